//! The cluster of `docker-compose.yml`, unmodified, in real containers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::jetstream::stream::Info;
use async_nats::{Client, ConnectOptions};
use contract::streams::{NUMBERS, TICKS};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Scratch, patient, repository};

/// A Compose project for the tests. They do not touch the volumes of another cluster on this
/// machine.
pub const PROJECT: &str = "evenodd-test";
/// The address where HAProxy serves HTTP.
pub const HTTP: &str = "127.0.0.1:8080";
/// The address where HAProxy forwards NATS.
pub const NATS: &str = "127.0.0.1:4222";
/// The services of the brokers.
pub const BROKERS: [&str; 3] = ["nats-1", "nats-2", "nats-3"];
/// The users that have a key.
pub const USERS: [&str; 5] = ["even", "odd", "multiplier", "gateway", "operator"];

/// Runs a program to its end, and returns what it printed.
///
/// # Panics
/// If it fails.
#[must_use]
pub fn run(program: &str, args: &[&str]) -> String {
    run_with(&[], program, args)
}

fn run_with(variables: &[(&str, &str)], program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args).current_dir(repository()).envs(variables.iter().copied());
    // The settings of another cluster on this machine.
    command.env("COMPOSE_DISABLE_ENV_FILE", "1");
    let output = command.output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {}: {}\n{}{}",
        args.join(" "),
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout).trim_end().to_owned()
}

/// Runs `docker compose` on this project.
pub fn compose(args: &[&str]) -> String {
    compose_with(&[], args)
}

/// As [`compose`], with environment variables.
pub fn compose_with(variables: &[(&str, &str)], args: &[&str]) -> String {
    run_with(variables, "docker", &[&["compose", "--project-name", PROJECT], args].concat())
}

/// Runs `docker`.
pub fn docker(args: &[&str]) -> String {
    run("docker", args)
}

/// The names of the running containers of a service, or of all services if the name is empty.
#[must_use]
pub fn containers(service: &str) -> Vec<String> {
    let project = format!("label=com.docker.compose.project={PROJECT}");
    let mut args = vec!["ps", "--format", "{{.Names}}", "--filter", &project];
    let filter = format!("label=com.docker.compose.service={service}");
    if !service.is_empty() {
        args.extend(["--filter", &filter]);
    }
    let mut names: Vec<_> = docker(&args).lines().map(ToOwned::to_owned).collect();
    names.sort();
    names
}

/// The output of `docker inspect` for a format, which is a Go template.
#[must_use]
pub fn inspect(container: &str, format: &str) -> String {
    docker(&["inspect", "--format", format, container])
}

/// Kills the processes of containers at the same moment. Docker restarts them as after a crash,
/// which it does not do after `docker kill`.
pub fn crash(containers: &[String]) {
    let pid = |container: &String| inspect(container, "{{.State.Pid}}").parse().unwrap();
    let pids: Vec<_> = containers.iter().map(pid).collect();
    for pid in pids {
        kill(Pid::from_raw(pid), Signal::SIGKILL)
            .expect("cannot kill the process of a container; run this as root");
    }
}

/// Cuts a container off the network. Connections stay open, but nothing passes.
pub fn disconnect(container: &str) {
    docker(&["network", "disconnect", &network(), container]);
}

/// Connects a container of this service to the network again.
pub fn reconnect(container: &str, service: &str) {
    docker(&["network", "connect", "--alias", service, &network(), container]);
}

/// The network that all containers share.
#[must_use]
pub fn network() -> String {
    format!("{PROJECT}_default")
}

/// Removes a container outside the project, if it exists.
pub fn remove(container: &str) {
    let filter = format!("name=^{container}$");
    let found = docker(&["ps", "--all", "--quiet", "--filter", &filter]);
    if !found.is_empty() {
        docker(&["rm", "--force", container]);
    }
}

/// The address of a container in that network.
#[must_use]
pub fn ip(container: &str) -> String {
    inspect(container, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
}

/// The name of the only container of a service.
#[must_use]
pub fn container(service: &str) -> String {
    format!("{PROJECT}-{service}-1")
}

/// Polls until `condition` holds.
///
/// # Panics
/// If it does not within two minutes. Brokers may first have to elect leaders and catch up.
pub async fn in_time(what: &str, condition: impl AsyncFnMut() -> bool) {
    within(Duration::from_mins(2), what, condition).await;
}

/// Polls until `condition` holds.
///
/// # Panics
/// If it does not within `limit`.
pub async fn within(limit: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let (begun, limit) = (Instant::now(), patient(limit));
    while !condition().await {
        assert!(begun.elapsed() < limit, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Copies of the keys that the cluster made.
pub struct Keys(PathBuf);

impl Keys {
    /// Copies the keys from their volume.
    #[must_use]
    pub fn copy(scratch: &Scratch, name: &str) -> Self {
        let directory = scratch.path(name);
        docker(&["cp", &format!("{}:/keys", container("keys")), directory.to_str().unwrap()]);
        Self(directory)
    }

    /// The path of one of the files.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    /// Every file and its content.
    #[must_use]
    pub fn contents(&self) -> BTreeMap<String, String> {
        let files = std::fs::read_dir(&self.0).unwrap().map(|file| {
            let file = file.unwrap();
            let content = std::fs::read_to_string(file.path()).unwrap();
            (file.file_name().into_string().unwrap(), content)
        });
        files.collect()
    }

    /// The options with which a user connects.
    #[must_use]
    pub fn options(&self, user: &str) -> ConnectOptions {
        let seed = std::fs::read_to_string(self.path(&format!("{user}.nk"))).unwrap();
        ConnectOptions::new()
            .nkey(seed)
            .require_tls(true)
            .add_root_certificates(self.path("ca.pem"))
            .custom_inbox_prefix(format!("_INBOX_{user}"))
            .ping_interval(Duration::from_secs(1))
            .request_timeout(Some(Duration::from_secs(2)))
            .connection_timeout(Duration::from_secs(2))
            .retry_on_initial_connect()
    }

    /// A client with all permissions, on the broker that HAProxy chooses.
    pub async fn operator(&self) -> Client {
        self.options("operator").connect(NATS).await.unwrap()
    }
}

/// The state of a stream, if it has a leader.
pub async fn stream_info(operator: &Client, stream: &str) -> Option<Info> {
    let context = async_nats::jetstream::new(operator.clone());
    let stream = context.get_stream(stream).await.ok()?;
    Some(stream.cached_info().clone())
}

/// Whether both streams are current on all three brokers, and every container is healthy.
pub async fn is_whole(operator: &Client) -> bool {
    for stream in [NUMBERS, TICKS] {
        let cluster = stream_info(operator, stream).await.and_then(|info| info.cluster);
        let current = cluster.is_some_and(|cluster| {
            let current = |peer: &async_nats::jetstream::stream::PeerInfo| peer.current;
            cluster.leader.is_some()
                && cluster.replicas.iter().filter(|peer| current(peer)).count() == 2
        });
        if !current {
            return false;
        }
    }
    let well = "{{.State.Status}} {{.State.Health.Status}}";
    containers("").iter().all(|container| inspect(container, well) == "running healthy")
}
