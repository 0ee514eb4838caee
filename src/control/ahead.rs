//! Nodes of one area, read together.

use std::io;

use rustc_hash::FxHashMap;

use crate::xen::{Nodes, if_there};

/// Nodes of an area, read in one round trip to xenstored before they are needed.
///
/// Other nodes are read when they are asked for, so the list matters only for speed.
#[derive(Debug)]
pub struct ReadAhead<'a, S> {
    store: &'a S,
    area: &'a str,
    read: FxHashMap<String, io::Result<Box<str>>>,
}

impl<'a, S: Nodes> ReadAhead<'a, S> {
    /// Reads these nodes below `area`. Fails if xenstored does not answer.
    pub fn new(store: &'a S, area: &'a str, nodes: &[&str]) -> io::Result<ReadAhead<'a, S>> {
        let mut ahead = ReadAhead { store, area, read: FxHashMap::default() };
        ahead.read(nodes)?;
        Ok(ahead)
    }

    /// Reads these nodes too, except those read already.
    pub fn read(&mut self, nodes: &[&str]) -> io::Result<()> {
        let missing = |node: &&str| !self.read.contains_key(*node);
        let nodes: Vec<&str> = nodes.iter().copied().filter(missing).collect();
        let texts = self.store.read_all(self.area, &nodes)?;
        self.read.extend(nodes.into_iter().map(str::to_owned).zip(texts));
        Ok(())
    }

    /// What a node holds.
    pub fn take(&mut self, node: &str) -> io::Result<Box<str>> {
        match self.read.remove(node) {
            Some(text) => text,
            None => self.store.read(&format!("{}/{node}", self.area)),
        }
    }

    /// What a node holds; `None` if it is missing.
    pub fn take_if_there(&mut self, node: &str) -> io::Result<Option<Box<str>>> {
        if_there(self.take(node))
    }
}
