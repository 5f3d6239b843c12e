//! The connection to NATS. It reconnects for ever and logs every change of its state.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::client::Request;
use async_nats::connection::State;
use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, Event, ReconnectToServer, Server, ServerAddr,
};
use rand::seq::SliceRandom;
use tracing::{debug, info, warn};

use crate::settings::NatsSettings;

/// After two unanswered pings the client leaves the broker for another one.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(2);
/// For requests that do not set a timeout of their own.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The most commands (publish, subscribe) that wait for the connection. The callers of further ones
/// wait.
const COMMAND_CAPACITY: usize = 1024;
/// The most messages that wait for a subscriber. The client drops further ones and reports a slow
/// consumer.
const SUBSCRIPTION_CAPACITY: usize = 8192;
/// The longest pause between two attempts to connect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// Why a client cannot do anything at this moment. The connection logs it.
pub const NOT_CONNECTED: &str = "not connected to NATS";

/// Returns the client at once. It connects in the background and retries for ever.
///
/// `user` is the user of the service: its replies arrive on `_INBOX_<user>.>`, which the broker's
/// permissions hide from other services. The broker's monitoring shows it as the client's name.
///
/// # Errors
/// If the settings are unusable. An unreachable broker is not an error.
pub async fn connect(settings: &NatsSettings, user: &str) -> anyhow::Result<Client> {
    info!(servers = addresses(settings), "connecting to NATS");
    let latest = Mutex::new(None);
    let next = move |servers, _| std::future::ready(next_server(servers, &latest));
    let options = options(settings, user).retry_on_initial_connect();
    Ok(options.reconnect_to_server_callback(next).connect(&settings.nats).await?)
}

/// As [`connect`], but tries each server once, and returns when the client is connected.
///
/// # Errors
/// If it cannot connect to any server. The error has the cause for the last one.
pub async fn connect_now(settings: &NatsSettings, user: &str) -> anyhow::Result<Client> {
    let limit = CONNECTION_TIMEOUT * u32::try_from(settings.nats.len())?;
    let connecting = options(settings, user).connect(&settings.nats);
    // The client sets no limit for resolving a name.
    let result = tokio::time::timeout(limit, connecting).await;
    let result = result.unwrap_or_else(|_| Err(ConnectErrorKind::TimedOut.into()));
    result.map_err(|error| {
        let servers = addresses(settings);
        let hint = "is the broker running, and do --nkey and --tls-ca fit?";
        anyhow::anyhow!("cannot connect to NATS at {servers}: {error} ({hint})")
    })
}

/// Not the whole URLs, which may contain a password.
fn addresses(settings: &NatsSettings) -> String {
    let address = |server: &ServerAddr| format!("{}:{}", server.host(), server.port());
    settings.nats.iter().map(address).collect::<Vec<_>>().join(", ")
}

fn options(settings: &NatsSettings, user: &str) -> ConnectOptions {
    let servers = addresses(settings);
    // A lasting fault is logged once for each connection, not at every attempt or message.
    let told = Arc::new(AtomicBool::new(false));
    let options = settings.credentials.apply(ConnectOptions::new());
    options
        .name(user)
        .custom_inbox_prefix(format!("_INBOX_{user}"))
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .connection_timeout(CONNECTION_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING_INTERVAL)
        .client_capacity(COMMAND_CAPACITY)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .event_callback(move |event| {
            log_event(&event, &servers, &told);
            std::future::ready(())
        })
}

/// Whether the client is connected at this moment. While it is not, it queues messages and sends
/// them late. Callers whose messages must not be late check this first.
#[must_use]
pub fn is_connected(client: &Client) -> bool {
    client.connection_state() == State::Connected
}

/// A request with an inbox of its own and no timeout: the caller sets one.
///
/// The client remembers a request on its shared inbox until the answer arrives, even if none ever
/// does. It forgets a separate inbox when the caller stops waiting.
#[must_use]
pub fn request(client: &Client) -> Request {
    Request::new().inbox(inbox(client)).timeout(None)
}

/// An unpredictable subject for answers. The client numbers its own inboxes in sequence: a
/// responder that has seen two of them could guess the next one.
#[must_use]
pub fn inbox(client: &Client) -> String {
    format!("{}.{:032x}", client.new_inbox(), rand::random::<u128>())
}

/// Back-off with jitter: no delay, then up to 50, 100, 200 … 2000 ms.
fn reconnect_delay(attempts: usize) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(16);
    let ceiling = MAX_RECONNECT_DELAY.min(Duration::from_millis(25) * 2u32.pow(doublings - 1));
    ceiling.mul_f64(rand::random_range(0.1..=1.0))
}

/// Chooses a server at random. The latest one comes last, because the client just lost it or was
/// refused by it. Among the others, those with the fewest failed attempts come first.
fn next_server(
    mut servers: Vec<Server>,
    latest: &Mutex<Option<ServerAddr>>,
) -> Option<ReconnectToServer> {
    let mut latest = latest.lock().unwrap_or_else(PoisonError::into_inner);
    servers.shuffle(&mut rand::rng());
    servers.sort_by_key(|server| (latest.as_ref() == Some(&server.addr), server.failed_attempts));
    *latest = servers.into_iter().next().map(|server| server.addr);
    // Without a delay here, `reconnect_delay` applies.
    latest.clone().map(|addr| ReconnectToServer { addr, delay: None })
}

/// The client reports an untrusted certificate and an unreachable server in the same way.
const UNREACHABLE: &str = "cannot reach NATS, or --tls-ca has not signed its certificate; retrying";
const REFUSED: &str = "the NATS server refuses access; is --nkey the key of this service?";

/// The client has no error kind for a violation of authorization or of permissions, so this goes by
/// the server's text.
fn is_refusal(error: &impl ToString) -> bool {
    error.to_string().to_lowercase().contains("violation")
}

fn log_event(event: &Event, servers: &str, told: &AtomicBool) {
    match event {
        Event::Connected => {
            told.store(false, Ordering::Relaxed);
            info!("connected to NATS");
        }
        Event::ClientError(error) if !told.swap(true, Ordering::Relaxed) => {
            warn!(servers, %error, "{}", if is_refusal(error) { REFUSED } else { UNREACHABLE });
        }
        Event::Disconnected => warn!("disconnected from NATS; reconnecting"),
        Event::ServerError(error) if is_refusal(error) => warn!(%error, "{REFUSED}"),
        Event::ServerError(error) => warn!(%error, "the NATS server reports an error"),
        Event::LameDuckMode => info!("the NATS server is shutting down; moving to another one"),
        // The client emits this event for every message that it drops.
        Event::SlowConsumer(_) if !told.swap(true, Ordering::Relaxed) => {
            warn!(%event, "messages arrive faster than they are processed; some are dropped");
        }
        _ => debug!(%event, "NATS connection"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_is_bounded_and_has_jitter() {
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        for attempts in 2..100 {
            let delay = reconnect_delay(attempts);
            assert!(!delay.is_zero() && delay <= MAX_RECONNECT_DELAY);
        }
        assert_ne!(reconnect_delay(50), reconnect_delay(50));
    }
}
