//! The start and the end of processes.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use contract::Parity;
use nix::sys::signal::Signal;
use tests::{Audit, Pipeline, Process, Scratch, Ticks};

#[tokio::test]
async fn sigterm_ends_every_service_with_status_0_and_loses_nothing() {
    let pipeline = Pipeline::new().await;
    let generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multiplier = pipeline.multiplier(500).await;
    let (mut gateway, _) = pipeline.gateway().await;
    ticks.until(|draw| draw.due().is_some()).await;
    let begun = Instant::now();
    assert!(multiplier.terminate().await.success(), "{}", multiplier.log());
    for mut generator in generators {
        assert!(generator.terminate().await.success(), "{}", generator.log());
    }
    assert!(gateway.terminate().await.success(), "{}", gateway.log());
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(Audit::of(&pipeline.client).await.missed(), []);
    pipeline.verify().await;
}

#[tokio::test]
async fn sigterm_without_a_broker_ends_every_service() {
    let mut pipeline = Pipeline::new().await;
    let generator = pipeline.generator(Parity::Even).await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multiplier = pipeline.multiplier(500).await;
    let (gateway, _) = pipeline.gateway().await;
    ticks.take(2).await;
    pipeline.broker.kill();
    for mut service in [generator, gateway] {
        service.wait_for("disconnected").await;
        assert!(service.terminate().await.success(), "{}", service.log());
    }
    // Slots have begun since and cannot be settled.
    multiplier.wait_for("not settled yet").await;
    assert_eq!(multiplier.terminate().await.code(), Some(1));
    assert!(multiplier.log().contains("their products are lost"), "{}", multiplier.log());
}

/// After SIGTERM a multiplier publishes a product that is due, or reports that it could not in
/// time.
#[tokio::test]
async fn after_sigterm_a_due_product_is_published_or_reported() {
    let mut pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let context = async_nats::jetstream::new(pipeline.client.clone());
    let numbers = evenodd::streams::numbers(1);
    let mut elsewhere = numbers.clone();
    elsewhere.subjects = vec!["elsewhere".into()];
    for comes_back in [true, false] {
        let mut ticks = Ticks::watch(&pipeline.client).await;
        let mut multiplier = pipeline.multiplier(500).await;
        // At a moment when no product is due, the history stops taking products. Then one becomes
        // due.
        ticks.until(|draw| draw.due().is_none()).await;
        context.update_stream(&elsewhere).await.unwrap();
        let due = ticks.until(|draw| draw.due().is_some()).await;
        multiplier.signal(Signal::SIGTERM);
        multiplier.wait_for("shutting down").await;
        if comes_back {
            context.update_stream(&numbers).await.unwrap();
            assert!(multiplier.wait().await.success(), "{}", multiplier.log());
            let stored = pipeline.history().await;
            let slots = stored.iter().filter_map(|entry| entry.message_id.clone());
            assert!(slots.collect::<Vec<_>>().contains(&due.slot.to_string()));
        } else {
            pipeline.broker.kill();
            assert_eq!(multiplier.wait().await.code(), Some(1));
            assert!(multiplier.log().contains("their products are lost"), "{}", multiplier.log());
        }
    }
}

#[tokio::test]
async fn settings_come_from_the_environment_too() {
    let scratch = Scratch::new();
    let variables = [("EVENODD_PARITY", "odd"), ("EVENODD_NATS", "nats://127.0.0.1:9")];
    let mut generator = Process::start_with(&scratch, "generator", &[], &variables);
    generator.wait_for("127.0.0.1:9").await;
    generator.wait_for("numbers.odd").await;
    let mut wrong = Process::start_with(&scratch, "generator", &[], &[("EVENODD_DRAIN_MS", "x")]);
    assert_eq!(wrong.wait().await.code(), Some(2));
    assert!(wrong.log().contains("--drain-ms"), "{}", wrong.log());
}

#[tokio::test]
async fn wrong_settings_are_named_and_end_with_status_2() {
    let scratch = Scratch::new();
    for (binary, flag, value) in [
        ("generator", "--parity", "prime"),
        ("generator", "--drain-ms", "1"),
        ("multiplier", "--slot-ms", "0"),
        ("multiplier", "--nats", ":"),
        ("gateway", "--http", "here"),
        ("gateway", "--log-format", "xml"),
        ("evenodd", "--colour", "red"),
    ] {
        let mut process = Process::start(&scratch, binary, &[flag, value]);
        assert_eq!(process.wait().await.code(), Some(2));
        let log = process.log();
        assert!(log.contains(flag), "{binary} does not name {flag}: {log}");
    }
    let mut missing = Process::start(&scratch, "generator", &[]);
    assert_eq!(missing.wait().await.code(), Some(2));
    assert!(missing.log().contains("--parity"), "{}", missing.log());
    let args = ["--linger-ms", "800", "--drain-ms", "800"];
    let mut forever = Process::start(&scratch, "gateway", &args);
    assert_eq!(forever.wait().await.code(), Some(2));
    assert!(forever.log().contains("--linger-ms"), "{}", forever.log());
}

#[tokio::test]
async fn a_port_in_use_is_a_clear_error() {
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut gateway = Process::start(&scratch, "gateway", &["--http", &address]);
    assert_eq!(gateway.wait().await.code(), Some(1));
    let log = gateway.log();
    assert!(log.contains(&address) && log.contains("--http"), "{log}");
}

#[tokio::test]
async fn logs_are_json_if_requested() {
    let scratch = Scratch::new();
    let args = ["--parity", "odd", "--log-format", "json", "--nats", "nats://127.0.0.1:9"];
    let mut generator = Process::start(&scratch, "generator", &args);
    generator.wait_for("answering").await;
    assert!(generator.terminate().await.success());
    for line in generator.log().lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(event["level"].is_string() && event["message"].is_string(), "{line}");
    }
}
