//! Service 4: an HTTP server that reads the history ahead of its clients.
//!
//! `reader` follows the stream and keeps `state`: a `snapshot` of the last 100 `record`s, rendered
//! in every `format` again for each new message. `routes` answers from it, and asks `history` only
//! for what is older. `live` goes on where a client was, `replicas` knows who is alive, `access`
//! who may ask, and `serve` is the loop over connections. `gateway` holds and runs these parts.

mod access;
mod encoding;
mod format;
mod gateway;
mod history;
mod live;
mod options;
mod problem;
mod query;
mod reader;
mod record;
mod replicas;
mod routes;
mod serve;
mod snapshot;
mod state;

use std::net::SocketAddr;

use async_nats::Client;
use clap::Parser;
use runtime::health::{self, Health};
use runtime::settings::{CommonSettings, listen_address};
use runtime::{Service, Shutdown};

use crate::gateway::ABOUT;
pub use crate::gateway::run;
pub use crate::options::Options;

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
        value_parser = listen_address,
        default_value = "127.0.0.1:8080"
    )]
    http: SocketAddr,

    #[command(flatten)]
    options: Options,
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
        if self.options.linger_ms >= self.common.drain_ms {
            return Err("--linger-ms is part of --drain-ms, and must be less".to_owned());
        }
        self.options.access.read().map_err(|error| format!("{error:#}"))
    }

    async fn run(self, client: Client, shutdown: Shutdown, _: Health) -> anyhow::Result<()> {
        serve::raise_file_limit(self.options.max_connections);
        let listener = health::listen(self.http, "--http").await?;
        run(listener, client, self.options, shutdown).await
    }
}
