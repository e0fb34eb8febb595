//! Texts a user or a management program hands over: device options, the SPICE option, a UUID, a
//! line on the control socket. Parsing opens nothing.

#![no_main]

use devices::{spec::Spec, virtio::registry::MODULES};
use drago_vmm::{control::Request, display::{SpiceConfig, WebConfig}, smbios};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, text)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let which = usize::from(*which) % (MODULES.len() + 4);
    match which.checked_sub(MODULES.len()) {
        None => {
            let module = MODULES[which];
            let Ok(spec) = Spec::parse(module.option, &text) else { return };
            if let Err(error) = (module.parse)(spec) {
                let error = error.to_string();
                assert!(error.starts_with(&format!("--{}", module.option)), "{error}");
            }
        }
        Some(0) => drop(Spec::parse("spice", &text).and_then(SpiceConfig::parse)),
        Some(1) => drop(Spec::parse("web", &text).and_then(WebConfig::parse)),
        Some(2) => drop(smbios::parse_uuid(&text)),
        Some(_) => drop(serde_json::from_str::<Request>(&text)),
    }
});
