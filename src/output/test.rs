use std::sync::{Arc, Mutex};

use super::*;

/// What a writer does with each write: an error, or how many bytes it takes at most.
type Plan = Box<dyn FnMut() -> io::Result<usize> + Send>;

/// A writer that misbehaves as planned, and the bytes it was given.
struct Sink {
    plan: Plan,
    taken: Arc<Mutex<Vec<u8>>>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = (self.plan)()?.min(bytes.len());
        self.taken.lock().unwrap().extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn queue(plan: impl FnMut() -> io::Result<usize> + Send + 'static) -> (Queue, Arc<Mutex<Vec<u8>>>) {
    let taken = Arc::default();
    let sink = Sink { plan: Box::new(plan), taken: Arc::clone(&taken) };
    (Queue::start(sink).unwrap(), taken)
}

fn text(taken: &Mutex<Vec<u8>>) -> String {
    String::from_utf8(taken.lock().unwrap().clone()).unwrap()
}

fn error(errno: i32) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(errno))
}

#[test]
fn lines_come_in_order_and_are_all_there_at_the_end() {
    let (queue, taken) = queue(|| Ok(3));
    let lines: Vec<String> = (0..100).map(|n| format!("line {n}\n")).collect();
    lines.iter().for_each(|line| queue.put(line.clone().into_bytes()));
    queue.finish();
    assert_eq!(text(&taken), lines.concat());
}

#[test]
fn what_a_full_filesystem_did_not_take_is_counted_and_told_later() {
    let mut writes = 0;
    let (queue, taken) = queue(move || {
        writes += 1;
        match writes {
            1 => Ok(2),
            2..=6 => error(libc::ENOSPC),
            _ => Ok(usize::MAX),
        }
    });
    for line in ["torn\n", "lost\n", "written\n"] {
        queue.put(line.into());
        queue.finish();
    }
    let text = text(&taken);
    let lines: Vec<&str> = text.lines().collect();
    assert!(matches!(lines[..], ["to", told, "written"] if told.ends_with("lost: 2")), "{text}");
}

#[test]
fn a_writer_that_is_busy_for_a_moment_loses_nothing() {
    let mut busy = true;
    let (queue, taken) = queue(move || {
        busy = !busy;
        if busy { Ok(1) } else { error(libc::EAGAIN) }
    });
    queue.put(b"whole\n".to_vec());
    queue.finish();
    assert_eq!(text(&taken), "whole\n");
}

#[test]
fn nobody_waits_for_a_writer_that_is_stuck() {
    let (free, is_free) = bounded(0);
    let (queue, taken) = queue(move || {
        // Once the other end is dropped, writes never block again.
        let _: Result<(), _> = is_free.recv();
        Ok(usize::MAX)
    });
    for _ in 0..2 * limits::LOG_LINES_QUEUED {
        queue.put(b"x\n".to_vec());
    }
    queue.finish();
    assert_eq!(text(&taken), "");
    drop(free);
    // Each line was written or is counted as lost.
    let told = || {
        let text = text(&taken);
        let lost = text.split("are lost: ").skip(1).filter_map(|rest| rest.lines().next());
        let lost: usize = lost.map(|number| number.parse::<usize>().unwrap_or(0)).sum();
        (text.matches("x\n").count() + lost, lost)
    };
    while told().0 < 2 * limits::LOG_LINES_QUEUED {
        std::thread::yield_now();
    }
    assert!(told().0 == 2 * limits::LOG_LINES_QUEUED && told().1 > 0);
}

#[test]
fn a_line_without_end_is_cut() {
    let (queue, taken) = queue(|| Ok(usize::MAX));
    queue.put(vec![b'x'; 10 * limits::LOG_LINE_MAX]);
    queue.finish();
    let text = text(&taken);
    assert!(text.len() < limits::LOG_LINE_MAX + 8 && text.ends_with("...\n"));
}

#[test]
fn a_reader_that_has_ended_is_no_error_but_a_full_disk_is() {
    assert!(taken(Err(io::ErrorKind::BrokenPipe.into())).is_ok());
    let full = taken(Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap_err();
    assert!(with_causes(&full).starts_with("cannot write to standard output: No space left"));
}
