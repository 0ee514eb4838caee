//! The data plane as control sees it: channels to the workers, placement of queues, and which disk a
//! connection belongs to.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use rustc_hash::FxHashMap;

use super::key::DiskKey;
use super::placement::Placement;
use crate::budget::{GrantBudget, HostBudget};
use crate::limits;
use crate::msg::{Command, CommandSender, ConnectionId, Refused, WorkerGone, WorkerId};
use crate::units::DomId;

/// The workers and the connections that they serve.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    placement: Placement,
    owners: FxHashMap<ConnectionId, DiskKey>,
    /// What all domains together may map.
    host: Arc<HostBudget>,
    /// Budgets of domains that have queues.
    budgets: FxHashMap<DomId, Weak<GrantBudget>>,
    next_connection: u64,
}

/// The channel to one worker.
#[derive(Debug)]
struct Worker {
    sender: CommandSender,
    /// Commands that it had no room for, sent before anything else. Control sends a few commands for each
    /// disk and then waits for the answers, so this is bounded by the number of disks.
    backlog: VecDeque<Command>,
}

impl Worker {
    fn send(&mut self, command: Command) -> Result<(), WorkerGone> {
        self.backlog.push_back(command);
        self.send_backlog()
    }

    fn send_backlog(&mut self) -> Result<(), WorkerGone> {
        while let Some(command) = self.backlog.pop_front() {
            match self.sender.send(command) {
                Ok(()) => {}
                Err(Refused::Full(command)) => {
                    self.backlog.push_front(command);
                    return Ok(());
                }
                Err(Refused::Gone(gone)) => {
                    self.backlog.clear();
                    return Err(gone);
                }
            }
        }
        Ok(())
    }
}

impl Workers {
    /// Workers without queues, in the order of their numbers.
    pub fn new(senders: Vec<CommandSender>) -> Workers {
        let placement = Placement::new(senders.len());
        let worker = |sender| Worker { sender, backlog: VecDeque::new() };
        let workers = senders.into_iter().map(worker).collect();
        let (owners, budgets) = Default::default();
        let host = Arc::new(HostBudget::of_this_host());
        Workers { workers, placement, owners, host, budgets, next_connection: 0 }
    }

    /// Makes a name for a new connection of this disk.
    pub fn begin_connection(&mut self, disk: &DiskKey) -> ConnectionId {
        let connection = ConnectionId(self.next_connection);
        self.next_connection += 1;
        self.owners.insert(connection, disk.clone());
        connection
    }

    /// Ends a connection: reports about it are stale from now on.
    pub fn end_connection(&mut self, connection: ConnectionId) {
        self.owners.remove(&connection);
    }

    /// The disk of a connection; `None` if the connection has ended.
    pub fn owner(&self, connection: ConnectionId) -> Option<&DiskKey> {
        self.owners.get(&connection)
    }

    /// What the queues of a domain together may map. The budget exists as long as any queue holds it.
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

    /// Places one more queue on a worker.
    pub fn place(&mut self) -> Option<WorkerId> {
        self.placement.place()
    }

    /// Takes one queue off this worker.
    pub fn release(&mut self, worker: WorkerId) {
        self.placement.release(worker);
    }

    /// Places nothing on this worker from now on.
    pub fn remove(&mut self, worker: WorkerId) {
        self.placement.remove(worker);
    }

    /// Sends to one worker without waiting: now, or later when it has room. Fails if it has ended.
    pub fn send(&mut self, worker: WorkerId, command: Command) -> Result<(), WorkerGone> {
        self.workers.get_mut(worker.0).ok_or(WorkerGone(worker))?.send(command)
    }

    /// Sends commands that workers had no room for. `true`: some still have none; nothing will signal when
    /// they have, so call this again.
    pub fn send_backlog(&mut self) -> bool {
        for worker in &mut self.workers {
            // A worker that has ended reports that itself.
            let _ = worker.send_backlog();
        }
        self.workers.iter().any(|worker| !worker.backlog.is_empty())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::units::VbdId;

    #[test]
    fn what_a_full_worker_does_not_take_is_kept_in_order_and_a_worker_that_ended_is_told() {
        use crate::msg::{ConnectionId, QueueKey, command_channel};
        use crate::units::QueueId;
        let (sender, receiver) = command_channel(WorkerId(0)).unwrap();
        let mut workers = Workers::new(vec![sender]);
        let key = |connection| QueueKey { connection: ConnectionId(connection), queue: QueueId(0) };
        let all = limits::WORKER_COMMANDS as u64 + 10;
        for connection in 0..all {
            workers.send(WorkerId(0), Command::Disconnect(key(connection))).unwrap();
        }
        let mut taken = Vec::new();
        while taken.len() < usize::try_from(all).unwrap() {
            while let Ok(Command::Disconnect(key)) = receiver.commands.try_recv() {
                taken.push(key.connection.0);
            }
            assert!(!workers.send_backlog());
        }
        assert!(taken.into_iter().eq(0..all));
        drop(receiver);
        assert!(workers.send(WorkerId(0), Command::Stop).is_err());
        assert!(!workers.send_backlog());
    }

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

    #[test]
    fn a_connection_that_has_ended_is_nobodys() {
        let mut workers = Workers::new(Vec::new());
        let disk = DiskKey { kind: "vbd".into(), domid: DomId::DOM0, vbd: VbdId(51712) };
        let connections = [(); 3].map(|()| workers.begin_connection(&disk));
        assert_eq!(connections.map(|connection| workers.owner(connection)), [Some(&disk); 3]);
        connections.iter().for_each(|connection| workers.end_connection(*connection));
        assert!(workers.owners.is_empty());
    }
}
