//! `evenodd keys`: an nkey for every user of the broker, a certificate authority, and a
//! certificate for every server. Each is made once; what is there is left as it is.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use async_nats::rustls::pki_types::CertificateDer;
use async_nats::rustls::pki_types::pem::PemObject;
use clap::Args;
use nkeys::KeyPair as Nkey;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::USER;

/// Who connects to the broker with a key. nats/cluster.conf says what each may do.
const USERS: [&str; 5] = ["even", "odd", "multiplier", "gateway", USER];

/// Twice as long as the system is meant to run: a certificate that ends is an outage with a date.
const VALID: Duration = Duration::days(20 * 365);
/// For servers whose clock is behind.
const VALID_BEFORE: Duration = Duration::days(1);

/// The name of our authority.
const AUTHORITY: &str = "Evenodd";

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
        let known = |name: &str| USERS.contains(&name) || self.servers.iter().any(|s| s == name);
        if let Some(name) = self.servers.iter().find(|name| name.is_empty() || name.contains('/')) {
            bail!("--servers: {name:?} is no host name");
        }
        if let Some((name, _)) = self.groups.iter().find(|(name, _)| !known(name)) {
            bail!("--groups: {name} is neither a user ({}) nor one of --servers", USERS.join(", "));
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
                    self.write(&file, &nkey.seed()?, self.group_of(user))?;
                    nkey
                }
            };
            public += &format!("{}_KEY: \"{}\"\n", user.to_uppercase(), nkey.public_key());
        }
        if self.read("users.conf")?.as_ref() != Some(&public) {
            self.write("users.conf", &public, Access::All)?;
        }
        Ok(())
    }

    fn certificates(&self) -> anyhow::Result<()> {
        let mut missing = Vec::new();
        for server in &self.servers {
            let [certificate, key] = [".pem", ".key"].map(|end| format!("{server}{end}"));
            if self.read(&certificate)?.is_none() || self.read(&key)?.is_none() {
                missing.push((server, certificate, key));
            }
        }
        let authority = match self.read("ca.pem")? {
            Some(_) if missing.is_empty() => return Ok(()),
            Some(certificate) => {
                let key = self.read("ca.key")?.context(
                    "a certificate is missing and ca.key is not there: put it back, or remove all certificates",
                )?;
                let key = KeyPair::from_pem(&key).context("ca.key")?;
                let certificate = CertificateDer::from_pem_slice(certificate.as_bytes());
                let certificate = certificate.context("ca.pem")?;
                let has = |part: &[u8]| certificate.windows(part.len()).any(|bytes| bytes == part);
                ensure!(
                    has(key.public_key_raw()) && has(AUTHORITY.as_bytes()),
                    "a certificate is missing, and ca.pem is not the certificate that was made here for \
                     ca.key: sign it with the authority that ca.pem is of"
                );
                Issuer::new(authority()?, key)
            }
            None => {
                let key = match self.read("ca.key")? {
                    // Its certificate can be made again, and those that it has signed stay valid.
                    Some(key) => KeyPair::from_pem(&key).context("ca.key")?,
                    None => {
                        ensure!(
                            missing.len() == self.servers.len(),
                            "there are certificates, and neither ca.pem nor ca.key: put these back, or \
                             remove all certificates"
                        );
                        let key = KeyPair::generate()?;
                        self.write("ca.key", &key.serialize_pem(), Access::Own)?;
                        key
                    }
                };
                let certificate = authority()?.self_signed(&key)?;
                self.write("ca.pem", &certificate.pem(), Access::All)?;
                Issuer::new(authority()?, key)
            }
        };
        for (server, certificate_file, key_file) in missing {
            let key = KeyPair::generate()?;
            let certificate = certificate(server)?.signed_by(&key, &authority)?;
            self.write(&key_file, &key.serialize_pem(), self.group_of(server))?;
            self.write(&certificate_file, &certificate.pem(), Access::All)?;
        }
        Ok(())
    }

    fn group_of(&self, name: &str) -> Access {
        let group = self.groups.iter().find(|(known, _)| known == name);
        group.map_or(Access::Own, |&(_, gid)| Access::Group(gid))
    }

    fn read(&self, file: &str) -> anyhow::Result<Option<String>> {
        let path = self.directory.join(file);
        match fs::read_to_string(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// All of it or nothing, whatever happens, and never readable by more than it is meant for.
    fn write(&self, file: &str, content: &str, access: Access) -> anyhow::Result<()> {
        let path = self.directory.join(file);
        let unfinished = self.directory.join(format!("{file}.new"));
        let write = || {
            let mut options = OpenOptions::new();
            let mut new =
                options.write(true).create(true).truncate(true).mode(SECRET).open(&unfinished)?;
            new.write_all(content.as_bytes())?;
            let mode = match access {
                Access::Own => SECRET,
                Access::Group(gid) => {
                    chown(&unfinished, None, Some(gid))?;
                    SECRET_OF_GROUP
                }
                Access::All => PUBLIC,
            };
            new.set_permissions(Permissions::from_mode(mode))?;
            new.sync_all()?;
            fs::rename(&unfinished, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        println!("made {}", path.display());
        Ok(())
    }
}

/// Who may read a file.
#[derive(Clone, Copy, Debug)]
enum Access {
    Own,
    Group(u32),
    All,
}

/// The same every time, so that a later certificate has the same issuer.
fn authority() -> anyhow::Result<CertificateParams> {
    let mut params = valid(CertificateParams::new(Vec::<String>::new())?);
    params.distinguished_name.push(DnType::CommonName, AUTHORITY);
    // It signs certificates of servers, and no other authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok(params)
}

fn certificate(server: &str) -> anyhow::Result<CertificateParams> {
    // The last two are for an operator on the server's own machine.
    let names = [server, "localhost", "127.0.0.1"].map(str::to_owned);
    let mut params = valid(CertificateParams::new(names).context("--servers")?);
    params.distinguished_name.push(DnType::CommonName, server);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Of two servers that form a cluster, the one that connects is the client.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn valid(mut params: CertificateParams) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - VALID_BEFORE;
    params.not_after = now + VALID;
    params
}
