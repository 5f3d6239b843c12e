//! `evenodd token`: an access token, for trying out a gateway that asks for one.

use std::fs;
use std::process::ExitCode;

use anyhow::Context;
use clap::{ArgGroup, Args};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use serde_json::json;

/// Make an access token for a gateway with --jwt-secret or --jwt-key
///
/// Prints a JSON Web Token (RFC 7519), to try a gateway out. In production tokens come from the service that signs users in.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("signer").args(["secret", "key"]).required(true))]
pub struct Token {
    /// Sign with the first secret in this file (HS256), for a gateway with --jwt-secret
    #[arg(long, value_name = "FILE", value_parser = secret)]
    secret: Option<Signer>,

    /// Sign with the private key in this file, in PEM (PKCS #8), for a gateway with --jwt-key
    #[arg(long, value_name = "FILE", value_parser = private_key)]
    key: Option<Signer>,

    /// The id of the key (kid)
    #[arg(long, value_name = "ID")]
    kid: Option<String>,

    /// The audience that the token is for (aud)
    #[arg(long, value_name = "NAME")]
    audience: Option<String>,

    /// The issuer of the token (iss)
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,

    /// How long the token is valid, in seconds
    #[arg(long, value_name = "S", default_value = "3600", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    valid_s: u64,
}

type Signer = (EncodingKey, Algorithm);

fn secret(file: &str) -> anyhow::Result<Signer> {
    let content = fs::read_to_string(file)?;
    let secret = content.lines().map(str::trim).find(|line| !line.is_empty());
    let secret = secret.context("it is empty; `openssl rand -hex 32` makes a secret")?;
    Ok((EncodingKey::from_secret(secret.as_bytes()), Algorithm::HS256))
}

fn private_key(file: &str) -> anyhow::Result<Signer> {
    let content = fs::read(file)?;
    let keys = [
        (EncodingKey::from_rsa_pem(&content), Algorithm::RS256),
        (EncodingKey::from_ec_pem(&content), Algorithm::ES256),
        (EncodingKey::from_ed_pem(&content), Algorithm::EdDSA),
    ];
    let key = keys.into_iter().find_map(|(key, algorithm)| Some((key.ok()?, algorithm)));
    key.context("it holds no private key of RSA, P-256 or Ed25519 in PEM")
}

impl Token {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let signer = self.secret.as_ref().or(self.key.as_ref());
        let (key, algorithm) = signer.context("give --secret or --key")?;
        let now = get_current_timestamp();
        let mut claims = json!({ "iat": now, "exp": now + self.valid_s });
        if let Some(audience) = &self.audience {
            claims["aud"] = audience.as_str().into();
        }
        if let Some(issuer) = &self.issuer {
            claims["iss"] = issuer.as_str().into();
        }
        let header = Header { kid: self.kid.clone(), ..Header::new(*algorithm) };
        runtime::telemetry::print(encode(&header, &claims, key)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
