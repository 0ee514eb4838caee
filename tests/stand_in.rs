//! The stand-in for Xen, as backends and guests use it, in one process and in several.
#![allow(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use polldisk::limits::{GRANTS_PER_MAP_BATCH, SIM_GRANT_ENTRIES};
use polldisk::park;
use polldisk::sim::domain::StillMapped;
use polldisk::sim::events::SimEvents;
use polldisk::sim::grants::SimGrants;
use polldisk::sim::{Domain, Endpoint, Gfn, SimXen, StandIn};
use polldisk::units::{DomId, GrantRef, Port};
use polldisk::xen::abi;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{CopyDirection, Events, GrantCopy, Grants, PageAccess, Platform};
use xenstore_rs::Xs;

fn domid(raw: u32) -> DomId {
    DomId::try_from(raw).unwrap()
}

/// A stand-in with a guest, and dom0's grant handle.
fn rig() -> (StandIn, Domain, SimGrants) {
    let stand_in = StandIn::start_temporary().unwrap();
    let guest = stand_in.create_domain(domid(1), 512).unwrap();
    let grants = stand_in.platform().open_grants().unwrap();
    (stand_in, guest, grants)
}

fn granted_page(guest: &Domain, content: &[u8], access: PageAccess) -> (Gfn, GrantRef) {
    let page = guest.alloc_pages(1).unwrap();
    guest.page(page).copy_from(content);
    (page, guest.grant(page, DomId::DOM0, access).unwrap())
}

fn content<const N: usize>(guest: &Domain, page: Gfn) -> [u8; N] {
    let mut bytes = [0; N];
    guest.page(page).copy_to(&mut bytes);
    bytes
}

fn segment(gref: GrantRef, direction: CopyDirection, local: &mut [u8]) -> GrantCopy {
    let len = u16::try_from(local.len()).unwrap();
    GrantCopy { gref, offset: 0, len, local: local.as_mut_ptr(), direction, status: i16::MAX }
}

fn copy_status(grants: &mut SimGrants, domid: DomId, segment: GrantCopy) -> i16 {
    let mut segments = [segment];
    grants.copy(domid, &mut segments).unwrap();
    segments[0].status
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

// Mapping.

#[test]
fn a_mapped_batch_shows_the_guests_pages_in_order() {
    let (_stand_in, guest, mut grants) = rig();
    let [first, second, third] = [b"first ", b"second", b"third "]
        .map(|content| granted_page(&guest, content, PageAccess::ReadWrite));
    let refs = [third.1, first.1, second.1];
    let pages = grants.map(guest.domid(), &refs, PageAccess::ReadWrite).unwrap();
    assert_eq!(pages.count(), 3);
    for (index, expected) in [b"third ", b"first ", b"second"].into_iter().enumerate() {
        let mut seen = [0; 6];
        pages.page(index).copy_to(&mut seen);
        assert_eq!(&seen, expected);
    }
    pages.page(0).copy_from(b"answer");
    assert_eq!(&content(&guest, third.0), b"answer");
    grants.unmap(pages).unwrap();
}

#[test]
fn one_bad_reference_fails_the_whole_batch_and_leaves_nothing_mapped() {
    let (_stand_in, guest, mut grants) = rig();
    let (page, good) = granted_page(&guest, b"", PageAccess::ReadWrite);
    let (_, read_only) = granted_page(&guest, b"", PageAccess::ReadOnly);
    let foreign = guest.grant(page, domid(2), PageAccess::ReadWrite).unwrap();
    let no_such_page = guest.grant(Gfn(512), DomId::DOM0, PageAccess::ReadWrite).unwrap();
    let unused = guest.reserve_refs(1).unwrap()[0];
    let failing = guest.grant(page, DomId::DOM0, PageAccess::ReadWrite).unwrap();
    guest.fail_maps(failing, abi::GNTST_GENERAL_ERROR);
    let outside = GrantRef(SIM_GRANT_ENTRIES);
    let absurd = GrantRef(u32::MAX);

    for bad in [read_only, foreign, no_such_page, unused, failing, outside, absurd] {
        for refs in [[good, bad], [bad, good]] {
            let mapped = grants.map(guest.domid(), &refs, PageAccess::ReadWrite);
            assert_eq!(errno(mapped), libc::EINVAL, "{bad:?}");
            assert_eq!(guest.mapped_grants(), 0, "{bad:?}");
        }
    }
    guest.heal(failing);
    grants.map(guest.domid(), &[good, failing], PageAccess::ReadWrite).unwrap();
}

#[test]
fn a_read_only_grant_may_be_mapped_for_reading() {
    let (_stand_in, guest, mut grants) = rig();
    let (_, gref) = granted_page(&guest, b"seen", PageAccess::ReadOnly);
    let pages = grants.map(guest.domid(), &[gref], PageAccess::ReadOnly).unwrap();
    let mut seen = [0; 4];
    pages.page(0).copy_to(&mut seen);
    assert_eq!(&seen, b"seen");
}

#[test]
fn a_domain_that_does_not_exist_has_nothing_to_map() {
    let (_stand_in, _guest, mut grants) = rig();
    let mapped = grants.map(domid(9), &[GrantRef(8)], PageAccess::ReadWrite);
    assert_eq!(errno(mapped), libc::ESRCH);
}

#[test]
fn a_grant_cannot_be_taken_back_while_it_is_mapped() {
    let (_stand_in, guest, mut grants) = rig();
    let (_, gref) = granted_page(&guest, b"", PageAccess::ReadWrite);
    let once = grants.map(guest.domid(), &[gref], PageAccess::ReadWrite).unwrap();
    let twice = grants.map(guest.domid(), &[gref], PageAccess::ReadOnly).unwrap();
    assert_eq!(guest.mapped_grants(), 1);
    grants.unmap(once).unwrap();
    assert_eq!(guest.end_access(gref), Err(StillMapped(gref)));
    grants.unmap(twice).unwrap();
    assert_eq!(guest.end_access(gref), Ok(()));
    let mapped = grants.map(guest.domid(), &[gref], PageAccess::ReadWrite);
    assert_eq!(errno(mapped), libc::EINVAL);
}

#[test]
fn a_full_batch_maps_and_closing_the_handle_unmaps_it() {
    let (_stand_in, guest, mut grants) = rig();
    let first = guest.alloc_pages(u32::try_from(GRANTS_PER_MAP_BATCH).unwrap()).unwrap();
    let refs = guest.reserve_refs(GRANTS_PER_MAP_BATCH).unwrap();
    for (gfn, gref) in (first.0..).map(Gfn).zip(&refs) {
        guest.permit(*gref, gfn, DomId::DOM0, PageAccess::ReadWrite);
    }
    grants.map(guest.domid(), &refs, PageAccess::ReadWrite).unwrap();
    assert_eq!(guest.mapped_grants(), refs.len());
    drop(grants);
    assert_eq!(guest.mapped_grants(), 0);
}

#[test]
fn a_revoked_page_stays_mapped_and_cannot_be_mapped_again() {
    let (_stand_in, guest, mut grants) = rig();
    let (page, gref) = granted_page(&guest, b"before", PageAccess::ReadWrite);
    let pages = grants.map(guest.domid(), &[gref], PageAccess::ReadWrite).unwrap();
    guest.revoke(gref);
    pages.page(0).copy_from(b"behind");
    assert_eq!(&content(&guest, page), b"behind");
    assert!(grants.map(guest.domid(), &[gref], PageAccess::ReadWrite).is_err());
    grants.unmap(pages).unwrap();
}

// Copying.

#[test]
fn copies_go_both_ways() {
    let (_stand_in, guest, mut grants) = rig();
    let (source, from) = granted_page(&guest, b"from the guest", PageAccess::ReadOnly);
    let (target, to) = granted_page(&guest, b"", PageAccess::ReadWrite);
    let mut fetched = [0; 9];
    let mut stored = *b"to the guest";
    let mut segments = [
        GrantCopy { offset: 5, ..segment(from, CopyDirection::FromGuest, &mut fetched) },
        segment(to, CopyDirection::ToGuest, &mut stored),
    ];
    grants.copy(guest.domid(), &mut segments).unwrap();
    assert_eq!(segments.map(|segment| segment.status), [abi::GNTST_OKAY; 2]);
    assert_eq!(&fetched, b"the guest");
    assert_eq!(&content(&guest, target), b"to the guest");
    assert_eq!(&content(&guest, source), b"from the guest");
    assert_eq!(guest.mapped_grants(), 0);
}

#[test]
fn each_segment_of_a_copy_has_a_status_of_its_own() {
    let (_stand_in, guest, mut grants) = rig();
    let (page, good) = granted_page(&guest, b"good", PageAccess::ReadWrite);
    let (_, read_only) = granted_page(&guest, b"", PageAccess::ReadOnly);
    let foreign = guest.grant(page, domid(2), PageAccess::ReadWrite).unwrap();
    let no_such_page = guest.grant(Gfn(512), DomId::DOM0, PageAccess::ReadWrite).unwrap();
    let failing = guest.grant(page, DomId::DOM0, PageAccess::ReadWrite).unwrap();
    guest.fail_copies(failing, abi::GNTST_BAD_PAGE);
    let (mut fetched, mut ours) = ([0; 4], *b"ours");
    let to_guest = segment(good, CopyDirection::ToGuest, &mut ours);
    let from_guest = segment(good, CopyDirection::FromGuest, &mut fetched);
    let mut segments = [
        GrantCopy { gref: read_only, ..to_guest },
        GrantCopy { gref: foreign, ..to_guest },
        GrantCopy { gref: no_such_page, ..to_guest },
        GrantCopy { gref: GrantRef(SIM_GRANT_ENTRIES), ..to_guest },
        GrantCopy { offset: 4093, ..to_guest },
        GrantCopy { offset: u16::MAX, ..to_guest },
        GrantCopy { gref: failing, ..to_guest },
        from_guest,
        to_guest,
    ];
    grants.copy(guest.domid(), &mut segments).unwrap();
    let expected = [
        abi::GNTST_GENERAL_ERROR,
        abi::GNTST_GENERAL_ERROR,
        abi::GNTST_BAD_PAGE,
        abi::GNTST_BAD_GNTREF,
        abi::GNTST_BAD_COPY_ARG,
        abi::GNTST_BAD_COPY_ARG,
        abi::GNTST_BAD_PAGE,
        abi::GNTST_OKAY,
        abi::GNTST_OKAY,
    ];
    assert_eq!(segments.map(|segment| segment.status), expected);
    assert_eq!(&fetched, b"good");
    assert_eq!(&content(&guest, page), b"ours");
}

#[test]
fn a_copy_reaches_the_guest_that_has_the_domid_now() {
    let (stand_in, guest, mut grants) = rig();
    let (_, gref) = granted_page(&guest, b"old", PageAccess::ReadOnly);
    let mut seen = [0; 3];
    let fetch = segment(gref, CopyDirection::FromGuest, &mut seen);
    assert_eq!(copy_status(&mut grants, domid(1), fetch), abi::GNTST_OKAY);
    drop(guest);
    assert_eq!(copy_status(&mut grants, domid(1), fetch), abi::GNTST_BAD_DOMAIN);

    let guest = stand_in.create_domain(domid(1), 16).unwrap();
    assert_eq!(granted_page(&guest, b"new", PageAccess::ReadOnly).1, gref);
    assert_eq!(copy_status(&mut grants, domid(1), fetch), abi::GNTST_OKAY);
    assert_eq!(&seen, b"new");
}

// Domains.

#[test]
fn a_domid_is_taken_until_its_domain_ends() {
    let (stand_in, guest, mut grants) = rig();
    assert_eq!(errno(stand_in.create_domain(domid(1), 1)), libc::EEXIST);
    let (_, gref) = granted_page(&guest, b"", PageAccess::ReadWrite);
    let zombie = grants.map(domid(1), &[gref], PageAccess::ReadWrite).unwrap();
    let mut events = guest.open_events().unwrap();
    drop(guest);

    let guest = stand_in.create_domain(domid(1), 1).unwrap();
    assert!(events.alloc_unbound(DomId::DOM0).is_err());
    zombie.page(0).zero();
    grants.unmap(zombie).unwrap();
    assert_eq!(guest.mapped_grants(), 0);
}

#[test]
fn pages_and_references_are_finite_and_come_back() {
    let (_stand_in, guest, _) = rig();
    let ring = guest.alloc_pages(4).unwrap();
    let rest = guest.alloc_pages(508).unwrap();
    assert_eq!(errno(guest.alloc_pages(1)), libc::ENOMEM);
    guest.free_pages(ring, 4);
    assert_eq!(guest.alloc_pages(4).unwrap(), ring);
    guest.free_pages(rest, 508);

    let refs = guest.reserve_refs(SIM_GRANT_ENTRIES as usize - 8).unwrap();
    assert_eq!(errno(guest.reserve_refs(1)), libc::ENOSPC);
    guest.release_refs(&refs);
    assert_eq!(guest.reserve_refs(1).unwrap()[0], refs[0]);
}

// Xenstore.

fn as_guest(guest: &Domain) -> StoreClient {
    guest.open_store().unwrap()
}

#[test]
fn dom0_has_its_area_from_the_start() {
    let (stand_in, ..) = rig();
    let dom0 = stand_in.platform().open_store().unwrap();
    assert_eq!(&*dom0.read("/local/domain/0/domid").unwrap(), "0");
    assert_eq!(&*dom0.read("domid").unwrap(), "0");
}

#[test]
fn a_guest_reads_its_area_and_writes_only_where_it_may() {
    let (stand_in, guest, _) = rig();
    let other = stand_in.create_domain(domid(2), 1).unwrap();
    let store = as_guest(&guest);
    assert_eq!(&*store.read("domid").unwrap(), "1");
    assert_eq!(&*store.read("/local/domain/1/name").unwrap(), "guest-1");
    store.write("error/device/vbd/51712/error", "22 no reason").unwrap();
    for path in ["name", "device/vbd", "/local/domain/0/backend", "/local/domain/2/data"] {
        assert_eq!(errno(store.write(path, "")), libc::EACCES, "{path}");
    }
    assert_eq!(errno(as_guest(&other).read("/local/domain/1/name")), libc::EACCES);
}

#[test]
fn a_guests_area_and_connections_go_with_it() {
    let (stand_in, guest, _) = rig();
    let dom0 = stand_in.platform().open_store().unwrap();
    let store = as_guest(&guest);
    drop(guest);
    assert_eq!(errno(dom0.read("/local/domain/1/domid")), libc::ENOENT);
    assert!(store.read("domid").is_err());
}

// Event channels.

/// Both ends of a bound channel: the guest's, then dom0's with its first event taken.
fn channel(stand_in: &StandIn, guest: &Domain) -> ((SimEvents, Port), (SimEvents, Port)) {
    let mut theirs = guest.open_events().unwrap();
    let mut ours = stand_in.platform().open_events().unwrap();
    let their_port = theirs.alloc_unbound(DomId::DOM0).unwrap();
    let port = ours.bind_interdomain(guest.domid(), their_port).unwrap();
    assert_eq!(pending(&mut ours), [port], "a bound port starts pending");
    ours.unmask(&[port]).unwrap();
    ((theirs, their_port), (ours, port))
}

fn pending(events: &mut SimEvents) -> Vec<Port> {
    let mut ports = [Port(0); 8];
    let count = events.pending(&mut ports).unwrap();
    ports[..count].to_vec()
}

fn is_readable(events: &SimEvents) -> bool {
    let fd = events.as_fd().as_raw_fd();
    let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    unsafe { libc::poll(&mut polled, 1, 0) == 1 }
}

#[test]
fn a_notification_makes_the_other_end_pending_once() {
    let (stand_in, guest, _) = rig();
    let ((mut theirs, their_port), (mut ours, port)) = channel(&stand_in, &guest);
    assert!(!is_readable(&ours) && !is_readable(&theirs));

    theirs.notify(their_port).unwrap();
    theirs.notify(their_port).unwrap();
    assert!(is_readable(&ours));
    assert_eq!(pending(&mut ours), [port]);
    assert!(!is_readable(&ours));

    ours.notify(port).unwrap();
    assert_eq!(pending(&mut theirs), [their_port]);
}

#[test]
fn a_port_that_became_pending_is_masked_until_its_unmask() {
    let (stand_in, guest, _) = rig();
    let ((theirs, their_port), (mut ours, port)) = channel(&stand_in, &guest);
    theirs.notify(their_port).unwrap();
    assert_eq!(pending(&mut ours), [port]);

    for _ in 0..1000 {
        theirs.notify(their_port).unwrap();
    }
    assert!(!is_readable(&ours), "a storm does not wake the owner of a masked port");
    assert_eq!(pending(&mut ours), []);
    ours.unmask(&[port]).unwrap();
    assert!(is_readable(&ours));
    assert_eq!(pending(&mut ours), [port]);
    ours.unmask(&[port]).unwrap();
    assert!(!is_readable(&ours));
}

#[test]
fn notifying_an_end_that_nobody_has_bound_is_no_error() {
    let (stand_in, guest, _) = rig();
    let ((theirs, their_port), (mut ours, port)) = channel(&stand_in, &guest);
    ours.unbind(port).unwrap();
    theirs.notify(their_port).unwrap();
    assert_eq!(errno(ours.notify(port)), libc::ENOTCONN);
    assert_eq!(errno(ours.unbind(port)), libc::ENOTCONN);
    assert_eq!(errno(theirs.notify(Port(their_port.0 + 1))), libc::ENOTCONN);
}

#[test]
fn a_new_backend_binds_to_the_port_that_a_dead_one_left() {
    let (stand_in, guest, _) = rig();
    let ((mut theirs, their_port), (ours, _)) = channel(&stand_in, &guest);
    drop(ours);
    theirs.notify(their_port).unwrap();

    let mut ours = stand_in.platform().open_events().unwrap();
    let port = ours.bind_interdomain(guest.domid(), their_port).unwrap();
    pending(&mut ours);
    ours.unmask(&[port]).unwrap();
    theirs.notify(their_port).unwrap();
    assert_eq!(pending(&mut ours), [port]);
    ours.notify(port).unwrap();
    assert_eq!(pending(&mut theirs), [their_port]);
}

#[test]
fn notifications_to_a_lost_peer_go_nowhere() {
    let (stand_in, guest, _) = rig();
    let ((theirs, _), (mut ours, port)) = channel(&stand_in, &guest);
    drop(theirs);
    ours.notify(port).unwrap();
    drop(guest);
    ours.notify(port).unwrap();
    ours.unbind(port).unwrap();
}

#[test]
fn only_a_port_that_waits_for_us_can_be_bound() {
    let (stand_in, guest, _) = rig();
    let mut theirs = guest.open_events().unwrap();
    let mut ours = stand_in.platform().open_events().unwrap();
    let for_another = theirs.alloc_unbound(domid(2)).unwrap();
    for port in [for_another, Port(0), Port(u32::MAX)] {
        assert_eq!(errno(ours.bind_interdomain(guest.domid(), port)), libc::EINVAL);
    }
}

#[test]
fn a_thousand_channels_in_one_process_do_not_mix() {
    let (stand_in, guest, _) = rig();
    let mut ours = stand_in.platform().open_events().unwrap();
    let mut channels: Vec<(SimEvents, Port, Port)> = (0..1000)
        .map(|_| {
            let mut theirs = guest.open_events().unwrap();
            let their_port = theirs.alloc_unbound(DomId::DOM0).unwrap();
            let port = ours.bind_interdomain(guest.domid(), their_port).unwrap();
            (theirs, their_port, port)
        })
        .collect();
    let mut ports = vec![Port(0); 1024];
    assert_eq!(ours.pending(&mut ports).unwrap(), 1000);
    ours.unmask(&ports[..1000]).unwrap();

    for (theirs, their_port, _) in channels.iter().step_by(100) {
        theirs.notify(*their_port).unwrap();
    }
    let count = ours.pending(&mut ports).unwrap();
    let notified: Vec<Port> = channels.iter().step_by(100).map(|channel| channel.2).collect();
    assert_eq!(ports[..count], notified);

    for (index, (theirs, their_port, port)) in channels.iter_mut().enumerate() {
        assert!(!is_readable(theirs), "channel {index}");
        ours.notify(*port).unwrap();
        assert_eq!(pending(theirs), [*their_port]);
    }
}

#[test]
fn more_pending_ports_than_asked_for_leave_the_descriptor_readable() {
    let (stand_in, guest, _) = rig();
    let mut theirs = guest.open_events().unwrap();
    let mut ours = stand_in.platform().open_events().unwrap();
    for _ in 0..10 {
        let port = theirs.alloc_unbound(DomId::DOM0).unwrap();
        ours.bind_interdomain(guest.domid(), port).unwrap();
    }
    assert_eq!(pending(&mut ours).len(), 8);
    assert!(is_readable(&ours));
    assert_eq!(pending(&mut ours).len(), 2);
}

// Several processes.

const ROLE: &str = "STAND_IN_TEST_ROLE";
const RUN_FOLDER: &str = "STAND_IN_TEST_FOLDER";
const NUMBERS: &str = "STAND_IN_TEST_NUMBERS";

/// Runs this test program again, as another process that plays `role`.
fn process(stand_in: &StandIn, role: &str, numbers: [u32; 2]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "another_process_plays_its_role", "--nocapture"])
        .env(ROLE, role)
        .env(RUN_FOLDER, stand_in.folder())
        .env(NUMBERS, format!("{} {}", numbers[0], numbers[1]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Not a test itself: the other process, which [`process`] starts.
#[test]
fn another_process_plays_its_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    if role == "guest" {
        return play_guest();
    }
    let xen = SimXen::connect(&PathBuf::from(std::env::var_os(RUN_FOLDER).unwrap()));
    let numbers = std::env::var(NUMBERS).unwrap();
    let (gref, port) = numbers.split_once(' ').unwrap();
    let (gref, port) = (gref.parse().unwrap(), port.parse().unwrap());

    let mut grants = xen.open_grants().unwrap();
    let mut events = xen.open_events().unwrap();
    let port = events.bind_interdomain(domid(1), port).unwrap();
    let pages = grants.map(domid(1), &[gref], PageAccess::ReadWrite).unwrap();
    pending(&mut events);
    events.unmask(&[port]).unwrap();
    println!("\nready");
    match role.as_str() {
        "holds" => {
            let _ = io::stdin().read(&mut [0]);
        }
        "answers" => {
            park::sleep(&[events.as_fd()], None);
            let mut question = [0; 4];
            pages.page(0).copy_to(&mut question);
            question.reverse();
            pages.page(0).copy_from(&question);
            events.notify(port).unwrap();
            grants.unmap(pages).unwrap();
        }
        other => panic!("{other} is no role"),
    }
}

fn play_guest() {
    let folder = PathBuf::from(std::env::var_os(RUN_FOLDER).unwrap());
    let guest = Domain::create(&Endpoint::at(&folder), domid(7), 16).unwrap();
    let (_, gref) = granted_page(&guest, b"far away", PageAccess::ReadOnly);
    let mut events = guest.open_events().unwrap();
    let port = events.alloc_unbound(DomId::DOM0).unwrap();
    as_guest(&guest).write("data/numbers", &format!("{gref} {port}")).unwrap();
    println!("\nready");
    let _ = io::stdin().read(&mut [0]);
}

fn await_ready(child: &mut Child) -> BufReader<ChildStdout> {
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line != "ready\n" {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the process ended early");
    }
    output
}

#[test]
fn a_killed_process_loses_what_it_had_mapped_and_bound() {
    let (stand_in, guest, _) = rig();
    let (_, gref) = granted_page(&guest, b"", PageAccess::ReadWrite);
    let mut theirs = guest.open_events().unwrap();
    let port = theirs.alloc_unbound(DomId::DOM0).unwrap();
    let mut child = process(&stand_in, "holds", [gref.0, port.0]);
    let _output = await_ready(&mut child);
    assert_eq!(guest.end_access(gref), Err(StillMapped(gref)));

    child.kill().unwrap();
    child.wait().unwrap();
    // The hypervisor learns of it from the closed sockets, a little later.
    while guest.mapped_grants() != 0 {
        std::thread::yield_now();
    }
    assert_eq!(guest.end_access(gref), Ok(()));
    let mut ours = stand_in.platform().open_events().unwrap();
    while ours.bind_interdomain(guest.domid(), port).is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn two_processes_exchange_data_and_notifications() {
    let (stand_in, guest, _) = rig();
    let (page, gref) = granted_page(&guest, b"ping", PageAccess::ReadWrite);
    let mut theirs = guest.open_events().unwrap();
    let port = theirs.alloc_unbound(DomId::DOM0).unwrap();
    let mut child = process(&stand_in, "answers", [gref.0, port.0]);
    let _output = await_ready(&mut child);

    theirs.notify(port).unwrap();
    park::sleep(&[theirs.as_fd()], None);
    assert_eq!(pending(&mut theirs), [port]);
    assert_eq!(&content(&guest, page), b"gnip");
    assert!(child.wait().unwrap().success());
    assert_eq!(guest.mapped_grants(), 0);
}

#[test]
fn a_guest_in_another_process_is_like_any_other_and_ends_with_it() {
    let stand_in = StandIn::start_temporary().unwrap();
    let xen = stand_in.platform();
    let (store, mut grants) = (xen.open_store().unwrap(), xen.open_grants().unwrap());
    let mut events = xen.open_events().unwrap();
    let mut child = process(&stand_in, "guest", [0, 0]);
    let _output = await_ready(&mut child);

    let numbers = store.read("/local/domain/7/data/numbers").unwrap();
    let (gref, port) = numbers.split_once(' ').unwrap();
    let (gref, their_port) = (gref.parse().unwrap(), port.parse().unwrap());
    let port = events.bind_interdomain(domid(7), their_port).unwrap();
    let mut seen = [0; 8];
    let fetch = segment(gref, CopyDirection::FromGuest, &mut seen);
    assert_eq!(copy_status(&mut grants, domid(7), fetch), abi::GNTST_OKAY);
    assert_eq!(&seen, b"far away");

    child.kill().unwrap();
    child.wait().unwrap();
    while copy_status(&mut grants, domid(7), fetch) != abi::GNTST_BAD_DOMAIN {
        std::thread::yield_now();
    }
    while store.read("/local/domain/7/domid").is_ok() {
        std::thread::yield_now();
    }
    events.notify(port).unwrap();
    stand_in.create_domain(domid(7), 16).unwrap();
}

#[test]
fn a_folder_that_a_killed_stand_in_left_can_be_used_again() {
    let folder = tempfile::tempdir().unwrap();
    for socket in ["xenstore.sock", "hypervisor.sock"] {
        // Closing a listener leaves its socket in the folder, as a killed process does.
        drop(UnixListener::bind(folder.path().join(socket)).unwrap());
    }
    let _stand_in = StandIn::start(folder.path()).unwrap();
    assert!(StandIn::start(folder.path()).is_err(), "a running stand-in is not replaced");
}
