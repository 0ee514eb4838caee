//! How a disk's contents are named: `raw:/path`, `null:SIZE`, or a bare absolute path, with options before
//! the colon, as in `raw,data-path=copy:/path`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::{Access, Backing, BackingError, Image, NullImage, RawImage};
use crate::units::{Bytes, SECTOR_BYTES};

/// A target that has been parsed but not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// What holds the contents.
    pub contents: Contents,
    /// How the disk is served.
    pub options: DiskOptions,
}

/// What holds a disk's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents {
    /// `raw:/path`, or `/path`: a file or a block device, byte for byte.
    Raw(PathBuf),
    /// `null:SIZE` or `null:SIZE,read-zeroes`: no contents, only a size.
    Null {
        /// The size it claims to have; a multiple of 512.
        size: Bytes,
        /// Reads fill the buffer with zeroes.
        read_zeroes: bool,
    },
}

/// The options before the colon, the same for every backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// `data-path=auto|map|copy`; `None`: the daemon's setting.
    pub data_path: Option<DataPath>,
    /// `emulate-512`: the guest sees 512-byte sectors, whatever size storage needs.
    pub emulate_512: bool,
    /// `shareable`: others may write at the same time, if they are shareable too.
    pub shareable: bool,
    /// `direct=auto|required`: whether it may be served through the page cache.
    pub direct: Direct,
}

/// Whether I/O bypasses the page cache (O_DIRECT).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// If the filesystem supports it.
    #[default]
    Auto,
    /// Always: files on a filesystem without it are refused.
    Required,
}

/// How data gets from the guest's pages to storage and back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataPath {
    /// Pages stay mapped if the frontend keeps them granted, else data is copied
    #[default]
    Auto,
    /// As auto, but instead of copying, the pages of large requests are mapped until they are answered
    Map,
    /// Data is always copied
    Copy,
}

impl Spec {
    /// Opens the contents. May take any time, as storage may hang.
    pub fn open(&self, access: &Access) -> Result<Backing, BackingError> {
        let (image, discard, warnings) = match &self.contents {
            Contents::Raw(path) => {
                let opened = RawImage::open(path, self.options, access)?;
                (Image::Raw(opened.image), opened.discard, opened.warnings)
            }
            Contents::Null { size, read_zeroes } => {
                let image = Image::Null(NullImage::new(*size, *read_zeroes));
                (image, Some(NullImage::DISCARD), Vec::new())
            }
        };
        Ok(Backing { image: Arc::new(image), discard, warnings, options: self.options })
    }
}

impl FromStr for Spec {
    type Err = BackingError;

    fn from_str(target: &str) -> Result<Self, BackingError> {
        if target.starts_with('/') {
            let contents = raw(target).map_err(|what| bad(target, &what))?;
            return Ok(Spec { contents, options: DiskOptions::default() });
        }
        let Some((head, rest)) = target.split_once(':') else {
            return Err(bad(target, "it is neither a backing nor an absolute path"));
        };
        let (kind, options) = match head.split_once(',') {
            None => (head, None),
            Some((kind, options)) => (kind, Some(options)),
        };
        let contents = match kind {
            "raw" => raw(rest),
            "null" => null(rest),
            _ => Err(format!("polldisk has no backing \"{kind}\"")),
        };
        let contents = contents.map_err(|what| bad(target, &what))?;
        let options = options.map_or(Ok(DiskOptions::default()), str::parse);
        Ok(Spec { contents, options: options.map_err(|what| bad_option(target, &what))? })
    }
}

fn raw(path: &str) -> Result<Contents, String> {
    if !path.starts_with('/') {
        return Err(format!("the path \"{path}\" is not absolute"));
    }
    if path.contains('\0') {
        return Err("the path holds a NUL byte".to_owned());
    }
    Ok(Contents::Raw(PathBuf::from(path)))
}

fn null(shape: &str) -> Result<Contents, String> {
    let (size, read_zeroes) = match shape.split_once(',') {
        None => (shape, false),
        Some((size, "read-zeroes")) => (size, true),
        Some((_, option)) => return Err(format!("\"{option}\" is not an option of null")),
    };
    let size: Bytes = size.parse().map_err(|error| format!("{error}"))?;
    if size.0 == 0 || !size.0.is_multiple_of(SECTOR_BYTES) {
        return Err(format!("{size} is not a positive multiple of 512 bytes"));
    }
    Ok(Contents::Null { size, read_zeroes })
}

/// All options, for the error about an unknown one.
const OPTIONS: &str =
    "data-path=auto, map or copy, direct=auto or required, emulate-512 or shareable";

impl FromStr for DiskOptions {
    /// What is wrong, with the option's name.
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let mut options = DiskOptions::default();
        let mut names = Vec::new();
        for option in list.split(',') {
            let (name, value) = match option.split_once('=') {
                None => (option, None),
                Some((name, value)) => (name, Some(value)),
            };
            if names.contains(&name) {
                return Err(format!("the option \"{name}\" is given twice"));
            }
            names.push(name);
            match (name, value) {
                ("data-path", Some(value)) => options.data_path = Some(value.parse()?),
                ("direct", Some("auto")) => options.direct = Direct::Auto,
                ("direct", Some("required")) => options.direct = Direct::Required,
                ("emulate-512", None) => options.emulate_512 = true,
                ("shareable", None) => options.shareable = true,
                ("", None) => return Err("an option is empty".to_owned()),
                _ => return Err(format!("there is no option \"{option}\"")),
            }
        }
        Ok(options)
    }
}

impl FromStr for DataPath {
    /// What is wrong.
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [DataPath::Auto, DataPath::Map, DataPath::Copy]
            .into_iter()
            .find(|path| path.to_string() == name)
            .ok_or_else(|| format!("the option data-path can't be \"{name}\""))
    }
}

fn bad(target: &str, what: &str) -> BackingError {
    let remedy = "write raw:/path/to/file-or-device, a bare absolute path, or null:SIZE";
    BackingError::new(target, what, remedy, None)
}

fn bad_option(target: &str, what: &str) -> BackingError {
    let remedy = format!("give {OPTIONS}, as in raw,data-path=copy:/path");
    BackingError::new(target, what, &remedy, None)
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spec { contents, options } = self;
        match contents {
            Contents::Raw(path) => write!(f, "raw{options}:{}", path.display()),
            Contents::Null { size, read_zeroes } => {
                let read_zeroes = if *read_zeroes { ",read-zeroes" } else { "" };
                write!(f, "null{options}:{}{read_zeroes}", size.0)
            }
        }
    }
}

/// As written after the backing's name, each with its comma.
impl fmt::Display for DiskOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DiskOptions { data_path, emulate_512, shareable, direct } = *self;
        data_path.iter().try_for_each(|path| write!(f, ",data-path={path}"))?;
        let flags = [
            (direct == Direct::Required, ",direct=required"),
            (emulate_512, ",emulate-512"),
            (shareable, ",shareable"),
        ];
        flags.iter().filter(|(is_set, _)| *is_set).try_for_each(|(_, text)| f.write_str(text))
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DataPath::Auto => "auto",
            DataPath::Map => "map",
            DataPath::Copy => "copy",
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn targets_are_parsed_and_print_as_they_can_be_written() {
        for (text, printed) in [
            ("raw:/srv/a:b.img", "raw:/srv/a:b.img"),
            ("/dev/nvme0n1", "raw:/dev/nvme0n1"),
            ("/srv/a,b:c", "raw:/srv/a,b:c"),
            ("null:8G", "null:8589934592"),
            ("null:1M,read-zeroes", "null:1048576,read-zeroes"),
            ("raw,data-path=copy:/srv/a,b:c", "raw,data-path=copy:/srv/a,b:c"),
            ("raw,data-path=auto:/a", "raw,data-path=auto:/a"),
            ("raw,emulate-512,data-path=map:/a", "raw,data-path=map,emulate-512:/a"),
            ("raw,shareable,direct=required:/a", "raw,direct=required,shareable:/a"),
            ("raw,direct=auto:/a", "raw:/a"),
            ("null,data-path=map:1M,read-zeroes", "null,data-path=map:1048576,read-zeroes"),
        ] {
            let spec: Spec = text.parse().unwrap();
            assert_eq!(spec.to_string(), printed);
            assert_eq!(printed.parse::<Spec>().unwrap(), spec);
        }
    }

    #[test]
    fn options_are_of_the_disk_whatever_holds_it() {
        for (text, data_path) in [
            ("raw:/a", None),
            ("raw,data-path=auto:/a", Some(DataPath::Auto)),
            ("raw,data-path=map:/a", Some(DataPath::Map)),
            ("null,data-path=copy:8G", Some(DataPath::Copy)),
        ] {
            let options = DiskOptions { data_path, ..DiskOptions::default() };
            assert_eq!(text.parse::<Spec>().unwrap().options, options);
            let text = text.replacen(':', ",emulate-512,shareable:", 1);
            let options = DiskOptions { emulate_512: true, shareable: true, ..options };
            assert_eq!(text.parse::<Spec>().unwrap().options, options);
        }
    }

    #[test]
    fn a_bad_target_is_named_with_what_would_be_right() {
        for text in
            ["", "disk.img", "raw:disk.img", "qcow2:/a", "null:", "null:100", "null:1G,x", ",a:/b"]
        {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text}: ")), "{error}");
            assert!(error.contains("write raw:/path"), "{error}");
        }
    }

    #[test]
    fn a_bad_option_is_named_with_those_that_there_are() {
        for (text, what) in [
            ("raw,:/a", "an option is empty"),
            ("raw,data-path=map,:/a", "an option is empty"),
            ("raw,data-path=map,data-path=map:/a", "the option \"data-path\" is given twice"),
            ("raw,data-path:/a", "there is no option \"data-path\""),
            ("raw,data-path=:/a", "the option data-path can't be \"\""),
            ("raw,data-path=mop:/a", "the option data-path can't be \"mop\""),
            ("raw,emulate-512=1:/a", "there is no option \"emulate-512=1\""),
            ("raw,emulate-512,emulate-512:/a", "the option \"emulate-512\" is given twice"),
            ("raw,shareable=1:/a", "there is no option \"shareable=1\""),
            ("raw,direct:/a", "there is no option \"direct\""),
            ("raw,direct=never:/a", "there is no option \"direct=never\""),
            ("raw,fast:/a", "there is no option \"fast\""),
            ("raw,fast=1:/a", "there is no option \"fast=1\""),
            ("null,=:1G", "there is no option \"=\""),
        ] {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{text}: {what}; give data-path=auto, ")),
                "{error}"
            );
        }
    }
}
