//! Reads a stream by direct get (NATS ADR-31). Any replica of the stream answers, a read can begin
//! at any position, and it leaves no state behind on the server.

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

/// The most messages that one read may request.
pub const MAX_BATCH: usize = 1000;

/// How long a replica may be silent before the request fails.
const PATIENCE: Duration = Duration::from_millis(500);
/// If the answer is not complete after this time, the read is requested once more, most likely from
/// another replica. The first complete answer counts.
const HEDGE: Duration = Duration::from_millis(150);
/// How often one read is requested. If one of three replicas is silent, all five requests reach it
/// once in 243 reads.
const TRIES: usize = 5;

/// Statuses that come in place of a message: no further message, no message, no responders.
const END_OF_BATCH: u16 = 204;
const NOT_FOUND: u16 = 404;
const NO_RESPONDERS: u16 = 503;

/// A stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its sequence in the stream. The first message has 1.
    pub sequence: u64,
    /// When the stream stored it.
    pub time: OffsetDateTime,
    /// The `Nats-Msg-Id` it was published with.
    pub message_id: Option<String>,
    /// The payload, not decoded.
    pub payload: Bytes,
}

/// Why a read failed. The caller may retry.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No replica answered in time.
    #[error("stream {0}: no answer in time")]
    TimedOut(&'static str),
    /// No server answers for the stream: it does not exist, or `JetStream` is not up.
    #[error("stream {0} is not there: is JetStream up, and did `evenodd provision` run?")]
    NoStream(&'static str),
    /// The answer is not a valid answer to a direct get.
    #[error("stream {0}: {1}")]
    Unexpected(&'static str, String),
}

/// Where a read begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At this sequence, or at the next one that exists.
    Sequence(u64),
    /// At the first message that was stored at this time or later.
    Time(OffsetDateTime),
}

impl From<u64> for Start {
    fn from(sequence: u64) -> Self {
        Self::Sequence(sequence)
    }
}

/// Reads up to `limit` messages (1 to [`MAX_BATCH`]) from `start` on, in order. Returns fewer, or
/// none, if the stream has no more, or if the answering replica lags behind.
///
/// # Errors
/// [`ReadError::TimedOut`] after five requests without an answer. Any other [`ReadError`] at once.
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

/// Reads the last message of a stream, if there is one.
///
/// # Errors
/// As [`read`].
pub async fn last(client: &Client, stream: &'static str) -> Result<Option<Entry>, ReadError> {
    let entries = ask(client, stream, json!({ "last_by_subj": ">" })).await?;
    Ok(entries.into_iter().next())
}

async fn ask(
    client: &Client,
    stream: &'static str,
    request: serde_json::Value,
) -> Result<Vec<Entry>, ReadError> {
    // Without a batch size the answer is one message, and no end marker follows it.
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
            // A stored message can have a status too, because its publisher chose the headers.
            _ if is_stored(&message) => entries.push(message.try_into().map_err(unexpected)?),
            None => return Err(unexpected(format!("the answer has no header {NATS_SEQUENCE}"))),
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

/// The last value of a header. The server adds its headers after those of the publisher, which may
/// have the same names.
fn header(headers: &HeaderMap, name: async_nats::HeaderName) -> Result<&str, String> {
    headers
        .get_last(name.clone())
        .map(async_nats::HeaderValue::as_str)
        .ok_or_else(|| format!("no header {name}"))
}
