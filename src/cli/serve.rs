//! `polldisk serve`: the daemon.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use polldisk::blkif::features::Offer;
use polldisk::config::{Config, ServeOptions};
use polldisk::control::{self, Ended};
use polldisk::msg::report_channel;
use polldisk::park::Doorbell;
use polldisk::text::ranges;
use polldisk::worker::{WorkerThread, spawn_all};
use polldisk::xen::linux::LinuxXen;

use super::log;

/// Serve guests' disks: run in dom0 or a driver domain, as root, until SIGTERM
///
/// Disks come from the toolstack (xl disks with backendtype=phy while xen-blkback is not loaded,
/// files with script=block-polldisk) or from `polldisk attach`. Log lines go to standard error.
#[derive(Args, Debug)]
pub struct Serve {
    /// TOML file with the same options as keys; the command line overrides it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    options: ServeOptions,
}

impl Serve {
    /// Serves until a signal ends it.
    pub fn run(self) -> anyhow::Result<()> {
        let file = match &self.config {
            Some(path) => ServeOptions::from_file(path)?,
            None => ServeOptions::default(),
        };
        let config = self.options.or(file).check(&available_cores())?;
        log::start(&config.log)?;
        let xen = LinuxXen::detect()?;
        for backend_type in &config.backend_types {
            xen.check_backend_is_free(backend_type)?;
        }
        serve(&xen, &config)
    }
}

fn serve(xen: &LinuxXen, config: &Config) -> anyhow::Result<()> {
    let (reporter, reports) = report_channel().context("cannot make the workers' channel")?;
    let (workers, threads) = spawn_all(xen, &config.workers, config.poll, &reporter)?;
    tell(config);
    let control_config = control::Config {
        backend_types: config.backend_types.clone(),
        admin_path: Some(config.admin.clone()),
        offer: config.offer,
        signals: true,
        ..control::Config::default()
    };
    let stop = Doorbell::new().context("cannot make an eventfd")?;
    match control::run(xen, &control_config, workers, reports, &stop)? {
        Ended::Drained => threads.into_iter().for_each(WorkerThread::join),
        // Threads that are stuck in storage end with the process, if the kernel can end them.
        Ended::GaveUp => bail!("storage did not answer all requests; the log names them"),
    }
    tracing::info!("ended");
    Ok(())
}

/// Logs the configuration.
fn tell(config: &Config) {
    let cores: Vec<usize> = config.workers.iter().copied().flatten().collect();
    let cores = if cores.is_empty() { "any".to_owned() } else { ranges(&cores) };
    let Offer { data_path, flush: _, ring_page_order, queues, indirect_segments } = config.offer;
    tracing::info!(
        version = %env!("CARGO_PKG_VERSION"),
        workers = config.workers.len(),
        cores = %cores,
        poll = %config.poll,
        backend_types = %config.backend_types.join(","),
        data_path = %data_path,
        ring_pages = 1u32 << ring_page_order,
        queues,
        segments = indirect_segments,
        admin = %config.admin.display(),
        "starting"
    );
}

/// The cores that this process may use.
pub fn available_cores() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}
