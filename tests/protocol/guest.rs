//! A guest that plays requests on all queues of a disk and checks each answer.

use std::ops::Range;
use std::time::{Duration, Instant};

use polldisk::blkif::codec::{RawDiscard, RawIndirect, RawRequest, RawSegment};
use polldisk::blkif::op;
use polldisk::sim::blkfront::device::{Answer, Device, Options};
use polldisk::sim::blkfront::oracle::{Oracle, SECTOR};
use polldisk::units::GrantRef;

use crate::draw::{Combination, ERROR, Fault, NOT_SUPPORTED, OKAY, Request, SECTORS, Segment};

/// Only a hang takes this long.
pub const HANG: Duration = Duration::from_secs(60);

const PAGE_BYTES: usize = 4096;

/// What a page holds before a read. No sector of any disk looks like this.
const POISON: [u8; PAGE_BYTES] = [0xee; PAGE_BYTES];

/// What the disk must hold, across all connections to it.
pub struct Disk {
    oracle: Oracle,
    /// By sector: who uses it now.
    users: Vec<Users>,
    /// A reference that grants nothing.
    bad_gref: GrantRef,
}

#[derive(Clone, Copy, Default)]
struct Users {
    readers: u32,
    writers: u32,
}

impl Disk {
    /// A disk of zeroes, for a guest that has reserved `bad_gref` and grants nothing with it.
    pub fn new(seed: u64, bad_gref: GrantRef) -> Disk {
        let sectors = usize::try_from(SECTORS).unwrap();
        let users = vec![Users::default(); sectors];
        Disk { oracle: Oracle::new(seed, sectors), users, bad_gref }
    }
}

/// The guest while it is connected.
pub struct Guest<'a> {
    disk: &'a mut Disk,
    combination: Combination,
    devices: Vec<Device>,
    /// Requests in flight, by queue and buffer.
    under_way: Vec<Vec<Option<Request>>>,
    /// By queue and buffer: the other buffer whose pages the request uses instead.
    borrowed: Vec<Vec<Option<usize>>>,
}

impl Guest<'_> {
    pub fn new(disk: &mut Disk, combination: Combination, devices: Vec<Device>) -> Guest<'_> {
        assert_eq!(devices.len(), combination.queues);
        let buffers = combination.options.buffers;
        let under_way = devices.iter().map(|_| vec![None; buffers]).collect();
        let borrowed = vec![vec![None; buffers]; devices.len()];
        Guest { disk, combination, devices, under_way, borrowed }
    }

    /// Sends all of them, as many at once as buffers and places allow, and waits for the last
    /// answer.
    pub fn play(&mut self, requests: impl IntoIterator<Item = Request>) {
        for request in requests {
            self.begin_one(request);
        }
        while self.in_flight() > 0 {
            self.take_answers();
        }
    }

    /// Sends one as soon as a buffer is free and its place on the disk allows it.
    pub fn begin_one(&mut self, request: Request) {
        while self.free_buffer(request.queue).is_none() || self.must_wait(&request) {
            self.take_answers();
        }
        self.put(request);
    }

    /// Reads the whole disk, through all queues.
    pub fn read_all(&mut self) {
        let indirect = self.combination.has_indirect();
        let pages = self.combination.segments(indirect);
        let total = usize::try_from(SECTORS / 8).unwrap();
        let reads = (0..total).step_by(pages).zip((0..self.devices.len()).cycle());
        let reads: Vec<Request> = reads
            .map(|(page, queue)| {
                Request::read(queue, page as u64 * 8, pages.min(total - page), indirect)
            })
            .collect();
        self.play(reads);
    }

    /// The frontend's ends, with nothing in flight.
    pub fn into_devices(self) -> Vec<Device> {
        assert_eq!(self.in_flight(), 0);
        self.devices
    }

    /// The next buffer of a queue, unless none is free or its pages are in use.
    fn free_buffer(&self, queue: usize) -> Option<usize> {
        let buffer = self.devices[queue].free_buffer()?;
        (!self.borrowed[queue].contains(&Some(buffer))).then_some(buffer)
    }

    fn in_flight(&self) -> usize {
        self.devices.iter().map(Device::in_flight).sum()
    }

    /// Requests in flight together have no order, so none may write what another uses.
    fn must_wait(&self, request: &Request) -> bool {
        self.moves_data(request)
            && self.disk.users[sectors_of(request)].iter().any(|users| {
                users.writers > 0 || (request.operation != op::READ && users.readers > 0)
            })
    }

    fn expected(&self, request: &Request) -> i16 {
        let writes = request.operation != op::READ && request.sectors() > 0;
        match &request.fault {
            _ if request.operation == op::DISCARD && !self.combination.discard => NOT_SUPPORTED,
            Some(fault) => fault.status(),
            None if writes && self.combination.read_only => ERROR,
            None => OKAY,
        }
    }

    fn moves_data(&self, request: &Request) -> bool {
        self.expected(request) == OKAY && request.sectors() > 0
    }

    fn put(&mut self, request: Request) {
        let device = &self.devices[request.queue];
        let buffer = device.free_buffer().unwrap();
        (0..request.pages()).for_each(|page| device.page(buffer, page).copy_from(&POISON));
        if self.moves_data(&request) {
            self.begin(&request, buffer);
        }
        let raw = self.raw_of(&request, buffer);
        let device = &mut self.devices[request.queue];
        assert_eq!(device.put_request(&raw, request.pages()), buffer);
        if request.publish {
            device.publish().unwrap();
        }
        let queue = request.queue;
        if request.twice && self.moves_data(&request) {
            self.put_again(&request, &raw, buffer);
        }
        self.under_way[queue][buffer] = Some(request);
    }

    /// Sends a read in flight once more, into the same pages. A frontend may do so only if neither
    /// answer makes it end the grants of those pages.
    fn put_again(&mut self, request: &Request, raw: &RawRequest, pages_of: usize) {
        let Options { persistent, ends_unmapped, .. } = self.combination.options;
        let Some(buffer) = self.free_buffer(request.queue) else { return };
        if !persistent || ends_unmapped {
            return;
        }
        self.begin(request, pages_of);
        let mut again = *raw;
        match &mut again {
            RawRequest::Direct(raw) => raw.id = buffer as u64,
            RawRequest::Indirect(raw) => raw.id = buffer as u64,
            RawRequest::Discard(_) => unreachable!("a read"),
        }
        assert_eq!(self.devices[request.queue].put_request(&again, 0), buffer);
        self.borrowed[request.queue][buffer] = Some(pages_of);
        self.under_way[request.queue][buffer] = Some(request.clone());
    }

    /// Marks its sectors as in use, and fills the buffer with the data to write.
    fn begin(&mut self, request: &Request, buffer: usize) {
        let sectors = sectors_of(request);
        let users = &mut self.disk.users[sectors.clone()];
        match request.operation {
            op::READ => users.iter_mut().for_each(|users| users.readers += 1),
            _ => users.iter_mut().for_each(|users| users.writers += 1),
        }
        match request.operation {
            op::READ => {}
            op::DISCARD => self.disk.oracle.discard(sectors),
            _ => self.fill(request, sectors.start, buffer),
        }
    }

    fn fill(&mut self, request: &Request, mut sector: usize, buffer: usize) {
        for (index, segment) in request.segments.iter().enumerate() {
            let end = sector + segment.sectors();
            if request.repeats > 0 && index >= request.repeats {
                let before = request.repeats * segment.sectors();
                self.disk.oracle.repeat(sector - before, sector..end);
            } else {
                let mut data = vec![0; segment.sectors() * SECTOR];
                self.disk.oracle.write(sector, &mut data);
                self.devices[request.queue]
                    .page(buffer, segment.page)
                    .part(u32::from(segment.first) * 512, u32::try_from(data.len()).unwrap())
                    .unwrap()
                    .copy_from(&data);
            }
            sector = end;
        }
    }

    /// The request as it goes on the ring, with its fault.
    fn raw_of(&self, request: &Request, buffer: usize) -> RawRequest {
        if request.operation == op::DISCARD {
            return raw_discard(request, buffer);
        }
        let device = &self.devices[request.queue];
        let segment =
            |segment: &Segment| device.segment(buffer, segment.page, segment.first, segment.last);
        let mut segments: Vec<RawSegment> = request.segments.iter().map(segment).collect();
        match request.fault {
            Some(Fault::Range { index, first, last }) => {
                segments[index] = RawSegment { first, last, ..segments[index] };
            }
            Some(Fault::Grant { index, absurd }) => {
                segments[index].gref = if absurd { u32::MAX } else { self.disk.bad_gref.0 };
            }
            _ => {}
        }
        if request.indirect {
            let raw = device.indirect(request.operation, request.sector, &segments);
            self.with_fault(raw, request.fault).into()
        } else {
            let mut raw = device.direct(request.operation, request.sector, &segments);
            match request.fault {
                Some(Fault::Operation(operation)) => raw.operation = operation,
                Some(Fault::Count(count)) => raw.nr_segments = u8::try_from(count).unwrap(),
                Some(Fault::Sector(sector)) => raw.sector = sector,
                Some(Fault::Unoffered) => return unoffered(request, buffer, segments[0].gref),
                _ => {}
            }
            raw.into()
        }
    }

    fn with_fault(&self, mut raw: RawIndirect, fault: Option<Fault>) -> RawIndirect {
        match fault {
            Some(Fault::Operation(operation)) => raw.operation = operation,
            Some(Fault::Count(count)) => raw.nr_segments = count,
            Some(Fault::Sector(sector)) => raw.sector = sector,
            Some(Fault::SegmentPage) => raw.pages[0] = self.disk.bad_gref.0,
            _ => {}
        }
        raw
    }

    /// Waits for an answer, and takes all that there are.
    fn take_answers(&mut self) {
        self.devices.iter_mut().for_each(|device| device.publish().unwrap());
        let start = Instant::now();
        loop {
            let mut found = false;
            for queue in 0..self.devices.len() {
                while let Some(answer) = self.devices[queue].next_answer().unwrap() {
                    self.judge(queue, answer);
                    found = true;
                }
            }
            if found {
                return;
            }
            assert!(start.elapsed() < HANG, "no answer to {:?}", self.under_way);
            let waiting = self.devices.iter_mut().find(|device| device.in_flight() > 0);
            waiting.expect("a request to wait for").wait(HANG).unwrap();
        }
    }

    fn judge(&mut self, queue: usize, answer: Answer) {
        let request = self.under_way[queue][answer.buffer].take().unwrap();
        assert_eq!(answer.status, self.expected(&request), "{request:?}");
        let pages_of = self.borrowed[queue][answer.buffer].take().unwrap_or(answer.buffer);
        if !self.moves_data(&request) {
            return;
        }
        let users = &mut self.disk.users[sectors_of(&request)];
        if request.operation == op::READ {
            users.iter_mut().for_each(|users| users.readers -= 1);
            self.check_read(&request, pages_of);
        } else {
            users.iter_mut().for_each(|users| users.writers -= 1);
        }
    }

    /// Checks that the sectors read hold what they must, and that nothing beside them was touched.
    fn check_read(&self, request: &Request, buffer: usize) {
        let device = &self.devices[request.queue];
        let mut sector = sectors_of(request).start;
        let mut page = [0; PAGE_BYTES];
        for (index, segment) in request.segments.iter().enumerate() {
            device.page(buffer, segment.page).copy_to(&mut page);
            let start = usize::from(segment.first) * SECTOR;
            let end = start + segment.sectors() * SECTOR;
            let mismatches = self.disk.oracle.mismatches(sector, &page[start..end]);
            assert_eq!(mismatches, 0, "sector {sector}, segment {index} of {request:?}");
            let others = request.segments.iter().filter(|other| other.page == segment.page);
            if others.count() == 1 {
                let untouched = page[..start] == POISON[..start] && page[end..] == POISON[end..];
                assert!(untouched, "beside segment {index} of {request:?}");
            }
            sector += segment.sectors();
        }
    }
}

fn sectors_of(request: &Request) -> Range<usize> {
    let [first, end] = [request.sector, request.sector + request.sectors()]
        .map(|sector| usize::try_from(sector).unwrap());
    first..end
}

fn raw_discard(request: &Request, buffer: usize) -> RawRequest {
    let (id, handle) = (buffer as u64, 0);
    let mut raw = RawDiscard {
        flag: 0,
        handle,
        id,
        sector: request.sector,
        nr_sectors: request.discard_sectors,
    };
    match request.fault {
        Some(Fault::Sector(sector)) => raw.sector = sector,
        Some(Fault::Sectors(count)) => raw.nr_sectors = count,
        Some(Fault::Secure) => raw.flag = 1,
        _ => {}
    }
    RawRequest::Discard(raw)
}

/// An indirect request from a frontend to which none were offered.
fn unoffered(request: &Request, buffer: usize, gref: u32) -> RawRequest {
    RawRequest::Indirect(RawIndirect {
        operation: request.operation,
        nr_segments: 1,
        id: buffer as u64,
        sector: request.sector,
        handle: 0,
        pages: [gref; 8],
    })
}
