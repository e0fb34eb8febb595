//! The guest's function over a device that is made of memory.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{Arc, Mutex},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    DeviceMemory, InterruptKind, Physical, Region, bars,
    config_space::{ConfigSpace, SIZE, Unsuitable},
    function::FunctionError,
};
use crate::{
    bus::{Bus, BusDevice},
    pci::{PciAddress, PciRoot, PciWindows},
    services::{MsiMessage, MsiVector, VmServices},
    virtio::shared_memory::SharedMemory,
};

const BAR0: u64 = 0x4000;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;
const VECTORS: u16 = 5;

/// An NVMe-like endpoint: a 64-bit register of 16 KiB with the MSI-X structures, a 32-bit one of 256
/// bytes, I/O ports; capabilities as they are chained in real devices.
fn header() -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    let mut set = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
    set(0x00, &[0x86, 0x80, 0x45, 0x58, 0x07, 0x05, 0x18, 0x00]);
    set(0x08, &[0x02, 0x02, 0x08, 0x01, 0x00, 0x00, 0x80, 0xff]);
    set(0x10, &0xfebd_0004_u64.to_le_bytes());
    set(0x18, &0xfebe_0000_u32.to_le_bytes());
    set(0x1c, &0x0000_c001_u32.to_le_bytes());
    set(0x2c, &[0xf4, 0x1a, 0x00, 0x11]);
    set(0x30, &0xfeb8_0001_u32.to_le_bytes());
    set(0x34, &[0x40]);
    set(0x3c, &[0x0b, 0x01]);
    // Power management, which can wake up, in D0.
    set(0x40, &[0x01, 0x50, 0x03, 0xc8, 0x00, 0x01, 0x00, 0x00]);
    // MSI, 64 bits, 8 vectors, masks.
    set(0x50, &[0x05, 0x70, 0x86, 0x01]);
    set(0x60, &[0xaa; 8]);
    // MSI-X in register 0.
    set(0x70, &[0x11, 0xd0, VECTORS as u8 - 1, 0x00]);
    set(0x74, &(TABLE as u32).to_le_bytes());
    set(0x78, &(PENDING as u32).to_le_bytes());
    // Vital product data, then PCI Express (an endpoint, version 2), then vendor specific.
    set(0xd0, &[0x03, 0x80, 0x00, 0x00]);
    set(0x80, &[0x10, 0xe0, 0x02, 0x00, 0x11, 0x22, 0x33, 0x44]);
    set(0xe0, &[0x09, 0x00, 0x08, 0x77]);
    bytes
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Config(u16, Vec<u8>),
    Write(u8, u64, Vec<u8>),
    Vectors(InterruptKind, usize),
    Reset,
}

struct Fake {
    config: [u8; SIZE],
    registers: File,
    seen: Mutex<Vec<Seen>>,
}

impl Fake {
    fn new(config: [u8; SIZE]) -> Arc<Self> {
        let fd = rustix::fs::memfd_create("registers", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let registers = File::from(fd);
        registers.set_len(BAR0).unwrap();
        Arc::new(Self { config, registers, seen: Mutex::default() })
    }

    fn note(&self, what: Seen) {
        self.seen.lock().unwrap().push(what);
    }

    fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Physical for Fake {
    fn name(&self) -> String {
        "0000:01:00.0".to_owned()
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        data.copy_from_slice(&self.config[offset..offset + data.len()]);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.note(Seen::Config(offset, data.to_vec()));
    }

    fn region(&self, bar: u8) -> Region {
        match bar {
            0 => Region { size: BAR0, mappable: vec![(0, BAR0)] },
            2 => Region { size: 0x100, mappable: Vec::new() },
            3 => Region { size: 0x20, mappable: Vec::new() },
            _ => Region::default(),
        }
    }

    fn read_region(&self, _: u8, offset: u64, data: &mut [u8]) {
        self.registers.read_exact_at(data, offset).unwrap();
    }

    fn write_region(&self, bar: u8, offset: u64, data: &[u8]) {
        self.note(Seen::Write(bar, offset, data.to_vec()));
    }

    fn map(&self, bar: u8, offset: u64, length: u64) -> io::Result<Arc<DeviceMemory>> {
        assert_eq!(bar, 0);
        Ok(Arc::new(DeviceMemory::new(self.registers.as_fd(), offset, length as usize)?))
    }

    fn vectors(&self, kind: InterruptKind) -> u32 {
        if kind == InterruptKind::Msi { 8 } else { VECTORS.into() }
    }

    fn set_vectors(&self, kind: InterruptKind, eventfds: &[&EventFd]) -> io::Result<()> {
        self.note(Seen::Vectors(kind, eventfds.len()));
        Ok(())
    }

    fn reset(&self) {
        self.note(Seen::Reset);
    }
}

struct Vector(EventFd, Mutex<Option<MsiMessage>>);

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.0
    }

    fn set_route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        *self.1.lock().unwrap() = message;
        Ok(())
    }
}

/// MSI vectors come first, then those of MSI-X.
#[derive(Default)]
struct Services {
    vectors: Mutex<Vec<Arc<Vector>>>,
    /// Bytes of a mapped piece, and where the guest sees it.
    placed: Mutex<Vec<(u64, u64)>>,
}

impl Services {
    fn route(&self, vector: usize) -> Option<MsiMessage> {
        *self.vectors.lock().unwrap()[vector].1.lock().unwrap()
    }

    fn placed(&self) -> Vec<(u64, u64)> {
        let mut placed = self.placed.lock().unwrap().clone();
        placed.sort();
        placed
    }
}

impl VmServices for Services {
    fn allocate_msi(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Arc::new(Vector(EventFd::new(EFD_NONBLOCK)?, Mutex::new(None)));
        self.vectors.lock().unwrap().push(vector.clone());
        Ok(vector)
    }

    fn register_ioevent(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister_ioevent(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn place_shared_memory(&self, _: &Arc<SharedMemory>, _: Option<u64>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn place_device_memory(
        &self,
        memory: &Arc<DeviceMemory>,
        address: Option<u64>,
    ) -> io::Result<()> {
        let mut placed = self.placed.lock().unwrap();
        match address {
            Some(address) => placed.push((memory.host_address(), address)),
            None => placed.retain(|(host, _)| *host != memory.host_address()),
        }
        Ok(())
    }
}

struct Rig {
    device: Arc<Fake>,
    services: Arc<Services>,
    mmio: Arc<Bus>,
    root: PciRoot,
    ecam: Arc<dyn BusDevice>,
}

impl Rig {
    fn new() -> Self {
        Self::with(header()).unwrap()
    }

    fn with(config: [u8; SIZE]) -> Result<Self, FunctionError> {
        let device = Fake::new(config);
        let services = Arc::new(Services::default());
        let mmio = Arc::new(Bus::new());
        let windows = PciWindows { mmio32: 0xc000_0000..0xd000_0000, mmio64: 1 << 32..2 << 32 };
        let root = PciRoot::new(windows, mmio.clone());
        let address = root.add_passthrough(device.clone(), services.clone())?;
        assert_eq!(address, PciAddress { bus: 0, device: 1, function: 0 });
        let ecam = root.ecam();
        Ok(Self { device, services, mmio, root, ecam })
    }

    fn read(&self, offset: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.ecam.read((1 << 15) + offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.ecam.write((1 << 15) + offset, data);
    }

    fn bar0(&self) -> u64 {
        self.read(0x10, 8) & !0xf
    }
}

#[test]
fn the_guest_sees_the_device_and_not_the_host() {
    let rig = Rig::new();
    assert_eq!(rig.read(0x00, 4), 0x5845_8086);
    assert_eq!(rig.read(0x08, 4), 0x0108_0202);
    assert_eq!(rig.read(0x0c, 4), 0, "a function alone, type 0, no self test");
    assert_eq!(rig.read(0x2c, 4), 0x1100_1af4);
    assert_eq!(rig.read(0x04, 4), 0x0010_0000, "nothing is on, and no interrupt pin is up");
    assert_eq!(rig.read(0x1c, 8), 0, "no I/O ports");
    assert_eq!(rig.read(0x30, 4), 0, "no option ROM");
    assert_eq!(rig.read(0x3c, 2), 0, "no interrupt pin");
    assert_eq!(rig.read(0x100, 4), 0, "no extended capabilities");
    assert_eq!((rig.read(0x10, 4), rig.read(0x18, 4)), (0xc000_0004, 0xc000_4000));

    // Sizes are found out as always.
    rig.write(0x10, &[0xff; 4]);
    rig.write(0x14, &[0xff; 4]);
    rig.write(0x18, &[0xff; 4]);
    rig.write(0x1c, &[0xff; 4]);
    rig.write(0x30, &[0xff; 4]);
    assert_eq!(rig.read(0x10, 8), !(BAR0 - 1) | 4);
    assert_eq!((rig.read(0x18, 4), rig.read(0x1c, 4), rig.read(0x30, 4)), (0xffff_ff00, 0, 0));
    assert_eq!(rig.device.take(), [], "the device stays where it is");
}

#[test]
fn capabilities_are_ours_the_devices_or_hidden() {
    let rig = Rig::new();
    let mut at = rig.read(0x34, 1);
    let mut list = Vec::new();
    while at != 0 {
        list.push((rig.read(at, 1), at));
        at = rig.read(at + 1, 1);
    }
    // Vital product data is left out.
    assert_eq!(list, [(0x01, 0x40), (0x05, 0x50), (0x11, 0x70), (0x10, 0x80), (0x09, 0xe0)]);
    // Power states are play: the device is not told, and it cannot wake up.
    rig.write(0x44, &[0x03, 0x81]);
    assert_eq!(rig.read(0x40, 8), 0x0000_000b_0003_5001);
    // MSI without masks.
    assert_eq!(rig.read(0x52, 2), 0x0086);
    assert_eq!(rig.read(0x60, 4), 0);
    // PCI Express: an endpoint of the root complex, the rest is the device's.
    assert_eq!(rig.read(0x80, 8), 0x4433_2211_0092_e010);
    assert_eq!(rig.device.take(), []);
    rig.write(0x88, &[0x10, 0x28]);
    rig.write(0xe2, &[0x55, 0x66]);
    rig.write(0x80, &[0xff, 0xff, 0xff, 0x01]);
    assert_eq!(
        rig.device.take(),
        [
            Seen::Config(0x88, vec![0x10, 0x28]),
            Seen::Config(0xe2, vec![0x55, 0x66]),
            Seen::Config(0x83, vec![0x01]),
        ]
    );
}

#[test]
fn registers_are_mapped_around_the_msix_structures() {
    let rig = Rig::new();
    assert_eq!(rig.services.placed(), []);
    rig.write(0x04, &[0x06, 0x00]);
    // The device is told, and that its interrupt pin stays down.
    assert_eq!(rig.device.take(), [Seen::Config(0x04, vec![0x06, 0x04])]);
    let pieces = |rig: &Rig| -> Vec<u64> {
        rig.services.placed().into_iter().map(|(_, address)| address).collect()
    };
    let bar0 = rig.bar0();
    assert_eq!(pieces(&rig), [bar0], "up to the table; behind it is only the page of pending bits");

    // What is not mapped is asked for.
    rig.device.registers.write_all_at(&[1, 2, 3, 4], 0x2800).unwrap();
    let mut data = [0; 4];
    assert!(rig.mmio.read(bar0 + 0x2800, &mut data));
    assert_eq!(data, [1, 2, 3, 4]);
    assert!(rig.mmio.write(bar0 + 0x2804, &[5; 4]));
    assert_eq!(rig.device.take(), [Seen::Write(0, 0x2804, vec![5; 4])]);
    assert!(rig.mmio.write(0xc000_4010, &[6]));
    assert_eq!(rig.device.take(), [Seen::Write(2, 0x10, vec![6])]);

    // They move, only inside the windows, and go when the guest says so: first the mapping, then
    // the device's decoding.
    rig.write(0x14, &[1, 0, 0, 0]);
    assert_eq!(pieces(&rig), [0x1_c000_0000]);
    rig.write(0x14, &[7, 0, 0, 0]);
    assert!(pieces(&rig).is_empty());
    rig.write(0x14, &[0; 4]);
    assert_eq!(pieces(&rig), [bar0]);
    assert_eq!(rig.device.take(), []);
    rig.write(0x04, &[0x04, 0x00]);
    assert!(pieces(&rig).is_empty());
    assert!(!rig.mmio.read(bar0, &mut data));
    assert_eq!(rig.device.take(), [Seen::Config(0x04, vec![0x04, 0x04])]);
}

#[test]
fn msix_vectors_are_routed_by_the_guests_table() {
    let rig = Rig::new();
    rig.write(0x04, &[0x06, 0x00]);
    rig.device.take();
    let table = rig.bar0() + TABLE;
    assert!(rig.mmio.write(table + 0x10, &0xfee0_1000_u64.to_le_bytes()));
    assert!(rig.mmio.write(table + 0x18, &0x41_u64.to_le_bytes()));
    assert_eq!(rig.device.take(), [], "the device's own table is the host's");
    let vector = 8 + 1;
    assert_eq!(rig.services.route(vector), None);
    rig.write(0x72, &0xc000_u16.to_le_bytes());
    assert_eq!(rig.device.take(), [Seen::Vectors(InterruptKind::MsiX, VECTORS.into())]);
    assert_eq!(rig.services.route(vector), None, "all are masked");
    // Raised while it was masked: that is its pending bit.
    rig.services.vectors.lock().unwrap()[vector].0.write(1).unwrap();
    let mut pending = [0; 8];
    assert!(rig.mmio.read(rig.bar0() + PENDING, &mut pending));
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    rig.write(0x72, &0x8000_u16.to_le_bytes());
    let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    assert_eq!(rig.services.route(vector), Some(message));
    assert_eq!(rig.read(0x70, 4), 0x8004_8011, "next is PCI Express");
    assert_eq!(rig.device.take(), []);
    rig.write(0x72, &[0, 0]);
    assert_eq!(rig.services.route(vector), None);
    assert_eq!(rig.device.take(), [Seen::Vectors(InterruptKind::MsiX, 0)]);
}

#[test]
fn msi_vectors_differ_in_their_lowest_bits() {
    let rig = Rig::new();
    rig.write(0x54, &0xfee0_2003_u32.to_le_bytes());
    rig.write(0x58, &1_u32.to_le_bytes());
    rig.write(0x5c, &0x4033_u16.to_le_bytes());
    assert_eq!(rig.device.take(), []);
    // Four vectors.
    rig.write(0x52, &0x0021_u16.to_le_bytes());
    assert_eq!(rig.device.take(), [Seen::Vectors(InterruptKind::Msi, 4)]);
    let routes: Vec<_> = (0..5).map(|vector| rig.services.route(vector)).collect();
    let message = |data| Some(MsiMessage { address: 0x1_fee0_2000, data });
    assert_eq!(routes, [message(0x4030), message(0x4031), message(0x4032), message(0x4033), None]);
    // Another message while it is on needs the kernel's routes only.
    rig.write(0x5c, &0x4048_u16.to_le_bytes());
    assert_eq!(rig.services.route(3), message(0x404b));
    assert_eq!(rig.device.take(), []);
    rig.write(0x52, &0_u16.to_le_bytes());
    assert_eq!(rig.device.take(), [Seen::Vectors(InterruptKind::Msi, 0)]);
    assert_eq!(rig.services.route(0), None);
}

#[test]
fn the_end_stops_and_resets_the_device() {
    let rig = Rig::new();
    rig.write(0x04, &[0x06, 0x00]);
    rig.write(0x72, &0x8000_u16.to_le_bytes());
    rig.device.take();
    rig.root.shutdown();
    assert_eq!(rig.services.placed(), []);
    assert_eq!(
        rig.device.take(),
        [Seen::Config(0x04, vec![0x00, 0x04]), Seen::Vectors(InterruptKind::MsiX, 0), Seen::Reset]
    );
}

#[test]
fn what_cannot_be_a_function_is_refused() {
    let refused = |change: &dyn Fn(&mut [u8; SIZE])| {
        let mut config = header();
        change(&mut config);
        match Rig::with(config) {
            Err(FunctionError::Unsuitable(reason)) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it was taken"),
        }
    };
    assert_eq!(refused(&|config| config[0x0e] = 0x81), Unsuitable::Bridge);
    assert_eq!(refused(&|config| config[0x34] = 0xd0), Unsuitable::PinOnly);
    assert_eq!(refused(&|config| config[0x06] = 0), Unsuitable::PinOnly);
    assert_eq!(refused(&|config| config.fill(0xff)), Unsuitable::Gone);
}

/// Whatever a device's configuration space says, and whatever the guest writes: no panic, and only
/// bits that are allowed to change do.
#[test]
fn no_configuration_space_and_no_write_is_too_odd() {
    let mut seed = 1_u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut made = 0;
    for _ in 0..2000 {
        let mut config = header();
        for _ in 0..random() % 24 {
            // Mostly in the capabilities.
            let at = if random() % 4 == 0 { random() % 0x40 } else { 0x40 + random() % 0xc0 };
            config[at as usize] = random() as u8;
        }
        config[0x0e] = 0;
        let device = Fake::new(config);
        let bars = bars::find(&config, device.as_ref());
        let Ok(mut space) = ConfigSpace::new(&config, &bars) else { continue };
        made += 1;
        for _ in 0..32 {
            let length = [1, 2, 4, 8][random() as usize % 4];
            let offset = (random() % 0x101) as u16;
            let data = random().to_le_bytes();
            let passed = space.write(offset, &data[..length]);
            assert!(passed.end <= length && usize::from(offset) + passed.end <= SIZE);
            let mut seen = [0; 4];
            space.overlay(0, &mut seen);
            assert_eq!(seen, config[..4], "who it is stays");
            let registers = space.msi_registers();
            assert!(registers.enabled <= space.msi().map_or(0, |(_, most)| most).min(32));
            let _ = space.msix_control();
            assert!(bars.iter().all(|bar| space.bar(bar).is_multiple_of(bar.size)));
        }
    }
    assert!(made > 500, "{made}");
}
