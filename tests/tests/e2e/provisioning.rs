//! `evenodd provision`.

use async_nats::jetstream::{self, stream};
use contract::streams::{NUMBERS, TICKS};
use contract::{Message, Product, subjects};
use tests::{Broker, Pipeline, Process, Scratch, connect};

#[tokio::test]
async fn creates_and_is_idempotent() {
    let pipeline = Pipeline::new().await;
    let context = jetstream::new(pipeline.client.clone());
    let numbers = context.get_stream(NUMBERS).await.unwrap();
    let config = &numbers.cached_info().config;
    assert_eq!(config.subjects, [subjects::PUBLISHED]);
    assert!(config.deny_delete && config.deny_purge && config.allow_direct);
    assert_eq!(config.discard, stream::DiscardPolicy::New);
    assert_eq!(context.get_stream(TICKS).await.unwrap().cached_info().config.max_messages, 1);
    let (status, output) = pipeline.evenodd(&["provision"]).await;
    assert_eq!(status, Some(0));
    assert_eq!(output.matches("as it must be").count(), 2, "{output}");
}

#[tokio::test]
async fn refuses_what_could_lose_history_and_applies_what_cannot() {
    let pipeline = Pipeline::new().await;
    let payload = Product::new(846, 511).unwrap().encode();
    for _ in 0..10 {
        let payload = payload.clone().into();
        pipeline.client.publish(subjects::PUBLISHED, payload).await.unwrap();
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
    assert!(log.contains("FOREIGN") && log.contains("numbers.published"), "{log}");
}

#[tokio::test]
async fn without_a_broker_it_waits_and_then_fails_clearly() {
    let scratch = Scratch::new();
    let args = ["provision", "--nats", "nats://127.0.0.1:9", "--wait-ms", "500"];
    let mut provision = Process::start(&scratch, "evenodd", &args);
    assert_eq!(provision.wait().await.code(), Some(1));
    assert!(provision.log().contains("is the broker running"), "{}", provision.log());
}
