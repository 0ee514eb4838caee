//! Logging of what a guest can cause: limited per disk, so that no guest fills the log (XSA-180).

use std::time::{Duration, Instant};

use crate::limits;

/// What one disk may still log: `limits::GUEST_LOG_LINES` lines in any
/// `limits::GUEST_LOG_SECONDS`.
#[derive(Debug)]
pub struct LogBudget {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// Leave to write one line.
#[derive(Debug, PartialEq, Eq)]
pub struct Leave {
    /// Lines that were not written since the last one that was.
    pub suppressed: u64,
}

impl LogBudget {
    /// A full budget.
    pub fn new(now: Instant) -> LogBudget {
        LogBudget { since: now, lines: 0, suppressed: 0 }
    }

    /// Asks for one line.
    pub fn ask(&mut self, now: Instant) -> Option<Leave> {
        if now.duration_since(self.since) >= Duration::from_secs(limits::GUEST_LOG_SECONDS) {
            self.since = now;
            self.lines = 0;
        }
        if self.lines == limits::GUEST_LOG_LINES {
            self.suppressed += 1;
            return None;
        }
        self.lines += 1;
        Some(Leave { suppressed: std::mem::take(&mut self.suppressed) })
    }
}

/// Logs something that a guest caused, if the disk's [`LogBudget`] has room:
/// `guest_log!(budget, warn, disk = %key, "message {}", more)`.
macro_rules! guest_log {
    ($budget:expr, $level:ident, $($message:tt)+) => {
        match $budget.ask(std::time::Instant::now()) {
            Some($crate::control::quiet::Leave { suppressed: 0 }) => {
                tracing::$level!($($message)+)
            }
            Some($crate::control::quiet::Leave { suppressed }) => {
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

    #[test]
    fn a_storm_is_cut_and_counted_and_the_next_period_starts_afresh() {
        let start = Instant::now();
        let mut budget = LogBudget::new(start);
        for _ in 0..limits::GUEST_LOG_LINES {
            assert_eq!(budget.ask(start), Some(Leave { suppressed: 0 }));
        }
        assert_eq!(budget.ask(start), None);
        assert_eq!(budget.ask(start), None);
        let later = start + Duration::from_secs(limits::GUEST_LOG_SECONDS);
        assert_eq!(budget.ask(later), Some(Leave { suppressed: 2 }));
        assert_eq!(budget.ask(later), Some(Leave { suppressed: 0 }));
    }
}
