//! Several guests, media that change, and storage that hangs, refuses, fails and keeps operations, in any
//! order: every request is answered exactly once, and a worker that can do nothing sleeps.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use polldisk::blkif::op;
use polldisk::msg::{Command, GrantMode, ReplaceImage, Report};
use polldisk::worker::Progress;

use crate::scripted::{Bench, Shape, bench, null, rules};
use polldisk::sim::disk::Script;
use polldisk::sim::random::Random;

const ROUNDS: u64 = 45;
const STEPS: usize = 120;

/// Pages of the largest request of each guest.
const PAGES: [usize; 5] = [256, 64, 11, 64, 4];

/// The guest whose only flushes are barriers.
const ORDERLY: usize = 2;

struct Play {
    bench: Bench,
    script: Rc<RefCell<Script>>,
    random: Random,
    asked: [usize; PAGES.len()],
    answered: [usize; PAGES.len()],
    indirect: [u16; PAGES.len()],
    replaced: usize,
    told: usize,
    /// Storage may have refused operations, which are submitted again when others have completed.
    refused: bool,
}

impl Play {
    fn new(seed: u64) -> Play {
        let (mut bench, script) = bench();
        let per_request = Shape { grant_mode: GrantMode::Map, ..Shape::copied(20) };
        let shapes = [
            Shape::copied(20).indirect(PAGES[0], 0),
            Shape::mapped(40).indirect(PAGES[1], 1),
            Shape::mapped(32),
            per_request.indirect(PAGES[3], 0),
            Shape::copied(32),
        ];
        for shape in shapes {
            bench.guest(shape);
        }
        let indirect = shapes.map(|shape| shape.indirect_segments);
        let (asked, answered) = Default::default();
        let random = Random::new(seed);
        Play {
            bench,
            script,
            random,
            asked,
            answered,
            indirect,
            replaced: 0,
            told: 0,
            refused: false,
        }
    }

    fn step(&mut self) {
        let guest = self.random.between(0, PAGES.len() - 1);
        match self.random.between(0, 13) {
            0..=4 => self.ask(guest),
            5 => {
                let mut script = self.script.borrow_mut();
                if !script.hung.remove(&guest) {
                    script.hung.insert(guest);
                }
            }
            6 => {
                self.script.borrow_mut().room =
                    self.random.one_of(&[None, Some(1), Some(3), Some(40)]);
                self.refused = true;
            }
            7 => {
                self.script.borrow_mut().per_reap =
                    self.random.one_of(&[None, Some(0), Some(1), Some(5)]);
            }
            8 => {
                self.script.borrow_mut().errno =
                    self.random.one_of(&[None, None, Some(libc::EIO), Some(libc::ENOSPC)]);
            }
            9 => {
                let parks = self.random.chance(50);
                self.script.borrow_mut().parks_flushes = parks;
            }
            10 => self.replace(guest),
            11 => self.sleep(),
            _ => {
                for _ in 0..self.random.between(1, 10) {
                    self.bench.now_ns += self.random.between(0, 300_000);
                    self.bench.pass();
                    self.check();
                }
            }
        }
        for guest in 0..PAGES.len() {
            self.answered[guest] += self.bench.statuses(guest).len();
        }
    }

    fn ask(&mut self, guest: usize) {
        let flush = if guest == ORDERLY { op::WRITE_BARRIER } else { op::FLUSH_DISKCACHE };
        let operation = self.random.one_of(&[op::READ, op::WRITE, op::READ, op::WRITE, flush]);
        let pages = match operation {
            op::FLUSH_DISKCACHE => 0,
            _ => self.random.between(1, PAGES[guest]),
        };
        let count = self.random.between(1, 20);
        self.asked[guest] += self.bench.ask(guest, operation, count, pages);
    }

    fn replace(&mut self, guest: usize) {
        let image = null(self.random.chance(50));
        let rules = rules(&image, self.indirect[guest]);
        let replace = ReplaceImage { key: self.bench.key(guest), rules, image: Arc::new(image) };
        self.bench.commands.send(Command::ReplaceImage(Box::new(replace))).unwrap();
        self.replaced += 1;
    }

    /// Lets the worker fall asleep while storage completes nothing.
    fn sleep(&mut self) {
        let per_reap = self.script.borrow_mut().per_reap.replace(0);
        assert!(self.settle(), "a worker that only waits for storage sleeps");
        self.script.borrow_mut().per_reap = per_reap;
    }

    /// As [`Bench::settle`], but looks again for events that came while the worker fell asleep.
    fn settle(&mut self) -> bool {
        while self.bench.settle() {
            if self.bench.pass() == Progress::Idle {
                return true;
            }
        }
        false
    }

    /// Storage has no request twice at a time, and a barrier only alone.
    fn check(&mut self) {
        let script = self.script.borrow();
        let mut slots: Vec<_> =
            script.taken.iter().map(|it| (it.ticket.queue(), it.ticket.slot())).collect();
        slots.sort_unstable();
        assert!(slots.windows(2).all(|two| two[0] != two[1]), "{slots:?}");
        let orderly = || script.taken.iter().filter(|it| it.ticket.queue() == ORDERLY);
        assert!(!orderly().any(|it| it.is_flush) || orderly().count() == 1);
        drop(script);
        let told = self.bench.reports.reports.try_iter();
        self.told += told.filter(|report| matches!(report, Report::ImageReplaced(_))).count();
    }

    /// A guest whose storage works is served, whatever the others do.
    fn serve_one(&mut self) {
        let guest = self.random.between(0, PAGES.len() - 1);
        {
            let mut script = self.script.borrow_mut();
            (script.room, script.per_reap, script.errno) = (None, None, None);
            if std::mem::take(&mut self.refused) {
                script.hung.clear();
            }
            script.hung.remove(&guest);
        }
        assert!(self.settle());
        self.answered[guest] += self.bench.statuses(guest).len();
        assert_eq!(self.answered[guest], self.asked[guest], "guest {guest}");
    }

    fn end(&mut self) {
        self.script.borrow_mut().hung.clear();
        for _ in 0..PAGES.len() {
            self.serve_one();
        }
        for guest in 0..PAGES.len() {
            self.answered[guest] += self.bench.statuses(guest).len();
        }
        self.check();
        assert_eq!(self.answered, self.asked);
        assert_eq!(self.told, self.replaced);
        for guest in 0..PAGES.len() {
            self.bench.commands.send(Command::Disconnect(self.bench.key(guest))).unwrap();
        }
        assert!(self.settle());
        let gone = self.bench.reports.reports.try_iter();
        let gone = gone.filter(|report| matches!(report, Report::Disconnected(_))).count();
        assert_eq!(gone, PAGES.len());
        for device in &self.bench.guests {
            assert_eq!(device.domain().mapped_grants(), 0, "nothing stays mapped");
        }
    }
}

#[test]
fn whatever_storage_does_each_request_is_answered_once_and_nobody_waits_for_another() {
    for seed in 1..=ROUNDS {
        println!("seed {seed}");
        let mut play = Play::new(seed);
        for step in 0..STEPS {
            play.step();
            if step % 20 == 19 {
                play.serve_one();
            }
        }
        play.end();
    }
}
