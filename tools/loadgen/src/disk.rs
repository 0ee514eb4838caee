//! One disk, from connecting it to closing it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use polldisk::blkif::Protocol;
use polldisk::blkif::ring::ring_entries;
use polldisk::sim::blkfront::xenbus::{self, Offered, Wanted, Xenbus};
use polldisk::units::{DomId, VbdId};
use polldisk::xen::keys::{self, XenbusState};
use polldisk::xen::shm::PAGE_BYTES;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{Events, if_there};
use serde::Serialize;
use xenstore_rs::Xs;

use crate::kernel::Kernel;
use crate::options::Plan;
use crate::pattern::Shape;
use crate::queue::Queue;

/// How long the backend may take to close a disk.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// A disk that is connecting or connected.
#[derive(Debug)]
pub struct Disk<E> {
    name: String,
    vbd: VbdId,
    store: StoreClient,
    /// Its areas in xenstore, once they were found.
    areas: Option<Areas>,
    queues: Vec<Queue<E>>,
    stage: Stage,
}

#[derive(Clone, Debug)]
struct Areas {
    xenbus: Xenbus,
    backend: DomId,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Waits for the backend's InitWait. An earlier connection may have to be closed first.
    Waiting {
        must_restart: bool,
    },
    /// Waits for the backend's Connected.
    Published(Wanted),
    Connected(Wanted, xenbus::Disk),
}

/// What both ends agreed on.
#[derive(Clone, Debug, Serialize)]
pub struct Negotiated {
    /// The disk: domid and vdev.
    pub disk: String,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of its logical blocks.
    pub sector_bytes: u32,
    /// Whether it can't be written.
    pub read_only: bool,
    /// Number of rings.
    pub queues: usize,
    /// log2 of each ring in pages.
    pub ring_order: u32,
    /// Most requests in flight on each ring.
    pub depth: usize,
    /// Whether granted pages stay mapped.
    pub persistent: bool,
    /// Whether requests are indirect.
    pub indirect: bool,
    /// Layout of ring entries.
    pub protocol: &'static str,
}

impl<E: Events> Disk<E> {
    /// A disk of the kernel's domain. Something else makes its areas in xenstore.
    pub fn new<K: Kernel<Events = E>>(
        kernel: &K,
        name: String,
        vbd: VbdId,
    ) -> anyhow::Result<Disk<E>> {
        let (store, queues) = (kernel.open_store()?, Vec::new());
        let stage = Stage::Waiting { must_restart: false };
        Ok(Disk { name, vbd, store, areas: None, queues, stage })
    }

    /// Continues as far as the toolstack and the backend allow. Returns whether the disk is connected.
    pub fn step<K: Kernel<Events = E>>(&mut self, kernel: &K, plan: &Plan) -> anyhow::Result<bool> {
        use XenbusState::*;
        let Some(Areas { xenbus, backend }) = self.find()? else { return Ok(false) };
        let state = xenbus.backend_state()?;
        match (self.stage, state) {
            (Stage::Connected(..), _) => return Ok(true),
            (Stage::Waiting { .. }, InitWait) => self.publish(kernel, plan, &xenbus, backend)?,
            (Stage::Waiting { must_restart: true }, Closed) => {
                xenbus.start_over()?;
                self.stage = Stage::Waiting { must_restart: false };
            }
            (Stage::Published(wanted), Connected) => {
                let disk = xenbus.disk()?;
                check(&disk, plan).with_context(|| self.name.clone())?;
                xenbus.set_state(Connected)?;
                self.stage = Stage::Connected(wanted, disk);
                return Ok(true);
            }
            (Stage::Published(_), Closing | Closed | Unknown) => {
                bail!("{}: the backend refused the connection and went to {state}", self.name)
            }
            _ => {}
        }
        Ok(false)
    }

    /// The areas, if they are complete. Closes the connection of an earlier frontend.
    fn find(&mut self) -> anyhow::Result<Option<Areas>> {
        if self.areas.is_some() {
            return Ok(self.areas.clone());
        }
        let Some(xenbus) = Xenbus::find(&self.store, self.vbd)? else { return Ok(None) };
        let (Some(backend), Some(state)) = (
            if_there(self.store.read(&xenbus.own(keys::BACKEND_ID)))?,
            if_there(self.store.read(&xenbus.own(keys::STATE)))?,
        ) else {
            return Ok(None);
        };
        let backend = backend.parse().context("the node backend-id of the frontend's area")?;
        let must_restart = XenbusState::from_text(&state) != XenbusState::Initialising;
        if must_restart {
            xenbus.set_state(XenbusState::Closed)?;
        }
        self.stage = Stage::Waiting { must_restart };
        self.areas = Some(Areas { xenbus, backend });
        Ok(self.areas.clone())
    }

    fn publish<K: Kernel<Events = E>>(
        &mut self,
        kernel: &K,
        plan: &Plan,
        xenbus: &Xenbus,
        backend: DomId,
    ) -> anyhow::Result<()> {
        let mut wanted = announced(&plan.wanted, &xenbus.offered()?);
        wanted.options.backend = backend;
        let options = &mut wanted.options;
        let entries = ring_entries(PAGE_BYTES << options.ring_order, options.protocol) as usize;
        options.buffers = options.buffers.min(entries);
        if plan.block_bytes > options.segments * PAGE_BYTES {
            let kib = options.segments * PAGE_BYTES / 1024;
            bail!(
                "{}: give --block-size {kib}K or less, the most that the backend accepts",
                self.name
            );
        }
        self.queues = (0..wanted.queues)
            .map(|_| Queue::new(kernel, &wanted.options, plan.block_bytes, &plan.operations))
            .collect::<anyhow::Result<_>>()?;
        xenbus.publish_all(&self.queues, &wanted)?;
        self.stage = Stage::Published(wanted);
        Ok(())
    }

    /// How far the disk has got, for the text of an error.
    pub fn standing(&self) -> String {
        let at = match self.areas.as_ref().map(|areas| areas.xenbus.backend_state()) {
            None => "it is not attached to its domain".to_owned(),
            Some(Ok(XenbusState::Unknown)) => "the backend has no state".to_owned(),
            Some(Ok(state)) => format!("the backend is at {state}"),
            Some(Err(error)) => format!("the backend's state cannot be read ({error})"),
        };
        format!("disk {}: {at}", self.name)
    }

    /// What both ends agreed on; `None` before the disk is connected.
    pub fn negotiated(&self, plan: &Plan) -> Option<Negotiated> {
        let Stage::Connected(wanted, disk) = &self.stage else { return None };
        let options = &wanted.options;
        Some(Negotiated {
            disk: self.name.clone(),
            sectors: disk.sectors.0,
            sector_bytes: disk.sector_bytes,
            read_only: disk.read_only,
            queues: wanted.queues,
            ring_order: options.ring_order,
            depth: options.buffers,
            persistent: options.persistent && disk.persistent,
            indirect: plan.operations.iter().any(|one| one.is_indirect(plan.block_bytes)),
            protocol: match options.protocol {
                Protocol::X86_64 => "x86_64",
                Protocol::X86_32 => "x86_32",
            },
        })
    }

    /// The disk's rings, and the shape of their requests.
    pub fn queues(&mut self, plan: &Plan) -> (&mut [Queue<E>], Shape) {
        let sectors = match &self.stage {
            Stage::Connected(_, disk) => disk.sectors.0,
            _ => 0,
        };
        let shape = Shape {
            sectors: 0..plan.options.size.map_or(sectors, |size| size.to_sectors().0),
            block_bytes: plan.block_bytes,
            sequential: plan.options.sequential,
            read_percent: plan.options.read,
        };
        (&mut self.queues, shape)
    }

    /// Closes the connection as a driver does when it is unloaded.
    pub fn close(&mut self) -> anyhow::Result<()> {
        use XenbusState::{Closed, Closing, InitWait, Unknown};
        let Some(Areas { xenbus, .. }) = &self.areas else { return Ok(()) };
        xenbus.set_state(Closing)?;
        self.wait_for(xenbus, &[Closing, Closed, Unknown])?;
        xenbus.set_state(Closed)?;
        self.wait_for(xenbus, &[Closed, InitWait, Unknown])
    }

    fn wait_for(&self, xenbus: &Xenbus, wanted: &[XenbusState]) -> anyhow::Result<()> {
        let end = Instant::now() + CLOSE_PATIENCE;
        loop {
            let state = xenbus.backend_state()?;
            if wanted.contains(&state) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{}: the backend stays at {state} and does not close", self.name);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// What the frontend publishes. xen-blkback offers persistent grants only once it is Connected, so they are
/// announced without an offer, as Linux's frontend does.
fn announced(wanted: &Wanted, offered: &Offered) -> Wanted {
    let mut announced = wanted.within(offered);
    announced.options.persistent = wanted.options.persistent;
    announced
}

fn check(disk: &xenbus::Disk, plan: &Plan) -> anyhow::Result<()> {
    let sector_bytes = disk.sector_bytes.max(1) as usize;
    if !plan.block_bytes.is_multiple_of(sector_bytes) {
        bail!("its blocks have {sector_bytes} bytes: give a multiple as --block-size");
    }
    if disk.read_only && plan.options.read < 100 {
        bail!("it can't be written: give --read 100");
    }
    let size = plan.options.size.map_or(disk.sectors, |size| size.to_sectors());
    if size > disk.sectors {
        bail!("it holds only {} sectors of 512 bytes: give a smaller --size", disk.sectors);
    }
    if size.0 / (plan.block_bytes as u64 / 512) < plan.wanted.queues as u64 {
        bail!("{size} sectors are too few for a block for each ring: give a larger --size");
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use polldisk::sim::blkfront::device::Options;

    use super::*;

    #[test]
    fn persistent_grants_are_announced_before_they_are_offered() {
        let early = Offered { persistent: false, ring_order: 0, queues: 1, indirect_segments: 256 };
        for persistent in [true, false] {
            let options = Options { persistent, ring_order: 2, ..Options::default() };
            let announced = announced(&Wanted::one_queue(options), &early);
            assert_eq!(announced.options.persistent, persistent);
            assert_eq!(announced.options.ring_order, 0, "everything else is as offered");
        }
    }
}
