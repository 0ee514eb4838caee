//! Whether goals are met, as far as the rounds can tell.
//!
//! In each round the goal's figure comes from the contenders' turns of that round alone, or from
//! neighbouring slices. The interval of these figures' median is judged ([`Interval::of`]).

use figures::{Interval, Verdict, within_rounds};
use serde::Serialize;

use crate::contender::Contender;
use crate::run::{Entry, Outcome};
use crate::sample::Metric;
use crate::scenario::Goal;

/// A goal judged.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    /// The goal.
    pub goal: Goal,
    /// The ratio, the difference or the figure itself.
    pub figure: Option<Interval>,
    /// The contender's own figure.
    pub own: Option<Interval>,
    /// The best of the contenders that the goal compares with, and its figure.
    pub reference: Option<(Contender, Interval)>,
    /// Whether the goal is met.
    pub verdict: Verdict,
}

/// Judges all goals of a scenario.
pub fn judge(outcome: &Outcome) -> Vec<Judged> {
    let entries = outcome.cases.first().map_or(&[][..], |case| &case.entries);
    let judge = |goal| match judge_goal(goal, entries) {
        judged if outcome.impossible().is_none() => judged,
        judged => Judged { verdict: Verdict::NotPossible, ..judged },
    };
    outcome.scenario.goals.iter().map(judge).collect()
}

fn judge_goal(goal: &Goal, entries: &[Entry]) -> Judged {
    let own = entries.iter().find(|entry| entry.contender == goal.of);
    let own = own.map(|entry| entry.judged_figures(goal.metric)).unwrap_or_default();
    let others = entries.iter().filter(|entry| entry.contender != goal.of);
    let reference = goal.reference().and_then(|name| best(others, name, goal.metric));
    let compared: Option<Vec<f64>> = match (goal.reference(), &reference) {
        (None, _) => Some(own.clone()),
        (Some(_), None) => None,
        (Some(_), Some((_, theirs))) => Some(within_rounds(&own, theirs, |own, theirs| {
            if goal.over.is_some() { own / theirs } else { own - theirs }
        })),
    };
    let figure = compared.and_then(|figures| Interval::of(&figures));
    Judged {
        goal: goal.clone(),
        figure,
        own: Interval::of(&own),
        reference: reference
            .and_then(|(contender, theirs)| Some((contender, Interval::of(&theirs)?))),
        verdict: Verdict::of(figure, |figure| goal.is_met_by(figure)),
    }
}

/// The contender with the best median among those that `name` means, and its figures.
pub fn best<'a>(
    entries: impl IntoIterator<Item = &'a Entry>,
    name: &str,
    metric: Metric,
) -> Option<(Contender, Vec<f64>)> {
    let mut best: Option<(f64, &Entry)> = None;
    let measured = |entry: &&Entry| entry.contender.is(name) && entry.failed.is_none();
    for entry in entries.into_iter().filter(measured) {
        let Some(Interval { median, .. }) = Interval::of(&entry.judged_figures(metric)) else {
            continue;
        };
        let is_better = |than: f64| match metric.more_is_better() {
            true => median > than,
            false => median < than,
        };
        if best.is_none_or(|(than, _)| is_better(than)) {
            best = Some((median, entry));
        }
    }
    best.map(|(_, entry)| (entry.contender.clone(), entry.judged_figures(metric)))
}

#[cfg(test)]
mod test {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sample::Sample;

    fn entry(contender: &str, iops: &[f64]) -> Entry {
        let sample = |iops: &f64| Sample {
            figures: BTreeMap::from([(Metric::Iops, *iops), (Metric::MeanUs, 1e6 / iops)]),
            latency_cdf: Vec::new(),
        };
        let samples = iops.iter().map(sample).collect();
        Entry { samples, ..Entry::new(contender.parse().unwrap()) }
    }

    fn goal(text: &str) -> Goal {
        toml::from_str(text).unwrap()
    }

    const TWICE: &str = "metric = 'iops'\nover = 'qemu'\nat_least = 2.0";

    #[test]
    fn rounds_that_agree_decide() {
        let polldisk = entry("polldisk", &[30.0, 40.0, 50.0]);
        let judged = |qemu: &[f64]| {
            judge_goal(&goal(TWICE), &[polldisk.clone(), entry("qemu:iothread", qemu)])
        };
        assert_eq!(judged(&[10.0, 20.0, 10.0]).verdict, Verdict::Met, "ratios 3, 2, 5");
        assert_eq!(judged(&[20.0, 25.0, 30.0]).verdict, Verdict::Missed);
        assert_eq!(judged(&[20.0, 10.0, 10.0]).verdict, Verdict::Noisy, "ratios 1.5, 4, 5");
        assert_eq!(judged(&[]).verdict, Verdict::NotMeasured);
    }

    #[test]
    fn noise_that_all_contenders_share_cancels_out() {
        let polldisk = entry("polldisk", &[30.0, 300.0, 3.0]);
        let qemu = entry("qemu:iothread", &[10.0, 100.0, 1.0]);
        let judged = judge_goal(&goal(TWICE), &[polldisk, qemu]);
        assert_eq!(judged.figure, Some(Interval { median: 3.0, low: 3.0, high: 3.0 }));
    }

    #[test]
    fn the_best_setting_is_the_reference_and_a_failed_one_never_is() {
        let mut failed = entry("qemu:iothread,native", &[1000.0]);
        failed.failed = Some("not in this build".to_owned());
        let entries = [
            entry("polldisk", &[30.0; 3]),
            entry("qemu:iothread", &[10.0; 3]),
            entry("qemu:main-loop", &[20.0; 3]),
            failed,
        ];
        let judged = judge_goal(&goal(TWICE), &entries);
        let (reference, _) = judged.reference.unwrap();
        assert_eq!(
            (reference.to_string().as_str(), judged.verdict),
            ("qemu:main-loop", Verdict::Missed)
        );
        let (lowest, _) = best(&entries, "qemu", Metric::MeanUs).unwrap();
        assert_eq!(lowest.to_string(), "qemu:main-loop", "less latency is better");
        let one = TWICE.replace("qemu", "qemu:iothread");
        assert_eq!(judge_goal(&goal(&one), &entries).verdict, Verdict::Met);
    }

    #[test]
    fn nobody_is_its_own_reference() {
        let entries = [entry("polldisk:workers=2", &[20.0; 3]), entry("polldisk", &[10.0; 3])];
        let text = "metric = 'iops'\nof = 'polldisk:workers=2'\nover = 'polldisk'\nat_least = 1.8";
        let judged = judge_goal(&goal(text), &entries);
        assert_eq!((judged.figure.unwrap().median, judged.verdict), (2.0, Verdict::Met));
    }

    #[test]
    fn differences_and_bare_figures_are_judged_too() {
        let entries = [entry("polldisk", &[1e5; 3]), entry("fio", &[2e5; 3])];
        let beyond = |most| goal(&format!("metric = 'mean_us'\nbeyond = 'fio'\nat_most = {most}"));
        assert_eq!(judge_goal(&beyond("5.0"), &entries).verdict, Verdict::Met);
        assert_eq!(judge_goal(&beyond("4.9"), &entries).verdict, Verdict::Missed);
        let alone = goal("metric = 'mean_us'\nat_most = 10");
        assert_eq!(judge_goal(&alone, &entries).verdict, Verdict::Met);
    }
}
