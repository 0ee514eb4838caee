//! The knobs: what an unprivileged domain may use of the store.
//!
//! | knob                   | bounds                                        | beyond it            |
//! |------------------------|-----------------------------------------------|----------------------|
//! | `nodes`                | nodes it owns                                 | ENOSPC               |
//! | `watches`              | watches of all its connections                | ENOSPC               |
//! | `transactions`         | transactions under way                        | ENOSPC               |
//! | `transaction_nodes`    | nodes one transaction touches                 | ENOSPC, then ENOMEM  |
//! | `permissions`          | entries in a node's permissions               | ENOSPC               |
//! | `node_bytes`           | a node's value, permissions and child names   | ENOSPC               |
//! | `outstanding_requests` | answers it has not read                       | no request is read   |
//! | `outstanding_bytes`    | watch events it has not read                  | events are folded    |
//!
//! The last two hold for dom0 too: they bound the server's own memory.

/// Bounds for each domain, by default those of xenstored.
#[derive(Clone, Copy, Debug)]
pub struct Quota {
    /// Nodes that a domain owns.
    pub nodes: usize,
    /// Watches that a domain has.
    pub watches: usize,
    /// Transactions that a domain has under way.
    pub transactions: usize,
    /// Nodes that one transaction touches.
    pub transaction_nodes: usize,
    /// Entries in one node's permissions.
    pub permissions: usize,
    /// Bytes of one node.
    pub node_bytes: usize,
    /// Answers that a connection has not read.
    pub outstanding_requests: usize,
    /// Bytes of watch events that a connection has not read.
    pub outstanding_bytes: usize,
}

impl Default for Quota {
    fn default() -> Quota {
        Quota {
            nodes: 1000,
            watches: 128,
            transactions: 10,
            transaction_nodes: 1024,
            permissions: 5,
            node_bytes: 2048,
            outstanding_requests: 20,
            outstanding_bytes: 5 << 19,
        }
    }
}
