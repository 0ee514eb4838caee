//! The embedded stand-in for Xen.
//!
//! [`StandIn`] serves it on two sockets in a run folder, `hypervisor.sock` and `xenstore.sock`, to any
//! process. [`LocalStandIn`] is the same hypervisor and xenstore without sockets and threads: what is
//! asked has happened when the call returns, so that one thread can step guests, control and workers in
//! an order of its own. Of both, [`SimXen`] is the platform that a backend gets, and [`Domain`] a guest.
//!
//! [`world`] does just that, with [storage that follows a script](disk).

pub mod blkfront;
pub mod connection;
pub mod disk;
pub mod domain;
pub mod events;
pub mod grants;
pub mod hypervisor;
pub mod random;
pub mod store;
pub mod world;

mod channels;
mod guest;
mod mailbox;
mod memory;
mod server;
mod wire;

pub use connection::Endpoint;
pub use domain::Domain;
pub use memory::Gfn;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use xenstore_rs::Xs;

use connection::Local;
use events::SimEvents;
use grants::SimGrants;
use hypervisor::{Hypervisor, Toolstack};
use server::HypervisorServer;
use store::{LocalStore, Quota, StoreServer};

use crate::units::DomId;
use crate::xen::store::StoreClient;
use crate::xen::{NodeAccess, Nodes, Permission, Platform, PlatformError, Store};

/// The name of xenstore's socket in the run folder. A client that can open it acts as dom0.
pub const XENSTORE_SOCKET: &str = "xenstore.sock";

/// A running stand-in. Dropping it ends it.
#[derive(Debug)]
pub struct StandIn {
    // In the order of their end: the hypervisor uses the store.
    _hypervisor: HypervisorServer,
    _store: Arc<StoreServer>,
    folder: PathBuf,
    /// Removes the folder, if we made it.
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
        let hypervisor = Hypervisor::new(Box::new(Toolbox::new(Arc::clone(&store))?));
        let of_domains = Arc::clone(&store);
        let connect_store = Box::new(move |domid| of_domains.connect_as(domid));
        Ok(StandIn {
            _hypervisor: HypervisorServer::start(folder, hypervisor, connect_store)?,
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
        Domain::create(&Endpoint::at(&self.folder), domid, pages)
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

/// A stand-in in the caller's process, without sockets and threads.
#[derive(Clone, Debug)]
pub struct LocalStandIn {
    local: Local,
}

impl LocalStandIn {
    /// One with dom0 only.
    pub fn new() -> io::Result<LocalStandIn> {
        let store = LocalStore::new(Quota::default());
        let hypervisor = Hypervisor::new(Box::new(Toolbox::new(store.clone())?));
        Ok(LocalStandIn { local: Local { hypervisor: Arc::new(Mutex::new(hypervisor)), store } })
    }

    /// The platform for a backend in dom0.
    pub fn platform(&self) -> SimXen {
        SimXen { endpoint: Endpoint::Local(self.local.clone()) }
    }

    /// Makes a guest with `pages` pages of memory.
    pub fn create_domain(&self, domid: DomId, pages: u32) -> io::Result<Domain> {
        Domain::create(&Endpoint::Local(self.local.clone()), domid, pages)
    }
}

/// A xenstore, as its toolstack needs it.
trait Xenstored: Send {
    fn client(&self) -> io::Result<StoreClient>;
    fn introduce(&self, domid: DomId) -> io::Result<()>;
    fn release(&self, domid: DomId) -> io::Result<()>;
}

impl Xenstored for Arc<StoreServer> {
    fn client(&self) -> io::Result<StoreClient> {
        StoreClient::from_stream(self.connect_as(DomId::DOM0)?)
    }

    fn introduce(&self, domid: DomId) -> io::Result<()> {
        StoreServer::introduce(self, domid)
    }

    fn release(&self, domid: DomId) -> io::Result<()> {
        StoreServer::release(self, domid)
    }
}

impl Xenstored for LocalStore {
    fn client(&self) -> io::Result<StoreClient> {
        self.connect_as(DomId::DOM0)
    }

    fn introduce(&self, domid: DomId) -> io::Result<()> {
        LocalStore::introduce(self, domid);
        Ok(())
    }

    fn release(&self, domid: DomId) -> io::Result<()> {
        LocalStore::release(self, domid);
        Ok(())
    }
}

/// What a toolstack does for domains: their areas in xenstore, with the permissions that libxl
/// gives, and the announcements.
#[derive(Debug)]
struct Toolbox<S> {
    store: S,
}

impl<S: Xenstored> Toolbox<S> {
    /// That of a new store, in which dom0 gets its area.
    fn new(store: S) -> io::Result<Toolbox<S>> {
        let area = area(DomId::DOM0);
        let client = store.client()?;
        client.write(&format!("{area}/name"), "Domain-0")?;
        client.write(&format!("{area}/domid"), "0")?;
        Ok(Toolbox { store })
    }

    /// The guest reads its area, and owns what it may write in it.
    fn create_area(&self, domid: DomId) -> io::Result<()> {
        let read_only = [(DomId::DOM0, NodeAccess::None), (domid, NodeAccess::Read)]
            .map(|(domid, access)| Permission { domid, access });
        let own = [Permission { domid, access: NodeAccess::None }];
        let area = area(domid);
        self.store.client()?.atomically(|span| {
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

impl<S: Xenstored> Toolstack for Toolbox<S> {
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
        // Both fail only if the store has ended, and the area with it.
        let _ = self.store.client().and_then(|client| client.rm(&area(domid)));
        let _ = self.store.release(domid);
    }
}

fn area(domid: DomId) -> String {
    format!("/local/domain/{domid}")
}

/// A stand-in, seen from a backend in dom0.
#[derive(Clone, Debug)]
pub struct SimXen {
    endpoint: Endpoint,
}

impl SimXen {
    /// The stand-in whose sockets are in `folder`.
    pub fn connect(folder: &Path) -> SimXen {
        SimXen { endpoint: Endpoint::at(folder) }
    }

    fn unreachable(&self, what: &str, source: io::Error) -> PlatformError {
        PlatformError {
            what: format!("cannot reach the {what} of {}", self.endpoint),
            remedy: "check that it runs and that the folder is the one it was started with"
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
        self.endpoint.open_store().map_err(|error| self.unreachable("xenstore", error))
    }

    fn open_events(&self) -> Result<SimEvents, PlatformError> {
        SimEvents::open(&self.endpoint, DomId::DOM0)
            .map_err(|error| self.unreachable("hypervisor", error))
    }

    fn open_grants(&self) -> Result<SimGrants, PlatformError> {
        SimGrants::open(&self.endpoint, DomId::DOM0)
            .map_err(|error| self.unreachable("hypervisor", error))
    }
}
