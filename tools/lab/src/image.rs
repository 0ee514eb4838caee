//! The images that the lab boots: Xen, dom0's kernel, initramfs and root, which contains the guests' images.
//!
//! They are built once per key, a hash of everything they are made from, in a folder outside the
//! checkout. A folder named by a key is complete: it is built under another name and then renamed.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use polldisk::output;

use crate::qemu;

/// The Debian release of dom0 and the guests. It has Xen 4.17, and the libc that a polldisk built on it
/// needs.
const RELEASE: &str = "bookworm";

/// Must change when this file builds something else from the same inputs.
const BUILDER_VERSION: u32 = 2;

/// The Linux of dom0 and the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// The kernel of [`RELEASE`].
    Bookworm,
    /// The kernel of the next release. Everything else is still from [`RELEASE`].
    Trixie,
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Kernel; 2] = [Kernel::Bookworm, Kernel::Trixie];

    /// The release that the kernel is from.
    pub fn release(self) -> &'static str {
        match self {
            Kernel::Bookworm => RELEASE,
            Kernel::Trixie => "trixie",
        }
    }

    fn package(self) -> String {
        match self {
            Kernel::Bookworm => KERNEL_PACKAGE.into(),
            Kernel::Trixie => format!("{KERNEL_PACKAGE}/{}", self.release()),
        }
    }
}

/// Debian's name for a release's kernel.
const KERNEL_PACKAGE: &str = "linux-image-amd64";

/// How a folder of the cache is made: from a Debian root with these packages, by a script.
#[derive(Debug, Hash)]
struct Recipe {
    packages: &'static str,
    /// The kernel, if there is one among the packages.
    kernel: Kernel,
    /// Options for mmdebstrap.
    options: &'static [&'static str],
    /// The script that makes the images, and the scripts that it puts into them, with the names it uses.
    scripts: &'static [(&'static str, &'static str)],
}

/// The images that every machine boots. The kernel may be another one.
const MACHINE: Recipe = Recipe {
    packages: include_str!("../image/packages"),
    kernel: Kernel::Bookworm,
    options: &[],
    scripts: &[
        ("pack", include_str!("../image/pack")),
        ("dom0-init", include_str!("../dom0/init")),
        ("guest-init", include_str!("../guest/init")),
        ("agent", include_str!("../agent/agent")),
    ],
};

/// A root with programs for guests.
const PROGRAMS: Recipe = Recipe {
    packages: include_str!("../image/programs"),
    kernel: Kernel::Bookworm,
    // A scenario makes its own PostgreSQL cluster.
    options: &["--essential-hook=mkdir -p \"$1/etc/postgresql-common\" && \
                echo create_main_cluster = false >\"$1/etc/postgresql-common/createcluster.conf\""],
    scripts: &[("pack", include_str!("../image/pack-programs"))],
};

/// Programs that the host needs, and their packages.
const HOST_PROGRAMS: [(&str, &str); 5] = [
    (qemu::PROGRAM, "qemu-system-x86"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mmdebstrap", "mmdebstrap"),
    ("cpio", "cpio"),
    ("xz", "xz-utils"),
];

/// Builds the machine's images unless the cache holds them; returns their folder.
pub fn ensure_built(kernel: Kernel) -> Result<PathBuf> {
    let machine = Recipe { kernel, ..MACHINE };
    ensure_cached(&machine, cache_folder()?.join(key(&machine)), None)
}

/// Builds the root with programs for guests unless the cache holds it; returns its file.
///
/// It is kept with the machine's images, because its modules fit only their kernel.
pub fn ensure_programs_built(machine: &Path) -> Result<PathBuf> {
    let folder = machine.join(format!("programs-{}", key(&PROGRAMS)));
    Ok(ensure_cached(&PROGRAMS, folder, Some(machine))?.join("programs.img"))
}

fn ensure_cached(recipe: &Recipe, folder: PathBuf, base: Option<&Path>) -> Result<PathBuf> {
    check_host_programs()?;
    if !folder.exists() {
        output::say(format_args!(
            "lab: building images in {}; this takes some minutes, but only once",
            folder.display()
        ));
        build(recipe, &folder, base).context("cannot build the lab's images")?;
    }
    Ok(folder)
}

fn build(recipe: &Recipe, folder: &Path, base: Option<&Path>) -> Result<()> {
    let cache = folder.parent().context("the cache folder has no parent")?;
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let aside = tempfile::Builder::new().prefix("building-").tempdir_in(cache)?;
    let (root, scripts, out) =
        (aside.path().join("root"), aside.path().join("scripts"), aside.path().join("out"));
    fs::create_dir(&scripts)?;
    fs::create_dir(&out)?;
    for (name, text) in recipe.scripts {
        fs::write(scripts.join(name), text)?;
    }
    let sources = aside.path().join("sources.list");
    fs::write(&sources, apt_sources(recipe.kernel)?)?;

    let log = aside.path().join("log");
    let log_file = File::create(&log)?;
    for mut command in [bootstrap(recipe, &root, &sources), pack(&root, &scripts, &out, base)] {
        let status = command
            .env("PATH", search_path())
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file.try_clone()?)
            .status()
            .with_context(|| format!("cannot run {command:?}"))?;
        ensure!(status.success(), "{status} from {command:?}\n{}", tail(&log));
    }
    match fs::rename(&out, folder) {
        // Another process has built the same meanwhile.
        Err(_) if folder.exists() => Ok(()),
        other => other.with_context(|| format!("cannot create {}", folder.display())),
    }
}

/// The command that makes a root as a folder, from the host's package sources.
fn bootstrap(recipe: &Recipe, root: &Path, sources: &Path) -> Command {
    let mut command = Command::new("mmdebstrap");
    // The lab has its own initramfs, so the kernel's package need not make one.
    command.env("INITRD", "No");
    command.args(["--mode=root", "--variant=essential", "--architectures=amd64"]);
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    // From another release, install only packages that are asked for by name.
    let ours = format!("/^{RELEASE}(|-security|-updates)$/");
    command.arg(format!("--aptopt=APT::Default-Release \"{ours}\""));
    for excluded in ["doc", "man", "locale"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{excluded}/*"));
    }
    command.args(recipe.options);
    command.arg(format!("--include={}", packages(recipe).join(",")));
    command.args([OsStr::new(RELEASE), root.as_os_str(), sources.as_os_str()]);
    command
}

fn pack(root: &Path, scripts: &Path, out: &Path, base: Option<&Path>) -> Command {
    let mut command = Command::new("sh");
    command.arg(scripts.join("pack")).args([root, scripts, out]).args(base);
    command
}

/// The host's package sources for the release, in apt's one-line form. If the kernel is from another
/// release, that release from the same server follows.
fn apt_sources(kernel: Kernel) -> Result<String> {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)",
        ])
        .arg("Created-By: Packages")
        .output()
        .context("cannot run apt-get: the lab takes its packages from Debian's sources")?;
    let sources = release_sources(&String::from_utf8_lossy(&output.stdout));
    ensure!(
        !sources.is_empty(),
        "apt has no package lists of Debian {RELEASE}: add its sources and run apt-get update"
    );
    Ok(with_kernels_release(sources, kernel))
}

fn with_kernels_release(sources: String, kernel: Kernel) -> String {
    let suite = format!(" {RELEASE} ");
    let kernels = |line: &str| line.replace(&suite, &format!(" {} ", kernel.release())) + "\n";
    let more: String = match kernel.release() {
        RELEASE => String::new(),
        _ => sources.lines().filter(|line| line.contains(&suite)).map(kernels).collect(),
    };
    sources + &more
}

/// Picks the release, its updates and its security updates out of apt's list of index files.
fn release_sources(targets: &str) -> String {
    let mut lines: Vec<String> = targets
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [origin, codename, uri, release, component] = fields[..] else { return None };
            let ours = origin == "Debian" && codename.starts_with(RELEASE);
            ours.then(|| format!("deb {uri} {release} {component}\n"))
        })
        .collect();
    lines.sort();
    lines.dedup();
    lines.concat()
}

fn packages(recipe: &Recipe) -> Vec<String> {
    let lines = recipe.packages.lines();
    let names = lines.filter(|line| !line.starts_with('#') && !line.is_empty());
    let chosen = |name: &str| match name {
        KERNEL_PACKAGE => recipe.kernel.package(),
        name => name.to_owned(),
    };
    names.map(chosen).collect()
}

/// The hash of everything that the images are made from, except the packages' versions.
fn key(recipe: &Recipe) -> String {
    key_of(&(BUILDER_VERSION, RELEASE, recipe))
}

fn key_of(inputs: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    inputs.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn cache_folder() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .context("XDG_CACHE_HOME and HOME are not set: there is no folder for the lab's images")?;
    Ok(cache.join("polldisk/lab"))
}

fn check_host_programs() -> Result<()> {
    let folders: Vec<PathBuf> = env::split_paths(&search_path()).collect();
    let missing = missing_packages(|program| folders.iter().any(|dir| dir.join(program).exists()));
    if !missing.is_empty() {
        let missing = missing.join(" ");
        bail!("the lab needs programs that this host lacks: apt-get install {missing}");
    }
    Ok(())
}

/// The PATH for the host's programs. Debian keeps mkfs in a folder that only root's PATH has.
pub(crate) fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

fn missing_packages(has: impl Fn(&str) -> bool) -> Vec<&'static str> {
    HOST_PROGRAMS.iter().filter(|(program, _)| !has(program)).map(|(_, package)| *package).collect()
}

/// The last lines of a log, for an error.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_each_input() {
        let key = key_of(&(1, "bookworm", "fio"));
        assert_eq!(key.len(), 16);
        assert_eq!(key, key_of(&(1, "bookworm", "fio")));
        assert_ne!(key, key_of(&(2, "bookworm", "fio")));
        assert_ne!(key, key_of(&(1, "trixie", "fio")));
        assert_ne!(key, key_of(&(1, "bookworm", "fio\nkmod")));
    }

    #[test]
    fn only_the_releases_own_sources_are_taken() {
        let targets = "Debian bookworm-security uri-b bookworm-security main\n\
                       Debian bookworm uri-a bookworm main\n\
                       Debian bookworm uri-a bookworm main\n\
                       Debian trixie uri-a trixie main\n\
                       Other bookworm uri-c bookworm main\n";
        assert_eq!(
            release_sources(targets),
            "deb uri-a bookworm main\ndeb uri-b bookworm-security main\n"
        );
    }

    #[test]
    fn comments_are_not_packages() {
        assert!(packages(&MACHINE).iter().any(|package| package == "xen-utils-4.17"));
        assert!(packages(&PROGRAMS).iter().any(|package| package == "stress-ng"));
        for recipe in [MACHINE, PROGRAMS] {
            assert!(packages(&recipe).iter().all(|package| !package.contains(' ')));
        }
    }

    #[test]
    fn another_release_gives_nothing_but_its_kernel() {
        let with = |kernel| Recipe { kernel, ..MACHINE };
        let (bookworm, trixie) = (with(Kernel::Bookworm), with(Kernel::Trixie));
        let both = packages(&bookworm).into_iter().zip(packages(&trixie));
        let differing: Vec<_> = both.filter(|(old, new)| old != new).collect();
        let names = ("linux-image-amd64".to_owned(), "linux-image-amd64/trixie".to_owned());
        assert_eq!(differing, [names]);
        let sources = "deb uri-a bookworm main\ndeb uri-b bookworm-security main\n".to_owned();
        assert_eq!(with_kernels_release(sources.clone(), Kernel::Bookworm), sources);
        let more = with_kernels_release(sources.clone(), Kernel::Trixie);
        assert_eq!(more, sources + "deb uri-a trixie main\n");
        assert_ne!(key(&bookworm), key(&trixie));
    }

    #[test]
    fn a_missing_program_is_named_by_its_package() {
        assert_eq!(missing_packages(|program| program != "mkfs.ext4"), ["e2fsprogs"]);
    }
}
