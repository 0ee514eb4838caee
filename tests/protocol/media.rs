//! A change of what a queue serves, seen by requests that the worker has not taken yet.

use std::sync::Arc;
use std::time::Instant;

use polldisk::backing::Image;
use polldisk::blkif::op;
use polldisk::engine::host::HostEngine;
use polldisk::msg::{Command, ReplaceImage, Report};

use crate::guest::HANG;
use crate::scripted::{Bench, Shape, rules};
use crate::workers::{opened, zeroes};

#[test]
fn requests_published_before_an_ejection_are_done_on_the_ejected_medium() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = zeroes(folder.path());
    let mut bench = Bench::over(HostEngine::new().unwrap());
    let guest = bench.guest_on(Shape::mapped(32), opened(&path));

    let device = &mut bench.guests[guest];
    let mut writes = 0;
    while let Some(buffer) = device.free_buffer() {
        device.fill(buffer, &[7; 4096]);
        device.put(op::WRITE, writes as u64 * 8, 4096);
        writes += 1;
    }
    device.publish().unwrap();
    let (key, image) = (bench.key(guest), Image::Empty);
    let replace = ReplaceImage { key, rules: rules(&image, 0), image: Arc::new(image) };
    bench.commands.send(Command::ReplaceImage(Box::new(replace))).unwrap();

    let start = Instant::now();
    let mut answered = 0;
    let mut replaced = false;
    while answered < writes || !replaced {
        assert!(start.elapsed() < HANG);
        bench.pass();
        answered += bench.answers(guest);
        let mut told = bench.reports.reports.try_iter();
        replaced |= told.any(|report| matches!(report, Report::ImageReplaced(_)));
    }
    bench.ask(guest, op::WRITE, 1, 1);
    let after = loop {
        assert!(start.elapsed() < HANG);
        bench.pass();
        if let Some(status) = bench.statuses(guest).first() {
            break *status;
        }
    };
    assert_eq!(after, -1, "the drive is empty");
    let held = std::fs::read(&path).unwrap();
    assert!(held[..writes * 4096].iter().all(|byte| *byte == 7));
}
