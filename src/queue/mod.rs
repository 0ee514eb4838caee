//! One ring being served, from the request on the ring to the response on it.
//!
//! A pass of the worker takes each queue through the same steps ([`pass`]): [`Queue::take`] copies and checks
//! requests, reads the pages of indirect ones ([`indirect`]), finds where their data is, mapping all
//! missing pages in one batch and filling bounce memory by one grant copy ([`locate`]), and submits;
//! [`Queue::complete`] takes the engine's results; [`Queue::finish_pass`] copies bounced reads to the
//! guest, as far as the turn's effort allows, publishes what is left of the responses, and says
//! whether to notify.
//!
//! What a pass does for a queue is bounded by the *effort* of its turn. What is left of copies and
//! transfers goes on with the next turn.
//!
//! A request that finds nothing left of what the worker's queues share *waits*, and so does the ring
//! behind it: it is tried again only once something was given back ([`Resources::freed`]).
//!
//! The steady path neither allocates nor calls the system per request, with one exception that the
//! admin has to choose: pages that are mapped for the time of a request ([`transient`]).
//!
//! [`persistent`] and [`slots`] are public for `benches/` only.

mod bounce;
mod copies;
mod devices;
mod indirect;
mod locate;
mod pass;
pub mod persistent;
mod report;
pub mod slots;
mod transient;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::backing::Image;
use crate::blkif::codec::RawDirect;
use crate::blkif::request::{DiskRules, IndirectHead};
use crate::blkif::ring::BackRing;
use crate::budget::GrantShare;
use crate::engine::RegisterBuffers;
use crate::limits::{
    BOUNCE_PAGES_COMMON, REQUESTS_COMMON, REQUESTS_PER_QUEUE, SEGMENTS_PER_REQUEST,
};
use crate::metrics::{LatencyLog, QueueCounters};
use crate::msg::{Connect, GrantMode, Outbox, QueueKey};
use crate::pool::{Pool, Share};
use crate::units::{DomId, GrantRef, Port};
use crate::xen::shm::SharedPage;
use crate::xen::{Events, Grants, PageAccess};

pub use bounce::BouncePool;
use copies::CopyBatch;
use devices::DeviceShare;
pub use devices::Devices;
use indirect::Indirect;
use persistent::{Mapper, PersistentGrants};
use report::Reports;
pub use slots::LargeTables;
use slots::Slots;
use transient::TransientGrants;

/// What the queues of one worker share, lent to them for a pass.
#[derive(Debug)]
pub struct Resources<G, E> {
    /// Mappings and copies.
    pub grants: G,
    /// Storage.
    pub engine: E,
    /// When the pass began, or its completions were looked at.
    pub now_ns: u64,
    /// Changes whenever something that a queue can wait for was given back.
    pub freed: u64,
    /// What control is told.
    pub outbox: Outbox,
    /// Requests in flight,
    requests: Pool,
    /// ... and how many of them block devices have.
    devices: Devices,
    /// Memory for data that is copied.
    bounce: BouncePool,
    /// Tables for indirect requests.
    tables: LargeTables,
    /// Reused lists, so that a pass allocates nothing.
    scratch: Scratch,
}

impl<G, E> Resources<G, E> {
    /// All of it unused; `workers` is how many share the host's devices.
    pub fn new(grants: G, engine: E, outbox: Outbox, workers: usize) -> Resources<G, E> {
        Resources {
            grants,
            engine,
            now_ns: 0,
            freed: 0,
            outbox,
            requests: Pool::new(REQUESTS_PER_QUEUE, REQUESTS_COMMON),
            devices: Devices::new(workers),
            bounce: BouncePool::new(BOUNCE_PAGES_COMMON),
            tables: LargeTables::default(),
            scratch: Scratch::default(),
        }
    }

    fn mapper(&mut self) -> Mapper<'_, G, E> {
        Mapper { grants: &mut self.grants, engine: &mut self.engine }
    }
}

/// What a pass fills and empties.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The direct request being taken.
    direct: RawDirect,
    /// Slots of requests just taken.
    fresh: Vec<u32>,
    /// Indirect requests whose segments are still to be read.
    indirect: Vec<Indirect>,
    /// Their segments as they were copied, one request after the other.
    segment_bytes: Vec<u8>,
    /// Segments whose page is not mapped: slot, index of the segment.
    unmapped: Vec<(u32, usize)>,
    /// References to map.
    wanted: Vec<GrantRef>,
    copies: CopyBatch,
}

/// One connected ring.
#[derive(Debug)]
pub struct Queue {
    key: QueueKey,
    index: u32,
    frontend: DomId,
    port: Port,
    ring: BackRing,
    rules: DiskRules,
    image: Arc<Image>,
    memory_alignment: u16,
    /// The worker moves its data itself.
    moves_data: bool,
    slots: Slots,
    /// This queue's part of the worker's requests in flight and tables.
    requests: Share,
    tables: Share,
    /// ... and of what the block device of its disk can have.
    device: Option<DeviceShare>,
    /// Its own bounce memory, for data that finds no room in the worker's.
    bounce: BouncePool,
    /// Slots whose next step the engine had no room for.
    refused: VecDeque<u32>,
    /// Slots that wait for bounce memory.
    stalled: VecDeque<u32>,
    /// An indirect request that waits for a table.
    parked: Option<IndirectHead>,
    /// [`Resources::freed`] when what waits was last tried; `None`: nothing waits.
    waits_since: Option<u64>,
    /// Writes whose data is being copied to bounce memory.
    fetched: VecDeque<u32>,
    /// Reads whose data is being copied from bounce memory to the guest.
    copied_out: VecDeque<u32>,
    /// Slots whose next step has to wait for the next turn.
    interrupted: VecDeque<u32>,
    /// What is left of the turn, and what storage costs of it for each request.
    effort: u32,
    operation_effort: u32,
    /// What goes to storage with the next kick, by the weights of operations.
    started: u32,
    /// Operations that came back since [`Queue::take_threaded`] and that threads of the kernel did,
    threaded: u32,
    /// ... without flushes: those that come back together were one for storage.
    flushed: bool,
    data_grants: DataGrants,
    counters: Arc<QueueCounters>,
    latency: LatencyLog,
    barrier: Barrier,
    /// The frontend is to be notified at the end of the pass.
    notify: bool,
    /// Takes no more requests: asked to, or the frontend broke the ring.
    stopped: bool,
    /// Takes this number of requests more, and then none until its image is replaced.
    before_pause: Option<u32>,
    reports: Reports,
}

/// What one turn of a queue may cost, in units of [`EFFORT_NS`](crate::limits::EFFORT_NS).
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// When it is spent, the turn ends.
    pub effort: u32,
    /// What it costs of it to give storage an operation without data.
    pub operation_effort: u32,
}

/// What is mapped of the guest's data pages ([`GrantMode`]).
#[derive(Debug)]
enum DataGrants {
    Persistent(PersistentGrants),
    Map(TransientGrants),
    Copy,
}

/// A write that may not change places with others. Nothing is taken before it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    None,
    /// Its slot waits until it is alone in flight.
    Waits(u32),
    /// Its slot is alone in flight.
    Began(u32),
}

impl Queue {
    /// Maps the ring and binds the event channel. On an error nothing stays mapped or bound; the
    /// text names the reference or port, for the frontend's `error` node.
    pub fn connect<G: Grants, E, V: Events>(
        connect: Connect,
        index: u32,
        io: &mut Resources<G, E>,
        events: &mut V,
    ) -> Result<Queue, String> {
        let grants = &mut io.grants;
        let refs = &connect.ring_refs;
        let pages = grants.map(connect.frontend, refs, PageAccess::ReadWrite).map_err(|error| {
            let refs: Vec<u32> = refs.iter().map(|gref| gref.0).collect();
            format!("mapping ring-ref {refs:?}: {error}")
        })?;
        let ring = match BackRing::attach(SharedPage::over(pages), connect.protocol) {
            Ok(ring) => ring,
            Err((fault, page)) => {
                unmap_ring(grants, page);
                return Err(fault.to_string());
            }
        };
        let port = match events.bind_interdomain(connect.frontend, connect.port) {
            Ok(port) => port,
            Err(error) => {
                unmap_ring(grants, ring.into_page());
                return Err(format!("binding event-channel {}: {error}", connect.port));
            }
        };
        let size = ring.size();
        let list = || VecDeque::with_capacity(size as usize);
        let share = GrantShare::of(connect.budget);
        let device = io.devices.join(&connect.image);
        Ok(Queue {
            key: connect.key,
            index,
            frontend: connect.frontend,
            port,
            ring,
            bounce: BouncePool::new(largest_request(&connect.rules)),
            rules: connect.rules,
            memory_alignment: connect.image.memory_alignment(),
            moves_data: connect.image.is_moved_by_worker(),
            image: connect.image,
            slots: Slots::new(size),
            requests: Share::default(),
            tables: Share::default(),
            device,
            refused: list(),
            stalled: list(),
            parked: None,
            waits_since: None,
            fetched: list(),
            copied_out: list(),
            interrupted: list(),
            effort: 0,
            operation_effort: 0,
            started: 0,
            threaded: 0,
            flushed: false,
            data_grants: match connect.grant_mode {
                GrantMode::Persistent => DataGrants::Persistent(PersistentGrants::new(share)),
                GrantMode::Map => DataGrants::Map(TransientGrants::new(share)),
                GrantMode::Copy => DataGrants::Copy,
            },
            counters: connect.counters,
            latency: LatencyLog::default(),
            barrier: Barrier::None,
            notify: false,
            stopped: false,
            before_pause: None,
            reports: Reports::default(),
        })
    }

    /// Unmaps and unbinds everything. Call only once [`Queue::is_drained`].
    pub fn disconnect<G: Grants, E: RegisterBuffers, V: Events>(
        mut self,
        io: &mut Resources<G, E>,
        events: &mut V,
    ) {
        assert!(self.is_drained());
        self.settle(io);
        if let Err(error) = events.unbind(self.port) {
            tracing::warn!(domid = %self.frontend, port = %self.port, %error, "unbinding failed");
        }
        if let DataGrants::Persistent(persistent) = &mut self.data_grants {
            persistent.unmap_all(&mut io.mapper());
        }
        self.counters.grants_mapped.set(0);
        io.devices.leave(self.device);
        unmap_ring(&mut io.grants, self.ring.into_page());
    }

    /// Its name.
    pub fn key(&self) -> QueueKey {
        self.key
    }

    /// Our end of its event channel.
    pub fn port(&self) -> Port {
        self.port
    }

    /// Whether nothing is in flight.
    pub fn is_drained(&self) -> bool {
        self.ring.in_flight() == 0
    }

    /// Takes no more requests; those in flight are finished and answered.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Takes what the frontend has published by now, and then no requests until
    /// [`Queue::replace_image`]; those in flight are finished and answered. It has to be polled.
    pub fn pause(&mut self) {
        // A broken ring is found out when it is looked at again.
        self.before_pause = Some(self.ring.requests().unwrap_or(0));
    }

    /// Whether all of that is done.
    pub fn is_paused(&self) -> bool {
        self.is_drained() && (self.stopped || self.before_pause == Some(0))
    }

    /// Serves another image from now on. Call only once [`Queue::is_paused`], so that no request
    /// is checked against one image and carried out on another.
    pub fn replace_image<G, E>(
        &mut self,
        io: &mut Resources<G, E>,
        image: Arc<Image>,
        rules: DiskRules,
    ) {
        assert!(self.is_drained());
        let device = io.devices.join(&image);
        io.devices.leave(std::mem::replace(&mut self.device, device));
        self.memory_alignment = image.memory_alignment();
        self.moves_data = image.is_moved_by_worker();
        self.image = image;
        if largest_request(&rules) > self.bounce.pages() {
            self.bounce = BouncePool::new(largest_request(&rules));
        }
        self.rules = rules;
        self.before_pause = None;
        // What it waited for was of the image before.
        self.waits_since = None;
    }

    /// Whether there is something to do at once. If not, the frontend was asked for a notification, unless
    /// its requests have to wait for something else; `freed` is [`Resources::freed`].
    pub fn arm(&mut self, freed: u64) -> bool {
        self.has_work_off_ring(freed).unwrap_or_else(|| self.ring.arm())
    }

    /// Whether data waits to be copied to the guest.
    pub fn has_copies(&self) -> bool {
        !self.copied_out.is_empty()
    }

    /// It has no turn in this pass.
    pub fn put_off(&mut self) {
        self.effort = 0;
    }

    /// Takes out what goes to storage with the next kick: [`OPERATION_WEIGHT`](crate::limits::OPERATION_WEIGHT) for each operation, and 1 for
    /// each page of its data.
    pub fn take_started(&mut self) -> u32 {
        std::mem::take(&mut self.started)
    }

    /// Takes out how many operations threads of the kernel have done.
    pub fn take_threaded(&mut self) -> u32 {
        let flushes = u32::from(std::mem::take(&mut self.flushed));
        std::mem::take(&mut self.threaded).saturating_add(flushes)
    }

    /// Whether it waits for something that others have.
    pub fn waits(&self) -> bool {
        self.waits_since.is_some()
    }

    /// Whether what it waits for may be there, now that something was given back.
    pub fn may_go_on<G, E>(&self, io: &Resources<G, E>) -> bool {
        self.has_waiting() || self.has_unfinished() || io.devices.has_room(&self.device)
    }

    /// Whether a turn would find anything to do; `freed` is [`Resources::freed`].
    pub fn has_work(&self, freed: u64) -> bool {
        let on_ring = || !matches!(self.ring.requests(), Ok(0));
        self.has_work_off_ring(freed).unwrap_or_else(on_ring)
    }

    /// The same, as far as that does not depend on what the ring holds; `None`: it does.
    fn has_work_off_ring(&self, freed: u64) -> Option<bool> {
        if self.has_unfinished() {
            return Some(true);
        }
        if let Some(since) = self.waits_since {
            return Some(since != freed);
        }
        match self.barrier {
            // Their own completions bring the worker back.
            Barrier::Waits(_) => Some(self.barrier_may_begin()),
            Barrier::Began(_) => Some(false),
            Barrier::None if self.stopped => Some(false),
            Barrier::None => self.before_pause.map(|left| left > 0),
        }
    }

    /// Whether a barrier waits for nothing but its turn.
    fn barrier_may_begin(&self) -> bool {
        matches!(self.barrier, Barrier::Waits(_)) && self.ring.in_flight() == 1
    }

    /// Asks the frontend for no notification any more, until [`Queue::arm`].
    pub fn disarm(&self) {
        self.ring.disarm();
    }

    /// Unmaps granted pages that have long been idle; `true`: others are still mapped.
    pub fn sweep<G: Grants, E: RegisterBuffers>(&mut self, io: &mut Resources<G, E>) -> bool {
        let DataGrants::Persistent(persistent) = &mut self.data_grants else { return false };
        persistent.sweep(&mut io.mapper(), self.slots.refs());
        self.counters.grants_mapped.set(persistent.count() as u64);
        persistent.count() > 0
    }
}

/// Pages that the data of the largest request can be in.
fn largest_request(rules: &DiskRules) -> usize {
    SEGMENTS_PER_REQUEST.max(rules.indirect_segments.into())
}

fn unmap_ring<G: Grants>(grants: &mut G, page: SharedPage) {
    let pages = page.into_guest_pages().expect("a ring is made over guest pages");
    if let Err(error) = grants.unmap(pages) {
        tracing::warn!(%error, "unmapping a ring failed");
    }
}
