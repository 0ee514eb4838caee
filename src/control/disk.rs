//! One disk: its machine, and what carries the machine's effects out.

mod medium;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::area::{self, Description, Failure, Hotplug, NodeValue, Standing};
use super::connection::{Connection, News};
use super::drive::Drive;
use super::frontend;
use super::key::DiskKey;
use super::machine::{Effect, Input, Link, Machine};
use super::quiet::{LogBudget, guest_log};
use super::workers::Workers;
use crate::backing::{DiskOptions, Geometry, Image};
use crate::blkif::features::{DiskOffer, Offer};
use crate::blkif::request::DiskRules;
use crate::units::DomId;
use crate::xen::Store;
use crate::xen::keys::{self, XenbusState};

/// What a disk needs of its surroundings.
#[derive(Debug)]
pub struct Surroundings<'a, S> {
    /// Xenstore.
    pub store: &'a S,
    /// Our own domain.
    pub own: DomId,
    /// What frontends are offered.
    pub offer: &'a Offer,
    /// The data plane.
    pub workers: &'a mut Workers,
}

/// A disk that was found in xenstore.
#[derive(Debug)]
pub struct Disk {
    key: DiskKey,
    area: String,
    frontend_area: String,
    machine: Machine,
    /// The backend's `state` as it is in xenstore, as far as we know.
    stored: XenbusState,
    description: Option<Description>,
    options: DiskOptions,
    image: Option<Arc<Image>>,
    drive: Drive,
    /// The logical block size that the connected frontend was told; it asks only once.
    told_sector_bytes: Option<u32>,
    connection: Option<Connection>,
    failure: Failure,
    error_written: bool,
    /// Why what `params` names now is not served; empty where it is.
    ignored: String,
    forgotten: bool,
    log: LogBudget,
    since: Instant,
}

impl Disk {
    /// Takes on a disk that was found: Initialising and online, to be served, or Closing and not
    /// online, to be let go.
    pub fn take_on<S: Store>(
        key: DiskKey,
        standing: Standing,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<Disk> {
        let area = key.backend_area(around.own);
        let frontend_area = key.frontend_area();
        let frontend = frontend::state(around.store, &frontend_area)?;
        let mut disk = Disk {
            key,
            area,
            frontend_area,
            machine: Machine::new(frontend, standing.online),
            stored: standing.state,
            description: None,
            options: DiskOptions::default(),
            image: None,
            drive: Drive::default(),
            told_sector_bytes: None,
            connection: None,
            failure: Failure::default(),
            error_written: false,
            ignored: String::new(),
            forgotten: false,
            log: LogBudget::new(Instant::now()),
            since: Instant::now(),
        };
        disk.watch_frontend(around.store)?;
        tracing::info!(disk = %disk.key, "found");
        disk.step(Input::Backend(standing.state), around);
        Ok(disk)
    }

    /// Asks for events about its frontend's state. One comes at once, so a change since the state
    /// was read is not missed.
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

    /// Its machine's state.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// What the toolstack says of it; `None` where that is of no use.
    pub fn description(&self) -> Option<&Description> {
        self.description.as_ref()
    }

    /// Its size and sector sizes as its guest is told them, once open.
    pub fn geometry(&self) -> Option<Geometry> {
        self.image.as_ref().map(|image| self.shown(image))
    }

    fn shown(&self, image: &Image) -> Geometry {
        image.geometry().in_sectors_of(self.told_sector_bytes.unwrap_or(0))
    }

    /// What holds its contents, once open.
    pub fn image(&self) -> Option<&Image> {
        self.image.as_deref()
    }

    /// Its connection to the data plane.
    pub fn connection(&self) -> Option<&Connection> {
        self.connection.as_ref()
    }

    /// As [`Disk::connection`], to be changed.
    pub fn connection_mut(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
    }

    /// Why it failed last, or does not do what it should; empty where there is no such thing.
    pub fn failure(&self) -> &str {
        if self.failure.text.is_empty() { &self.ignored } else { &self.failure.text }
    }

    /// Whether it is done with.
    pub fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// When it was found.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Reads what the toolstack may have changed and acts on it.
    pub fn look_at_backend<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        let Some(standing) = Standing::read(around.store, &self.area)? else {
            self.step(Input::Gone, around);
            return Ok(());
        };
        let Standing { state, online, hotplug_done } = standing;
        if online != self.machine.online() {
            self.step(Input::Online(online), around);
        }
        if state != self.stored && !self.forgotten {
            self.stored = state;
            self.step(Input::Backend(state), around);
        } else if state != self.machine.backend() {
            // Our last write was refused, such as by a xenstored that had gone away.
            self.set_state(self.machine.backend(), &mut VecDeque::new(), around)?;
        }
        if hotplug_done && !self.forgotten && self.image.is_some() && !self.machine.is_ready() {
            self.step(Input::Ready, around);
        }
        Ok(())
    }

    /// Reads what the frontend may have changed and acts on it.
    pub fn look_at_frontend<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        let state = frontend::state(around.store, &self.frontend_area)?;
        if state != self.machine.frontend() {
            guest_log!(self.log, debug, disk = %self.key, %state, "frontend");
            self.step(Input::Frontend(state), around);
        }
        if self.replaced_its_ring(around) {
            self.step(Input::RingReplaced, around);
        }
        Ok(())
    }

    /// Whether the frontend has started over without our seeing it: its rings are valid and not
    /// those that are served.
    fn replaced_its_ring<S: Store>(&self, around: &Surroundings<'_, S>) -> bool {
        use XenbusState::{Connected, Initialised};
        let Some(connection) = &self.connection else { return false };
        self.machine.link() == Link::Up
            && matches!(self.machine.frontend(), Initialised | Connected)
            && frontend::read(around.store, &self.frontend_area, &self.offer(around))
                .is_ok_and(|published| published != *connection.published())
    }

    /// Acts on what the data plane says of its connection.
    pub fn take_news<S: Store>(&mut self, news: Option<News>, around: &mut Surroundings<'_, S>) {
        if let Some(input) = news.map(|news| self.digest(news, around.workers)) {
            self.step(input, around);
        }
    }

    /// Runs the machine, and then what is to be done with its medium.
    pub fn step<S: Store>(&mut self, input: Input, around: &mut Surroundings<'_, S>) {
        self.run(input, around);
        self.move_medium(around);
    }

    /// Runs the machine until nothing follows.
    fn run<S: Store>(&mut self, input: Input, around: &mut Surroundings<'_, S>) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for effect in self.machine.step(input) {
                self.carry_out(*effect, &mut inputs, around);
            }
        }
    }

    fn carry_out<S: Store>(
        &mut self,
        effect: Effect,
        inputs: &mut VecDeque<Input>,
        around: &mut Surroundings<'_, S>,
    ) {
        let result = match effect {
            Effect::Open => {
                self.open(inputs, around);
                Ok(())
            }
            Effect::PublishFeatures => {
                area::write(around.store, &self.area, &self.features(around))
            }
            Effect::PublishDisk => self.publish_disk(around),
            Effect::SetState(state) => self.set_state(state, inputs, around),
            Effect::Connect => {
                inputs.extend(self.connect(around));
                Ok(())
            }
            Effect::Disconnect => {
                inputs.extend(self.disconnect(around));
                Ok(())
            }
            Effect::WriteError => self.write_error(around),
            Effect::WriteHotplugError => area::write(
                around.store,
                &self.area,
                &[
                    (keys::HOTPLUG_ERROR, self.failure.text.clone()),
                    (keys::HOTPLUG_STATUS, "error".to_owned()),
                ],
            ),
            Effect::Forget => self.forget(around),
        };
        if let Err(error) = result {
            guest_log!(self.log, error, disk = %self.key, ?effect, "xenstore refused: {error}");
        }
    }

    fn open<S: Store>(&mut self, inputs: &mut VecDeque<Input>, around: &mut Surroundings<'_, S>) {
        self.image = None;
        self.drive = Drive::default();
        self.ignored.clear();
        match self.try_open(around) {
            Ok(hotplug) => {
                inputs.push_back(Input::Opened);
                let standing = || Standing::read(around.store, &self.area);
                let done = || matches!(standing(), Ok(Some(it)) if it.hotplug_done);
                if hotplug == Hotplug::None || done() {
                    inputs.push_back(Input::Ready);
                }
            }
            Err(failure) => {
                tracing::error!(disk = %self.key, "cannot be opened: {}", failure.text);
                self.failure = failure;
                let hotplug = self.description.as_ref().map(Description::hotplug);
                inputs.push_back(match hotplug {
                    Some(Hotplug::Ours) => Input::OpenFailedScript,
                    _ => Input::OpenFailed,
                });
            }
        }
    }

    /// Opens the image; says whose hotplug script there is.
    fn try_open<S: Store>(&mut self, around: &Surroundings<'_, S>) -> Result<Hotplug, Failure> {
        self.description = None;
        let description = Description::read(around.store, &self.area, &self.key)
            .map_err(|error| Failure::of(&error))?;
        let description = self.description.insert(description);
        let (image, options) = medium::open(&description.target, &description.access(&self.key))?;
        self.drive = Drive::with(&description.target);
        self.options = options;
        self.image = Some(image);
        Ok(description.hotplug())
    }

    /// What the frontend reads before it chooses its rings; nothing where no image is open.
    fn features<S: Store>(&self, around: &Surroundings<'_, S>) -> Vec<NodeValue> {
        let (Some(geometry), Some(description)) = (self.geometry(), &self.description) else {
            return Vec::new();
        };
        let discard = self.image().and_then(|image| description.discard(image));
        let disk = DiskOffer { general: self.offer(around), geometry, discard };
        area::features(&disk, description.hotplug())
    }

    /// What the frontend reads of the disk itself; nothing where no image is open.
    fn shape(&self) -> Vec<NodeValue> {
        match (self.geometry(), &self.description) {
            (Some(geometry), Some(description)) => area::shape(description.info(), &geometry),
            _ => Vec::new(),
        }
    }

    fn publish_disk<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<()> {
        self.clear_error(around)?;
        area::write(around.store, &self.area, &self.shape())
    }

    /// A disk that works has no error.
    fn clear_error<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<()> {
        if std::mem::take(&mut self.error_written) {
            self.failure = Failure::default();
            area::remove(around.store, &self.key.error_area(around.own))?;
        }
        Ok(())
    }

    /// Writes a state together with what the frontend reads when it sees it. Connected is written
    /// again even where it stands already: a frontend that has replaced its ring waits for the event,
    /// and one whose drive has another medium looks again.
    fn set_state<S: Store>(
        &mut self,
        state: XenbusState,
        inputs: &mut VecDeque<Input>,
        around: &Surroundings<'_, S>,
    ) -> io::Result<()> {
        let nodes = match state {
            XenbusState::InitWait => self.features(around),
            XenbusState::Connected => {
                self.clear_error(around)?;
                self.shape()
            }
            _ => Vec::new(),
        };
        if state == self.stored && state != XenbusState::Connected {
            return area::write(around.store, &self.area, &nodes);
        }
        guest_log!(self.log, info, disk = %self.key, "{state}");
        let found = area::switch_state(around.store, &self.area, self.stored, state, &nodes)?;
        self.stored = found;
        if found != state {
            inputs.push_back(Input::Backend(found));
        }
        Ok(())
    }

    fn connect<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> Option<Input> {
        let published = frontend::read(around.store, &self.frontend_area, &self.offer(around));
        let (published, image) = match (published, &self.image) {
            (Ok(published), Some(image)) => (published, image),
            (Err(fault), _) => return Some(self.fail(Input::LinkFailed, Failure::of(&fault))),
            (Ok(_), None) => unreachable!("a disk is ready only with its image open"),
        };
        let image = image.clone();
        self.told_sector_bytes = Some(image.geometry().sector_bytes);
        let rules = self.rules(&image, around.offer);
        let (connection, news) =
            Connection::open(&self.key, published, &image, rules, around.workers);
        self.connection = Some(connection);
        news.map(|news| self.digest(news, around.workers))
    }

    /// What this disk's frontend is offered: its target's options go before the daemon's.
    fn offer<S: Store>(&self, around: &Surroundings<'_, S>) -> Offer {
        let data_path = self.options.data_path.unwrap_or(around.offer.data_path);
        Offer { data_path, ..*around.offer }
    }

    /// What the guest may do, as it was told.
    fn rules(&self, image: &Image, offer: &Offer) -> DiskRules {
        let discard = self.description.as_ref().and_then(|it| it.discard(image));
        DiskRules {
            geometry: self.shown(image),
            read_only: self.description.as_ref().is_none_or(|description| description.read_only),
            indirect_segments: offer.indirect_segments,
            discard: discard.is_some(),
            secure_discard: discard.is_some_and(|discard| discard.secure),
        }
    }

    fn disconnect<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> Option<Input> {
        // Without a connection the frontend was refused before any worker heard of it.
        let Some(connection) = &mut self.connection else { return Some(Input::LinkDown) };
        let news = connection.close(around.workers)?;
        Some(self.digest(news, around.workers))
    }

    fn digest(&mut self, news: News, workers: &mut Workers) -> Input {
        match news.input {
            Input::LinkFailed | Input::LinkFault => {
                let failure = Failure { errno: libc::EINVAL, text: news.reason };
                return self.fail(news.input, failure);
            }
            Input::LinkDown => {
                if let Some(connection) = self.connection.take() {
                    workers.end_link(connection.id());
                }
                self.told_sector_bytes = None;
                self.finish_move();
            }
            Input::MediumChanged => self.finish_move(),
            _ => {}
        }
        news.input
    }

    fn fail(&mut self, input: Input, failure: Failure) -> Input {
        guest_log!(self.log, warn, disk = %self.key, "failed: {}", failure.text);
        self.failure = failure;
        input
    }

    fn write_error<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<()> {
        self.error_written = true;
        area::write_error(around.store, around.own, &self.key, &self.failure)
    }

    fn forget<S: Store>(&mut self, around: &Surroundings<'_, S>) -> io::Result<()> {
        tracing::info!(disk = %self.key, "forgotten");
        self.forgotten = true;
        self.image = None;
        around.store.unwatch(&self.frontend_state_node(), &frontend_token(&self.key))?;
        let attached = self.description.as_ref().is_some_and(|description| description.attached);
        if attached || area::exists(around.store, &format!("{}/{}", self.area, keys::ATTACHED))? {
            area::remove(around.store, &self.frontend_area)?;
            area::remove(around.store, &self.area)?;
            area::remove(around.store, &self.key.error_area(around.own))?;
        }
        Ok(())
    }
}

/// What the token of a frontend's watch begins with.
pub const FRONTEND_TOKEN: &str = "frontend/";

fn frontend_token(key: &DiskKey) -> String {
    format!("{FRONTEND_TOKEN}{}/{}/{}", key.kind, key.domid, key.vbd)
}
