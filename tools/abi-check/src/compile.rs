//! The C compiler, as a source of data. Nothing that it builds is run: the values are read from the object
//! file, so `-m32` needs no 32-bit C library.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The section of the object file that holds the data.
pub const SECTION: &str = ".abi";

/// Describes what this machine lacks for [`data`]; `None` if it lacks nothing.
pub fn missing() -> Option<String> {
    for (tool, package) in [("cc", "gcc"), ("objcopy", "binutils")] {
        let tried = Command::new(tool).arg("--version").output();
        if tried.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Some(format!("{tool} (package {package})"));
        }
    }
    // Checks only that one header exists: a header that does not compile must fail the comparison.
    let probe = "#if !__has_include(<xen/io/blkif.h>)\n#error missing\n#endif\n";
    data(&format!("{probe}char probe __attribute__((section(\"{SECTION}\"))) = 1;\n"), &[])
        .err()
        .map(|_| "Xen's C headers (package libxen-dev)".to_owned())
}

/// Compiles a C program and returns the bytes of its [`SECTION`].
pub fn data(source: &str, flags: &[&str]) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().context("no folder for the compiler's files")?;
    let [program, object, bytes] =
        ["abi.c", "abi.o", "abi.bin"].map(|name| folder.path().join(name));
    fs::write(&program, source)?;
    run(Command::new("cc").args(flags).args([
        Path::new("-c"),
        &program,
        Path::new("-o"),
        &object,
    ]))?;
    let only = format!("--only-section={SECTION}");
    run(Command::new("objcopy").args(["-O", "binary", &only]).args([&object, &bytes]))?;
    Ok(fs::read(bytes)?)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed:\n{errors}");
    Ok(())
}
