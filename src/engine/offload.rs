//! Threads beside the worker, for operations that have no asynchronous form in the kernel.
//!
//! Discards of block devices are `ioctl`s that may take long, or never return. Each queue has one at a
//! time, in a thread that does nothing else meanwhile, so a device that hangs delays no other device.
//! Threads start on demand, and end after a while without work.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::{Completion, Submitted, Ticket};
use crate::backing::DeviceHandle;
use crate::limits::{DEVICE_DISCARDS_PER_QUEUE, DISCARD_THREAD_IDLE_SECONDS};
use crate::park::Doorbell;
use crate::pool::{Lanes, Pool};

/// A discard of a device, which any thread can do.
pub type Job = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// The worker's end.
#[derive(Debug)]
pub struct Offload {
    lanes: Lanes<Task>,
    shared: Arc<Shared>,
    results: Receiver<Completion>,
    /// Tasks handed to threads and not yet reaped.
    begun: usize,
}

/// A job and the ticket of its result.
struct Task {
    job: Job,
    ticket: Ticket,
}

/// What the worker and the threads share. It is locked only briefly, and only for discards.
#[derive(Debug)]
struct Shared {
    hand_over: Mutex<HandOver>,
    has_task: Condvar,
    results: Sender<Completion>,
    bell: Doorbell,
}

/// Tasks on their way to threads: at most one for each queue.
#[derive(Debug, Default)]
struct HandOver {
    tasks: VecDeque<Task>,
    /// Threads that wait for a task.
    idle: usize,
    threads: usize,
    closed: bool,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

impl Offload {
    /// No thread yet; `bell` is rung for each completion.
    pub fn new(bell: Doorbell) -> Offload {
        let (sender, results) = unbounded();
        let (hand_over, has_task) = Default::default();
        let shared = Arc::new(Shared { hand_over, has_task, results: sender, bell });
        let lanes = Lanes::new(Pool::new(DEVICE_DISCARDS_PER_QUEUE, 0));
        Offload { lanes, shared, results, begun: 0 }
    }

    /// Takes a discard of a block device.
    pub fn discard(
        &mut self,
        device: Arc<DeviceHandle>,
        (offset, len): (u64, u64),
        secure: bool,
        ticket: Ticket,
    ) -> Submitted {
        self.submit(Box::new(move || device.discard(offset, len, secure)), ticket)
    }

    fn submit(&mut self, job: Job, ticket: Ticket) -> Submitted {
        let queue = ticket.queue();
        if !self.lanes.take(queue) {
            self.lanes.park(queue, Task { job, ticket });
            return Submitted::Parked;
        }
        self.begin(Task { job, ticket });
        Submitted::Started
    }

    /// Hands over a task after a place was taken for it.
    fn begin(&mut self, task: Task) {
        self.begun += 1;
        let mut hand_over = self.shared.lock();
        hand_over.tasks.push_back(task);
        if hand_over.idle >= hand_over.tasks.len() {
            self.shared.has_task.notify_one();
            return;
        }
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("discard".to_owned());
        match thread.spawn(move || shared.work()) {
            Ok(_) => hand_over.threads += 1,
            // One of the threads will do it.
            Err(_) if hand_over.threads > 0 => {}
            Err(error) => {
                let tasks = std::mem::take(&mut hand_over.tasks);
                drop(hand_over);
                tasks
                    .into_iter()
                    .for_each(|task| self.shared.finish(task.ticket, Err(error_like(&error))));
            }
        }
    }

    /// Appends what has completed, and begins the tasks that waited for it.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.begun > 0 {
            self.take_results(done);
        }
    }

    #[cold]
    fn take_results(&mut self, done: &mut Vec<Completion>) {
        while let Ok(completion) = self.results.try_recv() {
            self.begun -= 1;
            let queue = completion.ticket.queue();
            self.lanes.give_back(queue);
            done.push(completion);
            if let Some(task) = self.lanes.admit(queue) {
                self.begin(task);
            }
        }
    }

    /// Whether there is something to reap.
    pub fn has_completed(&self) -> bool {
        !self.results.is_empty()
    }

    /// Operations taken and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.begun + self.lanes.parked()
    }
}

/// Each thread ends after its task. One that hangs ends with the process.
impl Drop for Offload {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.has_task.notify_all();
    }
}

impl Shared {
    /// Does tasks until there have been none for a while.
    fn work(&self) {
        while let Some(Task { job, ticket }) = self.next() {
            self.finish(ticket, job());
        }
    }

    fn next(&self) -> Option<Task> {
        let mut hand_over = self.lock();
        loop {
            if hand_over.closed {
                return None;
            }
            if let Some(task) = hand_over.tasks.pop_front() {
                return Some(task);
            }
            hand_over.idle += 1;
            let wait = Duration::from_secs(DISCARD_THREAD_IDLE_SECONDS);
            let (woken, waited) =
                self.has_task.wait_timeout(hand_over, wait).unwrap_or_else(PoisonError::into_inner);
            hand_over = woken;
            hand_over.idle -= 1;
            // A task that came at the last moment is still taken.
            if waited.timed_out() && hand_over.tasks.is_empty() {
                hand_over.threads -= 1;
                return None;
            }
        }
    }

    fn finish(&self, ticket: Ticket, result: io::Result<()>) {
        let result = match result {
            Ok(()) => 0,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        };
        // If the worker has ended, nobody waits for the result.
        let _ = self.results.send(Completion { ticket, result });
        self.bell.ring();
    }

    /// A thread that panicked left it valid, so a poisoned lock is no error.
    fn lock(&self) -> MutexGuard<'_, HandOver> {
        self.hand_over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn error_like(error: &io::Error) -> io::Error {
    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EAGAIN))
}

#[cfg(test)]
mod test {
    use std::os::fd::AsFd;
    use std::sync::mpsc;

    use super::*;
    use crate::park;

    const HANG: Duration = Duration::from_secs(60);

    /// Waits for `count` completions.
    fn reap(offload: &mut Offload, count: usize) -> Vec<(usize, u32, i32)> {
        let mut done = Vec::new();
        while done.len() < count {
            assert!(park::sleep(&[offload.shared.bell.clone().as_fd()], Some(HANG))[0], "it hangs");
            offload.shared.bell.silence();
            offload.reap(&mut done);
        }
        let told = |done: Completion| (done.ticket.queue(), done.ticket.slot(), done.result);
        done.into_iter().map(told).collect()
    }

    #[test]
    fn a_device_that_hangs_holds_up_no_other_queues_discards() {
        let mut offload = Offload::new(Doorbell::new().unwrap());
        let (release, hung) = mpsc::channel::<()>();
        let hang = move || hung.recv().map_err(io::Error::other);
        assert_eq!(offload.submit(Box::new(hang), Ticket::new(0, 0)), Submitted::Started);
        for slot in 1..4 {
            let submitted = offload.submit(Box::new(|| Ok(())), Ticket::new(0, slot));
            assert_eq!(submitted, Submitted::Parked, "one at a time for each queue");
        }
        for queue in 1..20 {
            let enospc = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
            let submitted = offload.submit(Box::new(enospc), Ticket::new(queue, 7));
            assert_eq!(submitted, Submitted::Started);
            let expected = [(queue as usize, 7, -libc::ENOSPC)];
            assert_eq!(reap(&mut offload, 1), expected);
            while offload.shared.lock().idle == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(offload.shared.lock().threads, 2, "the one that is idle is used again");
        assert_eq!(offload.in_flight(), 4);
        release.send(()).unwrap();
        assert_eq!(reap(&mut offload, 4), [0, 1, 2, 3].map(|slot| (0, slot, 0)));
        assert_eq!(offload.in_flight(), 0);
    }
}
