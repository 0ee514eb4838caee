//! What the lab can prove. Each scenario is a function on a fresh dom0.

mod first_disk;
mod guest_32bit;
mod guest_io;
mod guest_suites;
mod protocol;
mod reconnect;

use anyhow::Result;

use crate::lab::Lab;

/// Something the lab can prove.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it proves, in one line.
    pub about: &'static str,
    /// Whether its guests need the root with programs.
    pub programs: bool,
    /// Its steps; an error is a failure.
    pub run: fn(&mut Lab) -> Result<()>,
}

/// All of them, in the order of `lab all`.
pub const SCENARIOS: [Scenario; 5] = [
    first_disk::SCENARIO,
    reconnect::SCENARIO,
    protocol::SCENARIO,
    guest_32bit::SCENARIO,
    guest_suites::SCENARIO,
];

/// Looks a scenario up by its name.
pub fn find(name: &str) -> Option<Scenario> {
    SCENARIOS.into_iter().find(|scenario| scenario.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_is_found_by_its_name() {
        for scenario in SCENARIOS {
            assert_eq!(find(scenario.name).map(|found| found.about), Some(scenario.about));
        }
        assert!(find("all").is_none());
    }
}
