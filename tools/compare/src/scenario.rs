//! Scenarios: what is measured and the goals, from `perf/scenarios/*.toml`.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::contender::{Contender, Kind};
use crate::load::{Load, Split, Wait};
use crate::sample::Metric;

/// One file of the folder.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The file's name without `.toml`.
    #[serde(skip_deserializing)]
    pub name: String,
    /// A description.
    pub about: String,
    /// What holds the disks.
    pub backing: Backing,
    /// Whether a quick run includes it.
    #[serde(default = "yes")]
    pub quick: bool,
    /// Length in milliseconds of the [`crate::slices`] that goals are judged by, for storage whose speed
    /// changes between turns.
    pub slice_ms: Option<NonZeroU32>,
    /// The load.
    pub load: Load,
    /// How the load is split for a backend without indirect requests, as a guest's kernel would split it.
    pub split: Option<Split>,
    /// A value of the load, or the number of workers, that varies.
    pub vary: Option<Vary>,
    /// The contenders, in the order of their turns.
    pub contenders: Vec<Contender>,
    /// The goals.
    #[serde(default)]
    pub goals: Vec<Goal>,
    /// Whether to plot the latencies' distribution.
    #[serde(default)]
    pub latency_cdf: bool,
}

/// What holds a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Nothing: reads give zeroes.
    Null,
    /// A file on tmpfs.
    Tmpfs,
    /// A file on the checkout's filesystem.
    Ext4,
}

/// The value that varies, and what it becomes in turn.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Vary {
    /// [`Load::depth`].
    Depth(Vec<u32>),
    /// [`Load::disks`].
    Disks(Vec<u32>),
    /// polldisk's workers, with one disk for each of them.
    Workers(Vec<u32>),
}

/// A bound that a contender's figure should meet.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// Which figure.
    pub metric: Metric,
    /// Whose figure.
    #[serde(default)]
    pub of: Contender,
    /// The figure is divided by that of the best of these contenders: all of a kind (`qemu`) or a single one
    /// (`polldisk:workers=1`).
    pub over: Option<String>,
    /// The figure of the best of these contenders is subtracted.
    pub beyond: Option<String>,
    /// The least that meets the goal.
    pub at_least: Option<f64>,
    /// The most that meets the goal.
    pub at_most: Option<f64>,
}

/// A scenario's load and contenders, with one of the varying values filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Case {
    /// The varying value.
    pub at: Option<u32>,
    /// The load.
    pub load: Load,
    /// The contenders, in the scenario's order. Not in the JSON, since the turns name them.
    #[serde(skip)]
    pub contenders: Vec<Contender>,
}

fn yes() -> bool {
    true
}

impl Scenario {
    /// Reads all scenarios of a folder, in the order of their names.
    pub fn read_all(folder: &Path) -> Result<Vec<Scenario>> {
        let entries = fs::read_dir(folder)
            .with_context(|| format!("cannot read the scenarios in {}", folder.display()))?;
        let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
        paths.sort();
        paths
            .iter()
            .map(|path| {
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                let text = fs::read_to_string(path)?;
                Scenario::parse(&name, &text).with_context(|| path.display().to_string())
            })
            .collect()
    }

    /// Reads one scenario.
    pub fn parse(name: &str, text: &str) -> Result<Scenario> {
        let scenario: Scenario = toml::from_str(text)?;
        let scenario = Scenario { name: name.to_owned(), ..scenario };
        scenario.check()?;
        Ok(scenario)
    }

    fn check(&self) -> Result<()> {
        ensure!([0, 100].contains(&self.load.read), "read = {}: give 0 or 100", self.load.read);
        ensure!(
            self.goals.is_empty() || self.vary.is_none(),
            "a scenario with vary can't have goals: they would not say which of its values they mean"
        );
        for contender in &self.contenders {
            let kind = contender.kind();
            ensure!(
                kind != Kind::Fio || self.backing != Backing::Null,
                "{contender}: fio needs a file"
            );
            ensure!(
                kind != Kind::Echo || self.backing == Backing::Null,
                "{contender}: it needs backing = \"null\", since it reads and writes nothing"
            );
            ensure!(
                kind == Kind::Polldisk || self.cases().iter().all(|case| case.load.disks == 1),
                "{contender}: only polldisk is measured with several disks"
            );
            ensure!(
                *contender == Contender::default() || !matches!(self.vary, Some(Vary::Workers(_))),
                "{contender}: the number of workers comes from vary"
            );
            ensure!(
                contender.beside().is_none() || self.load.wait == Wait::Busy && !self.load.idle,
                "{contender}: neighbours need a load that polls: wait = \"busy\""
            );
            ensure!(
                contender.beside().is_none() || self.slice_ms.is_none(),
                "{contender}: slices would count the neighbours' reads, too"
            );
        }
        if self.slice_ms.is_some() {
            ensure!(
                self.backing == Backing::Ext4,
                "slice_ms: slices count only I/O that reaches storage: backing = \"ext4\""
            );
            ensure!(
                !self.goals.is_empty() && self.goals.iter().all(|goal| goal.metric == Metric::Iops),
                "slice_ms: slices need goals, and they measure only IOPS"
            );
        }
        self.goals.iter().try_for_each(|goal| self.check_goal(goal))
    }

    /// How long a slice is.
    pub fn slice(&self) -> Option<Duration> {
        self.slice_ms.map(|ms| Duration::from_millis(u64::from(ms.get())))
    }

    /// Whether a goal is about this contender or compares with it.
    pub fn is_judged(&self, contender: &Contender) -> bool {
        let is_in = |goal: &Goal| {
            goal.of == *contender || goal.reference().is_some_and(|name| contender.is(name))
        };
        self.goals.iter().any(is_in)
    }

    fn check_goal(&self, goal: &Goal) -> Result<()> {
        let of = &goal.of;
        ensure!(self.contenders.contains(of), "a goal of {of}, which is not a contender");
        if let Some(name) = goal.reference() {
            ensure!(
                self.contenders.iter().any(|contender| contender.is(name)),
                "a goal against {name}, which is not a contender"
            );
        }
        match (&goal.over, &goal.beyond, goal.at_least, goal.at_most) {
            (Some(_), Some(_), ..) => bail!("a goal has `over` or `beyond`, not both"),
            (_, _, Some(_), None) | (_, _, None, Some(_)) => Ok(()),
            _ => bail!("a goal needs either at_least or at_most"),
        }
    }

    /// The cases to run: one, or one for each varying value.
    pub fn cases(&self) -> Vec<Case> {
        let fixed = Case { at: None, load: self.load.clone(), contenders: self.contenders.clone() };
        let Some(vary) = &self.vary else { return vec![fixed] };
        vary.values().iter().map(|at| vary.fill(fixed.clone(), *at)).collect()
    }
}

impl Vary {
    fn values(&self) -> &[u32] {
        match self {
            Vary::Depth(values) | Vary::Disks(values) | Vary::Workers(values) => values,
        }
    }

    fn fill(&self, mut case: Case, at: u32) -> Case {
        case.at = Some(at);
        match self {
            Vary::Depth(_) => case.load.depth = at,
            Vary::Disks(_) => case.load.disks = at,
            Vary::Workers(_) => {
                case.load.disks = at;
                case.contenders.fill(Contender::Polldisk { workers: at, beside: None });
            }
        }
        case
    }
}

impl Case {
    /// How many cores its largest backend keeps busy.
    pub fn backend_cores(&self) -> u32 {
        self.contenders.iter().map(Contender::cores).max().unwrap_or(0)
    }
}

impl Goal {
    /// The name of the contenders that the figure is compared with.
    pub fn reference(&self) -> Option<&str> {
        self.over.as_deref().or(self.beyond.as_deref())
    }

    /// Whether a figure, ratio or difference meets the goal.
    pub fn is_met_by(&self, figure: f64) -> bool {
        self.at_least.is_none_or(|least| figure >= least)
            && self.at_most.is_none_or(|most| figure <= most)
    }

    /// In words, such as "at least 8 times qemu".
    pub fn describe(&self) -> String {
        let (bound, value) = match (self.at_least, self.at_most) {
            (Some(least), _) => ("at least", least),
            (_, most) => ("at most", most.unwrap_or(f64::INFINITY)),
        };
        match (&self.over, &self.beyond) {
            (Some(over), _) if value < 0.5 => format!("{bound} 1/{} of {over}", 1.0 / value),
            (Some(over), _) if value < 1.0 => format!("{bound} {} % of {over}", value * 100.0),
            (Some(over), _) => format!("{bound} {value} times {over}"),
            (_, Some(beyond)) => format!("{bound} {value} more than {beyond}"),
            _ => format!("{bound} {value}"),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const SOUND: &str = r#"
        about = "x"
        backing = "null"
        contenders = ["polldisk", "qemu:iothread"]
        load = { depth = 8 }
        goals = [{ metric = "iops", over = "qemu", at_least = 8 }]
    "#;

    fn error(text: &str) -> String {
        format!("{:#}", Scenario::parse("x", text).unwrap_err())
    }

    #[test]
    fn a_file_says_what_differs_from_the_usual_load() {
        let scenario = Scenario::parse("x", SOUND).unwrap();
        assert_eq!(scenario.load, Load { depth: 8, ..Load::default() });
        assert_eq!(scenario.goals[0].of.to_string(), "polldisk");
        assert_eq!(scenario.cases().len(), 1);
    }

    #[test]
    fn a_varying_value_makes_a_case_of_each() {
        let text = SOUND.split("goals").next().unwrap().to_owned() + "vary = { depth = [1, 2] }";
        let cases = Scenario::parse("x", &text).unwrap().cases();
        let depths: Vec<_> = cases.iter().map(|case| (case.at, case.load.depth)).collect();
        assert_eq!(depths, [(Some(1), 1), (Some(2), 2)]);
    }

    #[test]
    fn each_worker_serves_one_disk() {
        let text = "about = 'x'\nbacking = 'null'\ncontenders = ['polldisk']\nload = {}\n\
                    vary = { workers = [1, 4] }";
        let cases = Scenario::parse("x", text).unwrap().cases();
        let of = |case: &Case| (case.load.disks, case.contenders[0].to_string());
        let (one, four) = ("polldisk".to_owned(), "polldisk:workers=4".to_owned());
        assert_eq!(cases.iter().map(of).collect::<Vec<_>>(), [(1, one), (4, four)]);
        let found = error(&text.replace("'polldisk'", "'polldisk:workers=2'"));
        assert!(found.contains("the number of workers comes from vary"), "{found}");
        let found = error(&text.replace("'polldisk'", "'echo'"));
        assert!(found.contains("only polldisk is measured with several disks"), "{found}");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (from, to, why) in [
            ("depth = 8", "dept = 8", "unknown field `dept`"),
            ("depth = 8", "read = 50", "read = 50: give 0 or 100"),
            ("depth = 8", "disks = 2", "qemu:iothread: only polldisk is measured with several"),
            ("\"qemu:iothread\"", "\"fio\"", "fio: fio needs a file"),
            ("\"qemu:iothread\"", "\"qemu:fast\"", "qemu:fast: no such setting"),
            ("over = \"qemu\"", "over = \"fio\"", "a goal against fio, which is not a contender"),
            (", at_least = 8", "", "a goal needs either at_least or at_most"),
            ("at_least", "beyond = \"qemu\", at_least", "not both"),
            ("load =", "slice_ms = 0\nload =", "nonzero"),
            ("load =", "slice_ms = 20\nload =", "slices count only I/O that reaches storage"),
            ("load =", "vary = { disks = [1] }\nload =", "a scenario with vary can't have goals"),
        ] {
            let found = error(&SOUND.replace(from, to));
            assert!(found.contains(why), "{to}: {found}");
        }
    }

    #[test]
    fn neighbours_need_a_load_that_polls_and_no_slices() {
        let text = "about = 'x'\nbacking = 'ext4'\nload = { wait = 'block' }\n\
                    contenders = ['polldisk:beside=storm']\n\
                    goals = [{ metric = 'iops', of = 'polldisk:beside=storm', at_least = 1 }]";
        let found = error(text);
        assert!(found.contains("neighbours need a load that polls"), "{found}");
        let busy = text.replace("block", "busy");
        assert!(Scenario::parse("x", &busy).is_ok());
        let found = error(&busy.replace("load", "slice_ms = 20\nload"));
        assert!(found.contains("slices would count the neighbours' reads, too"), "{found}");
    }

    #[test]
    fn slices_are_of_contenders_that_goals_compare() {
        let text = "about = 'x'\nbacking = 'ext4'\nslice_ms = 20\nload = {}\n\
                    contenders = ['polldisk', 'fio', 'fio:registered', 'qemu:iothread']\n\
                    goals = [{ metric = 'iops', over = 'fio', at_least = 0.97 }]";
        let scenario = Scenario::parse("x", text).unwrap();
        let judged = |contender: &&Contender| scenario.is_judged(contender);
        let judged: Vec<_> = scenario.contenders.iter().filter(judged).collect();
        assert_eq!(judged, scenario.contenders[..3].iter().collect::<Vec<_>>());
        let found = error(&text.replace("iops", "mean_us"));
        assert!(found.contains("they measure only IOPS"), "{found}");
    }

    #[test]
    fn the_scenarios_of_this_repository_are_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../perf/scenarios");
        assert!(!Scenario::read_all(&folder).unwrap().is_empty());
    }

    #[test]
    fn goals_read_like_words() {
        let goal = |over: Option<&str>, at_least, at_most| Goal {
            metric: Metric::Iops,
            of: Contender::default(),
            over: over.map(str::to_owned),
            beyond: None,
            at_least,
            at_most,
        };
        assert_eq!(goal(Some("qemu"), Some(8.0), None).describe(), "at least 8 times qemu");
        assert_eq!(goal(Some("qemu"), None, Some(0.125)).describe(), "at most 1/8 of qemu");
        assert_eq!(goal(Some("fio"), Some(0.97), None).describe(), "at least 97 % of fio");
        assert_eq!(goal(None, None, Some(1.5)).describe(), "at most 1.5");
        assert!(goal(None, None, Some(1.5)).is_met_by(1.5));
        assert!(!goal(None, Some(8.0), None).is_met_by(7.9));
    }
}
