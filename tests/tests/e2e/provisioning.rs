//! `evenodd provision`.

use async_nats::jetstream::{self, stream};
use contract::streams::{NUMBERS, TICKS, TICKS_AGE};
use contract::{Message, Product, subjects};
use evenodd::streams;
use futures::StreamExt;
use tests::{Broker, Pipeline, Process, Scratch, connect};

#[tokio::test]
async fn provision_creates_the_streams_and_is_idempotent() {
    let pipeline = Pipeline::new().await;
    let context = jetstream::new(pipeline.client.clone());
    let numbers = context.get_stream(NUMBERS).await.unwrap();
    let config = &numbers.cached_info().config;
    assert_eq!(config.subjects, [subjects::PUBLISH]);
    assert!(config.deny_delete && config.deny_purge && config.allow_direct);
    assert_eq!(config.discard, stream::DiscardPolicy::New);
    let republish = config.republish.clone().unwrap();
    assert_eq!(
        (&*republish.source, &*republish.destination),
        (subjects::PUBLISH, subjects::PUBLISHED)
    );
    let ticks = context.get_stream(TICKS).await.unwrap().cached_info().config.clone();
    assert_eq!(
        (ticks.max_age, ticks.republish.unwrap().destination.as_str()),
        (TICKS_AGE, subjects::DONE)
    );
    let (status, output) = pipeline.evenodd(&["provision"]).await;
    assert_eq!(status, Some(0));
    assert_eq!(output.matches("as it must be").count(), 2, "{output}");
}

#[tokio::test]
async fn provision_refuses_only_changes_that_could_lose_history() {
    let pipeline = Pipeline::new().await;
    let payload = Product::new(846, 511).unwrap().encode();
    for _ in 0..10 {
        let payload = payload.clone().into();
        pipeline.client.publish(subjects::PUBLISH, payload).await.unwrap();
    }
    let context = jetstream::new(pipeline.client.clone());
    let right = context.get_stream(NUMBERS).await.unwrap().cached_info().config.clone();
    let update = async |change: &dyn Fn(&mut stream::Config)| {
        let mut config = right.clone();
        change(&mut config);
        context.update_stream(&config).await.unwrap();
        pipeline.evenodd(&["provision"]).await
    };

    let (status, output) = update(&|config| config.subjects.push("other".into())).await;
    assert_eq!(status, Some(1));
    assert!(output.contains("REFUSED") && output.contains("subjects"), "{output}");
    let (status, output) = update(&|config| {
        config.description = None;
        config.max_messages = 1000;
        config.compression = Some(stream::Compression::S2);
    })
    .await;
    assert_eq!(status, Some(0));
    for setting in ["description", "max_msgs", "compression"] {
        assert!(output.contains(setting), "{output}");
    }
    let now = context.get_stream(NUMBERS).await.unwrap().cached_info().clone();
    assert_eq!(now.config, right);
    assert_eq!(now.state.messages, 10);
}

/// `provision` changes streams from before the server republished, and loses nothing.
#[tokio::test]
async fn streams_of_the_former_protocol_are_changed() {
    let scratch = Scratch::new();
    let broker = Broker::start(&scratch).await;
    let client = connect(&broker).await;
    let context = jetstream::new(client.clone());
    let former = |config: stream::Config, subject: &str| stream::Config {
        subjects: vec![subject.into()],
        republish: None,
        ..config
    };
    let numbers = former(streams::numbers(1), "numbers.published");
    let ticks = former(streams::ticks(1), "ticks.claim");
    let ticks = stream::Config { max_messages: 1, max_age: std::time::Duration::ZERO, ..ticks };
    for config in [numbers, ticks] {
        context.create_stream(config).await.unwrap();
    }
    let payload = Product::new(846, 511).unwrap().encode();
    for _ in 0..150 {
        context.publish("numbers.published", payload.clone().into()).await.unwrap().await.unwrap();
    }
    context.publish("ticks.claim", "{}".into()).await.unwrap().await.unwrap();
    let before = tests::ticks::all(&client, NUMBERS).await;
    let args = ["provision", "--nats", &broker.url()];
    let mut provision = Process::start(&scratch, "evenodd", &args);
    assert!(provision.wait().await.success());
    for line in [
        "stream NUMBERS: changed",
        "subjects: has [\"numbers.published\"], wanted [\"numbers.publish\"]",
        "stream TICKS: changed",
        "republish: has null",
    ] {
        assert!(provision.log().contains(line), "{line}: {}", provision.log());
    }
    // A gateway serves the last 100 records, even if they were stored under another subject.
    let pipeline = Pipeline::on(scratch, broker).await;
    let (_gateway, address) = pipeline.gateway().await;
    assert_eq!(crate::gateway::sequences(&address, 150).await.len(), 100);
    assert_eq!(tests::ticks::all(&client, NUMBERS).await, before);
    let again = pipeline.evenodd(&["provision"]).await.1;
    assert_eq!(again.matches("as it must be").count(), 2, "{again}");
    let mut live = client.subscribe(subjects::PUBLISHED).await.unwrap();
    assert_eq!(pipeline.publish(7).await, 151);
    let heard = runtime::history::Entry::try_from(live.next().await.unwrap()).unwrap();
    assert_eq!(pipeline.entries(151, 1).await, [heard]);
    crate::gateway::sequences(&address, 151).await;
}

#[tokio::test]
async fn a_subject_that_belongs_to_another_stream_is_a_clear_error() {
    let scratch = Scratch::new();
    let broker = Broker::start(&scratch).await;
    let context = jetstream::new(connect(&broker).await);
    let foreign = stream::Config {
        name: "FOREIGN".into(),
        subjects: vec!["numbers.>".into()],
        ..stream::Config::default()
    };
    context.create_stream(foreign).await.unwrap();
    let args = ["provision", "--nats", &broker.url()];
    let mut provision = Process::start(&scratch, "evenodd", &args);
    assert_eq!(provision.wait().await.code(), Some(1));
    let log = provision.log();
    assert!(log.contains("FOREIGN") && log.contains("numbers.publish"), "{log}");
}

#[tokio::test]
async fn without_a_broker_provision_waits_and_then_fails_clearly() {
    let scratch = Scratch::new();
    let args = ["provision", "--nats", "nats://127.0.0.1:9", "--wait-ms", "500"];
    let mut provision = Process::start(&scratch, "evenodd", &args);
    assert_eq!(provision.wait().await.code(), Some(1));
    assert!(provision.log().contains("is the broker running"), "{}", provision.log());
}

/// `provision` says after a moment what it waits for, and does not wait in silence for --wait-ms.
#[tokio::test]
async fn provision_says_what_it_waits_for() {
    let scratch = Scratch::new();
    let configuration = scratch.path("plain.conf");
    std::fs::write(&configuration, "").unwrap();
    let plain = Broker::start_with(&scratch, &configuration).await;
    std::fs::write(&configuration, "authorization { token: secret }").unwrap();
    let guarded = Broker::start_with(&scratch, &configuration).await;
    for (nats, reason) in [
        (plain.url(), "is JetStream up"),
        (guarded.url(), "authorization violation"),
        ("nats://127.0.0.1:9".to_owned(), "is the broker running"),
    ] {
        let args = ["provision", "--nats", &nats, "--wait-ms", "600000"];
        let mut provision = Process::start(&scratch, "evenodd", &args);
        provision.wait_for(reason).await;
        let line = provision.wait_for("trying for another").await;
        assert!(line.contains("59"), "{line}");
    }
}
