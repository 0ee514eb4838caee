//! Random connections, driven through workers alone.
use polldisk::sim::random::Random;

use crate::draw::{Combination, Request};
use crate::guest::{Disk, Guest};
use crate::workers::Rig;

/// Cases in a run, each a sequence of requests.
const CASES: usize = 10_000;
const CASES_PER_CONNECTION: usize = 40;
const REQUESTS_PER_CASE: usize = 12;

/// Requests of a burst, as in one case out of a hundred: more than there are buffers.
const REQUESTS_PER_BURST: usize = 200;

/// Names the only connection to play.
pub const SEED: &str = "POLLDISK_PROTOCOL_SEED";

/// Sets the number of cases, for a long run.
const MORE: &str = "POLLDISK_PROTOCOL_CASES";

/// The seeds of `count` connections, or the one that was asked for.
pub fn seeds(count: usize) -> Vec<u64> {
    if let Ok(seed) = std::env::var(SEED) {
        return vec![seed.parse().expect("a decimal number")];
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let mut random = Random::new(u64::try_from(now.as_micros()).unwrap());
    (0..count).map(|_| random.next()).collect()
}

/// Requests of one case.
pub fn case(random: &mut Random, combination: &Combination) -> Vec<Request> {
    let count = match random.chance(1) {
        true => REQUESTS_PER_BURST,
        false => random.between_by_size(1, REQUESTS_PER_CASE),
    };
    (0..count).map(|_| Request::draw(random, combination)).collect()
}

#[test]
fn every_request_on_every_kind_of_connection_is_answered_correctly_and_data_is_kept() {
    let mut rig = Rig::start();
    let bad_gref = rig.domain.reserve_refs(1).unwrap()[0];
    let mut disk = Disk::new(1, bad_gref);
    let cases = std::env::var(MORE).map_or(CASES, |cases| cases.parse().expect("a number"));
    for seed in seeds(cases.div_ceil(CASES_PER_CONNECTION)) {
        let mut random = Random::new(seed);
        let combination = Combination::draw(&mut random);
        println!("{SEED}={seed}: {combination:?}");
        let devices = rig.connect(&combination);
        let mut guest = Guest::new(&mut disk, combination, devices);
        for _ in 0..CASES_PER_CONNECTION {
            guest.play(case(&mut random, &combination));
        }
        guest.read_all();
        rig.disconnect(guest.into_devices());
    }
}
