//! Service 4: an HTTP server that reads the history ahead of its clients.
//!
//! `reader` follows the stream and makes a `snapshot` of the last 100 numbers for every new
//! message; `routes` answers from the snapshot alone; `serve` is the loop over connections.
//! A request never waits for the broker.

mod problem;
mod reader;
mod routes;
mod serve;
mod snapshot;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use contract::subjects;
use runtime::micro::{self, Description};
use runtime::settings::{CommonSettings, milliseconds};
use runtime::{Service, connection};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::reader::Reader;
use crate::serve::Bounds;
use crate::snapshot::State;

const ABOUT: Description = Description {
    name: "gateway",
    description: "serves the published numbers to HTTP clients",
    version: env!("CARGO_PKG_VERSION"),
    subject: subjects::PUBLISHED,
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
}

impl Service for Settings {
    fn common(&self) -> &CommonSettings {
        &self.common
    }

    async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        serve::raise_file_limit(self.max_connections);
        let listener = TcpListener::bind(self.http).await.with_context(|| {
            format!(
                "cannot listen on {}; choose another address with --http",
                self.http
            )
        })?;
        let address = listener.local_addr()?;
        let client = connection::connect(&self.common.nats, ABOUT.name, ABOUT.name).await?;
        let micro = micro::announce(&client, ABOUT).await?;
        let state = Arc::new(State::default());
        let reader = Reader::new(client.clone(), state.clone()).await?;
        let routes = routes::all(state, client.clone(), micro.counters.clone());
        let bounds = Bounds {
            connections: self.max_connections,
            header_time: self.header_ms,
            drain: self.common.drain_ms.mul_f64(0.8),
        };
        info!(id = micro.id, "serving http://{address}/numbers");
        tokio::select! {
            never = reader.run() => never?,
            () = serve::serve(listener, routes, bounds, shutdown) => {}
        }
        connection::flush(&client).await;
        Ok(())
    }
}
