//! Child processes: started, their output prefixed, started again when they die, stopped.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long a service may take to finish.
pub const DRAIN: Duration = Duration::from_secs(5);
/// How long a child may take to stop before it is killed.
const GRACE: Duration = Duration::from_secs(8);
/// A child that lived this long is started again at once when it dies.
const HEALTHY: Duration = Duration::from_secs(5);
/// The pause before a child that dies again and again is started, doubling up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// What to start.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// The prefix of its output.
    pub label: String,
    pub program: PathBuf,
    pub args: Vec<String>,
    /// Lines of output that hold this are not shown.
    pub hide: Option<&'static str>,
    /// Held open by the child, as its standard input.
    pub holds: Option<Arc<File>>,
    /// `EVENODD_NATS`: not an argument, because anybody can read those and it may hold a password.
    pub servers: Option<String>,
}

/// A group of children that are stopped together.
pub struct Children {
    tasks: JoinSet<()>,
    stop: CancellationToken,
}

impl Children {
    /// `refused` is cancelled when one of them does not take its settings.
    pub fn start(specs: Vec<Spec>, refused: &CancellationToken) -> Self {
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for spec in specs {
            tasks.spawn(keep_running(spec, stop.clone(), refused.clone()));
        }
        Self { tasks, stop }
    }

    /// Stops them, and waits until all are gone.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.join_all().await;
    }
}

async fn keep_running(spec: Spec, stop: CancellationToken, refused: CancellationToken) {
    let mut pause = Duration::ZERO;
    while !stop.is_cancelled() {
        let started = Instant::now();
        match spawn(&spec) {
            Ok(child) => {
                let status = run(&spec, child, &stop).await;
                // A service has said what is wrong; it would say the same again for ever.
                let refuses = spec.servers.is_some() && status.and_then(|s| s.code()) == Some(2);
                if refuses {
                    refused.cancel();
                    return;
                }
                if let Some(status) = status {
                    warn!("{} ended with {status}; starting it again", spec.label);
                }
            }
            Err(error) => warn!("{}: cannot start {}: {error}", spec.label, spec.program.display()),
        }
        if started.elapsed() >= HEALTHY {
            pause = Duration::ZERO;
        }
        // Nothing waits here when all is well: the first restart is immediate.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
        pause = (pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
    }
}

/// Runs a child until it dies, and says how; or is told to stop and has stopped.
async fn run(spec: &Spec, mut child: Child, stop: &CancellationToken) -> Option<ExitStatus> {
    let output = [
        child.stdout.take().map(|out| tokio::spawn(print(spec.clone(), out))),
        child.stderr.take().map(|err| tokio::spawn(print(spec.clone(), err))),
    ];
    let mut died = None;
    tokio::select! {
        status = child.wait() => died = status.ok(),
        () = stop.cancelled() => {
            if let Some(pid) = child.id() {
                // It may have ended by itself in this moment.
                let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
            }
            match tokio::time::timeout(GRACE, child.wait()).await {
                Ok(Ok(status)) if !status.success() => warn!("{} stopped with {status}", spec.label),
                Ok(_) => {}
                Err(_) => {
                    warn!("{} did not stop within {} s: killing it", spec.label, GRACE.as_secs());
                    let _ = child.kill().await;
                }
            }
        }
    }
    for printing in output.into_iter().flatten() {
        let _ = printing.await;
    }
    died
}

async fn print(spec: Spec, output: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if spec.hide.is_none_or(|hidden| !line.contains(hidden)) {
            print_line(format!("{:<12} | {line}", spec.label));
        }
    }
}

/// How many lines wait to be printed; further ones are dropped. Where nobody reads, neither this
/// process nor its children must wait.
const LINES: usize = 4096;

/// Prints a line, at some time and if somebody reads.
pub fn print_line(line: String) {
    static PRINTER: LazyLock<SyncSender<String>> = LazyLock::new(|| {
        let (lines, waiting) = sync_channel::<String>(LINES);
        std::thread::spawn(move || {
            for line in waiting {
                let _ = writeln!(std::io::stdout(), "{line}");
            }
        });
        lines
    });
    let _ = PRINTER.try_send(line);
}

fn spawn(spec: &Spec) -> std::io::Result<Child> {
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        // One address cannot be that of all of them.
        .env_remove("EVENODD_HEALTH")
        .envs(spec.servers.as_ref().map(|servers| ("EVENODD_NATS", servers)))
        .stdin(match &spec.holds {
            Some(file) => Stdio::from(file.try_clone()?),
            None => Stdio::null(),
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        // Ctrl-C on the terminal must not reach the children: they are stopped in order.
        .process_group(0);
    #[cfg(target_os = "linux")]
    // SAFETY: prctl is a plain system call, safe between fork and exec.
    #[allow(unsafe_code)]
    unsafe {
        // If `up` itself is killed, its children stop too, and leave the store clean.
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?));
    }
    command.spawn()
}
