//! Who may read: bearer tokens (RFC 6750), JSON Web Tokens (RFC 7519) signed with a known key.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, Validation, decode, decode_header};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};
use warp::http::{HeaderMap, header};

use crate::problem::Problem;

/// How far the clocks of who signs and who checks may be apart.
const LEEWAY: Duration = Duration::from_secs(10);
/// A secret is as long as the hash that it keys (RFC 7518, section 3.2).
const MIN_SECRET: usize = 32;
/// More is no key file.
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

/// The only claim that is of use here; the others are checked by the library.
#[derive(Deserialize)]
struct Claims {
    exp: f64,
}

impl Access {
    /// Reads the key again at every SIGHUP, for ever. One that cannot be used changes nothing.
    ///
    /// # Errors
    /// If the signal cannot be listened to.
    pub async fn reload_on_hangup(&self) -> anyhow::Result<Infallible> {
        let Some(file) = self.jwt_key.clone() else {
            return std::future::pending().await;
        };
        let mut hangups = signal(SignalKind::hangup())?;
        loop {
            hangups.recv().await;
            let path = file.path.clone();
            // On a file system that hangs, this waits and nobody else does.
            match tokio::task::spawn_blocking(move || read_keys(&path)).await? {
                Ok(keys) => {
                    file.keys.send_replace(keys);
                    info!(file = %file.path.display(), "the key was read again");
                }
                Err(error) => warn!("the key stays as it was: {error:#}"),
            }
        }
    }

    /// Checks the token of a request, and says when it expires; `None` if none is asked for.
    ///
    /// `token` is one from the query, for a client that cannot send headers.
    ///
    /// # Errors
    /// 401, without a hint as to what is wrong with a token.
    pub fn check(
        &self,
        headers: &HeaderMap,
        token: Option<&str>,
    ) -> Result<Option<Instant>, Problem> {
        let Some(file) = &self.jwt_key else { return Ok(None) };
        let token = match headers.get(header::AUTHORIZATION) {
            Some(value) => bearer(value.to_str().unwrap_or_default()),
            None => token,
        };
        let token = token.ok_or_else(Problem::token_missing)?;
        let left = self.valid_for(&file.keys.borrow(), token);
        // None as well if it expires later than an instant can say.
        Ok(Instant::now().checked_add(left.ok_or_else(Problem::token_invalid)?))
    }

    fn valid_for(&self, keys: &[Key], token: &str) -> Option<Duration> {
        let token_header = decode_header(token).ok()?;
        // What a token holds to be critical is not understood here (RFC 7515, section 4.1.11).
        if token_header.crit.is_some() {
            return None;
        }
        let id = token_header.kid;
        let key = match (keys, &id) {
            // With one key it does not matter what it is called.
            ([key], _) if key.id.is_none() || id.is_none() => key,
            (keys, Some(_)) => keys.iter().find(|key| key.id == id)?,
            _ => return None,
        };
        // The key's algorithm, never the token's.
        let mut validation = Validation::new(key.algorithm);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.validate_aud = self.jwt_audience.is_some();
        let mut required = vec!["exp"];
        if let Some(audience) = &self.jwt_audience {
            validation.set_audience(&[audience]);
            required.push("aud");
        }
        if let Some(issuer) = &self.jwt_issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        let claims = decode::<Claims>(token, &key.key, &validation).ok()?.claims;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let expires = Duration::try_from_secs_f64(claims.exp).unwrap_or(Duration::MAX);
        Some(expires.saturating_add(LEEWAY).saturating_sub(now))
    }
}

/// A wrong key is a wrong setting, and reported with the others.
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
        // A pipe, for instance, can be read only once, and may make us wait.
        ensure!(about.is_file(), "it is not a regular file");
        ensure!(about.len() <= MAX_FILE, "it is longer than {MAX_FILE} bytes");
        let content = std::fs::read(file)?;
        if String::from_utf8_lossy(&content).contains("-----BEGIN") {
            return Ok(vec![pem_key(&content)?]);
        }
        if content.trim_ascii_start().starts_with(b"{") {
            return key_set(&content);
        }
        // A text file ends with a line break, which is nobody's secret.
        let secret = content.trim_ascii_end();
        // A public key in another form than PEM would otherwise become a secret that all know.
        ensure!(
            secret.iter().all(|byte| (b' '..=b'~').contains(byte)),
            "it is no PEM, no JWKS, and no secret, which is one line of text"
        );
        Ok(vec![Key::new(None, DecodingKey::from_secret(secret), Algorithm::HS256)?])
    };
    read().with_context(|| format!("the file {file:?} cannot be used as a key"))
}

/// A public key. Its type, which stands in the file, gives the algorithm.
fn pem_key(content: &[u8]) -> anyhow::Result<Key> {
    let is_private = String::from_utf8_lossy(content).contains("PRIVATE KEY");
    ensure!(!is_private, "it is a private key; give the public one that belongs to it");
    let (key, algorithm) = [
        (DecodingKey::from_rsa_pem(content), Algorithm::RS256),
        (DecodingKey::from_ec_pem(content), Algorithm::ES256),
        (DecodingKey::from_ed_pem(content), Algorithm::EdDSA),
    ]
    .into_iter()
    .find_map(|(key, algorithm)| Some((key.ok()?, algorithm)))
    .context("it is no public key of RSA, P-256 or Ed25519 (PEM, -----BEGIN PUBLIC KEY-----)")?;
    Key::new(None, key, algorithm)
}

/// The keys of a JWKS (RFC 7517) that can be used here; the others are left out, with a word.
fn key_set(content: &[u8]) -> anyhow::Result<Vec<Key>> {
    let set: JwkSet = serde_json::from_slice(content).context("it is no JWKS")?;
    let mut keys = Vec::new();
    for jwk in &set.keys {
        match set_key(jwk) {
            Ok(key) => keys.push(key),
            Err(error) => {
                let id = jwk.common.key_id.as_deref().unwrap_or("without an id");
                warn!("the key {id} of the JWKS is not used: {error:#}");
            }
        }
    }
    ensure!(!keys.is_empty(), "none of its keys can be used");
    Ok(keys)
}

fn set_key(jwk: &Jwk) -> anyhow::Result<Key> {
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(_) => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(_) => Algorithm::EdDSA,
        AlgorithmParameters::OctetKey(_) => Algorithm::HS256,
        _ => bail!("its type is not known"),
    };
    if let Some(named) = jwk.common.key_algorithm {
        let same = named.to_string() == format!("{algorithm:?}");
        ensure!(same, "it is for {named}, not for {algorithm:?}");
    }
    let signs = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    ensure!(signs, "it is not for signatures");
    Key::new(jwk.common.key_id.clone(), DecodingKey::from_jwk(jwk)?, algorithm)
}

impl Key {
    /// A key with which a token can be right at all: its length fits its algorithm.
    fn new(id: Option<String>, key: DecodingKey, algorithm: Algorithm) -> anyhow::Result<Self> {
        let length = match key.kind() {
            DecodingKeyKind::SecretOrDer(bytes) => bytes.len(),
            DecodingKeyKind::RsaModulusExponent { n, .. } => n.len(),
        };
        let (fits, what) = match algorithm {
            Algorithm::HS256 => (length >= MIN_SECRET, "a secret has 32 bytes or more"),
            Algorithm::RS256 => (length >= 2048 / 8, "an RSA key has 2048 bits or more"),
            // An uncompressed point: a byte and two coordinates.
            Algorithm::ES256 => (length == 1 + 32 + 32, "the curve must be P-256"),
            _ => (length == 32, "the curve must be Ed25519"),
        };
        ensure!(fits, "{what}, and this one {length} bytes");
        Ok(Self { id, key, algorithm })
    }
}
