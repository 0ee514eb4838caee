//! Plots of a run, as SVG.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow};
use figures::{Interval, figure};
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::contender::{Contender, Files, Kind};
use crate::report::{Plot, Report};
use crate::run::{CaseOutcome, Entry, Outcome};
use crate::sample::Metric;
use crate::scenario::Vary;
use crate::verdict;

const SIZE: (u32, u32) = (800, 480);
const DOT: u32 = 4;

/// Where values lie on an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    Linear,
    Logarithmic,
}

#[derive(Clone, Debug)]
struct Axis {
    title: String,
    scale: Scale,
    /// Values with labels. If empty, round values have them.
    labelled: Vec<f64>,
}

#[derive(Clone, Debug)]
struct Line {
    name: String,
    color: RGBColor,
    shape: Shape,
    points: Vec<(f64, f64)>,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Dots,
    Stroke,
    Both,
}

#[derive(Clone, Debug)]
struct Chart {
    file: String,
    title: String,
    x: Axis,
    y: Axis,
    lines: Vec<Line>,
    /// Names of whole numbers on the y axis.
    rows: Option<Vec<String>>,
    legend: SeriesLabelPosition,
}

/// Draws every chart that the run has figures for.
pub fn draw_all(report: &Report, folder: &Path) -> Result<Vec<Plot>> {
    let outcomes: Vec<&Outcome> = report.scenarios.iter().map(|s| &s.outcome).collect();
    let mut charts = Vec::new();
    for outcome in &outcomes {
        charts.extend(over_varied(outcome));
        charts.extend(latency_cdf(outcome));
    }
    charts.extend(cpu_per_io(&outcomes));
    charts.iter_mut().for_each(|chart| chart.lines.retain(|line| !line.points.is_empty()));
    charts
        .into_iter()
        .filter(|chart| !chart.lines.is_empty())
        .map(|chart| {
            draw(&chart, &folder.join(&chart.file))?;
            Ok(Plot { file: chart.file, title: chart.title })
        })
        .collect()
}

/// An empty chart of a scenario's figure.
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

/// Throughput and cost over depth or workers, or cost over the number of disks. Needs two values or
/// more.
fn over_varied(outcome: &Outcome) -> Vec<Chart> {
    use SeriesLabelPosition::{LowerRight, UpperLeft, UpperRight};
    let (x, scale, figures) = match &outcome.scenario.vary {
        _ if outcome.cases.len() < 2 => return Vec::new(),
        None => return Vec::new(),
        Some(Vary::Depth(_)) => (
            "requests in flight",
            Scale::Logarithmic,
            [(Metric::Iops, "iops", UpperLeft), (Metric::CpuUsPerIo, "cpu", UpperRight)],
        ),
        Some(Vary::Disks(_)) => (
            "disks",
            Scale::Logarithmic,
            [
                (Metric::OwnKibPerDisk, "memory", UpperRight),
                (Metric::ConnectS, "connect", UpperLeft),
            ],
        ),
        Some(Vary::Workers(_)) => (
            "workers, with as many busy disks",
            Scale::Linear,
            [(Metric::Iops, "iops", UpperLeft), (Metric::CpuUsPerIo, "cpu", LowerRight)],
        ),
    };
    let draw = |(metric, name, legend)| {
        let mut chart = chart(outcome, name, (x, scale), (Metric::title(metric), scale));
        chart.x.labelled =
            outcome.cases.iter().filter_map(|case| case.case.at).map(f64::from).collect();
        chart.legend = legend;
        let contenders = 0..outcome.scenario.contenders.len();
        chart.lines = contenders.map(|index| line_of(outcome, index, metric)).collect();
        if matches!(outcome.scenario.vary, Some(Vary::Workers(_))) && metric == Metric::Iops {
            let even = chart.lines.first().and_then(even_scaling);
            chart.lines.extend(even);
        }
        chart
    };
    figures.into_iter().map(draw).collect()
}

/// A figure of one of a scenario's contenders.
fn line_of(outcome: &Outcome, index: usize, metric: Metric) -> Line {
    let point = |case: &CaseOutcome| {
        Some((f64::from(case.case.at?), median(case.entries.get(index)?, metric)?))
    };
    let contender = &outcome.scenario.contenders[index];
    Line {
        name: contender.to_string(),
        color: color(contender),
        shape: Shape::Both,
        points: outcome.cases.iter().filter_map(point).collect(),
    }
}

/// The line if each worker did as much as those of the first point.
fn even_scaling(line: &Line) -> Option<Line> {
    let &(fewest, least) = line.points.first()?;
    let even = |(workers, _): &(f64, f64)| (*workers, least * workers / fewest);
    Some(Line {
        name: "as much from each worker".to_owned(),
        color: GRAY,
        shape: Shape::Stroke,
        points: line.points.iter().map(even).collect(),
    })
}

/// The distribution of latencies in each contender's middle round, without the few highest, which
/// would squeeze all others into a corner.
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
    chart.title = format!("{}: latency, without the highest 0.1 %", outcome.scenario.name);
    chart.legend = SeriesLabelPosition::LowerRight;
    let is_shown = |point: &&(f64, f64)| point.0 > 0.0 && point.1 <= 99.9;
    for entry in &outcome.cases.first()?.entries {
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
            color: color(&entry.contender),
            shape: Shape::Stroke,
            points: middle.latency_cdf.iter().filter(is_shown).copied().collect(),
        });
    }
    Some(chart)
}

/// The cost of a request in all scenarios, with each program's best setting.
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
        shape: Shape::Dots,
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

fn median(entry: &Entry, metric: Metric) -> Option<f64> {
    Interval::of(&entry.figures(metric)).map(|interval| interval.median)
}

/// A contender's color, the same in all plots.
fn color(contender: &Contender) -> RGBColor {
    match contender {
        Contender::Polldisk { .. } => BLUE,
        Contender::Fio { registered: true } => BLACK,
        Contender::Fio { registered: false } | Contender::Echo => GRAY,
        Contender::Qemu { iothread: false, .. } => PURPLE,
        Contender::Qemu { files: Files::Threads, .. } => RED,
        Contender::Qemu { files: Files::Buffered, .. } => ORANGE,
        Contender::Qemu { files: Files::Native, .. } => BROWN,
        Contender::Qemu { files: Files::IoUring, .. } => DARK_GREEN,
    }
}

const GRAY: RGBColor = RGBColor(130, 130, 130);
const PURPLE: RGBColor = RGBColor(140, 60, 160);
const ORANGE: RGBColor = RGBColor(240, 140, 0);
const BROWN: RGBColor = RGBColor(160, 100, 60);
const DARK_GREEN: RGBColor = RGBColor(0, 130, 80);

/// A part of an axis with labels at chosen places.
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
    /// The part of the axis that holds all values, with its labels.
    fn hold(&self, values: impl Iterator<Item = f64>) -> Labelled {
        let places: Vec<f64> = values.map(|value| self.scale.place(value)).collect();
        let low = places.iter().copied().fold(f64::INFINITY, f64::min);
        let high = places.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = match self.scale {
            Scale::Linear => (low.min(0.0), high.max(low + 1e-9) * 1.05),
            Scale::Logarithmic => between_labels(low - 0.05, high + 0.05),
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

/// The range itself if it holds two labels, otherwise the range from the label below it to the label
/// above it.
fn between_labels(low: f64, high: f64) -> (f64, f64) {
    if log_labels(low, high).len() >= 2 {
        return (low, high);
    }
    let (below, above) = (log_labels(low - 1.0, low), log_labels(high, high + 1.0));
    (below.last().copied().unwrap_or(low), above.first().copied().unwrap_or(high))
}

/// 1, 2 and 5 times powers of ten, or only the powers if the range is long.
fn log_labels(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = if high - low > 3.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
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
            // The range above the rows is room for the legend.
            Labelled { range: -0.5..rows.len() as f64 * 1.25, labels }
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
    // Drawn from the last to the first, so that the first is on top.
    for Line { color, shape, points, .. } in chart.lines.iter().rev() {
        let place = |(x, y): &(f64, f64)| (chart.x.scale.place(*x), chart.y.scale.place(*y));
        let places = || points.iter().map(place);
        if *shape != Shape::Dots {
            context.draw_series(LineSeries::new(places(), color.stroke_width(2)))?;
        }
        if *shape != Shape::Stroke {
            context.draw_series(places().map(|at| Circle::new(at, DOT, color.filled())))?;
        }
    }
    for Line { name, color, .. } in &chart.lines {
        context
            .draw_series(std::iter::empty::<Circle<(f64, f64), u32>>())?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), DOT, color.filled()));
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

/// A figure without trailing zeroes.
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
    use crate::sample::Sample;
    use crate::scenario::{Case, Scenario};

    #[test]
    fn axes_hold_all_values_and_are_labelled_at_round_ones() {
        let places = log_labels(1.5_f64.log10(), 60_f64.log10());
        let values: Vec<String> =
            places.iter().map(|place| figure_label(10_f64.powf(*place))).collect();
        assert_eq!(values, ["2", "5", "10", "20", "50"]);
        assert_eq!([1.0, 0.05, 1e6, 2.5e4].map(figure_label), ["1", "0.05", "1M", "25k"]);
    }

    #[test]
    fn values_close_together_lie_between_two_labels() {
        let around = |low: f64, high: f64| {
            let (low, high) = between_labels(low.log10(), high.log10());
            [low, high].map(|place| figure_label(10_f64.powf(place)))
        };
        assert_eq!(around(0.08, 0.099), ["0.05", "0.1"]);
        assert_eq!(around(0.08, 0.11), ["0.05", "0.2"], "one label is not enough");
        assert_eq!(around(0.15, 6.0), ["0.15", "6"]);
    }

    /// A scenario with one, two and four workers.
    fn scaling(iops: &[f64]) -> Outcome {
        let text = "about = 'x'\nbacking = 'null'\ncontenders = ['polldisk']\nload = {}\n\
                    vary = { workers = [1, 2, 4] }";
        let scenario = Scenario::parse("null-read-workers", text).unwrap();
        let measured = |(case, iops): (Case, &f64)| {
            let figures = [(Metric::Iops, *iops), (Metric::CpuUsPerIo, 0.06)];
            let sample = Sample { figures: figures.into(), latency_cdf: Vec::new() };
            let contender = case.contenders[0].clone();
            let entry = Entry { samples: vec![sample], ..Entry::new(contender) };
            CaseOutcome { case, shares_cores: false, entries: vec![entry] }
        };
        let cases = scenario.cases().into_iter().zip(iops).map(measured).collect();
        Outcome { scenario, cases, left_out: Vec::new(), stolen_percent: 0.0 }
    }

    #[test]
    fn workers_are_plotted_beside_perfect_scaling() {
        let charts = over_varied(&scaling(&[10e6, 19e6, 37e6]));
        let [iops, cpu] = &charts[..] else { panic!("{charts:?}") };
        let points: Vec<_> = iops.lines.iter().map(|line| line.points.clone()).collect();
        let measured = vec![(1.0, 10e6), (2.0, 19e6), (4.0, 37e6)];
        assert_eq!(points, [measured, vec![(1.0, 10e6), (2.0, 20e6), (4.0, 40e6)]]);
        assert_eq!(cpu.lines.len(), 1);
        assert!(over_varied(&scaling(&[10e6])).is_empty(), "one point is no curve");
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
            shape: Shape::Both,
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
