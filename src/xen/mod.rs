//! The boundary to the hypervisor, or to what stands in for it.
//!
//! Everything that polldisk asks of Xen goes through four traits: [`Platform`] opens the other
//! three, [`Store`] is xenstore (control thread), [`Events`] the event channels and [`Grants`] the
//! grant table (each worker opens its own). [`linux`] implements them on a real dom0, `sim` on the
//! embedded stand-in. They are static type parameters: nothing on the data path is `dyn`.

pub mod abi;
pub mod keys;
pub mod linux;
pub mod shm;
pub mod store;
pub mod vdev;

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use xenstore_rs::{Xs, XsTransaction, XsTransactionSpan};

use crate::units::{DomId, GrantRef, Port};
use shm::GuestPages;

/// A hypervisor, seen from the backend's domain.
pub trait Platform: Clone + Send + Sync + 'static {
    /// Its xenstore connection.
    type Store: Store;
    /// Its event channels.
    type Events: Events;
    /// Its grant table.
    type Grants: Grants;

    /// Connects to xenstore.
    fn open_store(&self) -> Result<Self::Store, PlatformError>;
    /// Opens a set of event channels of its own for the calling thread.
    fn open_events(&self) -> Result<Self::Events, PlatformError>;
    /// Opens a set of grant mappings of its own for the calling thread.
    fn open_grants(&self) -> Result<Self::Grants, PlatformError>;
}

/// Why a part of the platform is missing, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {remedy}")]
pub struct PlatformError {
    /// What failed, named: "cannot open /dev/xen/gntdev".
    pub what: String,
    /// What the admin can do.
    pub remedy: String,
    /// The system's own error.
    #[source]
    pub source: io::Error,
}

/// Operations on nodes beyond [`Xs`], the same inside and outside a transaction.
///
/// Errors carry xenstored's errno (`raw_os_error`), so a missing node is `ErrorKind::NotFound`.
pub trait Nodes: Xs {
    /// Writes nodes below `area`, in order, without waiting for each answer. If some are refused, the first
    /// refusal is the error, and the others are still written.
    fn write_all(&self, area: &str, nodes: &[(&str, String)]) -> io::Result<()>;
    /// Reads nodes below `area`, in order, without waiting for each answer. An outer error means that nothing
    /// is known about any of them.
    fn read_all(&self, area: &str, nodes: &[&str]) -> io::Result<Vec<io::Result<Box<str>>>>;
    /// Creates an empty node; one that exists stays as it is.
    fn mkdir(&self, path: &str) -> io::Result<()>;
    /// A node's permissions; the first entry names its owner.
    fn permissions(&self, path: &str) -> io::Result<Vec<Permission>>;
    /// Replaces a node's permissions; the first entry names the owner and what others may do.
    fn set_permissions(&self, path: &str, permissions: &[Permission]) -> io::Result<()>;
}

/// What was read from a node; `None`: the node is missing.
pub fn if_there<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// A xenstore connection whose watch events arrive through a pollable descriptor.
///
/// A request waits for its answer (xenstored is local and quick). Events that arrive meanwhile are kept for
/// [`Store::next_event`], and the descriptor is readable while any is kept.
pub trait Store: Nodes + XsTransaction<Span: Nodes + XsTransactionSpan> + AsFd {
    /// Asks for an event whenever `path` or a node below it changes; the first one comes at once.
    fn watch(&self, path: &str, token: &str) -> io::Result<()>;
    /// Ends a watch made with the same path and token.
    fn unwatch(&self, path: &str, token: &str) -> io::Result<()>;
    /// The next event that has already arrived; never blocks. After the descriptor was readable, call
    /// until `None`. An error means that the connection is lost.
    fn next_event(&self) -> io::Result<Option<WatchEvent>>;

    /// Reads a node, and drops those events of the watch with `token` that report earlier writes to this very
    /// node.
    fn read_up_to_date(&self, path: &str, token: &str) -> io::Result<Box<str>>;

    /// Whether xenstored knows the domain: it was created and is not yet destroyed.
    fn is_domain_introduced(&self, domid: DomId) -> io::Result<bool>;

    /// Runs `body` as one transaction, and again if another writer interfered (EAGAIN), at most
    /// `limits::STORE_TRANSACTION_TRIES` times. An error from `body` aborts the transaction.
    fn atomically<T>(&self, body: impl Fn(&Self::Span) -> io::Result<T>) -> io::Result<T> {
        for _ in 0..crate::limits::STORE_TRANSACTION_TRIES {
            let span = self.transaction()?;
            let value = body(&span)?;
            match span.commit() {
                Ok(()) => return Ok(value),
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => continue,
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }
}

/// A change at or below a watched path. An event for the watched path itself means that anything below it may
/// have changed: a watch's first event is one, and so is one that replaces many (see [`store::events`]).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WatchEvent {
    /// The node that changed; relative if the watched path was.
    pub path: String,
    /// The token given with the watch.
    pub token: String,
}

/// One entry of a node's permissions: `r5`, `w5`, `b5` or `n5` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// The domain that it applies to.
    pub domid: DomId,
    /// What it may do.
    pub access: NodeAccess,
}

/// What a domain may do with a xenstore node (`enum xs_perm_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeAccess {
    /// Nothing.
    None,
    /// Read.
    Read,
    /// Write.
    Write,
    /// Both.
    Both,
}

/// Event channels of one thread. The descriptor is readable while a bound port is pending and
/// unmasked. A port that became pending stays masked until [`Events::unmask`].
pub trait Events: AsFd {
    /// Binds to a port that `remote` allocated for us; returns our port, which starts pending, as on Xen.
    fn bind_interdomain(&mut self, remote: DomId, port: Port) -> io::Result<Port>;
    /// Closes a port of ours.
    fn unbind(&mut self, port: Port) -> io::Result<()>;
    /// Signals the other end: one system call.
    fn notify(&self, port: Port) -> io::Result<()>;
    /// Fills `ports` with ports that are pending and returns how many; never blocks.
    fn pending(&mut self, ports: &mut [Port]) -> io::Result<usize>;
    /// Lets these ports become pending again (the end-of-interrupt of XSA-332).
    fn unmask(&mut self, ports: &[Port]) -> io::Result<()>;
}

/// Grant mappings and copies of one thread. Closing it unmaps everything.
pub trait Grants {
    /// Maps pages of `domid` as one contiguous range, in the order given. All or nothing: one bad reference
    /// fails the whole batch and nothing stays mapped. To find the bad one, the caller maps them one by one
    /// (XSA-361, XSA-365).
    fn map(
        &mut self,
        domid: DomId,
        refs: &[GrantRef],
        access: PageAccess,
    ) -> io::Result<GuestPages>;

    /// Unmaps a whole range. No address in it may be used any more.
    fn unmap(&mut self, pages: GuestPages) -> io::Result<()>;

    /// Copies between local memory and granted pages, many segments by one system call. `Err` means that none
    /// was copied; otherwise each segment's `status` says whether it was (XSA-365).
    fn copy(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()>;
}

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageAccess {
    /// Read only, `GNTMAP_readonly`.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// One segment of a grant copy; it must not cross a page on the granted side.
#[derive(Clone, Copy)]
pub struct GrantCopy {
    /// The page in the other domain.
    pub gref: GrantRef,
    /// First byte in that page.
    pub offset: u16,
    /// Bytes to copy, 1 to 4096 - offset.
    pub len: u16,
    /// Our memory, which must be valid for `len` bytes until the copy returns.
    pub local: *mut u8,
    /// Which way to copy.
    pub direction: CopyDirection,
    /// `GNTST_okay` (0) or a negative `GNTST_*`, set by the copy.
    pub status: i16,
}

impl fmt::Debug for GrantCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "GrantCopy({:?} gref {} +{} len {}: {})",
            self.direction, self.gref, self.offset, self.len, self.status
        )
    }
}

/// Which way a grant copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// Out of the granted page into local memory (a guest's write).
    FromGuest,
    /// From local memory into the granted page (a guest's read).
    ToGuest,
}
