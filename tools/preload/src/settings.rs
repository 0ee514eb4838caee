//! Settings from the environment, read when the first device is opened.
#![allow(unsafe_code)]

use std::path::PathBuf;
use std::sync::OnceLock;

/// The variable with the stand-in's run folder. If it is not set, nothing is intercepted.
const FOLDER: &str = "POLLDISK_STAND_IN";

/// The variable that is `1` if operations that are a system call on Xen should cost one, too.
const SYSTEM_CALLS: &str = "POLLDISK_STAND_IN_SYSTEM_CALLS";

/// How the devices behave.
#[derive(Debug)]
pub struct Settings {
    /// The stand-in's run folder.
    pub folder: PathBuf,
    /// What grant copy, notify and unmask cost.
    pub toll: Toll,
}

impl Settings {
    /// The settings; `None` if the environment names no stand-in.
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

/// What an operation costs in addition to its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toll {
    /// Nothing.
    None,
    /// A system call that does almost nothing.
    SystemCall,
}

impl Toll {
    /// Pays it.
    #[inline]
    pub fn pay(self) {
        if self == Toll::SystemCall {
            // SAFETY: no arguments, no effect. `syscall` makes sure that it is a system call.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    }
}
