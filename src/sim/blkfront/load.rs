//! A load that verifies every byte it reads.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::device::{Answer, BackendFault, Device};
use super::oracle::{Oracle, SECTOR};
use crate::blkif::op;
use crate::sim::random::Random;

/// How long the guest looks for an answer before it sleeps for one.
const LOOKS_BEFORE_SLEEP: u32 = 2_000;

/// Wake-ups without an answer that are allowed: the notification of an answer already taken may arrive late.
const WAKE_UPS_WITHOUT_ANSWER: u32 = 4;

/// A backend that has answered nothing for this long is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a load does.
#[derive(Clone, Debug)]
pub struct Load {
    /// Seeds the choice of places and the data.
    pub seed: u64,
    /// Bytes of each request: whole sectors of the disk, at most what the device's requests move.
    pub block_bytes: usize,
    /// Requests in flight at most.
    pub depth: usize,
    /// Reads among 100 requests.
    pub read_percent: u64,
    /// One request in this number is a flush; 0: none.
    pub flush_every: u64,
    /// 512-byte sectors of the disk that it may use.
    pub sectors: Range<u64>,
    /// They hold zeroes at first; otherwise nothing is read that was not written before.
    pub zeroed: bool,
    /// The backing keeps what is written; otherwise (null) data is neither made nor checked.
    pub keeps_data: bool,
}

/// What a load has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Blocks read, every byte of which was compared.
    pub verified: u64,
    /// Sectors in them that held something else than they must.
    pub mismatches: u64,
    /// Reads answered with okay.
    pub reads: u64,
    /// Writes answered with okay.
    pub writes: u64,
    /// Flushes answered with okay.
    pub flushes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// Why a load ended early.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The backend broke the protocol.
    #[error(transparent)]
    Backend(#[from] BackendFault),
    /// The stand-in failed.
    #[error("the stand-in for Xen failed")]
    Io(#[from] io::Error),
    /// No answer.
    #[error("{0} requests were not answered within a minute")]
    Silence(usize),
}

/// A load in progress on one device.
#[derive(Debug)]
pub struct Runner<'a> {
    load: Load,
    device: &'a mut Device,
    oracle: Oracle,
    /// By block: a request for it is in flight.
    busy: Vec<bool>,
    /// By buffer: what it is in flight for.
    under_way: Vec<Option<Request>>,
    random: Random,
    data: Vec<u8>,
    report: Report,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    operation: u8,
    block: usize,
}

impl<'a> Runner<'a> {
    /// A load on a device whose disk has the sectors named.
    ///
    /// # Panics
    /// If the load's numbers do not fit the device or each other.
    pub fn new(load: Load, device: &'a mut Device) -> Runner<'a> {
        let sectors = usize::try_from(load.sectors.end - load.sectors.start).expect("a small disk");
        let per_block = load.block_bytes / SECTOR;
        assert!(per_block > 0 && load.block_bytes <= device.options().request_bytes_max());
        let blocks = sectors / per_block;
        assert!(blocks > 2 * load.depth, "too few blocks for the depth");
        Runner {
            oracle: Oracle::new(load.seed, if load.keeps_data { sectors } else { 0 }),
            busy: vec![false; blocks],
            under_way: vec![None; device.options().buffers],
            random: Random::new(load.seed),
            data: vec![0; load.block_bytes],
            report: Report::default(),
            load,
            device,
        }
    }

    /// Random reads and writes until `stop`, then waits for all answers. `done` counts requests.
    pub fn run(&mut self, stop: &AtomicBool, done: &AtomicU64) -> Result<(), LoadError> {
        while !stop.load(Ordering::Relaxed) {
            self.put_as_many_as_fit()?;
            done.fetch_add(self.take_answers()?, Ordering::Relaxed);
        }
        self.settle()
    }

    /// Goes on without waiting: puts random requests, if it is to, and takes the answers that are there;
    /// returns how many.
    pub fn step(&mut self, puts: bool) -> Result<u64, LoadError> {
        if puts {
            self.put_as_many_as_fit()?;
        }
        let mut count = 0;
        while let Some(answer) = self.device.next_answer()? {
            self.judge(answer);
            count += 1;
        }
        self.device.arm()?;
        Ok(count)
    }

    /// Whether all requests are answered.
    pub fn is_settled(&self) -> bool {
        self.device.in_flight() == 0
    }

    fn put_as_many_as_fit(&mut self) -> Result<(), LoadError> {
        while self.device.in_flight() < self.load.depth && self.device.free_buffer().is_some() {
            self.put_random();
        }
        Ok(self.device.publish()?)
    }

    /// Reads every block once, in order: what was written is still there, and nothing else is.
    pub fn read_all(&mut self) -> Result<(), LoadError> {
        let mut blocks: VecDeque<usize> =
            (0..self.busy.len()).filter(|block| self.is_known(*block)).collect();
        while !blocks.is_empty() {
            while self.device.in_flight() < self.load.depth
                && self.device.free_buffer().is_some()
                && let Some(block) = blocks.pop_front()
            {
                self.put(op::READ, block);
            }
            self.device.publish()?;
            self.take_answers()?;
        }
        self.settle()
    }

    /// What was seen so far.
    pub fn report(&self) -> Report {
        self.report
    }

    fn settle(&mut self) -> Result<(), LoadError> {
        self.device.publish()?;
        while self.device.in_flight() > 0 {
            self.take_answers()?;
        }
        Ok(())
    }

    fn put_random(&mut self) {
        let choice = self.random.next();
        if self.load.flush_every > 0 && choice.is_multiple_of(self.load.flush_every) {
            return self.put(op::FLUSH_DISKCACHE, 0);
        }
        let wants_read = self.random.next() % 100 < self.load.read_percent;
        let mut block = usize::try_from(self.random.next() >> 16).unwrap_or(0) % self.busy.len();
        while self.busy[block] {
            block = (block + 1) % self.busy.len();
        }
        let operation = if wants_read && self.is_known(block) { op::READ } else { op::WRITE };
        self.put(operation, block);
    }

    fn put(&mut self, operation: u8, block: usize) {
        let buffer = self.device.free_buffer().expect("checked by the caller");
        let is_flush = operation == op::FLUSH_DISKCACHE;
        if operation == op::WRITE && self.load.keeps_data {
            self.oracle.write(self.first_sector(block), &mut self.data);
            self.device.fill(buffer, &self.data);
        }
        let len = if is_flush { 0 } else { self.load.block_bytes };
        let sector = if is_flush { 0 } else { self.first_sector(block) as u64 };
        let taken = self.device.put(operation, self.load.sectors.start + sector, len);
        assert_eq!(taken, buffer);
        self.busy[block] |= !is_flush;
        self.under_way[buffer] = Some(Request { operation, block });
    }

    /// Whether it is known what a block holds.
    fn is_known(&self, block: usize) -> bool {
        self.load.zeroed
            || !self.load.keeps_data
            || self.oracle.is_written(self.first_sector(block))
    }

    fn first_sector(&self, block: usize) -> usize {
        block * (self.load.block_bytes / SECTOR)
    }

    /// Takes all answers that are there; waits for the first one.
    fn take_answers(&mut self) -> Result<u64, LoadError> {
        let mut count = 0;
        let mut looks = 0;
        while self.device.in_flight() > 0 {
            match self.device.next_answer()? {
                Some(answer) => {
                    self.judge(answer);
                    count += 1;
                }
                None if count > 0 => break,
                None if looks < LOOKS_BEFORE_SLEEP => {
                    looks += 1;
                    std::hint::spin_loop();
                }
                // Awake without an answer may happen; asleep through the time-out must not.
                None if looks > LOOKS_BEFORE_SLEEP + WAKE_UPS_WITHOUT_ANSWER => {
                    return Err(LoadError::Silence(self.device.in_flight()));
                }
                None => {
                    looks += 1;
                    self.device.wait(PATIENCE)?;
                }
            }
        }
        Ok(count)
    }

    fn judge(&mut self, answer: Answer) {
        let Some(request) = self.under_way[answer.buffer].take() else { return };
        if request.operation != op::FLUSH_DISKCACHE {
            self.busy[request.block] = false;
        }
        if answer.status != 0 {
            self.report.errors += 1;
            return;
        }
        match request.operation {
            op::READ => {
                self.report.reads += 1;
                if self.load.keeps_data {
                    self.device.drain(answer.buffer, &mut self.data);
                    let first = self.first_sector(request.block);
                    self.report.mismatches += self.oracle.mismatches(first, &self.data) as u64;
                    self.report.verified += 1;
                }
            }
            op::WRITE => self.report.writes += 1,
            _ => self.report.flushes += 1,
        }
    }
}

impl std::ops::AddAssign for Report {
    fn add_assign(&mut self, other: Report) {
        self.verified += other.verified;
        self.mismatches += other.mismatches;
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.errors += other.errors;
    }
}
