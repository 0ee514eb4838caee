//! A backend that answers every request at once and touches no data. It shows the upper limit of what a load
//! can measure.
//!
//! It runs in threads of this process, one for each ring, which poll and never sleep.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use polldisk::blkif::codec::RawResponse;
use polldisk::blkif::ring::BackRing;
use polldisk::blkif::{Protocol, Status};
use polldisk::limits::{INDIRECT_SEGMENTS_MAX, QUEUES_PER_DISK_MAX, RING_PAGE_ORDER_MAX};
use polldisk::sim::SimXen;
use polldisk::units::{DomId, GrantRef, Port};
use polldisk::xen::keys::{self, XenbusState};
use polldisk::xen::shm::SharedPage;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{Events, Grants, PageAccess, Platform};
use xenstore_rs::Xs;

use crate::measure::Watched;
use crate::toolstack::Place;

/// Sectors of each disk: 8 GiB.
const SECTORS: u64 = 8 << 21;

/// How often the echo looks at xenstore.
const LOOK: Duration = Duration::from_millis(1);

/// The backend of some disks. It ends when its disks close, or when it is dropped.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Echo {
    /// Starts a thread for each disk. Rings are pinned to `cores` in turn.
    pub fn start(
        platform: &SimXen,
        kind: &str,
        places: &[Place],
        cores: &[usize],
    ) -> anyhow::Result<Echo> {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = places
            .iter()
            .enumerate()
            .map(|(index, place)| {
                let disk = EchoDisk {
                    platform: platform.clone(),
                    domid: place.domid,
                    backend: keys::backend_area(DomId::DOM0, kind, place.domid, place.vbd),
                    frontend: keys::frontend_area(place.domid, place.vbd),
                    cores: cores.iter().copied().cycle().skip(index).take(cores.len()).collect(),
                    stop: Arc::clone(&stop),
                };
                let name = "echo".to_owned();
                std::thread::Builder::new().name(name).spawn(move || disk.serve())
            })
            .collect::<Result<_, _>>()?;
        Ok(Echo { stop, threads })
    }
}

impl Watched for Echo {
    fn check(&mut self) -> anyhow::Result<()> {
        match self.threads.iter().position(JoinHandle::is_finished) {
            None => Ok(()),
            Some(ended) => match self.threads.swap_remove(ended).join() {
                Ok(result) => result.context("the echo failed"),
                Err(_) => bail!("the echo panicked"),
            },
        }
    }

    fn pid(&self) -> Option<u32> {
        None
    }

    fn is_here(&self) -> bool {
        true
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // `check` has reported any failure that matters.
            let _ = thread.join();
        }
    }
}

struct EchoDisk {
    platform: SimXen,
    domid: DomId,
    backend: String,
    frontend: String,
    cores: Vec<usize>,
    stop: Arc<AtomicBool>,
}

/// A ring, as the frontend has published it.
struct Ring {
    refs: Vec<GrantRef>,
    port: Port,
}

impl EchoDisk {
    fn serve(&self) -> anyhow::Result<()> {
        let store = self.platform.open_store()?;
        for (node, value) in [
            (keys::FEATURE_PERSISTENT, 1),
            (keys::MAX_RING_PAGE_ORDER, u64::from(RING_PAGE_ORDER_MAX)),
            (keys::MULTI_QUEUE_MAX_QUEUES, u64::from(QUEUES_PER_DISK_MAX)),
            (keys::FEATURE_MAX_INDIRECT_SEGMENTS, u64::from(INDIRECT_SEGMENTS_MAX)),
            (keys::SECTORS, SECTORS),
            (keys::SECTOR_SIZE, 512),
            (keys::INFO, 0),
        ] {
            store.write(&format!("{}/{node}", self.backend), &value.to_string())?;
        }
        self.set_state(&store, XenbusState::InitWait)?;
        if !self.wait_for(&store, XenbusState::Initialised)? {
            return Ok(());
        }
        let (rings, protocol) = self.rings(&store)?;
        let closing = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let threads: Vec<_> = rings
                .iter()
                .enumerate()
                .map(|(index, ring)| {
                    let core = self.cores.get(index % self.cores.len().max(1)).copied();
                    let closing = &closing;
                    scope.spawn(move || self.echo(ring, protocol, core, closing))
                })
                .collect();
            self.set_state(&store, XenbusState::Connected)?;
            self.wait_for(&store, XenbusState::Closing)?;
            closing.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a ring's thread panicked"))??;
            }
            anyhow::Ok(())
        })?;
        self.set_state(&store, XenbusState::Closing)?;
        self.wait_for(&store, XenbusState::Closed)?;
        self.set_state(&store, XenbusState::Closed)?;
        // Stays until it is stopped, since a backend that has closed a disk still exists.
        while !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn echo(
        &self,
        ring: &Ring,
        protocol: Protocol,
        core: Option<usize>,
        closing: &AtomicBool,
    ) -> anyhow::Result<()> {
        if let Some(id) = core {
            core_affinity::set_for_current(core_affinity::CoreId { id });
        }
        let mut grants = self.platform.open_grants()?;
        let mut events = self.platform.open_events()?;
        let port = events.bind_interdomain(self.domid, ring.port)?;
        let pages = grants.map(self.domid, &ring.refs, PageAccess::ReadWrite)?;
        let mut ring =
            BackRing::attach(SharedPage::over(pages), protocol).map_err(|(fault, _)| fault)?;
        while !closing.load(Ordering::Relaxed) {
            let requests = ring.requests()?;
            if requests == 0 {
                std::hint::spin_loop();
                continue;
            }
            for _ in 0..requests {
                let request = ring.take();
                let response = RawResponse::new(request.id(), request.operation(), Status::Okay);
                ring.answer(&response);
            }
            if ring.publish() {
                events.notify(port)?;
            }
        }
        match ring.into_page().into_guest_pages() {
            Some(pages) => Ok(grants.unmap(pages)?),
            None => Ok(()),
        }
    }

    fn rings(&self, store: &StoreClient) -> anyhow::Result<(Vec<Ring>, Protocol)> {
        let text = |node: &str| store.read(&format!("{}/{node}", self.frontend));
        let number = |node: &str| -> anyhow::Result<u32> {
            let text = text(node)?;
            text.parse().with_context(|| format!("{node} holds \"{text}\""))
        };
        let queues = number(keys::MULTI_QUEUE_NUM_QUEUES).unwrap_or(1);
        let order = number(keys::RING_PAGE_ORDER).ok();
        let protocol = match &*text(keys::PROTOCOL)? {
            "x86_32-abi" => Protocol::X86_32,
            _ => Protocol::X86_64,
        };
        let rings = (0..queues).map(|queue| {
            let folder = if queues > 1 { format!("queue-{queue}/") } else { String::new() };
            let refs = match order {
                None => vec![number(&format!("{folder}{}", keys::RING_REF))?],
                Some(order) => (0..1 << order)
                    .map(|page| number(&format!("{folder}{}{page}", keys::RING_REF)))
                    .collect::<anyhow::Result<_>>()?,
            };
            let port = Port(number(&format!("{folder}{}", keys::EVENT_CHANNEL))?);
            Ok(Ring { refs: refs.into_iter().map(GrantRef).collect(), port })
        });
        Ok((rings.collect::<anyhow::Result<_>>()?, protocol))
    }

    fn set_state(&self, store: &StoreClient, state: XenbusState) -> anyhow::Result<()> {
        let path = format!("{}/{}", self.backend, keys::STATE);
        Ok(store.write(&path, &state.number().to_string())?)
    }

    /// Waits for a state of the frontend. Returns `false` if the echo is to stop.
    fn wait_for(&self, store: &StoreClient, wanted: XenbusState) -> anyhow::Result<bool> {
        loop {
            let state = store.read(&format!("{}/{}", self.frontend, keys::STATE))?;
            if XenbusState::from_text(&state) == wanted {
                return Ok(true);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
    }
}
