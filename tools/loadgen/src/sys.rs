//! System calls that the standard library does not have.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// CPU time in nanoseconds that all threads of a process have used so far, including those that have ended.
/// Fails if there is no such process.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let pid = pid_of(pid)?;
    let mut clock = 0;
    // SAFETY: `clock` is writable for the call.
    match unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } {
        0 => clock_ns(clock),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Checks that a number can be a process (Linux's `PID_MAX_LIMIT`). Larger numbers do not fit the number of
/// a process's clock; 0 and below have other meanings.
fn pid_of(pid: u32) -> io::Result<libc::pid_t> {
    match libc::pid_t::try_from(pid) {
        Ok(pid @ 1..=0x40_0000) => Ok(pid),
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

fn clock_ns(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable for the call.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let rest = u64::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(seconds * 1_000_000_000 + rest)
}

/// Lets the calling thread wake from a sleep as exactly as the kernel can, instead of 50 us late.
pub fn sleep_exactly() {
    // SAFETY: no pointers. If it fails, sleeps are less exact.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
}

/// Makes a child end when the thread that starts it ends, for any reason.
pub fn die_with_parent(command: &mut Command) {
    let prepare = || {
        // SAFETY: no pointers.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Asks a process to end (SIGTERM).
pub fn terminate(pid: u32) -> io::Result<()> {
    let pid = pid_of(pid)?;
    // SAFETY: no pointers.
    match unsafe { libc::kill(pid, libc::SIGTERM) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn cpu_time_grows_with_work_and_no_process_has_none() {
        let own = std::process::id();
        let before = process_cpu_ns(own).unwrap();
        while process_cpu_ns(own).unwrap() < before + 1_000_000 {}
        for nobody in [0, 0x40_0000, u32::MAX / 2, u32::MAX] {
            assert!(process_cpu_ns(nobody).is_err(), "{nobody}");
        }
    }
}
