//! The nodes. A clone of a [`Tree`] is a snapshot: it shares every node until one side changes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::access::Permissions;
use super::path::NodePath;
use crate::units::DomId;
use crate::xen::{NodeAccess, Permission};

/// One node. Its generation changes with its value, its permissions and its list of children.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) value: Arc<[u8]>,
    pub(super) permissions: Permissions,
    pub(super) generation: u64,
    children: BTreeMap<Arc<str>, Arc<Node>>,
    names_bytes: usize,
}

impl Node {
    fn new(value: &[u8], permissions: Permissions, generation: u64) -> Node {
        let children = BTreeMap::new();
        Node { value: value.into(), permissions, generation, children, names_bytes: 0 }
    }

    /// The names of its children, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.children.keys().map(|name| &**name)
    }

    /// Bytes of its children's names, each with a NUL.
    pub(super) fn names_bytes(&self) -> usize {
        self.names_bytes
    }

    fn owner(&self) -> DomId {
        self.permissions[0].domid
    }
}

/// All nodes, and how many each domain owns.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    root: Arc<Node>,
    special: BTreeMap<NodePath, Node>,
    owned: BTreeMap<DomId, usize>,
    generation: u64,
}

impl Default for Tree {
    /// The root and the special nodes, dom0's and closed to others.
    fn default() -> Tree {
        let closed: Permissions =
            [Permission { domid: DomId::DOM0, access: NodeAccess::None }].into();
        let node = || Node::new(b"", Arc::clone(&closed), 1);
        let special = ["@introduceDomain", "@releaseDomain"].map(NodePath::literal);
        Tree {
            root: Arc::new(node()),
            special: special.into_iter().map(|path| (path, node())).collect(),
            owned: BTreeMap::from([(DomId::DOM0, 3)]),
            generation: 1,
        }
    }
}

impl Tree {
    pub(super) fn get(&self, path: &NodePath) -> Option<&Node> {
        if path.is_special() {
            return self.special.get(path);
        }
        path.names().try_fold(&*self.root, |node, name| node.children.get(name).map(|node| &**node))
    }

    /// A node's generation, `None` if it does not exist: equal values mean an equal node.
    pub(super) fn generation(&self, path: &NodePath) -> Option<u64> {
        self.get(path).map(|node| node.generation)
    }

    /// How many nodes a domain owns.
    pub(super) fn owned(&self, domid: DomId) -> usize {
        self.owned.get(&domid).copied().unwrap_or(0)
    }

    /// The permissions of a node and of its parent: who may read either learns of its changes.
    pub(super) fn readers(&self, path: &NodePath) -> Vec<Permissions> {
        let both = [Some(path.clone()), path.parent()];
        let nodes = both.iter().flatten().filter_map(|path| self.get(path));
        nodes.map(|node| Arc::clone(&node.permissions)).collect()
    }

    /// Sets an existing node's value.
    pub(super) fn set_value(&mut self, path: &NodePath, value: &[u8]) {
        if let Some(node) = self.change(path) {
            node.value = value.into();
        }
    }

    /// Sets an existing node's permissions.
    pub(super) fn set_permissions(&mut self, path: &NodePath, permissions: Permissions) {
        let owner = permissions[0].domid;
        if let Some(node) = self.change(path) {
            let before = node.owner();
            node.permissions = permissions;
            self.disown(before);
            self.own(owner);
        }
    }

    /// Adds a node below an existing one. One that exists stays.
    pub(super) fn create(&mut self, path: &NodePath, value: &[u8], permissions: Permissions) {
        let Some(parent) = path.parent() else { return };
        if self.get(path).is_some() {
            return;
        }
        let (owner, generation) = (permissions[0].domid, self.generation + 2);
        let Some(parent) = self.change(&parent) else { return };
        let name: Arc<str> = path.name().into();
        parent.names_bytes += name.len() + 1;
        parent.children.insert(name, Arc::new(Node::new(value, permissions, generation)));
        self.generation = generation;
        self.own(owner);
    }

    /// Removes a node and all below it; the root and special nodes stay.
    pub(super) fn remove(&mut self, path: &NodePath) {
        let Some(parent) = path.parent() else { return };
        if self.get(path).is_none() {
            return;
        }
        let Some(parent) = self.change(&parent) else { return };
        let Some(node) = parent.children.remove(path.name()) else { return };
        parent.names_bytes -= path.name().len() + 1;
        self.disown_all(&node);
    }

    /// A node and all below it, each after its children.
    pub(super) fn below(&self, path: &NodePath) -> Vec<NodePath> {
        let mut found = Vec::new();
        let mut rest: Vec<(NodePath, &Node)> =
            self.get(path).map(|node| (path.clone(), node)).into_iter().collect();
        while let Some((path, node)) = rest.pop() {
            rest.extend(node.children.iter().map(|(name, node)| (path.child(name), &**node)));
            found.push(path);
        }
        found.reverse();
        found
    }

    /// Nodes with a permission entry for a domain: parents first, the special ones last.
    pub(super) fn traces(&self, domid: DomId) -> Vec<NodePath> {
        let mut all = self.below(&NodePath::literal("/"));
        all.reverse();
        all.extend(self.special.keys().cloned());
        let names = |node: &Node| node.permissions.iter().any(|entry| entry.domid == domid);
        all.retain(|path| self.get(path).is_some_and(names));
        all
    }

    /// The node, to be changed. Nodes on the way from the root that a snapshot shares are copied first.
    fn change(&mut self, path: &NodePath) -> Option<&mut Node> {
        self.get(path)?;
        self.generation += 1;
        let node = match path.is_special() {
            true => self.special.get_mut(path)?,
            false => path.names().try_fold(Arc::make_mut(&mut self.root), |node, name| {
                node.children.get_mut(name).map(Arc::make_mut)
            })?,
        };
        node.generation = self.generation;
        Some(node)
    }

    fn own(&mut self, owner: DomId) {
        *self.owned.entry(owner).or_default() += 1;
    }

    fn disown(&mut self, owner: DomId) {
        if let Some(count) = self.owned.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.owned.remove(&owner);
            }
        }
    }

    fn disown_all(&mut self, top: &Node) {
        let mut rest = vec![top];
        while let Some(node) = rest.pop() {
            self.disown(node.owner());
            rest.extend(node.children.values().map(|child| &**child));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn path(text: &str) -> NodePath {
        NodePath::parse(text.as_bytes(), DomId::DOM0, super::super::path::Allowed::Nodes).unwrap()
    }

    fn tree(paths: &[&str]) -> Tree {
        let mut tree = Tree::default();
        let permissions = Arc::clone(&tree.root.permissions);
        for text in paths {
            tree.create(&path(text), b"", Arc::clone(&permissions));
        }
        tree
    }

    #[test]
    fn a_snapshot_does_not_follow_the_tree() {
        let mut tree = tree(&["/a", "/a/b", "/c"]);
        let snapshot = tree.clone();
        tree.set_value(&path("/a/b"), b"new");
        tree.remove(&path("/c"));
        assert_eq!(&*snapshot.get(&path("/a/b")).unwrap().value, b"");
        assert!(snapshot.get(&path("/c")).is_some());
        assert_eq!(snapshot.generation(&path("/a")), tree.generation(&path("/a")));
        assert_ne!(snapshot.generation(&path("/a/b")), tree.generation(&path("/a/b")));
        assert_ne!(snapshot.generation(&path("/")), tree.generation(&path("/")));
    }

    #[test]
    fn a_list_of_children_is_part_of_its_nodes_generation() {
        let mut tree = tree(&["/a"]);
        let before = tree.generation(&path("/a"));
        let permissions = Arc::clone(&tree.root.permissions);
        tree.create(&path("/a/b"), b"", permissions);
        let with_child = tree.generation(&path("/a"));
        assert_ne!(before, with_child);
        assert_ne!(with_child, tree.generation(&path("/a/b")));
        tree.remove(&path("/a/b"));
        assert_ne!(with_child, tree.generation(&path("/a")));
    }

    #[test]
    fn owners_are_counted_through_every_change() {
        let mut tree = tree(&["/a", "/a/b", "/a/c", "/d"]);
        let guest = DomId::try_from(3).unwrap();
        let guests: Permissions = [Permission { domid: guest, access: NodeAccess::None }].into();
        tree.set_permissions(&path("/a/b"), Arc::clone(&guests));
        tree.create(&path("/a/b/x"), b"", guests);
        assert_eq!((tree.owned(DomId::DOM0), tree.owned(guest)), (6, 2));
        tree.remove(&path("/a"));
        assert_eq!((tree.owned(DomId::DOM0), tree.owned(guest)), (4, 0));
    }

    #[test]
    fn what_is_below_comes_before_its_parent() {
        let tree = tree(&["/a", "/a/b", "/a/b/c", "/a/d", "/e"]);
        let below: Vec<String> =
            tree.below(&path("/a")).iter().map(|path| path.as_str().to_owned()).collect();
        assert_eq!(below, ["/a/b/c", "/a/b", "/a/d", "/a"]);
        assert!(tree.below(&path("/missing")).is_empty());
    }
}
