//! `polldisk attach`, `detach`, `insert` and `eject`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use polldisk::config::ADMIN_SOCKET;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{self, Request};

/// Give a running guest a disk, without the toolstack
#[derive(Args, Debug)]
pub struct Attach {
    /// The guest's domid (xl domid NAME)
    #[arg(long, value_name = "N")]
    domid: u32,
    /// The disk's name in the guest: xvda..., hda..., sda..., d0...
    #[arg(long, value_name = "NAME")]
    vdev: String,
    /// What holds its contents: raw:/path/to/file-or-device, or null:SIZE; options go before the
    /// colon, as in raw,data-path=copy:/path
    #[arg(long, value_name = "SPEC", required_unless_present_any = ["cdrom", "removable"])]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    target: Option<String>,
    /// The guest may not write
    #[arg(long)]
    read_only: bool,
    /// A CD-ROM drive: read-only, and its medium can be changed; empty without --target
    #[arg(long)]
    cdrom: bool,
    /// A drive whose medium can be changed; empty without --target
    #[arg(long)]
    removable: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Take a disk away from its guest
#[derive(Args, Debug)]
pub struct Detach {
    /// The guest's domid
    #[arg(long, value_name = "N")]
    domid: u32,
    /// The disk's name in the guest
    #[arg(long, value_name = "NAME")]
    vdev: String,
    /// Do not wait for the guest to let go of it; its I/O will fail
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Put a medium into a guest's CD-ROM or other drive, in place of the one in it
#[derive(Args, Debug)]
pub struct Insert {
    /// The guest's domid
    #[arg(long, value_name = "N")]
    domid: u32,
    /// The drive's name in the guest
    #[arg(long, value_name = "NAME")]
    vdev: String,
    /// The medium, such as raw:/path/to/image.iso
    #[arg(long, value_name = "SPEC", value_parser = NonEmptyStringValueParser::new())]
    target: String,
    #[command(flatten)]
    daemon: Daemon,
}

/// Take the medium out of a guest's drive
#[derive(Args, Debug)]
pub struct Eject {
    /// The guest's domid
    #[arg(long, value_name = "N")]
    domid: u32,
    /// The drive's name in the guest
    #[arg(long, value_name = "NAME")]
    vdev: String,
    #[command(flatten)]
    daemon: Daemon,
}

/// Which daemon to ask.
#[derive(Args, Debug)]
pub struct Daemon {
    /// The daemon's socket
    #[arg(long, value_name = "PATH", default_value = ADMIN_SOCKET)]
    pub admin: PathBuf,
}

impl Attach {
    /// Asks the daemon.
    pub fn run(self) -> anyhow::Result<()> {
        let Attach { domid, vdev, target, read_only, cdrom, removable, daemon } = self;
        let target = target.unwrap_or_default();
        let attach = protocol::Attach { domid, vdev, target, read_only, cdrom, removable };
        request(&daemon.admin, &Request::Attach(attach))?;
        Ok(())
    }
}

impl Detach {
    /// Asks the daemon, and waits until the disk is gone.
    pub fn run(self) -> anyhow::Result<()> {
        let Detach { domid, vdev, force, daemon } = self;
        request(&daemon.admin, &Request::Detach(protocol::Detach { domid, vdev, force }))?;
        Ok(())
    }
}

impl Insert {
    /// Asks the daemon, and waits until the medium is in.
    pub fn run(self) -> anyhow::Result<()> {
        let Insert { domid, vdev, target, daemon } = self;
        request(&daemon.admin, &Request::Insert(protocol::Insert { domid, vdev, target }))?;
        Ok(())
    }
}

impl Eject {
    /// Asks the daemon, and waits until the medium is out.
    pub fn run(self) -> anyhow::Result<()> {
        let Eject { domid, vdev, daemon } = self;
        request(&daemon.admin, &Request::Eject(protocol::Eject { domid, vdev }))?;
        Ok(())
    }
}
