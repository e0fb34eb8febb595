//! Which device of the host.

use std::{
    fmt,
    path::{Component, Path},
    str::FromStr,
};

/// Domain, bus, slot and function of a PCI device of the host, as `lspci -D` writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostAddress {
    /// PCI domain ("segment"); 0 on most machines.
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Slot, 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.slot, self.function)
    }
}

/// Text that is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected the address of a PCI device, such as 0000:01:00.0 (lspci -D lists them) or \
     /sys/bus/pci/devices/0000:01:00.0"
)]
pub struct AddressError;

impl FromStr for HostAddress {
    type Err = AddressError;

    /// Reads `[DOMAIN:]BUS:SLOT.FUNCTION`, or a path below `/sys` that ends with it.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let name = if text.starts_with('/') {
            let path = Path::new(text);
            let Some(Component::Normal(name)) = path.components().next_back() else {
                return Err(AddressError);
            };
            path.starts_with("/sys").then_some(name).and_then(|name| name.to_str())
        } else {
            Some(text)
        };
        name.and_then(parse).ok_or(AddressError)
    }
}

fn parse(text: &str) -> Option<HostAddress> {
    let (front, function) = text.rsplit_once('.')?;
    let (front, slot) = front.rsplit_once(':')?;
    let (domain, bus) = front.split_once(':').unwrap_or(("0", front));
    Some(HostAddress {
        domain: hex(domain, 8, u32::MAX)?,
        bus: hex(bus, 2, 0xff)? as u8,
        slot: hex(slot, 2, 31)? as u8,
        function: hex(function, 1, 7)? as u8,
    })
}

fn hex(text: &str, digits: usize, most: u32) -> Option<u32> {
    let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(text, 16).ok())?.filter(|number| *number <= most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        let expected = HostAddress { domain: 0, bus: 0x0a, slot: 0x1f, function: 3 };
        for text in [
            "0000:0a:1f.3",
            "0a:1f.3",
            "0:a:1f.3",
            "/sys/bus/pci/devices/0000:0a:1f.3",
            "/sys/devices/pci0000:00/0000:00:01.0/0000:0a:1f.3/",
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        assert_eq!(expected.to_string(), "0000:0a:1f.3");
        for text in [
            "",
            "0a:1f",
            "0a:20.0",
            "0a:1f.8",
            "0a:+1.0",
            "1:2:3:4.5",
            "10de:2204",
            "/dev/vfio/0000:0a:1f.3",
            "/sys",
            "eth0",
            "000000000:0a:1f.3",
        ] {
            assert_eq!(text.parse::<HostAddress>(), Err(AddressError), "{text}");
        }
    }
}
