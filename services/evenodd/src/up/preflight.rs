//! What `up` needs before it starts anything. Every fault is reported, not only the first.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail, ensure};
use tokio::process::Command;

use super::child::Spec;
use super::{NATS_SERVER, Up};

/// The broker's configuration; ports and directories come from its command line.
const NATS_CONFIGURATION: &str = include_str!("../../../../nats/single.conf");

/// The files of `up` in the data directory.
const CONFIGURATION: &str = "nats-server.conf";
const LOCK: &str = "lock";

/// The oldest nats-server that is accepted; the same as in nats/install.
const MINIMUM: [u32; 2] = [2, 15];

/// Checks what `up` needs, makes the data directory, and returns how to start the broker on it.
///
/// # Errors
/// Every fault that was found, one a line.
pub async fn check(up: &Up, evenodd: &Path) -> anyhow::Result<Spec> {
    let mut faults = Vec::new();
    for program in ["generator", "multiplier", "gateway"] {
        let file = evenodd.with_file_name(program);
        if !file.is_file() {
            let shown = file.display();
            faults
                .push(format!("there is no {shown}; `cargo build --workspace` builds everything"));
        }
    }
    let gateways = (0..up.gateways).map(|n| (up.http(n), "--http"));
    let broker = [up.nats_port, up.monitoring_port()]
        .map(|port| (([127, 0, 0, 1], port).into(), "--nats-port"));
    // Held until all are checked, so that a port that is wanted twice is found as well.
    let addresses = gateways.chain(broker);
    let listen = |(address, flag)| {
        let what = || format!("cannot listen on {address}; choose another with {flag}");
        note(&mut faults, TcpListener::bind(address).with_context(what))
    };
    let _listeners: Vec<_> = addresses.map(listen).collect();
    let nats_server = note(&mut faults, nats_server(&up.nats_server, evenodd).await);
    let store = note(&mut faults, open_store(&up.data));
    match (nats_server, store) {
        (Some(nats_server), Some((store, lock))) if faults.is_empty() => {
            let mut spec = Spec::new("nats".to_owned(), &nats_server);
            spec.command.arg("-c").arg(store.join(CONFIGURATION)).arg("-sd").arg(&store);
            spec.command.args(["-p", &up.nats_port.to_string()]);
            spec.command.args(["-m", &up.monitoring_port().to_string()]);
            // The broker inherits the lock: if this process is killed, the directory stays locked
            // until the broker has gone.
            spec.command.stdin(Stdio::from(lock));
            spec.store = Some(store);
            Ok(spec)
        }
        (_, store) => {
            // Without the lock, another `up` uses it.
            if store.is_some() {
                clean_up(&up.data);
            }
            bail!(faults.join("\nerror: "))
        }
    }
}

fn note<T>(faults: &mut Vec<String>, result: anyhow::Result<T>) -> Option<T> {
    result.map_err(|fault| faults.push(format!("{fault:#}"))).ok()
}

/// The nats-server that is named or on PATH, or the one that `nats/install` has put beside this
/// program's sources.
async fn nats_server(named: &Path, evenodd: &Path) -> anyhow::Result<PathBuf> {
    let chosen = is_new_enough(named.to_owned()).await;
    // This program is target/release/evenodd.
    if chosen.is_err()
        && named == Path::new(NATS_SERVER)
        && let Some(sources) = evenodd.ancestors().nth(3)
        && let Ok(installed) = fs::read_dir(sources.join("nats/bin"))
    {
        for file in installed.flatten() {
            if let Ok(found) = is_new_enough(file.path()).await {
                return Ok(found);
            }
        }
    }
    chosen
}

async fn is_new_enough(nats_server: PathBuf) -> anyhow::Result<PathBuf> {
    let shown = nats_server.display();
    let output = Command::new(&nats_server).arg("--version").output().await.with_context(|| {
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
    Ok(nats_server)
}

/// Makes the data directory, locks it, and writes the broker's configuration into it. Returns its
/// absolute path and the lock.
fn open_store(data: &Path) -> anyhow::Result<(PathBuf, File)> {
    let shown = data.display();
    let store = std::path::absolute(data).with_context(|| format!("data directory {shown}"))?;
    fs::create_dir_all(&store)
        .with_context(|| format!("cannot make the data directory {shown}"))?;
    let written = || format!("cannot write to the data directory {shown}");
    let lock = File::create(store.join(LOCK)).with_context(written)?;
    lock.try_lock().with_context(|| {
        format!(
            "cannot lock the data directory {shown}: if another `evenodd up` uses it, stop that one \
             or choose another with --data"
        )
    })?;
    fs::write(store.join(CONFIGURATION), NATS_CONFIGURATION).with_context(written)?;
    Ok((store, lock))
}

/// Removes what [`check`] has made, after a start that failed before the broker made its store.
pub fn clean_up(data: &Path) {
    if !data.join("jetstream").exists() {
        let _ = fs::remove_file(data.join(CONFIGURATION));
        let _ = fs::remove_file(data.join(LOCK));
        // This fails if anything else is there.
        let _ = fs::remove_dir(data);
    }
}
