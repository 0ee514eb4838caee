//! The end of a file that fills no block of its storage, where sectors are emulated: its bytes go by
//! a descriptor of their own, in any sectors ([`crate::backing::Tail`]).

use std::os::fd::RawFd;

use super::emulate::cut;
use super::{IoOp, bytes};
use crate::backing::Tail;
use crate::xen::shm::GuestBuf;

/// Where an operation goes.
#[derive(Debug)]
pub enum Side<'a> {
    /// To the whole blocks; of a transfer that goes on in the tail only its beginning, for the queue asks
    /// for the rest.
    Blocks(IoOp<'a>),
    /// To the tail, by this descriptor.
    Tail(RawFd),
}

/// Which side an operation is for, of a file that may have a tail; `parts` has room for a list of
/// buffers.
pub fn side<'a>(
    operation: &IoOp<'a>,
    tail: Option<&Tail>,
    parts: &'a mut Vec<GuestBuf>,
) -> Side<'a> {
    let Some(tail) = tail else { return Side::Blocks(*operation) };
    let (IoOp::Read { offset, buffers } | IoOp::Write { offset, buffers }) = *operation else {
        // A flush is of the file, and a discard leaves parts of blocks alone.
        return Side::Blocks(*operation);
    };
    let room = tail.start().saturating_sub(offset);
    if room == 0 {
        return Side::Tail(tail.raw_fd());
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
