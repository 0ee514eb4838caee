//! Options for the demo's frontends.

use anyhow::bail;
use clap::{Args, ValueEnum};
use polldisk::backing::DataPath;
use polldisk::blkif::Protocol;
use polldisk::blkif::ring::ring_entries;
use polldisk::config::ServeOptions;
use polldisk::limits::{
    INDIRECT_SEGMENTS_MAX, QUEUES_PER_DISK_MAX, RING_PAGE_ORDER_MAX, SEGMENTS_PER_REQUEST,
    SIM_GRANT_ENTRIES,
};
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::xenbus::Wanted;
use polldisk::xen::shm::PAGE_BYTES;

/// Options of `polldisk demo` for its guests' frontends; the daemon offers what they need.
#[derive(Args, Clone, Debug)]
pub struct Frontend {
    /// Rings of each disk, spread over the workers
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queues: u16,
    /// Size of each ring, as the log2 of its 4 KiB pages: 0 to 5
    #[arg(long, value_name = "N", default_value_t = 0)]
    ring_order: u32,
    /// Most 4 KiB segments of a request, 12 to 1024, for a --block-size above 44K; 0: no indirect
    /// requests
    #[arg(long, value_name = "N", default_value_t = 0)]
    indirect: u16,
    /// Do not keep pages granted: each request grants its own
    #[arg(long)]
    no_persistent: bool,
    /// How the daemon gets guests' data to storage
    #[arg(long, value_name = "PATH", value_enum, default_value_t = DataPath::Auto)]
    data_path: DataPath,
    /// Layout of ring entries
    #[arg(long, value_enum, default_value_t = Layout::X86_64)]
    protocol: Layout,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "verbatim")]
enum Layout {
    /// That of 64-bit guests
    #[value(name = "x86_64")]
    X86_64,
    /// That of 32-bit guests
    #[value(name = "x86_32")]
    X86_32,
}

impl Frontend {
    /// A frontend with rings for `depth` requests of up to `block_bytes`.
    pub fn wanted(&self, depth: usize, block_bytes: usize) -> anyhow::Result<Wanted> {
        if self.queues == 0 || self.queues > QUEUES_PER_DISK_MAX {
            bail!("--queues {}: give 1 to {QUEUES_PER_DISK_MAX}", self.queues);
        }
        if self.ring_order > RING_PAGE_ORDER_MAX {
            bail!("--ring-order {}: give 0 to {RING_PAGE_ORDER_MAX}", self.ring_order);
        }
        let segments = usize::from(self.indirect);
        if segments != 0
            && (segments <= SEGMENTS_PER_REQUEST || self.indirect > INDIRECT_SEGMENTS_MAX)
        {
            bail!("--indirect {segments}: give 12 to {INDIRECT_SEGMENTS_MAX}, or 0");
        }
        let protocol = match self.protocol {
            Layout::X86_64 => Protocol::X86_64,
            Layout::X86_32 => Protocol::X86_32,
        };
        let entries = ring_entries(PAGE_BYTES << self.ring_order, protocol);
        if depth == 0 || depth > entries as usize {
            let order = self.ring_order;
            bail!(
                "--depth {depth}: give 1 to {entries}, the entries of a ring of --ring-order {order}"
            );
        }
        let segments_max = segments.max(SEGMENTS_PER_REQUEST);
        if block_bytes == 0
            || !block_bytes.is_multiple_of(512)
            || block_bytes > segments_max * PAGE_BYTES
        {
            let kib = segments_max * PAGE_BYTES / 1024;
            bail!(
                "--block-size {block_bytes}: give a multiple of 512, at most {kib}K; more needs \
                 --indirect with more segments"
            );
        }
        let options = Options {
            protocol,
            persistent: !self.no_persistent,
            buffers: depth,
            ring_order: self.ring_order,
            segments: block_bytes.div_ceil(PAGE_BYTES).max(SEGMENTS_PER_REQUEST),
            ..Options::default()
        };
        let wanted = Wanted { queues: self.queues.into(), ..Wanted::one_queue(options) };
        if wanted.pages() >= SIM_GRANT_ENTRIES as usize {
            bail!(
                "--depth {depth}: a guest can't grant the {} pages this needs; give fewer requests, \
                 smaller blocks or fewer queues",
                wanted.pages()
            );
        }
        Ok(wanted)
    }

    /// The daemon's options for these frontends.
    pub fn offer(&self, options: ServeOptions) -> ServeOptions {
        ServeOptions {
            max_queues: Some(self.queues),
            max_ring_page_order: Some(self.ring_order),
            max_indirect_segments: Some(self.indirect),
            data_path: Some(self.data_path),
            ..options
        }
    }
}
