//! The draws of the last 20 minutes, and whether the history has what they say.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use contract::streams::DUPLICATE_WINDOW;
use contract::{Draw, Message, Product, Slot, SlotLength};
use runtime::history::Entry;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::CLOCK_SKEW;

/// The draw of each slot.
pub struct Draws {
    slot_length: SlotLength,
    kept: BTreeMap<Slot, Kept>,
    /// When the first and the last of them were stored.
    times: Option<(OffsetDateTime, OffsetDateTime)>,
    /// How many products are not in the history yet, and may still come.
    due: usize,
}

struct Kept {
    sequence: u64,
    time: OffsetDateTime,
    due: Option<Product>,
    is_published: bool,
}

impl Draws {
    pub fn new(slot_length: SlotLength) -> Self {
        Self { slot_length, kept: BTreeMap::new(), times: None, due: 0 }
    }

    /// A stored draw.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn add(&mut self, entry: &Entry) -> Result<(), String> {
        let fault = |what: String| Err(format!("TICKS sequence {}: {what}", entry.sequence));
        let draw = match Draw::decode(&entry.payload) {
            Ok(draw) if entry.message_id == Some(draw.slot.to_string()) => draw,
            Ok(draw) => {
                return fault(format!("slot {} has the id {:?}", draw.slot, entry.message_id));
            }
            Err(error) => return fault(error.to_string()),
        };
        let slot = draw.slot;
        if self.slot_length.start_of(slot) > entry.since_epoch() + CLOCK_SKEW {
            return fault(format!("slot {slot} was not yet when it was stored"));
        }
        if let Some(first) = self.kept.get(&slot) {
            return fault(format!("slot {slot} was drawn at sequence {}", first.sequence));
        }
        let (sequence, time, due) = (entry.sequence, entry.time, draw.due());
        self.kept.insert(slot, Kept { sequence, time, due, is_published: false });
        self.times = Some((self.times.map_or(time, |(first, _)| first), time));
        Ok(())
    }

    /// A number in the history, and when it was stored.
    ///
    /// # Errors
    /// If it is not that of its slot's draw.
    pub fn published(
        &mut self,
        slot: Slot,
        product: Product,
        time: OffsetDateTime,
    ) -> Result<(), String> {
        let Some(kept) = self.kept.get_mut(&slot) else {
            // Its draw may be older than those that are kept, or newer than those that were read.
            let must_be_here = |(first, last)| time > first + DUPLICATE_WINDOW && time <= last;
            return match self.times.is_some_and(must_be_here) {
                true => Err(format!("slot {slot} has no draw")),
                false => Ok(()),
            };
        };
        kept.is_published = true;
        if kept.due == Some(product) {
            return Ok(());
        }
        let due = kept.due.map_or("nothing".to_owned(), |due| due.value().to_string());
        Err(format!("slot {slot} has drawn {due}, not {}", product.value()))
    }

    /// After the whole history: what is missing in it, and can no longer come.
    pub fn lost(&mut self) -> Vec<String> {
        let now = self.times.map_or(OffsetDateTime::UNIX_EPOCH, |(_, last)| last);
        let missing = self.kept.iter().filter(|(_, kept)| kept.due.is_some() && !kept.is_published);
        let (lost, due): (Vec<_>, Vec<_>) =
            missing.partition(|(_, kept)| now - kept.time > DUPLICATE_WINDOW);
        self.due = due.len();
        let lost = lost.iter().map(|(slot, kept)| {
            let sequence = kept.sequence;
            format!("TICKS sequence {sequence}: the number of slot {slot} is not in the history")
        });
        lost.collect()
    }
}

impl Display for Draws {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let slots: Vec<_> = self.kept.keys().collect();
        let gaps = || slots.windows(2).map(|pair| (pair[0], pair[1].0 - pair[0].0 - 1));
        let pauses: Vec<_> = gaps().filter(|(_, missing)| *missing > 0).collect();
        let missing: u64 = pauses.iter().map(|(_, missing)| missing).sum();
        let (draws, count) = (slots.len(), pauses.len());
        writeln!(f, "draws      {draws} in the last 20 minutes")?;
        write!(f, "pauses     {count} ({missing} slots without a draw)")?;
        for (slot, missing) in pauses {
            let from = OffsetDateTime::UNIX_EPOCH + self.slot_length.start_of(slot.next());
            let from = from.format(&Rfc3339).unwrap_or_default();
            write!(f, "\n           {missing} slots from {from}")?;
        }
        match self.due {
            0 => Ok(()),
            due => write!(f, "\ndue        {due} (drawn, and not in the history yet)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const AT: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn entry(sequence: u64, slot: u64, even: u16, id: &str) -> Entry {
        let slot = Slot(slot);
        let draw = Draw { slot, multiplier: "m".to_owned(), even: Some(even), odd: Some(511) };
        let (message_id, payload) = (Some(id.to_owned()), draw.encode().into());
        Entry { sequence, time: AT, message_id, payload }
    }

    #[test]
    fn what_is_drawn_must_be_published() {
        let mut draws = Draws::new(SlotLength::DEFAULT);
        for (sequence, slot, even) in [(1, 10, 846), (2, 11, 2), (3, 14, 846)] {
            draws.add(&entry(sequence, slot, even, &slot.to_string())).unwrap();
        }
        let product = Product::new(846, 511).unwrap();
        assert_eq!(draws.published(Slot(10), product, AT), Ok(()));
        // Older than all draws that are left.
        assert_eq!(draws.published(Slot(1), product, AT), Ok(()));
        let fault = |result: Result<(), String>| result.unwrap_err();
        assert!(fault(draws.published(Slot(11), product, AT)).contains("drawn nothing"));
        let other = Product::new(848, 511).unwrap();
        assert_eq!(draws.lost(), Vec::<String>::new());
        let text = draws.to_string();
        for line in [
            "draws      3 in",
            "pauses     1 (2 slots",
            "2 slots from 1970-01-01T00:00:06Z",
            "due        1 (",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        // Ten minutes later nobody may publish it any more.
        let later = AT + DUPLICATE_WINDOW + Duration::from_secs(1);
        draws.add(&Entry { time: later, ..entry(4, 15, 2, "15") }).unwrap();
        let lost = draws.lost();
        assert!(lost.len() == 1, "{lost:?}");
        assert!(lost[0].contains("sequence 3: the number of slot 14"), "{lost:?}");
        assert!(fault(draws.published(Slot(14), other, AT)).contains("432306, not 433328"));
        assert!(fault(draws.published(Slot(13), product, later)).contains("slot 13 has no draw"));
    }

    #[test]
    fn a_draw_that_is_not_one_is_a_fault() {
        let mut draws = Draws::new(SlotLength::DEFAULT);
        draws.add(&entry(1, 10, 846, "10")).unwrap();
        let fault = |result: Result<(), String>| result.unwrap_err();
        assert!(fault(draws.add(&entry(2, 10, 846, "10"))).contains("drawn at sequence 1"));
        assert!(fault(draws.add(&entry(3, 11, 846, "10"))).contains("slot 11 has the id"));
        let other = Entry { payload: "{}".into(), ..entry(4, 12, 846, "12") };
        assert!(fault(draws.add(&other)).contains("TICKS sequence 4: not a valid message"));
        assert!(fault(draws.add(&entry(5, 9999, 846, "9999"))).contains("was not yet"));
    }
}
