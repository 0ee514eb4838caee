//! Which storage the disks of this process use: each has many readers or one writer, unless all disks call
//! it shareable. A disk may claim it twice, as when a drive gets the same medium again.
//!
//! A claim is made before storage is opened and given up once it is closed. In between, another disk is
//! refused, with the name of the first; while the first is still opening or closing, the other waits. Only
//! helper threads call this, because they may wait.

use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use slab::Slab;

use super::BlockLocks;
use super::storage::Storage;
use crate::limits::CLAIM_SECONDS;

/// What a disk does with its storage, and what it lets others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// It may write.
    pub writes: bool,
    /// Others may write, too, if they are shareable as well.
    pub shareable: bool,
    /// It writes parts of blocks (`emulate-512`), which is safe beside others that do so, but not beside
    /// others that write whole blocks.
    pub emulates: bool,
}

impl Usage {
    /// Why the storage can't be used like this beside `other`.
    fn excludes(self, other: Usage) -> Option<Reason> {
        if !self.writes && !other.writes {
            None
        } else if !self.shareable || !other.shareable {
            Some(Reason::Used)
        } else if self.emulates != other.emulates {
            Some(Reason::Emulation)
        } else {
            None
        }
    }
}

/// Why a claim is refused.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Who has the storage: the `user` given to [`Claim::make`].
    pub user: String,
    /// What the conflict is.
    pub reason: Reason,
}

/// What a claim conflicts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// One of the two writes, and at least one is not shareable.
    Used,
    /// Both are shareable, but only one of them has `emulate-512`.
    Emulation,
    /// The other one has not finished opening it in time.
    Opening,
    /// The other one has not finished closing it in time.
    Closing,
}

/// The right to use some storage, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    key: usize,
    storages: Vec<Storage>,
}

#[derive(Debug)]
struct Entry {
    storages: Vec<Storage>,
    usage: Usage,
    user: String,
    phase: Phase,
    /// Open files that keep other processes off, each open exactly once.
    held: Vec<(Storage, Arc<File>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Opening,
    Open,
    Closing,
}

#[derive(Debug)]
struct Table {
    entries: Slab<Entry>,
    /// For storage with emulated sectors, the blocks that are being written.
    blocks: Vec<(Storage, Weak<BlockLocks>)>,
}

static TABLE: Mutex<Table> = Mutex::new(Table { entries: Slab::new(), blocks: Vec::new() });
/// Signalled when a claim is given up or enters another phase.
static CHANGED: Condvar = Condvar::new();

/// The table is consistent even if a thread panicked while it held the lock.
fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Claim {
    /// Claims storage for `user`, before it is opened. Waits a while for others that are opening or closing
    /// it.
    pub fn make(storages: Vec<Storage>, usage: Usage, user: &str) -> Result<Claim, Refusal> {
        Claim::make_within(Duration::from_secs(CLAIM_SECONDS), storages, usage, user)
    }

    fn make_within(
        patience: Duration,
        storages: Vec<Storage>,
        usage: Usage,
        user: &str,
    ) -> Result<Claim, Refusal> {
        let deadline = Instant::now() + patience;
        let mut table = table();
        while let Some((reason, other)) = table.obstacle(&storages, usage, user) {
            let left = deadline.saturating_duration_since(Instant::now());
            if !matches!(reason, Reason::Opening | Reason::Closing) || left.is_zero() {
                return Err(Refusal { user: other.user.clone(), reason });
            }
            table = CHANGED.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let key = table.entries.insert(Entry {
            storages: storages.clone(),
            usage,
            user: user.to_owned(),
            phase: Phase::Opening,
            held: Vec::new(),
        });
        Ok(Claim { key, storages })
    }

    /// What is claimed: first the storage that was named, then what it is made of.
    pub fn storages(&self) -> &[Storage] {
        &self.storages
    }

    /// Holds an open file that keeps other processes off, by its locks or by being open. If another disk
    /// already holds it, that file is used; else `open` opens it.
    pub fn hold(
        &self,
        storage: Storage,
        open: impl FnOnce() -> io::Result<Arc<File>>,
    ) -> io::Result<Arc<File>> {
        let known = table().held(storage);
        // Nobody else opens it meanwhile: other claims wait until this one's storage is open.
        let file = match known {
            Some(file) => file,
            None => open()?,
        };
        if let Some(entry) = table().entries.get_mut(self.key) {
            entry.held.push((storage, file.clone()));
        }
        Ok(file)
    }

    /// Whether another disk uses storage that overlaps, such as a partition of this device.
    pub fn is_divided(&self) -> bool {
        let table = table();
        let mut others = table.entries.iter().filter(|(key, _)| *key != self.key);
        others.any(|(_, other)| overlap(&self.storages, &other.storages))
    }

    /// Tells that the storage is open: others no longer wait for that.
    pub fn opened(&self) {
        self.enter(Phase::Open);
    }

    /// Tells that the storage is about to be closed: others wait for that instead of being refused.
    pub fn closing(&self) {
        self.enter(Phase::Closing);
    }

    /// The locks of blocks of `block_bytes`, shared by all disks that write parts of them.
    pub fn block_locks(&self, block_bytes: u32) -> Arc<BlockLocks> {
        let storage = self.storages.first();
        let mut table = table();
        table.blocks.retain(|(_, locks)| locks.strong_count() > 0);
        let known = table.blocks.iter().filter(|(other, _)| storage == Some(other));
        let mut known = known.filter_map(|(_, locks)| locks.upgrade());
        if let Some(locks) = known.find(|locks| locks.block_bytes() == block_bytes) {
            return locks;
        }
        let locks = BlockLocks::new(block_bytes);
        table.blocks.extend(storage.map(|storage| (*storage, Arc::downgrade(&locks))));
        locks
    }

    fn enter(&self, phase: Phase) {
        if let Some(entry) = table().entries.get_mut(self.key) {
            entry.phase = phase;
        }
        CHANGED.notify_all();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Closing may wait for storage, so the table is not locked meanwhile. Others that want the same
        // storage wait until all of it is closed.
        self.closing();
        let held = table().entries.get_mut(self.key).map(|entry| std::mem::take(&mut entry.held));
        drop(held);
        table().entries.try_remove(self.key);
        CHANGED.notify_all();
    }
}

impl Table {
    /// Why `storages` can't be claimed now, and whose claim is in the way.
    fn obstacle(&self, storages: &[Storage], usage: Usage, user: &str) -> Option<(Reason, &Entry)> {
        let others = || {
            let entries = self.entries.iter().map(|(_, entry)| entry);
            entries.filter(|other| overlap(storages, &other.storages))
        };
        let is_own = |other: &Entry| !user.is_empty() && other.user == user;
        let refused = others()
            .filter(|other| other.phase == Phase::Open && !is_own(other))
            .find_map(|other| usage.excludes(other.usage).map(|reason| (reason, other)));
        refused.or_else(|| {
            others().find_map(|other| match other.phase {
                Phase::Open => None,
                Phase::Opening => Some((Reason::Opening, other)),
                Phase::Closing => Some((Reason::Closing, other)),
            })
        })
    }

    fn held(&self, storage: Storage) -> Option<Arc<File>> {
        let mut held = self.entries.iter().flat_map(|(_, entry)| &entry.held);
        held.find(|(known, _)| *known == storage).map(|(_, file)| file.clone())
    }
}

/// Whether two lists, each of storage and what it is made of, have bytes in common. Two partitions of one
/// disk have none, although both lists name what the disk is made of.
fn overlap(some: &[Storage], others: &[Storage]) -> bool {
    let any = |so: fn(Storage, Storage) -> bool| {
        some.iter().any(|one| others.iter().any(|other| so(*one, *other)))
    };
    any(Storage::overlaps) && !any(Storage::is_beside)
}

#[cfg(test)]
mod test;
