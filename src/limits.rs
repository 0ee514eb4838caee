//! Every bound in the program, with its reason. Relations between them are asserted here.

/// Segments in a direct request: `BLKIF_MAX_SEGMENTS_PER_REQUEST` of Xen's `public/io/blkif.h`.
pub const SEGMENTS_PER_REQUEST: usize = 11;

/// Pages with segments in an indirect request: `BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`.
pub const INDIRECT_PAGES_PER_REQUEST: usize = 8;

/// Segments in one such page: 4096 bytes of 8 each.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;

/// Segments in an indirect request at most, whatever is configured: what one preadv takes
/// (`UIO_MAXIOV` of Linux), 4 MiB of data.
pub const INDIRECT_SEGMENTS_MAX: u16 = 1024;

/// Segments in an indirect request that frontends are offered unless configured otherwise:
/// blkback's figure, 1 MiB of data.
pub const INDIRECT_SEGMENTS_DEFAULT: u16 = 256;

/// Tables for the segments of indirect requests that one queue can always have, whatever the others do:
/// enough that storage has a next request while the first ones run.
pub const TABLES_PER_QUEUE: usize = 4;

/// ... and how many more all queues of a worker have together: 12 MiB for requests of 256 segments.
/// Further indirect requests wait in their rings; direct ones need no table.
pub const TABLES_COMMON: usize = 512;

/// Requests that one queue can always have in flight, whatever the others do: a full one-page ring.
pub const REQUESTS_PER_QUEUE: usize = 32;

/// ... and how many more all queues of a worker have together: two of the largest rings. Deeper queues
/// make no storage faster.
pub const REQUESTS_COMMON: usize = 2048;

/// Largest `ring-page-order` accepted anywhere: 32 pages, what FreeBSD's backend also takes.
pub const RING_PAGE_ORDER_MAX: u32 = 5;

/// Largest `ring-page-order` that frontends are offered unless configured otherwise: 16 pages, the
/// figure of blkback and QEMU.
pub const RING_PAGE_ORDER_DEFAULT: u32 = 4;

/// Pages of the largest ring.
pub const RING_PAGES_MAX: usize = 1 << RING_PAGE_ORDER_MAX;

/// Pages that one queue keeps mapped for a guest. blkback's figure
/// (`max_persistent_grants`): a 32-entry ring with three quarters of its indirect segments.
pub const PERSISTENT_GRANTS_PER_QUEUE: usize = 1056;

/// Pages that all queues of one domain keep mapped: those of sixteen full queues. However many disks
/// a guest has, it takes at most a quarter of the mappings that a process can have
/// (`vm.max_map_count`, 65530), even where each page is one of its own; and an eighth of what Xen
/// lets dom0 map ([`PAGES_MAPPED_MAX`]). So one guest does not keep the others from mapping (XSA-300).
pub const PERSISTENT_GRANTS_PER_DOMAIN: usize = 16 * PERSISTENT_GRANTS_PER_QUEUE;

/// Rings that there is a reserve for, whatever guests have mapped: four rings each of a thousand disks.
pub const RINGS_RESERVED: usize = 4096;

/// Mappings of the process (`vm.max_map_count`) that are none of guests' data: one for each ring, and
/// 4096 for its own stacks, libraries and memory, and for files of tmpfs that are its disks.
pub const MAPPINGS_RESERVED: usize = RINGS_RESERVED + 4096;

/// Pages that Xen lets dom0 map: 1024 frames of its maptrack (`gnttab_max_maptrack_frames`), 256 entries
/// each, two for each page if dom0 is a PV domain.
pub const PAGES_MAPPED_MAX: usize = 1024 * 256 / 2;

/// Of these, those for guests' data: the reserved rings have four pages each.
pub const PAGES_FOR_DATA: usize = PAGES_MAPPED_MAX - 4 * RINGS_RESERVED;
const _: () = assert!(PAGES_FOR_DATA > 4 * PERSISTENT_GRANTS_PER_DOMAIN);

/// Least segments of a request whose pages are mapped for its time only. Such a mapping takes four
/// system calls and a flush of the TLB, a copy one system call for all requests of a pass: a page
/// or two are cheaper copied on any host. From here on there are two pages and more for a call.
pub const SEGMENTS_MAPPED_MIN: usize = 8;

/// How often a worker looks which mapped pages were used.
pub const PERSISTENT_SWEEP_SECONDS: u64 = 15;

/// Sweeps in a row after which unused pages are unmapped: blkback's 60 s.
pub const PERSISTENT_IDLE_SWEEPS: u32 = 4;

/// Grants mapped by one system call. A failing batch is mapped again one by one, so a batch is
/// also what one bad reference can cost.
pub const GRANTS_PER_MAP_BATCH: usize = 32 * SEGMENTS_PER_REQUEST;

/// Pages that one call of `/dev/xen/gntalloc` makes: all that its module allows unless told
/// otherwise (its parameter `limit`).
pub const PAGES_PER_ALLOC: usize = 1024;

/// Segments in one grant copy call: bounds the bounce memory of a pass.
pub const SEGMENTS_PER_COPY_BATCH: usize = 512;

/// Transactions are tried again when another writer came between; a xenstore where that happens
/// this often is being written in a loop.
pub const STORE_TRANSACTION_TRIES: usize = 64;

/// Watch events kept while a request waits for its answer. A guest that rewrites its `state` in a
/// loop makes the events, so they must not pile up in memory (XSA-349): equal events are one, and
/// past this many distinct ones each watch keeps one event for everything below its path.
pub const WATCH_EVENTS_KEPT: usize = 4096;

/// A xenstore message's payload: `XENSTORE_PAYLOAD_MAX` of Xen's `public/io/xs_wire.h`.
pub const XENSTORE_PAYLOAD_MAX: usize = 4096;

/// An absolute xenstore path: `XENSTORE_ABS_PATH_MAX`.
pub const XENSTORE_ABS_PATH_MAX: usize = 3072;

/// A relative xenstore path: `XENSTORE_REL_PATH_MAX`.
pub const XENSTORE_REL_PATH_MAX: usize = 2048;

/// Requests sent to xenstored together. All of the largest fit a unix socket's buffer (208 KiB), and so
/// do their answers.
pub const XENSTORE_REQUESTS_PER_BATCH: usize = 32;

/// Commands waiting for one worker. Control sends a few per disk and life-cycle step.
pub const WORKER_COMMANDS: usize = 8192;

/// Reports waiting for control, from all workers: two per command and one fault per queue.
pub const WORKER_REPORTS: usize = 4 * WORKER_COMMANDS;

/// Worker threads. More than this on one host is a typing error.
pub const WORKERS_MAX: usize = 256;

/// Queues on one worker: the ticket's queue field has 16 bits.
pub const QUEUES_PER_WORKER: usize = 1 << 16;

/// Rings of one disk: one for each worker that there can be.
pub const QUEUES_PER_DISK_MAX: u16 = 256;

/// Event channels fetched by one read.
pub const PORTS_PER_READ: usize = 256;

/// Requests for parts of blocks that one queue can always have under way (`emulate-512`), whatever the
/// others do. Each has memory of its own, made when it is first needed.
pub const EMULATED_PER_QUEUE: usize = 2;

/// ... and how many more all queues of a worker have together.
pub const EMULATED_COMMON: usize = 64;

/// Pages of that memory: what one direct request and the rest of its blocks take, and some more.
pub const EMULATED_PAGES: u32 = 16;
const _: () = assert!(EMULATED_PAGES as usize > SEGMENTS_PER_REQUEST);

/// Entries of a worker's io_uring: what is handed to the kernel by one call at most. More of a pass
/// goes by several.
pub const URING_ENTRIES: u32 = 1024;

/// Results that the kernel has room for, and threads that it may start for what waits inside of it: the
/// common requests in flight of a worker and the guaranteed ones of over 400 queues. Beyond that
/// results are kept in a list of the kernel's.
pub const URING_COMPLETIONS: u32 = 1 << 14;
const _: () = assert!(URING_COMPLETIONS <= 1 << 16, "the kernel's own limit");

/// Discards of files that one queue has in the kernel at a time: each takes a thread there, and more
/// make no storage faster.
pub const FILE_DISCARDS_PER_QUEUE: usize = 4;

/// Discards of block devices that one queue has at a time, each in a thread of ours.
pub const DEVICE_DISCARDS_PER_QUEUE: usize = 1;

/// Seconds that such a thread waits for another discard: a guest's `fstrim` sends them one after the other.
pub const DISCARD_THREAD_IDLE_SECONDS: u64 = 10;

/// Ranges of memory that one worker registers with its io_uring: as many as a kernel's table can have
/// (`IORING_MAX_REG_BUFFERS`). Pages of others are looked up with each operation.
pub const REGISTERED_BUFFERS: u16 = 1 << 14;

/// Requests taken from one ring in a pass, so that a full 1024-entry ring does not hold up its
/// neighbours.
pub const REQUESTS_PER_PASS: usize = 64;

/// Responses that a pass keeps from the frontend until it shows them all at once. So a frontend that
/// is awake works on the first while the worker works on the next, and the line of the ring that
/// both write goes back and forth only once for that number.
pub const RESPONSES_HELD_BACK: u32 = 4;

/// One request line of the admin socket: enough for a path of 4096 bytes, escaped.
pub const ADMIN_LINE_MAX: usize = 64 * 1024;

/// One reply line of the admin socket: 10,000 disks with their latencies.
pub const ADMIN_REPLY_MAX: u64 = 256 << 20;

/// Connections to the admin socket at a time.
pub const ADMIN_CLIENTS_MAX: usize = 32;

/// Bytes of a socket's path: `sun_path` of Linux's `struct sockaddr_un`, less the NUL at its end.
pub const SOCKET_PATH_MAX: usize = 107;

/// Seconds that a daemon waits for another one to have found its place for the admin socket, which
/// takes milliseconds.
pub const ADMIN_LOCK_SECONDS: u64 = 5;

/// Seconds that a command waits for the daemon's answer. The daemon's own patience with guests and
/// storage ends before.
pub const ADMIN_REPLY_SECONDS: u64 = 60;
const _: () = assert!(DETACH_SECONDS + MEDIUM_SECONDS < ADMIN_REPLY_SECONDS);
const _: () = assert!(2 * OPEN_SECONDS + MEDIUM_SECONDS < ADMIN_REPLY_SECONDS);

/// Ports written to `/dev/xen/evtchn` by one call: the kernel takes a page of them.
pub const PORTS_PER_UNMASK: usize = 1024;

/// Entries of a guest's grant table in the stand-in: Xen's default `gnttab_max_frames`, 64 frames.
pub const SIM_GRANT_ENTRIES: u32 = 64 * 512;

/// Pages of a guest in the stand-in: 64 GiB, so that no length overflows.
pub const SIM_GUEST_PAGES_MAX: u32 = 1 << 24;

/// Event channels of one handle in the stand-in: one handle serves a worker, and a thousand disks
/// with four queues each fit one worker.
pub const SIM_PORTS_PER_HANDLE: usize = 4096;

/// The list of one xenstore node's children, in bytes: room for every domid there can be, twice.
pub const XENSTORE_DIRECTORY_MAX: usize = 512 * 1024;

/// Connections to the stand-in's xenstore at a time: each costs two descriptors and an inbox.
pub const SIM_STORE_CLIENTS_MAX: usize = 2048;

/// Requests the stand-in's xenstore answers for one client before it looks at the next.
pub const SIM_STORE_REQUESTS_PER_TURN: usize = 16;

/// Log lines that one guest may cause in `GUEST_LOG_SECONDS`: a guest with ten disks that boots and
/// shuts down, and next to nothing for one that loops.
pub const GUEST_LOG_LINES: u32 = 40;

/// The period of `GUEST_LOG_LINES`.
pub const GUEST_LOG_SECONDS: u64 = 30;

/// How often one frontend may be looked at in a burst, each time by some reads of xenstore. A connection
/// takes three or four. What a guest writes meanwhile is seen by the next look.
pub const FRONTEND_LOOKS_BURST: u32 = 64;

/// And then this number a second.
pub const FRONTEND_LOOKS_PER_SECOND: u32 = 50;

/// The same for all frontends of one guest: its 255 disks connect at once.
pub const DOMAIN_LOOKS_BURST: u32 = 1024;

/// And then this number a second, which takes a few per cent of a core.
pub const DOMAIN_LOOKS_PER_SECOND: u32 = 200;

/// Bytes of a configuration file: there are ten keys.
pub const CONFIG_BYTES_MAX: u64 = 64 * 1024;

/// Log lines on their way to standard error. More than these are lost where it takes none: a minute's
/// lines of a host where a hundred guests do their worst.
pub const LOG_LINES_QUEUED: usize = 4096;

/// Bytes of one log line: room for two of the longest names of files. All queued lines together are 32 MiB
/// at most.
pub const LOG_LINE_MAX: usize = 8 * 1024;

/// Milliseconds that the program waits at its end for its last lines to be written.
pub const LOG_END_MS: u64 = 1000;

/// Milliseconds until a line is tried again that a non-blocking standard error did not take.
pub const LOG_RETRY_MS: u64 = 10;

/// Watch events taken before the disks they are about are looked at, so that a guest that makes
/// events without end does not keep control from everybody else.
pub const WATCH_EVENTS_PER_PASS: usize = 1024;

/// Reports of workers taken before everything else is looked at again.
pub const WORKER_REPORTS_PER_PASS: usize = 1024;

/// Seconds that `detach` waits for the guest: libxl's own patience (LIBXL_DESTROY_TIMEOUT).
pub const DETACH_SECONDS: u64 = 10;

/// Seconds that `insert` and `eject` wait for the requests in flight on the medium before.
pub const MEDIUM_SECONDS: u64 = 10;

/// Seconds that `list` waits for the workers' latencies before it answers without them.
pub const LATENCY_SECONDS: u64 = 2;

/// Seconds that the daemon waits at its end for requests in flight. Storage that has not answered
/// by then is not going to.
pub const DRAIN_SECONDS: u64 = 30;

/// Threads that open and close storage. Each may be stuck in storage that hangs.
pub const HELPERS_MAX: usize = 64;

/// Of these at one file or device: whoever opens what hangs over and over leaves room for the other files
/// of the folder.
pub const HELPERS_PER_FILE: usize = 2;

/// Of these in one folder: enough for a thousand images that are opened in a row, and few where the
/// folder hangs.
pub const HELPERS_PER_FOLDER: usize = 4;

/// Of these on one mount, whatever its folders: a few mounts that hang leave threads for the others.
pub const HELPERS_PER_MOUNT: usize = 12;

/// Seconds that storage may take to open. libxl gives up after 10 s without InitWait, and by then should
/// be told why.
pub const OPEN_SECONDS: u64 = 8;

/// Inputs that may follow from one that a disk's machine was given. The longest row known (a connection
/// that fails at once, and is closed at once) takes four.
pub const INPUTS_PER_STEP: usize = 16;

/// Nanoseconds between two reports of a queue's that storage is full or has room again, so that a guest
/// that fills and empties it can't flood control.
pub const SPACE_REPORT_NS: u64 = 1_000_000_000;

/// Milliseconds after which a worker that sleeps offers control again what it had no room for.
pub const OUTBOX_RETRY_MS: u64 = 10;

/// Seconds that a worker which ends offers control what it has to tell. Control may have ended too.
pub const FAREWELL_SECONDS: u64 = 1;

/// Requests of a queue that are told one by one where the daemon ends without them.
pub const IN_FLIGHT_TOLD: usize = 4;

/// Seconds between attempts to reach a xenstored whose connection was lost.
pub const STORE_RETRY_SECONDS: u64 = 5;

/// Text of an `error` node: what fits beside its path in one xenstore message.
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

/// Bounce pages that all queues of a worker have together: several one-page rings full of largest
/// requests that are copied. Each queue can have its own beside them, for its largest request.
pub const BOUNCE_PAGES_COMMON: usize = 2048;

/// References of one queue that may fail to map before its data is only copied: a sound frontend
/// has none.
pub const MAP_REFUSALS_MAX: u32 = 64;

/// Commands taken by a worker in one pass, so that a thousand disks connecting at once do not
/// hold up the I/O of the others.
pub const COMMANDS_PER_PASS: usize = 8;

/// While a worker is busy it asks for the events of sleeping queues this seldom (one system call).
/// It is what a sleeping disk's first request can wait beside a busy one.
pub const EVENT_CHECK_NS: u64 = 20_000;

/// ... and never more often than once in this many passes, however slow a pass is.
pub const EVENT_CHECK_PASSES: u32 = 16;

/// ... but however few passes there were, they ask at least this often.
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

/// The part of a block device's tags, as its divisor, that goes to whichever of a worker's rings ask first,
pub const DEVICE_TAGS_COMMON_DIVISOR: usize = 2;

/// ... tags that are for each ring beside that,
pub const DEVICE_TAGS_PER_QUEUE: usize = 2;

/// ... and tags up to which the worker itself submits, if each page of data had to be a request of its own.
/// Beyond that a thread of the kernel does: the deadline scheduler has writes wait beyond three quarters of the tags
/// (`dd_limit_depth`, `block/mq-deadline.c`).
pub const fn device_tags_of_worker(tags: usize) -> usize {
    tags * 3 / 4
}

/// Where the time to submit is shared, an operation weighs as much as this number of pages of data: for a
/// read of 1 page the kernel takes 2.2 us, for one of 256 pages 22 us (ext4, Linux 6.18).
pub const OPERATION_WEIGHT: u32 = 25;

/// What a queue's turn in a pass may cost while others have work too, in units of [`EFFORT_NS`]: a full
/// one-page ring of requests for a page each that are answered at once, or 16 pages that the worker itself
/// copies, or what the kernel takes to begin operations in that time, as far as the worker has learnt. So
/// a turn lasts some microseconds, however much the guest asks for, and nobody waits for long behind anybody.
pub const TURN_EFFORT: u32 = 512;
const _: () = assert!(TURN_EFFORT == 32 * (REQUEST_EFFORT + SEGMENT_EFFORT));

/// About what a unit of effort takes of the worker's time.
pub const EFFORT_NS: u64 = 10;

/// ... for one that has had more than its share, while those who have not are about to come back,
pub const TURN_EFFORT_AHEAD: u32 = TURN_EFFORT / 4;
const _: () = assert!(TURN_EFFORT_AHEAD >= MOVED_PAGE_EFFORT);

/// ... and while no other has work: still little enough that one that wakes up does not wait for long.
pub const TURN_EFFORT_ALONE: u32 = 32 * TURN_EFFORT;

/// Of the effort a request costs this,
pub const REQUEST_EFFORT: u32 = 15;

/// ... each of its segments this, for the kernel has to look at it,
pub const SEGMENT_EFFORT: u32 = 1;

/// ... this number of bytes of a discard 1, because the worker notes which pages of a file in memory are gone,
pub const DISCARD_BYTES_PER_EFFORT: u64 = 2 << 20;

/// ... and each page that the worker copies this.
pub const MOVED_PAGE_EFFORT: u32 = 32;

/// Seconds that opening an image waits for another disk that is opening or closing the same storage.
/// Both take no time unless storage hangs: then the disk is told so, before its open is given up with a
/// reason that names no other disk.
pub const CLAIM_SECONDS: u64 = OPEN_SECONDS - 1;

/// Milliseconds that a disk waits for somebody else to let go of its storage before it is refused: a
/// program that has just ended, or a tool that looks at a new device, takes no longer.
pub const HOLDER_MILLISECONDS: u64 = 200;

/// Loop devices on top of each other that are followed down to the file below: nobody stacks this many.
pub const LOOPS_ON_LOOPS_MAX: usize = 8;
