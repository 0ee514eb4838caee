//! The daemon's side of the admin socket: bounded lines from a bounded number of clients, without ever
//! waiting for them.

use std::io::{self, Read, Write};
use std::path::Path;

use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry as Polled, Token};
use rustc_hash::FxHashMap;

use super::place::{self, BindError, Place};
use super::protocol::{Reply, Request};
use crate::limits;

/// A listening admin socket and its clients. Clients have tokens from `FIRST_CLIENT` up, each used only
/// once.
#[derive(Debug)]
pub struct Server {
    /// Dropped before the listener, so that the socket is never taken for a dead daemon's.
    _place: Place,
    listener: UnixListener,
    clients: FxHashMap<Token, Client>,
    next_token: usize,
}

/// The first token of a client; control uses the lower ones.
pub const FIRST_CLIENT: usize = 1 << 16;

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// A request is being worked on; the next is read after its reply.
    waiting: bool,
    /// It has closed its sending side.
    ended: bool,
}

impl Server {
    /// Listens at `path`, for its owner only. A socket that a dead daemon left is replaced.
    pub fn bind(path: &Path, polled: &Polled, token: Token) -> Result<Server, BindError> {
        let (mut listener, place) = place::listen(path)?;
        polled
            .register(&mut listener, token, Interest::READABLE)
            .map_err(|source| BindError::Failed { path: path.to_owned(), source })?;
        let clients = FxHashMap::default();
        Ok(Server { _place: place, listener, clients, next_token: FIRST_CLIENT })
    }

    /// Accepts new clients; those over the limit are refused.
    pub fn accept(&mut self, polled: &Polled) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream, polled),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::warn!("cannot accept an admin client: {error}");
                    }
                    return;
                }
            }
        }
    }

    fn admit(&mut self, mut stream: UnixStream, polled: &Polled) {
        if self.clients.len() == limits::ADMIN_CLIENTS_MAX {
            tracing::warn!("too many admin clients; one was refused");
            let message = "too many commands at once; try again".to_owned();
            let reply = serde_json::to_vec(&Reply::Error { message }).unwrap_or_default();
            // If the answer can't be sent at once, the client gets none.
            let _ = stream.write(&[&reply[..], b"\n"].concat());
            return;
        }
        let token = Token(self.next_token);
        self.next_token += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = polled.register(&mut stream, token, interest) {
            tracing::warn!("cannot watch an admin client: {error}");
            return;
        }
        let client =
            Client { stream, inbox: Vec::new(), outbox: Vec::new(), waiting: false, ended: false };
        self.clients.insert(token, client);
    }

    /// Writes to and reads from a client whose socket became ready; returns its next request, if complete.
    pub fn pump(&mut self, token: Token) -> Option<Request> {
        let client = self.clients.get_mut(&token)?;
        let request = client.write().and_then(|()| client.next_request());
        let (request, done) = match request {
            Ok(request) => (request, client.is_done()),
            Err(error) => {
                tracing::debug!("an admin client was dropped: {error}");
                (None, true)
            }
        };
        if done {
            self.clients.remove(&token);
        }
        request
    }

    /// Answers a client's request; does nothing if the client has gone. Call [`Server::pump`] afterwards.
    pub fn reply(&mut self, token: Token, reply: &Reply) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        match serde_json::to_writer(&mut client.outbox, reply) {
            Ok(()) => client.outbox.push(b'\n'),
            Err(error) => tracing::error!("a reply can't be written as JSON: {error}"),
        }
        client.waiting = false;
    }
}

impl Client {
    fn is_done(&self) -> bool {
        self.ended && !self.waiting && self.outbox.is_empty()
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            match self.stream.write(&self.outbox) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.outbox.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn next_request(&mut self) -> io::Result<Option<Request>> {
        if self.waiting || !self.outbox.is_empty() {
            return Ok(None);
        }
        let Some(line) = self.next_line()? else { return Ok(None) };
        let request = serde_json::from_slice(&line)?;
        self.waiting = true;
        Ok(Some(request))
    }

    fn next_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(end) = self.inbox.iter().position(|byte| *byte == b'\n') {
                let rest = self.inbox.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.inbox, rest)));
            }
            if self.inbox.len() > limits::ADMIN_LINE_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its line is too long"));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(None);
                }
                Ok(read) => self.inbox.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
