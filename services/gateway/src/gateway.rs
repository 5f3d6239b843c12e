//! The gateway: what its parts share, and how they run together.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use contract::subjects;
use runtime::connection;
use runtime::micro::{self, Counters, Description};
use runtime::settings::milliseconds;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::access::Access;
use crate::history::History;
use crate::limits::Limits;
use crate::replicas::List;
use crate::state::State;
use crate::{reader, replicas, routes, serve};

pub(crate) const ABOUT: Description = Description {
    name: "gateway",
    description: "serves the published numbers to HTTP clients",
    version: env!("CARGO_PKG_VERSION"),
    subject: subjects::PUBLISHED,
    reserved: subjects::is_ours,
};

/// What a gateway can be told, besides where it listens and where NATS is.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    #[command(flatten)]
    pub(crate) limits: Limits,

    /// How long to go on as before after SIGTERM, in milliseconds; part of --drain-ms. /readyz is
    /// 404 from the first moment, so that a load balancer sends new clients elsewhere
    #[arg(long, env = "EVENODD_LINGER_MS", value_name = "MS", default_value = "0", value_parser = milliseconds(0..=600_000))]
    pub(crate) linger_ms: Duration,

    #[command(flatten)]
    access: Access,
}

/// What the parts of a gateway share.
pub(crate) struct Gateway {
    pub client: Client,
    pub state: State,
    pub history: Arc<History>,
    pub replicas: watch::Sender<List>,
    pub access: Access,
    pub event_streams: Arc<Semaphore>,
    pub request_timeout: Duration,
    pub counters: Arc<Counters>,
    /// New clients should go elsewhere.
    pub leaving: CancellationToken,
    /// No new client is let in, and feeds end.
    pub shutdown: CancellationToken,
}

/// Serves HTTP on the listener until `leaving` is cancelled and `drain_ms` is over at the latest.
///
/// # Errors
/// If the connection to NATS is closed for good.
pub async fn run(
    listener: TcpListener,
    client: Client,
    options: Options,
    drain_ms: Duration,
    leaving: CancellationToken,
) -> anyhow::Result<()> {
    let Options { limits, linger_ms, access } = options;
    let address = listener.local_addr()?;
    let micro = micro::announce(&client, ABOUT).await?;
    let history = History::new(client.clone(), limits.history_reads, limits.max_exports);
    let shutdown = CancellationToken::new();
    let gateway = Arc::new(Gateway {
        client: client.clone(),
        state: State::new(),
        history: Arc::new(history),
        replicas: watch::Sender::new(None),
        access,
        event_streams: Arc::new(Semaphore::new(limits.max_event_streams as usize)),
        request_timeout: limits.request_ms,
        counters: micro.counters.clone(),
        leaving: leaving.clone(),
        shutdown: shutdown.clone(),
    });
    let linger = async {
        leaving.cancelled().await;
        tokio::time::sleep(linger_ms).await;
        shutdown.cancel();
    };
    // Some time is left for what follows.
    let drain = drain_ms.mul_f64(0.8).saturating_sub(linger_ms);
    let routes = routes::all(gateway.clone());
    let serve = serve::serve(listener, routes, limits, drain, shutdown.clone());
    info!(id = micro.id, "serving http://{address}/");
    tokio::select! {
        ended = reader::run(&client, &gateway.state) => ended?,
        ended = replicas::run(&client, &gateway.replicas) => ended?,
        ended = gateway.access.reload_on_hangup() => match ended? {},
        ended = gateway.history.refill() => match ended {},
        _ = futures::future::join(linger, serve) => {}
    }
    connection::flush(&client).await;
    Ok(())
}
