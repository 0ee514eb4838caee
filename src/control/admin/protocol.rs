//! The protocol of the admin socket: one JSON value per line, a request and then its reply.

use serde::{Deserialize, Serialize};

use crate::metrics::Counts;

/// What an admin asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "lowercase")]
pub enum Request {
    /// Give a running guest a disk.
    Attach(Attach),
    /// Take a disk away from its guest.
    Detach(Detach),
    /// Put another medium into a drive.
    Insert(Insert),
    /// Take the medium out of a drive.
    Eject(Eject),
    /// Report all disks.
    List,
}

/// A new disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The guest.
    pub domid: u32,
    /// The disk's name there, such as `xvdb`.
    pub vdev: String,
    /// What holds its contents, such as `raw:/path`; empty: a drive without a medium.
    #[serde(default)]
    pub target: String,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// It is a CD-ROM drive, which is read-only, and its medium can be changed.
    #[serde(default)]
    pub cdrom: bool,
    /// Its medium can be changed.
    #[serde(default)]
    pub removable: bool,
}

impl Attach {
    /// Whether its medium can be changed, and may be missing.
    pub fn is_drive(&self) -> bool {
        self.cdrom || self.removable
    }

    /// Whether the guest may not write.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.cdrom
    }
}

/// A medium for a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Insert {
    /// The guest.
    pub domid: u32,
    /// The drive's name there.
    pub vdev: String,
    /// The medium, such as `raw:/path`.
    pub target: String,
}

/// A drive to take the medium out of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eject {
    /// The guest.
    pub domid: u32,
    /// The drive's name there.
    pub vdev: String,
}

/// A disk to remove.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detach {
    /// The guest.
    pub domid: u32,
    /// The disk's name there.
    pub vdev: String,
    /// Do not wait for the guest to let go of it.
    #[serde(default)]
    pub force: bool,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase")]
pub enum Reply {
    /// The request is done.
    Done,
    /// All disks.
    Disks {
        /// Sorted by backend type, domain and number.
        disks: Vec<DiskReport>,
    },
    /// The request failed.
    Error {
        /// The cause and the remedy.
        message: String,
    },
}

/// The current state of one disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The guest.
    pub domid: u32,
    /// The disk's name there.
    pub vdev: String,
    /// Its number there.
    pub devid: u32,
    /// The backend type of its area, such as `vbd`.
    pub kind: String,
    /// The backend's state, such as `Connected`.
    pub state: String,
    /// Why it failed last; empty if it did not fail.
    pub failure: String,
    /// What the admin should know about its storage although it is served: sentences whose subject is "it".
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The target that holds its contents, as it was given.
    pub target: String,
    /// The kind of backing, `empty` for a drive without a medium; empty while none is open.
    pub backing: String,
    /// The guest may not write.
    pub read_only: bool,
    /// It is a drive: its medium can be changed.
    pub drive: bool,
    /// Its size in 512-byte sectors; 0 while nothing is open or in the drive.
    pub sectors: u64,
    /// Bytes of a logical block; 0 while nothing is open.
    pub sector_size: u32,
    /// How its guest's data pages are reached: `persistent` (they stay mapped), `map` (those of large
    /// requests are mapped until these are answered) or `copy`; empty while it is not connected.
    pub data_path: String,
    /// Rings in use.
    pub queues: usize,
    /// The worker of each ring.
    pub workers: Vec<usize>,
    /// The worker of its first ring.
    pub worker: Option<usize>,
    /// What was counted since it connected.
    #[serde(flatten)]
    pub counts: Counts,
    /// Request latencies since it connected: for each step of the histogram its highest value in
    /// nanoseconds, and how many requests it has.
    pub latency: Vec<(u64, u64)>,
    /// Milliseconds since it connected, or if it is not connected, since it was found.
    pub uptime_ms: u64,
}
