//! The daemon without I/O.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Errno;
use super::access::{Caller, Permissions};
use super::path::{Allowed, NodePath, home};
use super::quota::Quota;
use super::session::{Footprint, Session, exactly, only_string};
use super::transaction::Transaction;
use super::tree::Tree;
use super::watch::{Change, Reach, Watch, may_see};
use crate::limits::XENSTORE_PAYLOAD_MAX;
use crate::units::{DomId, parse_decimal};
use crate::xen::store::events::EventQueue;
use crate::xen::store::wire::{self, Header, Message, Op};
use crate::xen::{Permission, WatchEvent};

/// One connection; numbers are not used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(usize);

impl ClientId {
    /// The number, from 0 in order of connection.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A xenstore: its nodes, its clients, and what waits to be sent to each.
#[derive(Debug)]
pub struct StoreCore {
    tree: Tree,
    quota: Quota,
    clients: BTreeMap<ClientId, Client>,
    connected: usize,
    introduced: BTreeSet<DomId>,
    targets: BTreeMap<DomId, DomId>,
    /// Clients with something to send, or closed, since [`StoreCore::take_ready`].
    ready: BTreeSet<ClientId>,
}

#[derive(Debug)]
struct Client {
    domid: DomId,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    last_tx_id: u32,
    replies: VecDeque<Vec<u8>>,
    events: EventQueue,
}

impl Client {
    fn new(domid: DomId) -> Client {
        Client {
            domid,
            watches: Vec::new(),
            transactions: BTreeMap::new(),
            last_tx_id: 0,
            replies: VecDeque::new(),
            events: EventQueue::default(),
        }
    }

    fn notify(&mut self, index: usize, path: &NodePath, quota: &Quota) {
        let watch = &self.watches[index];
        let event = WatchEvent { path: watch.shown(path).into(), token: watch.token.clone() };
        let full = self.events.bytes() >= quota.outstanding_bytes
            || event.path.len() + event.token.len() + 2 > XENSTORE_PAYLOAD_MAX;
        self.events.push(event, watch.shown(&watch.path), full);
    }

    fn reset(&mut self) {
        self.watches.clear();
        self.transactions.clear();
    }
}

const ACK: &[u8] = b"OK\0";

impl StoreCore {
    /// An empty store: the root, and the nodes for domains to come.
    pub fn new(quota: Quota) -> StoreCore {
        StoreCore {
            tree: Tree::default(),
            quota,
            clients: BTreeMap::new(),
            connected: 0,
            introduced: BTreeSet::from([DomId::DOM0]),
            targets: BTreeMap::new(),
            ready: BTreeSet::new(),
        }
    }

    /// A new connection of a domain; dom0 is privileged.
    pub fn connect(&mut self, domid: DomId) -> ClientId {
        let id = ClientId(self.connected);
        self.connected += 1;
        self.clients.insert(id, Client::new(domid));
        id
    }

    /// Ends a connection: its watches go, its transactions are aborted.
    pub fn disconnect(&mut self, id: ClientId) {
        self.clients.remove(&id);
        self.ready.remove(&id);
    }

    /// Whether a connection is open: releasing its domain closes it.
    pub fn is_connected(&self, id: ClientId) -> bool {
        self.clients.contains_key(&id)
    }

    /// Whether a client's next request can be taken: it has not too many answers unread.
    pub fn accepts(&self, id: ClientId) -> bool {
        let unread = self.clients.get(&id).map(|client| client.replies.len());
        unread.is_some_and(|unread| unread < self.quota.outstanding_requests)
    }

    /// Serves one request. Its answer waits in [`StoreCore::next_message`], as do the events that
    /// it caused.
    pub fn handle(&mut self, id: ClientId, message: Message<'_>) {
        let Header { kind, req_id, tx_id, .. } = message.header;
        let answer = match Op::try_from(kind) {
            Ok(op) => self.answer(id, op, tx_id, message.payload).map(|payload| (op, payload)),
            Err(_) => Err(libc::ENOSYS),
        };
        let Some(client) = self.clients.get_mut(&id) else { return };
        let mut reply = Vec::new();
        let sent = answer.and_then(|(op, payload)| {
            wire::encode(&mut reply, op, req_id, tx_id, &[&payload]).map_err(|_| libc::E2BIG)
        });
        if let Err(errno) = sent {
            let name = wire::error_name(errno).as_bytes();
            wire::encode(&mut reply, Op::Error, req_id, tx_id, &[name, &[0]])
                .expect("an error's name is short");
        }
        client.replies.push_back(reply);
        self.ready.insert(id);
    }

    /// The next message for a client, as bytes to be sent: answers first, then events.
    pub fn next_message(&mut self, id: ClientId) -> Option<Vec<u8>> {
        let client = self.clients.get_mut(&id)?;
        if let Some(reply) = client.replies.pop_front() {
            return Some(reply);
        }
        let event = client.events.pop()?;
        let mut message = Vec::new();
        let parts = [event.path.as_bytes(), &[0], event.token.as_bytes(), &[0]];
        wire::encode(&mut message, Op::WatchEvent, 0, 0, &parts)
            .expect("a watch's path and token came in one message");
        Some(message)
    }

    /// The clients that have got something to send, or were closed, since the last call.
    pub fn take_ready(&mut self) -> BTreeSet<ClientId> {
        std::mem::take(&mut self.ready)
    }

    /// A domain appears: `@introduceDomain` fires, once.
    pub fn introduce(&mut self, domid: DomId) {
        if self.introduced.insert(domid) {
            self.fire_special("@introduceDomain");
        }
    }

    /// A guest is gone: its connections close, its nodes and its permissions to others' go,
    /// `@releaseDomain` fires.
    pub fn release(&mut self, domid: DomId) {
        if domid == DomId::DOM0 {
            return;
        }
        let of_domain = |(id, client): (&ClientId, &Client)| (client.domid == domid).then_some(*id);
        let closed: Vec<ClientId> = self.clients.iter().filter_map(of_domain).collect();
        for id in closed {
            self.clients.remove(&id);
            self.ready.insert(id);
        }
        self.introduced.remove(&domid);
        self.targets.retain(|of, target| *of != domid && *target != domid);
        self.remove_traces(domid);
        self.fire_special("@releaseDomain");
    }

    fn remove_traces(&mut self, domid: DomId) {
        let mut footprint = Footprint::default();
        let caller = Caller { domid: DomId::DOM0, target: None };
        let (tree, quota) = (&mut self.tree, &self.quota);
        let mut session = Session { caller, quota, tree, footprint: &mut footprint };
        for path in session.tree.traces(domid) {
            let Some(node) = session.tree.get(&path) else { continue };
            if node.permissions[0].domid == domid {
                session.remove(&path);
            } else {
                let others = node.permissions.iter().filter(|entry| entry.domid != domid);
                let others: Permissions = others.copied().collect::<Vec<Permission>>().into();
                session.tree.set_permissions(&path, others);
            }
        }
        self.fire(&footprint.into_changes());
    }

    fn answer(
        &mut self,
        id: ClientId,
        op: Op,
        tx_id: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        let client = self.clients.get(&id).ok_or(libc::ENOENT)?;
        let caller = self.caller(client.domid);
        if is_privileged(op) && !caller.is_privileged() {
            return Err(libc::EACCES);
        }
        match op {
            // A watch belongs to no transaction, even if the header names one.
            Op::Watch => self.watch(id, payload),
            Op::Unwatch => self.unwatch(id, payload),
            _ if tx_id != 0 && !client.transactions.contains_key(&tx_id) => Err(libc::ENOENT),
            Op::TransactionStart => self.begin(id, tx_id),
            Op::TransactionEnd => self.end(id, tx_id, caller, payload),
            Op::ResetWatches => self.reset(id),
            Op::Introduce => self.introduce_asked(payload),
            Op::Release => self.release_asked(payload),
            Op::IsDomainIntroduced => self.is_introduced(payload),
            Op::Resume => self.known_guest(only_string(payload)?).map(|_| ACK.to_vec()),
            Op::SetTarget => self.set_target(payload),
            Op::GetDomainPath => Ok((home(domid(only_string(payload)?)?) + "\0").into_bytes()),
            Op::Control => control(payload),
            _ => self.serve(id, tx_id, caller, op, payload),
        }
    }

    /// Requests on nodes.
    fn serve(
        &mut self,
        id: ClientId,
        tx_id: u32,
        caller: Caller,
        op: Op,
        payload: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        let quota = &self.quota;
        let client = self.clients.get_mut(&id).ok_or(libc::ENOENT)?;
        if let Some(transaction) = client.transactions.get_mut(&tx_id) {
            return transaction.serve(caller, quota, op, payload);
        }
        let mut footprint = Footprint::default();
        let tree = &mut self.tree;
        let answer =
            Session { caller, quota, tree, footprint: &mut footprint }.serve(op, payload)?;
        self.fire(&footprint.into_changes());
        Ok(answer)
    }

    fn begin(&mut self, id: ClientId, tx_id: u32) -> Result<Vec<u8>, Errno> {
        if tx_id != 0 {
            return Err(libc::EBUSY);
        }
        self.check_quota(id, self.quota.transactions, |client| client.transactions.len())?;
        let transaction = Transaction::begin(&self.tree);
        let client = self.clients.get_mut(&id).ok_or(libc::ENOENT)?;
        while client.last_tx_id == 0 || client.transactions.contains_key(&client.last_tx_id) {
            client.last_tx_id = client.last_tx_id.wrapping_add(1);
        }
        client.transactions.insert(client.last_tx_id, transaction);
        Ok(format!("{}\0", client.last_tx_id).into_bytes())
    }

    fn end(
        &mut self,
        id: ClientId,
        tx_id: u32,
        caller: Caller,
        payload: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        let commit = match only_string(payload)? {
            b"T" => true,
            b"F" => false,
            _ => return Err(libc::EINVAL),
        };
        let client = self.clients.get_mut(&id).ok_or(libc::ENOENT)?;
        let transaction = client.transactions.remove(&tx_id).ok_or(libc::ENOENT)?;
        if commit {
            let changes = transaction.commit(&mut self.tree, caller, &self.quota)?;
            self.fire(&changes);
        }
        Ok(ACK.to_vec())
    }

    fn watch(&mut self, id: ClientId, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (given, path, token) = self.watch_named(id, payload)?;
        self.check_quota(id, self.quota.watches, |client| client.watches.len())?;
        let client = self.clients.get_mut(&id).ok_or(libc::ENOENT)?;
        if client.watches.iter().any(|watch| watch.path == path && watch.token == token) {
            return Err(libc::EEXIST);
        }
        client.watches.push(Watch::new(path.clone(), token, given));
        client.notify(client.watches.len() - 1, &path, &self.quota);
        Ok(ACK.to_vec())
    }

    fn unwatch(&mut self, id: ClientId, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (_, path, token) = self.watch_named(id, payload)?;
        let client = self.clients.get_mut(&id).ok_or(libc::ENOENT)?;
        let is_it = |watch: &Watch| watch.path == path && watch.token == token;
        let index = client.watches.iter().position(is_it).ok_or(libc::ENOENT)?;
        client.watches.remove(index);
        Ok(ACK.to_vec())
    }

    fn watch_named<'a>(
        &self,
        id: ClientId,
        payload: &'a [u8],
    ) -> Result<(&'a [u8], NodePath, String), Errno> {
        let [given, token] = exactly(payload)?;
        let domid = self.clients.get(&id).ok_or(libc::ENOENT)?.domid;
        let path = NodePath::parse(given, domid, Allowed::Special).ok_or(libc::EINVAL)?;
        let token = String::from_utf8(token.to_vec()).map_err(|_| libc::EINVAL)?;
        Ok((given, path, token))
    }

    fn reset(&mut self, id: ClientId) -> Result<Vec<u8>, Errno> {
        self.clients.get_mut(&id).ok_or(libc::ENOENT)?.reset();
        Ok(ACK.to_vec())
    }

    fn introduce_asked(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let [domain, _gfn, port] = exactly(payload)?;
        let port: Option<u32> = std::str::from_utf8(port).ok().and_then(parse_decimal);
        if port.is_none_or(|port| port == 0) {
            return Err(libc::EINVAL);
        }
        self.introduce(domid(domain)?);
        Ok(ACK.to_vec())
    }

    fn release_asked(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let domid = self.known_guest(only_string(payload)?)?;
        self.release(domid);
        Ok(ACK.to_vec())
    }

    fn is_introduced(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let known = self.introduced.contains(&domid(only_string(payload)?)?);
        Ok(if known { b"T\0" } else { b"F\0" }.to_vec())
    }

    fn set_target(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let [of, target] = exactly(payload)?;
        let (of, target) = (self.known_guest(of)?, self.known_guest(target)?);
        self.targets.insert(of, target);
        Ok(ACK.to_vec())
    }

    fn known_guest(&self, digits: &[u8]) -> Result<DomId, Errno> {
        match domid(digits)? {
            DomId::DOM0 => Err(libc::EINVAL),
            guest if self.introduced.contains(&guest) => Ok(guest),
            _ => Err(libc::ENOENT),
        }
    }

    fn caller(&self, domid: DomId) -> Caller {
        Caller { domid, target: self.targets.get(&domid).copied() }
    }

    /// ENOSPC if a guest's connections together have as many as it may.
    fn check_quota(
        &self,
        id: ClientId,
        bound: usize,
        count: impl Fn(&Client) -> usize,
    ) -> Result<(), Errno> {
        let domid = self.clients.get(&id).ok_or(libc::ENOENT)?.domid;
        let own = self.clients.values().filter(|client| client.domid == domid);
        let within = domid == DomId::DOM0 || own.map(count).sum::<usize>() < bound;
        if within { Ok(()) } else { Err(libc::ENOSPC) }
    }

    fn fire_special(&mut self, name: &'static str) {
        let path = NodePath::literal(name);
        self.fire(&[Change { path, reach: Reach::Exact, readers_before: Vec::new() }]);
    }

    /// Queues the events of changes: by change, then by connection, then by watch.
    fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            let readers_after = self.tree.readers(&change.path);
            for (id, client) in &mut self.clients {
                let target = self.targets.get(&client.domid).copied();
                let caller = Caller { domid: client.domid, target };
                if !may_see(caller, &change.readers_before) && !may_see(caller, &readers_after) {
                    continue;
                }
                for index in 0..client.watches.len() {
                    if client.watches[index].sees(change) {
                        client.notify(index, &change.path, &self.quota);
                        self.ready.insert(*id);
                    }
                }
            }
        }
    }
}

/// Requests that only dom0 may make.
fn is_privileged(op: Op) -> bool {
    use Op::*;
    matches!(op, Control | Introduce | Release | IsDomainIntroduced | Resume | SetTarget)
}

fn domid(digits: &[u8]) -> Result<DomId, Errno> {
    wire::parse_domid(digits).ok_or(libc::EINVAL)
}

/// The commands of `xenstore-control` that make sense here.
fn control(payload: &[u8]) -> Result<Vec<u8>, Errno> {
    match wire::strings(payload).next() {
        Some(b"check") => Ok(ACK.to_vec()),
        Some(b"help") => Ok(b"check help\0".to_vec()),
        _ => Err(libc::EINVAL),
    }
}
