//! Names of virtual disks and the numbers they stand for, as xen-vbd-interface(7) defines them.
//!
//! | name | number |
//! |---|---|
//! | `xvd*`, `dNpM`, disk and partition up to 15 | `202 << 8 \| disk << 4 \| partition` |
//! | `xvd*`, `dNpM`, beyond | `1 << 28 \| disk << 8 \| partition` |
//! | `sd*`, disk and partition up to 15 | `8 << 8 \| disk << 4 \| partition` |
//! | `hd*`, disk 0 to 3, partition up to 63 | `3 << 8` or `22 << 8`, `\| (disk & 1) << 6 \| partition` |
//! | a decimal, hexadecimal or octal number | itself |

use std::fmt;
use std::str::FromStr;

use crate::units::{VbdId, parse_decimal};

/// A virtual disk's number, which a name such as `xvda` stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vdev(VbdId);

impl Vdev {
    /// The number, by which the disk's areas in xenstore are named.
    pub fn id(self) -> VbdId {
        self.0
    }
}

impl From<VbdId> for Vdev {
    fn from(id: VbdId) -> Vdev {
        Vdev(id)
    }
}

/// Text that names no virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a vdev: write xvda to xvdzzz, hda to hdd or sda to sdp, with a partition \
     number if wanted, or d0 or d0p1, or a plain device number"
)]
pub struct BadVdev(pub String);

const XVD_MAJOR: u32 = 202;
const SD_MAJOR: u32 = 8;
const HD_MAJORS: [u32; 2] = [3, 22];
const EXTENDED: u32 = 1 << 28;
const XVD_DISK_MAX: u32 = (1 << 20) - 1;
const XVD_PARTITION_MAX: u32 = 255;
/// libxl keeps the number in a C int.
const NUMBER_MAX: u32 = i32::MAX as u32;

impl FromStr for Vdev {
    type Err = BadVdev;

    fn from_str(text: &str) -> Result<Vdev, BadVdev> {
        parse(text).map(|number| Vdev(VbdId(number))).ok_or_else(|| BadVdev(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<u32> {
    if let Some(rest) = text.strip_prefix("xvd") {
        let (disk, partition) = lettered(rest, XVD_DISK_MAX, XVD_PARTITION_MAX)?;
        return Some(xvd(disk, partition));
    }
    if let Some(rest) = text.strip_prefix("hd") {
        let (disk, partition) = lettered(rest, 3, 63)?;
        let major = if disk < 2 { HD_MAJORS[0] } else { HD_MAJORS[1] };
        return Some(major << 8 | (disk & 1) << 6 | partition);
    }
    if let Some(rest) = text.strip_prefix("sd") {
        let (disk, partition) = lettered(rest, 15, 15)?;
        return Some(SD_MAJOR << 8 | disk << 4 | partition);
    }
    if let Some(rest) = text.strip_prefix('d') {
        let (disk, partition) = rest.split_once('p').unwrap_or((rest, "0"));
        let disk = parse_decimal(disk).filter(|&disk| disk <= XVD_DISK_MAX)?;
        let partition =
            parse_decimal(partition).filter(|&partition| partition <= XVD_PARTITION_MAX)?;
        return Some(xvd(disk, partition));
    }
    number(text)
}

fn xvd(disk: u32, partition: u32) -> u32 {
    if disk <= 15 && partition <= 15 {
        XVD_MAJOR << 8 | disk << 4 | partition
    } else {
        EXTENDED | disk << 8 | partition
    }
}

/// A disk in letters (a, b, ... z, aa, ab, ...) and an optional partition without leading zeroes.
fn lettered(text: &str, disk_max: u32, partition_max: u32) -> Option<(u32, u32)> {
    let letters = text.bytes().take_while(u8::is_ascii_lowercase).count();
    let (letters, digits) = text.split_at(letters);
    let mut count: u32 = 0;
    for letter in letters.bytes() {
        count = count.checked_mul(26)?.checked_add(u32::from(letter - b'a') + 1)?;
    }
    let disk = count.checked_sub(1).filter(|&disk| disk <= disk_max)?;
    let partition = match digits {
        "" => 0,
        _ if digits.starts_with('0') => return None,
        _ => parse_decimal(digits).filter(|&partition| partition <= partition_max)?,
    };
    Some((disk, partition))
}

/// A number in C's notation: decimal, 0x hexadecimal, 0 octal.
fn number(text: &str) -> Option<u32> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    let plain = digits.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let number = plain.then(|| u32::from_str_radix(digits, radix).ok()).flatten()?;
    (number <= NUMBER_MAX).then_some(number)
}

/// The name that stands for the number, or the number itself if there is none.
impl fmt::Display for Vdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.0.0;
        let (major, minor) = (number >> 8, number & 0xff);
        let (prefix, disk, partition) = match major {
            XVD_MAJOR => ("xvd", minor >> 4, minor & 15),
            SD_MAJOR => ("sd", minor >> 4, minor & 15),
            3 if minor >> 6 < 2 => ("hd", minor >> 6, minor & 63),
            22 if minor >> 6 < 2 => ("hd", 2 + (minor >> 6), minor & 63),
            _ if number >> 28 == 1 => {
                let disk = (number & !EXTENDED) >> 8;
                // A disk that has a short number is not named by its extended one.
                if xvd(disk, minor) != number {
                    return write!(f, "{number}");
                }
                ("xvd", disk, minor)
            }
            _ => return write!(f, "{number}"),
        };
        write!(f, "{prefix}{}", letters(disk))?;
        if partition == 0 { Ok(()) } else { write!(f, "{partition}") }
    }
}

fn letters(disk: u32) -> String {
    const LETTERS: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
    let mut reversed = Vec::new();
    let mut rest = disk + 1;
    while rest > 0 {
        rest -= 1;
        reversed.push(char::from(LETTERS[(rest % 26) as usize]));
        rest /= 26;
    }
    reversed.into_iter().rev().collect()
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn id(text: &str) -> u32 {
        text.parse::<Vdev>().unwrap().id().0
    }

    #[test]
    fn the_examples_of_the_manual_page_have_its_numbers() {
        for name in ["d0", "d0p0", "xvda"] {
            assert_eq!(id(name), 202 << 8);
        }
        assert_eq!(id("xvdb"), 51728);
        assert_eq!(id("d1p2"), 202 << 8 | 1 << 4 | 2);
        assert_eq!(id("xvdb2"), id("d1p2"));
        assert_eq!(id("d536p37"), 1 << 28 | 536 << 8 | 37);
        assert_eq!(id("xvdtq37"), id("d536p37"));
        assert_eq!(id("sdb3"), 8 << 8 | 1 << 4 | 3);
        assert_eq!(id("hdc2"), 22 << 8 | 2);
        assert_eq!(id("hdd63"), 22 << 8 | 1 << 6 | 63);
    }

    #[test]
    fn numbers_are_read_as_libxl_reads_them() {
        assert_eq!(id("51712"), 51712);
        assert_eq!(id("0xca00"), 51712);
        assert_eq!(id("0145000"), 51712);
        assert_eq!(id("0"), 0);
        assert_eq!(id("2147483647"), 2147483647);
    }

    #[test]
    fn text_that_names_no_disk_is_refused() {
        for text in [
            "",
            "xvd",
            "xvda0",
            "xvda01",
            "xvda256",
            "xvdA",
            "xvda1x",
            "xvdbgqcw",
            "sdq",
            "sda16",
            "hde",
            "hda64",
            "d",
            "dp1",
            "d1p",
            "d1048576",
            "d0p256",
            "d-1",
            "vda",
            "2147483648",
            "-1",
            "+1",
            "0x",
            "0x+1",
            "09",
            " 1",
            "xvdzzzzzzzzzzzz",
        ] {
            assert_eq!(text.parse::<Vdev>(), Err(BadVdev(text.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn the_last_extended_number_has_a_name() {
        assert_eq!(id("d1048575p255"), 1 << 28 | 0xf_ffff << 8 | 255);
        assert_eq!(Vdev::from(VbdId(id("d1048575p255"))).to_string(), "xvdbgqcv255");
    }

    #[test]
    fn disks_of_every_kind_print_as_their_names() {
        for name in [
            "hda", "hda1", "hdb63", "hdc", "hdd2", "sda1", "sdp15", "xvda15", "xvdp1", "xvdq",
            "xvda16",
        ] {
            assert_eq!(name.parse::<Vdev>().unwrap().to_string(), name);
        }
        for number in 0..=u16::MAX.into() {
            assert_eq!(id(&Vdev::from(VbdId(number)).to_string()), number);
        }
    }

    proptest! {
        #[test]
        fn every_number_prints_as_a_name_that_parses_back(number in 0..=NUMBER_MAX) {
            prop_assert_eq!(id(&Vdev::from(VbdId(number)).to_string()), number);
        }

        #[test]
        fn every_xvd_has_one_number_in_both_notations(
            disk in 0..=XVD_DISK_MAX,
            partition in 0..=XVD_PARTITION_MAX,
        ) {
            let number = id(&format!("d{disk}p{partition}"));
            let name = Vdev::from(VbdId(number)).to_string();
            prop_assert!(name.starts_with("xvd"));
            prop_assert_eq!(id(&name), number);
        }

        #[test]
        fn no_text_breaks_the_parser(text in "\\PC{0,12}") {
            let _ = text.parse::<Vdev>();
        }
    }
}
