//! A service of the NATS Services API (ADR-32). It answers `$SRV.PING`, `INFO` and `STATS`, and
//! `nats micro ls` and `nats micro stats` show every replica with its statistics. Services that
//! answer no other requests are listed as well. docs/adr/0004 explains why this does not use the
//! client's own implementation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, Message, Subject};
use futures::StreamExt;
use futures::stream::select_all;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Iso8601;
use tokio_util::task::AbortOnDropHandle;

/// How a service describes itself.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The kind of service; all its replicas share it.
    pub name: &'static str,
    /// A short description.
    pub description: &'static str,
    /// The subject of the statistics: the one on which the service answers requests, or else the
    /// one that it writes or reads.
    pub subject: &'static str,
    /// Whether the service must not reply to a subject. The requester chooses the reply subject,
    /// and could otherwise make the service publish to a subject of the pipeline.
    pub reserved: fn(&str) -> bool,
}

/// What a replica has done since it started.
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

/// A replica, announced for as long as this value lives.
pub struct Micro {
    /// The id of the replica. Every start of a process has a new one.
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
    let started = OffsetDateTime::now_utc().format(&Iso8601::DEFAULT)?;
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
                // Only a closed connection causes an error, and then the requester is gone too.
                if let (Some(reply), Some(answer)) = (about.reply_subject(question), answer) {
                    let _ = client.publish(reply, answer.to_string().into()).await;
                }
            }
        }
    });
    Ok(Micro { id, counters, _answers: AbortOnDropHandle::new(answers) })
}

impl Description {
    /// The reply subject of a request, if it has one and the service may reply to it.
    #[must_use]
    pub fn reply_subject(&self, request: Message) -> Option<Subject> {
        request.reply.filter(|reply| !(self.reserved)(reply))
    }
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
        // That of the workspace, which all services share.
        "version": env!("CARGO_PKG_VERSION"),
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
