//! The gateway: what its parts share, and how they run together.

use std::sync::Arc;

use async_nats::Client;
use contract::subjects;
use futures::future::join;
use runtime::Shutdown;
use runtime::micro::{self, Counters, Description};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::history::History;
use crate::options::Options;
use crate::replicas::List;
use crate::state::State;
use crate::{reader, replicas, serve};

pub(crate) const ABOUT: Description = Description {
    name: "gateway",
    description: "serves the published numbers to HTTP clients",
    subject: subjects::PUBLISHED,
    reserved: subjects::is_ours,
};

/// What the parts of a gateway share.
pub(crate) struct Gateway {
    pub client: Client,
    pub state: State,
    pub history: Arc<History>,
    pub replicas: watch::Sender<List>,
    pub options: Options,
    pub event_streams: Arc<Semaphore>,
    pub counters: Arc<Counters>,
    /// Once it has begun, `/readyz` sends new clients elsewhere.
    pub shutdown: Shutdown,
    /// Cancelled after the linger time: no connection is accepted any more, and feeds end.
    pub closing: CancellationToken,
}

/// Serves HTTP on the listener until the shutdown, then finishes open requests by its deadline.
///
/// # Errors
/// If the connection to NATS is closed for good.
pub async fn run(
    listener: TcpListener,
    client: Client,
    options: Options,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let micro = micro::announce(&client, ABOUT).await?;
    info!(id = micro.id, "serving http://{}/", listener.local_addr()?);
    let gateway = Arc::new(Gateway {
        client: client.clone(),
        state: State::new(),
        history: Arc::new(History::new(client.clone(), options.history_reads, options.max_exports)),
        replicas: watch::Sender::new(None),
        event_streams: Arc::new(Semaphore::new(options.max_event_streams as usize)),
        options: options.clone(),
        counters: micro.counters.clone(),
        shutdown: shutdown.clone(),
        closing: CancellationToken::new(),
    });
    let linger = async {
        shutdown.begun().await;
        tokio::time::sleep(options.linger_ms).await;
        gateway.closing.cancel();
    };
    tokio::select! {
        ended = reader::run(&client, &gateway.state) => ended?,
        ended = replicas::run(&client, &gateway.replicas) => ended?,
        ended = options.access.reload_on_hangup() => match ended? {},
        ended = gateway.history.refill() => match ended {},
        _ = join(linger, serve::serve(listener, gateway.clone())) => {}
    }
    Ok(())
}
