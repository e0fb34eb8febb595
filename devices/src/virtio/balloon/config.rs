//! The `--balloon` option.

use super::{
    PAGES_PER_MIB,
    device::{Balloon, BalloonHandle},
};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

/// A parsed `--balloon` option.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Memory in MiB that the guest is to give up as soon as it can.
    pub size_mib: u32,
    /// Whether the guest may take pages back when it would run out of memory otherwise.
    pub deflate_on_oom: bool,
}

impl BalloonConfig {
    /// Parses `[size=MIB][,deflate-on-oom=on|off]`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        let size_mib = spec.take_parsed("size")?.unwrap_or(0u32);
        if size_mib > u32::MAX / PAGES_PER_MIB {
            return Err(spec.invalid("size", &size_mib.to_string(), "more than 16 TiB"));
        }
        let deflate_on_oom = spec.take_switch("deflate-on-oom")?.unwrap_or(false);
        spec.finish()?;
        Ok(Box::new(Self { size_mib, deflate_on_oom }))
    }

    /// A balloon for the conformance test.
    pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
        Box::new(Self { size_mib: 1, deflate_on_oom: true }).build()
    }

    /// Builds the device together with its handle.
    pub(super) fn open(self) -> Result<(Balloon, BalloonHandle), BuildError> {
        Balloon::new(self.size_mib * PAGES_PER_MIB, self.deflate_on_oom).map_err(|source| {
            BuildError::Host {
                option: "balloon",
                what: "no eventfd can be made".to_owned(),
                source,
            }
        })
    }
}

impl DeviceConfig for BalloonConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let (device, handle) = self.open()?;
        Ok(BuiltDevice { device: Box::new(device), handle: Some(Box::new(handle)) })
    }

    fn gives_memory_back(&self) -> bool {
        true
    }
}
