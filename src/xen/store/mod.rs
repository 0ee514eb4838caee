//! The xenstore client: one implementation for xenstored and for the stand-in.
//!
//! [`StoreClient`] sends a request and waits for its answer; watch events that come before the
//! answer are kept in an [`events::EventQueue`]. There is no time-out: xenstored answers in order
//! and may be busy for long (many domains starting), and a request given up would leave the stream
//! out of step. A caller that must not wait has no business with xenstore.

pub mod events;
mod readiness;
pub mod transport;
pub mod wire;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;

use xenstore_rs::{Xs, XsTransaction, XsTransactionSpan};

use super::{Nodes, Permission, PlatformError, Store, WatchEvent};
use crate::limits;
use crate::park;
use crate::units::DomId;
use events::{EventQueue, covers};
use readiness::Readiness;
use transport::{Socket, Transport};
use wire::{Inbox, Op};

/// A connection to xenstore, for one thread. Clones share it.
///
/// A value ends before NULs at its end, which C programs leave there and do not see.
///
/// Errors: what xenstored refuses carries its errno (`raw_os_error`); a value that is not UTF-8 or
/// holds a NUL elsewhere is `InvalidData`, one with a NUL to be sent `InvalidInput`; once the connection is
/// lost, everything is `NotConnected`.
#[derive(Clone, Debug)]
pub struct StoreClient {
    scope: Scope,
}

/// A transaction under way: what it reads stays as it was when the transaction began, what it
/// writes is seen by others at [`XsTransactionSpan::commit`], or never. Dropping it aborts it.
#[derive(Debug)]
pub struct StoreTransaction {
    scope: Scope,
    open: bool,
}

impl StoreClient {
    /// Connects as Xen's own tools do: to `$XENSTORED_PATH` if that is set, else to xenstored's
    /// socket, else to the kernel's device.
    pub fn connect() -> Result<StoreClient, PlatformError> {
        let transport = transport::find()?;
        StoreClient::over(transport).map_err(|source| PlatformError {
            what: "cannot poll the xenstore connection".to_owned(),
            remedy: "raise the limit on open files (ulimit -n)".to_owned(),
            source,
        })
    }

    /// Connects to a server's unix socket.
    pub fn connect_unix(path: &Path) -> io::Result<StoreClient> {
        StoreClient::from_stream(UnixStream::connect(path)?)
    }

    /// Takes a stream with a xenstore server at its other end.
    pub fn from_stream(stream: UnixStream) -> io::Result<StoreClient> {
        StoreClient::over(Box::new(Socket::from_stream(stream)?))
    }

    /// Takes any stream of messages with a xenstore server at its other end.
    pub fn over(transport: Box<dyn Transport>) -> io::Result<StoreClient> {
        let readiness = Readiness::over(transport.as_fd())?;
        let connection = Connection { transport, readiness, state: RefCell::default() };
        Ok(StoreClient { scope: Scope { connection: Rc::new(connection), tx_id: 0 } })
    }

    /// The base of a domain's relative paths, `/local/domain/<domid>`.
    pub fn domain_path(&self, domid: DomId) -> io::Result<String> {
        let domid = domid.to_string();
        let answer = self.scope.ask(Op::GetDomainPath, &[domid.as_bytes(), NUL])?;
        text(answer.strip_suffix(NUL).unwrap_or(&answer))
    }
}

impl XsTransaction for StoreClient {
    type Span = StoreTransaction;

    fn transaction(&self) -> io::Result<StoreTransaction> {
        let answer = self.scope.ask(Op::TransactionStart, &[NUL])?;
        let id = wire::strings(&answer).next().unwrap_or_default();
        let tx_id = crate::units::parse_decimal(&text(id)?).ok_or(ErrorKind::InvalidData)?;
        let connection = Rc::clone(&self.scope.connection);
        Ok(StoreTransaction { scope: Scope { connection, tx_id }, open: true })
    }
}

impl XsTransactionSpan for StoreTransaction {
    fn commit(mut self) -> io::Result<()> {
        self.open = false;
        self.scope.ask(Op::TransactionEnd, &[b"T\0"]).map(drop)
    }
}

impl Drop for StoreTransaction {
    fn drop(&mut self) {
        if self.open {
            // A failure means that the connection is lost, and the transaction with it.
            let _ = self.scope.ask(Op::TransactionEnd, &[b"F\0"]);
        }
    }
}

impl Store for StoreClient {
    fn watch(&self, path: &str, token: &str) -> io::Result<()> {
        let parts = [plain(path)?, NUL, plain(token)?, NUL];
        let connection = &self.scope.connection;
        // Known before it is asked for: its first event may overtake the answer.
        let is_new = connection.remember_watch(path, token);
        let asked = self.scope.ask(Op::Watch, &parts);
        if asked.is_err() && is_new {
            connection.forget_watch(path, token);
        }
        asked.map(drop)
    }

    fn unwatch(&self, path: &str, token: &str) -> io::Result<()> {
        self.scope.ask(Op::Unwatch, &[plain(path)?, NUL, plain(token)?, NUL])?;
        self.scope.connection.forget_watch(path, token);
        Ok(())
    }

    fn next_event(&self) -> io::Result<Option<WatchEvent>> {
        self.scope.connection.next_event()
    }

    fn read_up_to_date(&self, path: &str, token: &str) -> io::Result<Box<str>> {
        let (parts, old) = ([plain(path)?, NUL], Some((path, token)));
        // Some servers send answers before events that came first. After another round trip all are here.
        self.scope.ask(Op::Read, &parts)?;
        value(&self.scope.connection.ask_without(old, Op::Read, 0, &parts)?)
    }

    fn is_domain_introduced(&self, domid: DomId) -> io::Result<bool> {
        let answer =
            self.scope.ask(Op::IsDomainIntroduced, &[domid.to_string().as_bytes(), NUL])?;
        Ok(answer.first() == Some(&b'T'))
    }
}

impl AsFd for StoreClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.scope.connection.readiness.as_fd()
    }
}

macro_rules! delegate_nodes {
    ($($type:ident)*) => {$(
        impl Xs for $type {
            fn directory(&self, path: &str) -> io::Result<Vec<Box<str>>> {
                self.scope.directory(path)
            }

            fn read(&self, path: &str) -> io::Result<Box<str>> {
                value(&self.scope.ask(Op::Read, &[plain(path)?, NUL])?)
            }

            fn write(&self, path: &str, data: &str) -> io::Result<()> {
                self.scope.ask(Op::Write, &[plain(path)?, NUL, plain(data)?]).map(drop)
            }

            fn rm(&self, path: &str) -> io::Result<()> {
                self.scope.ask(Op::Rm, &[plain(path)?, NUL]).map(drop)
            }
        }

        impl Nodes for $type {
            fn mkdir(&self, path: &str) -> io::Result<()> {
                self.scope.ask(Op::Mkdir, &[plain(path)?, NUL]).map(drop)
            }

            fn write_all(&self, area: &str, nodes: &[(&str, String)]) -> io::Result<()> {
                self.scope.write_all(area, nodes)
            }

            fn read_all(
                &self,
                area: &str,
                nodes: &[&str],
            ) -> io::Result<Vec<io::Result<Box<str>>>> {
                self.scope.read_all(area, nodes)
            }

            fn permissions(&self, path: &str) -> io::Result<Vec<Permission>> {
                self.scope.permissions(path)
            }

            fn set_permissions(&self, path: &str, permissions: &[Permission]) -> io::Result<()> {
                self.scope.set_permissions(path, permissions)
            }
        }
    )*};
}

delegate_nodes! { StoreClient StoreTransaction }

const NUL: &[u8] = &[0];

/// A connection inside (`tx_id` not 0) or outside a transaction.
#[derive(Clone, Debug)]
struct Scope {
    connection: Rc<Connection>,
    tx_id: u32,
}

impl Scope {
    fn ask(&self, op: Op, parts: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.connection.ask(op, self.tx_id, parts)
    }

    fn write_all(&self, area: &str, nodes: &[(&str, String)]) -> io::Result<()> {
        let payload = |(node, value): &(&str, String)| {
            Ok([plain(area)?, b"/", plain(node)?, NUL, plain(value)?].concat())
        };
        let answers = self.ask_all(Op::Write, nodes.iter().map(payload))?;
        answers.into_iter().try_for_each(|answer| answer.map(drop))
    }

    fn read_all(&self, area: &str, nodes: &[&str]) -> io::Result<Vec<io::Result<Box<str>>>> {
        let payload = |node: &&str| Ok([plain(area)?, b"/", plain(node)?, NUL].concat());
        let answers = self.ask_all(Op::Read, nodes.iter().map(payload))?;
        Ok(answers.into_iter().map(|answer| value(&answer?)).collect())
    }

    /// Each payload's answer. An error means that not all were asked for.
    fn ask_all(
        &self,
        op: Op,
        payloads: impl Iterator<Item = io::Result<Vec<u8>>>,
    ) -> io::Result<Vec<io::Result<Vec<u8>>>> {
        let payloads = payloads.collect::<io::Result<Vec<_>>>()?;
        let mut answers = Vec::with_capacity(payloads.len());
        for batch in payloads.chunks(limits::XENSTORE_REQUESTS_PER_BATCH) {
            self.connection.ask_batch(op, self.tx_id, batch, &mut answers)?;
        }
        Ok(answers)
    }

    fn directory(&self, path: &str) -> io::Result<Vec<Box<str>>> {
        let list = match self.ask(Op::Directory, &[plain(path)?, NUL]) {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => self.long_directory(path)?,
            answer => answer?,
        };
        wire::strings(&list).map(boxed_text).collect()
    }

    /// Fetches a list of names in parts, from the start again where the node changed between two.
    fn long_directory(&self, path: &str) -> io::Result<Vec<u8>> {
        for _ in 0..limits::STORE_TRANSACTION_TRIES {
            if let Some(list) = self.one_generation(path)? {
                return Ok(list);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN))
    }

    /// The whole list of one generation of the node; `None` if the generation changed midway.
    fn one_generation(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let mut list: Vec<u8> = Vec::new();
        let mut generation: Option<Vec<u8>> = None;
        while list.len() < limits::XENSTORE_DIRECTORY_MAX {
            let offset = list.len().to_string();
            let parts = [path.as_bytes(), NUL, offset.as_bytes(), NUL];
            let answer = self.ask(Op::DirectoryPart, &parts)?;
            let part = split_part(&answer)?;
            if *generation.get_or_insert_with(|| part.generation.to_vec()) != part.generation {
                return Ok(None);
            }
            list.extend_from_slice(part.names);
            if part.is_last {
                return Ok(Some(list));
            }
        }
        Err(io::Error::from_raw_os_error(libc::E2BIG))
    }

    fn permissions(&self, path: &str) -> io::Result<Vec<Permission>> {
        let answer = self.ask(Op::GetPerms, &[plain(path)?, NUL])?;
        wire::strings(&answer)
            .map(|one| wire::parse_permission(one).ok_or_else(|| ErrorKind::InvalidData.into()))
            .collect()
    }

    fn set_permissions(&self, path: &str, permissions: &[Permission]) -> io::Result<()> {
        let mut payload = [plain(path)?, NUL].concat();
        for permission in permissions {
            payload.extend_from_slice(wire::permission_text(*permission).as_bytes());
            payload.push(0);
        }
        self.ask(Op::SetPerms, &[&payload]).map(drop)
    }
}

/// A DIRECTORY_PART answer, taken apart.
struct DirectoryPart<'a> {
    generation: &'a [u8],
    names: &'a [u8],
    is_last: bool,
}

fn split_part(answer: &[u8]) -> io::Result<DirectoryPart<'_>> {
    let bad = || io::Error::new(ErrorKind::InvalidData, "malformed DIRECTORY_PART answer");
    let end = answer.iter().position(|&byte| byte == 0).ok_or_else(bad)?;
    let (generation, rest) = (&answer[..end], &answer[end + 1..]);
    match rest {
        // An empty name ends the list.
        [names @ .., 0] if names.is_empty() || names.ends_with(NUL) => {
            Ok(DirectoryPart { generation, names, is_last: true })
        }
        [.., 0] => Ok(DirectoryPart { generation, names: rest, is_last: false }),
        _ => Err(bad()),
    }
}

/// The stream and all that its clients share.
#[derive(Debug)]
struct Connection {
    transport: Box<dyn Transport>,
    readiness: Readiness,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    inbox: Inbox,
    outbox: Vec<u8>,
    req_id: u32,
    events: EventQueue,
    /// The paths watched with each token.
    watches: BTreeMap<String, Vec<String>>,
    lost: Option<String>,
}

/// An answer, whole.
struct Answer {
    kind: u32,
    req_id: u32,
    payload: Vec<u8>,
}

impl Connection {
    fn ask(&self, op: Op, tx_id: u32, parts: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.ask_without(None, op, tx_id, parts)
    }

    /// The same, and drops events of this path and token that came before the answer.
    fn ask_without(
        &self,
        old: Option<(&str, &str)>,
        op: Op,
        tx_id: u32,
        parts: &[&[u8]],
    ) -> io::Result<Vec<u8>> {
        let mut state = self.state.borrow_mut();
        state.check_alive()?;
        state.outbox.clear();
        state.put(op, tx_id, parts)?;
        self.send(&mut state)?;
        let answer = self.wait(&mut state)?;
        if let Some((path, token)) = old {
            state.events.retain(|event| event.path != path || event.token != token);
        }
        self.end_answers(&mut state)?;
        let last = state.req_id;
        state.check(answer, op, last)
    }

    /// Sends requests together, and only then waits for their answers. One that is refused does not
    /// keep the others from being carried out.
    fn ask_batch(
        &self,
        op: Op,
        tx_id: u32,
        payloads: &[Vec<u8>],
        answers: &mut Vec<io::Result<Vec<u8>>>,
    ) -> io::Result<()> {
        if !self.transport.takes_batches() {
            answers.extend(payloads.iter().map(|payload| self.ask(op, tx_id, &[payload])));
            return Ok(());
        }
        let mut state = self.state.borrow_mut();
        state.check_alive()?;
        state.outbox.clear();
        let mut req_id = state.req_id;
        payloads.iter().try_for_each(|payload| state.put(op, tx_id, &[payload]))?;
        self.send(&mut state)?;
        for _ in payloads {
            req_id = req_id.wrapping_add(1);
            let answer = self.wait(&mut state)?;
            answers.push(state.check(answer, op, req_id));
            state.check_alive()?;
        }
        self.end_answers(&mut state)
    }

    fn send(&self, state: &mut State) -> io::Result<()> {
        match self.transport.send(&state.outbox) {
            Err(error) if self.transport.is_lost_by_failed_send() => Err(state.lose(error)),
            sent => sent,
        }
    }

    /// Waits for the next answer.
    fn wait(&self, state: &mut State) -> io::Result<Answer> {
        loop {
            if let Some(answer) = state.absorb()? {
                return Ok(answer);
            }
            if !self.fill(state)? {
                park::sleep(&[self.transport.as_fd()], None);
            }
        }
    }

    /// Takes events that came with the last answer out of the inbox, so that what waits there is
    /// never more than a part of a message.
    fn end_answers(&self, state: &mut State) -> io::Result<()> {
        if state.absorb()?.is_some() {
            return Err(state.lose("an answer came that nobody asked for"));
        }
        self.readiness.set(!state.events.is_empty());
        Ok(())
    }

    /// Reads into the inbox; false where nothing is here.
    fn fill(&self, state: &mut State) -> io::Result<bool> {
        match self.transport.receive(state.inbox.space()) {
            Ok(Some(count)) => {
                state.inbox.filled(count);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => Err(state.lose(error)),
        }
    }

    fn next_event(&self) -> io::Result<Option<WatchEvent>> {
        let mut state = self.state.borrow_mut();
        loop {
            if let Some(event) = state.events.pop() {
                return Ok(Some(event));
            }
            self.readiness.set(false);
            state.check_alive()?;
            if !self.fill(&mut state)? {
                return Ok(None);
            }
            if state.absorb()?.is_some() {
                return Err(state.lose("an answer came that nobody asked for"));
            }
        }
    }

    fn remember_watch(&self, path: &str, token: &str) -> bool {
        let mut state = self.state.borrow_mut();
        let paths = state.watches.entry(token.to_owned()).or_default();
        let is_new = !paths.iter().any(|known| known == path);
        if is_new {
            paths.push(path.to_owned());
        }
        is_new
    }

    fn forget_watch(&self, path: &str, token: &str) {
        let state = &mut *self.state.borrow_mut();
        if let Some(paths) = state.watches.get_mut(token) {
            paths.retain(|known| known != path);
            if paths.is_empty() {
                state.watches.remove(token);
            }
        }
        let watches = &state.watches;
        state.events.retain(|event| watched_path(watches, event).is_some());
    }
}

impl State {
    fn check_alive(&self) -> io::Result<()> {
        match &self.lost {
            None => Ok(()),
            Some(why) => Err(lost_connection(why)),
        }
    }

    fn lose(&mut self, why: impl fmt::Display) -> io::Error {
        lost_connection(self.lost.insert(why.to_string()))
    }

    /// Appends a request to the outbox.
    fn put(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> io::Result<()> {
        self.req_id = self.req_id.wrapping_add(1);
        wire::encode(&mut self.outbox, op, self.req_id, tx_id, parts)
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
    }

    /// What a request was answered.
    fn check(&mut self, answer: Answer, op: Op, req_id: u32) -> io::Result<Vec<u8>> {
        if answer.req_id != req_id {
            return Err(self.lose("an answer to another request came"));
        }
        match Op::try_from(answer.kind) {
            Ok(Op::Error) => Err(refusal(&answer.payload)),
            Ok(kind) if kind == op => Ok(answer.payload),
            _ => Err(self.lose("an answer of another type came")),
        }
    }

    /// Takes messages from the inbox up to and including an answer, keeping the events.
    fn absorb(&mut self) -> io::Result<Option<Answer>> {
        loop {
            let message = match self.inbox.take() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(None),
                Err(error) => return Err(self.lose(error)),
            };
            let wire::Header { kind, req_id, .. } = message.header;
            if kind != Op::WatchEvent as u32 {
                return Ok(Some(Answer { kind, req_id, payload: message.payload.to_vec() }));
            }
            match parse_event(message.payload) {
                Some(event) => self.keep(event),
                None => return Err(self.lose("a malformed watch event came")),
            }
        }
    }

    /// Keeps an event; one whose watch is gone is old news.
    fn keep(&mut self, event: WatchEvent) {
        let full = self.events.len() >= limits::WATCH_EVENTS_KEPT;
        if let Some(watched) = watched_path(&self.watches, &event) {
            self.events.push(event, watched, full);
        }
    }
}

/// The path of the watch that an event belongs to. Where none with its token covers the path (a
/// server that reports paths in another form), any with the token is as good.
fn watched_path<'a>(
    watches: &'a BTreeMap<String, Vec<String>>,
    event: &WatchEvent,
) -> Option<&'a str> {
    let paths = watches.get(&event.token)?;
    let covering = paths.iter().find(|watched| covers(watched, &event.path));
    covering.or(paths.first()).map(String::as_str)
}

fn parse_event(payload: &[u8]) -> Option<WatchEvent> {
    let mut strings = wire::strings(payload).map(|string| std::str::from_utf8(string).ok());
    let path = strings.next()??.to_owned();
    let token = strings.next()??.to_owned();
    Some(WatchEvent { path, token })
}

fn refusal(payload: &[u8]) -> io::Error {
    let name = wire::strings(payload).next().unwrap_or(payload);
    match wire::error_number(name) {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(format!("xenstored says {}", name.escape_ascii())),
    }
}

fn lost_connection(why: &str) -> io::Error {
    io::Error::new(ErrorKind::NotConnected, format!("the xenstore connection is lost: {why}"))
}

/// A string that can be sent.
fn plain(text: &str) -> io::Result<&[u8]> {
    if text.contains('\0') {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a NUL can't be sent to xenstore"));
    }
    Ok(text.as_bytes())
}

/// A string that was received.
fn text(bytes: &[u8]) -> io::Result<String> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("not text: \"{}\"", bytes.escape_ascii()),
        )),
    }
}

/// What a node holds.
fn value(bytes: &[u8]) -> io::Result<Box<str>> {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    boxed_text(&bytes[..end])
}

fn boxed_text(bytes: &[u8]) -> io::Result<Box<str>> {
    text(bytes).map(String::into_boxed_str)
}

#[cfg(test)]
mod test {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;

    use super::transport::Device;
    use super::*;

    fn device(end: impl Into<OwnedFd>) -> StoreClient {
        StoreClient::over(Box::new(Device(File::from(end.into())))).unwrap()
    }

    #[test]
    fn a_write_that_the_device_refuses_fails_the_request_and_not_the_connection() {
        // The end of a pipe that can only be read refuses every write, as the kernel's device does
        // with a watch it doesn't like.
        let (reader, _writer) = io::pipe().unwrap();
        let client = device(reader);
        for _ in 0..2 {
            let refused = client.watch("/a", "t").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
        }
    }

    #[test]
    fn an_event_may_overtake_the_answer_to_its_watch_and_each_request_is_one_write() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let client = device(ours);
        let kernel = std::thread::spawn(move || {
            let mut request = [0; wire::MESSAGE_MAX];
            let count = theirs.read(&mut request).unwrap();
            let (message, taken) = wire::decode(&request[..count]).unwrap().unwrap();
            assert_eq!((taken, message.payload), (count, b"/a\0t\0".as_slice()));
            let mut answers = Vec::new();
            wire::encode(&mut answers, Op::WatchEvent, 0, 0, &[b"/a\0t\0"]).unwrap();
            let req_id = message.header.req_id;
            wire::encode(&mut answers, Op::Watch, req_id, 0, &[b"OK\0"]).unwrap();
            // The kernel hands out header and payload as separate pieces.
            for piece in answers.chunks(wire::HEADER_BYTES) {
                theirs.write_all(piece).unwrap();
            }
            theirs
        });
        client.watch("/a", "t").unwrap();
        let event = WatchEvent { path: "/a".into(), token: "t".into() };
        assert_eq!(client.next_event().unwrap(), Some(event));
        assert_eq!(client.next_event().unwrap(), None);
        drop(kernel.join().unwrap());
        assert_eq!(client.next_event().unwrap_err().kind(), ErrorKind::NotConnected);
    }
}
