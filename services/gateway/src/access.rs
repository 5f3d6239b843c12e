//! Who may read: bearer tokens (RFC 6750), JSON Web Tokens (RFC 7519) signed with a known key.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ParsedPublicKey, RsaParameters};
use clap::ArgGroup;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind, Header, Validation, decode,
    decode_header,
};
use serde::Deserialize;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};
use warp::http::{HeaderMap, header};

use crate::problem::{self, Problem};

/// How far the clocks of the issuer and of this machine may be apart.
const LEEWAY: Duration = Duration::from_secs(10);
/// The maximum size of a key file.
const MAX_FILE: u64 = 1024 * 1024;
/// The maximum number of keys in a file. A token without a `kid` is checked with each of them.
const MAX_KEYS: usize = 32;

/// Which tokens are accepted. Secrets and public keys have a flag each: a public key that is taken
/// for a secret would let everybody sign tokens.
#[derive(clap::Args, Clone, Debug)]
#[command(group = ArgGroup::new("keys").args(["jwt_key", "jwt_secret"]).multiple(true))]
pub struct Access {
    /// Require a token from every client, signed with one of the public keys in this file: PEM
    /// (RS256, ES256, EdDSA) or a JWKS. SIGHUP reads it again
    #[arg(long, env = "EVENODD_JWT_KEY", value_name = "FILE")]
    jwt_key: Option<PathBuf>,

    /// Require a token from every client, signed with one of the secrets in this file: one a line,
    /// of 32 bytes or more (HS256). SIGHUP reads it again
    #[arg(long, env = "EVENODD_JWT_SECRET", value_name = "FILE")]
    jwt_secret: Option<PathBuf>,

    /// The audience (`aud`) that a token must have
    #[arg(long, env = "EVENODD_JWT_AUDIENCE", value_name = "NAME", requires = "keys")]
    jwt_audience: Option<String>,

    /// The issuer (`iss`) that a token must have
    #[arg(long, env = "EVENODD_JWT_ISSUER", value_name = "NAME", requires = "keys")]
    jwt_issuer: Option<String>,

    /// What was in the files when they were read last.
    #[arg(skip)]
    keys: Arc<watch::Sender<Keys>>,
}

/// Keys, or why one of them is not used.
type Keys = Vec<Result<Key, String>>;

#[derive(Debug)]
struct Key {
    id: Option<String>,
    key: DecodingKey,
    algorithm: Algorithm,
}

impl Access {
    /// Reads the keys.
    ///
    /// # Errors
    /// If one of the files cannot be used. Nothing changes then.
    pub fn read(&self) -> anyhow::Result<()> {
        let mut keys = Keys::new();
        let files: [(_, _, fn(&str) -> _); 2] = [
            ("--jwt-key", &self.jwt_key, public_keys),
            ("--jwt-secret", &self.jwt_secret, secrets),
        ];
        for (flag, file, parse) in files {
            let Some(file) = file else { continue };
            let what = || format!("{flag} {file:?} cannot be used");
            keys.extend(read(file, parse).with_context(what)?);
        }
        self.keys.send_replace(keys);
        Ok(())
    }

    /// Logs the keys, and reads them again at every SIGHUP, for ever.
    ///
    /// # Errors
    /// If the signal cannot be listened to.
    pub async fn reload_on_hangup(&self) -> anyhow::Result<Infallible> {
        let mut hangups = signal(SignalKind::hangup())?;
        loop {
            for key in &*self.keys.borrow() {
                match key {
                    Ok(Key { id, key, algorithm }) => {
                        let kind = key.family();
                        info!(?kind, ?algorithm, kid = id, "accepting tokens of this key");
                    }
                    Err(reason) => warn!("not used: {reason}"),
                }
            }
            hangups.recv().await;
            let access = self.clone();
            // A file system that hangs must not block the runtime.
            match tokio::task::spawn_blocking(move || access.read()).await? {
                Ok(()) => info!("SIGHUP: the keys for tokens were read again"),
                Err(error) => warn!("SIGHUP: the keys for tokens stay as they were: {error:#}"),
            }
        }
    }

    /// Checks the token of a request and returns when it expires; `None` if no token is needed.
    ///
    /// The first `Authorization: Bearer` counts. A proxy in front may have added other schemes.
    /// `token` is the one from the query, for clients that cannot send headers.
    ///
    /// # Errors
    /// 401, which does not say what is wrong with the token.
    pub fn check(
        &self,
        headers: &HeaderMap,
        token: Option<&str>,
    ) -> problem::Result<Option<Instant>> {
        if self.jwt_key.is_none() && self.jwt_secret.is_none() {
            return Ok(None);
        }
        let bearer = headers.get_all(header::AUTHORIZATION).iter().find_map(|value| {
            let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
        });
        let token = bearer.or(token).ok_or_else(Problem::token_missing)?;
        let left = self.valid_for(token).ok_or_else(Problem::token_invalid)?;
        // Also `None` if it expires later than an `Instant` can express.
        Ok(Instant::now().checked_add(left))
    }

    fn valid_for(&self, token: &str) -> Option<Duration> {
        let Header { alg, crit, kid, .. } = decode_header(token).ok()?;
        // No critical extension is supported (RFC 7515, section 4.1.11).
        if crit.is_some() {
            return None;
        }
        let mut validation = Validation::new(alg);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.validate_aud = self.jwt_audience.is_some();
        // `exp` is required by default.
        if let Some(audience) = &self.jwt_audience {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".to_owned());
        }
        if let Some(issuer) = &self.jwt_issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        // The algorithm comes from the key: a token that names another one does not fit.
        let fits = |key: &&Key| {
            key.algorithm == alg && (kid.is_none() || key.id.is_none() || key.id == kid)
        };
        let keys = self.keys.borrow();
        let mut fitting = keys.iter().flatten().filter(fits);
        let token = fitting.find_map(|key| decode::<Value>(token, &key.key, &validation).ok())?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let expires =
            Duration::try_from_secs_f64(token.claims["exp"].as_f64()?).unwrap_or(Duration::MAX);
        Some(expires.saturating_add(LEEWAY).saturating_sub(now))
    }
}

/// The keys of a file, at least one of which can be used.
fn read(file: &Path, parse: fn(&str) -> anyhow::Result<Keys>) -> anyhow::Result<Keys> {
    let about = std::fs::metadata(file)?;
    // A pipe, for instance, can be read only once and may block.
    ensure!(about.is_file(), "it is not a regular file");
    ensure!(about.len() <= MAX_FILE, "it is longer than {MAX_FILE} bytes");
    let keys = parse(&String::from_utf8_lossy(&std::fs::read(file)?))?;
    ensure!(keys.len() <= MAX_KEYS, "it holds more than {MAX_KEYS} keys");
    let faults: Vec<_> = keys.iter().filter_map(|key| key.as_ref().err()).collect();
    ensure!(faults.len() < keys.len(), "none of its keys can be used {faults:?}");
    Ok(keys)
}

/// Secrets, one a line.
fn secrets(text: &str) -> anyhow::Result<Keys> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let secret = |line: &str| {
        let is_secret = line.bytes().all(|byte| byte.is_ascii_graphic()) && !is_public(line);
        let what = "a line is no secret, or could be a public key or a token; \
            give public keys with --jwt-key";
        ensure!(is_secret, what);
        Ok(Ok(Key::new(None, DecodingKey::from_secret(line.as_bytes()))?))
    };
    lines.map(secret).collect()
}

/// Whether a line begins as a public key, a token or an address does, as it is or in base64.
fn is_public(line: &str) -> bool {
    // The last four are DER in hexadecimal.
    const BEGINNINGS: &str = "----- LS0t { ew ey [ \" ssh- c3No ecdsa- AAAA http \
        3081 3082 302a3005 30593013";
    // DER in base64: a long sequence, or a short one that begins with another sequence.
    let is_der = matches!(line.as_bytes(), [b'M', b'I', ..] | [b'M', b'A'..=b'P', _, b'w', ..]);
    is_der || BEGINNINGS.split(' ').any(|beginning| line.starts_with(beginning))
}

/// The keys of a JWKS (RFC 7517), or of a file with one or more public keys in PEM.
fn public_keys(text: &str) -> anyhow::Result<Keys> {
    if text.trim_start().starts_with('{') {
        let set: Value = serde_json::from_str(text).context("it is no JWKS")?;
        let keys = set["keys"].as_array().context("it is no JWKS: it has no \"keys\"")?;
        let key = |jwk: &Value| {
            let id = jwk["kid"].as_str().unwrap_or("without a kid");
            set_key(jwk).map_err(|error| format!("key {id}: {error:#}"))
        };
        return Ok(keys.iter().map(key).collect());
    }
    let (_, blocks) = text
        .split_once("-----BEGIN")
        .context("it is neither PEM nor a JWKS; give a secret with --jwt-secret")?;
    blocks.split("-----BEGIN").map(|block| Ok(Ok(pem_key(block)?))).collect()
}

/// A public key. Its type determines the algorithm.
fn pem_key(block: &str) -> anyhow::Result<Key> {
    let label = block.split("-----").next().unwrap_or_default().trim();
    ensure!(
        label.ends_with("PUBLIC KEY"),
        "it holds a {label} in PEM; only public keys belong here"
    );
    let pem = format!("-----BEGIN{block}");
    let key = DecodingKey::from_rsa_pem(pem.as_bytes())
        .or_else(|_| DecodingKey::from_ec_pem(pem.as_bytes()))
        .or_else(|_| DecodingKey::from_ed_pem(pem.as_bytes()));
    Key::new(None, key.ok().context("it holds no public key of RSA, P-256 or Ed25519")?)
}

fn set_key(jwk: &Value) -> anyhow::Result<Key> {
    let field = |name: &str| jwk[name].as_str();
    ensure!(field("d").is_none(), "it is a private key; only public keys belong here");
    ensure!(field("use").is_none_or(|usage| usage == "sig"), "it is not for signatures");
    // The library takes the curve of a key for granted.
    let is_known = matches!(
        (field("kty"), field("crv")),
        (Some("RSA" | "oct"), _) | (Some("EC"), Some("P-256")) | (Some("OKP"), Some("Ed25519"))
    );
    ensure!(is_known, "it is none of RSA, P-256, Ed25519 and oct");
    let key = DecodingKey::from_jwk(&Jwk::deserialize(jwk)?)?;
    let key = Key::new(field("kid").map(str::to_owned), key)?;
    let algorithm = format!("{:?}", key.algorithm);
    let named = field("alg").unwrap_or(&algorithm);
    ensure!(named == algorithm, "it is for {named}, not for {algorithm}");
    Ok(key)
}

impl Key {
    /// A key with the algorithm of its type.
    ///
    /// # Errors
    /// If the algorithm cannot use the key.
    fn new(id: Option<String>, key: DecodingKey) -> anyhow::Result<Self> {
        use Algorithm::{ES256, EdDSA, HS256, RS256};
        use AlgorithmFamily::{Ec, Ed, Hmac, Rsa};
        let (bytes, modulus) = match key.kind() {
            DecodingKeyKind::SecretOrDer(bytes) => {
                (bytes, RsaParameters::public_modulus_len(bytes).ok())
            }
            DecodingKeyKind::RsaModulusExponent { n, .. } => (n, u32::try_from(n.len() * 8).ok()),
        };
        let (algorithm, fits, needs) = match key.family() {
            // As long as the hash that it keys (RFC 7518, section 3.2).
            Hmac => (HS256, bytes.len() >= 32, "a secret has 32 bytes or more"),
            Rsa => {
                let fits = modulus.is_some_and(|bits| (2048..=8192).contains(&bits));
                (RS256, fits, "an RSA key has 2048 to 8192 bits")
            }
            Ec => {
                let fits = ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, bytes).is_ok();
                (ES256, fits, "the curve must be P-256")
            }
            Ed => (EdDSA, bytes.len() == 32, "the curve must be Ed25519"),
        };
        ensure!(fits, needs);
        Ok(Self { id, key, algorithm })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use serde_json::json;

    /// Whether the keys of this text can be used.
    fn all_used(keys: anyhow::Result<Keys>) -> bool {
        keys.is_ok_and(|keys| keys.iter().all(Result::is_ok))
    }

    #[test]
    fn a_secret_is_any_line_that_nobody_else_has() {
        for secret in [
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
            "q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k",
            "Tr0ub4dor&3,correct{horse}battery~staple",
            "\r\n  0123456789abcdef0123456789abcdef \r\n\r\nfedcba9876543210fedcba9876543210\r\n",
        ] {
            assert!(all_used(secrets(secret)), "{secret:?}");
        }
    }

    #[test]
    fn what_others_may_know_is_no_secret() {
        for line in [
            "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA3chrv4", // RSA (SPKI)
            "MIIBCgKCAQEA3chrv4+zFNZh0iXnuWCJyL3+Z9kX/zj06CWz",   // RSA (PKCS #1)
            "MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQC9dUx35FhbUd", // RSA of 1024 bits
            "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEdzEjj4Qm1PQ3U1", // P-256
            "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEdzEjj4Qm1PQ3U1FvcC", // P-384
            "MDkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDIgACYxZ1wS2XcTzBM7", // P-256, a compressed point
            "302a300506032b657003210077ad8d40e33dc7e1258cf0c25d67", // Ed25519 in hexadecimal
            "30820122300d06092a864886f70d01010105000382010f003082", // RSA in hexadecimal
            "MCowBQYDK2VwAyEAd62NQOM9x-EljPDCXWdiK_AIGYFlmwPPi1", // Ed25519, base64url
            "MIIDCTCCAfGgAwIBAgIUX5Zq7z0BoFJMzuq9QYl1gWc0zqUwDQ", // a certificate
            "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQ", // a private key
            "\"MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA3ch\",", // a value in JSON
            "AAAAB3NzaC1yc2EAAAADAQABAAABgQDdyGu/j7MU1mHSJee5YI", // ssh-rsa, its second word
            "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQDdyGu/j7MU1m",
            "c3NoLXJzYSBBQUFBQjNOemFDMXljMkVBQUFBREFRQUJBQUFCZ1", // the same in base64
            "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKo",
            "LS0tLS1CRUdJTiBQVUJMSUMgS0VZLS0tLS0KTUZrd0V3WUhLb1", // PEM in base64
            "{\"kty\":\"RSA\",\"n\":\"3chrv4_zFNZh0iXnuWCJyL3-Z9kX\"}",
            "{\n  \"keys\": []\n}\n0123456789abcdef0123456789abcdef",
            "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjF9.q83vASNFZ4mrze8B", // a token
            "https://login.example.com/realms/one/protocol/certs",
            "0123456789abcdef 0123456789abcdef",
            "0123456789abcdef0123456789abcde\u{e9}",
            "0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}0\u{6}0\u{1}",
            "0123456789abcdef0123456789abcdef\nshort",
        ] {
            assert!(secrets(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn a_key_on_another_curve_is_not_used() {
        for pem in [
            // secp256k1, whose points are as long as those of P-256
            "MFYwEAYHKoZIzj0CAQYFK4EEAAoDQgAEdzEjj4Qm1PQ3U1FvcCryew/BA/KoJQTIkJpuSXL969W5eUVISY6GDF7A0sxOC8FUwJCWhhC87xKesqILOYBkXw==",
            // X25519, as long as Ed25519
            "MCowBQYDK2VuAyEAd62NQOM9x+EljPDCXWdiK/AIGYFlmwPPi1VnR5JPSE0=",
            // Ed448
            "MEMwBQYDK2VxAzoARDcGYVh2gOXqhK2YStYlEXKw7X6gJRf9DdkBLrOe6svsy9LTb4cEMfAQbXLvVBSFr8+tneBCM6oA",
            // RSA of 1984 bits
            "MIIBGTANBgkqhkiG9w0BAQEFAAOCAQYAMIIBAQKB+QC+dUx35FhbUdVA3f9c2/gjzrfKCm3tsCqKMLgyrEZjfIHXnj6slcdrxZVbFXh6PUifKhq8/69zPd6VJBGhms3NczU1hUOQ4P/u/Ed7a7yB5ga3tYp/4TK1EuQu7GRasmoA71zJsMOdvcRtFsGbspM11gtTR0w6wDXKyLOy4J3WDnSRjhgHqo+9McNLa5NYIXwrJDOL8QK0m3L8WMsUlrmQCcZiqotEOCos+CRNv2tuBrQL1m+sB6fVb5gYSIi0doZrndqoGI5cGW/h5NGYsrQ3/POuAOC8gVoyR0oWJpOcTRz4oewOcDRcLohLcu3jAjtEjZsQ7xZpMQIDAQAB",
        ] {
            let pem = format!("-----BEGIN PUBLIC KEY-----\n{pem}\n-----END PUBLIC KEY-----\n");
            assert!(public_keys(&pem).is_err(), "{pem}");
        }
        let x = "dzEjj4Qm1PQ3U1FvcCryew_BA_KoJQTIkJpuSXL969U";
        let y = "uXlFSEmOhgxewNLMTgvBVMCQloYQvO8SnrKiCzmAZF8";
        let base64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let n = base64(&[0xab; 256]);
        for jwk in [
            json!({ "kty": "EC", "crv": "P-256", "x": x, "y": y }),
            json!({ "kty": "EC", "crv": "secp256k1", "x": x, "y": y }),
            json!({ "kty": "EC", "crv": "P-384", "x": x, "y": y }),
            json!({ "kty": "OKP", "crv": "X25519", "x": x }),
            json!({ "kty": "OKP", "crv": "Ed448", "x": x }),
            json!({ "kty": "OKP", "crv": "P-256", "x": x }),
            json!({ "kty": "OKP", "crv": "Ed25519", "x": "AAAA" }),
            json!({ "kty": "RSA", "n": base64(&[0xab; 255]), "e": "AQAB" }),
            json!({ "kty": "RSA", "n": base64(&[0xab; 1025]), "e": "AQAB" }),
            json!({ "kty": "RSA", "n": n, "e": "AQAB", "d": "AQAB" }),
            json!({ "kty": "RSA", "n": n, "e": "AQAB", "use": "enc" }),
            json!({ "kty": "RSA", "n": n, "e": "AQAB", "alg": "PS256" }),
            json!({ "kty": "oct", "k": "AAAA" }),
            json!({ "kid": 7 }),
            json!("RSA"),
        ] {
            let good = json!({ "kty": "OKP", "crv": "Ed25519", "x": x, "kid": "good" });
            let set = json!({ "keys": [jwk, good] }).to_string();
            let keys = public_keys(&set).unwrap();
            assert!(keys[0].is_err() && keys[1].is_ok(), "{jwk}: {keys:?}");
        }
        let good = json!({ "keys": [{ "kty": "RSA", "n": n, "e": "AQAB", "use": "sig", "alg": "RS256" }] });
        assert!(all_used(public_keys(&good.to_string())));
    }
}
