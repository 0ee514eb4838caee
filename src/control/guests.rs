//! What each guest may cost control, across all of its disks: log lines and looks at its xenstore areas.
//!
//! Both are counted per guest, so that reconnecting or adding disks gains it nothing (XSA-180, XSA-349).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::limits;
use crate::units::DomId;

/// All guests that have or had a disk.
#[derive(Debug, Default)]
pub struct Guests {
    known: BTreeMap<DomId, Guest>,
}

#[derive(Debug, Default)]
struct Guest {
    log: LogBudget,
    looks: Pace,
    /// xenstored has said that the domain exists.
    introduced: bool,
}

/// Permission to write one line.
#[derive(Debug, PartialEq, Eq)]
pub struct LogPermit {
    /// Lines suppressed since the last one that was written.
    pub suppressed: u64,
}

impl Guests {
    /// Asks to write a log line that this guest has caused.
    pub fn may_log(&mut self, domid: DomId, now: Instant) -> Option<LogPermit> {
        self.known.entry(domid).or_default().log.ask(now)
    }

    /// Asks to look at what this guest has written; if there were too many looks, returns when to ask again.
    pub fn may_look(&mut self, domid: DomId, now: Instant) -> Result<(), Instant> {
        let looks = &mut self.known.entry(domid).or_default().looks;
        looks.ask(now, limits::DOMAIN_LOOKS_BURST, limits::DOMAIN_LOOKS_PER_SECOND)
    }

    /// Notes whether the domain exists now; returns whether it has ended since the last call.
    pub fn has_ended(&mut self, domid: DomId, exists: bool) -> bool {
        let guest = self.known.entry(domid).or_default();
        std::mem::replace(&mut guest.introduced, exists) && !exists
    }

    /// Whether it has been seen to exist.
    pub fn is_introduced(&self, domid: DomId) -> bool {
        self.known.get(&domid).is_some_and(|guest| guest.introduced)
    }

    /// The domains of all known guests.
    pub fn domains(&self) -> impl Iterator<Item = DomId> {
        self.known.keys().copied()
    }

    /// Forgets a domain that no longer exists.
    pub fn forget(&mut self, domid: DomId) {
        self.known.remove(&domid);
    }
}

/// What a guest may still log: `limits::GUEST_LOG_LINES` lines in each period of
/// `limits::GUEST_LOG_SECONDS`.
#[derive(Debug, Default)]
struct LogBudget {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogBudget {
    fn ask(&mut self, now: Instant) -> Option<LogPermit> {
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) >= Duration::from_secs(limits::GUEST_LOG_SECONDS) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines == limits::GUEST_LOG_LINES {
            self.suppressed += 1;
            return None;
        }
        self.lines += 1;
        Some(LogPermit { suppressed: std::mem::take(&mut self.suppressed) })
    }
}

/// A limit on how often something is done: a burst at once, then a number of times per second.
#[derive(Debug, Default)]
pub struct Pace {
    /// Until when everything done so far would have taken at the steady rate.
    paid_until: Option<Instant>,
}

impl Pace {
    /// Asks to do it once more; if it is too soon, returns when to ask again.
    pub fn ask(&mut self, now: Instant, burst: u32, per_second: u32) -> Result<(), Instant> {
        let price = Duration::from_secs(1) / per_second;
        let paid_until = self.paid_until.map_or(now, |paid_until| paid_until.max(now));
        let credit_ends = now + price * (burst - 1);
        if paid_until > credit_ends {
            return Err(now + (paid_until - credit_ends));
        }
        self.paid_until = Some(paid_until + price);
        Ok(())
    }
}

/// Logs something that a guest caused, if its budget has room:
/// `guest_log!(around, domid, warn, disk = %key, "message {}", more)`.
macro_rules! guest_log {
    ($around:expr, $domid:expr, $level:ident, $($message:tt)+) => {
        match $around.guests.may_log($domid, $around.now) {
            Some($crate::control::guests::LogPermit { suppressed: 0 }) => {
                tracing::$level!($($message)+)
            }
            Some($crate::control::guests::LogPermit { suppressed }) => {
                tracing::$level!(suppressed, $($message)+)
            }
            None => {}
        }
    };
}

pub(crate) use guest_log;

#[cfg(test)]
mod test {
    use super::*;

    fn domid(raw: u32) -> DomId {
        DomId::try_from(raw).unwrap()
    }

    #[test]
    fn a_storm_is_cut_and_counted_and_the_next_period_starts_afresh() {
        let start = Instant::now();
        let mut guests = Guests::default();
        for _ in 0..limits::GUEST_LOG_LINES {
            assert_eq!(guests.may_log(domid(1), start), Some(LogPermit { suppressed: 0 }));
        }
        assert_eq!(guests.may_log(domid(1), start), None);
        assert_eq!(guests.may_log(domid(1), start), None);
        assert_eq!(guests.may_log(domid(2), start), Some(LogPermit { suppressed: 0 }));
        let later = start + Duration::from_secs(limits::GUEST_LOG_SECONDS);
        assert_eq!(guests.may_log(domid(1), later), Some(LogPermit { suppressed: 2 }));
        assert_eq!(guests.may_log(domid(1), later), Some(LogPermit { suppressed: 0 }));
    }

    #[test]
    fn a_pace_allows_a_burst_and_then_its_rate_however_often_it_is_asked() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let allowed =
            |pace: &mut Pace, now| (0..100).filter(|_| pace.ask(now, 10, 50).is_ok()).count();
        assert_eq!(allowed(&mut pace, start), 10);
        let again = pace.ask(start, 10, 50).unwrap_err();
        assert_eq!(again - start, Duration::from_millis(20));
        assert_eq!(allowed(&mut pace, again), 1);
        assert_eq!(allowed(&mut pace, start + Duration::from_millis(120)), 5);
        assert_eq!(allowed(&mut pace, start + Duration::from_secs(60)), 10, "no more is saved up");
    }

    #[test]
    fn a_domain_ends_once_and_only_if_it_was_there() {
        let mut guests = Guests::default();
        assert!(!guests.has_ended(domid(1), false), "it may be about to be introduced");
        assert!(!guests.has_ended(domid(1), true));
        assert!(guests.has_ended(domid(1), false));
        assert!(!guests.has_ended(domid(1), false));
    }
}
