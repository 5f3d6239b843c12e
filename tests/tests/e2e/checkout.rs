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
