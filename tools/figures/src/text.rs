//! Figures and tables as text.

use std::fmt;

/// A figure with about three digits, such as 1.40M or 0.153.
pub fn figure(value: f64) -> String {
    match value.abs() {
        100.0.. => count(value),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.3}"),
    }
}

/// A whole number, in thousands (k) or millions (M) from ten thousand on.
pub fn count(value: f64) -> String {
    match value.abs() {
        1e6.. => format!("{:.2}M", value / 1e6),
        1e4.. => format!("{:.1}k", value / 1e3),
        _ => format!("{value:.0}"),
    }
}

/// A duration in the unit that suits it, such as 1.5us.
pub fn duration(ns: f64) -> String {
    match ns {
        ..1e3 => format!("{ns:.0}ns"),
        ..1e6 => format!("{:.1}us", ns / 1e3),
        ..1e9 => format!("{:.2}ms", ns / 1e6),
        _ => format!("{:.2}s", ns / 1e9),
    }
}

/// A value as `show` writes it, or a dash if there is none.
pub fn or_dash<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

/// A table in Markdown.
#[derive(Clone, Debug)]
pub struct Table(String);

impl Table {
    /// A table without rows. A column without a title has an empty one.
    pub fn new<'a>(titles: impl IntoIterator<Item = &'a str>) -> Table {
        let (mut heading, mut rule) = ("|".to_owned(), "|".to_owned());
        for title in titles {
            heading += &if title.is_empty() { " |".to_owned() } else { format!(" {title} |") };
            rule += "---|";
        }
        Table(format!("{heading}\n{rule}\n"))
    }

    /// Adds a row. It may have fewer cells than there are columns.
    pub fn row<T: fmt::Display>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.0.push('|');
        for cell in cells {
            self.0 += &format!(" {cell} |");
        }
        self.0.push('\n');
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let texts = [1_402_000.0, 45_700.0, 321.4, 12.34, 1.234, 0.1534, 0.0].map(figure);
        assert_eq!(texts, ["1.40M", "45.7k", "321", "12.3", "1.23", "0.153", "0"]);
        assert_eq!([-45_700.0, -1.5].map(figure), ["-45.7k", "-1.50"]);
    }

    #[test]
    fn counts_are_whole_and_durations_have_a_unit() {
        assert_eq!([9.0, 999.0, 25_000.0, 2.5e6].map(count), ["9", "999", "25.0k", "2.50M"]);
        assert_eq!([999.0, 1_500.0, 2e6, 3e9].map(duration), ["999ns", "1.5us", "2.00ms", "3.00s"]);
    }

    #[test]
    fn what_is_unknown_is_a_dash() {
        assert_eq!([Some(2.0), None].map(|value| or_dash(value, figure)), ["2.00", "-"]);
    }

    #[test]
    fn a_table_is_markdown() {
        let mut table = Table::new(["", "IOPS"]);
        table.row(["polldisk", "1.40M"]);
        table.row(["qemu"]);
        assert_eq!(table.to_string(), "| | IOPS |\n|---|---|\n| polldisk | 1.40M |\n| qemu |\n");
    }
}
