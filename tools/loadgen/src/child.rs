//! The backend as a child process.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use polldisk::output;
use polldisk::sim::XENSTORE_SOCKET;

use crate::sys;

/// Lines of output kept for the text of an error.
const LINES_KEPT: usize = 20;

/// How long the backend may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// How long the backend's last output may take to arrive after its end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A running backend. Dropping it kills it.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    output: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Backend {
    /// Starts the command, with the stand-in's folder in its arguments and its environment.
    pub fn start(command: &[String], folder: &Path, verbose: bool) -> anyhow::Result<Backend> {
        let (program, arguments) = command.split_first().context("no command")?;
        let folder_text = folder.to_str().context("--folder: its name is not UTF-8")?;
        let filled = |text: &String| text.replace("{folder}", folder_text);
        let mut command = Command::new(filled(program));
        command
            .args(arguments.iter().map(filled))
            .env("POLLDISK_STAND_IN", folder)
            .env("XENSTORED_PATH", folder.join(XENSTORE_SOCKET))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // An interrupt from the terminal reaches only blkload, which then ends the backend.
            .process_group(0);
        sys::die_with_parent(&mut command);
        let mut child =
            command.spawn().with_context(|| format!("cannot start the backend {program}"))?;
        let output = Arc::default();
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|s| Box::new(s) as _),
            child.stderr.take().map(|s| Box::new(s) as _),
        ];
        let readers = streams
            .into_iter()
            .flatten()
            .map(|stream| {
                let output = Arc::clone(&output);
                std::thread::spawn(move || keep_lines(stream, &output, verbose))
            })
            .collect();
        Ok(Backend { child, output, readers })
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns an error with the last output if the backend has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                // The last output may still be in the pipes. A child of the backend may keep them open, so
                // the wait has a limit.
                let end = Instant::now() + LAST_WORDS;
                while Instant::now() < end && !self.readers.iter().all(JoinHandle::is_finished) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                bail!("the backend ended ({status}){}", self.last_output())
            }
        }
    }

    /// The last lines of its output, for the text of an error.
    pub fn last_output(&self) -> String {
        let lines = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.is_empty() {
            return "; it printed nothing".to_owned();
        }
        let text: String = lines.iter().map(|line| format!("\n  {line}")).collect();
        format!("; its last output:{text}")
    }

    /// Ends the backend with SIGTERM. If it does not end in time, sends SIGKILL and returns `false`.
    pub fn end(mut self) -> anyhow::Result<bool> {
        if self.child.try_wait()?.is_none() {
            sys::terminate(self.child.id())?;
        }
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(false)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Both fail only if the backend has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep_lines(stream: impl Read, output: &Mutex<VecDeque<String>>, verbose: bool) {
    for line in BufReader::new(stream).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line).into_owned();
        if verbose {
            output::say(format_args!("backend: {line}"));
        }
        let mut lines = output.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES_KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn shell(script: &str) -> Backend {
        let command = ["sh", "-c", script].map(str::to_owned);
        Backend::start(&command, Path::new("/run/x"), false).unwrap()
    }

    fn error(mut backend: Backend) -> String {
        loop {
            if let Err(error) = backend.check() {
                return error.to_string();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_backend_that_ends_is_an_error_with_its_last_lines() {
        let error = error(shell("seq 30 >&2; echo no disk >&2; exit 3"));
        assert!(
            error.starts_with("the backend ended (exit status: 3); its last output:"),
            "{error}"
        );
        assert!(error.contains("\n  30") && error.contains("\n  no disk"), "{error}");
        assert!(!error.contains("\n  10\n"), "only the last lines: {error}");
    }

    #[test]
    fn the_folder_is_in_its_arguments_and_its_environment() {
        let error = error(shell("echo {folder} $POLLDISK_STAND_IN $XENSTORED_PATH; exit 1"));
        assert!(error.contains("\n  /run/x /run/x /run/x/xenstore.sock"), "{error}");
    }

    #[test]
    fn sigterm_ends_it() {
        assert!(shell("exec sleep 1000").end().unwrap());
    }
}
