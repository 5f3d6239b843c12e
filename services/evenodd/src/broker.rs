//! What the subcommands share: the operator's connection, and the wait for JetStream.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::ensure;
use async_nats::Client;
use async_nats::jetstream::stream::Config;
use runtime::jetstream::NoStream;
use runtime::settings::NatsSettings;
use runtime::{connection, jetstream};
use tokio::time::Instant;
use tracing::warn;

/// The operator's name among the users of the broker.
pub const USER: &str = "operator";

/// How long a broker that is up may take to answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for an answer before the request is repeated.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// How long to retry before a log line says so.
const QUIET: Duration = Duration::from_millis(1500);

/// Connects as the operator. `flag` is the one that names the broker.
///
/// # Errors
/// If there is no connection within `timeout`.
pub async fn connect(nats: &NatsSettings, flag: &str, timeout: Duration) -> anyhow::Result<Client> {
    let client = connection::connect(nats, USER, "evenodd").await?;
    let attempt = async || {
        let is_connected = connection::flush(&client, ATTEMPT_TIMEOUT).await;
        ensure!(is_connected, "NATS is not reachable; see {flag} (is the broker running?)");
        Ok(client.clone())
    };
    retry(Instant::now() + timeout, attempt).await
}

/// Repeats what fails until the deadline: JetStream takes some time to start, and in a cluster to
/// elect a leader. If that takes long, it logs once what it waits for.
///
/// # Errors
/// That of the last attempt.
pub async fn retry<T>(
    deadline: Instant,
    attempt: impl AsyncFn() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let (begun, mut is_said) = (Instant::now(), false);
    loop {
        let error = match attempt().await {
            Err(error) if Instant::now() < deadline => error,
            result => return result,
        };
        if !is_said && begun.elapsed() > QUIET {
            is_said = true;
            warn!("{error:#}; trying for another {} s", (deadline - Instant::now()).as_secs());
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// The configuration of a stream, or `None` if the stream does not exist. Tries until the deadline.
///
/// # Errors
/// If JetStream does not answer.
pub async fn stream_config(
    client: &Client,
    stream: &str,
    deadline: Instant,
) -> anyhow::Result<Option<Config>> {
    let attempt = async || match jetstream::info(client, stream, ATTEMPT_TIMEOUT).await {
        Err(error) if error.is::<NoStream>() => Ok(None),
        result => Ok(Some(result?.config)),
    };
    retry(deadline, attempt).await
}

/// Shows on a terminal how far a long command has come. The next line overwrites it.
pub fn show_progress(line: impl Display) {
    if io::stderr().is_terminal() {
        let _ = write!(io::stderr(), "{line}\r");
    }
}
