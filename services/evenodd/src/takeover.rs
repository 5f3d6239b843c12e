//! `evenodd takeover`: copies the history of another broker, message for message: sequences and
//! times stay as they are.
//!
//! The server makes a snapshot of the stream and restores it (the `JetStream` API `STREAM.SNAPSHOT` and
//! `STREAM.RESTORE`, as `nats stream backup` uses it); what happens here is that the pieces are passed on. A mirror would copy as
//! well, but needs the two brokers to be connected as leaf nodes for as long as it takes.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Info, State};
use async_nats::{Client, ServerAddr};
use clap::Args;
use contract::streams::NUMBERS;
use futures::StreamExt;
use indicatif::ProgressBar;
use runtime::connection;
use runtime::jetstream::{self, NoStream};
use runtime::settings::{NatsSettings, server};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{USER, streams};

/// How long the servers may take to begin and to end: the snapshot is checked before, and the
/// index made afterwards.
const PATIENCE: Duration = Duration::from_mins(10);
/// How long the servers may take to start.
const START_PATIENCE: Duration = Duration::from_mins(2);
/// How long one piece may take.
const PIECE_PATIENCE: Duration = Duration::from_secs(30);
/// A piece, in bytes: within the `max_payload` of both of our configurations.
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
        let other =
            NatsSettings { nats: vec![self.from], credentials: runtime::Credentials::default() };
        let from = connection::connect(&other, USER, "evenodd takeover").await?;
        let to = connection::connect(&self.nats, USER, "evenodd takeover").await?;
        for (client, flag) in [(&from, "--from"), (&to, "--nats")] {
            let connected = connection::wait_until_connected(client, Duration::from_secs(10));
            ensure!(connected.await, "NATS is not reachable; see {flag}");
        }
        wait_for_room(&to).await.context("--nats")?;
        let before = jetstream::info(&from, NUMBERS, PIECE_PATIENCE).await.context("--from")?.state;

        let inbox = connection::inbox(&from);
        let mut pieces = from.subscribe(inbox.clone()).await?;
        let order = json!({ "deliver_subject": inbox, "no_consumers": true, "chunk_size": PIECE });
        let snapshot: Value = ask(&from, "STREAM.SNAPSHOT", order).await.context("--from")?;
        let config = streams::numbers(self.replicas.into());
        let order = json!({ "config": config, "state": snapshot["state"] });
        let restore: Value = ask(&to, "STREAM.RESTORE", order).await.context("--nats")?;
        let deliver = restore["deliver_subject"].as_str().context("--nats names no subject")?;

        let progress = ProgressBar::new_spinner();
        let last = loop {
            let piece = tokio::time::timeout(PIECE_PATIENCE, pieces.next())
                .await
                .context("--from has stopped sending")?
                .context("the connection to --from was closed")?;
            if let Some(status) = piece.status.filter(|status| status.as_u16() >= 400) {
                bail!("--from: {status} {}", piece.description.unwrap_or_default());
            }
            let end = piece.payload.is_empty();
            progress.inc(piece.payload.len() as u64);
            progress.set_message(format!("{} MB", progress.position() / 1_000_000));
            let request = connection::request(&to).payload(piece.payload);
            let sent = to.send_request(deliver.to_owned(), request);
            let patience = if end { PATIENCE } else { PIECE_PATIENCE };
            let answer = tokio::time::timeout(patience, sent).await.context("--nats")??;
            if end {
                break answer;
            }
            let refusal = String::from_utf8_lossy(&answer.payload);
            ensure!(refusal.is_empty(), "--nats: {refusal}");
            if let Some(reply) = piece.reply {
                from.publish(reply, "".into()).await?;
            }
        };
        progress.finish_and_clear();
        let copy = match serde_json::from_slice(&last.payload)? {
            Response::<Info>::Ok(info) => info.state,
            Response::Err { error } => bail!("--nats: {error}"),
        };
        let after = jetstream::info(&from, NUMBERS, PIECE_PATIENCE).await?.state;
        ensure!(
            same(&before, &copy) && same(&after, &copy),
            "the copy has the sequences {} to {}, --from {} to {}: was something published there \
             meanwhile? Stop that, remove the copy, and begin again",
            copy.first_sequence,
            copy.last_sequence,
            after.first_sequence,
            after.last_sequence,
        );
        println!(
            "stream {NUMBERS}: copied {} messages, sequences {} to {}",
            copy.messages, copy.first_sequence, copy.last_sequence
        );
        Ok(ExitCode::SUCCESS)
    }
}

/// Waits for JetStream, which in a cluster that is just started has no leader yet, and makes sure that
/// there is no history.
async fn wait_for_room(client: &Client) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        match jetstream::info(client, NUMBERS, Duration::from_secs(2)).await {
            Ok(_) => bail!("there is a stream {NUMBERS} already, which is never overwritten"),
            Err(error) if error.is::<NoStream>() => return Ok(()),
            Err(error) if begun.elapsed() > START_PATIENCE => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(250)).await,
        }
    }
}

async fn ask(client: &Client, verb: &str, order: Value) -> anyhow::Result<Value> {
    jetstream::api(client, verb, NUMBERS, order.to_string().into(), PATIENCE).await
}

fn same(one: &State, other: &State) -> bool {
    let key = |state: &State| (state.first_sequence, state.last_sequence, state.messages);
    key(one) == key(other)
}
