//! All disks: found by watches, woken by them, and told what workers say.
//!
//! Two kinds of watch feed it: one per backend type on `backend/<type>`, which covers every key of
//! every backend area, and one per disk on the frontend's `state`. An event only marks what has to
//! be looked at; the looking is done once per pass, at the value that is there by then. So a
//! guest that rewrites its `state` in a loop costs one read per pass, and a thousand disks that
//! connect together cost each its own reads: directories are listed only when they change.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use xenstore_rs::Xs;

use super::admin::protocol::{Attach, Detach};
use super::area::{self, Failure, Standing};
use super::attach::{self, AttachError};
use super::disk::{Disk, FRONTEND_TOKEN, Surroundings};
use super::key::DiskKey;
use super::machine::Input;
use super::workers::Workers;
use crate::blkif::features::Offer;
use crate::msg::{CommandSender, Event, QueueKey};
use crate::units::{DomId, VbdId};
use crate::xen::keys::{self, XenbusState};
use crate::xen::{Store, WatchEvent, if_there};

const BACKEND_TOKEN: &str = "backend/";

/// The disks and everything they are made of.
#[derive(Debug)]
pub struct Registry<S> {
    store: S,
    own: DomId,
    kinds: Vec<Arc<str>>,
    offer: Offer,
    workers: Workers,
    disks: BTreeMap<DiskKey, Disk>,
    due: Due,
    stopping: bool,
}

/// What has to be looked at.
#[derive(Debug, Default)]
struct Due {
    kinds: BTreeSet<Arc<str>>,
    domains: BTreeSet<(Arc<str>, DomId)>,
    disks: FxHashMap<DiskKey, Ends>,
}

/// Which ends of a disk.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    backend: bool,
    medium: bool,
    frontend: bool,
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
    /// Watches the backend types; what is there already is found by the events that this causes.
    pub fn new(
        store: S,
        kinds: &[String],
        offer: Offer,
        senders: Vec<CommandSender>,
    ) -> io::Result<Registry<S>> {
        assert!(!kinds.is_empty(), "a registry serves at least one backend type");
        let own = own_domid(&store)?;
        let registry = Registry {
            store,
            own,
            kinds: kinds.iter().map(|kind| Arc::from(kind.as_str())).collect(),
            offer,
            workers: Workers::new(senders),
            disks: BTreeMap::new(),
            due: Due::default(),
            stopping: false,
        };
        registry.watch()?;
        Ok(registry)
    }

    fn watch(&self) -> io::Result<()> {
        self.kinds.iter().try_for_each(|kind| {
            let root = keys::backend_root(self.own, kind);
            self.store.watch(&root, &format!("{BACKEND_TOKEN}{kind}"))
        })
    }

    /// Goes on with another xenstore connection after the first was lost: everything is looked at
    /// again, as anything may have happened since.
    pub fn reconnect(&mut self, store: S) -> io::Result<()> {
        self.store = store;
        self.watch()?;
        for disk in self.disks.values() {
            disk.watch_frontend(&self.store)?;
            self.due
                .disks
                .insert(disk.key().clone(), Ends { backend: true, medium: true, frontend: true });
        }
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

    /// Marks what a watch event is about.
    pub fn take_event(&mut self, event: &WatchEvent) {
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
                self.due.disks.entry(key).or_default().medium = true;
            }
            _ => {}
        }
    }

    /// Anything of the backend area may have changed.
    fn look_at(&mut self, key: DiskKey) {
        let ends = self.due.disks.entry(key).or_default();
        (ends.backend, ends.medium) = (true, true);
    }

    /// What `<kind>[/<domid>[/<vbd>[/<node>]]]` names.
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

    /// Looks at everything that is due; says whether anything was.
    pub fn look(&mut self) -> bool {
        let due = std::mem::take(&mut self.due);
        let worked = !(due.kinds.is_empty() && due.domains.is_empty() && due.disks.is_empty());
        for kind in due.kinds {
            self.list_kind(&kind);
        }
        for (kind, domid) in due.domains {
            self.list_domain(&kind, domid);
        }
        for (key, ends) in due.disks {
            self.look_at_ends(&key, ends);
        }
        // What the listings found.
        for (key, ends) in std::mem::take(&mut self.due.disks) {
            self.look_at_ends(&key, ends);
        }
        worked
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

    /// The numbers among the names in a directory; none where it is missing.
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

    fn look_at_ends(&mut self, key: &DiskKey, ends: Ends) {
        let result = match self.disks.contains_key(key) {
            true => self
                .with_disk(key, |disk, around| {
                    if ends.backend {
                        disk.look_at_backend(around)?;
                    }
                    if ends.medium && !disk.is_forgotten() {
                        disk.look_at_medium(around)?;
                    }
                    if ends.frontend && !disk.is_forgotten() {
                        disk.look_at_frontend(around)?;
                    }
                    Ok(())
                })
                .unwrap_or(Ok(())),
            false if ends.backend && !self.stopping => self.consider(key),
            false => Ok(()),
        };
        if let Err(error) = result {
            tracing::error!(disk = %key, "cannot be looked at: {error}");
            if error.kind() == io::ErrorKind::InvalidData {
                self.tell_unreadable(key, &Failure::of(&error));
            }
        }
    }

    /// Tells the toolstack that it wrote something into a disk's area that can't be read.
    fn tell_unreadable(&mut self, key: &DiskKey, failure: &Failure) {
        if let Err(error) = area::write_error(&self.store, self.own, key, failure) {
            tracing::error!(disk = %key, "its error node can't be written: {error}");
        }
        if let Some(disk) = self.disks.get_mut(key) {
            disk.expect_error_node();
        }
    }

    /// Takes a disk on if the toolstack has made one (Initialising and online), or if it waits for
    /// one to close that nobody serves any more, such as a dead daemon's.
    fn consider(&mut self, key: &DiskKey) -> io::Result<()> {
        let area = key.backend_area(self.own);
        let Some(standing) = Standing::read(&self.store, &area)? else { return Ok(()) };
        let Standing { state, online, .. } = standing;
        let made = state == XenbusState::Initialising && online;
        let abandoned = state == XenbusState::Closing && !online;
        if !made && !abandoned {
            return Ok(());
        }
        let mut around = Surroundings {
            store: &self.store,
            own: self.own,
            offer: &self.offer,
            workers: &mut self.workers,
        };
        let disk = Disk::take_on(key.clone(), standing, &mut around)?;
        self.disks.insert(key.clone(), disk);
        self.drop_if_forgotten(key);
        Ok(())
    }

    fn with_disk<T>(
        &mut self,
        key: &DiskKey,
        act: impl FnOnce(&mut Disk, &mut Surroundings<'_, S>) -> T,
    ) -> Option<T> {
        let mut around = Surroundings {
            store: &self.store,
            own: self.own,
            offer: &self.offer,
            workers: &mut self.workers,
        };
        let value = act(self.disks.get_mut(key)?, &mut around);
        self.drop_if_forgotten(key);
        Some(value)
    }

    /// A forgotten disk's area is looked at again: the toolstack may have made another there
    /// while the old one was still being drained.
    fn drop_if_forgotten(&mut self, key: &DiskKey) {
        if self.disks.get(key).is_some_and(Disk::is_forgotten) {
            self.disks.remove(key);
            self.look_at(key.clone());
        }
    }

    /// Acts on what a worker says.
    pub fn take_worker_event(&mut self, event: Event) {
        match event {
            Event::Connected(queue) => {
                self.tell(queue, |disk, _| disk.connection_mut()?.queue_connected(queue));
            }
            Event::ConnectFailed(queue, reason) => {
                self.tell(queue, |disk, _| disk.connection_mut()?.queue_failed(queue, reason));
            }
            Event::RingFault(queue, reason) => {
                self.tell(queue, |disk, _| disk.connection_mut()?.queue_broken(queue, reason));
            }
            Event::Disconnected(queue) => {
                self.tell(queue, |disk, workers| {
                    disk.connection_mut()?.queue_disconnected(queue, workers)
                });
            }
            Event::ImageReplaced(queue) => {
                self.tell(queue, |disk, _| disk.connection_mut()?.queue_replaced(queue));
            }
            Event::Latency(queue, latency) => {
                self.tell(queue, |disk, _| {
                    disk.connection_mut()?.add_latency(queue, latency.as_deref());
                    None
                });
            }
            Event::InFlight(..) | Event::StorageFailed(..) | Event::SpaceLeft(_) => {}
            Event::Stopped(worker, reason) => {
                if !reason.is_empty() {
                    tracing::error!(worker = worker.0, "has ended: {reason}");
                }
                self.workers.remove(worker);
                for key in self.keys() {
                    self.tell_disk(&key, |disk, workers| {
                        disk.connection_mut()?.worker_stopped(worker, workers)
                    });
                }
            }
        }
    }

    /// Passes something on to the disk whose link it is about; a link that has ended has none.
    fn tell(
        &mut self,
        queue: QueueKey,
        hear: impl FnOnce(&mut Disk, &mut Workers) -> Option<super::connection::News>,
    ) {
        if let Some(key) = self.workers.owner(queue.link).cloned() {
            self.tell_disk(&key, hear);
        }
    }

    fn tell_disk(
        &mut self,
        key: &DiskKey,
        hear: impl FnOnce(&mut Disk, &mut Workers) -> Option<super::connection::News>,
    ) {
        self.with_disk(key, |disk, around| {
            let news = hear(disk, around.workers);
            disk.take_news(news, around);
        });
    }

    /// Asks every worker for its latencies; returns the queues whose answers are due.
    pub fn ask_latencies(&mut self) -> BTreeSet<QueueKey> {
        let workers = &self.workers;
        self.disks
            .values_mut()
            .filter_map(Disk::connection_mut)
            .flat_map(|connection| connection.ask_latency(workers))
            .collect()
    }

    /// Makes a disk for a running guest and offers it to the frontend.
    pub fn attach(&mut self, attach: &Attach) -> Result<(), AttachError> {
        let key = attach::name(&self.kinds[0], attach.domid, &attach.vdev)?;
        attach::make(&self.store, self.own, &self.kinds, &key, attach)?;
        self.consider(&key)?;
        let failure = self.disk(&key).map(|disk| disk.failure().to_owned()).unwrap_or_default();
        if failure.is_empty() {
            return Ok(());
        }
        attach::remove(&self.store, self.own, &key)?;
        Err(AttachError::Failed(failure))
    }

    /// Has a disk closed and destroyed; it is done once the disk is no more.
    pub fn detach(&mut self, detach: &Detach) -> Result<DiskKey, AttachError> {
        let key = self.find(detach.domid, &detach.vdev)?;
        attach::unmake(&self.store, self.own, &key, detach.force)?;
        Ok(key)
    }

    /// Has a drive change its medium, for none where `target` is empty; it is done once the disk's
    /// medium is settled.
    pub fn change_medium(
        &mut self,
        domid: u32,
        vdev: &str,
        target: &str,
    ) -> Result<DiskKey, AttachError> {
        let key = self.find(domid, vdev)?;
        if let Some(disk) = self.disk(&key) {
            attach::check_medium(disk, target)?;
        }
        // Taken out first, so that the same name means what it names by now.
        for target in ["", target] {
            attach::set_medium(&self.store, self.own, &key, target)?;
            self.with_disk(&key, Disk::look_at_medium).unwrap_or(Ok(()))?;
        }
        Ok(key)
    }

    /// Which disk a domid and a vdev name, of whatever backend type.
    fn find(&self, domid: u32, vdev: &str) -> Result<DiskKey, AttachError> {
        let named = attach::name(&self.kinds[0], domid, vdev)?;
        let mut keys =
            self.kinds.iter().map(|kind| DiskKey { kind: kind.clone(), ..named.clone() });
        keys.find(|key| self.disks.contains_key(key))
            .ok_or(AttachError::NoDisk(named.domid, named.vbd.into()))
    }

    /// Ends every disk: what polldisk attached is removed, the toolstack's disks keep their state
    /// once their rings are drained.
    pub fn stop(&mut self) {
        self.stopping = true;
        for key in self.keys() {
            self.with_disk(&key, |disk, around| disk.step(Input::Stop, around));
        }
    }

    fn keys(&self) -> Vec<DiskKey> {
        self.disks.keys().cloned().collect()
    }
}

/// Our own domain: the node `domid` of our directory, which dom0 may lack.
fn own_domid(store: &impl Xs) -> io::Result<DomId> {
    match if_there(store.read(keys::OWN_DOMID))? {
        Some(text) => {
            let own = keys::word(&text).parse();
            own.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        }
        None => Ok(DomId::DOM0),
    }
}
