//! The control plane, stepped in the test's own thread at times that the test chooses.

use std::time::{Duration, Instant};

use polldisk::control::{Config, Control, Ended, Progress};
use polldisk::limits::OPEN_SECONDS;
use polldisk::msg::report_channel;

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
