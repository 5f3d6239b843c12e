//! `evenodd up`: the whole pipeline on one machine, every service a process of its own.

mod child;
mod preflight;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use async_nats::ServerAddr;
use clap::Args;
use runtime::settings::NatsSettings;
use runtime::telemetry::{LogFormat, LogSettings};
use runtime::{Credentials, Shutdown, connection};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::{USER, provision};
use child::{Children, DRAIN, Spec};
use preflight::Ready;

/// The broker's configuration; ports and directories come from its command line.
const NATS_CONFIGURATION: &str = include_str!("../../../nats/single.conf");

/// Run the whole pipeline on this machine
///
/// Starts a broker and every service as a process of its own, restarts what dies, and stops everything in order on Ctrl-C. The history stays in the data directory.
#[derive(Args, Clone, Debug)]
pub struct Up {
    /// Use this broker instead of starting one
    #[arg(
        long,
        env = "EVENODD_NATS",
        value_name = "URL",
        value_delimiter = ',',
        hide_env_values = true, // it may hold a password
        value_parser = runtime::settings::server,
        conflicts_with = "nats_port"
    )]
    nats: Option<Vec<ServerAddr>>,

    #[command(flatten)]
    credentials: Credentials,

    /// The port of the broker that is started, on 127.0.0.1; its monitoring gets this port + 4000
    #[arg(long, env = "EVENODD_NATS_PORT", value_name = "PORT", default_value = "4222", value_parser = clap::value_parser!(u16).range(1..=61535))]
    nats_port: u16,

    /// The nats-server to start
    #[arg(long, env = "EVENODD_NATS_SERVER", value_name = "FILE", default_value = "nats-server")]
    nats_server: PathBuf,

    /// Where the history is kept
    #[arg(long, env = "EVENODD_DATA", value_name = "DIRECTORY", default_value = "./data")]
    data: PathBuf,

    /// Where the first gateway listens; each further one takes the next port
    #[arg(
        long,
        env = "EVENODD_HTTP",
        value_name = "ADDRESS:PORT",
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
        let ready = match preflight::check(&self).await {
            Ok(ready) => ready,
            Err(faults) => {
                for fault in faults {
                    eprintln!("error: {fault}");
                }
                return Ok(ExitCode::FAILURE);
            }
        };
        let shutdown = Shutdown::on_signal(DRAIN)?;
        // The order to stop in: nobody loses what it needs before it has stopped itself.
        let mut stages = Vec::new();
        let refused = CancellationToken::new();
        let result = self.start(&ready, log, &shutdown, &refused, &mut stages).await;
        if result.is_ok() {
            tokio::select! {
                _ = shutdown.begun() => {}
                () = refused.cancelled() => {}
            }
        }
        while let Some(stage) = stages.pop() {
            stage.stop().await;
        }
        // For whoever reads the last lines.
        tokio::time::sleep(Duration::from_millis(50)).await;
        result?;
        // The same status as the service that does not take its settings.
        Ok(if refused.is_cancelled() { ExitCode::from(2) } else { ExitCode::SUCCESS })
    }

    /// Starts everything, and pushes what it started onto `stages`. Returns early on shutdown.
    async fn start(
        &self,
        ready: &Ready,
        log: &LogSettings,
        shutdown: &Shutdown,
        refused: &CancellationToken,
        stages: &mut Vec<Children>,
    ) -> anyhow::Result<()> {
        if self.nats.is_none() {
            stages.push(Children::start(vec![self.broker(ready)], refused));
        }
        let servers = self.servers();
        let provisioned = async {
            // No client before the broker listens: it would only complain.
            let own = ("127.0.0.1", self.nats_port);
            while self.nats.is_none() && TcpStream::connect(own).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let settings =
                NatsSettings { nats: servers.clone(), credentials: self.credentials.clone() };
            let client = connection::connect(&settings, USER, "evenodd up").await?;
            let wait = Duration::from_secs(120);
            for outcome in provision::provision(&client, 1, wait).await? {
                anyhow::ensure!(outcome.refused.is_empty(), "{outcome}");
            }
            anyhow::Ok(())
        };
        tokio::select! {
            result = provisioned => result.context("cannot provision the streams")?,
            _ = shutdown.begun() => return Ok(()),
        }
        let service = |binary, label, n: u16, own: &[&str]| {
            let mut args = self.common_args(log);
            args.extend(own.iter().map(ToString::to_string));
            Spec {
                label: format!("{label}-{}", n + 1),
                program: ready.binaries.join(binary),
                args,
                servers: Some(self.server_list()),
                ..Spec::default()
            }
        };
        let gateways = (0..self.gateways)
            .map(|n| service("gateway", "gateway", n, &["--http", &self.http(n).to_string()]))
            .collect();
        let even = (0..self.even).map(|n| service("generator", "even", n, &["--parity", "even"]));
        let odd = (0..self.odd).map(|n| service("generator", "odd", n, &["--parity", "odd"]));
        let generators = even.chain(odd).collect();
        let multipliers =
            (0..self.multipliers).map(|n| service("multiplier", "multiplier", n, &[])).collect();
        for stage in [gateways, generators, multipliers] {
            stages.push(Children::start(stage, refused));
        }
        child::print_line(self.banner(ready));
        Ok(())
    }

    fn servers(&self) -> Vec<ServerAddr> {
        self.nats.clone().unwrap_or_else(|| {
            let local = format!("nats://127.0.0.1:{}", self.nats_port);
            local.parse().into_iter().collect()
        })
    }

    fn server_list(&self) -> String {
        let urls: Vec<_> = self.servers().iter().map(|s| s.as_url_str().to_owned()).collect();
        urls.join(",")
    }

    fn monitoring_port(&self) -> u16 {
        self.nats_port + 4000
    }

    /// Where the n-th gateway listens.
    fn http(&self, n: u16) -> SocketAddr {
        SocketAddr::new(self.http.ip(), self.http.port().saturating_add(n))
    }

    fn broker(&self, ready: &Ready) -> Spec {
        let data = ready.data.to_string_lossy();
        let args = [
            "-c".to_owned(),
            format!("{data}/nats-server.conf"),
            "-sd".to_owned(),
            data.into_owned(),
            "-p".to_owned(),
            self.nats_port.to_string(),
            "-m".to_owned(),
            self.monitoring_port().to_string(),
        ];
        Spec {
            label: "nats".to_owned(),
            program: self.nats_server.clone(),
            args: args.into(),
            // It says more than anybody wants to read while all is well.
            hide: Some("[INF]"),
            holds: ready.lock.clone(),
            ..Spec::default()
        }
    }

    /// What every service is told.
    fn common_args(&self, log: &LogSettings) -> Vec<String> {
        let mut args = vec!["--drain-ms".to_owned(), DRAIN.as_millis().to_string()];
        args.extend(self.credentials.to_args());
        if let Some(filter) = &log.log {
            args.extend(["--log".to_owned(), filter.clone()]);
        }
        if log.log_format == LogFormat::Json {
            args.extend(["--log-format".to_owned(), "json".to_owned()]);
        }
        args
    }

    fn banner(&self, ready: &Ready) -> String {
        let http = self.http;
        // Without a password that the URLs may hold.
        let shown: Vec<_> = self
            .servers()
            .iter()
            .map(|server| format!("nats://{}:{}", server.host(), server.port()))
            .collect();
        let shown = shown.join(",");
        let port = match (&self.nats, self.nats_port) {
            (None, 4222) => String::new(),
            _ => format!(" --server {shown}"),
        };
        let history = if self.nats.is_none() {
            format!("in {}", ready.data.display())
        } else {
            "in the broker's store".to_owned()
        };
        let verify = ready.binaries.join("evenodd");
        format!(
            "\nEvenodd is running: {} x even, {} x odd, {} x multiplier, {} x gateway.\n\n  \
             page      http://{http}/\n  \
             numbers   curl http://{http}/numbers\n  \
             live      nats{port} sub numbers.published\n  \
             ticks     nats{port} sub ticks.done\n  \
             history   {history}; check it with: {} verify --nats {shown}\n  \
             stop      Ctrl-C\n",
            self.even,
            self.odd,
            self.multipliers,
            self.gateways,
            verify.display(),
        )
    }
}
