//! A lowest layer for the tests of those above it.

use super::*;
use crate::engine::bytes;
use crate::xen::shm::GuestBuf;

/// Storage that keeps what it takes until the test completes it.
#[derive(Debug)]
pub struct Below<T> {
    /// In the order in which they came.
    pub taken: Vec<Taken<T>>,
    /// Refuses everything.
    pub is_full: bool,
    completed: Vec<Completion>,
}

/// An operation that was taken.
#[derive(Debug)]
pub struct Taken<T> {
    pub target: T,
    /// Such as `read 4096+8192`.
    pub text: String,
    pub buffers: Vec<GuestBuf>,
    pub ticket: Ticket,
    pub by: By,
}

impl<T> Below<T> {
    pub fn new() -> Below<T> {
        Below { taken: Vec::new(), is_full: false, completed: Vec::new() }
    }

    pub fn texts(&self) -> Vec<&str> {
        self.taken.iter().map(|taken| taken.text.as_str()).collect()
    }

    /// Completes the operation that was taken first.
    pub fn complete(&mut self, result: i32) {
        let ticket = self.taken.remove(0).ticket;
        self.completed.push(Completion { ticket, result });
    }
}

impl<T: Clone + Debug> Layer for Below<T> {
    type Target = T;

    fn submit(&mut self, target: &T, operation: &IoOp<'_>, ticket: Ticket, by: By) -> Submitted {
        if self.is_full {
            return Submitted::Full(ticket);
        }
        let (text, buffers) = match *operation {
            IoOp::Read { offset, buffers } => {
                (format!("read {offset}+{}", bytes(buffers)), buffers)
            }
            IoOp::Write { offset, buffers } => {
                (format!("write {offset}+{}", bytes(buffers)), buffers)
            }
            IoOp::Discard { offset, len, .. } => (format!("discard {offset}+{len}"), &[][..]),
            IoOp::Flush => ("flush".to_owned(), &[][..]),
        };
        let (target, buffers) = (target.clone(), buffers.to_vec());
        self.taken.push(Taken { target, text, buffers, ticket, by });
        Submitted::Started
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.completed);
    }

    fn in_flight(&self) -> usize {
        self.taken.len() + self.completed.len()
    }

    fn arm(&mut self) -> io::Result<bool> {
        Ok(!self.completed.is_empty())
    }
}
