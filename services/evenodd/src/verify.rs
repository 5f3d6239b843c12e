//! `evenodd verify`: reads the whole history and the latest draws, and checks every message.

mod draws;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use async_nats::Client;
use clap::Args;
use contract::streams::{DUPLICATE_WINDOW, NUMBERS, TICKS};
use contract::{Message, Product, Slot, SlotLength};
use runtime::history::{self, Entry, MAX_BATCH};
use runtime::jetstream;
use runtime::settings::NatsSettings;
use runtime::telemetry::print;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::broker;
use draws::Draws;

/// A replica that lags has no more messages for a moment: how often it is asked, and how long after.
const MAX_TRIES: u32 = 10;
const TRY_PAUSE: Duration = Duration::from_millis(200);

/// How far the clock of a multiplier may be ahead of the broker's.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Read the whole history and check every message, and the draws of the last 20 minutes
///
/// Exit status 0: no fault. Exit status 1: faults, each printed with its sequence. Exit status 3: it could not read everything, for example without a connection or a stream.
#[derive(Args, Clone, Debug)]
pub struct Verify {
    #[command(flatten)]
    nats: NatsSettings,

    /// The length of a slot in milliseconds; only tests have another one
    #[arg(long, env = "EVENODD_SLOT_MS", value_name = "MS", default_value = "500", hide = true)]
    slot_ms: SlotLength,
}

impl Verify {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let client = broker::connect(&self.nats, "--nats", Duration::ZERO).await?;
        let mut check = Check::new(self.slot_ms);
        // The draws first: by the time the history is read it has their products, or is about to.
        check_all(&client, TICKS, &mut check, Check::draw).await?;
        let last = check_all(&client, NUMBERS, &mut check, Check::message).await?;
        check.end(last);
        check.print_faults()?;
        let Check { draws, messages, first, last, faults, .. } = &check;
        let [first, last] = [first, last].map(|time| time.map_or("-".to_owned(), rfc3339));
        print(format_args!(
            "{draws}messages   {messages}\nfirst      {first}\nlast       {last}\nfaults     {faults}"
        ))?;
        Ok(if *faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Checks the messages that a stream has now, and returns the sequence of the last one.
async fn check_all(
    client: &Client,
    stream: &'static str,
    check: &mut Check,
    check_one: fn(&mut Check, &Entry),
) -> anyhow::Result<u64> {
    let state = jetstream::info(client, stream, broker::TIMEOUT).await?.state;
    let mut next = state.first_sequence;
    let mut tries = 0;
    while next <= state.last_sequence && tries < MAX_TRIES {
        let entries = history::read(client, stream, next, MAX_BATCH).await?;
        let Some(last) = entries.last() else {
            tries += 1;
            tokio::time::sleep(TRY_PAUSE).await;
            continue;
        };
        (next, tries) = (last.sequence + 1, 0);
        entries.iter().for_each(|entry| check_one(check, entry));
        check.print_faults()?;
        broker::show_progress(format_args!(
            "{stream} {} of {}",
            last.sequence, state.last_sequence
        ));
    }
    Ok(state.last_sequence)
}

/// The state of the check between two messages.
struct Check {
    slot_length: SlotLength,
    draws: Draws,
    /// How many messages the history has, and the times of the first and the last.
    messages: u64,
    first: Option<OffsetDateTime>,
    last: Option<OffsetDateTime>,
    /// The sequence that the next message of the history must have.
    next_sequence: u64,
    /// The latest slots of the history. A slot leaves when no other can come before it any more.
    window: BTreeSet<Slot>,
    faults: u64,
    /// Those that are not printed yet.
    unprinted: Vec<String>,
}

impl Check {
    fn new(slot_length: SlotLength) -> Self {
        Self {
            slot_length,
            draws: Draws::new(slot_length),
            messages: 0,
            first: None,
            last: None,
            next_sequence: 1,
            window: BTreeSet::new(),
            faults: 0,
            unprinted: Vec::new(),
        }
    }

    fn fault(&mut self, stream: &str, sequence: u64, what: impl Display) {
        self.faults += 1;
        self.unprinted.push(format!("{stream} sequence {sequence}: {what}"));
    }

    fn print_faults(&mut self) -> io::Result<()> {
        self.unprinted.drain(..).try_for_each(print)
    }

    /// Checks a message of the stream of draws.
    fn draw(&mut self, entry: &Entry) {
        if let Err(fault) = self.draws.add(entry) {
            self.fault(TICKS, entry.sequence, fault);
        }
    }

    /// Checks a message of the history.
    fn message(&mut self, entry: &Entry) {
        if entry.sequence > self.next_sequence {
            self.missing_up_to(entry.sequence - 1);
        }
        self.next_sequence = entry.sequence + 1;
        let slot = entry.message_id.as_deref().and_then(|id| id.parse().ok());
        let results =
            [self.check_time(entry), self.check_product(entry, slot), self.check_slot(entry, slot)];
        for fault in results.into_iter().filter_map(Result::err) {
            self.fault(NUMBERS, entry.sequence, fault);
        }
    }

    fn missing_up_to(&mut self, last: u64) {
        self.fault(NUMBERS, self.next_sequence, format_args!("missing up to sequence {last}"));
    }

    fn check_time(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let time = entry.time;
        self.messages += 1;
        self.first.get_or_insert(time);
        let before = self.last.replace(time).unwrap_or(time);
        ensure!(time >= before, "its time {time} is before that of the message before, {before}");
        Ok(())
    }

    fn check_product(&mut self, entry: &Entry, slot: Option<Slot>) -> anyhow::Result<()> {
        let product = Product::decode(&entry.payload).map_err(|error| {
            let payload = String::from_utf8_lossy(&entry.payload);
            anyhow!("{error}: {:?}", payload.chars().take(80).collect::<String>())
        })?;
        ensure!(product.is_above_threshold(), "{} is not above the threshold", product.value());
        slot.map_or(Ok(()), |slot| self.draws.published(slot, product, entry.time))
    }

    fn check_slot(&mut self, entry: &Entry, slot: Option<Slot>) -> anyhow::Result<()> {
        let id = &entry.message_id;
        let slot = slot.with_context(|| format!("its Nats-Msg-Id {id:?} is no slot"))?;
        // Others are compared with this slot from here on, so an impossible one must not get there.
        ensure_begun(slot, self.slot_length, entry)?;
        // A message may come late by as much: one multiplier may retry it while others go on, until
        // the duplicate window is over.
        let late_slots = self.slot_length.slot_at(DUPLICATE_WINDOW).0;
        let newest = self.window.last().map_or(slot, |&newest| newest.max(slot));
        let behind = newest.0 - slot.0;
        ensure!(behind <= late_slots, "slot {slot} is {behind} slots behind slot {newest}");
        ensure!(self.window.insert(slot), "slot {slot} was published before");
        while let Some(&oldest) = self.window.first()
            && newest.0 - oldest.0 > late_slots
        {
            self.window.pop_first();
        }
        Ok(())
    }

    /// After all messages; `last` is the sequence of the last one.
    fn end(&mut self, last: u64) {
        if self.next_sequence <= last {
            self.missing_up_to(last);
        }
        for (sequence, fault) in self.draws.lost() {
            self.fault(TICKS, sequence, fault);
        }
    }
}

/// Fails if a slot begins after its message was stored.
fn ensure_begun(slot: Slot, slot_length: SlotLength, entry: &Entry) -> anyhow::Result<()> {
    let latest = entry.since_epoch() + CLOCK_SKEW;
    ensure!(slot_length.start_of(slot) <= latest, "slot {slot} had not begun when it was stored");
    Ok(())
}

fn rfc3339(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(messages: &[(u64, u64, &str)]) -> Check {
        let mut check = Check::new(SlotLength::DEFAULT);
        for &(sequence, slot, payload) in messages {
            check.message(&Entry {
                sequence,
                time: OffsetDateTime::UNIX_EPOCH + Duration::from_secs(5000),
                message_id: Some(slot.to_string()),
                payload: payload.to_owned().into(),
            });
        }
        check.end(check.next_sequence - 1);
        check
    }

    const RIGHT: &str = r#"{"number":432306,"even":846,"odd":511}"#;

    #[test]
    fn a_right_history_has_no_fault() {
        let check = check(&[(1, 1000, RIGHT), (2, 1002, RIGHT), (3, 1003, RIGHT)]);
        assert_eq!(check.faults, 0, "{:?}", check.unprinted);
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
            ("sequence 2: slot 99999 had not begun", [(1, 5000, RIGHT), (2, 99_999, RIGHT)]),
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
            assert_eq!(check.faults, 1, "{:?}", check.unprinted);
            assert!(check.unprinted[0].contains(what), "{:?}", check.unprinted);
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
        assert_eq!(check.faults, 2, "{:?}", check.unprinted);
        assert!(check.unprinted[0].contains("before that of the message before"));
        assert!(check.unprinted[1].contains("Nats-Msg-Id None is no slot"));
    }

    #[test]
    fn a_late_slot_is_no_fault() {
        let check = check(&[(1, 5000, RIGHT), (2, 5003, RIGHT), (3, 5001, RIGHT)]);
        assert_eq!(check.faults, 0, "{:?}", check.unprinted);
    }
}
