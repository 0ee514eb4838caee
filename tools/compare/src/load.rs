//! What the frontends ask of a backend.

use serde::{Deserialize, Serialize};

/// The load of the disks.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Load {
    /// Reads among 100 requests: 100 or 0, since fio runs the same load.
    pub read: u32,
    /// Sequential instead of random blocks.
    pub sequential: bool,
    /// KiB of each request.
    pub block_kib: u32,
    /// Requests in flight on each disk.
    pub depth: u32,
    /// How the load waits for responses.
    pub wait: Wait,
    /// Number of disks. Each belongs to another guest, up to 100 guests.
    pub disks: u32,
    /// No requests at all.
    pub idle: bool,
}

/// How a load waits for responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// It polls, and never asks to be notified.
    Busy,
    /// It sleeps until it is notified, as a guest does.
    Block,
}

/// A load's requests cut into smaller ones, with the same number of bytes in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// KiB of each request.
    pub block_kib: u32,
    /// Requests in flight on each disk.
    pub depth: u32,
}

impl Default for Load {
    fn default() -> Load {
        Load {
            read: 100,
            sequential: false,
            block_kib: 4,
            depth: 32,
            wait: Wait::Busy,
            disks: 1,
            idle: false,
        }
    }
}

impl Load {
    /// How many cores its threads keep busy.
    pub fn cores(&self) -> u32 {
        if self.idle { 1 } else { self.disks }
    }

    /// The load with its requests split, for a backend without indirect requests.
    pub fn split(&self, split: Option<Split>) -> Load {
        match split {
            None => self.clone(),
            Some(Split { block_kib, depth }) => Load { block_kib, depth, ..self.clone() },
        }
    }
}
