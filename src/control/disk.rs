//! One disk: its state machine, and the code that carries out the machine's effects.

mod medium;
mod storage;

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use super::area::{self, Area, Description, Failure, NodeValue, Standing, Written};
use super::connection::{Connection, News};
use super::drive::Drive;
use super::frontend;
use super::guests::{Guests, Pace, guest_log};
use super::helpers::{Helpers, OpenBacking, OpenId};
use super::key::DiskKey;
use super::machine::{ConnectionState, Effect, Input, Machine};
use super::workers::Workers;
use crate::backing::{Backing, Geometry, Image};
use crate::blkif::features::{DiskOffer, Offer};
use crate::blkif::request::DiskRules;
use crate::limits;
use crate::msg::{StorageFailure, is_full};
use crate::units::DomId;
use crate::xen::keys::{self, XenbusState};
use crate::xen::{Store, if_there};
use xenstore_rs::Xs;

/// What a disk needs from the rest of control.
#[derive(Debug)]
pub struct Surroundings<'a, S> {
    /// Xenstore.
    pub store: &'a S,
    /// The domain that polldisk runs in.
    pub own: DomId,
    /// What frontends are offered.
    pub offer: &'a Offer,
    /// The data plane.
    pub workers: &'a mut Workers,
    /// The threads that open and close storage.
    pub helpers: &'a mut Helpers,
    /// What each guest may cost.
    pub guests: &'a mut Guests,
    /// The time of this pass.
    pub now: Instant,
}

/// A disk that was found in xenstore.
#[derive(Debug)]
pub struct Disk {
    key: DiskKey,
    area: Area,
    frontend_area: String,
    machine: Machine,
    /// The backend's `state` in xenstore, as last read or written.
    stored: XenbusState,
    description: Option<Description>,
    backing: Option<OpenBacking>,
    drive: Drive,
    opening: Option<OpenId>,
    /// Storage that was opened in advance, and its target.
    prepared: Option<(String, OpenBacking)>,
    /// The last event about `params` while its storage was being opened.
    params_event: Option<Params>,
    /// The logical block size that the connected frontend has read; it reads that only once.
    told_sector_bytes: Option<u32>,
    connection: Option<Connection>,
    failure: Failure,
    error_written: bool,
    /// The last look at its area found a value that can't be parsed.
    is_unreadable: bool,
    /// Why the target in `params` is not the one being served; empty if it is.
    ignored: String,
    /// Writes fail because its storage is full.
    is_full: bool,
    looks: Pace,
    forgotten: bool,
    since: Instant,
}

/// What an event says about writes to `params`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Params {
    /// It may not have been written: compare the value.
    Perhaps,
    /// It was written, perhaps with the same value.
    Written,
}

impl Disk {
    /// Takes on a disk whose area was taken on: to serve it if it is Initialising and online, or to let it
    /// go if it is Closing and not online. `prepared` is its target and the storage, if that is open
    /// already.
    pub fn take_on<S: Store>(
        key: DiskKey,
        area: Area,
        standing: Standing,
        prepared: Option<(String, OpenBacking)>,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<Disk> {
        let frontend_area = key.frontend_area();
        let frontend = frontend::state(around.store, &frontend_area)?;
        let mut disk = Disk {
            key,
            area,
            frontend_area,
            machine: Machine::new(frontend, standing.online),
            stored: standing.state,
            description: None,
            backing: None,
            drive: Drive::default(),
            opening: None,
            prepared,
            params_event: None,
            told_sector_bytes: None,
            connection: None,
            failure: Failure::default(),
            // There may be one, from before its area could be parsed, or from an earlier daemon.
            error_written: true,
            is_unreadable: false,
            ignored: String::new(),
            is_full: false,
            looks: Pace::default(),
            forgotten: false,
            since: around.now,
        };
        disk.watch_frontend(around.store)?;
        tracing::info!(disk = %disk.key, "found");
        disk.step(Input::Backend(standing.state), around);
        Ok(disk)
    }

    /// Watches its frontend's state. One event comes at once, so a change since the state was read is not
    /// missed.
    pub fn watch_frontend<S: Store>(&self, store: &S) -> io::Result<()> {
        store.watch(&self.frontend_state_node(), &frontend_token(&self.key))
    }

    fn frontend_state_node(&self) -> String {
        format!("{}/{}", self.frontend_area, keys::STATE)
    }

    /// Its name.
    pub fn key(&self) -> &DiskKey {
        &self.key
    }

    /// Its state machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The toolstack's description; `None` if that could not be read.
    pub fn description(&self) -> Option<&Description> {
        self.description.as_ref()
    }

    /// The name of its storage or medium, as the toolstack or the admin wrote it; empty if there is none,
    /// or if its area could not be read.
    pub fn named(&self) -> &str {
        self.description.as_ref().map_or("", |description| &description.target)
    }

    /// Whether its guest may only read. True if its area could not be read.
    fn is_read_only(&self) -> bool {
        self.description.as_ref().is_none_or(|description| description.read_only)
    }

    /// Its size and sector sizes as its guest sees them, once open.
    pub fn geometry(&self) -> Option<Geometry> {
        self.backing().map(|backing| self.shown(backing.image()))
    }

    fn shown(&self, image: &Image) -> Geometry {
        image.geometry().in_sectors_of(self.told_sector_bytes.unwrap_or(0))
    }

    /// What holds its contents, once open.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_deref()
    }

    /// Its connection to the data plane.
    pub fn connection(&self) -> Option<&Connection> {
        self.connection.as_ref()
    }

    /// As [`Disk::connection`], mutable.
    pub fn connection_mut(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
    }

    /// Why it failed last, or does not fully work; empty if nothing is wrong.
    pub fn failure(&self) -> &str {
        match (self.failure.text.as_str(), self.is_full) {
            ("", true) => NO_SPACE,
            ("", false) => &self.ignored,
            (text, _) => text,
        }
    }

    /// Reports that its area holds a value that can't be parsed, until it can.
    pub fn tell_unreadable<S: Store>(
        &mut self,
        failure: &Failure,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        self.is_unreadable = true;
        self.failure.clone_from(failure);
        self.write_error(around).map(drop)
    }

    /// Whether it is finished and can be dropped.
    pub fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// Whether it is being closed for good, or its areas are gone.
    pub fn is_leaving(&self) -> bool {
        !self.machine.online() || self.machine.is_gone_or_deserted()
    }

    /// Whether it waits only for its requests in flight, not for its guest.
    pub fn is_draining(&self) -> bool {
        self.machine.connection() == ConnectionState::Disconnecting
            || self.machine.is_gone_or_deserted()
    }

    /// When it was found.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Asks to look at its frontend; if there were too many looks, returns when to ask again.
    pub fn may_look(&mut self, guests: &mut Guests, now: Instant) -> Result<(), Instant> {
        self.looks.ask(now, limits::FRONTEND_LOOKS_BURST, limits::FRONTEND_LOOKS_PER_SECOND)?;
        guests.may_look(self.key.domid, now)
    }

    /// Reads what the toolstack may have changed and acts on it.
    pub fn look_at_backend<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        let Some(standing) = self.area.standing(around.store)? else {
            self.step(Input::Gone, around);
            return Ok(());
        };
        if std::mem::take(&mut self.is_unreadable) {
            self.clear_error(around)?;
        }
        let Standing { state, online, hotplug_done } = standing;
        if state != self.stored {
            self.stored = state;
            self.machine.set_online(online);
            self.step(Input::Backend(state), around);
        } else if online != self.machine.online() {
            self.step(Input::Online(online), around);
        } else if state != self.machine.backend()
            // The last write failed, for example because xenstored was gone.
            && self.set_state(self.machine.backend(), around)? == Written::Gone
        {
            self.step(Input::Gone, around);
        }
        if hotplug_done && !self.forgotten && self.backing.is_some() && !self.machine.is_ready() {
            self.step(Input::Ready, around);
        }
        Ok(())
    }

    /// Reads what the frontend may have changed and acts on it.
    pub fn look_at_frontend<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        let is_served = self.machine.connection() == ConnectionState::Up;
        let published = self.connection.as_ref().filter(|_| is_served).map(Connection::published);
        let glance = frontend::glance(around.store, &self.frontend_area, published)?;
        let (state, rings) = (glance.state, glance.rings_may_be_new);
        if state != self.machine.frontend() {
            guest_log!(around, self.key.domid, debug, disk = %self.key, %state, "frontend");
            self.step(Input::Frontend(state), around);
        }
        if rings && self.has_other_rings(around) {
            self.step(Input::RingReplaced, around);
        }
        Ok(())
    }

    /// Whether the frontend has started over unnoticed: its rings are valid, but are not those that are
    /// served.
    fn has_other_rings<S: Store>(&self, around: &Surroundings<'_, S>) -> bool {
        let Some(connection) = &self.connection else { return false };
        self.machine.connection() == ConnectionState::Up
            && frontend::read(around.store, &self.frontend_area, &self.offer(around))
                .is_ok_and(|published| published != *connection.published())
    }

    /// Passes a report of the data plane to its connection, if there is one, and acts on the news.
    pub fn tell_connection<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
        hear: impl FnOnce(&mut Connection, &mut Workers) -> Option<News>,
    ) {
        let news = self.connection.as_mut().and_then(|it| hear(it, around.workers));
        if let Some(news) = news {
            let input = self.digest(news, around);
            self.step(input, around);
        }
    }

    /// Runs the machine, and then does what its medium needs.
    pub fn step<S: Store>(&mut self, input: Input, around: &mut Surroundings<'_, S>) {
        self.run(VecDeque::from([input]), around);
        self.move_medium(around);
    }

    /// Runs the machine until no input is left. However the guest and the toolstack behave, one input leads
    /// to a bounded number of others; more is a bug in polldisk, which costs only this disk.
    fn run<S: Store>(&mut self, mut inputs: VecDeque<Input>, around: &mut Surroundings<'_, S>) {
        let mut taken = 0;
        while let Some(input) = inputs.pop_front().filter(|_| !self.forgotten) {
            taken += 1;
            if taken > limits::INPUTS_PER_STEP {
                debug_assert!(false, "{}: {input:?} follows endlessly", self.key);
                tracing::error!(
                    disk = %self.key,
                    "its state machine loops, a bug in polldisk; the disk is given up"
                );
                return self.give_up(around);
            }
            for effect in self.machine.step(input) {
                self.carry_out(*effect, &mut inputs, around);
            }
        }
    }

    /// Gives up this disk only.
    fn give_up<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        // The guest gets no answers to the requests in flight.
        if let Some(mut connection) = self.connection.take() {
            connection.close(around.workers);
            around.workers.end_connection(connection.id());
        }
        if let Err(error) = self.forget(around) {
            tracing::error!(disk = %self.key, "xenstore refused: {error}");
        }
    }

    fn carry_out<S: Store>(
        &mut self,
        effect: Effect,
        inputs: &mut VecDeque<Input>,
        around: &mut Surroundings<'_, S>,
    ) {
        let written = match effect {
            Effect::Open => {
                inputs.extend(self.open(around));
                Ok(Written::Done)
            }
            Effect::PublishFeatures => self.area.write(around.store, &self.features(around)),
            Effect::PublishDisk => self.publish_disk(around),
            Effect::SetState(state) => self.set_state(state, around),
            Effect::Connect => {
                inputs.extend(self.connect(around));
                Ok(Written::Done)
            }
            Effect::Disconnect => {
                inputs.extend(self.disconnect(around));
                Ok(Written::Done)
            }
            Effect::WriteError => self.write_error(around),
            Effect::WriteHotplugError => self.area.write(
                around.store,
                &[
                    (keys::HOTPLUG_ERROR, self.failure.text.clone()),
                    (keys::HOTPLUG_STATUS, "error".to_owned()),
                ],
            ),
            Effect::Forget => self.forget(around).map(|()| Written::Done),
        };
        match written {
            // If somebody else wrote the state first, the watch event of that write shows it.
            Ok(Written::Done | Written::Overtaken) => {}
            Ok(Written::Gone) => inputs.push_back(Input::Gone),
            Err(error) => {
                guest_log!(around, self.key.domid, error, disk = %self.key,
                    "xenstore refused a write: {error}");
            }
        }
    }

    /// What the frontend reads before it chooses its rings; nothing if no storage is open.
    fn features<S: Store>(&self, around: &Surroundings<'_, S>) -> Vec<NodeValue> {
        let (Some(backing), Some(description)) = (self.backing(), &self.description) else {
            return Vec::new();
        };
        let discard = description.discard(backing);
        let geometry = self.shown(backing.image());
        let disk = DiskOffer { general: self.offer(around), geometry, discard };
        area::features(&disk, description.hotplug())
    }

    /// What the frontend reads about the disk itself; nothing if no storage is open.
    fn shape(&self) -> Vec<NodeValue> {
        match (self.geometry(), &self.description) {
            (Some(geometry), Some(description)) => area::shape(description.info(), &geometry),
            _ => Vec::new(),
        }
    }

    fn publish_disk<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<Written> {
        self.clear_error(around)?;
        self.area.write(around.store, &self.shape())
    }

    /// Removes the `error` node, because the disk works.
    fn clear_error<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<()> {
        if let Some(error) = self.stale_error(around.own) {
            self.area.change(around.store, |span| area::remove(span, &error))?;
            self.forget_error();
        }
        Ok(())
    }

    /// The path of the `error` node, if it has to be removed once the disk works.
    fn stale_error(&self, own: DomId) -> Option<String> {
        self.error_written.then(|| self.key.error_area(own))
    }

    /// Notes that the `error` node is gone.
    fn forget_error(&mut self) {
        self.error_written = false;
        self.failure = Failure::default();
    }

    /// Writes a state together with what the frontend reads when it sees it. Connected is written even if
    /// it is there already: a frontend that has replaced its ring waits for the event, and one whose drive
    /// has another medium reads the disk's size again.
    fn set_state<S: Store>(
        &mut self,
        state: XenbusState,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<Written> {
        let (nodes, stale) = match state {
            XenbusState::InitWait => {
                // The disk's own error stays until it works; any other is left from an earlier disk.
                let has_own = self.failure != Failure::default();
                (self.features(around), self.stale_error(around.own).filter(|_| !has_own))
            }
            XenbusState::Connected => (self.shape(), self.stale_error(around.own)),
            _ => (Vec::new(), None),
        };
        if state == self.stored && state != XenbusState::Connected {
            return self.area.write(around.store, &nodes);
        }
        guest_log!(around, self.key.domid, info, disk = %self.key, "{state}");
        let states = [self.stored, state];
        let written = self.area.switch_state(around.store, states, &nodes, stale.as_deref())?;
        if written == Written::Done {
            self.stored = state;
            if stale.is_some() {
                self.forget_error();
            }
        }
        Ok(written)
    }

    fn connect<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> Option<Input> {
        let published = frontend::read(around.store, &self.frontend_area, &self.offer(around));
        let (published, backing) = match (published, self.backing.as_deref()) {
            (Ok(published), Some(backing)) => (published, backing),
            (Err(fault), _) => {
                return Some(self.fail(Input::ConnectionFailed, Failure::of(&fault), around));
            }
            (Ok(_), None) => unreachable!("a disk is ready only with its storage open"),
        };
        let image = backing.image().clone();
        self.told_sector_bytes = Some(image.geometry().sector_bytes);
        let rules = self.rules(backing, around.offer);
        let (connection, news) =
            Connection::open(&self.key, published, &image, rules, around.workers, around.now);
        self.connection = Some(connection);
        news.map(|news| self.digest(news, around))
    }

    /// What this disk's frontend is offered: its target's options override the daemon's.
    fn offer<S: Store>(&self, around: &Surroundings<'_, S>) -> Offer {
        let options = self.backing().map(Backing::options).unwrap_or_default();
        let data_path = options.data_path.unwrap_or(around.offer.data_path);
        Offer { data_path, ..*around.offer }
    }

    /// What the guest may do, as offered to it.
    fn rules(&self, backing: &Backing, offer: &Offer) -> DiskRules {
        let discard = self.description.as_ref().and_then(|it| it.discard(backing));
        DiskRules {
            geometry: self.shown(backing.image()),
            read_only: self.is_read_only(),
            indirect_segments: offer.indirect_segments,
            discard: discard.is_some(),
            secure_discard: discard.is_some_and(|discard| discard.secure),
        }
    }

    fn disconnect<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> Option<Input> {
        // Without a connection, the frontend was refused before any worker was involved.
        let Some(connection) = &mut self.connection else { return Some(Input::ConnectionDown) };
        let news = connection.close(around.workers)?;
        Some(self.digest(news, around))
    }

    fn digest<S: Store>(&mut self, news: News, around: &mut Surroundings<'_, S>) -> Input {
        match news.input {
            Input::ConnectionFailed | Input::ConnectionFault => {
                let failure = Failure { errno: libc::EINVAL, text: news.reason };
                return self.fail(news.input, failure, around);
            }
            Input::ConnectionDown => {
                if let Some(connection) = self.connection.take() {
                    around.workers.end_connection(connection.id());
                }
                self.told_sector_bytes = None;
                self.is_full = false;
                self.finish_move();
            }
            Input::MediumChanged => self.finish_move(),
            _ => {}
        }
        news.input
    }

    fn fail<S: Store>(
        &mut self,
        input: Input,
        failure: Failure,
        around: &mut Surroundings<'_, S>,
    ) -> Input {
        guest_log!(around, self.key.domid, warn, disk = %self.key, "failed: {}", failure.text);
        self.failure = failure;
        input
    }

    /// Logs a request that storage failed.
    pub fn take_storage_failure<S: Store>(
        &mut self,
        failure: &StorageFailure,
        around: &mut Surroundings<'_, S>,
    ) {
        let StorageFailure { operation, offset_bytes, len_bytes, errno, errors_so_far } = failure;
        let target = self.named();
        guest_log!(
            around, self.key.domid, error, disk = %self.key, target, errors_so_far,
            "storage failed a {operation} of {len_bytes} bytes at byte {offset_bytes}: {}",
            io::Error::from_raw_os_error(*errno)
        );
        if is_full(*errno) && !self.is_full {
            guest_log!(around, self.key.domid, error, disk = %self.key, target, "{NO_SPACE}");
            self.is_full = true;
        }
    }

    /// Notes that writes succeed again.
    pub fn take_space_left<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        if std::mem::take(&mut self.is_full) {
            guest_log!(around, self.key.domid, info, disk = %self.key,
                "its storage has space again, and writes succeed");
        }
    }

    fn write_error<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<Written> {
        self.error_written = true;
        let node = format!("{}/error", self.key.error_area(around.own));
        let line = area::error_line(&self.failure);
        self.area.change(around.store, |span| span.write(&node, &line))
    }

    fn forget<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> io::Result<()> {
        tracing::info!(disk = %self.key, "forgotten");
        self.forgotten = true;
        self.shut(around);
        self.prepared = None;
        around.store.unwatch(&self.frontend_state_node(), &frontend_token(&self.key))?;
        self.remove_own_areas(around)
    }

    /// Removes what `attach` made. If the backend area now belongs to another disk, so does the frontend's;
    /// if it is gone, its frontend area is left over.
    fn remove_own_areas<S: Store>(&self, around: &Surroundings<'_, S>) -> io::Result<()> {
        let (area, frontend) = (self.area.path(), &self.frontend_area);
        let attached = format!("{area}/{}", keys::ATTACHED);
        let error = self.key.error_area(around.own);
        let known = match &self.description {
            // The toolstack removes what it has made.
            Some(description) if !description.attached => return Ok(()),
            description => description.is_some(),
        };
        let written = self.area.change(around.store, |span| {
            if !known && !area::exists(span, &attached)? {
                return Ok(());
            }
            [frontend, area, &error].into_iter().try_for_each(|path| area::remove(span, path))
        })?;
        if written != Written::Gone || !known {
            return Ok(());
        }
        around.store.atomically(|span| {
            let backend = if_there(span.read(&format!("{frontend}/{}", keys::BACKEND)))?;
            if area::exists(span, area)? || backend.is_none_or(|backend| *backend != *area) {
                return Ok(());
            }
            area::remove(span, frontend)?;
            area::remove(span, &error)
        })
    }

    /// Asks for it to be closed and destroyed, as libxl does; with `force`, without waiting for its guest.
    pub fn ask_to_close<S: Store>(&self, store: &S, force: bool) -> io::Result<Written> {
        self.area.ask_to_close(store, force, &self.frontend_area)
    }
}

/// The failure of a disk whose storage is full.
const NO_SPACE: &str =
    "no space is left on its storage, and writes fail until there is some; reads still work";

/// The token of the watch on all backend areas of a type.
pub fn backend_token(kind: &str) -> String {
    format!("backend/{kind}")
}

/// The prefix of the token of a frontend's watch.
pub const FRONTEND_TOKEN: &str = "frontend/";

fn frontend_token(key: &DiskKey) -> String {
    format!("{FRONTEND_TOKEN}{}/{}/{}", key.kind, key.domid, key.vbd)
}
