//! Reads a stream by direct get (NATS ADR-31). Any replica of the stream answers, a read can begin
//! at any position, and it leaves no state behind on the server.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_nats::header::{HeaderMap, HeaderName, NATS_MESSAGE_ID, NATS_SEQUENCE, NATS_TIME_STAMP};
use async_nats::{Client, Message};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};
use tokio::time::timeout;

use crate::connection;
use crate::hedge::hedged;
use crate::jetstream::NO_STREAM;

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
/// After five requests without an answer in time. At once if the stream is not there, or if the
/// answer is an error. The caller may retry.
pub async fn read(
    client: &Client,
    stream: &'static str,
    start: impl Into<Start>,
    limit: usize,
) -> Result<Vec<Entry>> {
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
pub async fn last(client: &Client, stream: &'static str) -> Result<Option<Entry>> {
    let entries = ask(client, stream, json!({ "last_by_subj": ">" })).await?;
    Ok(entries.into_iter().next())
}

async fn ask(
    client: &Client,
    stream: &'static str,
    request: serde_json::Value,
) -> Result<Vec<Entry>> {
    // Without a batch size the answer is one message, and no end marker follows it.
    let single = request.get("batch").is_none();
    let payload = Bytes::from(request.to_string());
    let read = hedged(HEDGE, TRIES, async || {
        ask_once(client, stream, payload.clone(), single).await.transpose()
    });
    let read = read.await.unwrap_or_else(|| bail!("no answer in time"));
    read.with_context(|| format!("stream {stream}"))
}

/// Returns `None` if there is no answer in time.
async fn ask_once(
    client: &Client,
    stream: &'static str,
    request: Bytes,
    single: bool,
) -> Result<Option<Vec<Entry>>> {
    let open = async {
        let inbox = connection::inbox(client);
        let answers = client.subscribe(inbox.clone()).await?;
        let subject = format!("$JS.API.DIRECT.GET.{stream}");
        client.publish_with_reply(subject, inbox, request).await?;
        anyhow::Ok(answers)
    };
    let Ok(open) = timeout(PATIENCE, open).await else { return Ok(None) };
    let mut answers = open?;
    let mut entries = Vec::new();
    loop {
        let Ok(message) = timeout(PATIENCE, answers.next()).await else { return Ok(None) };
        let message = message.context("the connection was closed")?;
        match message.status.map(|status| status.as_u16()) {
            // A stored message can have a status too, because its publisher chose the headers.
            _ if is_stored(&message) => entries.push(message.try_into()?),
            None => bail!("the answer has no header {NATS_SEQUENCE}"),
            Some(END_OF_BATCH | NOT_FOUND) => return Ok(Some(entries)),
            Some(NO_RESPONDERS) => bail!("no responders: {NO_STREAM}"),
            Some(status) => bail!("{status} {}", message.description.unwrap_or_default()),
        }
        if single {
            return Ok(Some(entries));
        }
    }
}

fn is_stored(message: &Message) -> bool {
    message.headers.as_ref().is_some_and(|headers| headers.get(NATS_SEQUENCE).is_some())
}

/// A message with the headers of a direct get (ADR-31), or of a republished one (ADR-28).
impl TryFrom<Message> for Entry {
    type Error = anyhow::Error;

    fn try_from(message: Message) -> Result<Self> {
        let headers = message.headers.unwrap_or_default();
        let sequence = header(&headers, &NATS_SEQUENCE)?;
        let sequence = sequence.parse().context("header Nats-Sequence")?;
        let time = OffsetDateTime::parse(header(&headers, &NATS_TIME_STAMP)?, &Rfc3339)
            .context("header Nats-Time-Stamp")?;
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
fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a str> {
    let value = headers.get_last(name.clone()).with_context(|| format!("no header {name}"))?;
    Ok(value.as_str())
}
