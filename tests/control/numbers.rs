//! Values as other programs write them: with blanks, a line break or a sign. Linux's and QEMU's
//! backends read them too.

use super::rig::Rig;
use super::{XVDA, XVDB};
use polldisk::xen::Store;
use xenstore_rs::Xs;

/// Endings that `echo` or a C program leaves.
const ENDINGS: [&str; 3] = ["\n", " ", "\t\r\n"];

#[test]
fn a_toolstacks_values_are_read_with_blanks_around_them() {
    for ending in ENDINGS {
        let rig = Rig::start();
        let guest = rig.guest(5);
        let area = "/local/domain/5/device/vbd/51712";
        let values = [
            ("params", "null:1G".to_owned()),
            ("frontend", format!("{area}{ending}")),
            ("frontend-id", format!(" 5{ending}")),
            ("online", format!(" +1{ending}")),
            ("removable", format!("1{ending}")),
            ("discard-enable", format!("0{ending}")),
            ("mode", format!("w{ending}")),
            ("device-type", format!("disk{ending}")),
            ("script", format!("/etc/xen/scripts/block{ending}")),
            ("state", format!("1{ending}")),
        ];
        let values = values.each_ref().map(|(node, value)| (*node, value.as_str()));
        let areas = rig.toolstack_disk_with(5, XVDA, &values);
        rig.wait_state(&areas.backend, 2);
        assert_eq!(guest.read(&areas.backend, "feature-discard").as_deref(), Some("0"));
        guest.publish(&areas, 8);
        let connected = format!("connected{ending}");
        rig.dom0.write(&format!("{}/hotplug-status", areas.backend), &connected).unwrap();
        rig.wait_state(&areas.backend, 4);
        assert_eq!(guest.read(&areas.backend, "info").as_deref(), Some("2"), "removable");
    }
}

#[test]
fn a_guests_values_are_read_with_blanks_around_them() {
    for ending in ENDINGS {
        let rig = Rig::start();
        let guest = rig.guest(5);
        let areas = rig.toolstack_disk(5, XVDA, "null:8G");
        rig.wait_state(&areas.backend, 2);
        for (node, value) in [
            ("ring-ref", " 8"),
            ("event-channel", "+15"),
            ("protocol", "x86_64-abi"),
            ("feature-persistent", "1"),
            ("state", " 3"),
        ] {
            guest.set(&areas, node, &format!("{value}{ending}"));
        }
        rig.wait_state(&areas.backend, 4);
        assert_eq!(rig.list()[0].data_path, "persistent");
        guest.set(&areas, "state", &format!("5{ending}"));
        rig.wait_state(&areas.backend, 5);
    }
}

#[test]
fn unreadable_values_from_the_toolstack_are_reported_in_the_error_node() {
    let rig = Rig::start();
    rig.guest(5);
    for (node, value, told) in [
        ("removable", "abc", "removable = \"abc\""),
        ("discard-enable", "-1", "discard-enable = \"-1\""),
        ("online", "99999999999999999999", "online = \"99999999999999999999\""),
        ("online", "1 2", "online = \"1 2\""),
        ("frontend-id", "5x", "frontend-id is \"5x\""),
    ] {
        let areas = rig.toolstack_disk_with(5, XVDA, &[("params", "null:1G"), (node, value)]);
        let what = format!("{node} = {value} is reported");
        super::until(&what, || rig.read(&areas.error).is_some_and(|error| error.contains(told)));
        rig.toolstack_removes(&areas, true);
        super::until("it is gone", || rig.list().is_empty());
        rig.dom0.rm(&areas.error).unwrap();
    }
    assert_eq!(rig.plane().connects, 0);
}

#[test]
fn an_unreadable_online_node_removes_no_disk() {
    let rig = Rig::start();
    let (_guest, areas) = super::connected(&rig, 5);
    rig.dom0.write(&format!("{}/online", areas.backend), "abc").unwrap();
    let other = rig.toolstack_disk(5, XVDB, "null:1G");
    rig.wait_state(&other.backend, 2);
    assert!(rig.read(&areas.error).unwrap().contains("online = \"abc\""));
    assert_eq!((rig.state(&areas.backend), rig.served(5)), (Some(4), 1));
}

#[test]
fn an_unreadable_online_node_hides_no_other_change_at_the_same_time() {
    let rig = Rig::start();
    let guest = rig.guest(5);
    // Often enough that both are seen at once.
    for _ in 0..50 {
        let areas = rig.toolstack_disk(5, XVDA, "null:1G");
        guest.connect(&rig, &areas);
        rig.dom0
            .atomically(|span| {
                span.rm(&areas.frontend)?;
                span.write(&format!("{}/online", areas.backend), "abc")
            })
            .unwrap();
        super::until("its ring is disconnected", || rig.served(5) == 0);
        rig.toolstack_removes(&areas, false);
        super::until("it is gone", || rig.list().is_empty());
        rig.dom0.rm(&areas.backend).unwrap();
    }
}
