//! The key with which a process authenticates to the broker, and the authority whose broker
//! certificates it trusts.

use std::fmt::{self, Debug, Formatter};
use std::path::{Path, PathBuf};

use async_nats::ConnectOptions;
use async_nats::rustls::RootCertStore;
use async_nats::rustls::pki_types::CertificateDer;
use async_nats::rustls::pki_types::pem::PemObject;
use clap::Args;
use nkeys::{KeyPair, KeyPairType};

/// The credentials for the broker. `evenodd up` needs none: its broker listens on loopback only.
#[derive(Args, Clone, Debug, Default)]
pub struct Credentials {
    /// File with the seed of this user's nkey, as `evenodd keys` or `nsc` makes it
    #[arg(long, env = "EVENODD_NKEY", value_name = "FILE", value_parser = nkey)]
    nkey: Option<Nkey>,

    /// Require TLS and a broker certificate that this authority has signed: a PEM file
    #[arg(long, env = "EVENODD_TLS_CA", value_name = "FILE", value_parser = authority)]
    pub(crate) tls_ca: Option<PathBuf>,
}

impl Credentials {
    /// Adds the credentials to the options of a connection.
    pub(crate) fn apply(&self, mut options: ConnectOptions) -> ConnectOptions {
        if let Some(nkey) = &self.nkey {
            options = options.nkey(nkey.seed.clone());
        }
        if let Some(file) = &self.tls_ca {
            options = options.require_tls(true).add_root_certificates(file.clone());
        }
        options
    }

    /// The credentials as arguments for another process.
    #[must_use]
    pub fn to_args(&self) -> Vec<String> {
        let nkey = self.nkey.as_ref().map(|nkey| ("--nkey", &nkey.file));
        let tls_ca = self.tls_ca.as_ref().map(|file| ("--tls-ca", file));
        let both = [nkey, tls_ca].into_iter().flatten();
        both.flat_map(|(flag, file)| [flag.to_owned(), file.display().to_string()]).collect()
    }
}

/// The seed of an nkey, which is never printed, and the file it came from.
#[derive(Clone)]
struct Nkey {
    seed: String,
    file: PathBuf,
}

impl Debug for Nkey {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "Nkey({})", self.file.display())
    }
}

fn nkey(file: &str) -> Result<Nkey, String> {
    let content = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    let seed = content.trim();
    match KeyPair::from_seed(seed) {
        Ok(key) if key.key_pair_type() == KeyPairType::User => {
            Ok(Nkey { seed: seed.to_owned(), file: file.into() })
        }
        Ok(_) => Err("the file holds the seed of an nkey, but not of a user (SU...)".to_owned()),
        Err(_) => Err("the file holds no seed of an nkey (SU...)".to_owned()),
    }
}

fn authority(file: &str) -> Result<PathBuf, String> {
    let path = Path::new(file);
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| e.to_string())?;
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store.add(certificate).map_err(|e| e.to_string())?;
    }
    if store.is_empty() {
        return Err("the file holds no certificate in PEM format".to_owned());
    }
    Ok(path.to_owned())
}
