//! The last 100 numbers, rendered once for every message and then only copied.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use contract::Product;
use contract::streams::NUMBERS;
use runtime::history::Entry;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

/// How many numbers a snapshot holds.
pub const LAST: usize = 100;

/// The gateway is behind when it has not heard from the stream for this long; it looks every
/// second.
const STALE: Duration = Duration::from_secs(3);

/// One published number, as clients see it.
#[derive(Clone, Debug, Serialize)]
pub struct Number {
    /// Its place in the stream.
    pub seq: u64,
    #[serde(flatten)]
    product: Product,
    published_at: String,
}

impl Number {
    /// The number that a message holds, if it holds one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_entry(entry: &Entry) -> anyhow::Result<Self> {
        Ok(Self {
            seq: entry.sequence,
            product: Product::decode(&entry.payload)?,
            published_at: entry.time.format(&Rfc3339)?,
        })
    }
}

/// The last numbers of one stream, as of one message. Never changed: a new one takes its place.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When the stream was made, which tells it from another one of the same name.
    pub created: OffsetDateTime,
    /// The last sequence that was read.
    pub last_seq: u64,
    /// The last valid numbers, newest first.
    numbers: VecDeque<Number>,
    json: Rendered,
    text: Rendered,
    full_json: Bytes,
}

impl Snapshot {
    /// The snapshot of a stream of which nothing was read yet.
    pub fn empty(created: OffsetDateTime) -> Self {
        let empty = Self {
            created,
            last_seq: 0,
            numbers: VecDeque::new(),
            json: Rendered::default(),
            text: Rendered::default(),
            full_json: Bytes::new(),
        };
        empty.with([], 0)
    }

    /// The snapshot after more messages: the numbers that they hold, in their order, and the
    /// sequence of the last of them.
    pub fn with(&self, numbers: impl IntoIterator<Item = Number>, last_seq: u64) -> Self {
        let mut all = self.numbers.clone();
        for number in numbers {
            all.push_front(number);
        }
        all.truncate(LAST);
        let json = Rendered::new(&all, |number, out| {
            // Integers and a time: this always serialises.
            out.push_str(&serde_json::to_string(number).unwrap_or_default());
            out.push(',');
        });
        let text = Rendered::new(&all, |number, out| {
            let _ = writeln!(out, "{}", number.product.number());
        });
        let mut next = Self {
            created: self.created,
            last_seq,
            numbers: all,
            json,
            text,
            full_json: Bytes::new(),
        };
        next.full_json = next.render_json(LAST);
        next
    }

    /// How many valid numbers it holds.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// How many of `limit` numbers there are.
    fn count(&self, limit: usize) -> usize {
        limit.min(self.numbers.len())
    }

    /// The answer in JSON, with up to `limit` numbers.
    pub fn json(&self, limit: usize) -> Bytes {
        if self.count(limit) == self.numbers.len() {
            return self.full_json.clone();
        }
        self.render_json(limit)
    }

    fn render_json(&self, limit: usize) -> Bytes {
        let count = self.count(limit);
        let items = self.json.first(count);
        // Without the comma after the last one.
        let items = items.strip_suffix(',').unwrap_or(items);
        let last_seq = self.last_seq;
        format!(
            "{{\"stream\":\"{NUMBERS}\",\"last_seq\":{last_seq},\"count\":{count},\"numbers\":[{items}]}}\n"
        )
        .into()
    }

    /// Bare numbers, one a line.
    pub fn text(&self, limit: usize) -> Bytes {
        self.text.first(self.count(limit)).to_owned().into()
    }
}

/// The numbers written one after the other, and where each of them ends.
#[derive(Clone, Debug, Default)]
struct Rendered {
    all: String,
    ends: Vec<usize>,
}

impl Rendered {
    fn new(numbers: &VecDeque<Number>, write: impl Fn(&Number, &mut String)) -> Self {
        let mut rendered = Self::default();
        for number in numbers {
            write(number, &mut rendered.all);
            rendered.ends.push(rendered.all.len());
        }
        rendered
    }

    fn first(&self, count: usize) -> &str {
        let end = count.checked_sub(1).and_then(|last| self.ends.get(last));
        &self.all[..end.copied().unwrap_or(0)]
    }
}

/// What the reader knows, for everybody who answers.
#[derive(Default)]
pub struct State {
    snapshot: ArcSwapOption<Snapshot>,
    /// When the stream last said that there is nothing newer than the snapshot.
    confirmed: ArcSwapOption<Instant>,
}

impl State {
    /// The latest snapshot; `None` until the stream was read for the first time.
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.snapshot.load_full()
    }

    /// Whether the snapshot is as new as the stream, as far as can be known.
    pub fn is_current(&self) -> bool {
        let confirmed = self.confirmed.load();
        confirmed.as_ref().is_some_and(|at| at.elapsed() < STALE)
    }

    pub(crate) fn replace(&self, snapshot: Arc<Snapshot>) {
        self.snapshot.store(Some(snapshot));
    }

    pub(crate) fn confirm(&self) {
        self.confirmed.store(Some(Arc::new(Instant::now())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn number(seq: u64) -> Number {
        Number::from_entry(&Entry {
            sequence: seq,
            time: OffsetDateTime::UNIX_EPOCH,
            message_id: None,
            payload: Bytes::from_static(br#"{"number":432306,"even":846,"odd":511}"#),
        })
        .unwrap()
    }

    fn snapshot(count: u64) -> Snapshot {
        Snapshot::empty(OffsetDateTime::UNIX_EPOCH).with((1..=count).map(number), count)
    }

    #[test]
    fn holds_the_last_hundred_newest_first() {
        for (published, held) in [(0, 0), (1, 1), (99, 99), (100, 100), (101, 100)] {
            let snapshot = snapshot(published);
            let body: Value = serde_json::from_slice(&snapshot.json(LAST)).unwrap();
            assert_eq!(body["last_seq"], published);
            assert_eq!(body["count"], held);
            let numbers = body["numbers"].as_array().unwrap();
            let expected: Vec<u64> = (1..=published).rev().take(LAST).collect();
            let seqs: Vec<u64> = numbers.iter().map(|n| n["seq"].as_u64().unwrap()).collect();
            assert_eq!(seqs, expected);
        }
    }

    #[test]
    fn every_limit_gives_that_many() {
        let snapshot = snapshot(60);
        for limit in 1..=LAST {
            let body: Value = serde_json::from_slice(&snapshot.json(limit)).unwrap();
            assert_eq!(body["numbers"].as_array().unwrap().len(), limit.min(60));
            assert_eq!(body["count"], limit.min(60));
            assert_eq!(
                snapshot.text(limit).split(|&b| b == b'\n').count() - 1,
                limit.min(60)
            );
        }
    }

    #[test]
    fn a_number_is_written_as_documented() {
        let body = snapshot(1).json(LAST);
        let number = r#"{"seq":1,"number":432306,"even":846,"odd":511,"published_at":"1970-01-01T00:00:00Z"}"#;
        let expected = format!(
            "{{\"stream\":\"NUMBERS\",\"last_seq\":1,\"count\":1,\"numbers\":[{number}]}}\n"
        );
        assert_eq!(body, expected);
    }
}
