//! What a disk must hold: every sector says whose it is and how often it was written.
//!
//! A sector never written holds zeroes. Written sectors hold 64 words derived from the disk's
//! seed, the sector's number and its version, so that data of another disk, another place or an
//! earlier time is found out, to the byte.

use std::ops::Range;

/// Bytes in one sector.
pub const SECTOR: usize = 512;

/// Remembers what was written to one disk, and checks what is read.
#[derive(Debug)]
pub struct Oracle {
    seed: u64,
    contents: Vec<Content>,
    /// By sector: the version that was made of it last.
    versions: Vec<u32>,
}

/// What a sector holds: what was written to a sector as this version of it, or as version 0 zeroes.
type Content = (u32, u32);
const ZEROES: Content = (0, 0);

impl Oracle {
    /// A disk of `sectors` 512-byte sectors, all zero so far.
    pub fn new(seed: u64, sectors: usize) -> Oracle {
        Oracle { seed, contents: vec![ZEROES; sectors], versions: vec![0; sectors] }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> usize {
        self.contents.len()
    }

    /// Whether a sector was written.
    ///
    /// # Panics
    /// If it is beyond the disk.
    pub fn is_written(&self, sector: usize) -> bool {
        self.contents[sector] != ZEROES
    }

    /// Makes the next version of the sectors from `first` on, as many as fill `data`.
    ///
    /// # Panics
    /// If `data` reaches beyond the disk.
    pub fn write(&mut self, first: usize, data: &mut [u8]) {
        for (sector, bytes) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            let version = &mut self.versions[sector];
            *version = version.wrapping_add(1).max(1);
            let version = *version;
            let number = u32::try_from(sector).expect("at most 2 TiB");
            for (index, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                *word = word_of(self.seed, number, version, index).to_le_bytes();
            }
            self.contents[sector] = (number, version);
        }
    }

    /// Records that sectors were written with what those from `from` on hold.
    ///
    /// # Panics
    /// If either reaches beyond the disk.
    pub fn repeat(&mut self, from: usize, sectors: Range<usize>) {
        self.contents.copy_within(from..from + sectors.len(), sectors.start);
    }

    /// Records that sectors were discarded: they hold zeroes.
    ///
    /// # Panics
    /// If they reach beyond the disk.
    pub fn discard(&mut self, sectors: Range<usize>) {
        self.contents[sectors].fill(ZEROES);
    }

    /// Sectors in `data`, read from `first` on, that do not hold what they should.
    ///
    /// # Panics
    /// If `data` reaches beyond the disk.
    pub fn mismatches(&self, first: usize, data: &[u8]) -> usize {
        let sectors = (first..).zip(data.chunks_exact(SECTOR));
        sectors.filter(|(sector, bytes)| !self.is_right(*sector, bytes)).count()
    }

    fn is_right(&self, sector: usize, bytes: &[u8]) -> bool {
        match self.contents[sector] {
            ZEROES => bytes.iter().all(|byte| *byte == 0),
            (number, version) => {
                bytes.as_chunks::<8>().0.iter().enumerate().all(|(index, word)| {
                    *word == word_of(self.seed, number, version, index).to_le_bytes()
                })
            }
        }
    }
}

/// One word of a sector: a hash (splitmix64's finisher) of where and when, stepped per word.
#[inline]
fn word_of(seed: u64, sector: u32, version: u32, index: usize) -> u64 {
    let place = u64::from(sector) << 32 | u64::from(version);
    let mut hash = seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash.wrapping_add((index as u64).wrapping_mul(0xd6e8_feb8_6659_fd93))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_single_wrong_byte_is_found() {
        let mut oracle = Oracle::new(1, 16);
        let mut data = vec![0; 2 * SECTOR];
        assert_eq!(oracle.mismatches(3, &data), 0, "never written means zero");
        oracle.write(3, &mut data);
        assert_eq!(oracle.mismatches(3, &data), 0);
        for byte in 0..data.len() {
            data[byte] ^= 1;
            assert_eq!(oracle.mismatches(3, &data), 1, "byte {byte}");
            data[byte] ^= 1;
        }
    }

    #[test]
    fn data_of_another_place_time_or_disk_is_wrong() {
        let (mut oracle, mut other) = (Oracle::new(1, 16), Oracle::new(2, 16));
        let (mut old, mut new, mut foreign) = ([0; SECTOR], [0; SECTOR], [0; SECTOR]);
        oracle.write(3, &mut old);
        oracle.write(3, &mut new);
        other.write(3, &mut foreign);
        assert_eq!(oracle.mismatches(3, &new), 0);
        assert_eq!(oracle.mismatches(3, &old), 1, "an earlier version");
        assert_eq!(oracle.mismatches(4, &new), 1, "another place");
        assert_eq!(oracle.mismatches(3, &foreign), 1, "another disk");
        assert_eq!(oracle.mismatches(3, &[0; SECTOR]), 1, "zeroes");
    }

    #[test]
    fn discarded_sectors_hold_zeroes_and_repeated_ones_what_they_repeat() {
        let mut oracle = Oracle::new(1, 16);
        let mut data = vec![0; 2 * SECTOR];
        oracle.write(3, &mut data);
        oracle.repeat(3, 8..10);
        assert_eq!((oracle.mismatches(3, &data), oracle.mismatches(8, &data)), (0, 0));
        oracle.discard(3..4);
        assert!(!oracle.is_written(3) && oracle.is_written(4));
        assert_eq!((oracle.mismatches(3, &data), oracle.mismatches(8, &data)), (1, 0));
        let old = data.clone();
        oracle.write(3, &mut data);
        assert_eq!(oracle.mismatches(3, &old), 2, "versions go on after a discard");
    }
}
