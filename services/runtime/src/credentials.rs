//! The key with which a process authenticates to the broker, and the authority whose broker
//! certificates it trusts.

use std::path::PathBuf;

use anyhow::{Context, ensure};
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
    nkey: Option<KeyPair>,

    /// Require TLS and a broker certificate that this authority has signed: a PEM file
    #[arg(long, env = "EVENODD_TLS_CA", value_name = "FILE", value_parser = authority)]
    pub(crate) tls_ca: Option<PathBuf>,
}

impl Credentials {
    /// Adds the credentials to the options of a connection.
    pub(crate) fn apply(&self, mut options: ConnectOptions) -> ConnectOptions {
        // A key that was made of a seed has one.
        if let Some(seed) = self.nkey.as_ref().and_then(|nkey| nkey.seed().ok()) {
            options = options.nkey(seed);
        }
        if let Some(file) = &self.tls_ca {
            options = options.require_tls(true).add_root_certificates(file.clone());
        }
        options
    }
}

fn nkey(file: &str) -> anyhow::Result<KeyPair> {
    let content = std::fs::read_to_string(file)?;
    let key = KeyPair::from_seed(content.trim());
    let key = key.ok().context("the file holds no seed of an nkey (SU...)")?;
    let is_user = key.key_pair_type() == KeyPairType::User;
    ensure!(is_user, "the file holds the seed of an nkey, but not of a user (SU...)");
    Ok(key)
}

fn authority(file: &str) -> anyhow::Result<PathBuf> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file)? {
        store.add(certificate?)?;
    }
    ensure!(!store.is_empty(), "the file holds no certificate in PEM format");
    Ok(file.into())
}
