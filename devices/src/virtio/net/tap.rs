//! Tap interfaces: opened by name, or inherited as a descriptor (also macvtap).

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use super::{HEADER, backend::Packet, mac::MacAddress, sys};
use crate::virtio::{pieces::Pieces, registry::BuildError};

const OPTION: &str = "net";

/// The device `/dev/net/tun` (kernel: `Documentation/admin-guide/devices.txt`).
const TUN: (u32, u32) = (10, 200);

/// VIRTIO_NET_F_* bits that concern offloads, with the TUN_F_* flags they need.
const GUEST_OFFLOADS: &[(u32, u32)] = &[
    (super::device::GUEST_CSUM, libc::TUN_F_CSUM),
    (super::device::GUEST_TSO4, libc::TUN_F_TSO4),
    (super::device::GUEST_TSO6, libc::TUN_F_TSO6),
    (super::device::GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// An open tap interface.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    name: String,
    /// Packets on the descriptor carry the virtio header.
    header: bool,
    /// An address the guest must have, where the interface dictates it.
    mac: Option<MacAddress>,
    /// The interface was removed.
    gone: bool,
    /// How long the next packet may well be: not much less than the last ones.
    expected: usize,
}

impl Tap {
    /// Attaches `queues` times to the existing interface `name`.
    pub(super) fn open(name: &str, queues: usize) -> Result<Vec<Self>, BuildError> {
        (0..queues).map(|_| Self::attach(name, queues > 1)).collect()
    }

    /// Takes the descriptors of one interface that this process inherited.
    pub(super) fn inherited(numbers: &[RawFd]) -> Result<Vec<Self>, BuildError> {
        let mut taps: Vec<Self> = Vec::new();
        for number in numbers {
            let tap = Self::take(*number)?;
            if let Some(first) = taps.first()
                && (first.name != tap.name || first.header != tap.header)
            {
                let reason = format!(
                    "fd={number} is a queue of '{}', the first one of '{}'; all must be of one \
                     interface and opened with the same flags",
                    tap.name, first.name
                );
                return Err(BuildError::Unusable { option: OPTION, reason });
            }
            taps.push(tap);
        }
        Ok(taps)
    }

    fn attach(name: &str, several: bool) -> Result<Self, BuildError> {
        let host = |what: String, source| BuildError::Host { option: OPTION, what, source };
        let file =
            File::options().read(true).write(true).open("/dev/net/tun").map_err(|source| {
                host(
                    "/dev/net/tun cannot be opened (is the module 'tun' loaded?)".to_owned(),
                    source,
                )
            })?;
        if let Some(problem) = missing_interface(name) {
            return Err(BuildError::Unusable { option: OPTION, reason: problem });
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let multiple = flags | libc::IFF_MULTI_QUEUE;
        let attached = match sys::attach(file.as_fd(), name, if several { multiple } else { flags })
        {
            // Created for several queues: one of them is enough.
            Err(error) if error.kind() == ErrorKind::InvalidInput && !several => {
                sys::attach(file.as_fd(), name, multiple)
            }
            other => other,
        };
        attached.map_err(|source| {
            let hint = match source.kind() {
                ErrorKind::PermissionDenied => ": it belongs to another user",
                ErrorKind::ResourceBusy => ": another process uses it",
                ErrorKind::InvalidInput if several => {
                    ": it is no tap interface for several queues; make it with 'ip tuntap add … \
                     multi_queue', or leave out queues="
                }
                ErrorKind::InvalidInput => ": it is no tap interface",
                _ if source.raw_os_error() == Some(libc::E2BIG) => ": it has no more queues",
                _ => "",
            };
            host(format!("the interface '{name}' cannot be used{hint}"), source)
        })?;
        Self::adopt(file.into(), name, flags, None)
            .map_err(|source| host(format!("the tap interface '{name}' cannot be set up"), source))
    }

    fn take(number: RawFd) -> Result<Self, BuildError> {
        let unusable = |reason: String| BuildError::Unusable { option: OPTION, reason };
        let fd = sys::duplicate_inherited(number).map_err(|source| BuildError::Host {
            option: OPTION,
            what: format!("fd={number} is not an open descriptor"),
            source,
        })?;
        let info = sys::info(fd.as_fd()).map_err(|source| BuildError::Host {
            option: OPTION,
            what: format!("fd={number} is not a tap or macvtap descriptor"),
            source,
        })?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI;
        if info.flags & wanted != wanted {
            return Err(unusable(format!(
                "fd={number} ('{}') must be opened with IFF_TAP | IFF_NO_PI",
                info.name
            )));
        }
        // What a macvtap delivers is addressed to the interface's own address, so that must be the
        // guest's; on a tap the guest is at the other end of the wire and needs another one.
        // Taps all come from one device, whatever its node is called; macvtaps have one each.
        let macvtap = rustix::fs::fstat(&fd)
            .is_ok_and(|stat| stat.st_rdev != rustix::fs::makedev(TUN.0, TUN.1));
        let mac = macvtap.then(|| sys::hardware_address(fd.as_fd(), &info.name).ok()).flatten();
        let mac = mac.map(MacAddress);
        Self::adopt(fd, &info.name, info.flags, mac).map_err(|source| BuildError::Host {
            option: OPTION,
            what: format!("fd={number} ('{}') cannot be set up", info.name),
            source,
        })
    }

    fn adopt(fd: OwnedFd, name: &str, flags: i32, mac: Option<MacAddress>) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let header = flags & libc::IFF_VNET_HDR != 0;
        if header {
            sys::set_header_size(fd.as_fd(), HEADER as i32)?;
            sys::set_offload(fd.as_fd(), 0)?;
        }
        Ok(Self { file: fd.into(), name: name.to_owned(), header, mac, gone: false, expected: 0 })
    }

    /// Name of the interface.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor as a file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether the interface exists still.
    pub(super) fn is_there(&self) -> bool {
        !self.gone
    }

    /// The interface was removed; it cannot come back on this descriptor.
    pub(super) fn set_gone(&mut self) {
        tracing::warn!(interface = self.name, "the tap interface is gone");
        self.gone = true;
    }

    /// Whether offloads are possible.
    pub(super) fn has_header(&self) -> bool {
        self.header
    }

    /// The address that the interface dictates.
    pub(super) fn mac(&self) -> Option<MacAddress> {
        self.mac
    }

    /// Tells the interface what the driver can receive.
    pub(super) fn set_features(&self, features: u64) -> io::Result<()> {
        if !self.header {
            return Ok(());
        }
        let wanted = GUEST_OFFLOADS.iter().filter(|(bit, _)| features & (1 << bit) != 0);
        sys::set_offload(self.file.as_fd(), wanted.fold(0, |flags, (_, flag)| flags | flag))
    }

    /// Receives a packet, behind a virtio header, into `pieces` and what does not fit there into
    /// `spill`, which has room for the largest packet.
    pub(super) fn receive(&mut self, pieces: &mut Pieces, spill: &mut [u8]) -> io::Result<Packet> {
        if self.header {
            // Each piece costs the kernel time, also if nothing gets there.
            let (length, placed) = pieces.receive(self.file.as_fd(), self.expected, spill)?;
            let shrunk = self.expected - self.expected / 8;
            self.expected = length.max(shrunk);
            return Ok(Packet { length, placed });
        }
        spill[..HEADER].fill(0);
        let length = HEADER + (&self.file).read(&mut spill[HEADER..])?;
        Ok(Packet { length, placed: 0 })
    }

    /// Sends a packet that has a virtio header, from where the driver has it.
    pub(super) fn transmit(&self, packet: &mut Pieces) -> io::Result<()> {
        let skip = if self.header { 0 } else { HEADER };
        packet.send(self.file.as_fd(), &[], skip).map(|_| ())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The kernel would make a new interface, or refuse for want of a right, neither of which helps
/// whoever misspelt a name.
fn missing_interface(name: &str) -> Option<String> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    netdevice::name_to_index(&socket, name).is_err().then(|| {
        format!(
            "there is no interface '{name}'; make it with: \
             ip tuntap add dev {name} mode tap user $USER vnet_hdr && ip link set {name} up"
        )
    })
}
