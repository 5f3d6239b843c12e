//! `evenodd verify`: reads the whole history and the latest draws, and checks every message.

mod draws;

use std::collections::{HashSet, VecDeque};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use contract::streams::{DUPLICATE_WINDOW, NUMBERS, TICKS};
use contract::{Message, Product, Slot, SlotLength, odds};
use indicatif::{ProgressBar, ProgressStyle};
use runtime::connection;
use runtime::history::{self, Entry, MAX_BATCH, ReadError};
use runtime::jetstream;
use runtime::settings::NatsSettings;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::USER;
use draws::Draws;

/// Read the whole history and check every message, and the draws of the last 20 minutes
///
/// Exit status 0: no fault. Exit status 1: faults, each printed with its sequence.
#[derive(Args, Clone, Debug)]
pub struct Verify {
    #[command(flatten)]
    nats: NatsSettings,

    /// The most faults to print; all are counted
    #[arg(long, env = "EVENODD_MAX_FAULTS", value_name = "N", default_value = "1000")]
    max_faults: usize,

    /// The length of a slot in milliseconds; only tests have another one
    #[arg(long, env = "EVENODD_SLOT_MS", value_name = "MS", default_value = "500", hide = true)]
    slot_ms: SlotLength,
}

/// How long NATS, and the leader of the stream, may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The next messages. A replica that is behind has none for a moment, and is asked again.
async fn read(
    client: &async_nats::Client,
    stream: &'static str,
    from: u64,
) -> Result<Vec<Entry>, ReadError> {
    for _ in 0..10 {
        let entries = history::read(client, stream, from, MAX_BATCH).await?;
        if !entries.is_empty() {
            return Ok(entries);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(Vec::new())
}

impl Verify {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let client = connection::connect(&self.nats, USER, "evenodd verify").await?;
        anyhow::ensure!(
            connection::wait_until_connected(&client, PATIENCE).await,
            "NATS is not reachable; give its address with --nats"
        );
        let mut check = Check::new(self.slot_ms, self.max_faults);
        // First the draws: then the history has what they say, or is about to have it.
        let ticks = jetstream::info(&client, TICKS, PATIENCE).await?.state;
        let mut next = ticks.first_sequence;
        while next <= ticks.last_sequence {
            let entries = read(&client, TICKS, next).await?;
            entries.iter().for_each(|entry| check.draw(entry));
            next = entries.last().map_or(ticks.last_sequence, |last| last.sequence) + 1;
        }

        let last = jetstream::info(&client, NUMBERS, PATIENCE).await?.state.last_sequence;
        let progress = ProgressBar::new(last);
        progress.set_style(ProgressStyle::with_template(
            "{wide_bar} {pos}/{len} messages, {per_sec}, {eta} left",
        )?);
        loop {
            for fault in check.faults.drain(..) {
                progress.suspend(|| writeln!(std::io::stdout(), "{fault}"))?;
            }
            if check.next_sequence > last {
                break;
            }
            let entries = read(&client, NUMBERS, check.next_sequence).await?;
            if entries.is_empty() {
                check.hole(last + 1);
            }
            entries.iter().filter(|entry| entry.sequence <= last).for_each(|e| check.message(e));
            progress.set_position(check.next_sequence - 1);
        }
        progress.finish_and_clear();
        check.end();
        let summary = check.summary();
        for line in check.faults.drain(..).chain([summary]) {
            writeln!(std::io::stdout(), "{line}")?;
        }
        Ok(if check.fault_count == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// How many slots without a publication are a time in which nothing ran, and are left out of the
/// rate. Forty unpublished ticks in a row come by chance once in 10^19.
const DOWNTIME_SLOTS: u64 = 40;

/// How far the clock of a multiplier may be ahead of the broker's.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// The state of the check between two messages.
struct Check {
    slot_length: SlotLength,
    draws: Draws,
    next_sequence: u64,
    messages: u64,
    first_time: Option<OffsetDateTime>,
    last_time: Option<OffsetDateTime>,
    newest_slot: Option<Slot>,
    recent_slots: VecDeque<Slot>,
    known_slots: HashSet<Slot>,
    /// The slot after which `slots` are counted, up to the newest.
    counted_after: Slot,
    /// Slots between publications, without downtime, and how many of these were published.
    slots: u64,
    published: u64,
    late: u64,
    /// Those that are not printed yet.
    faults: Vec<String>,
    fault_count: usize,
    max_faults: usize,
}

impl Check {
    fn new(slot_length: SlotLength, max_faults: usize) -> Self {
        Self {
            slot_length,
            draws: Draws::new(slot_length),
            next_sequence: 1,
            messages: 0,
            first_time: None,
            last_time: None,
            newest_slot: None,
            recent_slots: VecDeque::new(),
            known_slots: HashSet::new(),
            counted_after: Slot(0),
            slots: 0,
            published: 0,
            late: 0,
            faults: Vec::new(),
            fault_count: 0,
            max_faults,
        }
    }

    /// How many slots back a message may come late: the outbox of one replica may be published when
    /// another has gone on, until the duplicate window is over.
    fn late_slots(&self) -> u64 {
        self.slot_length.slot_at(DUPLICATE_WINDOW).0
    }

    fn fault(&mut self, sequence: u64, what: impl std::fmt::Display) {
        self.note(format!("sequence {sequence}: {what}"));
    }

    fn note(&mut self, fault: String) {
        self.fault_count += 1;
        if self.fault_count <= self.max_faults {
            self.faults.push(fault);
        }
    }

    fn draw(&mut self, entry: &Entry) {
        if let Err(fault) = self.draws.add(entry) {
            self.note(fault);
        }
    }

    /// After all messages.
    fn end(&mut self) {
        for fault in self.draws.lost() {
            self.note(fault);
        }
    }

    /// The messages up to `next` are not there.
    fn hole(&mut self, next: u64) {
        let (first, last) = (self.next_sequence, next - 1);
        self.fault(first, format_args!("missing up to sequence {last}"));
        self.next_sequence = next;
    }

    fn message(&mut self, entry: &Entry) {
        if entry.sequence > self.next_sequence {
            self.hole(entry.sequence);
        }
        self.next_sequence = entry.sequence + 1;
        self.messages += 1;
        self.first_time.get_or_insert(entry.time);
        if let Some(last) = self.last_time.filter(|&last| entry.time < last) {
            self.fault(
                entry.sequence,
                format_args!(
                    "its time {} is before that of the message before, {last}",
                    entry.time
                ),
            );
        }
        self.last_time = Some(entry.time);
        let slot = entry.message_id.as_deref().and_then(|id| id.parse().ok());
        match Product::decode(&entry.payload) {
            Ok(product) if product.is_above_threshold() => {
                if let Some(Err(fault)) =
                    slot.map(|slot| self.draws.published(slot, product, entry.time))
                {
                    self.fault(entry.sequence, fault);
                }
            }
            Ok(product) => self.fault(
                entry.sequence,
                format_args!("{} is not above the threshold", product.value()),
            ),
            Err(error) => {
                let payload = String::from_utf8_lossy(&entry.payload);
                let payload: String = payload.chars().take(80).collect();
                self.fault(entry.sequence, format_args!("{error}: {payload:?}"));
            }
        }
        match slot {
            Some(slot) => self.slot(entry, slot),
            None => self.fault(
                entry.sequence,
                format_args!("its Nats-Msg-Id {:?} is no slot", entry.message_id),
            ),
        }
    }

    fn slot(&mut self, entry: &Entry, slot: Slot) {
        let sequence = entry.sequence;
        // A slot that cannot be must not become the one that others are compared with.
        if self.slot_length.start_of(slot) > entry.since_epoch() + CLOCK_SKEW {
            let what = format_args!("slot {slot} was not yet when it was stored");
            return self.fault(sequence, what);
        }
        if !self.known_slots.insert(slot) {
            return self.fault(sequence, format_args!("slot {slot} was published before"));
        }
        // A slot further back than this is a fault in any case.
        self.recent_slots.push_back(slot);
        if self.recent_slots.len() as u64 > 2 * self.late_slots()
            && let Some(old) = self.recent_slots.pop_front()
        {
            self.known_slots.remove(&old);
        }
        let Some(newest) = self.newest_slot else {
            self.newest_slot = Some(slot);
            self.counted_after = slot;
            return;
        };
        if slot < newest {
            let back = newest.0 - slot.0;
            if back > self.late_slots() {
                return self.fault(
                    sequence,
                    format_args!("slot {slot} is {back} slots behind slot {newest}"),
                );
            }
            self.late += 1;
            self.published += u64::from(slot > self.counted_after);
            return;
        }
        let passed = slot.0 - newest.0;
        if passed <= DOWNTIME_SLOTS {
            self.slots += passed;
            self.published += 1;
        } else {
            self.counted_after = slot;
        }
        self.newest_slot = Some(slot);
    }

    #[allow(clippy::cast_precision_loss)] // for people
    fn summary(&self) -> String {
        let expected = 100.0 * odds::publish_probability();
        let (above, pairs) = odds::published_pairs();
        let (published, slots) = (self.published as f64, self.slots.max(1) as f64);
        let rate = 100.0 * published / slots;
        let p = odds::publish_probability();
        let deviations = (published - slots * p) / (slots * p * (1.0 - p)).sqrt();
        let time = |time: Option<OffsetDateTime>| {
            time.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_else(|| "-".to_owned())
        };
        format!(
            "messages   {}\n\
             first      {}\n\
             last       {}\n\
             rate       {rate:.2} % of {} slots published; expected {expected:.2} % ({above}/{pairs}), {deviations:+.1} standard deviations\n\
             late       {} (published after a newer slot, as allowed after an outage)\n\
             {}\n\
             faults     {}",
            self.messages,
            time(self.first_time),
            time(self.last_time),
            self.slots,
            self.late,
            self.draws,
            self.fault_count,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(messages: &[(u64, u64, &str)]) -> Check {
        let mut check = Check::new(SlotLength::DEFAULT, 1000);
        for &(sequence, slot, payload) in messages {
            check.message(&Entry {
                sequence,
                time: OffsetDateTime::UNIX_EPOCH + Duration::from_secs(5000),
                message_id: Some(slot.to_string()),
                payload: payload.to_owned().into(),
            });
        }
        check
    }

    const RIGHT: &str = r#"{"number":432306,"even":846,"odd":511}"#;

    #[test]
    fn a_right_history_has_no_fault() {
        let check = check(&[(1, 1000, RIGHT), (2, 1002, RIGHT), (3, 1003, RIGHT)]);
        assert_eq!((check.fault_count, check.slots, check.published), (0, 3, 2));
    }

    #[test]
    fn every_kind_of_fault_is_found_with_its_sequence() {
        for (what, messages) in [
            ("sequence 2: missing up to sequence 3", [(1, 5000, RIGHT), (4, 5001, RIGHT)]),
            ("sequence 2: slot 5000 was published before", [(1, 5000, RIGHT), (2, 5000, RIGHT)]),
            ("sequence 2: slot 7 is 4993 slots behind", [(1, 5000, RIGHT), (2, 7, RIGHT)]),
            (
                "sequence 2: 6 is not above",
                [(1, 5000, RIGHT), (2, 5001, r#"{"number":6,"even":2,"odd":3}"#)],
            ),
            ("sequence 2: not a valid message", [(1, 5000, RIGHT), (2, 5001, "hello")]),
            ("sequence 2: slot 99999 was not yet", [(1, 5000, RIGHT), (2, 99_999, RIGHT)]),
            (
                "1001 is not an odd number",
                [(1, 5000, RIGHT), (2, 5001, r#"{"number":2002,"even":2,"odd":1001}"#)],
            ),
            (
                "2 x 3 is 6, not 7",
                [(1, 5000, RIGHT), (2, 5001, r#"{"number":7,"even":2,"odd":3}"#)],
            ),
        ] {
            let check = check(&messages);
            assert_eq!(check.fault_count, 1, "{:?}", check.faults);
            assert!(check.faults[0].contains(what), "{:?}", check.faults);
        }
    }

    #[test]
    fn a_time_that_goes_back_and_a_missing_slot_are_faults() {
        let mut check = check(&[(1, 5000, RIGHT)]);
        check.message(&Entry {
            sequence: 2,
            time: OffsetDateTime::UNIX_EPOCH + Duration::from_secs(4999),
            message_id: None,
            payload: RIGHT.into(),
        });
        assert_eq!(check.fault_count, 2, "{:?}", check.faults);
        assert!(check.faults[0].contains("before that of the message before"));
        assert!(check.faults[1].contains("Nats-Msg-Id None is no slot"));
    }

    #[test]
    fn a_late_slot_is_counted_and_no_fault() {
        let check = check(&[(1, 5000, RIGHT), (2, 5003, RIGHT), (3, 5001, RIGHT)]);
        assert_eq!((check.fault_count, check.late), (0, 1));
        assert_eq!((check.slots, check.published), (3, 2));
    }

    #[test]
    fn a_time_without_ticks_is_left_out_of_the_rate() {
        let check =
            check(&[(1, 5000, RIGHT), (2, 5001, RIGHT), (3, 9000, RIGHT), (4, 8999, RIGHT)]);
        assert_eq!((check.slots, check.published), (1, 1));
    }
}
