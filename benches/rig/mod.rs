//! A worker and a guest in one thread: each pass happens when the benchmark says so.

use std::sync::Arc;
use std::time::Duration;

use polldisk::backing::{Access, Spec};
use polldisk::blkif::request::DiskRules;
use polldisk::budget::GrantBudget;
use polldisk::engine::host::HostEngine;
use polldisk::limits::PERSISTENT_GRANTS_PER_DOMAIN;
use polldisk::metrics::QueueCounters;
use polldisk::msg::{
    Command, CommandSender, Connect, ConnectionId, GrantMode, QueueKey, ReportReceiver, WorkerId,
    command_channel, report_channel,
};
use polldisk::patience::{Policy, SleepCost};
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::{SimXen, StandIn};
use polldisk::units::{DomId, QueueId};
use polldisk::worker::{Setup, Worker};

pub struct Rig {
    pub device: Device,
    worker: Worker<SimXen, HostEngine>,
    clock_ns: u64,
    _commands: CommandSender,
    _reports: ReportReceiver,
    _stand_in: StandIn,
}

impl Rig {
    /// A guest with one ring on the disk that `target` names.
    pub fn connect(target: &str, options: Options) -> Rig {
        let stand_in = StandIn::start_temporary().unwrap();
        let domid = DomId::try_from(1).unwrap();
        let pages = u32::try_from(options.device_pages()).unwrap();
        let domain = Arc::new(stand_in.create_domain(domid, pages).unwrap());
        let device = Device::new(domain, options).unwrap();
        let backing = target.parse::<Spec>().unwrap().open(&Access::default()).unwrap();
        let image = backing.image().clone();
        let (commands, receiver) = command_channel(WorkerId(0)).unwrap();
        let (reporter, reports) = report_channel().unwrap();
        let setup = Setup {
            id: WorkerId(0),
            workers: 1,
            platform: stand_in.platform(),
            core: None,
            policy: Policy::UpTo(Duration::from_micros(50)),
            sleep_cost: SleepCost::default(),
            commands: receiver,
            reporter,
        };
        let connect = Connect {
            key: QueueKey { connection: ConnectionId(1), queue: QueueId(0) },
            frontend: domid,
            ring_refs: device.ring_refs().to_vec(),
            port: device.port(),
            protocol: options.protocol,
            grant_mode: if options.persistent { GrantMode::Persistent } else { GrantMode::Copy },
            budget: Arc::new(GrantBudget::new(PERSISTENT_GRANTS_PER_DOMAIN)),
            rules: DiskRules {
                geometry: image.geometry(),
                read_only: false,
                indirect_segments: 256,
                discard: false,
                secure_discard: false,
            },
            image,
            counters: Arc::new(QueueCounters::default()),
        };
        commands.send(Command::Connect(Box::new(connect))).unwrap();
        let worker = Worker::new(setup, HostEngine::new().unwrap()).unwrap();
        let mut rig = Rig {
            device,
            worker,
            clock_ns: 0,
            _commands: commands,
            _reports: reports,
            _stand_in: stand_in,
        };
        rig.pass();
        rig
    }

    /// One pass of the worker, a microsecond after the last one.
    pub fn pass(&mut self) {
        self.clock_ns += 1000;
        let now_ns = self.clock_ns;
        self.worker.poll_once(|| now_ns).unwrap();
    }

    /// Puts `count` requests of `len` bytes each and waits for all answers.
    pub fn batch(&mut self, operation: u8, count: u64, len: usize) {
        let sectors = len as u64 / 512;
        for index in 0..count {
            self.device.put(operation, index * sectors, len);
        }
        self.device.publish().unwrap();
        while self.device.in_flight() > 0 {
            self.pass();
            while let Some(answer) = self.device.next_answer().unwrap() {
                assert_eq!(answer.status, 0);
            }
        }
    }
}
