//! What the program writes to standard output and standard error. Either may be a file on a full
//! filesystem, a pipe whose reader has ended, or a pipe that nobody reads: nothing here panics, and in a
//! daemon nothing waits.
//!
//! Rust ignores SIGPIPE, and so does polldisk: a write to a pipe without a reader only fails. A command
//! then ends without an error, because its reader has what it wanted. `println!` and its relatives would
//! panic and are not used.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use crate::limits;
use crate::text::{printable, with_causes};

/// Standard output can't be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output")]
pub struct PrintError(#[source] io::Error);

/// Prints to standard output and ends the line.
pub fn print(text: impl Display) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    taken(writeln!(out, "{text}").and_then(|()| out.flush()))
}

/// It is no error if the reader has ended: it has what it wanted.
fn taken(written: io::Result<()>) -> Result<(), PrintError> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(PrintError(error)),
        _ => Ok(()),
    }
}

/// Writes a line to standard error if possible, through the queue if there is one. Foreign text has to be
/// made [`printable`] first.
pub fn say(line: impl Display) {
    put(format!("{line}\n").into_bytes());
}

fn put(line: Vec<u8>) {
    match QUEUE.get() {
        Some(queue) => queue.put(line),
        None => {
            let _ = io::stderr().write_all(&line);
        }
    }
}

/// Prints clap's help, or its complaint about the command line; returns the exit status.
pub fn usage(error: &clap::Error) -> ExitCode {
    let printed = taken(error.print());
    if error.use_stderr() {
        return ExitCode::from(2);
    }
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// From now on panics are printed by [`say`], which can't panic again if standard error is gone.
pub fn tell_panics() {
    std::panic::set_hook(Box::new(tell_panic));
}

fn tell_panic(info: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("unnamed");
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let message = printable(info.payload_as_str().unwrap_or("no message"));
    say(format_args!("thread {name} panicked: {message} ({place})"));
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        backtrace.to_string().lines().for_each(say);
    }
}

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// From now on lines for standard error go through a queue to a thread of their own, so that no other
/// thread waits for it. Call this once in a process.
pub fn start_queue() -> io::Result<()> {
    // A separate descriptor: code that locks Rust's standard error never waits for this thread.
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let queue = Queue::start(stderr)?;
    // If there is one already, it stays, and this one's thread ends.
    let _ = QUEUE.set(queue);
    Ok(())
}

/// Waits until the queue's lines are written, for `limits::LOG_END_MS` at most.
pub fn finish_queue() {
    if let Some(queue) = QUEUE.get() {
        queue.finish();
    }
}

/// Writes whole lines to the queue, for a log. Never fails and never waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueuedLines;

impl Write for QueuedLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        put(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines on their way to a writer that may be slow, stuck or broken. Lines that find no room are dropped
/// and counted, and the count is written when the writer accepts lines again.
struct Queue {
    sender: Sender<Entry>,
    lost: &'static AtomicU64,
}

enum Entry {
    Line(Vec<u8>),
    /// Answered once everything before it has been handled.
    End(Sender<()>),
}

impl Queue {
    fn start(writer: impl Write + Send + 'static) -> io::Result<Queue> {
        let (sender, entries) = bounded(limits::LOG_LINES_QUEUED);
        let lost: &AtomicU64 = Box::leak(Box::default());
        let mut drain = Drain { writer, lost, is_torn: false };
        std::thread::Builder::new().name("log".to_owned()).spawn(move || drain.run(&entries))?;
        Ok(Queue { sender, lost })
    }

    fn put(&self, mut line: Vec<u8>) {
        if line.len() > limits::LOG_LINE_MAX {
            line.truncate(limits::LOG_LINE_MAX);
            line.extend_from_slice(b"...\n");
        }
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.sender.try_send(Entry::Line(line))
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn finish(&self) {
        let until = Instant::now() + Duration::from_millis(limits::LOG_END_MS);
        let (end, ended) = bounded(1);
        // Give up at that time.
        if self.sender.send_deadline(Entry::End(end), until).is_ok() {
            let _ = ended.recv_deadline(until);
        }
    }
}

/// The far end of a [`Queue`].
struct Drain<W> {
    writer: W,
    lost: &'static AtomicU64,
    /// The last line was written only in part.
    is_torn: bool,
}

impl<W: Write> Drain<W> {
    fn run(&mut self, entries: &Receiver<Entry>) {
        for entry in entries {
            match entry {
                Entry::Line(line) => self.write(&line),
                Entry::End(end) => {
                    self.tell_lost();
                    // The caller may have given up.
                    let _ = end.send(());
                }
            }
        }
    }

    fn write(&mut self, line: &[u8]) {
        self.tell_lost();
        if !self.put(line) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell_lost(&mut self) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let told = lost == 0
            || self.put(
                format!(
                    "polldisk: lines that standard error did not accept and that are lost: {lost}\n"
                )
                .as_bytes(),
            );
        if !told {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
    }

    /// Returns whether all of it was written.
    fn put(&mut self, line: &[u8]) -> bool {
        if std::mem::take(&mut self.is_torn) && self.put_all(b"\n").is_err() {
            self.is_torn = true;
            return false;
        }
        match self.put_all(line) {
            Ok(()) => true,
            Err(written) => {
                self.is_torn = written > 0;
                false
            }
        }
    }

    /// The error is the number of bytes that were written.
    fn put_all(&mut self, mut line: &[u8]) -> Result<(), usize> {
        let whole = line.len();
        while !line.is_empty() {
            match self.writer.write(line) {
                Ok(0) => return Err(whole - line.len()),
                Ok(written) => line = line.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Another program made the terminal or pipe non-blocking for all that share it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(limits::LOG_RETRY_MS));
                }
                Err(_) => return Err(whole - line.len()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod test;
