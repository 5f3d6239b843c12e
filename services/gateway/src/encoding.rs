//! What a client accepts (RFC 9110, section 12.5), and bodies that are compressed once for all.

use std::io::Read;

use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzEncoder;
use warp::http::{HeaderMap, HeaderName, header};

/// One body, as it is and compressed with gzip, the content coding that every client knows.
#[derive(Clone, Debug)]
pub struct Encoded {
    identity: Bytes,
    gzip: Bytes,
}

impl Encoded {
    /// Compresses the body.
    pub fn new(identity: Bytes) -> Self {
        let mut gzip = Vec::new();
        // Reading from memory does not fail.
        let _ = GzEncoder::new(&*identity, Compression::new(6)).read_to_end(&mut gzip);
        Self { gzip: gzip.into(), identity }
    }

    /// The body as a client prefers it, and the name of its coding, if it has one.
    pub fn accepted(&self, headers: &HeaderMap) -> (Bytes, Option<&'static str>) {
        let weight = |coding| weight(headers, &header::ACCEPT_ENCODING, &[coding, "*"]);
        let gzip = weight("gzip");
        if gzip > 0.0 && gzip >= weight("identity") {
            (self.gzip.clone(), Some("gzip"))
        } else {
            (self.identity.clone(), None)
        }
    }
}

/// Whether a client prefers a media type such as `text/plain` to the default.
pub fn prefers(headers: &HeaderMap, media_type: &str, otherwise: &str) -> bool {
    let weight = |media_type: &str| {
        let (kind, _) = media_type.split_once('/').unwrap_or_default();
        weight(headers, &header::ACCEPT, &[media_type, &format!("{kind}/*"), "*/*"])
    };
    headers.contains_key(header::ACCEPT) && weight(media_type) > weight(otherwise)
}

/// The weight, from 0 to 1, that a header gives to the first of these ranges that it names. The
/// most specific range comes first.
fn weight(headers: &HeaderMap, name: &HeaderName, ranges: &[&str]) -> f32 {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let accepted: Vec<&str> = values.flat_map(|value| value.split(',')).collect();
    for range in ranges {
        for accepted in &accepted {
            let mut parts = accepted.split(';').map(str::trim);
            if parts.next().is_some_and(|accepted| accepted.eq_ignore_ascii_case(range)) {
                let weight = parts
                    .find_map(|part| part.to_ascii_lowercase().strip_prefix("q=")?.parse().ok());
                return weight.unwrap_or(1.0);
            }
        }
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use warp::http::HeaderValue;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn json_unless_text_is_asked_for() {
        for (accept, text) in [
            ("text/plain", true),
            ("text/plain;q=0.9", true),
            ("text/html, text/plain", true),
            ("*/*", false),
            ("application/json, text/plain, */*", false),
            ("text/html", false),
            ("text/plain;q=0", false),
            ("text/plain, application/json;q=0", true),
            ("application/json;q=0.1, text/plain;q=0.9", true),
            ("TEXT/PLAIN", true),
            ("text/*", true),
            ("nonsense", false),
        ] {
            let headers = headers(header::ACCEPT, accept);
            assert_eq!(prefers(&headers, "text/plain", "application/json"), text, "{accept}");
        }
        assert!(!prefers(&HeaderMap::new(), "text/plain", "application/json"));
    }

    #[test]
    fn gzip_where_it_is_accepted() {
        let encoded = Encoded::new(Bytes::from_static(b"body"));
        for (accept, expected) in [
            ("", None),
            ("gzip", Some("gzip")),
            ("GZIP", Some("gzip")),
            ("gzip, deflate, br, zstd", Some("gzip")),
            ("br;q=0.5, gzip;q=0.1", Some("gzip")),
            ("gzip;Q=0", None),
            ("*", Some("gzip")),
            ("*;q=0", None),
            ("gzip;q=0, *", None),
            ("identity, gzip;q=0.5", None),
            ("gzip, identity;q=0", Some("gzip")),
            ("br, zstd", None),
        ] {
            let headers = headers(header::ACCEPT_ENCODING, accept);
            assert_eq!(encoded.accepted(&headers).1, expected, "{accept}");
        }
        assert_eq!(encoded.accepted(&HeaderMap::new()).1, None);
    }

    proptest! {
        #[test]
        fn gzip_gives_the_body_back(body: Vec<u8>) {
            let encoded = Encoded::new(body.clone().into());
            let mut out = Vec::new();
            flate2::read::GzDecoder::new(&*encoded.gzip).read_to_end(&mut out).unwrap();
            prop_assert_eq!(&*encoded.identity, &*body);
            prop_assert_eq!(out, body);
        }

        #[test]
        fn no_header_panics(value in "[ -~]*") {
            let encoded = Encoded::new(Bytes::new());
            let _ = encoded.accepted(&headers(header::ACCEPT_ENCODING, &value));
            let _ = prefers(&headers(header::ACCEPT, &value), "a/b", "c/d");
        }
    }
}
