//! The backend area of a disk: what the toolstack wrote there, and how polldisk writes to it.

use std::io;

use xenstore_rs::Xs;

use super::ahead::ReadAhead;
use super::key::DiskKey;
use crate::backing::{Access, Discard, Geometry, Image};
use crate::blkif::features::{self, DiskOffer};
use crate::limits;
use crate::units::{DomId, parse_decimal};
use crate::xen::keys::{self, XenbusState};
use crate::xen::{Nodes, Store, if_there};

/// What the toolstack says of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What holds its contents, as written but for libxl's `aio:`; empty: a drive without a medium.
    pub target: String,
    /// The guest may not write.
    pub read_only: bool,
    /// Others may write to its contents, too: the mode has a `!`, as xl's `w!` does.
    pub shareable: bool,
    /// It is a CD-ROM, which is always read-only.
    pub cdrom: bool,
    /// The toolstack lets its guest discard.
    pub discard_enable: bool,
    /// Its medium can be taken out.
    pub removable: bool,
    /// The hotplug script that the toolstack runs after InitWait.
    pub script: Option<String>,
    /// polldisk made the areas.
    pub attached: bool,
}

/// The hotplug script of a disk. libxl runs it after InitWait, and where it fails gives up at once
/// and prints `hotplug-error`; without InitWait it waits for 10 s and prints no reason. A script may
/// find that somebody else uses what the disk holds, so like blkback polldisk connects only once it
/// has written `hotplug-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hotplug {
    /// There is none: polldisk writes `hotplug-status` itself.
    None,
    /// `block-polldisk`, which passes on what polldisk writes to `hotplug-status` and
    /// `hotplug-error`. So a disk that can't be opened goes to InitWait too.
    Ours,
    /// Another, such as `block`.
    Foreign,
}

/// Why an area does not describe a disk.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// A node is missing.
    #[error("{0} is missing from the backend area; the toolstack has to write it")]
    Missing(&'static str),
    /// The area names another frontend than its own path does.
    #[error("{node} is \"{value}\" and not \"{wanted}\"; an area is for its own path's frontend")]
    Stranger {
        /// Which node.
        node: &'static str,
        /// What it holds.
        value: String,
        /// What its path says.
        wanted: String,
    },
    /// There is no medium, and no drive that one could be put into.
    #[error(
        "params names nothing; name the disk's contents, such as raw:/path, or make it a drive \
         that may be empty (devtype=cdrom)"
    )]
    Empty,
    /// Xenstore failed.
    #[error("cannot read {node} of the backend area")]
    Store {
        /// Which node.
        node: &'static str,
        /// Xenstore's error.
        source: io::Error,
    },
}

impl Description {
    /// Reads the area of `key`.
    pub fn read(store: &impl Nodes, area: &str, key: &DiskKey) -> Result<Description, AreaError> {
        const NODES: [&str; 9] = [
            keys::FRONTEND_ID,
            keys::FRONTEND,
            keys::DEVICE_TYPE,
            keys::REMOVABLE,
            keys::PARAMS,
            keys::MODE,
            keys::DISCARD_ENABLE,
            keys::SCRIPT,
            keys::ATTACHED,
        ];
        let failed = |node| move |source| AreaError::Store { node, source };
        let mut ahead = ReadAhead::new(store, area, &NODES).map_err(failed(keys::FRONTEND_ID))?;
        let mut text = |node: &'static str| ahead.take_if_there(node).map_err(failed(node));
        let is = |node, value: Option<Box<str>>, wanted: String| match value {
            Some(value) if *value == *wanted => Ok(()),
            Some(value) => Err(AreaError::Stranger { node, value: value.into(), wanted }),
            None => Err(AreaError::Missing(node)),
        };
        is(keys::FRONTEND_ID, text(keys::FRONTEND_ID)?, key.domid.to_string())?;
        is(keys::FRONTEND, text(keys::FRONTEND)?, key.frontend_area())?;
        let cdrom = text(keys::DEVICE_TYPE)?.is_some_and(|kind| &*kind == "cdrom");
        let removable = text(keys::REMOVABLE)?.is_some_and(|flag| &*flag == "1");
        let target = match text(keys::PARAMS)? {
            Some(params) => target_of(&params).to_owned(),
            None if cdrom || removable => String::new(),
            None => return Err(AreaError::Missing(keys::PARAMS)),
        };
        if target.is_empty() && !(cdrom || removable) {
            return Err(AreaError::Empty);
        }
        let mode = text(keys::MODE)?.ok_or(AreaError::Missing(keys::MODE))?;
        Ok(Description {
            target,
            read_only: cdrom || !mode.contains('w'),
            shareable: mode.contains('!'),
            cdrom,
            removable,
            discard_enable: text(keys::DISCARD_ENABLE)?.is_none_or(|flag| &*flag != "0"),
            script: text(keys::SCRIPT)?.map(String::from),
            attached: text(keys::ATTACHED)?.is_some(),
        })
    }

    /// How the disk `key` uses its storage.
    pub fn access(&self, key: &DiskKey) -> Access {
        let Description { read_only, shareable, .. } = *self;
        Access { read_only, shareable, user: key.user() }
    }

    /// Whether it is a drive: its medium may be changed, and may be missing.
    pub fn is_drive(&self) -> bool {
        self.cdrom || self.removable
    }

    /// What the guest is told that it may discard of `image`.
    pub fn discard(&self, image: &Image) -> Option<Discard> {
        image.discard().filter(|_| self.discard_enable && !self.read_only)
    }

    /// How the toolstack's hotplug script and polldisk share the work.
    pub fn hotplug(&self) -> Hotplug {
        match self.script.as_deref() {
            None => Hotplug::None,
            Some(script) if script.ends_with("/block-polldisk") => Hotplug::Ours,
            Some(_) => Hotplug::Foreign,
        }
    }

    /// The flags of `info`.
    pub fn info(&self) -> u32 {
        let flag = |set, value| if set { value } else { 0 };
        flag(self.cdrom, keys::VDISK_CDROM)
            | flag(self.removable, keys::VDISK_REMOVABLE)
            | flag(self.read_only, keys::VDISK_READONLY)
    }
}

/// The target that `params` names. libxl writes raw contents as `aio:/path` where it does not know
/// the disk for a block device, and always when it changes a CD-ROM's medium.
fn target_of(params: &str) -> &str {
    params.strip_prefix("aio:").unwrap_or(params)
}

/// What `params` names now; empty: no medium. `None` where the node is missing.
pub fn target(store: &impl Xs, area: &str) -> io::Result<Option<String>> {
    let params = if_there(store.read(&format!("{area}/{}", keys::PARAMS)))?;
    Ok(params.map(|params| target_of(&params).to_owned()))
}

/// A value to be written to a node of an area.
pub type NodeValue = (&'static str, String);

/// What a frontend reads before it chooses its rings, and the toolstack's script before it ends.
pub fn features(disk: &DiskOffer, hotplug: Hotplug) -> Vec<NodeValue> {
    let mut nodes = features::nodes(disk);
    if hotplug == Hotplug::None {
        nodes.push((keys::HOTPLUG_STATUS, "connected".to_owned()));
    }
    nodes
}

/// What a frontend reads when the backend is Connected.
pub fn shape(info: u32, geometry: &Geometry) -> Vec<NodeValue> {
    vec![
        (keys::SECTORS, geometry.sectors().to_string()),
        (keys::INFO, info.to_string()),
        (keys::SECTOR_SIZE, geometry.sector_bytes.to_string()),
        (keys::PHYSICAL_SECTOR_SIZE, geometry.physical_sector_bytes.to_string()),
    ]
}

/// Writes nodes in one transaction, unless the area has vanished: writing would bring it back.
pub fn write<S: Store>(store: &S, area: &str, nodes: &[NodeValue]) -> io::Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    store.atomically(|span| {
        if !exists(span, &format!("{area}/{}", keys::STATE))? {
            return Ok(());
        }
        span.write_all(area, nodes)
    })
}

/// Writes nodes and moves `state` from `expected` to `new`, in one transaction. Where somebody else
/// has written the state meanwhile, nothing is written and what is there is returned: the
/// toolstack's Closing must not be overwritten.
pub fn switch_state<S: Store>(
    store: &S,
    area: &str,
    expected: XenbusState,
    new: XenbusState,
    nodes: &[NodeValue],
) -> io::Result<XenbusState> {
    let written = [nodes, &[(keys::STATE, new.number().to_string())]].concat();
    store.atomically(|span| {
        let found = if_there(span.read(&format!("{area}/{}", keys::STATE)))?;
        let Some(found) = found.map(|text| XenbusState::from_text(&text)) else {
            return Ok(XenbusState::Unknown);
        };
        if found != expected {
            return Ok(found);
        }
        span.write_all(area, &written)?;
        Ok(new)
    })
}

/// How a disk stands, as far as others than polldisk may have changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The backend's `state`.
    pub state: XenbusState,
    /// Whether the toolstack allows the disk to be used; a missing node means that it does not.
    pub online: bool,
    /// Whether the hotplug script has finished its work.
    pub hotplug_done: bool,
}

impl Standing {
    /// Reads the area; `None` where the whole of it is gone.
    pub fn read(store: &impl Nodes, area: &str) -> io::Result<Option<Standing>> {
        const NODES: [&str; 3] = [keys::STATE, keys::ONLINE, keys::HOTPLUG_STATUS];
        let mut ahead = ReadAhead::new(store, area, &NODES)?;
        let state = match ahead.take_if_there(keys::STATE)? {
            Some(text) => XenbusState::from_text(&text),
            None if exists(store, area)? => XenbusState::Unknown,
            None => return Ok(None),
        };
        let online = ahead.take_if_there(keys::ONLINE)?;
        let online = online.and_then(|text| parse_decimal::<u64>(&text));
        let hotplug = ahead.take_if_there(keys::HOTPLUG_STATUS)?;
        Ok(Some(Standing {
            state,
            online: online.is_some_and(|online| online != 0),
            hotplug_done: hotplug.as_deref() == Some("connected"),
        }))
    }
}

/// Whether a node is there.
pub fn exists(store: &impl Xs, path: &str) -> io::Result<bool> {
    Ok(if_there(store.read(path))?.is_some())
}

/// Removes a node and all below it; one that is not there is as good as removed.
pub fn remove(store: &impl Xs, path: &str) -> io::Result<()> {
    if_there(store.rm(path)).map(drop)
}

/// Why a disk failed, as its `error` node tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// A positive errno, which Linux's xenbus puts first.
    pub errno: i32,
    /// The cause and the mend.
    pub text: String,
}

impl Failure {
    /// The failure of `error` and everything that caused it.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Failure {
        let mut errno = libc::EINVAL;
        let mut text = String::new();
        let mut next = Some(error);
        while let Some(cause) = next {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause.to_string());
            if let Some(system) = cause.downcast_ref::<io::Error>() {
                errno = system.raw_os_error().unwrap_or(errno);
            }
            next = cause.source();
        }
        Failure { errno, text }
    }
}

/// Writes the `error` node of a disk.
pub fn write_error(
    store: &impl Xs,
    own: DomId,
    key: &DiskKey,
    failure: &Failure,
) -> io::Result<()> {
    let Failure { errno, text } = failure;
    let mut line = format!("{errno} {text}");
    let end = line.floor_char_boundary(limits::ERROR_TEXT_MAX);
    line.truncate(end);
    store.write(&format!("{}/error", key.error_area(own)), &line)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_failure_tells_the_whole_chain_and_the_systems_errno() {
        let source = io::Error::from_raw_os_error(libc::ENOSPC);
        let failure = Failure::of(&AreaError::Store { node: "mode", source });
        assert_eq!(failure.errno, libc::ENOSPC);
        assert!(failure.text.starts_with("cannot read mode of the backend area: No space"));
        assert_eq!(Failure::of(&AreaError::Empty).errno, libc::EINVAL);
    }

    #[test]
    fn only_without_a_script_does_polldisk_write_the_hotplug_status() {
        use crate::blkif::features::Offer;
        use crate::units::Bytes;
        let geometry =
            Geometry { size: Bytes(1 << 30), sector_bytes: 4096, physical_sector_bytes: 4096 };
        let disk = DiskOffer { general: Offer::default(), geometry, discard: None };
        let written = |hotplug| {
            features(&disk, hotplug).iter().any(|(node, _)| *node == keys::HOTPLUG_STATUS)
        };
        assert!(written(Hotplug::None) && !written(Hotplug::Ours) && !written(Hotplug::Foreign));
        assert!(shape(0, &geometry).contains(&(keys::SECTORS, (1 << 21).to_string())));
    }
}
