//! The outboxes of several replicas over simulated streams, under thousands of seeded schedules of
//! faults. Time is tokio's paused clock, so half an hour passes in milliseconds.
//!
//! A failure prints its seed. This runs the schedule of that seed alone:
//! `EVENODD_SEED=<seed> cargo test --package multiplier --test simulation`.

#![allow(
    clippy::disallowed_types,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use contract::streams::DUPLICATE_WINDOW;
use contract::{Draw, Message, Parity, Product, Slot, SlotLength, subjects};
use futures::channel::mpsc::UnboundedSender;
use multiplier::clock::Clock;
use multiplier::outbox::{CAPACITY, Outbox, World};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use runtime::history::{Entry, ReadError};
use runtime::jetstream::{Ack, PublishError};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How many schedules a run tries.
const SCHEDULES: u64 = 10_000;
/// When a schedule begins, since the Unix epoch.
const EPOCH: Duration = Duration::from_secs(1_800_000_000);
const ACK_TIMEOUT: Duration = Duration::from_millis(500);
/// What began this long before the faults ended was not given up.
const NOT_GIVEN_UP: Duration = Duration::from_secs(9 * 60);
/// How long a replica that starts may have to wait until its clock is later than what is stored.
const WAIT: Duration = Duration::from_secs(10);
const HOUR_MS: i64 = 3_600_000;
/// Longer than a stream remembers message ids.
const BACK_MS: i64 = -780_000;

/// Mistakes that somebody could make, made on purpose.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    None,
    /// A replica goes on with its own draw and not with the one that is stored.
    OwnDraw,
    DrawWithoutId,
    NumberWithoutId,
    /// What was not acknowledged is not published again.
    DrawOnce,
    NumberOnce,
    /// What was not acknowledged is published again later, after what has come since.
    RetryLater,
    /// A clock that is behind what is stored does not wait.
    IgnoreStoredSlots,
}

/// A stream: what it promises, and how it may fail.
#[derive(Default)]
struct Stream {
    stored: Vec<Entry>,
    ids: BTreeMap<Slot, (Instant, u64)>,
    in_process: BTreeSet<Slot>,
    /// Until when it has no leader, and how often it has lost one.
    leaderless: Option<Instant>,
    elections: u32,
}

impl Stream {
    /// The message with this id, as long as the stream remembers it.
    fn find(&self, slot: Slot) -> Option<Ack> {
        let (at, sequence) = *self.ids.get(&slot)?;
        (at.elapsed() < DUPLICATE_WINDOW).then_some(Ack { sequence, duplicate: true })
    }

    /// The last messages; the newest slot is among them, however late others came.
    fn latest(&self) -> Vec<Entry> {
        self.stored[self.stored.len().saturating_sub(16)..].to_vec()
    }

    fn store(&mut self, slot: Slot, payload: Vec<u8>, now: Duration) -> Entry {
        let entry = Entry {
            sequence: self.stored.len() as u64 + 1,
            time: OffsetDateTime::UNIX_EPOCH + now,
            message_id: Some(slot.to_string()),
            payload: payload.into(),
        };
        self.stored.push(entry.clone());
        self.ids.insert(slot, (Instant::now(), entry.sequence));
        entry
    }
}

/// One start of a multiplier.
struct Replica {
    hear: UnboundedSender<Entry>,
    offset_ms: Arc<Mutex<i64>>,
    /// Its clock is right within some seconds and was never changed.
    is_steady: bool,
    started: Instant,
    task: JoinHandle<()>,
    is_alive: bool,
    /// Until when nothing reaches it.
    cut_off: Option<Instant>,
    /// The times in which nothing reached it, since the Unix epoch.
    cuts: Vec<(Duration, Duration)>,
    /// The slots for which it has offered a draw, and of all it has published, in its order.
    drawn: BTreeSet<Slot>,
    published: Vec<Slot>,
}

struct State {
    random: StdRng,
    ticks: Stream,
    numbers: Stream,
    /// By how much the brokers' clock is behind.
    brokers_behind: Duration,
    /// Whether a clock was ever further ahead of the others than they tolerate.
    has_far_ahead: bool,
    /// The share of messages that are lost, late or repeated.
    loss: f64,
    /// Until when there is no generator of the one and of the other parity.
    away: [Option<Instant>; 2],
    replicas: Vec<Replica>,
}

impl State {
    fn stream(&mut self, subject: &str) -> &mut Stream {
        if subject == subjects::DRAW { &mut self.ticks } else { &mut self.numbers }
    }

    fn happens(&mut self, chance: f64) -> bool {
        self.random.random_bool(chance)
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.random.random_range(from * 1000..to * 1000))
    }
}

#[derive(Clone)]
struct Simulation {
    state: Arc<Mutex<State>>,
    begun: Instant,
    length: SlotLength,
    mistake: Mistake,
}

fn pending(until: Option<Instant>) -> bool {
    until.is_some_and(|until| until > Instant::now())
}

impl Simulation {
    fn new(seed: u64, mistake: Mistake) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        // With the longer one, outages outlast the duplicate window.
        let length = if random.random_bool(0.8) { "500" } else { "60000" };
        let is_short = length == "500";
        let brokers_behind = if is_short { [0, 0, 0, 0, 30][random.random_range(0..5)] } else { 0 };
        let state = State {
            brokers_behind: Duration::from_secs(brokers_behind),
            has_far_ahead: false,
            loss: [0.0, 0.02, 0.2][random.random_range(0..3)],
            random,
            ticks: Stream::default(),
            numbers: Stream::default(),
            away: [None; 2],
            replicas: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        Self { state, begun: Instant::now(), length: length.parse().unwrap(), mistake }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The brokers' time, since the Unix epoch.
    fn now(&self) -> Duration {
        EPOCH + self.begun.elapsed()
    }

    async fn pause(&self, from_ms: u64, to_ms: u64) {
        let pause = self.lock().ms(from_ms, to_ms);
        sleep(pause).await;
    }

    /// A multiplier starts.
    fn start(&self, offset_ms: i64) {
        let offset = Arc::new(Mutex::new(offset_ms));
        let clock = Clock::new(self.length, {
            let (simulation, offset) = (self.clone(), offset.clone());
            move || {
                let offset = *offset.lock().unwrap();
                let change = Duration::from_millis(offset.unsigned_abs());
                let now = simulation.now();
                if offset < 0 { now - change } else { now + change }
            }
        });
        let mut state = self.lock();
        let n = state.replicas.len();
        let (queue, turns) = mpsc::channel(CAPACITY);
        let (hear, heard) = futures::channel::mpsc::unbounded();
        let world = Wires { simulation: self.clone(), n };
        let outbox =
            Outbox::new(&n.to_string(), clock.clone(), world.clone(), state.random.random());
        let task = tokio::spawn(async move {
            let id = n.to_string();
            tokio::join!(
                outbox.run(turns, |_, _| {}),
                clock.run(queue),
                clock.follow(&world, heard, &id)
            );
        });
        state.has_far_ahead |= offset_ms > 4000;
        state.replicas.push(Replica {
            hear,
            offset_ms: offset,
            is_steady: offset_ms.abs() <= 4000,
            started: Instant::now(),
            task,
            is_alive: true,
            cut_off: None,
            cuts: Vec::new(),
            drawn: BTreeSet::new(),
            published: Vec::new(),
        });
    }

    /// A publication arrives at a stream.
    async fn arrive(
        self,
        subject: &'static str,
        slot: Slot,
        payload: Vec<u8>,
        reply: Option<oneshot::Sender<Result<Ack, PublishError>>>,
    ) {
        let answer = |result| reply.map(|reply| reply.send(result));
        let without_id = match subject {
            subjects::DRAW => self.mistake == Mistake::DrawWithoutId,
            _ => self.mistake == Mistake::NumberWithoutId,
        };
        let (elections, commit) = {
            let mut state = self.lock();
            let slow = state.happens(0.1);
            let commit = if slow { state.ms(1, 300) } else { state.ms(1, 4) };
            let stream = state.stream(subject);
            if pending(stream.leaderless) {
                return;
            }
            if let (Some(ack), false) = (stream.find(slot), without_id) {
                answer(Ok(ack));
                return;
            }
            if !stream.in_process.insert(slot) && !without_id {
                answer(Err(PublishError::InProcess));
                return;
            }
            (stream.elections, commit)
        };
        sleep(commit).await;
        let mut state = self.lock();
        let survives = state.happens(0.5);
        let stamp = self.now() - state.brokers_behind;
        let stream = state.stream(subject);
        let led = stream.elections == elections;
        if led {
            stream.in_process.remove(&slot);
        }
        // What a lost leader had proposed may be committed by the next one, which knows all ids.
        if (!led && !survives) || (stream.find(slot).is_some() && !without_id) {
            return;
        }
        let entry = stream.store(slot, payload, stamp);
        if subject == subjects::DRAW && self.mistake != Mistake::IgnoreStoredSlots {
            let loss = state.loss;
            for n in 0..state.replicas.len() {
                if !pending(state.replicas[n].cut_off) && !state.happens(loss) {
                    let _ = state.replicas[n].hear.unbounded_send(entry.clone());
                }
            }
        }
        if led {
            answer(Ok(Ack { sequence: entry.sequence, duplicate: false }));
        }
    }

    /// Faults, one after the other, and then a time without any. Returns when the faults ended.
    async fn run(&self) -> Duration {
        let slot = self.length.duration();
        let replicas = self.lock().random.random_range(2..=5);
        for _ in 0..replicas {
            let offset = self.offset();
            self.start(offset);
        }
        let faults = self.lock().random.random_range(0..30);
        for _ in 0..faults {
            let pause = { self.lock().random.random_range(0.0..3.0) };
            sleep(slot.mul_f64(pause)).await;
            self.fault();
        }
        // Everybody who is still there is well from now on, and there is somebody.
        {
            let mut state = self.lock();
            state.loss = 0.0;
            state.away = [None; 2];
            state.ticks.leaderless = None;
            state.numbers.leaderless = None;
            state.replicas.iter_mut().for_each(|replica| replica.cut_off = None);
        }
        self.start(0);
        let ended = self.now();
        // A late clock, a late message, and then a backlog.
        sleep(Duration::from_secs(15) + 2 * slot).await;
        for replica in &self.lock().replicas {
            replica.task.abort();
        }
        ended
    }

    fn offset(&self) -> i64 {
        let mut state = self.lock();
        match state.random.random_range(0..20) {
            0 => BACK_MS,
            // In long slots a schedule would reach what is drawn ahead of time.
            1 if self.length == SlotLength::DEFAULT => HOUR_MS,
            // Together with an outage of ten minutes this would be too much (docs/adr/0001).
            2 | 3 if self.length == SlotLength::DEFAULT => {
                [12_000, 20_000, 60_000, 300_000][state.random.random_range(0..4)]
            }
            4..=9 => state.random.random_range(-4000..=4000),
            _ => 0,
        }
    }

    fn fault(&self) {
        let mut state = self.lock();
        let kind = state.random.random_range(0..8);
        let n = {
            let len = state.replicas.len();
            state.random.random_range(0..len)
        };
        let seconds = [1, 4, 9, 20, 200, 700][state.random.random_range(0..6)];
        // In long slots an outage may outlast the duplicate window.
        let seconds = if self.length == SlotLength::DEFAULT { seconds.min(20) } else { seconds };
        let until = Some(Instant::now() + Duration::from_secs(seconds));
        match kind {
            0 | 1 => {
                let stream = if kind == 0 { &mut state.ticks } else { &mut state.numbers };
                stream.leaderless = until;
                stream.elections += 1;
                stream.in_process.clear();
            }
            2 => state.away[n % 2] = until,
            3 => {
                let (now, length) = (self.now(), Duration::from_secs(seconds));
                state.replicas[n].cut_off = until;
                state.replicas[n].cuts.push((now, now + length));
            }
            4 | 5 => {
                state.replicas[n].task.abort();
                state.replicas[n].is_alive = false;
                drop(state);
                let offset = self.offset();
                self.start(offset);
            }
            6 => {
                state.replicas[n].task.abort();
                state.replicas[n].is_alive = false;
            }
            _ => {
                let change = [BACK_MS, -5000, -700, 700, 5000][state.random.random_range(0..5)];
                let replica = &mut state.replicas[n];
                let mut offset_ms = replica.offset_ms.lock().unwrap();
                *offset_ms += change;
                let is_far_ahead = *offset_ms > 4000;
                drop(offset_ms);
                replica.is_steady = false;
                state.has_far_ahead |= is_far_ahead;
            }
        }
    }

    /// What is wrong with the outcome.
    fn check(&self, faults_ended: Duration) -> Result<(), String> {
        let state = self.lock();
        let mut draws = BTreeMap::new();
        for entry in &state.ticks.stored {
            let draw = Draw::decode(&entry.payload).unwrap();
            let slot = draw.slot;
            if draws.insert(slot, draw).is_some() {
                return Err(format!("two draws: slot {slot}"));
            }
        }
        let mut numbers = BTreeSet::new();
        for entry in &state.numbers.stored {
            let slot: Slot = entry.message_id.as_ref().unwrap().parse().unwrap();
            let number = Product::decode(&entry.payload).unwrap();
            if draws.get(&slot).and_then(Draw::due) != Some(number) {
                return Err(format!("not the number of its draw: slot {slot}"));
            }
            if !numbers.insert(slot) {
                return Err(format!("two numbers: slot {slot}"));
            }
        }
        for replica in &state.replicas {
            if !replica.published.is_sorted() {
                return Err("not in the order of slots".to_owned());
            }
        }
        let recent = |slot: &Slot| {
            let began = self.length.start_of(*slot);
            faults_ended.saturating_sub(NOT_GIVEN_UP) < began && began < faults_ended
        };
        let knew = |slot| state.replicas.iter().any(|r| r.is_alive && r.drawn.contains(slot));
        let lost = draws.values().find(|draw| {
            let slot = &draw.slot;
            draw.due().is_some() && recent(slot) && !numbers.contains(slot) && knew(slot)
        });
        if let Some(draw) = lost {
            return Err(format!("a number is lost: slot {}", draw.slot));
        }
        // The replica that started last is well, and goes on whatever has been.
        let margin = Duration::from_secs(3);
        let from = self.length.slot_at(faults_ended + WAIT).next().next();
        let to = self.length.slot_at(self.now() - margin);
        if let Some(slot) = (from.0..to.0).map(Slot).find(|slot| !draws.contains_key(slot)) {
            return Err(format!("no draw: slot {slot}, long after the faults"));
        }
        let steady = state.replicas.iter().filter(|r| r.is_alive && r.is_steady);
        // One whose clock is far ahead takes slots that those behind it still have before them.
        for replica in steady.filter(|_| !state.has_far_ahead) {
            // Its clock may be up to 4 s off. If it came later, it had to wait for the slots that one
            // whose clock was ahead had drawn already.
            let late = replica.started > self.begun;
            let wait = Duration::from_secs(5) + if late { WAIT } else { Duration::ZERO };
            let from = EPOCH + (replica.started - self.begun) + wait;
            let from = self.length.slot_at(from).next();
            let to = self.length.slot_at(faults_ended.saturating_sub(Duration::from_secs(5)));
            // It must know what is stored to begin a slot, and is told some seconds after a cut.
            let margin = Duration::from_secs(5);
            let was_there = |slot: &Slot| {
                let began = self.length.start_of(*slot);
                let cut = |&(from, to): &(Duration, Duration)| {
                    from < began + margin && began < to + 2 * margin
                };
                !replica.cuts.iter().any(cut)
            };
            let missed = (from.0..to.0)
                .map(Slot)
                .find(|slot| recent(slot) && was_there(slot) && !draws.contains_key(slot));
            if let Some(slot) = missed {
                return Err(format!("no draw: slot {slot}"));
            }
        }
        Ok(())
    }
}

/// What connects one replica to the streams and the generators.
#[derive(Clone)]
struct Wires {
    simulation: Simulation,
    n: usize,
}

impl Wires {
    fn is_cut_off(&self) -> bool {
        pending(self.simulation.lock().replicas[self.n].cut_off)
    }

    /// Publishes once. The message or its acknowledgement may be lost, late, or come twice.
    async fn send(
        &self,
        subject: &'static str,
        slot: Slot,
        payload: Vec<u8>,
    ) -> Result<Ack, PublishError> {
        let (reply, answer) = oneshot::channel();
        let mut reply = Some(reply);
        {
            let mut state = self.simulation.lock();
            let cut_off = pending(state.replicas[self.n].cut_off);
            state.replicas[self.n].published.push(slot);
            if subject == subjects::DRAW {
                state.replicas[self.n].drawn.insert(slot);
            }
            let loss = state.loss;
            if state.happens(loss) {
                // The acknowledgement is lost.
                reply = None;
            }
            let arrivals =
                if cut_off || state.happens(loss) { 0 } else { 1 + u32::from(state.happens(loss)) };
            for _ in 0..arrivals {
                let late = state.happens(loss);
                let delay = if late { state.ms(0, 5000) } else { state.ms(0, 2) };
                let (simulation, payload, reply) =
                    (self.simulation.clone(), payload.clone(), reply.take());
                tokio::spawn(async move {
                    sleep(delay).await;
                    simulation.arrive(subject, slot, payload, reply).await;
                });
            }
        }
        let failed = || PublishError::Failed("no answer in time".to_owned());
        // A sender that is dropped is an answer that never comes.
        let answer = async {
            match answer.await {
                Ok(answer) => answer,
                Err(_) => std::future::pending().await,
            }
        };
        timeout(ACK_TIMEOUT, answer).await.unwrap_or_else(|_| Err(failed()))
    }
}

impl World for Wires {
    async fn factor(&self, parity: Parity, until: Instant) -> Option<u16> {
        let away = self.simulation.lock().away[usize::from(parity == Parity::Odd)];
        if pending(away) || self.is_cut_off() {
            sleep_until(until).await;
            return None;
        }
        self.simulation.pause(0, 3).await;
        let half = self.simulation.lock().random.random_range(0..500);
        Some(2 * half + parity.range().start())
    }

    async fn publish(
        &self,
        subject: &'static str,
        slot: Slot,
        payload: Vec<u8>,
    ) -> Result<Ack, PublishError> {
        let result = self.send(subject, slot, payload.clone()).await;
        match (self.simulation.mistake, subject, &result) {
            (Mistake::OwnDraw, subjects::DRAW, Ok(ack)) => Ok(Ack { duplicate: false, ..*ack }),
            // It goes on as if all were well, with a draw that cannot be read.
            (Mistake::DrawOnce, subjects::DRAW, Err(_)) => Ok(Ack { sequence: 0, duplicate: true }),
            (Mistake::NumberOnce, subjects::PUBLISH, Err(_)) => {
                Ok(Ack { sequence: 0, duplicate: false })
            }
            (Mistake::RetryLater, subjects::PUBLISH, Err(_)) => {
                let wires = self.clone();
                tokio::spawn(async move {
                    while wires.send(subject, slot, payload.clone()).await.is_err() {
                        wires.simulation.pause(500, 1000).await;
                    }
                });
                Ok(Ack { sequence: 0, duplicate: false })
            }
            _ => result,
        }
    }

    async fn latest(&self) -> Result<Vec<Entry>, ReadError> {
        // It is told by the read whether there is an answer.
        self.get(1).await?;
        Ok(match self.simulation.mistake {
            Mistake::IgnoreStoredSlots => Vec::new(),
            _ => self.simulation.lock().ticks.latest(),
        })
    }

    async fn read(&self, sequence: u64) -> Result<Option<Entry>, ReadError> {
        self.get(sequence).await
    }
}

impl Wires {
    /// A direct get. The replica of the stream that answers may be behind.
    async fn get(&self, sequence: u64) -> Result<Option<Entry>, ReadError> {
        self.simulation.pause(0, 3).await;
        let cut_off = self.is_cut_off();
        let (is_lost, is_behind) = {
            let mut state = self.simulation.lock();
            let loss = state.loss;
            (state.happens(loss), state.happens(0.2))
        };
        if cut_off || is_lost {
            sleep(ACK_TIMEOUT).await;
            return Err(ReadError::TimedOut("TICKS"));
        }
        let state = self.simulation.lock();
        let entry = state.ticks.stored.get((sequence.max(1) - 1) as usize);
        Ok(entry.filter(|_| !is_behind).cloned())
    }
}

/// What one schedule ends with: all that is stored and when, and what is wrong with it.
type Ended = (Vec<Entry>, Vec<Entry>, Result<(), String>);

fn schedule(seed: u64, mistake: Mistake) -> Ended {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(async {
        let simulation = Simulation::new(seed, mistake);
        let faults_ended = simulation.run().await;
        let result = simulation.check(faults_ended);
        let state = simulation.lock();
        (state.ticks.stored.clone(), state.numbers.stored.clone(), result)
    })
}

#[test]
fn nothing_is_lost_or_doubled_whatever_happens() {
    let chosen = std::env::var("EVENODD_SEED").map(|seed| seed.parse().unwrap());
    let seeds = chosen.map_or(0..SCHEDULES, |seed: u64| seed..seed + 1);
    let begun = std::time::Instant::now();
    let (seeds_left, stored) = (Mutex::new(seeds.clone()), Mutex::new((0, 0)));
    let work = || {
        while let Some(seed) = { seeds_left.lock().unwrap().next() } {
            let (draws, numbers, result) = schedule(seed, Mistake::None);
            assert_eq!(result, Ok(()), "EVENODD_SEED={seed}");
            let mut stored = stored.lock().unwrap();
            *stored = (stored.0 + draws.len(), stored.1 + numbers.len());
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..processors).for_each(|_| drop(scope.spawn(work))));
    let (draws, numbers) = *stored.lock().unwrap();
    let schedules = seeds.end - seeds.start;
    println!(
        "{schedules} schedules, {:.0} a second: {draws} draws, {numbers} numbers",
        schedules as f64 / begun.elapsed().as_secs_f64()
    );
    assert!(numbers > 0 && numbers < draws);
}

/// Each property can fail: somebody who makes the mistake is found out.
#[test]
fn every_mistake_is_found() {
    for (mistake, found_by) in [
        (Mistake::OwnDraw, "not the number of its draw"),
        (Mistake::DrawWithoutId, "two draws"),
        (Mistake::NumberWithoutId, "two numbers"),
        (Mistake::DrawOnce, "no draw"),
        (Mistake::NumberOnce, "a number is lost"),
        (Mistake::RetryLater, "not in the order"),
        (Mistake::IgnoreStoredSlots, "two draws"),
    ] {
        let found = (0..1000)
            .find(|&seed| schedule(seed, mistake).2.is_err_and(|what| what.starts_with(found_by)));
        println!("{mistake:?}: {found_by}, with seed {:?}", found.expect("it is not found"));
    }
}

#[test]
fn a_seed_is_a_schedule() {
    for seed in 0..50 {
        assert_eq!(schedule(seed, Mistake::None), schedule(seed, Mistake::None));
    }
}
