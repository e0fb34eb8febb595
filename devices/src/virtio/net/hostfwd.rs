//! Port forwarding rules in the syntax of QEMU's `hostfwd`:
//! `[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

/// The guest's address behind user networking, as with QEMU.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// Transport protocol of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostForward {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Address of the host to listen on; all addresses without one.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
}

impl HostForward {
    /// The rule as passt's `--tcp-ports` and `--udp-ports` want it.
    pub fn to_passt(&self) -> String {
        let ports = format!("{}:{}", self.host_port, self.guest_port);
        match self.address {
            Some(address) => format!("{address}/{ports}"),
            None => ports,
        }
    }
}

/// As users write it.
impl fmt::Display for HostForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{protocol}:")?;
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}")?,
            None => {}
        }
        write!(f, ":{}-:{}", self.host_port, self.guest_port)
    }
}

/// Why a rule is not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HostForwardError {
    /// The overall shape is wrong.
    #[error("expected tcp:[ADDRESS]:PORT-[GUEST-ADDRESS]:PORT, or udp:…")]
    Shape,
    /// A port is no number from 1 to 65535.
    #[error("'{0}' is not a port number")]
    Port(String),
    /// The host's address is none.
    #[error("'{0}' is not an IP address of the host")]
    Address(String),
    /// The guest has one address only.
    #[error("the guest's address is {GUEST_ADDRESS} (or leave it out)")]
    Guest,
}

impl FromStr for HostForward {
    type Err = HostForwardError;

    fn from_str(text: &str) -> Result<Self, HostForwardError> {
        let (protocol, rest) = text.split_once(':').ok_or(HostForwardError::Shape)?;
        let protocol = match protocol {
            "tcp" | "" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(HostForwardError::Shape),
        };
        let (host, guest) = rest.split_once('-').ok_or(HostForwardError::Shape)?;
        let (address, host_port) = host.rsplit_once(':').ok_or(HostForwardError::Shape)?;
        let (guest, guest_port) = guest.rsplit_once(':').ok_or(HostForwardError::Shape)?;
        if !guest.is_empty() && guest.parse() != Ok(GUEST_ADDRESS) {
            return Err(HostForwardError::Guest);
        }
        let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let address = match bare.unwrap_or(address) {
            "" => None,
            other => {
                let parsed = other.parse();
                Some(parsed.map_err(|_| HostForwardError::Address(other.to_owned()))?)
            }
        };
        Ok(Self { protocol, address, host_port: port(host_port)?, guest_port: port(guest_port)? })
    }
}

fn port(text: &str) -> Result<u16, HostForwardError> {
    let number = text.parse().ok().filter(|port| *port != 0);
    number.ok_or_else(|| HostForwardError::Port(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passt(text: &str) -> Result<String, HostForwardError> {
        text.parse::<HostForward>().map(|rule| rule.to_passt())
    }

    #[test]
    fn rules() {
        assert_eq!(passt("tcp::2223-:22").unwrap(), "2223:22");
        assert_eq!(passt(":127.0.0.1:80-10.0.2.15:8080").unwrap(), "127.0.0.1/80:8080");
        assert_eq!(passt("udp:[::1]:53-:53").unwrap(), "::1/53:53");
        for rule in ["tcp::2223-:22", "udp:127.0.0.1:80-:8080", "tcp:[::1]:53-:53"] {
            assert_eq!(rule.parse::<HostForward>().unwrap().to_string(), rule);
        }
        assert_eq!("udp::1-:2".parse::<HostForward>().unwrap().protocol, Protocol::Udp);
        for shape in ["", "tcp", "tcp:2223", "tcp::2223", "tcp::22-22", "sctp::1-:1", "tcp:22-:22"]
        {
            assert_eq!(passt(shape), Err(HostForwardError::Shape), "{shape}");
        }
        assert_eq!(passt("tcp::0-:22"), Err(HostForwardError::Port("0".into())));
        assert_eq!(passt("tcp::1-:70000"), Err(HostForwardError::Port("70000".into())));
        assert_eq!(passt("tcp:host:1-:2"), Err(HostForwardError::Address("host".into())));
        assert_eq!(passt("tcp::1-10.0.2.16:2"), Err(HostForwardError::Guest));
    }
}
