//! The loop of the control thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use signal_hook_mio::v1_0::Signals;

use super::admin::{Admin, BindError, FIRST_CLIENT};
use super::registry::Registry;
use crate::blkif::features::Offer;
use crate::limits;
use crate::msg::{Command, CommandSender, Event, EventReceiver};
use crate::park::Doorbell;
use crate::xen::{Platform, PlatformError, Store};

/// How the control plane is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Backend types served, at least one; `attach` uses the first.
    pub backend_types: Vec<String>,
    /// Where the admin socket is; none where `None`.
    pub admin_path: Option<PathBuf>,
    /// What frontends are offered.
    pub offer: Offer,
    /// Whether SIGTERM and SIGINT end it, and SIGHUP does not. Only one thread of a process should have
    /// that.
    pub signals: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            backend_types: vec!["vbd".to_owned()],
            admin_path: None,
            offer: Offer::default(),
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
    /// There can be no admin socket.
    #[error(transparent)]
    Admin(#[from] BindError),
    /// Xenstore refuses what every backend needs.
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

/// How the control plane has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered. The workers end, too.
    Drained,
    /// Storage has requests that it did not answer, which the log names, and may keep workers and
    /// helpers from ending: do not wait for them.
    GaveUp,
}

/// Runs the control plane in the calling thread until `stop` rings or a signal comes, and at most
/// `limits::DRAIN_SECONDS` longer, or until a second ring or signal. Workers are numbered as they stand
/// in `workers`; all are told to stop before it returns.
pub fn run<P: Platform>(
    platform: &P,
    config: &Config,
    workers: Vec<CommandSender>,
    events: EventReceiver,
    stop: &Doorbell,
) -> Result<Ended, ControlError> {
    let senders = workers.clone();
    let result = Control::new(platform, config, workers, events, stop)
        .and_then(|mut control| control.serve());
    for sender in senders {
        // One that takes no more commands has ended.
        let _ = sender.send(Command::Stop);
    }
    result
}

struct Control<'a, P: Platform> {
    platform: &'a P,
    poll: Poll,
    registry: Registry<P::Store>,
    events: EventReceiver,
    opened: Doorbell,
    admin: Option<Admin>,
    stop: &'a Doorbell,
    signals: Option<Signals>,
    /// When to try xenstored again, where its connection was lost.
    store_retry: Option<Instant>,
    /// When to end whatever is in flight, once ending.
    drain_until: Option<Instant>,
    /// Since when only storage is still to be closed, once ending.
    closing_since: Option<Instant>,
    /// Answers still to come to what is in flight, once they were asked for.
    in_flight_due: Option<usize>,
}

impl<'a, P: Platform> Control<'a, P> {
    fn new(
        platform: &'a P,
        config: &Config,
        workers: Vec<CommandSender>,
        events: EventReceiver,
        stop: &'a Doorbell,
    ) -> Result<Self, ControlError> {
        let poll = Poll::new().map_err(ControlError::Wait)?;
        let store = platform.open_store()?;
        listen(&poll, &store, STORE)?;
        listen(&poll, &events.bell, WORKERS)?;
        listen(&poll, stop, STOP)?;
        let signals =
            config.signals.then(|| watch_signals(&poll)).transpose().map_err(ControlError::Wait)?;
        let admin = config
            .admin_path
            .as_deref()
            .map(|path| Admin::bind(path, poll.registry(), ADMIN))
            .transpose()?;
        let opened = Doorbell::new().map_err(ControlError::Wait)?;
        listen(&poll, &opened, HELPERS)?;
        let kinds = &config.backend_types;
        let registry =
            Registry::new(store, kinds, config.offer, workers, instance(), opened.clone())
                .map_err(ControlError::Watch)?;
        Ok(Control {
            platform,
            poll,
            registry,
            events,
            opened,
            admin,
            stop,
            signals,
            store_retry: None,
            drain_until: None,
            closing_since: None,
            in_flight_due: None,
        })
    }

    fn serve(&mut self) -> Result<Ended, ControlError> {
        let mut woken = Events::with_capacity(64);
        loop {
            let now = Instant::now();
            let worked = self.work(now);
            if let Some(ended) = self.ended(now) {
                return Ok(ended);
            }
            let timeout = if worked { Some(Duration::ZERO) } else { self.patience(now) };
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

    /// Does what there is to do; says whether there may be more.
    fn work(&mut self, now: Instant) -> bool {
        let store = self.take_store_events(now);
        let looked = self.registry.look(now);
        let workers = self.take_worker_events(now);
        self.opened.silence();
        let opened = self.registry.take_answers(now);
        if let Some(admin) = &mut self.admin {
            admin.finish_jobs(&mut self.registry, now);
        }
        store || looked || workers || opened
    }

    fn take_store_events(&mut self, now: Instant) -> bool {
        if let Some(retry) = self.store_retry {
            return now >= retry && self.reopen_store(now);
        }
        for taken in 0..limits::WATCH_EVENTS_PER_PASS {
            match self.registry.store().next_event() {
                Ok(Some(event)) => self.registry.take_event(&event),
                Ok(None) => return taken > 0,
                Err(error) => {
                    tracing::error!(
                        "the connection to xenstored is lost ({error}); connected disks run on, \
                         nothing else can change until it answers again"
                    );
                    self.forget_store(now);
                    return false;
                }
            }
        }
        true
    }

    fn forget_store(&mut self, now: Instant) {
        let fd = self.registry.store().as_fd().as_raw_fd();
        // Closing it takes it out of the poll set too.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        self.retry_store_later(now);
    }

    fn retry_store_later(&mut self, now: Instant) {
        let pause = Duration::from_secs(limits::STORE_RETRY_SECONDS);
        self.store_retry = Some(now + pause);
    }

    fn reopen_store(&mut self, now: Instant) -> bool {
        self.retry_store_later(now);
        let Ok(store) = self.platform.open_store() else { return false };
        let reopened = listen(&self.poll, &store, STORE)
            .and_then(|()| self.registry.reconnect(store).map_err(ControlError::Watch));
        match reopened {
            Ok(()) => {
                tracing::info!("xenstored answers again");
                self.store_retry = None;
            }
            Err(error) => tracing::error!("xenstored cannot be used yet: {error}"),
        }
        true
    }

    fn take_worker_events(&mut self, now: Instant) -> bool {
        self.events.bell.silence();
        for taken in 0..limits::WORKER_EVENTS_PER_PASS {
            let Ok(event) = self.events.events.try_recv() else { return taken > 0 };
            let latency_of = match &event {
                Event::Latency(queue, _) => Some(*queue),
                _ => None,
            };
            if let (Event::InFlight(..), Some(due)) = (&event, &mut self.in_flight_due) {
                *due = due.saturating_sub(1);
            }
            self.registry.take_worker_event(event, now);
            if let (Some(queue), Some(admin)) = (latency_of, &mut self.admin) {
                admin.latency_taken(queue);
            }
        }
        true
    }

    fn wake(&mut self, token: Token, now: Instant) {
        match token {
            SIGNALS => self.take_signals(now),
            STOP => self.end(now),
            ADMIN => {
                if let Some(admin) = &mut self.admin {
                    admin.accept(self.poll.registry());
                }
            }
            client if client.0 >= FIRST_CLIENT => {
                if let Some(admin) = &mut self.admin {
                    admin.pump(client, &mut self.registry, now);
                }
            }
            // Looked at in every pass.
            _ => {}
        }
    }

    fn take_signals(&mut self, now: Instant) {
        let Some(signals) = &mut self.signals else { return };
        let (hangups, ends): (Vec<_>, Vec<_>) =
            signals.pending().partition(|signal| *signal == libc::SIGHUP);
        if !hangups.is_empty() {
            tracing::info!(
                "SIGHUP changes nothing: options are read at the start only; SIGTERM ends polldisk"
            );
        }
        if !ends.is_empty() {
            self.end(now);
        }
    }

    /// Begins to end; asked again, gives up what is still in flight.
    fn end(&mut self, now: Instant) {
        self.stop.silence();
        if let Some(until) = &mut self.drain_until {
            *until = now.min(*until);
            return;
        }
        tracing::info!(
            "ending; requests in flight are waited for up to {} s, or until the next signal",
            limits::DRAIN_SECONDS
        );
        self.drain_until = Some(now + Duration::from_secs(limits::DRAIN_SECONDS));
        self.registry.stop(now);
    }

    /// How it has ended, once it has.
    fn ended(&mut self, now: Instant) -> Option<Ended> {
        let until = self.drain_until?;
        if self.registry.disks().next().is_none() {
            if !self.registry.is_closing() {
                return Some(Ended::Drained);
            }
            // That may wait for storage as well.
            self.closing_since.get_or_insert(now);
        }
        if Some(now) < self.give_up_at() {
            return None;
        }
        if self.closing_since.is_some() {
            return Some(Ended::GaveUp);
        }
        if self.in_flight_due.is_none() {
            let disks: Vec<String> =
                self.registry.disks().map(|disk| disk.key().to_string()).collect();
            tracing::error!("requests in flight are given up, of {}", disks.join(", "));
            self.in_flight_due = Some(self.registry.ask_in_flight());
        }
        // A worker that does not even say what it has is waited for no longer than this.
        let told = self.in_flight_due == Some(0) || now >= until + TELL_AT_MOST;
        told.then_some(Ended::GaveUp)
    }

    /// When to end whatever is not done, once ending.
    fn give_up_at(&self) -> Option<Instant> {
        let until = self.drain_until?;
        Some(self.closing_since.map_or(until, |since| until.max(since + CLOSE_AT_LEAST)))
    }

    /// How long nothing has to be done, unless something happens.
    fn patience(&mut self, now: Instant) -> Option<Duration> {
        let admin = self.admin.as_ref().and_then(Admin::deadline);
        let tell = if self.in_flight_due.is_some() { TELL_AT_MOST } else { Duration::ZERO };
        let drain = self.give_up_at().map(|until| until + tell);
        let backlog = self.registry.send_backlog().then(|| now + BACKLOG_PAUSE);
        [admin, self.store_retry, drain, backlog, self.registry.deadline()]
            .into_iter()
            .flatten()
            .min()
            .map(|next| next.saturating_duration_since(now))
    }
}

/// Given to storage to close files with, even where draining has used up all of its time.
const CLOSE_AT_LEAST: Duration = Duration::from_secs(2);

/// Given to workers to say what they have in flight.
const TELL_AT_MOST: Duration = Duration::from_secs(1);

/// Between attempts to send to a worker that is thousands of commands behind.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);

/// Names this run of the daemon, unlike any before or beside it.
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

/// By default a SIGHUP, of a terminal that is closed or an admin who wants a file read again, would end
/// the process at once, and guests' requests would be left.
fn watch_signals(poll: &Poll) -> io::Result<Signals> {
    let mut signals = Signals::new([libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
    poll.registry().register(&mut signals, SIGNALS, Interest::READABLE)?;
    Ok(signals)
}
