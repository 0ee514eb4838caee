//! What a frontend published, read and validated. The guest wrote all of it: if a number is out of range
//! the frontend is refused, and nothing is sized by a number before that check.

use std::io;

use xenstore_rs::Xs;

use super::ahead::ReadAhead;
use crate::backing::DataPath;
use crate::blkif::features::Offer;
use crate::msg::{GrantMode, Protocol};
use crate::text::excerpt;
use crate::units::{GrantRef, Port};
use crate::xen::Nodes;
use crate::xen::keys::{self, XenbusState};

/// What a frontend asked for, within the offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The layout of its ring entries.
    pub protocol: Protocol,
    /// How its data pages are reached.
    pub grant_mode: GrantMode,
    /// Its rings, at least one.
    pub rings: Vec<Ring>,
    /// The nodes of its first ring: the grant of the first page, and the event channel.
    pub first_nodes: [String; 2],
}

/// One ring of a frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Its pages in order; a power of two of them.
    pub refs: Vec<GrantRef>,
    /// The event channel to bind to.
    pub port: Port,
}

/// Why a frontend is refused. The text is safe to log.
#[derive(Debug, thiserror::Error)]
pub enum FrontendFault {
    /// A required node is missing.
    #[error("the frontend published no {0}")]
    Missing(String),
    /// A node holds an invalid value.
    #[error("the frontend published {node} = \"{value}\", which is not {wanted}")]
    Invalid {
        /// Below the frontend's directory.
        node: String,
        /// An excerpt of what it holds.
        value: String,
        /// What was expected.
        wanted: String,
    },
    /// Xenstore failed.
    #[error("cannot read {node} of the frontend")]
    Store {
        /// Below the frontend's directory.
        node: String,
        /// Xenstore's error.
        source: io::Error,
    },
}

/// The `state` in `area`; `Unknown` if the guest left something else there. Fails only if xenstore does.
pub fn state(store: &impl Xs, area: &str) -> io::Result<XenbusState> {
    match store.read(&format!("{area}/{}", keys::STATE)) {
        Ok(text) => Ok(XenbusState::from_text(&text)),
        Err(error) if is_unreadable(&error) => Ok(XenbusState::Unknown),
        Err(error) => Err(error),
    }
}

/// What a quick look at a frontend shows, in one round trip to xenstored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// Its `state`.
    pub state: XenbusState,
    /// It may have published rings that differ from those that are served: either its state says that it
    /// has just published some, or its first ring has changed.
    pub rings_may_be_new: bool,
}

/// Takes a quick look at a frontend; `served` is what it published for the rings that are served.
pub fn glance(store: &impl Nodes, area: &str, served: Option<&Published>) -> io::Result<Glance> {
    let (Some(served), Some(ring)) = (served, served.and_then(|served| served.rings.first()))
    else {
        return Ok(Glance { state: state(store, area)?, rings_may_be_new: false });
    };
    let [ref_node, port_node] = &served.first_nodes;
    let mut found = store.read_all(area, &[keys::STATE, ref_node, port_node])?.into_iter();
    let mut next = || match found.next() {
        Some(Err(error)) if !is_unreadable(&error) => Err(error),
        found => Ok(found.and_then(Result::ok)),
    };
    let (state, first_ref, port) = (next()?, next()?, next()?);
    let state = state.map_or(XenbusState::Unknown, |text| XenbusState::from_text(&text));
    let is = |text: Option<Box<str>>, number: u32| {
        text.is_some_and(|text| keys::number(&text) == Some(number))
    };
    let same = is(first_ref, ring.refs[0].0) && is(port, ring.port.0);
    let rings_may_be_new = match state {
        XenbusState::Initialised => true,
        XenbusState::Connected => !same,
        _ => false,
    };
    Ok(Glance { state, rings_may_be_new })
}

/// Reads everything that the frontend in `area` published for a connection.
pub fn read(store: &impl Nodes, area: &str, offer: &Offer) -> Result<Published, FrontendFault> {
    // All nodes of a frontend with one ring of one page.
    const NODES: [&str; 6] = [
        keys::RING_PAGE_ORDER,
        keys::MULTI_QUEUE_NUM_QUEUES,
        keys::RING_REF,
        keys::EVENT_CHANNEL,
        keys::FEATURE_PERSISTENT,
        keys::PROTOCOL,
    ];
    let failed = |source| FrontendFault::Store { node: keys::RING_REF.to_owned(), source };
    let mut nodes = Claims { ahead: ReadAhead::new(store, area, &NODES).map_err(failed)? };
    let order = nodes.number(
        keys::RING_PAGE_ORDER,
        0..=u64::from(offer.ring_page_order),
        "a ring size that was offered",
    )?;
    let queues = nodes.number(
        keys::MULTI_QUEUE_NUM_QUEUES,
        1..=u64::from(offer.queues),
        "a number of queues that was offered",
    )?;
    let queues = queues.unwrap_or(1);
    let folder = |queue: u64| if queues == 1 { String::new() } else { format!("queue-{queue}/") };
    let rings =
        (0..queues).map(|queue| nodes.ring(&folder(queue), order)).collect::<Result<_, _>>()?;
    let first_nodes =
        [ring_ref(&folder(0), order, 0), format!("{}{}", folder(0), keys::EVENT_CHANNEL)];
    // If the guest says neither, data is copied, which always works.
    let keeps_grants =
        nodes.text(keys::FEATURE_PERSISTENT)?.and_then(|text| keys::flag(&text)) == Some(true);
    let grant_mode = match offer.data_path {
        DataPath::Auto | DataPath::Map if keeps_grants => GrantMode::Persistent,
        DataPath::Map => GrantMode::Map,
        DataPath::Auto | DataPath::Copy => GrantMode::Copy,
    };
    Ok(Published { protocol: nodes.protocol()?, grant_mode, rings, first_nodes })
}

/// A frontend's area, in which nothing can be trusted.
struct Claims<'a, S> {
    ahead: ReadAhead<'a, S>,
}

impl<S: Nodes> Claims<'_, S> {
    fn text(&mut self, node: &str) -> Result<Option<Box<str>>, FrontendFault> {
        match self.ahead.take(node) {
            Ok(text) => Ok(Some(text)),
            // A value that is not text is reported like any invalid value, as a replacement character.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Some("\u{fffd}".into())),
            Err(error) if is_unreadable(&error) => Ok(None),
            Err(source) => Err(FrontendFault::Store { node: node.to_owned(), source }),
        }
    }

    fn number(
        &mut self,
        node: &str,
        range: std::ops::RangeInclusive<u64>,
        wanted: &str,
    ) -> Result<Option<u64>, FrontendFault> {
        let Some(text) = self.text(node)? else { return Ok(None) };
        match keys::number(&text).filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(FrontendFault::Invalid {
                node: node.to_owned(),
                value: excerpt(&text),
                wanted: format!("{wanted} ({} to {})", range.start(), range.end()),
            }),
        }
    }

    fn u32(&mut self, node: &str, wanted: &str) -> Result<u32, FrontendFault> {
        let number = self.number(node, 0..=u64::from(u32::MAX), wanted)?;
        number
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| FrontendFault::Missing(node.to_owned()))
    }

    /// One ring in `folder`. A one-page ring's grant is `ring-ref` unless `ring-page-order` is present; an
    /// earlier frontend may have left `ring-refN`, which does not count.
    fn ring(&mut self, folder: &str, order: Option<u64>) -> Result<Ring, FrontendFault> {
        let pages = 1u64 << order.unwrap_or(0);
        let refs: Vec<String> = (0..pages).map(|page| ring_ref(folder, order, page)).collect();
        let port = format!("{folder}{}", keys::EVENT_CHANNEL);
        let nodes: Vec<&str> = refs.iter().chain([&port]).map(String::as_str).collect();
        let failed = |source| FrontendFault::Store { node: refs[0].clone(), source };
        self.ahead.read(&nodes).map_err(failed)?;
        let refs = refs
            .iter()
            .map(|node| self.u32(node, "a grant reference").map(GrantRef))
            .collect::<Result<_, _>>()?;
        Ok(Ring { refs, port: Port(self.u32(&port, "an event channel")?) })
    }

    fn protocol(&mut self) -> Result<Protocol, FrontendFault> {
        let Some(text) = self.text(keys::PROTOCOL)? else { return Ok(UNSAID) };
        PROTOCOLS
            .iter()
            .find_map(|(name, protocol)| (*name == keys::word(&text)).then_some(*protocol))
            .ok_or_else(|| FrontendFault::Invalid {
                node: keys::PROTOCOL.to_owned(),
                value: excerpt(&text),
                wanted: "a protocol that polldisk supports".to_owned(),
            })
    }
}

/// The node with the grant of one page of the ring in `folder`.
fn ring_ref(folder: &str, order: Option<u64>, page: u64) -> String {
    match order {
        None => format!("{folder}{}", keys::RING_REF),
        Some(_) => format!("{folder}{}{page}", keys::RING_REF),
    }
}

/// Protocols that a frontend may use on this host, by their names in Xen's `public/io/protocols.h`.
#[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
const PROTOCOLS: &[(&str, Protocol)] =
    &[("x86_64-abi", Protocol::X86_64), ("x86_32-abi", Protocol::X86_32)];
#[cfg(target_arch = "aarch64")]
const PROTOCOLS: &[(&str, Protocol)] = &[("arm-abi", Protocol::X86_64)];

/// The protocol of a frontend that names none: on x86 every backend assumes an old 32-bit frontend;
/// elsewhere there is only one.
#[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
const UNSAID: Protocol = Protocol::X86_32;
#[cfg(target_arch = "aarch64")]
const UNSAID: Protocol = Protocol::X86_64;

/// Errors that a guest can cause in its own area: the node is missing, is not text, or may not be read (in
/// a driver domain).
fn is_unreadable(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | InvalidData | PermissionDenied)
}

#[cfg(test)]
mod test;
