//! What the host's kernel says about a device, and what is in the way of handing it over
//! (`Documentation/ABI/testing/sysfs-bus-pci`, `Documentation/driver-api/vfio.rst`).

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use super::address::HostAddress;

/// Drivers that leave a group's other devices alone: VFIO's own are recognised by their names.
const HARMLESS: [&str; 2] = ["pci-stub", "pcieport"];
/// What the kernel calls groups that it makes up where there is no IOMMU.
const MADE_UP: &str = "vfio-noiommu";

/// A device that can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its folder.
    pub path: PathBuf,
    /// Its IOMMU group.
    pub group: u32,
}

/// Looks at a device below `sys` (`/sys`). An error says what is in the way and what to do.
pub fn find(sys: &Path, address: HostAddress) -> Result<Found, String> {
    let devices = sys.join("bus/pci/devices");
    let path = devices.join(address.to_string());
    if !path.exists() {
        return Err("this host has no such PCI device (lspci -D lists them)".to_owned());
    }
    let folder = path.join("iommu_group");
    let number = |name: OsString| name.to_str()?.parse::<u32>().ok();
    let Some(group) = link_name(&folder).and_then(number) else {
        return Err("the host uses no IOMMU, without which a device cannot be limited to the \
                    guest's memory: switch it on in the firmware (Intel VT-d, AMD-Vi) and, on \
                    Intel, start Linux with intel_iommu=on"
            .to_owned());
    };
    if fs::read_to_string(folder.join("name")).is_ok_and(|name| name.trim() == MADE_UP) {
        return Err(format!(
            "its group {group} is of VFIO's no-IOMMU mode, in which it would write to the host's \
             memory at the guest's addresses: switch the IOMMU on in the firmware (Intel VT-d, \
             AMD-Vi) and, on Intel, start Linux with intel_iommu=on"
        ));
    }
    let driver = driver(&path);
    if !driver.as_deref().is_some_and(|driver| driver.contains("vfio")) {
        return Err(rebind(&path, address, driver.as_deref()));
    }
    let mut others = siblings(&folder, &path);
    others.sort();
    if !others.is_empty() {
        return Err(format!(
            "its IOMMU group {group} can only be passed through as a whole, and the host uses {} in \
             it: give that to vfio-pci too, or take it from its driver",
            others.join(", ")
        ));
    }
    Ok(Found { path, group })
}

/// Who has the device, and how to give it to vfio-pci.
fn rebind(path: &Path, address: HostAddress, driver: Option<&str>) -> String {
    let path = path.display();
    let (who, unbind) = match driver {
        Some(driver) => (
            format!("the host's driver {driver} has it"),
            format!("echo {address} >{path}/driver/unbind; "),
        ),
        None => ("no driver has it".to_owned(), String::new()),
    };
    format!(
        "{who}; give it to vfio-pci: modprobe vfio-pci; echo vfio-pci >{path}/driver_override; \
         {unbind}echo {address} >/sys/bus/pci/drivers_probe"
    )
}

/// Other devices of a group that the host uses.
fn siblings(group: &Path, device: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(group.join("devices")) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| Some(entry.file_name().as_os_str()) != device.file_name())
        .filter_map(|entry| {
            let driver = driver(&entry.path())?;
            let harmless = driver.contains("vfio") || HARMLESS.contains(&driver.as_str());
            (!harmless).then(|| format!("{} ({driver})", entry.file_name().display()))
        })
        .collect()
}

fn driver(device: &Path) -> Option<String> {
    link_name(&device.join("driver"))?.into_string().ok()
}

/// The last part of where a link leads to.
fn link_name(link: &Path) -> Option<OsString> {
    fs::read_link(link).ok()?.file_name().map(OsString::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const DEVICE: &str = "0000:01:00.0";

    struct Sys(tempfile::TempDir);

    impl Sys {
        fn new() -> Self {
            let sys = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(sys.path("bus/pci/devices")).unwrap();
            sys
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn add(&self, device: &str, driver: Option<&str>, group: Option<&str>) {
            let folder = self.path("bus/pci/devices").join(device);
            fs::create_dir(&folder).unwrap();
            if let Some(driver) = driver {
                self.bind(device, driver);
            }
            if let Some(group) = group {
                let group = self.path("kernel/iommu_groups").join(group);
                fs::create_dir_all(group.join("devices")).unwrap();
                symlink(&group, folder.join("iommu_group")).unwrap();
                symlink(&folder, group.join("devices").join(device)).unwrap();
            }
        }

        fn bind(&self, device: &str, driver: &str) {
            let link = self.path("bus/pci/devices").join(device).join("driver");
            let _ = fs::remove_file(&link);
            symlink(self.path("bus/pci/drivers").join(driver), link).unwrap();
        }

        fn find(&self) -> Result<Found, String> {
            find(self.0.path(), DEVICE.parse().unwrap())
        }

        fn refused(&self, words: &[&str]) {
            let reason = self.find().unwrap_err();
            for word in words {
                assert!(reason.contains(word), "no '{word}' in: {reason}");
            }
        }
    }

    #[test]
    fn what_is_in_the_way_is_told_in_the_order_in_which_it_is_mended() {
        let sys = Sys::new();
        sys.refused(&["no such PCI device", "lspci -D"]);
        sys.add(DEVICE, Some("nvme"), None);
        sys.refused(&["no IOMMU", "intel_iommu=on"]);

        let sys = Sys::new();
        sys.add(DEVICE, None, Some("7"));
        sys.add("0000:01:00.1", Some("snd_hda_intel"), Some("7"));
        sys.add("0000:00:01.0", Some("pcieport"), Some("7"));
        sys.add("0000:01:00.2", None, Some("7"));
        sys.refused(&["no driver has it", "echo 0000:01:00.0 >/sys/bus/pci/drivers_probe"]);
        sys.bind(DEVICE, "nvme");
        let path = sys.path("bus/pci/devices").join(DEVICE);
        let unbind = format!("echo {DEVICE} >{}/driver/unbind", path.display());
        sys.refused(&["the host's driver nvme has it", "modprobe vfio-pci", &unbind]);
        sys.bind(DEVICE, "vfio-pci");
        sys.refused(&["group 7", "0000:01:00.1 (snd_hda_intel) in it"]);
        sys.bind("0000:01:00.1", "mlx5_vfio_pci");
        assert_eq!(sys.find(), Ok(Found { path, group: 7 }));

        fs::write(sys.path("kernel/iommu_groups/7/name"), "vfio-noiommu\n").unwrap();
        sys.refused(&["no-IOMMU mode", "the host's memory"]);
    }
}
