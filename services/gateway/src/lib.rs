//! Service 4: an HTTP server that reads the history ahead of its clients.
//!
//! `reader` follows the stream and makes a `snapshot` of the last 100 numbers for every new
//! message; `routes` answers from it, and asks `history` only for what is older. `live` goes on
//! where a client was, `replicas` knows who is alive, `access` who may ask, and `serve` is the
//! loop over connections.

mod access;
mod encoding;
mod history;
mod live;
mod problem;
mod query;
mod reader;
mod replicas;
mod routes;
mod serve;
mod snapshot;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use async_nats::Client;
use clap::Parser;
use contract::subjects;
use runtime::micro::{self, Counters, Description};
use runtime::settings::{CommonSettings, milliseconds};
use runtime::{Service, Shutdown};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::access::Access;
use crate::history::History;
use crate::reader::Reader;
use crate::replicas::{List, Replicas};
use crate::serve::Bounds;
use crate::snapshot::State;

const ABOUT: Description = Description {
    name: "gateway",
    description: "serves the published numbers to HTTP clients",
    version: env!("CARGO_PKG_VERSION"),
    subject: subjects::PUBLISHED,
    reserved: subjects::is_ours,
};

/// Serves the published numbers to HTTP clients.
#[derive(Parser, Clone, Debug)]
#[command(name = "gateway", version)]
pub struct Settings {
    #[command(flatten)]
    common: CommonSettings,

    /// Where to listen for HTTP
    #[arg(
        long,
        env = "EVENODD_HTTP",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:8080"
    )]
    http: SocketAddr,

    /// How many connections are open at once; further ones wait to be accepted
    #[arg(long, env = "EVENODD_MAX_CONNECTIONS", value_name = "N", default_value = "12000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_connections: u32,

    /// How long a client may take to send the head of a request, in milliseconds; an idle
    /// connection is closed after the same time
    #[arg(long, env = "EVENODD_HEADER_MS", value_name = "MS", default_value = "10000", value_parser = milliseconds(10..=600_000))]
    header_ms: Duration,

    /// How long the head of a request may be, in bytes
    #[arg(long, env = "EVENODD_HEADER_BYTES", value_name = "N", default_value = "16384", value_parser = clap::value_parser!(u32).range(8192..=1_048_576))]
    header_bytes: u32,

    /// How long an answer may take to be made, and how long a client may take nothing of it, in
    /// milliseconds
    #[arg(long, env = "EVENODD_REQUEST_MS", value_name = "MS", default_value = "30000", value_parser = milliseconds(100..=600_000))]
    request_ms: Duration,

    /// How many event streams are open at once; further ones are refused
    #[arg(long, env = "EVENODD_MAX_EVENT_STREAMS", value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    max_event_streams: u32,

    /// How many exports of the history are in progress at once; further ones are refused
    #[arg(long, env = "EVENODD_MAX_EXPORTS", value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(0..=1000))]
    max_exports: u32,

    /// How often the history is read at random, beyond the last 100 numbers, in a second
    #[arg(long, env = "EVENODD_HISTORY_READS", value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    history_reads: u32,

    /// How long to go on as before after SIGTERM, of the time of --drain-ms, in milliseconds:
    /// /readyz is 404 from the first moment, so that a load balancer sends the next clients elsewhere
    #[arg(long, env = "EVENODD_LINGER_MS", value_name = "MS", default_value = "0", value_parser = milliseconds(0..=600_000))]
    linger_ms: Duration,

    #[command(flatten)]
    access: Access,
}

/// What everybody who answers needs.
struct Gateway {
    client: Client,
    state: Arc<State>,
    history: Arc<History>,
    replicas: watch::Receiver<List>,
    access: Access,
    event_streams: Arc<Semaphore>,
    request_time: Duration,
    counters: Arc<Counters>,
    /// No further client should come.
    leaving: Shutdown,
    /// No further client is let in, and feeds end.
    shutdown: CancellationToken,
}

impl Service for Settings {
    fn name(&self) -> &'static str {
        ABOUT.name
    }

    fn common(&self) -> &CommonSettings {
        &self.common
    }

    fn health_page(&self) -> Option<(SocketAddr, &'static str)> {
        Some((self.http, "/readyz"))
    }

    fn check(&self) -> Result<(), String> {
        match self.linger_ms < self.common.drain_ms {
            true => Ok(()),
            false => Err("--linger-ms is part of --drain-ms, and must be less".to_owned()),
        }
    }

    async fn run(self, client: Client, leaving: Shutdown) -> anyhow::Result<()> {
        serve::raise_file_limit(self.max_connections);
        let listener = TcpListener::bind(self.http).await.with_context(|| {
            format!("cannot listen on {}; choose another address with --http", self.http)
        })?;
        let address = listener.local_addr()?;
        let micro = micro::announce(&client, ABOUT).await?;
        let state = Arc::new(State::new());
        let reader = Reader::new(client.clone(), state.clone()).await?;
        let (replicas, list) = Replicas::new(client.clone()).await?;
        let history = History::new(client.clone(), self.history_reads, self.max_exports);
        let history = Arc::new(history);
        let shutdown = CancellationToken::new();
        let routes = routes::all(Arc::new(Gateway {
            history: history.clone(),
            client: client.clone(),
            state,
            replicas: list,
            access: self.access.clone(),
            event_streams: Arc::new(Semaphore::new(self.max_event_streams as usize)),
            request_time: self.request_ms,
            counters: micro.counters.clone(),
            leaving: leaving.clone(),
            shutdown: shutdown.clone(),
        }));
        let bounds = Bounds {
            connections: self.max_connections,
            header_time: self.header_ms,
            header_bytes: self.header_bytes as usize,
            stall: self.request_ms,
            drain: self.common.drain_ms - self.linger_ms,
        };
        let linger = {
            let (linger, shutdown) = (self.linger_ms, shutdown.clone());
            async move {
                leaving.begun().await;
                tokio::time::sleep(linger).await;
                shutdown.cancel();
                std::future::pending().await
            }
        };
        info!(id = micro.id, "serving http://{address}/");
        tokio::select! {
            never = reader.run() => never?,
            never = replicas.run() => never?,
            never = self.access.reload_on_hangup() => match never? {},
            never = history.refill() => match never {},
            never = linger => match never {},
            () = serve::serve(listener, routes, bounds, shutdown) => {}
        }
        Ok(())
    }
}
