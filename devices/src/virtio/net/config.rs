//! The `--net` option.

use std::{
    os::fd::RawFd,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{
    backend::Link,
    device::Net,
    hostfwd::HostForward,
    mac::MacAddress,
    passt::{Passt, PasstConfig},
    tap::Tap,
};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

/// Least MTU of IPv4 (RFC 791).
const MIN_MTU: u16 = 68;

/// Where the card is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Attachment {
    User(PasstConfig),
    Tap(String),
    Fd(RawFd),
}

/// A parsed `--net` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    attachment: Attachment,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
}

impl NetConfig {
    /// Parses `user[,hostfwd=RULE…][,host-access=on|off][,ipv6=on|off]`, `tap=IFNAME` or `fd=N`,
    /// each with `[,mac=MAC][,mtu=N]`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        let word = spec.take_word();
        let tap = spec.take("tap")?;
        let fd = spec.take("fd")?;
        let mac = spec.take_parsed("mac")?;
        let mtu: Option<u16> = spec.take_parsed("mtu")?;
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            let reason = format_args!("expected {MIN_MTU} to 65535");
            return Err(spec.invalid("mtu", &mtu.to_string(), reason));
        }
        let attachment = match (word.as_deref(), tap, fd) {
            (Some("user"), None, None) => Attachment::User(user(&mut spec, mtu)?),
            (None, Some(name), None) => {
                if name.is_empty() || name.len() > 15 || name.contains('/') {
                    return Err(spec.invalid("tap", &name, "not an interface name"));
                }
                Attachment::Tap(name)
            }
            (None, None, Some(number)) => Attachment::Fd(descriptor(&spec, &number)?),
            (word, ..) => {
                return Err(SpecError::UnexpectedWord {
                    option: spec.option().to_owned(),
                    word: word.unwrap_or_default().to_owned(),
                    expected: "expected one of user, tap=IFNAME, fd=N".to_owned(),
                });
            }
        };
        spec.finish()?;
        Ok(Box::new(Self { attachment, mac, mtu }))
    }

    /// Builds the device.
    pub(super) fn open(self) -> Result<Net, BuildError> {
        let no_eventfd = |source| BuildError::Host {
            option: "net",
            what: "no eventfd can be made".to_owned(),
            source,
        };
        let tap = match self.attachment {
            Attachment::Tap(name) => Tap::open(&name)?,
            Attachment::Fd(number) => Tap::inherited(number)?,
            Attachment::User(config) => {
                let link = Link::new(false).map_err(no_eventfd)?;
                // Only passt sees this address; cards are told apart by their order.
                static CARDS: AtomicU32 = AtomicU32::new(0);
                let number = CARDS.fetch_add(1, Ordering::Relaxed);
                let default = || MacAddress::from_seed(&format!("user {number}"));
                let mac = self.mac.unwrap_or_else(default);
                let passt = Passt::start(config, mac, link.clone())?;
                return Ok(Net::stream(Some(passt), link, mac, self.mtu));
            }
        };
        let default = || {
            // Several hosts may share a network, and have interfaces of the same name.
            let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
            MacAddress::from_seed(&format!("{} {}", machine.trim(), tap.name()))
        };
        let mac = self.mac.or(tap.mac()).unwrap_or_else(default);
        Ok(Net::tap(tap, Link::new(true).map_err(no_eventfd)?, mac, self.mtu))
    }
}

fn user(spec: &mut Spec, mtu: Option<u16>) -> Result<PasstConfig, SpecError> {
    let mut forwards: Vec<HostForward> = Vec::new();
    for rule in spec.take_all("hostfwd") {
        let forward: HostForward =
            rule.parse().map_err(|error| spec.invalid("hostfwd", &rule, error))?;
        let clash = forwards.iter().any(|other| {
            (other.protocol, other.address, other.host_port)
                == (forward.protocol, forward.address, forward.host_port)
        });
        if clash {
            return Err(spec.invalid("hostfwd", &rule, "this port is forwarded already"));
        }
        forwards.push(forward);
    }
    let host_access = spec.take_switch("host-access")?.unwrap_or(true);
    let ipv6 = spec.take_switch("ipv6")?.unwrap_or(true);
    Ok(PasstConfig { forwards, host_access, mtu, ipv6 })
}

fn descriptor(spec: &Spec, number: &str) -> Result<RawFd, SpecError> {
    if number.contains(':') {
        let reason = "several queues are not supported yet; pass one descriptor";
        return Err(spec.invalid("fd", number, reason));
    }
    let parsed = number.parse().ok().filter(|fd| *fd > 2);
    parsed.ok_or_else(|| spec.invalid("fd", number, "expected a descriptor from 3 on"))
}

impl DeviceConfig for NetConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        Ok(BuiltDevice { device: Box::new(self.open()?), handle: None })
    }
}

/// A card without a cable, for the conformance test.
pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
    let link = Link::new(false).map_err(|source| BuildError::Host {
        option: "net",
        what: "no eventfd can be made".to_owned(),
        source,
    })?;
    let net = Net::stream(None, link, MacAddress::from_seed("sample"), Some(1500));
    Ok(BuiltDevice { device: Box::new(net), handle: None })
}
