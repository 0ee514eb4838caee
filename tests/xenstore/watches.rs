//! Watches: when they fire, for whom, and that no change is missed.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use polldisk::limits::WATCH_EVENTS_KEPT;
use polldisk::park;
use polldisk::sim::store::Quota;
use polldisk::xen::store::StoreClient;
use polldisk::xen::{Nodes, Store, WatchEvent};
use xenstore_rs::{Xs, XsTransaction, XsTransactionSpan};

use crate::{Bench, dom, errno, events, permissions};

fn is_readable(client: &StoreClient) -> bool {
    let mut poll = mio::Poll::new().unwrap();
    let fd = client.as_fd().as_raw_fd();
    let source = &mut mio::unix::SourceFd(&fd);
    poll.registry().register(source, mio::Token(0), mio::Interest::READABLE).unwrap();
    let mut events = mio::Events::with_capacity(1);
    poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
    !events.is_empty()
}

/// Waits for an event as the control thread does.
fn wait_for_event(client: &StoreClient) -> WatchEvent {
    loop {
        if let Some(event) = client.next_event().unwrap() {
            return event;
        }
        park::sleep(&[client.as_fd()], None);
    }
}

#[test]
fn a_watch_fires_at_once_and_for_its_node_and_all_below() {
    let bench = Bench::new();
    let (store, other) = (bench.dom0(), bench.dom0());
    store.watch("/a/b", "t").unwrap();
    assert_eq!(events(&store), ["/a/b t"]);
    other.write("/a/b", "1").unwrap();
    other.write("/a/b/c/d", "1").unwrap();
    other.write("/a/bc", "not below").unwrap();
    other.set_permissions("/a/b/c", &permissions("r0")).unwrap();
    assert_eq!(events(&store), ["/a/b t", "/a/b/c/d t", "/a/b/c t"]);
    other.mkdir("/a/b").unwrap();
    other.rm("/a/b/missing").unwrap();
    assert!(events(&store).is_empty());
    other.rm("/a").unwrap();
    assert_eq!(events(&store), ["/a/b t"]);
}

#[test]
fn a_watch_is_made_and_ended_once() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("/a", "t").unwrap();
    assert_eq!(errno(store.watch("/a", "t")), libc::EEXIST);
    store.write("/a", "1").unwrap();
    assert_eq!(events(&store), ["/a t"]);
    store.unwatch("/a", "t").unwrap();
    assert_eq!(errno(store.unwatch("/a", "t")), libc::ENOENT);
    assert_eq!(errno(store.watch("not a path", "t")), libc::EINVAL);
    store.write("/a", "2").unwrap();
    assert!(events(&store).is_empty());
}

#[test]
fn an_ended_watch_sends_nothing_more_not_even_kept_events() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("/a", "one").unwrap();
    store.watch("/a", "two").unwrap();
    store.write("/a", "1").unwrap();
    store.unwatch("/a", "one").unwrap();
    assert_eq!(events(&store), ["/a two"]);
}

#[test]
fn a_transactions_changes_fire_when_it_is_committed() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("/a", "t").unwrap();
    events(&store);
    let span = store.transaction().unwrap();
    span.write("/a/x", "1").unwrap();
    span.write("/a/y", "1").unwrap();
    span.write("/a/x", "2").unwrap();
    assert!(events(&store).is_empty());
    span.commit().unwrap();
    assert_eq!(events(&store), ["/a/x t", "/a/y t"]);
    let span = store.transaction().unwrap();
    span.rm("/a").unwrap();
    drop(span);
    assert!(events(&store).is_empty());
}

#[test]
fn a_relative_watch_reports_relative_paths() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("backend/vbd", "t").unwrap();
    store.write("/local/domain/0/backend/vbd/5/51712/state", "1").unwrap();
    assert_eq!(events(&store), ["backend/vbd t", "backend/vbd/5/51712/state t"]);
    store.rm("/local/domain/0/backend").unwrap();
    assert_eq!(events(&store), ["backend/vbd t"]);
}

#[test]
fn domains_that_come_and_go_fire_the_special_watches() {
    let bench = Bench::new();
    let store = bench.dom0();
    let guest = bench.guest_at_home(5);
    for client in [&store, &guest] {
        client.watch("@introduceDomain", "in").unwrap();
        client.watch("@releaseDomain", "out").unwrap();
        assert_eq!(events(client), ["@introduceDomain in", "@releaseDomain out"]);
    }
    bench.server.introduce(dom(9)).unwrap();
    assert_eq!(events(&store), ["@introduceDomain in"]);
    bench.server.introduce(dom(9)).unwrap();
    assert!(events(&store).is_empty());
    bench.server.release(dom(9)).unwrap();
    assert_eq!(events(&store), ["@releaseDomain out"]);
    assert!(events(&guest).is_empty());
    store.set_permissions("@releaseDomain", &permissions("n0 r5")).unwrap();
    events(&guest);
    bench.server.release(dom(9)).unwrap();
    assert_eq!(events(&guest), ["@releaseDomain out"]);
}

#[test]
fn a_guest_learns_of_no_change_that_it_may_not_see() {
    let bench = Bench::new();
    let store = bench.dom0();
    let guest = bench.guest_at_home(5);
    guest.watch("/", "all").unwrap();
    events(&guest);
    store.write("/secret/a", "1").unwrap();
    assert!(events(&guest).is_empty());
    store.set_permissions("/secret/a", &permissions("n0 r5")).unwrap();
    store.write("/secret/a", "2").unwrap();
    assert_eq!(events(&guest), ["/secret/a all"]);
    store.set_permissions("/secret/a", &permissions("n0")).unwrap();
    assert_eq!(events(&guest), ["/secret/a all"]);
    store.write("/secret/a", "3").unwrap();
    assert!(events(&guest).is_empty());
}

#[test]
fn the_descriptor_is_readable_while_an_event_is_kept() {
    let bench = Bench::new();
    let (store, other) = (bench.dom0(), bench.dom0());
    assert!(!is_readable(&store));
    store.watch("/a", "t").unwrap();
    other.write("/a", "1").unwrap();
    // Events come before the answer, so reading the answer reads them too.
    while !is_readable(&store) {
        store.read("/a").unwrap();
    }
    store.read("/a").unwrap();
    assert!(is_readable(&store));
    assert!(store.next_event().unwrap().is_some());
    while store.next_event().unwrap().is_some() {}
    assert!(!is_readable(&store));
    other.write("/a", "2").unwrap();
    assert_eq!(wait_for_event(&store).path, "/a");
}

#[test]
fn a_client_that_is_busy_keeps_a_bounded_number_of_events_and_misses_no_change() {
    let bench = Bench::new();
    let (store, other) = (bench.dom0(), bench.dom0());
    store.watch("/a", "t").unwrap();
    events(&store);
    for n in 0..WATCH_EVENTS_KEPT + 500 {
        other.write(&format!("/a/{n}"), "").unwrap();
        if n % 50 == 0 {
            store.read("/a").unwrap();
        }
    }
    let seen = events(&store);
    let kept = (0..WATCH_EVENTS_KEPT).map(|n| format!("/a/{n} t"));
    // One event stands for all beyond the bound.
    let expected: Vec<String> = kept.chain(["/a t".to_owned()]).collect();
    assert!(seen == expected, "{} events, the last {:?}", seen.len(), seen.last());
}

#[test]
fn a_reader_that_sleeps_blocks_nobody_and_misses_no_change() {
    let bench = Bench::with(Quota { outstanding_bytes: 4096, ..Quota::default() });
    let store = bench.dom0();
    let guest = bench.guest_at_home(5);
    guest.watch("/local/domain/5/a", "t").unwrap();
    guest.watch("b", "t").unwrap();
    // Far more than the kernel's socket buffer and the server's bound hold.
    let long = "x".repeat(1000);
    for n in 0..5_000 {
        store.write(&format!("/local/domain/5/a/{long}{n}"), "").unwrap();
    }
    store.write("/local/domain/5/b/last", "").unwrap();
    let mut seen = vec![wait_for_event(&guest).path, wait_for_event(&guest).path];
    assert_eq!(seen, ["/local/domain/5/a", "b"]);
    while seen.len() < 3 || !seen[2..].iter().any(|path| path == "b" || path == "b/last") {
        seen.push(wait_for_event(&guest).path);
    }
    assert!(seen.len() < 2_500, "{} events were kept", seen.len());
    assert!(seen[2..].iter().any(|path| path == "/local/domain/5/a"));
}
