//! Random connections, negotiated through xenstore with the whole daemon.

use polldisk::backing::DataPath;
use polldisk::blkif::Protocol;
use polldisk::blkif::features::Offer;
use polldisk::limits::{INDIRECT_SEGMENTS_MAX, RING_PAGE_ORDER_MAX};
use polldisk::msg::GrantMode;
use polldisk::sim::blkfront::xenbus::Wanted;

use xenstore_rs::Xs;

use crate::daemon::Daemon;
use polldisk::sim::random::Random;

use crate::draw::{Combination, draw_options};
use crate::guest::{Disk, Guest};
use crate::random::{SEED, case, seeds};

const DAEMONS: usize = 8;
const CONNECTIONS_PER_DAEMON: usize = 12;
const CASES_PER_CONNECTION: usize = 5;

#[test]
fn whatever_is_offered_and_wanted_the_two_ends_agree_and_data_is_kept() {
    for seed in seeds(DAEMONS) {
        let mut random = Random::new(seed);
        let offer = draw_offer(&mut random);
        println!("{SEED}={seed}: {offer:?}");
        let daemon = Daemon::start(offer);
        let bad_gref = daemon.domain.reserve_refs(1).unwrap()[0];
        let mut disk = Disk::new(seed, bad_gref);
        for _ in 0..CONNECTIONS_PER_DAEMON {
            connect_and_play(&mut random, &daemon, &offer, &mut disk);
        }
    }
}

fn draw_offer(random: &mut Random) -> Offer {
    Offer {
        data_path: random.one_of(&[DataPath::Auto, DataPath::Map, DataPath::Copy]),
        ring_page_order: random.between(0, RING_PAGE_ORDER_MAX),
        queues: random.between(1, 4),
        indirect_segments: random.one_of(&[0, 8, 12, 256, INDIRECT_SEGMENTS_MAX]),
        ..Offer::default()
    }
}

/// Connects a frontend with random wishes, of which it gets what is offered, and plays requests on it.
fn connect_and_play(random: &mut Random, daemon: &Daemon, offer: &Offer, disk: &mut Disk) {
    let queues = random.between(1, 4);
    let options = draw_options(random, queues, INDIRECT_SEGMENTS_MAX.into());
    let wanted = Wanted {
        queues,
        options,
        names_protocol: options.protocol == Protocol::X86_64 || random.chance(50),
        leaves_nodes: random.chance(50),
    };
    println!("{wanted:?}");
    let (devices, told) = daemon.xenbus.connect_all(&daemon.domain, wanted).unwrap();
    let agreed = devices[0].options();
    assert_eq!(devices.len(), queues.min(offer.queues.into()));
    assert_eq!(agreed.ring_order, options.ring_order.min(offer.ring_page_order));
    assert_eq!(agreed.persistent, options.persistent && offer.data_path != DataPath::Copy);
    assert!(agreed.segments <= usize::from(offer.indirect_segments).max(11));
    let node = daemon.xenbus.theirs("feature-discard");
    let discard = daemon.xenbus.store().read(&node).unwrap();
    let report = daemon.disk();
    let expected: Vec<usize> = (0..devices.len()).map(|queue| queue % 2).collect();
    assert_eq!(report.workers, expected, "the workers get queues in turn");
    let combination = Combination {
        queues: devices.len(),
        options: agreed,
        grant_mode: match offer.data_path {
            DataPath::Auto | DataPath::Map if agreed.persistent => GrantMode::Persistent,
            DataPath::Map => GrantMode::Map,
            DataPath::Auto | DataPath::Copy => GrantMode::Copy,
        },
        offered_segments: offer.indirect_segments,
        sector_bytes: told.sector_bytes,
        read_only: told.read_only,
        discard: &*discard == "1",
        ..Combination::default()
    };
    let mut guest = Guest::new(disk, combination, devices);
    for _ in 0..CASES_PER_CONNECTION {
        guest.play(case(random, &combination));
    }
    guest.read_all();
    daemon.xenbus.close_all(guest.into_devices()).unwrap();
    assert_eq!(daemon.domain.mapped_grants(), 0);
    daemon.xenbus.start_over().unwrap();
}
