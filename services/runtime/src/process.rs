//! The shell of a service process: settings, logging, signals, the connection, and an end within
//! bounds.

use std::future::Future;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_nats::Client;
use clap::error::ErrorKind;
use clap::{Command, Parser};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::settings::CommonSettings;
use crate::{connection, health, telemetry};

/// A service that misses its deadline by this much is ended: it should have given up by itself, and
/// have said on what.
const OVERTIME: Duration = Duration::from_millis(500);

/// A service: settings that know how to run.
pub trait Service: Parser {
    /// What the service is called, which is also its user at the broker.
    fn name(&self) -> &'static str;

    /// The settings that every service has.
    fn common(&self) -> &CommonSettings;

    /// Where to answer `GET /healthz` for the service, if anywhere.
    fn health(&self) -> Option<SocketAddr> {
        None
    }

    /// The page that `healthcheck` asks.
    fn health_page(&self) -> Option<(SocketAddr, &'static str)> {
        Some((self.health()?, "/healthz"))
    }

    /// Checks what no setting can be checked for alone.
    ///
    /// # Errors
    /// What is wrong, for a person.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Does the service's work until the shutdown begins, then finishes what it has begun, by the
    /// deadline. To return before the shutdown is a failure, whatever it returns.
    fn run(
        self,
        client: Client,
        shutdown: Shutdown,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// The end of a process: when it begins, and by when everything must be finished.
#[derive(Clone, Debug)]
pub struct Shutdown {
    begun: CancellationToken,
    deadline: Arc<OnceLock<Instant>>,
    drain: Duration,
}

impl Shutdown {
    /// One that leaves this much time once it begins.
    #[must_use]
    pub fn new(drain: Duration) -> Self {
        Self { begun: CancellationToken::new(), deadline: Arc::default(), drain }
    }

    /// One that the first SIGINT or SIGTERM begins. From here on, neither signal ends the process by
    /// itself.
    ///
    /// # Errors
    /// If the signals cannot be listened to.
    pub fn on_signal(drain: Duration) -> std::io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let shutdown = Self::new(drain);
        let begin = shutdown.clone();
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            };
            begin.begin();
            info!("{name}: finishing");
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
}

/// The whole of a service's `main`. Status 0 after a signal and a complete drain, 1 after a
/// failure or a drain that took too long, 2 for wrong settings.
#[must_use]
pub fn main<S: Service>() -> ExitCode {
    let about = "Ask the service that runs here with the same flags (before this) and environment whether it is well";
    let healthcheck = Command::new("healthcheck").about(about);
    let mut command = S::command().subcommand(healthcheck).disable_help_subcommand(true);
    let matches = command.clone().get_matches();
    let service = S::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Err(fault) = service.check() {
        command.error(ErrorKind::ArgumentConflict, fault).exit();
    }
    if matches.subcommand().is_some() {
        return health::check(service.health_page());
    }
    // The connector says at every attempt what `connection` says once.
    telemetry::start(&service.common().log, "info,async_nats=warn,async_nats::connector=off");
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| anyhow::anyhow!("cannot start the runtime: {error}"))
        .and_then(|runtime| {
            let result = runtime.block_on(run(service));
            // A task that hangs on a blocking call must not keep the process.
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
    let CommonSettings { nats, drain_ms, .. } = service.common().clone();
    let shutdown = Shutdown::on_signal(drain_ms)?;
    let health = health::listen(service.health()).await?;
    let client = connection::connect(&nats, service.name(), service.name()).await?;
    let too_late = async { sleep_until(shutdown.begun().await + OVERTIME).await };
    tokio::select! {
        result = service.run(client.clone(), shutdown.clone()) => result?,
        never = health::serve(health, client.clone()) => match never {},
        () = too_late => anyhow::bail!("--drain-ms {} was not enough to finish everything", drain_ms.as_millis()),
    }
    anyhow::ensure!(shutdown.has_begun(), "the service ended by itself");
    if connection::is_connected(&client) {
        // What was published last leaves the process.
        let _ = tokio::time::timeout(Duration::from_secs(1), client.flush()).await;
    }
    info!("stopped");
    Ok(())
}
