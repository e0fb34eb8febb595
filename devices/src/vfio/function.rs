//! A device of the host as a function of the guest's bus.
//!
//! Locks: `state` guards configuration space and what follows from it; `msix` guards the vector table.
//! Registers are read and written without either.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    DeviceMemory, InterruptKind, Physical, VfioError,
    bars::{self, Bar},
    config_space::{COMMAND_NO_INTX, ConfigSpace, MsixPlace, SIZE, Unsuitable},
    msi::Msi,
};
use crate::{
    bus::{Bus, BusDevice},
    pci::{
        PciError, PciFunction, PciWindows,
        config::{COMMAND, COMMAND_MEMORY},
        msix::Msix,
    },
    services::{MsiVector, VmServices},
};

/// A device of the host as a PCI function.
pub struct VfioPci {
    name: String,
    device: Arc<dyn Physical>,
    this: Weak<Self>,
    services: Arc<dyn VmServices>,
    windows: PciWindows,
    /// The address space holds this function while it is mapped, so this must not hold it back.
    mmio_bus: Weak<Bus>,
    bars: Vec<Bar>,
    msix_place: Option<MsixPlace>,
    msix: Mutex<Msix>,
    msix_vectors: Vec<Arc<dyn MsiVector>>,
    state: Mutex<State>,
    /// The guest moved registers onto another device's; set and read under `state`, but read
    /// without it to skip the common case.
    displaced: AtomicBool,
}

struct State {
    config: ConfigSpace,
    /// By the index in `bars`: where the guest sees it, and the mapped parts of it.
    places: Vec<Place>,
    msi: Msi,
    msix_on: bool,
}

struct Place {
    at: Option<u64>,
    pieces: Vec<(u64, Arc<DeviceMemory>)>,
}

/// Why a device cannot be a function.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// The device is not made for it.
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    /// The guest's machine has no room or no interrupts for it.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The kernel says so.
    #[error(transparent)]
    Vfio(#[from] VfioError),
}

impl VfioPci {
    /// Makes the function; it becomes visible when it is put on a bus. `allocate` gives a place of so
    /// many bytes to a base address register; below 4 GiB if it says so.
    pub fn new(
        device: Arc<dyn Physical>,
        services: Arc<dyn VmServices>,
        windows: PciWindows,
        mmio_bus: &Arc<Bus>,
        mut allocate: impl FnMut(u64, bool) -> Result<u64, PciError>,
    ) -> Result<Arc<Self>, FunctionError> {
        let name = device.name();
        let mut bytes = [0xff; SIZE];
        device.read_config(0, &mut bytes);
        let bars = bars::find(&bytes, device.as_ref());
        let mut config = ConfigSpace::new(&bytes, &bars)?;
        for bar in &bars {
            config.set_bar(bar, allocate(bar.size, !bar.wide)?);
        }
        let vectors = |kind, most: u16| -> Result<Vec<Arc<dyn MsiVector>>, PciError> {
            let count = device.vectors(kind).min(most.into());
            let what = "an interrupt vector";
            let error = |source| PciError::Host { device: name.clone(), what, source };
            (0..count).map(|_| services.allocate_msi().map_err(error)).collect()
        };
        let msi = Msi::new(vectors(InterruptKind::Msi, config.msi().map_or(0, |(_, most)| most))?);
        let msix_place = config.msix().cloned();
        let most = msix_place.as_ref().map_or(0, |place| place.vectors);
        let msix_vectors = vectors(InterruptKind::MsiX, most)?;
        let mut places = Vec::with_capacity(bars.len());
        for bar in &bars {
            let trapped = msix_place.as_ref().map_or(Vec::new(), |place| trapped(place, bar.index));
            let mut pieces = Vec::new();
            for piece in bar.pieces(&trapped) {
                match device.map(bar.index, piece.start, piece.end - piece.start) {
                    Ok(memory) => pieces.push((piece.start, memory)),
                    Err(error) => {
                        tracing::warn!(device = %name, bar = bar.index, ?piece, %error, "registers cannot be mapped; each access takes the slow path");
                    }
                }
            }
            places.push(Place { at: None, pieces });
        }
        Ok(Arc::new_cyclic(|this| Self {
            name,
            device,
            this: this.clone(),
            services,
            windows,
            mmio_bus: Arc::downgrade(mmio_bus),
            bars,
            msix_place,
            msix: Mutex::new(Msix::new(msix_vectors.iter().cloned())),
            msix_vectors,
            state: Mutex::new(State { config, places, msi, msix_on: false }),
            displaced: AtomicBool::new(false),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the registers appear where the base address and command registers say.
    fn sync_mapping(&self, state: &mut State) {
        let decoding = state.config.command() & COMMAND_MEMORY != 0;
        let mut displaced = false;
        let State { config, places, .. } = state;
        let wanted: Vec<Option<u64>> = self
            .bars
            .iter()
            .map(|bar| {
                let address = config.bar(bar);
                (decoding && self.windows.contains(address, bar.size)).then_some(address)
            })
            .collect();
        // All go before any comes: registers may change places.
        for (place, wanted) in places.iter_mut().zip(&wanted) {
            if place.at != *wanted {
                self.take_out(place);
            }
        }
        for ((bar, place), wanted) in self.bars.iter().zip(places).zip(wanted) {
            if let Some(address) = wanted
                && place.at != wanted
            {
                displaced |= !self.put_in(bar, place, address);
            }
        }
        self.displaced.store(displaced, Ordering::Relaxed);
    }

    fn take_out(&self, place: &mut Place) {
        let Some(address) = place.at.take() else { return };
        for (_, memory) in &place.pieces {
            if let Err(error) = self.services.place_device_memory(memory, None) {
                tracing::error!(device = %self.name, %error, "registers stay where they were");
            }
        }
        if let Some(bus) = self.mmio_bus.upgrade() {
            bus.remove(address);
        }
    }

    fn put_in(&self, bar: &Bar, place: &mut Place, address: u64) -> bool {
        let (Some(bus), Some(this)) = (self.mmio_bus.upgrade(), self.this.upgrade()) else {
            return true;
        };
        let registers = Arc::new(Registers { function: this, bar: bar.index });
        if let Err(error) = bus.insert(address, bar.size, registers) {
            tracing::debug!(device = %self.name, bar = bar.index, %error, "not mapped");
            return false;
        }
        place.at = Some(address);
        for (offset, memory) in &place.pieces {
            if let Err(error) = self.services.place_device_memory(memory, Some(address + offset)) {
                tracing::warn!(device = %self.name, %error, "registers take the slow path");
            }
        }
        true
    }

    /// Tells the device what the guest wrote into the command register, and moves its registers.
    ///
    /// They are taken out first and put in last: what is mapped while the device does not decode its
    /// addresses would stop the processor that touches it.
    fn command(&self, state: &mut State) {
        // The interrupt pin of the host is nobody's.
        let command = (state.config.command() | COMMAND_NO_INTX).to_le_bytes();
        if state.config.command() & COMMAND_MEMORY != 0 {
            self.device.write_config(COMMAND, &command);
            self.sync_mapping(state);
        } else {
            self.sync_mapping(state);
            self.device.write_config(COMMAND, &command);
        }
    }

    fn sync_msi(&self, state: &mut State) {
        let registers = state.config.msi_registers();
        if let Some(vectors) = state.msi.update(registers) {
            self.set_vectors(InterruptKind::Msi, vectors);
        }
    }

    fn sync_msix(&self, state: &mut State) {
        let control = state.config.msix_control();
        let mut msix = self.msix();
        msix.set_control(control);
        if msix.enabled() != state.msix_on {
            state.msix_on = msix.enabled();
            let vectors = if state.msix_on { self.msix_vectors.as_slice() } else { &[] };
            self.set_vectors(InterruptKind::MsiX, vectors);
        }
    }

    fn set_vectors(&self, kind: InterruptKind, vectors: &[Arc<dyn MsiVector>]) {
        let eventfds: Vec<_> = vectors.iter().map(|vector| vector.eventfd()).collect();
        tracing::debug!(device = %self.name, ?kind, vectors = vectors.len(), "interrupts set");
        if let Err(error) = self.device.set_vectors(kind, &eventfds) {
            tracing::error!(device = %self.name, ?kind, vectors = vectors.len(), %error, "the device's interrupts cannot be set");
        }
    }

    /// Whether an offset of a base address register is in the vector table or the pending bits, and
    /// where there.
    fn msix_structure(&self, bar: u8, offset: u64) -> Option<(Structure, u64)> {
        let place = self.msix_place.as_ref()?;
        [(Structure::Table, &place.table), (Structure::Pending, &place.pending)]
            .into_iter()
            .find(|(_, (index, range))| *index == bar && range.contains(&offset))
            .map(|(structure, (_, range))| (structure, offset - range.start))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Structure {
    Table,
    Pending,
}

/// The parts of a base address register that are ours.
fn trapped(place: &MsixPlace, bar: u8) -> Vec<Range<u64>> {
    [&place.table, &place.pending]
        .into_iter()
        .filter(|(index, _)| *index == bar)
        .map(|(_, range)| range.clone())
        .collect()
}

impl PciFunction for VfioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let state = self.state();
        if state.config.is_passed(offset, data.len()) {
            data.fill(0xff);
            self.device.read_config(offset, data);
        }
        state.config.overlay(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state();
        let passed = state.config.write(offset, data);
        let touched = |register: u16, length: u16| {
            offset < register + length && register < offset.saturating_add(data.len() as u16)
        };
        if touched(COMMAND, 2) {
            self.command(&mut state);
        } else if touched(0x10, 24) {
            self.sync_mapping(&mut state);
        }
        if state.config.msi().is_some_and(|(at, _)| touched(at + 2, 12)) {
            self.sync_msi(&mut state);
        }
        if state.config.msix().is_some_and(|place| touched(place.capability + 2, 2)) {
            self.sync_msix(&mut state);
        }
        if let Some(part) = data.get(passed.clone()).filter(|part| !part.is_empty()) {
            self.device.write_config(offset + passed.start as u16, part);
        }
    }

    fn retry_mapping(&self) {
        if self.displaced.load(Ordering::Relaxed) {
            self.sync_mapping(&mut self.state());
        }
    }

    fn shutdown(&self) {
        let mut state = self.state();
        // Neither memory decoding nor bus mastering: nothing comes from it any more.
        state.config.write(COMMAND, &[0, 0]);
        self.command(&mut state);
        if state.msix_on {
            state.msix_on = false;
            self.set_vectors(InterruptKind::MsiX, &[]);
        }
        if state.config.msi_registers().enabled > 0 {
            self.set_vectors(InterruptKind::Msi, &[]);
        }
        self.device.reset();
    }
}

/// One base address register on the memory bus: what of it is not mapped.
struct Registers {
    function: Arc<VfioPci>,
    bar: u8,
}

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let function = &self.function;
        match function.msix_structure(self.bar, offset) {
            Some((Structure::Table, at)) => function.msix().read_table(at, data),
            Some((Structure::Pending, at)) => function.msix().read_pending(at, data),
            None => function.device.read_region(self.bar, offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let function = &self.function;
        match function.msix_structure(self.bar, offset) {
            Some((Structure::Table, at)) => function.msix().write_table(at, data),
            Some((Structure::Pending, _)) => {}
            None => function.device.write_region(self.bar, offset, data),
        }
    }

    fn describe(&self, offset: u64) -> String {
        let what = match self.function.msix_structure(self.bar, offset) {
            Some((Structure::Table, _)) => "MSI-X table",
            Some((Structure::Pending, _)) => "MSI-X pending bits",
            None => "registers",
        };
        format!(
            "{}: {what}, base address register {}, offset {offset:#x}",
            self.function.name, self.bar
        )
    }
}
