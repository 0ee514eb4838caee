//! Operations that the kernel has no asynchronous form of, done by a thread beside the worker.
//!
//! Discards of block devices are `ioctl`s that may take long. They are rare, so one thread does
//! them in order; it starts with the first.

use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::{Completion, Ticket};
use crate::backing::DeviceHandle;
use crate::backing::RawImage;
use crate::park::Doorbell;

/// The worker's end.
#[derive(Debug)]
pub struct Offload {
    bell: Doorbell,
    running: Option<Running>,
    in_flight: usize,
}

/// The channels to and from the thread, which ends when they close. What is in them is bounded by
/// the rings' entries.
#[derive(Debug)]
struct Running {
    jobs: Sender<Job>,
    results: Receiver<Completion>,
}

#[derive(Debug)]
struct Job {
    device: Arc<DeviceHandle>,
    offset: u64,
    len: u64,
    secure: bool,
    ticket: Ticket,
}

impl Offload {
    /// No thread yet; `bell` is rung for each completion.
    pub fn new(bell: Doorbell) -> Offload {
        Offload { bell, running: None, in_flight: 0 }
    }

    /// Takes a discard of a block device.
    pub fn discard(
        &mut self,
        image: &RawImage,
        offset: u64,
        len: u64,
        secure: bool,
        ticket: Ticket,
    ) -> Result<(), Ticket> {
        let Some(running) = self.running() else { return Err(ticket) };
        let job = Job { device: image.device_handle(), offset, len, secure, ticket };
        running.jobs.send(job).map_err(|refused| refused.0.ticket)?;
        self.in_flight += 1;
        Ok(())
    }

    fn running(&mut self) -> Option<&Running> {
        if self.running.is_none() {
            let (jobs, waiting) = unbounded::<Job>();
            let (done, results) = unbounded();
            let bell = self.bell.clone();
            let body = move || {
                for Job { device, offset, len, secure, ticket } in waiting {
                    let result = match device.discard(offset, len, secure) {
                        Ok(()) => 0,
                        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
                    };
                    if done.send(Completion { ticket, result }).is_err() {
                        return;
                    }
                    bell.ring();
                }
            };
            std::thread::Builder::new().name("discard".to_owned()).spawn(body).ok()?;
            self.running = Some(Running { jobs, results });
        }
        self.running.as_ref()
    }

    /// Appends what has completed.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.in_flight == 0 {
            return;
        }
        let before = done.len();
        done.extend(self.running.iter().flat_map(|running| running.results.try_iter()));
        self.in_flight -= done.len() - before;
    }

    /// Whether something waits to be reaped.
    pub fn has_completed(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.results.is_empty())
    }

    /// Operations taken and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }
}
