//! The checkout itself.

use std::process::Command;

use tests::repository;

/// Git ignores every secret that a documented command writes into the checkout, and tracks none.
#[test]
fn documented_secrets_are_ignored() {
    let ignored = |path: &str| {
        let mut git = Command::new("git");
        git.args(["check-ignore", "--quiet", "--no-index", path]).current_dir(repository());
        git.status().unwrap().success()
    };
    for secret in [
        ".env",
        "ca.pem",
        "data/lock",
        "key",
        "keys/multiplier.nk",
        "operator.nk",
        "private.pem",
        "secret",
        "secrets/jwt",
        "server.key",
    ] {
        assert!(ignored(secret), "{secret}");
    }
    assert!(!ignored("secrets/README"));
}

/// A missing pip is found before the build, which takes minutes.
#[test]
fn nats_server_is_looked_for_before_the_build() {
    for target in ["run", "test", "test-page", "test-api"] {
        let mut make = Command::new("make");
        make.args(["--dry-run", "--no-print-directory", target]).current_dir(repository());
        let commands = String::from_utf8(make.output().unwrap().stdout).unwrap();
        let (install, build) = (commands.find("nats/install"), commands.find(" build "));
        assert!(install.is_some() && install < build, "{target}: {commands}");
    }
}
