//! A guest of the demo: a thread that connects, does verified I/O and closes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::JoinHandle;

use anyhow::{Context, anyhow, bail};
use crossbeam::channel::{Receiver, Sender, bounded};
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::load::{Load, Report, Runner};
use polldisk::sim::blkfront::xenbus::Xenbus;
use polldisk::sim::{Domain, StandIn};
use polldisk::units::{Bytes, DomId, VbdId};

/// The disk of every guest.
pub const VDEV: &str = "xvda";
const VBD: VbdId = VbdId(51712);

/// Memory of a guest in pages: buffers for a full ring, and the ring.
const GUEST_PAGES: u32 = 512;

/// A running guest.
pub struct Guest {
    thread: JoinHandle<anyhow::Result<Report>>,
    connected: Receiver<()>,
    go: Sender<()>,
    stop: Arc<AtomicBool>,
}

impl Guest {
    /// Makes a domain and its thread, which waits for its disk to appear.
    pub fn start(
        stand_in: &StandIn,
        domid: DomId,
        load: Load,
        requests: &Arc<AtomicU64>,
    ) -> anyhow::Result<Guest> {
        let domain = Arc::new(stand_in.create_domain(domid, GUEST_PAGES)?);
        let (is_connected, connected) = bounded(1);
        let (go, may_go) = bounded(1);
        let stop = Arc::new(AtomicBool::new(false));
        let body = Body {
            domain,
            load,
            is_connected,
            may_go,
            stop: Arc::clone(&stop),
            requests: Arc::clone(requests),
        };
        let thread = std::thread::Builder::new()
            .name(format!("guest-{domid}"))
            .spawn(move || body.run().with_context(|| format!("guest {domid}")))?;
        Ok(Guest { thread, connected, go, stop })
    }

    /// Returns once its disk is connected; the thread's own error is told by [`Guest::finish`].
    pub fn wait_until_connected(&self) -> anyhow::Result<()> {
        let _ = self.connected.recv();
        Ok(())
    }

    /// Lets it begin.
    pub fn go(&self) {
        let _ = self.go.send(());
    }

    /// Whether its thread is still there.
    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends its random I/O; it then reads everything back and closes.
    pub fn stop(&self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Waits for its end; what it saw.
    pub fn finish(self) -> anyhow::Result<Report> {
        self.stop();
        drop(self.go);
        self.thread.join().map_err(|_| anyhow!("a guest's thread panicked"))?
    }
}

struct Body {
    domain: Arc<Domain>,
    load: Load,
    is_connected: Sender<()>,
    may_go: Receiver<()>,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
}

impl Body {
    fn run(self) -> anyhow::Result<Report> {
        let xenbus = Xenbus::open(&self.domain, VBD)?;
        let (mut device, disk) = xenbus.connect(&self.domain, Options::default())?;
        if self.load.sectors.end > disk.sectors.0 {
            bail!(
                "the target holds only {} sectors of 512 bytes; give a smaller --size",
                disk.sectors
            );
        }
        if !self.load.block_bytes.is_multiple_of(disk.sector_bytes as usize) {
            bail!(
                "the disk's sectors have {} bytes; give a multiple as --block-size",
                disk.sector_bytes
            );
        }
        let _ = self.is_connected.send(());
        let _ = self.may_go.recv();
        let mut runner = Runner::new(self.load, &mut device);
        runner.run(&self.stop, &self.requests)?;
        runner.read_all()?;
        let report = runner.report();
        xenbus.close(device)?;
        match self.domain.mapped_grants() {
            0 => Ok(report),
            left => bail!("{left} pages are still mapped after closing"),
        }
    }
}

/// The image of a guest in the demo's folder.
pub fn file(folder: &Path, index: u32) -> PathBuf {
    folder.join(format!("guest-{}.img", index + 1))
}

/// Makes an image for each guest where O_DIRECT works: with the temporary files, else here.
pub fn make_files(guests: u32, size: Bytes) -> anyhow::Result<tempfile::TempDir> {
    let mut refusal = None;
    for place in [std::env::temp_dir(), std::env::current_dir()?] {
        match make_files_in(&place, guests, size) {
            Ok(folder) => return Ok(folder),
            Err(error) => {
                refusal = Some(
                    anyhow::Error::new(error)
                        .context(format!("cannot make images in {}", place.display())),
                );
            }
        }
    }
    Err(refusal
        .unwrap_or_else(|| anyhow!("no place for images"))
        .context("run it in a folder on ext4, xfs or btrfs with room, or give --target"))
}

fn make_files_in(place: &Path, guests: u32, size: Bytes) -> io::Result<tempfile::TempDir> {
    let folder = tempfile::Builder::new().prefix("polldisk-demo").tempdir_in(place)?;
    for index in 0..guests {
        let path = file(folder.path(), index);
        File::create(&path)?.set_len(size.0)?;
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
    }
    Ok(folder)
}
