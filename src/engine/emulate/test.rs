use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::backing::Tail;
use crate::engine::layer::test::Below;
use crate::park;
use crate::sim::random::Random;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const SECTORS: usize = 400;

/// Storage of whole blocks. It does some operations at once, and the others in any order as it completes
/// them.
#[derive(Debug)]
struct Storage {
    random: Random,
    data: Vec<u8>,
    taken: Vec<Taken>,
    /// By worker.
    completed: [Vec<Completion>; 2],
    refuses: usize,
}

/// A worker's way to the storage.
#[derive(Debug)]
struct Way {
    worker: usize,
    storage: Rc<RefCell<Storage>>,
}

impl Layer for Way {
    type Target = ();

    fn submit(&mut self, (): &(), operation: &IoOp<'_>, ticket: Ticket, _: By) -> Submitted {
        self.storage.borrow_mut().take(self.worker, operation, ticket)
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.storage.borrow_mut().completed[self.worker]);
    }

    fn in_flight(&self) -> usize {
        let storage = self.storage.borrow();
        let taken = storage.taken.iter().filter(|taken| taken.worker == self.worker).count();
        taken + storage.completed[self.worker].len()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(!self.storage.borrow().completed[self.worker].is_empty())
    }
}

#[derive(Debug)]
struct Taken {
    worker: usize,
    ticket: Ticket,
    kind: Kind,
    offset: usize,
    len: usize,
    buffers: Vec<GuestBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Read,
    Write,
    Discard,
    Flush,
}

impl Storage {
    fn take(&mut self, worker: usize, operation: &IoOp<'_>, ticket: Ticket) -> Submitted {
        if self.random.one_in(8) {
            self.refuses += 1;
            return Submitted::Full(ticket);
        }
        let (kind, offset, len, buffers) = match *operation {
            IoOp::Read { offset, buffers } => (Kind::Read, offset, bytes(buffers).into(), buffers),
            IoOp::Write { offset, buffers } => {
                (Kind::Write, offset, bytes(buffers).into(), buffers)
            }
            IoOp::Discard { offset, len, .. } => (Kind::Discard, offset, len, &[][..]),
            IoOp::Flush => (Kind::Flush, 0, 0, &[][..]),
        };
        let (offset, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        assert!(offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK), "{offset} {len}");
        assert!(offset + len <= self.data.len());
        if !buffers.is_empty() {
            assert_eq!(straight_bytes(buffers, 4096) as usize, len, "odd stretches of memory");
        }
        let taken = Taken { worker, ticket, kind, offset, len, buffers: buffers.to_vec() };
        if self.random.one_in(8) {
            return Submitted::Done(self.execute(taken));
        }
        self.taken.push(taken);
        Submitted::Started
    }

    /// Completes any one of what was taken.
    fn complete_one(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let taken = self.taken.swap_remove(self.random.below(self.taken.len()));
        let worker = taken.worker;
        let completion = self.execute(taken);
        self.completed[worker].push(completion);
    }

    /// Does an operation, perhaps only on its first blocks.
    fn execute(&mut self, taken: Taken) -> Completion {
        let Taken { ticket, kind, offset, mut len, buffers, .. } = taken;
        if kind != Kind::Discard && len > BLOCK && self.random.one_in(4) {
            len = BLOCK * (1 + self.random.below(len / BLOCK - 1));
        }
        let data = &mut self.data[offset..offset + len];
        let mut at = 0;
        for buffer in &buffers {
            let end = (at + buffer.len() as usize).min(len);
            match kind {
                Kind::Read => buffer.copy_from(&data[at..end]),
                _ => buffer.copy_to(&mut data[at..end]),
            }
            at = end;
        }
        let moved = match kind {
            Kind::Discard => {
                data.fill(0);
                0
            }
            _ => i32::try_from(len).unwrap(),
        };
        Completion { ticket, result: moved }
    }
}

/// A request of a guest, as a queue executes it.
struct Request {
    worker: usize,
    kind: Kind,
    first: usize,
    count: usize,
    buffers: Vec<GuestBuf>,
    data: Vec<u8>,
    moved: usize,
    _pages: LocalPages,
}

impl Request {
    fn new(random: &mut Random, number: u8, first: usize, count: usize) -> Request {
        let pages = LocalPages::new(count);
        let kind = [Kind::Read, Kind::Write, Kind::Write, Kind::Discard][random.below(4)];
        let whole_pages = random.one_in(2);
        let mut buffers = Vec::new();
        let mut left = count;
        for page in 0.. {
            if left == 0 {
                break;
            }
            let start = if whole_pages { 0 } else { random.below(8) };
            let most = (8 - start).min(left);
            let len = if whole_pages { most } else { 1 + random.below(most) };
            let at = |sectors: usize| u32::try_from(sectors * SECTOR).unwrap();
            buffers.push(pages.page(page).part(at(start), at(len)).unwrap());
            left -= len;
        }
        let mut data = vec![0; count * SECTOR];
        for (sector, bytes) in data.chunks_mut(SECTOR).enumerate() {
            bytes.fill(number.wrapping_mul(31).wrapping_add(u8::try_from(sector % 7).unwrap()));
        }
        if kind == Kind::Write {
            let mut rest = &data[..];
            for buffer in &buffers {
                let (part, after) = rest.split_at(buffer.len() as usize);
                buffer.copy_from(part);
                rest = after;
            }
        }
        let worker = random.below(2);
        Request { worker, kind, first, count, buffers, data, moved: 0, _pages: pages }
    }

    /// What is left of the buffers after a short transfer.
    fn left(&self) -> Vec<GuestBuf> {
        let mut skip = u32::try_from(self.moved).unwrap();
        let rest = |buffer: &GuestBuf| {
            let skipped = skip.min(buffer.len());
            skip -= skipped;
            buffer.part(skipped, buffer.len() - skipped).filter(|part| !part.is_empty())
        };
        self.buffers.iter().filter_map(rest).collect()
    }

    fn read(&self) -> Vec<u8> {
        let mut data = vec![0; self.count * SECTOR];
        let mut rest = &mut data[..];
        for buffer in &self.buffers {
            let (part, after) = rest.split_at_mut(buffer.len() as usize);
            buffer.copy_to(part);
            rest = after;
        }
        data
    }
}

/// Two workers on one image, and a model of its contents.
struct World {
    random: Random,
    target: EmulationTarget<()>,
    workers: [Emulated<Way>; 2],
    storage: Rc<RefCell<Storage>>,
    model: Vec<u8>,
    busy: Vec<bool>,
    requests: Slab<Request>,
    refused: VecDeque<usize>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random::new(seed);
        let data: Vec<u8> =
            (0..SECTORS * SECTOR).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
        let storage = Rc::new(RefCell::new(Storage {
            random: Random::new(seed.rotate_left(32)),
            data: data.clone(),
            taken: Vec::new(),
            completed: Default::default(),
            refuses: 0,
        }));
        World {
            random,
            target: blocks(),
            workers: [0, 1].map(|worker| emulated(Way { worker, storage: Rc::clone(&storage) })),
            model: data,
            storage,
            busy: vec![false; SECTORS],
            requests: Slab::new(),
            refused: VecDeque::new(),
        }
    }

    /// Begins a request for sectors that no other request uses, though others may use their blocks.
    fn begin(&mut self, number: u8) {
        let longest = if self.random.one_in(10) { 300 } else { 20 };
        let count = 1 + self.random.below(longest);
        let first = self.random.below(SECTORS - count);
        let sectors = first..first + count;
        if self.busy[sectors.clone()].iter().any(|busy| *busy) {
            return;
        }
        self.busy[sectors].fill(true);
        let request = Request::new(&mut self.random, number, first, count);
        let index = self.requests.insert(request);
        self.submit(index);
    }

    fn submit(&mut self, index: usize) {
        let request = &self.requests[index];
        let (worker, buffers) = (request.worker, request.left());
        let offset = (request.first * SECTOR + request.moved) as u64;
        let operation = match request.kind {
            Kind::Read => IoOp::Read { offset, buffers: &buffers },
            Kind::Write => IoOp::Write { offset, buffers: &buffers },
            _ => IoOp::Discard { offset, len: (request.count * SECTOR) as u64, secure: false },
        };
        let ticket = Ticket::new(3, u32::try_from(index).unwrap());
        match self.workers[worker].submit(&self.target, &operation, ticket, By::Worker) {
            Submitted::Started | Submitted::Parked => {}
            Submitted::Done(completion) => self.finish(&completion),
            Submitted::Full(ticket) => {
                assert_eq!(ticket.slot() as usize, index);
                self.refused.push_back(index);
            }
        }
    }

    /// Tries again what was refused, and completes something.
    fn go_on(&mut self) {
        for _ in 0..self.refused.len() {
            if let Some(index) = self.refused.pop_front() {
                self.submit(index);
            }
        }
        let mut done = Vec::new();
        self.storage.borrow_mut().complete_one();
        for worker in &mut self.workers {
            // A worker sleeps unless something has completed or can be done at once.
            if worker.arm().unwrap() {
                worker.reap(&mut done);
            }
        }
        done.into_iter().for_each(|completion| self.finish(&completion));
    }

    fn finish(&mut self, completion: &Completion) {
        assert_eq!(completion.ticket.queue(), 3);
        let index = completion.ticket.slot() as usize;
        let request = &mut self.requests[index];
        let (first, end) = (request.first * SECTOR, (request.first + request.count) * SECTOR);
        if request.kind == Kind::Discard {
            assert_eq!(completion.result, 0);
            let whole = first.next_multiple_of(BLOCK)..end / BLOCK * BLOCK;
            if !whole.is_empty() {
                self.model[whole].fill(0);
            }
        } else {
            assert!(completion.result > 0, "{}", completion.result);
            request.moved += usize::try_from(completion.result).unwrap();
            assert!(request.moved <= end - first);
            if request.moved < end - first {
                return self.submit(index);
            }
            match request.kind {
                Kind::Write => self.model[first..end].copy_from_slice(&request.data),
                _ => assert_eq!(request.read(), self.model[first..end], "what is read"),
            }
        }
        self.busy[request.first..request.first + request.count].fill(false);
        self.requests.remove(index);
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            if self.requests.is_empty() {
                break;
            }
            self.go_on();
        }
        assert!(self.requests.is_empty(), "requests that never end");
        for worker in &self.workers {
            assert!(worker.is_idle() && !worker.is_ready() && worker.in_flight() == 0);
        }
        let (locks, noone) = (self.target.locks.as_ref().unwrap(), Waker::noop());
        assert!(locks.try_share(0..u64::MAX, noone).is_some(), "a block that stays locked");
        assert!((0..100).all(|block| locks.try_own(block, noone).is_some()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 100, ..ProptestConfig::default() })]

    /// Two workers, requests that share blocks but no sectors, and storage that completes at once or
    /// in any order, perhaps in part, and often has no room.
    #[test]
    fn every_sector_holds_what_was_written_to_it(seed in any::<u64>()) {
        let mut world = World::new(seed);
        for number in 0..200u8 {
            world.begin(number);
            if world.random.one_in(3) {
                world.go_on();
            }
        }
        world.settle();
        let storage = world.storage.borrow();
        prop_assert!(storage.data == world.model);
        prop_assert!(storage.refuses > 0);
    }
}

fn emulated<B: Layer<Target: Clone>>(below: B) -> Emulated<B> {
    Emulated::new(below, Doorbell::new().unwrap())
}

fn blocks() -> EmulationTarget<()> {
    EmulationTarget { locks: Some(BlockLocks::new(4096)), tail: None, below: () }
}

fn reap<B: Layer<Target: Clone>>(emulated: &mut Emulated<B>) -> Vec<Completion> {
    let mut done = Vec::new();
    emulated.reap(&mut done);
    done
}

#[test]
fn whole_blocks_go_straight_and_parts_go_through_memory() {
    let (blocks, pages) = (blocks(), LocalPages::new(8));
    let page = |index: usize, start, len| pages.page(index).part(start, len).unwrap();
    let two_pages = [page(0, 0, 4096), page(1, 0, 4096)];
    let odd = [page(0, 512, 512), page(3, 0, 3584)];
    for (operation, below) in [
        (IoOp::Read { offset: 4096, buffers: &two_pages }, "read 4096+8192"),
        (IoOp::Write { offset: 4096, buffers: &two_pages }, "write 4096+8192"),
        (IoOp::Read { offset: 4096, buffers: &odd }, "read 4096+4096"),
        (IoOp::Write { offset: 4096, buffers: &odd }, "write 4096+4096"),
        (IoOp::Read { offset: 512, buffers: &two_pages }, "read 0+12288"),
        (IoOp::Write { offset: 512, buffers: &two_pages }, "read 0+4096"),
        (IoOp::Write { offset: 4096, buffers: &two_pages[..1] }, "write 4096+4096"),
        (IoOp::Write { offset: 8192, buffers: &odd[..1] }, "read 8192+4096"),
        (IoOp::Discard { offset: 512, len: 8192, secure: false }, "discard 4096+4096"),
        (IoOp::Flush, "flush"),
    ] {
        let mut emulated = emulated(Below::new());
        let submitted = emulated.submit(&blocks, &operation, Ticket::new(1, 2), By::Worker);
        assert_eq!(submitted, Submitted::Started);
        assert_eq!(emulated.below.texts(), [below], "{operation:?}");
    }
}

#[test]
fn sectors_that_are_whole_blocks_are_passed_on_as_they_are() {
    let target = EmulationTarget { locks: None, ..blocks() };
    let (mut emulated, pages) = (emulated(Below::new()), LocalPages::new(1));
    let write = IoOp::Write { offset: 512, buffers: &[pages.page(0).part(0, 512).unwrap()] };
    let discard = IoOp::Discard { offset: 512, len: 512, secure: false };
    for operation in [write, discard] {
        let submitted = emulated.submit(&target, &operation, Ticket::new(1, 2), By::Thread);
        assert_eq!(submitted, Submitted::Started);
        let taken = emulated.below.taken.last().unwrap();
        assert_eq!((&taken.ticket, taken.by), (&Ticket::new(1, 2), By::Thread));
    }
    assert_eq!(emulated.below.texts(), ["write 512+512", "discard 512+512"]);
}

#[test]
fn a_transfer_ends_before_the_tail_which_takes_any_sectors() {
    let tail = Some(Tail { start: 8192, below: "tail" });
    let target = EmulationTarget { locks: blocks().locks, tail, below: "blocks" };
    let pages = LocalPages::new(2);
    let into = [pages.page(0), pages.page(1)];
    for (offset, len, expected) in [
        (0, 8192, ("blocks", "write 0+8192")),
        (4096, 8192, ("blocks", "write 4096+4096")),
        (7168, 4096, ("blocks", "read 4096+4096")),
        (8192, 512, ("tail", "write 8192+512")),
        (8704, 1024, ("tail", "write 8704+1024")),
    ] {
        let mut emulated = emulated(Below::new());
        let mut buffers = Vec::new();
        cut(&into, len, &mut buffers);
        let write = IoOp::Write { offset, buffers: &buffers };
        let submitted = emulated.submit(&target, &write, Ticket::new(1, 2), By::Worker);
        assert_eq!(submitted, Submitted::Started);
        let taken = emulated.below.taken.pop().unwrap();
        assert_eq!((taken.target, taken.text.as_str()), expected);
    }
}

#[test]
fn a_discard_of_parts_of_blocks_only_is_done_at_once() {
    let mut emulated = emulated(Below::new());
    let discard = IoOp::Discard { offset: 512, len: 4096, secure: false };
    let submitted = emulated.submit(&blocks(), &discard, Ticket::new(1, 2), By::Worker);
    let done = Completion { ticket: Ticket::new(1, 2), result: 0 };
    assert_eq!(submitted, Submitted::Done(done));
    assert!(emulated.below.taken.is_empty() && emulated.is_idle());
}

#[test]
fn an_error_below_is_the_requests_error_and_gives_everything_back() {
    let (blocks, pages) = (blocks(), LocalPages::new(1));
    let part = [pages.page(0).part(0, 512).unwrap()];
    let is_locked =
        || blocks.locks.as_ref().is_some_and(|locks| locks.try_own(0, Waker::noop()).is_none());
    for (read, written) in [(-libc::EIO, None), (512, None), (4096, Some(-libc::ENOSPC))] {
        let mut emulated = emulated(Below::new());
        let write = IoOp::Write { offset: 512, buffers: &part };
        let _ = emulated.submit(&blocks, &write, Ticket::new(1, 2), By::Worker);
        let mut done = Vec::new();
        for result in std::iter::once(read).chain(written) {
            assert!(is_locked() && done.is_empty());
            emulated.below.complete(result);
            emulated.reap(&mut done);
        }
        assert!(done.len() == 1 && done[0].result < 0, "{done:?}");
        assert!(emulated.is_idle() && emulated.in_flight() == 0 && !is_locked());
    }
}

/// Reads a part of block `number`, for a queue.
fn read_part(
    emulated: &mut Emulated<Below<()>>,
    blocks: &EmulationTarget<()>,
    (queue, number): (u32, u32),
) -> Submitted {
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    let read = IoOp::Read { offset: u64::from(number) * 4096 + 512, buffers: &part };
    // The data is copied to them later.
    std::mem::forget(pages);
    emulated.submit(blocks, &read, Ticket::new(queue, number), By::Worker)
}

#[test]
fn a_queue_always_finds_some_memory_and_what_finds_none_goes_on_by_itself() {
    let (mut emulated, blocks) = (emulated(Below::new()), blocks());
    let all = u32::try_from(EMULATED_PER_QUEUE + EMULATED_COMMON).unwrap();
    for number in 0..all + 2 {
        let submitted = read_part(&mut emulated, &blocks, (0, number));
        assert_eq!(submitted == Submitted::Started, number < all);
    }
    for number in 0..3 {
        let submitted = read_part(&mut emulated, &blocks, (1, number));
        assert_eq!(submitted == Submitted::Started, number < 2, "its own part is there");
    }
    assert_eq!((emulated.held_back(), emulated.arm().unwrap()), (3, false));
    emulated.below.complete(4096);
    assert_eq!(reap(&mut emulated), [Completion { ticket: Ticket::new(0, 0), result: 512 }]);
    assert_eq!(*emulated.below.texts().last().unwrap(), format!("read {}+4096", all * 4096));
    assert_eq!(emulated.held_back(), 2);
}

#[test]
fn who_waits_for_another_workers_block_is_woken_when_it_is_given_back() {
    let (blocks, bells) = (blocks(), [(); 2].map(|()| Doorbell::new().unwrap()));
    let mut workers = bells.each_ref().map(|bell| Emulated::new(Below::new(), bell.clone()));
    let pages = LocalPages::new(1);
    let write = IoOp::Write { offset: 512, buffers: &[pages.page(0).part(0, 512).unwrap()] };
    for (worker, expected) in [(0, Submitted::Started), (1, Submitted::Parked)] {
        let submitted = workers[worker].submit(&blocks, &write, Ticket::new(0, 0), By::Worker);
        assert_eq!(submitted, expected);
    }
    let rung =
        |worker: usize| park::sleep(&[bells[worker].as_fd()], Some(std::time::Duration::ZERO))[0];
    assert!(!workers[1].arm().unwrap() && !rung(1), "it sleeps meanwhile");
    for result in [4096, 4096] {
        workers[0].below.complete(result);
        let _ = reap(&mut workers[0]);
    }
    assert!(workers[1].arm().unwrap() && rung(1));
    assert_eq!(reap(&mut workers[1]), []);
    assert_eq!(workers[1].below.texts(), ["read 0+4096"]);
    assert!(!workers[1].is_ready() && workers[1].held_back() == 0);
}

#[test]
fn a_discard_and_a_write_of_a_part_of_its_block_wait_for_each_other() {
    let (blocks, pages) = (blocks(), LocalPages::new(1));
    let part = [pages.page(0).part(0, 512).unwrap()];
    let write = IoOp::Write { offset: 4096 + 512, buffers: &part };
    let discard = IoOp::Discard { offset: 0, len: 3 * 4096, secure: false };
    for operations in [[&write, &discard], [&discard, &write]] {
        let mut emulated = emulated(Below::new());
        for (queue, operation) in (0..).zip(operations) {
            let submitted = emulated.submit(&blocks, operation, Ticket::new(queue, 0), By::Worker);
            assert_eq!(submitted == Submitted::Parked, queue == 1, "{operation:?}");
        }
    }
}

/// Starts everything, and calls the test for each operation.
struct OnSubmit<F>(F);

impl<F: FnMut()> Layer for OnSubmit<F> {
    type Target = ();

    fn submit(&mut self, (): &(), _: &IoOp<'_>, _: Ticket, _: By) -> Submitted {
        (self.0)();
        Submitted::Started
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _: &mut Vec<Completion>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

#[test]
fn a_block_that_is_given_back_just_after_it_was_found_taken_is_tried_again() {
    let (blocks, pages) = (blocks(), LocalPages::new(1));
    let part = [pages.page(0).part(0, 512).unwrap()];
    let own = |block| blocks.locks.as_ref().and_then(|locks| locks.try_own(block, Waker::noop()));
    // Whichever queue has the first turn, in one of the two cases it is the one that has to wait on.
    for stays_taken in [0, 1] {
        let (held, begun) = (RefCell::new([own(0), own(1)]), Cell::new(0));
        let mut emulated = emulated(OnSubmit(|| {
            begun.set(begun.get() + 1);
            drop(held.borrow_mut()[stays_taken].take());
        }));
        for queue in [0, 1] {
            let write = IoOp::Write { offset: u64::from(queue) * 4096 + 512, buffers: &part };
            let submitted = emulated.submit(&blocks, &write, Ticket::new(queue, 0), By::Worker);
            assert_eq!(submitted, Submitted::Parked);
        }
        drop(held.borrow_mut()[1 - stays_taken].take());
        while emulated.is_ready() {
            emulated.reap(&mut Vec::new());
        }
        assert_eq!((begun.get(), emulated.held_back()), (2, 0));
    }
}

#[test]
fn a_short_read_shows_nothing_that_others_read() {
    let (mut emulated, blocks, pages) = (emulated(Below::new()), blocks(), LocalPages::new(2));
    let into = [pages.page(0), pages.page(1)];
    for (moved, result, shown) in [(12288, 8192, 8192), (4096, 3584, 3584), (0, 0, 0)] {
        into.iter().for_each(|page| page.zero());
        let read = IoOp::Read { offset: 512, buffers: &into };
        let submitted = emulated.submit(&blocks, &read, Ticket::new(1, 2), By::Worker);
        assert_eq!(submitted, Submitted::Started);
        if moved == 12288 {
            let buffers = &emulated.below.taken[0].buffers;
            buffers.iter().for_each(|buffer| buffer.copy_from(&[0xee; 4096]));
        }
        emulated.below.complete(moved);
        assert_eq!(reap(&mut emulated), [Completion { ticket: Ticket::new(1, 2), result }]);
        let mut data = [0; 8192];
        let (first, second) = data.split_at_mut(4096);
        pages.page(0).copy_to(first);
        pages.page(1).copy_to(second);
        assert_eq!(data.iter().filter(|byte| **byte == 0xee).count(), shown);
    }
}
