//! Multipliers with wrong clocks, next to one with a right clock. They run in the process of the
//! test, which gives each of them a clock of its own.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::SlotLength;
use multiplier::clock::Clock;
use runtime::health;
use runtime::settings::NatsSettings;
use runtime::{Credentials, Shutdown, connection};
use tests::http::get;
use tests::{Audit, Pipeline, Ticks, eventually, network, services};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tracing::subscriber::DefaultGuard;

const HOUR_MS: i64 = 3_600_000;

/// What is logged on this thread, which runs all tasks of the test.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn count(&self, text: &str) -> usize {
        String::from_utf8_lossy(&self.0.lock().unwrap()).matches(text).count()
    }
}

/// A multiplier whose clock is ahead by `offset_ms`. Dropping it kills it.
struct Multiplier {
    offset_ms: Arc<AtomicI64>,
    /// The address of its health page.
    health: String,
    _page: AbortOnDropHandle<()>,
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
        let health = clock.health.clone();
        let nats = vec![pipeline.broker.url().parse().unwrap()];
        let settings = NatsSettings { nats, credentials: Credentials::default() };
        let client = connection::connect(&settings, "multiplier").await.unwrap();
        let shutdown = Shutdown::new(Duration::from_secs(5));
        let listener = TcpListener::bind(format!("{}.1:0", network())).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let page = tokio::spawn(health::serve(Some(listener), client.clone(), health));
        let task = tokio::spawn(multiplier::run(client, clock, shutdown));
        let (_page, _task) = (AbortOnDropHandle::new(page), AbortOnDropHandle::new(task));
        Self { offset_ms, health: address, _page, _task }
    }

    async fn health(&self) -> (u16, String) {
        let page = get(&self.health, "/healthz", &[]).await;
        (page.status, page.body)
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
    let runs = Multiplier::start(&pipeline, 0).await;
    ticks.until(|draw| draw.multiplier != right).await;
    runs.offset_ms.store(-HOUR_MS, Ordering::Relaxed);
    // It may finish the slots that it has begun.
    ticks.take(2).await;
    let draws = ticks.take(10).await;
    assert!(draws.iter().all(|draw| draw.multiplier == right), "{draws:#?}");
    runs.offset_ms.store(0, Ordering::Relaxed);
    ticks.until(|draw| draw.multiplier != right).await;
    assert_eq!(Audit::of(&pipeline.client).await.missed(), []);
    pipeline.verify().await;
}

/// Whether others run or not, it draws nothing until its clock is right.
#[tokio::test]
async fn a_multiplier_that_starts_with_its_clock_behind_waits_and_says_so_once() {
    const BEHIND: &str = "clock is behind slots that are stored";
    let (log, _guard) = Log::start();
    let pipeline = Pipeline::new().await;
    let _generators = pipeline.generators().await;
    let mut ticks = Ticks::watch(&pipeline.client).await;
    let right = pipeline.multipliers::<2>(500).await;
    let answers = services(&pipeline.client, "PING.multiplier").await;
    let right_ids: HashSet<_> =
        answers.iter().map(|answer| answer["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(right_ids.len(), 2);
    ticks.take(2).await;

    let beside = Multiplier::start(&pipeline, -660_000).await;
    eventually("it says so", async || log.count(BEHIND) == 1).await;
    let (status, reason) = beside.health().await;
    assert!(status == 503 && reason.contains(BEHIND), "{status} {reason}");
    let draws = ticks.take(10).await;
    assert!(draws.iter().all(|draw| right_ids.contains(&draw.multiplier)), "{draws:#?}");
    assert_eq!((log.count(BEHIND), log.count("differs from the broker's")), (1, 1));

    for mut right in right {
        assert!(right.terminate().await.success());
    }
    let alone = Multiplier::start(&pipeline, -660_000).await;
    eventually("it says so", async || log.count(BEHIND) == 2).await;
    assert_eq!(alone.health().await.0, 503);

    for multiplier in [&beside, &alone] {
        multiplier.offset_ms.store(0, Ordering::Relaxed);
        eventually("it is healthy", async || multiplier.health().await.0 == 200).await;
    }
    let first = ticks.until(|draw| !right_ids.contains(&draw.multiplier)).await.multiplier;
    ticks.until(|draw| !right_ids.contains(&draw.multiplier) && draw.multiplier != first).await;
    assert_eq!(log.count(BEHIND), 2);
    Audit::of(&pipeline.client).await;
    pipeline.verify().await;
}

#[tokio::test]
async fn a_multiplier_that_is_alone_says_once_that_its_clock_is_wrong() {
    for offset_ms in [-3000, 3000] {
        let (log, _guard) = Log::start();
        let pipeline = Pipeline::new().await;
        let mut ticks = Ticks::watch(&pipeline.client).await;
        let _multiplier = Multiplier::start(&pipeline, offset_ms).await;
        ticks.take(8).await;
        assert_eq!(log.count("differs from the broker's"), 1, "{offset_ms}");
    }
}
