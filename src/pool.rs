//! Resources that several holders share without any of them starving another.
//!
//! A [`Pool`] has a guaranteed part for each holder and a common part for all, first come, first served.
//! What a holder uses counts against its guaranteed part until that is used up. So a take within the
//! guaranteed part never fails, whatever the others hold. In total a pool can give out its common part and
//! a guaranteed part for each holder.
//!
//! The holder is a queue, not a domain: the queues of a domain on one worker are nearly always those of
//! different disks, and a part for each also keeps one hung disk of a guest from stopping the guest's
//! other disks.
//!
//! A pool only counts: its owner decides who waits, and who is served when something was given back.
//! [`Lanes`] is a pool together with the items that wait for it.
//!
//! To add a pool that the queues of a worker share: its amounts go to `limits`, the pool to
//! [`Resources`](crate::queue::Resources), and a [`Share`] to the queue. A queue that finds nothing left
//! keeps its request and waits. A give-back must count up `Resources::give_backs`, or those queues wait on.

use std::collections::VecDeque;

/// How many of something there are, and how many of the common ones are used.
#[derive(Debug)]
pub struct Pool {
    guaranteed: usize,
    common: usize,
    common_used: usize,
}

/// What one holder uses of a pool.
#[derive(Debug, Default)]
pub struct Share {
    used: usize,
}

impl Pool {
    /// A pool with `guaranteed` for each holder, and `common` for all.
    pub const fn new(guaranteed: usize, common: usize) -> Pool {
        Pool { guaranteed, common, common_used: 0 }
    }

    /// How many this holder could take now.
    #[inline]
    pub fn available(&self, share: &Share) -> usize {
        let common = self.common.saturating_sub(self.common_used);
        self.guaranteed.saturating_sub(share.used) + common
    }

    /// Takes `count`, or none; returns whether it did.
    #[inline]
    pub fn take(&mut self, share: &mut Share, count: usize) -> bool {
        if count > self.available(share) {
            return false;
        }
        self.take_beyond(share, count);
        true
    }

    /// Takes `count`, even if there are fewer.
    #[inline]
    pub fn take_beyond(&mut self, share: &mut Share, count: usize) {
        self.set_used(share, share.used + count);
    }

    /// Gives back `count`.
    ///
    /// # Panics
    /// If the holder does not have that many.
    #[inline]
    pub fn give_back(&mut self, share: &mut Share, count: usize) {
        let used = share.used.checked_sub(count).expect("what is given back was taken");
        self.set_used(share, used);
    }

    fn set_used(&mut self, share: &mut Share, used: usize) {
        self.common_used -= share.used.saturating_sub(self.guaranteed);
        self.common_used += used.saturating_sub(self.guaranteed);
        share.used = used;
    }
}

impl Share {
    /// How many the holder has.
    #[inline]
    pub fn used(&self) -> usize {
        self.used
    }
}

/// A pool whose holders have numbers, and the items that wait for it, in order for each holder.
#[derive(Debug)]
pub struct Lanes<T> {
    pool: Pool,
    /// By the holder's number.
    lanes: Vec<Lane<T>>,
    parked: usize,
    /// The lane that [`Lanes::waiting`] starts with next time.
    turn: usize,
}

#[derive(Debug)]
struct Lane<T> {
    share: Share,
    parked: VecDeque<T>,
}

impl<T> Lanes<T> {
    /// Lanes of which nothing is taken.
    pub const fn new(pool: Pool) -> Lanes<T> {
        Lanes { pool, lanes: Vec::new(), parked: 0, turn: 0 }
    }

    /// Whether a holder could take one.
    pub fn has_room(&mut self, holder: usize) -> bool {
        self.grow(holder);
        self.pool.available(&self.lanes[holder].share) > 0
    }

    /// Takes one for a holder; returns whether there was one.
    pub fn take(&mut self, holder: usize) -> bool {
        self.grow(holder);
        self.pool.take(&mut self.lanes[holder].share, 1)
    }

    /// Gives back one that a holder has.
    ///
    /// # Panics
    /// If it has none.
    pub fn give_back(&mut self, holder: usize) {
        self.pool.give_back(&mut self.lanes[holder].share, 1);
    }

    /// Keeps an item that could not begin.
    pub fn park(&mut self, holder: usize, item: T) {
        self.grow(holder);
        self.lanes[holder].parked.push_back(item);
        self.parked += 1;
    }

    /// Takes out a holder's first waiting item.
    pub fn next_of(&mut self, holder: usize) -> Option<T> {
        let item = self.lanes.get_mut(holder)?.parked.pop_front()?;
        self.parked -= 1;
        Some(item)
    }

    /// Takes out a holder's first waiting item and one of the pool for it, if there are both.
    pub fn admit(&mut self, holder: usize) -> Option<T> {
        if !self.has_room(holder) {
            return None;
        }
        let item = self.next_of(holder)?;
        assert!(self.take(holder), "there was room");
        Some(item)
    }

    /// Puts back an item that was taken out and still can't begin.
    pub fn put_back(&mut self, holder: usize, item: T) {
        self.lanes[holder].parked.push_front(item);
        self.parked += 1;
    }

    /// The holders that have something waiting, starting from the next one each time.
    pub fn waiting(&mut self) -> impl Iterator<Item = usize> + use<T> {
        let (count, start) = (self.lanes.len(), self.turn);
        self.turn = if start + 1 < count { start + 1 } else { 0 };
        let waits: Vec<usize> = (start..count)
            .chain(0..start.min(count))
            .filter(|holder| !self.lanes[*holder].parked.is_empty())
            .collect();
        waits.into_iter()
    }

    /// How many items wait.
    #[inline]
    pub fn parked(&self) -> usize {
        self.parked
    }

    fn grow(&mut self, holder: usize) {
        if holder >= self.lanes.len() {
            let empty = || Lane { share: Share::default(), parked: VecDeque::new() };
            self.lanes.resize_with(holder + 1, empty);
        }
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const HOLDERS: usize = 4;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Any order of takes and returns of any sizes.
        #[test]
        fn a_guaranteed_part_is_never_lent_out(
            guaranteed in 0..8usize,
            common in 0..16usize,
            steps in prop::collection::vec((0..HOLDERS, 0..12usize, any::<bool>()), 0..200),
        ) {
            let mut pool = Pool::new(guaranteed, common);
            let mut shares: [Share; HOLDERS] = Default::default();
            for (holder, count, takes) in steps {
                let share = &mut shares[holder];
                let used = share.used();
                if takes {
                    let could = pool.available(share);
                    let took = pool.take(share, count);
                    prop_assert_eq!(took, count <= could);
                    prop_assert!(took || used + count > guaranteed);
                    prop_assert_eq!(share.used(), if took { used + count } else { used });
                } else {
                    pool.give_back(share, count.min(used));
                }
                let over = |share: &Share| share.used().saturating_sub(guaranteed);
                prop_assert_eq!(pool.common_used, shares.iter().map(over).sum::<usize>());
                prop_assert!(pool.common_used <= common);
                for share in &shares {
                    prop_assert!(pool.available(share) + share.used() >= guaranteed);
                }
            }
            let free = |share: &Share| guaranteed.saturating_sub(share.used());
            let used: usize = shares.iter().map(Share::used).sum();
            let left = common - pool.common_used + shares.iter().map(free).sum::<usize>();
            prop_assert_eq!(used + left, common + HOLDERS * guaranteed, "nothing is lost");
        }
    }

    #[test]
    #[should_panic(expected = "was taken")]
    fn nothing_comes_back_twice() {
        let (mut pool, mut share) = (Pool::new(2, 2), Share::default());
        assert!(pool.take(&mut share, 3));
        pool.give_back(&mut share, 3);
        pool.give_back(&mut share, 1);
    }

    #[test]
    fn what_waits_goes_on_in_its_holders_order_and_each_holder_is_first_in_turn() {
        let mut lanes = Lanes::new(Pool::new(1, 0));
        for (holder, item) in [(0, "a"), (2, "b"), (0, "c"), (3, "d")] {
            lanes.park(holder, item);
        }
        assert!(lanes.take(0) && !lanes.take(0) && lanes.take(2));
        let mut orders = (0..5).map(|_| lanes.waiting().collect::<Vec<_>>());
        assert_eq!(orders.next().unwrap(), [0, 2, 3]);
        assert_eq!(orders.next().unwrap(), [2, 3, 0]);
        assert_eq!(orders.next().unwrap(), [2, 3, 0]);
        assert_eq!(orders.next().unwrap(), [3, 0, 2]);
        assert_eq!(orders.next().unwrap(), [0, 2, 3]);
        let first = lanes.next_of(0).unwrap();
        lanes.put_back(0, first);
        assert_eq!(
            [lanes.next_of(0), lanes.next_of(0), lanes.next_of(0)],
            [Some("a"), Some("c"), None]
        );
        assert_eq!(lanes.parked(), 2);
        lanes.give_back(0);
        assert!(lanes.take(0));
    }
}
