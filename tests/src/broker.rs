//! A real nats-server.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::signal::Signal;
use tokio::net::TcpStream;

use crate::{NATS_PORT, Process, Scratch, network, repository};

/// A nats-server with a store and an address of its own.
pub struct Broker {
    process: Process,
    host: String,
}

impl Broker {
    /// Starts a server with the configuration that `evenodd up` uses.
    pub async fn start(scratch: &Scratch) -> Self {
        Self::start_with(scratch, &repository().join("nats/single.conf")).await
    }

    /// Starts a server with this configuration.
    pub async fn start_with(scratch: &Scratch, configuration: &Path) -> Self {
        Self::start_at(scratch, configuration, format!("{}.1", network())).await
    }

    /// Starts a server at this address.
    pub async fn start_at(scratch: &Scratch, configuration: &Path, host: String) -> Self {
        let store = scratch.path("jetstream");
        let command = [
            nats_server().to_str().unwrap(),
            "-c",
            configuration.to_str().unwrap(),
            "-sd",
            store.to_str().unwrap(),
            "-a",
            &host,
            "-p",
            &NATS_PORT.to_string(),
            "-m",
            "-1",
        ];
        let command = command.map(str::to_owned).into();
        let process = Process::start_command(scratch, "nats-server", command);
        let mut broker = Self { process, host };
        broker.listens().await;
        broker
    }

    async fn listens(&mut self) {
        let address = (self.host.clone(), NATS_PORT);
        self.process
            .until("it listens", async |_| TcpStream::connect(address.clone()).await.ok())
            .await;
    }

    /// Where clients connect.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://{}:{NATS_PORT}", self.host)
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts the server again, with the same store and address.
    pub async fn restart(&mut self) {
        self.process.start_again();
        self.listens().await;
    }

    /// Sends SIGSTOP: connections stay open, but the server does not answer.
    pub fn freeze(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Sends SIGCONT.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }
}

/// The nats-server that `nats/install` chooses.
#[must_use]
pub fn nats_server() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let output = Command::new(repository().join("nats/install")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        PathBuf::from(text.lines().last().unwrap())
    })
}
