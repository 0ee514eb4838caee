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
use polldisk::sim::blkfront::device::Device;
use polldisk::sim::blkfront::load::{Load, Report, Runner};
use polldisk::sim::blkfront::xenbus::{Disk, Wanted, Xenbus};
use polldisk::sim::{Domain, StandIn};
use polldisk::units::{Bytes, DomId, VbdId};

/// The disk of every guest.
pub const VDEV: &str = "xvda";
const VBD: VbdId = VbdId(51712);

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
        wanted: Wanted,
        loads: Vec<Load>,
        requests: &Arc<AtomicU64>,
    ) -> anyhow::Result<Guest> {
        let domain = Arc::new(stand_in.create_domain(domid, u32::try_from(wanted.pages())?)?);
        let (is_connected, connected) = bounded(1);
        let (go, may_go) = bounded(1);
        let stop = Arc::new(AtomicBool::new(false));
        let body = Body {
            domain,
            wanted,
            loads,
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

    /// Returns once its disk is connected or its thread has failed, whose error [`Guest::finish`] returns.
    pub fn wait_until_connected(&self) -> anyhow::Result<()> {
        let _ = self.connected.recv();
        Ok(())
    }

    /// Lets it begin.
    pub fn go(&self) {
        let _ = self.go.send(());
    }

    /// Whether its thread is still running.
    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends its random I/O; it then reads everything back and closes.
    pub fn stop(&self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Ends it and returns its report.
    pub fn finish(self) -> anyhow::Result<Report> {
        self.stop();
        drop(self.go);
        self.thread.join().map_err(|_| anyhow!("a guest's thread panicked"))?
    }
}

struct Body {
    domain: Arc<Domain>,
    wanted: Wanted,
    /// By ring.
    loads: Vec<Load>,
    is_connected: Sender<()>,
    may_go: Receiver<()>,
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
}

impl Body {
    fn run(self) -> anyhow::Result<Report> {
        let xenbus = Xenbus::open(&self.domain, VBD)?;
        let (mut devices, disk) = xenbus.connect_all(&self.domain, self.wanted)?;
        self.check(&disk)?;
        let _ = self.is_connected.send(());
        let _ = self.may_go.recv();
        let report = self.run_load(&mut devices)?;
        xenbus.close_all(devices)?;
        match self.domain.mapped_grants() {
            0 => Ok(report),
            left => bail!("{left} pages are still mapped after closing"),
        }
    }

    fn check(&self, disk: &Disk) -> anyhow::Result<()> {
        let end = self.loads.last().map_or(0, |load| load.sectors.end);
        let block_bytes = self.loads.first().map_or(0, |load| load.block_bytes);
        if end > disk.sectors.0 {
            bail!(
                "the target holds only {} sectors of 512 bytes; give a smaller --size",
                disk.sectors
            );
        }
        if !block_bytes.is_multiple_of(disk.sector_bytes as usize) {
            bail!(
                "the disk's sectors have {} bytes; give a multiple of that as --block-size",
                disk.sector_bytes
            );
        }
        Ok(())
    }

    /// Each ring has its own thread, as each vCPU of a guest has its own ring.
    fn run_load(&self, devices: &mut [Device]) -> anyhow::Result<Report> {
        std::thread::scope(|scope| {
            let queues = devices.iter_mut().zip(&self.loads);
            let threads: Vec<_> = queues
                .map(|(device, load)| scope.spawn(move || self.run_queue(device, load.clone())))
                .collect();
            let mut sum = Report::default();
            for thread in threads {
                sum += thread.join().map_err(|_| anyhow!("a guest's thread panicked"))??;
            }
            Ok(sum)
        })
    }

    fn run_queue(&self, device: &mut Device, load: Load) -> anyhow::Result<Report> {
        let mut runner = Runner::new(load, device);
        runner.run(&self.stop, &self.requests)?;
        runner.read_all()?;
        Ok(runner.report())
    }
}

/// The image of a guest in the demo's folder.
pub fn file(folder: &Path, index: u32) -> PathBuf {
    folder.join(format!("guest-{}.img", index + 1))
}

/// Makes an image for each guest in a place where O_DIRECT works: the folder for temporary files, else the
/// current one.
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
        .unwrap_or_else(|| anyhow!("there is no place for images"))
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
