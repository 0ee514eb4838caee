//! Programs from Debian: the host's, or copies in the user's cache folder.
//!
//! A missing program is not installed, since that could change what others use on the machine. Its
//! packages are downloaded and unpacked in the cache folder instead.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use polldisk::output;

/// A program that can be run.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program's file.
    pub path: PathBuf,
    /// The folder of the unpacked packages, unless the program is installed.
    pub root: Option<PathBuf>,
}

/// A program's path and Debian package.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Relative to the root folder.
    pub file: &'static str,
    /// The package.
    pub package: &'static str,
    /// An environment variable that may name another file instead.
    pub variable: &'static str,
}

/// QEMU with Xen's machine types. Debian's qemu-system-x86 has none.
pub const QEMU: Wanted = Wanted {
    file: "usr/libexec/xen-qemu-system-i386",
    package: "qemu-system-xen",
    variable: "POLLDISK_QEMU",
};

/// fio.
pub const FIO: Wanted = Wanted { file: "usr/bin/fio", package: "fio", variable: "POLLDISK_FIO" };

/// Where unpacked packages keep shared libraries.
const LIBRARIES: [&str; 4] =
    ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib"];

impl Program {
    /// Finds an installed program, or gets one.
    pub fn find(wanted: Wanted) -> Result<Program> {
        if let Some(path) = env::var_os(wanted.variable) {
            let path = PathBuf::from(path);
            ensure!(path.exists(), "{}: {} is missing", wanted.variable, path.display());
            return Ok(Program { path, root: None });
        }
        let installed = Path::new("/").join(wanted.file);
        if let Some(path) =
            [Some(installed), on_path(wanted.file)].into_iter().flatten().find(|path| path.exists())
        {
            return Ok(Program { path, root: None });
        }
        Program::unpacked(wanted, &cache_folder()?)
    }

    /// The program from the cache. Downloads it if it is not there yet.
    pub fn unpacked(wanted: Wanted, cache: &Path) -> Result<Program> {
        let root = cache.join(wanted.package);
        if !root.exists() {
            output::say(format_args!("compare: getting {} for {}", wanted.package, root.display()));
            unpack(wanted.package, &root).with_context(|| {
                let Wanted { file, package, variable } = wanted;
                format!(
                    "/{file} is missing: apt-get update && apt-get install {package}, or name another in \
                     {variable}"
                )
            })?;
        }
        let path = root.join(wanted.file);
        ensure!(path.exists(), "{} is missing: remove {}", path.display(), root.display());
        Ok(Program { path, root: Some(root) })
    }

    /// The start of the command line, to which arguments are added.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(root) = &self.root {
            let folders = LIBRARIES.map(|folder| root.join(folder).display().to_string());
            words.extend(["env".to_owned(), format!("LD_LIBRARY_PATH={}", folders.join(":"))]);
        }
        words.push(self.path.display().to_string());
        words
    }
}

fn on_path(file: &str) -> Option<PathBuf> {
    let name = Path::new(file).file_name()?;
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.exists())
}

/// Downloads and unpacks a package, and those of its dependencies that the machine lacks.
fn unpack(package: &str, root: &Path) -> Result<()> {
    let cache = root.parent().context("the cache folder has no parent")?;
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let aside = tempfile::Builder::new().prefix("unpacking-").tempdir_in(cache)?;
    let (archives, files) = (aside.path().join("archives"), aside.path().join("files"));
    for folder in [&archives.join("partial"), &files] {
        fs::create_dir_all(folder)?;
    }
    let mut option = OsString::from("Dir::Cache::archives=");
    option.push(&archives);
    // Nothing is installed, so apt's locks, and the rights to take them, are not needed.
    run(Command::new("apt-get")
        .args(["install", "--yes", "--no-install-recommends", "--download-only", "--reinstall"])
        .args(["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=", "-o"])
        .arg(option)
        .arg(package))?;
    for entry in fs::read_dir(&archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg").arg("-x").arg(path).arg(&files))?;
        }
    }
    match fs::rename(&files, root) {
        // Another process has unpacked it meanwhile.
        Err(_) if root.exists() => Ok(()),
        other => other.with_context(|| format!("cannot create {}", root.display())),
    }
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .context("XDG_CACHE_HOME and HOME are not set: there is no folder for packages")?;
    Ok(cache.join("polldisk/compare"))
}
