//! Child processes: started, their output prefixed, started again when they die, stopped.

use std::io::{self, Write};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long a child may take to stop before it is killed.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(8);
/// The least time between two starts of a child: one that dies after that is started again at once.
const RESTART_INTERVAL: Duration = Duration::from_secs(1);

/// What to start, and to start again whenever it ends.
pub struct Spec {
    /// The prefix of its output.
    pub label: String,
    pub command: Command,
    /// Of the broker's output only warnings and errors are shown, and its status 2 is a crash.
    pub is_broker: bool,
}

impl Spec {
    pub fn new(label: String, program: &Path) -> Self {
        let mut command = Command::new(program);
        // `up` has named these already.
        runtime::settings::unknown().for_each(|name| _ = command.env_remove(name));
        command
            // Every child would get the same address.
            .env_remove("EVENODD_HEALTH")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // All of them log here.
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
        Self { label, command, is_broker: false }
    }
}

/// The children in stages: the stage that was started last is stopped first.
#[derive(Default)]
pub struct Children {
    stages: Vec<(JoinSet<()>, CancellationToken)>,
    /// Cancelled when a service refuses its settings.
    pub refused: CancellationToken,
}

impl Children {
    /// Starts another stage.
    pub fn start(&mut self, specs: impl IntoIterator<Item = Spec>) {
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for spec in specs {
            tasks.spawn(keep_running(spec, stop.clone(), self.refused.clone()));
        }
        self.stages.push((tasks, stop));
    }

    /// Stops one stage after the other, and waits until all children are gone.
    pub async fn stop(self) {
        for (tasks, stop) in self.stages.into_iter().rev() {
            stop.cancel();
            tasks.join_all().await;
        }
    }
}

async fn keep_running(mut spec: Spec, stop: CancellationToken, refused: CancellationToken) {
    while !stop.is_cancelled() {
        let restart = Instant::now() + RESTART_INTERVAL;
        let result = run(&mut spec, &stop).await;
        let label = &spec.label;
        match result {
            Ok(status) if status.success() && stop.is_cancelled() => {}
            Ok(status) if stop.is_cancelled() => warn!("{label} stopped with {status}"),
            // The service has said what is wrong, and would say the same for ever.
            Ok(status) if status.code() == Some(2) && !spec.is_broker => return refused.cancel(),
            Ok(status) => warn!("{label} ended with {status}; starting it again"),
            Err(error) => warn!("cannot start {label}: {error}"),
        }
        stop.run_until_cancelled(tokio::time::sleep_until(restart)).await;
    }
}

/// Runs a child until it ends by itself or has been stopped.
async fn run(spec: &mut Spec, stop: &CancellationToken) -> io::Result<ExitStatus> {
    let mut child = spec.command.spawn()?;
    let output = print(spec, child.stderr.take());
    let end = async {
        if let Some(status) = stop.run_until_cancelled(child.wait()).await {
            return status;
        }
        if let Some(pid) = child.id() {
            // It may have ended by itself in this moment.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
        if let Ok(status) = tokio::time::timeout(STOP_TIMEOUT, child.wait()).await {
            return status;
        }
        warn!("{} did not stop within {} s: killing it", spec.label, STOP_TIMEOUT.as_secs());
        child.kill().await?;
        child.wait().await
    };
    let (status, ()) = tokio::join!(end, output);
    status
}

async fn print(spec: &Spec, output: Option<ChildStderr>) {
    let Some(output) = output else { return };
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if !(spec.is_broker && line.contains("[INF]")) {
            print_line(format!("{:<12} | {line}", spec.label));
        }
    }
}

/// Queues a line for printing; drops it when the queue is full. So neither this process nor its
/// children wait for a reader of the output.
pub fn print_line(line: String) {
    const QUEUE: usize = 4096;
    static PRINTER: LazyLock<SyncSender<String>> = LazyLock::new(|| {
        let (sender, lines) = sync_channel::<String>(QUEUE);
        std::thread::spawn(move || {
            for line in lines {
                let _ = writeln!(io::stdout(), "{line}");
            }
        });
        sender
    });
    let _ = PRINTER.try_send(line);
}
