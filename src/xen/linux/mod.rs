//! Real Xen: `/dev/xen/gntdev` and `/dev/xen/evtchn`, and xenstored.
//!
//! If something is missing, the errors made here tell the admin what failed and how to fix it.

pub mod evtchn;
pub mod gntalloc;
pub mod gntdev;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::store::StoreClient;
use super::{Platform, PlatformError};
use evtchn::Evtchn;
use gntalloc::Gntalloc;
use gntdev::Gntdev;

/// The hypervisor that this domain runs on.
#[derive(Clone, Debug)]
pub struct LinuxXen {
    /// `/`, or in tests a folder that looks like it.
    root: PathBuf,
}

impl LinuxXen {
    /// Finds Xen by opening its devices once, so that a daemon without one of them says so before it starts
    /// anything.
    pub fn detect() -> Result<LinuxXen, PlatformError> {
        LinuxXen::detect_under(Path::new("/"))
    }

    fn detect_under(root: &Path) -> Result<LinuxXen, PlatformError> {
        let xen = LinuxXen { root: root.to_owned() };
        xen.open_grants()?;
        xen.open_events()?;
        Ok(xen)
    }

    /// Opens the device by which a frontend in this domain grants pages. The daemon does not need it.
    pub fn open_gntalloc(&self) -> Result<Gntalloc, PlatformError> {
        self.open_device("gntalloc", "xen-gntalloc", 0).map(Gntalloc::new)
    }

    /// Whether the kernel says that it runs on Xen. Only errors need this: a device that opens is proof.
    fn is_xen(&self) -> bool {
        let kind = std::fs::read_to_string(self.root.join("sys/hypervisor/type"));
        kind.is_ok_and(|kind| kind.trim_end() == "xen")
            || self.root.join("proc/xen").exists()
            || self.root.join("dev/xen").exists()
    }

    /// Fails if the kernel's own backend would take the disks of `backend/<backend_type>`: if xen-blkback is
    /// loaded, it takes all of type `vbd`.
    pub fn check_backend_is_free(&self, backend_type: &str) -> Result<(), PlatformError> {
        let blkback = self.root.join("sys/bus/xen-backend/drivers/vbd");
        if backend_type != "vbd" || !blkback.exists() {
            return Ok(());
        }
        Err(PlatformError {
            what: "the kernel's xen-blkback already serves disks of type vbd".to_owned(),
            remedy: "unload it (modprobe -r xen-blkback) or choose another --backend-type"
                .to_owned(),
            source: io::ErrorKind::ResourceBusy.into(),
        })
    }

    /// Opens one of Xen's devices, which the kernel's `module` provides.
    fn open_device(&self, name: &str, module: &str, flags: i32) -> Result<File, PlatformError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(self.root.join("dev/xen").join(name))
            .map_err(|source| {
                if source.kind() == io::ErrorKind::NotFound && !self.is_xen() {
                    return no_xen(source);
                }
                let what = format!("cannot open /dev/xen/{name}");
                PlatformError { what, remedy: device_remedy(&source, module), source }
            })
    }
}

fn no_xen(source: io::Error) -> PlatformError {
    PlatformError {
        what: "this machine does not run on Xen".to_owned(),
        remedy: "run in dom0 or a driver domain, or try `polldisk demo`, which needs no Xen"
            .to_owned(),
        source,
    }
}

fn device_remedy(error: &io::Error, module: &str) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            format!("load its kernel module (modprobe {module})")
        }
        Some(libc::EACCES | libc::EPERM) => "run as root".to_owned(),
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n)".to_owned(),
        _ => format!("check the kernel log and the kernel module {module}"),
    }
}

impl Platform for LinuxXen {
    type Store = StoreClient;
    type Events = Evtchn;
    type Grants = Gntdev;

    fn open_store(&self) -> Result<StoreClient, PlatformError> {
        StoreClient::connect()
    }

    fn open_events(&self) -> Result<Evtchn, PlatformError> {
        self.open_device("evtchn", "xen-evtchn", libc::O_NONBLOCK).map(Evtchn::new)
    }

    fn open_grants(&self) -> Result<Gntdev, PlatformError> {
        self.open_device("gntdev", "xen-gntdev", 0).map(Gntdev::new)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn root_with(folders: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for folder in folders {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        root
    }

    fn text<T: std::fmt::Debug>(result: Result<T, PlatformError>) -> String {
        result.unwrap_err().to_string()
    }

    const NO_XEN: &str = "this machine does not run on Xen: run in dom0 or a driver domain, \
                          or try `polldisk demo`, which needs no Xen";
    const NO_MODULE: &str =
        "cannot open /dev/xen/gntdev: load its kernel module (modprobe xen-gntdev)";

    #[test]
    fn without_xen_the_error_points_to_the_demo() {
        let root = root_with(&[]);
        assert_eq!(text(LinuxXen::detect_under(root.path())), NO_XEN);
    }

    #[test]
    fn another_hypervisor_is_not_xen() {
        let root = root_with(&["sys/hypervisor"]);
        let kind = root.path().join("sys/hypervisor/type");
        std::fs::write(&kind, "kvm\n").unwrap();
        assert_eq!(text(LinuxXen::detect_under(root.path())), NO_XEN);
        std::fs::write(&kind, "xen\n").unwrap();
        assert_eq!(text(LinuxXen::detect_under(root.path())), NO_MODULE);
    }

    #[test]
    fn a_missing_device_names_its_module() {
        let root = root_with(&["dev/xen", "proc/xen"]);
        assert_eq!(text(LinuxXen::detect_under(root.path())), NO_MODULE);
        File::create(root.path().join("dev/xen/gntdev")).unwrap();
        assert_eq!(
            text(LinuxXen::detect_under(root.path())),
            "cannot open /dev/xen/evtchn: load its kernel module (modprobe xen-evtchn)"
        );
        File::create(root.path().join("dev/xen/evtchn")).unwrap();
        LinuxXen::detect_under(root.path()).unwrap();
    }

    #[test]
    fn a_frontend_without_gntalloc_is_told_the_module() {
        let root = root_with(&["dev/xen"]);
        let xen = LinuxXen { root: root.path().to_owned() };
        assert_eq!(
            text(xen.open_gntalloc()),
            "cannot open /dev/xen/gntalloc: load its kernel module (modprobe xen-gntalloc)"
        );
    }

    #[test]
    fn missing_rights_are_named() {
        for errno in [libc::EACCES, libc::EPERM] {
            assert_eq!(device_remedy(&io::Error::from_raw_os_error(errno), "m"), "run as root");
        }
    }

    #[test]
    fn the_kernels_own_backend_is_noticed_if_it_matters() {
        let root = root_with(&["sys/bus/xen-backend/drivers/vbd"]);
        let xen = LinuxXen { root: root.path().to_owned() };
        assert_eq!(
            text(xen.check_backend_is_free("vbd")),
            "the kernel's xen-blkback already serves disks of type vbd: \
             unload it (modprobe -r xen-blkback) or choose another --backend-type"
        );
        assert!(xen.check_backend_is_free("polldisk").is_ok());
        std::fs::remove_dir(root.path().join("sys/bus/xen-backend/drivers/vbd")).unwrap();
        assert!(xen.check_backend_is_free("vbd").is_ok());
    }
}
