//! Counters with one writer, and latency histograms that are handed over whole.
//!
//! A queue's counters have cache lines of their own, and only its worker writes them, with plain loads and
//! stores: no lock and no atomic read-modify-write on the data path.

use std::sync::atomic::{AtomicU64, Ordering};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it; only its one writer may.
    #[inline]
    pub fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// Replaces it; only its one writer may.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Its value, perhaps a moment old.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What one queue counted since it connected.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct QueueCounters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        /// The values of [`QueueCounters`] at one moment; those of several queues add up.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl QueueCounters {
            /// Reads them all.
            pub fn read(&self) -> Counts {
                Counts { $($name: self.$name.get(),)* }
            }
        }

        impl std::ops::AddAssign for Counts {
            fn add_assign(&mut self, other: Counts) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counters! {
    /// Read requests answered.
    reads,
    /// Write requests answered.
    writes,
    /// Flush requests answered.
    flushes,
    /// Discard requests answered.
    discards,
    /// Bytes read.
    read_bytes,
    /// Bytes written.
    written_bytes,
    /// Bytes discarded.
    discarded_bytes,
    /// Requests answered with an error.
    errors,
    /// Event-channel notifications sent.
    notifications,
    /// Guest pages mapped now.
    grants_mapped,
    /// Pages copied by grant copy.
    grants_copied,
}

/// A histogram that records a run of equal values at once; the requests of one pass often have the same
/// latency.
#[derive(Debug)]
pub struct LatencyLog {
    histogram: Histogram<u64>,
    /// Not yet in the histogram: a value, and how many times it occurred.
    latency_ns: u64,
    count: u64,
}

impl Default for LatencyLog {
    fn default() -> LatencyLog {
        LatencyLog { histogram: new_latency_histogram(), latency_ns: 1, count: 0 }
    }
}

impl LatencyLog {
    /// Records one latency; 0 counts as 1.
    #[inline]
    pub fn record(&mut self, latency_ns: u64) {
        let latency_ns = latency_ns.max(1);
        if latency_ns != self.latency_ns {
            self.end_run();
            self.latency_ns = latency_ns;
        }
        self.count += 1;
    }

    /// Hands over what was recorded since the last time.
    pub fn take(&mut self) -> Histogram<u64> {
        self.end_run();
        std::mem::replace(&mut self.histogram, new_latency_histogram())
    }

    fn end_run(&mut self) {
        self.histogram.saturating_record_n(self.latency_ns, std::mem::take(&mut self.count));
    }
}

/// Latencies from 1 ns to 1 hour with two significant digits (8 KiB to 30 KiB of memory).
pub fn new_latency_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 2).expect("constant bounds are valid")
}
