//! The admin socket: `attach`, `detach`, `insert`, `eject` and `list` while the daemon runs.
//!
//! The command line's side is [`client`]; [`protocol`] defines what goes over the socket. On the daemon's
//! side, a request that has to wait for a guest, storage or workers becomes a job that is checked again in
//! each pass.

pub mod client;
mod place;
pub mod protocol;
mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use mio::{Registry as Polled, Token};

use super::area::{Description, Failure};
use super::attach::AttachError;
use super::disk::Disk;
use super::helpers::OpenId;
use super::key::DiskKey;
use super::registry::{Begun, Registry};
use crate::backing::Image;
use crate::limits;
use crate::msg::{GrantMode, QueueKey};
use crate::xen::Store;
use crate::xen::vdev::Vdev;
use protocol::{DiskReport, Eject, Insert, Reply, Request};
use server::Server;

pub use place::BindError;
pub(super) use server::FIRST_CLIENT;

/// The admin socket and its unfinished requests.
#[derive(Debug)]
pub(super) struct Admin {
    server: Server,
    jobs: Vec<Job>,
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Job {
    client: Token,
    wait: Wait,
    deadline: Instant,
}

#[derive(Debug)]
enum Wait {
    /// For storage to be opened, and then for the disk or medium it is for.
    Opening(OpenId),
    /// For the disk to be forgotten.
    Detach(DiskKey),
    /// For the drive to have changed its medium.
    Medium(DiskKey),
    /// For the workers' latencies.
    Latencies(BTreeSet<QueueKey>),
}

impl Admin {
    /// Listens at `path`, with `token` for the listener.
    pub fn bind(path: &Path, polled: &Polled, token: Token) -> Result<Admin, BindError> {
        Ok(Admin { server: Server::bind(path, polled, token)?, jobs: Vec::new() })
    }

    /// Accepts new clients.
    pub fn accept(&mut self, polled: &Polled) {
        self.server.accept(polled);
    }

    /// Handles requests of one client.
    pub fn pump<S: Store>(&mut self, client: Token, registry: &mut Registry<S>, now: Instant) {
        while let Some(request) = self.server.pump(client) {
            match begin(request, registry, now) {
                Next::Reply(reply) => self.server.reply(client, &reply),
                Next::Wait(wait) => {
                    let deadline = now + Duration::from_secs(wait.seconds());
                    self.jobs.push(Job { client, wait, deadline });
                    return;
                }
            }
        }
    }

    /// Notes that a worker has reported the latencies of this queue.
    pub fn latency_taken(&mut self, queue: QueueKey) {
        for job in &mut self.jobs {
            if let Wait::Latencies(due) = &mut job.wait {
                due.remove(&queue);
            }
        }
    }

    /// Answers the jobs that are done or have waited long enough.
    pub fn finish_jobs<S: Store>(&mut self, registry: &mut Registry<S>, now: Instant) {
        let mut index = 0;
        while let Some(job) = self.jobs.get_mut(index) {
            match job.next(registry, now) {
                None => index += 1,
                Some(Next::Wait(wait)) => {
                    job.deadline = now + Duration::from_secs(wait.seconds());
                    job.wait = wait;
                }
                Some(Next::Reply(reply)) => {
                    let client = self.jobs.swap_remove(index).client;
                    self.server.reply(client, &reply);
                    self.pump(client, registry, now);
                }
            }
        }
    }

    /// When the next job has waited long enough.
    pub fn deadline(&self) -> Option<Instant> {
        self.jobs.iter().map(|job| job.deadline).min()
    }
}

/// What to do next for a request.
enum Next {
    Reply(Reply),
    Wait(Wait),
}

impl Wait {
    /// The longest time to wait.
    fn seconds(&self) -> u64 {
        match self {
            // The registry gives up earlier, with a reason.
            Wait::Opening(_) => 2 * limits::OPEN_SECONDS,
            Wait::Detach(_) => limits::DETACH_SECONDS,
            Wait::Medium(_) => limits::MEDIUM_SECONDS,
            Wait::Latencies(_) => limits::LATENCY_SECONDS,
        }
    }
}

fn begin<S: Store>(request: Request, registry: &mut Registry<S>, now: Instant) -> Next {
    match request {
        Request::Attach(attach) => match registry.attach(attach, now) {
            Ok(Begun::Opening(id)) => Next::Wait(Wait::Opening(id)),
            done => Next::Reply(reply(done.map(drop))),
        },
        Request::Detach(detach) => match registry.detach(&detach) {
            Ok(key) => Next::Wait(Wait::Detach(key)),
            Err(error) => Next::Reply(reply(Err(error))),
        },
        Request::Insert(Insert { domid, vdev, target }) => {
            medium(registry.change_medium(domid, &vdev, &target, now))
        }
        Request::Eject(Eject { domid, vdev }) => {
            medium(registry.change_medium(domid, &vdev, "", now))
        }
        Request::List => Next::Wait(Wait::Latencies(registry.ask_latencies())),
    }
}

fn medium(asked: Result<Begun, AttachError>) -> Next {
    match asked {
        Ok(Begun::Opening(id)) => Next::Wait(Wait::Opening(id)),
        Ok(Begun::Disk(key)) => Next::Wait(Wait::Medium(key)),
        Err(error) => Next::Reply(reply(Err(error))),
    }
}

fn reply(result: Result<(), AttachError>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Error { message: Failure::of(&error).text },
    }
}

impl Job {
    /// What to do next; `None` while the job has to wait.
    fn next<S: Store>(&self, registry: &mut Registry<S>, now: Instant) -> Option<Next> {
        let late = now >= self.deadline;
        let reply = match &self.wait {
            Wait::Opening(id) => match registry.outcome(*id) {
                // Wait until a drive has the medium; after `attach` that is true at once.
                Some(Ok(key)) => return Some(Next::Wait(Wait::Medium(key))),
                Some(Err(error)) => reply(Err(error)),
                None if late => Reply::Error { message: "storage does not answer".to_owned() },
                None => return None,
            },
            Wait::Detach(key) => match registry.disk(key) {
                None => Reply::Done,
                Some(disk) if late && disk.is_draining() => Reply::Error { message: drains(key) },
                Some(_) if late => Reply::Error { message: held(key) },
                Some(_) => return None,
            },
            Wait::Medium(key) => match registry.disk(key) {
                None => Reply::Error { message: format!("{key} is gone") },
                Some(disk) if disk.has_refused_medium() => {
                    Reply::Error { message: disk.failure().to_owned() }
                }
                Some(disk) if disk.medium_is_settled() => Reply::Done,
                Some(_) if late => Reply::Error { message: busy(key) },
                Some(_) => return None,
            },
            Wait::Latencies(due) if due.is_empty() || late => {
                Reply::Disks { disks: registry.disks().map(|disk| report(disk, now)).collect() }
            }
            Wait::Latencies(_) => return None,
        };
        Some(Next::Reply(reply))
    }
}

fn held(key: &DiskKey) -> String {
    let vdev = Vdev::from(key.vbd);
    format!(
        "domain {domid} has not let go of {vdev} within {seconds} s; unmount it in the guest, or remove \
         it with `polldisk detach --domid {domid} --vdev {vdev} --force`",
        domid = key.domid,
        seconds = limits::DETACH_SECONDS,
    )
}

fn drains(key: &DiskKey) -> String {
    format!(
        "storage has not answered all requests of disk {vdev} of domain {domid} within {seconds} s; the \
         disk is removed as soon as it has (see the host's log for problems with storage)",
        domid = key.domid,
        vdev = Vdev::from(key.vbd),
        seconds = limits::DETACH_SECONDS,
    )
}

fn busy(key: &DiskKey) -> String {
    format!(
        "requests on the medium in {key} are not finished after {} s; the medium is changed as \
         soon as storage has answered them (see the host's log for problems with storage)",
        limits::MEDIUM_SECONDS
    )
}

fn report(disk: &Disk, now: Instant) -> DiskReport {
    let key = disk.key();
    let geometry = disk.geometry();
    let connection = disk.connection();
    let workers = connection.map(|connection| connection.workers()).unwrap_or_default();
    let since = connection.map_or(disk.since(), |connection| connection.since());
    let description = disk.description();
    DiskReport {
        domid: key.domid.raw().into(),
        vdev: Vdev::from(key.vbd).to_string(),
        devid: key.vbd.0,
        kind: key.kind.to_string(),
        state: disk.machine().backend().to_string(),
        failure: disk.failure().to_owned(),
        warnings: disk.backing().map(|backing| backing.warnings().to_vec()).unwrap_or_default(),
        target: description.map(|description| description.target.clone()).unwrap_or_default(),
        backing: match disk.backing().map(|backing| &**backing.image()) {
            Some(Image::Raw(_)) => "raw",
            Some(Image::Null(_)) => "null",
            Some(Image::Empty) => "empty",
            None => "",
        }
        .to_owned(),
        read_only: description.is_some_and(|description| description.read_only),
        drive: description.is_some_and(Description::is_drive),
        sectors: geometry.map_or(0, |geometry| geometry.sectors().0),
        sector_size: geometry.map_or(0, |geometry| geometry.sector_bytes),
        data_path: match connection.map(|connection| connection.published().grant_mode) {
            Some(GrantMode::Persistent) => "persistent",
            Some(GrantMode::Map) => "map",
            Some(GrantMode::Copy) => "copy",
            None => "",
        }
        .to_owned(),
        queues: workers.len(),
        worker: workers.first().copied(),
        workers,
        counts: connection.map(|connection| connection.counts()).unwrap_or_default(),
        latency: connection.map(|connection| steps(connection.latency())).unwrap_or_default(),
        uptime_ms: u64::try_from(now.saturating_duration_since(since).as_millis())
            .unwrap_or(u64::MAX),
    }
}

fn steps(latency: &hdrhistogram::Histogram<u64>) -> Vec<(u64, u64)> {
    latency.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect()
}
