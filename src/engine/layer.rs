//! The interface of an engine's layers.

use std::fmt::Debug;
use std::io;

use super::{By, Completion, IoOp, Submitted, Ticket};

/// One layer of an engine. Each owns the layer below it, and the lowest talks to the kernel.
///
/// A layer passes on what it need not change, with the ticket it was given. For everything else it
/// submits operations of its own below, under tickets of a [`Job`](super::Job) kind of its own, and
/// answers the ticket from above when they are done.
pub trait Layer {
    /// What operations go to: what this layer needs to know, and the target of the layer below.
    type Target: Debug;

    /// Takes one operation, does it at once, or has no room for it now. Its buffers stay mapped and its
    /// target stays open until the ticket is back. The operation may not start before the next
    /// [`Layer::kick`].
    fn submit(
        &mut self,
        target: &Self::Target,
        operation: &IoOp<'_>,
        ticket: Ticket,
        by: By,
    ) -> Submitted;

    /// Starts everything taken that is not under way, with at most one system call. After an error
    /// nothing is lost, and the next call tries again.
    fn kick(&mut self) -> io::Result<()>;

    /// Appends what has completed, without jobs of this layer, and goes on with what waited for it. Never
    /// waits.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Operations taken by this layer and those below, and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Gets ready for a sleep: makes the next completion visible on [`Engine::completion_fd`](super::Engine::completion_fd), then looks
    /// once more. `true`: don't sleep, because this layer or one below has something to do.
    fn arm(&mut self) -> io::Result<bool>;
}

#[cfg(test)]
pub mod test;
