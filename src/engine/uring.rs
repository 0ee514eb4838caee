//! io_uring: all operations of a pass go to the kernel in one system call.
#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::layer::Layer;
use super::vectors::{append, vector};
use super::{By, Completion, IoOp, Submitted, Ticket};
use crate::limits;
use crate::park::Doorbell;
use crate::xen::shm::{GuestBuf, Registration, full_fence};

/// `IORING_ENTER_GETEVENTS`: run the completions' deferred work (`linux/io_uring.h`).
const ENTER_GETEVENTS: u32 = 1;

/// Operations that go to storage at once where it has none. A device that has finished these before the
/// next ones come goes back to sleep, and waking it again costs an exit to the host in a virtual machine;
/// more than two the kernel keeps from the device until it has prepared them all (`need_plug`,
/// `io_uring/io_uring.c`).
const HEAD_START: usize = 2;

/// How many times the last ones' number follow them together: what storage has to do lasts until those
/// are there, for it takes longer for an operation than the kernel to submit it.
const HEAD_START_GROWTH: usize = 2;

/// No operation goes to the kernel before the pass ends.
const NONE: usize = usize::MAX;

/// One thread's ring.
///
/// Its own descriptor does not become readable while completions wait for this thread (deferred
/// task work), so an eventfd tells of them; it is switched on only for the time of a sleep.
pub struct Uring {
    ring: IoUring,
    completed: Doorbell,
    in_flight: usize,
    /// So many operations that wait for the kernel go to it before the pass has ended.
    head_start: usize,
    /// Vectors of the operations not yet kicked; the kernel copies them as it takes the
    /// submissions (`IORING_FEAT_SUBMIT_STABLE`), so one pass's worth is enough. Never grows past
    /// its capacity, so that the addresses given to the kernel stay good.
    vectors: Vec<libc::iovec>,
    /// Registrations that can be had: the kernel's table of buffers has one more of them.
    free: Vec<Registration>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Uring {
    /// Sets up a ring that only the calling thread uses.
    pub fn new() -> io::Result<Uring> {
        let ring = Self::build()?;
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "io_uring of this kernel is too old: Linux 5.5 or later is needed",
            ));
        }
        let vectors =
            Vec::with_capacity(limits::URING_ENTRIES as usize * limits::SEGMENTS_PER_REQUEST);
        let completed = Doorbell::new()?;
        ring.submitter().register_eventfd(completed.as_fd().as_raw_fd())?;
        allow_kernel_threads(&ring);
        let free = table(&ring);
        let mut uring = Uring { ring, completed, in_flight: 0, head_start: NONE, vectors, free };
        uring.disarm(false);
        Ok(uring)
    }

    /// The kernel is told as much as it understands: that one thread submits and that completions
    /// may wait until that thread looks (Linux 6.1), which saves interrupts of it.
    fn build() -> io::Result<IoUring> {
        let newest = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(limits::URING_COMPLETIONS)
            .build(limits::URING_ENTRIES);
        match newest {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
                .setup_cqsize(limits::URING_COMPLETIONS)
                .build(limits::URING_ENTRIES),
            other => other,
        }
    }

    /// Has the kernel look up and pin the pages of `memory` now, once, instead of for every
    /// operation in it.
    ///
    /// Where dom0 is a PV domain its page tables make looking up dear: a third of what a read of one
    /// page costs the kernel. Pages that gntdev maps can be registered since Linux 6.5, before that
    /// EOPNOTSUPP says that they can't.
    pub fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        let registration = self.free.pop().ok_or(io::ErrorKind::QuotaExceeded)?;
        self.set_buffer(registration, vector(&memory))
            .inspect_err(|_| self.free.push(registration))?;
        Ok(registration)
    }

    /// Has the kernel let go of the pages once no operation is in them.
    pub fn unregister(&mut self, registration: Registration) {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        match self.set_buffer(registration, nothing) {
            Ok(()) => self.free.push(registration),
            // Its place in the table is lost, its pages stay pinned until the ring is closed.
            Err(error) => tracing::warn!(%error, "io_uring does not let go of a buffer"),
        }
    }

    fn set_buffer(&self, registration: Registration, vector: libc::iovec) -> io::Result<()> {
        let place = u32::from(registration.0.get()) - 1;
        // SAFETY: the memory is valid now, and the kernel itself keeps its pages after that.
        unsafe { self.ring.submitter().register_buffers_update(place, &[vector], None) }.map(drop)
    }

    /// The same as [`Layer::submit`] for a file whose operations always wait: a thread of the kernel
    /// begins with it at once.
    ///
    /// The kernel believes that files of FUSE can be polled, and would try again and again; if many
    /// operations are under way, some never complete (seen with Linux 6.18).
    #[cold]
    fn submit_to_wait(&mut self, file: RawFd, operation: &IoOp<'_>, ticket: Ticket) -> Submitted {
        self.submit_as(file, operation, ticket, squeue::Flags::ASYNC)
    }

    #[inline]
    fn submit_as(
        &mut self,
        file: RawFd,
        operation: &IoOp<'_>,
        ticket: Ticket,
        flags: squeue::Flags,
    ) -> Submitted {
        let user_data = ticket.into_user_data();
        let mut pushed = self.push(file, operation, user_data, flags);
        if pushed.is_none() && self.enter().is_ok() {
            pushed = self.push(file, operation, user_data, flags);
        }
        let Some(waiting) = pushed else {
            return Submitted::Full(Ticket::from_user_data(user_data));
        };
        if self.in_flight == 0 {
            self.head_start = HEAD_START;
        }
        self.in_flight += 1;
        if waiting == self.head_start {
            self.head_start = self.head_start.saturating_mul(HEAD_START_GROWTH);
            // What the kernel refuses now, it is asked again at the pass's end, where errors count.
            let _ = self.enter();
        }
        Submitted::Started
    }

    /// Puts an operation where the kernel takes it; returns how many wait there. `None`: there is no room
    /// before the kernel has taken what is there.
    #[inline(always)]
    fn push(
        &mut self,
        file: RawFd,
        operation: &IoOp<'_>,
        user_data: u64,
        flags: squeue::Flags,
    ) -> Option<usize> {
        let mut submission = self.ring.submission();
        if submission.is_full() {
            return None;
        }
        let entry = entry(&mut self.vectors, types::Fd(file), operation)?;
        // SAFETY: the buffers stay mapped until the ticket is back (GuestBuf's contract); the
        // vectors stay in place until kick; the file is open until then (the queue holds it).
        unsafe { submission.push(&entry.user_data(user_data).flags(flags)) }.ok()?;
        Some(submission.len())
    }

    fn enter(&mut self) -> io::Result<()> {
        // More completions than the ring has room for are kept by the kernel until it is entered.
        let (waiting, has_more) = {
            let submission = self.ring.submission();
            (submission.len(), submission.taskrun() || submission.cq_overflow())
        };
        if waiting == 0 && !has_more {
            return Ok(());
        }
        let to_submit = u32::try_from(waiting).expect("at most the ring's entries");
        // SAFETY: no argument is passed; the entries were pushed as `submit` demands.
        let entered = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(to_submit, 0, ENTER_GETEVENTS, None)
        };
        match entered {
            Ok(submitted) if submitted == waiting => {
                self.vectors.clear();
                Ok(())
            }
            // The rest stays queued, vectors and all, for the next kick.
            Ok(_) => Ok(()),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The bell that rings for a completion; others may ring it for theirs.
    pub fn bell(&self) -> &Doorbell {
        &self.completed
    }

    /// Ends the time of sleep; `signalled`: the descriptor was readable.
    pub fn disarm(&mut self, signalled: bool) {
        self.ring.completion().disable_eventfd();
        if signalled {
            self.completed.silence();
        }
    }

    /// Readable when something has completed since [`Uring::arm`].
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.completed.as_fd()
    }
}

impl Layer for Uring {
    /// An open file or device.
    type Target = RawFd;

    /// Storage with nothing in flight is waiting, and may begin before the pass has ended: the first
    /// [`HEAD_START`] operations go to the kernel at once, and [`HEAD_START_GROWTH`] times as many in
    /// each step after that.
    #[inline(always)]
    fn submit(&mut self, file: &RawFd, operation: &IoOp<'_>, ticket: Ticket, by: By) -> Submitted {
        match by {
            By::Worker => self.submit_as(*file, operation, ticket, squeue::Flags::empty()),
            By::Thread => self.submit_to_wait(*file, operation, ticket),
        }
    }

    /// Submits what was taken, and lets the kernel finish completions that wait for this thread.
    fn kick(&mut self) -> io::Result<()> {
        self.head_start = NONE;
        self.enter()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.in_flight == 0 {
            return;
        }
        let before = done.len();
        done.extend(self.ring.completion().map(|entry| Completion {
            ticket: Ticket::from_user_data(entry.user_data()),
            result: entry.result(),
        }));
        self.in_flight -= done.len() - before;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn arm(&mut self) -> io::Result<bool> {
        self.ring.completion().enable_eventfd();
        full_fence();
        self.kick()?;
        let waiting = !self.ring.submission().is_empty();
        Ok(waiting || !self.ring.completion().is_empty())
    }
}

/// Lets the kernel start a thread for each operation that has to wait in one: writes to a frozen or hung
/// filesystem do, flushes and discards always, and of its own accord it has only four a core for all.
fn allow_kernel_threads(ring: &IoUring) {
    // The second number is for files that never end, such as sockets; 0 leaves it as it is.
    let mut threads = [limits::URING_COMPLETIONS, 0];
    if let Err(error) = ring.submitter().register_iowq_max_workers(&mut threads) {
        tracing::info!(
            %error,
            "io_uring has few threads here (Linux 5.15 lets their number be set): beside storage that \
             hangs, flushes and discards of other disks may have to wait"
        );
    }
}

/// Makes the kernel's table of buffers, and the names of its places, the first one last. A kernel that
/// can't have an empty one (before 5.19) gets none.
fn table(ring: &IoUring) -> Vec<Registration> {
    match ring.submitter().register_buffers_sparse(limits::REGISTERED_BUFFERS.into()) {
        Ok(()) => {
            let places = (1..=limits::REGISTERED_BUFFERS).rev();
            places.filter_map(NonZeroU16::new).map(Registration).collect()
        }
        Err(error) => {
            tracing::info!(%error, "io_uring registers no buffers here, which costs some CPU");
            Vec::new()
        }
    }
}

/// The kernel's form of an operation, with its vectors behind those that are there. `None`: there is no
/// room for them, because after a kick that submitted only some, those of all are still there.
#[inline]
fn entry(
    vectors: &mut Vec<libc::iovec>,
    file: types::Fd,
    operation: &IoOp<'_>,
) -> Option<squeue::Entry> {
    Some(match *operation {
        IoOp::Read { offset, buffers } => match place(vectors, buffers)? {
            Place::Registered(one, buffer) => {
                opcode::ReadFixed::new(file, one.iov_base.cast(), len(one), buffer)
                    .offset(offset)
                    .build()
            }
            Place::One(one) => {
                opcode::Read::new(file, one.iov_base.cast(), len(one)).offset(offset).build()
            }
            Place::Many(first, count) => {
                opcode::Readv::new(file, first, count).offset(offset).build()
            }
        },
        IoOp::Write { offset, buffers } => match place(vectors, buffers)? {
            Place::Registered(one, buffer) => {
                opcode::WriteFixed::new(file, one.iov_base.cast(), len(one), buffer)
                    .offset(offset)
                    .build()
            }
            Place::One(one) => {
                opcode::Write::new(file, one.iov_base.cast(), len(one)).offset(offset).build()
            }
            Place::Many(first, count) => {
                opcode::Writev::new(file, first, count).offset(offset).build()
            }
        },
        IoOp::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        // Of a file: its blocks become a hole, which reads as zeroes.
        IoOp::Discard { offset, len, .. } => opcode::Fallocate::new(file, len)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
    })
}

/// Where the data of one operation is.
enum Place {
    /// Within one buffer of the kernel's table.
    Registered(libc::iovec, u16),
    One(libc::iovec),
    Many(*const libc::iovec, u32),
}

#[inline]
fn place(vectors: &mut Vec<libc::iovec>, buffers: &[GuestBuf]) -> Option<Place> {
    let [buffer] = buffers else { return place_several(vectors, buffers) };
    Some(Place::of_one(vector(buffer), buffer.registration()))
}

fn place_several(vectors: &mut Vec<libc::iovec>, buffers: &[GuestBuf]) -> Option<Place> {
    if vectors.capacity() - vectors.len() < buffers.len() {
        return None;
    }
    let first = vectors.len();
    append(vectors, buffers);
    Some(match vectors[first..] {
        [one] => {
            vectors.truncate(first);
            Place::of_one(one, common_registration(buffers))
        }
        ref many => {
            let count = u32::try_from(many.len()).expect("at most a request's segments");
            Place::Many(many.as_ptr(), count)
        }
    })
}

impl Place {
    #[inline]
    fn of_one(vector: libc::iovec, registration: Option<Registration>) -> Place {
        match registration {
            Some(Registration(number)) => Place::Registered(vector, number.get() - 1),
            None => Place::One(vector),
        }
    }
}

/// What an engine knows all of these buffers as.
fn common_registration(buffers: &[GuestBuf]) -> Option<Registration> {
    let (first, others) = buffers.split_first()?;
    let registration = first.registration()?;
    let same = |other: &GuestBuf| other.registration() == Some(registration);
    others.iter().all(same).then_some(registration)
}

#[inline]
fn len(vector: libc::iovec) -> u32 {
    u32::try_from(vector.iov_len).expect("a request is far below 4 GiB")
}

#[cfg(test)]
mod test;
