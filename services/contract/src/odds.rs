//! The probability that a tick has a product to publish, from exact counts.

use crate::THRESHOLD;
use crate::messages::Parity;

/// The share of the pairs of an even and an odd factor whose product is above the threshold. All
/// pairs are equally likely.
#[must_use]
pub fn publish_probability() -> f64 {
    let mut above = 0;
    let mut all = 0;
    for even in Parity::Even.factors() {
        for odd in Parity::Odd.factors() {
            all += 1;
            above += u32::from(u32::from(even) * u32::from(odd) > THRESHOLD);
        }
    }
    f64::from(above) / f64::from(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enumeration_and_division_agree() {
        // For each even factor: the odd factors that are greater than the threshold divided by it.
        let above: u32 =
            (2..=1000).step_by(2).map(|even| 500 - 500.min((THRESHOLD / even).div_ceil(2))).sum();
        assert!((publish_probability() * 501.0 * 500.0 - f64::from(above)).abs() < 1e-6);
    }
}
