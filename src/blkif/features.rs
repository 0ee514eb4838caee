//! What frontends are offered, in one table: [`FEATURES`].
//!
//! Names and meaning of the nodes are those of Xen's `public/io/blkif.h`. What is not offered is
//! explicitly denied (`0`), because an earlier daemon may have offered it.

use crate::backing::{DataPath, Discard, Geometry};
use crate::limits;
use crate::xen::keys;

/// What polldisk offers to frontends, within what the data plane can deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// How data gets from the guest's pages to storage.
    pub data_path: DataPath,
    /// Flushes and barriers are understood.
    pub flush: bool,
    /// log2 of the largest ring in pages, at most `limits::RING_PAGE_ORDER_MAX`.
    pub ring_page_order: u32,
    /// The most rings of one disk, at least 1.
    pub queues: u16,
    /// The most segments of an indirect request, up to `limits::INDIRECT_SEGMENTS_MAX`; 0: no such requests.
    pub indirect_segments: u16,
}

impl Offer {
    /// Whether granted pages may stay mapped.
    pub fn is_persistent(&self) -> bool {
        self.data_path != DataPath::Copy
    }
}

/// What one worker can deliver; with more workers, a disk can have more queues.
impl Default for Offer {
    fn default() -> Self {
        Offer {
            data_path: DataPath::Auto,
            flush: true,
            ring_page_order: limits::RING_PAGE_ORDER_DEFAULT,
            queues: 1,
            indirect_segments: limits::INDIRECT_SEGMENTS_DEFAULT,
        }
    }
}

/// What the frontend of one disk is offered.
#[derive(Clone, Copy, Debug)]
pub struct DiskOffer {
    /// What every frontend is offered.
    pub general: Offer,
    /// The disk's sizes.
    pub geometry: Geometry,
    /// How its blocks can be discarded; `None`: not at all.
    pub discard: Option<Discard>,
}

/// One feature of the protocol.
#[derive(Debug)]
pub struct Feature {
    /// Its name in the table of FEATURES.md.
    pub name: &'static str,
    /// The nodes that the backend writes for it before InitWait; one without a value is not written.
    pub offered: &'static [(&'static str, Value)],
    /// The nodes in the frontend's own area by which it takes up the offer.
    pub taken_up: &'static [&'static str],
    /// How both ends agree on it.
    pub negotiation: &'static str,
}

type Value = fn(&DiskOffer) -> Option<String>;

/// Every feature beyond plain reads and writes on a ring of one page.
pub const FEATURES: &[Feature] = &[
    Feature {
        name: "indirect descriptors",
        offered: &[(keys::FEATURE_MAX_INDIRECT_SEGMENTS, |disk| {
            number(disk.general.indirect_segments)
        })],
        taken_up: &[],
        negotiation: "a frontend sends indirect requests of at most this number of segments",
    },
    Feature {
        name: "rings of several pages",
        offered: &[(keys::MAX_RING_PAGE_ORDER, |disk| number(disk.general.ring_page_order))],
        taken_up: &[keys::RING_PAGE_ORDER, keys::RING_REF],
        negotiation: "a frontend that writes `ring-page-order`, up to what is offered, has grants \
                      `ring-refN`; others have one, `ring-ref`",
    },
    Feature {
        name: "several rings for a disk",
        offered: &[(keys::MULTI_QUEUE_MAX_QUEUES, |disk| number(disk.general.queues))],
        taken_up: &[keys::MULTI_QUEUE_NUM_QUEUES],
        negotiation: "two or more rings, up to what is offered, have a directory `queue-N` each",
    },
    Feature {
        name: "persistent grants",
        offered: &[(keys::FEATURE_PERSISTENT, |disk| flag(disk.general.is_persistent()))],
        taken_up: &[keys::FEATURE_PERSISTENT],
        negotiation: "in use if both ends say 1",
    },
    Feature {
        name: "flush",
        offered: &[(keys::FEATURE_FLUSH_CACHE, |disk| flag(disk.general.flush))],
        taken_up: &[],
        negotiation: "a frontend sends flushes",
    },
    Feature {
        name: "barrier",
        offered: &[(keys::FEATURE_BARRIER, |disk| flag(disk.general.flush))],
        taken_up: &[],
        negotiation: "a frontend that does not use flushes sends barriers",
    },
    Feature {
        name: "discard",
        offered: &[
            (keys::FEATURE_DISCARD, |disk| flag(disk.discard.is_some())),
            (keys::DISCARD_GRANULARITY, |disk| number(disk.discard?.granularity_bytes)),
            (keys::DISCARD_ALIGNMENT, |disk| number(disk.discard?.alignment_bytes)),
            (keys::DISCARD_SECURE, |disk| flag(disk.discard?.secure)),
        ],
        taken_up: &[],
        negotiation: "a frontend sends discards; the toolstack's `discard-enable` 0 forbids them",
    },
    Feature {
        name: "sector sizes",
        offered: &[
            (keys::SECTOR_SIZE, |disk| number(disk.geometry.sector_bytes)),
            (keys::PHYSICAL_SECTOR_SIZE, |disk| number(disk.geometry.physical_sector_bytes)),
        ],
        taken_up: &[],
        negotiation: "requests count in units of 512 bytes and must be multiples of `sector-size`",
    },
    Feature {
        name: "ring layouts",
        offered: &[],
        taken_up: &[keys::PROTOCOL],
        negotiation: "the frontend names its layout; on x86, one that names none uses the 32-bit one",
    },
];

/// The nodes that the backend writes before InitWait.
pub fn nodes(disk: &DiskOffer) -> Vec<(&'static str, String)> {
    let offered = FEATURES.iter().flat_map(|feature| feature.offered);
    offered.filter_map(|(node, value)| Some((*node, value(disk)?))).collect()
}

fn flag(set: bool) -> Option<String> {
    number(u8::from(set))
}

fn number(value: impl Into<u64>) -> Option<String> {
    Some(value.into().to_string())
}

#[cfg(test)]
mod test {
    use std::collections::BTreeSet;

    use super::*;
    use crate::units::Bytes;

    const NOTHING: Offer = Offer {
        data_path: DataPath::Copy,
        flush: false,
        ring_page_order: 0,
        queues: 1,
        indirect_segments: 0,
    };

    fn disk(general: Offer, discard: Option<Discard>) -> DiskOffer {
        let geometry =
            Geometry { size: Bytes(1 << 30), sector_bytes: 512, physical_sector_bytes: 4096 };
        DiskOffer { general, geometry, discard }
    }

    fn value(nodes: &[(&str, String)], node: &str) -> Option<String> {
        nodes.iter().find(|(known, _)| *known == node).map(|(_, value)| value.clone())
    }

    #[test]
    fn what_is_not_offered_is_explicitly_denied() {
        let discard = Discard { granularity_bytes: 4096, alignment_bytes: 512, secure: true };
        let all = nodes(&disk(Offer { queues: 2, ..Offer::default() }, Some(discard)));
        let none = nodes(&disk(NOTHING, None));
        for (node, offered, denied) in [
            ("feature-max-indirect-segments", "256", Some("0")),
            ("max-ring-page-order", "4", Some("0")),
            ("multi-queue-max-queues", "2", Some("1")),
            ("feature-persistent", "1", Some("0")),
            ("feature-flush-cache", "1", Some("0")),
            ("feature-barrier", "1", Some("0")),
            ("feature-discard", "1", Some("0")),
            ("discard-granularity", "4096", None),
            ("discard-alignment", "512", None),
            ("discard-secure", "1", None),
            ("sector-size", "512", Some("512")),
            ("physical-sector-size", "4096", Some("4096")),
        ] {
            assert_eq!(value(&all, node).as_deref(), Some(offered), "{node}");
            assert_eq!(value(&none, node).as_deref(), denied, "{node}");
        }
        assert_eq!(all.len(), 12, "{all:?}");
    }

    #[test]
    fn no_node_is_offered_twice() {
        let nodes = nodes(&disk(Offer::default(), None));
        let distinct: BTreeSet<_> = nodes.iter().map(|(node, _)| node).collect();
        assert_eq!(distinct.len(), nodes.len());
    }

    /// FEATURES.md shows users this table, with the same names and nodes in the same order.
    #[test]
    fn the_table_for_users_lists_every_feature_with_its_nodes() {
        let table = include_str!("FEATURES.md");
        let mut rows = table.lines().filter_map(|line| line.strip_prefix("| "));
        for feature in FEATURES {
            let row = rows
                .find(|row| row.split(" | ").next() == Some(feature.name))
                .unwrap_or_else(|| panic!("FEATURES.md has no row \"{}\" here", feature.name));
            let offered = feature.offered.iter().map(|(node, _)| node);
            for node in offered.chain(feature.taken_up) {
                assert!(
                    row.contains(&format!("`{node}")),
                    "{}: no `{node}` in its row",
                    feature.name
                );
            }
        }
    }
}
