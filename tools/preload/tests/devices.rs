//! The devices as a C program sees them: `devices.c`, which these tests compile, checks what it gets.

mod rig;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use polldisk::park;
use polldisk::sim::events::SimEvents;
use polldisk::sim::{Domain, Gfn, StandIn};
use polldisk::units::{DomId, GrantRef, Port};
use polldisk::xen::{Events, PageAccess};

fn compile(folder: &tempfile::TempDir) -> PathBuf {
    let program = folder.path().join("devices");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/devices.c");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    // With optimization and fortification, as in distributions.
    let status = Command::new(compiler)
        .args(["-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-Wall", "-Werror", "-o"])
        .args([program.as_os_str(), source.as_ref()])
        .status();
    assert!(status.unwrap().success());
    program
}

fn granted(guest: &Domain, content: &[u8], access: PageAccess) -> (Gfn, GrantRef) {
    let page = guest.alloc_pages(1).unwrap();
    guest.page(page).copy_from(content);
    (page, guest.grant(page, DomId::DOM0, access).unwrap())
}

/// Answers each of two notifications with another one.
fn answer(mut events: SimEvents, port: Port) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for _ in 0..2 {
            let mut ports = [Port(0); 1];
            while events.pending(&mut ports).unwrap() == 0 {
                park::sleep(&[events.as_fd()], Some(Duration::from_secs(60)));
            }
            events.notify(port).unwrap();
            events.unmask(&ports).unwrap();
        }
    })
}

#[test]
fn a_program_finds_the_devices_as_on_linux() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile(&folder);
    for system_calls in [false, true] {
        let stand_in = StandIn::start_temporary().unwrap();
        let guest = stand_in.create_domain(rig::domid(5), 16).unwrap();
        let (_, first) = granted(&guest, b"from the guest", PageAccess::ReadOnly);
        let (page, second) = granted(&guest, b"", PageAccess::ReadWrite);
        let mut events = guest.open_events().unwrap();
        let port = events.alloc_unbound(DomId::DOM0).unwrap();
        let answers = answer(events, port);

        let mut command = rig::on(&stand_in, system_calls, program.as_os_str());
        for number in [5, port.0, first.0, second.0] {
            command.arg(number.to_string());
        }
        assert!(command.status().unwrap().success());
        answers.join().unwrap();
        let mut written = [0; 6];
        guest.page(page).copy_to(&mut written);
        assert_eq!(&written, b"mapped");
        let mut written = [0; 12];
        guest.page(page).part(100, 12).unwrap().copy_to(&mut written);
        assert_eq!(&written, b"to the guest");
        rig::until("its mappings are gone", || guest.mapped_grants() == 0);
    }
}

#[test]
fn without_a_stand_in_nothing_is_intercepted() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile(&folder);
    let output = Command::new(program)
        .args(["5", "1", "8", "9"])
        .env("LD_PRELOAD", rig::library())
        .env_remove("POLLDISK_STAND_IN")
        .output()
        .unwrap();
    assert!(!output.status.success());
    if !PathBuf::from("/dev/xen/evtchn").exists() {
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("fd >= 0 (errno: No such file"), "{text}");
    }
}
