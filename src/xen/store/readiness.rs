//! One descriptor that is readable while the stream has bytes or an event is kept in memory.
//!
//! A request that waits for its answer also reads the events that arrive before the answer. A thread that
//! then waited for the stream alone would miss them. So the client hands out an epoll instance over the
//! stream and a bell, which stays rung while events are kept. Nobody calls `epoll_wait` on it: for poll(2)
//! and an outer epoll it is readable if one of the two is.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::park::Doorbell;

/// The descriptor and its bell.
#[derive(Debug)]
pub(super) struct Readiness {
    epoll: OwnedFd,
    bell: Doorbell,
    rung: Cell<bool>,
}

impl Readiness {
    /// Makes one over `stream`, which must stay open for as long as this does.
    pub(super) fn over(stream: BorrowedFd<'_>) -> io::Result<Readiness> {
        let bell = Doorbell::new()?;
        // SAFETY: no pointers; a negative result is an error, otherwise the descriptor is ours.
        let raw = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: freshly made and owned by nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(raw) };
        add(&epoll, stream)?;
        add(&epoll, bell.as_fd())?;
        Ok(Readiness { epoll, bell, rung: Cell::new(false) })
    }

    /// Sets whether events are kept.
    pub(super) fn set(&self, kept: bool) {
        match (self.rung.replace(kept), kept) {
            (false, true) => self.bell.ring(),
            (true, false) => self.bell.silence(),
            _ => {}
        }
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn add(epoll: &OwnedFd, source: BorrowedFd<'_>) -> io::Result<()> {
    let interest = libc::EPOLLIN.cast_unsigned();
    let mut event = libc::epoll_event { events: interest, u64: 0 };
    // SAFETY: both descriptors are open and `event` outlives the call.
    let added = unsafe {
        libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, source.as_raw_fd(), &raw mut event)
    };
    if added < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
