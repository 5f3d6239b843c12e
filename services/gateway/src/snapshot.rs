//! The last 100 records, rendered once for every message and then only copied.

use std::collections::VecDeque;

use bytes::Bytes;
use contract::streams::NUMBERS;
use runtime::history::Start;
use time::OffsetDateTime;
use warp::http::HeaderMap;

use crate::encoding::Encoded;
use crate::format::Format;
use crate::record::Record;

/// How many records a snapshot holds.
pub const LAST: usize = 100;

/// The last records of one stream, as of one message. It never changes: a new one takes its place.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When the stream was made, which tells it from another one of the same name.
    pub created: OffsetDateTime,
    /// The same for clients: in nanoseconds since 1970, hexadecimal.
    pub stream: String,
    /// The last sequence that was read.
    pub last_seq: u64,
    /// Identifies this snapshot among those of all streams.
    pub tag: String,
    /// The snapshot holds every record after this sequence.
    after: u64,
    /// Oldest first.
    records: VecDeque<Record>,
    newest_first: Rendered,
    text: Rendered,
    events: Rendered,
    lines: Rendered,
    full_json: Encoded,
}

impl Snapshot {
    /// A snapshot without records, of a stream that is read from after this sequence on.
    pub fn empty(created: OffsetDateTime, after: u64) -> Self {
        Self::new(created, after, VecDeque::new(), after)
    }

    /// The snapshot after more messages: the records that they hold, in order, and the sequence of
    /// the last message.
    pub fn with(&self, more: impl IntoIterator<Item = Record>, last_seq: u64) -> Self {
        let (mut after, mut records) = (self.after, self.records.clone());
        records.extend(more);
        while records.len() > LAST {
            after = records.pop_front().map_or(after, |record| record.seq);
        }
        Self::new(self.created, after, records, last_seq)
    }

    fn new(created: OffsetDateTime, after: u64, records: VecDeque<Record>, last_seq: u64) -> Self {
        let stream = format!("{:x}", created.unix_timestamp_nanos());
        let newest_first = Rendered::new(records.iter().rev(), Format::Json);
        Self {
            created,
            last_seq,
            tag: format!("{stream}-{last_seq}"),
            stream,
            after,
            full_json: Encoded::new(newest_first.json(last_seq, LAST)),
            newest_first,
            text: Rendered::new(records.iter().rev(), Format::Text),
            events: Rendered::new(&records, Format::Events),
            lines: Rendered::new(&records, Format::Lines),
            records,
        }
    }

    /// How many records it holds.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// The response in JSON with up to `limit` records, newest first, and its content coding. Only
    /// the response with all records is kept compressed.
    pub fn json(&self, limit: usize, headers: &HeaderMap) -> (Bytes, Option<&'static str>) {
        if limit >= self.records.len() {
            return self.full_json.accepted(headers);
        }
        (self.newest_first.json(self.last_seq, limit), None)
    }

    /// Bare numbers, one a line, newest first.
    pub fn text(&self, limit: usize) -> Bytes {
        self.text.first(limit)
    }

    /// Every record from `start` on, oldest first; `None` if the stream may have more of them than
    /// the snapshot.
    pub fn held(&self, start: Start) -> Option<impl Iterator<Item = &Record>> {
        let is_before = |record: &Record| match start {
            Start::Sequence(seq) => record.seq < seq,
            Start::Time(time) => record.time < time,
        };
        let held = match start {
            Start::Sequence(seq) => seq > self.after,
            Start::Time(_) => self.after == 0 || self.records.front().is_some_and(is_before),
        };
        held.then(|| self.records.range(self.records.partition_point(is_before)..))
    }

    /// Every record after a sequence, as events or else as lines; `None` as above.
    pub fn feed_after(&self, seq: u64, format: Format) -> Option<Bytes> {
        let rendered = if format == Format::Events { &self.events } else { &self.lines };
        let position = self.records.partition_point(|record| record.seq <= seq);
        (seq >= self.after).then(|| rendered.from(position))
    }
}

/// Records written one after the other.
#[derive(Clone, Debug)]
struct Rendered {
    all: Bytes,
    /// Where each record begins, and where the last one ends.
    bounds: Vec<usize>,
}

impl Rendered {
    fn new<'a>(records: impl IntoIterator<Item = &'a Record>, format: Format) -> Self {
        let mut all = String::new();
        let mut bounds = vec![0];
        for record in records {
            format.write(record, &mut all);
            bounds.push(all.len());
        }
        Self { all: all.into(), bounds }
    }

    /// The first `limit` records, or all if there are fewer.
    fn first(&self, limit: usize) -> Bytes {
        let count = limit.min(self.bounds.len() - 1);
        self.all.slice(..self.bounds[count])
    }

    /// The records from this position on.
    fn from(&self, position: usize) -> Bytes {
        self.all.slice(self.bounds[position]..)
    }

    /// The response to `GET /numbers`, made of records in JSON.
    fn json(&self, last_seq: u64, limit: usize) -> Bytes {
        let count = limit.min(self.bounds.len() - 1);
        let items = self.first(count);
        // Without the comma after the last one.
        let items = items.strip_suffix(b",").unwrap_or(&items);
        let head =
            format!(r#"{{"stream":"{NUMBERS}","last_seq":{last_seq},"count":{count},"numbers":["#);
        [head.as_bytes(), items, b"]}\n"].concat().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::history::Entry;
    use serde_json::Value;

    fn record(seq: u64) -> Record {
        Record::new(&Entry {
            sequence: seq,
            time: OffsetDateTime::UNIX_EPOCH,
            message_id: None,
            payload: Bytes::from_static(br#"{"number":432306,"even":846,"odd":511}"#),
        })
        .unwrap()
    }

    fn snapshot(count: u64) -> Snapshot {
        Snapshot::empty(OffsetDateTime::UNIX_EPOCH, 0).with((1..=count).map(record), count)
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
        let number = r#"{"seq":1,"number":432306,"even":846,"odd":511,"published_at":"1970-01-01T00:00:00.000000000Z"}"#;
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
        let data = r#"{"seq":2,"number":432306,"even":846,"odd":511,"published_at":"1970-01-01T00:00:00.000000000Z"}"#;
        assert_eq!(feed, format!("id: 2\nevent: number\ndata: {data}\n\n"));
    }

    #[test]
    fn the_tag_tells_streams_and_sequences_apart() {
        let tag = |created, seq| {
            let created = OffsetDateTime::from_unix_timestamp(created).unwrap();
            Snapshot::empty(created, seq).tag
        };
        assert_eq!(tag(1, 5), tag(1, 5));
        assert_ne!(tag(1, 5), tag(1, 6));
        assert_ne!(tag(1, 5), tag(2, 5));
    }
}
