//! What the environment says, read when the first device is opened.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::OnceLock;

/// The stand-in's run folder; without it nothing is intercepted.
const FOLDER: &str = "POLLDISK_STAND_IN";

/// `1`: what is a system call on Xen costs one here, too.
const SYSTEM_CALLS: &str = "POLLDISK_STAND_IN_SYSTEM_CALLS";

/// How to play the devices.
#[derive(Debug)]
pub struct Settings {
    /// The stand-in's run folder.
    pub folder: PathBuf,
    /// The price of grant copy, notify and unmask.
    pub toll: Toll,
}

impl Settings {
    /// `None` where the environment names no stand-in.
    pub fn get() -> Option<&'static Settings> {
        static SETTINGS: OnceLock<Option<Settings>> = OnceLock::new();
        let read = || {
            let folder = PathBuf::from(std::env::var_os(FOLDER)?);
            let toll = match std::env::var_os(SYSTEM_CALLS).is_some_and(|value| value == "1") {
                true => Toll::SystemCall,
                false => Toll::None,
            };
            Some(Settings { folder, toll })
        };
        SETTINGS.get_or_init(read).as_ref()
    }
}

/// What an operation costs beside its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toll {
    /// Nothing.
    None,
    /// A system call that does next to nothing.
    SystemCall,
}

impl Toll {
    /// Pays it.
    #[inline]
    pub fn pay(self) {
        if self == Toll::SystemCall {
            // SAFETY: no arguments, no effect. Through `syscall`, so that it is one for certain.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    }
}
