//! The control plane in steps: [`Control::poll_once`] does what there is to do at a given time. Nothing
//! here reads a clock, sleeps or waits for a descriptor; [`super::run`](super::run()) does.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::admin::Admin;
use super::helpers::Helpers;
use super::registry::Registry;
use super::{Config, ControlError};
use crate::limits;
use crate::msg::{CommandSender, Report, ReportReceiver};
use crate::park::Doorbell;
use crate::xen::{Platform, Store};

/// The result of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It did something, and there may be more to do.
    Worked,
    /// It found nothing to do.
    Idle,
    /// It was asked to end, and has. The caller tells the workers to stop.
    Ended(Ended),
}

/// How the control plane has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered. The workers end, too.
    Drained,
    /// Storage did not answer some requests, which the log names. It may keep workers and helpers from
    /// ending: do not wait for them.
    GaveUp,
}

/// The control plane of one daemon.
#[derive(Debug)]
pub struct Control<P: Platform> {
    platform: P,
    registry: Registry<P::Store>,
    reports: ReportReceiver,
    /// Rung by helpers.
    opened: Doorbell,
    admin: Option<Admin>,
    /// When to try xenstored again, if its connection was lost.
    store_retry: Option<Instant>,
    /// When to give up what is in flight, once ending.
    drain_until: Option<Instant>,
    /// Since when only closing storage is left to do, once ending.
    closing_since: Option<Instant>,
    /// Answers still due about what is in flight, once they were asked for.
    in_flight_due: Option<usize>,
}

impl<P: Platform> Control<P> {
    /// A control plane without an admin socket. A worker's number is its index in `workers`; `instance` is
    /// a unique name for this run of the daemon.
    pub fn new(
        platform: P,
        config: &Config,
        workers: Vec<CommandSender>,
        reports: ReportReceiver,
        instance: String,
    ) -> Result<Self, ControlError> {
        let store = platform.open_store()?;
        let opened = Doorbell::new().map_err(ControlError::Wait)?;
        let kinds = &config.backend_types;
        let helpers = Helpers::new(opened.clone(), config.helper_threads);
        let registry = Registry::new(store, kinds, config.offer, workers, instance, helpers)
            .map_err(ControlError::Watch)?;
        Ok(Control {
            platform,
            registry,
            reports,
            opened,
            admin: None,
            store_retry: None,
            drain_until: None,
            closing_since: None,
            in_flight_due: None,
        })
    }

    /// Runs one pass: handles a bounded amount of what came from xenstore, workers, helpers and the admin.
    pub fn poll_once(&mut self, now: Instant) -> Progress {
        let worked = self.work(now);
        match self.ended(now) {
            Some(ended) => Progress::Ended(ended),
            None if worked => Progress::Worked,
            None => Progress::Idle,
        }
    }

    /// Opens or closes one thing, as a helper thread would, for a control plane without those
    /// ([`Config::helper_threads`]); returns false if there is nothing to do.
    pub fn help_once(&self) -> bool {
        self.registry.help_once()
    }

    /// When to run the next pass, even if nothing happens before.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let admin = self.admin.as_ref().and_then(Admin::deadline);
        let tell = if self.in_flight_due.is_some() { TELL_AT_MOST } else { Duration::ZERO };
        let drain = self.give_up_at().map(|until| until + tell);
        let backlog = self.registry.send_backlog().then(|| now + BACKLOG_PAUSE);
        let all = [admin, self.store_retry, drain, backlog, self.registry.deadline()];
        all.into_iter().flatten().min()
    }

    /// Begins to end; when called again, gives up what is still in flight.
    pub fn end(&mut self, now: Instant) {
        if let Some(until) = &mut self.drain_until {
            *until = now.min(*until);
            return;
        }
        tracing::info!(
            "ending; waiting for requests in flight for up to {} s, or until the next signal",
            limits::DRAIN_SECONDS
        );
        self.drain_until = Some(now + Duration::from_secs(limits::DRAIN_SECONDS));
        self.registry.stop(now);
    }

    /// Readable while there are watch events; `None` while there is no connection to xenstore.
    pub fn store_fd(&self) -> Option<BorrowedFd<'_>> {
        self.store_retry.is_none().then(|| self.registry.store().as_fd())
    }

    /// Readable once workers have sent reports.
    pub fn workers_fd(&self) -> BorrowedFd<'_> {
        self.reports.bell.as_fd()
    }

    /// Readable once helpers have answers.
    pub fn helpers_fd(&self) -> BorrowedFd<'_> {
        self.opened.as_fd()
    }

    /// Serves this admin socket from now on.
    pub(super) fn answer(&mut self, admin: Admin) {
        self.admin = Some(admin);
    }

    /// The admin socket, and the registry for its commands.
    pub(super) fn admin(&mut self) -> Option<(&mut Admin, &mut Registry<P::Store>)> {
        Some((self.admin.as_mut()?, &mut self.registry))
    }

    /// Returns whether there may be more to do.
    fn work(&mut self, now: Instant) -> bool {
        let store = self.take_store_events(now);
        let looked = self.registry.look(now);
        let workers = self.take_worker_reports(now);
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
                        "the connection to xenstored is lost ({error}); connected disks keep working, \
                         but nothing else can change until it answers again"
                    );
                    self.retry_store_later(now);
                    return false;
                }
            }
        }
        true
    }

    fn retry_store_later(&mut self, now: Instant) {
        let pause = Duration::from_secs(limits::STORE_RETRY_SECONDS);
        self.store_retry = Some(now + pause);
    }

    fn reopen_store(&mut self, now: Instant) -> bool {
        self.retry_store_later(now);
        let Ok(store) = self.platform.open_store() else { return false };
        match self.registry.reconnect(store) {
            Ok(()) => {
                tracing::info!("xenstored answers again");
                self.store_retry = None;
            }
            Err(error) => tracing::error!("xenstored cannot be used yet: {error}"),
        }
        true
    }

    fn take_worker_reports(&mut self, now: Instant) -> bool {
        self.reports.bell.silence();
        for taken in 0..limits::WORKER_REPORTS_PER_PASS {
            let Ok(report) = self.reports.reports.try_recv() else { return taken > 0 };
            let latency_of = match &report {
                Report::Latency(queue, _) => Some(*queue),
                _ => None,
            };
            if let (Report::InFlight(..), Some(due)) = (&report, &mut self.in_flight_due) {
                *due = due.saturating_sub(1);
            }
            self.registry.take_worker_report(report, now);
            if let (Some(queue), Some(admin)) = (latency_of, &mut self.admin) {
                admin.latency_taken(queue);
            }
        }
        true
    }

    /// How it has ended, once it has.
    fn ended(&mut self, now: Instant) -> Option<Ended> {
        let until = self.drain_until?;
        if self.registry.disks().next().is_none() {
            if !self.registry.is_closing() {
                return Some(Ended::Drained);
            }
            // Closing may wait for storage, too.
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
            tracing::error!("giving up the requests in flight of {}", disks.join(", "));
            self.in_flight_due = Some(self.registry.ask_in_flight());
        }
        // Don't wait longer for a worker that does not even report what it has.
        let told = self.in_flight_due == Some(0) || now >= until + TELL_AT_MOST;
        told.then_some(Ended::GaveUp)
    }

    /// When to give up what is not done, once ending.
    fn give_up_at(&self) -> Option<Instant> {
        let until = self.drain_until?;
        Some(self.closing_since.map_or(until, |since| until.max(since + CLOSE_AT_LEAST)))
    }
}

/// Time for storage to close files, even if draining has used up its own time.
const CLOSE_AT_LEAST: Duration = Duration::from_secs(2);

/// Time for workers to report what they have in flight.
const TELL_AT_MOST: Duration = Duration::from_secs(1);

/// Time between attempts to send to a worker that is thousands of commands behind.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);
