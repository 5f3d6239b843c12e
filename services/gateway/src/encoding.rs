//! What a client accepts (RFC 9110, section 12.5), and bodies in every encoding it may ask for.

use std::io::{self, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use warp::http::{HeaderMap, HeaderName, header};

type Encode = fn(&[u8]) -> io::Result<Vec<u8>>;

/// Content codings (RFC 8878, 7932, 1952), the one that takes the fewest bytes first.
const CODINGS: [(&str, Encode); 3] = [("zstd", zstd), ("br", brotli), ("gzip", gzip)];

fn zstd(body: &[u8]) -> io::Result<Vec<u8>> {
    const LEVEL: i32 = 9;
    zstd::encode_all(body, LEVEL)
}

fn brotli(body: &[u8]) -> io::Result<Vec<u8>> {
    const BUFFER: usize = 4096;
    const QUALITY: u32 = 5;
    const WINDOW: u32 = 18;
    let mut out = Vec::new();
    brotli::CompressorWriter::new(&mut out, BUFFER, QUALITY, WINDOW).write_all(body)?;
    Ok(out)
}

fn gzip(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut writer = GzEncoder::new(Vec::new(), Compression::new(6));
    writer.write_all(body)?;
    writer.finish()
}

/// One body in every coding.
#[derive(Clone, Debug)]
pub struct Encoded {
    identity: Bytes,
    coded: Vec<(&'static str, Bytes)>,
}

impl Encoded {
    /// Compresses the body: some milliseconds for the last 100 numbers.
    pub fn new(identity: Bytes) -> Self {
        // Writing to memory does not fail. If it did, that coding would not be offered.
        let coded = CODINGS.iter().filter_map(|(name, encode)| {
            let body = encode(&identity).ok()?;
            Some((*name, body.into()))
        });
        Self { coded: coded.collect(), identity }
    }

    /// The body in the coding that a client likes best, the smaller one among equals, and the name
    /// of the coding, if it has one.
    pub fn accepted(&self, headers: &HeaderMap) -> (Bytes, Option<&'static str>) {
        let weight = |name: &str| {
            quality(headers, &header::ACCEPT_ENCODING, |range| {
                let named = range.eq_ignore_ascii_case(name).then_some(1);
                named.or((range == "*").then_some(0))
            })
        };
        if !headers.contains_key(header::ACCEPT_ENCODING) {
            return (self.identity.clone(), None);
        }
        // The last of equals is taken, which is the first of them here.
        let weighed = self.coded.iter().rev().map(|(name, body)| (weight(name), *name, body));
        match weighed.max_by(|a, b| a.0.total_cmp(&b.0)) {
            // The body as it is counts only where it is preferred by name.
            Some((best, name, body)) if best > 0.0 && weight("identity") <= best => {
                (body.clone(), Some(name))
            }
            _ => (self.identity.clone(), None),
        }
    }
}

/// Whether a client prefers one media type (`text/plain`) to another, which it gets otherwise.
pub fn prefers(headers: &HeaderMap, media_type: &str, otherwise: &str) -> bool {
    headers.contains_key(header::ACCEPT)
        && media_weight(headers, media_type) > media_weight(headers, otherwise)
}

fn media_weight(headers: &HeaderMap, media_type: &str) -> f32 {
    let kind = media_type.split('/').next().unwrap_or_default();
    quality(headers, &header::ACCEPT, |range| {
        if range.eq_ignore_ascii_case(media_type) {
            return Some(2);
        }
        let any_of_kind = range.strip_suffix("/*")?;
        match any_of_kind {
            "*" => Some(0),
            _ => any_of_kind.eq_ignore_ascii_case(kind).then_some(1),
        }
    })
}

/// The weight, from 0 to 1, of the most specific range in a header that matches.
fn quality(
    headers: &HeaderMap,
    name: &HeaderName,
    specificity: impl Fn(&str) -> Option<u8>,
) -> f32 {
    let values = headers.get_all(name);
    let ranges = values.iter().filter_map(|value| value.to_str().ok());
    let weights = ranges.flat_map(|value| value.split(',')).filter_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let specific = specificity(parts.next()?)?;
        let weight =
            parts.find_map(|part| part.to_ascii_lowercase().strip_prefix("q=")?.parse().ok());
        Some((specific, weight.unwrap_or(1.0)))
    });
    weights.max_by_key(|&(specific, _)| specific).map_or(0.0, |(_, weight)| weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Read;
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
    fn the_best_encoding_is_chosen() {
        let encoded = Encoded::new(Bytes::from_static(b"body"));
        for (accept, expected) in [
            ("", None),
            ("gzip", Some("gzip")),
            ("GZIP", Some("gzip")),
            ("gzip, deflate, br, zstd", Some("zstd")),
            ("gzip, deflate, br", Some("br")),
            ("br;q=0.5, gzip", Some("gzip")),
            ("br;q=0, gzip;Q=0", None),
            ("*", Some("zstd")),
            ("*;q=0", None),
            ("zstd;q=0, *", Some("br")),
            ("identity, gzip;q=0.5", None),
            ("gzip, identity;q=0", Some("gzip")),
            ("deflate", None),
        ] {
            let headers = headers(header::ACCEPT_ENCODING, accept);
            assert_eq!(encoded.accepted(&headers).1, expected, "{accept}");
        }
        assert_eq!(encoded.accepted(&HeaderMap::new()).1, None);
    }

    proptest! {
        #[test]
        fn every_encoding_gives_the_body_back(body: Vec<u8>) {
            let encoded = Encoded::new(body.clone().into());
            prop_assert_eq!(&*encoded.identity, &*body);
            for (name, coded) in &encoded.coded {
                let mut out = Vec::new();
                match *name {
                    "gzip" => flate2::read::GzDecoder::new(&**coded).read_to_end(&mut out).unwrap(),
                    "br" => brotli::Decompressor::new(&**coded, 4096).read_to_end(&mut out).unwrap(),
                    _ => zstd::Decoder::new(&**coded).unwrap().read_to_end(&mut out).unwrap(),
                };
                prop_assert_eq!(&out, &body, "{}", name);
            }
            prop_assert_eq!(encoded.coded.len(), 3);
        }

        #[test]
        fn no_header_panics(value in "[ -~]*") {
            let encoded = Encoded::new(Bytes::new());
            let _ = encoded.accepted(&headers(header::ACCEPT_ENCODING, &value));
            let _ = prefers(&headers(header::ACCEPT, &value), "a/b", "c/d");
        }
    }
}
