//! Guests, and what dom0's tools say about domains, xenstore and grants.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::{Agent, Job};
use crate::machine::Machine;

/// libxl waits 10 s for a backend and 40 s for a hotplug script before it gives up.
pub(crate) const CREATE_LIMIT: Duration = Duration::from_secs(180);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(120);
const DETACH_LIMIT: Duration = Duration::from_secs(60);

/// What a guest has besides its disks.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self { vcpus: 1, memory_mib: 384 }
    }
}

/// The options of a guest's kernel. `init_on_alloc=0`: the emulator needs seconds to clear a GiB.
pub const KERNEL_OPTIONS: &str = "console=hvc0 quiet mitigations=off init_on_alloc=0 panic=1";

/// How a guest starts.
#[derive(Clone, Copy, Debug)]
pub enum Boot {
    /// As a PV guest, with the lab's kernel.
    Kernel,
    /// As a PVH guest, with a 32-bit GRUB that runs `/boot/grub/grub.cfg` from one of its disks.
    Grub32,
}

/// A running guest and the agent on its console.
#[derive(Debug)]
pub struct Guest {
    /// Its name in xl.
    pub name: String,
    /// Its domain's number.
    pub domid: u32,
    /// Runs commands in it.
    pub agent: Agent,
    /// Carries its console in dom0; ends with the guest.
    console: Job,
}

impl Guest {
    /// Creates a guest with these disks, in xl's disk syntax, and waits for its agent.
    pub fn create(
        machine: &mut Machine,
        dom0: &mut Agent,
        name: &str,
        boot: Boot,
        size: Size,
        disks: &[String],
    ) -> Result<Self> {
        let file = format!("/run/{name}.cfg");
        dom0.ask(&format!("cat >{file} <<'END'\n{}END\n", config(name, boot, size, disks)))?;
        dom0.ask_within(&format!("xl create {file}"), CREATE_LIMIT)?;
        let domid = dom0.ask(&format!("xl domid {name}"))?.parse().context("domid")?;
        let (port, mut agent) = machine.guest_port(name)?;
        // Without `--interactive` xenconsole reads only from a terminal.
        let bridge =
            format!("exec /usr/lib/xen-4.17/bin/xenconsole {domid} --interactive <>{port} >&0");
        let console = dom0.start(&bridge, None)?;
        agent.wait_ready()?;
        Ok(Self { name: name.into(), domid, agent, console })
    }

    /// Gives the guest another disk, in xl's disk syntax.
    pub fn attach(&self, dom0: &mut Agent, disk: &str) -> Result<()> {
        dom0.ask_within(&format!("xl block-attach {} {disk}", self.domid), CREATE_LIMIT).map(drop)
    }

    /// Takes a disk away and waits until both ends have forgotten it.
    pub fn detach(&mut self, dom0: &mut Agent, vdev: &str) -> Result<()> {
        dom0.ask_within(&format!("xl block-detach {} {vdev}", self.domid), CREATE_LIMIT)?;
        wait_for(&mut self.agent, &format!("[ ! -e /sys/block/{vdev} ]"), DETACH_LIMIT)
    }

    /// Asks the guest to shut down and waits until its domain is gone.
    pub fn shut_down(self, dom0: &mut Agent) -> Result<()> {
        dom0.ask_within(&format!("xl shutdown --wait {}", self.name), SHUTDOWN_LIMIT)?;
        // The xl process in the background destroys the domain after it has shut down.
        wait_for(dom0, &format!("! xl domid {} >/dev/null 2>&1", self.name), SHUTDOWN_LIMIT)?;
        dom0.finish(self.console)?;
        Ok(())
    }
}

fn config(name: &str, boot: Boot, size: Size, disks: &[String]) -> String {
    let boot = match boot {
        Boot::Kernel => format!(
            "type = \"pv\"\n\
             kernel = \"/boot/guest/vmlinuz\"\n\
             ramdisk = \"/boot/guest/initramfs\"\n\
             extra = \"{KERNEL_OPTIONS}\"\n"
        ),
        Boot::Grub32 => "type = \"pvh\"\n\
                         kernel = \"/usr/lib/grub-xen/grub-i386-xen_pvh.bin\"\n"
            .into(),
    };
    let Size { vcpus, memory_mib } = size;
    let mut text = format!(
        "name = \"{name}\"\n\
         {boot}\
         memory = {memory_mib}\n\
         vcpus = {vcpus}\n\
         on_crash = \"destroy\"\n\
         on_reboot = \"destroy\"\n\
         disk = [\n"
    );
    for disk in disks {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "    \"{disk}\",");
    }
    text.push_str("]\n");
    text
}

/// Waits until a shell condition holds in dom0 or in a guest.
pub fn wait_for(agent: &mut Agent, condition: &str, limit: Duration) -> Result<()> {
    // The limit bounds the loop by killing its shell.
    let output = agent.run(&format!("until {condition}; do sleep 0.2; done"), limit)?;
    ensure!(output.status == 0, "still not true after {limit:?}: {condition}");
    Ok(())
}

/// How many grants of a domain other domains have mapped, as the hypervisor counts them.
pub fn mapped_grants(dom0: &mut Agent, domid: u32) -> Result<usize> {
    let text = dom0.ask("xl dmesg -c >/dev/null; xl debug-keys g; xl dmesg -c")?;
    count_mapped_grants(&text, domid).with_context(|| format!("no grant table of d{domid}: {text}"))
}

/// Counts the entries below the domain's heading; `None` if it has no heading.
fn count_mapped_grants(text: &str, domid: u32) -> Option<usize> {
    let heading = format!("grant-table for remote d{domid} ");
    let mut lines = text.lines().skip_while(|line| !line.contains(&heading));
    lines.next()?;
    Some(
        lines
            .take_while(|line| !line.contains("grant-table for remote"))
            .filter(|line| line.contains("[0x"))
            .count(),
    )
}

/// The domains that the hypervisor still knows, zombies included.
pub fn domains(dom0: &mut Agent) -> Result<usize> {
    Ok(dom0.ask("xl list")?.lines().skip(1).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANTS: &str = "\
(XEN) gnttab_usage_print_all [ key 'g' pressed
(XEN) [ref] localdom mfn      pin          localdom gmfn     flags
(XEN) grant-table for remote d0 (v1)
(XEN)   1 frames (64 max), 2 maptrack frames (1024 max)
(XEN) no active grant table entries
(XEN) grant-table for remote d1 (v1)
(XEN)   1 frames (64 max), 0 maptrack frames (1024 max)
(XEN) [0x000]      0 0x11e802 0x00000002          0 0x11e802 0x19
(XEN) [0x008]      0 0x117665 0x00000002          0 0x117665 0x19
(XEN) gnttab_usage_print_all ] done
";

    #[test]
    fn mapped_grants_are_counted_per_domain() {
        assert_eq!(count_mapped_grants(GRANTS, 0), Some(0));
        assert_eq!(count_mapped_grants(GRANTS, 1), Some(2));
        assert_eq!(count_mapped_grants(GRANTS, 11), None);
    }

    #[test]
    fn a_guests_disks_are_in_its_config() {
        let text =
            config("g", Boot::Kernel, Size::default(), &["vdev=xvda,target=/dev/ram0".into()]);
        assert!(text.contains("disk = [\n    \"vdev=xvda,target=/dev/ram0\",\n]\n"), "{text}");
    }
}
