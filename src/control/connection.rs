//! One connection of one disk: all of its queues on their workers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use hdrhistogram::Histogram;

use super::frontend::Published;
use super::key::DiskKey;
use super::machine::Input;
use super::workers::Workers;
use crate::backing::Image;
use crate::blkif::request::DiskRules;
use crate::metrics::{Counts, QueueCounters, new_latency_histogram};
use crate::msg::{Command, Connect, ConnectionId, QueueKey, ReplaceImage, WorkerId};
use crate::units::QueueId;

/// The queues of one connection.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    published: Published,
    queues: Vec<Queue>,
    ending: bool,
    since: Instant,
    latency: Histogram<u64>,
}

#[derive(Debug)]
struct Queue {
    key: QueueKey,
    worker: WorkerId,
    state: QueueState,
    counters: Arc<QueueCounters>,
    latency_asked: bool,
    replacing: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueState {
    Asked,
    Served,
    Down,
}

/// News of a connection for its disk, with the reason if it is a failure.
#[derive(Debug, PartialEq, Eq)]
pub struct News {
    /// The input for the disk's machine.
    pub input: Input,
    /// The reason for `ConnectionFailed` or `ConnectionFault`.
    pub reason: String,
}

impl News {
    fn plain(input: Input) -> Option<News> {
        Some(News { input, reason: String::new() })
    }

    fn because(input: Input, reason: String) -> Option<News> {
        Some(News { input, reason })
    }
}

impl Connection {
    /// Asks workers to serve what the frontend published. The news, if any, is that a worker is missing;
    /// the connection still has to be closed.
    pub fn open(
        disk: &DiskKey,
        published: Published,
        image: &Arc<Image>,
        rules: DiskRules,
        workers: &mut Workers,
        now: Instant,
    ) -> (Connection, Option<News>) {
        let id = workers.begin_connection(disk);
        let budget = workers.budget(disk.domid);
        let mut queues = Vec::with_capacity(published.rings.len());
        let mut news = None;
        for (number, ring) in (0..).zip(&published.rings) {
            let Some(worker) = workers.place() else {
                news = News::because(Input::ConnectionFailed, "no worker is left".to_owned());
                break;
            };
            let key = QueueKey { connection: id, queue: QueueId(number) };
            let counters = Arc::new(QueueCounters::default());
            let connect = Connect {
                key,
                frontend: disk.domid,
                ring_refs: ring.refs.clone(),
                port: ring.port,
                protocol: published.protocol,
                grant_mode: published.grant_mode,
                budget: Arc::clone(&budget),
                rules,
                image: image.clone(),
                counters: counters.clone(),
            };
            let mut queue = Queue {
                key,
                worker,
                state: QueueState::Asked,
                counters,
                latency_asked: false,
                replacing: false,
            };
            if let Err(gone) = workers.send(worker, Command::Connect(Box::new(connect))) {
                queue.set_down(workers);
                news = News::because(Input::ConnectionFailed, gone.to_string());
            }
            queues.push(queue);
        }
        let connection = Connection {
            id,
            published,
            queues,
            ending: false,
            since: now,
            latency: new_latency_histogram(),
        };
        (connection, news)
    }

    /// Its name.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// What the frontend published for it.
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// Asks the workers to end it. There is news at once if no worker had to be asked.
    pub fn close(&mut self, workers: &mut Workers) -> Option<News> {
        self.ending = true;
        for queue in &mut self.queues {
            if queue.state != QueueState::Down
                && workers.send(queue.worker, Command::Disconnect(queue.key)).is_err()
            {
                queue.set_down(workers);
            }
        }
        self.ended()
    }

    /// Notes that a worker serves this queue.
    pub fn queue_connected(&mut self, key: QueueKey) -> Option<News> {
        self.queue(key)?.state = QueueState::Served;
        let served = self.queues.iter().all(|queue| queue.state == QueueState::Served);
        if served && !self.ending { News::plain(Input::ConnectionUp) } else { None }
    }

    /// Asks the workers to change to another image; the news comes when the last one has.
    pub fn replace_image(
        &mut self,
        image: &Arc<Image>,
        rules: DiskRules,
        workers: &mut Workers,
    ) -> Option<News> {
        for queue in self.queues.iter_mut().filter(|queue| queue.state != QueueState::Down) {
            let replace = ReplaceImage { key: queue.key, rules, image: image.clone() };
            let command = Command::ReplaceImage(Box::new(replace));
            if let Err(gone) = workers.send(queue.worker, command) {
                return News::because(Input::ConnectionFault, gone.to_string());
            }
            queue.replacing = true;
        }
        self.replaced()
    }

    /// Notes that this queue has changed to another image.
    pub fn queue_replaced(&mut self, key: QueueKey) -> Option<News> {
        self.queue(key)?.replacing = false;
        self.replaced()
    }

    fn replaced(&self) -> Option<News> {
        let all = self.queues.iter().all(|queue| !queue.replacing);
        if all && !self.ending { News::plain(Input::MediumChanged) } else { None }
    }

    /// Notes that a worker can't serve this queue, which still has to be disconnected with the others.
    pub fn queue_failed(&mut self, key: QueueKey, reason: String) -> Option<News> {
        self.queue(key)?;
        if self.ending { None } else { News::because(Input::ConnectionFailed, reason) }
    }

    /// Notes that the frontend broke the ring protocol on this queue.
    pub fn queue_broken(&mut self, key: QueueKey, reason: String) -> Option<News> {
        self.queue(key)?;
        if self.ending { None } else { News::because(Input::ConnectionFault, reason) }
    }

    /// Notes that the worker has released everything of this queue.
    pub fn queue_disconnected(&mut self, key: QueueKey, workers: &mut Workers) -> Option<News> {
        self.queue(key)?.set_down(workers);
        self.ended()
    }

    /// Notes that a worker has ended, and all of its queues with it.
    pub fn worker_stopped(&mut self, worker: WorkerId, workers: &mut Workers) -> Option<News> {
        let mut hit = false;
        for queue in self.queues.iter_mut().filter(|queue| queue.worker == worker) {
            hit |= queue.state != QueueState::Down;
            queue.set_down(workers);
        }
        match hit {
            true if !self.ending => {
                News::because(Input::ConnectionFault, format!("worker {} has ended", worker.0))
            }
            true => self.ended(),
            false => None,
        }
    }

    /// Asks for latencies; returns the queues whose answers are due.
    pub fn ask_latency(&mut self, workers: &mut Workers) -> BTreeSet<QueueKey> {
        let mut due = BTreeSet::new();
        for queue in self.queues.iter_mut().filter(|queue| queue.state == QueueState::Served) {
            if !queue.latency_asked {
                queue.latency_asked =
                    workers.send(queue.worker, Command::TakeLatency(queue.key)).is_ok();
            }
            if queue.latency_asked {
                due.insert(queue.key);
            }
        }
        due
    }

    /// Asks what is in flight; returns how many answers are due.
    pub fn ask_in_flight(&self, workers: &mut Workers) -> usize {
        let held = self.queues.iter().filter(|queue| queue.state != QueueState::Down);
        held.filter(|queue| workers.send(queue.worker, Command::TellInFlight(queue.key)).is_ok())
            .count()
    }

    /// Takes latencies that a worker handed over.
    pub fn add_latency(&mut self, key: QueueKey, latency: Option<&Histogram<u64>>) {
        let Some(queue) = self.queue(key) else { return };
        queue.latency_asked = false;
        if let Some(latency) = latency {
            // This can't fail, because both have the same bounds.
            let _ = self.latency.add(latency);
        }
    }

    /// The sum of its queues' counters.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        for queue in &self.queues {
            sum += queue.counters.read();
        }
        sum
    }

    /// The latencies handed over so far.
    pub fn latency(&self) -> &Histogram<u64> {
        &self.latency
    }

    /// The workers of its queues, in order.
    pub fn workers(&self) -> Vec<usize> {
        self.queues.iter().map(|queue| queue.worker.0).collect()
    }

    /// When it was begun.
    pub fn since(&self) -> Instant {
        self.since
    }

    fn queue(&mut self, key: QueueKey) -> Option<&mut Queue> {
        self.queues.iter_mut().find(|queue| queue.key == key)
    }

    fn ended(&self) -> Option<News> {
        let down = self.queues.iter().all(|queue| queue.state == QueueState::Down);
        if self.ending && down { News::plain(Input::ConnectionDown) } else { None }
    }
}

impl Queue {
    fn set_down(&mut self, workers: &mut Workers) {
        if self.state != QueueState::Down {
            self.state = QueueState::Down;
            workers.release(self.worker);
        }
    }
}
