//! The data plane as control sees it: where commands go, which worker has room, whose link is
//! whose.

use std::sync::{Arc, Weak};

use rustc_hash::FxHashMap;

use super::key::DiskKey;
use super::placement::Placement;
use crate::budget::{GrantBudget, HostBudget};
use crate::limits;
use crate::msg::{Command, CommandSender, LinkId, WorkerGone, WorkerId};
use crate::units::DomId;

/// The workers and the links that they serve.
#[derive(Debug)]
pub struct Workers {
    senders: Vec<CommandSender>,
    placement: Placement,
    owners: FxHashMap<LinkId, DiskKey>,
    /// What all domains may map together.
    host: Arc<HostBudget>,
    /// Of domains that have queues.
    budgets: FxHashMap<DomId, Weak<GrantBudget>>,
    next_link: u64,
}

impl Workers {
    /// Workers without queues, in the order of their numbers.
    pub fn new(senders: Vec<CommandSender>) -> Workers {
        let placement = Placement::new(senders.len());
        let (owners, budgets) = Default::default();
        let host = Arc::new(HostBudget::of_this_host());
        Workers { senders, placement, owners, host, budgets, next_link: 0 }
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

    /// What the queues of a domain may map together. It lasts as long as any queue has it.
    pub fn budget(&mut self, domid: DomId) -> Arc<GrantBudget> {
        if let Some(budget) = self.budgets.get(&domid).and_then(Weak::upgrade) {
            return budget;
        }
        self.budgets.retain(|_, budget| budget.strong_count() > 0);
        let (host, pages) = (Arc::clone(&self.host), limits::PERSISTENT_GRANTS_PER_DOMAIN);
        let budget = Arc::new(GrantBudget::within(host, pages));
        self.budgets.insert(domid, Arc::downgrade(&budget));
        budget
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_domain_has_one_budget_for_as_long_as_any_queue_has_it() {
        let mut workers = Workers::new(Vec::new());
        let domain = |raw: u32| DomId::try_from(raw).unwrap();
        let (disk, another) = (workers.budget(domain(1)), workers.budget(domain(1)));
        assert!(Arc::ptr_eq(&disk, &another));
        assert!(!Arc::ptr_eq(&disk, &workers.budget(domain(2))));
        drop(disk);
        assert!(Arc::ptr_eq(&another, &workers.budget(domain(1))));
        drop(another);
        workers.budget(domain(3));
        assert_eq!(workers.budgets.len(), 1, "domains without queues are forgotten");
    }
}
