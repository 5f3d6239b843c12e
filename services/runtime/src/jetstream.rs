//! Publishes to a stream and requests its state: one request, one typed answer.
//!
//! Plain requests have three advantages over the client's own `JetStream` context. The caller sets
//! the timeout, every error keeps the server's code, and a request that is never answered leaves
//! nothing behind (see [`connection::request`]).

use std::fmt::Display;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
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

pub(crate) const NO_STREAM: &str = "is JetStream up, and did `evenodd provision` run?";

/// A stream's acknowledgement of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The sequence of the message with this id.
    pub sequence: u64,
    /// Whether the stream already had a message with this id. It keeps the earlier one.
    pub duplicate: bool,
}

/// Publishes to the stream of a subject, with a message id (`Nats-Msg-Id`, NATS ADR-4), and waits
/// for the acknowledgement.
///
/// # Errors
/// If there is no acknowledgement: no answer in time, no stream, or a refusal. A replicated stream
/// refuses while it is storing a message with this id. The stream may have stored the message
/// anyway; a retry with the same id is harmless.
pub async fn publish(
    client: &Client,
    subject: &'static str,
    id: impl Display,
    payload: Bytes,
    timeout: Duration,
) -> anyhow::Result<Ack> {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, id.to_string());
    let request = connection::request(client).headers(headers).payload(payload);
    match answer(client, subject, request, timeout).await? {
        Response::Ok(PublishAck { sequence, duplicate, .. }) => Ok(Ack { sequence, duplicate }),
        Response::Err { error } => bail!("refused: {error}"),
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
    let answer = answer(client, &subject, request, timeout).await;
    match answer.with_context(|| format!("stream {stream}"))? {
        Response::Ok(answer) => Ok(answer),
        Response::Err { error } if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
            bail!(NoStream(stream.to_owned()))
        }
        Response::Err { error } => bail!("stream {stream}: {error}"),
    }
}

async fn answer<T: DeserializeOwned>(
    client: &Client,
    subject: &str,
    request: Request,
    timeout: Duration,
) -> anyhow::Result<Response<T>> {
    // The timeout covers the time until the connection takes the request, as well as the answer.
    let answer = tokio::time::timeout(timeout, client.send_request(subject.to_owned(), request))
        .await
        .map_err(|_| anyhow!("no answer within {} ms", timeout.as_millis()))?
        .map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => anyhow!("no responders: {NO_STREAM}"),
            _ => error.into(),
        })?;
    serde_json::from_slice(&answer.payload)
        .map_err(|error| anyhow!("the answer is not a valid JetStream answer: {error}"))
}
