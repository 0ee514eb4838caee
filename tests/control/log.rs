//! The log of this process, kept line by line.

use std::io::Write;
use std::sync::{Mutex, Once};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Keeper;

impl Write for Keeper {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        LINES.lock().unwrap().push(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keeps what is logged from now on, at the daemon's level.
pub fn keep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(|| Keeper);
        subscriber.init();
    });
}

/// The lines so far that contain all of these words.
pub fn lines(words: &[&str]) -> Vec<String> {
    let all = LINES.lock().unwrap();
    all.iter().filter(|line| words.iter().all(|word| line.contains(word))).cloned().collect()
}
