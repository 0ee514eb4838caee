use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener as Listener;
use std::time::Duration;

use super::*;

/// So long that only a hang reaches it.
const HANG: Duration = Duration::from_secs(60);

/// Leaves a socket that nobody listens at.
fn leave_dead_socket(path: &Path) {
    drop(Listener::bind(path).unwrap());
}

fn is_alive(path: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(path).is_ok()
}

#[test]
fn what_is_no_socket_is_refused_by_name_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("file"), "precious").unwrap();
    std::fs::create_dir(at("directory")).unwrap();
    leave_dead_socket(&at("dead"));
    symlink(at("file"), at("link")).unwrap();
    symlink(at("dead"), at("link-to-socket")).unwrap();
    symlink(at("nothing"), at("dangling")).unwrap();
    for (name, what) in [
        ("file", "regular file"),
        ("directory", "directory"),
        ("link", "symbolic link"),
        ("link-to-socket", "symbolic link"),
        ("dangling", "symbolic link"),
    ] {
        let before = std::fs::symlink_metadata(at(name)).unwrap().ino();
        let refusal = listen(&at(name)).unwrap_err().to_string();
        assert!(refusal.contains(at(name).to_str().unwrap()), "{name}: {refusal}");
        assert!(refusal.contains(what) && refusal.contains("--admin"), "{name}: {refusal}");
        assert_eq!(std::fs::symlink_metadata(at(name)).unwrap().ino(), before, "{name}");
    }
    assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
}

#[test]
fn a_socket_that_a_dead_daemon_left_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    leave_dead_socket(&path);
    let server = listen(&path).unwrap();
    assert!(is_alive(&path));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_socket_where_somebody_listens_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let first = listen(&path).unwrap();
    assert!(matches!(listen(&path), Err(BindError::InUse(_))));
    assert!(is_alive(&path));
    drop(first);

    let other = folder.path().join("datagrams");
    let _datagrams = std::os::unix::net::UnixDatagram::bind(&other).unwrap();
    let refusal = listen(&other).unwrap_err().to_string();
    assert!(refusal.contains("another program"), "{refusal}");
    assert!(other.exists());
}

#[test]
fn a_daemon_that_hangs_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let stuck = Listener::bind(&path).unwrap();
    shorten_backlog(&stuck);
    // The listener accepts nobody, so one client fills its backlog.
    let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let (tell, told) = crossbeam::channel::bounded(1);
    std::thread::spawn(move || tell.send(listen(&path).map(drop)));
    let answer = told.recv_timeout(HANG).expect("bind waits for a daemon that hangs");
    assert!(matches!(answer, Err(BindError::InUse(_))), "{answer:?}");
}

#[allow(unsafe_code)]
fn shorten_backlog(listener: &Listener) {
    use std::os::fd::AsRawFd;
    // SAFETY: no pointers; the descriptor is a listening socket's.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
}

#[test]
fn of_daemons_that_start_at_once_one_gets_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..200 {
        let path = folder.path().join(format!("admin-{round}"));
        leave_dead_socket(&path);
        let start = std::sync::Barrier::new(4);
        let start_one = || {
            start.wait();
            listen(&path)
        };
        let servers: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(start_one)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(servers.iter().filter(|server| server.is_ok()).count(), 1, "{servers:?}");
        assert!(is_alive(&path));
    }
}

#[test]
fn at_its_end_a_daemon_removes_no_socket_but_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let first = listen(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = listen(&path).unwrap();
    drop(first);
    assert!(is_alive(&path));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "somebody else's").unwrap();
    drop(second);
    assert!(path.exists());
}

#[test]
fn a_path_that_no_socket_can_have_is_told_as_too_long() {
    let folder = tempfile::tempdir().unwrap();
    let path_of = |bytes: usize| {
        let left = bytes - folder.path().as_os_str().len() - 1;
        folder.path().join("x".repeat(left))
    };
    listen(&path_of(limits::SOCKET_PATH_MAX)).unwrap();
    let refusal = listen(&path_of(limits::SOCKET_PATH_MAX + 1)).unwrap_err().to_string();
    assert!(refusal.contains("107 bytes"), "{refusal}");
}
