//! The core by itself: requests in, messages out.

use proptest::collection::vec;
use proptest::prelude::*;

use super::{ClientId, Quota, StoreCore};
use crate::units::DomId;
use crate::xen::store::wire::{self, Message, Op};

/// Sends one request and returns what the core says next: the answer.
fn ask(core: &mut StoreCore, id: ClientId, tx: u32, op: Op, payload: &[u8]) -> (Op, Vec<u8>) {
    let mut request = Vec::new();
    wire::encode(&mut request, op, 7, tx, &[payload]).unwrap();
    let (message, _) = wire::decode(&request).unwrap().unwrap();
    core.handle(id, message);
    let answer = core.next_message(id).unwrap();
    let (Message { header, payload }, _) = wire::decode(&answer).unwrap().unwrap();
    assert_eq!((header.req_id, header.tx_id), (7, tx));
    (Op::try_from(header.kind).unwrap(), payload.to_vec())
}

fn events(core: &mut StoreCore, id: ClientId) -> Vec<String> {
    let mut seen = Vec::new();
    while let Some(message) = core.next_message(id) {
        let (message, _) = wire::decode(&message).unwrap().unwrap();
        assert_eq!(message.header.kind, Op::WatchEvent as u32);
        let path = wire::strings(message.payload).next().unwrap();
        seen.push(String::from_utf8(path.to_vec()).unwrap());
    }
    seen
}

fn begin(core: &mut StoreCore, id: ClientId) -> u32 {
    let (op, answer) = ask(core, id, 0, Op::TransactionStart, b"\0");
    assert_eq!(op, Op::TransactionStart);
    std::str::from_utf8(answer.strip_suffix(b"\0").unwrap()).unwrap().parse().unwrap()
}

fn dom0() -> (StoreCore, ClientId) {
    let mut core = StoreCore::new(Quota::default());
    let id = core.connect(DomId::DOM0);
    (core, id)
}

#[test]
fn events_come_in_the_order_of_the_changes_and_children_go_before_their_parent() {
    let (mut core, id) = dom0();
    for (path, token) in [("/a", "top"), ("/a/b/c", "deep")] {
        ask(&mut core, id, 0, Op::Watch, format!("{path}\0{token}\0").as_bytes());
    }
    assert_eq!(events(&mut core, id), ["/a", "/a/b/c"]);
    ask(&mut core, id, 0, Op::Write, b"/a/b/c\x001");
    ask(&mut core, id, 0, Op::Write, b"/a/d\x002");
    assert_eq!(events(&mut core, id), ["/a/b/c", "/a/b/c", "/a/d"]);
    ask(&mut core, id, 0, Op::Rm, b"/a/b\0");
    assert_eq!(events(&mut core, id), ["/a/b/c", "/a/b"]);
}

#[test]
fn a_transaction_fires_each_node_once_at_its_commit() {
    let (mut core, id) = dom0();
    ask(&mut core, id, 0, Op::Watch, b"/\0t\0");
    events(&mut core, id);
    let tx = begin(&mut core, id);
    for payload in [b"/b\x001", b"/a\x001", b"/b\x002"] {
        ask(&mut core, id, tx, Op::Write, payload);
    }
    assert!(events(&mut core, id).is_empty());
    assert_eq!(ask(&mut core, id, tx, Op::TransactionEnd, b"T\0").0, Op::TransactionEnd);
    assert_eq!(events(&mut core, id), ["/b", "/a"]);
}

#[test]
fn unknown_operations_are_enosys_and_answers_of_the_server_are_no_requests() {
    let (mut core, id) = dom0();
    for op in [Op::WatchEvent, Op::Error, Op::GetFeature, Op::SetQuota] {
        assert_eq!(ask(&mut core, id, 0, op, b"\0"), (Op::Error, b"ENOSYS\0".to_vec()));
    }
    for kind in [20, 27, u32::MAX] {
        let header = wire::Header { kind, req_id: 1, tx_id: 0, len: 0 };
        core.handle(id, Message { header, payload: b"" });
        let answer = core.next_message(id).unwrap();
        assert!(answer.ends_with(b"ENOSYS\0"));
    }
}

#[test]
fn a_tree_as_deep_as_a_path_can_be_is_removed_again() {
    let (mut core, id) = dom0();
    let path = "/a".repeat(1024);
    ask(&mut core, id, 0, Op::Mkdir, format!("{path}\0").as_bytes());
    assert_eq!(ask(&mut core, id, 0, Op::Read, format!("{path}\0").as_bytes()).0, Op::Read);
    assert_eq!(ask(&mut core, id, 0, Op::Rm, b"/a\0").0, Op::Rm);
    assert_eq!(ask(&mut core, id, 0, Op::Directory, b"/\0"), (Op::Directory, Vec::new()));
}

/// A request on one of few nodes, so that requests meet.
fn request() -> impl Strategy<Value = (Op, Vec<u8>)> {
    let path = prop::sample::select(vec!["/a", "/a/b", "/a/b/c", "/a/d", "/e", "/e/f"]);
    let kind = prop::sample::select(vec![
        (Op::Write, "\x001"),
        (Op::Write, "\x002"),
        (Op::Mkdir, "\0"),
        (Op::Rm, "\0"),
        (Op::Read, "\0"),
        (Op::Directory, "\0"),
        (Op::SetPerms, "\0n3\0r4\0"),
        (Op::GetPerms, "\0"),
    ]);
    (path, kind).prop_map(|(path, (op, rest))| (op, format!("{path}{rest}").into_bytes()))
}

#[derive(Clone, Debug)]
enum Step {
    /// A request outside of any transaction.
    Direct(Op, Vec<u8>),
    /// A request in a transaction; one is begun if none is under way.
    Within(usize, Op, Vec<u8>),
    /// The end of a transaction.
    Commit(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => request().prop_map(|(op, payload)| Step::Direct(op, payload)),
        6 => (0..3usize, request()).prop_map(|(slot, (op, payload))| Step::Within(slot, op, payload)),
        1 => (0..3usize).prop_map(Step::Commit),
    ]
}

/// Everything that can be read below a node.
fn dump(core: &mut StoreCore, id: ClientId, path: &str, out: &mut Vec<String>) {
    let payload = format!("{path}\0");
    for op in [Op::Read, Op::GetPerms] {
        let (_, answer) = ask(core, id, 0, op, payload.as_bytes());
        out.push(format!("{path} {op:?} {}", answer.escape_ascii()));
    }
    let (_, names) = ask(core, id, 0, Op::Directory, payload.as_bytes());
    for name in wire::strings(&names) {
        let above = if path == "/" { "" } else { path };
        dump(core, id, &format!("{above}/{}", name.escape_ascii()), out);
    }
}

proptest! {
    #[test]
    fn a_committed_transaction_is_as_if_all_its_requests_were_made_at_its_end(
        steps in vec(step(), 1..60),
    ) {
        let (mut core, id) = dom0();
        let (mut serial, serial_id) = dom0();
        let mut open: [Option<(u32, Vec<_>)>; 3] = [None, None, None];
        for step in steps {
            match step {
                Step::Direct(op, payload) => {
                    let answer = ask(&mut core, id, 0, op, &payload);
                    prop_assert_eq!(answer, ask(&mut serial, serial_id, 0, op, &payload));
                }
                Step::Within(slot, op, payload) => {
                    let (tx, log) =
                        open[slot].get_or_insert_with(|| (begin(&mut core, id), Vec::new()));
                    let answer = ask(&mut core, id, *tx, op, &payload);
                    log.push((op, payload, answer));
                }
                Step::Commit(slot) => {
                    let Some((tx, log)) = open[slot].take() else { continue };
                    match ask(&mut core, id, tx, Op::TransactionEnd, b"T\0") {
                        (Op::TransactionEnd, _) => {
                            for (op, payload, answer) in log {
                                let again = ask(&mut serial, serial_id, 0, op, &payload);
                                prop_assert_eq!(answer, again, "{:?} {:?}", op, payload);
                            }
                        }
                        refused => prop_assert_eq!(refused, (Op::Error, b"EAGAIN\0".to_vec())),
                    }
                }
            }
            let (mut left, mut right) = (Vec::new(), Vec::new());
            dump(&mut core, id, "/", &mut left);
            dump(&mut serial, serial_id, "/", &mut right);
            prop_assert_eq!(left, right);
        }
    }

    #[test]
    fn any_request_gets_one_answer_that_can_be_sent(
        requests in vec((0..30u32, 0..3u32, vec(prop::sample::select(b"/ab@0T\0\xff".to_vec()), 0..12)), 1..50),
        domid in 0..2u32,
    ) {
        let mut core = StoreCore::new(Quota::default());
        let id = core.connect(DomId::try_from(domid).unwrap());
        for (kind, tx_id, payload) in requests {
            let header = wire::Header { kind, req_id: 5, tx_id, len: 0 };
            core.handle(id, Message { header, payload: &payload });
            let mut answers = 0;
            while let Some(message) = core.next_message(id) {
                let (message, len) = wire::decode(&message).unwrap().unwrap();
                prop_assert!(len <= wire::MESSAGE_MAX);
                answers += usize::from(message.header.kind != Op::WatchEvent as u32);
            }
            prop_assert_eq!(answers, 1);
        }
    }
}
