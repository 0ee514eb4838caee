use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

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
    ) -> Result<(), Ticket> {
        if random.one_in(8) {
            self.refuses += 1;
            return Err(ticket);
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
        Ok(())
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
            workers: Default::default(),
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
        let taken =
            self.workers[worker].submit(&self.locks, 0, &operation, ticket, |operation, ticket| {
                storage.take(random, worker, operation, ticket)
            });
        if let Err(ticket) = taken {
            assert_eq!(ticket.slot() as usize, index);
            self.refused.push_back(index);
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
            worker.retry(|_, operation, ticket| storage.take(random, number, operation, ticket));
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
            assert!(worker.is_idle() && !worker.is_ready());
            assert_eq!((worker.held_back(), worker.lent), (0, 0));
        }
        assert!(self.locks.try_share(0..u64::MAX).is_some(), "a block that stays locked");
        assert!((0..100).all(|block| self.locks.try_own(block).is_some()));
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

/// Operations below, all taken.
fn all_taken(
    taken: &mut Vec<(String, Ticket)>,
) -> impl FnMut(&IoOp<'_>, Ticket) -> Result<(), Ticket> {
    |operation, ticket| {
        let text = match operation {
            IoOp::Read { offset, buffers } => format!("read {offset}+{}", bytes(buffers)),
            IoOp::Write { offset, buffers } => format!("write {offset}+{}", bytes(buffers)),
            IoOp::Discard { offset, len, .. } => format!("discard {offset}+{len}"),
            IoOp::Flush => "flush".to_owned(),
        };
        taken.push((text, ticket));
        Ok(())
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
        let (mut emulation, mut taken) = (Emulation::default(), Vec::new());
        let ticket = Ticket::new(1, 2);
        emulation.submit(&locks, 0, &operation, ticket, all_taken(&mut taken)).unwrap();
        let texts: Vec<_> = taken.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(texts, [below], "{operation:?}");
    }
}

#[test]
fn a_discard_of_parts_of_blocks_only_is_done_at_once() {
    let (mut emulation, mut taken) = (Emulation::default(), Vec::new());
    let discard = IoOp::Discard { offset: 512, len: 4096, secure: false };
    let locks = BlockLocks::new(4096);
    emulation.submit(&locks, 0, &discard, Ticket::new(1, 2), all_taken(&mut taken)).unwrap();
    assert!(taken.is_empty() && emulation.is_ready() && !emulation.is_idle());
    let mut done = Vec::new();
    emulation.complete(&mut done, 0, |_, _, _| unreachable!());
    assert_eq!(done, [Completion { ticket: Ticket::new(1, 2), result: 0 }]);
}

#[test]
fn an_error_below_is_the_requests_error_and_gives_everything_back() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    for (read, written) in [(-libc::EIO, None), (512, None), (4096, Some(-libc::ENOSPC))] {
        let (mut emulation, mut taken, mut done) = (Emulation::default(), Vec::new(), Vec::new());
        let write = IoOp::Write { offset: 512, buffers: &part };
        let ticket = Ticket::new(1, 2);
        emulation.submit(&locks, 0, &write, ticket, all_taken(&mut taken)).unwrap();
        assert!(locks.try_own(0).is_none());
        let mut results = std::iter::once(read).chain(written);
        while let Some((_, ticket)) = taken.pop() {
            done.push(Completion { ticket, result: results.next().unwrap() });
            let mut below = all_taken(&mut taken);
            emulation.complete(&mut done, 0, |_, operation, ticket| below(operation, ticket));
        }
        assert!(done.len() == 1 && done[0].result < 0, "{done:?}");
        assert!(emulation.is_idle() && locks.try_own(0).is_some());
    }
}

#[test]
fn memory_is_bounded_and_what_finds_none_is_refused_for_now() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(1);
    let part = [pages.page(0).part(0, 512).unwrap()];
    let (mut emulation, mut taken) = (Emulation::default(), Vec::new());
    for number in 0..=EMULATED_PER_WORKER as u64 {
        let read = IoOp::Read { offset: number * 4096 + 512, buffers: &part };
        let ticket = Ticket::new(0, u32::try_from(number).unwrap());
        let result = emulation.submit(&locks, 0, &read, ticket, all_taken(&mut taken));
        assert_eq!(result.is_ok(), number < EMULATED_PER_WORKER as u64);
    }
    let ticket = taken.pop().unwrap().1;
    let mut done = vec![Completion { ticket, result: 4096 }];
    emulation.complete(&mut done, 0, |_, _, _| unreachable!());
    assert_eq!(done[0].result, 512);
    let read = IoOp::Read { offset: 512, buffers: &part };
    emulation.submit(&locks, 0, &read, Ticket::new(0, 99), all_taken(&mut taken)).unwrap();
}

#[test]
fn a_short_read_shows_nothing_that_others_read() {
    let locks = BlockLocks::new(4096);
    let pages = LocalPages::new(2);
    let into = [pages.page(0), pages.page(1)];
    let (mut emulation, mut taken) = (Emulation::default(), Vec::new());
    for (moved, result, shown) in [(12288, 8192, 8192), (4096, 3584, 3584), (0, 0, 0)] {
        into.iter().for_each(|page| page.zero());
        let read = IoOp::Read { offset: 512, buffers: &into };
        let mut below = |operation: &IoOp<'_>, ticket| {
            let IoOp::Read { buffers, .. } = operation else { unreachable!() };
            if moved == 12288 {
                buffers.iter().for_each(|buffer| buffer.copy_from(&[0xee; 4096]));
            }
            taken.push(ticket);
            Ok(())
        };
        emulation.submit(&locks, 0, &read, Ticket::new(1, 2), &mut below).unwrap();
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
