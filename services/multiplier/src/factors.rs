//! Getting a factor: a request to the generators, hedged.

use std::time::Duration;

use async_nats::Client;
use contract::Parity;
use runtime::{connection, hedged};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

/// A factor of this parity, or `None` if no generator gives one in time.
///
/// Another request goes out each time that `hedge_after` has passed without a valid answer: it most
/// likely reaches another member of the queue group. So a frozen generator costs a moment, until the
/// server drops it.
pub async fn get(
    client: &Client,
    parity: Parity,
    until: Instant,
    hedge_after: Duration,
) -> Option<u16> {
    let factor = hedged(hedge_after, usize::MAX, || request(client, parity));
    timeout_at(until, factor).await.ok().flatten()
}

async fn request(client: &Client, parity: Parity) -> Option<u16> {
    let subject = parity.subject();
    // A request that is sent without a connection waits in the client, and goes out late.
    if !connection::is_connected(client) {
        return None;
    }
    let answer = client.send_request(subject, connection::request(client)).await;
    // Mostly there are no responders; the next request may find one.
    let answer = answer.inspect_err(|error| debug!(subject, %error, "no answer")).ok()?;
    let factor = parity.decode_reply(&answer.payload);
    factor.inspect_err(|error| warn!(subject, %error, "a generator gave a wrong answer")).ok()
}
