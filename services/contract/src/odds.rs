//! The probability that a tick has a product to publish, from exact counts.

use crate::THRESHOLD;
use crate::messages::Parity;

/// Returns how many pairs of an even and an odd factor have a product above the threshold, and how
/// many pairs there are. All pairs are equally likely, so the ratio is the probability that a tick
/// has a product to publish.
#[must_use]
pub fn published_pairs() -> (u32, u32) {
    let mut above = 0;
    let mut all = 0;
    for even in Parity::Even.factors() {
        for odd in Parity::Odd.factors() {
            all += 1;
            above += u32::from(u32::from(even) * u32::from(odd) > THRESHOLD);
        }
    }
    (above, all)
}

/// [`published_pairs`] as a probability.
#[must_use]
pub fn publish_probability() -> f64 {
    let (above, all) = published_pairs();
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
        assert_eq!(published_pairs(), (above, 501 * 500));
    }
}
