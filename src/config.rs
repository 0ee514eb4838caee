//! Command line and configuration file, checked together into one [`Config`].
//!
//! The command line overrides the file, which overrides the defaults. Every error names the option and a
//! valid value.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use crate::backing::DataPath;
use crate::blkif::features::Offer;
use crate::limits;
use crate::patience::Policy;
use crate::text::ranges;

/// Where `polldisk serve` listens for the other commands by default.
pub const ADMIN_SOCKET: &str = "/run/polldisk/admin.sock";

/// Options of `polldisk serve`, unchecked: from the command line, or from keys of the TOML file.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ServeOptions {
    /// Worker threads that serve rings [default: one per core of --cores, else half of the host's
    /// cores]
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,

    /// Cores to pin the workers to, such as 2-5,8; keep guests' vCPUs off them [default: unpinned]
    #[arg(long, value_name = "LIST")]
    pub cores: Option<String>,

    /// When a worker without work polls before it sleeps [default: latency]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub poll: Option<Poll>,

    /// Instead of --poll: longest time in microseconds that a worker polls without work before it sleeps, or twice that while
    /// requests are in flight at storage; 0: never poll
    #[arg(long, value_name = "N")]
    pub poll_us: Option<u64>,

    /// Kind of xenstore areas to serve, backend/TYPE/...; may be given several times
    /// [default: vbd]
    #[arg(long = "backend-type", value_name = "TYPE")]
    pub backend_type: Vec<String>,

    /// Largest ring offered, as the log2 of its 4 KiB pages: 0 to 5 [default: 4]
    #[arg(long, value_name = "N")]
    pub max_ring_page_order: Option<u32>,

    /// Most rings of one disk; they are spread over the workers [default: as many as workers]
    #[arg(long, value_name = "N")]
    pub max_queues: Option<u16>,

    /// Most 4 KiB segments of an indirect request: 0 (no indirect requests) to 1024 [default: 256]
    #[arg(long, value_name = "N")]
    pub max_indirect_segments: Option<u16>,

    /// How guests' data gets to storage, unless a disk's target says otherwise [default: auto]
    #[arg(long, value_name = "PATH", value_enum)]
    pub data_path: Option<DataPath>,

    /// Socket for all other commands [default: /run/polldisk/admin.sock]
    #[arg(long, value_name = "PATH")]
    pub admin: Option<PathBuf>,

    /// What to log: error, warn, info, debug, trace, or a filter such as polldisk::control=debug
    /// [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<String>,
}

/// When a worker without work polls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Poll {
    /// If that is expected to cost less CPU time than to sleep and to be woken; slower for guests that wait for
    /// each answer
    Auto,
    /// If work usually comes within 50 us: --poll-us 50
    Latency,
    /// Never: --poll-us 0
    Never,
}

impl fmt::Display for Poll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Poll::Auto => "auto",
            Poll::Latency => "latency",
            Poll::Never => "never",
        })
    }
}

/// The checked options of `polldisk serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// One entry per worker: the core that it is pinned to, if any.
    pub workers: Vec<Option<usize>>,
    /// When workers without work poll.
    pub poll: Policy,
    /// What frontends are offered.
    pub offer: Offer,
    /// `backend/<type>` areas served.
    pub backend_types: Vec<String>,
    /// The admin socket.
    pub admin: PathBuf,
    /// Log filter.
    pub log: String,
}

/// An option that is not valid.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {what}; {remedy}")]
pub struct ConfigError {
    /// The option, or the file.
    pub option: String,
    /// What is wrong with it.
    pub what: String,
    /// What to do instead.
    pub remedy: String,
}

impl ServeOptions {
    /// Reads the options of a TOML file.
    pub fn from_file(path: &Path) -> Result<ServeOptions, ConfigError> {
        let fail = |what: String, remedy: &str| ConfigError {
            option: format!("--config {}", path.display()),
            what,
            remedy: remedy.to_owned(),
        };
        let text = read_bounded(path)
            .map_err(|error| fail(error.to_string(), "name a readable TOML file"))?;
        toml::from_str(&text).map_err(|error| {
            let line = text.get(..error.span().unwrap_or_default().start).map_or(1, line_of_end);
            let known = "the keys are the long options without their dashes";
            fail(format!("line {line}: {}", error.message()), known)
        })
    }

    /// These options; those that are not set come from `file`.
    #[must_use]
    pub fn or(self, file: ServeOptions) -> ServeOptions {
        // Two options for one thing: either here replaces both there.
        let (poll, poll_us) = match (self.poll, self.poll_us) {
            (None, None) => (file.poll, file.poll_us),
            ours => ours,
        };
        ServeOptions {
            workers: self.workers.or(file.workers),
            cores: self.cores.or(file.cores),
            poll,
            poll_us,
            backend_type: if self.backend_type.is_empty() {
                file.backend_type
            } else {
                self.backend_type
            },
            max_ring_page_order: self.max_ring_page_order.or(file.max_ring_page_order),
            max_queues: self.max_queues.or(file.max_queues),
            max_indirect_segments: self.max_indirect_segments.or(file.max_indirect_segments),
            data_path: self.data_path.or(file.data_path),
            admin: self.admin.or(file.admin),
            log: self.log.or(file.log),
        }
    }

    /// Checks everything for a host on which the cores `available` can be used.
    pub fn check(self, available: &[usize]) -> Result<Config, ConfigError> {
        let workers = place_workers(self.workers, self.cores.as_deref(), available)?;
        let offer = self.check_offer(workers.len())?;
        let backend_types = match self.backend_type {
            types if types.is_empty() => vec!["vbd".to_owned()],
            types => types,
        };
        for (index, backend_type) in backend_types.iter().enumerate() {
            check_backend_type(backend_type)?;
            if backend_types[..index].contains(backend_type) {
                return Err(ConfigError {
                    option: format!("--backend-type {backend_type}"),
                    what: "it is named twice".to_owned(),
                    remedy: "name each type once".to_owned(),
                });
            }
        }
        Ok(Config {
            workers,
            poll: check_poll(self.poll, self.poll_us)?,
            offer,
            backend_types,
            admin: check_admin(self.admin)?,
            log: self.log.unwrap_or_else(|| "info".to_owned()),
        })
    }

    fn check_offer(&self, workers: usize) -> Result<Offer, ConfigError> {
        let order = self.max_ring_page_order.unwrap_or(limits::RING_PAGE_ORDER_DEFAULT);
        let queues = self.max_queues.unwrap_or_else(|| {
            u16::try_from(workers).map_or(limits::QUEUES_PER_DISK_MAX, |workers| {
                workers.min(limits::QUEUES_PER_DISK_MAX)
            })
        });
        let segments = self.max_indirect_segments.unwrap_or(limits::INDIRECT_SEGMENTS_DEFAULT);
        check_range(
            "--max-ring-page-order",
            order,
            0..=limits::RING_PAGE_ORDER_MAX,
            "no frontend has rings of this size",
        )?;
        check_range(
            "--max-queues",
            queues,
            1..=limits::QUEUES_PER_DISK_MAX,
            "this is not a sensible number of rings",
        )?;
        check_range(
            "--max-indirect-segments",
            segments,
            0..=limits::INDIRECT_SEGMENTS_MAX,
            "the host can't read or write more segments at once",
        )?;
        Ok(Offer {
            ring_page_order: order,
            queues,
            indirect_segments: segments,
            data_path: self.data_path.unwrap_or_default(),
            ..Offer::default()
        })
    }
}

/// Reads a text file of at most `CONFIG_BYTES_MAX` bytes.
fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(limits::CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > limits::CONFIG_BYTES_MAX {
        let long = format!("it has more than {} bytes", limits::CONFIG_BYTES_MAX);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, long));
    }
    Ok(text)
}

/// The number of the line in which a text ends, from 1.
fn line_of_end(text: &str) -> usize {
    1 + text.matches('\n').count()
}

/// Checks that a number is in the range of its option.
fn check_range<N: PartialOrd + std::fmt::Display>(
    option: &str,
    value: N,
    range: std::ops::RangeInclusive<N>,
    why: &str,
) -> Result<(), ConfigError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(ConfigError {
        option: format!("{option} {value}"),
        what: why.to_owned(),
        remedy: format!("give {} to {}", range.start(), range.end()),
    })
}

/// The core of each of `workers` workers, taken from `cores` if those are given.
fn place_workers(
    workers: Option<usize>,
    cores: Option<&str>,
    available: &[usize],
) -> Result<Vec<Option<usize>>, ConfigError> {
    let bad_count = |what: String, remedy: String| ConfigError {
        option: format!("--workers {}", workers.unwrap_or_default()),
        what,
        remedy,
    };
    if workers.is_some_and(|count| count == 0 || count > limits::WORKERS_MAX) {
        let remedy = format!("give 1 to {}", limits::WORKERS_MAX);
        return Err(bad_count("this is not a sensible number of threads".to_owned(), remedy));
    }
    let Some(list) = cores else {
        let count = workers.unwrap_or((available.len() / 2).max(1));
        return Ok(vec![None; count]);
    };
    let cores = parse_cores(list)?;
    if let Some(missing) = cores.iter().find(|core| !available.contains(core)) {
        return Err(ConfigError {
            option: format!("--cores {list}"),
            what: format!("this process can't use core {missing}"),
            remedy: format!("choose from {}", ranges(available)),
        });
    }
    let count = workers.unwrap_or(cores.len());
    if count > cores.len() {
        let what = format!("--cores {list} names only {} cores", cores.len());
        let remedy = "two polling workers on one core slow each other down: give each its own core";
        return Err(bad_count(what, remedy.to_owned()));
    }
    Ok(cores.into_iter().take(count).map(Some).collect())
}

/// Parses a list of cores such as `2-5,8`, in the order given.
pub fn parse_cores(list: &str) -> Result<Vec<usize>, ConfigError> {
    let bad = |what: String| ConfigError {
        option: format!("--cores {list}"),
        what,
        remedy: "write numbers and ranges, such as 2-5,8".to_owned(),
    };
    let number = |text: &str| {
        text.parse::<usize>()
            .ok()
            .filter(|core| *core < 4096)
            .ok_or_else(|| bad(format!("\"{text}\" is not a core number")))
    };
    let mut cores = Vec::new();
    for part in list.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(bad(format!("the range {part} runs backwards")));
        }
        for core in first..=last {
            if cores.contains(&core) {
                return Err(bad(format!("core {core} is named twice")));
            }
            cores.push(core);
        }
    }
    Ok(cores)
}

/// The longest poll that makes sense: more than a second is busy waiting.
const POLL_US_MAX: u64 = 1_000_000;
const POLL_US_DEFAULT: u64 = 50;

fn check_poll(poll: Option<Poll>, poll_us: Option<u64>) -> Result<Policy, ConfigError> {
    let poll_us = match (poll, poll_us) {
        (Some(poll), Some(poll_us)) => {
            return Err(ConfigError {
                option: format!("--poll-us {poll_us}"),
                what: format!("--poll {poll} already says when workers poll"),
                remedy: "give one of the two".to_owned(),
            });
        }
        (Some(Poll::Auto), None) => return Ok(Policy::Auto),
        (Some(Poll::Never), None) => 0,
        (Some(Poll::Latency), None) => POLL_US_DEFAULT,
        (None, poll_us) => poll_us.unwrap_or(POLL_US_DEFAULT),
    };
    if poll_us > POLL_US_MAX {
        return Err(ConfigError {
            option: format!("--poll-us {poll_us}"),
            what: "a worker would burn its core".to_owned(),
            remedy: format!("give 0 to {POLL_US_MAX}; {POLL_US_DEFAULT} suits most hosts"),
        });
    }
    Ok(Policy::UpTo(Duration::from_micros(poll_us)))
}

fn check_admin(path: Option<PathBuf>) -> Result<PathBuf, ConfigError> {
    let path = path.unwrap_or_else(|| ADMIN_SOCKET.into());
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.contains(&0) || bytes.ends_with(b"/") {
        return Err(ConfigError {
            option: format!("--admin \"{}\"", path.display()),
            what: "a socket can't have this path".to_owned(),
            remedy: format!("give a path such as {ADMIN_SOCKET}"),
        });
    }
    Ok(path)
}

fn check_backend_type(name: &str) -> Result<(), ConfigError> {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if name.is_empty() || !plain || name.len() > 32 {
        return Err(ConfigError {
            option: format!("--backend-type {name}"),
            what: "it is not the name of a xenstore area".to_owned(),
            remedy: "give vbd, or the name that your toolstack writes under backend/".to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    fn options(edit: impl FnOnce(&mut ServeOptions)) -> ServeOptions {
        let mut options = ServeOptions::default();
        edit(&mut options);
        options
    }

    #[test]
    fn defaults_leave_half_of_the_host_to_others() {
        let config = ServeOptions::default().check(&[0, 1, 2, 3]).unwrap();
        assert_eq!(config.workers, [None, None]);
        assert_eq!(config.poll, Policy::UpTo(Duration::from_micros(50)));
        assert_eq!(config.backend_types, ["vbd"]);
        assert_eq!(config.admin, Path::new(ADMIN_SOCKET));
    }

    #[test]
    fn one_of_two_options_says_when_workers_poll() {
        let policy = |poll, poll_us| {
            let set = options(|options| (options.poll, options.poll_us) = (poll, poll_us));
            set.check(&[0]).map(|config| config.poll)
        };
        let up_to = |limit_us| Policy::UpTo(Duration::from_micros(limit_us));
        assert_eq!(policy(Some(Poll::Auto), None).unwrap(), Policy::Auto);
        assert_eq!(policy(Some(Poll::Latency), None).unwrap(), up_to(50));
        assert_eq!(policy(Some(Poll::Never), None).unwrap(), up_to(0));
        assert_eq!(policy(None, Some(7)).unwrap(), up_to(7));
        let error = policy(Some(Poll::Auto), Some(7)).unwrap_err().to_string();
        assert!(error.starts_with("--poll-us 7: --poll auto already says"), "{error}");
        let file = options(|options| options.poll_us = Some(7));
        let config = options(|options| options.poll = Some(Poll::Auto)).or(file).check(&[0]);
        assert_eq!(
            config.unwrap().poll,
            Policy::Auto,
            "the command line replaces both of the file"
        );
    }

    #[test]
    fn a_worker_gets_a_core_of_its_own() {
        let pinned = options(|options| options.cores = Some("2-3,0".to_owned()));
        assert_eq!(
            pinned.clone().check(&[0, 1, 2, 3]).unwrap().workers,
            [Some(2), Some(3), Some(0)]
        );
        let too_many = options(|options| options.workers = Some(4)).or(pinned);
        let error = too_many.check(&[0, 1, 2, 3]).unwrap_err().to_string();
        assert!(error.starts_with("--workers 4: --cores 2-3,0 names only 3 cores;"), "{error}");
    }

    #[test]
    fn bad_options_are_named_with_what_would_be_right() {
        let cases: [(ServeOptions, &str); 15] = [
            (options(|options| options.workers = Some(0)), "--workers 0: "),
            (options(|options| options.cores = Some("4-2".to_owned())), "--cores 4-2: "),
            (options(|options| options.cores = Some("x".to_owned())), "--cores x: "),
            (options(|options| options.cores = Some("1,1".to_owned())), "--cores 1,1: "),
            (options(|options| options.cores = Some("9".to_owned())), "--cores 9: this process"),
            (options(|options| options.poll_us = Some(9_000_000)), "--poll-us 9000000: "),
            (options(|options| options.max_ring_page_order = Some(6)), "--max-ring-page-order 6: "),
            (options(|options| options.max_queues = Some(0)), "--max-queues 0: "),
            (options(|options| options.max_queues = Some(257)), "--max-queues 257: "),
            (
                options(|options| options.max_indirect_segments = Some(1025)),
                "--max-indirect-segments 1025: ",
            ),
            (options(|options| options.backend_type = vec!["a/b".to_owned()]), "--backend-type"),
            (
                options(|options| options.backend_type = vec!["vbd".to_owned(); 2]),
                "--backend-type vbd: it is named twice",
            ),
            (options(|options| options.admin = Some("".into())), "--admin \"\": "),
            (options(|options| options.admin = Some("/run/".into())), "--admin \"/run/\": "),
            (options(|options| options.admin = Some("/a\0b".into())), "--admin "),
        ];
        for (options, start) in cases {
            let error = options.check(&[0, 1]).unwrap_err().to_string();
            assert!(error.starts_with(start) && error.contains("; "), "{error}");
        }
    }

    #[test]
    fn features_are_what_the_workers_can_keep_unless_limited() {
        let config = options(|options| options.workers = Some(3)).check(&[0, 1]).unwrap();
        let offered = Offer {
            ring_page_order: 4,
            queues: 3,
            indirect_segments: 256,
            data_path: DataPath::Auto,
            ..Offer::default()
        };
        assert_eq!(config.offer, offered);
        let text = "max-ring-page-order = 0\nmax-queues = 1\nmax-indirect-segments = 0\n\
                    data-path = \"copy\"\n";
        let file: ServeOptions = toml::from_str(text).unwrap();
        let config = options(|options| options.max_queues = Some(2)).or(file).check(&[0]).unwrap();
        let offered = Offer {
            ring_page_order: 0,
            queues: 2,
            indirect_segments: 0,
            data_path: DataPath::Copy,
            ..Offer::default()
        };
        assert_eq!(config.offer, offered);
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("polldisk.toml");
        std::fs::write(&path, "workers = 3\npoll-us = 7\nbackend-type = [\"vbd\", \"vbd3\"]\n")
            .unwrap();
        let file = ServeOptions::from_file(&path).unwrap();
        let config = options(|options| options.workers = Some(1)).or(file).check(&[0, 1]).unwrap();
        assert_eq!(config.workers.len(), 1);
        assert_eq!(config.poll, Policy::UpTo(Duration::from_micros(7)));
        assert_eq!(config.backend_types, ["vbd", "vbd3"]);

        std::fs::write(&path, "worker = 3\n").unwrap();
        let error = ServeOptions::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("unknown field `worker`"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_configuration_is_told_on_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("polldisk.toml");
        let refusal = |contents: &[u8]| {
            std::fs::write(&path, contents).unwrap();
            ServeOptions::from_file(&path).unwrap_err().to_string()
        };
        for (contents, told) in [
            (&b"workers = 1\nwrokers = 2\n"[..], "line 2: unknown field `wrokers`"),
            (b"\n\nworkers = \"many\"", "line 3: "),
            (b"\xff\xfe\x00", "TOML"),
            (b"workers", "line 1: "),
            (&[b' '; 1 << 20], "more than 65536 bytes"),
        ] {
            let refusal = refusal(contents);
            assert!(refusal.contains(told) && !refusal.contains('\n'), "{refusal}");
            assert!(refusal.contains(path.to_str().unwrap()), "{refusal}");
        }
        for endless in ["/dev/zero", "/"] {
            assert!(ServeOptions::from_file(Path::new(endless)).is_err());
        }
        std::fs::write(&path, "").unwrap();
        assert!(ServeOptions::from_file(&path).is_ok());
    }
}
