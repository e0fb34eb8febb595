//! The `--sound` option.

use super::device::Sound;
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

/// A parsed `--sound` option. There is nothing to choose: `--sound off` never gets here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SoundConfig;

impl SoundConfig {
    /// Parses `[on]`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        if let Some(word) = spec.take_word()
            && word != "on"
        {
            return Err(SpecError::UnexpectedWord {
                option: spec.option().to_owned(),
                word,
                expected: "expected on or off".to_owned(),
            });
        }
        spec.finish()?;
        Ok(Box::new(Self))
    }

    /// A sound card for the conformance test.
    pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
        Box::new(Self).build()
    }
}

impl DeviceConfig for SoundConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let (device, handle) = Sound::new().map_err(|source| BuildError::Host {
            option: super::MODULE.option,
            what: "no timer can be made".to_owned(),
            source,
        })?;
        Ok(BuiltDevice { device: Box::new(device), handle: Some(Box::new(handle)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parse = |text: &str| SoundConfig::parse(Spec::parse("sound", text).unwrap());
        assert!(parse("").is_ok() && parse("on").is_ok());
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(error("loud"), "--sound: 'loud' is not understood; expected on or off");
        assert!(error("on,rate=1").starts_with("--sound: unknown key 'rate'"));
    }
}
