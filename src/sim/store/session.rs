//! One request on the nodes: a caller, a tree (the live one or a transaction's) and the footprint
//! that it leaves. Every check comes before the first change, so a refused request changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Errno;
use super::access::{Caller, Permissions, Right};
use super::path::{Allowed, NodePath};
use super::quota::Quota;
use super::tree::{Node, Tree};
use super::watch::{Change, Reach};
use crate::limits::XENSTORE_PAYLOAD_MAX;
use crate::units::parse_decimal;
use crate::xen::Permission;
use crate::xen::store::wire::{self, Op};

/// What requests saw and did.
#[derive(Debug, Default)]
pub(super) struct Footprint {
    /// Nodes that were looked at, also those that did not exist.
    pub(super) seen: BTreeSet<NodePath>,
    /// Nodes that were written, created or removed.
    pub(super) modified: BTreeSet<NodePath>,
    /// Changes to report to watches, in order, each node once.
    changes: Vec<Change>,
    told: BTreeMap<NodePath, usize>,
}

impl Footprint {
    /// Adds a change, or widens the reach of the one that its node has already.
    fn tell(&mut self, change: Change) {
        match self.told.get(&change.path) {
            Some(&index) => {
                let reach = &mut self.changes[index].reach;
                *reach = change.reach.max(*reach);
            }
            None => {
                self.told.insert(change.path.clone(), self.changes.len());
                self.changes.push(change);
            }
        }
    }

    /// The changes, in order.
    pub(super) fn into_changes(self) -> Vec<Change> {
        self.changes
    }
}

/// A request being served.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) caller: Caller,
    pub(super) quota: &'a Quota,
    pub(super) tree: &'a mut Tree,
    pub(super) footprint: &'a mut Footprint,
}

const ACK: &[u8] = b"OK\0";

impl Session<'_> {
    /// Serves a request; `ENOSYS` if it is none on nodes.
    pub(super) fn serve(&mut self, op: Op, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        match op {
            Op::Directory => self.directory(payload),
            Op::DirectoryPart => self.directory_part(payload),
            Op::Read => self.read(payload),
            Op::Write => self.write(payload).map(|()| ACK.to_vec()),
            Op::Mkdir => self.mkdir(payload).map(|()| ACK.to_vec()),
            Op::Rm => self.rm(payload).map(|()| ACK.to_vec()),
            Op::GetPerms => self.get_perms(payload),
            Op::SetPerms => self.set_perms(payload).map(|()| ACK.to_vec()),
            _ => Err(libc::ENOSYS),
        }
    }

    fn directory(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(only_string(payload)?, Allowed::Nodes)?;
        let node = self.find(&path, Right::Read)?;
        Ok(name_list(node))
    }

    fn directory_part(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let [path, offset] = exactly(payload)?;
        let path = self.path(path, Allowed::Nodes)?;
        let offset = std::str::from_utf8(offset).ok().and_then(parse_decimal::<usize>);
        let offset = offset.ok_or(libc::EINVAL)?;
        let node = self.find(&path, Right::Read)?;
        let mut answer = format!("{}\0", node.generation).into_bytes();
        let list = name_list(node);
        let rest = list.get(offset..).unwrap_or_default();
        // Whole names only, and a byte is left for the NUL that ends the list.
        let room = XENSTORE_PAYLOAD_MAX - answer.len() - 1;
        let part = match rest.len() <= room {
            true => rest,
            false => {
                &rest[..rest[..room].iter().rposition(|&byte| byte == 0).map_or(0, |at| at + 1)]
            }
        };
        answer.extend_from_slice(part);
        if part.len() == rest.len() {
            answer.push(0);
        }
        Ok(answer)
    }

    fn read(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(only_string(payload)?, Allowed::Nodes)?;
        Ok(self.find(&path, Right::Read)?.value.to_vec())
    }

    fn get_perms(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = self.path(only_string(payload)?, Allowed::Special)?;
        let node = self.find(&path, Right::Read)?;
        let texts = node.permissions.iter().map(|entry| wire::permission_text(*entry) + "\0");
        Ok(texts.collect::<String>().into_bytes())
    }

    fn write(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let end = payload.iter().position(|&byte| byte == 0).ok_or(libc::EINVAL)?;
        let (path, value) = (self.path(&payload[..end], Allowed::Nodes)?, &payload[end + 1..]);
        let readers_before = self.tree.readers(&path);
        match self.find(&path, Right::Write) {
            Ok(node) => {
                let bytes = node_bytes(value.len(), &node.permissions, node.names_bytes());
                self.check_node_bytes(bytes)?;
                self.tree.set_value(&path, value);
                self.footprint.modified.insert(path.clone());
            }
            Err(libc::ENOENT) => self.create(&path, value)?,
            Err(errno) => return Err(errno),
        }
        self.footprint.tell(Change { path, reach: Reach::Subtree, readers_before });
        Ok(())
    }

    fn mkdir(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let path = self.path(only_string(payload)?, Allowed::Nodes)?;
        let readers_before = self.tree.readers(&path);
        match self.find(&path, Right::Write) {
            Ok(_) => return Ok(()),
            Err(libc::ENOENT) => self.create(&path, b"")?,
            Err(errno) => return Err(errno),
        }
        self.footprint.tell(Change { path, reach: Reach::Subtree, readers_before });
        Ok(())
    }

    /// Creates a missing node and all missing nodes above it. They inherit the permissions of
    /// the node that exists, but a guest owns what it creates.
    fn create(&mut self, path: &NodePath, value: &[u8]) -> Result<(), Errno> {
        let mut missing = vec![path.clone()];
        let mut above = path.parent().ok_or(libc::EINVAL)?;
        while self.tree.get(&above).is_none() {
            let next = above.parent().ok_or(libc::EINVAL)?;
            missing.push(std::mem::replace(&mut above, next));
        }
        self.footprint.seen.insert(above.clone());
        let parent = self.tree.get(&above).ok_or(libc::ENOENT)?;
        let mut permissions = parent.permissions.to_vec();
        if !self.caller.is_privileged() {
            permissions[0].domid = self.caller.domid;
        }
        let permissions: Permissions = permissions.into();
        self.check_creation(parent, &missing, value, &permissions)?;
        for path in missing.iter().rev() {
            self.tree.create(path, b"", Arc::clone(&permissions));
        }
        self.tree.set_value(path, value);
        self.footprint.seen.extend(missing.iter().cloned());
        self.footprint.modified.extend(missing);
        Ok(())
    }

    fn check_creation(
        &self,
        parent: &Node,
        missing: &[NodePath],
        value: &[u8],
        permissions: &Permissions,
    ) -> Result<(), Errno> {
        if self.caller.is_privileged() {
            return Ok(());
        }
        if self.tree.owned(self.caller.domid) + missing.len() > self.quota.nodes {
            return Err(libc::ENOSPC);
        }
        let mut names: Vec<usize> = missing.iter().map(|path| path.name().len() + 1).collect();
        if let Some(topmost) = names.last_mut() {
            *topmost += parent.names_bytes();
        }
        // Each new name is in the list of the node above it; the lowest node has only its value.
        self.check_node_bytes(node_bytes(value.len(), permissions, 0))?;
        for names_bytes in &names[..names.len() - 1] {
            self.check_node_bytes(node_bytes(0, permissions, *names_bytes))?;
        }
        let topmost = names[names.len() - 1];
        self.check_node_bytes(node_bytes(parent.value.len(), &parent.permissions, topmost))
    }

    fn rm(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let path = self.path(only_string(payload)?, Allowed::Nodes)?;
        match self.find(&path, Right::Write) {
            Ok(_) => {}
            Err(libc::ENOENT) => return self.removed_already(&path),
            Err(errno) => return Err(errno),
        }
        if path.is_root() {
            return Err(libc::EINVAL);
        }
        self.remove(&path);
        Ok(())
    }

    /// Removing what does not exist is fine if the node above does.
    fn removed_already(&mut self, path: &NodePath) -> Result<(), Errno> {
        let parent = path.parent().ok_or(libc::ENOENT)?;
        self.footprint.seen.insert(parent.clone());
        self.tree.get(&parent).map(drop).ok_or(libc::ENOENT)
    }

    /// Removes an existing node with all below it, of any owner.
    pub(super) fn remove(&mut self, path: &NodePath) {
        for gone in self.tree.below(path) {
            let reach = if gone == *path { Reach::Subtree } else { Reach::Exact };
            let readers_before = self.tree.readers(&gone);
            self.footprint.seen.insert(gone.clone());
            self.footprint.modified.insert(gone.clone());
            self.footprint.tell(Change { path: gone, reach, readers_before });
        }
        self.footprint.seen.extend(path.parent());
        self.tree.remove(path);
    }

    fn set_perms(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let mut strings = wire::strings(payload);
        let alleged = strings.next().ok_or(libc::EINVAL)?;
        let entries: Option<Vec<Permission>> = strings.map(wire::parse_permission).collect();
        let entries = entries.filter(|entries| !entries.is_empty()).ok_or(libc::EINVAL)?;
        if !self.caller.is_privileged() && entries.len() > self.quota.permissions {
            return Err(libc::ENOSPC);
        }
        let path = self.path(alleged, Allowed::Special)?;
        let readers_before = self.tree.readers(&path);
        let node = self.find(&path, Right::Own)?;
        let owner = node.permissions[0].domid;
        let bytes = node_bytes(node.value.len(), &entries, node.names_bytes());
        if !self.caller.is_privileged() && entries[0].domid != owner {
            return Err(libc::EPERM);
        }
        self.check_node_bytes(bytes)?;
        self.tree.set_permissions(&path, entries.into());
        self.footprint.modified.insert(path.clone());
        self.footprint.tell(Change { path, reach: Reach::Subtree, readers_before });
        Ok(())
    }

    fn path(&self, alleged: &[u8], allowed: Allowed) -> Result<NodePath, Errno> {
        NodePath::parse(alleged, self.caller.domid, allowed).ok_or(libc::EINVAL)
    }

    /// The node, if the caller has this right to it.
    fn find(&mut self, path: &NodePath, right: Right) -> Result<&Node, Errno> {
        self.footprint.seen.insert(path.clone());
        match self.tree.get(path) {
            Some(node) if self.caller.may(right, &node.permissions) => Ok(node),
            Some(_) => Err(self.refusal(path, right, libc::EACCES)),
            None => Err(self.refusal(path, right, libc::ENOENT)),
        }
    }

    /// `errno` for someone who has the right to the nearest node above, who may know; EACCES for
    /// anybody else, whether the node exists or not. For ownership, to be able to write is enough.
    fn refusal(&self, path: &NodePath, right: Right, errno: Errno) -> Errno {
        let right = if right == Right::Own { Right::Write } else { right };
        let mut above = path.parent();
        while let Some(path) = above {
            if let Some(node) = self.tree.get(&path) {
                let knows = self.caller.may(right, &node.permissions);
                return if knows { errno } else { libc::EACCES };
            }
            above = path.parent();
        }
        if self.caller.is_privileged() { errno } else { libc::EACCES }
    }

    fn check_node_bytes(&self, bytes: usize) -> Result<(), Errno> {
        let fits = self.caller.is_privileged() || bytes <= self.quota.node_bytes;
        if fits { Ok(()) } else { Err(libc::ENOSPC) }
    }
}

/// What counts against the quota of a node's size.
fn node_bytes(value: usize, permissions: &[Permission], names: usize) -> usize {
    value + 8 * permissions.len() + names
}

fn name_list(node: &Node) -> Vec<u8> {
    let mut list = Vec::with_capacity(node.names_bytes());
    for name in node.names() {
        list.extend_from_slice(name.as_bytes());
        list.push(0);
    }
    list
}

/// The one string of a payload that holds nothing else.
pub(super) fn only_string(payload: &[u8]) -> Result<&[u8], Errno> {
    exactly(payload).map(|[string]| string)
}

/// The strings of a payload that must hold exactly `N`.
pub(super) fn exactly<const N: usize>(payload: &[u8]) -> Result<[&[u8]; N], Errno> {
    if !payload.ends_with(&[0]) {
        return Err(libc::EINVAL);
    }
    let strings: Vec<&[u8]> = wire::strings(payload).collect();
    strings.try_into().map_err(|_| libc::EINVAL)
}
