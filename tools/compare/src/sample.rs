//! The figures of one turn, read from blkload's or fio's JSON.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a figure of a turn says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Requests answered per second.
    Iops,
    /// Millions of bytes per second.
    MbPerS,
    /// Mean latency in microseconds.
    MeanUs,
    /// Median latency in microseconds.
    P50Us,
    /// 99th percentile of the latency in microseconds.
    P99Us,
    /// 99.9th percentile of the latency in microseconds.
    P999Us,
    /// CPU time of the backend per request, in microseconds.
    CpuUsPerIo,
    /// CPU time of the backend in percent of a core.
    CpuPercent,
    /// Anonymous memory of the backend, without its code and the guests' pages, divided by the number of
    /// disks, in KiB.
    OwnKibPerDisk,
    /// Seconds from the backend's start until all disks are connected.
    ConnectS,
    /// Requests answered per second for all neighbours together.
    NeighbourIops,
}

impl Metric {
    /// Whether a higher figure is better.
    pub fn more_is_better(self) -> bool {
        matches!(self, Metric::Iops | Metric::MbPerS | Metric::NeighbourIops)
    }

    /// Its name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Metric::Iops => "IOPS",
            Metric::MbPerS => "MB/s",
            Metric::MeanUs => "mean latency, us",
            Metric::P50Us => "median latency, us",
            Metric::P99Us => "99 % latency, us",
            Metric::P999Us => "99.9 % latency, us",
            Metric::CpuUsPerIo => "backend CPU us per I/O",
            Metric::CpuPercent => "CPU, % of a core",
            Metric::OwnKibPerDisk => "own memory for each disk, KiB",
            Metric::ConnectS => "seconds until all are connected",
            Metric::NeighbourIops => "neighbours' IOPS",
        }
    }
}

/// Figures that exist only if requests were answered.
const LATENCIES: [Metric; 4] = [Metric::MeanUs, Metric::P50Us, Metric::P99Us, Metric::P999Us];

/// One turn of a contender.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// All known figures.
    pub figures: BTreeMap<Metric, f64>,
    /// The latencies' distribution: microseconds, and the percent of requests that took no longer. Only
    /// for plots: it would be most of the report's JSON.
    #[serde(skip)]
    pub latency_cdf: Vec<(f64, f64)>,
}

impl Sample {
    /// Reads what `blkload --json` wrote for this number of disks.
    pub fn of_blkload(json: &Value, disks: u32) -> Result<Sample> {
        let number = |path: &str| json.pointer(path).and_then(Value::as_f64);
        let mut figures: BTreeMap<Metric, f64> = [
            (Metric::Iops, "/total/iops", 1.0),
            (Metric::MbPerS, "/total/mb_per_s", 1.0),
            (Metric::MeanUs, "/total/latency/mean_ns", 1e-3),
            (Metric::P50Us, "/total/latency/p50_ns", 1e-3),
            (Metric::P99Us, "/total/latency/p99_ns", 1e-3),
            (Metric::P999Us, "/total/latency/p999_ns", 1e-3),
            (Metric::CpuUsPerIo, "/total/backend/cpu_us_per_io", 1.0),
            (Metric::CpuPercent, "/total/backend/cpu_percent", 1.0),
            (
                Metric::OwnKibPerDisk,
                "/total/backend/rss_anonymous_bytes",
                1.0 / 1024.0 / f64::from(disks),
            ),
            (Metric::ConnectS, "/connect_s", 1.0),
            (Metric::NeighbourIops, "/neighbours/iops", 1.0),
        ]
        .into_iter()
        .filter_map(|(metric, path, scale)| Some((metric, number(path)? * scale)))
        .collect();
        if figures.contains_key(&Metric::NeighbourIops) {
            // The backend's work for the neighbours would count as work for the measured requests.
            figures.remove(&Metric::CpuUsPerIo);
        }
        if figures.get(&Metric::Iops) == Some(&0.0) {
            // Without requests the latency is unknown, not 0.
            figures.retain(|metric, _| !LATENCIES.contains(metric));
        }
        let points = json.pointer("/total/latency/cdf").and_then(Value::as_array);
        let latency_cdf = points
            .context("blkload reported no latencies")?
            .iter()
            .filter_map(|point| {
                Some((point["value_ns"].as_f64()? / 1e3, point["percentile"].as_f64()?))
            })
            .collect();
        Ok(Sample { figures, latency_cdf })
    }

    /// Reads what `fio --output-format=json` wrote about one job. `cpu_us` is the CPU time of fio's process,
    /// `start_us` the part of it that fio's start took. fio's own figure for its CPU time misses the kernel's
    /// threads that serve its io_uring.
    pub fn of_fio(json: &Value, cpu_us: f64, start_us: f64) -> Result<Sample> {
        let job = json.pointer("/jobs/0").context("fio reported no job")?;
        let side = ["read", "write"]
            .into_iter()
            .map(|side| &job[side])
            .find(|side| side["total_ios"].as_f64().is_some_and(|ios| ios > 0.0))
            .context("fio did no I/O")?;
        let number = |value: &Value, path: &str| {
            value.pointer(path).and_then(Value::as_f64).with_context(|| format!("fio: no {path}"))
        };
        let cpu_us = (cpu_us - start_us).max(0.0);
        let runtime_us = number(job, "/job_runtime")? * 1e3;
        let percentile = |name: &str| number(side, &format!("/lat_ns/percentile/{name}"));
        let figures = BTreeMap::from([
            (Metric::Iops, number(side, "/iops")?),
            (Metric::MbPerS, number(side, "/bw_bytes")? / 1e6),
            (Metric::MeanUs, number(side, "/lat_ns/mean")? / 1e3),
            (Metric::P50Us, percentile("50.000000")? / 1e3),
            (Metric::P99Us, percentile("99.000000")? / 1e3),
            (Metric::P999Us, percentile("99.900000")? / 1e3),
            (Metric::CpuUsPerIo, cpu_us / number(side, "/total_ios")?),
            (Metric::CpuPercent, cpu_us * 100.0 / runtime_us),
        ]);
        let percentiles = side.pointer("/lat_ns/percentile").and_then(Value::as_object);
        let mut latency_cdf: Vec<(f64, f64)> = percentiles
            .context("fio reported no latencies")?
            .iter()
            .filter_map(|(percent, ns)| Some((ns.as_f64()? / 1e3, percent.parse().ok()?)))
            .collect();
        latency_cdf.sort_by(|a, b| a.1.total_cmp(&b.1));
        Ok(Sample { figures, latency_cdf })
    }
}

#[cfg(test)]
mod test {
    use serde_json::json;

    use super::*;

    #[test]
    fn blkloads_figures_have_our_units() {
        let json = json!({
            "connect_s": 0.25,
            "total": {
                "iops": 2000.0, "mb_per_s": 8.192,
                "latency": {"mean_ns": 1500.0, "p50_ns": 1400, "p99_ns": 2000, "p999_ns": 3000,
                            "cdf": [{"value_ns": 1000, "percentile": 10.0}]},
                "backend": {"cpu_us_per_io": null, "cpu_percent": 12.5, "rss_anonymous_bytes": 40960},
            },
        });
        let sample = Sample::of_blkload(&json, 4).unwrap();
        assert_eq!(sample.figures[&Metric::MeanUs], 1.5);
        assert_eq!(sample.figures[&Metric::OwnKibPerDisk], 10.0);
        assert_eq!(sample.figures[&Metric::ConnectS], 0.25);
        assert_eq!(
            sample.figures.get(&Metric::CpuUsPerIo),
            None,
            "without I/O there is no cost per I/O"
        );
        assert_eq!(sample.latency_cdf, [(1.0, 10.0)]);
    }

    #[test]
    fn a_starved_contender_has_no_latency() {
        let latency = json!({"mean_ns": 0.0, "p50_ns": 0, "p99_ns": 0, "p999_ns": 0, "cdf": []});
        let json = json!({ "total": {"iops": 0.0, "latency": latency} });
        let figures = Sample::of_blkload(&json, 1).unwrap().figures;
        assert_eq!(figures, BTreeMap::from([(Metric::Iops, 0.0)]));
    }

    #[test]
    fn the_cost_of_neighbours_does_not_count_for_the_measured_requests() {
        let of = |neighbours: Value| {
            let total = json!({"backend": {"cpu_us_per_io": 2.5}, "latency": {"cdf": []}});
            let json = json!({ "total": total, "neighbours": neighbours });
            Sample::of_blkload(&json, 1).unwrap().figures
        };
        assert_eq!(of(Value::Null), BTreeMap::from([(Metric::CpuUsPerIo, 2.5)]));
        assert_eq!(of(json!({"iops": 30.0})), BTreeMap::from([(Metric::NeighbourIops, 30.0)]));
    }

    #[test]
    fn fios_figures_have_our_units() {
        let side = json!({
            "total_ios": 1000, "iops": 500.0, "bw_bytes": 2048000,
            "lat_ns": {"mean": 2500.0,
                       "percentile": {"50.000000": 2000, "99.000000": 9000, "99.900000": 9900}},
        });
        let job = json!({
            "job_runtime": 2000, "read": {"total_ios": 0}, "write": side,
        });
        let sample = Sample::of_fio(&json!({ "jobs": [job] }), 1.2e6, 2e5).unwrap();
        assert_eq!(sample.figures[&Metric::CpuUsPerIo], 1000.0);
        assert_eq!(sample.figures[&Metric::CpuPercent], 50.0, "one second of two");
        assert_eq!(sample.figures[&Metric::MeanUs], 2.5);
        assert_eq!(sample.latency_cdf, [(2.0, 50.0), (9.0, 99.0), (9.9, 99.9)]);
        assert!(Sample::of_fio(&json!({ "jobs": [] }), 0.0, 0.0).is_err());
    }
}
