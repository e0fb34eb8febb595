//! The `--fs` option.

use std::path::PathBuf;

use super::{device::Fs, supervisor::Supervisor};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

/// Room for the tag in configuration space, in bytes.
pub(super) const MAX_TAG: usize = 36;

/// A parsed `--fs` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsConfig {
    /// What the guest mounts it by.
    pub tag: String,
    /// Where virtiofsd listens.
    pub socket: PathBuf,
}

impl FsConfig {
    /// Parses `tag=TAG,socket=PATH`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        let tag = spec.take("tag")?;
        if let Some(tag) = &tag
            && (tag.is_empty() || tag.len() > MAX_TAG)
        {
            let reason = format_args!("expected 1 to {MAX_TAG} bytes");
            return Err(spec.invalid("tag", tag, reason));
        }
        let socket = spec.take_path("socket")?;
        let (no_tag, no_socket) = (spec.missing("tag"), spec.missing("socket"));
        for key in ["path", "source", "dir"] {
            if let Some(value) = spec.take(key)? {
                let reason = "virtiofsd shares the folder, and listens at socket=; start it with \
                              --shared-dir";
                return Err(spec.invalid(key, &value, reason));
            }
        }
        spec.finish()?;
        Ok(Box::new(Self { tag: tag.ok_or(no_tag)?, socket: socket.ok_or(no_socket)? }))
    }
}

impl DeviceConfig for FsConfig {
    fn connects_later(&self) -> bool {
        true
    }

    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let supervisor = Supervisor::start(&self.tag, &self.socket)?;
        Ok(BuiltDevice { device: Box::new(Fs::new(&self.tag, Some(supervisor))), handle: None })
    }
}

/// A folder that nobody serves, for the conformance test.
pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
    Ok(BuiltDevice { device: Box::new(Fs::new("sample", None)), handle: None })
}
