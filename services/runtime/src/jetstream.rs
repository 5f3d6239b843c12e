//! Publishing to a stream: one request, one typed answer.
//!
//! A plain request says more than the client's own `JetStream` context does, in less: its time-out
//! is the caller's, and every answer of the server keeps its code.

use std::time::Duration;

use async_nats::Client;
use async_nats::client::RequestErrorKind;
use async_nats::header::{HeaderMap, NATS_MESSAGE_ID};
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use bytes::Bytes;
use contract::Slot;

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

/// Why there is no acknowledgement. The message may be stored all the same, unless this says
/// that it was refused; a retry with the same id is harmless.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// No answer in time: no leader, a broker that is frozen, or no permission.
    #[error("no acknowledgement within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// No stream listens on the subject, or `JetStream` is not up.
    #[error("no stream takes {0}: is JetStream up, and did `evenodd provision` run?")]
    NoStream(String),
    /// The same id is being stored at this moment; ask again for the outcome.
    #[error("a message with this id is being stored at this moment")]
    InProcess,
    /// The stream said no.
    #[error("refused: {0}")]
    Refused(String),
    /// The answer was no acknowledgement, or the request could not be sent.
    #[error("{0}")]
    Other(String),
}

/// Publishes to the stream that listens on `subject`, with the slot as the message id
/// (`Nats-Msg-Id`, NATS ADR-4), and waits for the acknowledgement.
///
/// # Errors
/// [`PublishError`], see there.
pub async fn publish(
    client: &Client,
    subject: &'static str,
    slot: Slot,
    payload: Bytes,
    timeout: Duration,
) -> Result<Ack, PublishError> {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, slot.to_string());
    let request = connection::request(client).headers(headers).payload(payload);
    // The time-out covers the hand-over to the connection as well as the wait for the answer.
    let answer = tokio::time::timeout(timeout, client.send_request(subject, request))
        .await
        .map_err(|_| PublishError::TimedOut(timeout))?
        .map_err(|e| match e.kind() {
            RequestErrorKind::NoResponders => PublishError::NoStream(subject.to_owned()),
            _ => PublishError::Other(e.to_string()),
        })?;
    match serde_json::from_slice(&answer.payload) {
        Ok(Response::Ok(PublishAck { sequence, duplicate, .. })) => Ok(Ack { sequence, duplicate }),
        Ok(Response::Err { error }) if error.error_code().0 == ERROR_IN_PROCESS => {
            Err(PublishError::InProcess)
        }
        Ok(Response::Err { error }) => Err(PublishError::Refused(error.to_string())),
        Err(e) => Err(PublishError::Other(format!("the answer is no acknowledgement: {e}"))),
    }
}
