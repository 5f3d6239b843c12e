//! What `up` needs before it starts anything. Every fault is reported, not only the first.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use tokio::process::Command;

use super::Up;

/// The broker's configuration; ports and directories come from its command line.
const NATS_CONFIGURATION: &str = include_str!("../../../../nats/single.conf");

/// The oldest nats-server that is accepted; the same as in nats/install.
const MINIMUM: [u32; 2] = [2, 12];

/// A data directory with the broker's configuration in it.
pub struct Store {
    /// The absolute path.
    pub directory: PathBuf,
    /// The lock on the directory. The broker inherits it: if this process is killed, the directory
    /// stays locked until the broker has gone.
    pub lock: File,
}

/// Checks what `up` needs, and opens the store.
///
/// # Errors
/// Every fault that was found, one a line.
pub async fn check(up: &Up, evenodd: &Path) -> anyhow::Result<Store> {
    let mut faults = Vec::new();
    for program in ["generator", "multiplier", "gateway"] {
        note(&mut faults, is_built(&evenodd.with_file_name(program)));
    }
    // Held until all are checked, so that a port that is wanted twice is found as well.
    let mut listeners = Vec::new();
    for n in 0..up.gateways {
        listeners.push(note(&mut faults, listen(up.http(n), "--http")));
    }
    for port in [up.nats_port, up.monitoring_port()] {
        let address = ([127, 0, 0, 1], port).into();
        listeners.push(note(&mut faults, listen(address, "--nats-port")));
    }
    note(&mut faults, is_new_enough(&up.nats_server).await);
    let store = note(&mut faults, open_store(&up.data));
    store.filter(|_| faults.is_empty()).with_context(|| faults.join("\nerror: "))
}

fn note<T>(faults: &mut Vec<String>, result: anyhow::Result<T>) -> Option<T> {
    result.map_err(|fault| faults.push(format!("{fault:#}"))).ok()
}

fn is_built(program: &Path) -> anyhow::Result<()> {
    let shown = program.display();
    ensure!(program.is_file(), "there is no {shown}; `cargo build --workspace` builds everything");
    Ok(())
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
    let numbers: Vec<u32> = version.split('.').map_while(|part| part.parse().ok()).collect();
    let [major, minor] = MINIMUM;
    ensure!(
        numbers[..] >= MINIMUM[..],
        "{shown} is version {version}; nats-server {major}.{minor} or newer is needed, `nats/install` gets one"
    );
    Ok(())
}

/// Makes the data directory, locks it, and writes the broker's configuration into it.
fn open_store(data: &Path) -> anyhow::Result<Store> {
    let shown = data.display();
    fs::create_dir_all(data).with_context(|| format!("cannot make the data directory {shown}"))?;
    let directory = data.canonicalize().with_context(|| format!("data directory {shown}"))?;
    let written = || format!("cannot write to the data directory {shown}");
    let lock = File::create(directory.join("lock")).with_context(written)?;
    lock.try_lock().with_context(|| {
        format!(
            "cannot lock the data directory {shown}: if another `evenodd up` uses it, stop that one \
             or choose another with --data"
        )
    })?;
    fs::write(directory.join("nats-server.conf"), NATS_CONFIGURATION).with_context(written)?;
    Ok(Store { directory, lock })
}
