use std::collections::VecDeque;

use proptest::prelude::*;

use std::os::fd::AsFd;

use super::*;
use crate::park;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const SECTORS: usize = 400;

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % end
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

/// Storage of whole blocks. What an operation does happens when it completes, in any order.
struct Storage {
    data: Vec<u8>,
    taken: Vec<Taken>,
    refuses: usize,
}

struct Taken {
    worker: usize,
    ticket: Ticket,
    kind: Kind,
    offset: usize,
    len: usize,
    buffers: Vec<GuestBuf>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    Discard,
    Flush,
}

impl Storage {
    fn take(
        &mut self,
        random: &mut Random,
        worker: usize,
        operation: &IoOp<'_>,
        ticket: Ticket,
    ) -> Submitted {
        if random.one_in(8) {
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
        self.taken.push(Taken { worker, ticket, kind, offset, len, buffers: buffers.to_vec() });
        Submitted::Started
    }

    /// Completes any one of what was taken, perhaps only its first blocks.
    fn complete_one(&mut self, random: &mut Random) -> Option<(usize, Completion)> {
        if self.taken.is_empty() {
            return None;
        }
        let Taken { worker, ticket, kind, offset, mut len, buffers } =
            self.taken.swap_remove(random.below(self.taken.len()));
        if kind != Kind::Discard && len > BLOCK && random.one_in(4) {
            len = BLOCK * (1 + random.below(len / BLOCK - 1));
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
        Some((worker, Completion { ticket, result: moved }))
    }
}

/// A request of a guest, as a queue carries it.
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

/// Two workers on one image, and what it must hold.
struct World {
    random: Random,
    locks: Arc<BlockLocks>,
    target: Target,
    workers: [Emulation; 2],
    storage: Storage,
    model: Vec<u8>,
    busy: Vec<bool>,
    requests: Slab<Request>,
    refused: VecDeque<usize>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed | 1);
        let data: Vec<u8> =
            (0..SECTORS * SECTOR).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
        World {
            random,
            locks: BlockLocks::new(4096),
            target: Target { file: 0, device: None, by: crate::engine::By::Worker },
            workers: [emulation(), emulation()],
            model: data.clone(),
            storage: Storage { data, taken: Vec::new(), refuses: 0 },
            busy: vec![false; SECTORS],
            requests: Slab::new(),
            refused: VecDeque::new(),
        }
    }

    /// Begins a request for sectors that no other one is for; their blocks may be others', too.
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
        let (storage, random) = (&mut self.storage, &mut self.random);
        let ticket = Ticket::new(3, u32::try_from(index).unwrap());
        let below = |_: &Target, operation: &IoOp<'_>, ticket| {
            storage.take(random, worker, operation, ticket)
        };
        let emulation = &mut self.workers[worker];
        match emulation.submit(&self.locks, &self.target, &operation, ticket, below) {
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
        let (storage, random) = (&mut self.storage, &mut self.random);
        let mut completed = storage.complete_one(random);
        for (number, worker) in self.workers.iter_mut().enumerate() {
            let mut own = Vec::new();
            if let Some((_, completion)) = completed.take_if(|(owner, _)| *owner == number) {
                own.push(completion);
            }
            // A worker without events sleeps unless something is to be done at once.
            if own.is_empty() && !worker.is_ready() {
                continue;
            }
            worker.complete(&mut own, 0, |_, operation, ticket| {
                storage.take(random, number, operation, ticket)
            });
            done.append(&mut own);
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
            assert!(worker.is_idle() && !worker.is_ready() && worker.held_back() == 0);
        }
        let noone = Waker::noop();
        assert!(self.locks.try_share(0..u64::MAX, noone).is_some(), "a block that stays locked");
        assert!((0..100).all(|block| self.locks.try_own(block, noone).is_some()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 100, ..ProptestConfig::default() })]

    /// Two workers, requests whose blocks overlap though their sectors do not, storage that
    /// completes in any order, in part, and often has no room.
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
        prop_assert!(world.storage.data == world.model);
        prop_assert!(world.storage.refuses > 0);
    }
}

fn emulation() -> Emulation {
    Emulation::new(Doorbell::new().unwrap())
}

const FILE: Target = Target { file: 0, device: None, by: crate::engine::By::Worker };

/// Operations below, all taken.
fn all_taken(
    taken: &mut Vec<(String, Ticket)>,
) -> impl FnMut(&Target, &IoOp<'_>, Ticket) -> Submitted {
    |_, operation, ticket| {
        let text = match operation {
            IoOp::Read { offset, buffers } => format!("read {offset}+{}", bytes(buffers)),
            IoOp::Write { offset, buffers } => format!("write {offset}+{}", bytes(buffers)),
            IoOp::Discard { offset, len, .. } => format!("discard {offset}+{len}"),
            IoOp::Flush => "flush".to_owned(),
        };
        taken.push((text, ticket));
        Submitted::Started
    }
}

#[test]
fn whole_blocks_go_straight_and_parts_go_through_memory() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(8);
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
        let (mut emulation, mut taken) = (emulation(), Vec::new());
        let ticket = Ticket::new(1, 2);
        let submitted = emulation.submit(&locks, &FILE, &operation, ticket, all_taken(&mut taken));
        assert_eq!(submitted, Submitted::Started);
        let texts: Vec<_> = taken.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(texts, [below], "{operation:?}");
    }
}

#[test]
fn a_discard_of_parts_of_blocks_only_is_done_at_once() {
    let (mut emulation, mut taken) = (emulation(), Vec::new());
    let discard = IoOp::Discard { offset: 512, len: 4096, secure: false };
    let (locks, ticket) = (BlockLocks::new(4096), Ticket::new(1, 2));
    let submitted = emulation.submit(&locks, &FILE, &discard, ticket, all_taken(&mut taken));
    let done = Completion { ticket: Ticket::new(1, 2), result: 0 };
    assert_eq!(submitted, Submitted::Done(done));
    assert!(taken.is_empty() && emulation.is_idle());
}

#[test]
fn an_error_below_is_the_requests_error_and_gives_everything_back() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    for (read, written) in [(-libc::EIO, None), (512, None), (4096, Some(-libc::ENOSPC))] {
        let (mut emulation, mut taken, mut done) = (emulation(), Vec::new(), Vec::new());
        let write = IoOp::Write { offset: 512, buffers: &part };
        let ticket = Ticket::new(1, 2);
        let _ = emulation.submit(&locks, &FILE, &write, ticket, all_taken(&mut taken));
        assert!(locks.try_own(0, Waker::noop()).is_none());
        let mut results = std::iter::once(read).chain(written);
        while let Some((_, ticket)) = taken.pop() {
            done.push(Completion { ticket, result: results.next().unwrap() });
            let mut below = all_taken(&mut taken);
            emulation.complete(&mut done, 0, &mut below);
        }
        assert!(done.len() == 1 && done[0].result < 0, "{done:?}");
        assert!(emulation.is_idle() && locks.try_own(0, Waker::noop()).is_some());
    }
}

/// A read of a part of block `number`, for a queue.
fn read_part(
    emulation: &mut Emulation,
    locks: &Arc<BlockLocks>,
    (queue, number): (u32, u32),
    taken: &mut Vec<(String, Ticket)>,
) -> Submitted {
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    let read = IoOp::Read { offset: u64::from(number) * 4096 + 512, buffers: &part };
    // Nothing is read into them.
    std::mem::forget(pages);
    emulation.submit(locks, &FILE, &read, Ticket::new(queue, number), all_taken(taken))
}

#[test]
fn a_queue_always_finds_some_memory_and_what_finds_none_goes_on_by_itself() {
    let locks = BlockLocks::new(4096);
    let (mut emulation, mut taken) = (emulation(), Vec::new());
    let all = u32::try_from(EMULATED_PER_QUEUE + EMULATED_COMMON).unwrap();
    for number in 0..all + 2 {
        let submitted = read_part(&mut emulation, &locks, (0, number), &mut taken);
        assert_eq!(submitted == Submitted::Started, number < all);
    }
    for number in 0..3 {
        let submitted = read_part(&mut emulation, &locks, (1, number), &mut taken);
        assert_eq!(submitted == Submitted::Started, number < 2, "its own part is there");
    }
    assert_eq!((emulation.held_back(), emulation.is_ready()), (3, false));
    let (_, ticket) = taken.remove(0);
    let mut done = vec![Completion { ticket, result: 4096 }];
    emulation.complete(&mut done, 0, all_taken(&mut taken));
    assert_eq!(done, [Completion { ticket: Ticket::new(0, 0), result: 512 }]);
    assert_eq!(taken.last().unwrap().0, format!("read {}+4096", all * 4096));
    assert_eq!(emulation.held_back(), 2);
}

#[test]
fn who_waits_for_another_workers_block_is_woken_when_it_is_given_back() {
    let (locks, bells) = (BlockLocks::new(4096), [(); 2].map(|()| Doorbell::new().unwrap()));
    let mut workers = bells.each_ref().map(|bell| Emulation::new(bell.clone()));
    let pages = LocalPages::new(1);
    let write = IoOp::Write { offset: 512, buffers: &[pages.page(0).part(0, 512).unwrap()] };
    let mut taken = [Vec::new(), Vec::new()];
    for (worker, expected) in [(0, Submitted::Started), (1, Submitted::Parked)] {
        let (below, ticket) = (all_taken(&mut taken[worker]), Ticket::new(0, 0));
        let submitted = workers[worker].submit(&locks, &FILE, &write, ticket, below);
        assert_eq!(submitted, expected);
    }
    let rung =
        |worker: usize| park::sleep(&[bells[worker].as_fd()], Some(std::time::Duration::ZERO))[0];
    assert!(!workers[1].is_ready() && !rung(1), "it sleeps meanwhile");
    for result in [4096, 4096] {
        let mut done = vec![Completion { ticket: taken[0].pop().unwrap().1, result }];
        workers[0].complete(&mut done, 0, all_taken(&mut taken[0]));
    }
    assert!(workers[1].is_ready() && rung(1));
    workers[1].complete(&mut Vec::new(), 0, all_taken(&mut taken[1]));
    assert_eq!(taken[1].pop().unwrap().0, "read 0+4096");
    assert!(!workers[1].is_ready() && workers[1].held_back() == 0);
}

#[test]
fn a_discard_and_a_write_of_a_part_of_its_block_wait_for_each_other() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    let write = IoOp::Write { offset: 4096 + 512, buffers: &part };
    let discard = IoOp::Discard { offset: 0, len: 3 * 4096, secure: false };
    for operations in [[&write, &discard], [&discard, &write]] {
        let (mut emulation, mut taken) = (emulation(), Vec::new());
        for (queue, operation) in (0..).zip(operations) {
            let ticket = Ticket::new(queue, 0);
            let submitted =
                emulation.submit(&locks, &FILE, operation, ticket, all_taken(&mut taken));
            assert_eq!(submitted == Submitted::Parked, queue == 1, "{operation:?}");
        }
    }
}

#[test]
fn a_block_that_is_given_back_just_after_it_was_found_taken_is_tried_again() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    let own = |block| locks.try_own(block, Waker::noop());
    // Whichever queue has the first turn, in one of the two it is the one that has to wait on.
    for stays_taken in [0, 1] {
        let (mut emulation, mut begun) = (emulation(), 0);
        let mut held = [own(0), own(1)];
        for queue in [0, 1] {
            let write = IoOp::Write { offset: u64::from(queue) * 4096 + 512, buffers: &part };
            let ticket = Ticket::new(queue, 0);
            let submitted =
                emulation.submit(&locks, &FILE, &write, ticket, |_, _, _| unreachable!());
            assert_eq!(submitted, Submitted::Parked);
        }
        drop(held[1 - stays_taken].take());
        while emulation.is_ready() {
            emulation.complete(&mut Vec::new(), 0, |_, _, _| {
                begun += 1;
                drop(held[stays_taken].take());
                Submitted::Started
            });
        }
        assert_eq!((begun, emulation.held_back()), (2, 0));
    }
}

#[test]
fn a_short_read_shows_nothing_that_others_read() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(2);
    let into = [pages.page(0), pages.page(1)];
    let (mut emulation, mut taken) = (emulation(), Vec::new());
    for (moved, result, shown) in [(12288, 8192, 8192), (4096, 3584, 3584), (0, 0, 0)] {
        into.iter().for_each(|page| page.zero());
        let read = IoOp::Read { offset: 512, buffers: &into };
        let mut below = |_: &Target, operation: &IoOp<'_>, ticket| {
            let IoOp::Read { buffers, .. } = operation else { unreachable!() };
            if moved == 12288 {
                buffers.iter().for_each(|buffer| buffer.copy_from(&[0xee; 4096]));
            }
            taken.push(ticket);
            Submitted::Started
        };
        let submitted = emulation.submit(&locks, &FILE, &read, Ticket::new(1, 2), &mut below);
        assert_eq!(submitted, Submitted::Started);
        let mut done = vec![Completion { ticket: taken.pop().unwrap(), result: moved }];
        emulation.complete(&mut done, 0, |_, _, _| unreachable!());
        assert_eq!(done, [Completion { ticket: Ticket::new(1, 2), result }]);
        let mut data = [0; 8192];
        let (first, second) = data.split_at_mut(4096);
        pages.page(0).copy_to(first);
        pages.page(1).copy_to(second);
        assert_eq!(data.iter().filter(|byte| **byte == 0xee).count(), shown);
    }
}
