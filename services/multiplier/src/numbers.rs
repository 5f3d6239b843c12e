//! Getting a number: a request to the generators, hedged.

use std::time::Duration;

use async_nats::Client;
use contract::Parity;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use runtime::connection;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing::{debug, warn};

/// A number of this parity, or `None` if no generator gives one in time.
///
/// A second request goes out when the first was not answered within `hedge_after`, and so on: it
/// most likely reaches another member of the queue group. So a generator that is frozen costs a
/// moment, until the server drops it. The first right answer counts.
pub async fn get(
    client: &Client,
    parity: Parity,
    until: Instant,
    hedge_after: Duration,
) -> Option<u16> {
    let mut asked = FuturesUnordered::new();
    let mut hedge = interval(hedge_after);
    hedge.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut deadline = std::pin::pin!(sleep_until(until));
    loop {
        tokio::select! {
            Some(answer) = asked.next(), if !asked.is_empty() => match answer {
                Ok(async_nats::Message { payload, .. }) => match parity.decode_reply(&payload) {
                    Ok(number) => return Some(number),
                    Err(error) => warn!(subject = parity.subject(), %error, "a generator gave a wrong answer"),
                },
                // No responders, for the most part; the next request may find one.
                Err(error) => debug!(subject = parity.subject(), %error, "no answer"),
            },
            _ = hedge.tick() => {
                // What is sent without a connection waits in the client, and comes out late.
                if connection::is_connected(client) {
                    asked.push(client.send_request(parity.subject(), connection::request(client)));
                }
            }
            () = &mut deadline => return None,
        }
    }
}
