//! Whose turn it is when several queues of a worker have work.
//!
//! Each gets an equal share of the worker's time. A queue that has had more time than the least served one
//! is put off while others have work, so that a guest with few requests does not wait behind one with many.
//! If no other queue turns out to have work, the least served of those put off has a turn after all.
//!
//! Each round starts with the next queue, so that none is always first to take what all share.

use crate::limits::{EFFORT_NS, OPERATION_WEIGHT, TURN_EFFORT};

/// How much more time than the least served queue a queue may have had before it is put off. Equally busy
/// guests differ by less, so that each of them has a turn in every pass.
const SLACK_NS: u64 = 50_000;

/// How much unused time a queue can save up. So a queue that was idle for long does not keep the others
/// waiting for longer than this.
const LAG_MAX_NS: u64 = 4 * SLACK_NS;

/// How long after its last work a queue is expected back; no other is put off for one that isn't. A guest
/// that sends requests less often may wait for a few turns of others, which is little compared with its
/// pauses.
const EXPECTED_NS: u64 = 200_000;

/// The time charged for an operation that a kernel thread executes (a flush, a discard). The worker has no
/// part in that, but it often happens on the worker's core: a thread is woken, switched to, and rings the
/// device's doorbell. For a flush of an ext4 file on virtio that takes 14 us (Linux 6.18). More is charged,
/// because it takes the core away in the middle of a pass: with 20 us, a flood of flushes left another guest
/// 0.7 to 0.9 of its share (`perf/scenarios/hostile-neighbours.toml`), with 40 us all of it.
pub const THREAD_NS: u64 = 40_000;

/// How the time of a worker is shared.
#[derive(Debug, Default)]
pub struct Turns {
    /// Index of the polled queue that is first in this round.
    first: usize,
    /// The most time that any queue has had.
    ahead_ns: u64,
}

/// What it has lately cost the worker to begin an operation of one queue, not counting its data.
#[derive(Clone, Copy, Debug, Default)]
pub struct OperationCost {
    effort: u32,
}

impl OperationCost {
    /// Records the time of a turn and the weight of its operations. The cost is at most a whole turn's
    /// effort, which ends the turn in any case; so a turn that was held up once is soon forgotten.
    pub fn learn(&mut self, weight: u64, time_ns: u64) {
        let time_ns = time_ns.saturating_mul(OPERATION_WEIGHT.into());
        let Some(each_ns) = time_ns.checked_div(weight) else { return };
        let each = u32::try_from(each_ns / EFFORT_NS).unwrap_or(u32::MAX).min(TURN_EFFORT);
        self.effort = (7 * self.effort + each) / 8;
    }

    /// The effort charged for one operation: half of its cost, because each costs more in too small a batch.
    pub fn effort(self) -> u32 {
        self.effort / 2
    }
}

/// The time that one queue has had, on a scale that all queues of the worker share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeUsed(u64);

impl Turns {
    /// Begins a round of `count` queues; returns the index of the first.
    #[inline]
    pub fn begin(&mut self, count: usize) -> usize {
        self.first = if self.first + 1 < count { self.first + 1 } else { 0 };
        self.first
    }

    /// The indices of this round's `count` queues, in order.
    #[inline]
    pub fn order(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        (self.first..count).chain(0..self.first.min(count))
    }

    /// The most time that a queue may have had without being put off at `now_ns`. `queues` says for each
    /// polled queue how much time it has had and when it last had work.
    pub fn limit(&self, now_ns: u64, queues: impl Iterator<Item = (TimeUsed, u64)>) -> TimeUsed {
        let expected = queues.filter(|(_, work_ns)| now_ns.saturating_sub(*work_ns) < EXPECTED_NS);
        let least_ns = expected.map(|(used, _)| self.counted_ns(used)).min();
        TimeUsed(least_ns.map_or(u64::MAX, |least_ns| least_ns.saturating_add(SLACK_NS)))
    }

    /// Charges a queue for time that it has had.
    pub fn charge(&mut self, used: &mut TimeUsed, time_ns: u64) {
        used.0 = self.counted_ns(*used).saturating_add(time_ns);
        self.ahead_ns = self.ahead_ns.max(used.0);
    }

    /// The time that a queue counts as having had: it is never more than [`LAG_MAX_NS`] behind.
    fn counted_ns(&self, used: TimeUsed) -> u64 {
        used.0.max(self.ahead_ns.saturating_sub(LAG_MAX_NS))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A queue whose turns each take `turn_ns`.
    struct Guest {
        turn_ns: u64,
        /// How long it has no work after each turn.
        thinks_ns: u64,
        ready_at_ns: u64,
        used: TimeUsed,
        had_ns: u64,
        worked_ns: u64,
    }

    impl Guest {
        fn new(turn_ns: u64, thinks_ns: u64) -> Guest {
            let used = TimeUsed::default();
            Guest { turn_ns, thinks_ns, ready_at_ns: 0, used, had_ns: 0, worked_ns: 0 }
        }
    }

    /// Plays rounds as a worker does, for `lasts_ns`; returns the time that each guest has had.
    fn play(guests: &mut [Guest], lasts_ns: u64) -> Vec<u64> {
        let (mut turns, mut now_ns) = (Turns::default(), 0);
        while now_ns < lasts_ns {
            turns.begin(guests.len());
            let all = guests.iter().map(|guest| (guest.used, guest.worked_ns));
            let limit = turns.limit(now_ns, all);
            let order = turns.order(guests.len());
            let mut put_off: Vec<usize> = Vec::new();
            let mut worked = false;
            let mut turn = |guest: &mut Guest, now_ns: &mut u64| {
                if guest.ready_at_ns > *now_ns {
                    return false;
                }
                *now_ns += guest.turn_ns;
                guest.had_ns += guest.turn_ns;
                guest.worked_ns = *now_ns;
                turns.charge(&mut guest.used, guest.turn_ns);
                guest.ready_at_ns = *now_ns + guest.thinks_ns;
                true
            };
            for index in order {
                if guests[index].used > limit {
                    put_off.push(index);
                } else {
                    worked |= turn(&mut guests[index], &mut now_ns);
                }
            }
            put_off.retain(|index| guests[*index].ready_at_ns <= now_ns);
            if !worked
                && let Some(index) = put_off.into_iter().min_by_key(|index| guests[*index].used)
            {
                turn(&mut guests[index], &mut now_ns);
            }
            // Looking at all rings takes time too.
            now_ns += 100;
        }
        guests.iter().map(|guest| guest.had_ns).collect()
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_guest_with_few_requests_gets_as_much_beside_greedy_guests_as_beside_its_equals() {
        for thinks_ns in [0, 2_000, 20_000, 100_000] {
            let like = || Guest::new(4_000, thinks_ns);
            let greedy = || Guest::new(10_000, 0);
            let polite = play(&mut [like(), like(), like(), like(), like()], SECOND)[0];
            let beside = play(&mut [like(), greedy(), greedy(), greedy(), greedy()], SECOND)[0];
            assert!(beside * 10 >= polite * 8, "{thinks_ns}: {beside} of {polite}");
        }
    }

    #[test]
    fn greedy_guests_share_what_others_leave_equally() {
        let mut guests = [Guest::new(12_000, 0), Guest::new(3_000, 0), Guest::new(1_000, 50_000)];
        let had = play(&mut guests, SECOND);
        assert!(had[0].abs_diff(had[1]) < SECOND / 100, "{had:?}");
        assert!(had[0] + had[1] > SECOND * 8 / 10, "no time is wasted: {had:?}");
    }

    #[test]
    fn a_queue_that_slept_has_not_saved_up_time() {
        let mut turns = Turns::default();
        let (mut busy, mut slept) = (TimeUsed::default(), TimeUsed::default());
        turns.charge(&mut busy, SECOND);
        let now_ns = SECOND;
        let is_ahead = |turns: &Turns, busy, slept| {
            busy > turns.limit(now_ns, [(busy, now_ns), (slept, now_ns)].into_iter())
        };
        assert!(is_ahead(&turns, busy, slept));
        let mut turns_until_level = 0;
        while is_ahead(&turns, busy, slept) {
            turns.charge(&mut slept, 10_000);
            turns_until_level += 1;
        }
        assert!(turns_until_level <= LAG_MAX_NS / 10_000);
    }

    #[test]
    fn no_queue_is_put_off_for_one_that_is_not_expected_back() {
        let mut turns = Turns::default();
        let (mut busy, idle) = (TimeUsed::default(), TimeUsed::default());
        turns.charge(&mut busy, SECOND);
        for (idle_ns, has_turn) in [(0, false), (EXPECTED_NS - 1, false), (EXPECTED_NS, true)] {
            let queues = [(busy, SECOND), (idle, SECOND - idle_ns)];
            assert_eq!(busy <= turns.limit(SECOND, queues.into_iter()), has_turn);
        }
        assert!(busy <= turns.limit(SECOND, std::iter::once((idle, 0))), "nobody is expected");
    }

    #[test]
    fn the_cost_of_an_operation_follows_what_turns_took() {
        let mut cost = OperationCost::default();
        let mut learn = |turns: u32, operations: u64, time_ns: u64| {
            let weight = operations * u64::from(OPERATION_WEIGHT);
            (0..turns).for_each(|_| cost.learn(weight, time_ns));
            cost.effort()
        };
        assert_eq!(learn(1, 0, 1_000_000), 0, "nothing went to storage");
        let dear = learn(50, 8, 32_000);
        assert!((190..=200).contains(&dear), "half of 4 us: {dear}");
        let held_up = learn(1, 1, SECOND);
        assert!((dear..TURN_EFFORT / 2).contains(&held_up), "one slow turn: {held_up}");
        let cheap = learn(50, 32, 32_000);
        assert!((45..=50).contains(&cheap), "half of 1 us: {cheap}");
    }

    #[test]
    fn each_round_starts_with_the_next_queue() {
        let mut turns = Turns::default();
        let firsts: Vec<usize> = (0..5).map(|_| turns.begin(3)).collect();
        assert_eq!(firsts, [1, 2, 0, 1, 2]);
        assert_eq!(turns.begin(1), 0);
    }
}
