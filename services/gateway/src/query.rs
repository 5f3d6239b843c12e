//! The parameters of a request, and what is said about wrong ones.

use std::ops::RangeInclusive;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::problem::Problem;

/// The parameters that are given. Each is taken by its name; [`end`](Self::end) finds the ones
/// that nobody knows.
pub struct Query {
    given: Vec<(String, String)>,
    known: Vec<&'static str>,
}

impl Query {
    /// The parameters of a query string.
    ///
    /// # Errors
    /// 400 if it is not one.
    pub fn parse(query: &str) -> Result<Self, Problem> {
        let given = serde_urlencoded::from_str(query)
            .map_err(|e| Problem::bad_request(format!("the query cannot be read: {e}")))?;
        Ok(Self { given, known: Vec::new() })
    }

    /// Takes a parameter.
    ///
    /// # Errors
    /// 400 if it is given twice.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, Problem> {
        self.known.push(name);
        let Some(at) = self.given.iter().position(|(given, _)| given == name) else {
            return Ok(None);
        };
        let (_, value) = self.given.remove(at);
        if self.given.iter().any(|(given, _)| given == name) {
            return Err(Problem::bad_request(format!("{name} is given more than once")));
        }
        Ok(Some(value))
    }

    /// Takes a number.
    ///
    /// # Errors
    /// 400 if it is given twice, or is no number within the bounds.
    pub fn number(
        &mut self,
        name: &'static str,
        bounds: RangeInclusive<u64>,
    ) -> Result<Option<u64>, Problem> {
        let Some(value) = self.text(name)? else {
            return Ok(None);
        };
        match digits(&value).filter(|number| bounds.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Problem::bad_request(format!(
                "{name} is a number from {} to {}, not {value:?}",
                bounds.start(),
                bounds.end(),
            ))),
        }
    }

    /// Takes a time.
    ///
    /// # Errors
    /// 400 if it is given twice, or is not of RFC 3339.
    pub fn time(&mut self, name: &'static str) -> Result<Option<OffsetDateTime>, Problem> {
        let Some(value) = self.text(name)? else {
            return Ok(None);
        };
        // A plus sign in a query is a space, and people forget to write %2B.
        match OffsetDateTime::parse(&value.replace(' ', "+"), &Rfc3339) {
            Ok(time) => Ok(Some(time)),
            Err(_) => Err(Problem::bad_request(format!(
                "{name} is a time of RFC 3339 such as 2026-01-31T12:00:00Z, not {value:?}"
            ))),
        }
    }

    /// Everything was taken.
    ///
    /// # Errors
    /// 400 if something is left that nobody knows.
    pub fn end(self) -> Result<(), Problem> {
        let Some((name, _)) = self.given.first() else {
            return Ok(());
        };
        let there = match &*self.known {
            [] => "this takes none".to_owned(),
            known => format!("there is {}", known.join(", ")),
        };
        Err(Problem::bad_request(format!("there is no parameter {name:?}: {there}")))
    }
}

/// A number that is written in digits alone, without a sign.
pub fn digits(text: &str) -> Option<u64> {
    text.parse().ok().filter(|_| !text.starts_with('+'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_limit_is_taken_or_refused(number in 0..200u64) {
            let mut query = Query::parse(&format!("limit={number}")).unwrap();
            let taken = query.number("limit", 1..=100).ok().flatten();
            prop_assert_eq!(taken, (1..=100).contains(&number).then_some(number));
            prop_assert!(query.end().is_ok());
        }

        #[test]
        fn no_query_panics(text: String) {
            if let Ok(mut query) = Query::parse(&text) {
                let _ = query.number("limit", 1..=100);
                let _ = query.time("from");
                let _ = query.end();
            }
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
            let time = Query::parse(text).unwrap().time("from").unwrap().unwrap();
            assert_eq!(time.unix_timestamp(), 1_769_860_800, "{text}");
        }
        for text in ["from=", "from=yesterday", "from=2026-01-31", "from=2026-02-30T00:00:00Z"] {
            assert!(Query::parse(text).unwrap().time("from").is_err(), "{text}");
        }
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        let mut query = Query::parse("limit=3&colour=red").unwrap();
        assert_eq!(query.number("limit", 1..=100).unwrap(), Some(3));
        assert!(query.end().is_err());
        let mut twice = Query::parse("limit=3&limit=3").unwrap();
        assert!(twice.number("limit", 1..=100).is_err());
    }
}
