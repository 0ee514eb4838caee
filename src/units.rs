//! Identifiers and quantities, each with its own type and checked conversions.
//!
//! A number that a guest or the toolstack wrote becomes one of these only through `FromStr` or
//! `TryFrom`, so an identifier that exists is in range.

use std::fmt;
use std::str::FromStr;

/// A domain's number: `domid_t` in Xen's `public/xen.h`. 0 is dom0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomId(xen_sys::domid_t);

/// The first reserved domid, `DOMID_FIRST_RESERVED` in Xen's `public/xen.h`.
const DOMID_FIRST_RESERVED: u16 = 0x7ff0;

impl DomId {
    /// The control domain.
    pub const DOM0: DomId = DomId(0);

    /// The number as Xen's structures hold it.
    pub const fn raw(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for DomId {
    type Error = OutOfRange;

    fn try_from(raw: u32) -> Result<Self, OutOfRange> {
        match u16::try_from(raw) {
            Ok(domid) if domid < DOMID_FIRST_RESERVED => Ok(DomId(domid)),
            _ => Err(OutOfRange { what: "domid", value: u64::from(raw) }),
        }
    }
}

/// A virtual disk's number within its guest: the last component of its xenstore areas, which is
/// also the encoded vdev (xen-vbd-interface(7)), such as 51712 for xvda.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VbdId(pub u32);

/// The number of one ring of a disk, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(pub u16);

/// An event channel's number as its owner's domain knows it: `evtchn_port_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port(pub xen_sys::evtchn_port_t);

/// A grant reference: an index into the granting domain's grant table (`grant_ref_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantRef(pub u32);

/// A length or a position in 512-byte sectors, the unit of everything on a blkif ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sectors(pub u64);

/// Bytes in one ring sector, whatever the disk's own sector size is.
pub const SECTOR_BYTES: u64 = 512;

impl Sectors {
    /// The same length in bytes; `None` if it does not fit in 64 bits.
    pub fn to_bytes(self) -> Option<Bytes> {
        self.0.checked_mul(SECTOR_BYTES).map(Bytes)
    }
}

/// A length or a position in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Whole ring sectors that fit in this length.
    pub fn to_sectors(self) -> Sectors {
        Sectors(self.0 / SECTOR_BYTES)
    }
}

/// A size as people write it: bytes, or a number with K, M, G or T (powers of 1024).
impl FromStr for Bytes {
    type Err = BadNumber;

    fn from_str(text: &str) -> Result<Self, BadNumber> {
        let bad = || BadNumber {
            text: text.to_owned(),
            wanted: "a size such as 4096, 64K, 512M, 8G or 1T",
        };
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(bad()),
        };
        let count: u64 = parse_decimal(digits).ok_or_else(bad)?;
        count.checked_mul(1 << shift).map(Bytes).ok_or_else(bad)
    }
}

/// A number that its type can't hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value} is out of range")]
pub struct OutOfRange {
    /// The kind of number.
    pub what: &'static str,
    /// What was given.
    pub value: u64,
}

/// Text that is not the number it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not {wanted}")]
pub struct BadNumber {
    /// What was given.
    pub text: String,
    /// What was expected.
    pub wanted: &'static str,
}

/// Parses decimal digits only: no sign, no blanks, no other radix, as in xenstore's paths and messages. For
/// values of nodes, see [`crate::xen::keys::number`].
pub fn parse_decimal<T: FromStr>(text: &str) -> Option<T> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

macro_rules! decimal_text {
    ($($type:ident: $wanted:literal),*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $type {
            type Err = BadNumber;

            fn from_str(text: &str) -> Result<Self, BadNumber> {
                parse_decimal(text)
                    .map($type)
                    .ok_or_else(|| BadNumber { text: text.to_owned(), wanted: $wanted })
            }
        }
    )*};
}

decimal_text! {
    VbdId: "a device number (0 to 4294967295)",
    QueueId: "a queue number (0 to 65535)",
    Port: "an event channel (0 to 4294967295)",
    GrantRef: "a grant reference (0 to 4294967295)",
    Sectors: "a count of 512-byte sectors"
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for DomId {
    type Err = BadNumber;

    fn from_str(text: &str) -> Result<Self, BadNumber> {
        parse_decimal::<u32>(text)
            .and_then(|raw| DomId::try_from(raw).ok())
            .ok_or_else(|| BadNumber { text: text.to_owned(), wanted: "a domid (0 to 32751)" })
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn numbers_are_plain_decimals_in_range() {
        assert_eq!("4294967295".parse(), Ok(GrantRef(u32::MAX)));
        for text in ["", "-1", "+1", " 1", "1 ", "0x10", "4294967296", "1e3"] {
            assert!(text.parse::<GrantRef>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn reserved_domids_are_refused() {
        assert_eq!("32751".parse::<DomId>().map(DomId::raw), Ok(0x7fef));
        assert!("32752".parse::<DomId>().is_err());
    }

    #[test]
    fn sizes_take_binary_suffixes() {
        assert_eq!("8G".parse(), Ok(Bytes(8 << 30)));
        assert_eq!("512".parse(), Ok(Bytes(512)));
        assert_eq!("64k".parse(), Ok(Bytes(65536)));
        for text in ["", "G", "1X", "-1G", "99999999T"] {
            assert!(text.parse::<Bytes>().is_err(), "{text:?}");
        }
        assert_eq!(Bytes(8 << 30).to_string(), "8 GiB");
        assert_eq!(Bytes(512).to_string(), "512 B");
    }
}
