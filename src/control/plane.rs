//! The control plane as it is stepped: [`Control::poll_once`] does what there is to do at a given time.
//! Nothing in here reads a clock, sleeps or waits for a descriptor; [`super::run`](super::run()) does.

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

/// What became of a pass, or of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It did something, and there may be more to do.
    Worked,
    /// It found nothing to do.
    Idle,
    /// It was asked to end, and has. Whoever runs it tells the workers to stop.
    Ended(Ended),
}

/// How the control plane has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered. The workers end, too.
    Drained,
    /// Storage has requests that it did not answer, which the log names, and may keep workers and
    /// helpers from ending: do not wait for them.
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
    /// When to try xenstored again, where its connection was lost.
    store_retry: Option<Instant>,
    /// When to end whatever is in flight, once ending.
    drain_until: Option<Instant>,
    /// Since when only storage is still to be closed, once ending.
    closing_since: Option<Instant>,
    /// Answers still to come to what is in flight, once they were asked for.
    in_flight_due: Option<usize>,
}

impl<P: Platform> Control<P> {
    /// One without an admin socket. Workers are numbered as they stand in `workers`; `instance` names this
    /// run of the daemon, unlike any before or beside it.
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

    /// One pass: what xenstore, workers, helpers and the admin have to say, each as far as a share of a
    /// pass allows.
    pub fn poll_once(&mut self, now: Instant) -> Progress {
        let worked = self.work(now);
        match self.ended(now) {
            Some(ended) => Progress::Ended(ended),
            None if worked => Progress::Worked,
            None => Progress::Idle,
        }
    }

    /// Opens or closes one thing, as a helper thread would, if [`Config::helper_threads`] is 0; false if there
    /// is nothing to be opened or closed.
    pub fn help_once(&self) -> bool {
        self.registry.help_once()
    }

    /// When there is something to do, even if nothing happens before.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let admin = self.admin.as_ref().and_then(Admin::deadline);
        let tell = if self.in_flight_due.is_some() { TELL_AT_MOST } else { Duration::ZERO };
        let drain = self.give_up_at().map(|until| until + tell);
        let backlog = self.registry.send_backlog().then(|| now + BACKLOG_PAUSE);
        let all = [admin, self.store_retry, drain, backlog, self.registry.deadline()];
        all.into_iter().flatten().min()
    }

    /// Begins to end; asked again, gives up what is still in flight.
    pub fn end(&mut self, now: Instant) {
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

    /// Readable while xenstore has something to say; `None` while there is no connection to it.
    pub fn store_fd(&self) -> Option<BorrowedFd<'_>> {
        self.store_retry.is_none().then(|| self.registry.store().as_fd())
    }

    /// Readable once workers have something to say.
    pub fn workers_fd(&self) -> BorrowedFd<'_> {
        self.reports.bell.as_fd()
    }

    /// Readable once helpers have.
    pub fn helpers_fd(&self) -> BorrowedFd<'_> {
        self.opened.as_fd()
    }

    /// Answers the admin from now on.
    pub(super) fn answer(&mut self, admin: Admin) {
        self.admin = Some(admin);
    }

    /// The admin socket, and what its commands are about.
    pub(super) fn admin(&mut self) -> Option<(&mut Admin, &mut Registry<P::Store>)> {
        Some((self.admin.as_mut()?, &mut self.registry))
    }

    /// Says whether there may be more to do.
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
                        "the connection to xenstored is lost ({error}); connected disks run on, \
                         nothing else can change until it answers again"
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
}

/// Given to storage to close files with, even where draining has used up all of its time.
const CLOSE_AT_LEAST: Duration = Duration::from_secs(2);

/// Given to workers to say what they have in flight.
const TELL_AT_MOST: Duration = Duration::from_secs(1);

/// Between attempts to send to a worker that is thousands of commands behind.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);
