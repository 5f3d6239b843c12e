//! `evenodd verify`: what it reports, and what it says if it cannot look.

use std::fs;
use std::time::Instant;

use contract::streams::NUMBERS;
use tests::{Broker, Pipeline, Process, Scratch, Ticks, nats_server, network, patient};
use tokio::net::TcpStream;

/// Starts a nats-server with this configuration, and returns it with its address.
async fn server(scratch: &Scratch, configuration: &str) -> (Process, String) {
    let address = format!("{}.1:14222", network());
    let file = scratch.path(&format!("{address}.conf"));
    fs::write(&file, format!("listen: \"{address}\"\n{configuration}")).unwrap();
    let command = [nats_server(), "-c".as_ref(), &file];
    let command = command.map(|part| part.to_str().unwrap().to_owned()).into();
    let mut process = Process::start_command(scratch, "nats-server", command);
    process.until("it listens", async |_| TcpStream::connect(&address).await.ok()).await;
    (process, address)
}

#[tokio::test]
async fn if_it_cannot_look_it_says_why_within_seconds() {
    let scratch = Scratch::new();
    let keys = scratch.path("keys");
    let keys = keys.to_str().unwrap();
    let args = ["keys", "--directory", keys, "--servers", "localhost"];
    assert!(Process::start(&scratch, "evenodd", &args).wait().await.success());
    let authority = format!("{keys}/ca.pem");
    let tls = format!(
        "tls {{ cert_file: \"{keys}/localhost.pem\", key_file: \"{keys}/localhost.key\" }}"
    );
    let users = "authorization { user: a, password: b }";

    let nobody = format!("{}.1:14222", network());
    let (frozen, silent) = server(&scratch, "").await;
    frozen.signal(nix::sys::signal::Signal::SIGSTOP);
    let (_server, without_jetstream) = server(&scratch, "").await;
    let (_server, with_users) = server(&scratch, users).await;
    let (_server, with_tls) = server(&scratch, &tls).await;
    let broker = Broker::start(&scratch).await;
    let without_streams = broker.url().replace("nats://", "");
    for (address, args, reason) in [
        (&nobody, &[][..], "refused"),
        (&silent, &[], "timed out"),
        (&with_users, &[], "authorization violation"),
        (&with_tls, &[], "certificate"),
        (&without_jetstream, &["--tls-ca", &authority], "--tls-ca"),
        (&without_jetstream, &[], "JetStream"),
        (&without_streams, &[], "stream TICKS is not there"),
    ] {
        let begun = Instant::now();
        let args = [&["verify", "--nats", address], args].concat();
        let mut verify = Process::start(&scratch, "evenodd", &args);
        assert_eq!(verify.wait().await.code(), Some(3), "{reason}");
        assert!(begun.elapsed() < patient(std::time::Duration::from_secs(4)), "{reason}");
        let log = verify.log();
        assert!(log.contains(reason), "{reason}: {log}");
        assert!(log.contains("stream TICKS") || log.contains(address.as_str()), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

#[tokio::test]
async fn it_reports_faults_and_incomplete_reads_with_different_statuses() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multiplier = pipeline.multiplier(500).await;
    ticks.take(3).await;
    assert!(multiplier.terminate().await.success());
    let (status, output) = pipeline.evenodd(&["verify"]).await;
    assert!(status == Some(0) && output.contains("faults     0"), "{output}");
    pipeline.store(1, b"hello".to_vec()).await;
    let (status, output) = pipeline.evenodd(&["verify"]).await;
    assert!(status == Some(1) && output.contains("not a valid message"), "{output}");
    // The draws can still be read.
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.delete_stream(NUMBERS).await.unwrap();
    let (status, output) = pipeline.evenodd(&["verify"]).await;
    assert!(status == Some(3) && output.contains("stream NUMBERS is not there"), "{output}");
}

/// The slots of a pause are none of the draws of which the rate says how many were published.
#[tokio::test]
async fn a_pause_is_shown_and_not_part_of_the_rate() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    for _ in 0..2 {
        let mut multiplier = pipeline.multiplier(500).await;
        ticks.take(3).await;
        assert!(multiplier.terminate().await.success());
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    }
    let complete = ticks.all_so_far().await.iter().filter(|draw| draw.product().is_some()).count();
    let (status, output) = pipeline.evenodd(&["verify"]).await;
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("pause      "), "{output}");
    assert!(output.contains(&format!("% of {complete} draws with both factors")), "{output}");
}
