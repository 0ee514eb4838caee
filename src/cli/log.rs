//! Where log lines go: standard error, which systemd passes to the journal.

use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

/// Starts logging at `filter`. Under systemd the journal adds the time, so lines carry none.
pub fn start(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| {
        format!("--log {filter}: give error, warn, info, debug or trace, or module=level pairs")
    })?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if is_journal() {
        lines.without_time().init()
    } else {
        lines.init()
    }
    Ok(())
}

/// Whether standard error is the journal: systemd says which stream that is in JOURNAL_STREAM.
fn is_journal() -> bool {
    let link = format!("/proc/self/fd/{}", std::io::stderr().as_fd().as_raw_fd());
    let (Ok(stream), Ok(target)) = (std::env::var("JOURNAL_STREAM"), std::fs::read_link(link))
    else {
        return false;
    };
    let inode = stream.split(':').nth(1).unwrap_or("");
    !inode.is_empty() && target.to_string_lossy() == format!("socket:[{inode}]")
}
