//! The script `nats/install`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use tests::{Scratch, nats_server, repository};

fn install(variable: &str, value: &str) -> Output {
    let mut install = Command::new(repository().join("nats/install"));
    install.env_remove("NATS_SERVER").env(variable, value);
    install.output().unwrap()
}

fn fake(scratch: &Scratch, says: &str) -> String {
    let path = scratch.path("nats-server");
    fs::write(&path, format!("#!/bin/sh\n{says}\n")).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The script uses the server that `NATS_SERVER` names, or fails.
#[test]
fn a_named_server_is_used_or_refused_with_a_reason() {
    let scratch = Scratch::new();
    let good = nats_server().to_str().unwrap();
    let taken = install("NATS_SERVER", good);
    assert!(taken.status.success());
    assert_eq!(String::from_utf8_lossy(&taken.stdout).trim(), good);
    for (server, reason) in [
        ("/nonexistent/nats-server".to_owned(), "not a nats-server that runs"),
        (fake(&scratch, "echo nats-server: v2.9.10"), "version 2.9.10"),
    ] {
        let refused = install("NATS_SERVER", &server);
        assert!(!refused.status.success());
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(error.contains(reason) && error.contains(&server), "{error}");
    }
}

/// The script ignores a server on PATH that is too old or broken.
#[test]
fn an_unusable_server_on_path_is_ignored() {
    // `nats_server` has fetched the pinned server if it was needed. If not, the test is skipped.
    let pinned = repository().join("nats/bin");
    if !nats_server().starts_with(&pinned) {
        return;
    }
    for says in ["echo nats-server: v2.9.10", "exit 3"] {
        let scratch = Scratch::new();
        let server = fake(&scratch, says);
        let directory = Path::new(&server).parent().unwrap().to_str().unwrap();
        let path = format!("{directory}:{}", std::env::var("PATH").unwrap());
        let output = install("PATH", &path);
        assert!(output.status.success());
        let chosen = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(Path::new(&chosen).starts_with(&pinned), "{chosen}");
    }
}
