//! Commands for dom0 and the guests, over a byte stream that `agent/agent` serves at the other end.
//!
//! The script's first lines describe the two kinds of line. Commands run side by side: [`Agent::start`]
//! sends one, [`Agent::finish`] waits for its answer; other commands may be answered first.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::prelude::{BASE64_STANDARD, Engine as _};

/// How long a command may run by default.
///
/// Limits of commands are in the machine's own time, which is slower than the host's while the
/// machine works, so no command fails because the host is busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How long the lab waits, by the host's clock, for a machine that no longer answers.
const HANG: Duration = Duration::from_secs(900);

/// What a command printed and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The exit status, as a shell gives it: 137 is a command killed at its limit.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A command that was started and not yet answered.
#[derive(Debug)]
#[must_use = "only `Agent::finish` says how a job ended"]
pub struct Job {
    id: u32,
    command: String,
}

/// The lab's end of one agent's stream.
#[derive(Debug)]
pub struct Agent {
    name: String,
    stream: UnixStream,
    lines: Receiver<Line>,
    answers: HashMap<u32, Result<Output>>,
    last_id: u32,
}

/// A line of the stream that is not noise.
#[derive(Debug)]
enum Line {
    Ready,
    Answer(u32, Result<Output>),
}

impl Agent {
    /// Connects to an agent's socket; everything that arrives also goes to the file `log`.
    pub fn connect(name: &str, socket: &Path, log: &Path) -> Result<Self> {
        let stream = connect_soon(socket, Duration::from_secs(10))
            .with_context(|| format!("the emulator does not offer {}", socket.display()))?;
        let input = BufReader::new(stream.try_clone()?);
        let log = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let (sender, lines) = channel();
        thread::spawn(move || read_lines(input, log, &sender));
        Ok(Self { name: name.into(), stream, lines, answers: HashMap::new(), last_id: 0 })
    }

    /// Waits until the agent is ready for commands.
    pub fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + HANG;
        loop {
            match self
                .next_line(deadline)
                .with_context(|| format!("{} did not start", self.name))?
            {
                Line::Ready => return Ok(()),
                Line::Answer(id, answer) => drop(self.answers.insert(id, answer)),
            }
        }
    }

    /// Starts a command. Without a limit it may run as long as the machine does.
    pub fn start(&mut self, command: &str, limit: Option<Duration>) -> Result<Job> {
        self.last_id += 1;
        let id = self.last_id;
        let request = request(id, limit, command);
        self.stream
            .write_all(request.as_bytes())
            .with_context(|| format!("{} is gone", self.name))?;
        Ok(Job { id, command: command.into() })
    }

    /// Waits for a job's end.
    pub fn finish(&mut self, job: Job) -> Result<Output> {
        let deadline = Instant::now() + HANG;
        let answer = loop {
            if let Some(answer) = self.answers.remove(&job.id) {
                break answer;
            }
            let line = self
                .next_line(deadline)
                .with_context(|| format!("{} has not answered: {}", self.name, job.command))?;
            if let Line::Answer(id, answer) = line {
                self.answers.insert(id, answer);
            }
        };
        answer.with_context(|| format!("{} answered badly: {}", self.name, job.command))
    }

    /// Whether a job has ended, without waiting for it.
    pub fn has_ended(&mut self, job: &Job) -> bool {
        while let Ok(Line::Answer(id, answer)) = self.lines.try_recv() {
            self.answers.insert(id, answer);
        }
        self.answers.contains_key(&job.id)
    }

    /// Runs a command to its end and accepts any status.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Output> {
        let job = self.start(command, Some(limit))?;
        self.finish(job)
    }

    /// Runs a command that must succeed; returns what it printed, without the final line break.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.ask_within(command, PATIENCE)
    }

    /// [`Agent::ask`] with a limit of its own.
    pub fn ask_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output = self.run(command, limit)?;
        ensure!(
            output.status == 0,
            "{}: status {} from: {command}\n{}{}",
            self.name,
            output.status,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout.trim_end().into())
    }

    fn next_line(&self, deadline: Instant) -> Result<Line> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.lines.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => anyhow!("no answer in time"),
            RecvTimeoutError::Disconnected => anyhow!("the machine has stopped"),
        })
    }
}

/// Connects as soon as the socket exists: the emulator makes its sockets a moment after its start.
fn connect_soon(socket: &Path, limit: Duration) -> std::io::Result<UnixStream> {
    let deadline = Instant::now() + limit;
    loop {
        match UnixStream::connect(socket) {
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

fn read_lines(mut input: impl BufRead, mut log: File, lines: &Sender<Line>) {
    let mut bytes = Vec::new();
    while input.read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
        let line = String::from_utf8_lossy(&bytes);
        // The log is for people, who cannot read the base64 of answers. Errors show their text.
        match parse_line(&line) {
            Some(line) => {
                if lines.send(line).is_err() {
                    return;
                }
            }
            None => drop(log.write_all(&bytes)),
        }
        bytes.clear();
    }
}

fn request(id: u32, limit: Option<Duration>, command: &str) -> String {
    let seconds = limit.map_or(0, |limit| limit.as_secs().max(1));
    format!("{id} {seconds} {}\n", BASE64_STANDARD.encode(command))
}

/// Reads one line; `None` if it is noise. An answer with damaged fields is still the answer of its job.
fn parse_line(line: &str) -> Option<Line> {
    // The kernel may have printed part of a line first.
    let (_, line) = line.split_once('@')?;
    // Spaces stay, since the last field may be empty. A console ends a line with two bytes.
    let line = line.trim_end_matches(['\r', '\n']);
    if line == "ready" {
        return Some(Line::Ready);
    }
    let (id, rest) = line.split_once(' ')?;
    Some(Line::Answer(id.parse().ok()?, parse_output(rest)))
}

fn parse_output(fields: &str) -> Result<Output> {
    let fields: Vec<&str> = fields.split(' ').collect();
    let [status, stdout_length, stdout, stderr_length, stderr] = fields[..] else {
        bail!("{} fields instead of 5", fields.len());
    };
    Ok(Output {
        status: status.parse().context("status")?,
        stdout: parse_text(stdout_length, stdout).context("output")?,
        stderr: parse_text(stderr_length, stderr).context("errors")?,
    })
}

fn parse_text(length: &str, text: &str) -> Result<String> {
    let bytes = BASE64_STANDARD.decode(text)?;
    let length: usize = length.parse()?;
    ensure!(bytes.len() == length, "{} bytes arrived of {length}", bytes.len());
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(line: &str) -> (u32, Result<Output>) {
        match parse_line(line) {
            Some(Line::Answer(id, answer)) => (id, answer),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_is_one_line() {
        assert_eq!(request(7, Some(Duration::from_secs(60)), "echo a\nb"), "7 60 ZWNobyBhCmI=\n");
        assert_eq!(request(8, None, ""), "8 0 \n");
    }

    #[test]
    fn a_limit_below_a_second_is_still_a_limit() {
        assert!(request(1, Some(Duration::from_millis(1)), "x").starts_with("1 1 "));
    }

    #[test]
    fn an_answer_carries_status_and_both_outputs() {
        let (id, output) = answer("@7 1 3 YQpi 0 \r\n");
        let expected = Output { status: 1, stdout: "a\nb".into(), stderr: String::new() };
        assert_eq!((id, output.expect("well-formed")), (7, expected));
    }

    #[test]
    fn the_kernels_lines_are_noise() {
        assert!(parse_line("[    1.0] xen: started").is_none());
        assert!(parse_line("[    1.0] mail root@localhost about it").is_none());
        assert!(parse_line("").is_none());
    }

    #[test]
    fn an_answer_behind_an_unfinished_line_is_read() {
        assert!(matches!(parse_line("[    1.0] half@ready"), Some(Line::Ready)));
    }

    #[test]
    fn a_damaged_answer_is_an_error_of_its_job() {
        assert!(answer("@7 0 3 YQpi").1.is_err());
        assert!(answer("@7 0 4 YQpi 0 ").1.is_err());
        assert!(answer("@7 0 3 YQ[pi 0 ").1.is_err());
    }
}
