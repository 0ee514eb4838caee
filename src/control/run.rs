//! The loop of the control thread: sleeps until something happens, and lets [`Control`] handle it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use signal_hook_mio::v1_0::Signals;

use super::admin::{Admin, BindError, FIRST_CLIENT};
use super::plane::{Control, Ended, Progress};
use crate::blkif::features::Offer;
use crate::limits;
use crate::msg::{Command, CommandSender, ReportReceiver};
use crate::park::Doorbell;
use crate::xen::{Platform, PlatformError};

/// How the control plane is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Backend types served, at least one; `attach` uses the first.
    pub backend_types: Vec<String>,
    /// The path of the admin socket; `None`: there is none.
    pub admin_path: Option<PathBuf>,
    /// What frontends are offered.
    pub offer: Offer,
    /// How many threads may open and close storage at a time; with 0, [`Control::help_once`] does.
    pub helper_threads: usize,
    /// Whether to handle signals: SIGTERM and SIGINT end the control plane, SIGHUP changes nothing. Only
    /// one thread of a process should do so.
    pub signals: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            backend_types: vec!["vbd".to_owned()],
            admin_path: None,
            offer: Offer::default(),
            helper_threads: limits::HELPERS_MAX,
            signals: false,
        }
    }
}

/// Why the control plane can't run.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Xenstore can't be reached.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The admin socket can't be made.
    #[error(transparent)]
    Admin(#[from] BindError),
    /// Xenstore refuses watches that every backend needs.
    #[error("xenstore refuses to watch backends; run polldisk in dom0 or a driver domain, as root")]
    Watch(#[source] io::Error),
    /// The system refuses to wait for descriptors or signals.
    #[error("cannot wait for events; raise the limit on open files (ulimit -n)")]
    Wait(#[source] io::Error),
}

const STORE: Token = Token(0);
const WORKERS: Token = Token(1);
const STOP: Token = Token(2);
const SIGNALS: Token = Token(3);
const ADMIN: Token = Token(4);
const HELPERS: Token = Token(5);

/// Runs the control plane in the calling thread until `stop` rings or a signal comes, and then until all is
/// drained, for at most `limits::DRAIN_SECONDS` or until a second ring or signal. A worker's number is its
/// index in `workers`; all are told to stop before this returns.
pub fn run<P: Platform>(
    platform: &P,
    config: &Config,
    workers: Vec<CommandSender>,
    reports: ReportReceiver,
    stop: &Doorbell,
) -> Result<Ended, ControlError> {
    let senders = workers.clone();
    let result =
        Loop::new(platform, config, workers, reports, stop).and_then(|mut control| control.serve());
    for sender in senders {
        // A worker that accepts no commands has ended already.
        let _ = sender.send(Command::Stop);
    }
    result
}

struct Loop<'a, P: Platform> {
    poll: Poll,
    control: Control<P>,
    /// The descriptor of the xenstore connection in `poll`.
    store: Option<RawFd>,
    stop: &'a Doorbell,
    signals: Option<Signals>,
}

impl<'a, P: Platform> Loop<'a, P> {
    fn new(
        platform: &P,
        config: &Config,
        workers: Vec<CommandSender>,
        reports: ReportReceiver,
        stop: &'a Doorbell,
    ) -> Result<Self, ControlError> {
        let poll = Poll::new().map_err(ControlError::Wait)?;
        // Do this before touching xenstore: another daemon may already be running.
        let admin = config.admin_path.as_deref();
        let admin = admin.map(|path| Admin::bind(path, poll.registry(), ADMIN)).transpose()?;
        let mut control = Control::new(platform.clone(), config, workers, reports, instance())?;
        if let Some(admin) = admin {
            control.answer(admin);
        }
        listen(&poll, &control.workers_fd(), WORKERS)?;
        listen(&poll, &control.helpers_fd(), HELPERS)?;
        listen(&poll, stop, STOP)?;
        let signals =
            config.signals.then(|| watch_signals(&poll)).transpose().map_err(ControlError::Wait)?;
        Ok(Loop { poll, control, store: None, stop, signals })
    }

    fn serve(&mut self) -> Result<Ended, ControlError> {
        let mut woken = Events::with_capacity(64);
        loop {
            let now = Instant::now();
            let progress = self.control.poll_once(now);
            self.listen_to_store()?;
            let timeout = match progress {
                Progress::Ended(ended) => return Ok(ended),
                Progress::Worked => Some(Duration::ZERO),
                Progress::Idle => {
                    let next = self.control.deadline(now);
                    next.map(|next| next.saturating_duration_since(now))
                }
            };
            match self.poll.poll(&mut woken, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(ControlError::Wait(error));
                }
                _ => {}
            }
            for event in &woken {
                self.wake(event.token(), Instant::now());
            }
        }
    }

    /// Listens to the current connection to xenstore: a lost one would stay readable for ever.
    fn listen_to_store(&mut self) -> Result<(), ControlError> {
        let store = self.control.store_fd().map(|fd| fd.as_raw_fd());
        if store == self.store {
            return Ok(());
        }
        if let Some(lost) = self.store.take() {
            // If it was closed, it has left the poll set by itself.
            let _ = self.poll.registry().deregister(&mut SourceFd(&lost));
        }
        if let Some(fd) = self.control.store_fd() {
            listen(&self.poll, &fd, STORE)?;
        }
        self.store = store;
        Ok(())
    }

    fn wake(&mut self, token: Token, now: Instant) {
        match token {
            SIGNALS => self.take_signals(now),
            STOP => {
                self.stop.silence();
                self.control.end(now);
            }
            ADMIN => {
                if let Some((admin, _)) = self.control.admin() {
                    admin.accept(self.poll.registry());
                }
            }
            client if client.0 >= FIRST_CLIENT => {
                if let Some((admin, registry)) = self.control.admin() {
                    admin.pump(client, registry, now);
                }
            }
            // Every pass looks at these.
            _ => {}
        }
    }

    fn take_signals(&mut self, now: Instant) {
        let Some(signals) = &mut self.signals else { return };
        let (hangups, ends): (Vec<_>, Vec<_>) =
            signals.pending().partition(|signal| *signal == libc::SIGHUP);
        if !hangups.is_empty() {
            tracing::info!(
                "SIGHUP changes nothing: options are read only at the start; SIGTERM ends polldisk"
            );
        }
        if !ends.is_empty() {
            self.control.end(now);
        }
    }
}

/// A unique name for this run of the daemon.
fn instance() -> String {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    format!("{}.{}", std::process::id(), since_1970.unwrap_or_default().as_nanos())
}

fn listen(poll: &Poll, source: &impl AsFd, token: Token) -> Result<(), ControlError> {
    let fd = source.as_fd().as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), token, Interest::READABLE)
        .map_err(ControlError::Wait)
}

/// Watches SIGHUP, too: by default it would end the process at once and leave guests' requests unanswered,
/// whether it comes from a closed terminal or from an admin who wants the configuration read again.
fn watch_signals(poll: &Poll) -> io::Result<Signals> {
    let mut signals = Signals::new([libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
    poll.registry().register(&mut signals, SIGNALS, Interest::READABLE)?;
    Ok(signals)
}
