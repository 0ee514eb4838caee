//! Whether a target is met, as far as the rounds can tell.

use std::fmt;

use serde::Serialize;

use crate::interval::Interval;

/// What the rounds say of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All of the interval meets it.
    Met,
    /// None of the interval does.
    Missed,
    /// The bound lies within the interval: this machine was too noisy to tell.
    Noisy,
    /// There are no figures.
    NotMeasured,
    /// This machine has too few cores.
    NotPossible,
}

impl Verdict {
    /// Judges by both ends of an interval; `is_met` says whether a figure meets the target.
    pub fn of(figure: Option<Interval>, is_met: impl Fn(f64) -> bool) -> Verdict {
        let Some(Interval { low, high, .. }) = figure else { return Verdict::NotMeasured };
        match [low, high].map(is_met) {
            [true, true] => Verdict::Met,
            [false, false] => Verdict::Missed,
            _ => Verdict::Noisy,
        }
    }
}

/// As Markdown.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Met => "met",
            Verdict::Missed => "**missed**",
            Verdict::Noisy => "**noisy**",
            Verdict::NotMeasured => "**not measured**",
            Verdict::NotPossible => "not possible here",
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_bound_within_the_interval_is_noise() {
        let judged = |bound: f64| {
            let interval = Interval { median: 2.0, low: 1.0, high: 3.0 };
            [
                Verdict::of(Some(interval), |figure| figure < bound),
                Verdict::of(Some(interval), |figure| figure >= bound),
            ]
        };
        assert_eq!(judged(3.1), [Verdict::Met, Verdict::Missed]);
        assert_eq!(judged(1.0), [Verdict::Missed, Verdict::Met]);
        assert_eq!(judged(2.0), [Verdict::Noisy; 2]);
        assert_eq!(Verdict::of(None, |_| true), Verdict::NotMeasured);
    }
}
