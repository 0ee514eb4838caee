//! The negotiation of a frontend, as Linux blkfront does it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xenstore_rs::Xs;

use super::device::{Device, Options};
use crate::limits::SEGMENTS_PER_REQUEST;
use crate::msg::Protocol;
use crate::park;
use crate::sim::Domain;
use crate::units::{GrantRef, Port, Sectors, VbdId, parse_decimal};
use crate::xen::keys::{self, XenbusState};
use crate::xen::store::StoreClient;
use crate::xen::{Store, if_there};

/// How long a frontend waits for its backend: a guard against hanging, far above what is normal.
const PATIENCE: Duration = Duration::from_secs(60);

/// A ring, as its frontend publishes it.
pub trait Published {
    /// Grants of its pages, in their order.
    fn ring_refs(&self) -> &[GrantRef];
    /// The port to which the backend binds.
    fn port(&self) -> Port;
}

impl Published for Device {
    fn ring_refs(&self) -> &[GrantRef] {
        self.ring_refs()
    }

    fn port(&self) -> Port {
        self.port()
    }
}

/// A frontend's view of xenstore.
#[derive(Clone, Debug)]
pub struct Xenbus {
    store: StoreClient,
    area: String,
    backend: String,
}

/// What a frontend asks for. It gets the part of it that the backend offers.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Rings of the disk, each a [`Device`].
    pub queues: usize,
    /// What each of them is like.
    pub options: Options,
    /// It writes `protocol`; without it the backend takes an x86 guest for a 32-bit one.
    pub names_protocol: bool,
    /// Nodes of its earlier connection stay if the new one does not need them. Such a frontend
    /// writes the order and the number of its rings even when they are 0 and 1.
    pub leaves_nodes: bool,
}

impl Wanted {
    /// One ring, by a frontend that says everything and cleans up.
    pub fn one_queue(options: Options) -> Wanted {
        Wanted { queues: 1, options, names_protocol: true, leaves_nodes: false }
    }

    /// Pages of the domain that its devices take, and grants.
    pub fn pages(&self) -> usize {
        self.queues * self.options.device_pages()
    }

    /// As much of it as is offered.
    #[must_use]
    pub fn within(mut self, offered: &Offered) -> Wanted {
        self.queues = self.queues.min(offered.queues);
        let options = &mut self.options;
        options.persistent &= offered.persistent;
        options.ring_order = options.ring_order.min(offered.ring_order);
        options.segments =
            options.segments.min(offered.indirect_segments.max(SEGMENTS_PER_REQUEST));
        self
    }
}

/// What the backend offers from InitWait on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Granted pages may stay mapped.
    pub persistent: bool,
    /// log2 of the largest ring in pages.
    pub ring_order: u32,
    /// Most rings of the disk.
    pub queues: usize,
    /// Most segments of an indirect request; 0: none.
    pub indirect_segments: usize,
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
        let store = domain.open_store()?;
        store.watch(&format!("{}/{}", area_of(vbd), keys::BACKEND), "area")?;
        let xenbus = wait(&store, || Xenbus::find(&store, vbd))?;
        store.watch(&xenbus.theirs(keys::STATE), "backend")?;
        Ok(xenbus)
    }

    /// The area of a disk, through a connection with its domain's rights; `None` if nobody has
    /// made it. It watches nothing: the caller looks.
    pub fn find(store: &StoreClient, vbd: VbdId) -> io::Result<Option<Xenbus>> {
        let area = area_of(vbd);
        let backend = read_text(store, &format!("{area}/{}", keys::BACKEND))?;
        Ok(backend.map(|backend| Xenbus { store: store.clone(), area, backend }))
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

    /// The backend's `state`; `Unknown` if it is gone.
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
        let (mut devices, disk) = self.connect_all(domain, Wanted::one_queue(options))?;
        Ok((devices.remove(0), disk))
    }

    /// The same with several rings.
    pub fn connect_all(
        &self,
        domain: &Arc<Domain>,
        wanted: Wanted,
    ) -> io::Result<(Vec<Device>, Disk)> {
        self.wait_for(&[XenbusState::InitWait])?;
        let wanted = wanted.within(&self.offered()?);
        let devices = (0..wanted.queues)
            .map(|_| Device::new(Arc::clone(domain), wanted.options))
            .collect::<io::Result<Vec<_>>>()?;
        self.publish_all(&devices, &wanted)?;
        match self.wait_for(&[XenbusState::Connected, XenbusState::Closing, XenbusState::Closed])? {
            XenbusState::Connected => {}
            state => return Err(io::Error::other(format!("the backend went to {state}"))),
        }
        let disk = self.disk()?;
        self.set_state(XenbusState::Connected)?;
        Ok((devices, disk))
    }

    /// Writes a device's ring and event channel in one transaction, then Initialised.
    pub fn publish(&self, device: &Device) -> io::Result<()> {
        let wanted = Wanted::one_queue(device.options());
        self.publish_all(std::slice::from_ref(device), &wanted)
    }

    /// The same with the rings of a whole disk.
    pub fn publish_all(&self, rings: &[impl Published], wanted: &Wanted) -> io::Result<()> {
        let nodes = nodes(rings, wanted);
        self.store.atomically(|span| {
            for name in span.directory(&self.area)? {
                let stays = wanted.leaves_nodes && &*name != keys::PROTOCOL;
                if is_of_a_connection(&name) && !stays {
                    span.rm(&self.own(&name))?;
                }
            }
            nodes.iter().try_for_each(|(node, value)| span.write(&self.own(node), value))
        })?;
        self.set_state(XenbusState::Initialised)
    }

    /// Reads what the backend offers.
    pub fn offered(&self) -> io::Result<Offered> {
        Ok(Offered {
            persistent: self.number_or(keys::FEATURE_PERSISTENT, 0)? == 1,
            ring_order: self.number_or(keys::MAX_RING_PAGE_ORDER, 0)?,
            queues: self.number_or(keys::MULTI_QUEUE_MAX_QUEUES, 1)?,
            indirect_segments: self.number_or(keys::FEATURE_MAX_INDIRECT_SEGMENTS, 0)?,
        })
    }

    /// Reads what a backend has to publish before Connected.
    pub fn disk(&self) -> io::Result<Disk> {
        let info: u32 = self.number(keys::INFO)?;
        Ok(Disk {
            sectors: Sectors(self.number(keys::SECTORS)?),
            sector_bytes: self.number(keys::SECTOR_SIZE)?,
            read_only: info & keys::VDISK_READONLY != 0,
            persistent: self.offered()?.persistent,
        })
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> io::Result<T> {
        self.number_if_there(key)?.ok_or(io::ErrorKind::NotFound.into())
    }

    fn number_or<T: std::str::FromStr>(&self, key: &str, unsaid: T) -> io::Result<T> {
        Ok(self.number_if_there(key)?.unwrap_or(unsaid))
    }

    fn number_if_there<T: std::str::FromStr>(&self, key: &str) -> io::Result<Option<T>> {
        let path = self.theirs(key);
        let Some(text) = read_text(&self.store, &path)? else { return Ok(None) };
        match parse_decimal(&text) {
            Some(number) => Ok(Some(number)),
            None => Err(io::Error::other(format!("{path} holds \"{text}\""))),
        }
    }

    /// Closes the device: Closing, the backend's Closing, Closed, the backend's Closed; then every
    /// page is taken back. An error names a page that the backend still has.
    pub fn close(&self, device: Device) -> io::Result<()> {
        self.close_all(vec![device])
    }

    /// The same with several rings.
    pub fn close_all(&self, devices: Vec<Device>) -> io::Result<()> {
        self.set_state(XenbusState::Closing)?;
        self.wait_for(&[XenbusState::Closing, XenbusState::Closed, XenbusState::Unknown])?;
        self.set_state(XenbusState::Closed)?;
        // An online backend starts over at once.
        self.wait_for(&[XenbusState::Closed, XenbusState::InitWait, XenbusState::Unknown])?;
        devices.into_iter().try_for_each(Device::close).map_err(io::Error::other)
    }

    /// Starts over after [`Xenbus::close`]: the backend goes to InitWait again.
    pub fn start_over(&self) -> io::Result<()> {
        self.set_state(XenbusState::Initialising)
    }
}

/// What a frontend writes for a connection, below its own area.
fn nodes(rings: &[impl Published], wanted: &Wanted) -> Vec<(String, String)> {
    let Wanted { options, names_protocol, leaves_nodes, .. } = wanted;
    let mut nodes = vec![(keys::FEATURE_PERSISTENT, u8::from(options.persistent).to_string())];
    if *names_protocol {
        nodes.push((keys::PROTOCOL, name_of(options.protocol).to_owned()));
    }
    let says_order = options.ring_order > 0 || *leaves_nodes;
    if says_order {
        nodes.push((keys::RING_PAGE_ORDER, options.ring_order.to_string()));
    }
    if rings.len() > 1 || *leaves_nodes {
        nodes.push((keys::MULTI_QUEUE_NUM_QUEUES, rings.len().to_string()));
    }
    let mut nodes: Vec<_> =
        nodes.into_iter().map(|(node, value)| (node.to_owned(), value)).collect();
    for (number, ring) in rings.iter().enumerate() {
        let folder = if rings.len() > 1 { format!("queue-{number}/") } else { String::new() };
        let ring_ref = |page: usize| match says_order {
            true => format!("{folder}{}{page}", keys::RING_REF),
            false => format!("{folder}{}", keys::RING_REF),
        };
        let refs = ring.ring_refs().iter().enumerate();
        nodes.extend(refs.map(|(page, gref)| (ring_ref(page), gref.to_string())));
        nodes.push((format!("{folder}{}", keys::EVENT_CHANNEL), ring.port().to_string()));
    }
    nodes
}

fn area_of(vbd: VbdId) -> String {
    format!("device/{}/{vbd}", keys::FRONTEND_CLASS)
}

fn name_of(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::X86_64 => "x86_64-abi",
        Protocol::X86_32 => "x86_32-abi",
    }
}

/// Whether a connection wrote the node that is named.
fn is_of_a_connection(name: &str) -> bool {
    [keys::PROTOCOL, keys::EVENT_CHANNEL, keys::RING_PAGE_ORDER, keys::MULTI_QUEUE_NUM_QUEUES]
        .contains(&name)
        || name.starts_with(keys::RING_REF)
        || name.starts_with("queue-")
}

fn read_text(store: &StoreClient, path: &str) -> io::Result<Option<String>> {
    Ok(if_there(store.read(path))?.map(String::from))
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
