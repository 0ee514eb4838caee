//! A change of what a queue serves, seen by requests that the worker has not taken yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polldisk::backing::{Access, DiskOptions, Image, RawImage};
use polldisk::blkif::op;
use polldisk::blkif::request::DiskRules;
use polldisk::budget::GrantBudget;
use polldisk::engine::host::HostEngine;
use polldisk::metrics::QueueCounters;
use polldisk::msg::{
    Command, Connect, Event, LinkId, Mapping, QueueKey, ReplaceImage, WorkerId, command_channel,
    event_channel,
};
use polldisk::sim::StandIn;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::units::{DomId, QueueId};
use polldisk::worker::{Setup, Worker};

use crate::guest::HANG;
use crate::workers::zeroes;

#[test]
fn what_was_published_before_an_ejection_is_done_on_the_medium_before_it() {
    let stand_in = StandIn::start_temporary().unwrap();
    let domain = Arc::new(stand_in.create_domain(DomId::try_from(1).unwrap(), 512).unwrap());
    let (sender, commands) = command_channel(WorkerId(0)).unwrap();
    let (reports, events) = event_channel().unwrap();
    let platform = stand_in.platform();
    let setup =
        Setup { id: WorkerId(0), platform, core: None, poll: Duration::ZERO, commands, reports };
    let mut worker = Worker::new(setup, HostEngine::new().unwrap()).unwrap();
    let mut device = Device::new(Arc::clone(&domain), Options::default()).unwrap();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = zeroes(folder.path());
    let image =
        Image::Raw(RawImage::open(&path, DiskOptions::default(), &Access::default()).unwrap());
    let rules = |image: &Image| DiskRules {
        geometry: image.geometry(),
        read_only: false,
        indirect_segments: 0,
        discard: false,
        secure_discard: false,
    };
    let key = QueueKey { link: LinkId(1), queue: QueueId(0) };
    let connect = Connect {
        key,
        frontend: domain.domid(),
        ring_refs: device.ring_refs().to_vec(),
        port: device.port(),
        protocol: device.options().protocol,
        mapping: Mapping::Kept,
        budget: Arc::new(GrantBudget::new(512)),
        rules: rules(&image),
        image: Arc::new(image),
        counters: Arc::new(QueueCounters::default()),
    };
    sender.send(Command::Connect(Box::new(connect))).unwrap();
    worker.poll_once(|| 1).unwrap();

    let mut writes = 0;
    while let Some(buffer) = device.free_buffer() {
        device.fill(buffer, &[7; 4096]);
        device.put(op::WRITE, writes * 8, 4096);
        writes += 1;
    }
    device.publish().unwrap();
    let replace = ReplaceImage { key, rules: rules(&Image::Empty), image: Arc::new(Image::Empty) };
    sender.send(Command::ReplaceImage(Box::new(replace))).unwrap();

    let start = Instant::now();
    let mut answered = 0;
    let mut replaced = false;
    while answered < writes || !replaced {
        assert!(start.elapsed() < HANG);
        worker.poll_once(|| 1).unwrap();
        while let Some(answer) = device.next_answer().unwrap() {
            assert_eq!(answer.status, 0);
            answered += 1;
        }
        replaced |= events.events.try_iter().any(|event| matches!(event, Event::ImageReplaced(_)));
    }
    device.put(op::WRITE, 0, 4096);
    device.publish().unwrap();
    let after = loop {
        assert!(start.elapsed() < HANG);
        worker.poll_once(|| 1).unwrap();
        if let Some(answer) = device.next_answer().unwrap() {
            break answer.status;
        }
    };
    assert_eq!(after, -1, "the drive is empty");
    let held = std::fs::read(&path).unwrap();
    let end = usize::try_from(writes).unwrap() * 4096;
    assert!(held[..end].iter().all(|byte| *byte == 7));
}
