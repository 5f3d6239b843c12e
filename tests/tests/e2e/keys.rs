//! Keys and certificates: how they are made, and that services accept only the right ones.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use tests::{Broker, Process, Scratch};

/// Makes keys and returns the directory, the exit status and what was printed.
async fn keys(scratch: &Scratch, name: &str, args: &[&str]) -> (String, Option<i32>, String) {
    let directory = scratch.path(name).to_str().unwrap().to_owned();
    let args = [&["keys", "--directory", &directory], args].concat();
    let mut process = Process::start(scratch, "evenodd", &args);
    (directory, process.wait().await.code(), process.log())
}

/// Every file with its mode and content.
fn files(directory: &str) -> BTreeMap<String, (u32, String)> {
    let files = fs::read_dir(directory).unwrap().map(|entry| {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        let content = fs::read_to_string(entry.path()).unwrap();
        (entry.file_name().into_string().unwrap(), (mode, content))
    });
    files.collect()
}

#[tokio::test]
async fn keys_are_made_once_and_missing_ones_again() {
    let scratch = Scratch::new();
    let group = fs::metadata(scratch.path("")).unwrap().gid();
    let groups = format!("even={group}");
    let args = ["--servers", "a,10.0.0.7", "--groups", &groups];
    let (directory, status, output) = keys(&scratch, "keys", &args).await;
    assert_eq!(status, Some(0), "{output}");
    let made = files(&directory);
    let modes: BTreeMap<_, _> =
        made.iter().map(|(name, (mode, _))| (name.as_str(), *mode)).collect();
    let expected = BTreeMap::from([
        ("10.0.0.7.key", 0o600),
        ("10.0.0.7.pem", 0o644),
        ("a.key", 0o600),
        ("a.pem", 0o644),
        ("ca.key", 0o600),
        ("ca.pem", 0o644),
        ("even.nk", 0o640),
        ("gateway.nk", 0o600),
        ("multiplier.nk", 0o600),
        ("odd.nk", 0o600),
        ("operator.nk", 0o600),
        ("users.conf", 0o644),
    ]);
    assert_eq!(modes, expected);
    for (name, (_, content)) in made.iter().filter(|(_, (mode, _))| *mode == 0o644) {
        let secret = made.values().any(|(mode, secret)| *mode != 0o644 && content.contains(secret));
        assert!(!secret, "{name}: {content}");
    }

    let (_, status, output) = keys(&scratch, "keys", &args).await;
    assert_eq!((status, output.as_str()), (Some(0), ""));
    assert_eq!(files(&directory), made);

    // A new user key also changes the list of public keys. A certificate without its key is made
    // again.
    for file in ["odd.nk", "a.key"] {
        fs::remove_file(Path::new(&directory).join(file)).unwrap();
    }
    let (_, status, output) = keys(&scratch, "keys", &args).await;
    assert_eq!(status, Some(0), "{output}");
    let again = files(&directory);
    let changed: Vec<_> = again.iter().filter(|(name, file)| made[*name] != **file).collect();
    let changed: Vec<_> = changed.into_iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(changed, ["a.key", "a.pem", "odd.nk", "users.conf"]);
}

#[tokio::test]
async fn errors_say_which_keys_cannot_be_made() {
    let scratch = Scratch::new();
    for (args, told) in [
        (
            ["--groups", "evens=1"],
            "evens is neither a user (even, odd, multiplier, gateway, operator)",
        ),
        (["--servers", "a/b"], "\"a/b\" is no host name"),
        (["--servers", "nats-1,ca"], "ca.pem and ca.key are the files of the authority"),
        (["--directory", "/proc/keys"], "cannot make /proc/keys"),
    ] {
        let args = [&["keys"][..], &args].concat();
        let mut process = Process::start(&scratch, "evenodd", &args);
        assert_eq!(process.wait().await.code(), Some(1));
        assert!(process.log().contains(told), "{}", process.log());
    }
    // If there are signed certificates, no new authority is made.
    let (directory, ..) = keys(&scratch, "two", &[]).await;
    for (gone, expected) in
        [("ca.pem", (Some(0), "made ")), ("ca.pem", (Some(0), "made ")), ("ca.key", (Some(0), ""))]
    {
        let before = files(&directory);
        fs::remove_file(Path::new(&directory).join(gone)).unwrap();
        let (_, status, output) = keys(&scratch, "two", &[]).await;
        assert_eq!(status, expected.0, "{output}");
        assert!(output.starts_with(expected.1) && output.lines().count() < 2, "{output}");
        let after = files(&directory);
        assert!(after.iter().all(|(name, file)| name == "ca.pem" || before[name] == *file));
    }
    fs::remove_file(Path::new(&directory).join("ca.pem")).unwrap();
    let (_, status, output) = keys(&scratch, "two", &[]).await;
    assert_eq!(status, Some(1));
    assert!(output.contains("ca.key is not there"), "{output}");
    // Without the right key of the authority nothing can be signed. A new authority would not help,
    // because the services trust the old one. This is an error only if something must be signed.
    let (directory, ..) = keys(&scratch, "keys", &[]).await;
    let (other, ..) = keys(&scratch, "other", &[]).await;
    let key = Path::new(&directory).join("ca.key");
    fs::remove_file(&key).unwrap();
    for told in ["ca.key is not there", "ca.pem is not the certificate"] {
        let (_, status, output) = keys(&scratch, "keys", &[]).await;
        assert_eq!((status, output.as_str()), (Some(0), ""));
        let (_, status, output) = keys(&scratch, "keys", &["--servers", "nats-4"]).await;
        assert_eq!(status, Some(1));
        assert!(output.contains(told), "{output}");
        fs::copy(Path::new(&other).join("ca.key"), &key).unwrap();
    }
}

/// A broker that knows the users and has a certificate.
async fn broker(scratch: &Scratch, keys: &str, host: String) -> Broker {
    let configuration = scratch.path("tls.conf");
    let text = format!(
        r#"
        jetstream {{}}
        tls {{ cert_file: "{keys}/{host}.pem", key_file: "{keys}/{host}.key" }}
        allow_non_tls: true
        include "keys/users.conf"
        authorization {{
          users: [
            {{ nkey: $EVEN_KEY }}, {{ nkey: $ODD_KEY }}, {{ nkey: $MULTIPLIER_KEY }}
            {{ nkey: $GATEWAY_KEY }}, {{ nkey: $OPERATOR_KEY }}
          ]
        }}
        "#
    );
    fs::write(&configuration, text).unwrap();
    Broker::start_at(scratch, &configuration, host).await
}

#[tokio::test]
async fn services_connect_with_the_right_keys_and_report_wrong_ones() {
    let scratch = Scratch::new();
    let host = format!("{}.1", tests::network());
    let (right, ..) = keys(&scratch, "keys", &["--servers", &host]).await;
    let (wrong, ..) = keys(&scratch, "others", &[]).await;
    let broker = broker(&scratch, &right, host).await;
    let generator = |nkey: String, tls_ca: String| {
        let args =
            ["--parity", "even", "--nats", &broker.url(), "--nkey", &nkey, "--tls-ca", &tls_ca];
        Process::start(&scratch, "generator", &args)
    };
    let [right_key, wrong_key] = [&right, &wrong].map(|keys| format!("{keys}/even.nk"));
    let [right_ca, wrong_ca] = [&right, &wrong].map(|keys| format!("{keys}/ca.pem"));
    let mut process = generator(right_key.clone(), right_ca.clone());
    process.wait_for("connected to NATS").await;
    let mut process = generator(wrong_key, right_ca.clone());
    process.wait_for("is --nkey the key of this service?").await;
    // If another authority signed the certificate, the service does not even send its key.
    let mut process = generator(right_key.clone(), wrong_ca);
    process.wait_for("or --tls-ca has not signed its certificate").await;
    assert!(!process.log().contains("connected to NATS\n"), "{}", process.log());

    let operator = format!("{right}/operator.nk");
    let args = ["provision", "--nats", &broker.url(), "--nkey", &operator, "--tls-ca", &right_ca];
    let mut process = Process::start(&scratch, "evenodd", &args);
    assert!(process.wait().await.success(), "{}", process.log());

    // A service with --tls-ca never connects without TLS.
    let scratch = Scratch::new();
    let plain = Broker::start(&scratch).await;
    let args = ["--parity", "even", "--nats", &plain.url(), "--tls-ca", &right_ca];
    let mut process = Process::start(&scratch, "generator", &args);
    process.wait_for("cannot reach NATS").await;
}

#[tokio::test]
async fn unusable_key_files_are_wrong_settings() {
    let scratch = Scratch::new();
    let (keys, ..) = keys(&scratch, "keys", &[]).await;
    let account = scratch.path("account.nk");
    fs::write(&account, nkeys::KeyPair::new_account().seed().unwrap()).unwrap();
    for (flag, file, told) in [
        ("--nkey", "/none", "No such file"),
        ("--nkey", &format!("{keys}/ca.pem"), "no seed"),
        ("--nkey", account.to_str().unwrap(), "not of a user"),
        ("--tls-ca", "/none", "No such file"),
        ("--tls-ca", &format!("{keys}/even.nk"), "no certificate"),
        ("--tls-ca", &format!("{keys}/ca.key"), "no certificate"),
    ] {
        let mut process = Process::start(&scratch, "multiplier", &[flag, file]);
        assert_eq!(process.wait().await.code(), Some(2));
        let log = process.log();
        assert!(log.contains(flag) && log.contains(told), "{told}: {log}");
    }
}

/// The subcommand `healthcheck`, which the health check of a container runs.
#[tokio::test]
async fn healthcheck_asks_the_running_service() {
    let scratch = Scratch::new();
    let mut broker = Broker::start(&scratch).await;
    let (_gateway, http) = tests::gateway(&scratch, &broker.url(), &[]).await;
    let health = format!("{}.1:18081", tests::network());
    let args = ["--parity", "odd", "--nats", &broker.url(), "--health", &health];
    let mut generator = Process::start(&scratch, "generator", &args);
    generator.wait_for("connected to NATS").await;
    let ask = async |service: &str, args: &[&str]| {
        let mut process = Process::start(&scratch, service, &[args, &["healthcheck"]].concat());
        (process.wait().await.code(), process.log())
    };
    assert_eq!(ask("generator", &args).await, (Some(0), "ok\n".to_owned()));
    let mut other = Process::start(&scratch, "generator", &args);
    assert_eq!(other.wait().await.code(), Some(1));
    assert!(other.log().contains("choose another address with --health"), "{}", other.log());
    // Without a stream this gateway is not ready, and its answer says why.
    let (status, told) = ask("gateway", &["--http", &http]).await;
    assert_eq!(status, Some(1));
    assert!(told.contains("history"), "{told}");
    broker.kill();
    generator.wait_for("disconnected").await;
    assert_eq!(ask("generator", &args).await, (Some(1), "not connected to NATS\n".to_owned()));
    generator.kill();
    let (status, told) = ask("generator", &args).await;
    assert_eq!(status, Some(1));
    assert!(told.contains("refused"), "{told}");
    let (status, told) = ask("multiplier", &[]).await;
    assert_eq!(status, Some(1));
    assert!(told.contains("set --health"), "{told}");
}
