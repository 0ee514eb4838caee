//! The backend area of a disk: how polldisk reads what the toolstack wrote there, and writes to it.

use std::error::Error;
use std::io;

use xenstore_rs::Xs;

use super::ahead::ReadAhead;
use super::key::DiskKey;
use crate::backing::{Backing, Discard, Geometry};
use crate::blkif::features::{self, DiskOffer};
use crate::limits;
use crate::text::{causes, excerpt, printable, with_causes};
use crate::xen::keys::{self, XenbusState};
use crate::xen::{Nodes, Store, if_there};

/// The toolstack's description of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// What holds its contents, as written except for libxl's `aio:`; empty: a drive without a medium.
    pub target: String,
    /// The guest may not write.
    pub read_only: bool,
    /// Others may write to its contents, too: the mode has a `!`, as xl's `w!` does.
    pub shareable: bool,
    /// It is a CD-ROM, which is always read-only.
    pub cdrom: bool,
    /// The toolstack allows its guest to discard.
    pub discard_enable: bool,
    /// Its medium can be taken out.
    pub removable: bool,
    /// The hotplug script that the toolstack runs after InitWait.
    pub script: Option<String>,
    /// polldisk made the areas.
    pub attached: bool,
}

/// The hotplug script of a disk. libxl runs it after InitWait; if it fails, libxl gives up at once and
/// prints `hotplug-error`. Without InitWait, libxl waits for 10 s and prints no reason. A script may find
/// that somebody else uses the disk's storage, so polldisk, like blkback, connects only once the script has
/// written `hotplug-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hotplug {
    /// No script: polldisk writes `hotplug-status` itself.
    None,
    /// `block-polldisk`, which passes on what polldisk writes to `hotplug-status` and `hotplug-error`. So
    /// even a disk that can't be opened goes to InitWait.
    Ours,
    /// Another script, such as `block`.
    Foreign,
}

/// Why an area does not describe a disk.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// A node is missing.
    #[error("{0} is missing from the backend area; the toolstack has to write it")]
    Missing(&'static str),
    /// A node holds an invalid value.
    #[error("{node} = \"{value}\" is invalid; it has to be {wanted}")]
    Invalid {
        /// Which node.
        node: &'static str,
        /// An excerpt of what it holds.
        value: String,
        /// What it should hold.
        wanted: &'static str,
    },
    /// The area's frontend is not the one in the area's path.
    #[error("{node} is \"{value}\" instead of \"{wanted}\"; it has to match the area's own path")]
    Stranger {
        /// Which node.
        node: &'static str,
        /// What it holds.
        value: String,
        /// The value that matches its path.
        wanted: String,
    },
    /// There is no medium, and the disk is not a drive that may be empty.
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
        let id = text(keys::FRONTEND_ID)?.ok_or(AreaError::Missing(keys::FRONTEND_ID))?;
        let is_own = keys::number(&id) == Some(u64::from(key.domid.raw()));
        check_owner(keys::FRONTEND_ID, is_own, &id, key.domid)?;
        let frontend = text(keys::FRONTEND)?.ok_or(AreaError::Missing(keys::FRONTEND))?;
        let is_own = keys::word(&frontend) == key.frontend_area();
        check_owner(keys::FRONTEND, is_own, &frontend, key.frontend_area())?;
        let cdrom = text(keys::DEVICE_TYPE)?.is_some_and(|kind| keys::word(&kind) == "cdrom");
        let removable = flag(keys::REMOVABLE, text(keys::REMOVABLE)?, false)?;
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
            discard_enable: flag(keys::DISCARD_ENABLE, text(keys::DISCARD_ENABLE)?, true)?,
            script: text(keys::SCRIPT)?.map(|script| keys::word(&script).to_owned()),
            attached: text(keys::ATTACHED)?.is_some(),
        })
    }

    /// Whether it is a drive: its medium may be changed, and may be missing.
    pub fn is_drive(&self) -> bool {
        self.cdrom || self.removable
    }

    /// What the guest may discard of `backing`.
    pub fn discard(&self, backing: &Backing) -> Option<Discard> {
        backing.discard().filter(|_| self.discard_enable && !self.read_only)
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

/// A yes-or-no node of the toolstack; `missing` if it is not there.
fn flag(node: &'static str, text: Option<Box<str>>, missing: bool) -> Result<bool, AreaError> {
    let Some(text) = text else { return Ok(missing) };
    keys::flag(&text).ok_or_else(|| {
        let value = excerpt(&text);
        AreaError::Invalid { node, value, wanted: "a number, 0 for no and 1 for yes" }
    })
}

fn check_owner(
    node: &'static str,
    is_own: bool,
    value: &str,
    wanted: impl ToString,
) -> Result<(), AreaError> {
    if is_own {
        return Ok(());
    }
    let value = printable(value).into_owned();
    Err(AreaError::Stranger { node, value, wanted: wanted.to_string() })
}

/// The target that `params` names. libxl writes raw contents as `aio:/path` unless it knows that they are a
/// block device, and always when it changes a CD-ROM's medium.
fn target_of(params: &str) -> &str {
    params.strip_prefix("aio:").unwrap_or(params)
}

/// The target that `params` names now; empty: no medium. `None` if the node is missing. Events of the watch
/// with `token` about earlier writes are dropped.
pub fn target(store: &impl Store, area: &str, token: &str) -> io::Result<Option<String>> {
    let node = format!("{area}/{}", keys::PARAMS);
    let params = if_there(store.read_up_to_date(&node, token))?;
    Ok(params.map(|params| target_of(&params).to_owned()))
}

/// A node of an area and the value to write to it.
pub type NodeValue = (&'static str, String);

/// The nodes that a frontend reads before it chooses its rings, and that the toolstack waits for.
pub fn features(disk: &DiskOffer, hotplug: Hotplug) -> Vec<NodeValue> {
    let mut nodes = features::nodes(disk);
    if hotplug == Hotplug::None {
        nodes.push((keys::HOTPLUG_STATUS, "connected".to_owned()));
    }
    nodes
}

/// The nodes that a frontend reads when the backend is Connected.
pub fn shape(info: u32, geometry: &Geometry) -> Vec<NodeValue> {
    vec![
        (keys::SECTORS, geometry.sectors().to_string()),
        (keys::INFO, info.to_string()),
        (keys::SECTOR_SIZE, geometry.sector_bytes.to_string()),
        (keys::PHYSICAL_SECTOR_SIZE, geometry.physical_sector_bytes.to_string()),
    ]
}

/// A backend area that a disk has taken on.
///
/// Between two requests to xenstore, a toolstack may remove an area and make another at the same path. So
/// the disk leaves a unique mark in the area ([`keys::SERVED_BY`]), and all its writes are in transactions
/// that check the mark. A write for one disk never ends up in the next.
#[derive(Clone, Debug)]
pub struct Area {
    path: String,
    mark: String,
}

/// The outcome of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Everything was written.
    Done,
    /// Nothing was written: somebody else has written the state meanwhile, which a watch event will show.
    Overtaken,
    /// Nothing was written: the area is removed, or belongs to another disk now.
    Gone,
}

impl Area {
    /// Takes on the area at `path` if `wanted` accepts how it stands; `mark` must be unique.
    pub fn take_on<S: Store>(
        store: &S,
        path: String,
        mark: String,
        wanted: impl Fn(&Standing) -> bool,
    ) -> io::Result<Option<(Area, Standing)>> {
        let standing = store.atomically(|span| {
            let Some((standing, _)) = Standing::read_marked(span, &path)? else { return Ok(None) };
            if !wanted(&standing) {
                return Ok(None);
            }
            span.write(&format!("{path}/{}", keys::SERVED_BY), &mark)?;
            Ok(Some(standing))
        })?;
        Ok(standing.map(|standing| (Area { path, mark }, standing)))
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How it stands; `None` if it is gone.
    pub fn standing(&self, store: &impl Nodes) -> io::Result<Option<Standing>> {
        let found = Standing::read_marked(store, &self.path)?;
        Ok(found.filter(|(_, mark)| self.is_marked(mark)).map(|(standing, _)| standing))
    }

    fn is_marked(&self, mark: &Option<Box<str>>) -> bool {
        mark.as_deref() == Some(&self.mark)
    }

    /// Runs `body` in a transaction if the area is still this one.
    pub fn change<S: Store>(
        &self,
        store: &S,
        body: impl Fn(&S::Span) -> io::Result<()>,
    ) -> io::Result<Written> {
        store.atomically(|span| {
            let mark = if_there(span.read(&format!("{}/{}", self.path, keys::SERVED_BY)))?;
            if !self.is_marked(&mark) {
                return Ok(Written::Gone);
            }
            body(span)?;
            Ok(Written::Done)
        })
    }

    /// Writes nodes, all or none.
    pub fn write<S: Store>(&self, store: &S, nodes: &[NodeValue]) -> io::Result<Written> {
        match nodes {
            [] => Ok(Written::Done),
            nodes => self.change(store, |span| span.write_all(&self.path, nodes)),
        }
    }

    /// Writes nodes, moves `state` from `expected` to `new` and removes `stale`, all or nothing: the
    /// toolstack's Closing must not be overwritten.
    pub fn switch_state<S: Store>(
        &self,
        store: &S,
        [expected, new]: [XenbusState; 2],
        nodes: &[NodeValue],
        stale: Option<&str>,
    ) -> io::Result<Written> {
        let written = [nodes, &[(keys::STATE, new.number().to_string())]].concat();
        store.atomically(|span| {
            let mut found = ReadAhead::new(span, &self.path, &[keys::STATE, keys::SERVED_BY])?;
            let state = found.take_if_there(keys::STATE)?;
            let mark = found.take_if_there(keys::SERVED_BY)?;
            if !self.is_marked(&mark) {
                return Ok(Written::Gone);
            }
            if state_of(state.as_deref()) != expected {
                return Ok(Written::Overtaken);
            }
            stale.map_or(Ok(()), |stale| remove(span, stale))?;
            span.write_all(&self.path, &written)?;
            Ok(Written::Done)
        })
    }

    /// Asks for the disk to be closed and destroyed, as libxl does; with `force`, without waiting for its
    /// guest, by removing the area `frontend`.
    pub fn ask_to_close<S: Store>(
        &self,
        store: &S,
        force: bool,
        frontend: &str,
    ) -> io::Result<Written> {
        self.change(store, |span| {
            if force {
                remove(span, frontend)?;
            }
            let state = if_there(span.read(&format!("{}/{}", self.path, keys::STATE)))?;
            let mut nodes = vec![(keys::ONLINE, "0".to_owned())];
            if state_of(state.as_deref()) != XenbusState::Closed {
                nodes.push((keys::STATE, XenbusState::Closing.number().to_string()));
            }
            span.write_all(&self.path, &nodes)
        })
    }
}

fn state_of(text: Option<&str>) -> XenbusState {
    text.map_or(XenbusState::Unknown, XenbusState::from_text)
}

/// How a disk stands: what others may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The backend's `state`; `Unknown` if the area lacks it.
    pub state: XenbusState,
    /// Whether the toolstack allows the disk to be used; a missing node means that it does not.
    pub online: bool,
    /// Whether the hotplug script has finished its work.
    pub hotplug_done: bool,
}

impl Standing {
    /// Reads an area and the mark in it; `None` if the whole area is gone.
    ///
    /// The error is `InvalidData` if `online` says neither yes nor no.
    ///
    /// The mark is read last. Once an area is removed, its mark never comes back, so if the mark is right,
    /// everything else was read from the same area.
    fn read_marked(
        store: &impl Nodes,
        area: &str,
    ) -> io::Result<Option<(Standing, Option<Box<str>>)>> {
        const NODES: [&str; 4] = [keys::STATE, keys::ONLINE, keys::HOTPLUG_STATUS, keys::SERVED_BY];
        let mut ahead = ReadAhead::new(store, area, &NODES)?;
        let state = ahead.take_if_there(keys::STATE)?;
        let online = ahead.take_if_there(keys::ONLINE)?;
        let hotplug = ahead.take_if_there(keys::HOTPLUG_STATUS)?;
        let mark = ahead.take_if_there(keys::SERVED_BY)?;
        if state.is_none() && mark.is_none() && !exists(store, area)? {
            return Ok(None);
        }
        let online = flag(keys::ONLINE, online, false)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let standing = Standing {
            state: state_of(state.as_deref()),
            online,
            hotplug_done: hotplug.is_some_and(|status| keys::word(&status) == "connected"),
        };
        Ok(Some((standing, mark)))
    }
}

/// Whether a node is there.
pub fn exists(store: &impl Xs, path: &str) -> io::Result<bool> {
    Ok(if_there(store.read(path))?.is_some())
}

/// Removes a node and all below it; succeeds if it is not there.
pub fn remove(store: &impl Xs, path: &str) -> io::Result<()> {
    if_there(store.rm(path)).map(drop)
}

/// Why a disk failed, for its `error` node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// A positive errno, which Linux's xenbus puts first.
    pub errno: i32,
    /// The cause and the remedy, on one line.
    pub text: String,
}

impl Failure {
    /// The failure for `error` and all of its causes.
    pub fn of(error: &(dyn Error + 'static)) -> Failure {
        let system =
            |cause: &(dyn Error + 'static)| cause.downcast_ref::<io::Error>()?.raw_os_error();
        let errnos = causes(error).filter_map(system);
        Failure { errno: errnos.last().unwrap_or(libc::EINVAL), text: with_causes(error) }
    }
}

/// The text of an `error` node, cut to what fits.
pub fn error_line(failure: &Failure) -> String {
    let Failure { errno, text } = failure;
    let mut line = format!("{errno} {text}");
    let end = line.floor_char_boundary(limits::ERROR_TEXT_MAX);
    line.truncate(end);
    line
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

    #[test]
    fn an_error_line_is_no_longer_than_fits_and_ends_with_a_whole_character() {
        for text in ["u".repeat(2 * limits::ERROR_TEXT_MAX), "ü".repeat(limits::ERROR_TEXT_MAX)] {
            let line = error_line(&Failure { errno: 22, text: text.clone() });
            assert!(
                line.len() == limits::ERROR_TEXT_MAX || line.len() == limits::ERROR_TEXT_MAX - 1
            );
            assert!(text.starts_with(line.strip_prefix("22 ").unwrap()));
        }
    }

    #[test]
    fn what_is_meant_for_an_area_lands_in_no_other_and_on_no_other_state() {
        use crate::sim::store::{Quota, StoreServer};
        use crate::xen::store::StoreClient;
        use XenbusState::{Closing, InitWait, Initialising};
        let folder = tempfile::tempdir().unwrap();
        let server = StoreServer::start(&folder.path().join("store"), Quota::default()).unwrap();
        let store = StoreClient::connect_unix(server.socket()).unwrap();
        let take_on = |mark: &str| {
            let taken = Area::take_on(&store, "/area".to_owned(), mark.to_owned(), |_| true);
            taken.unwrap().unwrap().0
        };
        let read = |node| store.read(&format!("/area/{node}")).ok().map(String::from);
        let nodes = [("node", "1".to_owned())];
        let switch = |area: &Area, states| area.switch_state(&store, states, &nodes, None).unwrap();
        store.write("/area/state", "1").unwrap();
        let area = take_on("first");

        store.write("/area/state", "5").unwrap();
        assert_eq!(switch(&area, [Initialising, InitWait]), Written::Overtaken);
        assert_eq!((read("state").as_deref(), read("node")), (Some("5"), None));

        let next = take_on("second");
        assert_eq!(switch(&area, [Closing, InitWait]), Written::Gone);
        assert_eq!(area.write(&store, &nodes).unwrap(), Written::Gone);
        assert_eq!(area.standing(&store).unwrap(), None);
        assert_eq!((read("state").as_deref(), read("node")), (Some("5"), None));
        assert_eq!(switch(&next, [Closing, InitWait]), Written::Done);
        assert_eq!((read("state").as_deref(), read("node").as_deref()), (Some("2"), Some("1")));
    }
}
