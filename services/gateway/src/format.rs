//! The formats in which records are written.

use std::fmt::Write;

use crate::record::Record;

/// How records are written, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON objects, each followed by a comma.
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
    /// Appends one record.
    pub fn write(self, record: &Record, out: &mut String) {
        let Record { seq, product, published_at, .. } = record;
        // Integers and a time always serialise, and writing to a string does not fail.
        let json = || serde_json::to_string(record).unwrap_or_default();
        let _ = match self {
            Self::Json => write!(out, "{},", json()),
            Self::Lines => writeln!(out, "{}", json()),
            Self::Events => write!(out, "id: {seq}\nevent: number\ndata: {}\n\n", json()),
            Self::Csv => {
                let (number, even, odd) = (product.value(), product.even(), product.odd());
                writeln!(out, "{seq},{number},{even},{odd},{published_at}")
            }
            Self::Text => writeln!(out, "{}", product.value()),
        };
    }

    /// All of these records.
    pub fn all<'a>(self, records: impl IntoIterator<Item = &'a Record>) -> String {
        let mut out = String::new();
        for record in records {
            self.write(record, &mut out);
        }
        out
    }
}
