//! Publishing to a stream, and asking for its state: one request, one typed answer.
//!
//! A plain request says more than the client's own `JetStream` context does, in less: its time-out
//! is the caller's, every answer of the server keeps its code, and one that never comes leaves
//! nothing behind (see [`connection::request`]).

use std::fmt::Display;
use std::time::Duration;

use async_nats::Client;
use async_nats::client::{Request, RequestErrorKind};
use async_nats::header::{HeaderMap, NATS_MESSAGE_ID};
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Info;
use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::connection;

/// The server is storing a message of the same id right now: 10158, on replicated streams.
const ERROR_IN_PROCESS: u64 = 10158;

/// What became of a message that the stream took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Where the message with this id is in the stream.
    pub sequence: u64,
    /// Whether the stream had a message with this id already; it keeps that one.
    pub duplicate: bool,
}

/// Why there is no acknowledgement. The message may be stored all the same; a retry with the same
/// id is harmless.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The same id is being stored at this moment; ask again for the outcome.
    #[error("a message with this id is being stored at this moment")]
    InProcess,
    /// Anything else, for a person: no answer in time, no stream, or a stream that refuses.
    #[error("{0}")]
    Failed(String),
}

/// Publishes to the stream that listens on `subject`, with a message id (`Nats-Msg-Id`, NATS ADR-4),
/// and waits for the acknowledgement.
///
/// # Errors
/// [`PublishError`], see there.
pub async fn publish(
    client: &Client,
    subject: &'static str,
    id: impl Display,
    payload: Bytes,
    timeout: Duration,
) -> Result<Ack, PublishError> {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, id.to_string());
    let request = connection::request(client).headers(headers).payload(payload);
    match answer(client, subject, request, timeout).await.map_err(PublishError::Failed)? {
        Response::Ok(PublishAck { sequence, duplicate, .. }) => Ok(Ack { sequence, duplicate }),
        Response::Err { error } if error.error_code().0 == ERROR_IN_PROCESS => {
            Err(PublishError::InProcess)
        }
        Response::Err { error } => Err(PublishError::Failed(format!("refused: {error}"))),
    }
}

/// The stream does not exist.
#[derive(Debug, thiserror::Error)]
#[error("stream {0} is not there; did `evenodd provision` run?")]
pub struct NoStream(String);

/// What the leader of a stream says of it.
///
/// # Errors
/// As [`api`]; also if there is no leader.
pub async fn info(client: &Client, stream: &str, timeout: Duration) -> anyhow::Result<Info> {
    api(client, "STREAM.INFO", stream, Bytes::new(), timeout).await
}

/// A request of the `JetStream` API to a stream.
///
/// # Errors
/// [`NoStream`] if that is the answer; also any other error, and no answer in time.
pub async fn api<T: DeserializeOwned>(
    client: &Client,
    verb: &str,
    stream: &str,
    payload: Bytes,
    timeout: Duration,
) -> anyhow::Result<T> {
    let subject = format!("$JS.API.{verb}.{stream}");
    let request = connection::request(client).payload(payload);
    match answer(client, &subject, request, timeout).await {
        Ok(Response::Ok(answer)) => Ok(answer),
        Ok(Response::Err { error }) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
            anyhow::bail!(NoStream(stream.to_owned()))
        }
        Ok(Response::Err { error }) => anyhow::bail!("stream {stream}: {error}"),
        Err(error) => anyhow::bail!("stream {stream}: {error}"),
    }
}

async fn answer<T: DeserializeOwned>(
    client: &Client,
    subject: &str,
    request: Request,
    timeout: Duration,
) -> Result<Response<T>, String> {
    // The time-out covers the hand-over to the connection as well as the wait for the answer.
    let answer = tokio::time::timeout(timeout, client.send_request(subject.to_owned(), request))
        .await
        .map_err(|_| format!("no answer within {} ms", timeout.as_millis()))?
        .map_err(|e| match e.kind() {
            RequestErrorKind::NoResponders => {
                "nobody answers: is JetStream up, and did `evenodd provision` run?".to_owned()
            }
            _ => e.to_string(),
        })?;
    serde_json::from_slice(&answer.payload)
        .map_err(|e| format!("the answer is not one of JetStream: {e}"))
}
