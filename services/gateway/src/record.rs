//! A record: one product in the history, with its sequence and time.

use contract::{Message, Product};
use runtime::history::Entry;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Iso8601;
use tracing::warn;

/// One product in the history, as clients see it.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Its sequence in the stream.
    pub seq: u64,
    /// What was published.
    #[serde(flatten)]
    pub product: Product,
    /// The time in RFC 3339, always with nine digits after the point, so that it sorts as text.
    pub published_at: String,
    /// When the stream stored it.
    #[serde(skip)]
    pub time: OffsetDateTime,
}

impl Record {
    /// Decodes a message of the stream.
    ///
    /// # Errors
    /// If the message does not hold a valid product.
    pub fn new(entry: &Entry) -> anyhow::Result<Self> {
        Ok(Self {
            seq: entry.sequence,
            product: Product::decode(&entry.payload)?,
            published_at: entry.time.format(&Iso8601::DEFAULT)?,
            time: entry.time,
        })
    }
}

/// The records that these messages hold. A message without a valid product is skipped and logged.
pub fn valid(entries: &[Entry]) -> Vec<Record> {
    let mut records = Vec::with_capacity(entries.len());
    let mut fault = None;
    for entry in entries {
        match Record::new(entry) {
            Ok(record) => records.push(record),
            Err(error) => fault = fault.or(Some((entry.sequence, error))),
        }
    }
    if let Some((seq, error)) = fault {
        let skipped = entries.len() - records.len();
        warn!(messages = skipped, first = seq, "skipped: {error:#}");
    }
    records
}
