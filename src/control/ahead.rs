//! Nodes of one area, read together.

use std::collections::HashMap;
use std::io;

use crate::xen::Nodes;

/// The nodes of an area that will be asked for, read in one round trip to xenstored instead of one each.
///
/// What was not thought of before is read when it is asked for, so the list is about speed only.
#[derive(Debug)]
pub struct ReadAhead<'a, S> {
    store: &'a S,
    area: &'a str,
    read: HashMap<String, io::Result<Box<str>>>,
}

impl<'a, S: Nodes> ReadAhead<'a, S> {
    /// Reads these nodes below `area`; an error means that xenstored is not to be had.
    pub fn new(store: &'a S, area: &'a str, nodes: &[&str]) -> io::Result<ReadAhead<'a, S>> {
        let mut ahead = ReadAhead { store, area, read: HashMap::new() };
        ahead.read(nodes)?;
        Ok(ahead)
    }

    /// Reads further nodes.
    pub fn read(&mut self, nodes: &[&str]) -> io::Result<()> {
        let texts = self.store.read_all(self.area, nodes)?;
        self.read.extend(nodes.iter().map(|node| (*node).to_owned()).zip(texts));
        Ok(())
    }

    /// What a node holds.
    pub fn take(&mut self, node: &str) -> io::Result<Box<str>> {
        match self.read.remove(node) {
            Some(text) => text,
            None => self.store.read(&format!("{}/{node}", self.area)),
        }
    }

    /// What a node holds; `None` where it is not there.
    pub fn take_if_there(&mut self, node: &str) -> io::Result<Option<Box<str>>> {
        match self.take(node) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
