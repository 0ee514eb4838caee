//! What an image's first bytes tell about the sector size that it was made for. The guest writes them, so
//! they decide nothing: they only lead to a warning in the log.

/// The signature of a GUID partition table, in the second sector.
const GPT: &[u8] = b"EFI PART";
/// The signature at the end of a PC's boot sector.
const MBR: [u8; 2] = [0x55, 0xaa];

/// Whether a disk of `size_bytes` was partitioned with 512-byte sectors and not with larger ones of
/// `sector_bytes`. `start`: its first bytes, at least two sectors.
pub fn is_made_for_512(start: &[u8], sector_bytes: u32, size_bytes: u64) -> bool {
    let is_gpt = |at: usize| start.get(at..).is_some_and(|rest| rest.starts_with(GPT));
    if is_gpt(sector_bytes as usize) {
        return false;
    }
    is_gpt(512)
        || mbr_ends(start).any(|end| {
            end.saturating_mul(512) <= size_bytes
                && end.saturating_mul(sector_bytes.into()) > size_bytes
        })
}

/// The end of each partition of an MBR, in sectors.
fn mbr_ends(start: &[u8]) -> impl Iterator<Item = u64> {
    let table = start.get(446..512).filter(|table| table.ends_with(&MBR)).unwrap_or_default();
    table.chunks_exact(16).filter_map(|entry| {
        let number = |at: usize| Some(u32::from_le_bytes(entry.get(at..at + 4)?.try_into().ok()?));
        let (first, count) = (number(8)?, number(12)?);
        (count > 0).then(|| u64::from(first) + u64::from(count))
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn with_gpt(at: usize) -> Vec<u8> {
        let mut start = vec![0; 8192];
        start[at..at + 8].copy_from_slice(GPT);
        start
    }

    fn with_mbr(first: u32, count: u32) -> Vec<u8> {
        let mut start = vec![0; 8192];
        start[510..512].copy_from_slice(&MBR);
        start[446 + 8..446 + 12].copy_from_slice(&first.to_le_bytes());
        start[446 + 12..446 + 16].copy_from_slice(&count.to_le_bytes());
        start
    }

    #[test]
    fn the_place_of_the_partition_table_tells_the_sector_size() {
        let size = 1 << 30;
        assert!(is_made_for_512(&with_gpt(512), 4096, size));
        assert!(!is_made_for_512(&with_gpt(4096), 4096, size));
        assert!(!is_made_for_512(&[0; 8192], 4096, size));
        assert!(!is_made_for_512(b"EFI PART", 4096, size));
        assert!(!is_made_for_512(&[], 4096, size));
    }

    #[test]
    fn a_partition_beyond_the_disk_tells_it_too() {
        let size = 1 << 30;
        let sectors = u32::try_from(size / 512).unwrap();
        assert!(is_made_for_512(&with_mbr(2048, sectors - 2048), 4096, size));
        assert!(!is_made_for_512(&with_mbr(256, sectors / 8 - 256), 4096, size), "fits either way");
        assert!(!is_made_for_512(&with_mbr(2048, u32::MAX), 4096, size), "fits neither way");
        assert!(!is_made_for_512(&with_mbr(0, 0), 4096, size));
    }
}
