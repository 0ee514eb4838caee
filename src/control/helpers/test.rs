use std::fs;
use std::fs::File;
use std::os::fd::AsFd;

use lease::Lease;

use super::*;
use crate::park;

#[path = "../../../tests/control/lease.rs"]
mod lease;

struct Rig {
    helpers: Helpers,
    bell: Doorbell,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let bell = Doorbell::new().unwrap();
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        Rig { helpers: Helpers::new(bell.clone(), limits::HELPERS_MAX), bell, folder }
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }

    fn open(&mut self, path: &Path) -> OpenId {
        let target = format!("raw:{}", path.display());
        let access = Access { read_only: true, ..Access::default() };
        self.helpers.open(&target, access, Asker::Admin, Instant::now()).unwrap()
    }

    fn wait_closed(&self) {
        while self.helpers.is_closing() {
            assert!(park::sleep(&[self.bell.as_fd()], Some(Duration::from_secs(60)))[0]);
            self.bell.silence();
        }
    }

    fn answer(&mut self) -> Answer {
        loop {
            if let Some(answer) = self.helpers.next_answer(Instant::now()) {
                return answer;
            }
            assert!(park::sleep(&[self.bell.as_fd()], Some(Duration::from_secs(60)))[0]);
            self.bell.silence();
        }
    }
}

#[test]
fn an_open_is_answered_with_what_was_opened_or_the_reason() {
    let mut rig = Rig::new();
    let path = rig.image("disk");
    let good = rig.open(&path);
    let answer = rig.answer();
    assert_eq!(answer.id, good);
    assert_eq!(answer.result.unwrap().image().geometry().size.0, 1 << 20);
    let bad = rig.open(Path::new("/nowhere/at/all"));
    let answer = rig.answer();
    assert_eq!(answer.id, bad);
    assert!(answer.result.unwrap_err().text.contains("does not exist"));
    rig.wait_closed();
}

#[test]
fn storage_that_hangs_keeps_a_few_threads_and_leaves_the_others_to_everybody_else() {
    let mut rig = Rig::new();
    fs::create_dir(rig.folder.path().join("hung")).unwrap();
    let hung: Vec<_> = (0..20).map(|number| rig.image(&format!("hung/{number}"))).collect();
    let leases: Vec<_> = hung.iter().map(|path| Lease::on(path)).collect();
    let asked: Vec<_> = hung.iter().map(|path| rig.open(path)).collect();
    for number in 0..3 {
        let path = rig.image(&format!("{number}"));
        let id = rig.open(&path);
        assert_eq!(rig.answer().id, id, "those in the other folder still hang");
    }
    let state = rig.helpers.pool.state();
    let folder = Place::Folder(rig.folder.path().join("hung"));
    assert_eq!(state.running.get(&folder), Some(&limits::HELPERS_PER_FOLDER));
    assert!(state.threads < asked.len() / 2, "{state:?}");
    drop(state);

    // Abandoned opens that have not begun never do.
    asked[limits::HELPERS_PER_FOLDER..].iter().for_each(|id| rig.helpers.abandon(*id));
    let waits_to_open = |job: &Job| matches!(job.task, Task::Open { .. });
    assert!(!rig.helpers.pool.state().waiting.iter().any(waits_to_open));
    drop(leases);
    let mut answered: Vec<_> = (0..limits::HELPERS_PER_FOLDER).map(|_| rig.answer().id).collect();
    answered.sort();
    assert_eq!(answered, asked[..limits::HELPERS_PER_FOLDER]);
    rig.wait_closed();
    assert!(rig.helpers.next_answer(Instant::now()).is_none());
}

#[test]
fn what_is_dropped_is_closed_by_a_helper() {
    use std::os::fd::RawFd;
    let mut rig = Rig::new();
    let path = rig.image("disk");
    rig.open(&path);
    let backing = rig.answer().result.unwrap();
    let Image::Raw(image) = &**backing.image() else { unreachable!() };
    let fd: RawFd = image.target().below.below.raw_fd;
    let link = format!("/proc/self/fd/{fd}");
    assert_eq!(fs::read_link(&link).unwrap(), path);
    drop(backing);
    rig.wait_closed();
    assert_ne!(fs::read_link(&link).ok(), Some(path));
}

#[test]
fn who_wants_what_waits_to_be_closed_is_told_so_from_its_drop_on() {
    let mut rig = Rig::new();
    fs::create_dir(rig.folder.path().join("hung")).unwrap();
    let disk = rig.image("hung/disk");
    let target = format!("raw:{}", disk.display());
    let access = |user: &str| Access { user: user.to_owned(), ..Access::default() };
    rig.helpers.open(&target, access("one"), Asker::Admin, Instant::now()).unwrap();
    let backing = rig.answer().result.unwrap();
    let hung: Vec<_> = (0..limits::HELPERS_PER_FOLDER)
        .map(|number| rig.image(&format!("hung/{number}")))
        .collect();
    let leases: Vec<_> = hung.iter().map(|path| Lease::on(path)).collect();
    for path in &hung {
        rig.open(path);
    }

    drop(backing);
    let again = || target.parse::<Spec>().unwrap().open(&access("another"));
    let refusal = again().unwrap_err().to_string();
    assert!(refusal.contains("one is still closing it"), "{refusal}");
    drop(leases);
    rig.wait_closed();
    again().unwrap();
}

#[test]
fn a_device_is_a_place_of_its_own_and_a_mounted_folder_is_counted_as_both() {
    let shared = |one: &str, other: &str| {
        let [Places(one), Places(other)] = [one, other].map(|path| Places::of(Path::new(path)));
        one.into_iter().filter(|place| other.contains(place)).collect::<Vec<_>>()
    };
    let is_folder = |place: &Place| matches!(place, Place::Folder(_));
    assert!(!shared("/dev/a", "/dev/b").iter().any(is_folder));
    assert!(shared("/srv/a", "/srv/b").contains(&Place::Folder("/srv".into())));
    assert_eq!(shared("/a", "/b"), [Place::Folder("/".into()), Place::Mount("/".into())]);
}
