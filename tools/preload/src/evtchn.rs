//! `/dev/xen/evtchn`: Linux' `drivers/xen/evtchn.c` on the stand-in's event channels.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use polldisk::limits::PORTS_PER_UNMASK;
use polldisk::sim::Endpoint;
use polldisk::sim::events::SimEvents;
use polldisk::units::{DomId, Port};
use polldisk::xen::Events;
use polldisk::xen::abi::{self, EvtchnBindInterdomain, EvtchnPort};

use crate::settings::{Settings, Toll};

const PORT_BYTES: usize = size_of::<u32>();

/// Most ports in one read or write: the kernel moves a page of them.
const PORTS_MAX: usize = PORTS_PER_UNMASK;

/// An open device. The program's descriptor is the one of the event channels.
#[derive(Debug)]
pub struct Evtchn {
    events: SimEvents,
    /// `O_NONBLOCK` as the program has set it. The descriptor itself never blocks.
    is_nonblocking: bool,
    /// The only domain that the device may bind to, if the program has restricted it.
    partner: Option<DomId>,
    toll: Toll,
    ports: Vec<Port>,
    /// Events were lost: reads fail until the program resets the device. Only tests make this happen.
    has_overflowed: bool,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// This many bytes of port numbers.
    Bytes(usize),
    /// No port is pending, and the program wants to wait.
    Wait,
}

impl Evtchn {
    /// Opens a device that acts for dom0.
    pub fn open(settings: &Settings, flags: c_int) -> io::Result<Evtchn> {
        Ok(Evtchn {
            events: SimEvents::open(&Endpoint::at(&settings.folder), DomId::DOM0)?,
            is_nonblocking: flags & libc::O_NONBLOCK != 0,
            partner: None,
            toll: settings.toll,
            ports: vec![Port(0); PORTS_MAX],
            has_overflowed: false,
        })
    }

    /// The descriptor, which is readable while a port is pending and unmasked.
    pub fn fd(&self) -> c_int {
        self.events.as_fd().as_raw_fd()
    }

    /// The file status flags, as the program set them.
    pub fn flags(&self) -> c_int {
        libc::O_RDWR | if self.is_nonblocking { libc::O_NONBLOCK } else { 0 }
    }

    /// Sets the file status flags. Only `O_NONBLOCK` has an effect.
    pub fn set_flags(&mut self, flags: c_int) {
        self.is_nonblocking = flags & libc::O_NONBLOCK != 0;
    }

    /// Takes pending ports. If the program was woken without one, which may happen when events cross, the
    /// error is EINTR: a program that polls and then reads must not be made to wait.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Taken> {
        if self.has_overflowed {
            return Err(errno(libc::EFBIG));
        }
        let (places, _) = buffer.as_chunks_mut::<PORT_BYTES>();
        let wanted = places.len().min(PORTS_MAX);
        if wanted == 0 {
            return Ok(Taken::Bytes(0));
        }
        let (count, was_readable) = self.events.take_pending(&mut self.ports[..wanted]);
        for (place, port) in places.iter_mut().zip(&self.ports[..count]) {
            *place = port.0.to_ne_bytes();
        }
        match (count, self.is_nonblocking, was_readable) {
            (0, true, _) => Err(errno(libc::EAGAIN)),
            (0, false, true) => Err(errno(libc::EINTR)),
            (0, false, false) => Ok(Taken::Wait),
            _ => Ok(Taken::Bytes(count * PORT_BYTES)),
        }
    }

    /// Unmasks ports. Unknown port numbers are ignored, as in the kernel.
    pub fn write(&mut self, buffer: &[u8]) -> usize {
        self.toll.pay();
        let (numbers, _) = buffer.as_chunks::<PORT_BYTES>();
        let numbers = &numbers[..numbers.len().min(PORTS_MAX)];
        for number in numbers {
            let _ = self.events.unmask(&[Port(u32::from_ne_bytes(*number))]);
        }
        numbers.len() * PORT_BYTES
    }

    /// # Safety
    /// `argument` must be what the ioctl `number` takes.
    pub unsafe fn ioctl(&mut self, number: c_ulong, argument: *mut c_void) -> io::Result<c_int> {
        // SAFETY: the caller's promise.
        let call = unsafe { Call::read(number, argument) }.ok_or_else(|| errno(libc::ENOTTY))?;
        match call {
            Call::BindInterdomain { remote, port } => {
                let remote = self.permitted(remote)?;
                number_of(self.events.bind_interdomain(remote, port)?)
            }
            Call::BindUnboundPort { remote } => {
                let remote = self.permitted(remote)?;
                number_of(self.events.alloc_unbound(remote)?)
            }
            Call::Unbind(port) => self.events.unbind(port).map(|()| 0),
            Call::Notify(port) => {
                self.toll.pay();
                self.events.notify(port).map(|()| 0)
            }
            Call::Reset => {
                // Ports that are taken stay masked, like ports that the kernel forgets.
                while self.events.take_pending(&mut self.ports).0 > 0 {}
                self.has_overflowed = false;
                Ok(0)
            }
            Call::Restrict { domid } => {
                if self.partner.is_some() {
                    return Err(errno(libc::EACCES));
                }
                self.partner = Some(known(domid)?);
                Ok(0)
            }
        }
    }

    /// The domain, if the device may bind to it.
    fn permitted(&self, remote: u32) -> io::Result<DomId> {
        let remote = known(remote)?;
        match self.partner {
            Some(partner) if partner != remote => Err(errno(libc::EACCES)),
            _ => Ok(remote),
        }
    }
}

/// An ioctl with its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    BindInterdomain { remote: u32, port: Port },
    BindUnboundPort { remote: u32 },
    Unbind(Port),
    Notify(Port),
    Reset,
    Restrict { domid: u32 },
}

impl Call {
    /// Reads an ioctl. `None` if the stand-in lacks it: it has no virtual interrupts (`BIND_VIRQ`).
    ///
    /// # Safety
    /// `argument` must be what the ioctl `number` takes.
    unsafe fn read(number: c_ulong, argument: *mut c_void) -> Option<Call> {
        // SAFETY: the caller promises the structure that the number asks for.
        unsafe {
            Some(match number {
                abi::IOCTL_EVTCHN_BIND_INTERDOMAIN => {
                    let bind = argument.cast::<EvtchnBindInterdomain>().read_unaligned();
                    let port = Port(bind.remote_port);
                    Call::BindInterdomain { remote: bind.remote_domain, port }
                }
                abi::IOCTL_EVTCHN_BIND_UNBOUND_PORT => {
                    let bind = argument.cast::<abi::EvtchnBindUnboundPort>().read_unaligned();
                    Call::BindUnboundPort { remote: bind.remote_domain }
                }
                abi::IOCTL_EVTCHN_UNBIND => Call::Unbind(port(argument)),
                abi::IOCTL_EVTCHN_NOTIFY => Call::Notify(port(argument)),
                abi::IOCTL_EVTCHN_RESET => Call::Reset,
                abi::IOCTL_EVTCHN_RESTRICT_DOMID => {
                    let restrict = argument.cast::<abi::EvtchnRestrictDomid>().read_unaligned();
                    Call::Restrict { domid: restrict.domid.into() }
                }
                _ => return None,
            })
        }
    }
}

/// # Safety
/// `argument` must point to an [`EvtchnPort`].
unsafe fn port(argument: *mut c_void) -> Port {
    // SAFETY: the caller's promise.
    Port(unsafe { argument.cast::<EvtchnPort>().read_unaligned() }.port)
}

/// A valid domain number. For others Xen returns ESRCH.
fn known(domid: u32) -> io::Result<DomId> {
    DomId::try_from(domid).map_err(|_| errno(libc::ESRCH))
}

fn number_of(port: Port) -> io::Result<c_int> {
    c_int::try_from(port.0).map_err(io::Error::other)
}

fn errno(errno: c_int) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

#[cfg(test)]
mod test {
    use std::fs::File;
    use std::os::fd::FromRawFd;

    use polldisk::sim::StandIn;
    use polldisk::xen::linux::evtchn::Evtchn as LinuxEvtchn;

    use super::*;
    use crate::handles::{self, Device};

    #[test]
    fn polldisk_suspects_every_port_that_it_still_has_once_events_were_lost() {
        let stand_in = StandIn::start_temporary().unwrap();
        let domid = DomId::try_from(5).unwrap();
        let _guest = stand_in.create_domain(domid, 4).unwrap();
        let settings = Settings { folder: stand_in.folder().to_owned(), toll: Toll::None };
        let device = Evtchn::open(&settings, libc::O_NONBLOCK).unwrap();
        let fd = handles::insert(Device::Evtchn(Box::new(device))).unwrap();
        // SAFETY: opened just now, and closed by nobody else.
        let mut events = LinuxEvtchn::new(unsafe { File::from_raw_fd(fd) });
        let ports = [(); 4].map(|()| events.alloc_unbound(domid).unwrap());
        events.unbind(ports[0]).unwrap();
        let mut pending = [Port(0); 4];
        assert_eq!(events.pending(&mut pending).unwrap(), 0);

        handles::with(fd, |device| match device {
            Device::Evtchn(device) => device.has_overflowed = true,
            Device::Gntdev { .. } => unreachable!(),
        });
        assert_eq!(events.pending(&mut pending[..1]).unwrap(), 1);
        let left: Vec<Port> =
            ports[1..].iter().copied().filter(|port| *port != pending[0]).collect();
        assert_eq!(left.len(), 2);
        events.unbind(left[0]).unwrap();
        assert_eq!(events.pending(&mut pending).unwrap(), 1);
        assert_eq!(pending[0], left[1]);
        assert_eq!(events.pending(&mut pending).unwrap(), 0);
    }

    fn call<T>(number: c_ulong, mut argument: T) -> Option<Call> {
        // SAFETY: each test passes the structure of its number.
        unsafe { Call::read(number, std::ptr::from_mut(&mut argument).cast()) }
    }

    #[test]
    fn ioctls_are_told_apart_by_their_numbers() {
        let bind = EvtchnBindInterdomain { remote_domain: 5, remote_port: 9 };
        assert_eq!(
            call(abi::IOCTL_EVTCHN_BIND_INTERDOMAIN, bind),
            Some(Call::BindInterdomain { remote: 5, port: Port(9) })
        );
        let unbound = abi::EvtchnBindUnboundPort { remote_domain: 7 };
        assert_eq!(
            call(abi::IOCTL_EVTCHN_BIND_UNBOUND_PORT, unbound),
            Some(Call::BindUnboundPort { remote: 7 })
        );
        let port = EvtchnPort { port: 4097 };
        assert_eq!(call(abi::IOCTL_EVTCHN_UNBIND, port), Some(Call::Unbind(Port(4097))));
        assert_eq!(call(abi::IOCTL_EVTCHN_NOTIFY, port), Some(Call::Notify(Port(4097))));
        assert_eq!(call(abi::IOCTL_EVTCHN_RESET, ()), Some(Call::Reset));
        assert_eq!(
            call(abi::IOCTL_EVTCHN_RESTRICT_DOMID, abi::EvtchnRestrictDomid { domid: 3 }),
            Some(Call::Restrict { domid: 3 })
        );
        const BIND_VIRQ: c_ulong = 0x0004_4500;
        assert_eq!(call(BIND_VIRQ, 0u32), None);
        assert_eq!(call(abi::IOCTL_GNTDEV_GRANT_COPY, 0u64), None);
    }
}
