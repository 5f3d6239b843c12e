//! The shell of a service process: settings, logging, signals, and an end within bounds.

use std::future::Future;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Command, Parser};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::settings::CommonSettings;
use crate::{health, telemetry};

/// A service: settings that know how to run.
pub trait Service: Parser {
    /// The settings that every service has.
    fn common(&self) -> &CommonSettings;

    /// The address and path where `healthcheck` asks whether it is well.
    fn health(&self) -> Option<(SocketAddr, &'static str)>;

    /// What is wrong with settings that are right one by one.
    ///
    /// # Errors
    /// That, for a person.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    /// Does the service's work until `shutdown` is cancelled, then finishes what it has begun.
    /// To return before that is a failure, whatever it returns.
    fn run(self, shutdown: CancellationToken) -> impl Future<Output = anyhow::Result<()>> + Send;
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
        return health::check(service.health());
    }
    let common = service.common().clone();
    // The connector says at every attempt what `connection` says once.
    telemetry::start(&common.log, "info,async_nats=warn,async_nats::connector=off");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            error!("cannot start the runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run_until_drained(service, common));
    // A task that hangs on a blocking call must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run_until_drained<S: Service>(service: S, common: CommonSettings) -> anyhow::Result<()> {
    let shutdown = shutdown_on_signal()?;
    let mut run = std::pin::pin!(service.run(shutdown.clone()));
    let ended = tokio::select! {
        result = &mut run => Some(result),
        () = shutdown.cancelled() => None,
    };
    let result = match ended {
        Some(result) => result,
        None => match tokio::time::timeout(common.drain_ms, run).await {
            Ok(result) => result,
            Err(_) => anyhow::bail!(
                "stopped before everything was finished: --drain-ms allows {} ms",
                common.drain_ms.as_millis()
            ),
        },
    };
    result?;
    anyhow::ensure!(shutdown.is_cancelled(), "the service ended by itself");
    info!("stopped");
    Ok(())
}

/// A token that the first SIGINT or SIGTERM cancels. The signals are taken from here on: neither
/// ends the process any more by itself.
///
/// # Errors
/// If the signals cannot be listened to.
pub fn shutdown_on_signal() -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let shutdown = CancellationToken::new();
    let cancel = shutdown.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        cancel.cancel();
        info!("{name}: finishing");
    });
    Ok(shutdown)
}
