//! A xenstore server that stands in for xenstored.
//!
//! [`StoreCore`] is the daemon without I/O: messages in, messages out, nothing depends on time or
//! on chance, so that a simulation can drive it. [`StoreServer`] serves it on a unix socket, to our
//! own client as to Xen's tools; [`LocalStore`] without a socket, to our own client only. What a client
//! can see is xenstored's (`docs/misc/xenstore.txt` of Xen, and if that says nothing, what its C
//! implementation does), except:
//! - a node's children are listed in alphabetical order, not in the order of their creation;
//! - tokens must be UTF-8;
//! - xenstored drops the watch events of a domain that doesn't read them; here they are folded
//!   into one for each watch (see [`crate::xen::store::events`]);
//! - features, the protocol's quota requests and live update are not there (ENOSYS or EINVAL).

mod access;
mod core;
mod local;
mod path;
mod quota;
mod server;
mod session;
mod transaction;
mod tree;
mod watch;

#[cfg(test)]
mod test;

pub use self::core::{ClientId, StoreCore};
pub use local::LocalStore;
pub use quota::Quota;
pub use server::StoreServer;

/// An errno value, as it goes back to the client.
type Errno = i32;
