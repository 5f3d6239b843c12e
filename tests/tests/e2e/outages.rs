//! The broker is killed, frozen, full; nothing acknowledged is lost and nothing is stored twice.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use contract::streams::{self, NUMBERS};
use contract::{Message, Outcome, Product, Slot, subjects};
use tests::{Broker, Pipeline, Scratch, Ticks, eventually, repository};
use tokio::time::sleep;

const SLOT_MS: u64 = 500;

fn slots_with(ticks: &Ticks, outcomes: &[Outcome]) -> BTreeSet<Slot> {
    let with = ticks.seen().iter().filter(|done| outcomes.contains(&done.outcome));
    with.map(|done| done.slot).collect()
}

/// What was reported as published or as pending gets into the history.
async fn assert_everything_due_is_stored(pipeline: &Pipeline, ticks: &Ticks) {
    let due = slots_with(ticks, &[Outcome::Published, Outcome::Pending]);
    eventually("everything due is in the history", async || {
        let stored: BTreeSet<Slot> = stored(pipeline).await.into_iter().collect();
        stored.is_superset(&due)
    })
    .await;
}

async fn stored(pipeline: &Pipeline) -> Vec<Slot> {
    let history = pipeline.history().await;
    let slots = history.iter().map(|entry| entry.message_id.as_ref().unwrap().parse().unwrap());
    slots.collect()
}

/// Everything that a tick reported as published is in the history, and nothing is there twice.
async fn assert_nothing_lost_or_doubled(pipeline: &Pipeline, ticks: &Ticks) {
    let slots = stored(pipeline).await;
    let unique: BTreeSet<Slot> = slots.iter().copied().collect();
    assert_eq!(unique.len(), slots.len(), "a slot was stored twice: {slots:?}");
    let lost: Vec<_> =
        slots_with(ticks, &[Outcome::Published]).difference(&unique).copied().collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let doubled: Vec<_> = ticks.irregular().into_iter().filter(|&(_, count)| count > 1).collect();
    assert_eq!(doubled, [], "ticked twice");
    pipeline.verify().await;
}

#[tokio::test]
async fn a_broker_that_is_killed_and_restarted_at_once() {
    let mut pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multipliers = pipeline.multipliers::<3>(SLOT_MS).await;
    for _ in 0..3 {
        ticks.take(4).await;
        pipeline.broker.kill();
        pipeline.broker.restart(&pipeline.scratch).await;
        ticks.until(|done| done.product.is_some()).await;
        // From here on, each slot once again.
        let mut after = Ticks::watch(&pipeline.client).await;
        after.take(4).await;
        assert!(after.irregular().is_empty(), "{:#?}", after.seen());
    }
    assert_nothing_lost_or_doubled(&pipeline, &ticks).await;
}

#[tokio::test]
async fn a_broker_that_is_away_for_twenty_seconds() {
    let mut pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multipliers = pipeline.multipliers::<2>(SLOT_MS).await;
    ticks.until(|done| done.outcome == Outcome::Published).await;
    // Before it goes, something becomes due: the history takes nothing for a while.
    let context = jetstream::new(pipeline.client.clone());
    let elsewhere = stream::Config { subjects: vec!["elsewhere".into()], ..streams::numbers(1) };
    context.update_stream(&elsewhere).await.unwrap();
    for _ in 0..2 {
        ticks.until(|done| done.outcome == Outcome::Pending).await;
    }
    pipeline.broker.kill();
    sleep(Duration::from_secs(20)).await;
    pipeline.broker.restart(&pipeline.scratch).await;
    ticks.until(|done| done.product.is_some()).await;
    context.update_stream(&streams::numbers(1)).await.unwrap();
    ticks.until(|done| done.outcome == Outcome::Published).await;
    ticks.take(4).await;
    assert_everything_due_is_stored(&pipeline, &ticks).await;
    assert_nothing_lost_or_doubled(&pipeline, &ticks).await;
}

#[tokio::test]
async fn a_broker_that_is_frozen_for_a_while() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multipliers = pipeline.multipliers::<2>(SLOT_MS).await;
    for frozen_ms in [300, 1500, 6000] {
        ticks.until(|done| done.outcome == Outcome::Published).await;
        pipeline.broker.freeze();
        sleep(Duration::from_millis(frozen_ms)).await;
        pipeline.broker.thaw();
        ticks.until(|done| done.product.is_some()).await;
        ticks.take(4).await;
    }
    assert_nothing_lost_or_doubled(&pipeline, &ticks).await;
}

/// A store without space refuses publications. They wait, and are published when there is space.
#[tokio::test]
async fn what_is_due_waits_while_the_disk_is_full() {
    let scratch = Scratch::new();
    let configuration = scratch.path("full.conf");
    let normal = fs::read_to_string(repository().join("nats/single.conf")).unwrap();
    let full = normal.replace("jetstream {", "jetstream {\n max_file_store: 2KB\n");
    assert_ne!(normal, full);
    fs::write(&configuration, full).unwrap();
    let broker = Broker::start_with(&scratch, &configuration).await;
    let mut pipeline = Pipeline::on(scratch, broker).await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multiplier = pipeline.multiplier(SLOT_MS).await;
    // Claims fail as well now: the ticks go on without JetStream.
    for _ in 0..3 {
        ticks.until(|done| done.outcome == Outcome::Pending).await;
    }
    assert!(ticks.irregular().is_empty(), "{:?}", ticks.irregular());
    let refused = multiplier.wait_for("not published yet").await;
    assert!(refused.contains("insufficient"), "{refused}");
    pipeline.broker.kill();
    fs::write(&configuration, normal).unwrap();
    pipeline.broker.restart(&pipeline.scratch).await;
    assert_everything_due_is_stored(&pipeline, &ticks).await;
    multiplier.wait_for("published after all").await;
    ticks.until(|done| done.outcome == Outcome::Published).await;
    assert_nothing_lost_or_doubled(&pipeline, &ticks).await;
}

/// The acknowledgement got lost, and the broker was restarted since: the retry stores nothing.
#[tokio::test]
async fn a_retry_stores_nothing_twice() {
    let mut pipeline = Pipeline::new().await;
    let payload = Product::new(846, 511).unwrap().encode();
    let publish = async |pipeline: &Pipeline, slot| {
        let (client, payload) = (&pipeline.client, payload.clone().into());
        let timeout = Duration::from_secs(5);
        runtime::jetstream::publish(client, subjects::PUBLISHED, Slot(slot), payload, timeout).await
    };
    let first = publish(&pipeline, 1).await.unwrap();
    assert!(!first.duplicate);
    let retry = publish(&pipeline, 1).await.unwrap();
    assert_eq!((retry.sequence, retry.duplicate), (first.sequence, true));
    assert!(!publish(&pipeline, 2).await.unwrap().duplicate);

    pipeline.broker.kill();
    pipeline.broker.restart(&pipeline.scratch).await;
    eventually("connected", async || runtime::connection::is_connected(&pipeline.client)).await;
    let retry = publish(&pipeline, 1).await.unwrap();
    assert_eq!((retry.sequence, retry.duplicate), (first.sequence, true));
    assert_eq!(stored(&pipeline).await, [Slot(1), Slot(2)], "stream {NUMBERS}");
}
