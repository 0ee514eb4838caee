//! The xenstore client and the stand-in's server, from outside; Xen's own tools against the server.

mod nodes;
mod robustness;
mod tools;
mod watches;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use polldisk::sim::store::{Quota, StoreServer};
use polldisk::units::DomId;
use polldisk::xen::store::StoreClient;
use polldisk::xen::store::wire::{self, Inbox, Op};
use polldisk::xen::{Nodes, Permission, Store};
use tempfile::TempDir;

/// A server in a directory of its own.
struct Bench {
    server: StoreServer,
    _home: TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench::with(Quota::default())
    }

    fn with(quota: Quota) -> Bench {
        let home = TempDir::new().unwrap();
        let server = StoreServer::start(&home.path().join("socket"), quota).unwrap();
        Bench { server, _home: home }
    }

    fn dom0(&self) -> StoreClient {
        StoreClient::connect_unix(self.server.socket()).unwrap()
    }

    fn raw_dom0(&self) -> Raw {
        Raw::new(UnixStream::connect(self.server.socket()).unwrap())
    }

    fn guest(&self, domid: u32) -> StoreClient {
        StoreClient::from_stream(self.stream_of(domid)).unwrap()
    }

    fn stream_of(&self, domid: u32) -> UnixStream {
        self.server.connect_as(dom(domid)).unwrap()
    }

    /// A guest with a home of its own, as the toolstack makes it.
    fn guest_at_home(&self, domid: u32) -> StoreClient {
        let home = format!("/local/domain/{domid}");
        let dom0 = self.dom0();
        dom0.mkdir(&home).unwrap();
        dom0.set_permissions(&home, &permissions(&format!("n{domid}"))).unwrap();
        self.guest(domid)
    }
}

fn dom(domid: u32) -> DomId {
    DomId::try_from(domid).unwrap()
}

fn permissions(text: &str) -> Vec<Permission> {
    text.split(' ').map(|one| wire::parse_permission(one.as_bytes()).unwrap()).collect()
}

/// The errno of a refusal.
#[track_caller]
fn errno<T>(result: io::Result<T>) -> i32 {
    let error = result.err().expect("should be refused");
    error.raw_os_error().expect("an errno from the server")
}

/// All events received, as "path token". The request sent first makes sure that the events of earlier
/// requests have arrived.
fn events(client: &StoreClient) -> Vec<String> {
    client.domain_path(DomId::DOM0).unwrap();
    let one = || client.next_event().unwrap();
    std::iter::from_fn(one).map(|event| format!("{} {}", event.path, event.token)).collect()
}

/// A connection without a client, for raw messages.
struct Raw {
    stream: UnixStream,
    inbox: Inbox,
}

impl Raw {
    fn new(stream: UnixStream) -> Raw {
        Raw { stream, inbox: Inbox::default() }
    }

    fn send(&mut self, op: Op, req_id: u32, payload: &[u8]) {
        self.stream.write_all(&message(op, req_id, payload)).unwrap();
    }

    fn receive(&mut self) -> (Op, u32, String) {
        loop {
            if let Some(message) = self.inbox.take().unwrap() {
                let op = Op::try_from(message.header.kind).unwrap();
                let payload = String::from_utf8(message.payload.to_vec()).unwrap();
                return (op, message.header.req_id, payload);
            }
            let count = self.stream.read(self.inbox.space()).unwrap();
            assert!(count > 0, "the server hung up");
            self.inbox.filled(count);
        }
    }

    /// The answer to a request; events are skipped.
    fn ask(&mut self, op: Op, payload: &[u8]) -> (Op, String) {
        self.send(op, 1, payload);
        loop {
            let (op, _, payload) = self.receive();
            if op != Op::WatchEvent {
                return (op, payload);
            }
        }
    }
}

fn message(op: Op, req_id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::encode(&mut bytes, op, req_id, 0, &[payload]).unwrap();
    bytes
}
