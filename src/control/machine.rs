//! The xenbus state machine of one disk: pure, and declared as a table.
//!
//! What happens to a disk is an [`Input`]. [`Machine::step`] first updates the machine's state with it (so
//! a condition sees the new value), then picks the first row of [`TABLE`] that matches the input and whose
//! conditions hold, and returns that row's [`Effect`]s for the caller to carry out in order. There is no
//! I/O here, and nothing fails.
//!
//! The behaviour is that of QEMU's xen-bus and xen-block, with these differences:
//! - a failure writes the xenbus `error` node and moves to Closing, as Linux's `xenbus_dev_fatal`
//!   does; the disk then stays down until the frontend starts over;
//! - the data plane and storage answer later, so the frontend and the toolstack may move on while a
//!   connection is being made or ended, or storage is being opened. What an answer leads to depends on
//!   their states when it comes;
//! - several changes may be seen as one. A frontend that is Initialising while its connection runs, or has a
//!   different ring from the connection's, has started over: the connection is ended first;
//! - if a toolstack writes Initialising again, the disk is opened afresh;
//! - a drive may be empty, and its medium may change while it is connected.
//!
//! To change it: edit the table, run its tests with `UPDATE_SNAPSHOTS=1`, and review the difference in
//! `machine/table.txt`. A new input also goes into `any_input` of the tests.

use std::fmt;

use crate::xen::keys::XenbusState;
use XenbusState::{
    Closed, Closing, Connected, InitWait, Initialised, Initialising, Reconfigured, Reconfiguring,
    Unknown,
};

/// Something that happened to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Somebody else has written this to the backend's `state`.
    Backend(XenbusState),
    /// The backend's `online` now holds this.
    Online(bool),
    /// The frontend's `state` now holds this; `Unknown` if it or the whole area is gone.
    Frontend(XenbusState),
    /// The frontend, Initialised or Connected, has published a different ring from the connection's.
    RingReplaced,
    /// Storage is open.
    Opened,
    /// Storage can't be opened, or the area does not describe a disk.
    OpenFailed,
    /// As [`Input::OpenFailed`], for a disk whose hotplug script reports the reason.
    OpenFailedScript,
    /// Storage is open and no hotplug script is still to finish.
    Ready,
    /// The data plane serves every queue.
    ConnectionUp,
    /// A queue can't be served, or the frontend published invalid values.
    ConnectionFailed,
    /// The frontend broke the ring protocol, or a worker died.
    ConnectionFault,
    /// The data plane has released everything of the connection.
    ConnectionDown,
    /// The drive has another medium, or none, and every queue of the connection uses it.
    MediumChanged,
    /// The medium that the toolstack named can't be used; the drive is empty.
    MediumFailed,
    /// The backend area is removed, or belongs to another disk now.
    Gone,
    /// The guest no longer exists, whatever its toolstack leaves behind.
    DomainGone,
    /// The daemon is ending.
    Stop,
}

/// What the caller has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Begin to open storage; the answer, at any time later, is `Opened`, `OpenFailed` or
    /// `OpenFailedScript`.
    Open,
    /// Write the nodes that the frontend reads before it chooses its rings.
    PublishFeatures,
    /// Write size and kind of the disk.
    PublishDisk,
    /// Write the backend's `state`, and what the frontend reads in that state: InitWait with all of
    /// [`Effect::PublishFeatures`], Connected with all of [`Effect::PublishDisk`].
    SetState(XenbusState),
    /// Read what the frontend published and begin to serve it; the answer is `ConnectionUp` or
    /// `ConnectionFailed`.
    Connect,
    /// Begin to end the connection; the answer is `ConnectionDown`.
    Disconnect,
    /// Write the xenbus `error` node: why the disk failed.
    WriteError,
    /// Write `hotplug-status` and `hotplug-error`, which the hotplug script passes on.
    WriteHotplugError,
    /// Drop the disk, and remove its areas if polldisk made them.
    Forget,
}

/// The connection to the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// Nothing is connected.
    Down,
    /// Asked for, not answered yet.
    Connecting,
    /// Served.
    Up,
    /// Its end was asked for, not answered yet.
    Disconnecting,
}

/// The state of one disk, as the machine knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    backend: XenbusState,
    frontend: XenbusState,
    online: bool,
    connection: ConnectionState,
    opening: bool,
    ready: bool,
    failed: bool,
    gone: bool,
    deserted: bool,
    stopping: bool,
}

/// One row: if `on` matches the input and all of `when` hold, `then` is done.
#[derive(Debug)]
pub struct Row {
    on: On,
    when: &'static [When],
    then: &'static [Effect],
}

/// Which inputs a row is about.
#[derive(Clone, Copy, Debug)]
enum On {
    Backend(&'static [XenbusState]),
    Frontend(&'static [XenbusState]),
    Online(bool),
    Just(Input),
}

/// A condition on the state after the input has updated it.
#[derive(Clone, Copy, Debug)]
enum When {
    Backend(&'static [XenbusState]),
    Frontend(&'static [XenbusState]),
    Connection(&'static [ConnectionState]),
    Online(bool),
    /// Storage is open and the hotplug script is done.
    Ready,
    /// The last connection failed, and the frontend has not started over since then.
    Failed,
    Gone,
    /// The guest no longer exists.
    Deserted,
    Stopping,
}

const ANY: &[XenbusState] = &XenbusState::ALL;
/// A frontend that will not answer: missing, closed, or not started yet.
const DEAD: &[XenbusState] = &[Unknown, Initialising, Closed, Reconfiguring, Reconfigured];
/// A frontend whose ring is published.
const PUBLISHED: &[XenbusState] = &[Initialised, Connected];
/// A frontend that is gone or has closed.
const LEFT: &[XenbusState] = &[Unknown, Closed];
/// Backend states in which a disk that is not online waits for nobody.
const IDLE: &[XenbusState] = &[Unknown, Initialising, InitWait, Closed];
/// A connection that has to be ended.
const ALIVE: &[ConnectionState] = &[ConnectionState::Connecting, ConnectionState::Up];

use Effect::{
    Connect, Disconnect, Forget, Open, PublishDisk, PublishFeatures, SetState, WriteError,
    WriteHotplugError,
};

const fn row(on: On, when: &'static [When], then: &'static [Effect]) -> Row {
    Row { on, when, then }
}

/// The whole behaviour. Rows are tried from the top; the first that matches is the only one.
pub static TABLE: &[Row] = &[
    // The daemon is ending: rings are drained, the states of the toolstack's disks stay.
    row(On::Just(Input::Stop), &[When::Connection(ALIVE)], &[Disconnect]),
    row(On::Just(Input::Stop), &[When::Connection(&[ConnectionState::Down])], &[Forget]),
    row(On::Just(Input::ConnectionDown), &[When::Stopping], &[Forget]),
    // The backend area is gone: nothing may be written there now.
    row(On::Just(Input::Gone), &[When::Connection(ALIVE)], &[Disconnect]),
    row(On::Just(Input::Gone), &[When::Connection(&[ConnectionState::Down])], &[Forget]),
    row(On::Just(Input::ConnectionDown), &[When::Gone], &[Forget]),
    // The guest is gone, and its toolstack may never clean up.
    row(On::Just(Input::DomainGone), &[When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Just(Input::DomainGone),
        &[When::Connection(&[ConnectionState::Down])],
        &[SetState(Closed), Forget],
    ),
    row(On::Just(Input::ConnectionDown), &[When::Deserted], &[SetState(Closed), Forget]),
    // Opening: all nodes that the frontend reads are written with InitWait.
    row(On::Just(Input::Opened), &[When::Backend(&[Initialising])], &[SetState(InitWait)]),
    row(
        On::Just(Input::OpenFailedScript),
        &[When::Backend(&[Initialising])],
        &[WriteError, WriteHotplugError, SetState(InitWait)],
    ),
    row(
        On::Just(Input::OpenFailed),
        &[When::Backend(&[Initialising]), When::Frontend(DEAD)],
        &[WriteError, SetState(Closing), SetState(Closed)],
    ),
    row(
        On::Just(Input::OpenFailed),
        &[When::Backend(&[Initialising])],
        &[WriteError, SetState(Closing)],
    ),
    row(
        On::Just(Input::Ready),
        &[
            When::Backend(&[InitWait]),
            When::Frontend(PUBLISHED),
            When::Connection(&[ConnectionState::Down]),
            When::Online(true),
        ],
        &[Connect],
    ),
    // The toolstack (or an admin) wrote the backend's state.
    row(On::Backend(&[Initialising]), &[When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Backend(&[Initialising]),
        &[When::Connection(&[ConnectionState::Down]), When::Online(true)],
        &[Open],
    ),
    row(On::Backend(&[Closing]), &[When::Frontend(DEAD), When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Backend(&[Closing]),
        &[When::Frontend(DEAD), When::Connection(&[ConnectionState::Down]), When::Online(true)],
        &[SetState(Closed)],
    ),
    row(
        On::Backend(&[Closing]),
        &[When::Frontend(DEAD), When::Connection(&[ConnectionState::Down])],
        &[SetState(Closed), Forget],
    ),
    row(On::Backend(IDLE), &[When::Online(false), When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Backend(IDLE),
        &[When::Online(false), When::Connection(&[ConnectionState::Down])],
        &[SetState(Closed), Forget],
    ),
    row(On::Backend(ANY), &[], &[]),
    // Destruction.
    row(On::Online(false), &[When::Backend(IDLE), When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Online(false),
        &[When::Backend(IDLE), When::Connection(&[ConnectionState::Down])],
        &[SetState(Closed), Forget],
    ),
    row(
        On::Online(false),
        &[
            When::Backend(&[Closing]),
            When::Frontend(DEAD),
            When::Connection(&[ConnectionState::Down]),
        ],
        &[SetState(Closed), Forget],
    ),
    row(
        On::Online(true),
        &[When::Backend(&[Initialising]), When::Connection(&[ConnectionState::Down])],
        &[Open],
    ),
    // The frontend changed its state. Before the disk is open, that is only remembered.
    row(On::Frontend(ANY), &[When::Backend(&[Initialising])], &[]),
    row(On::Frontend(&[Initialising]), &[When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Frontend(&[Initialising]),
        &[
            When::Backend(&[Closing, Closed]),
            When::Connection(&[ConnectionState::Down]),
            When::Online(true),
            When::Ready,
        ],
        &[SetState(InitWait)],
    ),
    row(
        On::Frontend(&[Initialising]),
        &[
            When::Backend(&[Closing]),
            When::Connection(&[ConnectionState::Down]),
            When::Online(true),
        ],
        &[SetState(Closed)],
    ),
    row(
        On::Frontend(&[Initialising]),
        &[When::Backend(&[Closing]), When::Connection(&[ConnectionState::Down])],
        &[SetState(Closed), Forget],
    ),
    row(On::Frontend(PUBLISHED), &[When::Failed], &[]),
    row(
        On::Frontend(PUBLISHED),
        &[When::Backend(&[Closing]), When::Connection(&[ConnectionState::Up]), When::Online(true)],
        &[SetState(Connected)],
    ),
    row(
        On::Frontend(PUBLISHED),
        &[
            When::Backend(&[InitWait, Closed]),
            When::Connection(&[ConnectionState::Down]),
            When::Online(true),
            When::Ready,
        ],
        &[Connect],
    ),
    row(On::Frontend(&[Closing]), &[], &[SetState(Closing)]),
    row(On::Frontend(LEFT), &[When::Connection(ALIVE)], &[Disconnect]),
    row(
        On::Frontend(LEFT),
        &[When::Connection(&[ConnectionState::Down]), When::Online(true)],
        &[SetState(Closed)],
    ),
    row(
        On::Frontend(LEFT),
        &[When::Connection(&[ConnectionState::Down])],
        &[SetState(Closed), Forget],
    ),
    row(On::Frontend(ANY), &[], &[]),
    row(On::Just(Input::RingReplaced), &[When::Connection(&[ConnectionState::Up])], &[Disconnect]),
    // The data plane answered.
    row(
        On::Just(Input::ConnectionUp),
        &[When::Connection(&[ConnectionState::Up]), When::Backend(&[InitWait, Connected, Closed])],
        &[SetState(Connected)],
    ),
    row(
        On::Just(Input::ConnectionFailed),
        &[When::Connection(ALIVE)],
        &[WriteError, SetState(Closing), Disconnect],
    ),
    row(
        On::Just(Input::ConnectionFault),
        &[When::Connection(ALIVE)],
        &[WriteError, SetState(Closing), Disconnect],
    ),
    row(
        On::Just(Input::ConnectionDown),
        &[When::Online(true), When::Backend(&[Initialising])],
        &[Open],
    ),
    row(
        On::Just(Input::ConnectionDown),
        &[When::Online(true), When::Frontend(&[Initialising]), When::Ready],
        &[SetState(InitWait)],
    ),
    row(
        On::Just(Input::ConnectionDown),
        &[When::Online(true), When::Frontend(DEAD)],
        &[SetState(Closed)],
    ),
    row(
        On::Just(Input::ConnectionDown),
        &[When::Online(false), When::Frontend(DEAD)],
        &[SetState(Closed), Forget],
    ),
    row(
        On::Just(Input::ConnectionDown),
        &[When::Online(false), When::Backend(IDLE)],
        &[SetState(Closed), Forget],
    ),
    row(On::Just(Input::ConnectionDown), &[When::Failed], &[]),
    row(
        On::Just(Input::ConnectionDown),
        &[When::Online(true), When::Frontend(PUBLISHED), When::Ready],
        &[Connect],
    ),
    // Another medium in the drive.
    row(
        On::Just(Input::MediumChanged),
        &[When::Connection(&[ConnectionState::Up]), When::Backend(&[Connected])],
        &[SetState(Connected)],
    ),
    row(
        On::Just(Input::MediumChanged),
        &[When::Connection(&[ConnectionState::Up])],
        &[PublishDisk],
    ),
    row(
        On::Just(Input::MediumChanged),
        &[When::Connection(&[ConnectionState::Down]), When::Backend(&[InitWait])],
        &[PublishFeatures],
    ),
    row(On::Just(Input::MediumFailed), &[], &[WriteError]),
];

impl Machine {
    /// The machine of a disk that has just been found, with its frontend's `state` and the backend's
    /// `online`. Its first input is the backend's `state`, Initialising or Closing.
    pub fn new(frontend: XenbusState, online: bool) -> Machine {
        Machine {
            backend: Unknown,
            frontend,
            online,
            connection: ConnectionState::Down,
            opening: false,
            ready: false,
            failed: false,
            gone: false,
            deserted: false,
            stopping: false,
        }
    }

    /// The backend's `state` as last read or written.
    pub fn backend(&self) -> XenbusState {
        self.backend
    }

    /// The frontend's `state` as last read.
    pub fn frontend(&self) -> XenbusState {
        self.frontend
    }

    /// The backend's `online` as last read.
    pub fn online(&self) -> bool {
        self.online
    }

    /// The connection to the data plane.
    pub fn connection(&self) -> ConnectionState {
        self.connection
    }

    /// Whether storage is open and the hotplug script is done.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether the backend area is gone, or the guest is.
    pub fn is_gone_or_deserted(&self) -> bool {
        self.gone || self.deserted
    }

    /// Whether storage is being opened.
    pub fn is_opening(&self) -> bool {
        self.opening
    }

    /// Updates the backend's `online`, which changed together with its `state`, the next input: the
    /// toolstack writes both in one transaction.
    pub fn set_online(&mut self, online: bool) {
        self.online = online;
    }

    /// Takes one input; returns the effects to carry out in order. The answer to an open that is no longer
    /// under way has none.
    pub fn step(&mut self, input: Input) -> &'static [Effect] {
        let answers_open =
            matches!(input, Input::Opened | Input::OpenFailed | Input::OpenFailedScript);
        if answers_open && !self.opening {
            return &[];
        }
        self.take_in(input);
        let effects =
            TABLE.iter().find(|row| row.matches(input, self)).map_or(&[][..], |row| row.then);
        for effect in effects {
            self.apply(*effect);
        }
        effects
    }

    fn take_in(&mut self, input: Input) {
        match input {
            Input::Backend(state) => self.backend = state,
            Input::Online(online) => self.online = online,
            Input::Frontend(state) => {
                self.frontend = state;
                self.failed &= !matches!(state, Unknown | Initialising | Closed);
            }
            Input::Opened | Input::OpenFailed | Input::OpenFailedScript => self.opening = false,
            Input::Ready => self.ready = true,
            Input::ConnectionUp if self.connection == ConnectionState::Connecting => {
                self.connection = ConnectionState::Up
            }
            Input::ConnectionFailed | Input::ConnectionFault
                if ALIVE.contains(&self.connection) =>
            {
                self.failed = true;
            }
            Input::ConnectionDown => self.connection = ConnectionState::Down,
            Input::Gone => self.gone = true,
            Input::DomainGone => self.deserted = true,
            Input::Stop => self.stopping = true,
            _ => {}
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            SetState(state) => self.backend = state,
            Connect => self.connection = ConnectionState::Connecting,
            Disconnect => self.connection = ConnectionState::Disconnecting,
            Open => (self.opening, self.ready) = (true, false),
            _ => {}
        }
    }
}

impl Row {
    fn matches(&self, input: Input, machine: &Machine) -> bool {
        let about = match (self.on, input) {
            (On::Backend(states), Input::Backend(state)) => states.contains(&state),
            (On::Frontend(states), Input::Frontend(state)) => states.contains(&state),
            (On::Online(wanted), Input::Online(online)) => wanted == online,
            (On::Just(wanted), input) => wanted == input,
            _ => false,
        };
        about && self.when.iter().all(|condition| condition.holds(machine))
    }
}

impl When {
    fn holds(self, machine: &Machine) -> bool {
        match self {
            When::Backend(states) => states.contains(&machine.backend),
            When::Frontend(states) => states.contains(&machine.frontend),
            When::Connection(connections) => connections.contains(&machine.connection),
            When::Online(online) => machine.online == online,
            When::Ready => machine.ready,
            When::Failed => machine.failed,
            When::Gone => machine.gone,
            When::Deserted => machine.deserted,
            When::Stopping => machine.stopping,
        }
    }
}

/// A row as one line: `input | conditions | effects`.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let when: Vec<String> = self.when.iter().map(ToString::to_string).collect();
        let then: Vec<String> = self.then.iter().map(|effect| format!("{effect:?}")).collect();
        let or_dash = |list: Vec<String>| match list.is_empty() {
            true => "-".to_owned(),
            false => list.join(", "),
        };
        write!(f, "{} | {} | {}", self.on, or_dash(when), or_dash(then))
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            On::Backend(states) => write!(f, "Backend {}", choice(states)),
            On::Frontend(states) => write!(f, "Frontend {}", choice(states)),
            On::Online(online) => write!(f, "Online {online}"),
            On::Just(input) => write!(f, "{input:?}"),
        }
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            When::Backend(states) => write!(f, "backend {}", choice(states)),
            When::Frontend(states) => write!(f, "frontend {}", choice(states)),
            When::Connection(connections) => write!(f, "connection {}", choice(connections)),
            When::Online(online) => write!(f, "{}", if *online { "online" } else { "not online" }),
            When::Ready => f.write_str("ready"),
            When::Failed => f.write_str("failed"),
            When::Gone => f.write_str("gone"),
            When::Deserted => f.write_str("deserted"),
            When::Stopping => f.write_str("stopping"),
        }
    }
}

fn choice<T: fmt::Debug>(values: &[T]) -> String {
    if values.len() == XenbusState::ALL.len() {
        return "any".to_owned();
    }
    values.iter().map(|value| format!("{value:?}")).collect::<Vec<_>>().join("|")
}

#[cfg(test)]
mod test;
