//! Hedged requests to the generators for a factor.

use std::time::Duration;

use async_nats::Client;
use contract::Parity;
use runtime::{connection, hedged};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

/// Requests a factor of this parity. Returns `None` if no generator gives one in time.
///
/// It sends another request each time that `hedge_after` has passed without a valid reply. That
/// request most likely reaches another member of the queue group. A frozen generator therefore
/// costs only a short delay, until the server drops it.
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
    // Without a connection the client would queue the request and send it late.
    if !connection::is_connected(client) {
        return None;
    }
    let answer = client.send_request(subject, connection::request(client)).await;
    // Usually the error is that there are no responders. The next request may find one.
    let answer = answer.inspect_err(|error| debug!(subject, %error, "no answer")).ok()?;
    let factor = parity.decode_reply(&answer.payload);
    factor.inspect_err(|error| warn!(subject, %error, "a generator gave a wrong answer")).ok()
}
