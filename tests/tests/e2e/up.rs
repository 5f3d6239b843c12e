//! `evenodd up`, as `make run` calls it.

use std::fs;
use std::net::TcpListener;

use nix::sys::signal::Signal;
use tests::http::{get, try_get};
use tests::{Audit, Process, Scratch, Ticks, eventually, nats_server, port};

struct Up {
    process: Process,
    nats: String,
    http: String,
}

fn start(scratch: &Scratch, nats_port: u16, http_port: u16) -> Up {
    start_with(scratch, nats_port, http_port, &[])
}

fn start_with(
    scratch: &Scratch,
    nats_port: u16,
    http_port: u16,
    variables: &[(&'static str, &'static str)],
) -> Up {
    let (data, http) = (scratch.path("data"), format!("127.0.0.1:{http_port}"));
    let args = [
        "up",
        "--nats-server",
        nats_server().to_str().unwrap(),
        "--data",
        data.to_str().unwrap(),
        "--nats-port",
        &nats_port.to_string(),
        "--http",
        &http,
    ];
    Up {
        process: Process::start_with(scratch, "evenodd", &args, variables),
        nats: format!("nats://127.0.0.1:{nats_port}"),
        http,
    }
}

/// The last sequence of the gateway, or 0 until it has read the history.
async fn last_seq(up: &Up) -> u64 {
    get(&up.http, "/numbers", &[]).await.json()["last_seq"].as_u64().unwrap_or(0)
}

async fn is_ready(up: &Up) {
    eventually("the gateway is ready", async || {
        try_get(&up.http, "/readyz").await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
}

#[tokio::test]
async fn up_restarts_what_dies_and_continues_the_history() {
    let scratch = Scratch::new();
    let (nats_port, http_port) = (port(), port());
    let mut up = start(&scratch, nats_port, http_port);
    up.process.wait_for("Evenodd is running").await;
    is_ready(&up).await;
    eventually("numbers come", async || last_seq(&up).await >= 2).await;

    // One child after the other is killed. Each is started again, and no slot is missed.
    let client = async_nats::connect(&up.nats).await.unwrap();
    let mut ticks = Ticks::watch(&client).await;
    for binary in ["generator", "multiplier", "gateway", "generator", "multiplier"] {
        ticks.next().await;
        let pid = children(up.process.pid(), binary)[0];
        kill(pid);
        ticks.take(3).await;
    }
    assert_eq!(up.process.log().matches("starting it again").count(), 5);
    // The broker is started again too.
    kill(children(up.process.pid(), "nats-server")[0]);
    ticks.take(6).await;
    assert_eq!(Audit::of(&client).await.missed(), []);

    is_ready(&up).await;

    // A second `up` finds everything in use, and reports all of it at once.
    let mut second = start(&scratch, nats_port, http_port);
    assert_eq!(second.process.wait().await.code(), Some(1));
    let log = second.process.log();
    for fault in ["--http", "--nats-port", "--data"] {
        assert!(log.contains(fault), "{fault}: {log}");
    }

    let stopped_at = last_seq(&up).await;
    up.process.signal(Signal::SIGINT);
    assert!(up.process.wait().await.success(), "{}", up.process.log());
    let mut up = start(&scratch, nats_port, http_port);
    is_ready(&up).await;
    let before = last_seq(&up).await;
    assert!(before >= stopped_at);
    eventually("the history goes on", async || last_seq(&up).await > before).await;
    let mut verify = Process::start(&scratch, "evenodd", &["verify", "--nats", &up.nats]);
    assert!(verify.wait().await.success(), "{}", verify.log());
    assert!(up.process.terminate().await.success());
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// If `up` itself is killed, its children end, and the next `up` finds a usable store.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn no_child_survives_when_up_is_killed() {
    let scratch = Scratch::new();
    let (nats_port, http_port) = (port(), port());
    let mut up = start(&scratch, nats_port, http_port);
    is_ready(&up).await;
    let pid = up.process.pid();
    let all = ["generator", "multiplier", "gateway", "nats-server"].map(|name| children(pid, name));
    let all: Vec<i32> = all.into_iter().flatten().collect();
    assert_eq!(all.len(), 8);
    up.process.kill();
    eventually("all children are gone", async || {
        all.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    })
    .await;
    let mut up = start(&scratch, nats_port, http_port);
    is_ready(&up).await;
    assert!(up.process.terminate().await.success());
}

/// The children of a process that have this name.
fn children(parent: u32, name: &str) -> Vec<i32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let children = processes.filter_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(process.path().join("stat")).ok()?;
        let (before, after) = stat.rsplit_once(") ")?;
        let is_child = after.split(' ').nth(1)? == parent.to_string();
        (is_child && before.contains(&format!("({name}"))).then_some(pid)
    });
    children.collect()
}

#[tokio::test]
async fn every_fault_is_named_before_anything_starts() {
    let scratch = Scratch::new();
    fs::write(scratch.path("file"), "").unwrap();
    let old = scratch.path("old-nats-server");
    fs::write(&old, "#!/bin/sh\necho nats-server: v2.9.10\n").unwrap();
    fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let args = [
        "up",
        "--nats-server",
        old.to_str().unwrap(),
        "--data",
        scratch.path("file").to_str().unwrap(),
        "--nats-port",
        &port().to_string(),
        "--http",
        &taken.local_addr().unwrap().to_string(),
    ]
    .map(str::to_owned);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut up = Process::start(&scratch, "evenodd", &args);
    assert_eq!(up.wait().await.code(), Some(1));
    let log = up.log();
    for fault in ["version 2.9.10", "data directory", "--http"] {
        assert!(log.contains(fault), "{fault}: {log}");
    }
}

/// A restart does not help a service that rejects its settings, so `up` ends.
#[tokio::test]
async fn up_ends_if_a_service_rejects_its_settings() {
    let scratch = Scratch::new();
    let key = [("EVENODD_JWT_KEY", "/nowhere/key")];
    let mut up = start_with(&scratch, port(), port(), &key);
    assert_eq!(up.process.wait().await.code(), Some(2));
    let log = up.process.log();
    assert!(log.contains("--jwt-key") && log.contains("/nowhere/key"), "{log}");
}
