//! What `polldisk list` and other commands print for the oddest names and failures.

use std::process::{Command, Output};

use super::rig::Rig;
use super::{XVDA, XVDB, connected};

fn polldisk(rig: &Rig, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polldisk"))
        .args(arguments)
        .arg("--admin")
        .arg(rig.admin_path())
        .output()
        .unwrap()
}

fn list(rig: &Rig) -> String {
    String::from_utf8(polldisk(rig, &["list", "--interval", "0"]).stdout).unwrap()
}

#[test]
fn a_failing_disk_leaves_the_table_as_narrow_as_it_was() {
    let rig = Rig::start();
    rig.guest(5);
    let sound = rig.toolstack_disk(5, XVDA, "null:1G");
    rig.wait_state(&sound.backend, 2);
    let width = |text: &str| text.lines().take(3).map(str::len).max().unwrap();
    let before = width(&list(&rig));
    let failing = rig.toolstack_disk(5, XVDB, "raw:/no/such");
    rig.wait_state(&failing.backend, 6);
    let text = list(&rig);
    assert!(width(&text) <= before + "raw:/no/such".len(), "{text}");
    let failures: Vec<&str> = text.lines().filter(|line| line.contains("does not exist")).collect();
    assert!(matches!(failures[..], [line] if line.starts_with("5 xvdb: ")), "{text}");
}

#[test]
fn no_name_and_no_failure_breaks_a_table_or_a_terminal() {
    let rig = Rig::start();
    rig.guest(5);
    let odd = "raw:/no\nsuch\t\u{1b}[2J\u{9b}31mfile";
    let areas = rig.toolstack_disk(5, XVDA, odd);
    rig.wait_state(&areas.backend, 6);
    let text = list(&rig);
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        matches!(lines[..], [_, disk, "", failure]
        if disk.contains("raw:/no\\nsuch") && failure.contains("raw:/no\\nsuch")),
        "{text}"
    );
    let error = rig.read(&areas.error).unwrap();
    assert!(!error.contains(char::is_control), "{error:?}");

    let attach = ["attach", "--domid", "5", "--vdev", "xvdb", "--target", odd];
    let said = String::from_utf8(polldisk(&rig, &attach).stderr).unwrap();
    assert!(said.contains("raw:/no\\nsuch") && said.lines().count() == 1, "{said:?}");
    assert!(!said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn each_list_asks_for_the_latencies_since_the_last() {
    let rig = Rig::start();
    let (_guest, _areas) = connected(&rig, 5);
    for lists in 1..4 {
        let told = rig.list()[0].latency.iter().map(|(_, count)| count).sum::<u64>();
        assert_eq!(told, lists, "the worker has one more each time");
    }
}
