//! The stand-in for Xen, as backends and guests use it.
#![allow(missing_docs, unsafe_code)]

use std::io::ErrorKind;
use std::sync::atomic::Ordering;

use polldisk::park;
use polldisk::sim::domain::StillMapped;
use polldisk::sim::grants::SimGrants;
use polldisk::sim::{Domain, Gfn, SimXen, StandIn};
use polldisk::units::{DomId, GrantRef, Port};
use polldisk::xen::abi;
use polldisk::xen::shm::PAGE_BYTES;
use polldisk::xen::{CopyDirection, Events, GrantCopy, Grants, PageAccess, Platform};
use std::os::fd::AsFd;
use std::time::Duration;

const OUTSIDE_THE_TABLE: GrantRef = GrantRef(u32::MAX);

fn domid(raw: u32) -> DomId {
    DomId::try_from(raw).unwrap()
}

fn stand_in_with_guest() -> (StandIn, Domain) {
    let stand_in = StandIn::start_temporary().unwrap();
    let guest = stand_in.create_domain(domid(1), 64).unwrap();
    (stand_in, guest)
}

fn granted_page(guest: &Domain, content: &[u8], access: PageAccess) -> (Gfn, GrantRef) {
    let page = guest.alloc_pages(1).unwrap();
    guest.page(page).copy_from(content);
    (page, guest.grant(page, DomId::DOM0, access).unwrap())
}

fn is_readable(fd: &impl AsFd) -> bool {
    let mut polled = libc::pollfd {
        fd: std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&mut polled, 1, 0) == 1 }
}

fn pending(events: &mut impl Events) -> Vec<Port> {
    let mut ports = [Port(0); 8];
    let count = events.pending(&mut ports).unwrap();
    ports[..count].to_vec()
}

// Mapping.

#[test]
fn a_mapped_batch_shows_the_guests_pages_in_order() {
    let (stand_in, guest) = stand_in_with_guest();
    let mut grants = stand_in.platform().open_grants().unwrap();
    let first = granted_page(&guest, b"first", PageAccess::ReadWrite);
    let second = granted_page(&guest, b"second", PageAccess::ReadWrite);
    let third = granted_page(&guest, b"third", PageAccess::ReadWrite);

    let refs = [third.1, first.1, second.1];
    let pages = grants.map(guest.domid(), &refs, PageAccess::ReadWrite).unwrap();
    for (index, content) in [b"third ", b"first ", b"second"].iter().enumerate() {
        let mut seen = [0; 5];
        pages.page(index).copy_to(&mut seen);
        assert_eq!(seen, content[..5]);
    }
    pages.page(0).copy_from(b"answer");
    let mut seen = [0; 6];
    guest.page(third.0).copy_to(&mut seen);
    assert_eq!(&seen, b"answer");
    assert_eq!(guest.mapped_grants(), 3);
    grants.unmap(pages).unwrap();
    assert_eq!(guest.mapped_grants(), 0);
}
