//! Which replicas of which service are alive, and the latest tick.
//!
//! All replicas are asked at once through the NATS Services API (ADR-32), in the background: a
//! request for the list costs the broker nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use async_nats::Client;
use bytes::Bytes;
use contract::{Draw, Message, subjects};
use futures::StreamExt;
use runtime::connection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Iso8601;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

/// How often the replicas are asked.
const ROUND: Duration = Duration::from_secs(1);
/// A replica that has not answered for this long is not listed.
const GONE: Duration = Duration::from_millis(2500);
/// The maximum number of replicas that are listed.
const MAX_REPLICAS: usize = 1000;
/// The maximum size of an answer; longer ones are ignored.
const MAX_ANSWER: usize = 4096;

/// A replica: its answer to `$SRV.STATS`, and what clients see of it.
#[derive(Deserialize, Serialize)]
struct Replica {
    #[serde(rename(serialize = "service"))]
    name: String,
    id: String,
    version: String,
    started: String,
    #[serde(skip_deserializing)]
    requests: u64,
    #[serde(skip_deserializing)]
    errors: u64,
    #[serde(default, skip_serializing)]
    endpoints: Vec<Value>,
    #[serde(skip, default = "Instant::now")]
    heard: Instant,
}

/// The response body, and when it was made; `None` until the first replica was heard.
pub type List = Option<(Bytes, Instant)>;

/// Asks and listens for ever, and keeps the list.
///
/// # Errors
/// If the connection was closed for good.
pub async fn run(client: &Client, list: &watch::Sender<List>) -> anyhow::Result<()> {
    const CLOSED: &str = "the connection to NATS was closed";
    let inbox = connection::inbox(client);
    let mut answers = client.subscribe(inbox.clone()).await?;
    let mut ticks = client.subscribe(subjects::DONE).await?;
    let mut known = Known::default();
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // Without the broker the list stays as it is, and gets old.
            _ = rounds.tick() => if connection::is_connected(client) {
                if let Some(body) = known.render() {
                    list.send_replace(Some((body, Instant::now())));
                }
                client.publish_with_reply("$SRV.STATS", inbox.clone(), "".into()).await?;
            },
            answer = answers.next() => known.hear(&answer.context(CLOSED)?.payload),
            tick = ticks.next() => {
                let tick = Draw::decode(&tick.context(CLOSED)?.payload).ok();
                known.latest_tick = tick.or(known.latest_tick.take());
            }
        }
    }
}

/// What was heard.
#[derive(Default)]
struct Known {
    /// By service and id.
    replicas: BTreeMap<(String, String), Replica>,
    latest_tick: Option<Draw>,
}

impl Known {
    fn hear(&mut self, payload: &[u8]) {
        if payload.len() > MAX_ANSWER {
            return;
        }
        // Anyone on the broker may send something else.
        let Ok(mut replica) = serde_json::from_slice::<Replica>(payload) else { return };
        for endpoint in &replica.endpoints {
            let count = |name: &str| endpoint[name].as_u64().unwrap_or(0);
            replica.requests = replica.requests.saturating_add(count("num_requests"));
            replica.errors = replica.errors.saturating_add(count("num_errors"));
        }
        let key = (replica.name.clone(), replica.id.clone());
        if self.replicas.len() < MAX_REPLICAS || self.replicas.contains_key(&key) {
            self.replicas.insert(key, replica);
        }
    }

    /// The list of the replicas that are alive; `None` until the first answers have arrived.
    fn render(&mut self) -> Option<Bytes> {
        self.replicas.retain(|_, replica| replica.heard.elapsed() < GONE);
        if self.replicas.is_empty() {
            return None;
        }
        let body = json!({
            "as_of": OffsetDateTime::now_utc().format(&Iso8601::DEFAULT).unwrap_or_default(),
            "latest_tick": self.latest_tick,
            "replicas": self.replicas.values().collect::<Vec<_>>(),
        });
        Some(format!("{body}\n").into())
    }
}
