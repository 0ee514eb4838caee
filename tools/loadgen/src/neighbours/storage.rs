//! What holds the neighbours' disks.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use tempfile::TempDir;

/// Bytes of a file. A flood of requests needs no more, and it is quickly made.
const FILE_BYTES: usize = 4 << 20;

/// What holds a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Nothing, and reads leave the guest's memory alone.
    Nothing,
    /// Nothing, and reads give zeroes.
    Zeroes,
    /// A file full of data.
    File,
    /// A block device that accepts all requests and never answers.
    Hung,
}

/// A folder with files, and hung block devices. Dropping it removes everything.
#[derive(Debug, Default)]
pub struct Storage {
    // In this order, since fields are dropped in order.
    hung: Option<Hung>,
    folder: Option<TempDir>,
    files: usize,
}

impl Storage {
    /// Makes a new folder in `scratch`, or in the system's folder for temporary files.
    pub fn make(scratch: Option<&Path>) -> anyhow::Result<Storage> {
        let make = || match scratch {
            None => tempfile::tempdir(),
            Some(scratch) => {
                fs::create_dir_all(scratch)?;
                tempfile::Builder::new().prefix("blkload-").tempdir_in(scratch)
            }
        };
        let folder = make().context("--scratch: cannot make a folder for the neighbours' files")?;
        Ok(Storage { hung: None, folder: Some(folder), files: 0 })
    }

    /// Makes this number of hung block devices.
    pub fn hang(&mut self, count: usize) -> anyhow::Result<()> {
        if count > 0 {
            self.hung = Some(Hung::freeze(self.folder()?, count)?);
        }
        Ok(())
    }

    /// Makes a target for another disk, in polldisk's syntax.
    pub fn target(&mut self, holds: Holds) -> anyhow::Result<String> {
        Ok(match holds {
            Holds::Nothing => "null:1G".to_owned(),
            Holds::Zeroes => "null:1G,read-zeroes".to_owned(),
            Holds::File => {
                self.files += 1;
                let path = self.folder()?.join(format!("{}.img", self.files));
                fill(&path).with_context(|| format!("cannot write {}", path.display()))?;
                format!("raw:{}", path.display())
            }
            Holds::Hung => {
                let hung = self.hung.as_mut().context("there is no hung storage")?;
                format!("raw:{}", hung.devices.pop().context("there are too few hung devices")?)
            }
        })
    }

    /// Lets hung storage answer, so that everything can end.
    pub fn thaw(&mut self) -> anyhow::Result<()> {
        self.hung.as_mut().map_or(Ok(()), Hung::thaw)
    }

    fn folder(&self) -> anyhow::Result<&Path> {
        self.folder.as_ref().map(TempDir::path).context("there is no folder for files")
    }
}

/// Writes data to every block, so that the whole file is allocated.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&[0xa5; FILE_BYTES])?;
    file.sync_all()
}

/// Loop devices over files of a frozen filesystem, so that writes to them wait.
///
/// A shell owns them. It undoes everything when its input ends, even if this process is killed.
#[derive(Debug)]
struct Hung {
    keeper: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    devices: Vec<String>,
}

/// The shell's script. Its arguments are a folder and the number of devices. It prints their names and
/// `ready`, thaws the filesystem at a line of input, and undoes everything at the end of its input.
const KEEPER: &str = r#"
set -eu
trap '' INT TERM HUP PIPE
[ "$(id -u)" -eq 0 ] || { echo "it needs root" >&2; exit 1; }
cd "$1"
devices=
undo() {
    fsfreeze --unfreeze mnt || :
    for device in $devices; do losetup --detach "$device" || :; done
    # Lazily if the backend still has a device open.
    umount mnt || umount --lazy mnt || :
}
truncate --size 64M filesystem.img
mkfs.ext4 -q -F filesystem.img
mkdir mnt
mount -o loop filesystem.img mnt
trap 'undo 2>/dev/null' EXIT
for number in $(seq "$2"); do
    head --bytes 4M /dev/zero >"mnt/$number.img"
    sync "mnt/$number.img"
    device=$(losetup --find --show "mnt/$number.img")
    devices="$devices $device"
    echo "$device"
done
fsfreeze --freeze mnt
echo ready || :
read -r line || exit 0
fsfreeze --unfreeze mnt
echo thawed || :
read -r line || :
"#;

impl Hung {
    fn freeze(folder: &Path, count: usize) -> anyhow::Result<Hung> {
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(folder)
            .arg(count.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run sh")?;
        let input = keeper.stdin.take();
        let output = BufReader::new(keeper.stdout.take().context("it has no output")?);
        let mut hung = Hung { keeper, input, output, devices: Vec::new() };
        loop {
            match hung.line()? {
                line if line == "ready" => return Ok(hung),
                device => hung.devices.push(device),
            }
        }
    }

    fn thaw(&mut self) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("the shell has ended")?;
        input.write_all(b"thaw\n").context("cannot let frozen storage go on")?;
        self.line().map(|_| ())
    }

    /// The shell's next line of output. If it has ended, the error is what it printed.
    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? > 0 {
            return Ok(line.trim_end().to_owned());
        }
        let mut said = String::new();
        if let Some(stderr) = &mut self.keeper.stderr {
            stderr.read_to_string(&mut said)?;
        }
        bail!("{}", said.trim());
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        self.input = None;
        // Wait until the shell has undone everything.
        let _ = self.keeper.wait();
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_error_says_why_storage_cannot_hang() {
        let nowhere = tempfile::tempdir().unwrap().path().to_owned();
        let error = Hung::freeze(&nowhere, 1).unwrap_err().to_string();
        let named = error.contains(nowhere.to_str().unwrap());
        assert!(error.contains("needs root") || named, "{error}");
    }
}
