//! Event channels through `/dev/xen/evtchn`.
//!
//! The kernel masks a port when its event arrives and queues its number; a read takes queued
//! numbers, a write unmasks ports. The queue grows with the number of bound ports, so it can
//! overflow only on kernels before 4.5. Then reads fail with EFBIG, and events are lost. To recover, the
//! queue is reset and every port is treated as pending, because only its ring tells whether there is work.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::limits::{PORTS_PER_READ, PORTS_PER_UNMASK};
use crate::units::{DomId, Port};
use crate::xen::Events;
use crate::xen::abi;

const PORT_BYTES: usize = size_of::<u32>();

/// An open evtchn. It allocates only when a port is bound.
#[derive(Debug)]
pub struct Evtchn {
    device: File,
    bound: BTreeSet<Port>,
    /// Ports that may have lost an event and are still to be handed out.
    unsure: Vec<Port>,
    /// Port numbers as the kernel wrote them.
    incoming: Box<[u8]>,
    /// Port numbers for the kernel.
    outgoing: Vec<u8>,
}

impl Evtchn {
    /// Takes the device, opened with O_NONBLOCK.
    pub fn new(device: File) -> Evtchn {
        Evtchn {
            device,
            bound: BTreeSet::new(),
            unsure: Vec::new(),
            incoming: vec![0; PORTS_PER_READ * PORT_BYTES].into(),
            outgoing: Vec::with_capacity(PORTS_PER_UNMASK * PORT_BYTES),
        }
    }

    /// Allocates a port to which `remote` may bind, as a frontend does.
    pub fn alloc_unbound(&mut self, remote: DomId) -> io::Result<Port> {
        let mut request = abi::EvtchnBindUnboundPort { remote_domain: u32::from(remote.raw()) };
        let port = Port(self.ioctl(abi::IOCTL_EVTCHN_BIND_UNBOUND_PORT, &mut request)?);
        self.bound.insert(port);
        Ok(port)
    }

    /// Empties the kernel's queue, which has lost events, and treats every port as pending.
    fn recover(&mut self) -> io::Result<()> {
        self.ioctl(abi::IOCTL_EVTCHN_RESET, &mut ())?;
        self.unsure.clear();
        self.unsure.extend(&self.bound);
        Ok(())
    }

    fn take_unsure(&mut self, ports: &mut [Port]) -> usize {
        let count = ports.len().min(self.unsure.len());
        let taken = self.unsure.drain(self.unsure.len() - count..);
        ports.iter_mut().zip(taken).for_each(|(place, port)| *place = port);
        count
    }

    /// Every ioctl here takes a structure of `abi` (or nothing), which it only reads.
    fn ioctl<T>(&self, number: libc::Ioctl, argument: &mut T) -> io::Result<u32> {
        // SAFETY: the pointer is valid for the call, and the private callers pass the structure
        // whose size is part of `number`.
        let result =
            unsafe { libc::ioctl(self.device.as_raw_fd(), number, std::ptr::from_mut(argument)) };
        u32::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl Events for Evtchn {
    fn bind_interdomain(&mut self, remote: DomId, port: Port) -> io::Result<Port> {
        let mut request = abi::EvtchnBindInterdomain {
            remote_domain: u32::from(remote.raw()),
            remote_port: port.0,
        };
        let port = Port(self.ioctl(abi::IOCTL_EVTCHN_BIND_INTERDOMAIN, &mut request)?);
        self.bound.insert(port);
        Ok(port)
    }

    fn unbind(&mut self, port: Port) -> io::Result<()> {
        self.ioctl(abi::IOCTL_EVTCHN_UNBIND, &mut abi::EvtchnPort { port: port.0 })?;
        self.bound.remove(&port);
        self.unsure.retain(|unsure| *unsure != port);
        Ok(())
    }

    fn notify(&self, port: Port) -> io::Result<()> {
        self.ioctl(abi::IOCTL_EVTCHN_NOTIFY, &mut abi::EvtchnPort { port: port.0 }).map(drop)
    }

    /// Returns at most [`PORTS_PER_READ`] ports per call. After an overflow it hands out every bound port, in
    /// as many calls as that takes.
    fn pending(&mut self, ports: &mut [Port]) -> io::Result<usize> {
        if !self.unsure.is_empty() {
            return Ok(self.take_unsure(ports));
        }
        let wanted = ports.len().min(PORTS_PER_READ) * PORT_BYTES;
        let buffer = &mut self.incoming[..wanted];
        match (&self.device).read(buffer) {
            Ok(bytes) => {
                let (numbers, _) = buffer[..bytes].as_chunks();
                ports
                    .iter_mut()
                    .zip(numbers)
                    .for_each(|(place, number)| *place = Port(u32::from_ne_bytes(*number)));
                Ok(numbers.len())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) if error.raw_os_error() == Some(libc::EFBIG) => {
                self.recover()?;
                Ok(self.take_unsure(ports))
            }
            Err(error) => Err(error),
        }
    }

    fn unmask(&mut self, ports: &[Port]) -> io::Result<()> {
        for batch in ports.chunks(PORTS_PER_UNMASK) {
            self.outgoing.clear();
            self.outgoing.extend(batch.iter().flat_map(|port| port.0.to_ne_bytes()));
            (&self.device).write_all(&self.outgoing)?;
        }
        Ok(())
    }
}

impl AsFd for Evtchn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

#[cfg(test)]
mod test {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// A device whose kernel side the test plays, except for the ioctls.
    fn device() -> (Evtchn, UnixDatagram) {
        let (ours, kernels) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Evtchn::new(File::from(OwnedFd::from(ours))), kernels)
    }

    #[test]
    fn pending_reads_the_ports_that_the_kernel_queued() {
        let (mut evtchn, kernel) = device();
        let mut ports = [Port(0); 4];
        assert_eq!(evtchn.pending(&mut ports).unwrap(), 0);
        let queued: Vec<u8> = [7u32, 1 << 16].into_iter().flat_map(u32::to_ne_bytes).collect();
        kernel.send(&queued).unwrap();
        assert_eq!(evtchn.pending(&mut ports).unwrap(), 2);
        assert_eq!(ports[..2], [Port(7), Port(1 << 16)]);
        let mut too_many = [Port(0); PORTS_PER_READ + 1];
        assert_eq!(evtchn.pending(&mut too_many).unwrap(), 0);
    }

    #[test]
    fn unmask_writes_a_page_of_ports_at_a_time() {
        let (mut evtchn, kernel) = device();
        let ports: Vec<Port> = (0..=1024).map(Port).collect();
        evtchn.unmask(&ports).unwrap();
        let mut written = [0; 8192];
        assert_eq!(kernel.recv(&mut written).unwrap(), 4096);
        assert_eq!(kernel.recv(&mut written).unwrap(), 4);
        assert_eq!(written[..4], 1024u32.to_ne_bytes());
    }

    #[test]
    fn after_an_overflow_every_port_is_handed_out_once() {
        let (mut evtchn, _kernel) = device();
        evtchn.unsure = vec![Port(1), Port(2), Port(3)];
        let mut ports = [Port(0); 2];
        assert_eq!(evtchn.pending(&mut ports).unwrap(), 2);
        assert_eq!(ports, [Port(2), Port(3)]);
        assert_eq!(evtchn.pending(&mut ports).unwrap(), 1);
        assert_eq!(ports[0], Port(1));
        assert_eq!(evtchn.pending(&mut ports).unwrap(), 0);
    }

    #[test]
    fn system_errors_are_passed_on() {
        let (mut evtchn, _kernel) = device();
        let refused = evtchn.bind_interdomain(DomId::DOM0, Port(1)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTTY));
        assert!(evtchn.notify(Port(1)).is_err());
    }
}
