//! Reading a stream by direct get (NATS ADR-31): any replica answers, nothing is left behind on
//! the server, and the cost does not depend on where in the stream one reads.

use std::time::Duration;

use async_nats::header::{HeaderMap, NATS_MESSAGE_ID, NATS_SEQUENCE, NATS_TIME_STAMP};
use async_nats::{Client, Message};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use tokio::time::timeout;

use crate::connection;
use crate::hedge::hedged;

/// The most messages that one batch may ask for.
pub const MAX_BATCH: usize = 1000;

/// How long a replica may be silent before it is given up.
const PATIENCE: Duration = Duration::from_millis(500);
/// When it has not answered after this time, the read is asked for once more, and most likely from
/// another replica. The first answer counts.
const HEDGE: Duration = Duration::from_millis(150);
/// How often one read is asked for: one of three replicas that is silent gets all of these requests
/// once in 243 times.
const TRIES: usize = 5;

/// Statuses in place of a message: no (further) message; nobody listens.
const END_OF_BATCH: u16 = 204;
const NOT_FOUND: u16 = 404;
const NO_RESPONDERS: u16 = 503;

/// A stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the stream; the first message has 1.
    pub sequence: u64,
    /// When the stream stored it.
    pub time: OffsetDateTime,
    /// The `Nats-Msg-Id` it was published with.
    pub message_id: Option<String>,
    /// What was published, not yet decoded.
    pub payload: Bytes,
}

/// Why a read failed. It may be tried again.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No replica answered in time.
    #[error("stream {0}: no answer in time")]
    TimedOut(&'static str),
    /// Nobody serves the stream: it does not exist, or `JetStream` is not up.
    #[error("stream {0} is not there: is JetStream up, and did `evenodd provision` run?")]
    NoStream(&'static str),
    /// An answer that is not one of a direct get.
    #[error("stream {0}: {1}")]
    Unexpected(&'static str, String),
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With this sequence, or the next one that there is.
    Sequence(u64),
    /// With the first message that was stored at this time or later.
    Time(OffsetDateTime),
}

impl From<u64> for Start {
    fn from(sequence: u64) -> Self {
        Self::Sequence(sequence)
    }
}

/// Up to `limit` messages (1 to [`MAX_BATCH`]) from `start` on, in order. Fewer, or none,
/// if the stream, or the replica that answers, has no more yet.
///
/// # Errors
/// [`ReadError`] after five tries.
pub async fn read(
    client: &Client,
    stream: &'static str,
    start: impl Into<Start>,
    limit: usize,
) -> Result<Vec<Entry>, ReadError> {
    let mut request = json!({ "batch": limit.clamp(1, MAX_BATCH) });
    match start.into() {
        Start::Sequence(sequence) => request["seq"] = sequence.max(1).into(),
        // The server counts nanoseconds since 1970 in 64 bits, up to the year 2262.
        Start::Time(time) => match i64::try_from(time.unix_timestamp_nanos()) {
            Ok(nanoseconds) if nanoseconds > 0 => {
                let time = time.to_offset(UtcOffset::UTC).format(&Rfc3339);
                request["start_time"] = time.unwrap_or_default().into();
            }
            Err(_) if time.year() > 1970 => return Ok(Vec::new()),
            _ => request["seq"] = 1.into(),
        },
    }
    ask(client, stream, request).await
}

/// The last message of a stream, if there is one.
///
/// # Errors
/// [`ReadError`] after five tries.
pub async fn last(client: &Client, stream: &'static str) -> Result<Option<Entry>, ReadError> {
    let entries = ask(client, stream, json!({ "last_by_subj": ">" })).await?;
    Ok(entries.into_iter().next())
}

async fn ask(
    client: &Client,
    stream: &'static str,
    request: serde_json::Value,
) -> Result<Vec<Entry>, ReadError> {
    // Without a batch size the one message is the whole answer, and no end follows it.
    let single = request.get("batch").is_none();
    let payload = Bytes::from(request.to_string());
    let read = hedged(HEDGE, TRIES, async || {
        match ask_once(client, stream, payload.clone(), single).await {
            Err(ReadError::TimedOut(_)) => None,
            result => Some(result),
        }
    });
    read.await.unwrap_or(Err(ReadError::TimedOut(stream)))
}

async fn ask_once(
    client: &Client,
    stream: &'static str,
    request: Bytes,
    single: bool,
) -> Result<Vec<Entry>, ReadError> {
    let unexpected = |what: String| ReadError::Unexpected(stream, what);
    let timed_out = |_| ReadError::TimedOut(stream);
    let open = async {
        let inbox = connection::inbox(client);
        let answers = client.subscribe(inbox.clone()).await?;
        let subject = format!("$JS.API.DIRECT.GET.{stream}");
        client.publish_with_reply(subject, inbox, request).await?;
        Ok::<_, async_nats::Error>(answers)
    };
    let open = timeout(PATIENCE, open).await.map_err(timed_out)?;
    let mut answers = open.map_err(|error| unexpected(error.to_string()))?;
    let mut entries = Vec::new();
    loop {
        let message = timeout(PATIENCE, answers.next()).await.map_err(timed_out)?;
        let message = message.ok_or_else(|| unexpected("the connection was closed".to_owned()))?;
        match message.status.map(|status| status.as_u16()) {
            // What is stored may have a status too: anything can be published.
            _ if is_stored(&message) => entries.push(message.try_into().map_err(unexpected)?),
            None => return Err(unexpected(format!("no header {NATS_SEQUENCE}"))),
            Some(END_OF_BATCH | NOT_FOUND) => return Ok(entries),
            Some(NO_RESPONDERS) => return Err(ReadError::NoStream(stream)),
            Some(status) => {
                let description = message.description.unwrap_or_default();
                return Err(unexpected(format!("{status} {description}")));
            }
        }
        if single {
            return Ok(entries);
        }
    }
}

fn is_stored(message: &Message) -> bool {
    message.headers.as_ref().is_some_and(|headers| headers.get(NATS_SEQUENCE).is_some())
}

/// A message with the headers of a direct get (ADR-31), or of a republished one (ADR-28).
impl TryFrom<Message> for Entry {
    type Error = String;

    fn try_from(message: Message) -> Result<Self, String> {
        let headers = message.headers.unwrap_or_default();
        let sequence = header(&headers, NATS_SEQUENCE)?;
        let sequence = sequence.parse().map_err(|e| format!("{NATS_SEQUENCE}: {e}"))?;
        let time = OffsetDateTime::parse(header(&headers, NATS_TIME_STAMP)?, &Rfc3339)
            .map_err(|e| format!("{NATS_TIME_STAMP}: {e}"))?;
        let message_id = headers.get(NATS_MESSAGE_ID).map(ToString::to_string);
        Ok(Self { sequence, time, message_id, payload: message.payload })
    }
}

impl Entry {
    /// When the stream stored it, since the Unix epoch.
    #[must_use]
    pub fn since_epoch(&self) -> Duration {
        (self.time - OffsetDateTime::UNIX_EPOCH).try_into().unwrap_or_default()
    }
}

/// The server adds its headers after those of the publisher, who may have sent the same.
fn header(headers: &HeaderMap, name: async_nats::HeaderName) -> Result<&str, String> {
    headers
        .get_last(name.clone())
        .map(async_nats::HeaderValue::as_str)
        .ok_or_else(|| format!("no header {name}"))
}
