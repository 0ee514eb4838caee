//! The daemon with its usual options, as a program of its own on a stand-in for Xen: a backend for
//! `blkload` that needs no preload library.

use polldisk::config::ServeOptions;
use polldisk::control;
use polldisk::msg::report_channel;
use polldisk::park::Doorbell;
use polldisk::sim::SimXen;
use polldisk::worker::{WorkerThread, spawn_all};

use anyhow::Context;
use clap::Parser;

#[derive(Parser)]
struct Options {
    #[command(flatten)]
    serve: ServeOptions,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse().serve;
    let folder = std::env::var_os("POLLDISK_STAND_IN").context("POLLDISK_STAND_IN: not set")?;
    let admin_path = options.admin.clone();
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let cores: Vec<usize> = cores.into_iter().map(|core| core.id).collect();
    let config = options.check(&cores)?;
    let platform = SimXen::connect(folder.as_ref());
    let (reporter, reports) = report_channel()?;
    let (workers, threads) = spawn_all(&platform, &config.workers, config.poll, &reporter)?;
    let control_config = control::Config {
        backend_types: config.backend_types.clone(),
        admin_path,
        offer: config.offer,
        signals: true,
        ..control::Config::default()
    };
    control::run(&platform, &control_config, workers, reports, &Doorbell::new()?)?;
    threads.into_iter().for_each(WorkerThread::join);
    Ok(())
}
