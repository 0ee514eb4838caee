//! Whose turn it is, if several queues of a worker have work.
//!
//! Each has an equal share of the worker's time. A queue that had more than the one that had the least is
//! put off for as long as others have work, so that one request of a guest that asks for little need not
//! wait behind all that another can think of. Nobody is put off for nothing: if no other had work, the
//! one of them that had the least has a turn after all.
//!
//! Each round starts with another queue, so that none is always first at what all share.

use crate::limits::{EFFORT_NS, OPERATION_WEIGHT, TURN_EFFORT};

/// How much more time than the least served a queue may have had and still have its turn. Equal guests
/// differ by less, so that all of them go on having their turns in one pass.
const SLACK_NS: u64 = 50_000;

/// How far a queue may be behind: what it did not use before that is lost. So a queue that begins after a
/// long time keeps the others waiting for no longer than this.
const LAG_MAX_NS: u64 = 4 * SLACK_NS;

/// For so long after it last had work a queue is expected back, and nobody is put off for one that is
/// not. To a guest that comes less often, waiting for a few turns of others is little beside its own pauses.
const EXPECTED_NS: u64 = 200_000;

/// What an operation counts that a thread of the kernel does (a flush, a discard). The worker has no part in
/// that, but often it happens on its core: a thread is woken, switched to, and rings the device's doorbell.
/// For a flush of an ext4 file on virtio that takes 14 us (Linux 6.18). It counts for more, because it takes
/// the core away in the middle of a pass: with 20 us a flood of flushes left another guest 0.7 to 0.9 of
/// its share (`perf/scenarios/hostile-neighbours.toml`), with 40 us all of it.
pub const THREAD_NS: u64 = 40_000;

/// How the time of a worker is shared.
#[derive(Debug, Default)]
pub struct Turns {
    /// Which of the polled queues is first.
    first: usize,
    /// The most that any queue that had a turn has had.
    ahead_ns: u64,
}

/// What it costs the worker to begin an operation without data, as it was lately for one queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct OperationCost {
    effort: u32,
}

impl OperationCost {
    /// Takes note of the time of a turn and the weight of its operations. A cost beyond a turn's effort
    /// counts as that: the turn ends with it in any case, and one that was held up does not count for long.
    pub fn learn(&mut self, weight: u64, time_ns: u64) {
        let time_ns = time_ns.saturating_mul(OPERATION_WEIGHT.into());
        let Some(each_ns) = time_ns.checked_div(weight) else { return };
        let each = u32::try_from(each_ns / EFFORT_NS).unwrap_or(u32::MAX).min(TURN_EFFORT);
        self.effort = (7 * self.effort + each) / 8;
    }

    /// What one counts of a turn's effort: half of its cost, since a batch of too few is dearer for each.
    pub fn effort(self) -> u32 {
        self.effort / 2
    }
}

/// The worker's time that one queue has had, on a scale that all queues of the worker share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeUsed(u64);

impl Turns {
    /// Begins a round of `count` queues: which one is first.
    #[inline]
    pub fn begin(&mut self, count: usize) -> usize {
        self.first = if self.first + 1 < count { self.first + 1 } else { 0 };
        self.first
    }

    /// The numbers of this round's `count` queues, in order.
    #[inline]
    pub fn order(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        (self.first..count).chain(0..self.first.min(count))
    }

    /// The most that a queue may have had to have its turn at `now_ns`; of each that is polled, the time it
    /// has had and when it last had work.
    pub fn limit(&self, now_ns: u64, queues: impl Iterator<Item = (TimeUsed, u64)>) -> TimeUsed {
        let expected = queues.filter(|(_, work_ns)| now_ns.saturating_sub(*work_ns) < EXPECTED_NS);
        let least_ns = expected.map(|(used, _)| self.counted_ns(used)).min();
        TimeUsed(least_ns.map_or(u64::MAX, |least_ns| least_ns.saturating_add(SLACK_NS)))
    }

    /// Takes note of time that a queue has had.
    pub fn charge(&mut self, used: &mut TimeUsed, time_ns: u64) {
        used.0 = self.counted_ns(*used).saturating_add(time_ns);
        self.ahead_ns = self.ahead_ns.max(used.0);
    }

    /// What counts of a queue's time: it is never farther behind than [`LAG_MAX_NS`].
    fn counted_ns(&self, used: TimeUsed) -> u64 {
        used.0.max(self.ahead_ns.saturating_sub(LAG_MAX_NS))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A queue that has work at these times, each turn of which takes `turn_ns`.
    struct Guest {
        turn_ns: u64,
        /// Has nothing to do for so long after each turn.
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

    /// Rounds as a worker does them, for so long; the time that each guest has had.
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
    fn a_guest_that_asks_for_little_has_as_much_beside_greedy_ones_as_beside_its_like() {
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
        assert!(had[0] + had[1] > SECOND * 8 / 10, "nobody is put off for nothing: {had:?}");
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
    fn nobody_is_put_off_for_one_that_is_not_expected_back() {
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
        assert!((dear..TURN_EFFORT / 2).contains(&held_up), "one turn is no rule: {held_up}");
        let cheap = learn(50, 32, 32_000);
        assert!((45..=50).contains(&cheap), "half of 1 us: {cheap}");
    }

    #[test]
    fn another_one_is_first_each_time() {
        let mut turns = Turns::default();
        let firsts: Vec<usize> = (0..5).map(|_| turns.begin(3)).collect();
        assert_eq!(firsts, [1, 2, 0, 1, 2]);
        assert_eq!(turns.begin(1), 0);
    }
}
