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

/// `IORING_ENTER_GETEVENTS`: run the deferred work of completions (`linux/io_uring.h`).
const ENTER_GETEVENTS: u32 = 1;

/// How many operations idle storage gets at once. With fewer, a device finishes them before the next ones
/// come and goes back to sleep; in a virtual machine, waking it again costs an exit to the host.
/// With more than two, the kernel sends none before it has prepared them all (`need_plug`,
/// `io_uring/io_uring.c`).
const HEAD_START: usize = 2;

/// How many times larger each step is than the one before. Storage takes longer for an operation than the
/// kernel takes to submit one, so it stays busy until the next step comes.
const HEAD_START_GROWTH: usize = 2;

/// A head start that is never reached: nothing goes to the kernel before the pass ends.
const NONE: usize = usize::MAX;

/// One thread's ring.
///
/// Its own descriptor does not become readable while completions wait for this thread to run them
/// (deferred task work), so an eventfd signals them. It is enabled only during a sleep.
pub struct Uring {
    ring: IoUring,
    completed: Doorbell,
    in_flight: usize,
    /// When this number of operations wait, they go to the kernel although the pass has not ended.
    head_start: usize,
    /// Vectors of the operations not yet kicked. The kernel copies them when it takes the submissions
    /// (`IORING_FEAT_SUBMIT_STABLE`), so there are never more than those of one pass. Never grows beyond
    /// its capacity, so that the addresses given to the kernel stay valid.
    vectors: Vec<libc::iovec>,
    /// Unused registrations, which are places in the kernel's table of buffers, counted from 1.
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
                format!(
                    "this kernel's io_uring is too old: use Linux {} or later",
                    limits::LINUX_MIN
                ),
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

    /// Asks for what newer kernels (Linux 6.1) offer: only one thread submits, and completions wait until
    /// this thread looks for them instead of interrupting it. Older kernels get a plain ring.
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

    /// Makes the kernel look up and pin the pages of `memory` once, instead of for every operation.
    ///
    /// If dom0 is a PV domain, looking up a page is expensive: a third of what a read of one page costs
    /// the kernel. Pages that gntdev maps can be registered since Linux 6.5; older kernels answer
    /// EOPNOTSUPP.
    pub fn register(&mut self, memory: GuestBuf) -> io::Result<Registration> {
        let registration = self.free.pop().ok_or(io::ErrorKind::QuotaExceeded)?;
        self.set_buffer(registration, vector(&memory))
            .inspect_err(|_| self.free.push(registration))?;
        Ok(registration)
    }

    /// Lets the kernel release the pages once no operation uses them.
    pub fn unregister(&mut self, registration: Registration) {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        match self.set_buffer(registration, nothing) {
            Ok(()) => self.free.push(registration),
            // Its place in the table is lost, and its pages stay pinned until the ring is closed.
            Err(error) => tracing::warn!(%error, "io_uring does not release a buffer"),
        }
    }

    fn set_buffer(&self, registration: Registration, vector: libc::iovec) -> io::Result<()> {
        let place = u32::from(registration.0.get()) - 1;
        // SAFETY: the memory is valid now, and afterwards the kernel itself holds its pages.
        unsafe { self.ring.submitter().register_buffers_update(place, &[vector], None) }.map(drop)
    }

    /// Makes a thread of the kernel begin with an operation at once, because it would wait anyway.
    ///
    /// Otherwise the kernel takes a file of FUSE for one that can be polled, and tries again and again.
    /// If many operations are under way, some never complete (seen with Linux 6.18).
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
            // Whatever the kernel refuses now is submitted again at the end of the pass, which reports
            // errors.
            let _ = self.enter();
        }
        Submitted::Started
    }

    /// Puts an operation into the submission ring, and returns how many wait there. `None`: there is no
    /// room until the kernel has taken some.
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
        // SAFETY: the buffers stay mapped until the ticket is back (GuestBuf's contract), the vectors
        // stay in place until the kernel has taken them, and the queue keeps the file open.
        unsafe { submission.push(&entry.user_data(user_data).flags(flags)) }.ok()?;
        Some(submission.len())
    }

    fn enter(&mut self) -> io::Result<()> {
        // The kernel keeps completions that the ring has no room for until it is entered.
        let (waiting, has_more) = {
            let submission = self.ring.submission();
            (submission.len(), submission.taskrun() || submission.cq_overflow())
        };
        if waiting == 0 && !has_more {
            return Ok(());
        }
        let to_submit = u32::try_from(waiting).expect("at most the ring's entries");
        // SAFETY: no argument is passed; `push` made all entries valid.
        let entered = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(to_submit, 0, ENTER_GETEVENTS, None)
        };
        match entered {
            Ok(submitted) if submitted == waiting => {
                self.vectors.clear();
                Ok(())
            }
            // The rest stays queued with its vectors until the next kick.
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

    /// The bell that rings for a completion. Others may ring it for their own.
    pub fn bell(&self) -> &Doorbell {
        &self.completed
    }

    /// Ends a sleep. `signalled`: the descriptor was readable.
    pub fn disarm(&mut self, signalled: bool) {
        self.ring.completion().disable_eventfd();
        if signalled {
            self.completed.silence();
        }
    }

    /// Readable when something has completed since [`Layer::arm`].
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.completed.as_fd()
    }
}

impl Layer for Uring {
    /// An open file or device.
    type Target = RawFd;

    /// If nothing is in flight storage is idle, so it does not have to wait for the end of the pass: the
    /// first [`HEAD_START`] operations go to the kernel at once, and each step after that has
    /// [`HEAD_START_GROWTH`] times as many. An operation is never done or parked when this returns.
    #[inline(always)]
    fn submit(&mut self, file: &RawFd, operation: &IoOp<'_>, ticket: Ticket, by: By) -> Submitted {
        match by {
            By::Worker => self.submit_as(*file, operation, ticket, squeue::Flags::empty()),
            By::Thread => self.submit_to_wait(*file, operation, ticket),
        }
    }

    /// Submits everything taken, and runs completions that wait for this thread.
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

/// Allows the kernel one thread for each operation that waits in one: flushes and discards always do, and
/// writes to a frozen or hung filesystem. By default it has only four per core.
fn allow_kernel_threads(ring: &IoUring) {
    // The second number is for endless files such as sockets; 0 leaves it unchanged.
    let mut threads = [limits::URING_COMPLETIONS, 0];
    if let Err(error) = ring.submitter().register_iowq_max_workers(&mut threads) {
        tracing::info!(
            %error,
            "io_uring has few threads here (Linux 5.15 or later allows more): while storage hangs, \
             flushes and discards of other disks may have to wait"
        );
    }
}

/// Creates the kernel's table of buffers, and returns its places, the first one last. Kernels before 5.19
/// can't have an empty table, and get none.
fn table(ring: &IoUring) -> Vec<Registration> {
    match ring.submitter().register_buffers_sparse(limits::REGISTERED_BUFFERS.into()) {
        Ok(()) => {
            let places = (1..=limits::REGISTERED_BUFFERS).rev();
            places.filter_map(NonZeroU16::new).map(Registration).collect()
        }
        Err(error) => {
            tracing::info!(%error, "io_uring can't register buffers here, which costs some CPU time");
            Vec::new()
        }
    }
}

/// The kernel's form of an operation; appends its vectors. `None`: there is no room for them, because the
/// last kick submitted only some operations, and the vectors of all are still there.
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
        // The blocks of the file become a hole, which reads as zeroes.
        IoOp::Discard { offset, len, .. } => opcode::Fallocate::new(file, len)
            .offset(offset)
            .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            .build(),
    })
}

/// The memory of one operation.
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

/// The registration that all of these buffers share.
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
