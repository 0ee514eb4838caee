//! Bounds that a guest, an admin or several parts of the program can reach, with their reasons. Relations
//! between them are asserted here. What tunes one file only is in that file.

/// Segments in a direct request: `BLKIF_MAX_SEGMENTS_PER_REQUEST` of Xen's `public/io/blkif.h`.
pub const SEGMENTS_PER_REQUEST: usize = 11;

/// Pages with segments in an indirect request: `BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`.
pub const INDIRECT_PAGES_PER_REQUEST: usize = 8;

/// Segments in one such page: 4096 bytes, 8 for each.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;

/// Most segments of an indirect request, whatever is configured: what one preadv takes
/// (`UIO_MAXIOV` of Linux), 4 MiB of data.
pub const INDIRECT_SEGMENTS_MAX: u16 = 1024;

/// Segments in an indirect request that frontends are offered unless configured otherwise:
/// blkback's figure, 1 MiB of data.
pub const INDIRECT_SEGMENTS_DEFAULT: u16 = 256;

/// Segment tables for indirect requests that each queue is guaranteed: enough that storage has a next
/// request while the first ones run.
pub const TABLES_PER_QUEUE: usize = 4;

/// ... and how many more all queues of a worker share: 3 MiB for requests of 256 segments.
/// Further indirect requests wait in their rings; direct ones need no table.
pub const TABLES_COMMON: usize = 512;

/// Requests in flight that each queue is guaranteed: a full one-page ring.
pub const REQUESTS_PER_QUEUE: usize = 32;

/// ... and how many more all queues of a worker share: two of the largest rings. No storage gets faster
/// with deeper queues.
pub const REQUESTS_COMMON: usize = 2048;

/// Largest `ring-page-order` accepted anywhere: 32 pages, as in FreeBSD's backend.
pub const RING_PAGE_ORDER_MAX: u32 = 5;

/// Largest `ring-page-order` that frontends are offered unless configured otherwise: 16 pages, the
/// figure of blkback and QEMU.
pub const RING_PAGE_ORDER_DEFAULT: u32 = 4;

/// Pages of the largest ring.
pub const RING_PAGES_MAX: usize = 1 << RING_PAGE_ORDER_MAX;

/// Pages that one queue keeps mapped for a guest: blkback's figure (`max_persistent_grants`).
pub const PERSISTENT_GRANTS_PER_QUEUE: usize = 1056;

/// Pages that all queues of one domain keep mapped: those of sixteen full queues. However many disks a
/// guest has, it takes about a quarter of the mappings at most that a process can have (`vm.max_map_count`,
/// 65530), even if each page is a mapping of its own; and about an eighth of what Xen lets dom0 map
/// ([`PAGES_MAPPED_MAX`]). So one guest does not keep the others from mapping (XSA-300).
pub const PERSISTENT_GRANTS_PER_DOMAIN: usize = 16 * PERSISTENT_GRANTS_PER_QUEUE;

/// Rings that can always be mapped, however much data guests have mapped: four for each of a thousand disks.
pub const RINGS_RESERVED: usize = 4096;

/// Mappings of the process (`vm.max_map_count`) that are not for guests' data: one for each ring, and 4096
/// for stacks, libraries and memory of its own, and for disks that are files on tmpfs.
pub const MAPPINGS_RESERVED: usize = RINGS_RESERVED + 4096;

/// Pages that Xen lets dom0 map: 1024 frames of its maptrack (`gnttab_max_maptrack_frames`), 256 entries
/// each, two for each page if dom0 is a PV domain.
pub const PAGES_MAPPED_MAX: usize = 1024 * 256 / 2;

/// Of these, the pages for guests' data: the reserved rings have four pages each.
pub const PAGES_FOR_DATA: usize = PAGES_MAPPED_MAX - 4 * RINGS_RESERVED;
const _: () = assert!(PAGES_FOR_DATA > 4 * PERSISTENT_GRANTS_PER_DOMAIN);

/// Fewest segments of a request whose pages are mapped only until it is answered. Such a mapping costs four
/// system calls and a TLB flush, while one system call copies for all requests of a pass: a page or two are
/// cheaper to copy on any host. From this size on, each call handles at least two pages.
pub const SEGMENTS_MAPPED_MIN: usize = 8;

/// Seconds between a worker's checks of which mapped pages were used.
pub const PERSISTENT_SWEEP_SECONDS: u64 = 15;

/// Sweeps in a row after which unused pages are unmapped: blkback's 60 s.
pub const PERSISTENT_IDLE_SWEEPS: u32 = 4;

/// Grants mapped by one system call. If a batch fails, its grants are mapped one by one, so a bad reference
/// costs at most this number of calls.
pub const GRANTS_PER_MAP_BATCH: usize = 32 * SEGMENTS_PER_REQUEST;

/// Pages that one call of `/dev/xen/gntalloc` makes: all that its module allows by default (parameter
/// `limit`).
pub const PAGES_PER_ALLOC: usize = 1024;

/// Segments in one grant copy call; this bounds the bounce memory of a pass.
pub const SEGMENTS_PER_COPY_BATCH: usize = 512;

/// Attempts at a transaction, which fails when another writer interferes; if that happens this often,
/// somebody is writing to xenstore in a loop.
pub const STORE_TRANSACTION_TRIES: usize = 64;

/// Watch events kept while a request waits for its answer. A guest can cause events in a loop by rewriting
/// its `state`, so they must not pile up in memory (XSA-349): equal events are kept once, and beyond this
/// number of distinct ones each watch keeps one event for everything below its path.
pub const WATCH_EVENTS_KEPT: usize = 4096;

/// A xenstore message's payload: `XENSTORE_PAYLOAD_MAX` of Xen's `public/io/xs_wire.h`.
pub const XENSTORE_PAYLOAD_MAX: usize = 4096;

/// An absolute xenstore path: `XENSTORE_ABS_PATH_MAX`.
pub const XENSTORE_ABS_PATH_MAX: usize = 3072;

/// A relative xenstore path: `XENSTORE_REL_PATH_MAX`.
pub const XENSTORE_REL_PATH_MAX: usize = 2048;

/// Requests sent to xenstored together. Even the largest fit in a unix socket's buffer (208 KiB), as do
/// their answers.
pub const XENSTORE_REQUESTS_PER_BATCH: usize = 32;

/// Commands waiting for one worker. Control sends a few for each step of a disk's life.
pub const WORKER_COMMANDS: usize = 8192;

/// Reports waiting for control, from all workers: two per command and one fault per queue.
pub const WORKER_REPORTS: usize = 4 * WORKER_COMMANDS;

/// Worker threads. More than this on one host is a typo.
pub const WORKERS_MAX: usize = 256;

/// Queues on one worker: the ticket's queue field has 16 bits.
pub const QUEUES_PER_WORKER: usize = 1 << 16;

/// Rings of one disk: one for each possible worker.
pub const QUEUES_PER_DISK_MAX: u16 = 256;

/// Event channels fetched by one read.
pub const PORTS_PER_READ: usize = 256;

/// Requests in flight for parts of blocks (`emulate-512`) that each queue is guaranteed. Each has its own
/// memory, allocated when it is first needed.
pub const EMULATED_PER_QUEUE: usize = 2;

/// ... and how many more all queues of a worker share.
pub const EMULATED_COMMON: usize = 64;

/// Pages of that memory: one direct request and the rest of its blocks, with some room to spare.
pub const EMULATED_PAGES: u32 = 16;
const _: () = assert!(EMULATED_PAGES as usize > SEGMENTS_PER_REQUEST);

/// The oldest Linux that dom0 can run: io_uring reads and writes without a vector (`IORING_OP_READ`) since then.
pub const LINUX_MIN: &str = "5.6";

/// Entries of a worker's io_uring: the most that one call hands to the kernel. A pass with more makes
/// several calls.
pub const URING_ENTRIES: u32 = 1024;

/// Results that the kernel has room for, and threads that it may start for operations that block: the
/// shared requests in flight of a worker and the guaranteed ones of over 400 queues. Further results go to
/// an overflow list in the kernel.
pub const URING_COMPLETIONS: u32 = 1 << 14;
const _: () = assert!(URING_COMPLETIONS <= 1 << 16, "the kernel's own limit");

/// Discards of files that one queue has in the kernel at a time: each takes a kernel thread, and more make
/// no storage faster.
pub const FILE_DISCARDS_PER_QUEUE: usize = 4;

/// Discards of block devices that one queue has at a time, each in a thread of the daemon.
pub const DEVICE_DISCARDS_PER_QUEUE: usize = 1;

/// Seconds that such a thread waits for another discard: a guest's `fstrim` sends them one after another.
pub const DISCARD_THREAD_IDLE_SECONDS: u64 = 10;

/// Ranges of memory that one worker registers with its io_uring: as many as the kernel's table can have
/// (`IORING_MAX_REG_BUFFERS`). Pages outside them are looked up for each operation.
pub const REGISTERED_BUFFERS: u16 = 1 << 14;

/// Requests taken from one ring in a pass, so that a full 1024-entry ring does not hold up its
/// neighbours.
pub const REQUESTS_PER_PASS: usize = 64;

/// Responses that a pass collects before it publishes them together. A frontend that is awake works on
/// these while the worker works on the next ones, and the cache line of the ring that both write moves
/// between their cores only once for this number.
pub const RESPONSES_HELD_BACK: u32 = 4;

/// One request line of the admin socket: enough for a path of 4096 bytes, escaped.
pub const ADMIN_LINE_MAX: usize = 64 * 1024;

/// One reply line of the admin socket: 10,000 disks with their latencies.
pub const ADMIN_REPLY_MAX: u64 = 256 << 20;

/// Connections to the admin socket at a time.
pub const ADMIN_CLIENTS_MAX: usize = 32;

/// Bytes of a socket's path: `sun_path` of Linux's `struct sockaddr_un`, without the final NUL.
pub const SOCKET_PATH_MAX: usize = 107;

/// Seconds that a daemon waits while another one sets up its admin socket, which takes milliseconds.
pub const ADMIN_LOCK_SECONDS: u64 = 5;

/// Seconds that a command waits for the daemon's answer. The daemon gives up on guests and storage earlier.
pub const ADMIN_REPLY_SECONDS: u64 = 60;
const _: () = assert!(DETACH_SECONDS + MEDIUM_SECONDS < ADMIN_REPLY_SECONDS);
const _: () = assert!(2 * OPEN_SECONDS + MEDIUM_SECONDS < ADMIN_REPLY_SECONDS);

/// Ports written to `/dev/xen/evtchn` by one call: the kernel accepts one page of them.
pub const PORTS_PER_UNMASK: usize = 1024;

/// Entries of a guest's grant table in the stand-in: Xen's default `gnttab_max_frames`, 64 frames.
pub const SIM_GRANT_ENTRIES: u32 = 64 * 512;

/// Pages of a guest in the stand-in: 64 GiB, so that no length overflows.
pub const SIM_GUEST_PAGES_MAX: u32 = 1 << 24;

/// Event channels of one handle in the stand-in: one handle serves a worker, and a thousand disks
/// with four queues each fit one worker.
pub const SIM_PORTS_PER_HANDLE: usize = 4096;

/// The list of one xenstore node's children, in bytes: room for twice as many as all possible domids.
pub const XENSTORE_DIRECTORY_MAX: usize = 512 * 1024;

/// Connections to the stand-in's xenstore at a time: each costs two descriptors and an inbox.
pub const SIM_STORE_CLIENTS_MAX: usize = 2048;

/// Requests that the stand-in's xenstore answers for one client before it looks at the next.
pub const SIM_STORE_REQUESTS_PER_TURN: usize = 16;

/// Log lines that one guest may cause in `GUEST_LOG_SECONDS`: enough for a guest with ten disks that boots
/// and shuts down, and a bound on one that loops.
pub const GUEST_LOG_LINES: u32 = 40;

/// The period of `GUEST_LOG_LINES`.
pub const GUEST_LOG_SECONDS: u64 = 30;

/// Looks at one frontend in a burst, each of several reads of xenstore. A connection takes three or four.
/// The next look sees whatever the guest has written meanwhile.
pub const FRONTEND_LOOKS_BURST: u32 = 64;

/// Looks at one frontend per second after the burst.
pub const FRONTEND_LOOKS_PER_SECOND: u32 = 50;

/// The same for all frontends of one guest: its 255 disks connect at once.
pub const DOMAIN_LOOKS_BURST: u32 = 1024;

/// Looks at all frontends of one guest per second after the burst, which take a few per cent of a core.
pub const DOMAIN_LOOKS_PER_SECOND: u32 = 200;

/// Bytes of a configuration file: there are ten keys.
pub const CONFIG_BYTES_MAX: u64 = 64 * 1024;

/// Log lines that wait for standard error. Further lines are lost. This is a minute's worth on a host with
/// a hundred guests that log as much as they can.
pub const LOG_LINES_QUEUED: usize = 4096;

/// Bytes of one log line: room for two of the longest file names. All queued lines together take at most 32
/// MiB.
pub const LOG_LINE_MAX: usize = 8 * 1024;

/// Milliseconds that the program waits before it exits for its last lines to be written.
pub const LOG_END_MS: u64 = 1000;

/// Milliseconds before retrying a line that a non-blocking standard error did not take.
pub const LOG_RETRY_MS: u64 = 10;

/// Watch events taken before control looks at the disks that they concern, so that a guest that causes
/// events without end does not keep control from all others.
pub const WATCH_EVENTS_PER_PASS: usize = 1024;

/// Reports of workers taken before control looks at everything else again.
pub const WORKER_REPORTS_PER_PASS: usize = 1024;

/// Seconds that `detach` waits for the guest, as libxl does (LIBXL_DESTROY_TIMEOUT).
pub const DETACH_SECONDS: u64 = 10;

/// Seconds that `insert` and `eject` wait for the requests in flight on the previous medium.
pub const MEDIUM_SECONDS: u64 = 10;

/// Seconds that `list` waits for the workers' latencies before it answers without them.
pub const LATENCY_SECONDS: u64 = 2;

/// Seconds that the daemon waits for requests in flight before it exits. Storage that takes longer is not
/// expected to answer.
pub const DRAIN_SECONDS: u64 = 30;

/// Threads that open and close storage. Each may be stuck in storage that hangs.
pub const HELPERS_MAX: usize = 64;

/// Of these, threads at one file or device, so that repeated opens of one that hangs leave threads for the
/// other files of its folder.
pub const HELPERS_PER_FILE: usize = 2;

/// Of these, threads in one folder: enough to open a thousand images in a row, and few to lose if the
/// folder hangs.
pub const HELPERS_PER_FOLDER: usize = 4;

/// Of these, threads on one mount: a few mounts that hang leave threads for the others.
pub const HELPERS_PER_MOUNT: usize = 12;

/// Seconds that storage may take to open. libxl gives up after 10 s without InitWait, and should be told
/// why before that.
pub const OPEN_SECONDS: u64 = 8;

/// Inputs that one input to a disk's state machine may lead to. The longest known chain (a connection that
/// fails at once and is closed at once) has four.
pub const INPUTS_PER_STEP: usize = 16;

/// Nanoseconds between two reports of a queue that storage is full or has room again, so that a guest that
/// fills and empties it can't flood control.
pub const SPACE_REPORT_NS: u64 = 1_000_000_000;

/// Milliseconds after which a sleeping worker offers control again the reports it had no room for.
pub const OUTBOX_RETRY_MS: u64 = 10;

/// Seconds for which a worker that ends offers control its last reports. Control may have ended too.
pub const FAREWELL_SECONDS: u64 = 1;

/// Requests of a queue that the log lists one by one when the daemon ends without finishing them.
pub const IN_FLIGHT_TOLD: usize = 4;

/// Seconds between attempts to reach a xenstored whose connection was lost.
pub const STORE_RETRY_SECONDS: u64 = 5;

/// Bytes of an `error` node's text, which fits into one xenstore message together with its path.
pub const ERROR_TEXT_MAX: usize = 1024;

const _: () = assert!(
    HELPERS_PER_FILE < HELPERS_PER_FOLDER
        && HELPERS_PER_FOLDER < HELPERS_PER_MOUNT
        && 4 * HELPERS_PER_MOUNT < HELPERS_MAX
);
const _: () = assert!(REQUESTS_PER_PASS * SEGMENTS_PER_REQUEST >= GRANTS_PER_MAP_BATCH);
const _: () = assert!(PERSISTENT_GRANTS_PER_QUEUE >= GRANTS_PER_MAP_BATCH);
const _: () = assert!(PERSISTENT_GRANTS_PER_QUEUE >= INDIRECT_SEGMENTS_MAX as usize);
const _: () = assert!(SEGMENTS_MAPPED_MIN <= SEGMENTS_PER_REQUEST);
const _: () = assert!(XENSTORE_ABS_PATH_MAX < XENSTORE_PAYLOAD_MAX);

/// Bounce pages that all queues of a worker share: several one-page rings full of direct requests that are
/// copied. Each queue can have its own in addition, for its largest request.
pub const BOUNCE_PAGES_COMMON: usize = 2048;

/// References of one queue that may fail to map before its data is only copied: a correct frontend has
/// none.
pub const MAP_REFUSALS_MAX: u32 = 64;

/// Commands taken by a worker in one pass, so that a thousand disks that connect at once do not hold up the
/// I/O of the others.
pub const COMMANDS_PER_PASS: usize = 8;

/// Nanoseconds between a busy worker's checks for events of sleeping queues (one system call). The first
/// request of a sleeping disk can wait this long while another disk is busy.
pub const EVENT_CHECK_NS: u64 = 20_000;

/// ... and the fewest passes between two checks, however slow a pass is.
pub const EVENT_CHECK_PASSES: u32 = 16;

/// ... but after this time it checks, however few passes there were.
pub const EVENT_CHECK_MAX_NS: u64 = 100_000;

const _: () = assert!(BOUNCE_PAGES_COMMON >= 2 * 32 * SEGMENTS_PER_REQUEST);
const _: () = assert!(SIM_PORTS_PER_HANDLE.is_multiple_of(64));

const _: () = assert!(XENSTORE_REL_PATH_MAX < XENSTORE_ABS_PATH_MAX);
const _: () = assert!(XENSTORE_DIRECTORY_MAX >= 32752 * 6);
const _: () = assert!(ERROR_TEXT_MAX + XENSTORE_REL_PATH_MAX < XENSTORE_PAYLOAD_MAX);
const _: () = assert!(BOUNCE_PAGES_COMMON >= INDIRECT_SEGMENTS_MAX as usize);
const _: () = assert!(REQUESTS_COMMON + 400 * REQUESTS_PER_QUEUE < URING_COMPLETIONS as usize);
const _: () = assert!(
    INDIRECT_SEGMENTS_MAX as usize <= INDIRECT_PAGES_PER_REQUEST * SEGMENTS_PER_INDIRECT_PAGE
);
const _: () = assert!(INDIRECT_SEGMENTS_DEFAULT <= INDIRECT_SEGMENTS_MAX);
const _: () = assert!(QUEUES_PER_DISK_MAX as usize == WORKERS_MAX);
const _: () = assert!(RING_PAGE_ORDER_DEFAULT <= RING_PAGE_ORDER_MAX);
const _: () =
    assert!(URING_ENTRIES as usize * SEGMENTS_PER_REQUEST >= INDIRECT_SEGMENTS_MAX as usize);

/// One in this number of a block device's tags is shared by a worker's rings, first come, first served,
pub const DEVICE_TAGS_COMMON_DIVISOR: usize = 2;

/// ... each ring has this number of its own in addition,
pub const DEVICE_TAGS_PER_QUEUE: usize = 2;

/// ... and up to this number of tags the worker itself submits, counting a request for each page of data.
/// Beyond that a kernel thread does: the deadline scheduler makes writes wait once three quarters of the tags
/// are taken (`dd_limit_depth`, `block/mq-deadline.c`).
pub const fn device_tags_of_worker(tags: usize) -> usize {
    tags * 3 / 4
}

/// When the time to submit is divided among operations, each counts as this number of pages in addition to
/// its data: the kernel takes 2.2 us for a read of 1 page and 22 us for one of 256 pages (ext4, Linux
/// 6.18).
pub const OPERATION_WEIGHT: u32 = 25;

/// About how much of the worker's time a unit of effort takes.
pub const EFFORT_NS: u64 = 10;

/// What a queue's turn in a pass may cost while others have work too, in units of [`EFFORT_NS`]: a full
/// one-page ring of single-page requests that are answered at once, or 16 pages that the worker itself
/// copies, or the operations that the kernel can begin in that time, as the worker has measured. So a turn
/// lasts some microseconds, however much the guest asks for, and no queue waits long for another.
pub const TURN_EFFORT: u32 = 512;
const _: () = assert!(TURN_EFFORT == 32 * (REQUEST_EFFORT + SEGMENT_EFFORT));

/// ... for a queue that has had more than its share, while queues that have not are about to have work again,
pub const TURN_EFFORT_AHEAD: u32 = TURN_EFFORT / 4;
const _: () = assert!(TURN_EFFORT_AHEAD >= MOVED_PAGE_EFFORT);

/// ... and while no other has work: still so little that a queue that wakes up does not wait long.
pub const TURN_EFFORT_ALONE: u32 = 32 * TURN_EFFORT;

/// The effort that a request costs,
pub const REQUEST_EFFORT: u32 = 15;

/// ... that each of its segments costs, because the kernel has to look at it,
pub const SEGMENT_EFFORT: u32 = 1;

/// ... the bytes of a discard that cost 1, because the worker notes which pages of a file in memory are gone,
pub const DISCARD_BYTES_PER_EFFORT: u64 = 2 << 20;

/// ... and that each page that the worker copies costs.
pub const MOVED_PAGE_EFFORT: u32 = 32;

/// Seconds that opening an image waits for another disk that is opening or closing the same storage. Both
/// are quick unless storage hangs. The error then names the other disk, so it has to come before the open
/// itself times out.
pub const CLAIM_SECONDS: u64 = OPEN_SECONDS - 1;

/// Milliseconds that a disk waits for another user to let go of its storage before it is refused: a program
/// that has just ended, or a tool that looks at a new device, takes no longer.
pub const HOLDER_MILLISECONDS: u64 = 200;

/// Loop devices on top of each other that are followed to the file at the bottom: nobody stacks this many.
pub const LOOPS_ON_LOOPS_MAX: usize = 8;
