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
    /// Whether SIGTERM and SIGINT end it. Only one thread of a process should have that.
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
    /// Xenstore is not to be had.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The admin socket is not to be had.
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

/// Runs the control plane in the calling thread until `stop` rings or a signal comes. Workers are
/// numbered as they stand in `workers`; all are told to stop before it returns.
pub fn run<P: Platform>(
    platform: &P,
    config: &Config,
    workers: Vec<CommandSender>,
    events: EventReceiver,
    stop: &Doorbell,
) -> Result<(), ControlError> {
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
    admin: Option<Admin>,
    stop: &'a Doorbell,
    signals: Option<Signals>,
    /// When to try xenstored again, where its connection was lost.
    store_retry: Option<Instant>,
    /// When to end whatever is in flight, once ending.
    drain_until: Option<Instant>,
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
            config.signals.then(|| take_signals(&poll)).transpose().map_err(ControlError::Wait)?;
        let admin = config
            .admin_path
            .as_deref()
            .map(|path| Admin::bind(path, poll.registry(), ADMIN))
            .transpose()?;
        let registry = Registry::new(store, &config.backend_types, config.offer, workers)
            .map_err(ControlError::Watch)?;
        Ok(Control {
            platform,
            poll,
            registry,
            events,
            admin,
            stop,
            signals,
            store_retry: None,
            drain_until: None,
        })
    }

    fn serve(&mut self) -> Result<(), ControlError> {
        let mut woken = Events::with_capacity(64);
        loop {
            let worked = self.work();
            if self.has_ended() {
                return Ok(());
            }
            let timeout = if worked { Some(Duration::ZERO) } else { self.patience() };
            match self.poll.poll(&mut woken, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(ControlError::Wait(error));
                }
                _ => {}
            }
            for event in &woken {
                self.wake(event.token());
            }
        }
    }

    /// Does what there is to do; says whether there may be more.
    fn work(&mut self) -> bool {
        let store = self.take_store_events();
        let looked = self.registry.look();
        let workers = self.take_worker_events();
        if let Some(admin) = &mut self.admin {
            admin.finish_jobs(&mut self.registry);
        }
        store || looked || workers
    }

    fn take_store_events(&mut self) -> bool {
        if let Some(retry) = self.store_retry {
            return Instant::now() >= retry && self.reopen_store();
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
                    self.forget_store();
                    return false;
                }
            }
        }
        true
    }

    fn forget_store(&mut self) {
        let fd = self.registry.store().as_fd().as_raw_fd();
        // Closing it takes it out of the poll set too.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        self.retry_store_later();
    }

    fn retry_store_later(&mut self) {
        let pause = Duration::from_secs(limits::STORE_RETRY_SECONDS);
        self.store_retry = Some(Instant::now() + pause);
    }

    fn reopen_store(&mut self) -> bool {
        self.retry_store_later();
        let Ok(store) = self.platform.open_store() else { return false };
        let reopened = listen(&self.poll, &store, STORE)
            .and_then(|()| self.registry.reconnect(store).map_err(ControlError::Watch));
        match reopened {
            Ok(()) => {
                tracing::info!("xenstored answers again");
                self.store_retry = None;
            }
            Err(error) => tracing::error!("xenstored is of no use yet: {error}"),
        }
        true
    }

    fn take_worker_events(&mut self) -> bool {
        self.events.bell.silence();
        for taken in 0..limits::WORKER_EVENTS_PER_PASS {
            let Ok(event) = self.events.events.try_recv() else { return taken > 0 };
            let latency_of = match &event {
                Event::Latency(queue, _) => Some(*queue),
                _ => None,
            };
            self.registry.take_worker_event(event);
            if let (Some(queue), Some(admin)) = (latency_of, &mut self.admin) {
                admin.latency_taken(queue);
            }
        }
        true
    }

    fn wake(&mut self, token: Token) {
        match token {
            SIGNALS => {
                if let Some(signal) = self.signals.as_mut().and_then(|s| s.pending().last()) {
                    tracing::info!(signal, "ending");
                    self.end();
                }
            }
            STOP => self.end(),
            ADMIN => {
                if let Some(admin) = &mut self.admin {
                    admin.accept(self.poll.registry());
                }
            }
            client if client.0 >= FIRST_CLIENT => {
                if let Some(admin) = &mut self.admin {
                    admin.pump(client, &mut self.registry);
                }
            }
            // Looked at in every pass.
            _ => {}
        }
    }

    fn end(&mut self) {
        self.stop.silence();
        if self.drain_until.is_none() {
            self.drain_until = Some(Instant::now() + Duration::from_secs(limits::DRAIN_SECONDS));
            self.registry.stop();
        }
    }

    fn has_ended(&self) -> bool {
        let Some(until) = self.drain_until else { return false };
        let left = self.registry.disks().count();
        if left > 0 && Instant::now() >= until {
            tracing::error!(
                disks = left,
                "requests are still in flight after {} s; they are given up",
                limits::DRAIN_SECONDS
            );
            return true;
        }
        left == 0
    }

    /// How long nothing has to be done, unless something happens.
    fn patience(&self) -> Option<Duration> {
        let admin = self.admin.as_ref().and_then(Admin::deadline);
        [admin, self.store_retry, self.drain_until]
            .into_iter()
            .flatten()
            .min()
            .map(|next| next.saturating_duration_since(Instant::now()))
    }
}

fn listen(poll: &Poll, source: &impl AsFd, token: Token) -> Result<(), ControlError> {
    let fd = source.as_fd().as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), token, Interest::READABLE)
        .map_err(ControlError::Wait)
}

fn take_signals(poll: &Poll) -> io::Result<Signals> {
    let mut signals = Signals::new([libc::SIGTERM, libc::SIGINT])?;
    poll.registry().register(&mut signals, SIGNALS, Interest::READABLE)?;
    Ok(signals)
}
