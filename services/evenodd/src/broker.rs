//! What the subcommands share: the operator's connection, the wait for JetStream, progress.

use std::fmt::Display;
use std::time::Duration;

use anyhow::{bail, ensure};
use async_nats::Client;
use async_nats::jetstream::stream::Config;
use runtime::jetstream::NoStream;
use runtime::settings::NatsSettings;
use runtime::{connection, jetstream};
use tokio::time::Instant;

/// The operator's name among the users of the broker.
pub const USER: &str = "operator";

/// How long a broker that is up may take to answer.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for one answer when the request can be repeated.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(250);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Connects as the operator. `flag` is the one that names the broker.
///
/// # Errors
/// If there is no connection within `timeout`.
pub async fn connect(
    settings: &NatsSettings,
    flag: &str,
    timeout: Duration,
) -> anyhow::Result<Client> {
    let client = connection::connect(settings, USER, "evenodd").await?;
    let is_connected = connection::wait_until_connected(&client, timeout).await;
    ensure!(is_connected, "NATS is not reachable; see {flag} (is the broker running?)");
    Ok(client)
}

/// JetStream does not answer, or its cluster has no leader or too few servers: it may still start.
#[derive(Debug, thiserror::Error)]
#[error("JetStream is not ready: {0}")]
pub struct NotReady(pub String);

/// Repeats what fails because JetStream is [`NotReady`].
///
/// # Errors
/// If JetStream is not ready within `timeout`, or if `attempt` fails for another reason.
pub async fn when_ready<T>(
    timeout: Duration,
    attempt: impl AsyncFn() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        match attempt().await {
            Err(error) if error.is::<NotReady>() && Instant::now() < deadline => {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// The configuration of a stream, or `None` if the stream does not exist.
///
/// # Errors
/// [`NotReady`].
pub async fn stream_config(client: &Client, stream: &str) -> anyhow::Result<Option<Config>> {
    match jetstream::info(client, stream, ATTEMPT_TIMEOUT).await {
        Ok(info) => Ok(Some(info.config)),
        Err(error) if error.is::<NoStream>() => Ok(None),
        Err(error) => bail!(NotReady(error.to_string())),
    }
}

/// Prints how far a long command has come, at most every five seconds.
pub fn show_progress(latest: &mut Instant, line: impl Display) {
    if latest.elapsed() >= PROGRESS_INTERVAL {
        eprintln!("{line}");
        *latest = Instant::now();
    }
}
