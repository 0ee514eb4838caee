//! The negotiation of a frontend, as Linux blkfront does it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xenstore_rs::Xs;

use super::device::{Device, Options};
use crate::msg::Protocol;
use crate::park;
use crate::sim::Domain;
use crate::units::{Sectors, VbdId, parse_decimal};
use crate::xen::Store;
use crate::xen::keys::{self, XenbusState};
use crate::xen::store::StoreClient;

/// How long a frontend waits for its backend: a guard against hanging, far above what is normal.
const PATIENCE: Duration = Duration::from_secs(60);

/// A frontend's view of xenstore.
#[derive(Debug)]
pub struct Xenbus {
    store: StoreClient,
    area: String,
    backend: String,
}

/// What the backend says of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// 512-byte sectors.
    pub sectors: Sectors,
    /// Bytes in a logical block.
    pub sector_bytes: u32,
    /// It can't be written.
    pub read_only: bool,
    /// The backend keeps granted pages mapped.
    pub persistent: bool,
}

impl Xenbus {
    /// Opens the area of a disk, once the toolstack has made it.
    pub fn open(domain: &Domain, vbd: VbdId) -> io::Result<Xenbus> {
        let store = StoreClient::from_stream(domain.open_store()?)?;
        let area = format!("device/{}/{vbd}", keys::FRONTEND_CLASS);
        store.watch(&format!("{area}/{}", keys::BACKEND), "area")?;
        let backend = wait(&store, || read_text(&store, &format!("{area}/{}", keys::BACKEND)))?;
        store.watch(&format!("{backend}/{}", keys::STATE), "backend")?;
        Ok(Xenbus { store, area, backend })
    }

    /// The store connection, with the guest's rights.
    pub fn store(&self) -> &StoreClient {
        &self.store
    }

    /// The path of one of the frontend's own nodes.
    pub fn own(&self, key: &str) -> String {
        format!("{}/{key}", self.area)
    }

    /// The path of one of the backend's nodes.
    pub fn theirs(&self, key: &str) -> String {
        format!("{}/{key}", self.backend)
    }

    /// Writes the frontend's `state`.
    pub fn set_state(&self, state: XenbusState) -> io::Result<()> {
        self.store.write(&self.own(keys::STATE), &state.number().to_string())
    }

    /// The backend's `state`; `Unknown` where it is gone.
    pub fn backend_state(&self) -> io::Result<XenbusState> {
        let text = read_text(&self.store, &self.theirs(keys::STATE))?;
        Ok(text.map_or(XenbusState::Unknown, |text| XenbusState::from_text(&text)))
    }

    /// Waits until the backend is in one of `wanted`.
    pub fn wait_for(&self, wanted: &[XenbusState]) -> io::Result<XenbusState> {
        wait(&self.store, || Ok(Some(self.backend_state()?).filter(|state| wanted.contains(state))))
    }

    /// Goes through the whole negotiation: a device that the backend serves, and its disk.
    pub fn connect(&self, domain: &Arc<Domain>, options: Options) -> io::Result<(Device, Disk)> {
        self.wait_for(&[XenbusState::InitWait])?;
        let device = Device::new(Arc::clone(domain), options)?;
        self.publish(&device)?;
        match self.wait_for(&[XenbusState::Connected, XenbusState::Closing, XenbusState::Closed])? {
            XenbusState::Connected => {}
            state => return Err(io::Error::other(format!("the backend went to {state}"))),
        }
        let disk = self.disk()?;
        self.set_state(XenbusState::Connected)?;
        Ok((device, disk))
    }

    /// Writes a device's ring and event channel in one transaction, then Initialised.
    pub fn publish(&self, device: &Device) -> io::Result<()> {
        let options = device.options();
        let protocol = match options.protocol {
            Protocol::X86_64 => "x86_64-abi",
            Protocol::X86_32 => "x86_32-abi",
        };
        self.store.atomically(|span| {
            span.write(&self.own(keys::RING_REF), &device.ring_ref().to_string())?;
            span.write(&self.own(keys::EVENT_CHANNEL), &device.port().to_string())?;
            span.write(&self.own(keys::PROTOCOL), protocol)?;
            let persistent = if options.persistent { "1" } else { "0" };
            span.write(&self.own(keys::FEATURE_PERSISTENT), persistent)
        })?;
        self.set_state(XenbusState::Initialised)
    }

    /// Reads what a backend has to publish before Connected.
    pub fn disk(&self) -> io::Result<Disk> {
        let info: u32 = self.number(keys::INFO)?;
        Ok(Disk {
            sectors: Sectors(self.number(keys::SECTORS)?),
            sector_bytes: self.number(keys::SECTOR_SIZE)?,
            read_only: info & keys::VDISK_READONLY != 0,
            persistent: read_text(&self.store, &self.theirs(keys::FEATURE_PERSISTENT))?
                .is_some_and(|text| text == "1"),
        })
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> io::Result<T> {
        let path = self.theirs(key);
        let text = self.store.read(&path)?;
        parse_decimal(&text).ok_or_else(|| io::Error::other(format!("{path} holds \"{text}\"")))
    }

    /// Closes the device: Closing, the backend's Closing, Closed, the backend's Closed; then every
    /// page is taken back. An error names a page that the backend still has.
    pub fn close(&self, device: Device) -> io::Result<()> {
        self.set_state(XenbusState::Closing)?;
        self.wait_for(&[XenbusState::Closing, XenbusState::Closed, XenbusState::Unknown])?;
        self.set_state(XenbusState::Closed)?;
        // An online backend starts over at once.
        self.wait_for(&[XenbusState::Closed, XenbusState::InitWait, XenbusState::Unknown])?;
        device.close().map_err(io::Error::other)
    }

    /// Starts over after [`Xenbus::close`]: the backend goes to InitWait again.
    pub fn start_over(&self) -> io::Result<()> {
        self.set_state(XenbusState::Initialising)
    }
}

fn read_text(store: &StoreClient, path: &str) -> io::Result<Option<String>> {
    match store.read(path) {
        Ok(text) => Ok(Some(text.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks again after every watch event until `look` finds something.
fn wait<T>(store: &StoreClient, look: impl Fn() -> io::Result<Option<T>>) -> io::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if store.next_event()?.is_some() {
            continue;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        park::sleep(&[store.as_fd()], Some(left));
    }
}
