//! The files behind disks, with data in every block.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use polldisk::output;
use serde::Serialize;

use crate::contender::Contents;
use crate::scenario::Backing;

/// Size of a disk without a file.
const NULL_BYTES: u64 = 8 << 30;

const TMPFS_BYTES: u64 = 1 << 30;
const EXT4_BYTES: u64 = 1 << 30;

/// Bytes written at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A disk's file, which is removed when this is dropped.
#[derive(Debug)]
pub struct Image {
    file: tempfile::NamedTempFile,
    bytes: u64,
}

/// A folder for disks' files, and its filesystem.
#[derive(Clone, Debug, Serialize)]
pub struct Place {
    /// The backing whose files it holds.
    pub backing: Backing,
    /// The folder. Not in the JSON, since it means nothing on other machines.
    #[serde(skip)]
    pub folder: PathBuf,
    /// The filesystem's type.
    pub filesystem: String,
}

impl Place {
    /// The place for a backing's files; `None` if it has no files.
    pub fn of(backing: Backing, scratch: &Path) -> Result<Option<Place>> {
        let folder = match backing {
            Backing::Null => return Ok(None),
            Backing::Tmpfs => Path::new("/dev/shm"),
            Backing::Ext4 => scratch,
        };
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let filesystem = filesystem(folder)?;
        let expected = match backing {
            Backing::Tmpfs => "tmpfs",
            _ => "ext4",
        };
        if filesystem != expected {
            let folder = folder.display();
            output::say(format_args!(
                "compare: {folder} is on {filesystem}, so its figures are not those of {expected}"
            ));
        }
        Ok(Some(Place { backing, folder: folder.to_owned(), filesystem }))
    }
}

fn filesystem(folder: &Path) -> Result<String> {
    let output = Command::new("df").arg("--output=fstype").arg(folder).output()?;
    // The first line is a heading.
    Ok(String::from_utf8_lossy(&output.stdout).lines().nth(1).unwrap_or("unknown").to_owned())
}

impl Image {
    /// A file full of random data.
    pub fn make(place: &Place) -> Result<Image> {
        let bytes = match place.backing {
            Backing::Ext4 => EXT4_BYTES,
            _ => TMPFS_BYTES,
        };
        let folder = place.folder.display();
        output::say(format_args!("compare: filling a file of {} MiB in {folder}", bytes >> 20));
        let file = tempfile::Builder::new()
            .prefix("polldisk-compare-")
            .suffix(".img")
            .tempfile_in(&place.folder)?;
        fill(file.as_file(), bytes).with_context(|| format!("cannot fill a file in {folder}"))?;
        Ok(Image { file, bytes })
    }

    /// The disk, as contenders' command lines need it.
    pub fn contents(&self) -> Contents {
        Contents { file: Some(self.file.path().display().to_string()), bytes: self.bytes }
    }
}

/// A disk without a file.
pub fn null() -> Contents {
    Contents { file: None, bytes: NULL_BYTES }
}

/// Writes the same random megabyte again and again, each time with its number in every sector, so that
/// storage cannot deduplicate it.
fn fill(mut file: &File, bytes: u64) -> Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut chunk)?;
    for number in 0..bytes / CHUNK_BYTES as u64 {
        for sector in chunk.chunks_mut(512) {
            sector[..8].copy_from_slice(&number.to_le_bytes());
        }
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_block_of_a_file_differs() {
        let mut file = tempfile::tempfile().unwrap();
        fill(&file, 3 << 20).unwrap();
        let mut data = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut data).unwrap();
        assert_eq!(data.len(), 3 << 20);
        let blocks: std::collections::BTreeSet<&[u8]> = data.chunks(4096).collect();
        assert_eq!(blocks.len(), 768);
    }
}
