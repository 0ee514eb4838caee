//! Paths of nodes: one that exists as a [`NodePath`] is absolute and well formed.

use std::fmt;
use std::sync::Arc;

use crate::limits::{XENSTORE_ABS_PATH_MAX, XENSTORE_REL_PATH_MAX};
use crate::units::DomId;

/// Which paths a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowed {
    /// Nodes of the tree.
    Nodes,
    /// Those and the special ones, `@introduceDomain` and the like.
    Special,
}

/// An absolute path, or a special one (`@...`). Sorts after its parents.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NodePath(Arc<str>);

impl NodePath {
    /// The path that `alleged` names for a domain: a relative one starts at the domain's home.
    pub(super) fn parse(alleged: &[u8], domid: DomId, allowed: Allowed) -> Option<NodePath> {
        if alleged.is_empty() || !alleged.iter().all(|&byte| is_path_byte(byte)) {
            return None;
        }
        let text = std::str::from_utf8(alleged).ok()?;
        if text.starts_with('@') {
            return (allowed == Allowed::Special && text.len() <= XENSTORE_ABS_PATH_MAX)
                .then(|| NodePath(text.into()));
        }
        let path = match text.starts_with('/') {
            true => text.to_owned(),
            false => format!("{}/{text}", home(domid)),
        };
        let well_formed = path == "/" || (!path.ends_with('/') && !path.contains("//"));
        let short =
            path.len() <= XENSTORE_ABS_PATH_MAX && local_len(&path) <= XENSTORE_REL_PATH_MAX;
        (well_formed && short).then(|| NodePath(path.into()))
    }

    /// A path known to be well formed.
    pub(super) fn literal(text: &'static str) -> NodePath {
        NodePath(text.into())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn is_root(&self) -> bool {
        &*self.0 == "/"
    }

    pub(super) fn is_special(&self) -> bool {
        self.0.starts_with('@')
    }

    /// The names from the root down to this node; none for the root.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }

    /// The last name.
    pub(super) fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// The node above; `None` for the root and for special nodes.
    pub(super) fn parent(&self) -> Option<NodePath> {
        match self.0.rsplit_once('/')? {
            ("", "") => None,
            ("", _) => Some(NodePath::literal("/")),
            (parent, _) => Some(NodePath(parent.into())),
        }
    }

    /// The node of that name below.
    pub(super) fn child(&self, name: &str) -> NodePath {
        let above = if self.is_root() { "" } else { self.as_str() };
        NodePath(format!("{above}/{name}").into())
    }
}

impl fmt::Debug for NodePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a domain's relative paths start.
pub(super) fn home(domid: DomId) -> String {
    format!("/local/domain/{domid}")
}

fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte)
}

/// Bytes of a path without the home of whichever domain it is in.
fn local_len(path: &str) -> usize {
    let local = path.strip_prefix("/local/domain/").and_then(|rest| rest.split_once('/'));
    match local {
        Some((domid, local)) if domid.bytes().all(|byte| byte.is_ascii_digit()) => local.len(),
        _ => path.len(),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn parse(text: &str) -> Option<NodePath> {
        NodePath::parse(text.as_bytes(), DomId::try_from(5).unwrap(), Allowed::Nodes)
    }

    #[test]
    fn relative_paths_start_at_the_domains_home() {
        assert_eq!(parse("device/vbd").unwrap().as_str(), "/local/domain/5/device/vbd");
        assert_eq!(parse("/a").unwrap().as_str(), "/a");
    }

    #[test]
    fn malformed_paths_are_refused() {
        for text in ["", "//", "/a/", "/a//b", "/a b", "/a.b", "a/", "@x", "/\u{e4}", "/a\0"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert!(NodePath::parse(b"@x", DomId::DOM0, Allowed::Special).is_some());
    }

    #[test]
    fn long_paths_are_refused_by_their_part_below_the_home() {
        let local = "a".repeat(XENSTORE_REL_PATH_MAX);
        assert!(parse(&local).is_some());
        assert!(parse(&format!("/local/domain/7/{local}")).is_some());
        assert!(parse(&format!("{local}a")).is_none());
        assert!(parse(&format!("/{local}")).is_none());
    }

    #[test]
    fn the_way_up_ends_at_the_root() {
        let path = parse("/a/b").unwrap();
        assert_eq!((path.name(), path.names().count()), ("b", 2));
        let above = path.parent().unwrap();
        assert_eq!(above.child("b"), path);
        let root = above.parent().unwrap();
        assert!(root.is_root() && root.parent().is_none() && root.names().next().is_none());
        assert_eq!(root.child("a"), above);
        assert!(root < above && above < path);
    }
}
