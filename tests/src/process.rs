//! A process that a test starts and that ends with the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Scratch, patience, repository};

/// A running process. Dropping it kills it.
pub struct Process {
    child: Child,
    log: PathBuf,
    /// The command for a restart.
    command: Vec<String>,
    variables: Vec<(&'static str, &'static str)>,
}

impl Process {
    /// Starts one of the project's binaries. Its output goes to a file in `scratch`.
    pub fn start(scratch: &Scratch, binary: &str, args: &[&str]) -> Self {
        Self::start_with(scratch, binary, args, &[])
    }

    /// As [`Self::start`], with environment variables.
    pub fn start_with(
        scratch: &Scratch,
        binary: &str,
        args: &[&str],
        variables: &[(&'static str, &'static str)],
    ) -> Self {
        let path = binaries().join(binary);
        let mut command = vec![path.to_str().unwrap().to_owned()];
        command.extend(args.iter().map(ToString::to_string));
        Self::spawn(scratch, binary, command, variables.to_vec())
    }

    /// Starts another program. `name` is the name of its log.
    pub fn start_command(scratch: &Scratch, name: &str, command: Vec<String>) -> Self {
        Self::spawn(scratch, name, command, Vec::new())
    }

    fn spawn(
        scratch: &Scratch,
        name: &str,
        command: Vec<String>,
        variables: Vec<(&'static str, &'static str)>,
    ) -> Self {
        let log = (0..)
            .map(|n| scratch.path(&format!("{name}-{n}.log")))
            .find(|path| !path.exists())
            .unwrap();
        let child = spawn(&command, &variables, &log);
        Self { child, log, command, variables }
    }

    /// Starts the same command again, after the process has ended.
    pub fn start_again(&mut self) {
        assert!(self.exit_status().is_some(), "it is still running");
        self.child = spawn(&self.command, &self.variables, &self.log);
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All output of the process so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    /// Sends SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM and waits for the end.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait().await
    }

    /// The status with which it has ended, if it has.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end within [`patience`].
    pub async fn wait(&mut self) -> ExitStatus {
        self.until("it ends", async |process| process.exit_status()).await
    }

    /// Waits until the output contains `text`, and returns the first line that does.
    pub async fn wait_for(&mut self, text: &str) -> String {
        self.until(text, async |process| {
            let log = process.log();
            let line = log.lines().find(|line| line.contains(text)).map(str::to_owned);
            if let (None, Some(status)) = (&line, process.exit_status()) {
                panic!("ended with {status} before it printed {text:?}:\n{}", process.log());
            }
            line
        })
        .await
    }

    /// Waits until `probe` returns a value.
    ///
    /// # Panics
    /// If there is none within [`patience`].
    pub async fn until<T>(
        &mut self,
        what: &str,
        mut probe: impl AsyncFnMut(&mut Self) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = probe(self).await {
                return value;
            }
            assert!(
                start.elapsed() < patience(),
                "{}: timeout while waiting for: {what}\n{}",
                self.command[0],
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &[String], variables: &[(&str, &str)], log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    let mut child = Command::new(&command[0]);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("EVENODD_") {
            child.env_remove(name);
        }
    }
    child
        .args(&command[1..])
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", command[0]))
}

/// The directory with the binaries, built from the current source.
#[must_use]
pub fn binaries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        // A test is target/debug/deps/e2e-…, a benchmark is target/release/deps/latency-…; the
        // binaries are in the directory above.
        let test = std::env::current_exe().unwrap();
        let directory = test.parent().unwrap().parent().unwrap().to_owned();
        let mut build = Command::new(env!("CARGO"));
        build.current_dir(repository()).args(["build", "--quiet", "--workspace", "--bins"]);
        if directory.ends_with("release") {
            build.arg("--release");
        }
        // These variables, which cargo sets for a test, would make build scripts run again.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                build.env_remove(name);
            }
        }
        let status = build.status().unwrap();
        assert!(status.success(), "the services do not build");
        directory
    })
}
