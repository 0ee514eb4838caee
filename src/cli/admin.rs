//! `polldisk attach` and `polldisk detach`.

use std::path::PathBuf;

use clap::Args;
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
    #[arg(long, value_name = "SPEC")]
    target: String,
    /// The guest may not write
    #[arg(long)]
    read_only: bool,
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
    /// Do not wait for the guest to let go of it: its I/O fails
    #[arg(long)]
    force: bool,
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
        let Attach { domid, vdev, target, read_only, daemon } = self;
        let attach = protocol::Attach { domid, vdev, target, read_only };
        request(&daemon.admin, &Request::Attach(attach))?;
        Ok(())
    }
}

impl Detach {
    /// Asks the daemon, and waits until the guest has let go.
    pub fn run(self) -> anyhow::Result<()> {
        let Detach { domid, vdev, force, daemon } = self;
        request(&daemon.admin, &Request::Detach(protocol::Detach { domid, vdev, force }))?;
        Ok(())
    }
}
