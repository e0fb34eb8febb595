//! Opening a device of the host, and talking to it through its descriptor.

use std::{fmt, io, mem::ManuallyDrop, path::Path, sync::Arc};

use rustix::process::{Resource, getrlimit};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{
    VfioContainer, VfioDevice, VfioDeviceFd, VfioError as CallError, VfioRegionInfoCap,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{
    DeviceMemory, HostAddress, InterruptKind, Physical, Region, VfioError, sys,
    sysfs::{self, Found},
};
use crate::GuestMemory;

/// An open device that reaches the guest's memory.
pub struct HostDevice {
    address: HostAddress,
    /// Never dropped: the kernel takes everything back in the right order when the process ends, and
    /// what the library does instead needs system calls that are not allowed any more by then.
    open: ManuallyDrop<Open>,
}

struct Open {
    device: VfioDevice,
    /// What the device may write to.
    _memory: GuestMemory,
}

impl fmt::Debug for HostDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostDevice").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Opens devices and lets all of them reach all of the guest's memory. `hypervisor` gets to know
/// of them.
pub fn open(
    addresses: &[HostAddress],
    memory: &GuestMemory,
    hypervisor: Option<VfioDeviceFd>,
) -> Result<Vec<HostDevice>, VfioError> {
    let Some(first) = addresses.first() else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for address in addresses {
        let unusable = |reason| VfioError::Unusable { address: *address, reason };
        found.push((*address, sysfs::find(Path::new("/sys"), *address).map_err(unusable)?));
    }
    let container = VfioContainer::new(hypervisor.map(Arc::new))
        .map_err(|error| explain(*first, None, error))?;
    let container = Arc::new(container);
    let mut devices = Vec::new();
    for (address, found) in found {
        let device = VfioDevice::new(&found.path, container.clone(), true)
            .map_err(|error| explain(address, Some(&found), error))?;
        tracing::debug!(%address, group = found.group, "device of the host opened");
        devices.push((address, ManuallyDrop::new(Open { device, _memory: memory.clone() })));
    }
    // The container has an address space as soon as it has a group.
    sys::map_guest_memory(&container, memory).map_err(|error| pinning(*first, memory, error))?;
    Ok(devices.into_iter().map(|(address, open)| HostDevice { address, open }).collect())
}

/// Says what a failed call means.
fn explain(address: HostAddress, found: Option<&Found>, error: CallError) -> VfioError {
    let group = found.map_or_else(String::new, |found| found.group.to_string());
    let reason = match &error {
        CallError::OpenContainer(source) => match source.kind() {
            io::ErrorKind::NotFound => {
                "/dev/vfio/vfio does not exist: modprobe vfio-pci".to_owned()
            }
            _ => format!(
                "/dev/vfio/vfio cannot be opened ({source}); it is for everybody: chmod 666 /dev/vfio/vfio"
            ),
        },
        CallError::OpenGroup(source, _) => match source.kind() {
            io::ErrorKind::PermissionDenied => {
                format!("/dev/vfio/{group} belongs to somebody else: chown USER /dev/vfio/{group}")
            }
            io::ErrorKind::ResourceBusy => {
                format!(
                    "its group is in use by another machine or program (fuser /dev/vfio/{group})"
                )
            }
            _ => format!("/dev/vfio/{group} cannot be opened ({source})"),
        },
        CallError::GroupViable => format!(
            "its IOMMU group {group} can only be passed through as a whole, and the host uses a \
             part of it (ls -l /sys/kernel/iommu_groups/{group}/devices/*/driver)"
        ),
        CallError::ContainerSetIOMMU(errno) if errno.errno() == libc::EPERM => {
            "the host's IOMMU does not check interrupts (no interrupt remapping), so a device could \
             raise any: switch that on in the firmware (x2APIC, IOMMU); where the guest is trusted, \
             echo 1 >/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
                .to_owned()
        }
        CallError::VfioExtension => {
            "the host's kernel lacks VFIO's type 1 IOMMU support: modprobe vfio_iommu_type1"
                .to_owned()
        }
        _ => {
            let what = "the device cannot be opened".to_owned();
            return VfioError::Host { address, what, source: Box::new(error) };
        }
    };
    VfioError::Unusable { address, reason }
}

/// The guest's memory could not be pinned.
fn pinning(address: HostAddress, memory: &GuestMemory, error: CallError) -> VfioError {
    let mib = memory.iter().map(GuestMemoryRegion::len).sum::<u64>() >> 20;
    if let CallError::IommuDmaMap(errno) = &error
        && errno.errno() == libc::ENOMEM
    {
        let limit = match getrlimit(Resource::Memlock).current {
            Some(bytes) => format!("is {} MiB", bytes >> 20),
            None => "is none, so the host has too little free".to_owned(),
        };
        let reason = format!(
            "the guest's {mib} MiB must stay in the host's memory; the limit for that {limit} \
             (ulimit -l unlimited; systemd: LimitMEMLOCK=infinity)"
        );
        return VfioError::Unusable { address, reason };
    }
    let what = format!("the guest's {mib} MiB cannot be made visible to the device");
    VfioError::Host { address, what, source: Box::new(error) }
}

fn irq_index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

impl HostDevice {
    fn device(&self) -> &VfioDevice {
        &self.open.device
    }
}

impl Physical for HostDevice {
    fn name(&self) -> String {
        self.address.to_string()
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.device().region_read(VFIO_PCI_CONFIG_REGION_INDEX, data, offset.into());
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.device().region_write(VFIO_PCI_CONFIG_REGION_INDEX, data, offset.into());
    }

    fn region(&self, bar: u8) -> Region {
        let (device, bar) = (self.device(), bar.into());
        let size = device.get_region_size(bar);
        if device.get_region_flags(bar) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Region { size, mappable: Vec::new() };
        }
        let sparse = device.get_region_caps(bar).into_iter().find_map(|cap| match cap {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        });
        let mappable = match sparse {
            Some(areas) => areas.iter().map(|area| (area.offset, area.size)).collect(),
            None => vec![(0, size)],
        };
        Region { size, mappable }
    }

    fn read_region(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.device().region_read(bar.into(), data, offset);
    }

    fn write_region(&self, bar: u8, offset: u64, data: &[u8]) {
        self.device().region_write(bar.into(), data, offset);
    }

    fn map(&self, bar: u8, offset: u64, length: u64) -> io::Result<Arc<DeviceMemory>> {
        let start = self.device().get_region_offset(bar.into()) + offset;
        let fd = sys::descriptor(self.device());
        Ok(Arc::new(DeviceMemory::new(fd, start, length as usize)?))
    }

    fn vectors(&self, kind: InterruptKind) -> u32 {
        self.device().get_irq_info(irq_index(kind)).map_or(0, |info| info.count)
    }

    fn set_vectors(&self, kind: InterruptKind, eventfds: &[&EventFd]) -> io::Result<()> {
        let (device, index) = (self.device(), irq_index(kind));
        let result = match eventfds {
            [] => device.disable_irq(index),
            some => device.enable_irq(index, some.to_vec()),
        };
        // The library tells which call failed, and the kernel why.
        result.map_err(|error| {
            let cause = io::Error::last_os_error();
            io::Error::new(cause.kind(), format!("{error}: {cause}"))
        })
    }

    fn reset(&self) {
        self.device().reset();
    }
}
