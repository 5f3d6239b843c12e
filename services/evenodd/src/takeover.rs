//! `evenodd takeover`: copies the history of another broker, message for message: sequences and
//! times stay as they are.
//!
//! One server makes a snapshot of the stream and the other restores it (the `JetStream` API
//! `STREAM.SNAPSHOT` and `STREAM.RESTORE`, as `nats stream backup` uses it); this command passes the
//! pieces on. A mirror would copy as well, but needs the two brokers to be connected as leaf nodes for
//! as long as it takes.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Info, State};
use async_nats::{Client, ServerAddr};
use bytes::Bytes;
use clap::Args;
use contract::streams::NUMBERS;
use futures::StreamExt;
use runtime::settings::{NatsSettings, server};
use runtime::telemetry::print;
use runtime::{Credentials, connection, jetstream};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::{broker, streams};

/// How long the servers may take to begin, when they check the snapshot, and to end, when they make
/// the index.
const TIMEOUT: Duration = Duration::from_mins(10);
/// How long JetStream may take to start.
const START_TIMEOUT: Duration = Duration::from_mins(2);
/// How long one piece may take.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);
/// The size of a piece in bytes: less than the `max_payload` of both our configurations.
const PIECE: usize = 32 * 1024;

/// Copy the history of another broker here, with its sequences and times
///
/// There must be no history here yet, and nothing may publish there meanwhile. The other broker keeps its own.
#[derive(Args, Clone, Debug)]
pub struct Takeover {
    /// The broker that has the history
    #[arg(long, value_name = "URL", value_parser = server)]
    from: ServerAddr,

    #[command(flatten)]
    nats: NatsSettings,

    /// How many servers keep the copy: 1 on one machine, 3 in a cluster
    #[arg(long, env = "EVENODD_REPLICAS", value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=5))]
    replicas: u8,
}

impl Takeover {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let other = NatsSettings { nats: vec![self.from], credentials: Credentials::default() };
        let from = broker::connect(&other, "--from", Duration::ZERO).await?;
        let to = broker::connect(&self.nats, "--nats", Duration::ZERO).await?;
        let deadline = Instant::now() + START_TIMEOUT;
        let existing = broker::stream_config(&to, NUMBERS, deadline).await.context("--nats")?;
        ensure!(
            existing.is_none(),
            "--nats: there is a stream {NUMBERS} already, which is never overwritten"
        );

        let inbox = connection::inbox(&from);
        let mut pieces = from.subscribe(inbox.clone()).await?;
        let order = json!({ "deliver_subject": inbox, "no_consumers": true, "chunk_size": PIECE });
        let snapshot = ask(&from, "STREAM.SNAPSHOT", order).await.context("--from")?;
        let config = streams::numbers(self.replicas.into());
        let order = json!({ "config": config, "state": snapshot["state"] });
        let restore = ask(&to, "STREAM.RESTORE", order).await.context("--nats")?;
        let subject = restore["deliver_subject"].as_str().context("--nats names no subject")?;

        let mut bytes = 0;
        loop {
            let piece = timeout(PIECE_TIMEOUT, pieces.next())
                .await
                .context("--from has stopped sending")?
                .context("the connection to --from was closed")?;
            if let Some(status) = piece.status.filter(|status| status.as_u16() >= 400) {
                bail!("--from: {status} {}", piece.description.unwrap_or_default());
            }
            // The last piece is an empty one.
            if piece.payload.is_empty() {
                break;
            }
            bytes += piece.payload.len();
            broker::show_progress(format_args!("{} MB copied", bytes / 1_000_000));
            let refusal = send(&to, subject, piece.payload, PIECE_TIMEOUT).await?;
            ensure!(refusal.is_empty(), "--nats: {}", String::from_utf8_lossy(&refusal));
            if let Some(reply) = piece.reply {
                from.publish(reply, Bytes::new()).await?;
            }
        }
        let restored = send(&to, subject, Bytes::new(), TIMEOUT).await?;
        let copy = match serde_json::from_slice(&restored)? {
            Response::<Info>::Ok(info) => info.state,
            Response::Err { error } => bail!("--nats: {error}"),
        };
        let original = jetstream::info(&from, NUMBERS, PIECE_TIMEOUT).await.context("--from")?;
        let extent = |state: &State| (state.first_sequence, state.last_sequence, state.messages);
        ensure!(
            extent(&copy) == extent(&original.state),
            "the copy ends with sequence {} and --from with {}: was something published there \
             meanwhile? Stop that, remove the copy, and begin again",
            copy.last_sequence,
            original.state.last_sequence,
        );
        print(format_args!(
            "stream {NUMBERS}: copied {} messages, sequences {} to {}",
            copy.messages, copy.first_sequence, copy.last_sequence
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn ask(client: &Client, verb: &str, order: Value) -> anyhow::Result<Value> {
    jetstream::api(client, verb, NUMBERS, order.to_string().into(), TIMEOUT).await
}

/// Sends a piece to the broker that restores the stream, and returns its answer.
async fn send(to: &Client, subject: &str, piece: Bytes, limit: Duration) -> anyhow::Result<Bytes> {
    let request = connection::request(to).payload(piece);
    let answer = timeout(limit, to.send_request(subject.to_owned(), request)).await;
    Ok(answer.context("--nats does not answer in time")?.context("--nats")?.payload)
}
