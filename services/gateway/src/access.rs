//! Who may read: bearer tokens (RFC 6750), JSON Web Tokens (RFC 7519) signed with a known key.

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tracing::{info, warn};
use warp::http::{HeaderMap, header};

use crate::problem::Problem;

/// How far the clocks of who signs and who checks may be apart.
const LEEWAY_S: u64 = 10;
/// A secret is as long as the hash that it keys (RFC 7518, section 3.2).
const MIN_SECRET: usize = 32;
/// More is no key file.
const MAX_FILE: u64 = 1024 * 1024;

/// Which tokens are accepted.
#[derive(clap::Args, Clone, Debug)]
pub struct AccessSettings {
    /// Ask every client for a token that is signed with this key: a file with a secret of 32 bytes
    /// or more (HS256), a public key in PEM (RS256, ES256, EdDSA), or a JWKS. SIGHUP reads it again
    #[arg(long, env = "EVENODD_JWT_KEY", value_name = "FILE", value_parser = key_file)]
    jwt_key: Option<PathBuf>,

    /// The audience (`aud`) that a token must have
    #[arg(long, env = "EVENODD_JWT_AUDIENCE", value_name = "NAME", requires = "jwt_key")]
    jwt_audience: Option<String>,

    /// The issuer (`iss`) that a token must have
    #[arg(long, env = "EVENODD_JWT_ISSUER", value_name = "NAME", requires = "jwt_key")]
    jwt_issuer: Option<String>,
}

/// Checks tokens.
pub struct Access {
    settings: AccessSettings,
    file: PathBuf,
    keys: RwLock<Vec<Key>>,
}

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
    /// What the settings ask for; `None` if they ask for nothing.
    ///
    /// # Errors
    /// If the key cannot be used.
    pub fn new(settings: AccessSettings) -> anyhow::Result<Option<Arc<Self>>> {
        let Some(file) = settings.jwt_key.clone() else {
            return Ok(None);
        };
        let keys = RwLock::new(read_keys(&file)?);
        Ok(Some(Arc::new(Self { settings, file, keys })))
    }

    /// Reads the key again at every SIGHUP. One that cannot be used changes nothing.
    ///
    /// # Errors
    /// If the signal cannot be listened to.
    pub async fn reload_on_hangup(&self) -> anyhow::Result<()> {
        let mut hangups = signal(SignalKind::hangup())?;
        while hangups.recv().await.is_some() {
            match read_keys(&self.file) {
                Ok(keys) => {
                    *self.keys.write().unwrap_or_else(std::sync::PoisonError::into_inner) = keys;
                    info!(file = %self.file.display(), "the key was read again");
                }
                Err(error) => warn!("the key stays as it was: {error:#}"),
            }
        }
        Ok(())
    }

    /// Checks the token of a request, and says when it expires.
    ///
    /// `token` is one from the query, for a client that cannot send headers.
    ///
    /// # Errors
    /// 401, without a hint as to what is wrong with a token.
    pub fn check(&self, headers: &HeaderMap, token: Option<&str>) -> Result<Instant, Problem> {
        let token = match headers.get(header::AUTHORIZATION) {
            Some(value) => bearer(value.to_str().unwrap_or_default()),
            None => token,
        };
        let token = token.ok_or_else(Problem::token_missing)?;
        self.valid_for(token).map(|left| Instant::now() + left).ok_or_else(Problem::token_invalid)
    }

    fn valid_for(&self, token: &str) -> Option<Duration> {
        let id = decode_header(token).ok()?.kid;
        let keys = self.keys.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = match (&**keys, &id) {
            // With one key it does not matter what it is called.
            ([key], _) if key.id.is_none() || id.is_none() => key,
            (keys, Some(_)) => keys.iter().find(|key| key.id == id)?,
            _ => return None,
        };
        // The key's algorithm, never the token's.
        let mut validation = Validation::new(key.algorithm);
        validation.leeway = LEEWAY_S;
        validation.validate_nbf = true;
        validation.validate_aud = self.settings.jwt_audience.is_some();
        let mut required = vec!["exp"];
        if let Some(audience) = &self.settings.jwt_audience {
            validation.set_audience(&[audience]);
            required.push("aud");
        }
        if let Some(issuer) = &self.settings.jwt_issuer {
            validation.set_issuer(&[issuer]);
            required.push("iss");
        }
        validation.set_required_spec_claims(&required);
        let claims = decode::<Claims>(token, &key.key, &validation).ok()?.claims;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let expires = Duration::try_from_secs_f64(claims.exp).unwrap_or(Duration::MAX);
        let expires = expires.saturating_add(Duration::from_secs(LEEWAY_S));
        // An instant has an end as well; nobody is connected for longer than a year.
        const LONGEST: Duration = Duration::from_secs(365 * 86_400);
        Some(expires.saturating_sub(now).min(LONGEST))
    }
}

/// A wrong key is a wrong setting, and reported with the others.
fn key_file(path: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(path);
    match read_keys(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(format!("{error:#}")),
    }
}

/// The token of an `Authorization` header.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn read_keys(file: &Path) -> anyhow::Result<Vec<Key>> {
    let read = || {
        let length = std::fs::metadata(file)?.len();
        ensure!(length <= MAX_FILE, "it is longer than {MAX_FILE} bytes");
        let content = std::fs::read(file)?;
        if content.starts_with(b"-----BEGIN") {
            return Ok(vec![pem_key(&content)?]);
        }
        if content.trim_ascii_start().starts_with(b"{") {
            return key_set(&content);
        }
        // A text file ends with a line break, which is nobody's secret.
        let secret = content.trim_ascii_end();
        ensure!(
            secret.len() >= MIN_SECRET,
            "a secret has {MIN_SECRET} bytes or more, this one has {}",
            secret.len()
        );
        Ok(vec![Key {
            id: None,
            key: DecodingKey::from_secret(secret),
            algorithm: Algorithm::HS256,
        }])
    };
    read().with_context(|| format!("{} cannot be used as a key", file.display()))
}

/// A public key. Its type, which stands in the file, gives the algorithm.
fn pem_key(content: &[u8]) -> anyhow::Result<Key> {
    /// An uncompressed point of P-256.
    const P256_POINT: usize = 65;
    let found = [
        (DecodingKey::from_rsa_pem(content), Algorithm::RS256),
        (DecodingKey::from_ec_pem(content), Algorithm::ES256),
        (DecodingKey::from_ed_pem(content), Algorithm::EdDSA),
    ]
    .into_iter()
    .find_map(|(key, algorithm)| Some((key.ok()?, algorithm)));
    let is_private = String::from_utf8_lossy(content).contains("PRIVATE KEY");
    ensure!(!is_private, "it is a private key; give the public one that belongs to it");
    let (key, algorithm) = found.context(
        "it is no public key of RSA, P-256 or Ed25519 (PEM, -----BEGIN PUBLIC KEY-----)",
    )?;
    if algorithm == Algorithm::ES256 {
        let length = key.try_get_as_bytes()?.len();
        ensure!(length == P256_POINT, "its curve is not P-256");
    }
    Ok(Key { id: None, key, algorithm })
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
        AlgorithmParameters::EllipticCurve(ec) if ec.curve == EllipticCurve::P256 => {
            Algorithm::ES256
        }
        AlgorithmParameters::OctetKeyPair(ed) if ed.curve == EllipticCurve::Ed25519 => {
            Algorithm::EdDSA
        }
        AlgorithmParameters::OctetKey(_) => Algorithm::HS256,
        _ => bail!("it is none of RSA, P-256, Ed25519 and a secret"),
    };
    let named = jwk.common.key_algorithm.map(|named| named.to_string());
    ensure!(
        named.as_ref().is_none_or(|named| *named == format!("{algorithm:?}")),
        "it is for {}, not for {algorithm:?}",
        named.unwrap_or_default()
    );
    let signs = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    ensure!(signs, "it is not for signatures");
    let key = DecodingKey::from_jwk(jwk)?;
    if algorithm == Algorithm::HS256 {
        ensure!(
            key.try_get_as_bytes()?.len() >= MIN_SECRET,
            "it is shorter than {MIN_SECRET} bytes"
        );
    }
    Ok(Key { id: jwk.common.key_id.clone(), key, algorithm })
}
