//! The tail of a file with emulated sectors: its end, which does not fill a block of its storage. It takes
//! any sectors, through a descriptor of its own ([`crate::backing::Tail`]).

use super::emulate::cut;
use super::{IoOp, bytes};
use crate::backing::Tail;
use crate::xen::shm::GuestBuf;

/// Where an operation goes.
#[derive(Debug)]
pub enum Side<'a, T> {
    /// To the whole blocks. A transfer that reaches into the tail ends before it, and the queue asks
    /// for the rest.
    Blocks(IoOp<'a>),
    /// To the tail.
    Tail(&'a T),
}

/// Where an operation goes on a file that may have a tail; `parts` is reused for a list of buffers.
pub fn side<'a, T>(
    operation: &IoOp<'a>,
    tail: Option<&'a Tail<T>>,
    parts: &'a mut Vec<GuestBuf>,
) -> Side<'a, T> {
    let Some(tail) = tail else { return Side::Blocks(*operation) };
    let (IoOp::Read { offset, buffers } | IoOp::Write { offset, buffers }) = *operation else {
        // A flush is of the whole file, and a discard leaves parts of blocks as they are.
        return Side::Blocks(*operation);
    };
    let room = tail.start.saturating_sub(offset);
    if room == 0 {
        return Side::Tail(&tail.below);
    }
    if room >= u64::from(bytes(buffers)) {
        return Side::Blocks(*operation);
    }
    // Less than the buffers hold, which is far below 4 GiB.
    cut(buffers, u32::try_from(room).unwrap_or(u32::MAX), parts);
    Side::Blocks(match operation {
        IoOp::Write { .. } => IoOp::Write { offset, buffers: parts },
        _ => IoOp::Read { offset, buffers: parts },
    })
}
