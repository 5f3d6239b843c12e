//! `evenodd up`: the whole pipeline on one machine, every service a process of its own.

pub mod child;
mod preflight;

use std::future::pending;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use runtime::settings::{NatsSettings, listen_address};
use runtime::telemetry::{LogFormat, LogSettings};
use runtime::{Credentials, Shutdown};

use crate::provision::Provision;
use child::{Children, STOP_TIMEOUT, Spec};

/// How long the broker and JetStream may take to start. After a SIGKILL the broker reads the whole
/// history before it listens: 7 to 10 s for 40 million messages.
const START_TIMEOUT: Duration = Duration::from_mins(10);

/// The label of this process among the labels of its children.
pub const LABEL: &str = "evenodd";

/// The nats-server on PATH.
const NATS_SERVER: &str = "nats-server";

/// Run the whole pipeline on this machine
///
/// Starts a broker and every service as a process of its own, restarts what dies, and stops everything in order on Ctrl-C. The history stays in the data directory.
#[derive(Args, Clone, Debug)]
pub struct Up {
    /// The port of the broker, on 127.0.0.1; its monitoring gets this port + 4000
    #[arg(long, env = "EVENODD_NATS_PORT", value_name = "PORT", default_value = "4222", value_parser = clap::value_parser!(u16).range(1..=61535))]
    nats_port: u16,

    /// The nats-server to start
    #[arg(long, env = "EVENODD_NATS_SERVER", value_name = "FILE", default_value = NATS_SERVER)]
    nats_server: PathBuf,

    /// Where the history is kept
    #[arg(long, env = "EVENODD_DATA", value_name = "DIRECTORY", default_value = "./data")]
    data: PathBuf,

    /// Where the first gateway listens; each further one takes the next port
    #[arg(
        long,
        env = "EVENODD_HTTP",
        value_name = "ADDRESS:PORT",
        value_parser = listen_address,
        default_value = "127.0.0.1:8080"
    )]
    http: SocketAddr,

    /// How many generators of even numbers to run
    #[arg(long, env = "EVENODD_EVEN", value_name = "N", default_value = "2", value_parser = clap::value_parser!(u16).range(0..=100))]
    even: u16,

    /// How many generators of odd numbers to run
    #[arg(long, env = "EVENODD_ODD", value_name = "N", default_value = "2", value_parser = clap::value_parser!(u16).range(0..=100))]
    odd: u16,

    /// How many multipliers to run
    #[arg(long, env = "EVENODD_MULTIPLIERS", value_name = "N", default_value = "2", value_parser = clap::value_parser!(u16).range(0..=100))]
    multipliers: u16,

    /// How many gateways to run
    #[arg(long, env = "EVENODD_GATEWAYS", value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(0..=100))]
    gateways: u16,
}

impl Up {
    pub async fn run(self, log: &LogSettings) -> anyhow::Result<ExitCode> {
        let further = self.gateways.saturating_sub(1);
        if self.http.port() == 0 || self.http.port().checked_add(further).is_none() {
            crate::report(log, "--http: each gateway needs a port of its own, from 1 to 65535");
            return Ok(ExitCode::from(2));
        }
        let evenodd = std::env::current_exe().context("cannot find this program's own file")?;
        let broker = preflight::check(&self, &evenodd).await?;
        let shutdown = Shutdown::on_signal(STOP_TIMEOUT)?;
        let mut children = Children::default();
        children.control.log_format = log.log_format;
        let control = children.control.clone();
        let result = tokio::select! {
            result = self.run_children(&evenodd, broker, log, &mut children) => result,
            () = control.failed.cancelled() => Ok(()),
            _ = shutdown.begun() => Ok(()),
        };
        tokio::spawn(async move {
            // `timeout` and others send the same signal twice.
            tokio::time::sleep(Duration::from_millis(200)).await;
            if let Ok(again) = Shutdown::on_signal(STOP_TIMEOUT) {
                again.begun().await;
                control.kill.cancel();
            }
        });
        let failures = children.stop().await;
        if result.is_err() || !failures.is_empty() {
            preflight::clean_up(&self.data);
        }
        // Time to print the last lines.
        tokio::time::sleep(Duration::from_millis(50)).await;
        failures.iter().for_each(|(_, text)| crate::report(log, text));
        result?;
        Ok(failures.iter().map(|(status, _)| *status).max().unwrap_or(0).into())
    }

    /// Starts everything, and returns only if that fails.
    async fn run_children(
        &self,
        evenodd: &Path,
        broker: Spec,
        log: &LogSettings,
        children: &mut Children,
    ) -> anyhow::Result<()> {
        // In this order, so that what is needed is stopped after those that need it.
        children.start([broker]);
        let url = format!("nats://127.0.0.1:{}", self.nats_port);
        let nats = NatsSettings { nats: vec![url.parse()?], credentials: Credentials::default() };
        let provision = Provision { nats, replicas: 1, wait_ms: START_TIMEOUT };
        let say = |line: String| {
            child::print(log.log_format, LABEL, "INFO", &line);
            Ok(())
        };
        provision.run(say).await.context("cannot provision the streams")?;

        let service = |label, program, n, args: &[&str]| {
            let label = format!("{label}-{}", n + 1);
            let mut spec = Spec::new(label, &evenodd.with_file_name(program));
            spec.command.args(args).args(["--nats", &url]);
            spec.command.args(log.log.iter().flat_map(|filter| ["--log", filter]));
            if log.log_format == LogFormat::Json {
                spec.command.args(["--log-format", "json"]);
            }
            spec
        };
        let gateways = (0..self.gateways)
            .map(|n| service("gateway", "gateway", n, &["--http", &self.http(n).to_string()]));
        children.start(gateways);
        let even = (0..self.even).map(|n| service("even", "generator", n, &["--parity", "even"]));
        let odd = (0..self.odd).map(|n| service("odd", "generator", n, &["--parity", "odd"]));
        children.start(even.chain(odd));
        children.start((0..self.multipliers).map(|n| service("multiplier", "multiplier", n, &[])));
        let http = self.http;
        say(format!(
            "Evenodd is running: http://{http}/ has the numbers, {url} the live feed. Ctrl-C stops it."
        ))?;
        pending().await
    }

    /// The port of the broker's monitoring.
    fn monitoring_port(&self) -> u16 {
        self.nats_port + 4000
    }

    /// Where the n-th gateway listens.
    fn http(&self, n: u16) -> SocketAddr {
        SocketAddr::new(self.http.ip(), self.http.port().saturating_add(n))
    }
}
