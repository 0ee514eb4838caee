//! A median and its spread.

use std::f64::consts::LN_2;

use serde::Serialize;

const CONFIDENCE: f64 = 0.9;

/// The median of some figures, and a range around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Interval {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Interval {
    /// The range that holds the true median with a confidence of 90 %, whatever the figures' distribution
    /// (order statistics). Fewer than five figures cannot give that confidence: then it is the range of
    /// all of them. `None` if there are no figures.
    pub fn of(figures: &[f64]) -> Option<Interval> {
        Interval::without(cut(figures.len()), figures)
    }

    /// The range of all figures. `None` if there are none.
    pub fn of_all(figures: &[f64]) -> Option<Interval> {
        Interval::without(0, figures)
    }

    /// The range without the `cut` smallest and the `cut` largest figures.
    fn without(cut: usize, figures: &[f64]) -> Option<Interval> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (count, middle) = (sorted.len(), sorted.len() / 2);
        let median = match count {
            0 => return None,
            _ if count.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        };
        Some(Interval { median, low: sorted[cut], high: sorted[count - 1 - cut] })
    }

    /// Such as "2.00 (1.50 to 3.00)", with each figure as `show` writes it.
    pub fn show(self, show: impl Fn(f64) -> String) -> String {
        format!("{} ({} to {})", show(self.median), show(self.low), show(self.high))
    }
}

/// How many of the smallest and of the largest of `count` figures may be left out of an interval
/// that still holds the true median with [`CONFIDENCE`]. Each figure lies above the true median with
/// the probability of a coin's head, so the chance that `cut` or fewer lie on one side is binomial.
fn cut(count: usize) -> usize {
    // Logarithms, because from about a thousand figures on the binomial coefficients exceed an f64.
    let ln_outcomes = count as f64 * LN_2;
    let mut ln_ways = 0.0;
    let mut tail = 0.0;
    for cut in 0..count / 2 {
        tail += f64::exp(ln_ways - ln_outcomes);
        if 1.0 - 2.0 * tail < CONFIDENCE {
            return cut.saturating_sub(1);
        }
        ln_ways += f64::ln((count - cut) as f64 / (cut + 1) as f64);
    }
    0
}

/// Compares each round's figure with the other's of the same round, so that noise which both share
/// cancels out.
pub fn within_rounds(own: &[f64], others: &[f64], compare: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    own.iter().zip(others).map(|(own, other)| compare(*own, *other)).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn outliers_are_left_out_as_far_as_the_number_of_rounds_allows() {
        // Confidence of the range of all: 1 - 2 / 2^n. Tables give the others (two-sided, 90 %).
        assert_eq!([1, 2, 3, 5, 7, 8, 10, 11, 15, 20].map(cut), [0, 0, 0, 0, 0, 1, 1, 2, 3, 5]);
        // Large counts, by the normal distribution: half of them, less 1.645 times half the root, less one.
        assert_eq!([600, 2400, 10_000].map(cut), [279, 1159, 4917]);
        let interval = Interval::of(&[9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0]).unwrap();
        assert_eq!(interval, Interval { median: 4.5, low: 2.0, high: 9.0 });
    }

    #[test]
    fn the_range_of_all_leaves_nothing_out() {
        let figures = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0];
        let expected = Interval { median: 4.5, low: 1.0, high: 100.0 };
        assert_eq!(Interval::of_all(&figures), Some(expected));
        let odd = Interval { median: 2.0, low: 1.0, high: 9.0 };
        assert_eq!(Interval::of_all(&figures[..3]), Some(odd));
    }

    #[test]
    fn no_figures_have_no_median() {
        assert_eq!((Interval::of(&[]), Interval::of_all(&[])), (None, None));
    }

    #[test]
    fn each_round_is_compared_with_itself() {
        let ratios = within_rounds(&[50.0, 500.0, 5.0], &[100.0, 1000.0], |own, other| own / other);
        assert_eq!(ratios, [0.5, 0.5]);
    }
}
