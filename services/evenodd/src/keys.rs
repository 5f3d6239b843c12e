//! `evenodd keys`: an nkey for every user of the broker, a certificate authority, and a
//! certificate for every server. It makes what is missing and leaves what is there as it is.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use async_nats::rustls::RootCertStore;
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, TrustAnchor};
use clap::Args;
use nkeys::KeyPair as Nkey;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use runtime::telemetry::print;
use time::{Duration, OffsetDateTime};

use crate::broker::USER;

/// The users that connect to the broker with a key. nats/cluster.conf says what each may do.
const USERS: [&str; 5] = ["even", "odd", "multiplier", "gateway", USER];

/// Twice as long as the system is meant to run: a certificate that expires is an outage.
const VALID: Duration = Duration::days(20 * 365);
/// Certificates are valid from a day ago, for servers whose clock is behind.
const VALID_BEFORE: Duration = Duration::days(1);

/// File modes.
const SECRET: u32 = 0o600;
const SECRET_OF_GROUP: u32 = 0o640;
const PUBLIC: u32 = 0o644;

/// Make the keys and certificates of a cluster, once
///
/// Makes what is missing in the directory and changes nothing that is there: USER.nk, the seed of each user's nkey; users.conf, their public keys, for the servers; ca.pem and ca.key, a certificate authority; SERVER.pem and SERVER.key for each server.
#[derive(Args, Debug)]
pub struct Keys {
    /// Where to put them
    #[arg(long, env = "EVENODD_KEYS", value_name = "DIRECTORY", default_value = "./keys")]
    directory: PathBuf,

    /// The host names or addresses of the servers, as clients and other servers call them
    #[arg(
        long,
        env = "EVENODD_SERVERS",
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "nats-1,nats-2,nats-3"
    )]
    servers: Vec<String>,

    /// Let a group read the secrets of a user or server: even=10001,nats-1=10011. This process must be a member of it
    #[arg(long, env = "EVENODD_GROUPS", value_name = "NAME=GID", value_delimiter = ',', value_parser = group)]
    groups: Vec<(String, u32)>,
}

fn group(text: &str) -> Result<(String, u32), String> {
    let (name, gid) = text.split_once('=').ok_or("it is something like even=10001")?;
    Ok((name.to_owned(), gid.parse().map_err(|e| format!("{gid}: {e}"))?))
}

impl Keys {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        for server in &self.servers {
            let is_host = !server.is_empty() && !server.contains('/');
            ensure!(is_host, "--servers: {server:?} is no host name");
            ensure!(server != "ca", "--servers: ca.pem and ca.key are the files of the authority");
        }
        for (name, _) in &self.groups {
            ensure!(
                USERS.contains(&name.as_str()) || self.servers.contains(name),
                "--groups: {name} is neither a user ({}) nor one of --servers",
                USERS.join(", ")
            );
        }
        fs::create_dir_all(&self.directory)
            .with_context(|| format!("cannot make {}", self.directory.display()))?;
        self.users()?;
        self.certificates()?;
        Ok(ExitCode::SUCCESS)
    }

    fn users(&self) -> anyhow::Result<()> {
        let mut public = String::from(
            "# The public keys of the users. Made by `evenodd keys`; nats/cluster.conf refers to them.\n",
        );
        for user in USERS {
            let file = format!("{user}.nk");
            let nkey = match self.read(&file)? {
                Some(seed) => Nkey::from_seed(seed.trim())
                    .with_context(|| format!("{file} holds no seed of an nkey"))?,
                None => {
                    let nkey = Nkey::new_user();
                    self.write_secret(&file, &nkey.seed()?, user)?;
                    nkey
                }
            };
            public += &format!("{}_KEY: \"{}\"\n", user.to_uppercase(), nkey.public_key());
        }
        if self.read("users.conf")?.as_ref() != Some(&public) {
            self.write("users.conf", &public, PUBLIC, None)?;
        }
        Ok(())
    }

    fn certificates(&self) -> anyhow::Result<()> {
        let exists = |file: String| self.directory.join(file).exists();
        let is_missing =
            |server: &&_| !exists(format!("{server}.pem")) || !exists(format!("{server}.key"));
        let missing: Vec<&String> = self.servers.iter().filter(is_missing).collect();
        let ca_pem = self.read("ca.pem")?;
        let ca_key = match (&ca_pem, self.read("ca.key")?) {
            (Some(_), _) if missing.is_empty() => return Ok(()),
            (_, Some(key)) => KeyPair::from_pem(&key).context("ca.key")?,
            (None, None) if missing.len() == self.servers.len() => {
                let key = KeyPair::generate()?;
                self.write("ca.key", &key.serialize_pem(), SECRET, None)?;
                key
            }
            (_, None) => bail!(
                "a certificate is missing and ca.key is not there: put it back, or remove all certificates"
            ),
        };
        let authority = CertifiedIssuer::self_signed(authority()?, ca_key)?;
        match ca_pem {
            // The same name and the same key: the certificates of the servers stay valid.
            None => self.write("ca.pem", &authority.pem(), PUBLIC, None)?,
            Some(pem) => ensure!(
                trust_anchor(&pem).context("ca.pem")? == trust_anchor(&authority.pem())?,
                "a certificate is missing, and ca.pem is not the certificate that was made here for \
                 ca.key: sign the missing one with the authority that ca.pem belongs to"
            ),
        }
        for server in missing {
            let key = KeyPair::generate()?;
            let certificate = certificate(server)?.signed_by(&key, &authority)?;
            self.write_secret(&format!("{server}.key"), &key.serialize_pem(), server)?;
            self.write(&format!("{server}.pem"), &certificate.pem(), PUBLIC, None)?;
        }
        Ok(())
    }

    fn read(&self, file: &str) -> anyhow::Result<Option<String>> {
        let path = self.directory.join(file);
        match fs::read_to_string(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes what only its owner may read, and the group that is set for `name`.
    fn write_secret(&self, file: &str, content: &str, name: &str) -> anyhow::Result<()> {
        let gid = self.groups.iter().find(|(of, _)| of == name).map(|(_, gid)| *gid);
        let mode = if gid.is_some() { SECRET_OF_GROUP } else { SECRET };
        self.write(file, content, mode, gid)
    }

    /// Writes the whole file or none of it. At no moment can more users read it than `mode` says.
    fn write(&self, file: &str, content: &str, mode: u32, gid: Option<u32>) -> anyhow::Result<()> {
        let path = self.directory.join(file);
        let unfinished = self.directory.join(format!("{file}.new"));
        let write = || {
            let mut options = OpenOptions::new();
            let mut new =
                options.write(true).create(true).truncate(true).mode(SECRET).open(&unfinished)?;
            new.write_all(content.as_bytes())?;
            chown(&unfinished, None, gid)?;
            new.set_permissions(Permissions::from_mode(mode))?;
            new.sync_all()?;
            fs::rename(&unfinished, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(print(format_args!("made {}", path.display()))?)
    }
}

/// What a client that trusts this certificate goes by: its name and its public key.
fn trust_anchor(pem: &str) -> anyhow::Result<Vec<TrustAnchor<'static>>> {
    let mut store = RootCertStore::empty();
    store.add(CertificateDer::from_pem_slice(pem.as_bytes())?)?;
    Ok(store.roots)
}

/// The certificate of the authority. Its name never changes: it is the issuer in the certificates
/// of the servers.
fn authority() -> anyhow::Result<CertificateParams> {
    let mut params = params("Evenodd", &[])?;
    // It may sign certificates of servers, but not of another authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok(params)
}

/// The certificate of a server.
fn certificate(server: &str) -> anyhow::Result<CertificateParams> {
    // An operator on the server's own machine uses the last two.
    let mut params = params(server, &[server, "localhost", "127.0.0.1"]).context("--servers")?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // When two servers of a cluster connect, one of them is the client.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

/// What all certificates have in common.
fn params(name: &str, hosts: &[&str]) -> anyhow::Result<CertificateParams> {
    let hosts: Vec<_> = hosts.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - VALID_BEFORE;
    params.not_after = OffsetDateTime::now_utc() + VALID;
    Ok(params)
}
