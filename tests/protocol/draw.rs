//! What is drawn from a seed: a connection, and the requests on it. Nothing here depends on time,
//! so that a seed always plays the same.

use polldisk::blkif::Protocol;
use polldisk::blkif::op;
use polldisk::limits::{
    INDIRECT_SEGMENTS_MAX, PERSISTENT_GRANTS_PER_DOMAIN, RING_PAGE_ORDER_MAX, SEGMENTS_PER_REQUEST,
};
use polldisk::msg::GrantMode;
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::random::Random;
use polldisk::units::DomId;

/// Sectors of the disk: as many as the largest indirect request moves.
pub const SECTORS: u64 = 8 * INDIRECT_SEGMENTS_MAX as u64;

/// Sectors in a page.
const PAGE: u8 = 8;

/// Pages of the guest for all buffers of a connection.
const BUFFER_PAGES: usize = 6 * 1024;

pub const OKAY: i16 = 0;
pub const ERROR: i16 = -1;
pub const NOT_SUPPORTED: i16 = -2;

/// A connection: what both ends agreed on, and the disk.
#[derive(Clone, Copy, Debug)]
pub struct Combination {
    pub queues: usize,
    pub options: Options,
    /// What the backend maps. A frontend may keep pages granted that the backend does not keep mapped.
    pub grant_mode: GrantMode,
    /// Segments offered for an indirect request; 0: no indirect requests.
    pub offered_segments: u16,
    pub sector_bytes: u32,
    pub read_only: bool,
    /// Whether discards were offered.
    pub discard: bool,
    /// Pages that all queues may keep mapped.
    pub budget: usize,
}

/// What most connections have in common.
impl Default for Combination {
    fn default() -> Self {
        Combination {
            queues: 1,
            options: Options::default(),
            grant_mode: GrantMode::Persistent,
            offered_segments: 0,
            sector_bytes: 512,
            read_only: false,
            discard: true,
            budget: PERSISTENT_GRANTS_PER_DOMAIN,
        }
    }
}

impl Combination {
    pub fn draw(random: &mut Random) -> Combination {
        let queues = random.between(1, 4);
        let offered_segments = match random.chance(60) {
            true => random.between_by_size(1, INDIRECT_SEGMENTS_MAX.into()),
            false => 0,
        };
        let options = draw_options(random, queues, offered_segments);
        let read_only = random.chance(5);
        Combination {
            queues,
            options,
            grant_mode: match options.persistent {
                true => random.one_of(&[
                    GrantMode::Persistent,
                    GrantMode::Persistent,
                    GrantMode::Map,
                    GrantMode::Copy,
                ]),
                false => random.one_of(&[GrantMode::Map, GrantMode::Copy]),
            },
            offered_segments: u16::try_from(offered_segments).unwrap(),
            sector_bytes: random.one_of(&[512, 4096]),
            read_only,
            discard: !read_only && random.chance(80),
            budget: match random.chance(60) {
                true => PERSISTENT_GRANTS_PER_DOMAIN,
                false => random.between_by_size(1, 200) - 1,
            },
        }
    }

    /// 512-byte sectors in one sector of the disk.
    fn block(&self) -> u64 {
        u64::from(self.sector_bytes / 512)
    }

    /// The largest request, in segments.
    pub fn segments(&self, indirect: bool) -> usize {
        if indirect { self.options.segments } else { SEGMENTS_PER_REQUEST }
    }

    pub fn has_indirect(&self) -> bool {
        self.options.segments > SEGMENTS_PER_REQUEST
    }
}

/// What a frontend chooses from the offer.
pub fn draw_options(random: &mut Random, queues: usize, offered_segments: usize) -> Options {
    let segments = match offered_segments {
        ..=SEGMENTS_PER_REQUEST => SEGMENTS_PER_REQUEST,
        _ => random.between_by_size(SEGMENTS_PER_REQUEST + 1, offered_segments),
    };
    let ring_order = random.between(0, RING_PAGE_ORDER_MAX);
    let room = BUFFER_PAGES / (queues * (segments + 3));
    Options {
        backend: DomId::DOM0,
        protocol: random.one_of(&[Protocol::X86_64, Protocol::X86_32]),
        persistent: random.chance(60),
        ends_unmapped: random.chance(50),
        buffers: random.between_by_size(1, room.min(32 << ring_order)),
        ring_order,
        segments,
    }
}

/// One request, sound except for its fault.
#[derive(Clone, Debug)]
pub struct Request {
    pub queue: usize,
    pub operation: u8,
    pub sector: u64,
    pub segments: Vec<Segment>,
    pub indirect: bool,
    pub fault: Option<Fault>,
    /// Whether it is published at once.
    pub publish: bool,
    /// How many sectors a discard covers.
    pub discard_sectors: u64,
    /// How many segments of a write have pages of their own, while the others use the same pages
    /// again; 0: all of them.
    pub repeats: usize,
    /// Whether a read is sent twice at the same time, into the same pages.
    pub twice: bool,
}

/// Sectors `first` to `last` of a page of the request's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub page: usize,
    pub first: u8,
    pub last: u8,
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// No such operation.
    Operation(u8),
    /// An impossible count of segments.
    Count(u16),
    /// A place beyond the disk, or not at the start of one of its sectors.
    Sector(u64),
    /// A segment that exceeds its page, or is not made of whole sectors of the disk.
    Range { index: usize, first: u8, last: u8 },
    /// A segment without a grant.
    Grant { index: usize, absurd: bool },
    /// No grant for the page that holds an indirect request's segments.
    SegmentPage,
    /// An indirect request although none were offered.
    Unoffered,
    /// A discard of this number of sectors, which is impossible.
    Sectors(u64),
    /// A secure discard, which was not offered.
    Secure,
}

impl Fault {
    pub fn status(&self) -> i16 {
        match self {
            Fault::Operation(_) | Fault::Unoffered | Fault::Secure => NOT_SUPPORTED,
            _ => ERROR,
        }
    }
}

impl Segment {
    fn whole(page: usize) -> Segment {
        Segment { page, first: 0, last: PAGE - 1 }
    }

    pub fn sectors(&self) -> usize {
        usize::from(self.last - self.first) + 1
    }
}

impl Request {
    pub fn draw(random: &mut Random, combination: &Combination) -> Request {
        if random.chance(7) {
            return Request::draw_discard(random, combination);
        }
        let indirect = combination.has_indirect() && random.chance(40);
        let operation = match random.between(0, 99) {
            0..45 => op::READ,
            45..90 => op::WRITE,
            _ if indirect => op::WRITE,
            _ => random.one_of(&[op::FLUSH_DISKCACHE, op::WRITE_BARRIER]),
        };
        let is_plain_flush = flushes(operation) && random.chance(50);
        let count = match is_plain_flush {
            true => 0,
            false => random.between_by_size(1, combination.segments(indirect)),
        };
        let repeats = match operation == op::WRITE && count > 1 && random.chance(15) {
            true => random.between(1, count - 1),
            false => 0,
        };
        let segments = match repeats {
            0 => draw_segments(random, combination, count),
            _ => (0..count).map(|index| Segment::whole(index % repeats)).collect(),
        };
        let mut request = Request {
            queue: random.between(0, combination.queues - 1),
            operation,
            segments,
            indirect,
            publish: random.chance(50),
            repeats,
            twice: operation == op::READ && random.chance(20),
            ..Request::NOTHING
        };
        request.place(random, combination);
        if !is_plain_flush && random.chance(10) {
            request.fault = Some(draw_fault(random, combination, &request));
        }
        request
    }

    fn draw_discard(random: &mut Random, combination: &Combination) -> Request {
        let block = combination.block();
        let mut request = Request {
            queue: random.between(0, combination.queues - 1),
            operation: op::DISCARD,
            publish: random.chance(50),
            discard_sectors: random.between_by_size(1, 256) as u64 * block,
            ..Request::NOTHING
        };
        request.place(random, combination);
        if random.chance(20) {
            request.fault = Some(match random.between(0, 3) {
                0 => Fault::Sector(draw_bad_sector(random, combination, &request)),
                1 => Fault::Sectors(random.one_of(&[0, SECTORS + block, u64::MAX])),
                2 if block > 1 => Fault::Sectors(random.between(1, block - 1)),
                _ => Fault::Secure,
            });
        }
        request
    }

    /// Gives it a place on the disk where it fits.
    fn place(&mut self, random: &mut Random, combination: &Combination) {
        let block = combination.block();
        self.sector = random.between(0, (SECTORS - self.sectors()) / block) * block;
    }

    const NOTHING: Request = Request {
        queue: 0,
        operation: op::READ,
        sector: 0,
        segments: Vec::new(),
        indirect: false,
        fault: None,
        publish: true,
        discard_sectors: 0,
        repeats: 0,
        twice: false,
    };

    /// A read of whole pages.
    pub fn read(queue: usize, sector: u64, pages: usize, indirect: bool) -> Request {
        let segments = (0..pages).map(Segment::whole).collect();
        Request { queue, sector, segments, indirect, ..Request::NOTHING }
    }

    pub fn sectors(&self) -> u64 {
        if self.operation == op::DISCARD {
            return self.discard_sectors;
        }
        self.segments.iter().map(|segment| segment.sectors() as u64).sum()
    }

    /// Pages of its buffer that it uses, from the first on.
    pub fn pages(&self) -> usize {
        self.segments.iter().map(|segment| segment.page + 1).max().unwrap_or(0)
    }
}

/// Whether it is valid without data.
fn flushes(operation: u8) -> bool {
    [op::FLUSH_DISKCACHE, op::WRITE_BARRIER].contains(&operation)
}

/// Segments in whole pages, in parts of pages, or two in each page.
fn draw_segments(random: &mut Random, combination: &Combination, count: usize) -> Vec<Segment> {
    let shape = if combination.sector_bytes == 512 { random.between(0, 2) } else { 0 };
    let mut segments = Vec::with_capacity(count);
    for index in 0..count {
        let (page, first, last) = match shape {
            0 => (index, 0, PAGE - 1),
            1 => {
                let first = random.between(0, PAGE - 1);
                (index, first, random.between(first, PAGE - 1))
            }
            _ if index % 2 == 0 => (index / 2, 0, random.between(0, PAGE - 2)),
            _ => (index / 2, segments.last().map_or(0, |one: &Segment| one.last) + 1, PAGE - 1),
        };
        segments.push(Segment { page, first, last });
    }
    segments
}

fn draw_fault(random: &mut Random, combination: &Combination, request: &Request) -> Fault {
    let index = random.between(0, request.segments.len() - 1);
    match random.between(0, 6) {
        0 if request.indirect => Fault::Operation(random.between(op::WRITE_BARRIER, u8::MAX)),
        0 => Fault::Operation(random.between(op::INDIRECT + 1, u8::MAX)),
        1 if request.indirect => {
            Fault::Count(random.one_of(&[0, combination.offered_segments + 1, u16::MAX]))
        }
        1 if flushes(request.operation) => Fault::Count(random.between(12, 255)),
        1 => Fault::Count(random.one_of(&[0, 12, 255])),
        2 => Fault::Sector(draw_bad_sector(random, combination, request)),
        3 => {
            let (first, last) = draw_bad_range(random, combination);
            Fault::Range { index, first, last }
        }
        4 if request.indirect => Fault::SegmentPage,
        5 if combination.offered_segments == 0 => Fault::Unoffered,
        _ => Fault::Grant { index, absurd: random.chance(50) },
    }
}

fn draw_bad_sector(random: &mut Random, combination: &Combination, request: &Request) -> u64 {
    let beyond = SECTORS - request.sectors() + 1;
    match random.between(0, 3) {
        0 => random.between(beyond, SECTORS),
        1 => u64::MAX - random.between(0, request.sectors()),
        2 if combination.block() > 1 => request.sector + random.between(1, combination.block() - 1),
        _ => random.between(SECTORS, u64::MAX - 1),
    }
}

fn draw_bad_range(random: &mut Random, combination: &Combination) -> (u8, u8) {
    match random.between(0, 2) {
        0 if combination.block() > 1 => (0, random.between(0, PAGE - 2)),
        1 if combination.block() > 1 => (random.between(1, PAGE - 1), PAGE - 1),
        2 => (0, random.between(PAGE, u8::MAX)),
        _ => {
            let first = random.between(1, u8::MAX);
            (first, random.between(0, first - 1))
        }
    }
}
