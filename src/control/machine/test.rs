//! The behaviour of QEMU's xen-bus and xen-block, row by row, with the test for each:
//!
//! | what happens | test |
//! |---|---|
//! | found with online and Initialising | `a_new_disk_is_opened_and_offers_itself_before_init_wait` |
//! | FE 1, BE 6, online | `a_closed_disk_waits_again_when_the_frontend_starts_over` |
//! | FE 1 otherwise | `a_frontend_that_initialises_beside_init_wait_changes_nothing`, `a_closed_disk_that_is_not_online_does_not_wait_again`, `a_frontend_that_starts_over_unseen_gets_its_old_connection_ended` |
//! | FE 2 | `a_frontend_in_init_wait_changes_nothing` |
//! | FE 3 or 4, BE 4 | `a_frontend_that_follows_to_connected_changes_nothing` |
//! | FE 3 or 4, BE not 4 | `a_frontend_with_a_ring_is_connected`, `a_frontend_with_a_ring_connects_a_closed_disk` |
//! | the same, on an error | `a_connection_that_fails_writes_the_error_and_closes` (differs: QEMU only logs) |
//! | FE 5 | `a_closing_frontend_keeps_its_ring` |
//! | FE 6 or 0 | `a_frontend_that_closed_is_disconnected`, `a_frontend_area_that_vanished_is_disconnected` |
//! | BE changed by others: cached | `a_state_written_by_others_is_taken_as_it_is` |
//! | BE 5, FE not 2 to 5 | `closing_written_over_a_dead_frontend_closes` |
//! | online 0, BE 6, 1, 2 or 0 | `a_disk_without_a_guest_is_forgotten_when_it_goes_offline` |
//! | device_del: online 0 and BE 5 at once | `a_detached_disk_waits_for_its_frontend` |
//! | forced removal | `a_forced_removal_waits_for_the_connection_only` |
//! | (not in QEMU: the domain is gone, its areas stay) | `the_disk_of_a_guest_that_is_gone_is_closed_and_let_go` |
//! | exit | `when_the_daemon_ends_the_connection_is_drained_and_no_state_written` |
//! | another medium in the drive (differs: QEMU never checks) | `a_connected_frontend_is_told_of_another_medium`, `a_medium_changed_before_the_connection_changes_what_is_offered`, `a_medium_that_cannot_be_used_is_an_error_and_no_failure` |
//!
//! Rows that do not apply here: creation of the backend and frontend areas (in the registry and attach:
//! tests/control.rs), resize (no image changes its size yet), drained_begin/end (a worker drains by
//! itself).

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A disk in InitWait, ready, with a frontend in Initialising.
fn waiting() -> Machine {
    let mut machine = Machine::new(Initialising, true);
    assert_eq!(machine.step(Input::Backend(Initialising)), [Open]);
    assert_eq!(machine.step(Input::Opened), [SetState(InitWait)]);
    assert_eq!(machine.step(Input::Ready), []);
    machine
}

fn connected() -> Machine {
    let mut machine = waiting();
    assert_eq!(machine.step(Input::Frontend(Initialised)), [Connect]);
    assert_eq!(machine.step(Input::ConnectionUp), [SetState(Connected)]);
    assert_eq!(machine.step(Input::Frontend(Connected)), []);
    machine
}

fn closed() -> Machine {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Frontend(Closed)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed)]);
    machine
}

fn failed() -> Machine {
    let mut machine = connected();
    assert_eq!(machine.step(Input::ConnectionFault), [WriteError, SetState(Closing), Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), []);
    machine
}

#[test]
fn a_new_disk_is_opened_and_offers_itself_before_init_wait() {
    assert_eq!(waiting().backend(), InitWait);
}

#[test]
fn a_disk_that_cannot_be_opened_closes_with_an_error() {
    for (frontend, effects) in [
        (Initialising, &[WriteError, SetState(Closing), SetState(Closed)][..]),
        (Connected, &[WriteError, SetState(Closing)]),
    ] {
        let mut machine = Machine::new(frontend, true);
        machine.step(Input::Backend(Initialising));
        assert_eq!(machine.step(Input::OpenFailed), effects);
    }
}

#[test]
fn a_script_that_reports_failures_is_let_run() {
    let mut machine = Machine::new(Initialising, true);
    machine.step(Input::Backend(Initialising));
    let effects = machine.step(Input::OpenFailedScript);
    assert_eq!(effects, [WriteError, WriteHotplugError, SetState(InitWait)]);
    assert_eq!(machine.step(Input::Frontend(Initialised)), [], "there is nothing to connect to");
    assert_eq!(machine.step(Input::Frontend(Closed)), [SetState(Closed)]);
    assert_eq!(machine.step(Input::Frontend(Initialising)), []);
}

#[test]
fn a_disk_that_failed_is_opened_again_when_the_toolstack_starts_over() {
    let mut machine = Machine::new(Initialising, true);
    machine.step(Input::Backend(Initialising));
    machine.step(Input::OpenFailed);
    assert_eq!(machine.step(Input::Backend(Initialising)), [Open]);
    assert_eq!(machine.step(Input::Opened), [SetState(InitWait)]);
}

#[test]
fn a_disk_in_use_is_drained_before_the_toolstack_starts_it_over() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Backend(Initialising)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [Open]);
}

#[test]
fn a_hotplug_script_that_runs_late_delays_the_connection() {
    let mut machine = Machine::new(Initialising, true);
    machine.step(Input::Backend(Initialising));
    machine.step(Input::Opened);
    assert_eq!(machine.step(Input::Frontend(Initialised)), []);
    assert_eq!(machine.step(Input::Ready), [Connect]);
}

#[test]
fn a_closed_disk_waits_again_when_the_frontend_starts_over() {
    let mut machine = closed();
    for _ in 0..10 {
        let effects = machine.step(Input::Frontend(Initialising));
        assert_eq!(effects, [SetState(InitWait)]);
        assert_eq!(machine.step(Input::Frontend(Initialised)), [Connect]);
        machine.step(Input::ConnectionUp);
        machine.step(Input::Frontend(Connected));
        machine.step(Input::Frontend(Closing));
        machine.step(Input::Frontend(Closed));
        assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed)]);
    }
}

#[test]
fn a_frontend_that_initialises_beside_init_wait_changes_nothing() {
    assert_eq!(waiting().step(Input::Frontend(Initialising)), []);
}

#[test]
fn a_closed_disk_that_is_not_online_does_not_wait_again() {
    let mut machine = closed();
    assert_eq!(machine.step(Input::Online(false)), [SetState(Closed), Forget]);
    assert_eq!(machine.step(Input::Frontend(Initialising)), []);
}

#[test]
fn a_frontend_that_starts_over_unseen_gets_its_old_connection_ended() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Frontend(Initialising)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(InitWait)]);

    let mut machine = connected();
    assert_eq!(machine.step(Input::RingReplaced), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [Connect]);
    assert_eq!(machine.step(Input::ConnectionUp), [SetState(Connected)]);
}

#[test]
fn a_frontend_in_init_wait_changes_nothing() {
    for mut machine in [waiting(), connected(), closed()] {
        assert_eq!(machine.step(Input::Frontend(InitWait)), []);
    }
}

#[test]
fn states_that_block_devices_do_not_have_change_nothing() {
    for mut machine in [waiting(), connected(), closed()] {
        assert_eq!(machine.step(Input::Frontend(Reconfiguring)), []);
        assert_eq!(machine.step(Input::Frontend(Reconfigured)), []);
    }
}

#[test]
fn a_frontend_that_follows_to_connected_changes_nothing() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Frontend(Connected)), []);
    assert_eq!(machine.step(Input::Frontend(Initialised)), []);
}

#[test]
fn a_frontend_with_a_ring_is_connected() {
    assert_eq!(connected().backend(), Connected);
    let mut early = waiting();
    assert_eq!(early.step(Input::Frontend(Connected)), [Connect]);
}

#[test]
fn a_frontend_with_a_ring_connects_a_closed_disk() {
    assert_eq!(closed().step(Input::Frontend(Initialised)), [Connect]);
}

#[test]
fn a_connection_that_fails_writes_the_error_and_closes() {
    let mut machine = waiting();
    machine.step(Input::Frontend(Initialised));
    assert_eq!(machine.step(Input::ConnectionFailed), [WriteError, SetState(Closing), Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), []);
    assert_eq!(machine.backend(), Closing);
}

#[test]
fn a_failed_disk_stays_down_until_the_frontend_starts_over() {
    let mut machine = failed();
    assert_eq!(machine.step(Input::Frontend(Initialised)), []);
    assert_eq!(machine.step(Input::Frontend(Connected)), []);
    assert_eq!(machine.step(Input::Frontend(Closing)), [SetState(Closing)]);
    assert_eq!(machine.step(Input::Frontend(Closed)), [SetState(Closed)]);
    let effects = machine.step(Input::Frontend(Initialising));
    assert_eq!(effects, [SetState(InitWait)]);
    assert_eq!(machine.step(Input::Frontend(Initialised)), [Connect]);
}

#[test]
fn a_closing_frontend_keeps_its_ring() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Frontend(Closing)), [SetState(Closing)]);
    assert_eq!(machine.connection(), ConnectionState::Up);
    assert_eq!(machine.step(Input::Frontend(Connected)), [SetState(Connected)]);
    assert_eq!(machine.connection(), ConnectionState::Up);
}

#[test]
fn a_frontend_that_closes_while_connecting_is_not_called_connected() {
    let mut machine = waiting();
    machine.step(Input::Frontend(Initialised));
    assert_eq!(machine.step(Input::Frontend(Closing)), [SetState(Closing)]);
    assert_eq!(machine.step(Input::ConnectionUp), []);
    assert_eq!(machine.step(Input::Frontend(Closed)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed)]);

    let mut machine = waiting();
    machine.step(Input::Frontend(Initialised));
    assert_eq!(machine.step(Input::Frontend(Closed)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionUp), [], "the answer crossed the disconnection");
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed)]);
}

#[test]
fn a_frontend_that_comes_back_while_disconnecting_is_served_after() {
    let mut machine = connected();
    machine.step(Input::Frontend(Closed));
    assert_eq!(machine.step(Input::Frontend(Initialising)), []);
    assert_eq!(machine.step(Input::Frontend(Initialised)), []);
    assert_eq!(machine.step(Input::ConnectionDown), [Connect]);
}

#[test]
fn a_frontend_that_closed_is_disconnected() {
    assert_eq!(closed().backend(), Closed);
    assert_eq!(waiting().step(Input::Frontend(Closed)), [SetState(Closed)]);
}

#[test]
fn a_frontend_area_that_vanished_is_disconnected() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Frontend(Unknown)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed)]);
}

#[test]
fn a_state_written_by_others_is_taken_as_it_is() {
    for state in [Unknown, InitWait, Initialised, Connected, Closing, Closed] {
        let mut machine = connected();
        assert_eq!(machine.step(Input::Backend(state)), []);
        assert_eq!(machine.backend(), state);
        assert_eq!(machine.connection(), ConnectionState::Up);
    }
}

#[test]
fn closing_written_over_a_dead_frontend_closes() {
    assert_eq!(waiting().step(Input::Backend(Closing)), [SetState(Closed)]);
    let mut machine = connected();
    machine.step(Input::Frontend(Reconfiguring));
    assert_eq!(machine.step(Input::Backend(Closing)), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed)]);
}

#[test]
fn a_disk_without_a_guest_is_forgotten_when_it_goes_offline() {
    assert_eq!(waiting().step(Input::Online(false)), [SetState(Closed), Forget]);
    assert_eq!(closed().step(Input::Online(false)), [SetState(Closed), Forget]);
    for state in [Unknown, Initialising, InitWait, Closed] {
        let mut machine = connected();
        machine.step(Input::Online(false));
        assert_eq!(machine.step(Input::Backend(state)), [Disconnect], "{state}");
        assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed), Forget]);
    }
}

#[test]
fn a_detached_disk_waits_for_its_frontend() {
    for order in [
        [Input::Online(false), Input::Backend(Closing)],
        [Input::Backend(Closing), Input::Online(false)],
    ] {
        let mut machine = connected();
        for input in order {
            assert_eq!(machine.step(input), []);
        }
        assert_eq!(machine.step(Input::Frontend(Closing)), [SetState(Closing)]);
        assert_eq!(machine.step(Input::Frontend(Closed)), [Disconnect]);
        assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed), Forget]);
    }
}

#[test]
fn a_disk_detached_while_connecting_stays_closing() {
    let mut machine = waiting();
    machine.step(Input::Frontend(Initialised));
    machine.step(Input::Online(false));
    machine.step(Input::Backend(Closing));
    assert_eq!(machine.step(Input::ConnectionUp), []);
    assert_eq!(machine.backend(), Closing);
}

#[test]
fn a_forced_removal_waits_for_the_connection_only() {
    let inputs = [Input::Online(false), Input::Backend(Closing), Input::Frontend(Unknown)];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for mut machine in [connected(), failed(), waiting()] {
            let mut effects = Vec::new();
            for index in order {
                effects.extend_from_slice(machine.step(inputs[index]));
            }
            if effects == [Disconnect] {
                effects.extend_from_slice(machine.step(Input::ConnectionDown));
            }
            assert_eq!(effects.last(), Some(&Forget), "{order:?}: {effects:?}");
            assert!(effects.contains(&SetState(Closed)));
        }
    }
}

#[test]
fn a_disk_that_nobody_serves_is_let_go() {
    let mut machine = Machine::new(Unknown, false);
    assert_eq!(machine.step(Input::Backend(Closing)), [SetState(Closed), Forget]);
    let mut machine = Machine::new(Connected, false);
    assert_eq!(machine.step(Input::Backend(Closing)), []);
    assert_eq!(machine.step(Input::Frontend(Closed)), [SetState(Closed), Forget]);
}

#[test]
fn an_area_that_vanished_is_not_written_to() {
    assert_eq!(waiting().step(Input::Gone), [Forget]);
    let mut machine = connected();
    assert_eq!(machine.step(Input::Gone), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [Forget]);
}

#[test]
fn the_disk_of_a_guest_that_is_gone_is_closed_and_let_go() {
    assert_eq!(waiting().step(Input::DomainGone), [SetState(Closed), Forget]);
    let mut machine = connected();
    assert_eq!(machine.step(Input::DomainGone), [Disconnect]);
    assert_eq!(machine.step(Input::Frontend(Unknown)), []);
    assert_eq!(machine.step(Input::ConnectionDown), [SetState(Closed), Forget]);
}

#[test]
fn while_storage_is_being_opened_everything_else_goes_on() {
    let mut machine = Machine::new(Initialising, true);
    machine.step(Input::Backend(Initialising));
    assert!(machine.is_opening());
    assert_eq!(machine.step(Input::Frontend(Initialised)), [], "it waits for InitWait");
    let mut removed = machine;
    removed.set_online(false);
    assert_eq!(removed.step(Input::Backend(Closing)), [], "its guest is alive");
    assert_eq!(removed.step(Input::Frontend(Closed)), [SetState(Closed), Forget]);
    assert_eq!(machine.step(Input::Opened), [SetState(InitWait)]);
    assert_eq!(machine.step(Input::Ready), [Connect]);
}

#[test]
fn an_answer_that_nobody_waits_for_changes_nothing() {
    for answer in [Input::Opened, Input::OpenFailed, Input::OpenFailedScript] {
        let mut machine = waiting();
        let before = machine;
        assert_eq!((machine.step(answer), machine), (&[][..], before));
    }
}

#[test]
fn when_the_daemon_ends_the_connection_is_drained_and_no_state_written() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::Stop), [Disconnect]);
    assert_eq!(machine.step(Input::ConnectionDown), [Forget]);
    assert_eq!(waiting().step(Input::Stop), [Forget]);
}

#[test]
fn a_connected_frontend_is_told_of_another_medium() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::MediumChanged), [SetState(Connected)]);
    machine.step(Input::Frontend(Closing));
    assert_eq!(machine.step(Input::MediumChanged), [PublishDisk], "Closing must not be undone");
    assert_eq!(machine.step(Input::Frontend(Connected)), [SetState(Connected)]);
}

#[test]
fn a_medium_changed_before_the_connection_changes_what_is_offered() {
    let mut machine = waiting();
    assert_eq!(machine.step(Input::MediumChanged), [PublishFeatures]);
    machine.step(Input::Frontend(Initialised));
    assert_eq!(
        machine.step(Input::MediumChanged),
        [],
        "the connection's answer publishes the size"
    );
    assert_eq!(machine.step(Input::ConnectionUp), [SetState(Connected)]);
    assert_eq!(closed().step(Input::MediumChanged), []);
}

#[test]
fn a_medium_that_cannot_be_used_is_an_error_and_no_failure() {
    let mut machine = connected();
    assert_eq!(machine.step(Input::MediumFailed), [WriteError]);
    assert_eq!((machine.backend(), machine.connection()), (Connected, ConnectionState::Up));
    assert_eq!(machine.step(Input::MediumChanged), [SetState(Connected)]);
}

#[test]
fn the_table_is_the_one_that_was_reviewed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/control/machine/table.txt");
    let table: String = TABLE.iter().map(|row| format!("{row}\n")).collect();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    let reviewed = std::fs::read_to_string(path).unwrap_or_default();
    if table != reviewed {
        let (old, new): (BTreeSet<&str>, BTreeSet<&str>) =
            (reviewed.lines().collect(), table.lines().collect());
        for line in old.difference(&new) {
            println!("- {line}");
        }
        for line in new.difference(&old) {
            println!("+ {line}");
        }
        panic!(
            "the machine's table (or the order of its rows) differs from the reviewed one; if \
             that is intended, run this test with UPDATE_SNAPSHOTS=1 and review the change"
        );
    }
}

/// A model of what surrounds a machine: the connection in the data plane, and storage.
#[derive(Debug, Default)]
struct Around {
    connecting: bool,
    linked: bool,
    ending: bool,
    forgotten: bool,
    opening: bool,
    open: bool,
}

impl Around {
    /// Carries out effects, and checks what must always hold.
    fn carry_out(&mut self, effects: &[Effect]) {
        for effect in effects {
            assert!(!self.forgotten, "an effect after Forget: {effects:?}");
            let idle = !(self.connecting || self.linked || self.ending);
            match effect {
                Connect => {
                    assert!(idle, "two connections: {self:?}");
                    self.connecting = true;
                }
                Disconnect => {
                    assert!((self.connecting || self.linked) && !self.ending, "{self:?}");
                    self.ending = true;
                }
                SetState(Connected) => assert!(self.linked && !self.ending, "{self:?}"),
                Open => {
                    assert!(idle, "opened under a connection");
                    (self.opening, self.open) = (true, false);
                }
                Forget => {
                    assert!(idle, "forgotten with a connection: {self:?}");
                    self.forgotten = true;
                }
                _ => {}
            }
        }
    }

    /// The proposed input if it can happen now: an answer needs a question.
    fn allow(&mut self, input: Input) -> Option<Input> {
        match input {
            Input::Opened | Input::OpenFailed | Input::OpenFailedScript if self.opening => {
                self.opening = false;
                self.open = input == Input::Opened;
                Some(input)
            }
            Input::Opened | Input::OpenFailed | Input::OpenFailedScript => None,
            Input::Ready => self.open.then_some(input),
            Input::ConnectionUp if self.connecting => {
                self.connecting = false;
                self.linked = true;
                Some(input)
            }
            Input::ConnectionFailed if self.connecting => Some(input),
            Input::ConnectionFault | Input::RingReplaced if self.linked => Some(input),
            Input::ConnectionDown if self.ending => {
                (self.connecting, self.linked, self.ending) = (false, false, false);
                Some(input)
            }
            Input::ConnectionUp
            | Input::ConnectionFailed
            | Input::ConnectionFault
            | Input::ConnectionDown
            | Input::RingReplaced => None,
            _ => Some(input),
        }
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    let state = prop::sample::select(&XenbusState::ALL[..]);
    prop_oneof![
        6 => state.clone().prop_map(Input::Frontend),
        2 => state.prop_map(Input::Backend),
        1 => any::<bool>().prop_map(Input::Online),
        2 => Just(Input::Ready),
        2 => Just(Input::Opened),
        1 => prop::sample::select(vec![Input::OpenFailed, Input::OpenFailedScript]),
        4 => Just(Input::ConnectionUp),
        1 => prop::sample::select(vec![Input::ConnectionFailed, Input::ConnectionFault, Input::RingReplaced]),
        4 => Just(Input::ConnectionDown),
        2 => prop::sample::select(vec![Input::MediumChanged, Input::MediumFailed]),
    ]
}

fn play(inputs: &[Input]) -> (Machine, Around) {
    let mut machine = Machine::new(Initialising, true);
    let mut around = Around::default();
    around.carry_out(machine.step(Input::Backend(Initialising)));
    for input in inputs {
        if around.forgotten {
            break;
        }
        if let Some(input) = around.allow(*input) {
            around.carry_out(machine.step(input));
        }
    }
    (machine, around)
}

fn finish(mut machine: Machine, mut around: Around, inputs: &[Input]) -> bool {
    for input in
        inputs.iter().chain(&[Input::ConnectionDown, Input::ConnectionDown, Input::ConnectionDown])
    {
        if !around.forgotten
            && let Some(input) = around.allow(*input)
        {
            around.carry_out(machine.step(input));
        }
    }
    around.forgotten
}

/// Inputs that a guest, storage and the data plane can cause without the toolstack.
fn guest_input() -> impl Strategy<Value = Input> {
    any_input().prop_filter("the toolstack's doing", |input| {
        use Input::{Backend, Online, OpenFailed, OpenFailedScript};
        !matches!(input, Backend(_) | Online(_) | OpenFailed | OpenFailedScript)
    })
}

fn many_cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) }
}

proptest! {
    #![proptest_config(many_cases())]

    #[test]
    fn whatever_happens_there_is_one_connection_at_most_and_the_disk_can_be_removed(
        inputs in prop::collection::vec(any_input(), 0..60)
    ) {
        let (machine, around) = play(&inputs);
        for end in [
            &[Input::Frontend(Closed), Input::Online(false), Input::Backend(Closing)][..],
            &[Input::Online(false), Input::Backend(Closing), Input::Frontend(Unknown)],
            &[Input::Gone],
            &[Input::DomainGone],
            &[Input::Stop],
        ] {
            let around = Around { ..around };
            let ended = around.forgotten || finish(machine, around, end);
            prop_assert!(ended, "{:?} by {:?}", machine, end);
        }
    }

    #[test]
    fn whatever_a_guest_did_it_can_start_over(
        inputs in prop::collection::vec(guest_input(), 0..60)
    ) {
        let (mut machine, mut around) = play(&inputs);
        for input in [
            Input::Opened,
            Input::Ready,
            Input::Frontend(Closed),
            Input::ConnectionDown,
            Input::Frontend(Initialising),
        ] {
            if let Some(input) = around.allow(input) {
                around.carry_out(machine.step(input));
            }
        }
        prop_assert_eq!(machine.backend(), InitWait);
        around.carry_out(machine.step(Input::Frontend(Initialised)));
        prop_assert!(around.connecting);
    }
}
