//! Watch events that wait for their reader, in bounded memory (XSA-326, XSA-349).
//!
//! An event only says "look again", so of equal events only one is kept. If too many wait, an event for
//! `/a/b/c` is kept as one for the watched path itself, `/a`. A new watch sends that one first, too, so it
//! means "look at everything below again". So there are never more events than the bound and one for each
//! watch, and no change goes unnoticed.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use crate::xen::WatchEvent;

/// Whether a watch on `watched` sees changes of `path`: the node itself and everything below.
pub fn covers(watched: &str, path: &str) -> bool {
    match path.strip_prefix(watched) {
        Some(below) => below.is_empty() || below.starts_with('/') || watched == "/",
        None => false,
    }
}

/// Distinct events in the order they first came.
#[derive(Debug, Default)]
pub struct EventQueue {
    order: VecDeque<Arc<WatchEvent>>,
    waiting: HashSet<Arc<WatchEvent>>,
    bytes: usize,
}

impl EventQueue {
    /// Keeps an event of a watch on `watched`. `full` says that the owner's bound is reached.
    pub fn push(&mut self, mut event: WatchEvent, watched: &str, full: bool) {
        if full && !self.waiting.contains(&event) {
            watched.clone_into(&mut event.path);
        }
        let event = Arc::new(event);
        if self.waiting.insert(Arc::clone(&event)) {
            self.bytes += event.path.len() + event.token.len();
            self.order.push_back(event);
        }
    }

    /// Takes the oldest event.
    pub fn pop(&mut self) -> Option<WatchEvent> {
        let event = self.order.pop_front()?;
        self.waiting.remove(&event);
        self.bytes -= event.path.len() + event.token.len();
        Some(Arc::unwrap_or_clone(event))
    }

    /// Keeps only the events that `wanted` accepts.
    pub fn retain(&mut self, wanted: impl Fn(&WatchEvent) -> bool) {
        for event in std::mem::take(self).order {
            if wanted(&event) {
                self.bytes += event.path.len() + event.token.len();
                self.waiting.insert(Arc::clone(&event));
                self.order.push_back(event);
            }
        }
    }

    /// How many events wait.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Bytes of the paths and tokens that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn event(path: &str) -> WatchEvent {
        WatchEvent { path: path.into(), token: "t".into() }
    }

    fn paths(queue: &mut EventQueue) -> Vec<String> {
        std::iter::from_fn(|| queue.pop()).map(|event| event.path).collect()
    }

    #[test]
    fn a_watch_covers_its_node_and_everything_below() {
        for (watched, path) in [("/", "/a"), ("/", "/"), ("/a", "/a"), ("/a", "/a/b"), ("a", "a/b")]
        {
            assert!(covers(watched, path), "{watched} {path}");
        }
        for (watched, path) in
            [("/a", "/"), ("/a", "/ab"), ("/a/b", "/a"), ("/", "@x"), ("a", "/a")]
        {
            assert!(!covers(watched, path), "{watched} {path}");
        }
    }

    #[test]
    fn equal_events_are_one_and_keep_the_first_place() {
        let mut queue = EventQueue::default();
        for path in ["/a/1", "/a/2", "/a/1"] {
            queue.push(event(path), "/a", false);
        }
        assert_eq!(queue.bytes(), 10);
        assert_eq!(paths(&mut queue), ["/a/1", "/a/2"]);
        assert_eq!(queue.bytes(), 0);
    }

    #[test]
    fn past_the_bound_each_watch_keeps_one_event_for_all_below_it() {
        let mut queue = EventQueue::default();
        for number in 0..1000 {
            let full = queue.len() >= 2;
            queue.push(event(&format!("/a/{number}")), "/a", full);
        }
        assert_eq!(paths(&mut queue), ["/a/0", "/a/1", "/a"]);
    }

    #[test]
    fn unwanted_events_are_dropped() {
        let mut queue = EventQueue::default();
        for path in ["/a", "/b", "/c"] {
            queue.push(event(path), path, false);
        }
        queue.retain(|event| event.path != "/b");
        queue.push(event("/b"), "/b", false);
        assert_eq!(paths(&mut queue), ["/a", "/c", "/b"]);
    }
}
