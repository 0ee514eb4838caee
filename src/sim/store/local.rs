//! The core in its callers' threads: a request is answered before the call that sent it returns.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::core::{ClientId, StoreCore};
use super::quota::Quota;
use crate::park::Doorbell;
use crate::units::DomId;
use crate::xen::store::StoreClient;
use crate::xen::store::transport::Transport;
use crate::xen::store::wire::Inbox;

/// A xenstore without a server. Clones are the same one.
#[derive(Clone, Debug)]
pub struct LocalStore {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    core: StoreCore,
    /// Each client's, which rings for messages to it.
    bells: BTreeMap<ClientId, Doorbell>,
}

/// A client's end.
#[derive(Debug)]
struct Stream {
    store: LocalStore,
    id: ClientId,
    bell: Doorbell,
    state: RefCell<State>,
}

/// Bytes under way.
#[derive(Debug, Default)]
struct State {
    /// Requests of the client.
    inbox: Inbox,
    /// Messages to it, in the order in which a server would have sent them.
    messages: VecDeque<Vec<u8>>,
    /// The one that it reads, of which the first `read` bytes were read.
    outbox: Vec<u8>,
    read: usize,
    /// A message was read to its end since the client was last told that nothing is here.
    pauses: bool,
}

impl LocalStore {
    /// An empty store.
    pub fn new(quota: Quota) -> LocalStore {
        let shared = Shared { core: StoreCore::new(quota), bells: BTreeMap::new() };
        LocalStore { shared: Arc::new(Mutex::new(shared)) }
    }

    /// A new connection that is served as that domain's.
    pub fn connect_as(&self, domid: DomId) -> io::Result<StoreClient> {
        let bell = Doorbell::new()?;
        let id = {
            let mut shared = self.lock();
            let id = shared.core.connect(domid);
            shared.bells.insert(id, bell.clone());
            id
        };
        let state = RefCell::default();
        StoreClient::over(Box::new(Stream { store: self.clone(), id, bell, state }))
    }

    /// Announces a domain (`@introduceDomain`); creates no node.
    pub fn introduce(&self, domid: DomId) {
        self.change(|core| core.introduce(domid));
    }

    /// Announces a guest's end (`@releaseDomain`): its connections close, and its nodes, watches and
    /// transactions go.
    pub fn release(&self, domid: DomId) {
        self.change(|core| core.release(domid));
    }

    /// Changes the core, and rings for the messages that this causes.
    fn change<T>(&self, change: impl FnOnce(&mut StoreCore) -> T) -> T {
        let shared = &mut *self.lock();
        let value = change(&mut shared.core);
        for id in shared.core.take_ready() {
            if let Some(bell) = shared.bells.get(&id) {
                bell.ring();
            }
        }
        value
    }

    /// Requests are served whole, so it is whole even if a thread panicked while it held the lock.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    /// Serves what has been sent, and takes all messages to the client.
    fn serve(&self, state: &mut State) -> io::Result<()> {
        self.store.change(|core| {
            while core.accepts(self.id) {
                let request = state.inbox.take().map_err(io::Error::other)?;
                let Some(request) = request else { break };
                core.handle(self.id, request);
            }
            state.messages.extend(iter::from_fn(|| core.next_message(self.id)));
            if core.is_connected(self.id) {
                Ok(())
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
        })
    }

    /// Makes bytes of the next message if all before it are read. Between two messages the client finds
    /// nothing once, and its bell rings again: messages of a real server may arrive one by one, too.
    fn refill(&self, state: &mut State) {
        if state.read < state.outbox.len() {
            return;
        }
        state.read = 0;
        state.outbox.clear();
        if std::mem::take(&mut state.pauses) {
            self.bell.ring();
        } else if let Some(message) = state.messages.pop_front() {
            state.outbox = message;
            state.pauses = true;
        }
    }
}

impl Transport for Stream {
    fn send(&self, messages: &[u8]) -> io::Result<()> {
        let state = &mut *self.state.borrow_mut();
        let mut rest = messages;
        while !rest.is_empty() {
            let space = state.inbox.space();
            let count = space.len().min(rest.len());
            space[..count].copy_from_slice(&rest[..count]);
            state.inbox.filled(count);
            rest = &rest[count..];
            self.serve(state)?;
        }
        Ok(())
    }

    fn receive(&self, space: &mut [u8]) -> io::Result<Option<usize>> {
        let state = &mut *self.state.borrow_mut();
        self.bell.silence();
        self.serve(state)?;
        self.refill(state);
        let rest = &state.outbox[state.read..];
        let count = rest.len().min(space.len());
        space[..count].copy_from_slice(&rest[..count]);
        state.read += count;
        if state.read < state.outbox.len() || !state.messages.is_empty() {
            self.bell.ring();
        }
        Ok((count > 0).then_some(count))
    }

    /// One at a time: there is no latency to hide, and a batch's answers could exceed the quota.
    fn takes_batches(&self) -> bool {
        false
    }

    fn is_lost_by_failed_send(&self) -> bool {
        true
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut shared = self.store.lock();
        shared.core.disconnect(self.id);
        shared.bells.remove(&self.id);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod test {
    use std::time::Duration;

    use xenstore_rs::Xs;

    use super::*;
    use crate::park;
    use crate::xen::Store;

    #[test]
    fn the_descriptor_is_readable_while_an_event_waits_behind_an_answer() {
        let client = LocalStore::new(Quota::default()).connect_as(DomId::DOM0).unwrap();
        let is_readable = || park::sleep(&[client.as_fd()], Some(Duration::ZERO))[0];
        client.watch("/a", "token").unwrap();
        while client.next_event().unwrap().is_some() || client.next_event().unwrap().is_some() {}
        assert!(!is_readable());
        client.write("/a", "1").unwrap();
        assert!(is_readable());
        let events = [(); 2].map(|()| client.next_event().unwrap());
        assert_eq!(events.iter().flatten().count(), 1);
    }
}
