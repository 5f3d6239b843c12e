//! Child processes: started, their output labelled, started again when they die, stopped.

use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runtime::telemetry::LogFormat;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long a child may take to stop before it is killed.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(8);
/// The least time between two starts of a child: one that dies after that is started again at once.
const RESTART_INTERVAL: Duration = Duration::from_secs(1);
/// The same for a broker with a write error.
const WRITE_ERROR_INTERVAL: Duration = Duration::from_secs(5);
/// A broker that ends with status 1 sooner than this cannot start; how often in a row it may do so.
const START_TIME: Duration = Duration::from_secs(60);
const MAX_FAILED_STARTS: u32 = 3;
/// How many of its last lines are repeated if a child fails.
const LAST_LINES: usize = 5;

/// What to start, and to start again whenever it ends.
pub struct Spec {
    /// Marks its output.
    pub label: String,
    pub command: Command,
    /// Of the broker: of its output only warnings and errors are shown, and its status 2 is a crash.
    pub store: Option<PathBuf>,
    /// The latest one first.
    last_lines: Vec<String>,
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
        Self { label, command, store: None, last_lines: Vec::new() }
    }
}

/// What `up` and the tasks of the children tell each other.
#[derive(Clone, Default)]
pub struct Control {
    pub log_format: LogFormat,
    /// Cancelled when a child is not started again.
    pub failed: CancellationToken,
    /// Cancelled when the children of a stage are to stop, and when there is no time left for that.
    stop: CancellationToken,
    pub kill: CancellationToken,
}

/// A child that failed for good: the exit status of `up`, and what happened, with the last lines of
/// the child.
pub type Failure = (u8, String);

/// The children in stages: the stage that was started last is stopped first.
#[derive(Default)]
pub struct Children {
    stages: Vec<(JoinSet<Option<Failure>>, CancellationToken)>,
    pub control: Control,
}

impl Children {
    /// Starts another stage.
    pub fn start(&mut self, specs: impl IntoIterator<Item = Spec>) {
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        for spec in specs {
            let control = Control { stop: stop.clone(), ..self.control.clone() };
            tasks.spawn(keep_running(spec, control));
        }
        self.stages.push((tasks, stop));
    }

    /// Stops one stage after the other, waits until all children are gone, and returns what failed.
    pub async fn stop(self) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (tasks, stop) in self.stages.into_iter().rev() {
            stop.cancel();
            failures.extend(tasks.join_all().await.into_iter().flatten());
        }
        failures
    }
}

async fn keep_running(mut spec: Spec, control: Control) -> Option<Failure> {
    let mut failed_starts = 0;
    while !control.stop.is_cancelled() {
        let started = Instant::now();
        let result = run(&mut spec, &control).await;
        let code = result.as_ref().ok().and_then(ExitStatus::code);
        let is_failed_start = code == Some(1) && started.elapsed() < START_TIME;
        failed_starts = if is_failed_start { failed_starts + 1 } else { 0 };
        let label = &spec.label;
        let fail = |status, what: String| {
            control.failed.cancel();
            let lines =
                spec.last_lines.iter().rev().map(|line| format!("\n{}", labelled(label, line)));
            Some((status, what + &lines.collect::<String>()))
        };
        match (result, &spec.store) {
            (Ok(status), _) if control.stop.is_cancelled() => {
                // SIGTERM kills a child that has only just been started.
                let is_clean = status.success() || status.signal() == Some(Signal::SIGTERM as i32);
                return fail(1, format!("{label} stopped with {status}")).filter(|_| !is_clean);
            }
            // The service has said what is wrong, and would say the same for ever.
            (Ok(_), None) if code == Some(2) => {
                return fail(2, format!("{label} refuses its settings"));
            }
            (Ok(_), Some(store)) if failed_starts == MAX_FAILED_STARTS => {
                return fail(1, format!("{label} cannot start; its store is {}", store.display()));
            }
            (Ok(status), _) => warn!(label, "ended with {status}; starting it again"),
            (Err(error), _) => warn!(label, "cannot be started: {error}"),
        }
        control.stop.run_until_cancelled(sleep_until(started + RESTART_INTERVAL)).await;
    }
    None
}

/// Runs a child until it ends by itself or has been stopped.
///
/// A broker with a write error refuses every publication from then on, even if the disk has space
/// again. So it is stopped, but not sooner than [`WRITE_ERROR_INTERVAL`] after its start.
async fn run(spec: &mut Spec, control: &Control) -> io::Result<ExitStatus> {
    let Spec { label, command, store, last_lines } = spec;
    last_lines.clear();
    let mut child = command.spawn()?;
    let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let write_error = Notify::new();
    let output = async {
        let mut lines = BufReader::new(stderr).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.is_empty() || store.is_some() && line.contains("[INF]") {
                continue;
            }
            if store.is_some() && line.to_lowercase().contains("critical write error") {
                write_error.notify_one();
            }
            let level = if line.contains("[WRN]") { "WARN" } else { "ERROR" };
            print(control.log_format, label, level, &line);
            last_lines.truncate(LAST_LINES - 1);
            last_lines.insert(0, line);
        }
    };
    let earliest = Instant::now() + WRITE_ERROR_INTERVAL;
    let restart = async {
        write_error.notified().await;
        sleep_until(earliest).await;
    };
    let end = async {
        tokio::select! {
            status = child.wait() => return status,
            () = control.stop.cancelled() => {}
            () = restart => {
                warn!(label, "cannot write to its store; restarting it");
            }
        }
        stop(&mut child, label, control).await
    };
    tokio::join!(end, output).0
}

async fn stop(child: &mut Child, label: &str, control: &Control) -> io::Result<ExitStatus> {
    if let Some(pid) = child.id() {
        // It may have ended by itself in this moment.
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
    }
    let stopped = timeout(STOP_TIMEOUT, child.wait());
    if let Some(Ok(status)) = control.kill.run_until_cancelled(stopped).await {
        return status;
    }
    warn!(label, "has not stopped in time: killing it");
    child.kill().await?;
    child.wait().await
}

/// Queues a line of the process with this label for printing; drops it when the queue is full. So
/// neither this process nor its children wait for a reader of the output.
pub fn print(format: LogFormat, label: &str, level: &str, line: &str) {
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
    let _ = PRINTER.try_send(match format {
        LogFormat::Text => labelled(label, line),
        LogFormat::Json => json(label, level, line),
    });
}

fn labelled(label: &str, line: &str) -> String {
    format!("{label:<12} | {line}")
}

/// A line as a JSON object with a label: the object that it is, or a new one.
pub fn json(label: &str, level: &str, line: &str) -> String {
    let object = serde_json::from_str(line).ok().filter(Value::is_object);
    let mut object = object.unwrap_or_else(|| {
        let timestamp = OffsetDateTime::now_utc().format(&Rfc3339).ok();
        json!({ "timestamp": timestamp, "level": level, "message": line })
    });
    object["label"] = label.into();
    object.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_becomes_an_object_with_a_label() {
        let own = json("even-1", "ERROR", r#"{"level":"INFO","message":"ready"}"#);
        assert_eq!(own, r#"{"label":"even-1","level":"INFO","message":"ready"}"#);
        for line in ["[1] [WRN] a \"text\"", "7", "[1]", "{", ""] {
            let wrapped: Value = serde_json::from_str(&json("nats", "WARN", line)).unwrap();
            assert_eq!((&wrapped["label"], &wrapped["level"]), (&json!("nats"), &json!("WARN")));
            assert_eq!(wrapped["message"], line);
            assert!(wrapped["timestamp"].as_str().unwrap().ends_with('Z'));
        }
    }
}
