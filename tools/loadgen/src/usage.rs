//! CPU time, context switches and memory of a process.

use std::io;
use std::ops::Sub;

use serde::Serialize;

use crate::sys;

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// CPU time of all threads, including those that have ended, in nanoseconds.
    pub cpu_ns: u64,
    /// CPU time in user mode. The kernel counts it, and that in the kernel, in ticks of 10 ms, so only their
    /// proportion over a longer time means anything.
    pub user_ticks: u64,
    /// CPU time in the kernel; see `user_ticks`.
    pub system_ticks: u64,
    /// Context switches of the current threads because they slept.
    pub voluntary_switches: u64,
    /// Context switches of the current threads because others wanted the core.
    pub involuntary_switches: u64,
    /// Memory in use now, including guests' mapped pages, in bytes.
    pub rss_bytes: u64,
    /// The part of it that belongs to the process alone.
    pub rss_anonymous_bytes: u64,
}

impl Usage {
    /// Asks the kernel. Fails if the process is gone.
    pub fn of(pid: u32) -> io::Result<Usage> {
        let mut usage = Usage { cpu_ns: sys::process_cpu_ns(pid)?, ..Usage::default() };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        (usage.user_ticks, usage.system_ticks) = ticks(&stat).ok_or(io::ErrorKind::InvalidData)?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        usage.rss_bytes = number(&status, "VmRSS:") * 1024;
        usage.rss_anonymous_bytes = number(&status, "RssAnon:") * 1024;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            // A thread may end while this reads its file.
            let status = std::fs::read_to_string(task?.path().join("status")).unwrap_or_default();
            usage.voluntary_switches += number(&status, "voluntary_ctxt_switches:");
            usage.involuntary_switches += number(&status, "nonvoluntary_ctxt_switches:");
        }
        Ok(usage)
    }
}

/// What was used between two moments, and the memory at the later one. Switches of threads that ended in
/// between are lost.
impl Sub for Usage {
    type Output = Usage;

    fn sub(self, earlier: Usage) -> Usage {
        let (later, since) = (self, u64::saturating_sub);
        Usage {
            cpu_ns: since(later.cpu_ns, earlier.cpu_ns),
            user_ticks: since(later.user_ticks, earlier.user_ticks),
            system_ticks: since(later.system_ticks, earlier.system_ticks),
            voluntary_switches: since(later.voluntary_switches, earlier.voluntary_switches),
            involuntary_switches: since(later.involuntary_switches, earlier.involuntary_switches),
            ..later
        }
    }
}

/// utime and stime of `/proc/PID/stat`: fields 14 and 15. Counted from behind the name, which may hold
/// anything.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// The number after a name at the start of a line; 0 if the name is missing, as for kernel threads.
fn number(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_confusing_process_name_is_read_correctly() {
        let stat = "12 (a) S 9 (x y) R 1 2 3 4 5 6 7 8 9 10 111 222 13 14";
        assert_eq!(ticks(stat), Some((111, 222)));
        let status = "Name:\ta\nVmRSS:\t    2048 kB\nvoluntary_ctxt_switches:\t7\n";
        assert_eq!(number(status, "VmRSS:"), 2048);
        assert_eq!(number(status, "voluntary_ctxt_switches:"), 7);
        assert_eq!(number(status, "nonvoluntary_ctxt_switches:"), 0);
    }

    #[test]
    fn sleeping_is_seen_as_switches_and_work_as_cpu_time() {
        let pid = std::process::id();
        let before = Usage::of(pid).unwrap();
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
        let used = Usage::of(pid).unwrap() - before;
        assert!(used.voluntary_switches >= 10, "{used:?}");
        assert!(used.cpu_ns > 0 && used.rss_bytes > used.rss_anonymous_bytes, "{used:?}");
        assert!(used.rss_anonymous_bytes > 0, "{used:?}");
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        assert!(Usage::of(u32::MAX / 2).is_err());
    }
}
