//! `evenodd token`: an access token, for trying out a gateway that asks for one.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use serde_json::json;

/// Make an access token for a gateway with --jwt-key
///
/// Prints a JSON Web Token (RFC 7519), to try a gateway out. In production tokens come from the service that signs users in.
#[derive(Args, Debug)]
pub struct Token {
    /// What to sign with: the file with the secret, or the private key in PEM (PKCS #8)
    #[arg(long, value_name = "FILE")]
    key: PathBuf,

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

impl Token {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let file = self.key.display();
        let content = std::fs::read(&self.key).with_context(|| {
            format!("cannot read {file}; `openssl rand -hex 32 > {file}` makes a secret")
        })?;
        let (key, algorithm) = if String::from_utf8_lossy(&content).contains("-----BEGIN") {
            [
                (EncodingKey::from_rsa_pem(&content), Algorithm::RS256),
                (EncodingKey::from_ec_pem(&content), Algorithm::ES256),
                (EncodingKey::from_ed_pem(&content), Algorithm::EdDSA),
            ]
            .into_iter()
            .find_map(|(key, algorithm)| Some((key.ok()?, algorithm)))
            .with_context(|| format!("{file} holds no private key of RSA, P-256 or Ed25519"))?
        } else {
            // As the gateway reads it: without the line break at the end.
            (EncodingKey::from_secret(content.trim_ascii_end()), Algorithm::HS256)
        };
        let now = get_current_timestamp();
        let mut claims = json!({ "iat": now, "exp": now + self.valid_s });
        if let Some(audience) = &self.audience {
            claims["aud"] = audience.as_str().into();
        }
        if let Some(issuer) = &self.issuer {
            claims["iss"] = issuer.as_str().into();
        }
        runtime::telemetry::print(encode(&Header::new(algorithm), &claims, &key)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
