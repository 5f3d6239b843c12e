//! A real nats-server.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::signal::Signal;

use crate::{Process, Scratch, repository};

/// A nats-server with a store and ports of its own.
pub struct Broker {
    process: Process,
    port: u16,
    command: Vec<String>,
}

impl Broker {
    /// Starts one with the configuration that `evenodd up` uses.
    pub async fn start(scratch: &Scratch) -> Self {
        Self::start_with(scratch, &repository().join("nats/single.conf")).await
    }

    /// Starts one with a configuration of the test's.
    pub async fn start_with(scratch: &Scratch, configuration: &Path) -> Self {
        let store = scratch.path("jetstream");
        let command: Vec<String> = [
            nats_server().to_str().unwrap(),
            "-c",
            configuration.to_str().unwrap(),
            "-sd",
            store.to_str().unwrap(),
            "-m",
            "-1",
            "-p",
        ]
        .map(str::to_owned)
        .into();
        // The server takes a free port itself, and keeps it over restarts.
        let mut process = Process::start_command(scratch, "nats-server", with_port(&command, -1));
        let line = process.wait_for("Listening for client connections on").await;
        let port = line.rsplit(':').next().unwrap().parse().unwrap();
        process.wait_for("Server is ready").await;
        Self { process, port, command }
    }

    /// Where clients connect.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The port that clients connect to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again, on the same store and port.
    pub async fn restart(&mut self, scratch: &Scratch) {
        assert!(self.process.exit_status().is_some(), "it is still running");
        let command = with_port(&self.command, self.port.into());
        self.process = Process::start_command(scratch, "nats-server", command);
        self.process.wait_for("Server is ready").await;
    }

    /// SIGSTOP: connections stay open and nothing is answered.
    pub fn freeze(&self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }
}

fn with_port(command: &[String], port: i32) -> Vec<String> {
    let mut command = command.to_vec();
    command.push(port.to_string());
    command
}

/// The nats-server that `nats/install` settles on.
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
