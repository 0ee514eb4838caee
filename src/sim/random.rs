//! Choices that a seed repeats.

/// splitmix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The choices of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Any number.
    #[inline]
    #[expect(clippy::should_implement_trait, reason = "there is no end to iterate to")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut hash = self.0;
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^ (hash >> 31)
    }

    /// A number from `low` to `high`, both possible.
    ///
    /// # Panics
    /// If `low` is above `high`.
    pub fn between<N>(&mut self, low: N, high: N) -> N
    where
        N: TryInto<u64> + TryFrom<u64>,
    {
        let [low, high] =
            [low, high].map(|number| number.try_into().ok().expect("at most 64 bits"));
        assert!(low <= high);
        N::try_from(low + self.next() % (high - low + 1)).ok().expect("between two of its kind")
    }

    /// The same, small numbers as often as large ones.
    pub fn between_by_size(&mut self, low: usize, high: usize) -> usize {
        let bound = low.max(1) << self.between(0, (high / low.max(1)).ilog2() + 1);
        self.between(low, bound.clamp(low, high))
    }

    /// A number below `end`.
    ///
    /// # Panics
    /// If `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.between(0, end - 1)
    }

    /// Whether something that happens once in `count` times happens now.
    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    /// Whether something that happens in `percent` of 100 cases happens now.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.between(1, 100) <= percent
    }

    /// One of several.
    ///
    /// # Panics
    /// If there is none.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.between(0, choices.len() - 1)]
    }

    /// Puts things in any order.
    pub fn shuffle<T>(&mut self, things: &mut [T]) {
        for at in (1..things.len()).rev() {
            things.swap(at, self.between(0, at));
        }
    }
}
