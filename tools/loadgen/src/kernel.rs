//! What a kernel gives a frontend: granted pages, an event channel, xenstore.
//!
//! [`SimKernel`] is a domain of the stand-in. [`XenKernel`] is the domain that this process runs in on real
//! Xen, usually dom0. There a process can be a frontend through `/dev/xen/gntalloc`. All other modules work
//! with both.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use polldisk::sim::Domain;
use polldisk::sim::events::SimEvents;
use polldisk::units::{DomId, GrantRef, Port};
use polldisk::xen::linux::LinuxXen;
use polldisk::xen::linux::evtchn::Evtchn;
use polldisk::xen::linux::gntalloc::Gntalloc;
use polldisk::xen::shm::GuestPages;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{Events, PageAccess, Platform};

/// Pages that the backend may map and write. They stay valid as long as the kernel that made them lives.
#[derive(Debug)]
pub struct Granted {
    /// The pages, in one range.
    pub pages: GuestPages,
    /// Their references, in the same order.
    pub refs: Vec<GrantRef>,
}

/// A frontend's own kernel.
pub trait Kernel {
    /// Its event channels.
    type Events: Events + Send;

    /// Opens a xenstore connection with the domain's rights.
    fn open_store(&self) -> anyhow::Result<StoreClient>;
    /// Opens a set of event channels with one port, to which `backend` may bind.
    fn open_events(&self, backend: DomId) -> anyhow::Result<(Self::Events, Port)>;
    /// Makes pages that `backend` may use as long as the kernel lives.
    fn grant(&self, backend: DomId, count: usize) -> anyhow::Result<Granted>;
    /// Number of granted pages that are mapped; `None` if it can't be known.
    fn mapped(&self) -> Option<usize>;
}

/// A domain of the stand-in.
#[derive(Clone, Debug)]
pub struct SimKernel(pub Arc<Domain>);

impl Kernel for SimKernel {
    type Events = SimEvents;

    fn open_store(&self) -> anyhow::Result<StoreClient> {
        Ok(self.0.open_store()?)
    }

    fn open_events(&self, backend: DomId) -> anyhow::Result<(SimEvents, Port)> {
        let mut events = self.0.open_events()?;
        let port = events.alloc_unbound(backend)?;
        Ok((events, port))
    }

    fn grant(&self, backend: DomId, count: usize) -> anyhow::Result<Granted> {
        let count = u32::try_from(count)?;
        let first = self.0.alloc_pages(count)?;
        let refs = self.0.reserve_refs(count as usize)?;
        for (frame, gref) in (first.0..).zip(&refs) {
            let gfn = polldisk::sim::Gfn(frame);
            self.0.permit(*gref, gfn, backend, PageAccess::ReadWrite);
        }
        Ok(Granted { pages: self.0.guest_pages(first, count), refs })
    }

    fn mapped(&self) -> Option<usize> {
        Some(self.0.mapped_grants())
    }
}

/// The domain that this process runs in.
#[derive(Debug)]
pub struct XenKernel {
    xen: LinuxXen,
    gntalloc: Gntalloc,
}

impl XenKernel {
    /// Opens Xen's devices.
    pub fn open() -> anyhow::Result<XenKernel> {
        let xen = LinuxXen::detect()?;
        let gntalloc = xen.open_gntalloc()?;
        Ok(XenKernel { xen, gntalloc })
    }
}

impl Kernel for XenKernel {
    type Events = Evtchn;

    fn open_store(&self) -> anyhow::Result<StoreClient> {
        Ok(self.xen.open_store()?)
    }

    fn open_events(&self, backend: DomId) -> anyhow::Result<(Evtchn, Port)> {
        let mut events = self.xen.open_events()?;
        let port = events.alloc_unbound(backend).context("cannot allocate an event channel")?;
        Ok((events, port))
    }

    fn grant(&self, backend: DomId, count: usize) -> anyhow::Result<Granted> {
        let (pages, refs) = self.gntalloc.alloc(backend, count).map_err(|error| {
            anyhow!(error).context(format!(
                "cannot grant {count} more pages; give a smaller --depth, or raise \
                 /sys/module/xen_gntalloc/parameters/limit"
            ))
        })?;
        Ok(Granted { pages, refs })
    }

    fn mapped(&self) -> Option<usize> {
        None
    }
}
