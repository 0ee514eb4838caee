//! The data plane as control sees it: where commands go, which worker has room, whose link is
//! whose.

use rustc_hash::FxHashMap;

use super::key::DiskKey;
use super::placement::Placement;
use crate::msg::{Command, CommandSender, LinkId, WorkerGone, WorkerId};

/// The workers and the links that they serve.
#[derive(Debug)]
pub struct Workers {
    senders: Vec<CommandSender>,
    placement: Placement,
    owners: FxHashMap<LinkId, DiskKey>,
    next_link: u64,
}

impl Workers {
    /// Workers without queues, in the order of their numbers.
    pub fn new(senders: Vec<CommandSender>) -> Workers {
        let placement = Placement::new(senders.len());
        Workers { senders, placement, owners: FxHashMap::default(), next_link: 0 }
    }

    /// A name for a new link of this disk.
    pub fn begin_link(&mut self, disk: &DiskKey) -> LinkId {
        let link = LinkId(self.next_link);
        self.next_link += 1;
        self.owners.insert(link, disk.clone());
        link
    }

    /// Events about this link are stale from now on.
    pub fn end_link(&mut self, link: LinkId) {
        self.owners.remove(&link);
    }

    /// Whose link this is; `None` for one that has ended.
    pub fn owner(&self, link: LinkId) -> Option<&DiskKey> {
        self.owners.get(&link)
    }

    /// A worker for one queue more.
    pub fn place(&mut self) -> Option<WorkerId> {
        self.placement.place()
    }

    /// One queue less on this worker.
    pub fn release(&mut self, worker: WorkerId) {
        self.placement.release(worker);
    }

    /// Nothing is placed on this worker any more.
    pub fn remove(&mut self, worker: WorkerId) {
        self.placement.remove(worker);
    }

    /// Sends to one worker, without waiting.
    pub fn send(&self, worker: WorkerId, command: Command) -> Result<(), WorkerGone> {
        self.senders.get(worker.0).ok_or(WorkerGone(worker))?.send(command)
    }
}
