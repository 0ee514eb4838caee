//! Which worker serves a queue: the one with the fewest queues.

use crate::msg::WorkerId;

/// How many queues each worker serves. Each placed queue is released once.
#[derive(Debug)]
pub struct Placement {
    /// By worker; `None` for one that has ended.
    loads: Vec<Option<usize>>,
}

impl Placement {
    /// A placement for `workers` workers without queues.
    pub fn new(workers: usize) -> Placement {
        Placement { loads: vec![Some(0); workers] }
    }

    /// Places a queue on the least loaded worker, the one with the lowest number among equals; `None` if
    /// all workers have ended.
    pub fn place(&mut self) -> Option<WorkerId> {
        let alive = self.loads.iter_mut().enumerate();
        let (index, load) = alive
            .filter_map(|(index, load)| load.as_mut().map(|load| (index, load)))
            .min_by_key(|(index, load)| (**load, *index))?;
        *load += 1;
        Some(WorkerId(index))
    }

    /// Takes a queue off its worker.
    pub fn release(&mut self, worker: WorkerId) {
        if let Some(Some(load)) = self.loads.get_mut(worker.0) {
            assert!(*load > 0, "worker {} has no queue to release", worker.0);
            *load -= 1;
        }
    }

    /// Excludes a worker that has ended.
    pub fn remove(&mut self, worker: WorkerId) {
        if let Some(load) = self.loads.get_mut(worker.0) {
            *load = None;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn queues_go_to_the_least_loaded_worker_and_ties_to_the_lowest() {
        let mut placement = Placement::new(3);
        let placed: Vec<_> = (0..4).filter_map(|_| placement.place()).map(|id| id.0).collect();
        assert_eq!(placed, [0, 1, 2, 0]);
        placement.release(WorkerId(1));
        assert_eq!(placement.place(), Some(WorkerId(1)));
        assert_eq!(placement.place(), Some(WorkerId(1)));
    }

    #[test]
    fn a_worker_that_ended_gets_no_queue() {
        let mut placement = Placement::new(2);
        placement.place();
        placement.remove(WorkerId(0));
        placement.release(WorkerId(0));
        assert_eq!(placement.place(), Some(WorkerId(1)));
        placement.remove(WorkerId(1));
        assert_eq!(placement.place(), None);
    }

    proptest! {
        #[test]
        fn loads_differ_by_one_at_most(workers in 1usize..9, queues in 0usize..100) {
            let mut placement = Placement::new(workers);
            let mut loads = vec![0; workers];
            for _ in 0..queues {
                loads[placement.place().unwrap().0] += 1;
            }
            prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1);
        }
    }
}
