//! What goes wrong: values that are not text, lost connections, nonsense, floods.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use polldisk::limits::XENSTORE_PAYLOAD_MAX;
use polldisk::sim::store::{Quota, StoreServer};
use polldisk::xen::store::StoreClient;
use polldisk::xen::store::wire::Op;
use polldisk::xen::{Nodes, Store};
use xenstore_rs::{Xs, XsTransaction};

use crate::{Bench, Raw, errno, message};

#[test]
fn values_that_are_not_text_are_an_error_and_nothing_worse() {
    let bench = Bench::new();
    let store = bench.dom0();
    let mut raw = bench.raw_dom0();
    raw.ask(Op::Write, b"/nul\0a\0b");
    raw.ask(Op::Write, b"/latin\0\xe4");
    for path in ["/nul", "/latin"] {
        assert_eq!(store.read(path).unwrap_err().kind(), ErrorKind::InvalidData);
    }
    for refused in [store.write("/x\0y", ""), store.write("/x", "a\0"), store.watch("/x", "\0")] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    assert_eq!(errno(store.write("/\u{e4}", "")), libc::EINVAL);
    assert_eq!(errno(store.write("/x", &"v".repeat(XENSTORE_PAYLOAD_MAX))), libc::E2BIG);
    store.write("/x", "\u{e4}").unwrap();
    assert_eq!(&*store.read("/x").unwrap(), "\u{e4}");
}

#[test]
fn a_value_ends_at_its_trailing_nul_as_c_programs_write_it() {
    let bench = Bench::new();
    let store = bench.dom0();
    let mut raw = bench.raw_dom0();
    raw.ask(Op::Write, b"/area/one\x001\0");
    raw.ask(Op::Write, b"/area/none\0\0\0");
    assert_eq!(&*store.read("/area/one").unwrap(), "1");
    assert_eq!(&*store.transaction().unwrap().read("/area/one").unwrap(), "1");
    store.watch("/area/one", "token").unwrap();
    assert_eq!(&*store.read_up_to_date("/area/one", "token").unwrap(), "1");
    let together = store.read_all("/area", &["one", "none"]).unwrap();
    let together: Vec<_> = together.into_iter().map(Result::unwrap).collect();
    assert_eq!(together, ["1".into(), "".into()]);
}

#[test]
fn a_directory_that_changes_between_two_parts_is_listed_again() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut server = Raw::new(theirs);
        let script: [(Op, &str, Op, &str); 5] = [
            (Op::Directory, "/d\0", Op::Error, "E2BIG\0"),
            (Op::DirectoryPart, "/d\x000\0", Op::DirectoryPart, "7\0a\0b\0"),
            (Op::DirectoryPart, "/d\x004\0", Op::DirectoryPart, "8\0d\0\0"),
            (Op::DirectoryPart, "/d\x000\0", Op::DirectoryPart, "8\0a\0"),
            (Op::DirectoryPart, "/d\x002\0", Op::DirectoryPart, "8\0c\0\0"),
        ];
        for (op, payload, answer_op, answer) in script {
            let (kind, req_id, asked) = server.receive();
            assert_eq!((kind, asked.as_str()), (op, payload));
            server.send(answer_op, req_id, answer.as_bytes());
        }
    });
    let store = StoreClient::from_stream(ours).unwrap();
    assert_eq!(store.directory("/d").unwrap(), ["a".into(), "c".into()]);
    server.join().unwrap();
}

#[test]
fn every_call_reports_a_lost_connection_from_then_on() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.watch("/a", "t").unwrap();
    let span = store.transaction().unwrap();
    let socket = bench.server.socket().to_owned();
    drop(bench);
    assert!(!socket.exists());
    for _ in 0..2 {
        assert_eq!(store.read("/a").unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!(store.transaction().unwrap_err().kind(), ErrorKind::NotConnected);
    }
    assert_eq!(span.read("/a").unwrap_err().kind(), ErrorKind::NotConnected);
    drop(span);
    while let Ok(event) = store.next_event() {
        event.expect("events from before the loss, then an error");
    }
    assert_eq!(store.next_event().unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn a_server_that_answers_nonsense_loses_the_client() {
    for nonsense in [
        message(Op::Read, 99, b"wrong request"),
        message(Op::Write, 1, b"wrong type"),
        message(Op::WatchEvent, 0, b"/no/token\0"),
        [0xff; 64].to_vec(),
        [message(Op::Read, 1, b"v"), message(Op::Read, 1, b"twice")].concat(),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&nonsense).unwrap();
        let store = StoreClient::from_stream(ours).unwrap();
        for _ in 0..2 {
            assert_eq!(store.read("/a").unwrap_err().kind(), ErrorKind::NotConnected);
        }
    }
}

#[test]
fn an_error_without_a_known_name_is_shown_as_it_came() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&message(Op::Error, 1, b"EWHATEVER\0")).unwrap();
    let store = StoreClient::from_stream(ours).unwrap();
    assert!(store.read("/a").unwrap_err().to_string().contains("EWHATEVER"));
}

#[test]
fn garbage_on_the_socket_harms_only_its_sender() {
    let bench = Bench::new();
    let store = bench.dom0();
    for garbage in [vec![0xff; 100], vec![0x7f; 5000]] {
        let mut bad = UnixStream::connect(bench.server.socket()).unwrap();
        // The server may hang up before all is sent.
        let _ = bad.write_all(&garbage);
        let mut rest = Vec::new();
        let _ = bad.read_to_end(&mut rest);
        assert!(rest.is_empty());
        store.write("/alive", "1").unwrap();
    }
    let mut half = UnixStream::connect(bench.server.socket()).unwrap();
    half.write_all(&message(Op::Write, 1, b"/half\0v")[..20]).unwrap();
    drop(half);
    store.write("/alive", "2").unwrap();
    assert_eq!(errno(store.read("/half")), libc::ENOENT);
}

#[test]
fn a_client_that_vanishes_leaves_no_transaction_and_no_watch_behind() {
    let bench = Bench::with(Quota { transactions: 1, watches: 1, ..Quota::default() });
    bench.guest_at_home(5);
    for _ in 0..20 {
        let mut guest = Raw::new(bench.stream_of(5));
        // The server may not have dropped the previous guest yet.
        while guest.ask(Op::TransactionStart, b"\0").0 == Op::Error {}
        while guest.ask(Op::Watch, b"x\0t\0").0 == Op::Error {}
        guest.send(Op::Directory, 9, b"/\0");
    }
}

#[test]
fn a_flood_of_requests_is_answered_in_order_as_it_is_read() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/v", &"v".repeat(2000)).unwrap();
    let stream = UnixStream::connect(bench.server.socket()).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let flood = thread::spawn(move || {
        for req_id in 0..2000 {
            writer.write_all(&message(Op::Read, req_id, b"/v\0")).unwrap();
        }
    });
    for n in 0..100 {
        store.write("/meanwhile", &n.to_string()).unwrap();
    }
    let mut reader = Raw::new(stream);
    for expected in 0..2000 {
        let (op, req_id, value) = reader.receive();
        assert_eq!((op, req_id, value.len()), (Op::Read, expected, 2000));
    }
    flood.join().unwrap();
}

#[test]
fn a_burst_of_requests_is_served_to_its_end_even_if_nothing_more_comes() {
    let bench = Bench::new();
    let store = bench.dom0();
    let mut raw = bench.raw_dom0();
    let burst: Vec<u8> =
        (0..200).flat_map(|n| message(Op::Mkdir, n, format!("/burst/{n}\0").as_bytes())).collect();
    raw.stream.write_all(&burst).unwrap();
    let served = (0..10_000).any(|_attempt| store.read("/burst/199").is_ok());
    assert!(served, "the last request was never served");
    assert_eq!(store.directory("/burst").unwrap().len(), 200);
}

#[test]
fn a_client_that_reads_no_answers_is_not_listened_to() {
    let bench = Bench::new();
    let store = bench.dom0();
    store.write("/v", &"v".repeat(2000)).unwrap();
    let mut flood = UnixStream::connect(bench.server.socket()).unwrap();
    flood.set_nonblocking(true).unwrap();
    let requests = message(Op::Read, 1, b"/v\0").repeat(1000);
    let (mut sent, mut refused) = (0, 0);
    // The answers would take 100 times the memory of the requests.
    while refused < 1000 {
        match flood.write(&requests[sent % requests.len()..]) {
            Ok(count) => (sent, refused) = (sent + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refused += 1;
                store.read("/v").unwrap();
            }
        }
        assert!(sent < 4 << 20, "{sent} bytes of requests were taken");
    }
}

#[test]
fn a_server_does_not_start_on_a_socket_in_use() {
    let bench = Bench::new();
    let refused = StoreServer::start(bench.server.socket(), Quota::default()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AddrInUse);
    bench.dom0().write("/alive", "1").unwrap();
}
