//! The policy of waiting: how long a worker that has no work looks for some before it sleeps.
//!
//! Everything here is a pure function of what the worker has observed. [`crate::park`] does the sleeping.
//!
//! # The choice
//!
//! A *pause* is a time without work. Spinning through it costs the core as long as it lasts. Sleeping through
//! it costs [`SleepCost::cpu_ns`], however long it lasts. Nobody knows how long a pause will be, so a worker
//! spins up to a limit and sleeps after that. This is the ski-rental problem (Karlin, Manasse, McGeoch and
//! Owicki, "Competitive randomized algorithms for nonuniform problems", Algorithmica 11, 1994):
//! - a limit equal to the cost of a sleep never costs more than twice what is best in hindsight;
//! - the limit that is cheapest for a known distribution of pauses costs, on average over that distribution,
//!   at most e/(e-1) times that, about 1.58.
//!
//! [`Policy::Auto`] starts with the first and turns to the second as it observes pauses. It keeps one
//! distribution for pauses while storage has requests, whose results are sure to come, and one for others.
//!
//! What this does not know yet: a guest that waits for each answer sleeps because the worker does, so its
//! pauses are longer than they would be if both spun. Then neither ever finds out that spinning is cheaper.
//!
//! [`Policy::UpTo`] buys latency with CPU time: it spins whenever work usually comes within its limit.

use std::fmt;
use std::time::Duration;

/// When a worker without work spins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// If that is expected to cost less CPU time than sleeping.
    Auto,
    /// If work usually comes within this time, or within twice this time while storage has requests; zero:
    /// never.
    UpTo(Duration),
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Auto => f.write_str("auto"),
            Policy::UpTo(limit) => write!(f, "up to {} us", limit.as_micros()),
        }
    }
}

/// The cost of falling asleep and waking up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SleepCost {
    /// CPU time.
    pub cpu_ns: u64,
    /// From the wake-up call to the first instruction after it.
    pub delay_ns: u64,
}

/// Typical of current machines, until it is measured.
impl Default for SleepCost {
    fn default() -> Self {
        SleepCost { cpu_ns: 5_000, delay_ns: 5_000 }
    }
}

/// How long a worker looks for work before it sleeps.
#[derive(Debug)]
pub struct Patience {
    guests: Budget,
    storage: Budget,
    delay_ns: u64,
    pause: Option<Begun>,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    at_ns: u64,
    storage_works: bool,
    slept: bool,
}

/// A pause that has not ended yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// How long it has lasted so far.
    pub lasted_ns: u64,
    /// Whether to keep looking for work.
    pub spins: bool,
    /// The longest time to spin in a pause of its kind.
    pub limit_ns: u64,
}

impl Patience {
    /// The limit of [`Policy::UpTo`] while storage has requests, as a multiple of that for guests.
    const STORAGE_LIMITS: u32 = 2;

    /// No pause yet, on a machine where sleeping costs this.
    pub fn new(policy: Policy, sleep: SleepCost) -> Patience {
        let [guests, storage] = match policy {
            Policy::Auto => [(); 2].map(|()| Budget::Expected(Expected::new(sleep.cpu_ns))),
            Policy::UpTo(limit) => [limit, Self::STORAGE_LIMITS * limit]
                .map(|limit| Budget::Following(Following::new(limit))),
        };
        Patience { guests, storage, delay_ns: sleep.delay_ns, pause: None }
    }

    /// There is no work now. `storage_works` counts only at the beginning of a pause.
    #[inline]
    pub fn goes_on(&mut self, now_ns: u64, storage_works: bool) -> Pause {
        let begun = Begun { at_ns: now_ns, storage_works, slept: false };
        let pause = *self.pause.get_or_insert(begun);
        let (budget_ns, limit_ns) = self.budget(pause).budget_and_limit_ns();
        let lasted_ns = now_ns - pause.at_ns;
        Pause { lasted_ns, spins: lasted_ns < budget_ns, limit_ns }
    }

    /// The worker sleeps in the current pause.
    pub fn sleeps(&mut self) {
        if let Some(pause) = &mut self.pause {
            pause.slept = true;
        }
    }

    /// There was work at `now_ns`, after a pause or not.
    #[inline]
    pub fn ended(&mut self, now_ns: u64) {
        if let Some(pause) = self.pause.take() {
            let delay_ns = if pause.slept { self.delay_ns } else { 0 };
            let lasted_ns = now_ns.saturating_sub(pause.at_ns);
            self.budget(pause).paused(lasted_ns, delay_ns);
        }
    }

    #[inline]
    fn budget(&mut self, pause: Begun) -> &mut Budget {
        if pause.storage_works { &mut self.storage } else { &mut self.guests }
    }
}

/// How long to spin in pauses of one kind.
#[derive(Debug)]
enum Budget {
    Expected(Expected),
    Following(Following),
}

impl Budget {
    #[inline]
    fn budget_and_limit_ns(&self) -> (u64, u64) {
        match self {
            Budget::Expected(expected) => (expected.budget_ns, expected.budget_ns),
            Budget::Following(following) => (following.budget_ns, following.limit_ns),
        }
    }

    /// Work was found after `pause_ns`, of which the last `delay_ns` passed while the worker woke up.
    fn paused(&mut self, pause_ns: u64, delay_ns: u64) {
        match self {
            Budget::Expected(expected) => expected.paused(pause_ns.saturating_sub(delay_ns)),
            Budget::Following(following) => following.paused(pause_ns),
        }
    }
}

/// The budget with the least expected cost, for the distribution of the last pauses.
#[derive(Debug)]
struct Expected {
    sleep_ns: u64,
    budget_ns: u64,
    /// Pauses by their length; the last bucket is for all that are longer than any budget.
    counts: [u32; Expected::BUCKETS + 1],
    total: u32,
}

impl Expected {
    /// Pauses up to this long are told apart.
    const SHORTEST_NS: u64 = 256;

    /// Buckets for each doubling of a pause's length.
    const PER_DOUBLING: usize = 4;

    /// From [`Expected::SHORTEST_NS`] to 512 us.
    const BUCKETS: usize = 1 + 11 * Expected::PER_DOUBLING;

    /// All counts are halved at this number of pauses, so that recent ones count most.
    const PAUSES_MAX: u32 = 256;

    /// The budget is computed again after this number of pauses.
    const PAUSES_PER_CHOICE: u32 = 16;

    /// With nothing observed, a budget as long as a sleep costs.
    fn new(sleep_ns: u64) -> Expected {
        let counts = [0; Expected::BUCKETS + 1];
        Expected { sleep_ns, budget_ns: sleep_ns, counts, total: 0 }
    }

    fn paused(&mut self, pause_ns: u64) {
        self.counts[Self::bucket(pause_ns)] += 1;
        self.total += 1;
        if self.total.is_multiple_of(Self::PAUSES_PER_CHOICE) {
            self.budget_ns = self.cheapest_ns();
        }
        if self.total >= Self::PAUSES_MAX {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().sum();
        }
    }

    /// The budget that would have cost least for all pauses observed.
    fn cheapest_ns(&self) -> u64 {
        let total = u64::from(self.total);
        let (mut best_ns, mut best_cost) = (0, total * self.sleep_ns);
        let (mut within, mut spun_ns) = (0, 0);
        for (bucket, count) in self.counts[..Self::BUCKETS].iter().enumerate() {
            let (count, end_ns) = (u64::from(*count), Self::end_ns(bucket));
            within += count;
            spun_ns += count * end_ns;
            let cost = spun_ns + (total - within) * (end_ns + self.sleep_ns);
            if cost < best_cost {
                (best_ns, best_cost) = (end_ns, cost);
            }
        }
        best_ns
    }

    fn bucket(pause_ns: u64) -> usize {
        (0..Self::BUCKETS).find(|bucket| pause_ns <= Self::end_ns(*bucket)).unwrap_or(Self::BUCKETS)
    }

    /// The longest pause of a bucket.
    fn end_ns(bucket: usize) -> u64 {
        let (doublings, part) = (bucket / Self::PER_DOUBLING, bucket % Self::PER_DOUBLING);
        let start_ns = Self::SHORTEST_NS << doublings;
        start_ns + start_ns * part as u64 / Self::PER_DOUBLING as u64
    }
}

/// A budget that follows the pauses: twice the last ones, never below what a sleep costs, since a shorter spin
/// saves nothing, and half with each pause that was longer than the limit. After several of those in a row
/// it is zero: a loaded worker spins, an idle one costs nothing.
#[derive(Debug)]
struct Following {
    limit_ns: u64,
    budget_ns: u64,
    /// Pauses in a row that were longer than the limit.
    long_pauses: u32,
}

impl Following {
    /// About what it costs to fall asleep and to be woken.
    const SLEEP_COST_NS: u64 = 10_000;

    /// After this number of long pauses in a row the worker counts as idle.
    const LONG_PAUSES_MAX: u32 = 8;

    /// A budget of at most `limit`; zero means never spin.
    fn new(limit: Duration) -> Following {
        let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        Following { limit_ns, budget_ns: limit_ns, long_pauses: 0 }
    }

    /// Work came after a pause, spun or slept.
    fn paused(&mut self, pause_ns: u64) {
        let least_ns = Self::SLEEP_COST_NS.min(self.limit_ns);
        if pause_ns <= self.limit_ns {
            self.long_pauses = 0;
            let wanted_ns = pause_ns.saturating_mul(2).clamp(least_ns, self.limit_ns);
            self.budget_ns = wanted_ns.max(self.budget_ns - self.budget_ns / 8);
        } else if self.long_pauses < Self::LONG_PAUSES_MAX {
            self.long_pauses += 1;
            self.budget_ns = least_ns.max(self.budget_ns / 2);
        } else {
            self.budget_ns = 0;
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn patience(limit_us: u64) -> Patience {
        Patience::new(Policy::UpTo(Duration::from_micros(limit_us)), SleepCost::default())
    }

    #[test]
    fn what_storage_works_on_is_looked_for_longer() {
        let mut patience = patience(50);
        let waits = |patience: &mut Patience, lasted_ns: u64, storage_works: bool| {
            patience.ended(0);
            patience.goes_on(0, storage_works);
            patience.goes_on(lasted_ns, !storage_works)
        };
        for (storage_works, limit_ns) in [(false, 50_000), (true, 100_000)] {
            for (lasted_ns, spins) in [(limit_ns - 1, true), (limit_ns, false)] {
                let pause = waits(&mut patience, lasted_ns, storage_works);
                assert_eq!(pause, Pause { lasted_ns, spins, limit_ns });
            }
        }
    }

    #[test]
    fn each_kind_of_pause_has_its_own_past() {
        let mut patience = patience(50);
        for _ in 0..20 {
            for (storage_works, lasts_ns) in [(true, 1_000_000), (false, 20_000)] {
                patience.goes_on(0, storage_works);
                patience.ended(lasts_ns);
            }
        }
        assert!(!patience.goes_on(0, true).spins, "storage takes its time");
        patience.ended(0);
        patience.goes_on(0, false);
        assert!(patience.goes_on(30_000, false).spins, "guests come within twice 20 us");
    }

    #[test]
    fn work_without_a_pause_tells_nothing() {
        let mut patience = patience(50);
        (0..100).for_each(|at_us| patience.ended(at_us * 1_000_000));
        patience.goes_on(0, false);
        assert!(patience.goes_on(49_999, false).spins);
    }

    #[test]
    fn the_budget_is_twice_the_pauses_and_no_less_than_a_sleep_costs() {
        let mut budget = Following::new(Duration::from_micros(50));
        assert_eq!(budget.budget_ns, 50_000);
        (0..100).for_each(|_| budget.paused(8_000));
        assert_eq!(budget.budget_ns, 16_000);
        (0..100).for_each(|_| budget.paused(10));
        assert_eq!(budget.budget_ns, 10_000);
        budget.paused(20_000);
        assert_eq!(budget.budget_ns, 40_000);
        budget.paused(50_000);
        assert_eq!(budget.budget_ns, 50_000);
    }

    #[test]
    fn only_a_row_of_long_pauses_ends_all_spinning() {
        let mut budget = Following::new(Duration::from_micros(50));
        for _ in 0..100 {
            budget.paused(1_000_000);
            budget.paused(1_000);
        }
        assert_eq!(budget.budget_ns, 10_000);
        (0..9).for_each(|_| budget.paused(1_000_000));
        assert_eq!(budget.budget_ns, 0);
        budget.paused(1_000_000);
        assert_eq!(budget.budget_ns, 0);
        budget.paused(5_000);
        assert_eq!(budget.budget_ns, 10_000);
    }

    #[test]
    fn a_limit_of_zero_never_spins() {
        let mut budget = Following::new(Duration::ZERO);
        budget.paused(0);
        budget.paused(1_000);
        assert_eq!(budget.budget_ns, 0);
    }

    /// The budget after many pauses of these lengths in turn, if a sleep costs 5 us.
    fn expected_ns(pauses_ns: &[u64]) -> u64 {
        let mut expected = Expected::new(5_000);
        pauses_ns.iter().cycle().take(1000).for_each(|pause_ns| expected.paused(*pause_ns));
        expected.budget_ns
    }

    #[test]
    fn spinning_is_chosen_where_it_costs_less() {
        assert_eq!(Expected::new(5_000).budget_ns, 5_000, "nothing is known yet");
        assert_eq!(expected_ns(&[100_000]), 0, "work never comes in time");
        let soon_ns = expected_ns(&[2_000]);
        assert!((2_000..=2_500).contains(&soon_ns), "{soon_ns}");
        let mostly_soon_ns = expected_ns(&[1_000, 1_000, 1_000, 1_000, 80_000]);
        assert!((1_000..=1_250).contains(&mostly_soon_ns), "{mostly_soon_ns}");
        assert_eq!(expected_ns(&[4_000, 80_000]), 0, "half of the time it would be for nothing");
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let mut expected = Expected::new(5_000);
        (0..10_000).for_each(|_| expected.paused(100_000));
        (0..1_000).for_each(|_| expected.paused(1_000));
        assert!((1_000..=1_250).contains(&expected.budget_ns));
    }

    #[test]
    fn the_delay_of_a_wake_up_is_no_part_of_a_pause() {
        let sleep = SleepCost { cpu_ns: 5_000, delay_ns: 30_000 };
        let mut patience = Patience::new(Policy::Auto, sleep);
        for _ in 0..1_000 {
            patience.goes_on(0, false);
            patience.sleeps();
            patience.ended(32_000);
        }
        assert!(
            patience.goes_on(1_900, false).spins
                || patience.goes_on(1_901, false).lasted_ns < 2_000
        );
        patience.ended(0);
        patience.goes_on(0, false);
        assert!(patience.goes_on(2_000, false).spins, "work comes after 2 us");
    }

    proptest::proptest! {
        /// The cost of every choice is within the bound of the module's documentation, up to the width of a
        /// bucket.
        #[test]
        fn no_distribution_costs_more_than_it_may(
            pauses_ns in proptest::collection::vec(300u64..400_000, 16..17),
        ) {
            let budget_ns = expected_ns(&pauses_ns);
            let cost = |pause_ns: &u64| match *pause_ns <= budget_ns {
                true => *pause_ns,
                false => budget_ns + 5_000,
            };
            let best: u64 = pauses_ns.iter().map(|pause_ns| *pause_ns.min(&5_000)).sum();
            let chosen: u64 = pauses_ns.iter().map(cost).sum();
            proptest::prop_assert!(chosen as f64 <= 1.59 * 1.25 * best as f64, "{chosen} {best}");
        }
    }
}
