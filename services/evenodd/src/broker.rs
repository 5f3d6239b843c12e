//! What the subcommands share: the operator's connection, and the wait for JetStream.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::Client;
use async_nats::jetstream::stream::Config;
use runtime::jetstream::NoStream;
use runtime::settings::NatsSettings;
use runtime::{connection, jetstream};
use tokio::time::Instant;
use tracing::warn;

/// The operator's name among the users of the broker.
pub const USER: &str = "operator";

/// How long a broker that is up may take to answer a request.
pub const TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// How long to retry before a log line says so.
const QUIET: Duration = Duration::from_millis(1500);

/// Connects as the operator, and retries for as long as `wait`. `flag` is the one that names the
/// broker.
///
/// # Errors
/// That of the last attempt.
pub async fn connect(nats: &NatsSettings, flag: &'static str, wait: Duration) -> Result<Client> {
    let attempt = async || connection::connect_now(nats, USER).await.context(flag);
    retry(Instant::now() + wait, attempt).await
}

/// Repeats what fails until the deadline: JetStream takes some time to start, and in a cluster to
/// elect a leader. If that takes long, it logs once what it waits for.
///
/// # Errors
/// That of the last attempt.
pub async fn retry<T>(deadline: Instant, attempt: impl AsyncFn() -> Result<T>) -> Result<T> {
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
) -> Result<Option<Config>> {
    let attempt = async || match jetstream::info(client, stream, TIMEOUT).await {
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
