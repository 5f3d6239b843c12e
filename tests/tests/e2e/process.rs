//! The start and the end of processes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant, UNIX_EPOCH};

use contract::streams::TICKS;
use contract::{Parity, Slot, SlotLength};
use nix::sys::signal::Signal;
use tests::http::try_get;
use tests::{
    Audit, Broker, Pipeline, Process, Scratch, Ticks, eventually, nats_server, patience, port,
};

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
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(multiplier.terminate().await.code(), Some(1));
    // One line says which, and how many.
    let log = multiplier.log();
    let told: Vec<_> = log.split("gave up on ").skip(1).collect();
    let [told] = told[..] else { panic!("{log}") };
    let numbers: Vec<u64> =
        told.split(|c: char| !c.is_ascii_digit()).filter_map(|text| text.parse().ok()).collect();
    let [first, last, slots] = numbers[..3] else { panic!("{told}") };
    assert!(slots == last - first + 1 && slots >= 4, "{told}");
    let last = Slot(last);
    let last = UNIX_EPOCH + SlotLength::DEFAULT.start_of(last);
    assert!(last.elapsed().unwrap() < patience(), "{told}");
    assert!(told.contains("their products are lost"), "{told}");
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
async fn an_empty_variable_is_unset_and_an_unknown_one_is_named() {
    let scratch = Scratch::new();
    let variables = [
        ("EVENODD_PARITY", "odd"),
        ("EVENODD_NATS", ""),
        ("EVENODD_LOG", ""),
        ("EVENODD_LOG_FORMAT", ""),
        ("EVENODD_DRAIN_MS", ""),
        ("EVENODD_HEALTH", ""),
        ("EVENODD_NKEY", ""),
        ("EVENODD_TLS_CA", ""),
        ("EVENODD_PARTY", "odd"),
        ("EVENODD_EMPTY", ""),
        // A setting of the gateway.
        ("EVENODD_HTTP", "x"),
    ];
    let args = ["--nats", "nats://127.0.0.1:9"];
    let mut generator = Process::start_with(&scratch, "generator", &args, &variables);
    generator.wait_for("numbers.odd").await;
    let log = generator.log();
    assert_eq!(log.matches("is not a setting").count(), 1, "{log}");
    assert!(log.contains("EVENODD_PARTY is not a setting"), "{log}");
    // Subcommands too.
    let variables = [("EVENODD_REPLICAS", ""), ("EVENODD_LOG", ""), ("EVENODD_REPLICA", "3")];
    let args = ["provision", "--wait-ms", "0", "--nats", "nats://127.0.0.1:9"];
    let mut provision = Process::start_with(&scratch, "evenodd", &args, &variables);
    assert_eq!(provision.wait().await.code(), Some(1));
    assert!(provision.log().contains("EVENODD_REPLICA is not a setting"), "{}", provision.log());
}

/// The processes that `up` starts do not repeat the warning.
#[tokio::test]
async fn up_names_an_unknown_variable_once() {
    let scratch = Scratch::new();
    let (nats_port, http) = (port().to_string(), format!("127.0.0.1:{}", port()));
    let (data, server) = (scratch.path("data"), nats_server().to_str().unwrap());
    let settings = ["--nats-port", &nats_port, "--http", &http, "--nats-server", server];
    let args = [&["up", "--data", data.to_str().unwrap()], &settings[..]].concat();
    let variables = [("EVENODD_PARTY", "odd")];
    let mut up = Process::start_with(&scratch, "evenodd", &args, &variables);
    up.wait_for("Evenodd is running").await;
    for label in ["gateway-1", "even-2", "odd-2", "multiplier-2"] {
        up.wait_for(&format!("{label:<12} |")).await;
    }
    assert!(up.terminate().await.success());
    assert_eq!(up.log().matches("EVENODD_PARTY").count(), 1, "{}", up.log());
}

#[tokio::test]
async fn services_listen_on_the_address_of_a_host_name() {
    let scratch = Scratch::new();
    let (http, health) = (format!("localhost:{}", port()), format!("localhost:{}", port()));
    let nats = ["--nats", "nats://127.0.0.1:9"];
    let args = [&nats[..], &["--http", &http]].concat();
    let _gateway = Process::start(&scratch, "gateway", &args);
    let args = [&nats[..], &["--health", &health]].concat();
    let _multiplier = Process::start(&scratch, "multiplier", &args);
    for (address, status) in [(&http, 200), (&health, 503)] {
        let address = address.replace("localhost", "127.0.0.1");
        eventually("it answers", async || {
            try_get(&address, "/healthz").await.is_ok_and(|answer| answer.status == status)
        })
        .await;
    }
    let mut up = Process::start(&scratch, "evenodd", &["up", "--http", "nowhere.invalid:1"]);
    assert_eq!(up.wait().await.code(), Some(2));
    assert!(up.log().contains("--http") && up.log().contains("nowhere"), "{}", up.log());
}

/// More idle connections than are served at once delay the page, but not for as long as a health
/// check waits.
#[tokio::test]
async fn the_health_page_answers_beside_idle_connections() {
    let scratch = Scratch::new();
    let broker = Broker::start(&scratch).await;
    let health = format!("{}.1:18081", tests::network());
    let args = ["--parity", "odd", "--nats", &broker.url(), "--health", &health];
    let mut generator = Process::start(&scratch, "generator", &args);
    generator.wait_for("connected to NATS").await;
    // A client may shut down its side after the request.
    let mut half_closed = TcpStream::connect(&health).unwrap();
    half_closed.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    half_closed.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    for idle in [2, 100] {
        let open: Vec<_> = (0..idle).map(|_| TcpStream::connect(&health).unwrap()).collect();
        let mut check =
            Process::start(&scratch, "generator", &[&args, &["healthcheck"][..]].concat());
        assert!(check.wait().await.success(), "{idle}: {}", check.log());
        drop(open);
    }
}

#[tokio::test]
async fn a_multiplier_is_healthy_only_while_it_knows_the_stored_slots() {
    let scratch = Scratch::new();
    let broker = Broker::start(&scratch).await;
    let health = format!("{}.1:18081", tests::network());
    let (url, mut seen) = (broker.url(), String::new());
    let args = ["--nats", &url, "--health", &health];
    let _multiplier = Process::start(&scratch, "multiplier", &args);
    let page = async |wanted: u16| {
        try_get(&health, "/healthz").await.is_ok_and(|page| page.status == wanted)
    };
    eventually("503 for the stream", async || {
        let page = try_get(&health, "/healthz").await;
        seen = page.map_or(String::new(), |page| page.body);
        seen.contains("TICKS")
    })
    .await;
    assert!(page(503).await, "{seen}");
    let pipeline = Pipeline::on(scratch, broker).await;
    eventually("200", async || page(200).await).await;
    pipeline.client.flush().await.unwrap();
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.delete_stream(TICKS).await.unwrap();
    eventually("503 again", async || page(503).await).await;
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
        ("gateway", "--http", "nowhere.invalid:80"),
        ("multiplier", "--health", "nowhere.invalid:80"),
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
