//! A scenario's steps, with their durations and figures.

use std::collections::BTreeMap;

use serde::Serialize;

/// One step of a scenario.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// Wall-clock seconds it took.
    pub seconds: f64,
    /// What was counted or measured, by name.
    pub figures: BTreeMap<String, f64>,
}

/// A scenario that passed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// The backend that served the disks.
    pub backend: String,
    /// The steps in their order.
    pub steps: Vec<Step>,
    /// Wall-clock seconds of the whole scenario.
    pub seconds: f64,
}

impl Report {
    /// The last line that is printed for the scenario.
    pub fn summary(&self) -> String {
        let Self { scenario, steps, seconds, .. } = self;
        format!("{scenario}: passed ({} steps, {seconds:.0} s)", steps.len())
    }
}

impl Step {
    /// The line that is printed, after the scenario's name, when the step ends.
    pub fn line(&self) -> String {
        let figures: String =
            self.figures.iter().map(|(name, value)| format!("  {name} {value}")).collect();
        format!("{:<46} {:>6.1} s{figures}", self.name, self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_steps_and_seconds() {
        let step = Step { name: "boot".into(), seconds: 2.0, figures: BTreeMap::new() };
        let report = Report {
            scenario: "first-disk".into(),
            backend: "polldisk".into(),
            steps: vec![step.clone(), step],
            seconds: 61.6,
        };
        assert_eq!(report.summary(), "first-disk: passed (2 steps, 62 s)");
    }

    #[test]
    fn a_step_names_its_figures() {
        let figures = BTreeMap::from([("reads".into(), 64.0)]);
        let step = Step { name: "fio".into(), seconds: 2.04, figures };
        assert!(step.line().ends_with("    2.0 s  reads 64"), "{}", step.line());
    }
}
