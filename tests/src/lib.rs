//! The harness of the end-to-end tests: real nats-servers and the real service binaries, as
//! processes that a test starts, freezes, kills and starts again.
//!
//! Everything a test starts has ports of its own, a directory of its own, and ends with the test.
//! The directory of a test that failed is kept, and its path printed.

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

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt;

pub use broker::{Broker, nats_server};
pub use brokers::Brokers;
pub use pipeline::{Pipeline, gateway};
pub use process::Process;
pub use ticks::{Audit, Ticks};

/// Longer than anything here takes on a busy machine of two cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

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
/// If it does not within [`PATIENCE`].
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A client of the broker.
pub async fn connect(broker: &Broker) -> async_nats::Client {
    async_nats::connect(broker.url()).await.unwrap()
}

/// Every answer to a request of the Services API (ADR-32), such as `PING` or `STATS.even`, that
/// comes within a short time.
pub async fn services(client: &async_nats::Client, verb: &str) -> Vec<serde_json::Value> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.unwrap();
    let subject = format!("$SRV.{verb}");
    client.publish_with_reply(subject, inbox, "".into()).await.unwrap();
    let mut all = Vec::new();
    while let Ok(Some(answer)) =
        tokio::time::timeout(Duration::from_millis(300), answers.next()).await
    {
        // With no service at all the server says so itself, without a payload.
        all.extend(serde_json::from_slice::<serde_json::Value>(&answer.payload));
    }
    all
}
