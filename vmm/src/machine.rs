//! Building and running a machine from a checked configuration.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use devices::{
    bus::{Bus, RangeError},
    legacy::{
        SystemEvent, SystemEventSink, cmos::Cmos, i8042, port61, power, power::Power, pvpanic,
        pvpanic::PvPanic, serial, serial::Serial,
    },
    pci::{PciError, PciRoot, PciWindows},
    services::VmServices,
    vfio::{self, VfioError, function::FunctionError},
    virtio::{balloon::BalloonHandle, registry::BuildError, vsock::VsockHandle},
};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use spice_server::Expiry;
use vm_memory::GuestMemoryError;

use crate::{
    acpi,
    boot::{self, LoadError},
    config::{ConfigError, VmConfig},
    control::{
        self, ControlError, ControlTarget, SocketError,
        events::{EventHub, Subscription},
        server::ControlServer,
    },
    credentials::{self, CredentialError},
    display::{self, DisplayControl, DisplayError, Doors, Handles, Identity},
    exit::{Exit, ExitReason},
    firmware,
    kvm::{
        self,
        activity::Activities,
        cpuid::Template,
        services::KvmServices,
        vcpu::{self, Stop, VcpuThreads},
    },
    layout::{self, MIB},
    memory,
    notify::Readiness,
    seccomp, smbios, sys,
    terminal::{self, SerialConfig},
};

/// How long a terminal may take to accept the last of the guest's output.
const SERIAL_FLUSH: Duration = Duration::from_secs(2);

/// How long a guest may take to fill or empty its balloon before its progress is told.
const BALLOON_LIMIT: Duration = Duration::from_secs(10);

/// How often the main loop looks whether a processor of the guest stands still, in milliseconds.
const LOOK_MS: i32 = 5_000;

/// A machine could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A device.
    #[error(transparent)]
    Device(#[from] BuildError),
    /// A device of the host.
    #[error(transparent)]
    HostDevice(#[from] VfioError),
    /// A device of the host that the guest cannot have.
    #[error("--vfio {0}: it cannot be passed through")]
    Passthrough(String, #[source] FunctionError),
    /// The PCI bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The display.
    #[error(transparent)]
    Display(#[from] DisplayError),
    /// A credential.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] SocketError),
    /// Two devices in one place: a defect.
    #[error("the address map contradicts itself")]
    Map(#[from] RangeError),
    /// Tables could not be written: a defect.
    #[error("firmware tables cannot be written to guest memory")]
    Tables(#[source] GuestMemoryError),
    /// A resource of the host.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    /// The guest cannot go on.
    #[error("the virtual machine failed: {0}")]
    Failed(String),
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host(what, source)
}

/// How a machine ended, as an exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome(pub u8);

/// Builds the machine, runs it until it ends, flushes what it has written.
pub fn run(config: VmConfig) -> Result<Outcome, Error> {
    let started = Instant::now();
    config.validate()?;
    // Before any thread exists, so that all of them leave these signals to the main loop.
    let signals = sys::signal_fd(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
        .map_err(host("signals cannot be received"))?;
    let exit = Arc::new(Exit::new().map_err(host("no eventfd"))?);
    let machine = match Machine::build(config, &exit, started) {
        Ok(machine) => machine,
        // Building may take a while where it has to wait for others.
        Err(error) => {
            return match sys::read_signal(&signals) {
                Some(signal) => {
                    tracing::info!(%error, "signal {signal}: the virtual machine was not started");
                    Ok(Outcome(0))
                }
                None => Err(error),
            };
        }
    };
    let result = wait(signals, &exit, &machine.activities);
    let outcome = machine.end(&exit);
    result.and(outcome)
}

struct Machine {
    processors: VcpuThreads,
    pci: PciRoot,
    serial_writer: Option<serial::Writer>,
    control: Option<ControlServer>,
    display: Option<Arc<dyn DisplayControl>>,
    activities: Arc<Activities>,
    panic_exit_code: Option<u8>,
    terminal: Option<sys::RawTerminal>,
    readiness: Readiness,
    started: Instant,
}

impl Machine {
    fn build(config: VmConfig, exit: &Arc<Exit>, started: Instant) -> Result<Self, Error> {
        let mut strings = credentials::read(&config.credentials)?;
        let (spice, vnc) = (config.spice.as_ref(), config.vnc.as_ref());
        let doors = Doors::open(spice, config.web.as_ref(), vnc)?;
        let mut readiness = Readiness::from_environment();
        let kvm = kvm::open()?;
        let max = kvm.get_max_vcpus();
        if config.cpus as usize > max {
            return Err(kvm::Error::TooManyCpus { wanted: config.cpus, max }.into());
        }
        let (vm, timer) = kvm::create_vm(&kvm)?;
        let vm = Arc::new(vm);
        let ram_size = config.memory_mib * MIB;
        let memory = memory::allocate(config.memory_mib, config.huge_pages)?;
        memory::warm_up(&memory);
        sys::map_guest_memory(&vm, &memory).map_err(host("KVM refused the guest's memory"))?;
        let template = Template::new(&kvm, config.cpus)?;
        let mmio64 = layout::pci_mmio64(ram_size, template.address_bits());
        let rsdp = acpi::write(
            &memory,
            &acpi::Platform {
                cpus: config.cpus,
                mmio64: mmio64.clone(),
                serial: config.serial != SerialConfig::Off,
            },
        )
        .map_err(Error::Tables)?;
        firmware::write(&memory).map_err(Error::Tables)?;
        let registers = boot::load(&memory, ram_size, &config.boot, rsdp)?;

        let services = KvmServices::new(vm.clone());
        let ports = Arc::new(Bus::new());
        let mmio = Arc::new(Bus::new());
        let events = system_events(exit, config.panic_exit_code);
        let power = add_power(&ports, &services, &events)?;
        add_legacy(&ports, &events, timer)?;
        let (serial_writer, serial) = add_serial(&ports, &services, &config.serial)?;

        let windows = PciWindows { mmio32: layout::PCI_MMIO32, mmio64 };
        let pci = PciRoot::new(windows, mmio.clone());
        ports.insert(0xcf8, 8, pci.config_ports(events.clone()))?;
        mmio.insert(layout::ECAM.start, layout::ECAM.end - layout::ECAM.start, pci.ecam())?;
        let shared: Arc<dyn VmServices> = Arc::new(services);
        let mut handles = Handles::default();
        let host_devices = !config.host_devices.is_empty();
        let connecting = config.devices.iter().any(|(_, device)| device.connects_later());
        for (option, mut device) in config.devices {
            device.set_sandbox(config.sandbox.name());
            let built = device.build()?;
            let address = pci.add_virtio(built.device, shared.clone(), memory.clone())?;
            tracing::debug!(option, %address, "device added");
            let Some(handle) = built.handle else { continue };
            match handle.downcast::<VsockHandle>() {
                Ok(vsock) => strings.extend(readiness.report_by(*vsock)),
                Err(handle) => handles.by_option.push((option, handle)),
            }
        }
        if host_devices {
            let hypervisor = Some(kvm::passthrough(&vm)?);
            for device in vfio::open(&config.host_devices, &memory, hypervisor)? {
                let device: Arc<dyn vfio::Physical> = Arc::new(device);
                let address = pci
                    .add_passthrough(device.clone(), shared.clone())
                    .map_err(|error| Error::Passthrough(device.name(), error))?;
                tracing::info!(device = %device.name(), %address, "passed through");
            }
        }
        smbios::write(&memory, config.uuid, &strings).map_err(Error::Tables)?;
        let observed = Arc::<EventHub>::default();
        let identity = Identity { name: config.name.clone(), uuid: config.uuid };
        let display = display::start(doors, identity, &handles, &observed)?;

        let balloon: Option<BalloonHandle> =
            handles.by_option.iter().find_map(|(_, handle)| handle.downcast_ref().cloned());
        if let Some(size) = balloon.as_ref().map(BalloonHandle::size_mib)
            && u64::from(size) > config.memory_mib - memory::MINIMUM_MIB
        {
            return Err(ConfigError::Balloon { size, memory: config.memory_mib }.into());
        }
        let activities = Activities::new(config.cpus, &ports, &mmio);
        let target = Target {
            activities: activities.clone(),
            name: config.name,
            cpus: config.cpus,
            memory_mib: config.memory_mib,
            started,
            power,
            exit: exit.clone(),
            display: display.clone(),
            events: observed,
            balloon,
        };
        let control = match &config.control {
            Some(path) => Some(ControlServer::start(path, Arc::new(target))?),
            None => None,
        };
        let processors = vcpu::create(&vm, &template, config.cpus, &registers)?;
        let terminal = match (&serial, &config.serial) {
            (Some(serial), SerialConfig::Stdio) => {
                terminal::read_stdin(serial.clone(), exit.clone())
                    .map_err(host("standard input cannot be read"))?
            }
            _ => None,
        };
        // All files are open and all programs run: from here on less will do.
        let extras = seccomp::Extras { connecting, host_devices };
        let filter = seccomp::close(config.sandbox, extras);
        let processors = VcpuThreads::start(
            processors,
            &ports,
            &mmio,
            &activities,
            &processor_stops(exit),
            filter,
        )
        .map_err(host("a processor's thread cannot be started"))?;
        tracing::debug!(elapsed = ?started.elapsed(), "the guest runs");
        readiness.running().map_err(host("the guest's state cannot be relayed"))?;
        Ok(Self {
            processors,
            pci,
            serial_writer,
            control,
            display,
            activities,
            panic_exit_code: config.panic_exit_code,
            terminal,
            readiness,
            started,
        })
    }

    /// Stops the guest, flushes, and says how it went.
    fn end(self, exit: &Exit) -> Result<Outcome, Error> {
        self.readiness.stopping();
        self.processors.stop();
        self.pci.shutdown();
        if let Some(writer) = &self.serial_writer
            && !writer.flush(SERIAL_FLUSH)
        {
            tracing::warn!("not all of the serial port's output could be written");
        }
        drop(self.control);
        // Control clients may have it still.
        if let Some(display) = self.display {
            display.end();
        }
        drop(self.terminal);
        let exits = self.activities.exits();
        tracing::debug!(
            port = exits.ports,
            mmio = exits.mmio,
            other = exits.others,
            elapsed = ?self.started.elapsed(),
            "exits of the guest to this program"
        );
        let reason = exit.reason().unwrap_or(ExitReason::Quit);
        if let ExitReason::Failed(text) = reason {
            return Err(Error::Failed(text));
        }
        let panicked = exit.panicked();
        tracing::info!(panicked, "the virtual machine ended: {}", describe(&reason));
        Ok(Outcome(self.panic_exit_code.filter(|_| panicked).unwrap_or(0)))
    }
}

fn describe(reason: &ExitReason) -> String {
    match reason {
        ExitReason::PowerOff => "the guest switched itself off".to_owned(),
        ExitReason::Reset(way) => format!("the guest reset itself by {way}"),
        ExitReason::Panicked => "the guest's kernel panicked".to_owned(),
        ExitReason::Signal(signal) => format!("signal {signal}"),
        ExitReason::Quit => "it was told to quit".to_owned(),
        ExitReason::Failed(text) => text.clone(),
    }
}

fn system_events(exit: &Arc<Exit>, panic_exit_code: Option<u8>) -> SystemEventSink {
    let exit = exit.clone();
    Arc::new(move |event| match event {
        SystemEvent::PowerOff => exit.request(ExitReason::PowerOff),
        SystemEvent::Reset(way) => exit.request(ExitReason::Reset(way)),
        SystemEvent::Panicked => {
            tracing::error!("the guest's kernel panicked");
            exit.note_panic();
            if panic_exit_code.is_some() {
                exit.request(ExitReason::Panicked);
            }
        }
        SystemEvent::CrashLoaded => {
            tracing::error!("the guest's kernel panicked and starts its crash kernel");
            exit.note_panic();
        }
    })
}

fn processor_stops(exit: &Arc<Exit>) -> vcpu::StopSink {
    let exit = exit.clone();
    Arc::new(move |id, stop| match stop {
        Stop::Asked => {}
        Stop::TripleFault => exit.request(ExitReason::Reset("a triple fault")),
        Stop::Failed(text) => {
            exit.request(ExitReason::Failed(format!("processor {id}: {text}")));
        }
    })
}

fn add_power(
    ports: &Bus,
    services: &KvmServices,
    events: &SystemEventSink,
) -> Result<Arc<Power>, Error> {
    let line = services.line(layout::GED_GSI).map_err(host("no interrupt line"))?;
    let power = Arc::new(Power::new(events.clone(), line));
    ports.insert(power::PORT, power::PORTS, power.clone())?;
    Ok(power)
}

fn add_legacy(ports: &Bus, events: &SystemEventSink, timer: bool) -> Result<(), Error> {
    let controller = Arc::new(i8042::Controller::new(events.clone()));
    for (port, register) in
        [(i8042::PORT, i8042::Register::Data), (i8042::COMMAND_PORT, i8042::Register::Command)]
    {
        ports.insert(port, 1, Arc::new(i8042::Port::new(controller.clone(), register)))?;
    }
    ports.insert(
        devices::legacy::cmos::PORT,
        devices::legacy::cmos::PORTS,
        Arc::new(Cmos::new()),
    )?;
    ports.insert(pvpanic::PORT, 1, Arc::new(PvPanic::new(events.clone())))?;
    if !timer {
        ports.insert(port61::PORT, 1, Arc::new(port61::Port61::default()))?;
    }
    Ok(())
}

type SerialParts = (Option<serial::Writer>, Option<Arc<Serial>>);

fn add_serial(
    ports: &Bus,
    services: &KvmServices,
    config: &SerialConfig,
) -> Result<SerialParts, Error> {
    let sink = config.open().map_err(host("--serial: the file cannot be opened"))?;
    let Some(sink) = sink else { return Ok((None, None)) };
    let line = services.line(serial::GSI).map_err(host("no interrupt line"))?;
    let writer = serial::Writer::spawn(sink).map_err(host("no thread for the serial port"))?;
    let serial = Arc::new(Serial::new(line, &writer));
    ports.insert(serial::PORT, serial::PORTS, serial.clone())?;
    Ok((Some(writer), Some(serial)))
}

/// Waits for a reason to end, and has an eye on the processors.
fn wait(
    signals: std::os::fd::OwnedFd,
    exit: &Arc<Exit>,
    activities: &Activities,
) -> Result<(), Error> {
    let failed = |error: event_manager::Error| {
        Error::Host("the main loop failed", io::Error::other(error.to_string()))
    };
    let mut manager = EventManager::<MainLoop>::new().map_err(failed)?;
    manager.add_subscriber(MainLoop { signals, exit: exit.clone() });
    while exit.reason().is_none() {
        match manager.run_with_timeout(LOOK_MS) {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
            Err(error) => return Err(failed(error)),
        }
        activities.look(Instant::now());
    }
    Ok(())
}

struct MainLoop {
    signals: std::os::fd::OwnedFd,
    exit: Arc<Exit>,
}

impl MutEventSubscriber for MainLoop {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        while let Some(signal) = sys::read_signal(&self.signals) {
            self.exit.request(ExitReason::Signal(signal));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for events in
            [Events::new(&self.signals, EventSet::IN), Events::new(self.exit.event(), EventSet::IN)]
        {
            if let Err(error) = ops.add(events) {
                let text = format!("the main loop cannot watch for events: {error}");
                self.exit.request(ExitReason::Failed(text));
            }
        }
    }
}

/// What the control socket acts on.
struct Target {
    activities: Arc<Activities>,
    name: String,
    cpus: u32,
    memory_mib: u64,
    started: Instant,
    power: Arc<Power>,
    exit: Arc<Exit>,
    display: Option<Arc<dyn DisplayControl>>,
    events: Arc<EventHub>,
    balloon: Option<BalloonHandle>,
}

impl Target {
    fn display(&self) -> Result<&dyn DisplayControl, ControlError> {
        self.display.as_deref().ok_or_else(|| {
            ControlError(
                "this machine has no display; start it with --spice, --vnc or --gpu".to_owned(),
            )
        })
    }
}

impl ControlTarget for Target {
    fn status(&self) -> control::Status {
        control::Status {
            name: self.name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            cpus: self.cpus,
            processors: self.activities.ask().iter().map(ToString::to_string).collect(),
            memory_mib: self.memory_mib,
            spice: self.display.as_ref().and_then(|display| display.address()),
            spice_clients: self.display.as_ref().map_or_else(Vec::new, |d| d.clients()),
            spice_totals: self.display.as_ref().and_then(|display| display.spice_totals()),
            vnc: self.display.as_ref().and_then(|display| display.vnc_address()),
            vnc_clients: self.display.as_ref().map_or_else(Vec::new, |d| d.vnc_clients()),
        }
    }

    fn spice_clients(&self) -> Vec<serde_json::Value> {
        self.display.as_ref().map_or_else(Vec::new, |display| display.spice_counters())
    }

    fn set_password(
        &self,
        password: &str,
        expires: Expiry,
        disconnect: bool,
    ) -> Result<(), ControlError> {
        self.display()?.set_password(password, expires, disconnect)
    }

    fn set_certificate(&self, certificate: &str, key: &str) -> Result<(), ControlError> {
        self.display()?.set_certificate(certificate, key)
    }

    fn expire_password(&self, expires: Expiry) -> Result<(), ControlError> {
        self.display()?.expire_password(expires)
    }

    fn events(&self) -> Subscription {
        self.events.subscribe()
    }

    fn power_button(&self) {
        if let Err(error) = self.power.press_power_button() {
            tracing::warn!(%error, "the power button could not be pressed");
        }
    }

    fn quit(&self) {
        self.exit.request(ExitReason::Quit);
    }

    fn ctrl_alt_del(&self) -> Result<(), ControlError> {
        self.display()?.ctrl_alt_del()
    }

    fn screenshot(&self, display: u32) -> Result<Vec<u8>, ControlError> {
        self.display()?.screenshot(display)
    }

    fn resize(&self, display: u32, width: u32, height: u32) -> Result<(), ControlError> {
        self.display()?.resize(display, width, height)
    }

    fn balloon(&self, mib: Option<u32>) -> Result<u32, ControlError> {
        let Some(balloon) = &self.balloon else {
            let text = "this machine has no balloon; start it with --balloon";
            return Err(ControlError(text.to_owned()));
        };
        let Some(mib) = mib else { return Ok(balloon.actual_mib()) };
        let most = self.memory_mib.saturating_sub(memory::MINIMUM_MIB);
        if u64::from(mib) > most {
            let all = self.memory_mib;
            return Err(ControlError(format!(
                "the guest has {all} MiB and needs some of them: at most {most} can be taken"
            )));
        }
        balloon.set_size_mib(mib);
        Ok(balloon.wait_settled(BALLOON_LIMIT))
    }
}
