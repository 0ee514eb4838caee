//! `polldisk demo`: verified I/O through the whole data path, on the embedded stand-in for Xen.
//!
//! The daemon's own control thread and workers serve guests that are threads of this process. Both sides
//! use the same xenstore protocol, rings, grants and event channels as under Xen, and the image is a real
//! file behind O_DIRECT and io_uring.

mod frontend;
mod guest;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use polldisk::backing::{Contents, Spec};
use polldisk::config::{Config, ServeOptions};
use polldisk::control;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{Attach, DiskReport, Request};
use polldisk::control::{ControlError, Ended};
use polldisk::msg::report_channel;
use polldisk::output;
use polldisk::park::Doorbell;
use polldisk::sim::blkfront::load::{Load, Report};
use polldisk::sim::blkfront::xenbus::Wanted;
use polldisk::sim::{SimXen, StandIn};
use polldisk::units::{Bytes, DomId, SECTOR_BYTES};
use polldisk::worker::{WorkerThread, spawn_all};

use super::list::list;
use super::log;
use super::rates::{DiskRates, duration, rates, table, workers};
use super::serve::available_cores;
use frontend::Frontend;
use guest::{Guest, VDEV};

/// Show polldisk at work with guests that do verified I/O on a stand-in for Xen; needs no root
#[derive(Args, Debug)]
pub struct Demo {
    /// Guests, each with one disk
    #[arg(long, value_name = "N", default_value_t = 2)]
    guests: u32,
    /// Seconds that the guests do I/O
    #[arg(long, value_name = "N", default_value_t = 5.0, allow_negative_numbers = true)]
    seconds: f64,
    /// Worker threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    workers: usize,
    /// Cores to pin the workers to, such as 0 or 0-1
    #[arg(long, value_name = "LIST")]
    cores: Option<String>,
    /// Longest time in microseconds that a worker polls without work
    #[arg(long, value_name = "N")]
    poll_us: Option<u64>,
    /// Use this image, shared by the guests, instead of a temporary file for each: raw:/path, or
    /// null:SIZE
    #[arg(long, value_name = "SPEC")]
    target: Option<String>,
    /// Allow the target's contents to be overwritten
    #[arg(long)]
    overwrite: bool,
    /// Size of each guest's disk, or of its part of the target
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    size: Bytes,
    /// Requests that each guest keeps in flight on each of its rings, at most 32 in a one-page ring
    #[arg(long, value_name = "N", default_value_t = 32)]
    depth: usize,
    /// Bytes of each request: a multiple of 512, at most 44K without --indirect
    #[arg(long, value_name = "SIZE", default_value = "4K")]
    block_size: Bytes,
    /// Reads among 100 requests; the others are writes and some flushes
    #[arg(long, value_name = "N", default_value_t = 70)]
    read_percent: u64,
    #[command(flatten)]
    frontend: Frontend,
    /// What to log
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: String,
}

/// One request in this number is a flush.
const FLUSH_EVERY: u64 = 1000;

impl Demo {
    /// Runs it; a mismatch is an error, too.
    pub fn run(self) -> anyhow::Result<()> {
        log::start(&self.log)?;
        let plan = self.plan()?;
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        let stand_in = StandIn::start_temporary().context("cannot start the stand-in for Xen")?;
        let daemon = Daemon::start(&stand_in, &plan.config)?;
        let result = self.run_guests(&stand_in, &daemon, &plan, &interrupted);
        let ended = daemon.end();
        let (report, disks) = result?;
        ended?;
        self.judge(report, &disks, &plan)
    }

    fn plan(&self) -> anyhow::Result<Plan> {
        if self.guests == 0 || self.guests > 1000 {
            bail!("--guests {}: give 1 to 1000", self.guests);
        }
        let duration = Duration::try_from_secs_f64(self.seconds)
            .map_err(|_| anyhow!("--seconds {}: give a number, 0 or more", self.seconds))?;
        let block_bytes = usize::try_from(self.block_size.0).unwrap_or(usize::MAX);
        let wanted = self.frontend.wanted(self.depth, block_bytes)?;
        let blocks = 2 * self.depth * wanted.queues;
        if self.size.0 / self.block_size.0 / wanted.queues as u64 <= 2 * self.depth as u64
            || self.size.0 > 1 << 40
        {
            bail!("--size {}: give room for more than {blocks} blocks, at most 1T", self.size);
        }
        if self.read_percent > 100 {
            bail!("--read-percent {}: give 0 to 100", self.read_percent);
        }
        let options = ServeOptions {
            workers: Some(self.workers),
            cores: self.cores.clone(),
            poll_us: self.poll_us,
            ..ServeOptions::default()
        };
        let config = self.frontend.offer(options).check(&available_cores())?;
        let target = self.target.as_deref().map(str::parse::<Spec>).transpose();
        let mut target = target.context("--target")?;
        // Each guest uses only its own part.
        if let Some(target) = target.as_mut().filter(|_| self.guests > 1) {
            target.options.shareable = true;
        }
        if matches!(&target, Some(Spec { contents: Contents::Raw(_), .. })) && !self.overwrite {
            bail!("--target: the demo overwrites it; add --overwrite if its contents may be lost");
        }
        let files = match target {
            None => Some(guest::make_files(self.guests, self.size)?),
            Some(_) => None,
        };
        Ok(Plan { config, wanted, target, files, duration, block_bytes })
    }

    /// Attaches a disk to each guest, runs their load, and measures it.
    fn run_guests(
        &self,
        stand_in: &StandIn,
        daemon: &Daemon,
        plan: &Plan,
        interrupted: &AtomicBool,
    ) -> anyhow::Result<(Report, Vec<DiskCost>)> {
        let requests = Arc::new(AtomicU64::new(0));
        let mut guests = Vec::new();
        for index in 0..self.guests {
            let domid = DomId::try_from(index + 1)?;
            let guest =
                Guest::start(stand_in, domid, plan.wanted, self.loads(index, plan), &requests)?;
            let attach = Attach {
                domid: domid.raw().into(),
                vdev: VDEV.to_owned(),
                target: self.target_of(index, plan),
                ..Attach::default()
            };
            request(&daemon.admin, &Request::Attach(attach))?;
            guests.push(guest);
        }
        for guest in &guests {
            guest.wait_until_connected()?;
        }
        let disks = self.observe(daemon, plan, &guests, &requests, interrupted)?;
        let mut report = Report::default();
        for guest in guests {
            report += guest.finish()?;
        }
        Ok((report, disks))
    }

    /// Watches the load for the planned time.
    fn observe(
        &self,
        daemon: &Daemon,
        plan: &Plan,
        guests: &[Guest],
        requests: &AtomicU64,
        interrupted: &AtomicBool,
    ) -> anyhow::Result<Vec<DiskCost>> {
        let before = list(&daemon.admin)?;
        let cpu_before = worker_cpu_ns(self.workers)?;
        guests.iter().for_each(Guest::go);
        let start = Instant::now();
        let bar = progress_bar(plan.duration);
        while start.elapsed() < plan.duration
            && !interrupted.load(Ordering::Relaxed)
            && guests.iter().all(Guest::is_running)
        {
            std::thread::sleep(Duration::from_millis(50).min(plan.duration));
            bar.set_position(u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX));
            bar.set_message(format!("{} requests", requests.load(Ordering::Relaxed)));
        }
        let elapsed = start.elapsed();
        let after = list(&daemon.admin)?;
        let cpu_after = worker_cpu_ns(self.workers)?;
        guests.iter().for_each(Guest::stop);
        bar.set_message("reading everything back");
        bar.finish_and_clear();
        let cpu_ns: Vec<u64> =
            cpu_after.iter().zip(&cpu_before).map(|(after, before)| after - before).collect();
        Ok(costs(&before, after, elapsed, &cpu_ns))
    }

    /// The load of each ring of a guest, each on its own part of the disk.
    fn loads(&self, index: u32, plan: &Plan) -> Vec<Load> {
        let sectors = self.size.to_sectors().0;
        let first = if plan.target.is_some() { u64::from(index) * sectors } else { 0 };
        let per_block = plan.block_bytes as u64 / SECTOR_BYTES;
        let share = sectors / plan.wanted.queues as u64 / per_block * per_block;
        let load = |queue: u64| Load {
            seed: 0x706f_6c6c_6469_736b ^ u64::from(index + 1) << 40 ^ queue << 32,
            block_bytes: plan.block_bytes,
            depth: self.depth,
            read_percent: self.read_percent,
            flush_every: FLUSH_EVERY,
            sectors: first + queue * share..first + (queue + 1) * share,
            keeps_data: plan.keeps_data(),
            zeroed: plan.target.is_none(),
        };
        (0..plan.wanted.queues as u64).map(load).collect()
    }

    fn target_of(&self, index: u32, plan: &Plan) -> String {
        match (&plan.target, &plan.files) {
            (_, Some(files)) => format!("raw:{}", guest::file(files.path(), index).display()),
            (target, None) => target.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    fn judge(&self, report: Report, disks: &[DiskCost], plan: &Plan) -> anyhow::Result<()> {
        let kept = match plan.keeps_data() {
            true => "",
            false => "null keeps no data: nothing was compared\n",
        };
        let printed = output::print(format_args!(
            "{}\n\n{kept}verified {} blocks, {} mismatches",
            cost_table(disks),
            report.verified,
            report.mismatches
        ));
        if report.mismatches > 0 {
            bail!("some data read was not what was written");
        }
        if report.errors > 0 {
            bail!("{} requests were answered with an error", report.errors);
        }
        Ok(printed?)
    }
}

/// The options, checked.
struct Plan {
    config: Config,
    wanted: Wanted,
    target: Option<Spec>,
    files: Option<tempfile::TempDir>,
    duration: Duration,
    block_bytes: usize,
}

impl Plan {
    fn keeps_data(&self) -> bool {
        let backing = self.target.as_ref().map(|target| &target.contents);
        !matches!(backing, Some(Contents::Null { .. }))
    }
}

/// The daemon, in threads of this process on the stand-in.
struct Daemon {
    admin: PathBuf,
    stop: Doorbell,
    control: JoinHandle<Result<Ended, ControlError>>,
    workers: Vec<WorkerThread>,
}

impl Daemon {
    fn start(stand_in: &StandIn, config: &Config) -> anyhow::Result<Daemon> {
        let platform: SimXen = stand_in.platform();
        let (reporter, reports) = report_channel()?;
        let (senders, workers) = spawn_all(&platform, &config.workers, config.poll, &reporter)?;
        let admin = stand_in.folder().join("admin.sock");
        let control_config = control::Config {
            admin_path: Some(admin.clone()),
            offer: config.offer,
            ..control::Config::default()
        };
        let stop = Doorbell::new()?;
        let control = {
            let stop = stop.clone();
            std::thread::Builder::new()
                .name("control".to_owned())
                .spawn(move || control::run(&platform, &control_config, senders, reports, &stop))?
        };
        let daemon = Daemon { admin, stop, control, workers };
        // The control thread binds its socket when it starts, or ends.
        while !daemon.admin.exists() {
            if daemon.control.is_finished() {
                daemon.end()?;
                bail!("the control thread ended at once");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(daemon)
    }

    fn end(self) -> anyhow::Result<()> {
        self.stop.ring();
        self.control.join().map_err(|_| anyhow!("the control thread panicked"))??;
        self.workers.into_iter().for_each(WorkerThread::join);
        Ok(())
    }
}

/// A disk's rates and their CPU cost.
struct DiskCost {
    rates: DiskRates,
    cpu_ns_per_io: f64,
}

/// Divides each worker's CPU time among requests, and each disk's requests among its rings.
fn costs(
    before: &[DiskReport],
    after: Vec<DiskReport>,
    elapsed: Duration,
    cpu_ns: &[u64],
) -> Vec<DiskCost> {
    let rates = rates(before, after, elapsed);
    let mut iops = vec![0.0; cpu_ns.len()];
    for disk in &rates {
        for worker in &disk.disk.workers {
            if let Some(sum) = iops.get_mut(*worker) {
                *sum += disk.iops / disk.disk.workers.len() as f64;
            }
        }
    }
    let cost = |worker: usize| {
        let requests = iops.get(worker)? * elapsed.as_secs_f64();
        Some(*cpu_ns.get(worker)? as f64 / requests).filter(|ns| ns.is_finite())
    };
    let mean = |workers: &[usize]| {
        let sum: f64 = workers.iter().filter_map(|worker| cost(*worker)).sum();
        sum / workers.len().max(1) as f64
    };
    rates
        .into_iter()
        .map(|rates| DiskCost { cpu_ns_per_io: mean(&rates.disk.workers), rates })
        .collect()
}

fn cost_table(disks: &[DiskCost]) -> String {
    let header = ["DISK", "IOPS", "MB/s", "P50", "P99", "P99.9", "CPU/IO", "WORKER"];
    let rows = disks.iter().map(|DiskCost { rates, cpu_ns_per_io }| {
        vec![
            format!("{}:{}", rates.disk.domid, rates.disk.vdev),
            format!("{:.0}", rates.iops),
            format!("{:.1}", rates.mb_per_s),
            duration(rates.p50_ns),
            duration(rates.p99_ns),
            duration(rates.p999_ns),
            format!("{cpu_ns_per_io:.0} ns"),
            workers(&rates.disk),
        ]
    });
    table(&header, rows)
}

fn progress_bar(duration: Duration) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {elapsed} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)).with_style(style)
}

/// CPU time of each worker so far: the first number of its thread's schedstat.
fn worker_cpu_ns(workers: usize) -> anyhow::Result<Vec<u64>> {
    let mut cpu_ns = vec![0; workers];
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        let Ok(name) = std::fs::read_to_string(task.join("comm")) else { continue };
        let worker = name.trim_end().strip_prefix("worker-").and_then(|text| text.parse().ok());
        let Some(cpu_ns) = worker.and_then(|worker: usize| cpu_ns.get_mut(worker)) else {
            continue;
        };
        let schedstat = std::fs::read_to_string(task.join("schedstat"))?;
        *cpu_ns = schedstat.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0);
    }
    Ok(cpu_ns)
}
