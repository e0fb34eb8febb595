//! The `--net` option.

use std::{
    os::fd::RawFd,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{
    backend::Link,
    device::Net,
    hostfwd::HostForward,
    kernel::KernelPair,
    mac::MacAddress,
    passt::{LARGEST_MTU, Passt, PasstConfig},
    tap::Tap,
};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

/// Most pairs of queues: each queue has an interrupt vector, of which there are 256.
const MAX_QUEUES: usize = 64;
/// Least MTU of IPv4 (RFC 791).
const MIN_MTU: u16 = 68;

/// Where the card is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Attachment {
    User(PasstConfig),
    Tap(String),
    Fds(Vec<RawFd>),
}

/// A parsed `--net` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    attachment: Attachment,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    /// Pairs of queues.
    queues: usize,
    /// Whether the kernel serves them.
    vhost: bool,
}

impl NetConfig {
    /// Parses `user[,hostfwd=RULE…][,host-access=on|off][,ipv6=on|off][,passt=FILE]`,
    /// `tap=IFNAME[,queues=N][,vhost=on|off]` or `fd=N[:N…][,vhost=on|off]`, each with
    /// `[,mac=MAC][,mtu=N]`.
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
        if word.as_deref() == Some("bridge") || spec.take("bridge")?.is_some() {
            return Err(SpecError::UnexpectedWord {
                option: spec.option().to_owned(),
                word: "bridge".to_owned(),
                expected: "drago-vmm calls no set-user-ID helper to join a bridge; make a tap \
                           interface, put it into the bridge, and use tap=IFNAME"
                    .to_owned(),
            });
        }
        let queues: Option<usize> = spec.take_parsed("queues")?;
        if let Some(queues) = queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues)) {
            let reason = format_args!("expected 1 to {MAX_QUEUES}");
            return Err(spec.invalid("queues", &queues.to_string(), reason));
        }
        let vhost = spec.take_switch("vhost")?.unwrap_or(false);
        let attachment = match (word.as_deref(), tap, fd) {
            (Some("user"), None, None) if vhost || queues.is_some_and(|queues| queues > 1) => {
                let key = if vhost { "vhost" } else { "queues" };
                return Err(spec.invalid(key, "…", "user networking has none of this; use tap="));
            }
            (Some("user"), None, None) => Attachment::User(user(&mut spec, mtu)?),
            (None, Some(name), None) => {
                if name.is_empty() || name.len() > 15 || name.contains('/') {
                    return Err(spec.invalid("tap", &name, "not an interface name"));
                }
                Attachment::Tap(name)
            }
            (None, None, Some(numbers)) => Attachment::Fds(descriptors(&spec, &numbers)?),
            (word, ..) => {
                return Err(SpecError::UnexpectedWord {
                    option: spec.option().to_owned(),
                    word: word.unwrap_or_default().to_owned(),
                    expected: "expected one of user, tap=IFNAME, fd=N[:N…]".to_owned(),
                });
            }
        };
        let queues = match &attachment {
            Attachment::Fds(numbers) => match queues {
                Some(queues) if queues != numbers.len() => {
                    let reason = format_args!("there are {} descriptors", numbers.len());
                    return Err(spec.invalid("queues", &queues.to_string(), reason));
                }
                _ => numbers.len(),
            },
            _ => queues.unwrap_or(1),
        };
        spec.finish()?;
        Ok(Box::new(Self { attachment, mac, mtu, queues, vhost }))
    }

    /// Builds the device.
    pub(super) fn open(self) -> Result<Net, BuildError> {
        let no_eventfd = |source| BuildError::Host {
            option: "net",
            what: "no eventfd can be made".to_owned(),
            source,
        };
        let taps = match self.attachment {
            Attachment::Tap(name) => Tap::open(&name, self.queues)?,
            Attachment::Fds(numbers) => Tap::inherited(&numbers)?,
            Attachment::User(config) => {
                let link = Link::new(false).map_err(no_eventfd)?;
                // Only passt sees this address; cards are told apart by their order.
                static CARDS: AtomicU32 = AtomicU32::new(0);
                let number = CARDS.fetch_add(1, Ordering::Relaxed);
                let default = || MacAddress::from_seed(&format!("user {number}"));
                let mac = self.mac.unwrap_or_else(default);
                let passt = Passt::start(&config, mac, link.clone())?;
                return Ok(Net::stream(Some(passt), link, mac, Some(config.mtu)));
            }
        };
        let default = || {
            // Several hosts may share a network, and have interfaces of the same name.
            let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
            let name = taps.first().map_or("", Tap::name);
            MacAddress::from_seed(&format!("{} {name}", machine.trim()))
        };
        let mac = self.mac.or(taps.first().and_then(Tap::mac)).unwrap_or_else(default);
        let mut pairs = Vec::new();
        if self.vhost {
            if taps.iter().any(|tap| !tap.has_header()) {
                let reason = "vhost=on needs an interface with the flag vnet_hdr".to_owned();
                return Err(BuildError::Unusable { option: "net", reason });
            }
            for _ in &taps {
                pairs.push(KernelPair::open()?);
            }
        }
        let link = Link::new(true).map_err(no_eventfd)?;
        Net::tap(taps, pairs, link, mac, self.mtu).map_err(no_eventfd)
    }
}

fn user(spec: &mut Spec, mtu: Option<u16>) -> Result<PasstConfig, SpecError> {
    let mut forwards: Vec<HostForward> = Vec::new();
    for rule in spec.take_all("hostfwd")? {
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
    let program = spec.take_path("passt")?;
    let mtu = mtu.unwrap_or(LARGEST_MTU);
    Ok(PasstConfig { forwards, host_access, mtu, ipv6, program })
}

fn descriptors(spec: &Spec, text: &str) -> Result<Vec<RawFd>, SpecError> {
    let parsed: Option<Vec<RawFd>> =
        text.split(':').map(|number| number.parse().ok().filter(|fd| *fd > 2)).collect();
    let mut seen = std::collections::HashSet::new();
    parsed
        .filter(|numbers| numbers.len() <= MAX_QUEUES && numbers.iter().all(|fd| seen.insert(*fd)))
        .ok_or_else(|| {
            let reason = "expected different descriptors from 3 on, separated by colons";
            spec.invalid("fd", text, reason)
        })
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
