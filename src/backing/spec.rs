//! How a disk's contents are named: `raw:/path`, `null:SIZE`, or a bare absolute path.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{BackingError, Image, NullImage, RawImage};
use crate::units::{Bytes, SECTOR_BYTES};

/// A target, parsed and not yet opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// `raw:/path`, or `/path`: a file or a block device, byte for byte.
    Raw(PathBuf),
    /// `null:SIZE` or `null:SIZE,read-zeroes`: nothing, of that size.
    Null {
        /// Bytes it claims to hold; a multiple of 512.
        size: Bytes,
        /// Reads fill the buffer with zeroes.
        read_zeroes: bool,
    },
}

impl Spec {
    /// Opens what it names. Never waits for a network.
    pub fn open(&self, read_only: bool) -> Result<Image, BackingError> {
        match self {
            Spec::Raw(path) => RawImage::open(path, read_only).map(Image::Raw),
            Spec::Null { size, read_zeroes } => {
                Ok(Image::Null(NullImage::new(*size, *read_zeroes)))
            }
        }
    }
}

impl FromStr for Spec {
    type Err = BackingError;

    fn from_str(target: &str) -> Result<Self, BackingError> {
        match target.split_once(':') {
            Some(("raw", path)) => raw(target, path),
            Some(("null", shape)) => null(target, shape),
            _ if target.starts_with('/') => raw(target, target),
            Some((scheme, _)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                Err(bad(target, format!("polldisk has no backing \"{scheme}\"")))
            }
            _ => Err(bad(target, "it is neither a backing nor an absolute path".to_owned())),
        }
    }
}

fn raw(target: &str, path: &str) -> Result<Spec, BackingError> {
    if !path.starts_with('/') {
        return Err(bad(target, format!("the path \"{path}\" is not absolute")));
    }
    if path.contains('\0') {
        return Err(bad(target, "the path holds a NUL byte".to_owned()));
    }
    Ok(Spec::Raw(PathBuf::from(path)))
}

fn null(target: &str, shape: &str) -> Result<Spec, BackingError> {
    let (size, read_zeroes) = match shape.split_once(',') {
        None => (shape, false),
        Some((size, "read-zeroes")) => (size, true),
        Some((_, option)) => {
            return Err(bad(target, format!("null has no option \"{option}\"")));
        }
    };
    let size: Bytes = size.parse().map_err(|error| bad(target, format!("{error}")))?;
    if size.0 == 0 || !size.0.is_multiple_of(SECTOR_BYTES) {
        return Err(bad(target, format!("{size} is not a positive multiple of 512 bytes")));
    }
    Ok(Spec::Null { size, read_zeroes })
}

fn bad(target: &str, what: String) -> BackingError {
    BackingError {
        target: target.to_owned(),
        what,
        mend: "write raw:/path/to/file-or-device, a bare absolute path, or null:SIZE".to_owned(),
        source: None,
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Raw(path) => write!(f, "raw:{}", path.display()),
            Spec::Null { size, read_zeroes } => {
                write!(f, "null:{}{}", size.0, if *read_zeroes { ",read-zeroes" } else { "" })
            }
        }
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
            ("null:8G", "null:8589934592"),
            ("null:1M,read-zeroes", "null:1048576,read-zeroes"),
        ] {
            let spec: Spec = text.parse().unwrap();
            assert_eq!(spec.to_string(), printed);
            assert_eq!(printed.parse::<Spec>().unwrap(), spec);
        }
    }

    #[test]
    fn a_bad_target_is_named_with_what_would_be_right() {
        for text in ["", "disk.img", "raw:disk.img", "qcow2:/a", "null:", "null:100", "null:1G,x"] {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text}: ")), "{error}");
            assert!(error.contains("write raw:/path"), "{error}");
        }
    }
}
