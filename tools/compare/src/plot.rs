//! Plots of a run, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::contender::{Contender, Kind};
use crate::report::{Plot, Report, figure};
use crate::run::{CaseOutcome, Entry, Outcome};
use crate::sample::Metric;
use crate::scenario::Vary;
use crate::verdict::{self, Interval};

const SIZE: (u32, u32) = (800, 480);

/// Points on a logarithmic axis lie at the logarithm of their values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    Linear,
    Logarithmic,
}

#[derive(Clone, Debug)]
struct Axis {
    title: String,
    scale: Scale,
    /// Values with labels; empty: round ones.
    labelled: Vec<f64>,
}

#[derive(Clone, Debug)]
struct Line {
    name: String,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

#[derive(Clone, Debug)]
struct Chart {
    file: String,
    title: String,
    x: Axis,
    y: Axis,
    lines: Vec<Line>,
    /// Only points, with these names of whole numbers on the y axis.
    rows: Option<Vec<String>>,
    legend: SeriesLabelPosition,
}

/// Draws all that a run has figures for.
pub fn draw_all(report: &Report, folder: &Path) -> Result<Vec<Plot>> {
    let outcomes: Vec<&Outcome> = report.scenarios.iter().map(|s| &s.outcome).collect();
    let mut charts = Vec::new();
    for outcome in &outcomes {
        charts.extend(over_varied(outcome));
        charts.extend(over_workers(outcome));
        charts.extend(latency_cdf(outcome));
    }
    charts.extend(cpu_per_io(&outcomes));
    charts
        .into_iter()
        .filter(|chart| chart.lines.iter().any(|line| !line.points.is_empty()))
        .map(|chart| {
            draw(&chart, &folder.join(&chart.file))?;
            Ok(Plot { file: chart.file, title: chart.title })
        })
        .collect()
}

/// A chart of a scenario's figure, without its lines.
fn chart(outcome: &Outcome, of: &str, x: (&str, Scale), y: (&str, Scale)) -> Chart {
    let name = &outcome.scenario.name;
    let axis = |(title, scale): (&str, Scale)| Axis {
        title: title.to_owned(),
        scale,
        labelled: Vec::new(),
    };
    Chart {
        file: format!("{name}-{of}.svg"),
        title: format!("{name}: {}", y.0),
        x: axis(x),
        y: axis(y),
        lines: Vec::new(),
        rows: None,
        legend: SeriesLabelPosition::UpperLeft,
    }
}

/// Throughput and cost over depth, or cost over the number of disks.
fn over_varied(outcome: &Outcome) -> Vec<Chart> {
    let (x, metrics): (_, &[(Metric, &str)]) = match &outcome.scenario.vary {
        None => return Vec::new(),
        Some(Vary::Depth(_)) => {
            ("requests in flight", &[(Metric::Iops, "iops"), (Metric::CpuUsPerIo, "cpu")])
        }
        Some(Vary::Disks(_)) => {
            ("disks", &[(Metric::OwnKibPerDisk, "memory"), (Metric::ConnectS, "connect")])
        }
    };
    let draw = |(metric, name): &(Metric, &str)| {
        let y = (metric.title(), Scale::Logarithmic);
        let mut chart = chart(outcome, name, (x, Scale::Logarithmic), y);
        chart.x.labelled =
            outcome.cases.iter().filter_map(|case| case.case.at).map(f64::from).collect();
        if !matches!(metric, Metric::Iops | Metric::ConnectS) {
            chart.legend = SeriesLabelPosition::UpperRight;
        }
        let contenders = outcome.scenario.contenders.iter().enumerate();
        chart.lines = contenders
            .map(|(index, contender)| {
                let point = |case: &CaseOutcome| {
                    Some((f64::from(case.case.at?), median(&case.entries, contender, *metric)?))
                };
                let points = outcome.cases.iter().filter_map(point).collect();
                Line { name: contender.to_string(), color: color(contender, index), points }
            })
            .collect();
        chart
    };
    metrics.iter().map(draw).collect()
}

/// Throughput over workers, where contenders differ in them.
fn over_workers(outcome: &Outcome) -> Option<Chart> {
    let entries = &outcome.cases.first()?.entries;
    let mut points: Vec<(f64, f64)> = entries
        .iter()
        .filter(|entry| entry.contender.kind() == Kind::Polldisk)
        .filter_map(|entry| {
            let workers = f64::from(entry.contender.cores());
            Some((workers, median(entries, &entry.contender, Metric::Iops)?))
        })
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let &(fewest, least) = points.first().filter(|_| points.len() > 1)?;
    let mut chart = chart(outcome, "workers", ("workers", Scale::Linear), ("IOPS", Scale::Linear));
    let even = points.iter().map(|(workers, _)| (*workers, least * workers / fewest)).collect();
    chart.x.labelled = points.iter().map(|(workers, _)| *workers).collect();
    chart.lines = vec![
        Line { name: "polldisk".to_owned(), color: BLUE, points },
        Line { name: "as much from each worker".to_owned(), color: GRAY, points: even },
    ];
    Some(chart)
}

/// The distribution of latencies in the middle round of each contender.
fn latency_cdf(outcome: &Outcome) -> Option<Chart> {
    if !outcome.scenario.latency_cdf {
        return None;
    }
    let mut chart = chart(
        outcome,
        "latency",
        ("latency, us", Scale::Logarithmic),
        ("percent of the requests", Scale::Linear),
    );
    chart.legend = SeriesLabelPosition::LowerRight;
    for (index, entry) in outcome.cases.first()?.entries.iter().enumerate() {
        let mut samples: Vec<_> = entry.samples.iter().collect();
        samples.sort_by(|a, b| {
            let mean = |figures: &std::collections::BTreeMap<Metric, f64>| {
                figures.get(&Metric::MeanUs).copied().unwrap_or(f64::INFINITY)
            };
            mean(&a.figures).total_cmp(&mean(&b.figures))
        });
        let Some(middle) = samples.get(samples.len() / 2) else { continue };
        chart.lines.push(Line {
            name: entry.contender.to_string(),
            color: color(&entry.contender, index),
            points: middle.latency_cdf.iter().filter(|point| point.0 > 0.0).copied().collect(),
        });
    }
    Some(chart)
}

/// The cost of a request in all scenarios, of each program's best setting.
fn cpu_per_io(outcomes: &[&Outcome]) -> Option<Chart> {
    let of_kind = |entries: &[Entry], kind: Kind| {
        let (_, figures) = verdict::best(entries, kind.name(), Metric::CpuUsPerIo)?;
        Interval::of(&figures).map(|interval| interval.median)
    };
    let shown: Vec<(&str, &[Entry])> = outcomes
        .iter()
        .filter(|outcome| outcome.scenario.vary.is_none())
        .filter_map(|outcome| {
            Some((outcome.scenario.name.as_str(), outcome.cases.first()?.entries.as_slice()))
        })
        .filter(|(_, entries)| of_kind(entries, Kind::Polldisk).is_some())
        .collect();
    let line = |(kind, color)| Line {
        name: Kind::name(kind).to_owned(),
        color,
        points: shown
            .iter()
            .rev()
            .enumerate()
            .filter_map(|(row, (_, entries))| Some((of_kind(entries, kind)?, row as f64)))
            .collect(),
    };
    let kinds = [(Kind::Polldisk, BLUE), (Kind::Qemu, RED), (Kind::Fio, GRAY)];
    (!shown.is_empty()).then(|| Chart {
        file: "cpu-per-io.svg".to_owned(),
        title: "CPU time for each request, best setting of each".to_owned(),
        x: Axis {
            title: Metric::CpuUsPerIo.title().to_owned(),
            scale: Scale::Logarithmic,
            labelled: Vec::new(),
        },
        y: Axis { title: String::new(), scale: Scale::Linear, labelled: Vec::new() },
        lines: kinds.into_iter().map(line).collect(),
        rows: Some(shown.iter().rev().map(|(name, _)| (*name).to_owned()).collect()),
        legend: SeriesLabelPosition::UpperLeft,
    })
}

fn median(entries: &[Entry], contender: &Contender, metric: Metric) -> Option<f64> {
    let entry = entries.iter().find(|entry| entry.contender == *contender)?;
    Interval::of(&verdict::figures(&entry.samples, metric)).map(|interval| interval.median)
}

fn color(contender: &Contender, index: usize) -> RGBColor {
    const OTHERS: [RGBColor; 4] =
        [RED, RGBColor(240, 140, 0), RGBColor(140, 60, 160), RGBColor(160, 100, 60)];
    match contender.kind() {
        Kind::Polldisk => BLUE,
        Kind::Fio if contender.to_string() == "fio" => GRAY,
        Kind::Fio => BLACK,
        Kind::Echo => GRAY,
        Kind::Qemu => OTHERS[index % OTHERS.len()],
    }
}

const GRAY: RGBColor = RGBColor(130, 130, 130);

/// A part of an axis with labels at places of our choice.
#[derive(Clone, Debug)]
struct Labelled {
    range: Range<f64>,
    labels: Vec<f64>,
}

impl Ranged for Labelled {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, pixels: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.range.clone()).map(place, pixels)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.labels.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Scale::Linear => value,
            Scale::Logarithmic => value.log10(),
        }
    }

    fn value(self, place: f64) -> f64 {
        match self {
            Scale::Linear => place,
            Scale::Logarithmic => 10_f64.powf(place),
        }
    }
}

impl Axis {
    /// The part of the axis that holds all values, and the labels on it, as places.
    fn hold(&self, values: impl Iterator<Item = f64>) -> Labelled {
        let places: Vec<f64> = values.map(|value| self.scale.place(value)).collect();
        let low = places.iter().copied().fold(f64::INFINITY, f64::min);
        let high = places.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = match self.scale {
            Scale::Linear => (low.min(0.0), high.max(low + 1e-9) * 1.05),
            Scale::Logarithmic => (low - 0.05, high + 0.05),
        };
        let labels = match self.scale {
            _ if !self.labelled.is_empty() => {
                self.labelled.iter().map(|value| self.scale.place(*value)).collect()
            }
            Scale::Linear => {
                let step = 10_f64.powf(((high - low) / 4.0).log10().floor());
                let step = step * ((high - low) / step / 8.0).ceil();
                (0..=16).map(|count| f64::from(count) * step).filter(|at| *at <= high).collect()
            }
            Scale::Logarithmic => log_labels(low, high),
        };
        Labelled { range: low..high, labels }
    }
}

/// 1, 2 and 5 times powers of ten; only the powers where there are many.
fn log_labels(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = if high - low > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    (-12..12)
        .flat_map(|power| steps.iter().map(move |step| step.log10() + f64::from(power)))
        .filter(|place| (low..=high).contains(place))
        .collect()
}

fn draw(chart: &Chart, path: &Path) -> Result<()> {
    draw_to(chart, SVGBackend::new(path, SIZE))
        .map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn draw_to(chart: &Chart, backend: SVGBackend<'_>) -> Result<()> {
    let area = backend.into_drawing_area();
    area.fill(&WHITE)?;
    let points = || chart.lines.iter().flat_map(|line| line.points.iter().copied());
    let x_axis = chart.x.hold(points().map(|point| point.0));
    let y_axis = match &chart.rows {
        None => chart.y.hold(points().map(|point| point.1)),
        Some(rows) => {
            let labels = (0..rows.len()).map(|row| row as f64).collect();
            // With room for the legend.
            Labelled { range: -0.5..rows.len() as f64 + 1.0, labels }
        }
    };
    let left = if chart.rows.is_some() { 190 } else { 80 };
    let mut context = ChartBuilder::on(&area)
        .caption(&chart.title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(left)
        .build_cartesian_2d(x_axis, y_axis)?;
    let x_label = |place: &f64| figure_label(chart.x.scale.value(*place));
    let y_label = |place: &f64| match &chart.rows {
        None => figure_label(chart.y.scale.value(*place)),
        Some(rows) => {
            let row = rows.iter().enumerate().find(|(row, _)| (*row as f64 - place).abs() < 0.1);
            row.map_or(String::new(), |(_, name)| name.clone())
        }
    };
    context
        .configure_mesh()
        .x_desc(&chart.x.title)
        .y_desc(&chart.y.title)
        .x_label_formatter(&x_label)
        .y_label_formatter(&y_label)
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 14))
        .draw()?;
    for Line { name, color, points } in &chart.lines {
        let places: Vec<(f64, f64)> = points
            .iter()
            .map(|(x, y)| (chart.x.scale.place(*x), chart.y.scale.place(*y)))
            .collect();
        if chart.rows.is_none() {
            context.draw_series(LineSeries::new(places.clone(), color.stroke_width(2)))?;
        }
        let size = if places.len() > 40 { 0 } else { 4 };
        let dots = places.into_iter().map(|place| Circle::new(place, size, color.filled()));
        context
            .draw_series(dots)?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
    }
    context
        .configure_series_labels()
        .position(chart.legend.clone())
        .background_style(WHITE.mix(0.8))
        .border_style(GRAY)
        .label_font(("sans-serif", 14))
        .draw()?;
    area.present()?;
    Ok(())
}

/// A figure without the zeroes at its end.
fn figure_label(value: f64) -> String {
    let text = figure(value);
    let (digits, unit) = match text.strip_suffix(['k', 'M']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text.as_str(), ""),
    };
    match digits.contains('.') {
        true => format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.')),
        false => text,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn axes_hold_all_values_and_are_labelled_at_round_ones() {
        let places = log_labels(1.5_f64.log10(), 60_f64.log10());
        let values: Vec<String> =
            places.iter().map(|place| figure_label(10_f64.powf(*place))).collect();
        assert_eq!(values, ["2", "5", "10", "20", "50"]);
        assert_eq!([1.0, 0.05, 1e6, 2.5e4].map(figure_label), ["1", "0.05", "1M", "25k"]);
    }

    #[test]
    fn a_chart_becomes_an_svg_with_its_lines_and_texts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.svg");
        let axis = |title: &str| Axis {
            title: title.to_owned(),
            scale: Scale::Logarithmic,
            labelled: Vec::new(),
        };
        let line = |name: &str, points: &[(f64, f64)]| Line {
            name: name.to_owned(),
            color: BLUE,
            points: points.to_vec(),
        };
        let chart = Chart {
            file: "x.svg".to_owned(),
            title: "a title".to_owned(),
            x: axis("depth"),
            y: axis("IOPS"),
            lines: vec![line("one", &[(1.0, 10.0), (32.0, 1e6)]), line("none", &[])],
            rows: None,
            legend: SeriesLabelPosition::UpperLeft,
        };
        draw(&chart, &path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for part in ["<svg", "a title", "depth", "IOPS", "one", "<polyline", "<circle"] {
            assert!(text.contains(part), "{part}");
        }
    }
}
