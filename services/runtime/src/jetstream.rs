//! Publishes to a stream and requests its state: one request, one typed answer.
//!
//! Plain requests have three advantages over the client's own `JetStream` context. The caller sets
//! the timeout, every error keeps the server's code, and a request that is never answered leaves
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

/// The server is storing a message with the same id at this moment. Only replicated streams report
/// this.
const ERROR_IN_PROCESS: u64 = 10158;

/// A stream's acknowledgement of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The sequence of the message with this id.
    pub sequence: u64,
    /// Whether the stream already had a message with this id. It keeps the earlier one.
    pub duplicate: bool,
}

/// Why there is no acknowledgement. The stream may have stored the message anyway. A retry with the
/// same id is harmless.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A message with this id is being stored at this moment. A retry will tell the outcome.
    #[error("a message with this id is being stored at this moment")]
    InProcess,
    /// Any other error, as text: no answer in time, no stream, or a refusal.
    #[error("{0}")]
    Failed(String),
}

/// Publishes to the stream of a subject, with a message id (`Nats-Msg-Id`, NATS ADR-4), and waits
/// for the acknowledgement.
///
/// # Errors
/// [`PublishError`] if there is no acknowledgement.
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

/// Requests the state of a stream from its leader.
///
/// # Errors
/// As [`api`]. Also if the stream has no leader.
pub async fn info(client: &Client, stream: &str, timeout: Duration) -> anyhow::Result<Info> {
    api(client, "STREAM.INFO", stream, Bytes::new(), timeout).await
}

/// Sends a request of the `JetStream` API for a stream.
///
/// # Errors
/// [`NoStream`] if the stream does not exist. Also if the server reports another error, or does not
/// answer in time.
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
    // The timeout covers the time until the connection takes the request, as well as the answer.
    let answer = tokio::time::timeout(timeout, client.send_request(subject.to_owned(), request))
        .await
        .map_err(|_| format!("no answer within {} ms", timeout.as_millis()))?
        .map_err(|e| match e.kind() {
            RequestErrorKind::NoResponders => {
                "no responders: is JetStream up, and did `evenodd provision` run?".to_owned()
            }
            _ => e.to_string(),
        })?;
    serde_json::from_slice(&answer.payload)
        .map_err(|e| format!("the answer is not a valid JetStream answer: {e}"))
}
