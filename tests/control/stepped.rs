//! The control plane, stepped in the test's own thread at times that the test chooses.

use std::time::{Duration, Instant};

use polldisk::blkif::features::Offer;
use polldisk::control::{Config, Control, Ended, Progress};
use polldisk::limits::OPEN_SECONDS;
use polldisk::msg::{Command, QueueKey, Report, WorkerId, command_channel, report_channel};

use super::XVDA;
use crate::opening::hung_file;
use crate::rig::{Rig, until};

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

#[test]
fn a_disk_is_connected_once_the_last_of_its_queues_is() {
    const QUEUES: u32 = 3;
    let rig = Rig::without_control();
    let (reporter, reports) = report_channel().unwrap();
    let (sender, worker) = command_channel(WorkerId(0)).unwrap();
    let offer = Offer { queues: 4, ..Offer::default() };
    let config = Config { offer, ..Config::default() };
    let name = "a test".to_owned();
    let mut control = Control::new(rig.platform(), &config, vec![sender], reports, name).unwrap();
    let now = Instant::now();
    let guest = rig.guest(5);
    let areas = rig.toolstack_disk(5, XVDA, "null:1G");
    until("the disk is offered", || {
        control.poll_once(now);
        rig.state(&areas.backend) == Some(2)
    });
    guest.set(&areas, "multi-queue-num-queues", &QUEUES.to_string());
    for queue in 0..QUEUES {
        for (node, value) in [("ring-ref", 8 + queue), ("event-channel", queue)] {
            guest.set(&areas, &format!("queue-{queue}/{node}"), &value.to_string());
        }
    }
    guest.set_state(&areas, 3);
    let mut asked: Vec<QueueKey> = Vec::new();
    until("all queues are to be connected", || {
        control.poll_once(now);
        asked.extend(worker.commands.try_iter().filter_map(|command| match command {
            Command::Connect(connect) => Some(connect.key),
            _ => None,
        }));
        asked.len() == QUEUES as usize
    });

    // In no order of theirs.
    asked.rotate_left(1);
    for key in asked {
        while control.poll_once(now) == Progress::Worked {}
        assert_eq!(rig.state(&areas.backend), Some(2), "{key:?} is not connected yet");
        reporter.send(Report::Connected(key));
    }
    while control.poll_once(now) == Progress::Worked {}
    assert_eq!(rig.state(&areas.backend), Some(4));
}
