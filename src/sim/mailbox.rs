//! Where a handle's event channels become pending: bits in shared memory and one bell.
//!
//! As in Xen's shared info page each port (here: slot of a handle) has a pending bit and a mask
//! bit. A notification sets the pending bit and rings the bell only if the port was neither
//! pending nor masked, so a burst costs one system call and a masked port none. A third word per
//! slot, the link, tells the owner whom it is connected to: 0 nobody, else a number that changes
//! with every connection, so that notifying needs no question to the hypervisor.
//!
//! Sequential consistency carries the protocol: who notifies stores *pending*, then loads *mask*;
//! who unmasks stores *mask*, then loads *pending*. One of the two sees the other and rings.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::memory::SharedFile;
use crate::limits::SIM_PORTS_PER_HANDLE as SLOTS;
use crate::park::Doorbell;

const WORDS: usize = SLOTS / 64;
const PENDING_AT: usize = 0;
const MASKED_AT: usize = PENDING_AT + WORDS * size_of::<u64>();
const LINKS_AT: usize = MASKED_AT + WORDS * size_of::<u64>();
const BYTES: usize = LINKS_AT + SLOTS * size_of::<u32>();

/// The pending and mask bits of one handle, and its bell.
#[derive(Debug)]
pub struct Mailbox {
    shared: SharedFile,
    bell: File,
}

impl Mailbox {
    /// An empty one.
    pub fn create() -> io::Result<Mailbox> {
        let shared = SharedFile::create(c"event channels", BYTES)?;
        let bell = Doorbell::new()?.as_fd().try_clone_to_owned()?;
        Ok(Mailbox { shared, bell: bell.into() })
    }

    /// One that the hypervisor made: its memory and its bell, as they arrived.
    pub fn open(fds: Vec<OwnedFd>) -> io::Result<Mailbox> {
        let [shared, bell]: [OwnedFd; 2] =
            fds.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
        let shared = SharedFile::open(shared)?;
        if shared.len() != BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Mailbox { shared, bell: bell.into() })
    }

    /// The memory and the bell, to be passed on.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.shared.as_fd(), self.bell.as_fd()]
    }

    /// Makes a slot pending.
    pub fn notify(&self, slot: usize) {
        let bit = bit(slot);
        let was_pending = self.pending(slot / 64).fetch_or(bit, Ordering::SeqCst) & bit != 0;
        if !was_pending && self.masked(slot / 64).load(Ordering::SeqCst) & bit == 0 {
            self.ring();
        }
    }

    /// Lets a slot become pending again.
    pub fn unmask(&self, slot: usize) {
        let bit = bit(slot);
        self.masked(slot / 64).fetch_and(!bit, Ordering::SeqCst);
        if self.pending(slot / 64).load(Ordering::SeqCst) & bit != 0 {
            self.ring();
        }
    }

    /// Silences the bell and takes those of the first `slots` that are pending and unmasked, which
    /// become masked. `take` gets each and says whether there is room for more. Returns whether the
    /// bell had rung. It may ring with no slot ready: an earlier call may have taken that slot.
    pub fn take_pending(&self, slots: usize, mut take: impl FnMut(usize) -> bool) -> bool {
        let rang = self.silence();
        let words = slots.div_ceil(64);
        for word in 0..words {
            let mut ready = self.ready(word);
            while ready != 0 {
                let slot = word * 64 + ready.trailing_zeros() as usize;
                ready &= ready - 1;
                self.masked(word).fetch_or(bit(slot), Ordering::SeqCst);
                self.pending(word).fetch_and(!bit(slot), Ordering::SeqCst);
                if !take(slot) {
                    // Ring again for the slots that are left, because the bell was silenced above.
                    if ready != 0 || (word + 1..words).any(|word| self.ready(word) != 0) {
                        self.ring();
                    }
                    return rang;
                }
            }
        }
        rang
    }

    /// Makes a slot as new: not pending, not masked, connected to nobody.
    pub fn reset(&self, slot: usize) {
        self.link(slot).store(0, Ordering::SeqCst);
        self.pending(slot / 64).fetch_and(!bit(slot), Ordering::SeqCst);
        self.masked(slot / 64).fetch_and(!bit(slot), Ordering::SeqCst);
    }

    /// Whom a slot is connected to; the hypervisor writes it.
    pub fn link(&self, slot: usize) -> &AtomicU32 {
        assert!(slot < SLOTS);
        self.shared.word(LINKS_AT + slot * size_of::<u32>())
    }

    fn pending(&self, word: usize) -> &AtomicU64 {
        assert!(word < WORDS);
        self.shared.double_word(PENDING_AT + word * size_of::<u64>())
    }

    fn masked(&self, word: usize) -> &AtomicU64 {
        assert!(word < WORDS);
        self.shared.double_word(MASKED_AT + word * size_of::<u64>())
    }

    /// Pending and not masked.
    fn ready(&self, word: usize) -> u64 {
        match self.pending(word).load(Ordering::SeqCst) {
            0 => 0,
            pending => pending & !self.masked(word).load(Ordering::SeqCst),
        }
    }

    fn ring(&self) {
        // It fails only if the counter is full, and then the descriptor is readable anyway.
        let _ = (&self.bell).write(&1u64.to_ne_bytes());
    }

    /// Whether it had rung; an error says that nobody did.
    fn silence(&self) -> bool {
        (&self.bell).read(&mut [0; 8]).is_ok()
    }
}

/// The bell: readable while a slot is pending and unmasked.
impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

fn bit(slot: usize) -> u64 {
    1 << (slot % 64)
}

#[cfg(test)]
mod test {
    use super::*;

    fn taken(mailbox: &Mailbox, room: usize) -> Vec<usize> {
        let mut slots = Vec::new();
        mailbox.take_pending(SLOTS, |slot| {
            slots.push(slot);
            slots.len() < room
        });
        slots
    }

    #[test]
    fn a_burst_of_notifications_is_one_event() {
        let mailbox = Mailbox::create().unwrap();
        for _ in 0..3 {
            mailbox.notify(70);
        }
        assert_eq!(taken(&mailbox, 8), [70]);
        assert!(taken(&mailbox, 8).is_empty());
    }

    #[test]
    fn what_comes_while_masked_is_kept_until_the_unmask() {
        let mailbox = Mailbox::create().unwrap();
        mailbox.notify(1);
        assert_eq!(taken(&mailbox, 8), [1]);
        mailbox.notify(1);
        assert!(taken(&mailbox, 8).is_empty());
        mailbox.unmask(1);
        assert_eq!(taken(&mailbox, 8), [1]);
        mailbox.unmask(1);
        assert!(taken(&mailbox, 8).is_empty());
    }

    #[test]
    fn ports_that_found_no_room_come_next_time() {
        let mailbox = Mailbox::create().unwrap();
        for slot in [0, 63, 64, SLOTS - 1] {
            mailbox.notify(slot);
        }
        assert_eq!(taken(&mailbox, 3), [0, 63, 64]);
        assert_eq!(taken(&mailbox, 3), [SLOTS - 1]);
    }

    #[test]
    fn the_bell_rings_on_only_for_what_found_no_room() {
        let mailbox = Mailbox::create().unwrap();
        mailbox.notify(3);
        mailbox.notify(4);
        assert_eq!(taken(&mailbox, 1), [3]);
        assert_eq!(taken(&mailbox, 1), [4], "the bell rang on for it");
        assert!(!mailbox.take_pending(SLOTS, |_| true), "and then for nobody");
    }

    #[test]
    fn a_bell_that_is_heard_late_is_told_from_silence() {
        let mailbox = Mailbox::create().unwrap();
        mailbox.notify(3);
        assert_eq!(taken(&mailbox, 8), [3]);
        // Who notified had set the slot, and rings only now.
        mailbox.ring();
        assert!(mailbox.take_pending(SLOTS, |_| true));
        assert!(!mailbox.take_pending(SLOTS, |_| true));
    }

    #[test]
    fn a_reset_slot_forgets_what_was_pending() {
        let mailbox = Mailbox::create().unwrap();
        mailbox.notify(5);
        mailbox.reset(5);
        assert!(taken(&mailbox, 8).is_empty());
    }

    #[test]
    fn no_event_is_lost_between_two_threads() {
        const EVENTS: u32 = 20_000;
        let mailbox = Mailbox::create().unwrap();
        let sent = AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..EVENTS {
                    sent.fetch_add(1, Ordering::SeqCst);
                    mailbox.notify(9);
                }
            });
            // A lost event would leave this asleep for ever.
            while sent.load(Ordering::SeqCst) < EVENTS {
                crate::park::sleep(&[mailbox.as_fd()], None);
                for slot in taken(&mailbox, 8) {
                    mailbox.unmask(slot);
                }
            }
        });
    }
}
