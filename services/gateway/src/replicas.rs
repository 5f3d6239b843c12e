//! Which replicas of which service are alive, and who did the latest tick.
//!
//! They are asked through the NATS Services API (ADR-32), all at once and in the background: a
//! request for the list costs the broker nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::{Client, Subscriber};
use bytes::Bytes;
use contract::{Draw, Message, subjects};
use futures::StreamExt;
use runtime::connection;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

/// How often all are asked.
const ROUND: Duration = Duration::from_secs(1);
/// A replica that has not answered for this long is gone.
const GONE: Duration = Duration::from_millis(2500);
/// More are not listed.
const MAX_REPLICAS: usize = 1000;
/// An answer that is longer is not read.
const MAX_ANSWER: usize = 4096;

/// An answer to `$SRV.STATS`.
#[derive(Deserialize)]
struct Stats {
    name: String,
    id: String,
    version: String,
    started: String,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
struct Endpoint {
    #[serde(default)]
    num_requests: u64,
    #[serde(default)]
    num_errors: u64,
}

/// A replica, as clients see it.
#[derive(Serialize)]
struct Replica {
    service: String,
    id: String,
    version: String,
    started: String,
    requests: u64,
    errors: u64,
    #[serde(skip)]
    heard: Instant,
}

/// The answer, and when it was made; `None` until the replicas were heard.
pub type List = Option<(Bytes, Instant)>;

#[derive(Serialize)]
struct Body<'a> {
    as_of: String,
    latest_tick: Option<&'a Draw>,
    replicas: Vec<&'a Replica>,
}

/// The task that keeps the list.
pub struct Replicas {
    client: Client,
    inbox: String,
    answers: Subscriber,
    ticks: Subscriber,
    known: BTreeMap<(String, String), Replica>,
    latest_tick: Option<Draw>,
    list: watch::Sender<List>,
}

impl Replicas {
    /// Listens, and gives the list as it will be kept: empty until it is known.
    ///
    /// # Errors
    /// If the connection was closed.
    pub async fn new(client: Client) -> anyhow::Result<(Self, watch::Receiver<List>)> {
        let inbox = connection::inbox(&client);
        let (list, receiver) = watch::channel(None);
        let replicas = Self {
            answers: client.subscribe(inbox.clone()).await?,
            ticks: client.subscribe(subjects::DONE).await?,
            client,
            inbox,
            known: BTreeMap::new(),
            latest_tick: None,
            list,
        };
        Ok((replicas, receiver))
    }

    /// Asks and listens for ever.
    ///
    /// # Errors
    /// If the connection was closed for good.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut rounds = tokio::time::interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = rounds.tick() => {
                    // Without the broker nobody knows who is alive: the list gets old.
                    if connection::is_connected(&self.client) {
                        self.render();
                        let inbox = self.inbox.clone();
                        self.client.publish_with_reply("$SRV.STATS", inbox, "".into()).await?;
                    }
                }
                answer = self.answers.next() => match answer {
                    Some(answer) => self.heard(&answer.payload),
                    None => anyhow::bail!("the connection to NATS was closed"),
                },
                tick = self.ticks.next() => match tick {
                    Some(tick) => {
                        let tick = Draw::decode(&tick.payload).ok();
                        self.latest_tick = tick.or(self.latest_tick.take());
                    }
                    None => anyhow::bail!("the connection to NATS was closed"),
                },
            }
        }
    }

    fn heard(&mut self, payload: &[u8]) {
        // What is no such answer is somebody else's.
        let (true, Ok(stats)) =
            (payload.len() <= MAX_ANSWER, serde_json::from_slice::<Stats>(payload))
        else {
            return;
        };
        let key = (stats.name.clone(), stats.id.clone());
        if self.known.len() >= MAX_REPLICAS && !self.known.contains_key(&key) {
            return;
        }
        let replica = Replica {
            service: stats.name,
            id: stats.id,
            version: stats.version,
            started: stats.started,
            requests: stats.endpoints.iter().map(|e| e.num_requests).sum(),
            errors: stats.endpoints.iter().map(|e| e.num_errors).sum(),
            heard: Instant::now(),
        };
        self.known.insert(key, replica);
    }

    /// Writes the list down. Until the first answers had time to come there is none.
    fn render(&mut self) {
        self.known.retain(|_, replica| replica.heard.elapsed() < GONE);
        if self.known.is_empty() {
            return;
        }
        let body = serde_json::to_string(&Body {
            as_of: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            latest_tick: self.latest_tick.as_ref(),
            replicas: self.known.values().collect(),
        });
        let body = body.unwrap_or_default() + "\n";
        self.list.send_replace(Some((body.into(), Instant::now())));
    }
}
