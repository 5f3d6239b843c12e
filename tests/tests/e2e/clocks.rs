//! Multipliers with wrong clocks, next to one with a right clock. They run in the process of the
//! test, which gives each of them a clock of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::SlotLength;
use multiplier::clock::Clock;
use runtime::settings::NatsSettings;
use runtime::{Credentials, Shutdown, connection};
use tests::{Audit, Pipeline, Ticks};
use tokio_util::task::AbortOnDropHandle;

const HOUR_MS: i64 = 3_600_000;

/// A multiplier whose clock is ahead by `offset_ms`. Dropping it kills it.
struct Multiplier {
    offset_ms: Arc<AtomicI64>,
    _task: AbortOnDropHandle<anyhow::Result<()>>,
}

impl Multiplier {
    async fn start(pipeline: &Pipeline, offset_ms: i64) -> Self {
        let offset_ms = Arc::new(AtomicI64::new(offset_ms));
        let wall = {
            let offset_ms = offset_ms.clone();
            move || {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                let offset_ms = offset_ms.load(Ordering::Relaxed);
                let offset = Duration::from_millis(offset_ms.unsigned_abs());
                if offset_ms < 0 { now - offset } else { now + offset }
            }
        };
        let clock = Clock::new(SlotLength::DEFAULT, wall);
        let nats = vec![pipeline.broker.url().parse().unwrap()];
        let settings = NatsSettings { nats, credentials: Credentials::default() };
        let client = connection::connect(&settings, "multiplier", "multiplier").await.unwrap();
        let shutdown = Shutdown::new(Duration::from_secs(5));
        let task = tokio::spawn(multiplier::run(client, clock, shutdown));
        Self { offset_ms, _task: AbortOnDropHandle::new(task) }
    }
}

#[tokio::test]
async fn a_multiplier_with_a_clock_ahead_costs_no_slot_when_it_dies() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _right = pipeline.multiplier(500).await;
    let right = ticks.next().await.multiplier;
    let ahead = Multiplier::start(&pipeline, 2000).await;
    let first = ticks.until(|draw| draw.multiplier != right).await.slot;
    // From then on its draws are the first.
    let draws = ticks.take(12).await;
    let later = || draws.iter().filter(|draw| draw.slot > first);
    assert!(later().count() >= 4 && later().all(|draw| draw.multiplier != right), "{draws:#?}");
    drop(ahead);
    ticks.until(|draw| draw.multiplier == right).await;
    ticks.take(4).await;
    assert_eq!(Audit::of(&pipeline.client).await.missed(), []);
    pipeline.verify().await;
}

#[tokio::test]
async fn a_multiplier_whose_clock_is_set_back_draws_no_slot_twice() {
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let _right = pipeline.multiplier(500).await;
    let right = ticks.next().await.multiplier;
    let starts_wrong = Multiplier::start(&pipeline, -HOUR_MS).await;
    let runs = Multiplier::start(&pipeline, 0).await;
    ticks.until(|draw| draw.multiplier != right).await;
    runs.offset_ms.store(-HOUR_MS, Ordering::Relaxed);
    // It may finish the slots that it has begun.
    ticks.take(2).await;
    let draws = ticks.take(10).await;
    assert!(draws.iter().all(|draw| draw.multiplier == right), "{draws:#?}");
    for wrong in [&starts_wrong, &runs] {
        wrong.offset_ms.store(0, Ordering::Relaxed);
    }
    let first = ticks.until(|draw| draw.multiplier != right).await.multiplier;
    ticks.until(|draw| draw.multiplier != right && draw.multiplier != first).await;
    assert_eq!(Audit::of(&pipeline.client).await.missed(), []);
    pipeline.verify().await;
}
