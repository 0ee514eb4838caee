//! Four more guests on the backend of the measured disks: polite ones, or ones that try to take all of the
//! backend's time.
//!
//! Each is a domain with a disk and repeats the same requests ([`Habit`]). None has a thread of its own: the
//! first measured ring's thread, which polls, does a little for one of them in each pass
//! ([`crate::load::crowd`]). So they take no more than that from the measured load, even if there are few
//! cores, and still keep their rings full.

pub mod storage;

use polldisk::units::{Bytes, DomId};

use crate::options::{Mode, NEIGHBOUR_DOMAINS, NeighbourKind, Options, Plan};
use crate::queue::Operation;
use crate::toolstack::{self, Place};
use storage::{Holds, Storage};

/// Number of neighbours.
pub const NEIGHBOURS: usize = NEIGHBOUR_DOMAINS as usize;

/// What a neighbour does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Habit {
    /// A short name for what it does.
    pub name: &'static str,
    /// What holds its disk.
    holds: Holds,
    /// What its requests do, in turn. Empty if it sends no requests.
    operations: &'static [Operation],
    block_bytes: u64,
    depth: usize,
    ring_order: u32,
    persistent: bool,
    /// Whether it notifies the backend all the time.
    pub storms: bool,
}

const POLITE: Habit = Habit {
    name: "polite",
    holds: Holds::Nothing,
    operations: &[Operation::Read],
    block_bytes: 4096,
    depth: 8,
    ring_order: 0,
    persistent: true,
    storms: false,
};

const COPIES: Habit = Habit {
    name: "copies",
    holds: Holds::Zeroes,
    block_bytes: 1 << 20,
    depth: 32,
    persistent: false,
    ..POLITE
};

/// As many requests as a ring of 16 pages holds.
const FLOOD: Habit = Habit { holds: Holds::File, depth: 512, ring_order: 4, ..POLITE };

const INDIRECT: Habit = Habit { name: "indirect", operations: &[Operation::ReadIndirect], ..FLOOD };

const FLUSHES: Habit = Habit { name: "flushes", operations: &[Operation::Flush], ..FLOOD };

const DISCARDS: Habit =
    Habit { name: "discards", operations: &[Operation::Discard], block_bytes: 64 << 10, ..FLOOD };

const STORM: Habit = Habit { name: "storm", operations: &[], storms: true, ..POLITE };

const HUNG: Habit = Habit {
    name: "hung",
    holds: Holds::Hung,
    operations: &[Operation::Write, Operation::WriteIndirect, Operation::Flush, Operation::Discard],
    ..FLOOD
};

const FLUSHES_AND_DISCARDS: Habit = Habit {
    name: "flushes and discards",
    operations: &[Operation::Flush, Operation::Discard],
    ..DISCARDS
};

const INDIRECT_AND_STORM: Habit = Habit { name: "indirect and storm", storms: true, ..INDIRECT };

/// What each guest does, beside disks that hold `target`.
fn habits(kind: NeighbourKind, target: &str) -> [Habit; NEIGHBOURS] {
    match kind {
        NeighbourKind::Polite if target.starts_with("null") => [POLITE; _],
        NeighbourKind::Polite => [Habit { holds: Holds::File, ..POLITE }; _],
        NeighbourKind::Copies => [COPIES; _],
        NeighbourKind::Indirect => [INDIRECT; _],
        NeighbourKind::Flushes => [FLUSHES; _],
        NeighbourKind::Discards => [DISCARDS; _],
        NeighbourKind::Storm => [STORM; _],
        NeighbourKind::Hung => [HUNG; _],
        NeighbourKind::Worst => [COPIES, INDIRECT_AND_STORM, FLUSHES_AND_DISCARDS, HUNG],
    }
}

/// A neighbour and its disk.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// What it does.
    pub habit: Habit,
    /// The plan of its frontend.
    pub plan: Plan,
    /// Its disk.
    pub place: Place,
}

/// The neighbours that a plan asks for, and what holds their disks.
#[derive(Debug, Default)]
pub struct Neighbours {
    /// The guests; empty if the plan has none.
    pub guests: Vec<Neighbour>,
    /// What holds their disks.
    pub storage: Storage,
}

impl Neighbours {
    /// Makes the storage. The neighbours' domains are numbered after the measured ones.
    pub fn of(plan: &Plan) -> anyhow::Result<Neighbours> {
        let Some(kind) = plan.options.neighbours else { return Ok(Neighbours::default()) };
        let target = plan.options.target.as_deref().unwrap_or_default();
        let mut habits = habits(kind, target);
        let hung = habits.iter().filter(|habit| habit.holds == Holds::Hung).count();
        let mut storage = Storage::make(plan.options.scratch.as_deref())?;
        if let Err(error) = storage.hang(hung) {
            if kind != NeighbourKind::Worst {
                return Err(error.context("--neighbours hung: cannot make storage that hangs"));
            }
            polldisk::output::say(format_args!("no neighbour has storage that hangs: {error:#}"));
            for habit in habits.iter_mut().filter(|habit| habit.holds == Holds::Hung) {
                *habit = INDIRECT;
            }
        }
        let guests = (0..)
            .zip(habits)
            .map(|(number, habit)| {
                let target = storage.target(habit.holds)?;
                let plan = habit.plan(plan, number, target)?;
                let place = toolstack::places(&plan)?.remove(0);
                Ok(Neighbour { habit, plan, place })
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Neighbours { guests, storage })
    }
}

impl Habit {
    /// The plan of the guest with this number, from 0. Its domain comes after those of `measured`.
    fn plan(&self, measured: &Plan, number: u32, target: String) -> anyhow::Result<Plan> {
        let measured = &measured.options;
        let domid = u32::from(measured.domid.raw()) + measured.domains + number;
        let options = Options {
            neighbours: None,
            domid: DomId::try_from(domid)?,
            domains: 1,
            disks: 1,
            target: Some(target),
            mode: Mode::W,
            nodes: Vec::new(),
            size: None,
            read: 100,
            sequential: false,
            rate: None,
            block_size: Bytes(self.block_bytes),
            depth: self.depth,
            queues: 1,
            ring_order: self.ring_order,
            indirect: None,
            no_persistent: !self.persistent,
            cores: None,
            ..measured.clone()
        };
        let plan = options.check(&[])?;
        Ok(Plan { operations: self.operations.to_vec(), ..plan })
    }
}

#[cfg(test)]
mod test {
    use clap::Parser;

    use super::*;

    fn neighbours(line: &str) -> Neighbours {
        let words = std::iter::once("blkload").chain(line.split_whitespace());
        Neighbours::of(&Options::try_parse_from(words).unwrap().check(&[0]).unwrap()).unwrap()
    }

    #[test]
    fn each_is_a_domain_of_its_own_behind_the_measured_ones() {
        let beside = neighbours(
            "--target null:8G --disks 4 --domains 2 --domid 7 --queues 2 --read 50 --size 1M \
             --wait busy --neighbours copies --protocol x86_32",
        );
        let names: Vec<_> = beside.guests.iter().map(|guest| guest.place.name()).collect();
        assert_eq!(names, ["9:xvda", "10:xvda", "11:xvda", "12:xvda"]);
        for Neighbour { plan, .. } in &beside.guests {
            assert_eq!(plan.options.target.as_deref(), Some("null:1G,read-zeroes"));
            assert_eq!((plan.block_bytes, plan.wanted.options.buffers), (1 << 20, 32));
            assert_eq!((plan.wanted.queues, plan.wanted.options.persistent), (1, false));
            assert_eq!((plan.options.size, plan.options.read), (None, 100));
        }
        assert!(neighbours("--target null:8G").guests.is_empty());
    }

    #[test]
    fn each_guest_has_its_own_file_which_goes_with_the_run() {
        let scratch = tempfile::tempdir().unwrap();
        let line = format!(
            "--target null:8G --wait busy --neighbours discards --scratch {}",
            scratch.path().display()
        );
        let beside = neighbours(&line);
        let targets: std::collections::BTreeSet<_> =
            beside.guests.iter().filter_map(|guest| guest.plan.options.target.as_deref()).collect();
        assert_eq!(targets.len(), NEIGHBOURS, "{targets:?}");
        for target in targets {
            let file = std::path::Path::new(target.strip_prefix("raw:").unwrap());
            assert!(file.starts_with(scratch.path()), "{target}");
            let data = std::fs::read(file).unwrap();
            assert!(data.chunks(4096).all(|block| block.iter().any(|byte| *byte != 0)));
        }
        drop(beside);
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[test]
    fn polite_ones_hold_what_the_measured_disks_hold() {
        for (target, start) in [("null:8G", "null:"), ("raw:/x.img", "raw:")] {
            let beside = neighbours(&format!("--target {target} --wait busy --neighbours polite"));
            let theirs = beside.guests[0].plan.options.target.clone().unwrap();
            assert!(theirs.starts_with(start), "{theirs}");
        }
    }

    #[test]
    fn the_worst_are_of_different_kinds() {
        let habits = habits(NeighbourKind::Worst, "null:8G");
        for (at, habit) in habits.iter().enumerate() {
            assert!(!habits[..at].contains(habit), "{habit:?}");
        }
        assert!(habits.iter().any(|habit| habit.storms));
    }
}
