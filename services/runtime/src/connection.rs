//! The connection to NATS: named, kept up for ever, and every change of it logged.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::client::Request;
use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Event, ReconnectToServer, Server, ServerAddr};
use rand::seq::SliceRandom;
use tracing::{debug, info, warn};

use crate::settings::NatsSettings;

/// A broker that does not answer two pings in a row is given up for another one.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(2);
/// For requests that do not set a time-out of their own.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Commands (publish, subscribe) that wait for the connection; more wait in their callers.
const COMMAND_CAPACITY: usize = 1024;
/// Messages that wait for a subscriber; more are dropped and logged as a slow consumer.
const SUBSCRIPTION_CAPACITY: usize = 8192;
/// The greatest pause between two attempts to connect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// Connects in the background and at once returns the client, which keeps trying for ever.
///
/// `name` is what the broker's monitoring shows, and `user` the service's user: replies to it
/// come on `_INBOX_<user>.>`, so that no service can be permitted to read another's.
///
/// # Errors
/// If the settings cannot be used at all. A broker that is not there is no error.
pub async fn connect(settings: &NatsSettings, user: &str, name: &str) -> anyhow::Result<Client> {
    let servers = settings
        .nats
        .iter()
        // Never the whole URL: it may hold a password.
        .map(|server| format!("{}:{}", server.host(), server.port()))
        .collect::<Vec<_>>()
        .join(", ");
    info!(%servers, "connecting to NATS");
    // What lasts is told once for each connection, not at every attempt and every message.
    let told = Arc::new(AtomicBool::new(false));
    // The client does not tell a certificate that it does not trust from a server that is not there.
    let unreachable = match settings.credentials.tls_ca {
        Some(_) => "cannot reach NATS, or --tls-ca has not signed its certificate; trying for ever",
        None => "cannot reach NATS; trying for ever",
    };
    let latest = Mutex::new(None);
    let options = settings.credentials.apply(ConnectOptions::new());
    let options = options
        .name(name)
        .custom_inbox_prefix(format!("_INBOX_{user}"))
        .retry_on_initial_connect()
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .reconnect_to_server_callback(move |servers, _| {
            std::future::ready(next_server(servers, &latest))
        })
        .connection_timeout(CONNECTION_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING_INTERVAL)
        .client_capacity(COMMAND_CAPACITY)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .event_callback(move |event| {
            log_event(&event, &servers, unreachable, &told);
            std::future::ready(())
        });
    Ok(options.connect(&settings.nats).await?)
}

/// Whether the client is connected at this moment. What is sent while it is not waits in the
/// client and comes out late, so whoever has something that ages looks here first.
#[must_use]
pub fn is_connected(client: &Client) -> bool {
    client.connection_state() == State::Connected
}

/// A request with an inbox of its own and no time-out: the caller has one.
///
/// The client remembers a request on its shared inbox until the answer comes, for ever if none
/// does. An inbox of its own is forgotten when the caller stops waiting.
#[must_use]
pub fn request(client: &Client) -> Request {
    Request::new().inbox(inbox(client)).timeout(None)
}

/// A subject for answers that nobody can guess. The client's own ones count up, so that whoever has
/// answered two requests would know where the answer to the next one is expected.
#[must_use]
pub fn inbox(client: &Client) -> String {
    format!("{}.{:032x}", client.new_inbox(), rand::random::<u128>())
}

/// Waits for the connection, at most for `limit`. Whether it is there.
pub async fn wait_until_connected(client: &Client, limit: Duration) -> bool {
    // The client flushes once it is connected.
    tokio::time::timeout(limit, client.flush()).await.is_ok_and(|flushed| flushed.is_ok())
}

/// Back-off with full jitter: at once, then up to 50, 100, 200 … 2000 ms.
fn reconnect_delay(attempts: usize) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(16);
    let ceiling = MAX_RECONNECT_DELAY.min(Duration::from_millis(25) * 2u32.pow(doublings - 1));
    ceiling.mul_f64(rand::random_range(0.1..=1.0))
}

/// Any server but the latest one: that one was just lost, or did not let the client in.
fn next_server(
    mut servers: Vec<Server>,
    latest: &Mutex<Option<ServerAddr>>,
) -> Option<ReconnectToServer> {
    let mut latest = latest.lock().unwrap_or_else(PoisonError::into_inner);
    servers.shuffle(&mut rand::rng());
    servers.sort_by_key(|server| (latest.as_ref() == Some(&server.addr), server.failed_attempts));
    *latest = servers.into_iter().next().map(|server| server.addr);
    // Without a delay of its own it is `reconnect_delay`.
    latest.clone().map(|addr| ReconnectToServer { addr, delay: None })
}

const REFUSED: &str = "the NATS server refuses; is --nkey the key of this service?";

/// The client has no kind of its own for what the server calls a violation, of authorization or of
/// permissions.
fn is_refusal(error: &impl ToString) -> bool {
    error.to_string().to_lowercase().contains("violation")
}

fn log_event(event: &Event, servers: &str, unreachable: &str, told: &AtomicBool) {
    match event {
        Event::Connected => {
            told.store(false, Ordering::Relaxed);
            info!("connected to NATS");
        }
        Event::ClientError(error) if !told.swap(true, Ordering::Relaxed) => {
            warn!(servers, %error, "{}", if is_refusal(error) { REFUSED } else { unreachable });
        }
        Event::ClientError(error) => debug!(%error, "NATS connection"),
        Event::Disconnected => warn!("disconnected from NATS; reconnecting"),
        Event::ServerError(error) if is_refusal(error) => warn!(%error, "{REFUSED}"),
        Event::ServerError(error) => warn!(%error, "the NATS server complains"),
        Event::LameDuckMode => info!("the NATS server is about to stop; moving to another"),
        Event::Draining | Event::Closed => debug!(%event, "NATS connection"),
        // There is one for every message that is dropped.
        Event::SlowConsumer(_) if !told.swap(true, Ordering::Relaxed) => {
            warn!(%event, "messages come faster than they are taken; some are dropped");
        }
        Event::SlowConsumer(_) => debug!(%event, "NATS connection"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_is_bounded_and_spread() {
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        for attempts in 2..100 {
            let delay = reconnect_delay(attempts);
            assert!(!delay.is_zero() && delay <= MAX_RECONNECT_DELAY);
        }
        assert_ne!(reconnect_delay(50), reconnect_delay(50));
    }
}
