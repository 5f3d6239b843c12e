//! The harness of the end-to-end tests. A test starts, freezes, kills and restarts real
//! nats-servers and service binaries as processes.
//!
//! Each test has its own ports and its own directory, and its processes end with it. The directory
//! of a failed test is kept, and its path is printed.

#![allow(
    clippy::disallowed_types,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::missing_panics_doc
)]

mod broker;
pub mod brokers;
pub mod browser;
pub mod cluster;
pub mod http;
mod pipeline;
mod process;
pub mod ticks;
pub mod watch;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::{Mutex, MutexGuard};

pub use broker::{Broker, nats_server};
pub use brokers::Brokers;
pub use pipeline::{Pipeline, gateway, publish};
pub use process::{Process, binaries};
pub use ticks::{Audit, Ticks};

/// How long a test waits for something before it fails: long enough for a busy machine with two
/// cores.
#[must_use]
pub fn patience() -> Duration {
    patient(Duration::from_secs(30))
}

/// A time limit, multiplied by `EVENODD_TEST_PATIENCE` for slow machines.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    let factor = std::env::var("EVENODD_TEST_PATIENCE").unwrap_or_else(|_| "1".to_owned());
    limit.mul_f64(factor.parse().expect("EVENODD_TEST_PATIENCE is a number, such as 2"))
}

/// The first three parts of addresses that no other test uses: `127.x.y`. All their ports are free,
/// and stay free while a server of the test is down. (On Linux all of 127.0.0.0/8 is this machine.)
#[must_use]
pub fn network() -> String {
    let n = unique();
    format!("127.{}.{}", 1 + n / 250 % 250, n % 250)
}

/// The ports of brokers and gateways on the addresses of a test. They differ from the default
/// ports, on which other programs may listen at all addresses of this machine.
const NATS_PORT: u16 = 14_222;
const HTTP_PORT: u16 = 18_080;

/// A port of 127.0.0.1 that no other test uses, for programs that cannot have an address of their
/// own. This port, and the one 4000 above it, are below the range that the kernel assigns.
#[must_use]
pub fn port() -> u16 {
    u16::try_from(10_000 + unique() % 18_000).unwrap()
}

/// A number that no other test of this process has, and most likely no test of another process.
fn unique() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    std::process::id().wrapping_mul(512) + COUNT.fetch_add(1, Ordering::Relaxed)
}

/// A lock for tests that measure timing. Only one of them runs at a time.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// A directory for everything that one test writes.
#[derive(Debug)]
pub struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    /// A new, empty directory.
    #[must_use]
    pub fn new() -> Self {
        Self(Some(tempfile::tempdir().unwrap()))
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.as_ref().unwrap().path().join(name)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(directory) = self.0.take()
        {
            eprintln!("logs and stores are in {}", directory.keep().display());
        }
    }
}

/// The repository.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Polls until `condition` holds.
///
/// # Panics
/// If it does not within [`patience`].
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < patience(), "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A client of the broker.
pub async fn connect(broker: &Broker) -> async_nats::Client {
    async_nats::connect(broker.url()).await.unwrap()
}

/// Sends a request of the Services API (ADR-32), such as `PING` or `STATS.even`, and returns all
/// answers that come within a short time.
pub async fn services(client: &async_nats::Client, verb: &str) -> Vec<serde_json::Value> {
    const QUIET: Duration = Duration::from_millis(100);
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.unwrap();
    let subject = format!("$SRV.{verb}");
    client.publish_with_reply(subject, inbox, "".into()).await.unwrap();
    let mut all = Vec::new();
    while let Ok(Some(answer)) = tokio::time::timeout(QUIET, answers.next()).await {
        // If there is no service at all, the server answers without a payload.
        all.extend(serde_json::from_slice::<serde_json::Value>(&answer.payload));
    }
    all
}

/// The ids of the replicas that were seen. Every start of a service has a new id.
#[derive(Default)]
pub struct Replicas(Mutex<HashSet<String>>);

impl Replicas {
    /// Waits until a replica of this service answers for the first time.
    pub async fn appear(&self, client: &async_nats::Client, service: &str) {
        let mut seen = self.0.lock().await;
        eventually(&format!("a new replica of {service} answers"), async || {
            let answers = services(client, &format!("PING.{service}")).await;
            answers.iter().any(|answer| seen.insert(answer["id"].as_str().unwrap().to_owned()))
        })
        .await;
    }
}
