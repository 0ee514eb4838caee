//! The programs that are measured, and their settings.
//!
//! Written as `polldisk`, `polldisk:workers=2`, `polldisk:beside=copies`, `qemu:iothread`,
//! `qemu:main-loop`, `qemu:iothread,buffered`, `qemu:iothread,native`, `qemu:iothread,io_uring`,
//! `fio`, `fio:registered` or `echo`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, bail, ensure};
use clap::ValueEnum;
use loadgen::options::NeighbourKind;
use serde::{Deserialize, Serialize};

use crate::load::{Load, Wait};

/// A program and its setting.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Contender {
    /// `polldisk serve` with this number of workers.
    Polldisk {
        /// 1 by default.
        workers: u32,
        /// What four more guests of the same polldisk do meanwhile.
        beside: Option<NeighbourKind>,
    },
    /// QEMU's xen-block.
    Qemu {
        /// The disk has its own thread; otherwise the main loop serves it.
        iothread: bool,
        /// How it reads and writes a file.
        files: Files,
    },
    /// fio with io_uring on the file itself, without a backend.
    Fio {
        /// With registered files and buffers, submitting and completing in batches.
        registered: bool,
    },
    /// A thread that polls the ring and answers every request without doing it: the most that the ring
    /// and two cores of this machine allow.
    Echo,
}

/// The programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Ours.
    Polldisk,
    /// QEMU.
    Qemu,
    /// fio.
    Fio,
    /// The ring alone.
    Echo,
}

/// How QEMU reads and writes a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Files {
    /// O_DIRECT, by a pool of threads.
    Threads,
    /// Through the page cache, by a pool of threads.
    Buffered,
    /// O_DIRECT, by Linux AIO, if QEMU was built with it.
    Native,
    /// O_DIRECT, by io_uring, if QEMU was built with it.
    IoUring,
}

impl Default for Contender {
    fn default() -> Contender {
        Contender::Polldisk { workers: 1, beside: None }
    }
}

impl Contender {
    /// Its program.
    pub fn kind(&self) -> Kind {
        match self {
            Contender::Polldisk { .. } => Kind::Polldisk,
            Contender::Qemu { .. } => Kind::Qemu,
            Contender::Fio { .. } => Kind::Fio,
            Contender::Echo => Kind::Echo,
        }
    }

    /// Whether a goal's text names its program, or exactly this contender.
    pub fn is(&self, name: &str) -> bool {
        self.kind().name() == name || self.to_string() == name
    }

    /// How many cores it may use under a load.
    pub fn cores(&self) -> u32 {
        match self {
            Contender::Polldisk { workers, .. } => *workers,
            _ => 1,
        }
    }

    /// What the neighbours do, if there are any.
    pub fn beside(&self) -> Option<NeighbourKind> {
        match self {
            Contender::Polldisk { beside, .. } => *beside,
            _ => None,
        }
    }
}

impl Kind {
    /// The word that a contender's text begins with.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Polldisk => "polldisk",
            Kind::Qemu => "qemu",
            Kind::Fio => "fio",
            Kind::Echo => "echo",
        }
    }
}

impl Files {
    const ALL: [Files; 4] = [Files::Threads, Files::Buffered, Files::Native, Files::IoUring];

    fn name(self) -> &'static str {
        match self {
            Files::Threads => "threads",
            Files::Buffered => "buffered",
            Files::Native => "native",
            Files::IoUring => "io_uring",
        }
    }

    /// The properties of QEMU's block device.
    fn properties(self) -> &'static str {
        match self {
            Files::Threads => "cache.direct=on,aio=threads",
            Files::Buffered => "cache.direct=off,aio=threads",
            Files::Native => "cache.direct=on,aio=native",
            Files::IoUring => "cache.direct=on,aio=io_uring",
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contender::Polldisk { workers, beside } => {
                let workers = (*workers != 1).then(|| format!("workers={workers}"));
                let beside = beside.map(|kind| format!("beside={}", neighbours_name(kind)));
                let settings: Vec<String> = workers.into_iter().chain(beside).collect();
                let separator = if settings.is_empty() { "" } else { ":" };
                write!(f, "polldisk{separator}{}", settings.join(","))
            }
            Contender::Qemu { iothread, files } => {
                write!(f, "qemu:{}", if *iothread { "iothread" } else { "main-loop" })?;
                match files {
                    Files::Threads => Ok(()),
                    files => write!(f, ",{}", files.name()),
                }
            }
            Contender::Fio { registered: false } => write!(f, "fio"),
            Contender::Fio { registered: true } => write!(f, "fio:registered"),
            Contender::Echo => write!(f, "echo"),
        }
    }
}

impl FromStr for Contender {
    type Err = Error;

    fn from_str(text: &str) -> Result<Contender, Error> {
        let unknown = || format!("{text}: no such setting");
        let (program, setting) = text.split_once(':').unwrap_or((text, ""));
        match (program, setting) {
            ("polldisk", "") => Ok(Contender::default()),
            ("polldisk", settings) => {
                let (mut workers, mut beside) = (None, None);
                for setting in settings.split(',') {
                    let (name, value) = setting.split_once('=').with_context(unknown)?;
                    let is_new = match name {
                        "workers" => {
                            workers.replace(value.parse().with_context(unknown)?).is_none()
                        }
                        "beside" => {
                            let kind = NeighbourKind::from_str(value, false).map_err(Error::msg);
                            beside.replace(kind.with_context(unknown)?).is_none()
                        }
                        _ => bail!(unknown()),
                    };
                    ensure!(is_new, "{text}: {name} is given twice");
                }
                Ok(Contender::Polldisk { workers: workers.unwrap_or(1), beside })
            }
            ("qemu", setting) => {
                let (thread, files) = setting.split_once(',').unwrap_or((setting, "threads"));
                let iothread = match thread {
                    "iothread" => true,
                    "main-loop" => false,
                    _ => bail!(unknown()),
                };
                let files = Files::ALL.into_iter().find(|kind| kind.name() == files);
                Ok(Contender::Qemu { iothread, files: files.with_context(unknown)? })
            }
            ("fio", "") => Ok(Contender::Fio { registered: false }),
            ("fio", "registered") => Ok(Contender::Fio { registered: true }),
            ("echo", "") => Ok(Contender::Echo),
            _ => bail!("{text}: no such contender; choose polldisk, qemu, fio or echo"),
        }
    }
}

impl TryFrom<String> for Contender {
    type Error = Error;

    fn try_from(text: String) -> Result<Contender, Error> {
        text.parse()
    }
}

impl From<Contender> for String {
    fn from(contender: Contender) -> String {
        contender.to_string()
    }
}

/// blkload's name for what neighbours do.
pub fn neighbours_name(kind: NeighbourKind) -> String {
    let value = kind.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What holds a disk: a file, or nothing but a size.
#[derive(Clone, Debug)]
pub struct Contents {
    /// The file.
    pub file: Option<String>,
    /// The size of the file, or of the disk if there is no file.
    pub bytes: u64,
}

/// polldisk's command line after `serve`, with a worker on each of these cores.
pub fn polldisk_arguments(cores: &str) -> Vec<String> {
    ["--cores", cores, "--admin", "{folder}/admin.sock"].map(str::to_owned).into()
}

/// polldisk's target for a disk.
pub fn polldisk_target(contents: &Contents) -> String {
    match &contents.file {
        None => format!("null:{}", contents.bytes),
        Some(file) => format!("raw:{file}"),
    }
}

/// QEMU's command line, for a disk of domain 1.
pub fn qemu_arguments(iothread: bool, files: Files, contents: &Contents) -> Vec<String> {
    // No option that reads a data file, such as -vnc: an unpacked QEMU would not find it.
    let fixed =
        "-machine xenpv -xen-attach -xen-domid 1 -nodefaults -no-user-config -nographic -m 512";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    let mut device = "xen-disk,drive=n0,vdev=xvda".to_owned();
    if iothread {
        arguments.extend(["-object", "iothread,id=io0"].map(str::to_owned));
        device.push_str(",iothread=io0");
    }
    let drive = match &contents.file {
        // Reads leave the buffer as it is, so QEMU does not spend time on zeroing it.
        None => format!("driver=null-co,node-name=n0,size={},read-zeroes=off", contents.bytes),
        Some(file) => format!("driver=file,node-name=n0,filename={file},{}", files.properties()),
    };
    arguments.extend(["-blockdev".to_owned(), drive, "-device".to_owned(), device]);
    arguments
}

/// fio's command line, for a run of `seconds`.
pub fn fio_arguments(registered: bool, load: &Load, file: &str, seconds: f64) -> Vec<String> {
    let way = match (load.read, load.sequential) {
        (0, false) => "randwrite",
        (0, true) => "write",
        (_, false) => "randread",
        (_, true) => "read",
    };
    let mut arguments = vec![
        format!("--filename={file}"),
        format!("--rw={way}"),
        format!("--bs={}k", load.block_kib),
        format!("--iodepth={}", load.depth),
        format!("--runtime={}ms", (seconds * 1e3).round()),
    ];
    let fixed = "--name=limit --ioengine=io_uring --direct=1 --thread --time_based --norandommap \
                 --randrepeat=0 --lat_percentiles=1 --clat_percentiles=0 --slat_percentiles=0 \
                 --output-format=json";
    arguments.extend(fixed.split(' ').map(str::to_owned));
    let percentiles = "1:5:10:20:30:40:50:60:70:80:90:95:98:99:99.5:99.9:99.99";
    arguments.push(format!("--percentile_list={percentiles}"));
    if registered {
        let batch = (load.depth / 2).max(1);
        arguments.extend(["--registerfiles=1", "--fixedbufs=1"].map(str::to_owned));
        arguments.push(format!("--iodepth_batch_submit={batch}"));
        arguments.push(format!("--iodepth_batch_complete_max={}", load.depth));
    }
    arguments
}

/// Appended to [`fio_arguments`]: makes fio end after one request.
pub const FIO_ONE_REQUEST: [&str; 2] = ["--time_based=0", "--number_ios=1"];

/// Most guests. The stand-in needs longer to end each of them the more there are: a thousand take
/// minutes.
const GUESTS_MAX: u32 = 100;

/// blkload's options for a load.
pub fn blkload_arguments(load: &Load) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    option("--read", load.read.to_string());
    option("--block-size", format!("{}K", load.block_kib));
    option("--depth", load.depth.to_string());
    option("--disks", load.disks.to_string());
    option("--domains", load.disks.min(GUESTS_MAX).to_string());
    let wait = match load.wait {
        Wait::Busy => "busy",
        Wait::Block => "block",
    };
    option("--wait", wait.to_owned());
    for (is_set, flag) in [(load.sequential, "--sequential"), (load.idle, "--idle")] {
        if is_set {
            arguments.push(flag.to_owned());
        }
    }
    arguments
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn texts_are_read_as_they_are_written() {
        for text in [
            "polldisk",
            "polldisk:workers=2",
            "polldisk:beside=copies",
            "polldisk:workers=2,beside=worst",
            "qemu:iothread",
            "qemu:main-loop",
            "qemu:iothread,buffered",
            "qemu:main-loop,native",
            "fio",
            "fio:registered",
            "echo",
        ] {
            assert_eq!(text.parse::<Contender>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "qemu",
            "qemu:iothread,x",
            "polldisk:workers=x",
            "polldisk:beside=nobody",
            "polldisk:workers=2,workers=3",
            "polldisk:workers=2,",
            "fio:x",
            "echo:x",
            "tapdisk",
        ] {
            assert!(text.parse::<Contender>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_goal_means_a_program_or_one_setting_of_it() {
        let contender: Contender = "qemu:main-loop".parse().unwrap();
        assert!(contender.is("qemu") && contender.is("qemu:main-loop"));
        assert!(!contender.is("qemu:iothread") && !contender.is("fio"));
    }

    #[test]
    fn qemu_is_told_its_setting() {
        let contents = Contents { file: Some("/x.img".to_owned()), bytes: 0 };
        let line = qemu_arguments(true, Files::IoUring, &contents).join(" ");
        assert!(line.ends_with(
            "-object iothread,id=io0 -blockdev driver=file,node-name=n0,filename=/x.img,\
             cache.direct=on,aio=io_uring -device xen-disk,drive=n0,vdev=xvda,iothread=io0"
        ));
        let nothing = Contents { file: None, bytes: 4096 };
        let line = qemu_arguments(false, Files::Threads, &nothing).join(" ");
        assert!(line.contains("null-co,node-name=n0,size=4096,read-zeroes=off"), "{line}");
        assert!(!line.contains("iothread"), "{line}");
        assert!(!line.contains("-vnc"), "even `-vnc none` reads a keymap: {line}");
    }

    #[test]
    fn fio_does_what_the_load_says() {
        let load = Load { read: 0, depth: 8, ..Load::default() };
        let line = fio_arguments(true, &load, "/x.img", 1.5).join(" ");
        for part in ["--rw=randwrite", "--iodepth=8 ", "--runtime=1500ms", "_batch_submit=4"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
}
