//! The broker is killed, frozen or full. No acknowledged message is lost, and none is stored twice.

use std::fs;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use contract::{Message, Product, Slot, subjects};
use evenodd::streams;
use tests::{Audit, Broker, Pipeline, Scratch, Ticks, eventually, repository};
use tokio::time::sleep;

const SLOT_MS: u64 = 500;

/// Every product that is due is in the history, and nothing is stored twice.
async fn assert_nothing_lost_or_doubled(pipeline: &Pipeline) -> Audit {
    let audit = Audit::of(&pipeline.client).await;
    pipeline.verify().await;
    audit
}

#[tokio::test]
async fn a_broker_that_is_killed_and_restarted_costs_no_slot() {
    let mut pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multipliers = pipeline.multipliers::<3>(SLOT_MS).await;
    for _ in 0..3 {
        ticks.take(4).await;
        pipeline.broker.kill();
        pipeline.broker.restart().await;
        ticks.take(4).await;
    }
    assert_eq!(assert_nothing_lost_or_doubled(&pipeline).await.missed(), []);
}

#[tokio::test]
async fn a_broker_that_is_down_for_twenty_seconds_costs_no_product() {
    let mut pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multipliers = pipeline.multipliers::<2>(SLOT_MS).await;
    ticks.take(4).await;
    // A product must still be due when the broker is killed. So the history stops taking products,
    // at a moment when none is due.
    ticks.until(|draw| draw.due().is_none()).await;
    let context = jetstream::new(pipeline.client.clone());
    let elsewhere = stream::Config { subjects: vec!["elsewhere".into()], ..streams::numbers(1) };
    context.update_stream(&elsewhere).await.unwrap();
    let due = ticks.until(|draw| draw.due().is_some()).await;
    pipeline.broker.kill();
    sleep(Duration::from_secs(20)).await;
    pipeline.broker.restart().await;
    sleep(Duration::from_secs(1)).await;
    context.update_stream(&streams::numbers(1)).await.unwrap();
    // Slots that began while the broker was down are drawn once it is back.
    ticks.until(|draw| draw.slot.0 > due.slot.0 + 45).await;
    let audit = assert_nothing_lost_or_doubled(&pipeline).await;
    assert!(audit.numbers.contains_key(&due.slot));
    let first_seconds = (due.slot.0..due.slot.0 + 16).map(Slot);
    assert!(first_seconds.clone().all(|slot| audit.draws.contains_key(&slot)), "{audit:?}");
}

#[tokio::test]
async fn a_broker_that_is_frozen_for_a_while_costs_no_slot() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multipliers = pipeline.multipliers::<2>(SLOT_MS).await;
    for frozen_ms in [300, 1500, 6000] {
        ticks.until(|draw| draw.due().is_some()).await;
        pipeline.broker.freeze();
        sleep(Duration::from_millis(frozen_ms)).await;
        pipeline.broker.thaw();
        ticks.take(4).await;
    }
    assert_eq!(assert_nothing_lost_or_doubled(&pipeline).await.missed(), []);
}

/// A full store refuses publications. The multiplier retries them until there is space.
#[tokio::test]
async fn products_wait_while_the_store_is_full() {
    let scratch = Scratch::new();
    let configuration = scratch.path("full.conf");
    let normal = fs::read_to_string(repository().join("nats/single.conf")).unwrap();
    let full = normal.replace("max_file_store: 100GB", "max_file_store: 2KB");
    assert_ne!(normal, full);
    fs::write(&configuration, full).unwrap();
    let broker = Broker::start_with(&scratch, &configuration).await;
    let mut pipeline = Pipeline::on(scratch, broker).await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multiplier = pipeline.multiplier(SLOT_MS).await;
    let refused = multiplier.wait_for("not settled yet").await;
    assert!(refused.contains("insufficient"), "{refused}");
    sleep(Duration::from_secs(2)).await;
    pipeline.broker.kill();
    fs::write(&configuration, normal).unwrap();
    pipeline.broker.restart().await;
    multiplier.wait_for("settled again").await;
    ticks.take(8).await;
    assert_eq!(assert_nothing_lost_or_doubled(&pipeline).await.missed(), []);
}

/// A retry after a lost acknowledgement stores nothing, even if the broker was restarted meanwhile.
#[tokio::test]
async fn a_retry_stores_nothing_twice() {
    let mut pipeline = Pipeline::new().await;
    let payload = Product::new(846, 511).unwrap().encode();
    let publish = async |pipeline: &Pipeline, slot| {
        let (client, payload) = (&pipeline.client, payload.clone().into());
        let timeout = Duration::from_secs(5);
        runtime::jetstream::publish(client, subjects::PUBLISH, Slot(slot), payload, timeout).await
    };
    let first = publish(&pipeline, 1).await.unwrap();
    assert!(!first.duplicate);
    let retry = publish(&pipeline, 1).await.unwrap();
    assert_eq!((retry.sequence, retry.duplicate), (first.sequence, true));
    assert!(!publish(&pipeline, 2).await.unwrap().duplicate);

    pipeline.broker.kill();
    pipeline.broker.restart().await;
    eventually("connected", async || runtime::connection::is_connected(&pipeline.client)).await;
    let retry = publish(&pipeline, 1).await.unwrap();
    assert_eq!((retry.sequence, retry.duplicate), (first.sequence, true));
    let slots: Vec<_> = pipeline.history().await.iter().map(tests::ticks::slot).collect();
    assert_eq!(slots, [Slot(1), Slot(2)]);
}
