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

use events::SimEvents;
use grants::SimGrants;
use hypervisor::{Hypervisor, Toolstack};

use crate::units::DomId;
use crate::xen::store::StoreClient;
use crate::xen::{Platform, PlatformError};

/// The name of xenstore's socket in the run folder.
pub const XENSTORE_SOCKET: &str = "xenstore.sock";

/// A running stand-in. Dropping it ends it.
#[derive(Debug)]
pub struct StandIn {
    _hypervisor: Hypervisor,
    folder: PathBuf,
    /// Removes the folder where we made it.
    _temporary: Option<tempfile::TempDir>,
}

impl StandIn {
    /// Starts one in `folder`, which must exist. Its path must be short enough for a unix socket.
    pub fn start(folder: &Path) -> io::Result<StandIn> {
        let _hypervisor = Hypervisor::start(folder, Box::new(Toolbox))?;
        Ok(StandIn { _hypervisor, folder: folder.to_owned(), _temporary: None })
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

/// What a toolstack does for domains.
#[derive(Debug)]
struct Toolbox;

impl Toolstack for Toolbox {
    fn created(&mut self, _domid: DomId) -> io::Result<()> {
        Ok(())
    }

    fn destroyed(&mut self, _domid: DomId) {}

    fn connect_store(&mut self, _domid: DomId) -> io::Result<UnixStream> {
        Err(io::ErrorKind::Unsupported.into())
    }
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
