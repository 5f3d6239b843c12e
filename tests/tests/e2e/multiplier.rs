//! Service 3: the rate of products, and one draw for every slot whatever happens to the replicas.

use std::time::Duration;

use contract::streams::{NUMBERS, TICKS};
use contract::{Draw, Message, Outcome, Parity, Product, Slot, odds, subjects};
use futures::StreamExt;
use nix::sys::signal::Signal;
use runtime::history::Entry;
use tests::ticks::all;
use tests::{Audit, Pipeline, Ticks};
use tokio::time::sleep;

/// The length of a slot in deployments.
const SLOT_MS: u64 = 500;

/// Over many fast ticks, the share of published products matches the odds. A subscriber hears
/// exactly what the history stores.
#[tokio::test]
async fn the_rate_matches_the_odds_and_subscribers_hear_the_history() {
    let _alone = tests::alone().await;
    const TICKS: u32 = 1200;
    let pipeline = Pipeline::new().await;
    let mut live = pipeline.client.subscribe(subjects::PUBLISHED).await.unwrap();
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _generators = pipeline.generators().await;
    let mut multiplier = pipeline.multiplier(20).await;
    ticks.take(TICKS as usize).await;
    assert!(multiplier.terminate().await.success());
    // The multiplier may have finished another tick before it stopped.
    let done = ticks.all_so_far().await;

    // On a busy machine some ticks lack a factor. They say nothing about the odds.
    let products: Vec<_> = done.iter().filter_map(|done| done.product()).collect();
    let above = products.iter().filter(|product| product.is_above_threshold()).count();
    let n = f64::from(u32::try_from(products.len()).unwrap());
    assert!(n > 0.9 * f64::from(TICKS), "only {n} ticks had both factors");
    let p = odds::publish_probability();
    let deviation = (f64::from(u32::try_from(above).unwrap()) - n * p) / (n * p * (1.0 - p)).sqrt();
    // Six standard deviations are exceeded once in 5 * 10^8 runs.
    assert!(deviation.abs() < 6.0, "{above} of {n} published: {deviation} standard deviations");

    let history = all(&pipeline.client, NUMBERS).await;
    assert_eq!(history.len(), above);
    for stored in history {
        let message = live.next().await.unwrap();
        // The server adds the sequence and the time.
        assert_eq!(Entry::try_from(message).unwrap(), stored);
        assert!(Product::decode(&stored.payload).unwrap().is_above_threshold());
    }
    let (status, output) = pipeline.evenodd(&["verify", "--slot-ms", "20"]).await;
    assert_eq!(status, Some(0), "{output}");
}

async fn assert_one_draw_a_slot(pipeline: &Pipeline) {
    let audit = Audit::of(&pipeline.client).await;
    assert_eq!(audit.missed(), []);
    pipeline.verify().await;
}

#[tokio::test]
async fn a_frozen_multiplier_costs_nothing() {
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
    assert_one_draw_a_slot(&pipeline).await;
}

/// As a machine that is paused does: the slots of the pause are drawn when it is over.
#[tokio::test]
async fn a_pause_of_all_multipliers_costs_no_slot() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let multipliers = pipeline.multipliers::<2>(SLOT_MS).await;
    ticks.take(3).await;
    multipliers.iter().for_each(|multiplier| multiplier.signal(Signal::SIGSTOP));
    sleep(Duration::from_secs(4)).await;
    multipliers.iter().for_each(|multiplier| multiplier.signal(Signal::SIGCONT));
    ticks.take(12).await;
    assert_one_draw_a_slot(&pipeline).await;
}

#[tokio::test]
async fn a_killed_or_frozen_generator_costs_no_factor() {
    let _alone = tests::alone().await;
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
    assert_eq!(Audit::of(&pipeline.client).await.without_numbers(), []);
    assert_one_draw_a_slot(&pipeline).await;
}

/// A multiplier repeats a request that was on its way to a generator that stopped.
#[tokio::test]
async fn generators_may_come_and_go() {
    let _alone = tests::alone().await;
    let pipeline = Pipeline::new().await;
    let mut generators = pipeline.generators().await.map(|generator| (generator, Parity::Even));
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multiplier = pipeline.multiplier(250).await;
    generators.iter_mut().skip(2).for_each(|(_, parity)| *parity = Parity::Odd);
    for (generator, parity) in &mut generators {
        for _ in 0..5 {
            let new = pipeline.generator(*parity).await;
            let mut old = std::mem::replace(generator, new);
            assert!(old.terminate().await.success());
            ticks.take(2).await;
        }
    }
    let audit = Audit::of(&pipeline.client).await;
    assert_eq!((audit.missed(), audit.without_numbers()), (vec![], vec![]));
}

#[tokio::test]
async fn without_generators_draws_say_so_and_recover_when_they_are_back() {
    let pipeline = Pipeline::new().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _multiplier = pipeline.multiplier(SLOT_MS).await;
    assert_eq!(ticks.next().await.outcome(), Outcome::NoNumbers);
    let _even = pipeline.generator(Parity::Even).await;
    let one = ticks.until(|draw| draw.outcome() != Outcome::NoNumbers).await;
    assert_eq!(one.outcome(), Outcome::NoOdd);
    assert_eq!(pipeline.history().await, []);
    let mut odd = pipeline.generator(Parity::Odd).await;
    ticks.until(|draw| draw.outcome() == Outcome::AboveThreshold).await;
    odd.kill();
    ticks.until(|draw| draw.outcome() == Outcome::NoOdd).await;
    let stored = pipeline.history().await.len();
    ticks.take(4).await;
    assert_eq!(pipeline.history().await.len(), stored);
    assert_one_draw_a_slot(&pipeline).await;
}

/// A foreign message in the place of a draw costs only that slot.
#[tokio::test]
async fn an_unusable_draw_is_reported_and_skipped() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut multiplier = pipeline.multiplier(SLOT_MS).await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let (slot, timeout) = (ticks.next().await.slot, Duration::from_secs(1));
    let other = Draw { slot, multiplier: "x".to_owned(), even: Some(846), odd: Some(511) };
    let spoilt = Slot(slot.0 + 3);
    let (subject, payload) = (subjects::DRAW, other.encode().into());
    runtime::jetstream::publish(&pipeline.client, subject, spoilt, payload, timeout).await.unwrap();
    let reported = multiplier.wait_for("cannot be used").await;
    assert!(reported.contains(&format!("it belongs to slot {slot}")), "{reported}");
    ticks.until(|draw| draw.slot > spoilt).await;
    let slots: Vec<_> = pipeline.history().await.iter().map(tests::ticks::slot).collect();
    assert!(!slots.contains(&spoilt), "{slots:?}");
}

/// On a broker without keys, any client can delete draws and publish to `ticks.done`. The
/// multipliers continue after some seconds.
#[tokio::test]
async fn an_unrestricted_client_does_not_stop_the_multipliers_for_long() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let _multipliers = pipeline.multipliers::<2>(SLOT_MS).await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let draw = |slot| Draw { slot, multiplier: "x".to_owned(), even: Some(846), odd: Some(511) };
    let slot = Slot(ticks.next().await.slot.0 + 2);
    let (timeout, payload) = (Duration::from_secs(1), draw(slot).encode().into());
    runtime::jetstream::publish(&pipeline.client, subjects::DRAW, slot, payload, timeout)
        .await
        .unwrap();
    // A multiplier that reads the draw of that slot finds an empty stream.
    let context = async_nats::jetstream::new(pipeline.client.clone());
    context.get_stream(TICKS).await.unwrap().purge().await.unwrap();
    ticks.until(|draw| draw.slot.0 > slot.0 + 8 && draw.multiplier != "x").await;

    let hour = Slot(ticks.next().await.slot.0 + 7200);
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Sequence", "1");
    headers.insert("Nats-Time-Stamp", "2100-01-01T00:00:00Z");
    let (forged, client) = (draw(hour).encode().into(), &pipeline.client);
    client.publish_with_headers(subjects::DONE, headers, forged).await.unwrap();
    ticks.until(|draw| draw.multiplier == "x").await;
    let mut after = Ticks::watch(&pipeline.client).await;
    after.take(8).await;
}

/// A multiplier ignores the invalid answers of one generator and uses those of another one.
#[tokio::test]
async fn invalid_answers_are_ignored() {
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
    for draw in ticks.take(8).await {
        assert!(draw.product().is_some(), "{draw:?}");
    }
    lying.abort();
    pipeline.verify().await;
}

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
    assert_one_draw_a_slot(&pipeline).await;
}
