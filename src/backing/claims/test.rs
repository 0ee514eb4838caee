use std::sync::mpsc::channel;

use super::*;

const WRITES: Usage = Usage { writes: true, shareable: false, emulates: false };
const READS: Usage = Usage { writes: false, shareable: false, emulates: false };
const SHARES: Usage = Usage { writes: true, shareable: true, emulates: false };

/// Storage that no other test uses.
fn storage() -> Storage {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let inode = NEXT.fetch_add(1, Ordering::Relaxed);
    Storage::File { filesystem: u64::MAX, inode }
}

fn claim_as(user: &str, storage: Storage, usage: Usage) -> Result<Claim, Refusal> {
    Claim::make_within(Duration::ZERO, vec![storage], usage, user)
}

/// A claim for a disk of its own.
fn claim(storage: Storage, usage: Usage) -> Result<Claim, Refusal> {
    claim_as("", storage, usage)
}

fn opened(storage: Storage, usage: Usage) -> Claim {
    let claim = claim(storage, usage).unwrap();
    claim.opened();
    claim
}

#[test]
fn storage_has_many_readers_or_one_writer_unless_all_share_it() {
    let emulates = Usage { emulates: true, ..SHARES };
    let reads_shared = Usage { writes: false, ..SHARES };
    for (first, second, reason) in [
        (READS, READS, None),
        (READS, WRITES, Some(Reason::Used)),
        (WRITES, READS, Some(Reason::Used)),
        (WRITES, WRITES, Some(Reason::Used)),
        (WRITES, SHARES, Some(Reason::Used)),
        (SHARES, SHARES, None),
        (SHARES, READS, Some(Reason::Used)),
        (SHARES, reads_shared, None),
        (reads_shared, READS, None),
        (SHARES, emulates, Some(Reason::Emulation)),
        (emulates, emulates, None),
    ] {
        let storage = storage();
        let held = opened(storage, first);
        let refusal = claim(storage, second).err();
        let expected = reason.map(|reason| Refusal { user: String::new(), reason });
        assert_eq!(refusal, expected, "{first:?} {second:?}");
        drop(held);
        drop(opened(storage, second));
    }
}

#[test]
fn a_disk_is_not_in_its_own_way() {
    let storage = storage();
    let claims = [(); 2].map(|()| claim_as("a drive", storage, WRITES).inspect(Claim::opened));
    assert!(claims.iter().all(Result::is_ok));
    let refusal = claim_as("another", storage, READS).unwrap_err();
    assert_eq!((refusal.reason, &*refusal.user), (Reason::Used, "a drive"));
    let [first, second] = claims;
    first.as_ref().unwrap().closing();
    assert_eq!(claim_as("a drive", storage, WRITES).unwrap_err().reason, Reason::Closing);
    drop(first);
    assert!(claim_as("another", storage, READS).is_err());
    drop(second);
    assert!(claim_as("another", storage, READS).is_ok());
}

#[test]
fn what_is_being_closed_is_waited_for() {
    let storage = storage();
    let held = opened(storage, WRITES);
    held.closing();
    let (ended, waits) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let next = Claim::make(vec![storage], WRITES, "the next").unwrap();
            ended.send(()).unwrap();
            drop(next);
        });
        assert!(waits.recv_timeout(Duration::from_millis(50)).is_err(), "it is not closed yet");
        drop(held);
        waits.recv_timeout(Duration::from_secs(60)).unwrap();
    });
}

#[test]
fn what_is_being_opened_is_waited_for_and_taken_if_that_fails() {
    let storage = storage();
    for succeeds in [true, false] {
        let opening = claim(storage, WRITES).unwrap();
        let (ended, waits) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let next = Claim::make(vec![storage], WRITES, "the next");
                ended.send(next.map(drop)).unwrap();
            });
            assert!(waits.recv_timeout(Duration::from_millis(50)).is_err(), "it may still fail");
            let held = match succeeds {
                true => {
                    opening.opened();
                    Some(opening)
                }
                false => {
                    drop(opening);
                    None
                }
            };
            let next = waits.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(next.is_err(), succeeds);
            drop(held);
        });
    }
}

#[test]
fn who_hangs_is_waited_for_no_longer_than_the_bound() {
    let storage = storage();
    let opening = claim_as("a disk", storage, WRITES).unwrap();
    let refusal = claim(storage, READS).unwrap_err();
    assert_eq!((refusal.reason, &*refusal.user), (Reason::Opening, "a disk"));
    opening.opened();
    opening.closing();
    assert_eq!(claim(storage, READS).unwrap_err().reason, Reason::Closing);
}

#[test]
fn what_keeps_others_off_is_open_once_for_all_of_its_readers() {
    let storage = storage();
    let mut times_opened = 0;
    let mut open = || {
        times_opened += 1;
        tempfile::tempfile().map(Arc::new)
    };
    let first = claim(storage, READS).unwrap();
    first.hold(storage, &mut open).unwrap();
    first.opened();
    let second = claim(storage, READS).unwrap();
    second.hold(storage, &mut open).unwrap();
    second.opened();
    drop(first);
    let third = claim(storage, READS).unwrap();
    third.hold(storage, &mut open).unwrap();
    drop((second, third));
    let fourth = claim(storage, READS).unwrap();
    fourth.hold(storage, &mut open).unwrap();
    assert_eq!(times_opened, 2, "the first three had one in common");
}

#[test]
fn locks_of_blocks_belong_to_the_storage() {
    let [one, other] = [storage(), storage()];
    let [first, second, third] = [(one, SHARES), (one, SHARES), (other, SHARES)]
        .map(|(storage, usage)| opened(storage, usage));
    let locks = first.block_locks(4096);
    assert!(Arc::ptr_eq(&locks, &second.block_locks(4096)));
    assert!(!Arc::ptr_eq(&locks, &third.block_locks(4096)));
}
