//! What a client accepts (RFC 9110, section 12.5), and bodies in every encoding it may ask for.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use warp::http::{HeaderMap, HeaderName, header};

/// A content coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Identity,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// RFC 7932.
    Brotli,
}

impl Encoding {
    /// The compressed ones, the one that takes the fewest bytes first.
    const COMPRESSED: [Self; 3] = [Self::Zstd, Self::Brotli, Self::Gzip];

    /// Its name in `Content-Encoding`; none for the identity.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Identity => None,
            Self::Gzip => Some("gzip"),
            Self::Zstd => Some("zstd"),
            Self::Brotli => Some("br"),
        }
    }

    /// The one that a client likes best, the smaller one among equals.
    pub fn accepted(headers: &HeaderMap) -> Self {
        let weight = |encoding: Self| {
            let name = encoding.name().unwrap_or("identity");
            quality(headers, &header::ACCEPT_ENCODING, |range| {
                (range.eq_ignore_ascii_case(name)).then_some(1).or((range == "*").then_some(0))
            })
        };
        let mut best = (Self::Identity, 0.0);
        for encoding in Self::COMPRESSED {
            let weight = weight(encoding);
            if weight > best.1 {
                best = (encoding, weight);
            }
        }
        // The identity is always there, but counts only where it is preferred by name.
        if best.1 > 0.0 && weight(Self::Identity) > best.1 {
            return Self::Identity;
        }
        best.0
    }
}

/// One body in every encoding.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    identity: Bytes,
    gzip: Bytes,
    zstd: Bytes,
    brotli: Bytes,
}

impl Encoded {
    /// Compresses the body: some milliseconds for the last 100 numbers.
    pub fn new(identity: Bytes) -> Self {
        const BROTLI_BUFFER: usize = 4096;
        const BROTLI_QUALITY: u32 = 5;
        const BROTLI_WINDOW: u32 = 18;
        const ZSTD_LEVEL: i32 = 9;
        // Writing to memory does not fail. If it did, the body would go out as it is.
        let gzip = || {
            let mut writer = GzEncoder::new(Vec::new(), Compression::new(6));
            writer.write_all(&identity)?;
            writer.finish()
        };
        let brotli = || {
            let mut out = Vec::new();
            brotli::CompressorWriter::new(&mut out, BROTLI_BUFFER, BROTLI_QUALITY, BROTLI_WINDOW)
                .write_all(&identity)?;
            Ok::<_, std::io::Error>(out)
        };
        Self {
            gzip: gzip().unwrap_or_default().into(),
            zstd: zstd::encode_all(&*identity, ZSTD_LEVEL).unwrap_or_default().into(),
            brotli: brotli().unwrap_or_default().into(),
            identity,
        }
    }

    /// The body, and how it is encoded.
    pub fn get(&self, encoding: Encoding) -> (Bytes, Encoding) {
        let body = match encoding {
            Encoding::Identity => &self.identity,
            Encoding::Gzip => &self.gzip,
            Encoding::Zstd => &self.zstd,
            Encoding::Brotli => &self.brotli,
        };
        if body.is_empty() {
            return (self.identity.clone(), Encoding::Identity);
        }
        (body.clone(), encoding)
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
        use Encoding::{Brotli, Gzip, Identity, Zstd};
        for (accept, expected) in [
            ("", Identity),
            ("gzip", Gzip),
            ("GZIP", Gzip),
            ("gzip, deflate, br, zstd", Zstd),
            ("gzip, deflate, br", Brotli),
            ("gzip, zstd", Zstd),
            ("br;q=0.5, gzip", Gzip),
            ("br;q=0, gzip;q=0", Identity),
            ("*", Zstd),
            ("*;q=0", Identity),
            ("zstd;q=0, *", Brotli),
            ("identity, gzip;q=0.5", Identity),
            ("gzip, identity;q=0", Gzip),
            ("deflate", Identity),
        ] {
            let headers = headers(header::ACCEPT_ENCODING, accept);
            assert_eq!(Encoding::accepted(&headers), expected, "{accept}");
        }
    }

    proptest! {
        #[test]
        fn every_encoding_gives_the_body_back(body: Vec<u8>) {
            let encoded = Encoded::new(body.clone().into());
            let (identity, encoding) = encoded.get(Encoding::Identity);
            prop_assert_eq!((&*identity, encoding), (&*body, Encoding::Identity));
            let mut out = Vec::new();
            flate2::read::GzDecoder::new(&*encoded.gzip).read_to_end(&mut out).unwrap();
            prop_assert_eq!(&out, &body);
            prop_assert_eq!(&zstd::decode_all(&*encoded.zstd).unwrap(), &body);
            out.clear();
            brotli::Decompressor::new(&*encoded.brotli, 4096).read_to_end(&mut out).unwrap();
            prop_assert_eq!(&out, &body);
        }

        #[test]
        fn no_header_panics(value in "[ -~]*") {
            let _ = Encoding::accepted(&headers(header::ACCEPT_ENCODING, &value));
            let _ = prefers(&headers(header::ACCEPT, &value), "a/b", "c/d");
        }
    }
}
