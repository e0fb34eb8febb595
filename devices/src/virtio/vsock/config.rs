//! The `--vsock` option.

use std::io;

use super::{Listener, VsockHandle, device::Vsock};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

const OPTION: &str = "vsock";

/// A parsed `--vsock` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context identifier.
    pub cid: u32,
    /// Whether the guest's systemd is to report its state to the service manager of the host.
    pub notify: bool,
}

impl VsockConfig {
    /// Parses `cid=N[,notify=on|off]`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        // 0, 1 and 2 are hypervisor, loopback and host; the last one means any.
        let cid = match spec.take("cid")? {
            Some(text) => match text.parse() {
                Ok(cid) if (3..u32::MAX).contains(&cid) => Some(cid),
                _ => return Err(spec.invalid("cid", &text, "expected 3 to 4294967294")),
            },
            None => None,
        };
        let notify = spec.take_switch("notify")?.unwrap_or(false);
        let missing = spec.missing("cid");
        spec.finish()?;
        let cid = cid.ok_or(missing)?;
        Ok(Box::new(Self { cid, notify }))
    }
}

impl DeviceConfig for VsockConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let device = Vsock::open(self.cid)?;
        let notify = self.notify.then(|| Listener::bind(self.cid)).transpose();
        let notify = notify.map_err(|source| BuildError::Host {
            option: OPTION,
            what: "notify=on: no AF_VSOCK socket can be had (is the module vhost_vsock loaded?)"
                .to_owned(),
            source,
        })?;
        let handle = VsockHandle { cid: self.cid, notify };
        Ok(BuiltDevice { device: Box::new(device), handle: Some(Box::new(handle)) })
    }
}

/// A device that nobody serves, for the conformance test.
pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
    Ok(BuiltDevice { device: Box::new(Vsock::unserved(3)), handle: None })
}

/// What the host said to `/dev/vhost-vsock`.
pub(super) fn host(what: String, source: io::Error) -> BuildError {
    BuildError::Host { option: OPTION, what, source }
}
