//! Where log lines go: standard error, which systemd passes to the journal.

use std::fmt;
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, ensure};
use polldisk::output::{self, QueuedLines};
use polldisk::text::printable;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

/// Starts logging at `filter`. Under systemd the journal adds the time, so lines carry none.
pub fn start(filter: &str) -> anyhow::Result<()> {
    let advice = || {
        format!(
            "--log {filter}: give error, warn, info, debug or trace, or module=level pairs such as \
             polldisk::control=debug"
        )
    };
    ensure!(filter.split(',').all(names_level_or_module), advice());
    let filter = EnvFilter::try_new(filter).with_context(advice)?;
    output::start_queue().context("cannot start the log's thread")?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(QueuedLines::default)
        .with_ansi(is_colourful())
        .log_internal_errors(false)
        .fmt_fields(fields());
    if is_journal() {
        lines.without_time().init()
    } else {
        lines.init()
    }
    Ok(())
}

/// Whether a part of a filter names a level or a module of polldisk. [`EnvFilter`] would accept any other
/// word as a module and log nothing.
fn names_level_or_module(part: &str) -> bool {
    let name = part.split(['=', '[']).next().unwrap_or_default().trim();
    name.parse::<LevelFilter>().is_ok() || name == OURS || name.starts_with(&format!("{OURS}::"))
}

const OURS: &str = "polldisk";

/// How an event's fields are written.
fn fields() -> impl for<'a> FormatFields<'a> + Send + Sync + 'static {
    debug_fn(write_field).delimited(" ")
}

/// Writes the message as it is and other fields with their names, all on one line.
fn write_field(
    line: &mut Writer<'_>,
    field: &tracing::field::Field,
    value: &dyn fmt::Debug,
) -> fmt::Result {
    let text = format!("{value:?}");
    match field.name() {
        "message" => write!(line, "{}", printable(&text)),
        name => write!(line, "{name}={}", printable(&text)),
    }
}

/// Whether to use colours: on terminals, unless the user wants none (<https://no-color.org>).
fn is_colourful() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stderr().is_terminal() && !unwanted
}

/// Whether standard error is the journal: systemd identifies the journal's stream in JOURNAL_STREAM.
fn is_journal() -> bool {
    let link = format!("/proc/self/fd/{}", std::io::stderr().as_fd().as_raw_fd());
    let (Ok(stream), Ok(target)) = (std::env::var("JOURNAL_STREAM"), std::fs::read_link(link))
    else {
        return false;
    };
    let inode = stream.split(':').nth(1).unwrap_or("");
    !inode.is_empty() && target.to_string_lossy() == format!("socket:[{inode}]")
}

#[cfg(test)]
mod test {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let log = Log::default();
        let writer = log.clone();
        let lines = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .without_time()
            .fmt_fields(fields())
            .finish();
        let odd = "raw:/no\nsuch\u{1b}[2J\u{9b}m";
        tracing::subscriber::with_default(lines, || {
            tracing::warn!(disk = %odd, target = odd, count = 3, "cannot open {odd}: gr\u{fc}n");
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let line = text.strip_suffix('\n').unwrap();
        assert!(!line.contains(char::is_control), "{line:?}");
        let escaped = "raw:/no\\nsuch\\u{1b}[2J\\u{9b}m";
        for part in
            [&format!("cannot open {escaped}: gr\u{fc}n"), &format!("disk={escaped}"), "count=3"]
        {
            assert!(line.contains(part), "{line}");
        }
    }
}
