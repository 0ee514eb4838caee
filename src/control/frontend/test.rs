use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::xen::Permission;

const AREA: &str = "/local/domain/5/device/vbd/51712";

/// A frontend's nodes, and nothing else.
struct Area(BTreeMap<String, String>);

impl Area {
    fn new(nodes: &[(&str, &str)]) -> Area {
        Area(
            nodes.iter().map(|(node, value)| (format!("{AREA}/{node}"), (*value).into())).collect(),
        )
    }

    fn read(&self, offer: Offer) -> Result<Published, FrontendFault> {
        read(self, AREA, &offer)
    }

    fn refusal(&self, offer: Offer) -> String {
        self.read(offer).unwrap_err().to_string()
    }
}

impl Xs for Area {
    fn directory(&self, _: &str) -> io::Result<Vec<Box<str>>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read(&self, path: &str) -> io::Result<Box<str>> {
        self.0.get(path).map(|value| value.as_str().into()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn write(&self, _: &str, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn rm(&self, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Nodes for Area {
    fn write_all(&self, _: &str, _: &[(&str, String)]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_all(&self, area: &str, nodes: &[&str]) -> io::Result<Vec<io::Result<Box<str>>>> {
        Ok(nodes.iter().map(|node| Xs::read(self, &format!("{area}/{node}"))).collect())
    }

    fn mkdir(&self, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn permissions(&self, _: &str) -> io::Result<Vec<Permission>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_permissions(&self, _: &str, _: &[Permission]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn wide() -> Offer {
    Offer { ring_page_order: 2, queues: 4, ..Offer::default() }
}

fn ring(refs: &[u32], port: u32) -> Ring {
    Ring { refs: refs.iter().map(|number| GrantRef(*number)).collect(), port: Port(port) }
}

#[test]
fn a_one_page_ring_is_its_ring_ref() {
    let area = Area::new(&[
        ("ring-ref", "8"),
        ("event-channel", "15"),
        ("protocol", "x86_64-abi"),
        ("feature-persistent", "1"),
    ]);
    let published = area.read(Offer::default()).unwrap();
    assert_eq!(
        published,
        Published {
            protocol: Protocol::X86_64,
            grant_mode: GrantMode::Persistent,
            rings: vec![ring(&[8], 15)],
            first_nodes: ["ring-ref".into(), "event-channel".into()],
        }
    );
}

#[test]
fn what_is_mapped_is_what_the_data_path_and_the_frontend_allow() {
    for (data_path, keeps_grants, grant_mode) in [
        (DataPath::Auto, "1", GrantMode::Persistent),
        (DataPath::Auto, "0", GrantMode::Copy),
        (DataPath::Map, "1", GrantMode::Persistent),
        (DataPath::Map, "0", GrantMode::Map),
        (DataPath::Copy, "1", GrantMode::Copy),
        (DataPath::Copy, "0", GrantMode::Copy),
    ] {
        let area = Area::new(&[
            ("ring-ref", "8"),
            ("event-channel", "15"),
            ("feature-persistent", keeps_grants),
        ]);
        let published = area.read(Offer { data_path, ..Offer::default() }).unwrap();
        assert_eq!(published.grant_mode, grant_mode, "{data_path} for {keeps_grants}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_frontend_that_names_no_protocol_has_the_32_bit_layout() {
    let area = Area::new(&[("ring-ref", "8"), ("event-channel", "15")]);
    assert_eq!(area.read(Offer::default()).unwrap().protocol, Protocol::X86_32);
}

#[test]
fn a_larger_ring_is_numbered_refs_and_several_have_their_folders() {
    let mut nodes = vec![
        ("ring-page-order".to_owned(), "1".to_owned()),
        ("multi-queue-num-queues".to_owned(), "2".to_owned()),
    ];
    for queue in 0..2 {
        nodes.push((format!("queue-{queue}/event-channel"), format!("{}", 10 + queue)));
        for page in 0..2 {
            nodes.push((format!("queue-{queue}/ring-ref{page}"), format!("{}", 4 * queue + page)));
        }
    }
    let nodes: Vec<_> = nodes.iter().map(|(node, value)| (node.as_str(), value.as_str())).collect();
    let published = Area::new(&nodes).read(wide()).unwrap();
    assert_eq!(published.rings, [ring(&[0, 1], 10), ring(&[4, 5], 11)]);
}

#[test]
fn keys_left_by_an_earlier_frontend_do_not_count() {
    let area = Area::new(&[
        ("ring-ref", "8"),
        ("ring-ref0", "100"),
        ("ring-ref1", "101"),
        ("queue-0/ring-ref", "102"),
        ("queue-0/event-channel", "103"),
        ("event-channel", "15"),
    ]);
    assert_eq!(area.read(wide()).unwrap().rings, [ring(&[8], 15)]);
}

#[test]
fn nonsense_is_refused_by_name() {
    for (node, value, named) in [
        ("ring-ref", "4294967296", "ring-ref = \"4294967296\""),
        ("ring-ref", "-1", "ring-ref"),
        ("ring-ref", "0x8", "ring-ref"),
        ("event-channel", "", "event-channel"),
        ("ring-page-order", "31", "ring-page-order"),
        ("ring-page-order", "18446744073709551615", "ring-page-order"),
        ("multi-queue-num-queues", "0", "multi-queue-num-queues"),
        ("multi-queue-num-queues", "5", "multi-queue-num-queues"),
        ("protocol", "foo", "protocol = \"foo\""),
        ("protocol", "x86_64-abi x", "protocol"),
        ("ring-ref", "8 9", "ring-ref = \"8 9\""),
        ("event-channel", "15abc", "event-channel = \"15abc\""),
    ] {
        let good = [("ring-ref", "8"), ("event-channel", "15"), (node, value)];
        let refusal = Area::new(&good).refusal(wide());
        assert!(refusal.contains(named), "{node} = {value}: {refusal}");
    }
    assert!(Area::new(&[("ring-ref", "8")]).refusal(wide()).contains("no event-channel"));
    assert!(Area::new(&[("event-channel", "8")]).refusal(wide()).contains("no ring-ref"));
}

#[test]
fn what_was_not_offered_is_refused() {
    let good = [("ring-ref", "8"), ("ring-ref0", "8"), ("event-channel", "15")];
    for (node, offered, more) in
        [("ring-page-order", "0", "1"), ("multi-queue-num-queues", "1", "2")]
    {
        let with = |value| Area::new(&[&good[..], &[(node, value)]].concat());
        let offer = Offer { ring_page_order: 0, ..Offer::default() };
        with(offered).read(offer).unwrap();
        assert!(with(more).refusal(offer).contains("offered"), "{node}");
    }
}

#[test]
fn a_refusal_quotes_little_and_nothing_that_harms_a_log() {
    let long = "\u{1b}[2J\n".repeat(500);
    let area = Area::new(&[("ring-ref", "8"), ("event-channel", "15"), ("protocol", &long)]);
    let refusal = area.refusal(Offer::default());
    assert!(refusal.len() < 400, "{refusal}");
    assert!(!refusal.contains(|c: char| c.is_control()), "{refusal:?}");
}

proptest! {
    #[test]
    fn whatever_a_guest_wrote_is_answered_within_what_was_offered(
        nodes in prop::collection::btree_map(
            prop::sample::select(vec![
                "ring-ref", "ring-ref0", "ring-ref1", "ring-ref2", "ring-ref3", "ring-page-order",
                "event-channel", "protocol", "multi-queue-num-queues", "queue-0/ring-ref",
                "queue-1/ring-ref", "queue-0/event-channel", "queue-1/event-channel",
            ]),
            prop_oneof!["1", "[0-9]{1,20}", "\\PC{0,8}", "x86_32-abi"],
            0..13,
        )
    ) {
        let nodes: Vec<_> = nodes.iter().map(|(node, value)| (*node, value.as_str())).collect();
        if let Ok(published) = Area::new(&nodes).read(wide()) {
            prop_assert!((1..=4).contains(&published.rings.len()));
            for ring in published.rings {
                prop_assert!(ring.refs.len().is_power_of_two() && ring.refs.len() <= 4);
            }
        }
    }
}
