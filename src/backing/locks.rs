//! Locks on image files, as QEMU takes them (`block/file-posix.c`), so that QEMU and polldisk keep off each
//! other's images.
//!
//! No lock excludes anybody by itself. Each user of an image takes a read lock on one byte for each kind of
//! access that it uses, and on one for each kind that it does not allow others. Then it checks whether
//! somebody has locked the opposite of one of these. The locks belong to the open file, not to the process
//! (`F_OFD_SETLK`), and end with it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::claims::Usage;

/// `RAW_LOCK_PERM_BASE`: from here on, one byte for each kind of access that is used.
const DONE: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`: from here on, one byte for each kind that others may not use.
const REFUSED: i64 = 200;

/// QEMU's `BLK_PERM_CONSISTENT_READ`, `BLK_PERM_WRITE` and `BLK_PERM_RESIZE`, by their bits.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Why a file is not locked.
#[derive(Debug)]
pub enum LockError {
    /// Somebody else's use conflicts with this one.
    Taken,
    /// The filesystem does not support locks.
    Unsupported(io::Error),
}

/// Locks a file for this usage, for as long as it is open. Uses through the same open file never conflict.
/// Never waits.
pub fn lock(file: &File, usage: Usage) -> Result<(), LockError> {
    let done: &[i64] = if usage.writes { &[READ, WRITE] } else { &[READ] };
    let refused: &[i64] = if usage.shareable { &[RESIZE] } else { &[WRITE, RESIZE] };
    // Look before locking, so that a refused use leaves no new locks on a file that its holder uses in
    // another way; and look again, because another may have locked meanwhile.
    look(file, done, refused)?;
    for byte in done.iter().map(|bit| DONE + bit).chain(refused.iter().map(|bit| REFUSED + bit)) {
        set(file, byte)?;
    }
    look(file, done, refused)
}

/// Checks whether somebody else has locked the opposite.
fn look(file: &File, done: &[i64], refused: &[i64]) -> Result<(), LockError> {
    let mut opposites =
        done.iter().map(|bit| REFUSED + bit).chain(refused.iter().map(|bit| DONE + bit));
    opposites.try_for_each(|byte| match is_locked(file, byte)? {
        true => Err(LockError::Taken),
        false => Ok(()),
    })
}

fn set(file: &File, byte: i64) -> Result<(), LockError> {
    let mut range = one_byte(libc::F_RDLCK, byte);
    fcntl(file, libc::F_OFD_SETLK, &mut range)
}

/// Whether another open file has a lock there.
fn is_locked(file: &File, byte: i64) -> Result<bool, LockError> {
    let mut range = one_byte(libc::F_WRLCK, byte);
    fcntl(file, libc::F_OFD_GETLK, &mut range)?;
    Ok(i32::from(range.l_type) != libc::F_UNLCK)
}

#[expect(clippy::cast_possible_truncation, reason = "constants of one digit")]
fn one_byte(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: libc::c_int, range: &mut libc::flock) -> Result<(), LockError> {
    loop {
        // SAFETY: both commands read and write one `struct flock`.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *range) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN | libc::EACCES) => return Err(LockError::Taken),
            // ENOLCK and EOPNOTSUPP of network filesystems, EINVAL of filesystems without locks. Any other
            // error also means only that the file can't be locked, not that it can't be used.
            _ => return Err(LockError::Unsupported(error)),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const WRITES: Usage = Usage { writes: true, shareable: false, emulates: false };
    const READS: Usage = Usage { writes: false, ..WRITES };
    const SHARES: Usage = Usage { shareable: true, ..WRITES };
    const READS_SHARED: Usage = Usage { shareable: true, ..READS };

    #[test]
    fn open_files_keep_each_other_off_as_their_uses_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        for (first, second, go_together) in [
            (READS, READS, true),
            (READS, WRITES, false),
            (WRITES, READS, false),
            (WRITES, WRITES, false),
            (WRITES, SHARES, false),
            (SHARES, WRITES, false),
            (SHARES, SHARES, true),
            (SHARES, READS, false),
            (READS, SHARES, false),
            (READS_SHARED, SHARES, true),
            (READS_SHARED, READS, true),
        ] {
            let (held, other) = (open(), open());
            lock(&held, first).unwrap();
            assert_eq!(lock(&other, second).is_ok(), go_together, "{first:?} {second:?}");
            drop(held);
            lock(&other, second).unwrap();
        }
    }

    #[test]
    fn a_refused_use_leaves_the_locks_of_another_by_the_same_holder_as_they_were() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let [held, reader, later] = [open(), open(), open()];
        lock(&held, READS).unwrap();
        lock(&reader, READS).unwrap();
        assert!(matches!(lock(&held, SHARES), Err(LockError::Taken)));
        lock(&later, READS).unwrap();
    }

    #[test]
    fn what_cannot_be_locked_is_told_from_what_is_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let unreadable = File::options().write(true).open(file.path()).unwrap();
        assert!(matches!(lock(&unreadable, READS), Err(LockError::Unsupported(_))));
    }
}
