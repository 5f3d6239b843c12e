//! `evenodd up`, as `make run` calls it.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::process::Command;

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
    let all = all_children(&up).await;
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

/// A restart does not help a service that rejects its settings, so `up` ends and repeats why.
#[tokio::test]
async fn up_ends_if_a_service_rejects_its_settings() {
    let scratch = Scratch::new();
    let key = [("EVENODD_JWT_KEY", "/nowhere/key")];
    let mut up = start_with(&scratch, port(), port(), &key);
    assert_eq!(up.process.wait().await.code(), Some(2));
    let log = up.process.log();
    let (_, end) = log.rsplit_once("error: gateway-1 refuses its settings\n").unwrap();
    assert!(end.contains("--jwt-key") && end.contains("/nowhere/key"), "{log}");
    assert!(end.lines().all(|line| line.starts_with("gateway-1    | ")), "{log}");
}

#[tokio::test]
async fn ports_that_do_not_exist_are_wrong_settings() {
    let scratch = Scratch::new();
    for args in [
        ["--http", "127.0.0.1:0", "--gateways", "1"],
        ["--http", "127.0.0.1:65535", "--gateways", "2"],
    ] {
        let mut up = Process::start(&scratch, "evenodd", &[&["up"][..], &args].concat());
        assert_eq!(up.wait().await.code(), Some(2));
        assert!(up.log().contains("--http"), "{}", up.log());
    }
}

/// `nats/install` puts the server there. `make run` has asked it already, and `up` alone looks too.
#[tokio::test]
async fn up_finds_the_nats_server_of_this_checkout() {
    let pinned = tests::repository().join("nats/bin");
    if !nats_server().starts_with(&pinned) {
        eprintln!("skipped: nats/install has chosen another server");
        return;
    }
    let scratch = Scratch::new();
    let (data, http) = (scratch.path("data"), format!("127.0.0.1:{}", port()));
    let nats_port = port().to_string();
    let data = data.to_str().unwrap();
    let args = ["up", "--data", data, "--nats-port", &nats_port, "--http", &http];
    let mut up = Process::start_with(&scratch, "evenodd", &args, &[("PATH", "/nowhere")]);
    up.wait_for("Evenodd is running").await;
    assert!(up.terminate().await.success(), "{}", up.log());
}

/// Starts `up` with a program in place of the nats-server.
fn start_with_fake(scratch: &Scratch, script: &str) -> Process {
    let fake = scratch.path("fake-nats-server");
    fs::write(&fake, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let data = scratch.path("data");
    let (nats_port, http) = (port().to_string(), format!("127.0.0.1:{}", port()));
    let args = ["up", "--nats-server", fake.to_str().unwrap(), "--data", data.to_str().unwrap()];
    let args = [&args[..], &["--nats-port", &nats_port, "--http", &http]].concat();
    Process::start(scratch, "evenodd", &args)
}

#[tokio::test]
async fn a_failed_start_ends_with_its_reason_and_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let failing = "[ \"$1\" = --version ] && { echo nats-server: v2.15.1; exit; }\n\
                   printf 'not \\377 UTF-8\\n' >&2; echo the disk is read-only >&2; exit 1";
    let mut up = start_with_fake(&scratch, failing);
    assert_eq!(up.wait().await.code(), Some(1));
    let log = up.log();
    assert_eq!(log.matches("starting it again").count(), 2, "{log}");
    let (_, end) = log.rsplit_once("error: nats cannot start").unwrap();
    assert!(end.contains("/data") && end.contains("| the disk is read-only"), "{log}");
    assert!(!scratch.path("data").exists());

    // Nor does one that fails before.
    let mut up = start_with_fake(&scratch, "echo nats-server: v2.14.9");
    assert_eq!(up.wait().await.code(), Some(1));
    assert!(up.log().contains("nats-server 2.15 or newer is needed"), "{}", up.log());
    assert!(!scratch.path("data").exists());

    // What was there before stays.
    fs::create_dir_all(scratch.path("data")).unwrap();
    fs::write(scratch.path("data/jetstream"), "no directory").unwrap();
    let mut up = start_with_fake(&scratch, &format!("exec {} \"$@\"", nats_server().display()));
    assert_eq!(up.wait().await.code(), Some(1));
    let log = up.log();
    let (_, end) = log.rsplit_once("error: nats cannot start").unwrap();
    assert!(end.contains("storage directory is not a directory"), "{log}");
    assert!(scratch.path("data/jetstream").exists());
}

/// Waits until all children are there, and returns them.
async fn all_children(up: &Up) -> Vec<i32> {
    let mut all = Vec::new();
    eventually("all children are there", async || {
        let names = ["generator", "multiplier", "gateway", "nats-server"];
        all = names.iter().flat_map(|name| children(up.process.pid(), name)).collect();
        all.len() == 8
    })
    .await;
    all
}

#[tokio::test]
async fn a_hangup_ends_nothing() {
    let scratch = Scratch::new();
    let mut up = start(&scratch, port(), port());
    is_ready(&up).await;
    let client = async_nats::connect(&up.nats).await.unwrap();
    let mut ticks = Ticks::watch(&client).await;
    ticks.take(1).await;
    up.process.signal(Signal::SIGHUP);
    for pid in all_children(&up).await {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGHUP).unwrap();
    }
    ticks.take(4).await;
    assert!(up.process.terminate().await.success(), "{}", up.process.log());
    // Nothing went wrong, so there is no warning.
    assert!(!up.process.log().contains("WARN"), "{}", up.process.log());
}

/// Sends SIGSTOP.
fn freeze(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
}

fn errors(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.starts_with("error: ")).collect()
}

fn are_gone(pids: &[i32]) -> bool {
    pids.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
}

#[tokio::test]
async fn work_that_is_lost_while_stopping_is_a_failure() {
    let scratch = Scratch::new();
    let mut up = start(&scratch, port(), port());
    is_ready(&up).await;
    let all = all_children(&up).await;
    eventually("numbers come", async || last_seq(&up).await >= 1).await;
    freeze(children(up.process.pid(), "nats-server")[0]);
    up.process.wait_for("not settled yet").await;
    assert_eq!(up.process.terminate().await.code(), Some(1));
    let log = up.process.log();
    let errors = errors(&log);
    assert!(errors[0].starts_with("error: multiplier-"), "{errors:?}");
    assert!(errors[0].ends_with("stopped with exit status: 1"), "{errors:?}");
    assert!(log.rsplit_once(errors[0]).unwrap().1.contains("their products are lost"), "{log}");
    assert_eq!(errors.last(), Some(&"error: nats stopped with signal: 9 (SIGKILL)"), "{log}");
    assert!(are_gone(&all), "{log}");
}

/// After another signal `up` does not wait for anything.
#[tokio::test]
async fn a_second_signal_kills_what_has_not_stopped() {
    let scratch = Scratch::new();
    let mut up = start(&scratch, port(), port());
    is_ready(&up).await;
    let all = all_children(&up).await;
    freeze(children(up.process.pid(), "multiplier")[0]);
    let begun = std::time::Instant::now();
    let status = up.process.until("it ends", async |up| {
        up.signal(Signal::SIGINT);
        up.exit_status()
    });
    assert_eq!(status.await.code(), Some(1), "{}", up.process.log());
    // Sooner than a frozen child is killed otherwise.
    assert!(begun.elapsed() < std::time::Duration::from_secs(7));
    let log = up.process.log();
    assert!(errors(&log)[0].starts_with("error: multiplier-"), "{log}");
    assert!(errors(&log)[0].ends_with("(SIGKILL)"), "{log}");
    assert!(are_gone(&all), "{log}");
}

#[tokio::test]
async fn every_line_is_json_if_requested() {
    let scratch = Scratch::new();
    let mut up = start_with(&scratch, port(), port(), &[("EVENODD_LOG_FORMAT", "json")]);
    is_ready(&up).await;
    eventually("numbers come", async || last_seq(&up).await >= 2).await;
    // After SIGKILL the broker has something to say, and `up` too.
    for binary in ["nats-server", "multiplier"] {
        kill(children(up.process.pid(), binary)[0]);
    }
    up.process.wait_for("\"label\":\"nats\"").await;
    is_ready(&up).await;
    assert!(up.process.terminate().await.success(), "{}", up.process.log());
    let mut refused = start_with(
        &scratch,
        port(),
        port(),
        &[("EVENODD_LOG_FORMAT", "json"), ("EVENODD_JWT_KEY", "/nowhere/key")],
    );
    assert_eq!(refused.process.wait().await.code(), Some(2));
    let mut labels = std::collections::BTreeSet::new();
    for line in [up.process.log(), refused.process.log()].iter().flat_map(|log| log.lines()) {
        let event: serde_json::Value = serde_json::from_str(line).expect(line);
        for field in ["timestamp", "level", "message"] {
            assert!(event[field].is_string(), "{field}: {line}");
        }
        labels.insert(event["label"].as_str().expect(line).to_owned());
    }
    for label in ["evenodd", "even-1", "odd-2", "multiplier-2", "gateway-1", "nats"] {
        assert!(labels.contains(label), "{label}: {labels:?}");
    }
}

/// Ends the mount of a file system with the test.
struct Mount(std::path::PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A broker that could not write refuses everything until it is started again.
#[tokio::test]
async fn after_a_full_disk_numbers_come_again_by_themselves() {
    let scratch = Scratch::new();
    let data = scratch.path("data");
    fs::create_dir(&data).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&data);
    if !mount.output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: only root can mount a small file system");
        return;
    }
    let _mount = Mount(data.clone());
    let mut up = start(&scratch, port(), port());
    is_ready(&up).await;
    let client = async_nats::connect(&up.nats).await.unwrap();
    let mut ticks = Ticks::watch(&client).await;
    ticks.take(2).await;
    // All the space, to the last byte.
    let mut filler = fs::File::create(data.join("filler")).unwrap();
    for size in [65_536, 1] {
        while filler.write_all(&vec![0; size]).is_ok() {}
    }
    // It is tried again, in vain, for as long as there is no space.
    let restarts = |log: String| log.matches("cannot write to its store; restarting it").count();
    up.process.until("two restarts", async |up| (restarts(up.log()) >= 2).then_some(())).await;
    drop(filler);
    fs::remove_file(data.join("filler")).unwrap();
    let before = last_seq(&up).await;
    eventually("numbers come again", async || last_seq(&up).await > before).await;
    ticks.take(4).await;
    assert_eq!(Audit::of(&client).await.missed(), []);
    let mut verify = Process::start(&scratch, "evenodd", &["verify", "--nats", &up.nats]);
    assert!(verify.wait().await.success(), "{}", verify.log());
    assert!(up.process.terminate().await.success(), "{}", up.process.log());
}
