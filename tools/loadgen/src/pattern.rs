//! The operations and sectors of requests.

use std::ops::Range;

use polldisk::blkif::op;
use polldisk::sim::random::Random;
use polldisk::units::SECTOR_BYTES;

/// A stream of operations and sectors, a few nanoseconds each.
#[derive(Clone, Debug)]
pub struct Pattern {
    order: Order,
    first_sector: u64,
    block_sectors: u64,
    blocks: u64,
    /// Reads among 65536 requests.
    reads: u64,
    random: Random,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Random,
    /// The next block.
    Sequential(u64),
}

/// The parameters of a queue's pattern.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Sectors of 512 bytes of the disk that may be used.
    pub sectors: Range<u64>,
    /// Bytes of each request, a multiple of the sector.
    pub block_bytes: usize,
    /// Whether blocks are sequential; otherwise random.
    pub sequential: bool,
    /// Reads among 100 requests.
    pub read_percent: u64,
}

impl Shape {
    /// The pattern of one of a disk's queues. Sequential patterns each go through their own part of the
    /// disk. `None` if there is no room for a block.
    pub fn pattern(&self, queue: usize, queues: usize, seed: u64) -> Option<Pattern> {
        let block_sectors = self.block_bytes as u64 / SECTOR_BYTES;
        let all = (self.sectors.end.checked_sub(self.sectors.start)?) / block_sectors;
        let (first, blocks) = match self.sequential {
            true => (all / queues as u64 * queue as u64, all / queues as u64),
            false => (0, all),
        };
        (blocks > 0).then(|| Pattern {
            order: if self.sequential { Order::Sequential(0) } else { Order::Random },
            first_sector: self.sectors.start + first * block_sectors,
            block_sectors,
            blocks,
            reads: self.read_percent * 65536 / 100,
            random: Random::new(seed),
        })
    }
}

impl Pattern {
    /// The operation and the first sector of the next request.
    #[inline]
    pub fn next_request(&mut self) -> (u8, u64) {
        let random = self.random.next();
        let block = match &mut self.order {
            // The high half of the product is evenly spread over 0..blocks.
            Order::Random => random.carrying_mul(self.blocks, 0).1,
            Order::Sequential(next) => {
                let block = *next;
                *next = if block + 1 == self.blocks { 0 } else { block + 1 };
                block
            }
        };
        let operation = if random & 0xffff < self.reads { op::READ } else { op::WRITE };
        (operation, self.first_sector + block * self.block_sectors)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn shape(sectors: Range<u64>, sequential: bool, read_percent: u64) -> Shape {
        Shape { sectors, block_bytes: 4096, sequential, read_percent }
    }

    #[test]
    fn random_blocks_are_whole_inside_and_everywhere() {
        // The last 3 sectors are less than a block.
        let mut pattern = shape(16..16 + 8 * 10 + 3, false, 100).pattern(1, 2, 7).unwrap();
        let mut seen = [0; 10];
        for _ in 0..10_000 {
            let (_, sector) = pattern.next_request();
            assert!((16..96).contains(&sector) && sector % 8 == 0, "{sector}");
            seen[usize::try_from((sector - 16) / 8).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
    }

    #[test]
    fn sequential_queues_go_round_in_parts_of_their_own() {
        let shape = shape(0..8 * 7, true, 100);
        let sectors = |queue| -> Vec<u64> {
            let mut pattern = shape.pattern(queue, 2, 7).unwrap();
            (0..4).map(|_| pattern.next_request().1).collect()
        };
        assert_eq!(sectors(0), [0, 8, 16, 0]);
        assert_eq!(sectors(1), [24, 32, 40, 24]);
    }

    #[test]
    fn the_mix_is_as_asked() {
        for (percent, range) in [(0, 0..=0), (100, 10_000..=10_000), (70, 6_800..=7_200)] {
            let mut pattern = shape(0..8000, false, percent).pattern(0, 1, 3).unwrap();
            let reads = (0..10_000).filter(|_| pattern.next_request().0 == op::READ).count();
            assert!(range.contains(&reads), "{percent}%: {reads}");
        }
    }

    #[test]
    fn a_disk_too_small_for_a_block_has_no_pattern() {
        assert!(shape(0..7, false, 0).pattern(0, 1, 0).is_none());
        assert!(shape(0..15, true, 0).pattern(1, 2, 0).is_none());
    }
}
