//! The command line, and the [`Plan`] that it becomes once it is checked.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use polldisk::blkif::Protocol;
use polldisk::blkif::ring::ring_entries;
use polldisk::config::parse_cores;
use polldisk::limits::{
    INDIRECT_SEGMENTS_MAX, QUEUES_PER_DISK_MAX, RING_PAGE_ORDER_MAX, SEGMENTS_PER_REQUEST,
    SIM_GRANT_ENTRIES,
};
use polldisk::sim::blkfront::device::Options as RingOptions;
use polldisk::sim::blkfront::xenbus::Wanted;
use polldisk::units::{Bytes, DomId};
use polldisk::xen::shm::PAGE_BYTES;
use polldisk::xen::vdev::Vdev;
use serde::Serialize;

use crate::load::Wait;
use crate::queue::Operation;

/// clap turns a plain `{n}` into a line break. An escape that sets no style breaks it up; clap strips the
/// escape if the output is not a terminal.
const TARGET_HELP: &str = "What holds a disk, as a toolstack writes it to params for this backend; \
                           {\u{1b}[0mn} is the disk's number from 1";

/// Measure a Xen block backend: its throughput, its latency and its CPU time
///
/// blkload is the frontend. It starts its own stand-in for Xen, makes domains with disks, starts the
/// backend as a child, and ends it afterwards. {folder} in the command is the stand-in's folder, which
/// is also in POLLDISK_STAND_IN; XENSTORED_PATH names its xenstore. Without a command, blkload waits
/// for another process to serve the disks. With --xen it is a frontend of the domain it runs in, on
/// real Xen.
#[derive(Clone, Debug, Parser)]
#[command(name = "blkload", version, after_help = EXAMPLES)]
pub struct Options {
    /// Reads among 100 requests; the others are writes
    #[arg(long, value_name = "PERCENT", default_value_t = 100, help_heading = "Load")]
    pub read: u64,
    /// Sequential instead of random blocks
    #[arg(long, help_heading = "Load")]
    pub sequential: bool,
    /// Bytes of each request
    #[arg(long, value_name = "SIZE", default_value = "4K", help_heading = "Load")]
    pub block_size: Bytes,
    /// Most requests in flight on each ring
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Load")]
    pub depth: usize,
    /// Requests per second from all rings together, at fixed times; latencies count from when a
    /// request was due [default: as many as the backend answers]
    #[arg(long, value_name = "IOPS", help_heading = "Load")]
    pub rate: Option<u64>,
    /// Send no requests, to see what idle disks cost
    #[arg(long, conflicts_with = "rate", help_heading = "Load")]
    pub idle: bool,
    /// How a ring's thread waits for responses
    #[arg(long, value_enum, default_value_t = WaitKind::Block, help_heading = "Load")]
    pub wait: WaitKind,
    /// Microseconds that --wait block polls for responses before it sleeps
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Load")]
    pub spin_us: u64,
    /// Cores for the rings' threads, such as 2-5,8, in turn [default: unpinned]
    #[arg(long, value_name = "LIST", help_heading = "Load")]
    pub cores: Option<String>,
    /// The part of each disk, from its start, that is used [default: all]
    #[arg(long, value_name = "SIZE", help_heading = "Load")]
    pub size: Option<Bytes>,

    /// Rings of each disk
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Frontend")]
    pub queues: u16,
    /// Size of each ring, as the log2 of its 4 KiB pages
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Frontend")]
    pub ring_order: u32,
    /// Most 4 KiB segments of a request: 12 to 1024, or 0 for no indirect requests [default: as many
    /// as a block needs]
    #[arg(long, value_name = "N", help_heading = "Frontend")]
    pub indirect: Option<u16>,
    /// Do not announce persistent grants
    #[arg(long, help_heading = "Frontend")]
    pub no_persistent: bool,
    /// Layout of ring entries
    #[arg(long, value_enum, default_value_t = Layout::X86_64, help_heading = "Frontend")]
    pub protocol: Layout,

    /// Disks, spread over the domains
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Disks")]
    pub disks: u32,
    /// Domains, numbered from --domid on
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Disks")]
    pub domains: u32,
    /// The first domain's number
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Disks")]
    pub domid: DomId,
    /// As [`TARGET_HELP`] says.
    #[arg(long, value_name = "TEXT", help = TARGET_HELP, help_heading = "Disks")]
    pub target: Option<String>,
    /// Let the backend make the disks' areas in xenstore, as QEMU does for its -device xen-disk
    #[arg(long, conflicts_with_all = ["target", "nodes", "echo", "xen"], help_heading = "Disks")]
    pub no_toolstack: bool,
    /// Kind of the backend's areas in xenstore: vbd, qdisk, ...
    #[arg(long, value_name = "TYPE", default_value = "vbd", help_heading = "Disks")]
    pub backend_type: String,
    /// Whether disks may be written
    #[arg(long, value_enum, default_value_t = Mode::W, help_heading = "Disks")]
    pub mode: Mode,
    /// Another node of each backend area, such as direct-io-safe=1; may be given several times
    #[arg(long = "node", value_name = "KEY=VALUE", help_heading = "Disks")]
    pub nodes: Vec<String>,

    /// Add four more guests, each with a disk, that do this. Their requests count only in their own
    /// figures, and may fail. Their targets are in polldisk's syntax
    #[arg(long, value_enum, value_name = "KIND",
          conflicts_with_all = ["idle", "echo", "xen", "no_toolstack"],
          help_heading = "Neighbours")]
    pub neighbours: Option<NeighbourKind>,
    /// Folder for the neighbours' temporary files [default: the system's]
    #[arg(long, value_name = "DIR", requires = "neighbours", help_heading = "Neighbours")]
    pub scratch: Option<PathBuf>,

    /// Seconds before the first sample
    #[arg(long, value_name = "S", default_value_t = 1.0, help_heading = "Measurement")]
    pub warmup: f64,
    /// Seconds of all samples together
    #[arg(long, value_name = "S", default_value_t = 5.0, help_heading = "Measurement")]
    pub seconds: f64,
    /// Samples that the time is split into, to show how much the figures vary
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Measurement")]
    pub samples: usize,
    /// Write everything as JSON to a file, or to standard output (-) instead of the table
    #[arg(long, value_name = "FILE", help_heading = "Measurement")]
    pub json: Option<PathBuf>,
    /// Longest time for the disks to connect, in seconds
    #[arg(long, value_name = "S", default_value_t = 30.0, help_heading = "Measurement")]
    pub patience: f64,

    /// Folder for the stand-in's sockets [default: a temporary one]
    #[arg(long, value_name = "DIR", help_heading = "Backend")]
    pub folder: Option<PathBuf>,
    /// The process whose CPU time is measured [default: the child]
    #[arg(long, value_name = "PID", help_heading = "Backend")]
    pub pid: Option<u32>,
    /// Show what the backend prints
    #[arg(short, long, help_heading = "Backend")]
    pub verbose: bool,
    /// Measure blkload itself: a thread for each ring answers requests without doing them
    #[arg(long, conflicts_with_all = ["xen", "pid", "folder", "command"], help_heading = "Backend")]
    pub echo: bool,
    /// Be a frontend of this domain on real Xen, through /dev/xen/gntalloc
    #[arg(long, conflicts_with_all = ["folder", "target", "command"], requires = "vdev",
          help_heading = "Backend")]
    pub xen: bool,
    /// The disk that --xen uses; attach it first (polldisk attach --domid 0 --vdev xvdz ...)
    #[arg(long, value_name = "NAME", requires = "xen", help_heading = "Backend")]
    pub vdev: Option<Vdev>,
    /// The backend and its arguments
    #[arg(last = true, value_name = "BACKEND COMMAND")]
    pub command: Vec<String>,
}

/// Guests of --neighbours, each a domain of its own.
pub const NEIGHBOUR_DOMAINS: u32 = 4;

/// Most samples of a run. Each takes half a megabyte for every ring's thread.
const SAMPLES_MAX: usize = 100;

const EXAMPLES: &str = "Examples:
  blkload --echo --wait busy --cores 0,1
  blkload --target null:8G --depth 32 -- env LD_PRELOAD=$LIB polldisk serve --admin {folder}/admin
  blkload --xen --vdev xvdz --pid $(pidof polldisk) --rate 20000";

/// How a ring's thread waits for responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WaitKind {
    /// Polls and never asks to be notified
    Busy,
    /// Sleeps until it is notified, as a guest's kernel does
    Block,
}

/// Layout of ring entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// The layout of 64-bit guests
    #[value(name = "x86_64")]
    X86_64,
    /// The layout of 32-bit guests
    #[value(name = "x86_32")]
    X86_32,
}

/// Whether disks may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Only read
    R,
    /// Read and written
    W,
}

/// What the guests of --neighbours do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NeighbourKind {
    /// 4 KiB reads, 8 in flight, of nothing or of a file as the measured disks hold
    Polite,
    /// 1 MiB reads that are copied, 32 in flight
    Copies,
    /// 512 indirect requests of one segment in flight, on a file
    Indirect,
    /// 512 flushes in flight, on a file
    Flushes,
    /// 512 discards in flight, on a file
    Discards,
    /// Endless notifications, and no request
    Storm,
    /// 512 requests of all kinds in flight to storage that never answers (needs root)
    Hung,
    /// Each does the worst of a different kind; without root none has storage that never answers
    Worst,
}

/// What is measured, and how: the options, checked.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The features that the frontends ask for.
    pub wanted: Wanted,
    /// Bytes of each request.
    pub block_bytes: usize,
    /// The operations that each ring's requests are made for, in turn; empty if it sends none. A measured
    /// request gets its operation only when it starts.
    pub operations: Vec<Operation>,
    /// How rings wait.
    pub wait: Wait,
    /// Cores for the rings' threads; empty if they are not pinned.
    pub cores: Vec<usize>,
    /// Time before the first sample.
    pub warmup: Duration,
    /// Length of each sample.
    pub sample: Duration,
    /// Longest time for all disks to connect.
    pub patience: Duration,
    /// Extra nodes of each backend area.
    pub nodes: Vec<(String, String)>,
    /// The options as they were given.
    pub options: Options,
}

impl Options {
    /// Checks the options; `available` are the cores of this machine.
    pub fn check(self, available: &[usize]) -> anyhow::Result<Plan> {
        if self.read > 100 {
            bail!("--read {}: give 0 to 100", self.read);
        }
        if self.read < 100 && self.mode == Mode::R {
            bail!("--read {}: --mode r makes disks that refuse writes; give 100", self.read);
        }
        if self.rate == Some(0) {
            bail!("--rate 0: give 1 or more requests per second, or leave it out");
        }
        if self.samples == 0 || self.samples > SAMPLES_MAX {
            bail!("--samples {}: give 1 to {SAMPLES_MAX}", self.samples);
        }
        self.check_disks()?;
        if self.neighbours.is_some() && self.wait != WaitKind::Busy {
            bail!("--neighbours: give --wait busy, since the load's own thread drives them, too");
        }
        let block_bytes = usize::try_from(self.block_size.0).unwrap_or(usize::MAX);
        let wanted = self.wanted(block_bytes)?;
        let seconds = |option: &str, value: f64| {
            Duration::try_from_secs_f64(value)
                .ok()
                .filter(|duration| duration.as_secs() < 1_000_000)
                .with_context(|| format!("{option} {value}: give a number of seconds"))
        };
        let sample = seconds("--seconds", self.seconds / self.samples as f64)?;
        if sample < Duration::from_millis(1) {
            bail!("--seconds {}: give at least a millisecond for each sample", self.seconds);
        }
        let spin_ns = self.spin_us.checked_mul(1000).filter(|ns| *ns <= 1_000_000_000);
        let Some(spin_ns) = spin_ns else {
            bail!("--spin-us {}: give at most 1000000; --wait busy never sleeps", self.spin_us)
        };
        Ok(Plan {
            wanted,
            block_bytes,
            operations: vec![Operation::Read],
            wait: match self.wait {
                WaitKind::Busy => Wait::Busy,
                WaitKind::Block => Wait::Block { spin_ns },
            },
            cores: self.check_cores(available)?,
            warmup: seconds("--warmup", self.warmup)?,
            sample,
            patience: seconds("--patience", self.patience)?,
            nodes: self.nodes.iter().map(|node| parse_node(node)).collect::<Result<_, _>>()?,
            options: self,
        })
    }

    fn check_disks(&self) -> anyhow::Result<()> {
        if self.target.is_none() && !self.xen && !self.echo && !self.no_toolstack {
            bail!("--target: say what the disks hold, such as null:8G or raw:/srv/{{n}}.img");
        }
        if self.xen && (self.disks, self.domains) != (1, 1) {
            bail!("--disks, --domains: with --xen there is one disk, the one of --vdev");
        }
        if self.domains == 0 || self.disks < self.domains || self.disks > 1000 {
            bail!(
                "--disks {} --domains {}: give 1 to 1000 disks, at least one for each domain",
                self.disks,
                self.domains
            );
        }
        let neighbours = self.neighbours.map_or(0, |_| NEIGHBOUR_DOMAINS);
        let domains = self.domains + neighbours;
        let last = u32::from(self.domid.raw()) + domains - 1;
        if self.domid == DomId::DOM0 || DomId::try_from(last).is_err() {
            bail!("--domid {}: give 1 to {}", self.domid, 32752 - domains);
        }
        Ok(())
    }

    fn check_cores(&self, available: &[usize]) -> anyhow::Result<Vec<usize>> {
        let Some(list) = &self.cores else { return Ok(Vec::new()) };
        let cores = parse_cores(list)?;
        match cores.iter().find(|core| !available.contains(core)) {
            Some(core) => {
                bail!("--cores {list}: there is no core {core}; choose from {available:?}")
            }
            None => Ok(cores),
        }
    }

    fn wanted(&self, block_bytes: usize) -> anyhow::Result<Wanted> {
        if self.queues == 0 || self.queues > QUEUES_PER_DISK_MAX {
            bail!("--queues {}: give 1 to {QUEUES_PER_DISK_MAX}", self.queues);
        }
        if self.ring_order > RING_PAGE_ORDER_MAX {
            bail!("--ring-order {}: give 0 to {RING_PAGE_ORDER_MAX}", self.ring_order);
        }
        if block_bytes == 0 || !block_bytes.is_multiple_of(512) {
            bail!("--block-size {}: give a multiple of 512", self.block_size);
        }
        let protocol = match self.protocol {
            Layout::X86_64 => Protocol::X86_64,
            Layout::X86_32 => Protocol::X86_32,
        };
        let entries = ring_entries(PAGE_BYTES << self.ring_order, protocol) as usize;
        if self.depth == 0 || self.depth > entries {
            bail!(
                "--depth {}: give 1 to {entries}, what a ring of --ring-order {} holds",
                self.depth,
                self.ring_order
            );
        }
        let options = RingOptions {
            protocol,
            persistent: !self.no_persistent,
            buffers: self.depth,
            ring_order: self.ring_order,
            segments: self.segments(block_bytes)?,
            ..RingOptions::default()
        };
        let wanted = Wanted { queues: usize::from(self.queues), ..Wanted::one_queue(options) };
        let pages = wanted.pages() * self.disks.div_ceil(self.domains) as usize;
        if pages >= SIM_GRANT_ENTRIES as usize / 2 {
            bail!(
                "--depth {}: it needs {pages} pages, more than a domain can grant; give fewer \
                 requests, smaller blocks, fewer queues or more --domains",
                self.depth
            );
        }
        Ok(wanted)
    }

    /// Segments of the largest request, as [`RingOptions::segments`].
    fn segments(&self, block_bytes: usize) -> anyhow::Result<usize> {
        let needed = block_bytes.div_ceil(PAGE_BYTES);
        let most = match self.indirect.map(usize::from) {
            None => usize::from(INDIRECT_SEGMENTS_MAX),
            Some(0) => SEGMENTS_PER_REQUEST,
            Some(most)
                if most <= SEGMENTS_PER_REQUEST || most > usize::from(INDIRECT_SEGMENTS_MAX) =>
            {
                bail!("--indirect {most}: give 12 to {INDIRECT_SEGMENTS_MAX}, or 0");
            }
            Some(most) => most,
        };
        if needed > most {
            let kib = most * PAGE_BYTES / 1024;
            bail!("--block-size {}: give at most {kib}K, or more --indirect", self.block_size);
        }
        Ok(needed.max(SEGMENTS_PER_REQUEST))
    }
}

fn parse_node(text: &str) -> anyhow::Result<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !key.starts_with('/') => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => bail!("--node {text}: write KEY=VALUE, such as direct-io-safe=1"),
    }
}

#[cfg(test)]
mod test {
    use clap::CommandFactory;

    use super::*;

    fn plan(line: &str) -> anyhow::Result<Plan> {
        let words = std::iter::once("blkload").chain(line.split_whitespace());
        Options::try_parse_from(words)?.check(&[0, 1, 2])
    }

    #[test]
    fn help_shows_every_text_in_full() {
        use clap::CommandFactory;
        let mut command = Options::command();
        let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let page = words(command.render_long_help().to_string());
        assert!(page.contains("{n} is the disk's number"), "{page}");
        for argument in command.get_arguments() {
            let help = argument.get_long_help().or(argument.get_help());
            let help = words(help.map(ToString::to_string).unwrap_or_default());
            assert!(page.contains(&help), "--help lacks \"{help}\"");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn options_become_a_plan() {
        let plan = plan(
            "--target null:8G --block-size 1M --depth 4 --queues 2 --ring-order 2 --cores 1-2 \
             --wait block --spin-us 5 --seconds 3 --samples 6 --node direct-io-safe=1 \
             --protocol x86_32 --no-persistent -- backend --folder {folder}",
        )
        .unwrap();
        assert_eq!((plan.wanted.queues, plan.wanted.options.buffers), (2, 4));
        assert_eq!(plan.wanted.options.segments, 256, "as many as a block needs");
        assert_eq!((plan.wanted.options.ring_order, plan.wanted.options.persistent), (2, false));
        assert_eq!(plan.wanted.options.protocol, Protocol::X86_32);
        assert_eq!(plan.wait, Wait::Block { spin_ns: 5000 });
        assert_eq!((plan.sample, plan.cores), (Duration::from_millis(500), vec![1, 2]));
        assert_eq!(plan.nodes, [("direct-io-safe".to_owned(), "1".to_owned())]);
        assert_eq!(plan.options.command, ["backend", "--folder", "{folder}"]);
    }

    #[test]
    fn an_impossible_option_is_named_with_the_possible_values() {
        for (line, error) in [
            ("", "--target: say what the disks hold, such as null:8G or raw:/srv/{n}.img"),
            ("--echo --depth 33", "--depth 33: give 1 to 32, what a ring of --ring-order 0 holds"),
            ("--echo --depth 0", "--depth 0: give 1 to 32, what a ring of --ring-order 0 holds"),
            ("--echo --read 101", "--read 101: give 0 to 100"),
            (
                "--echo --read 0 --mode r",
                "--read 0: --mode r makes disks that refuse writes; give 100",
            ),
            ("--echo --rate 0", "--rate 0: give 1 or more requests per second, or leave it out"),
            ("--echo --block-size 4000", "--block-size 4000 B: give a multiple of 512"),
            (
                "--echo --block-size 8M",
                "--block-size 8 MiB: give at most 4096K, or more --indirect",
            ),
            (
                "--echo --block-size 1M --indirect 0",
                "--block-size 1 MiB: give at most 44K, or more --indirect",
            ),
            ("--echo --indirect 11", "--indirect 11: give 12 to 1024, or 0"),
            ("--echo --queues 0", "--queues 0: give 1 to 256"),
            ("--echo --ring-order 6", "--ring-order 6: give 0 to 5"),
            ("--echo --cores 0,3", "--cores 0,3: there is no core 3; choose from [0, 1, 2]"),
            ("--echo --samples 0", "--samples 0: give 1 to 100"),
            ("--echo --seconds=-1", "--seconds -0.2: give a number of seconds"),
            ("--echo --seconds 0", "--seconds 0: give at least a millisecond for each sample"),
            (
                "--echo --spin-us 2000000",
                "--spin-us 2000000: give at most 1000000; --wait busy never sleeps",
            ),
            ("--echo --node x", "--node x: write KEY=VALUE, such as direct-io-safe=1"),
            (
                "--echo --disks 2 --domains 3",
                "--disks 2 --domains 3: give 1 to 1000 disks, at least one for each domain",
            ),
            ("--echo --domid 0", "--domid 0: give 1 to 32751"),
            (
                "--target null:1G --wait busy --neighbours storm --domid 32748",
                "--domid 32748: give 1 to 32747",
            ),
            (
                "--target null:1G --neighbours polite",
                "--neighbours: give --wait busy, since the load's own thread drives them, too",
            ),
            (
                "--xen --vdev xvdz --disks 2",
                "--disks, --domains: with --xen there is one disk, the one of --vdev",
            ),
        ] {
            let found = plan(line).unwrap_err().to_string();
            assert_eq!(found, error, "{line}");
        }
        for (line, part) in [
            ("--xen", "--vdev"),
            ("--echo --pid 5", "--pid"),
            ("--no-toolstack --target null:1G", "cannot be used with"),
            ("--echo -- backend", "cannot be used with"),
            ("--echo --neighbours polite --wait busy", "cannot be used with"),
            ("--target null:1G --idle --neighbours polite --wait busy", "cannot be used with"),
            ("--target null:1G --scratch /tmp", "--neighbours"),
            ("--echo --depth 32 --block-size 4M --queues 2", "more than a domain can grant"),
        ] {
            let found = plan(line).unwrap_err().to_string();
            assert!(found.contains(part), "{line}: {found}");
        }
    }
}
