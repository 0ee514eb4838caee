//! Nodes, transactions, permissions, quotas, domains.

use std::io::{self, ErrorKind};

use polldisk::sim::store::Quota;
use polldisk::xen::store::wire::Op;
use polldisk::xen::{Nodes, Store};
use xenstore_rs::{Xs, XsTransaction, XsTransactionSpan};

use crate::{Bench, Raw, dom, errno, events, permissions};

#[test]
fn what_is_written_can_be_read_and_missing_parents_are_made() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/a/b/c", "v").unwrap();
    assert_eq!(&*store.read("/a/b/c").unwrap(), "v");
    assert_eq!(&*store.read("/a/b").unwrap(), "");
    store.mkdir("/a/b/c").unwrap();
    assert_eq!(&*store.read("/a/b/c").unwrap(), "v");
    store.mkdir("/a/a").unwrap();
    assert_eq!(store.directory("/a").unwrap(), ["a".into(), "b".into()]);
    assert!(store.directory("/a/a").unwrap().is_empty());
    assert_eq!(store.read("/x").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.directory("/x").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn nodes_written_together_are_in_order_and_one_refusal_stops_none_of_the_others() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("/a", "token").unwrap();
    // More than are sent at once, with events between the answers.
    let names: Vec<String> = (0..100).map(|index| format!("n{}", index % 90)).collect();
    let nodes: Vec<_> =
        names.iter().enumerate().map(|(index, name)| (&**name, index.to_string())).collect();
    store.write_all("/a", &nodes).unwrap();
    assert_eq!(&*store.read("/a/n5").unwrap(), "95");
    assert_eq!(&*store.read("/a/n89").unwrap(), "89");
    assert_eq!(store.directory("/a").unwrap().len(), 90);

    let nodes = [("x", "1"), ("no//path", "2"), ("\u{e4}", "3"), ("y", "4")];
    let nodes = nodes.map(|(node, value)| (node, value.to_owned()));
    assert_eq!(errno(store.write_all("/b", &nodes)), libc::EINVAL);
    assert_eq!(&*store.read("/b/x").unwrap(), "1");
    assert_eq!(&*store.read("/b/y").unwrap(), "4");
    let long = [("z", "v".repeat(4096))];
    assert_eq!(errno(store.write_all("/b", &long)), libc::E2BIG);
    assert_eq!(errno(store.read("/b/z")), libc::ENOENT);
    let span = store.transaction().unwrap();
    span.write_all("/c", &[("x", "1".to_owned())]).unwrap();
    assert_eq!(errno(store.read("/c/x")), libc::ENOENT);
    span.commit().unwrap();
    assert_eq!(&*store.read("/c/x").unwrap(), "1");
}

#[test]
fn nodes_read_together_are_in_order_each_with_its_own_error() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("/a", "token").unwrap();
    // More than are sent at once, each nearly as long as a message may be, with events in between.
    let names: Vec<String> = (0..100).map(|index| format!("n{index}")).collect();
    let long = |index: usize| format!("{index:04}").repeat(1000);
    for (index, name) in names.iter().enumerate().filter(|(index, _)| index % 3 != 0) {
        bench.dom0().write(&format!("/a/{name}"), &long(index)).unwrap();
    }
    let nodes: Vec<&str> = names.iter().map(String::as_str).collect();
    let texts = store.read_all("/a", &nodes).unwrap();
    assert_eq!(texts.len(), 100);
    for (index, text) in texts.into_iter().enumerate() {
        match index % 3 {
            0 => assert_eq!(errno(text), libc::ENOENT, "{index}"),
            _ => assert_eq!(*text.unwrap(), long(index), "{index}"),
        }
    }
    assert_eq!(store.read_all("/a", &["n1", "a\0b"]).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(store.next_event().unwrap().is_some(), "events between answers are kept");
    let span = store.transaction().unwrap();
    span.write("/a/n0", "new").unwrap();
    assert_eq!(&**span.read_all("/a", &["n0"]).unwrap()[0].as_ref().unwrap(), "new");
    assert_eq!(errno(store.read("/a/n0")), libc::ENOENT);
}

#[test]
fn removing_takes_all_below_and_a_missing_node_is_fine_if_its_parent_exists() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/a/b/c", "v").unwrap();
    store.rm("/a/b").unwrap();
    assert_eq!(errno(store.read("/a/b/c")), libc::ENOENT);
    store.rm("/a/b").unwrap();
    assert_eq!(errno(store.rm("/a/b/c")), libc::ENOENT);
    assert_eq!(errno(store.rm("/")), libc::EINVAL);
}

#[test]
fn relative_paths_are_below_the_domains_home() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("backend/x", "1").unwrap();
    assert_eq!(&*store.read("/local/domain/0/backend/x").unwrap(), "1");
    let guest = bench.guest_at_home(7);
    guest.write("device/y", "2").unwrap();
    assert_eq!(&*store.read("/local/domain/7/device/y").unwrap(), "2");
    assert_eq!(store.domain_path(dom(7)).unwrap(), "/local/domain/7");
}

#[test]
fn a_transaction_is_invisible_until_it_is_committed() {
    let bench = Bench::new();
    let (store, other) = (bench.dom0(), bench.dom0());
    store.write("/a", "old").unwrap();
    let span = store.transaction().unwrap();
    span.write("/a", "new").unwrap();
    span.write("/b/c", "more").unwrap();
    assert_eq!(&*span.read("/a").unwrap(), "new");
    assert_eq!(&*other.read("/a").unwrap(), "old");
    assert_eq!(&*store.read("/a").unwrap(), "old");
    span.commit().unwrap();
    assert_eq!(&*other.read("/a").unwrap(), "new");
    assert_eq!(&*other.read("/b/c").unwrap(), "more");
}

#[test]
fn a_dropped_transaction_is_aborted() {
    let bench = Bench::with(Quota { transactions: 1, ..Quota::default() });
    let guest = bench.guest_at_home(5);
    for _ in 0..3 {
        let span = guest.transaction().unwrap();
        span.write("data", "1").unwrap();
        assert_eq!(errno(guest.transaction()), libc::ENOSPC);
    }
    assert_eq!(errno(guest.read("data")), libc::ENOENT);
}

#[test]
fn a_transaction_fails_with_eagain_if_something_it_saw_has_changed() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/a", "1").unwrap();
    store.write("/dir/x", "1").unwrap();
    type Act = fn(&dyn Xs);
    let meetings: [(Act, Act); 5] = [
        (|tx| drop(tx.read("/a")), |other| other.write("/a", "2").unwrap()),
        (|tx| tx.write("/a", "3").unwrap(), |other| other.write("/a", "2").unwrap()),
        (|tx| drop(tx.directory("/dir")), |other| other.write("/dir/y", "1").unwrap()),
        (|tx| drop(tx.read("/missing")), |other| other.write("/missing", "").unwrap()),
        (|tx| tx.rm("/dir").unwrap(), |other| other.write("/dir/x", "2").unwrap()),
    ];
    for (index, (within, meanwhile)) in meetings.into_iter().enumerate() {
        let span = store.transaction().unwrap();
        within(&span);
        meanwhile(&store);
        assert_eq!(errno(span.commit()), libc::EAGAIN, "case {index}");
    }
    let span = store.transaction().unwrap();
    span.read("/a").unwrap();
    span.write("/dir/z", "1").unwrap();
    store.write("/elsewhere", "1").unwrap();
    span.commit().unwrap();
}

#[test]
fn atomically_tries_again_until_nobody_interferes() {
    let bench = Bench::new();
    let (store, other) = (bench.dom0(), bench.dom0());
    store.write("/n", "0").unwrap();
    let tries = std::cell::Cell::new(0);
    let result = store.atomically(|span| {
        let n: u32 = span.read("/n")?.parse().unwrap();
        tries.set(tries.get() + 1);
        if tries.get() < 3 {
            other.write("/n", &(n + 10).to_string())?;
        }
        span.write("/n", &(n + 1).to_string())?;
        Ok(n)
    });
    assert_eq!((result.unwrap(), tries.get()), (20, 3));
    assert_eq!(&*store.read("/n").unwrap(), "21");
    let refused: io::Result<()> = store.atomically(|span| {
        span.write("/n", "lost")?;
        Err(io::Error::other("no"))
    });
    assert_eq!(refused.unwrap_err().to_string(), "no");
    assert_eq!(&*store.read("/n").unwrap(), "21");
}

#[test]
fn four_threads_count_in_transactions_and_lose_nothing() {
    let bench = Bench::new();
    bench.dom0().write("/n", "0").unwrap();
    let count_up = || {
        let store = bench.dom0();
        for _ in 0..50 {
            while let Err(error) = store.atomically(|span| {
                let n: u32 = span.read("/n")?.parse().unwrap();
                span.write("/n", &(n + 1).to_string())
            }) {
                assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(count_up);
        }
    });
    assert_eq!(&*bench.dom0().read("/n").unwrap(), "200");
}

#[test]
fn a_guest_reaches_only_what_it_may() {
    let bench = Bench::new();
    let store = bench.dom0();
    let guest = bench.guest_at_home(5);
    store.write("/secret", "s").unwrap();
    store.write("/open", "o").unwrap();
    store.set_permissions("/open", &permissions("r0 n6")).unwrap();
    assert_eq!(errno(guest.read("/secret")), libc::EACCES);
    assert_eq!(errno(guest.read("/secret/missing")), libc::EACCES);
    assert_eq!(&*guest.read("/open").unwrap(), "o");
    assert_eq!(errno(guest.read("/open/missing")), libc::ENOENT);
    assert_eq!(errno(guest.write("/open", "x")), libc::EACCES);
    assert_eq!(errno(guest.rm("/open")), libc::EACCES);
    assert_eq!(errno(guest.mkdir("/open/below")), libc::EACCES);
    assert_eq!(errno(bench.guest(6).read("/open")), libc::EACCES);
    assert_eq!(errno(guest.set_permissions("/open", &permissions("b5"))), libc::EACCES);
}

#[test]
fn a_guest_owns_what_it_creates_and_cannot_give_it_away() {
    let bench = Bench::new();
    let (guest, other) = (bench.guest_at_home(5), bench.guest(6));
    guest.write("own", "1").unwrap();
    assert_eq!(guest.permissions("own").unwrap(), permissions("n5"));
    assert_eq!(errno(other.read("/local/domain/5/own")), libc::EACCES);
    guest.set_permissions("own", &permissions("n5 b6")).unwrap();
    other.write("/local/domain/5/own", "2").unwrap();
    other.write("/local/domain/5/own/below", "3").unwrap();
    let inherited = other.permissions("/local/domain/5/own/below").unwrap();
    assert_eq!(inherited, permissions("n6 b6"));
    assert_eq!(errno(guest.set_permissions("own", &permissions("n6"))), libc::EPERM);
    bench.dom0().set_permissions("/local/domain/5/own", &permissions("n6")).unwrap();
    assert_eq!(errno(guest.read("own")), libc::EACCES);
}

#[test]
fn only_dom0_manages_domains() {
    let bench = Bench::new();
    let mut guest = Raw::new(bench.stream_of(5));
    for (op, payload) in [
        (Op::Introduce, "7\x001\x001\0"),
        (Op::Release, "7\0"),
        (Op::SetTarget, "5\x000\0"),
        (Op::Control, "check\0"),
    ] {
        assert_eq!(guest.ask(op, payload.as_bytes()), (Op::Error, "EACCES\0".into()));
    }
    let mut dom0 = bench.raw_dom0();
    let is_introduced = |answer: &str| (Op::IsDomainIntroduced, answer.to_owned());
    assert_eq!(dom0.ask(Op::IsDomainIntroduced, b"7\0"), is_introduced("F\0"));
    assert_eq!(dom0.ask(Op::Introduce, b"7\x001\x000\0"), (Op::Error, "EINVAL\0".into()));
    assert_eq!(dom0.ask(Op::Introduce, b"7\x001\x001\0").0, Op::Introduce);
    assert_eq!(dom0.ask(Op::IsDomainIntroduced, b"7\0"), is_introduced("T\0"));
    assert_eq!(dom0.ask(Op::Resume, b"7\0").0, Op::Resume);
    assert_eq!(dom0.ask(Op::Release, b"7\0").0, Op::Release);
    assert_eq!(dom0.ask(Op::Release, b"7\0"), (Op::Error, "ENOENT\0".into()));
    assert_eq!(dom0.ask(Op::Control, b"check\0"), (Op::Control, "OK\0".into()));
}

#[test]
fn a_device_model_has_the_rights_of_its_target() {
    let bench = Bench::new();
    bench.guest_at_home(5).write("own", "1").unwrap();
    for domid in [5, 6] {
        bench.server.introduce(dom(domid)).unwrap();
    }
    let stub = bench.guest(6);
    assert_eq!(errno(stub.read("/local/domain/5/own")), libc::EACCES);
    assert_eq!(bench.raw_dom0().ask(Op::SetTarget, b"6\x005\0").0, Op::SetTarget);
    assert_eq!(&*stub.read("/local/domain/5/own").unwrap(), "1");
}

#[test]
fn a_released_domain_loses_connection_nodes_and_rights() {
    let bench = Bench::new();
    let store = bench.dom0();
    let guest = bench.guest_at_home(5);
    bench.server.introduce(dom(5)).unwrap();
    guest.write("device/vbd/51712/state", "1").unwrap();
    store.write("/shared", "1").unwrap();
    store.set_permissions("/shared", &permissions("n0 r5 r6")).unwrap();
    store.watch("/local/domain/5", "t").unwrap();
    events(&store);
    bench.server.release(dom(5)).unwrap();
    assert_eq!(guest.read("device").unwrap_err().kind(), ErrorKind::NotConnected);
    assert_eq!(errno(store.read("/local/domain/5")), libc::ENOENT);
    assert_eq!(events(&store), ["/local/domain/5 t"]);
    assert_eq!(store.permissions("/shared").unwrap(), permissions("n0 r6"));
}

#[test]
fn a_directory_of_thousands_is_listed_whole() {
    let bench = Bench::new();
    let store = bench.dom0();
    let span = store.transaction().unwrap();
    let names: Vec<Box<str>> = (10_000..15_000).map(|n| format!("node-{n}").into()).collect();
    for name in &names {
        span.mkdir(&format!("/big/{name}")).unwrap();
    }
    assert_eq!(span.directory("/big").unwrap(), names);
    span.commit().unwrap();
    assert_eq!(store.directory("/big").unwrap(), names);
}

#[test]
fn quotas_hold_for_guests_and_not_for_dom0() {
    let quota =
        Quota { nodes: 10, watches: 3, node_bytes: 100, permissions: 2, ..Quota::default() };
    let bench = Bench::with(quota);
    let guest = bench.guest_at_home(5);
    for n in 0..9 {
        guest.write(&n.to_string(), "v").unwrap();
    }
    assert_eq!(errno(guest.write("x", "v")), libc::ENOSPC);
    guest.rm("0").unwrap();
    assert_eq!(errno(guest.write("x/y", "v")), libc::ENOSPC);
    assert_eq!(errno(guest.read("x")), libc::ENOENT);
    assert_eq!(errno(guest.write("1", &"v".repeat(100))), libc::ENOSPC);
    assert_eq!(errno(guest.mkdir(&"n".repeat(100))), libc::ENOSPC);
    assert_eq!(errno(guest.set_permissions("1", &permissions("n5 r6 r7"))), libc::ENOSPC);
    for n in 0..3 {
        guest.watch(&n.to_string(), "t").unwrap();
    }
    assert_eq!(errno(guest.watch("x", "t")), libc::ENOSPC);
    assert_eq!(errno(bench.guest(5).watch("x", "t")), libc::ENOSPC);
    bench.guest(6).watch("x", "t").unwrap();
    let store = bench.dom0();
    for n in 0..20 {
        store.write(&format!("/many/{n}"), &"v".repeat(1000)).unwrap();
        store.watch(&n.to_string(), "t").unwrap();
    }
}

#[test]
fn nodes_created_in_a_transaction_count_when_it_is_committed() {
    let bench = Bench::with(Quota { nodes: 4, ..Quota::default() });
    let guest = bench.guest_at_home(5);
    let span = guest.transaction().unwrap();
    span.write("a", "").unwrap();
    span.write("b", "").unwrap();
    for name in ["c", "d"] {
        bench.dom0().write(&format!("/elsewhere/{name}"), "").unwrap();
        let path = format!("/elsewhere/{name}");
        bench.dom0().set_permissions(&path, &permissions("n5")).unwrap();
    }
    assert_eq!(errno(span.commit()), libc::ENOSPC);
    assert_eq!(errno(guest.read("a")), libc::ENOENT);
}

#[test]
fn a_transaction_that_touches_too_much_cannot_be_committed() {
    let bench = Bench::with(Quota { transaction_nodes: 10, ..Quota::default() });
    let guest = bench.guest_at_home(5);
    let span = guest.transaction().unwrap();
    let refused = (0..20).find_map(|n| span.write(&n.to_string(), "v").err()).unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(errno(span.commit()), libc::ENOMEM);
    assert!(guest.directory("/local/domain/5").unwrap().is_empty());
}
