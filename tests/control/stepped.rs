//! The control plane, stepped in the test's own thread at times that the test chooses.

use std::time::{Duration, Instant};

use polldisk::blkif::features::Offer;
use polldisk::control::{Config, Control, Ended, Progress};
use polldisk::limits::{DRAIN_SECONDS, OPEN_SECONDS, STORE_RETRY_SECONDS};
use polldisk::msg::{
    Command, CommandReceiver, InFlight, QueueKey, Report, ReportSender, WorkerId, command_channel,
    report_channel,
};
use polldisk::xen::store::StoreClient;
use xenstore_rs::Xs;

use super::XVDA;
use crate::opening::hung_file;
use crate::rig::{Areas, Guest, Rig, StorePlatform, until};

#[test]
fn time_is_what_the_caller_says() {
    let rig = Rig::without_control();
    let (_sender, receiver) = report_channel().unwrap();
    let config = Config::default();
    let mut control =
        Control::new(rig.platform(), &config, Vec::new(), receiver, "a test".to_owned()).unwrap();
    let start = Instant::now();
    rig.guest(5);
    let (lease, target) = hung_file(&rig, "hung.img");
    let areas = rig.toolstack_disk(5, XVDA, &target);
    let due = start + Duration::from_secs(OPEN_SECONDS);
    until("it is being opened", || {
        control.poll_once(start);
        control.deadline(start) == Some(due)
    });

    while control.poll_once(due - Duration::from_nanos(1)) == Progress::Worked {}
    assert_eq!((rig.state(&areas.backend), rig.read(&areas.error)), (Some(1), None));
    while control.poll_once(due) == Progress::Worked {}
    assert_eq!(rig.state(&areas.backend), Some(6));
    assert!(rig.read(&areas.error).is_some_and(|error| error.contains("within 8 s")));

    control.end(due);
    assert_eq!(control.poll_once(due), Progress::Ended(Ended::Drained));
    drop(lease);
}

/// How many queues the frontend of [`Stepped`] wants.
const QUEUES: u32 = 3;

/// A guest's drive with several queues, and a worker played by the test.
struct Stepped {
    rig: Rig,
    control: Control<StorePlatform>,
    worker: CommandReceiver,
    reporter: ReportSender,
    areas: Areas,
    now: Instant,
    guest: Guest,
}

impl Stepped {
    /// One whose frontend has published its rings.
    fn published() -> Stepped {
        let rig = Rig::without_control();
        let (reporter, reports) = report_channel().unwrap();
        let (sender, worker) = command_channel(WorkerId(0)).unwrap();
        let config = Config { offer: Offer { queues: 4, ..Offer::default() }, ..Config::default() };
        let (platform, name) = (rig.platform(), "a test".to_owned());
        let control = Control::new(platform, &config, vec![sender], reports, name).unwrap();
        let guest = rig.guest(5);
        let nodes = [("params", "null:1G"), ("device-type", "cdrom"), ("removable", "1")];
        let areas = rig.toolstack_disk_with(5, XVDA, &nodes);
        let now = Instant::now();
        let mut stepped = Stepped { rig, control, worker, reporter, areas, now, guest };
        stepped.until("the disk is offered", |it| it.node("state") == "2");
        let Stepped { guest, areas, .. } = &stepped;
        guest.set(areas, "multi-queue-num-queues", &QUEUES.to_string());
        for queue in 0..QUEUES {
            for (node, value) in [("ring-ref", 8 + queue), ("event-channel", queue)] {
                guest.set(areas, &format!("queue-{queue}/{node}"), &value.to_string());
            }
        }
        guest.set_state(areas, 3);
        stepped
    }

    /// A node of the backend area.
    fn node(&self, node: &str) -> String {
        self.rig.node(&self.areas.backend, node).unwrap_or_default()
    }

    fn until(&mut self, what: &str, mut so: impl FnMut(&Stepped) -> bool) {
        until(what, || {
            self.control.poll_once(self.now);
            so(self)
        });
    }

    fn until_lost(&mut self) {
        until("the connection to xenstored is lost", || {
            self.control.poll_once(self.now);
            self.control.store_fd().is_none()
        });
    }

    /// Runs passes until control has nothing left to do.
    fn settle(&mut self) {
        while self.control.poll_once(self.now) == Progress::Worked {}
    }

    /// One that is connected, and whose control has waited for storage for as long as it does at its end.
    fn drained() -> Stepped {
        let mut stepped = Stepped::published();
        stepped.connect();
        stepped.control.end(stepped.now);
        stepped.now += Duration::from_secs(DRAIN_SECONDS);
        stepped.settle();
        stepped
    }

    /// Answers what control asked of each queue, not in their order. Until the last answer, `node` must
    /// hold `before`.
    fn answer_each(
        &mut self,
        asked: impl Fn(&Command) -> Option<QueueKey>,
        answer: impl Fn(QueueKey) -> Report,
        (node, before): (&str, &str),
    ) {
        let mut queues = Vec::new();
        self.until("all queues are asked", |it| {
            queues.extend(it.worker.commands.try_iter().filter_map(|command| asked(&command)));
            queues.len() == QUEUES as usize
        });
        queues.rotate_left(1);
        for queue in queues {
            self.settle();
            assert_eq!(self.node(node), before, "{queue:?} has not answered yet");
            self.reporter.send(answer(queue));
        }
        self.settle();
    }

    fn connect(&mut self) {
        let asked = |command: &Command| match command {
            Command::Connect(connect) => Some(connect.key),
            _ => None,
        };
        self.answer_each(asked, Report::Connected, ("state", "2"));
    }

    fn replace(&mut self, before: &str) {
        let asked = |command: &Command| match command {
            Command::ReplaceImage(replace) => Some(replace.key),
            _ => None,
        };
        self.answer_each(asked, Report::ImageReplaced, ("sectors", before));
    }
}

#[test]
fn a_disk_is_connected_once_the_last_of_its_queues_is() {
    let mut stepped = Stepped::published();
    stepped.connect();
    assert_eq!(stepped.node("state"), "4");
}

#[test]
fn a_drive_has_another_medium_once_the_last_of_its_queues_has() {
    let mut stepped = Stepped::published();
    stepped.connect();
    stepped.rig.toolstack_sets_medium(&stepped.areas, "null:2G");
    stepped.replace("2097152");
    assert_eq!(stepped.node("sectors"), "0", "it is ejected first");
    stepped.replace("0");
    assert_eq!(stepped.node("sectors"), "4194304");
}

/// A node with all below it, and what they hold.
fn copy_of(store: &StoreClient, path: &str, nodes: &mut Vec<(String, Box<str>)>) {
    nodes.push((path.to_owned(), store.read(path).unwrap()));
    for name in store.directory(path).unwrap() {
        copy_of(store, &format!("{path}/{name}"), nodes);
    }
}

#[test]
fn a_frontend_is_watched_again_once_xenstored_has_come_back() {
    let mut stepped = Stepped::published();
    stepped.connect();
    let mut nodes = Vec::new();
    for area in [&stepped.areas.backend, &stepped.areas.frontend] {
        copy_of(&stepped.rig.dom0, area, &mut nodes);
    }
    stepped.rig.kill_server();
    stepped.until_lost();
    stepped.rig.restart_server();
    stepped.guest = stepped.rig.guest(5);
    for (path, value) in nodes {
        stepped.rig.dom0.write(&path, &value).unwrap();
    }
    stepped.now += Duration::from_secs(STORE_RETRY_SECONDS);
    stepped.settle();
    assert!(stepped.control.store_fd().is_some());
    assert_eq!(stepped.node("state"), "4", "it is served all the time");
    stepped.rig.dom0.write(&format!("{}/state", stepped.areas.frontend), "5").unwrap();
    stepped.until("the frontend is heard", |it| it.node("state") == "5");
}

#[test]
fn a_worker_that_reports_nothing_is_waited_for_a_second_only() {
    let mut stepped = Stepped::drained();
    let ask = |command: &Command| matches!(command, Command::TellInFlight(_));
    let asked = stepped.worker.commands.try_iter().filter(ask).count();
    assert_eq!(asked, QUEUES as usize, "the log is to name what is in flight");
    stepped.now += Duration::from_secs(1);
    assert_eq!(stepped.control.poll_once(stepped.now), Progress::Ended(Ended::GaveUp));
}

#[test]
fn a_worker_that_reports_what_is_in_flight_is_waited_for_no_longer() {
    let mut stepped = Stepped::drained();
    for command in stepped.worker.commands.try_iter() {
        if let Command::TellInFlight(queue) = command {
            stepped.reporter.send(Report::InFlight(queue, InFlight::default()));
        }
    }
    let now = stepped.now;
    let ended = std::iter::repeat_with(|| stepped.control.poll_once(now));
    let ended = ended.take(10).find(|progress| *progress != Progress::Worked);
    assert_eq!(ended, Some(Progress::Ended(Ended::GaveUp)));
}

#[test]
fn a_pass_returns_whether_it_found_anything_to_do() {
    let mut stepped = Stepped::published();
    stepped.connect();
    assert_eq!(stepped.control.poll_once(stepped.now), Progress::Idle);
    // A report after which nothing follows.
    stepped.reporter.send(Report::Stopped(WorkerId(7), String::new()));
    assert_eq!(stepped.control.poll_once(stepped.now), Progress::Worked);
    assert_eq!(stepped.control.poll_once(stepped.now), Progress::Idle);
}
