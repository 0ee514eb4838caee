//! The embedded stand-in for Xen.
//!
//! A run folder holds `hypervisor.sock` and `xenstore.sock`. [`StandIn`] serves both; [`SimXen`] is
//! the platform that a backend gets, [`Domain`] is a guest. All of them may be in one process or
//! each in its own.

pub mod blkfront;
pub mod domain;
pub mod events;
pub mod grants;
pub mod hypervisor;
pub mod store;

mod channels;
mod guest;
mod mailbox;
mod memory;
mod wire;

pub use domain::Domain;
pub use memory::Gfn;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xenstore_rs::Xs;

use events::SimEvents;
use grants::SimGrants;
use hypervisor::{Hypervisor, Toolstack};
use store::{Quota, StoreServer};

use crate::units::DomId;
use crate::xen::store::StoreClient;
use crate::xen::{NodeAccess, Nodes, Permission, Platform, PlatformError, Store};

/// The name of xenstore's socket in the run folder. Whoever can open it is dom0.
pub const XENSTORE_SOCKET: &str = "xenstore.sock";

/// A running stand-in. Dropping it ends it.
#[derive(Debug)]
pub struct StandIn {
    // In the order of their end: the hypervisor uses the store.
    _hypervisor: Hypervisor,
    _store: Arc<StoreServer>,
    folder: PathBuf,
    /// Removes the folder where we made it.
    _temporary: Option<tempfile::TempDir>,
}

impl StandIn {
    /// Starts one in `folder`, which must exist; sockets that a killed one left there are replaced.
    /// Its path must be short enough for a unix socket.
    pub fn start(folder: &Path) -> io::Result<StandIn> {
        let socket = folder.join(XENSTORE_SOCKET);
        remove_abandoned(&socket)?;
        remove_abandoned(&folder.join(wire::SOCKET_NAME))?;
        let store = Arc::new(StoreServer::start(&socket, Quota::default())?);
        let toolstack = Toolbox { store: Arc::clone(&store) };
        toolstack.create_dom0()?;
        Ok(StandIn {
            _hypervisor: Hypervisor::start(folder, Box::new(toolstack))?,
            _store: store,
            folder: folder.to_owned(),
            _temporary: None,
        })
    }

    /// Starts one in a folder of its own, which goes with it.
    pub fn start_temporary() -> io::Result<StandIn> {
        let temporary = tempfile::Builder::new().prefix("polldisk").tempdir()?;
        let stand_in = StandIn::start(temporary.path())?;
        Ok(StandIn { _temporary: Some(temporary), ..stand_in })
    }

    /// The run folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The platform for a backend in dom0.
    pub fn platform(&self) -> SimXen {
        SimXen::connect(&self.folder)
    }

    /// Makes a guest with `pages` pages of memory.
    pub fn create_domain(&self, domid: DomId, pages: u32) -> io::Result<Domain> {
        Domain::create(&self.folder, domid, pages)
    }
}

/// Removes a socket on which nobody listens any more.
fn remove_abandoned(socket: &Path) -> io::Result<()> {
    match UnixStream::connect(socket) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(socket)
        }
        _ => Ok(()),
    }
}

/// What a toolstack does for domains: their areas in xenstore, with the permissions that libxl
/// gives, and the announcements.
#[derive(Debug)]
struct Toolbox {
    store: Arc<StoreServer>,
}

impl Toolbox {
    fn client(&self) -> io::Result<StoreClient> {
        StoreClient::from_stream(self.store.connect_as(DomId::DOM0)?)
    }

    fn create_dom0(&self) -> io::Result<()> {
        let area = area(DomId::DOM0);
        let client = self.client()?;
        client.write(&format!("{area}/name"), "Domain-0")?;
        client.write(&format!("{area}/domid"), "0")
    }

    /// The guest reads its area, and owns what it may write in it.
    fn create_area(&self, domid: DomId) -> io::Result<()> {
        let read_only = [(DomId::DOM0, NodeAccess::None), (domid, NodeAccess::Read)]
            .map(|(domid, access)| Permission { domid, access });
        let own = [Permission { domid, access: NodeAccess::None }];
        let area = area(domid);
        self.client()?.atomically(|span| {
            span.mkdir(&area)?;
            span.set_permissions(&area, &read_only)?;
            span.write(&format!("{area}/name"), &format!("guest-{domid}"))?;
            span.write(&format!("{area}/domid"), &domid.to_string())?;
            span.mkdir(&format!("{area}/device"))?;
            for name in ["attr", "data", "drivers", "error", "feature"] {
                let path = format!("{area}/{name}");
                span.mkdir(&path)?;
                span.set_permissions(&path, &own)?;
            }
            Ok(())
        })
    }
}

impl Toolstack for Toolbox {
    fn created(&mut self, domid: DomId) -> io::Result<()> {
        // Dom0 with memory of its own (a frontend in dom0, through gntalloc) has its area already.
        if domid == DomId::DOM0 {
            return Ok(());
        }
        self.create_area(domid)?;
        self.store.introduce(domid)
    }

    fn destroyed(&mut self, domid: DomId) {
        if domid == DomId::DOM0 {
            return;
        }
        // Both fail only where the store has ended, and the area with it.
        let _ = self.client().and_then(|client| client.rm(&area(domid)));
        let _ = self.store.release(domid);
    }

    fn connect_store(&mut self, domid: DomId) -> io::Result<UnixStream> {
        self.store.connect_as(domid)
    }
}

fn area(domid: DomId) -> String {
    format!("/local/domain/{domid}")
}

/// A stand-in, seen from a backend in dom0.
#[derive(Clone, Debug)]
pub struct SimXen {
    folder: PathBuf,
}

impl SimXen {
    /// The stand-in whose sockets are in `folder`.
    pub fn connect(folder: &Path) -> SimXen {
        SimXen { folder: folder.to_owned() }
    }

    /// The run folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn unreachable(&self, what: &str, source: io::Error) -> PlatformError {
        PlatformError {
            what: format!("cannot reach the {what} of the stand-in in {}", self.folder.display()),
            mend: "check that it runs and that the folder is the one it was started with"
                .to_owned(),
            source,
        }
    }
}

impl Platform for SimXen {
    type Store = StoreClient;
    type Events = SimEvents;
    type Grants = SimGrants;

    fn open_store(&self) -> Result<StoreClient, PlatformError> {
        StoreClient::connect_unix(&self.folder.join(XENSTORE_SOCKET))
            .map_err(|error| self.unreachable("xenstore", error))
    }

    fn open_events(&self) -> Result<SimEvents, PlatformError> {
        SimEvents::open(&self.folder, DomId::DOM0)
            .map_err(|error| self.unreachable("hypervisor", error))
    }

    fn open_grants(&self) -> Result<SimGrants, PlatformError> {
        SimGrants::open(&self.folder, DomId::DOM0)
            .map_err(|error| self.unreachable("hypervisor", error))
    }
}
