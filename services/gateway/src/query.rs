//! The parameters of a request, and the errors about wrong ones.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::problem::{Problem, Result};

/// The parameters of a query. Each is taken by name; [`end`](Self::end) finds those that are
/// unknown.
pub struct Query {
    given: Vec<(String, String)>,
    known: Vec<&'static str>,
}

impl Query {
    /// The parameters of a query string.
    pub fn parse(query: &str) -> Self {
        let given = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        Self { given, known: Vec::new() }
    }

    /// Takes a parameter.
    ///
    /// # Errors
    /// 400 if it is given twice.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>> {
        self.known.push(name);
        let mut values = self.given.extract_if(.., |(given, _)| given == name);
        match (values.next(), values.next()) {
            (_, Some(_)) => Err(Problem::bad_request(format!("{name} is given more than once"))),
            (given, None) => Ok(given.map(|(_, value)| value)),
        }
    }

    /// Takes a number.
    ///
    /// # Errors
    /// 400 if it is given twice, or is not a number within the bounds.
    pub fn number<T: FromStr + PartialOrd + Display>(
        &mut self,
        name: &'static str,
        bounds: RangeInclusive<T>,
    ) -> Result<Option<T>> {
        self.text(name)?.map(|value| number(name, &value, bounds)).transpose()
    }

    /// Takes a time.
    ///
    /// # Errors
    /// 400 if it is given twice, or is not in the format of RFC 3339.
    pub fn time(&mut self, name: &'static str) -> Result<Option<OffsetDateTime>> {
        let Some(value) = self.text(name)? else { return Ok(None) };
        // In a query, + means a space; people forget to write %2B.
        match OffsetDateTime::parse(&value.replace(' ', "+"), &Rfc3339) {
            Ok(time) => Ok(Some(time)),
            Err(_) => Err(Problem::bad_request(format!(
                "{name} is a time of RFC 3339 such as 2026-01-31T12:00:00Z, not {value:?}"
            ))),
        }
    }

    /// Makes sure that everything was taken.
    ///
    /// # Errors
    /// 400 if an unknown parameter is left.
    pub fn end(&self) -> Result<()> {
        let Some((name, _)) = self.given.first() else { return Ok(()) };
        let there = match &*self.known {
            [] => "this takes none".to_owned(),
            known => format!("there is {}", known.join(", ")),
        };
        Err(Problem::bad_request(format!("there is no parameter {name:?}: {there}")))
    }
}

/// Reads a number that a client has sent as `name`.
///
/// # Errors
/// 400 if it is not a number within the bounds.
pub fn number<T: FromStr + PartialOrd + Display>(
    name: &str,
    value: &str,
    bounds: RangeInclusive<T>,
) -> Result<T> {
    digits(value).filter(|number| bounds.contains(number)).ok_or_else(|| {
        let (first, last) = bounds.into_inner();
        Problem::bad_request(format!("{name} is a number from {first} to {last}, not {value:?}"))
    })
}

/// A number that is written in digits alone, without a sign.
pub fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok().filter(|_| !text.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_limit_is_taken_or_refused(number in 0..200u64) {
            let mut query = Query::parse(&format!("limit={number}"));
            let taken = query.number("limit", 1..=100).ok().flatten();
            prop_assert_eq!(taken, (1..=100).contains(&number).then_some(number));
            prop_assert!(query.end().is_ok());
        }

        #[test]
        fn no_query_panics(text: String) {
            let mut query = Query::parse(&text);
            let _ = query.number("limit", 1..=100);
            let _ = query.time("from");
            let _ = query.end();
        }
    }

    #[test]
    fn times_in_every_zone() {
        for text in [
            "from=2026-01-31T12:00:00Z",
            "from=2026-01-31T14:00:00+02:00",
            "from=2026-01-31T14:00:00%2B02:00",
            "from=2026-01-31T12%3A00%3A00.000Z",
        ] {
            let time = Query::parse(text).time("from").unwrap().unwrap();
            assert_eq!(time.unix_timestamp(), 1_769_860_800, "{text}");
        }
        for text in ["from=", "from=yesterday", "from=2026-01-31", "from=2026-02-30T00:00:00Z"] {
            assert!(Query::parse(text).time("from").is_err(), "{text}");
        }
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        let mut query = Query::parse("limit=3&colour=red");
        assert_eq!(query.number("limit", 1..=100).unwrap(), Some(3));
        assert!(query.end().is_err());
        let mut twice = Query::parse("limit=3&limit=3");
        assert!(twice.number("limit", 1..=100).is_err());
    }
}
