//! A service of the NATS Services API (ADR-32): it answers `$SRV.PING`, `INFO` and `STATS`, so
//! that `nats micro ls` and `nats micro stats` show every replica and what it did.
//!
//! The client's own implementation hides the subscription of an endpoint, and with it the way to
//! leave a queue group without losing what is on its way (see [`Requests`] and docs/adr/0004).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use async_nats::{Client, Message, Subject, Subscriber};
use contract::subjects;
use futures::StreamExt;
use futures::stream::select_all;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::task::AbortOnDropHandle;

use crate::connection;

/// What a service tells about itself.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The kind of service; all its replicas share it.
    pub name: &'static str,
    /// One sentence.
    pub description: &'static str,
    /// The version of the service (semantic).
    pub version: &'static str,
    /// The subject that its work is about: the one it answers on, or else the one it writes or
    /// reads. The statistics are about this.
    pub subject: &'static str,
}

/// What a replica did since it started.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Counters {
    /// Counts one piece of work, how long it took, and whether it failed.
    pub fn count(&self, took: Duration, failed: bool) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(failed.into(), Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// A replica that is announced for as long as this value lives.
pub struct Micro {
    /// The id of the replica, unique for every start.
    pub id: String,
    /// Its statistics.
    pub counters: Arc<Counters>,
    _answers: AbortOnDropHandle<()>,
}

/// Announces this process as a replica of the service.
///
/// # Errors
/// If the connection was closed.
pub async fn announce(client: &Client, about: Description) -> anyhow::Result<Micro> {
    let id = nuid::next().to_string();
    let started = OffsetDateTime::now_utc().format(&Rfc3339)?;
    let mut questions = Vec::with_capacity(9);
    for verb in ["PING", "INFO", "STATS"] {
        for whom in ["", &format!(".{}", about.name), &format!(".{}.{id}", about.name)] {
            questions.push(client.subscribe(format!("$SRV.{verb}{whom}")).await?);
        }
    }
    let mut questions = select_all(questions);
    let counters = Arc::new(Counters::default());
    let answers = tokio::spawn({
        let (client, id, counters) = (client.clone(), id.clone(), counters.clone());
        async move {
            while let Some(question) = questions.next().await {
                let answer = answer(&question, about, &id, &started, &counters);
                // Without a connection nobody hears.
                if let (Some(reply), Some(answer)) = (reply_subject(question), answer) {
                    let _ = client.publish(reply, answer.to_string().into()).await;
                }
            }
        }
    });
    Ok(Micro { id, counters, _answers: AbortOnDropHandle::new(answers) })
}

/// Where the answer to a request goes: nowhere if nobody waits for it, or if the subject that was
/// named for it is one of the pipeline's own.
#[must_use]
pub fn reply_subject(request: Message) -> Option<Subject> {
    request.reply.filter(|reply| !subjects::is_ours(reply))
}

fn answer(
    question: &Message,
    about: Description,
    id: &str,
    started: &str,
    counters: &Counters,
) -> Option<Value> {
    let verb = question.subject.split('.').nth(1)?.to_ascii_lowercase();
    let mut answer = json!({
        "type": format!("io.nats.micro.v1.{verb}_response"),
        "name": about.name,
        "id": id,
        "version": about.version,
        "metadata": {},
    });
    let mut endpoint = json!({
        "name": about.name,
        "subject": about.subject,
        "queue_group": about.name,
    });
    match verb.as_str() {
        "info" => {
            answer["description"] = about.description.into();
            answer["endpoints"] = json!([endpoint]);
        }
        "stats" => {
            let requests = counters.requests.load(Ordering::Relaxed);
            let nanoseconds = counters.nanoseconds.load(Ordering::Relaxed);
            endpoint["num_requests"] = requests.into();
            endpoint["num_errors"] = counters.errors.load(Ordering::Relaxed).into();
            endpoint["last_error"] = "".into();
            endpoint["processing_time"] = nanoseconds.into();
            endpoint["average_processing_time"] = (nanoseconds / requests.max(1)).into();
            answer["started"] = started.into();
            answer["endpoints"] = json!([endpoint]);
        }
        _ => {}
    }
    Some(answer)
}

/// Requests still taken when a replica leaves its queue group: more than can be on their way.
const LEAVING_REQUESTS: u64 = 256;
/// A pause after which a replica stops waiting for these.
const LEAVING_QUIET: Duration = Duration::from_millis(20);

/// The share of a queue group's requests that come to this replica.
///
/// To leave the group, the client library drops a subscription while the server still delivers
/// to it; under load that loses requests. Instead the server is told to deliver a certain number
/// more and no further ones. They are taken until the number is reached, or requests are so rare
/// that none is likely to come in the moment in which the subscription is dropped.
pub struct Requests {
    client: Client,
    about: Description,
    subscriber: Subscriber,
    /// The subscription of the connection before, until what it holds is taken.
    before: Option<Subscriber>,
    /// How often the client had connected when the subscription was made. The server counts what
    /// it delivers from the connection on, so that each connection gets a subscription of its own.
    connects: u64,
    taken: u64,
    leaving_until: Option<Instant>,
}

impl Requests {
    /// Joins the queue group named like the service, on the subject of the service.
    ///
    /// # Errors
    /// If the connection was closed.
    pub async fn join(client: &Client, about: Description) -> anyhow::Result<Self> {
        Ok(Self {
            subscriber: subscribe(client, about).await?,
            before: None,
            connects: connects(client),
            client: client.clone(),
            about,
            taken: 0,
            leaving_until: None,
        })
    }

    /// Starts to leave the group, within `limit`: [`next`](Self::next) gives what is on its way,
    /// then `None`.
    pub async fn leave(&mut self, limit: Duration) {
        self.leaving_until = Some(Instant::now() + limit);
        // This fails when the connection was closed; then there is nothing to leave.
        let _ = self.subscriber.unsubscribe_after(self.taken + LEAVING_REQUESTS).await;
    }

    /// After the connection was lost and made again.
    async fn join_again(&mut self) {
        let Ok(subscriber) = subscribe(&self.client, self.about).await else {
            return;
        };
        let mut before = std::mem::replace(&mut self.subscriber, subscriber);
        if before.drain().await.is_ok() {
            self.before = Some(before);
        }
        self.connects = connects(&self.client);
        self.taken = 0;
    }

    /// The next request; `None` after the last one. Cancel safe.
    pub async fn next(&mut self) -> Option<Message> {
        if let Some(before) = &mut self.before {
            match before.next().await {
                Some(request) => return Some(request),
                None => self.before = None,
            }
        }
        let request = match self.leaving_until {
            None => self.subscriber.next().await,
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                let next = tokio::time::timeout(LEAVING_QUIET.min(left), self.subscriber.next());
                match next.await {
                    Ok(request) => request,
                    // What comes in the very moment of the end is still taken.
                    Err(_) => {
                        let _ = self.subscriber.drain().await;
                        tokio::time::timeout(LEAVING_QUIET, self.subscriber.next())
                            .await
                            .ok()
                            .flatten()
                    }
                }
            }
        };
        self.taken += u64::from(request.is_some());
        if self.leaving_until.is_none() && self.connects != connects(&self.client) {
            self.join_again().await;
        }
        request
    }
}

async fn subscribe(client: &Client, about: Description) -> anyhow::Result<Subscriber> {
    client
        .queue_subscribe(about.subject, about.name.to_owned())
        .await
        .with_context(|| format!("cannot listen on {}", about.subject))
}

/// How often the client has connected; before the first time it counts as connected, because what
/// is subscribed then belongs to the first connection.
fn connects(client: &Client) -> u64 {
    connection::connects(client).max(1)
}
