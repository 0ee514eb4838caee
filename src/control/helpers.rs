//! Threads that open and close storage, so that control never waits for it.
//!
//! Opening a file on a hung NFS server, behind an automount or under a lease may take seconds or for ever,
//! and so may closing it. Control asks for an open with [`Helpers::open`], goes on, and gets the answer
//! from [`Helpers::next_answer`]. What was opened is also closed here, on whichever thread it is dropped ([`OpenBacking`]).
//!
//! Threads are started as needed, at most `limits::HELPERS_MAX`. Storage that hangs blocks the threads that
//! use it, so only a few may be at one file (`limits::HELPERS_PER_FILE`), in one folder
//! (`limits::HELPERS_PER_FOLDER`) and on one mount (`limits::HELPERS_PER_MOUNT`); the others stay free for
//! other storage.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::area::Failure;
use super::key::DiskKey;
use crate::backing::{Access, Backing, BackingError, Contents, Image, Spec, mounts};
use crate::limits;
use crate::park::Doorbell;

/// How long an idle thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// A request to open storage: unique in the life of the daemon, so that late answers are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpenId(u64);

/// Who asked for an open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A disk, for its storage or a new medium.
    Disk(DiskKey),
    /// The admin, for a new disk or a new medium.
    Admin,
}

/// The answer to [`Helpers::open`].
#[derive(Debug)]
pub struct Answer {
    /// The request.
    pub id: OpenId,
    /// Who asked.
    pub asker: Asker,
    /// The opened storage, or why it could not be opened within `limits::OPEN_SECONDS`.
    pub result: Result<OpenBacking, Failure>,
}

/// Opened storage. When it is dropped, on any thread, a helper closes it.
#[derive(Debug)]
pub struct OpenBacking {
    /// `None` only while it is dropped.
    backing: Option<Backing>,
    target: String,
    places: Places,
    pool: Arc<Pool>,
}

/// Control's end of the helpers.
#[derive(Debug)]
pub struct Helpers {
    pool: Arc<Pool>,
    results: Receiver<Opened>,
    /// Opens that control waits for, oldest first.
    asked: BTreeMap<OpenId, Asked>,
    next: u64,
}

/// An open that control waits for.
#[derive(Debug)]
struct Asked {
    asker: Asker,
    target: String,
    until: Instant,
}

/// A helper's result.
#[derive(Debug)]
struct Opened {
    id: OpenId,
    result: Result<OpenBacking, BackingError>,
}

#[derive(Debug)]
struct Pool {
    state: Mutex<State>,
    /// Signalled when a job may have become ready to run.
    changed: Condvar,
    results: Sender<Opened>,
    bell: Doorbell,
    threads_max: usize,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    /// How many jobs run in each place.
    running: BTreeMap<Place, usize>,
    /// Waiting and running jobs that close something.
    closings: usize,
    threads: usize,
    idle: usize,
}

#[derive(Debug)]
struct Job {
    task: Task,
    places: Places,
}

#[derive(Debug)]
enum Task {
    Open { id: OpenId, spec: Spec, access: Access },
    Close(Backing),
}

/// A place in which a job may get stuck.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// A file or device.
    File(PathBuf),
    /// A file's folder.
    Folder(PathBuf),
    /// A mount, by its mount point.
    Mount(PathBuf),
}

impl Place {
    /// How many jobs may be there at a time.
    fn most(&self) -> usize {
        match self {
            Place::File(_) => limits::HELPERS_PER_FILE,
            Place::Folder(_) => limits::HELPERS_PER_FOLDER,
            Place::Mount(_) => limits::HELPERS_PER_MOUNT,
        }
    }
}

/// All places in which one job may get stuck.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Places(Vec<Place>);

impl Helpers {
    /// Helpers without a thread yet, and never more than `threads_max`; with 0, [`Helpers::help_once`] does
    /// the work. `bell` is rung for each answer, and when everything that was dropped is closed.
    pub fn new(bell: Doorbell, threads_max: usize) -> Helpers {
        let (sender, results) = unbounded();
        let (state, changed) = Default::default();
        let pool = Arc::new(Pool { state, changed, results: sender, bell, threads_max });
        Helpers { pool, results, asked: BTreeMap::new(), next: 0 }
    }

    /// Opens or closes one thing in the calling thread; returns false if there is nothing to do.
    pub fn help_once(&self) -> bool {
        let job = self.pool.state().next_job();
        job.is_some_and(|job| {
            self.pool.work(job);
            true
        })
    }

    /// Begins to open storage; [`Helpers::next_answer`] will have the result. Fails if `target` is invalid.
    pub fn open(
        &mut self,
        target: &str,
        access: Access,
        asker: Asker,
        now: Instant,
    ) -> Result<OpenId, BackingError> {
        let spec = target.parse::<Spec>()?;
        let id = OpenId(self.next);
        self.next += 1;
        let until = now + Duration::from_secs(limits::OPEN_SECONDS);
        self.asked.insert(id, Asked { asker, target: target.to_owned(), until });
        match &spec.contents {
            Contents::Raw(path) => {
                let places = Places::of(path);
                self.pool.push(Job { task: Task::Open { id, spec, access }, places });
            }
            // There is nothing to wait for.
            Contents::Null { .. } => {
                let result = spec.open(&access);
                self.pool.answer(id, &spec, Places::default(), result);
            }
        }
        Ok(id)
    }

    /// A drive without a medium.
    pub fn empty(&self) -> OpenBacking {
        self.pool.own(Backing::empty(), String::new(), Places::default())
    }

    /// Abandons an open. If it runs already it goes on, and what it opens is closed.
    pub fn abandon(&mut self, id: OpenId) {
        self.asked.remove(&id);
        self.pool
            .state()
            .waiting
            .retain(|job| !matches!(&job.task, Task::Open { id: waiting, .. } if *waiting == id));
    }

    /// The next answer that control waits for, if there is one, or a failure for an open that takes too long.
    pub fn next_answer(&mut self, now: Instant) -> Option<Answer> {
        while let Ok(Opened { id, result }) = self.results.try_recv() {
            if let Some(Asked { asker, .. }) = self.asked.remove(&id) {
                let result = result.map_err(|error| Failure::of(&error));
                return Some(Answer { id, asker, result });
            }
        }
        self.next_late(now)
    }

    /// When [`Helpers::next_answer`] will have an answer at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.asked.first_key_value().map(|(_, asked)| asked.until)
    }

    fn next_late(&mut self, now: Instant) -> Option<Answer> {
        self.deadline().filter(|until| *until <= now)?;
        let (id, Asked { asker, target, .. }) = self.asked.pop_first()?;
        self.abandon(id);
        let text = BackingError::too_slow(&target).to_string();
        Some(Answer { id, asker, result: Err(Failure { errno: libc::ETIMEDOUT, text }) })
    }

    /// Whether dropped storage is still being closed. The bell is rung when it no longer is.
    pub fn is_closing(&self) -> bool {
        self.pool.state().closings > 0
    }
}

impl Pool {
    /// The state is consistent even if a thread panicked: no change of it can panic half-way.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(self: &Arc<Self>, backing: Backing, target: String, places: Places) -> OpenBacking {
        OpenBacking { backing: Some(backing), target, places, pool: Arc::clone(self) }
    }

    fn answer(
        self: &Arc<Self>,
        id: OpenId,
        spec: &Spec,
        places: Places,
        result: Result<Backing, BackingError>,
    ) {
        let result = result.map(|backing| self.own(backing, spec.to_string(), places));
        // If control has ended, nobody wants the answer.
        let _ = self.results.send(Opened { id, result });
        self.bell.ring();
    }

    fn push(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        let may_run = state.may_run(&job);
        state.closings += job.closes();
        state.waiting.push_back(job);
        if !may_run {
            // The thread that leaves its place next will take it.
            return;
        }
        let due = state.waiting.iter().filter(|job| state.may_run(job)).count();
        // Compare with all ready jobs, because a thread that was woken may still count as idle.
        if due <= state.idle || state.threads == self.threads_max {
            drop(state);
            self.changed.notify_all();
        } else if let Some(job) = state.next_job() {
            state.threads += 1;
            drop(state);
            self.spawn(job);
        }
    }

    fn spawn(self: &Arc<Self>, job: Job) {
        let pool = Arc::clone(self);
        let first = Arc::new(Mutex::new(Some(job)));
        let taken = Arc::clone(&first);
        let body = move || {
            let job = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
            pool.serve(job);
        };
        let spawned = std::thread::Builder::new().name("storage".to_owned()).spawn(body);
        if let Err(error) = spawned
            && let Some(job) = first.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            let mut state = self.state();
            state.leave(&job.places);
            state.waiting.push_front(job);
            drop(state);
            self.give_up_where_nobody_helps(&error);
        }
    }

    /// Fails all waiting jobs if there is no thread left: otherwise none would ever be answered.
    fn give_up_where_nobody_helps(self: &Arc<Self>, error: &std::io::Error) {
        let mut state = self.state();
        state.threads -= 1;
        if state.threads > 0 {
            return;
        }
        let waiting = std::mem::take(&mut state.waiting);
        state.closings = 0;
        drop(state);
        for Job { task, places } in waiting {
            match task {
                Task::Open { id, spec, .. } => {
                    let what = format!("no thread can be started to open it ({error})");
                    let remedy = "raise the limit on threads (TasksMax= under systemd)";
                    let error = BackingError::new(&spec.to_string(), &what, remedy, None);
                    self.answer(id, &spec, places, Err(error));
                }
                // Closed on this thread, because its file would stay open for good otherwise.
                Task::Close(backing) => drop(backing),
            }
        }
        self.bell.ring();
    }

    /// Runs this job and others, until there were none for a while.
    fn serve(self: &Arc<Self>, mut first: Option<Job>) {
        let mut state = self.state();
        loop {
            if let Some(job) = first.take().or_else(|| state.next_job()) {
                drop(state);
                self.work(job);
                state = self.state();
                continue;
            }
            state.idle += 1;
            let (next, waited) =
                self.changed.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if waited.timed_out() && !state.has_job() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// Does a job, and makes room for those that wait for its places.
    fn work(self: &Arc<Self>, job: Job) {
        let (places, closes) = (job.places.clone(), job.closes());
        self.run(job);
        let mut state = self.state();
        state.leave(&places);
        state.closings -= closes;
        if closes > 0 && state.closings == 0 {
            self.bell.ring();
        }
        drop(state);
        self.changed.notify_all();
    }

    fn run(self: &Arc<Self>, job: Job) {
        match job.task {
            Task::Open { id, spec, access } => {
                let opened = catch_unwind(AssertUnwindSafe(|| spec.open(&access)));
                let result = opened.unwrap_or_else(|_| {
                    let what = "opening it failed in polldisk itself";
                    let remedy = "see the log, and report it as a bug in polldisk";
                    Err(BackingError::new(&spec.to_string(), what, remedy, None))
                });
                self.answer(id, &spec, job.places, result);
            }
            Task::Close(backing) => {
                let _ = catch_unwind(AssertUnwindSafe(|| drop(backing)));
            }
        }
    }
}

impl Job {
    /// 1 if the job closes something, else 0.
    fn closes(&self) -> usize {
        usize::from(matches!(self.task, Task::Close(_)))
    }
}

impl State {
    fn may_run(&self, job: &Job) -> bool {
        let has_room =
            |place: &Place| self.running.get(place).is_none_or(|running| *running < place.most());
        job.places.0.iter().all(has_room)
    }

    fn has_job(&self) -> bool {
        self.waiting.iter().any(|job| self.may_run(job))
    }

    /// The oldest job whose places have room.
    fn next_job(&mut self) -> Option<Job> {
        let index = self.waiting.iter().position(|job| self.may_run(job))?;
        let job = self.waiting.remove(index)?;
        for place in &job.places.0 {
            *self.running.entry(place.clone()).or_default() += 1;
        }
        Some(job)
    }

    fn leave(&mut self, places: &Places) {
        for place in &places.0 {
            if let Some(running) = self.running.get_mut(place) {
                *running -= 1;
                if *running == 0 {
                    self.running.remove(place);
                }
            }
        }
    }
}

impl Places {
    /// A file, its folder and its mount, found by name only, because looking them up could hang. For
    /// devices the folder does not matter.
    fn of(path: &Path) -> Places {
        let folder = path.parent().filter(|_| !path.starts_with("/dev"));
        let folder = folder.map(|folder| Place::Folder(folder.to_owned()));
        let (file, mount) = (Place::File(path.to_owned()), Place::Mount(mounts::point_of(path)));
        Places([file].into_iter().chain(folder).chain([mount]).collect())
    }
}

impl OpenBacking {
    /// The target that named it.
    pub fn target(&self) -> &str {
        &self.target
    }
}

impl Deref for OpenBacking {
    type Target = Backing;

    fn deref(&self) -> &Backing {
        self.backing.as_ref().expect("taken only in its drop")
    }
}

impl Drop for OpenBacking {
    fn drop(&mut self) {
        match self.backing.take() {
            Some(backing) if matches!(**backing.image(), Image::Raw(_)) => {
                // Other disks that want the same storage wait for this instead of being refused.
                backing.closing();
                let places = std::mem::take(&mut self.places);
                self.pool.push(Job { task: Task::Close(backing), places });
            }
            // Nothing is open.
            _ => {}
        }
    }
}

#[cfg(test)]
mod test;
