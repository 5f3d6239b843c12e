//! The wire messages, all in JSON. Decoding validates: a decoded value is always valid.
//!
//! Decoding ignores unknown fields, because a newer version may send more. The payloads of version
//! 1 are frozen in `payloads/v1`, and every later version must read them.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::slot::Slot;
use crate::{THRESHOLD, subjects};

/// What is wrong with a payload that could not be decoded.
#[derive(Debug, thiserror::Error)]
#[error("not a valid message: {0}")]
pub struct DecodeError(String);

/// A message whose payload is JSON.
pub trait Message: Serialize + DeserializeOwned {
    /// Encodes the message as a payload.
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("integers, strings and options of them always serialise")
    }

    /// Decodes a payload.
    ///
    /// # Errors
    /// If the payload is not this message: other JSON, a wrong product, a factor out of range.
    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        from_json(payload)
    }
}

fn from_json<T: DeserializeOwned>(payload: &[u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(payload).map_err(|error| DecodeError(error.to_string()))
}

/// The two kinds of factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parity {
    /// 0, 2, … 1000.
    Even,
    /// 1, 3, … 999.
    Odd,
}

impl Parity {
    /// The name of the generator service and of its queue group.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Even => "even",
            Self::Odd => "odd",
        }
    }

    /// The subject on which factors of this parity are requested.
    #[must_use]
    pub const fn subject(self) -> &'static str {
        match self {
            Self::Even => subjects::EVEN,
            Self::Odd => subjects::ODD,
        }
    }

    /// The smallest and the greatest factor of this parity.
    #[must_use]
    pub const fn range(self) -> RangeInclusive<u16> {
        match self {
            Self::Even => 0..=1000,
            Self::Odd => 1..=999,
        }
    }

    /// All factors of this parity, ascending.
    pub fn factors(self) -> impl ExactSizeIterator<Item = u16> + Clone {
        self.range().step_by(2)
    }

    /// Returns the factor if it has this parity and is in range.
    ///
    /// # Errors
    /// If it does not.
    pub fn check(self, factor: u64) -> Result<u16, DecodeError> {
        let (first, last) = self.range().into_inner();
        u16::try_from(factor)
            .ok()
            .filter(|n| self.range().contains(n) && n % 2 == first % 2)
            .ok_or_else(|| {
                DecodeError(format!("{factor} is not an {self} number from {first} to {last}"))
            })
    }

    /// Encodes a reply with this factor.
    #[must_use]
    pub fn encode_reply(factor: u16) -> Vec<u8> {
        format!(r#"{{"number":{factor}}}"#).into_bytes()
    }

    /// Decodes a reply and returns its factor.
    ///
    /// # Errors
    /// If the payload is not a reply, or if its factor has the wrong parity or is out of range.
    pub fn decode_reply(self, payload: &[u8]) -> Result<u16, DecodeError> {
        #[derive(Deserialize)]
        struct Reply {
            number: u64,
        }
        self.check(from_json::<Reply>(payload)?.number)
    }
}

impl fmt::Display for Parity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An even factor, an odd factor and their product: the message on `numbers.publish`, which the
/// server republishes on `numbers.published`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ProductFields", into = "ProductFields")]
pub struct Product {
    even: u16,
    odd: u16,
}

/// The JSON form of a [`Product`], with the fields in the order of the payload.
#[derive(Serialize, Deserialize)]
struct ProductFields {
    number: u64,
    even: u64,
    odd: u64,
}

impl Product {
    /// The product of two factors.
    ///
    /// # Errors
    /// If one is not of its parity or not in its range.
    pub fn new(even: u64, odd: u64) -> Result<Self, DecodeError> {
        Ok(Self { even: Parity::Even.check(even)?, odd: Parity::Odd.check(odd)? })
    }

    /// The even factor.
    #[must_use]
    pub fn even(self) -> u16 {
        self.even
    }

    /// The odd factor.
    #[must_use]
    pub fn odd(self) -> u16 {
        self.odd
    }

    /// The value of the product, at most 999,000.
    #[must_use]
    pub fn value(self) -> u32 {
        u32::from(self.even) * u32::from(self.odd)
    }

    /// Whether the product must be published.
    #[must_use]
    pub fn is_above_threshold(self) -> bool {
        self.value() > THRESHOLD
    }
}

impl Message for Product {}

impl From<Product> for ProductFields {
    fn from(product: Product) -> Self {
        Self { number: product.value().into(), even: product.even.into(), odd: product.odd.into() }
    }
}

impl TryFrom<ProductFields> for Product {
    type Error = DecodeError;

    fn try_from(ProductFields { number, even, odd }: ProductFields) -> Result<Self, DecodeError> {
        let product = Self::new(even, odd)?;
        let value = product.value();
        if u64::from(value) == number {
            Ok(product)
        } else {
            Err(DecodeError(format!("{even} x {odd} is {value}, not {number}")))
        }
    }
}

/// The outcome of a draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The product is greater than the threshold: it belongs in the history.
    AboveThreshold,
    /// The product is not greater than the threshold.
    BelowThreshold,
    /// No generator gave an even factor in time.
    NoEven,
    /// No generator gave an odd factor in time.
    NoOdd,
    /// No generator gave a factor of either parity in time.
    NoNumbers,
}

/// What one multiplier offers for a slot. The first draw of a slot that the stream
/// [`TICKS`](crate::streams::TICKS) stores is the tick.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "DrawFields", into = "DrawFields")]
pub struct Draw {
    /// The slot, which is also the message id.
    pub slot: Slot,
    /// The service id of the multiplier.
    pub multiplier: String,
    /// The even factor, or `None` if no generator gave one in time.
    pub even: Option<u16>,
    /// The odd factor, or `None` if no generator gave one in time.
    pub odd: Option<u16>,
}

/// The JSON form of a [`Draw`], with the fields in the order of the payload.
#[derive(Serialize, Deserialize)]
struct DrawFields {
    slot: Slot,
    multiplier: String,
    even: Option<u16>,
    odd: Option<u16>,
    product: Option<u32>,
    outcome: Outcome,
}

impl Draw {
    /// The product, if the draw has both factors.
    #[must_use]
    pub fn product(&self) -> Option<Product> {
        Product::new(self.even?.into(), self.odd?.into()).ok()
    }

    /// The product, if it must be published.
    #[must_use]
    pub fn due(&self) -> Option<Product> {
        self.product().filter(|product| product.is_above_threshold())
    }

    /// The outcome of the draw.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match (self.even, self.odd) {
            (Some(_), Some(_)) if self.due().is_some() => Outcome::AboveThreshold,
            (Some(_), Some(_)) => Outcome::BelowThreshold,
            (Some(_), None) => Outcome::NoOdd,
            (None, Some(_)) => Outcome::NoEven,
            (None, None) => Outcome::NoNumbers,
        }
    }
}

impl Message for Draw {}

impl From<Draw> for DrawFields {
    fn from(draw: Draw) -> Self {
        Self {
            product: draw.product().map(Product::value),
            outcome: draw.outcome(),
            slot: draw.slot,
            multiplier: draw.multiplier,
            even: draw.even,
            odd: draw.odd,
        }
    }
}

impl TryFrom<DrawFields> for Draw {
    type Error = DecodeError;

    fn try_from(fields: DrawFields) -> Result<Self, DecodeError> {
        let DrawFields { slot, multiplier, even, odd, product, outcome } = fields;
        even.map(|even| Parity::Even.check(even.into())).transpose()?;
        odd.map(|odd| Parity::Odd.check(odd.into())).transpose()?;
        let draw = Self { slot, multiplier, even, odd };
        let right = (draw.product().map(Product::value), draw.outcome());
        if (product, outcome) == right {
            Ok(draw)
        } else {
            let what = format!("product and outcome are {:?}, not {right:?}", (product, outcome));
            Err(DecodeError(what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_product_survives_the_wire(even in 0..=500u64, odd in 0..500u64) {
            let product = Product::new(even * 2, odd * 2 + 1).unwrap();
            prop_assert_eq!(u64::from(product.value()), even * 2 * (odd * 2 + 1));
            prop_assert_eq!(Product::decode(&product.encode()).unwrap(), product);
        }

        #[test]
        fn only_correct_products_decode(number: u64, even in 0..1100u64, odd in 0..1100u64) {
            let right = even % 2 == 0 && even <= 1000 && odd % 2 == 1 && odd <= 999;
            let decode = |number| {
                Product::decode(format!(r#"{{"number":{number},"even":{even},"odd":{odd}}}"#).as_bytes())
            };
            prop_assert_eq!(decode(even * odd).is_ok(), right);
            prop_assert_eq!(decode(number).is_ok(), right && number == even * odd);
        }

        #[test]
        fn a_draw_survives_the_wire_and_decodes_only_if_it_is_consistent(
            slot: u64, even in proptest::option::of(0..=500u16), odd in proptest::option::of(0..500u16),
        ) {
            let (even, odd) = (even.map(|n| 2 * n), odd.map(|n| 2 * n + 1));
            let draw = Draw { slot: Slot(slot), multiplier: "m".to_owned(), even, odd };
            let payload = draw.encode();
            prop_assert_eq!(&Draw::decode(&payload).unwrap(), &draw);
            let fields: serde_json::Value = serde_json::from_slice(&payload).unwrap();
            for (field, lie) in [
                ("even", serde_json::json!(7)),
                ("odd", 8.into()),
                ("product", 100_002.into()),
                ("outcome", if even.is_none() { "no_odd" } else { "no_even" }.into()),
            ] {
                let mut lying = fields.clone();
                lying[field] = lie;
                let lying = Draw::decode(lying.to_string().as_bytes());
                prop_assert!(lying.is_err() || field == "product" && draw == lying.unwrap());
            }
        }

        #[test]
        fn a_reply_decodes_only_for_its_own_parity(number: u64) {
            for number in [number, number % 1100] {
                let payload = format!(r#"{{"number":{number}}}"#);
                let even = Parity::Even.decode_reply(payload.as_bytes());
                let odd = Parity::Odd.decode_reply(payload.as_bytes());
                prop_assert_eq!(even.is_ok(), number % 2 == 0 && number <= 1000);
                prop_assert_eq!(odd.is_ok(), number % 2 == 1 && number <= 999);
            }
        }

        #[test]
        fn arbitrary_bytes_never_cause_a_panic(noise: Vec<u8>) {
            let _ = Product::decode(&noise);
            let _ = Draw::decode(&noise);
            let _ = Parity::Even.decode_reply(&noise);
        }
    }

    #[test]
    fn payloads_are_written_as_documented() {
        let product = Product::new(846, 511).unwrap();
        assert_eq!(product.encode(), br#"{"number":432306,"even":846,"odd":511}"#);
        assert_eq!(Parity::encode_reply(846), br#"{"number":846}"#);
        let draw =
            Draw { slot: Slot(7), multiplier: "m".to_owned(), even: Some(846), odd: Some(511) };
        let written = br#"{"slot":7,"multiplier":"m","even":846,"odd":511,"product":432306,"outcome":"above_threshold"}"#;
        assert_eq!(draw.encode(), written);
    }

    #[test]
    fn the_threshold_itself_is_not_published() {
        let at = Product::new(160, 625).unwrap();
        assert_eq!(at.value(), THRESHOLD);
        assert!(!at.is_above_threshold());
        assert!(Product::new(162, 625).unwrap().is_above_threshold());
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let wrong = Product::decode(br#"{"number":7,"even":2,"odd":3}"#).unwrap_err();
        assert!(wrong.to_string().contains("2 x 3 is 6, not 7"), "{wrong}");
        let odd = Parity::Even.check(7).unwrap_err();
        assert_eq!(odd.to_string(), "not a valid message: 7 is not an even number from 0 to 1000");
    }

    /// Every version must read the payloads that earlier versions have written.
    #[test]
    fn version_1_is_still_read() {
        let product = Product::decode(include_bytes!("../payloads/v1/published.json")).unwrap();
        assert_eq!((product.even(), product.odd()), (846, 511));
        let reply = include_bytes!("../payloads/v1/reply.json");
        assert_eq!(Parity::Even.decode_reply(reply).unwrap(), 846);
        let draw = Draw::decode(include_bytes!("../payloads/v1/draw.json")).unwrap();
        assert_eq!((draw.slot, draw.outcome()), (Slot(3_590_000_000), Outcome::AboveThreshold));
        assert_eq!(draw.due().map(Product::value), Some(432_306));
        let none = Draw::decode(include_bytes!("../payloads/v1/draw-no-odd.json")).unwrap();
        assert_eq!((none.outcome(), none.product()), (Outcome::NoOdd, None));
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let more = br#"{"number":6,"even":2,"odd":3,"colour":"red"}"#;
        assert!(Product::decode(more).is_ok());
        let more = br#"{"slot":1,"multiplier":"a","outcome":"no_numbers","colour":"red"}"#;
        assert!(Draw::decode(more).is_ok());
    }
}
