//! The last 100 numbers, rendered once for every message and then only copied.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use contract::streams::NUMBERS;
use contract::{Message, Product};
use runtime::history::{Entry, Start};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio::time::Instant;
use warp::http::{HeaderMap, HeaderValue};

use crate::encoding::Encoded;

/// How many numbers a snapshot holds.
pub const LAST: usize = 100;

/// The gateway is behind when it has not heard from the stream for this long; it looks every
/// second.
pub const STALE: Duration = Duration::from_secs(3);

/// How long a client that has seen more than this replica waits for it to catch up.
pub const CATCH_UP: Duration = Duration::from_secs(1);

/// One published number, as clients see it.
#[derive(Clone, Debug, Serialize)]
pub struct Number {
    /// Its place in the stream.
    pub seq: u64,
    #[serde(flatten)]
    product: Product,
    published_at: String,
    /// When the stream stored it.
    #[serde(skip)]
    pub time: OffsetDateTime,
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
            time: entry.time,
        })
    }
}

/// How numbers are written one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON objects, each with a comma after it.
    Json,
    /// JSON objects, one a line.
    Lines,
    /// Server-sent events.
    Events,
    /// `seq,number,even,odd,published_at`.
    Csv,
    /// The bare number.
    Text,
}

impl Format {
    /// Appends one number.
    pub fn write(self, number: &Number, out: &mut String) {
        // Integers and a time: they always serialise, and a string takes all that is written.
        let json = || serde_json::to_string(number).unwrap_or_default();
        let (seq, value) = (number.seq, number.product.value());
        let _ = match self {
            Self::Json => write!(out, "{},", json()),
            Self::Lines => writeln!(out, "{}", json()),
            Self::Events => write!(out, "id: {seq}\nevent: number\ndata: {}\n\n", json()),
            Self::Csv => {
                let (even, odd) = (number.product.even(), number.product.odd());
                writeln!(out, "{seq},{value},{even},{odd},{}", number.published_at)
            }
            Self::Text => writeln!(out, "{value}"),
        };
    }

    /// All of these numbers.
    pub fn all<'a>(self, numbers: impl IntoIterator<Item = &'a Number>) -> String {
        let mut out = String::new();
        for number in numbers {
            self.write(number, &mut out);
        }
        out
    }
}

/// The last numbers of one stream, as of one message. Never changed: a new one takes its place.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When the stream was made, which tells it from another one of the same name.
    pub created: OffsetDateTime,
    /// The last sequence that was read.
    pub last_seq: u64,
    /// `ETag` of everything that is made of this snapshot: the stream's identity and `last_seq`.
    pub etag: HeaderValue,
    /// The snapshot holds every valid number after this sequence.
    after: u64,
    /// The last valid numbers, oldest first.
    numbers: VecDeque<Number>,
    newest_first: Rendered,
    text: Rendered,
    events: Rendered,
    lines: Rendered,
    full_json: Encoded,
}

impl Snapshot {
    /// The snapshot of a stream of which nothing was read, nor will be up to this sequence.
    pub fn empty(created: OffsetDateTime, after: u64) -> Self {
        Self::new(created, after, VecDeque::new(), after)
    }

    /// The snapshot after more messages: the numbers that they hold, in their order, and the
    /// sequence of the last of them.
    pub fn with(&self, more: impl IntoIterator<Item = Number>, last_seq: u64) -> Self {
        let mut numbers = self.numbers.clone();
        numbers.extend(more);
        Self::new(self.created, self.after, numbers, last_seq)
    }

    fn new(
        created: OffsetDateTime,
        mut after: u64,
        mut numbers: VecDeque<Number>,
        last_seq: u64,
    ) -> Self {
        while numbers.len() > LAST {
            after = numbers.pop_front().map_or(after, |number| number.seq);
        }
        let etag = format!("W/\"{}-{last_seq}\"", stream_id(created));
        let newest_first = Rendered::new(numbers.iter().rev(), Format::Json);
        Self {
            created,
            last_seq,
            // Digits and a dash: always a valid header.
            etag: HeaderValue::from_str(&etag).unwrap_or(HeaderValue::from_static("")),
            after,
            full_json: Encoded::new(newest_first.json(last_seq, LAST)),
            newest_first,
            text: Rendered::new(numbers.iter().rev(), Format::Text),
            events: Rendered::new(&numbers, Format::Events),
            lines: Rendered::new(&numbers, Format::Lines),
            numbers,
        }
    }

    /// How many valid numbers it holds.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The answer in JSON, with up to `limit` numbers, newest first, and its coding. Only that with
    /// all of them is there in every coding.
    pub fn json(&self, limit: usize, headers: &HeaderMap) -> (Bytes, Option<&'static str>) {
        if limit >= self.numbers.len() {
            return self.full_json.accepted(headers);
        }
        (self.newest_first.json(self.last_seq, limit), None)
    }

    /// Bare numbers, one a line, newest first.
    pub fn text(&self, limit: usize) -> Bytes {
        self.text.first(limit)
    }

    /// Every valid number from there on, oldest first; `None` if there may be more than the
    /// snapshot holds.
    pub fn held(&self, start: Start) -> Option<impl Iterator<Item = &Number>> {
        let (held, from) = match start {
            Start::Sequence(seq) => {
                (seq > self.after, self.numbers.partition_point(|number| number.seq < seq))
            }
            Start::Time(time) => (
                self.after == 0 || self.numbers.front().is_some_and(|number| number.time < time),
                self.numbers.partition_point(|number| number.time < time),
            ),
        };
        held.then(|| self.numbers.iter().skip(from))
    }

    /// Every valid number after a sequence, written as events or else as lines; `None` as above.
    pub fn feed_after(&self, seq: u64, format: Format) -> Option<Bytes> {
        let rendered = match format {
            Format::Events => &self.events,
            _ => &self.lines,
        };
        let position = self.numbers.partition_point(|number| number.seq <= seq);
        (seq >= self.after).then(|| rendered.from(position))
    }
}

/// What tells a stream from an earlier one of the same name: when it was made, in nanoseconds.
pub fn stream_id(created: OffsetDateTime) -> String {
    format!("{:x}", created.unix_timestamp_nanos())
}

/// Numbers written one after the other, and where each of them ends.
#[derive(Clone, Debug, Default)]
struct Rendered {
    all: Bytes,
    ends: Vec<usize>,
}

impl Rendered {
    fn new<'a>(numbers: impl IntoIterator<Item = &'a Number>, format: Format) -> Self {
        let mut all = String::new();
        let mut ends = Vec::with_capacity(LAST);
        for number in numbers {
            format.write(number, &mut all);
            ends.push(all.len());
        }
        Self { all: all.into(), ends }
    }

    /// Where the first `count` of them end.
    fn end(&self, count: usize) -> usize {
        let last = count.min(self.ends.len()).checked_sub(1);
        last.map_or(0, |last| self.ends[last])
    }

    fn first(&self, count: usize) -> Bytes {
        self.all.slice(..self.end(count))
    }

    /// The answer of `GET /numbers`, of numbers in JSON.
    fn json(&self, last_seq: u64, limit: usize) -> Bytes {
        let count = limit.min(self.ends.len());
        let items = self.first(count);
        // Without the comma after the last one.
        let items = items.strip_suffix(b",").unwrap_or(&items);
        let head = format!(
            "{{\"stream\":\"{NUMBERS}\",\"last_seq\":{last_seq},\"count\":{count},\"numbers\":["
        );
        [head.as_bytes(), items, b"]}\n"].concat().into()
    }

    fn from(&self, position: usize) -> Bytes {
        self.all.slice(self.end(position)..)
    }
}

/// What the reader knows, for everybody who answers.
pub struct State {
    snapshot: watch::Sender<Option<Arc<Snapshot>>>,
    begun: Instant,
    /// When the stream last said that there is nothing newer than the snapshot, in milliseconds
    /// after the beginning; 0 before the first time.
    confirmed_ms: AtomicU64,
}

impl State {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self {
            snapshot: watch::Sender::new(None),
            begun: Instant::now(),
            confirmed_ms: AtomicU64::new(0),
        }
    }

    /// The latest snapshot; `None` until the stream was read for the first time.
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.snapshot.borrow().clone()
    }

    /// Tells of every new snapshot.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.snapshot.subscribe()
    }

    /// The latest snapshot, after a moment for this replica to catch up if the client has seen a
    /// later sequence of the same stream.
    pub async fn snapshot_with(&self, seq: u64) -> Option<Arc<Snapshot>> {
        let mut snapshots = self.subscribe();
        let caught_up = snapshots.wait_for(|s| s.as_ref().is_none_or(|s| s.last_seq >= seq));
        let _ = tokio::time::timeout(CATCH_UP, caught_up).await;
        self.snapshot()
    }

    /// How long ago the snapshot was known to be as new as the stream.
    pub fn age(&self) -> Duration {
        let confirmed = Duration::from_millis(self.confirmed_ms.load(Ordering::Relaxed));
        self.begun.elapsed().saturating_sub(confirmed)
    }

    /// Whether the snapshot is as new as the stream, as far as can be known.
    pub fn is_current(&self) -> bool {
        self.confirmed_ms.load(Ordering::Relaxed) > 0 && self.age() < STALE
    }

    pub(crate) fn replace(&self, snapshot: Arc<Snapshot>) {
        self.snapshot.send_replace(Some(snapshot));
    }

    pub(crate) fn confirm(&self) {
        let ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.confirmed_ms.store(ms.max(1), Ordering::Relaxed);
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
        Snapshot::empty(OffsetDateTime::UNIX_EPOCH, 0).with((1..=count).map(number), count)
    }

    fn json(snapshot: &Snapshot, limit: usize) -> Bytes {
        snapshot.json(limit, &HeaderMap::new()).0
    }

    #[test]
    fn holds_the_last_hundred_newest_first() {
        for (published, held) in [(0, 0), (1, 1), (99, 99), (100, 100), (101, 100)] {
            let snapshot = snapshot(published);
            let body: Value = serde_json::from_slice(&json(&snapshot, LAST)).unwrap();
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
            let body: Value = serde_json::from_slice(&json(&snapshot, limit)).unwrap();
            assert_eq!(body["numbers"].as_array().unwrap().len(), limit.min(60));
            assert_eq!(body["count"], limit.min(60));
            assert_eq!(snapshot.text(limit).split(|&b| b == b'\n').count() - 1, limit.min(60));
        }
    }

    #[test]
    fn a_number_is_written_as_documented() {
        let body = json(&snapshot(1), LAST);
        let number = r#"{"seq":1,"number":432306,"even":846,"odd":511,"published_at":"1970-01-01T00:00:00Z"}"#;
        let expected = format!(
            "{{\"stream\":\"NUMBERS\",\"last_seq\":1,\"count\":1,\"numbers\":[{number}]}}\n"
        );
        assert_eq!(body, expected);
    }

    #[test]
    fn a_feed_goes_on_after_any_position_that_is_held() {
        let snapshot = snapshot(250);
        for seq in 0..=251 {
            let feed = snapshot.feed_after(seq, Format::Lines);
            assert_eq!(feed.is_some(), seq >= 150, "{seq}");
            let Some(feed) = feed else { continue };
            let seqs: Vec<u64> = feed
                .split(|&byte| byte == b'\n')
                .filter(|line| !line.is_empty())
                .map(|line| serde_json::from_slice::<Value>(line).unwrap()["seq"].as_u64().unwrap())
                .collect();
            assert_eq!(seqs, (seq + 1..=250).collect::<Vec<_>>());
            let held = snapshot.held(Start::Sequence(seq + 1)).unwrap();
            assert_eq!(held.count(), seqs.len());
        }
    }

    #[test]
    fn an_event_is_written_as_documented() {
        let feed = snapshot(2).feed_after(1, Format::Events).unwrap();
        let data = r#"{"seq":2,"number":432306,"even":846,"odd":511,"published_at":"1970-01-01T00:00:00Z"}"#;
        assert_eq!(feed, format!("id: 2\nevent: number\ndata: {data}\n\n"));
    }

    #[test]
    fn the_etag_tells_streams_and_sequences_apart() {
        let etag = |created, seq| {
            let created = OffsetDateTime::from_unix_timestamp(created).unwrap();
            Snapshot::empty(created, seq).etag
        };
        assert_eq!(etag(1, 5), etag(1, 5));
        assert_ne!(etag(1, 5), etag(1, 6));
        assert_ne!(etag(1, 5), etag(2, 5));
    }
}
