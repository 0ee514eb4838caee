//! A copy that survives missing memory.
//!
//! Anyone who may write to a mapped file can make it shorter, and the kernel may fail to allocate one of
//! its pages, to read it back from swap, or find it broken. Touching such a page raises SIGBUS. The copy
//! is one instruction at a known address. If the signal interrupts it there, the handler skips the
//! instruction, whose registers say how much is left. Signals from anywhere else go to the handler that
//! was there before.
//!
//! SIGSEGV is handled in the same way, for a guest's page on the other side of the copy. Granted pages
//! stay mapped as long as a request holds them, whatever the guest does, so this is only a safety net:
//! the copy by a system call that follows fails with EFAULT.
#![allow(unsafe_code)]

pub use arch::{copy, install, prefetch, prefetch_line};

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::mem::MaybeUninit;
    use std::ptr::NonNull;
    use std::sync::OnceLock;

    use libc::{c_int, c_void};

    const CACHE_LINE_BYTES: usize = 64;

    const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

    /// What was done with [`SIGNALS`] before; `None` if it could not be read.
    static BEFORE: OnceLock<Option<[libc::sigaction; 2]>> = OnceLock::new();

    // Returns in rax how many bytes are left. When the string instruction faults its state is in
    // registers; with words of eight bytes it is fast on all processors.
    std::arch::global_asm!(
        ".pushsection .text.polldisk_guarded_copy,\"ax\",@progbits",
        ".p2align 4",
        ".type polldisk_guarded_copy, @function",
        ".globl polldisk_guarded_copy, polldisk_guarded_copy_faults, polldisk_guarded_copy_ends",
        ".hidden polldisk_guarded_copy, polldisk_guarded_copy_faults, polldisk_guarded_copy_ends",
        "polldisk_guarded_copy:",
        ".cfi_startproc",
        "mov rcx, rdx",
        "shr rcx, 3",
        "polldisk_guarded_copy_faults:",
        "rep movsq",
        "polldisk_guarded_copy_ends:",
        "lea rax, [rcx * 8]",
        "ret",
        ".cfi_endproc",
        ".size polldisk_guarded_copy, . - polldisk_guarded_copy",
        ".popsection",
    );

    unsafe extern "sysv64" {
        fn polldisk_guarded_copy(to: *mut u8, from: *const u8, len: usize) -> usize;
        fn polldisk_guarded_copy_faults();
        fn polldisk_guarded_copy_ends();
    }

    /// Copies `len` bytes, a multiple of 8. Returns how many bytes at the end were not copied, because
    /// memory on one side can't be touched.
    ///
    /// # Safety
    /// Both ranges must belong to mappings, with or without pages behind them. Nobody may see the bytes
    /// of `to` as Rust values. [`install`] must have returned true.
    #[inline]
    pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> usize {
        if !len.is_multiple_of(8) {
            return len;
        }
        // SAFETY: the caller keeps the contract; if memory can't be touched, `on_fault` is called.
        unsafe { polldisk_guarded_copy(to, from, len) }
    }

    /// Fetches the cache lines that will be copied to, all at once. A copy alone waits for a few at a
    /// time, and takes a quarter longer on a page that is in no cache.
    #[inline]
    pub fn prefetch(to: NonNull<u8>, len: usize) {
        for line in (0..len).step_by(CACHE_LINE_BYTES) {
            prefetch_line(to.as_ptr().wrapping_add(line));
        }
    }

    /// Makes the processor look up a page and fetch one cache line of it.
    #[inline]
    pub fn prefetch_line(address: *const u8) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which touches nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }

    /// Installs the signal handler that guards [`copy`], once. Returns whether it is there.
    pub fn install() -> bool {
        // Stored before the handler is installed, which reads them.
        let before = BEFORE.get_or_init(|| {
            let [Some(bus), Some(segv)] = SIGNALS.map(action_of) else { return None };
            Some([bus, segv])
        });
        static INSTALLED: OnceLock<bool> = OnceLock::new();
        *INSTALLED.get_or_init(|| before.is_some() && SIGNALS.into_iter().all(catch))
    }

    fn action_of(signal: c_int) -> Option<libc::sigaction> {
        let mut action = MaybeUninit::uninit();
        // SAFETY: changes nothing; fills `action` if it succeeds.
        unsafe {
            let asked = libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
            (asked == 0).then(|| action.assume_init())
        }
    }

    fn catch(signal: c_int) -> bool {
        // SAFETY: zeroes are valid for plain numbers and an empty set.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        // Rust's own handler, which this one may call, detects stack overflows and needs its own stack.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler does only what a signal handler may do: it changes a register of the
        // interrupted thread, calls the handler that was there before, or calls signal and raise.
        unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) == 0 }
    }

    extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: the kernel passes both, valid during this call (SA_SIGINFO).
        let (code, registers) = unsafe {
            ((*info).si_code, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs)
        };
        let next = &mut registers[libc::REG_RIP as usize];
        // Codes above 0 mean that the kernel raised the signal, not kill(2).
        if code > 0 && *next == polldisk_guarded_copy_faults as *const () as i64 {
            *next = polldisk_guarded_copy_ends as *const () as i64;
        } else {
            pass_on(signal, info, context);
        }
    }

    /// Does what would have happened without our handler.
    fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let which = usize::from(signal != SIGNALS[0]);
        let before = BEFORE.get().and_then(Option::as_ref).map(|before| &before[which]);
        match before {
            // SAFETY: the kernel would have called that handler in the same way.
            Some(before) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction) => unsafe {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                    std::mem::transmute::<usize, Handler>(before.sa_sigaction)(
                        signal, info, context,
                    );
                } else {
                    type Handler = extern "C" fn(c_int);
                    std::mem::transmute::<usize, Handler>(before.sa_sigaction)(signal);
                }
            },
            // A fault can't be ignored: the signal ends the process.
            _ => {
                // SAFETY: removes the handler; the signal is blocked until this handler returns.
                unsafe {
                    libc::signal(signal, libc::SIG_DFL);
                    libc::raise(signal);
                }
            }
        }
    }
}

/// On other processors copies are not guarded, so nothing is copied.
#[cfg(not(target_arch = "x86_64"))]
mod arch {
    /// Copies nothing.
    ///
    /// # Safety
    /// None is needed.
    pub unsafe fn copy(_: *mut u8, _: *const u8, len: usize) -> usize {
        len
    }

    /// Nothing will be copied.
    pub fn prefetch(_: std::ptr::NonNull<u8>, _: usize) {}

    /// Nothing will be copied.
    pub fn prefetch_line(_: *const u8) {}

    /// Copies are not guarded.
    pub fn install() -> bool {
        false
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod test {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const BYTES: usize = 8192;

    /// Two mapped pages of an open file, the second beyond its end.
    fn cut_short() -> (File, *mut u8) {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, which stays for good.
        let base = unsafe {
            let (null, fd) = (std::ptr::null_mut(), file.as_raw_fd());
            libc::mmap(null, BYTES, protection, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        (file, base.cast())
    }

    #[test]
    fn a_copy_ends_where_memory_does_and_says_how_much_is_left() {
        assert!(install() && install());
        let (_file, base) = cut_short();
        let mut ours = vec![7u8; BYTES];
        // SAFETY: both are mapped, and nobody reads them meanwhile.
        let mut copy = |to_file, start, len| unsafe {
            let (file, ours) = (base.add(start), ours.as_mut_ptr());
            if to_file { copy(file, ours, len) } else { copy(ours, file, len) }
        };
        assert_eq!(copy(true, 0, 4096), 0);
        assert_eq!(copy(true, 0, BYTES), 4096);
        assert_eq!(copy(false, 4096 - 512, 1024), 512);
        assert_eq!(copy(false, 4096, 512), 512);
        assert_eq!(copy(false, 0, 4096), 0);
        assert_eq!(copy(false, 0, 13), 13, "only multiples of eight");
        // SAFETY: the mapping of `cut_short`.
        assert_eq!(unsafe { libc::mprotect(base.cast(), BYTES, libc::PROT_NONE) }, 0);
        assert_eq!(copy(true, 0, 4096), 4096);
        assert_eq!(copy(false, 0, 4096), 4096);
        assert!(ours.iter().all(|byte| *byte == 7));
    }

    const CHILD: &str = "POLLDISK_TEST_FAULTS";

    #[test]
    fn other_faults_end_the_process_by_their_signal() {
        const NAME: &str = "engine::guarded::test::other_faults_end_the_process_by_their_signal";
        if let Some(signal) = std::env::var_os(CHILD) {
            assert!(install());
            let (_file, base) = cut_short();
            // SAFETY: mapped; touching it raises the signal.
            unsafe {
                if signal == "SIGSEGV" {
                    libc::mprotect(base.cast(), BYTES, libc::PROT_NONE);
                }
                base.add(4096).read_volatile();
            }
            unreachable!("touching it did not fail");
        }
        for (name, signal) in [("SIGBUS", libc::SIGBUS), ("SIGSEGV", libc::SIGSEGV)] {
            let mut child = Command::new(std::env::current_exe().unwrap());
            let output = child.args(["--exact", NAME]).env(CHILD, name).output().unwrap();
            assert_eq!(output.status.signal(), Some(signal), "{output:?}");
        }
    }
}
