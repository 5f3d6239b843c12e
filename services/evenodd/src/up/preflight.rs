//! What must be so before anything starts. Every fault is reported, not only the first.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use tokio::process::Command;

use super::{NATS_CONFIGURATION, Up};

/// The oldest nats-server that is accepted; the same as in nats/install.
const MINIMUM: (u32, u32) = (2, 12);

/// What the checks found, and hold.
pub struct Ready {
    /// Where the service binaries are: beside this one.
    pub binaries: PathBuf,
    /// The data directory, absolute.
    pub data: PathBuf,
    /// The lock on the data directory. The broker holds it as well: should this process be
    /// killed, the store is locked until the broker has gone.
    pub lock: Option<Arc<File>>,
}

/// Checks everything that `up` needs.
///
/// # Errors
/// Every fault that was found.
pub async fn check(up: &Up) -> Result<Ready, Vec<String>> {
    let mut faults = Vec::new();
    let mut note = |result: anyhow::Result<()>| {
        if let Err(fault) = result {
            faults.push(format!("{fault:#}"));
        }
    };
    let mut ready = Ready { binaries: PathBuf::new(), data: up.data.clone(), lock: None };
    note(binaries().map(|path| ready.binaries = path));
    // Held until all are checked, so that a port that is wanted twice is found as well.
    let mut held = Vec::new();
    let mut is_free = |address, flag| listen(address, flag).map(|socket| held.push(socket));
    for n in 0..up.gateways {
        note(is_free(up.http(n), "--http"));
    }
    if up.nats.is_none() {
        for port in [up.nats_port, up.monitoring_port()] {
            note(is_free(([127, 0, 0, 1], port).into(), "--nats-port"));
        }
        note(is_new_enough(&up.nats_server).await);
        note(store(&up.data).map(|(data, lock)| {
            ready.data = data;
            ready.lock = Some(Arc::new(lock));
        }));
    }
    if faults.is_empty() { Ok(ready) } else { Err(faults) }
}

fn binaries() -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("cannot find this program's own file")?;
    let directory = this.parent().unwrap_or(Path::new(".")).to_owned();
    for binary in ["generator", "multiplier", "gateway"] {
        ensure!(
            directory.join(binary).is_file(),
            "the program {binary} is not in {}; build everything with `cargo build --workspace`",
            directory.display()
        );
    }
    Ok(directory)
}

fn listen(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .with_context(|| format!("cannot listen on {address}; choose another with {flag}"))
}

async fn is_new_enough(nats_server: &Path) -> anyhow::Result<()> {
    let shown = nats_server.display();
    let output = Command::new(nats_server).arg("--version").output().await.with_context(|| {
        format!("cannot run {shown}; `nats/install` gets one, --nats-server names one")
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.trim().trim_start_matches("nats-server: v");
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= MINIMUM => Ok(()),
        (Some(_), Some(_)) => bail!(
            "{shown} is version {version}; {}.{} or newer is needed, `nats/install` gets one",
            MINIMUM.0,
            MINIMUM.1
        ),
        _ => bail!("{shown} is no nats-server: `--version` prints {:?}", text.trim()),
    }
}

/// Makes the data directory, locks it, and writes the broker's configuration into it.
fn store(data: &Path) -> anyhow::Result<(PathBuf, File)> {
    let shown = data.display();
    fs::create_dir_all(data).with_context(|| format!("cannot make the data directory {shown}"))?;
    let data = data.canonicalize().with_context(|| format!("data directory {shown}"))?;
    let lock = File::create(data.join("lock"))
        .with_context(|| format!("cannot write to the data directory {shown}"))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => bail!(
            "the data directory {shown} is in use by another `evenodd up`; stop that one or choose another with --data"
        ),
        Err(fs::TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {shown}/lock"));
        }
    }
    fs::write(data.join("nats-server.conf"), NATS_CONFIGURATION)
        .with_context(|| format!("cannot write to the data directory {shown}"))?;
    Ok((data, lock))
}
