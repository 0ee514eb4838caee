//! All disks: watches find them, and watch events and workers' reports are routed to them.
//!
//! There are three kinds of watches: one per backend type on `backend/<type>`, which covers every node of
//! every backend area, one per disk on the frontend's `state`, and those for domains that begin or end. An
//! event only marks what to look at. Each pass looks once, at the current values, and limits how often it
//! looks at each frontend and guest ([`super::guests`]). So a guest that rewrites its `state` in a loop
//! costs little and holds up nobody. When a thousand disks connect together, each costs only its own reads:
//! directories are listed only when they change.

mod requests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xenstore_rs::Xs;

use super::area::{self, Area, Failure, Standing};
use super::attach::AttachError;
use super::disk::{self, Disk, FRONTEND_TOKEN, Params, Surroundings};
use super::guests::Guests;
use super::helpers::{Answer, Asker, Helpers, OpenBacking, OpenId};
use super::key::DiskKey;
use super::machine::Input;
use super::workers::Workers;
use crate::blkif::features::Offer;
use crate::msg::{CommandSender, InFlight, QueueKey, Report};
use crate::units::{DomId, VbdId};
use crate::xen::keys::{self, XenbusState};
use crate::xen::{Store, WatchEvent, if_there};

pub use requests::Begun;
use requests::Wanted;

/// Paths of watches that fire when a domain begins or ends (`docs/misc/xenstore.txt`), and their tokens.
const DOMAINS: [&str; 2] = ["@introduceDomain", "@releaseDomain"];

/// The disks and everything that they need.
#[derive(Debug)]
pub struct Registry<S> {
    store: S,
    own: DomId,
    kinds: Vec<Arc<str>>,
    offer: Offer,
    workers: Workers,
    helpers: Helpers,
    guests: Guests,
    disks: BTreeMap<DiskKey, Disk>,
    due: Due,
    /// Requests of the admin that wait for storage.
    asked: BTreeMap<OpenId, Wanted>,
    /// Their outcomes.
    outcomes: BTreeMap<OpenId, Result<DiskKey, AttachError>>,
    /// A unique name of this run of the daemon; with `disks_taken_on` it marks each disk's area.
    instance: String,
    disks_taken_on: u64,
    stopping: bool,
}

/// What to look at in the next pass.
#[derive(Debug, Default)]
struct Due {
    kinds: BTreeSet<Arc<str>>,
    domains: BTreeSet<(Arc<str>, DomId)>,
    disks: BTreeMap<DiskKey, Ends>,
    /// Some domain has begun or ended; the event does not say which.
    existence: bool,
    /// When to look again at the next frontend that had too many looks.
    frontends_at: Option<Instant>,
}

/// Which ends of a disk to look at.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    backend: bool,
    params: Option<Params>,
    frontend: bool,
}

impl Ends {
    fn add(&mut self, more: Ends) {
        self.backend |= more.backend;
        self.frontend |= more.frontend;
        self.params = self.params.max(more.params);
    }
}

/// What a path below `backend/` names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Kind(Arc<str>),
    Domain(Arc<str>, DomId),
    Disk(DiskKey),
    Node(DiskKey, String),
}

impl<S: Store> Registry<S> {
    /// Watches the backend types; the first events lead to existing disks. `instance` is a unique name of
    /// this run of the daemon.
    pub fn new(
        store: S,
        kinds: &[String],
        offer: Offer,
        senders: Vec<CommandSender>,
        instance: String,
        helpers: Helpers,
    ) -> io::Result<Registry<S>> {
        assert!(!kinds.is_empty(), "a registry serves at least one backend type");
        let own = own_domid(&store)?;
        let registry = Registry {
            store,
            own,
            kinds: kinds.iter().map(|kind| Arc::from(kind.as_str())).collect(),
            offer,
            workers: Workers::new(senders),
            helpers,
            guests: Guests::default(),
            disks: BTreeMap::new(),
            due: Due::default(),
            asked: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            instance,
            disks_taken_on: 0,
            stopping: false,
        };
        registry.watch()?;
        Ok(registry)
    }

    fn watch(&self) -> io::Result<()> {
        for kind in &self.kinds {
            let root = keys::backend_root(self.own, kind);
            self.store.watch(&root, &disk::backend_token(kind))?;
        }
        // A driver domain may not be allowed to. Then the end of a domain shows only in its areas.
        if let Err(error) = DOMAINS.iter().try_for_each(|path| self.store.watch(path, path)) {
            tracing::info!(
                "xenstore does not report domains that end ({error}); the disks of a guest that is \
                 gone are closed when its toolstack removes them"
            );
        }
        Ok(())
    }

    fn around(&mut self, now: Instant) -> (&mut BTreeMap<DiskKey, Disk>, Surroundings<'_, S>) {
        let around = Surroundings {
            store: &self.store,
            own: self.own,
            offer: &self.offer,
            workers: &mut self.workers,
            helpers: &mut self.helpers,
            guests: &mut self.guests,
            now,
        };
        (&mut self.disks, around)
    }

    /// Continues with another xenstore connection after the first was lost, and looks at everything again,
    /// because anything may have changed.
    pub fn reconnect(&mut self, store: S) -> io::Result<()> {
        self.store = store;
        self.watch()?;
        for disk in self.disks.values() {
            disk.watch_frontend(&self.store)?;
            let ends = Ends { backend: true, params: Some(Params::Perhaps), frontend: true };
            self.due.disks.insert(disk.key().clone(), ends);
        }
        self.due.existence = true;
        Ok(())
    }

    /// The xenstore connection.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The disks, in order.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.disks.values()
    }

    /// One disk.
    pub fn disk(&self, key: &DiskKey) -> Option<&Disk> {
        self.disks.get(key)
    }

    /// Marks what a watch event asks to look at.
    pub fn take_event(&mut self, event: &WatchEvent) {
        if DOMAINS.contains(&event.token.as_str()) {
            self.due.existence = true;
            return;
        }
        if let Some(name) = event.token.strip_prefix(FRONTEND_TOKEN) {
            if let Some(Place::Disk(key)) = self.place(name) {
                self.due.disks.entry(key).or_default().frontend = true;
            }
            return;
        }
        let root = format!("{}/backend/", keys::domain(self.own));
        match event.path.strip_prefix(&root).and_then(|name| self.place(name)) {
            Some(Place::Kind(kind)) => {
                self.due.kinds.insert(kind);
            }
            Some(Place::Domain(kind, domid)) => {
                self.due.domains.insert((kind, domid));
            }
            Some(Place::Disk(key)) => self.look_at(key),
            Some(Place::Node(key, node))
                if [keys::STATE, keys::ONLINE, keys::HOTPLUG_STATUS].contains(&node.as_str()) =>
            {
                self.due.disks.entry(key).or_default().backend = true;
            }
            Some(Place::Node(key, node)) if node == keys::PARAMS => {
                self.due
                    .disks
                    .entry(key)
                    .or_default()
                    .add(Ends { params: Some(Params::Written), ..Ends::default() });
            }
            _ => {}
        }
    }

    /// Marks a whole backend area: anything in it may have changed.
    fn look_at(&mut self, key: DiskKey) {
        let ends = self.due.disks.entry(key).or_default();
        ends.add(Ends { backend: true, params: Some(Params::Perhaps), frontend: false });
    }

    /// Parses `<kind>[/<domid>[/<vbd>[/<node>]]]`.
    fn place(&self, name: &str) -> Option<Place> {
        let mut parts = name.splitn(4, '/');
        let kind = parts.next()?;
        let kind = self.kinds.iter().find(|known| ***known == *kind)?.clone();
        let Some(domid) = parts.next() else { return Some(Place::Kind(kind)) };
        let domid = domid.parse().ok()?;
        let Some(vbd) = parts.next() else { return Some(Place::Domain(kind, domid)) };
        let key = DiskKey { kind, domid, vbd: vbd.parse().ok()? };
        match parts.next() {
            None => Some(Place::Disk(key)),
            Some(node) => Some(Place::Node(key, node.to_owned())),
        }
    }

    /// Looks at everything that is due; returns whether anything was.
    pub fn look(&mut self, now: Instant) -> bool {
        let mut due = std::mem::take(&mut self.due);
        let mut looked = !due.kinds.is_empty() || !due.domains.is_empty() || due.existence;
        for kind in due.kinds {
            self.list_kind(&kind);
        }
        for (kind, domid) in due.domains {
            self.list_domain(&kind, domid);
        }
        // Add what the listings found.
        for (key, ends) in std::mem::take(&mut self.due.disks) {
            due.disks.entry(key).or_default().add(ends);
        }
        for (key, ends) in due.disks {
            looked |= self.look_at_ends(&key, ends, now);
        }
        if due.existence {
            self.look_for_ended_domains(now);
        }
        looked
    }

    /// When to do something even without an event.
    pub fn deadline(&self) -> Option<Instant> {
        self.helpers.deadline().into_iter().chain(self.due.frontends_at).min()
    }

    /// Closes the disks of domains that are gone, whether their toolstack cleans up or not. A domain
    /// without disks is forgotten, so that the next one with its number is not taken for it.
    fn look_for_ended_domains(&mut self, now: Instant) {
        let with_disks = self.disks.keys().map(|key| key.domid);
        let domains: BTreeSet<DomId> = with_disks.chain(self.guests.domains()).collect();
        for domid in domains {
            match self.store.is_domain_introduced(domid) {
                Ok(exists) => {
                    if self.guests.has_ended(domid, exists) {
                        self.end_domain(domid, now);
                    }
                    if !exists && !self.disks.keys().any(|key| key.domid == domid) {
                        self.guests.forget(domid);
                    }
                }
                Err(error) => {
                    tracing::error!(%domid, "cannot find out whether it exists: {error}");
                }
            }
        }
    }

    fn end_domain(&mut self, domid: DomId, now: Instant) {
        let disks: Vec<DiskKey> =
            self.disks.keys().filter(|key| key.domid == domid).cloned().collect();
        if !disks.is_empty() {
            tracing::info!(%domid, "the guest is gone; its disks are closed");
        }
        for key in disks {
            self.with_disk(&key, now, |disk, around| disk.step(Input::DomainGone, around));
        }
    }

    fn list_kind(&mut self, kind: &Arc<str>) {
        let root = keys::backend_root(self.own, kind);
        for domid in self.list::<DomId>(&root) {
            self.list_domain(kind, domid);
        }
        let known: Vec<DiskKey> =
            self.disks.keys().filter(|key| key.kind == *kind).cloned().collect();
        known.into_iter().for_each(|key| self.look_at(key));
    }

    fn list_domain(&mut self, kind: &Arc<str>, domid: DomId) {
        let root = format!("{}/{domid}", keys::backend_root(self.own, kind));
        for vbd in self.list::<VbdId>(&root) {
            self.look_at(DiskKey { kind: kind.clone(), domid, vbd });
        }
        let first = DiskKey { kind: kind.clone(), domid, vbd: VbdId(0) };
        let last = DiskKey { vbd: VbdId(u32::MAX), ..first.clone() };
        let known: Vec<DiskKey> =
            self.disks.range(first..=last).map(|(key, _)| key.clone()).collect();
        known.into_iter().for_each(|key| self.look_at(key));
    }

    /// The numbers among the names in a directory; none if it is missing.
    fn list<N: std::str::FromStr>(&self, path: &str) -> Vec<N> {
        match self.store.directory(path) {
            Ok(names) => names.iter().filter_map(|name| name.parse().ok()).collect(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(path, "cannot list the disks: {error}");
                }
                Vec::new()
            }
        }
    }

    /// Returns whether anything was looked at.
    fn look_at_ends(&mut self, key: &DiskKey, mut ends: Ends, now: Instant) -> bool {
        let guests = &mut self.guests;
        if ends.frontend
            && let Some(Err(at)) = self.disks.get_mut(key).map(|disk| disk.may_look(guests, now))
        {
            // Look later; only the value at that time counts.
            ends.frontend = false;
            self.due.disks.entry(key.clone()).or_default().frontend = true;
            self.due.frontends_at = Some(self.due.frontends_at.map_or(at, |next| next.min(at)));
            if !ends.backend && ends.params.is_none() {
                return false;
            }
        }
        let result = match self.disks.contains_key(key) {
            true => self
                .with_disk(key, now, |disk, around| {
                    // If one look fails, still do the others.
                    let mut result = Ok(());
                    if ends.backend {
                        result = disk.look_at_backend(around);
                    }
                    if let Some(params) = ends.params.filter(|_| !disk.is_forgotten()) {
                        result = result.and(disk.look_at_medium(params, around));
                    }
                    if ends.frontend && !disk.is_forgotten() {
                        result = result.and(disk.look_at_frontend(around));
                    }
                    result
                })
                .unwrap_or(Ok(())),
            false if ends.backend && !self.stopping => self.consider(key, None, now),
            false => Ok(()),
        };
        if let Err(error) = result {
            tracing::error!(disk = %key, "cannot read its area: {error}");
            if error.kind() == io::ErrorKind::InvalidData {
                self.tell_unreadable(key, &Failure::of(&error), now);
            }
        }
        true
    }

    /// Tells the toolstack that a disk's area holds a value that can't be parsed.
    fn tell_unreadable(&mut self, key: &DiskKey, failure: &Failure, now: Instant) {
        let told = self.with_disk(key, now, |disk, around| disk.tell_unreadable(failure, around));
        let told = told.unwrap_or_else(|| {
            let node = format!("{}/error", key.error_area(self.own));
            self.store.write(&node, &area::error_line(failure))
        });
        if let Err(error) = told {
            tracing::error!(disk = %key, "its error node can't be written: {error}");
        }
    }

    /// Takes on a disk if the toolstack has made one (Initialising and online), or if the toolstack waits
    /// for a disk to close that nobody serves, such as a dead daemon's. `prepared` is its target and the
    /// storage, if that is open already.
    fn consider(
        &mut self,
        key: &DiskKey,
        prepared: Option<(String, OpenBacking)>,
        now: Instant,
    ) -> io::Result<()> {
        let is_ours = |standing: &Standing| {
            let made = standing.state == XenbusState::Initialising && standing.online;
            let abandoned = standing.state == XenbusState::Closing && !standing.online;
            made || abandoned
        };
        let mark = format!("{}/{}", self.instance, self.disks_taken_on);
        let path = key.backend_area(self.own);
        let Some((area, standing)) = Area::take_on(&self.store, path, mark, is_ours)? else {
            return Ok(());
        };
        self.disks_taken_on += 1;
        if !self.guests.is_introduced(key.domid) {
            let exists = self.store.is_domain_introduced(key.domid).unwrap_or(false);
            self.guests.has_ended(key.domid, exists);
        }
        let (_, mut around) = self.around(now);
        let disk = Disk::take_on(key.clone(), area, standing, prepared, &mut around)?;
        self.disks.insert(key.clone(), disk);
        self.drop_if_forgotten(key);
        Ok(())
    }

    fn with_disk<T>(
        &mut self,
        key: &DiskKey,
        now: Instant,
        act: impl FnOnce(&mut Disk, &mut Surroundings<'_, S>) -> T,
    ) -> Option<T> {
        let (disks, mut around) = self.around(now);
        let value = act(disks.get_mut(key)?, &mut around);
        self.drop_if_forgotten(key);
        Some(value)
    }

    /// Drops a disk that is finished, and looks at its area again: the toolstack may have made another disk
    /// there while the old one was being drained.
    fn drop_if_forgotten(&mut self, key: &DiskKey) {
        if self.disks.get(key).is_some_and(Disk::is_forgotten) {
            self.disks.remove(key);
            self.look_at(key.clone());
        }
    }

    /// Sends commands that workers had no room for; returns whether some still have none.
    pub fn send_backlog(&mut self) -> bool {
        self.workers.send_backlog()
    }

    /// Does one job of the helpers in the calling thread; returns false if there is none.
    pub fn help_once(&self) -> bool {
        self.helpers.help_once()
    }

    /// Acts on answers of helpers and on opens that take too long; returns whether there were any.
    pub fn take_answers(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(Answer { id, asker, result }) = self.helpers.next_answer(now) {
            any = true;
            match asker {
                Asker::Disk(key) => {
                    self.with_disk(&key, now, |disk, around| disk.take_answer(id, result, around));
                }
                Asker::Admin => {
                    if let Some(wanted) = self.asked.remove(&id) {
                        let outcome = self.go_on(wanted, result, now);
                        self.outcomes.insert(id, outcome);
                    }
                }
            }
        }
        any
    }

    /// Whether storage is still being closed.
    pub fn is_closing(&self) -> bool {
        self.helpers.is_closing()
    }

    /// Acts on a worker's report.
    pub fn take_worker_report(&mut self, event: Report, now: Instant) {
        match event {
            Report::Connected(queue) => self.tell(queue, now, |disk, around| {
                disk.tell_connection(around, |it, _| it.queue_connected(queue));
            }),
            Report::ConnectFailed(queue, reason) => self.tell(queue, now, |disk, around| {
                disk.tell_connection(around, |it, _| it.queue_failed(queue, reason));
            }),
            Report::RingFault(queue, reason) => self.tell(queue, now, |disk, around| {
                disk.tell_connection(around, |it, _| it.queue_broken(queue, reason));
            }),
            Report::Disconnected(queue) => self.tell(queue, now, |disk, around| {
                disk.tell_connection(around, |it, workers| it.queue_disconnected(queue, workers));
            }),
            Report::ImageReplaced(queue) => self.tell(queue, now, |disk, around| {
                disk.tell_connection(around, |it, _| it.queue_replaced(queue));
            }),
            Report::Latency(queue, latency) => self.tell(queue, now, |disk, _| {
                if let Some(connection) = disk.connection_mut() {
                    connection.add_latency(queue, latency.as_deref());
                }
            }),
            Report::InFlight(queue, in_flight) => {
                self.tell(queue, now, |disk, _| tell_in_flight(disk, queue, &in_flight));
            }
            Report::StorageFailed(queue, failure) => {
                self.tell(queue, now, |disk, around| disk.take_storage_failure(&failure, around));
            }
            Report::SpaceLeft(queue) => {
                self.tell(queue, now, |disk, around| disk.take_space_left(around));
            }
            Report::Stopped(worker, reason) => {
                if !reason.is_empty() {
                    tracing::error!(worker = worker.0, "has ended: {reason}");
                }
                self.workers.remove(worker);
                for key in self.keys() {
                    self.with_disk(&key, now, |disk, around| {
                        disk.tell_connection(around, |it, all| it.worker_stopped(worker, all));
                    });
                }
            }
        }
    }

    /// Passes a report to the disk of its connection, if that has not ended.
    fn tell(
        &mut self,
        queue: QueueKey,
        now: Instant,
        hear: impl FnOnce(&mut Disk, &mut Surroundings<'_, S>),
    ) {
        if let Some(key) = self.workers.owner(queue.connection).cloned() {
            self.with_disk(&key, now, hear);
        }
    }

    /// Asks every worker for its latencies; returns the queues whose answers are due.
    pub fn ask_latencies(&mut self) -> BTreeSet<QueueKey> {
        let workers = &mut self.workers;
        self.disks
            .values_mut()
            .filter_map(Disk::connection_mut)
            .flat_map(|connection| connection.ask_latency(workers))
            .collect()
    }

    /// Asks every worker what it has in flight; the answers go to the log. Returns how many are due.
    pub fn ask_in_flight(&mut self) -> usize {
        let workers = &mut self.workers;
        let connections = self.disks.values().filter_map(Disk::connection);
        connections.map(|connection| connection.ask_in_flight(workers)).sum()
    }

    /// Ends every disk once its rings are drained: disks that polldisk attached are removed, the
    /// toolstack's disks keep their state.
    pub fn stop(&mut self, now: Instant) {
        self.stopping = true;
        for (id, _) in std::mem::take(&mut self.asked) {
            self.helpers.abandon(id);
            self.outcomes.insert(id, Err(AttachError::Ending));
        }
        for key in self.keys() {
            self.with_disk(&key, now, |disk, around| disk.step(Input::Stop, around));
        }
    }

    fn keys(&self) -> Vec<DiskKey> {
        self.disks.keys().cloned().collect()
    }
}

/// Logs requests of a queue that the daemon gives up as it ends.
fn tell_in_flight(disk: &Disk, queue: QueueKey, in_flight: &InFlight) {
    let target = disk.named();
    for request in &in_flight.oldest {
        tracing::error!(
            disk = %disk.key(), queue = queue.queue.0, target,
            "not answered by storage for {:.1} s: a {} of {} bytes at byte {}",
            Duration::from_nanos(request.age_ns).as_secs_f64(),
            request.operation, request.len_bytes, request.offset_bytes
        );
    }
    let more = in_flight.count.saturating_sub(in_flight.oldest.len());
    if more > 0 {
        tracing::error!(disk = %disk.key(), queue = queue.queue.0, "and {more} more requests");
    }
}

/// The domain that polldisk runs in: the node `domid` of its own directory, which dom0 may lack.
fn own_domid(store: &impl Xs) -> io::Result<DomId> {
    match if_there(store.read(keys::OWN_DOMID))? {
        Some(text) => {
            let own = keys::word(&text).parse();
            own.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        }
        None => Ok(DomId::DOM0),
    }
}
