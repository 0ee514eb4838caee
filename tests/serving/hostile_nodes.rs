//! Frontends that publish nonsense in xenstore, beside a guest that must not notice.

use polldisk::sim::Domain;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::units::{DomId, GrantRef};
use polldisk::xen::PageAccess;
use polldisk::xen::keys::XenbusState;
use xenstore_rs::Xs;

use crate::rig::{Guest, Neighbour, Rig, load, run_verified};

/// What a sound frontend publishes, with some nodes replaced (or left out, if empty).
fn nodes(device: &Device, replaced: &[(&str, &str)]) -> Vec<(String, String)> {
    let sound = [
        ("ring-ref", device.ring_ref().to_string()),
        ("event-channel", device.port().to_string()),
        ("protocol", "x86_64-abi".to_owned()),
        ("feature-persistent", "1".to_owned()),
    ];
    let kept = sound.into_iter().filter(|(node, _)| replaced.iter().all(|(name, _)| name != node));
    let added = replaced.iter().filter(|(_, value)| !value.is_empty());
    kept.chain(added.map(|(node, value)| (*node, (*value).to_owned())))
        .map(|(node, value)| (node.to_owned(), value))
        .collect()
}

/// Publishes nonsense: the disk has to close with an `error` node that names `culprit`, and the guest
/// has to be able to start over.
fn is_refused(rig: &Rig, guest: &Guest, replaced: &[(&str, &str)], culprit: &str) {
    guest.xenbus.wait_for(&[XenbusState::InitWait]).unwrap();
    let device = Device::new(guest.domain.clone(), Options::default()).unwrap();
    let written = nodes(&device, replaced);
    let written: Vec<_> = written.iter().map(|(node, value)| (&**node, &**value)).collect();
    guest.publish(&written, XenbusState::Initialised);
    guest.xenbus.wait_for(&[XenbusState::Closing]).unwrap();
    let error = rig.error_of(guest.domid()).unwrap();
    assert!(error.contains(culprit), "{replaced:?}: {error}");

    guest.xenbus.set_state(XenbusState::Closed).unwrap();
    guest.xenbus.wait_for(&[XenbusState::Closed]).unwrap();
    assert_eq!(guest.domain.mapped_grants(), 0, "{replaced:?}");
    device.close().unwrap();
    for (node, _) in written {
        guest.xenbus.store().rm(&guest.xenbus.own(node)).unwrap();
    }
    guest.xenbus.start_over().unwrap();
}

/// The disk works, and the failure is forgotten.
fn works(rig: &Rig, guest: &Guest) {
    let mut device = guest.connect(Options::default());
    assert_eq!(rig.error_of(guest.domid()), None);
    run_verified(&mut device, load(7, 4096), 100);
    guest.close(device);
}

#[test]
fn nonsense_in_xenstore_closes_the_disk_with_a_reason_and_disturbs_nobody() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    for (replaced, culprit) in [
        (&[("ring-ref", "4294967295")][..], "ring-ref"),
        (&[("ring-ref", "4294967296")], "ring-ref"),
        (&[("ring-ref", "-1")], "ring-ref"),
        (&[("ring-ref", "0x10")], "ring-ref"),
        (&[("ring-ref", "")], "ring-ref"),
        (&[("event-channel", "")], "event-channel"),
        (&[("event-channel", "4294967295")], "event-channel"),
        (&[("event-channel", "99999999999999999999")], "event-channel"),
        (&[("ring-page-order", "31")], "ring-page-order"),
        (&[("ring-page-order", "18446744073709551616")], "ring-page-order"),
        (&[("ring-page-order", "0"), ("ring-ref", "")], "ring-ref0"),
        (&[("multi-queue-num-queues", "0")], "multi-queue-num-queues"),
        (&[("multi-queue-num-queues", "65536")], "multi-queue-num-queues"),
        (&[("protocol", "foo")], "protocol"),
        (&[("protocol", "x86_64-abi\n\u{1b}[2J")], "protocol"),
    ] {
        is_refused(&rig, &guest, replaced, culprit);
    }
    works(&rig, &guest);
    neighbour.finish();
}

/// Grants a page to domain `to`.
fn grant(domain: &Domain, to: u32, access: PageAccess) -> GrantRef {
    let page = domain.alloc_pages(1).unwrap();
    domain.grant(page, DomId::try_from(to).unwrap(), access).unwrap()
}

#[test]
fn a_ring_that_is_not_granted_to_the_backend_is_refused() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    let never_granted = guest.domain.reserve_refs(1).unwrap()[0];
    let to_another = grant(&guest.domain, 9, PageAccess::ReadWrite);
    let read_only = grant(&guest.domain, 0, PageAccess::ReadOnly);
    let no_such_page = guest.domain.reserve_refs(1).unwrap()[0];
    let beyond = polldisk::sim::Gfn(guest.domain.pages());
    guest.domain.permit(no_such_page, beyond, DomId::DOM0, PageAccess::ReadWrite);
    for gref in [never_granted, to_another, read_only, no_such_page] {
        is_refused(&rig, &guest, &[("ring-ref", &gref.to_string())], "ring-ref");
    }
    works(&rig, &guest);
    neighbour.finish();
}

#[test]
fn an_event_channel_that_does_not_wait_for_the_backend_is_refused() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 9);
    let guest = rig.guest_on_file(1);
    let mut events = guest.domain.open_events().unwrap();
    let to_another = events.alloc_unbound(DomId::try_from(9).unwrap()).unwrap();
    let never_allocated = to_another.0 + 1;
    for port in [to_another.0, never_allocated, 0] {
        is_refused(&rig, &guest, &[("event-channel", &port.to_string())], "event-channel");
    }
    works(&rig, &guest);
    neighbour.finish();
}
