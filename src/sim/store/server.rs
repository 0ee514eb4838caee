//! The core on a unix socket: one thread that never waits for a client.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, Sender};
use mio::net::{UnixListener, UnixStream};
use mio::{Events, Interest, Poll, Token, Waker};

use super::core::{ClientId, StoreCore};
use super::quota::Quota;
use crate::limits::{SIM_STORE_CLIENTS_MAX, SIM_STORE_REQUESTS_PER_TURN};
use crate::units::DomId;
use crate::xen::store::wire::{Inbox, MESSAGE_MAX};

/// A running xenstore server. Clients of its socket act as dom0; guests get their ends from
/// [`StoreServer::connect_as`]. Dropping it closes every connection and removes the socket.
#[derive(Debug)]
pub struct StoreServer {
    socket: PathBuf,
    commands: Sender<Command>,
    waker: Arc<Waker>,
    requests: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Command {
    Connect(StdStream, DomId),
    Introduce(DomId, Sender<()>),
    Release(DomId, Sender<()>),
    Stop,
}

/// Commands on their way to the thread; each but `Connect` is waited for.
const COMMANDS: usize = 64;

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
const FIRST_CLIENT: usize = 2;

impl StoreServer {
    /// Serves an empty store on a new socket; `AlreadyExists` or `AddrInUse` if something is in
    /// its place.
    pub fn start(socket: &Path, quota: Quota) -> io::Result<StoreServer> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let mut listener = UnixListener::bind(socket)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let (commands, inbox) = channel::bounded(COMMANDS);
        let requests = Arc::default();
        let service = Service {
            poll,
            listener,
            commands: inbox,
            core: StoreCore::new(quota),
            peers: BTreeMap::new(),
            busy: BTreeSet::new(),
            requests: Arc::clone(&requests),
        };
        let thread = std::thread::Builder::new().name("sim-xenstored".into());
        let thread = Some(thread.spawn(move || service.run())?);
        Ok(StoreServer { socket: socket.to_owned(), commands, waker, requests, thread })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Requests that all clients together have made so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// A new connection that is served as that domain's.
    pub fn connect_as(&self, domid: DomId) -> io::Result<StdStream> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        self.command(Command::Connect(ours, domid))?;
        Ok(theirs)
    }

    /// Announces a domain (`@introduceDomain`); creates no node. Done when it returns.
    pub fn introduce(&self, domid: DomId) -> io::Result<()> {
        self.command_and_wait(|done| Command::Introduce(domid, done))
    }

    /// Announces a guest's end (`@releaseDomain`): its connections close, and its nodes, watches
    /// and transactions go. Done when it returns.
    pub fn release(&self, domid: DomId) -> io::Result<()> {
        self.command_and_wait(|done| Command::Release(domid, done))
    }

    fn command(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(|_| ErrorKind::NotConnected)?;
        self.waker.wake()
    }

    fn command_and_wait(&self, command: impl FnOnce(Sender<()>) -> Command) -> io::Result<()> {
        let (done, waiting) = channel::bounded(1);
        self.command(command(done))?;
        waiting.recv().map_err(|_| ErrorKind::NotConnected.into())
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // If the thread is gone already, there is nobody to tell.
        let _ = self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the store's thread panicked");
        }
        let _ = fs::remove_file(&self.socket);
    }
}

/// The thread's own.
struct Service {
    poll: Poll,
    listener: UnixListener,
    commands: Receiver<Command>,
    core: StoreCore,
    peers: BTreeMap<ClientId, Peer>,
    /// Clients to look at without waiting for their stream to become ready (it is edge-triggered).
    busy: BTreeSet<ClientId>,
    requests: Arc<AtomicU64>,
}

/// A client's stream, with what arrived and what waits to go out.
struct Peer {
    stream: UnixStream,
    inbox: Inbox,
    outbox: Vec<u8>,
}

/// Whether a stream can go on.
#[derive(PartialEq, Eq)]
enum Flow {
    Ready,
    WouldBlock,
    Closed,
}

impl Service {
    fn run(mut self) {
        let mut events = Events::with_capacity(256);
        loop {
            let timeout = (!self.busy.is_empty()).then_some(Duration::ZERO);
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return tracing::error!(%error, "the stand-in's xenstore can't poll"),
                Ok(()) => {}
            }
            let tokens: BTreeSet<Token> = events.iter().map(|event| event.token()).collect();
            if tokens.contains(&LISTENER) {
                self.accept();
            }
            if tokens.contains(&WAKER) && self.obey().is_break() {
                return;
            }
            let is_ready = |id: &ClientId| tokens.contains(&token(*id));
            self.busy.extend(self.peers.keys().filter(|id| is_ready(id)));
            for id in std::mem::take(&mut self.busy) {
                self.turn(id);
            }
            for id in self.core.take_ready() {
                self.flush(id);
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.add(stream, DomId::DOM0),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return tracing::warn!(%error, "the stand-in's xenstore can't accept");
                }
            }
        }
    }

    fn obey(&mut self) -> std::ops::ControlFlow<()> {
        // Nobody waits for the answer any more if sending it fails.
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Connect(stream, domid) => self.add(UnixStream::from_std(stream), domid),
                Command::Introduce(domid, done) => {
                    self.core.introduce(domid);
                    let _ = done.send(());
                }
                Command::Release(domid, done) => {
                    self.core.release(domid);
                    let _ = done.send(());
                }
                Command::Stop => return std::ops::ControlFlow::Break(()),
            }
        }
        std::ops::ControlFlow::Continue(())
    }

    /// Takes a stream; one too many is closed.
    fn add(&mut self, mut stream: UnixStream, domid: DomId) {
        if self.peers.len() >= SIM_STORE_CLIENTS_MAX {
            return tracing::warn!(%domid, "the stand-in's xenstore has too many connections");
        }
        let id = self.core.connect(domid);
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut stream, token(id), interest) {
            tracing::warn!(%error, "the stand-in's xenstore can't serve a connection");
            return self.core.disconnect(id);
        }
        self.peers.insert(id, Peer { stream, inbox: Inbox::default(), outbox: Vec::new() });
    }

    /// Serves a client's requests, as many as it may have at a time.
    fn turn(&mut self, id: ClientId) {
        for _ in 0..SIM_STORE_REQUESTS_PER_TURN {
            if self.flush(id) == Flow::Closed {
                return;
            }
            let Some(peer) = self.peers.get_mut(&id) else { return };
            // If its answers pile up, its reading them makes the stream writable again.
            if !self.core.accepts(id) {
                return;
            }
            let request = match peer.inbox.take() {
                Ok(request) => request,
                Err(error) => {
                    tracing::warn!(%error, "the stand-in's xenstore drops a connection");
                    return self.drop_peer(id);
                }
            };
            if let Some(request) = request {
                self.requests.fetch_add(1, Ordering::Relaxed);
                self.core.handle(id, request);
                continue;
            }
            match peer.fill() {
                Flow::Ready => {}
                Flow::WouldBlock => return,
                Flow::Closed => return self.drop_peer(id),
            }
        }
        self.busy.insert(id);
    }

    /// Sends what waits for a client, as far as its stream takes it.
    fn flush(&mut self, id: ClientId) -> Flow {
        let Some(peer) = self.peers.get_mut(&id) else { return Flow::Closed };
        if !self.core.is_connected(id) {
            self.drop_peer(id);
            return Flow::Closed;
        }
        loop {
            while peer.outbox.len() < MESSAGE_MAX {
                match self.core.next_message(id) {
                    Some(message) => peer.outbox.extend_from_slice(&message),
                    None => break,
                }
            }
            match peer.send() {
                Flow::Ready if peer.outbox.is_empty() => return Flow::Ready,
                Flow::Ready => {}
                Flow::WouldBlock => return Flow::WouldBlock,
                Flow::Closed => {
                    self.drop_peer(id);
                    return Flow::Closed;
                }
            }
        }
    }

    fn drop_peer(&mut self, id: ClientId) {
        self.core.disconnect(id);
        self.peers.remove(&id);
    }
}

impl Peer {
    fn fill(&mut self) -> Flow {
        match self.stream.read(self.inbox.space()) {
            Ok(0) => Flow::Closed,
            Ok(count) => {
                self.inbox.filled(count);
                Flow::Ready
            }
            Err(error) => flow_after(&error),
        }
    }

    fn send(&mut self) -> Flow {
        if self.outbox.is_empty() {
            return Flow::Ready;
        }
        match self.stream.write(&self.outbox) {
            Ok(count) => {
                self.outbox.drain(..count);
                Flow::Ready
            }
            Err(error) => flow_after(&error),
        }
    }
}

fn flow_after(error: &io::Error) -> Flow {
    match error.kind() {
        ErrorKind::WouldBlock => Flow::WouldBlock,
        ErrorKind::Interrupted => Flow::Ready,
        _ => Flow::Closed,
    }
}

fn token(id: ClientId) -> Token {
    Token(FIRST_CLIENT + id.index())
}
