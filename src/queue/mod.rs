//! One ring being served: from taking a request off it to putting the response on it.
//!
//! Each pass of the worker takes a queue through the same steps ([`pass`]):
//! - [`Queue::take`] copies and checks requests, reads the segments of indirect ones ([`indirect`]), locates
//!   their data, mapping all missing pages in one batch and filling bounce memory by one grant copy
//!   ([`locate`]), and submits them to storage.
//! - [`Queue::complete`] handles the engine's results.
//! - [`Queue::finish_pass`] copies bounced reads to the guest, as far as the turn's effort allows, publishes
//!   the remaining responses, and says whether to notify the frontend.
//!
//! The *effort* of a queue's turn bounds what a pass does for it. Copies and transfers that are left over
//! continue in the next turn.
//!
//! If a request needs something that the worker's queues share and none is left, it *waits*, and so do the
//! requests behind it on the ring. It is tried again only after something was given back
//! ([`Resources::give_backs`]).
//!
//! The steady path neither allocates nor makes a system call per request, with one exception that the admin
//! must choose: mapping pages for the duration of a request ([`transient`]).
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
    /// Grant mappings and copies.
    pub grants: G,
    /// Storage.
    pub engine: E,
    /// When the pass began, or when its completions were reaped.
    pub now_ns: u64,
    /// Changes whenever something that a queue may be waiting for is given back.
    pub give_backs: u64,
    /// Reports to control.
    pub outbox: Outbox,
    /// Requests in flight.
    requests: Pool,
    /// How many of them each block device has.
    devices: Devices,
    /// Bounce memory, for data that is copied.
    bounce: BouncePool,
    /// Tables for indirect requests.
    tables: LargeTables,
    /// Reused lists, so that a pass allocates nothing.
    scratch: Scratch,
}

impl<G, E> Resources<G, E> {
    /// With nothing in use; `workers` is the number of workers that share the host's devices.
    pub fn new(grants: G, engine: E, outbox: Outbox, workers: usize) -> Resources<G, E> {
        Resources {
            grants,
            engine,
            now_ns: 0,
            give_backs: 0,
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

/// Lists that each pass fills and empties.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The direct request being taken.
    direct: RawDirect,
    /// Slots of requests just taken.
    fresh: Vec<u32>,
    /// Indirect requests whose segments are still to be read.
    indirect: Vec<Indirect>,
    /// Their segments as copied from the guest, one request after another.
    segment_bytes: Vec<u8>,
    /// Segments whose page is not mapped: slot and index of the segment.
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
    /// The worker itself moves its data.
    moves_data: bool,
    slots: Slots,
    /// This queue's share of the worker's requests in flight.
    requests: Share,
    /// This queue's share of the worker's tables.
    tables: Share,
    /// This queue's share of the tags of the block device that its disk is on.
    device: Option<DeviceShare>,
    /// Its own bounce memory, used when too little is left of the worker's.
    bounce: BouncePool,
    /// Slots whose next step the engine had no room for.
    no_room: VecDeque<u32>,
    /// Slots that wait for bounce memory.
    stalled: VecDeque<u32>,
    /// An indirect request that waits for a table.
    waiting_head: Option<IndirectHead>,
    /// [`Resources::give_backs`] when the waiting requests were last tried; `None`: nothing waits.
    waits_since: Option<u64>,
    /// Writes whose data is being copied to bounce memory.
    to_fetch: VecDeque<u32>,
    /// Reads whose data is being copied from bounce memory to the guest.
    to_copy_out: VecDeque<u32>,
    /// Slots whose next step must wait for the next turn.
    interrupted: VecDeque<u32>,
    /// Effort left in this turn.
    effort: u32,
    /// As in [`Turn`].
    operation_effort: u32,
    /// The total weight of the operations that go to storage with the next kick.
    started: u32,
    /// Operations other than flushes that kernel threads completed since [`Queue::take_threaded`].
    threaded: u32,
    /// A flush completed since then. Flushes that complete together were one for storage.
    flushed: bool,
    data_grants: DataGrants,
    counters: Arc<QueueCounters>,
    latency: LatencyLog,
    barrier: Barrier,
    /// The frontend is to be notified at the end of the pass.
    notify: bool,
    /// Takes no more requests, because it was told to stop or the frontend broke the ring.
    stopped: bool,
    /// Requests still to be taken before a pause, which lasts until the image is replaced; `None`: no pause.
    before_pause: Option<u32>,
    reports: Reports,
}

/// What one turn of a queue may cost, in units of [`EFFORT_NS`](crate::limits::EFFORT_NS).
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// The turn ends when this is spent.
    pub effort: u32,
    /// The effort of submitting one operation without data to storage; 0: not charged.
    pub operation_effort: u32,
}

/// How the guest's data pages are accessed ([`GrantMode`]).
#[derive(Debug)]
enum DataGrants {
    Persistent(PersistentGrants),
    Map(TransientGrants),
    Copy,
}

/// A write that must not be reordered with other requests. Nothing more is taken until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    None,
    /// It waits in this slot until nothing else is in flight.
    Waits(u32),
    /// It is under way in this slot, and nothing else is in flight.
    Began(u32),
}

impl Queue {
    /// Maps the ring and binds the event channel. On an error nothing stays mapped or bound. The error's
    /// text names the reference or port and goes to the `error` node.
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
            no_room: list(),
            stalled: list(),
            waiting_head: None,
            waits_since: None,
            to_fetch: list(),
            to_copy_out: list(),
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

    /// Unmaps and unbinds everything. Call only when [`Queue::is_drained`].
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

    /// The queue's name.
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

    /// Stops taking requests; those in flight are finished and answered.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Takes the requests published so far, then none until [`Queue::replace_image`]. The queue must be
    /// polled until those in flight are finished and answered.
    pub fn pause(&mut self) {
        // A broken ring is noticed when it is next looked at.
        self.before_pause = Some(self.ring.requests().unwrap_or(0));
    }

    /// Whether a [`Queue::pause`] is complete: nothing is in flight, and nothing more is taken.
    pub fn is_paused(&self) -> bool {
        self.is_drained() && (self.stopped || self.before_pause == Some(0))
    }

    /// Serves another image from now on. Call only when [`Queue::is_paused`], so that no request is checked
    /// against one image and executed on another.
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
        // What it waited for concerned the previous image.
        self.waits_since = None;
    }

    /// Asks the frontend for a notification, unless the queue has work or waits for something other
    /// than requests. `true`: there is work now. `give_backs` is [`Resources::give_backs`].
    pub fn arm(&mut self, give_backs: u64) -> bool {
        self.has_work_off_ring(give_backs).unwrap_or_else(|| self.ring.arm())
    }

    /// Whether data waits to be copied to the guest.
    pub fn has_copies(&self) -> bool {
        !self.to_copy_out.is_empty()
    }

    /// Denies the queue a turn in this pass.
    pub fn put_off(&mut self) {
        self.effort = 0;
    }

    /// Returns and resets the weight of what goes to storage with the next kick:
    /// [`OPERATION_WEIGHT`](crate::limits::OPERATION_WEIGHT) for each operation and 1 for each page of data.
    pub fn take_started(&mut self) -> u32 {
        std::mem::take(&mut self.started)
    }

    /// Returns and resets the number of operations that kernel threads have completed.
    pub fn take_threaded(&mut self) -> u32 {
        let flushes = u32::from(std::mem::take(&mut self.flushed));
        std::mem::take(&mut self.threaded).saturating_add(flushes)
    }

    /// Whether it waits for something that other queues hold.
    pub fn waits(&self) -> bool {
        self.waits_since.is_some()
    }

    /// False if it waits only for tags of its device, and none is free.
    pub fn may_go_on<G, E>(&self, io: &Resources<G, E>) -> bool {
        self.has_waiting() || self.has_unfinished() || io.devices.has_room(&self.device)
    }

    /// Whether a turn would find anything to do; `give_backs` is [`Resources::give_backs`].
    pub fn has_work(&self, give_backs: u64) -> bool {
        let on_ring = || !matches!(self.ring.requests(), Ok(0));
        self.has_work_off_ring(give_backs).unwrap_or_else(on_ring)
    }

    /// As [`Queue::has_work`], without a look at the ring; `None`: it depends on the ring.
    fn has_work_off_ring(&self, give_backs: u64) -> Option<bool> {
        if self.has_unfinished() {
            return Some(true);
        }
        if let Some(since) = self.waits_since {
            return Some(since != give_backs);
        }
        match self.barrier {
            // Completions of the requests in flight bring the worker back.
            Barrier::Waits(_) => Some(self.barrier_may_begin()),
            Barrier::Began(_) => Some(false),
            Barrier::None if self.stopped => Some(false),
            Barrier::None => self.before_pause.map(|left| left > 0),
        }
    }

    /// Whether a barrier waits and nothing else is in flight.
    fn barrier_may_begin(&self) -> bool {
        matches!(self.barrier, Barrier::Waits(_)) && self.ring.in_flight() == 1
    }

    /// Stops asking the frontend for notifications, until [`Queue::arm`].
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

/// The most pages that the data of one request can lie in.
fn largest_request(rules: &DiskRules) -> usize {
    SEGMENTS_PER_REQUEST.max(rules.indirect_segments.into())
}

fn unmap_ring<G: Grants>(grants: &mut G, page: SharedPage) {
    let pages = page.into_guest_pages().expect("a ring is made over guest pages");
    if let Err(error) = grants.unmap(pages) {
        tracing::warn!(%error, "unmapping a ring failed");
    }
}
