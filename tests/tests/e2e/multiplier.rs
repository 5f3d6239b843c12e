//! Service 3: rates, and one tick a slot whatever happens to the replicas.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::streams::TICKS;
use contract::{Claim, Message, Outcome, Parity, Product, Slot, odds, subjects};
use futures::StreamExt;
use nix::sys::signal::Signal;
use tests::{PATIENCE, Pipeline, Process, Ticks};
use tokio::time::{sleep, timeout};

/// The slot of real deployments.
const SLOT_MS: u64 = 500;

/// Many ticks at full speed: as many are published as the odds say, and what a plain subscriber
/// sees live is the history.
#[tokio::test]
async fn rate_and_live_feed() {
    const TICKS: u32 = 1200;
    let pipeline = Pipeline::new().await;
    let mut live = pipeline.client.subscribe(subjects::PUBLISHED).await.unwrap();
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _generators = pipeline.generators().await;
    let mut multiplier = pipeline.multiplier(20).await;
    ticks.take(TICKS as usize).await;
    assert!(multiplier.terminate().await.success());
    // Its last tick may have come since.
    let done = ticks.all_so_far().await;

    // Ticks without both numbers (a busy machine) say nothing about the odds.
    let products: Vec<u32> = done.iter().filter_map(|done| done.product).collect();
    let above = products.iter().filter(|&&p| p > contract::THRESHOLD).count();
    let n = f64::from(u32::try_from(products.len()).unwrap());
    assert!(n > 0.9 * f64::from(TICKS), "only {n} ticks had numbers");
    let p = odds::publish_probability();
    let deviation = (f64::from(u32::try_from(above).unwrap()) - n * p) / (n * p * (1.0 - p)).sqrt();
    // Six standard deviations are exceeded once in 5 * 10^8 runs.
    assert!(deviation.abs() < 6.0, "{above} of {n} published: {deviation} standard deviations");

    let history = pipeline.history().await;
    assert_eq!(history.len(), above);
    for stored in history {
        let message = live.next().await.unwrap();
        assert_eq!(stored.payload, message.payload);
        assert!(Product::decode(&message.payload).unwrap().is_above_threshold());
    }
    let (status, output) = pipeline.evenodd(&["verify", "--slot-ms", "20"]).await;
    assert_eq!(status, Some(0), "{output}");
}

async fn assert_one_tick_a_slot(pipeline: &Pipeline, ticks: &Ticks) {
    assert_eq!(ticks.irregular(), BTreeMap::new(), "{:#?}", ticks.seen());
    pipeline.verify().await;
}

#[tokio::test]
async fn one_tick_a_slot_when_a_multiplier_is_killed() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multipliers = pipeline.multipliers::<3>(SLOT_MS).await;
    ticks.take(4).await;
    // Between two ticks: the slot of a replica that dies in the middle of a tick is lost.
    ticks.next().await;
    multipliers[0].kill();
    ticks.take(6).await;
    ticks.next().await;
    multipliers[1].kill();
    ticks.take(6).await;
    multipliers[0].start_again();
    ticks.take(4).await;
    assert_one_tick_a_slot(&pipeline, &ticks).await;
}

#[tokio::test]
async fn one_tick_a_slot_when_a_multiplier_is_frozen() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let multipliers = pipeline.multipliers::<3>(SLOT_MS).await;
    for frozen in &multipliers {
        ticks.next().await;
        frozen.signal(Signal::SIGSTOP);
        ticks.take(6).await;
        frozen.signal(Signal::SIGCONT);
        ticks.take(2).await;
    }
    assert_one_tick_a_slot(&pipeline, &ticks).await;
}

#[tokio::test]
async fn a_generator_that_is_killed_or_frozen_costs_no_tick() {
    let pipeline = Pipeline::new().await;
    let [mut even, _even, odd, _odd] = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multiplier = pipeline.multiplier(SLOT_MS).await;
    ticks.take(3).await;
    even.kill();
    ticks.take(4).await;
    odd.signal(Signal::SIGSTOP);
    ticks.take(12).await;
    odd.signal(Signal::SIGCONT);
    ticks.take(3).await;
    let lost = ticks.seen().iter().filter(|done| done.product.is_none());
    assert_eq!(lost.count(), 0, "{:#?}", ticks.seen());
    assert_one_tick_a_slot(&pipeline, &ticks).await;
}

#[tokio::test]
async fn without_generators_ticks_say_so_and_go_on_when_one_is_back() {
    let pipeline = Pipeline::new().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multiplier = pipeline.multiplier(SLOT_MS).await;
    assert_eq!(ticks.next().await.outcome, Outcome::NoNumbers);
    let _even = pipeline.generator(Parity::Even).await;
    let one = ticks.until(|done| done.outcome != Outcome::NoNumbers).await;
    assert_eq!(one.outcome, Outcome::NoOdd);
    assert!(one.even.is_some());
    assert_eq!(pipeline.history().await, []);
    let mut odd = pipeline.generator(Parity::Odd).await;
    ticks.until(|done| done.outcome == Outcome::Published).await;
    odd.kill();
    ticks.until(|done| done.outcome == Outcome::NoOdd).await;
    let stored = pipeline.history().await.len();
    ticks.take(4).await;
    assert_eq!(pipeline.history().await.len(), stored);
    assert_one_tick_a_slot(&pipeline, &ticks).await;
}

/// Without claims the replicas settle each slot among themselves, also when one is frozen.
#[tokio::test]
async fn one_tick_a_slot_without_claims() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multipliers = pipeline.multipliers::<3>(SLOT_MS).await;
    ticks.take(3).await;
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.delete_stream(TICKS).await.unwrap();
    ticks.take(6).await;
    multipliers[0].wait_for("settle slots among themselves").await;
    for frozen in &multipliers {
        ticks.next().await;
        frozen.signal(Signal::SIGSTOP);
        ticks.take(3).await;
        frozen.signal(Signal::SIGCONT);
        ticks.take(2).await;
    }
    assert_eq!(pipeline.evenodd(&["provision"]).await.0, Some(0));
    multipliers[0].wait_for("claims are answered again").await;
    ticks.take(3).await;
    assert_one_tick_a_slot(&pipeline, &ticks).await;
}

/// A replica goes by what it hears of others: the stream's word counts more than a smaller id, and a
/// bid that was there before more than the stream's word.
#[tokio::test]
async fn a_slot_that_another_replica_has_is_not_ticked() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    // Long slots, so that there is time for a test to answer a bid.
    let mut multiplier = pipeline.multiplier(3 * SLOT_MS).await;
    let say = async |slot, multiplier: &str, granted| {
        let claim = Claim { slot, multiplier: multiplier.to_owned(), granted };
        pipeline.client.publish(subjects::TAKING, claim.encode().into()).await.unwrap();
    };
    let mut theirs = Vec::new();
    // Somebody whose clock is ahead bids for slots that the stream gives to this one.
    for _ in 0..3 {
        let slot = ticks.next().await.slot.next();
        say(slot, "zzz", false).await;
        theirs.push(slot);
    }
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.delete_stream(TICKS).await.unwrap();
    multiplier.wait_for("settle slots among themselves").await;
    // Somebody to whom the stream gave a slot hears a bid for it.
    let mut heard = pipeline.client.subscribe(subjects::TAKING).await.unwrap();
    while theirs.len() < 6 {
        let message = timeout(PATIENCE, heard.next()).await.unwrap().unwrap();
        let bid = Claim::decode(&message.payload).unwrap();
        if bid.multiplier != "zzz" {
            say(bid.slot, "zzz", true).await;
            theirs.push(bid.slot);
        }
    }
    ticks.until(|done| Some(&done.slot) > theirs.last()).await;
    let left: Vec<_> = ticks.irregular().into_keys().collect();
    assert_eq!(left, theirs);
}

/// A replica that comes into a slot when the others may have settled it goes by the stream: it ticks if
/// that gives it the slot, and does not if there is no stream to ask.
#[tokio::test]
async fn a_replica_that_is_late_does_not_bid() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let mut multiplier = pipeline.multiplier(3 * SLOT_MS).await;
    let be_late = async |multiplier: &Process, slot: Slot| {
        multiplier.signal(Signal::SIGSTOP);
        let begin = UNIX_EPOCH + Duration::from_millis(3 * SLOT_MS * slot.0);
        // A fifth of the slot is when bids are made, three fifths when it is too late for anything.
        let late = begin + Duration::from_millis(SLOT_MS);
        sleep(late.duration_since(SystemTime::now()).unwrap()).await;
        multiplier.signal(Signal::SIGCONT);
    };
    let slot = ticks.next().await.slot.next();
    be_late(&multiplier, slot).await;
    assert_eq!(ticks.next().await.slot, slot);
    async_nats::jetstream::new(pipeline.client.clone()).delete_stream(TICKS).await.unwrap();
    multiplier.wait_for("settle slots among themselves").await;
    ticks.take(2).await;
    let slot = ticks.next().await.slot.next();
    be_late(&multiplier, slot).await;
    assert_eq!(ticks.next().await.slot, slot.next());
}

/// A generator that answers nonsense is not believed; the other one's answer counts.
#[tokio::test]
async fn wrong_answers_are_not_believed() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let liar = pipeline.client.clone();
    let queue = Parity::Even.name().to_owned();
    let mut requests = liar.queue_subscribe(Parity::Even.subject(), queue).await.unwrap();
    liar.flush().await.unwrap();
    let lying = tokio::spawn(async move {
        let lies = [r#"{"number":7}"#, r#"{"number":1002}"#, "{}", "", "\u{0}"];
        for lie in lies.iter().cycle() {
            let request = requests.next().await.unwrap();
            liar.publish(request.reply.unwrap(), (*lie).into()).await.unwrap();
        }
    });
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multiplier = pipeline.multiplier(SLOT_MS).await;
    for done in ticks.take(8).await {
        assert!(done.product.is_some(), "{done:?}");
    }
    lying.abort();
    pipeline.verify().await;
}

/// Of two replicas in their first slots neither waits for the other to go first.
#[tokio::test]
async fn replicas_may_start_and_stop_at_any_time() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _stays = pipeline.multiplier(SLOT_MS).await;
    ticks.take(2).await;
    for _ in 0..4 {
        let mut comes_and_goes = pipeline.multiplier(SLOT_MS).await;
        sleep(Duration::from_millis(1300)).await;
        assert!(comes_and_goes.terminate().await.success());
    }
    ticks.take(10).await;
    assert_one_tick_a_slot(&pipeline, &ticks).await;
}
