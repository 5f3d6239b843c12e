//! The frame of a service process: settings, logging, signals, the connection, and a shutdown with
//! a deadline.

use std::future::Future;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_nats::Client;
use clap::error::ErrorKind;
use clap::{Command, Parser};
use futures::future::OptionFuture;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::health::Health;
use crate::settings::{self, CommonSettings};
use crate::{connection, health, telemetry};

/// A service should give up at its deadline and report what it could not finish. If it misses the
/// deadline by this much, the process ends without it.
const OVERTIME: Duration = Duration::from_millis(500);

/// A service, defined by settings that can run it.
pub trait Service: Parser {
    /// The name of the service, which is also its user at the broker.
    fn name(&self) -> &'static str;

    /// The settings that every service has.
    fn common(&self) -> &CommonSettings;

    /// The page that `healthcheck` requests, if any.
    fn health_page(&self) -> Option<(SocketAddr, &'static str)> {
        Some((self.common().health?, "/healthz"))
    }

    /// Checks whether the settings fit together.
    ///
    /// # Errors
    /// What is wrong, as a message for the user.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Does the service's work until the shutdown begins, then finishes what it has begun, by the
    /// deadline. Returning before the shutdown is a failure, even with `Ok`.
    fn run(
        self,
        client: Client,
        shutdown: Shutdown,
        health: Health,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// The shutdown of a process: when it begins, and the deadline by which everything must be
/// finished.
#[derive(Clone, Debug)]
pub struct Shutdown {
    begun: CancellationToken,
    deadline: Arc<OnceLock<Instant>>,
    drain: Duration,
}

impl Shutdown {
    /// A shutdown whose deadline is this long after it begins.
    #[must_use]
    pub fn new(drain: Duration) -> Self {
        Self { begun: CancellationToken::new(), deadline: Arc::default(), drain }
    }

    /// A shutdown that begins at the first SIGINT or SIGTERM. From now on, neither signal ends the
    /// process by itself, and SIGHUP does not either.
    ///
    /// # Errors
    /// If the process cannot listen for the signals.
    pub fn on_signal(drain: Duration) -> std::io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // A process that has listened for a signal once is no longer ended by it.
        let _ = signal(SignalKind::hangup())?;
        let shutdown = Self::new(drain);
        let begin = shutdown.clone();
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            };
            begin.begin();
            info!("{name}: shutting down");
        });
        Ok(shutdown)
    }

    /// Begins the shutdown.
    pub fn begin(&self) {
        self.deadline.get_or_init(|| Instant::now() + self.drain);
        self.begun.cancel();
    }

    /// Whether it has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.begun.is_cancelled()
    }

    /// Waits until it begins, and returns the deadline.
    pub async fn begun(&self) -> Instant {
        self.begun.cancelled().await;
        self.deadline.get().copied().unwrap_or_else(Instant::now)
    }

    /// Waits until the deadline.
    pub async fn is_over(&self) {
        sleep_until(self.begun().await).await;
    }
}

/// The `main` function of a service. The exit status is 0 after a signal and a complete drain, 1
/// after a failure or a drain that took too long, and 2 for wrong settings.
#[must_use]
pub fn main<S: Service>() -> ExitCode {
    let about = "Check the health of the service that runs here with the same environment and flags; flags go before `healthcheck`";
    let healthcheck = Command::new("healthcheck").about(about);
    let command = S::command().subcommand(healthcheck).disable_help_subcommand(true);
    let mut command = settings::ignore_empty(command);
    let matches = command.clone().get_matches();
    let service = S::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Err(fault) = service.check() {
        command.error(ErrorKind::ArgumentConflict, fault).exit();
    }
    if matches.subcommand().is_some() {
        return health::check(service.health_page());
    }
    // The connector logs at every attempt what `connection` logs once.
    telemetry::start(&service.common().log, "info,async_nats=warn,async_nats::connector=off");
    settings::warn_of_unknown();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| anyhow::anyhow!("cannot start the runtime: {error}"))
        .and_then(|runtime| {
            let result = runtime.block_on(run(service));
            // A task that hangs in a blocking call must not keep the process alive.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run<S: Service>(service: S) -> anyhow::Result<()> {
    let CommonSettings { nats, drain_ms, health, .. } = service.common().clone();
    let shutdown = Shutdown::on_signal(drain_ms)?;
    let page = health.map(|address| health::listen(address, "--health"));
    let page = OptionFuture::from(page).await.transpose()?;
    let client = connection::connect(&nats, service.name()).await?;
    let health = Health::default();
    let too_late = async { sleep_until(shutdown.begun().await + OVERTIME).await };
    tokio::select! {
        result = service.run(client.clone(), shutdown.clone(), health.clone()) => result?,
        () = health::serve(page, client.clone(), health) => anyhow::bail!("the health page has ended"),
        () = too_late => anyhow::bail!("the service did not finish within --drain-ms {}", drain_ms.as_millis()),
    }
    anyhow::ensure!(shutdown.has_begun(), "the service ended without a signal");
    if connection::is_connected(&client) {
        // If this fails, the broker has just gone.
        let _ = timeout(Duration::from_secs(1), client.flush()).await;
    }
    info!("stopped");
    Ok(())
}
