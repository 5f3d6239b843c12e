//! Who may read: bearer tokens (RFC 6750), JSON Web Tokens (RFC 7519) signed with a known key.

use std::convert::Infallible;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind, Header, Validation, decode,
    decode_header,
};
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

/// Which tokens are accepted.
#[derive(clap::Args, Clone, Debug)]
pub struct Access {
    /// Ask every client for a token that is signed with this key: a file with a secret of 32 bytes
    /// or more (HS256), a public key in PEM (RS256, ES256, EdDSA), or a JWKS. SIGHUP reads it again
    #[arg(long, env = "EVENODD_JWT_KEY", value_name = "FILE", value_parser = key_file)]
    jwt_key: Option<Arc<KeyFile>>,

    /// The audience (`aud`) that a token must have
    #[arg(long, env = "EVENODD_JWT_AUDIENCE", value_name = "NAME", requires = "jwt_key")]
    jwt_audience: Option<String>,

    /// The issuer (`iss`) that a token must have
    #[arg(long, env = "EVENODD_JWT_ISSUER", value_name = "NAME", requires = "jwt_key")]
    jwt_issuer: Option<String>,
}

/// A file, and the keys that were in it when it was read last.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    keys: watch::Sender<Vec<Key>>,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    key: DecodingKey,
    algorithm: Algorithm,
}

impl Access {
    /// Reads the key file again at every SIGHUP, for ever. A key that cannot be used changes
    /// nothing.
    ///
    /// # Errors
    /// If the signal cannot be listened to.
    pub async fn reload_on_hangup(&self) -> anyhow::Result<Infallible> {
        let Some(file) = self.jwt_key.clone() else { return pending().await };
        let mut hangups = signal(SignalKind::hangup())?;
        loop {
            hangups.recv().await;
            let path = file.path.clone();
            // A file system that hangs must not block the runtime.
            match tokio::task::spawn_blocking(move || read_keys(&path)).await? {
                Ok(keys) => {
                    file.keys.send_replace(keys);
                    info!(file = %file.path.display(), "the key was read again");
                }
                Err(error) => warn!("the key stays as it was: {error:#}"),
            }
        }
    }

    /// Checks the token of a request and returns when it expires; `None` if no token is needed.
    ///
    /// `token` is the one from the query, for clients that cannot send headers.
    ///
    /// # Errors
    /// 401, which does not say what is wrong with the token.
    pub fn check(
        &self,
        headers: &HeaderMap,
        token: Option<&str>,
    ) -> problem::Result<Option<Instant>> {
        let Some(file) = &self.jwt_key else { return Ok(None) };
        let token = match headers.get(header::AUTHORIZATION) {
            Some(value) => bearer(value.to_str().unwrap_or_default()),
            None => token,
        };
        let token = token.ok_or_else(Problem::token_missing)?;
        let left = self.valid_for(&file.keys.borrow(), token);
        // Also `None` if it expires later than an `Instant` can express.
        Ok(Instant::now().checked_add(left.ok_or_else(Problem::token_invalid)?))
    }

    fn valid_for(&self, keys: &[Key], token: &str) -> Option<Duration> {
        let Header { crit, kid, .. } = decode_header(token).ok()?;
        // No critical extension is supported (RFC 7515, section 4.1.11).
        if crit.is_some() {
            return None;
        }
        let key = match keys {
            // A single key needs no id.
            [key] if key.id.is_none() || kid.is_none() => key,
            keys => keys.iter().find(|key| key.id.is_some() && key.id == kid)?,
        };
        // The algorithm comes from the key, never from the token.
        let mut validation = Validation::new(key.algorithm);
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
        let claims = decode::<Value>(token, &key.key, &validation).ok()?.claims;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let expires = Duration::try_from_secs_f64(claims["exp"].as_f64()?).unwrap_or(Duration::MAX);
        Some(expires.saturating_add(LEEWAY).saturating_sub(now))
    }
}

/// For clap, which reports an unusable key like any other wrong setting.
fn key_file(path: &str) -> Result<Arc<KeyFile>, String> {
    let path = PathBuf::from(path);
    let keys = read_keys(&path).map_err(|error| format!("{error:#}"))?;
    Ok(Arc::new(KeyFile { path, keys: watch::Sender::new(keys) }))
}

/// The token of an `Authorization` header.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn read_keys(file: &Path) -> anyhow::Result<Vec<Key>> {
    let read = || {
        let about = std::fs::metadata(file)?;
        // A pipe, for instance, can be read only once and may block.
        ensure!(about.is_file(), "it is not a regular file");
        ensure!(about.len() <= MAX_FILE, "it is longer than {MAX_FILE} bytes");
        let content = std::fs::read(file)?;
        if String::from_utf8_lossy(&content).contains("-----BEGIN") {
            return Ok(vec![pem_key(&content)?]);
        }
        if content.trim_ascii_start().starts_with(b"{") {
            return key_set(&content);
        }
        // The line break at the end of a text file is not part of the secret.
        let secret = content.trim_ascii_end();
        // A public key in another format, such as DER, must not become a shared secret.
        let is_line = secret.iter().all(|byte| (b' '..=b'~').contains(byte));
        ensure!(is_line, "it is no PEM, no JWKS, and no secret, which is one line of text");
        Ok(vec![Key::new(None, DecodingKey::from_secret(secret))?])
    };
    read().with_context(|| format!("the file {file:?} cannot be used as a key"))
}

/// A public key. Its type determines the algorithm.
fn pem_key(content: &[u8]) -> anyhow::Result<Key> {
    let is_private = String::from_utf8_lossy(content).contains("PRIVATE KEY");
    ensure!(!is_private, "it is a private key; give the public one that belongs to it");
    let key = DecodingKey::from_rsa_pem(content)
        .or_else(|_| DecodingKey::from_ec_pem(content))
        .or_else(|_| DecodingKey::from_ed_pem(content));
    let what = "it is no public key of RSA, P-256 or Ed25519 (PEM, -----BEGIN PUBLIC KEY-----)";
    Key::new(None, key.ok().context(what)?)
}

/// The usable keys of a JWKS (RFC 7517). Others are logged and skipped.
fn key_set(content: &[u8]) -> anyhow::Result<Vec<Key>> {
    let set: JwkSet = serde_json::from_slice(content).context("it is no JWKS")?;
    let mut keys = Vec::new();
    for jwk in &set.keys {
        let id = jwk.common.key_id.as_deref().unwrap_or("without an id");
        match set_key(jwk) {
            Ok(key) => keys.push(key),
            Err(error) => warn!("the key {id} of the JWKS is not used: {error:#}"),
        }
    }
    ensure!(!keys.is_empty(), "none of its keys can be used");
    Ok(keys)
}

fn set_key(jwk: &Jwk) -> anyhow::Result<Key> {
    let signs = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    ensure!(signs, "it is not for signatures");
    let key = Key::new(jwk.common.key_id.clone(), DecodingKey::from_jwk(jwk)?)?;
    if let Some(named) = jwk.common.key_algorithm {
        let algorithm = key.algorithm;
        ensure!(named == algorithm.into(), "it is for {named}, not for {algorithm:?}");
    }
    Ok(key)
}

impl Key {
    /// A key with the algorithm of its type.
    ///
    /// # Errors
    /// If the key does not have the length that the algorithm needs.
    fn new(id: Option<String>, key: DecodingKey) -> anyhow::Result<Self> {
        let length = match key.kind() {
            DecodingKeyKind::SecretOrDer(bytes) => bytes.len(),
            DecodingKeyKind::RsaModulusExponent { n, .. } => n.len(),
        };
        use Algorithm::{ES256, EdDSA, HS256, RS256};
        let (algorithm, fits, what) = match key.family() {
            // As long as the hash that it keys (RFC 7518, section 3.2).
            AlgorithmFamily::Hmac => (HS256, length >= 32, "a secret has 32 bytes or more"),
            AlgorithmFamily::Rsa => (RS256, length >= 2048 / 8, "an RSA key has 2048 bits or more"),
            // An uncompressed point: a byte and two coordinates.
            AlgorithmFamily::Ec => (ES256, length == 1 + 32 + 32, "the curve must be P-256"),
            AlgorithmFamily::Ed => (EdDSA, length == 32, "the curve must be Ed25519"),
        };
        ensure!(fits, "{what}, and this one {length} bytes");
        Ok(Self { id, key, algorithm })
    }
}
