//! Names and paths of xenstore nodes, and xenbus states, as Xen's `public/io/blkif.h`,
//! `public/io/xenbus.h` and libxl write them.

use std::fmt;
use std::str::FromStr;

use crate::units::{DomId, VbdId, parse_decimal};

/// How far one end of a device has got: `enum xenbus_state` of Xen's `public/io/xenbus.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum XenbusState {
    /// The node is missing or holds no state.
    Unknown = 0,
    /// Made by the toolstack, or starting over.
    Initialising = 1,
    /// The backend has published what it offers and waits for the frontend.
    InitWait = 2,
    /// The frontend has published its rings.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// About to close; the rings still work.
    Closing = 5,
    /// Closed.
    Closed = 6,
    /// Changing its configuration (PCI only).
    Reconfiguring = 7,
    /// Changed its configuration (PCI only).
    Reconfigured = 8,
}

impl XenbusState {
    /// Every state, in the order of their numbers.
    pub const ALL: [XenbusState; 9] = [
        XenbusState::Unknown,
        XenbusState::Initialising,
        XenbusState::InitWait,
        XenbusState::Initialised,
        XenbusState::Connected,
        XenbusState::Closing,
        XenbusState::Closed,
        XenbusState::Reconfiguring,
        XenbusState::Reconfigured,
    ];

    /// The number that a `state` node holds.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// What the text of a `state` node means; anything but a state's number is `Unknown`.
    pub fn from_text(text: &str) -> XenbusState {
        let state = number(text).and_then(|number: usize| XenbusState::ALL.get(number));
        state.copied().unwrap_or(XenbusState::Unknown)
    }
}

impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A node's text without the blanks, line break or NUL that the writer may have left around it. Linux
/// (`xenbus_scanf`) and QEMU (`xs_node_scanf`) read with sscanf, which skips them.
pub fn word(text: &str) -> &str {
    const BLANKS: [char; 6] = [' ', '\t', '\n', '\x0b', '\x0c', '\r'];
    text.trim_start_matches(BLANKS).trim_end_matches(|c| BLANKS.contains(&c) || c == '\0')
}

/// The number that a node holds: decimal digits, with an optional `+` before them, as QEMU reads it, and
/// blanks around them. `None`: there is anything else, or the number is out of range. sscanf would read `-1`
/// as 4294967295 and `12abc` as 12, which nobody meant.
pub fn number<T: FromStr>(text: &str) -> Option<T> {
    let word = word(text);
    parse_decimal(word.strip_prefix('+').unwrap_or(word))
}

/// Whether a node means yes: any number but 0 does, as Linux reads flags with `xenbus_read_unsigned`. `None`:
/// it holds no number.
pub fn flag(text: &str) -> Option<bool> {
    number::<u64>(text).map(|number| number != 0)
}

/// A relative path, at which each domain reads its own domid.
pub const OWN_DOMID: &str = "domid";

/// Both areas: how far this end has got.
pub const STATE: &str = "state";
/// Both areas, from the toolstack: whether it is a disk or a CD-ROM.
pub const DEVICE_TYPE: &str = "device-type";

/// Backend area, from the toolstack: 0 when the disk is to be destroyed.
pub const ONLINE: &str = "online";
/// Backend area, from the toolstack: the frontend's directory.
pub const FRONTEND: &str = "frontend";
/// Backend area, from the toolstack: the frontend's domain.
pub const FRONTEND_ID: &str = "frontend-id";
/// Backend area, from the toolstack: what holds the disk's contents.
pub const PARAMS: &str = "params";
/// Backend area, from the toolstack: `r` or `w`.
pub const MODE: &str = "mode";
/// Backend area, from the toolstack: the vdev as the admin wrote it.
pub const DEV: &str = "dev";
/// Backend area, from the toolstack: its name for the kind of backend.
pub const TYPE: &str = "type";
/// Backend area, from the toolstack: 1 for removable media.
pub const REMOVABLE: &str = "removable";
/// Backend area, from the toolstack: 1 for a disk that may be booted from.
pub const BOOTABLE: &str = "bootable";
/// Backend area, from the toolstack: the hotplug script that it runs after InitWait.
pub const SCRIPT: &str = "script";
/// Backend area, from the hotplug script: `connected`, `error` or `busy`.
pub const HOTPLUG_STATUS: &str = "hotplug-status";
/// Backend area: why the hotplug script failed; libxl prints it.
pub const HOTPLUG_ERROR: &str = "hotplug-error";
/// Backend area: present if polldisk made both areas itself (`polldisk attach`).
pub const ATTACHED: &str = "polldisk-attached";

/// Backend area: a mark of the daemon and disk that serve it; unique to that disk.
pub const SERVED_BY: &str = "polldisk-served-by";

/// Backend area: the size in 512-byte sectors, regardless of `sector-size`.
pub const SECTORS: &str = "sectors";
/// Backend area: bytes in a logical block.
pub const SECTOR_SIZE: &str = "sector-size";
/// Backend area: bytes in a physical block.
pub const PHYSICAL_SECTOR_SIZE: &str = "physical-sector-size";
/// Backend area: the sum of the `VDISK_` flags.
pub const INFO: &str = "info";
/// Backend area: BLKIF_OP_FLUSH_DISKCACHE is understood.
pub const FEATURE_FLUSH_CACHE: &str = "feature-flush-cache";
/// Backend area: BLKIF_OP_WRITE_BARRIER is understood.
pub const FEATURE_BARRIER: &str = "feature-barrier";
/// Backend area: BLKIF_OP_DISCARD is understood.
pub const FEATURE_DISCARD: &str = "feature-discard";
/// Backend area: bytes in the smallest range that a discard can free.
pub const DISCARD_GRANULARITY: &str = "discard-granularity";
/// Backend area: byte where the first such range starts.
pub const DISCARD_ALIGNMENT: &str = "discard-alignment";
/// Backend area: BLKIF_DISCARD_SECURE is understood.
pub const DISCARD_SECURE: &str = "discard-secure";
/// Backend area, from the toolstack: 0 if discards are not to be offered.
pub const DISCARD_ENABLE: &str = "discard-enable";
/// Both areas: granted pages stay mapped.
pub const FEATURE_PERSISTENT: &str = "feature-persistent";
/// Backend area: the most segments of an indirect request.
pub const FEATURE_MAX_INDIRECT_SEGMENTS: &str = "feature-max-indirect-segments";
/// Backend area: log2 of the largest ring in pages.
pub const MAX_RING_PAGE_ORDER: &str = "max-ring-page-order";
/// Backend area: the most rings of one disk.
pub const MULTI_QUEUE_MAX_QUEUES: &str = "multi-queue-max-queues";

/// Frontend area, from the toolstack: the backend's directory.
pub const BACKEND: &str = "backend";
/// Frontend area, from the toolstack: the backend's domain.
pub const BACKEND_ID: &str = "backend-id";
/// Frontend area, from the toolstack: the device number.
pub const VIRTUAL_DEVICE: &str = "virtual-device";
/// Frontend area: layout of ring entries.
pub const PROTOCOL: &str = "protocol";
/// Frontend area: the grant of a one-page ring. A larger ring's grants add a number to it.
pub const RING_REF: &str = "ring-ref";
/// Frontend area: log2 of the ring in pages. If it is present at all, the grants are in `ring-refN`.
pub const RING_PAGE_ORDER: &str = "ring-page-order";
/// Frontend area: the port to bind to.
pub const EVENT_CHANNEL: &str = "event-channel";
/// Frontend area: rings in use, each in its own `queue-N` directory if more than one.
pub const MULTI_QUEUE_NUM_QUEUES: &str = "multi-queue-num-queues";

/// `info` flag of a CD-ROM (`VDISK_CDROM`).
pub const VDISK_CDROM: u32 = 1;
/// `info` flag of removable media (`VDISK_REMOVABLE`).
pub const VDISK_REMOVABLE: u32 = 2;
/// `info` flag of a disk that can't be written (`VDISK_READONLY`).
pub const VDISK_READONLY: u32 = 4;

/// The frontend's device class, regardless of the backend's type: `device/vbd/...`.
pub const FRONTEND_CLASS: &str = "vbd";

/// A domain's own directory.
pub fn domain(domid: DomId) -> String {
    format!("/local/domain/{domid}")
}

/// Where a domain's backends of one type are: `<domain>/backend/<kind>`.
pub fn backend_root(own: DomId, kind: &str) -> String {
    format!("/local/domain/{own}/backend/{kind}")
}

/// The backend area of one disk.
pub fn backend_area(own: DomId, kind: &str, domid: DomId, vbd: VbdId) -> String {
    format!("/local/domain/{own}/backend/{kind}/{domid}/{vbd}")
}

/// The frontend area of one disk.
pub fn frontend_area(domid: DomId, vbd: VbdId) -> String {
    format!("/local/domain/{domid}/device/{FRONTEND_CLASS}/{vbd}")
}

/// Where Linux's xenbus reports why a backend failed (`xenbus_dev_fatal`), in the backend's domain:
/// a directory with the node `error`.
pub fn error_area(own: DomId, kind: &str, domid: DomId, vbd: VbdId) -> String {
    format!("/local/domain/{own}/error/backend/{kind}/{domid}/{vbd}")
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_read_as_sscanf_reads_them_unless_that_is_ambiguous() {
        for text in ["8", " 8", "8\n", "\t 8 \r\n", "+8", "008", "8\0", "8\n\0", "\x0b8\x0c"] {
            assert_eq!(number(text), Some(8), "{text:?}");
        }
        for text in [
            "",
            " ",
            "\0",
            "+",
            "-8",
            "--8",
            "+-8",
            "+ 8",
            "8 9",
            "8x",
            "x8",
            "0x8",
            "8.0",
            "1e3",
            "8\0\n8",
            "\u{a0}8",
            "\u{664}",
            "99999999999999999999",
        ] {
            assert_eq!(number::<u64>(text), None, "{text:?}");
        }
        assert_eq!((number("255"), number::<u8>("256")), (Some(255), None));
        assert_eq!([flag("0\n"), flag(" 2"), flag("yes")], [Some(false), Some(true), None]);
    }

    proptest! {
        #[test]
        fn blanks_change_no_number(
            value: u64, before in "[ \t\n\r\x0b\x0c]{0,4}", after in "[ \t\n\r\x0b\x0c]{0,4}\0{0,2}"
        ) {
            prop_assert_eq!(number(&format!("{before}{value}{after}")), Some(value));
            prop_assert_eq!(number(&format!("{before}+{value}{after}")), Some(value));
            prop_assert_eq!(number::<u64>(&format!("{before}-{value}{after}")), None);
        }

        #[test]
        fn a_number_is_the_whole_text(text in "\\PC{0,6}|[-+ 0-9\\n]{0,8}") {
            if let Some(value) = number::<u64>(&text) {
                let digits: String = text.chars().filter(char::is_ascii_digit).collect();
                prop_assert_eq!(digits.parse::<u64>(), Ok(value));
                prop_assert!(text.chars().all(|c| c.is_ascii_digit() || " +\n".contains(c)));
            }
        }
    }

    #[test]
    fn a_state_is_its_number_and_anything_else_is_unknown() {
        for state in XenbusState::ALL {
            assert_eq!(XenbusState::from_text(&state.number().to_string()), state);
            assert_eq!(XenbusState::from_text(&format!(" 0{}\n", state.number())), state);
        }
        for text in ["", " ", "9", "44", "4 4", "4x", "-1", "260", "Connected", "\u{664}"] {
            assert_eq!(XenbusState::from_text(text), XenbusState::Unknown, "{text:?}");
        }
    }
}
