//! The block device (VIRTIO 1.3 §5.2) on a raw file or a block device.
//!
//! ```text
//!  driver ─ring─▶ worker ──▶ page cache has it: done at once (RWF_NOWAIT)
//!            ▲      └──────▶ pool: threads that wait for the disk, flush, discard
//!            └─── used ◀────────┘ in any order
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `image` | the file: opening, locking, alignment, operations |
//! | `request` | from a descriptor chain to an operation and its status |
//! | `pool` | threads for what has to wait |
//! | `device` | configuration space, life cycle, the queue's worker |

mod device;
mod image;
mod pool;
mod request;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use self::{
    device::Disk,
    image::{Image, ImageOptions},
    request::ID_LENGTH,
};
use super::registry::{BuildError, BuiltDevice, Count, DeviceConfig, DeviceModule};
use crate::spec::{Spec, SpecError};

/// The disk in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "disk",
    value_name: "path=FILE[,ro=on][,direct=on][,serial=TEXT][,id=NAME][,format=raw]",
    help: "a disk: a raw image file or a block device; /dev/vda, /dev/vdb… in the given order",
    count: Count::Many,
    presets: &[],
    can_be_off: false,
    served_elsewhere: false,
    parse,
    sample,
};

/// `--disk`.
#[derive(Debug)]
pub struct DiskConfig {
    path: PathBuf,
    options: ImageOptions,
    serial: String,
    /// Said with `format=raw`.
    surely_raw: bool,
}

fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
    // `--disk FILE` is short for `--disk path=FILE`.
    let path = match (spec.take_word(), spec.take_path("path")?) {
        (Some(word), None) => Some(PathBuf::from(word)),
        (None, path) => path,
        (Some(word), Some(_)) => {
            return Err(SpecError::UnexpectedWord {
                option: spec.option().to_owned(),
                word,
                expected: "there is a path= already".to_owned(),
            });
        }
    };
    let missing = spec.missing("path");
    let read_only = spec.take_switch("ro")?.unwrap_or(false);
    let direct = spec.take_switch("direct")?.unwrap_or(false);
    let mut surely_raw = false;
    for key in ["format", "image_type"] {
        if let Some(format) = spec.take(key)? {
            if format != "raw" {
                let reason = "only raw images and block devices are possible; convert it with \
                              'qemu-img convert -O raw'";
                return Err(spec.invalid(key, &format, reason));
            }
            surely_raw = true;
        }
    }
    let id = spec.take("id")?;
    let serial = spec.take("serial")?;
    if let Some(serial) = &serial
        && (serial.len() > ID_LENGTH || !serial.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        return Err(spec.invalid(
            "serial",
            serial,
            format_args!("up to {ID_LENGTH} printable ASCII characters are possible"),
        ));
    }
    spec.finish()?;
    let path = path.ok_or(missing)?;
    // The name given with id= shows up in the guest as the serial number unless there is another.
    let serial = serial.or(id).unwrap_or_default();
    let options = ImageOptions { read_only, direct };
    Ok(Box::new(DiskConfig { path, options, serial, surely_raw }))
}

impl DeviceConfig for DiskConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let image = Image::open(&self.path, &self.options)?;
        // The content of a disk is the guest's and never decides how it is read. But who has a
        // qcow2 image and gets a guest without a root file system would look for the reason long.
        if !self.surely_raw
            && let Some(format) = looks_like(&self.path)
        {
            let reason = format!(
                "path={}: this looks like a {format} image, and only raw ones are possible; convert it \
                 with 'qemu-img convert -O raw', or give it to the guest as it is with format=raw",
                self.path.display()
            );
            return Err(BuildError::Unusable { option: MODULE.option, reason });
        }
        Ok(BuiltDevice { device: Box::new(Disk::new(image, &self.serial)), handle: None })
    }
}

/// The format of a file that is probably not meant to be a raw image.
fn looks_like(path: &Path) -> Option<&'static str> {
    let mut start = [0; 8];
    File::open(path).ok()?.read_exact(&mut start).ok()?;
    match &start {
        [b'Q', b'F', b'I', 0xfb, ..] => Some("qcow2"),
        b"vhdxfile" => Some("VHDX"),
        b"conectix" => Some("VHD"),
        [b'K', b'D', b'M', b'V', ..] => Some("VMDK"),
        _ => None,
    }
}

fn sample() -> Result<BuiltDevice, BuildError> {
    let host = |source| BuildError::Host {
        option: MODULE.option,
        what: "no memory for the sample disk".to_owned(),
        source,
    };
    let file = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| host(error.into()))?;
    let file = File::from(file);
    file.set_len(1 << 20).map_err(host)?;
    let image = Image::new("sample".to_owned(), file, None, false)?;
    Ok(BuiltDevice { device: Box::new(Disk::new(image, "sample")), handle: None })
}
