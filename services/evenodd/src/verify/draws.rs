//! The draws of the last 20 minutes, and whether the history has what they say.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use anyhow::{bail, ensure};
use contract::streams::DUPLICATE_WINDOW;
use contract::{Draw, Message, Product, Slot, SlotLength, odds};
use runtime::history::Entry;
use time::OffsetDateTime;

use super::{ensure_begun, rfc3339};

/// The draw of each slot.
pub struct Draws {
    slot_length: SlotLength,
    kept: BTreeMap<Slot, Kept>,
    /// How many of them have both factors, and how many have a product above the threshold.
    complete: u32,
    above: u32,
    /// When the first and the last of them were stored.
    times: Option<(OffsetDateTime, OffsetDateTime)>,
}

struct Kept {
    sequence: u64,
    time: OffsetDateTime,
    due: Option<Product>,
    is_published: bool,
}

impl Draws {
    pub fn new(slot_length: SlotLength) -> Self {
        Self { slot_length, kept: BTreeMap::new(), complete: 0, above: 0, times: None }
    }

    /// Adds a stored draw.
    ///
    /// # Errors
    /// What is wrong with it; it is not added then.
    pub fn add(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let draw = Draw::decode(&entry.payload)?;
        let (slot, time) = (draw.slot, entry.time);
        let id = &entry.message_id;
        ensure!(*id == Some(slot.to_string()), "slot {slot} has the id {id:?}");
        ensure_begun(slot, self.slot_length, entry)?;
        if let Some(first) = self.kept.get(&slot) {
            bail!("slot {slot} was drawn at sequence {}", first.sequence);
        }
        let kept = Kept { sequence: entry.sequence, time, due: draw.due(), is_published: false };
        self.kept.insert(slot, kept);
        self.complete += u32::from(draw.product().is_some());
        self.above += u32::from(draw.due().is_some());
        self.times = Some((self.times.map_or(time, |(first, _)| first), time));
        Ok(())
    }

    /// Notes a product in the history, and when it was stored.
    ///
    /// # Errors
    /// If it is not the product of its slot's draw.
    pub fn published(
        &mut self,
        slot: Slot,
        product: Product,
        time: OffsetDateTime,
    ) -> anyhow::Result<()> {
        if let Some(kept) = self.kept.get_mut(&slot) {
            kept.is_published = true;
            let due = kept.due.map_or("nothing".to_owned(), |due| due.value().to_string());
            let number = product.value();
            ensure!(kept.due == Some(product), "slot {slot} has drawn {due}, not {number}");
        } else if let Some((first, last)) = self.times {
            // Its draw may be older than those that are kept, or newer than those that were read.
            let must_be_here = first + DUPLICATE_WINDOW < time && time <= last;
            ensure!(!must_be_here, "slot {slot} has no draw");
        }
        Ok(())
    }

    /// After the whole history: the draws whose product is missing there and can no longer come,
    /// each with its sequence.
    pub fn lost(&self) -> Vec<(u64, String)> {
        let lost = self.missing().filter(|(_, kept)| !self.may_come(kept));
        let fault = |slot| format!("the product of slot {slot} is not in the history");
        lost.map(|(slot, kept)| (kept.sequence, fault(slot))).collect()
    }

    /// The draws whose product is not in the history.
    fn missing(&self) -> impl Iterator<Item = (&Slot, &Kept)> {
        self.kept.iter().filter(|(_, kept)| kept.due.is_some() && !kept.is_published)
    }

    /// Whether a multiplier may still retry the publication.
    fn may_come(&self, kept: &Kept) -> bool {
        self.times.is_some_and(|(_, last)| last - kept.time <= DUPLICATE_WINDOW)
    }
}

impl Display for Draws {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "draws      {} in the last 20 minutes", self.kept.len())?;
        for (before, after) in self.kept.keys().zip(self.kept.keys().skip(1)) {
            let missing = after.0 - before.0 - 1;
            if missing > 0 {
                let start = self.slot_length.start_of(before.next());
                let start = rfc3339(OffsetDateTime::UNIX_EPOCH + start);
                writeln!(f, "pause      {missing} slots without a draw from {start}")?;
            }
        }
        if self.complete > 0 {
            let (above, n) = (f64::from(self.above), f64::from(self.complete));
            let p = odds::publish_probability();
            let (rate, expected) = (100.0 * above / n, 100.0 * p);
            let deviations = (above - n * p) / (n * p * (1.0 - p)).sqrt();
            writeln!(
                f,
                "rate       {rate:.2} % of {n} draws with both factors are above the threshold; \
                 expected {expected:.2} %, {deviations:+.1} standard deviations"
            )?;
        }
        let due = self.missing().filter(|(_, kept)| self.may_come(kept)).count();
        writeln!(f, "due        {due} (drawn, and not in the history yet)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn fault(result: anyhow::Result<()>) -> String {
        result.unwrap_err().to_string()
    }

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
        draws.published(Slot(10), product, AT).unwrap();
        // Older than all draws that are left.
        draws.published(Slot(1), product, AT).unwrap();
        assert!(fault(draws.published(Slot(11), product, AT)).contains("drawn nothing"));
        let other = Product::new(848, 511).unwrap();
        assert_eq!(draws.lost(), []);
        let text = draws.to_string();
        for line in [
            "draws      3 in",
            "pause      2 slots without a draw from 1970-01-01T00:00:06Z",
            "due        1 (",
            "rate       66.67 % of 3 draws with both factors are above the threshold; expected 66.93",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        // Ten minutes later nobody may publish it any more.
        let later = AT + DUPLICATE_WINDOW + Duration::from_secs(1);
        draws.add(&Entry { time: later, ..entry(4, 15, 2, "15") }).unwrap();
        assert_eq!(draws.lost(), [(3, "the product of slot 14 is not in the history".to_owned())]);
        assert!(fault(draws.published(Slot(14), other, AT)).contains("432306, not 433328"));
        assert!(fault(draws.published(Slot(13), product, later)).contains("slot 13 has no draw"));
    }

    #[test]
    fn a_draw_that_is_not_one_is_a_fault() {
        let mut draws = Draws::new(SlotLength::DEFAULT);
        draws.add(&entry(1, 10, 846, "10")).unwrap();
        assert!(fault(draws.add(&entry(2, 10, 846, "10"))).contains("drawn at sequence 1"));
        assert!(fault(draws.add(&entry(3, 11, 846, "10"))).contains("slot 11 has the id"));
        let other = Entry { payload: "{}".into(), ..entry(4, 12, 846, "12") };
        assert!(fault(draws.add(&other)).contains("not a valid message"));
        assert!(fault(draws.add(&entry(5, 9999, 846, "9999"))).contains("had not begun"));
    }
}
