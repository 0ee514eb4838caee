//! Files whose open hangs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// A write lease on a file, as a file server holds one: any other open of the file waits until this is
/// dropped. The kernel breaks the lease after /proc/sys/fs/lease-break-time, 45 s by default.
pub struct Lease(File);

impl Lease {
    /// Takes one on a file that nobody has open.
    pub fn on(path: &Path) -> Lease {
        let file = File::options().read(true).write(true).open(path).unwrap();
        set_lease(&file, libc::F_WRLCK);
        Lease(file)
    }

    /// Whether nobody else has begun to open the file.
    #[allow(dead_code, unsafe_code)]
    pub fn is_untouched(&self) -> bool {
        // SAFETY: no pointers.
        unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) == libc::F_WRLCK }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        set_lease(&self.0, libc::F_UNLCK);
    }
}

/// Takes the lease, or gives it up.
#[allow(unsafe_code)]
fn set_lease(file: &File, kind: libc::c_int) {
    // The kernel tells the holder by SIGIO, which would end the test.
    // SAFETY: no pointers.
    unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
        assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind), 0);
    }
}
