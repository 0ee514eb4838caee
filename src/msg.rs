//! All that crosses between the control thread and the workers: plain data, no Xen descriptor and no guest
//! mapping. A command carries numbers and an opened image; a report carries results.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use hdrhistogram::Histogram;

use crate::backing::Image;
pub use crate::blkif::Protocol;
use crate::blkif::request::DiskRules;
use crate::budget::GrantBudget;
use crate::limits;
use crate::metrics::QueueCounters;
use crate::park::Doorbell;
use crate::units::{DomId, GrantRef, Port, QueueId};

/// One connection of one disk: unique in the life of the daemon, so that a report about an earlier
/// connection of the same disk is recognised as stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// One queue of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueKey {
    /// The connection.
    pub connection: ConnectionId,
    /// Its ring.
    pub queue: QueueId,
}

/// The number of a worker, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub usize);

/// What control asks of a worker. Each command names the report that answers it.
#[derive(Debug)]
pub enum Command {
    /// Map the ring, bind the event channel, serve: [`Report::Connected`] or
    /// [`Report::ConnectFailed`].
    Connect(Box<Connect>),
    /// Finish what is in flight, then unmap and unbind everything: [`Report::Disconnected`]. Also for a
    /// queue that failed; for an unknown key, answered at once.
    Disconnect(QueueKey),
    /// Serve another image once what is in flight on the old one is finished:
    /// [`Report::ImageReplaced`]. For an unknown key, answered at once.
    ReplaceImage(Box<ReplaceImage>),
    /// Hand over the latencies recorded since the last time: [`Report::Latency`].
    TakeLatency(QueueKey),
    /// Report what is in flight: [`Report::InFlight`]. For an unknown key, nothing is.
    TellInFlight(QueueKey),
    /// Disconnect every queue, then end the thread: [`Report::Stopped`].
    Stop,
}

/// What a worker needs to serve one ring.
#[derive(Debug)]
pub struct Connect {
    /// The queue's name in all further messages.
    pub key: QueueKey,
    /// The frontend's domain.
    pub frontend: DomId,
    /// Granted ring pages, in order; a power of two of them, at most `limits::RING_PAGES_MAX`.
    pub ring_refs: Vec<GrantRef>,
    /// The frontend's event channel.
    pub port: Port,
    /// The layout of its ring entries.
    pub protocol: Protocol,
    /// How its data pages are reached.
    pub grant_mode: GrantMode,
    /// The budget of the frontend's domain, shared by all of its queues.
    pub budget: Arc<GrantBudget>,
    /// What its guest may do.
    pub rules: DiskRules,
    /// The opened image, shared by the queues of the disk.
    pub image: Arc<Image>,
    /// The queue's counters, which control reads at any time.
    pub counters: Arc<QueueCounters>,
}

/// How a queue reaches its guest's data pages. Data in pages that are not mapped is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantMode {
    /// Persistent grants, if both ends wrote `feature-persistent`: pages stay mapped.
    Persistent,
    /// Grant maps. The frontend takes its pages back with every response, so those of a large request are
    /// mapped only until it is answered.
    Map,
    /// Grant copies only.
    Copy,
}

/// Another medium for a ring that is being served.
#[derive(Debug)]
pub struct ReplaceImage {
    /// Which queue.
    pub key: QueueKey,
    /// What its guest may do with the new medium.
    pub rules: DiskRules,
    /// The opened image. The sender keeps the old one until all queues have let go of it, so that
    /// no worker has to close a file.
    pub image: Arc<Image>,
}

/// What a worker reports to control.
#[derive(Debug)]
pub enum Report {
    /// The queue is being served.
    Connected(QueueKey),
    /// The queue is not served and holds nothing; the reason names the grant or port.
    ConnectFailed(QueueKey, String),
    /// The frontend broke the ring protocol. The queue takes no more requests and stays mapped
    /// until [`Command::Disconnect`].
    RingFault(QueueKey, String),
    /// Nothing of the queue is mapped, bound or in flight any more.
    Disconnected(QueueKey),
    /// No request of the queue uses the image that the last [`Command::ReplaceImage`] replaced.
    ImageReplaced(QueueKey),
    /// Request latencies in nanoseconds since the last [`Command::TakeLatency`]; `None` for an
    /// unknown queue.
    Latency(QueueKey, Option<Box<Histogram<u64>>>),
    /// The answer to [`Command::TellInFlight`].
    InFlight(QueueKey, InFlight),
    /// Storage failed a request: the first of the queue, the second, the fourth, and so on, and the first that
    /// finds storage full.
    StorageFailed(QueueKey, StorageFailure),
    /// A write succeeded again after one had failed with ENOSPC or EDQUOT; at most once a second.
    SpaceLeft(QueueKey),
    /// The worker ended; the reason is empty after [`Command::Stop`].
    Stopped(WorkerId, String),
}

/// Requests of one queue that were taken and not yet answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// How many.
    pub count: usize,
    /// At most `limits::IN_FLIGHT_TOLD` of them, oldest first.
    pub oldest: Vec<InFlightRequest>,
}

/// One request that was taken and not yet answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFlightRequest {
    /// What it asks, in words for the log: `write`, `flush`.
    pub operation: &'static str,
    /// Byte on the disk.
    pub offset_bytes: u64,
    /// Bytes.
    pub len_bytes: u64,
    /// Nanoseconds since it was taken off the ring.
    pub age_ns: u64,
}

/// A request that storage failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageFailure {
    /// What it asked, in words for the log: `write`, `flush`.
    pub operation: &'static str,
    /// Byte on the disk.
    pub offset_bytes: u64,
    /// Bytes.
    pub len_bytes: u64,
    /// A positive errno.
    pub errno: i32,
    /// Failed requests of this queue since it connected, this one included.
    pub errors_so_far: u64,
}

/// Whether a positive errno says that storage is full. Any operation may fail with it: a flush may be the
/// first.
pub fn is_full(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT)
}

/// The sending end of one worker's commands.
#[derive(Clone, Debug)]
pub struct CommandSender {
    worker: WorkerId,
    commands: Sender<Command>,
    bell: Doorbell,
}

/// The receiving end of one worker's commands; its bell rings after each.
#[derive(Debug)]
pub struct CommandReceiver {
    /// What was sent.
    pub commands: Receiver<Command>,
    /// Readable when something was sent.
    pub bell: Doorbell,
}

/// The workers' end of the channel to control.
#[derive(Clone, Debug)]
pub struct ReportSender {
    reports: Sender<Report>,
    bell: Doorbell,
}

/// One worker's channel to control. Sending never waits: reports that find no room are kept and offered
/// again.
#[derive(Debug)]
pub struct Outbox {
    sender: ReportSender,
    kept: VecDeque<Report>,
}

/// Control's end of the channel from all workers.
#[derive(Debug)]
pub struct ReportReceiver {
    /// What was sent.
    pub reports: Receiver<Report>,
    /// Readable when something was sent.
    pub bell: Doorbell,
}

/// Why a worker did not take a command.
#[derive(Debug)]
pub enum Refused {
    /// Its queue is full; it may take the command later.
    Full(Command),
    /// It has ended.
    Gone(WorkerGone),
}

/// The worker takes no commands any more: it has ended.
#[derive(Debug, thiserror::Error)]
#[error("worker {} has ended", .0.0)]
pub struct WorkerGone(pub WorkerId);

/// Makes the channel from control to one worker.
pub fn command_channel(worker: WorkerId) -> io::Result<(CommandSender, CommandReceiver)> {
    let (sender, commands) = bounded(limits::WORKER_COMMANDS);
    let bell = Doorbell::new()?;
    let sender = CommandSender { worker, commands: sender, bell: bell.clone() };
    Ok((sender, CommandReceiver { commands, bell }))
}

/// Makes the channel from all workers to control.
pub fn report_channel() -> io::Result<(ReportSender, ReportReceiver)> {
    let (sender, reports) = bounded(limits::WORKER_REPORTS);
    let bell = Doorbell::new()?;
    Ok((ReportSender { reports: sender, bell: bell.clone() }, ReportReceiver { reports, bell }))
}

impl CommandSender {
    /// The worker that these commands go to.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// Sends without waiting.
    pub fn send(&self, command: Command) -> Result<(), Refused> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(command) => Refused::Full(command),
            TrySendError::Disconnected(_) => Refused::Gone(WorkerGone(self.worker)),
        })?;
        self.bell.ring();
        Ok(())
    }
}

impl ReportSender {
    /// Sends, or returns the report if control has no room for it now. If control has ended, the report is
    /// dropped.
    fn try_send(&self, report: Report) -> Result<(), Report> {
        match self.reports.try_send(report) {
            Ok(()) => {
                self.bell.ring();
                Ok(())
            }
            Err(TrySendError::Full(report)) => Err(report),
            Err(TrySendError::Disconnected(_)) => Ok(()),
        }
    }

    /// Sends; waits for a while if control is thousands of reports behind, so only for a thread that is
    /// about to end. If control has ended, the report is dropped.
    pub fn send(&self, report: Report) {
        self.wait_and_send(report);
    }

    /// The same; returns whether it was sent.
    fn wait_and_send(&self, report: Report) -> bool {
        let patience = Duration::from_secs(limits::FAREWELL_SECONDS);
        let sent = self.reports.send_timeout(report, patience).is_ok();
        if sent {
            self.bell.ring();
        }
        sent
    }
}

impl Outbox {
    /// An outbox with nothing kept.
    pub fn new(sender: ReportSender) -> Outbox {
        Outbox { sender, kept: VecDeque::new() }
    }

    /// Sends to control as soon as it has room, in order. The number kept is bounded: one answer per
    /// command, and for each queue a few a second that guests can cause.
    pub fn send(&mut self, report: Report) {
        self.kept.push_back(report);
        self.offer();
    }

    /// Offers control the kept reports again.
    pub fn offer(&mut self) {
        while let Some(report) = self.kept.pop_front() {
            if let Err(report) = self.sender.try_send(report) {
                return self.kept.push_front(report);
            }
        }
    }

    /// Whether control has received everything.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Sends the kept reports before the worker ends; waits for a while if control is behind.
    pub fn close(&mut self) {
        while let Some(report) = self.kept.pop_front() {
            if !self.sender.wait_and_send(report) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_outbox_never_waits_and_tells_everything_in_order() {
        let (sender, receiver) = report_channel().unwrap();
        let mut outbox = Outbox::new(sender);
        let key = |connection| QueueKey { connection: ConnectionId(connection), queue: QueueId(0) };
        let count = limits::WORKER_REPORTS as u64 + 3;
        (0..count).for_each(|connection| outbox.send(Report::Connected(key(connection))));
        assert!(!outbox.is_empty(), "control has no room for all");
        let mut told = 0;
        while told < count {
            outbox.offer();
            for report in receiver.reports.try_iter() {
                assert!(matches!(report, Report::Connected(queue) if queue == key(told)));
                told += 1;
            }
        }
        assert!(outbox.is_empty());
        drop(receiver);
        outbox.send(Report::Connected(key(0)));
        assert!(outbox.is_empty(), "there is nobody left to tell");
    }
}
