//! The command line. The flags of devices come from their registry.

use std::{ffi::OsString, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use devices::{
    spec::{Spec, SpecError},
    vfio::HostAddress,
    virtio::registry::{Count, DeviceConfig, MODULES, Machines},
};

use crate::{
    boot::BootConfig,
    config::VmConfig,
    control::client::Action,
    credentials::CredentialConfig,
    display::{SpiceConfig, VncConfig, WebConfig},
    seccomp, smbios,
    terminal::SerialConfig,
};

/// What to do.
#[derive(Debug)]
pub enum Invocation {
    /// Run a machine.
    Run {
        /// The machine.
        config: Box<VmConfig>,
        /// Log filter.
        log: String,
    },
    /// Talk to a running machine.
    Ctl {
        /// Its control socket.
        control: PathBuf,
        /// What to tell it.
        action: Action,
    },
    /// Examine the host.
    Doctor {
        /// Machine-readable.
        json: bool,
    },
}

/// The command line was wrong.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Syntax, or a request for help.
    #[error(transparent)]
    Clap(#[from] clap::Error),
    /// Something that other programs do and this one does not.
    #[error("{option}: {hint}")]
    Refused {
        /// The option.
        option: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
    /// As QEMU has them.
    #[error("-{0}: options have two dashes: --{0}")]
    OneDash(String),
    /// A word where an option is expected.
    #[error(
        "'{0}' belongs to no option; a value with spaces needs quotes: --cmdline 'root=/dev/vda rw'"
    )]
    Stray(String),
    /// A device option.
    #[error(transparent)]
    Device(#[from] SpecError),
}

/// What follows the address of `--spice`.
const SPICE: &str = "Serve the screen to SPICE clients; more, after commas:
password-file=FILE, password-required=on
clients=exclusive|refuse|shared|view-only
tls-cert-file=FILE, tls-key-file=FILE, tls-port=PORT, tls-channels=all|none|NAME+NAME…
unix=PATH, unix-mode=OCTAL, web-origin=ORIGIN, capture=FILE
copy-paste=on|off|to-guest|to-client, copy-paste-limit=MIB, file-transfer=on|off
video-codec=auto|mjpeg|vp8|h264|off";

#[derive(Debug, Parser)]
#[command(name = "drago-vmm", version, about = "A virtual machine monitor for graphical microVMs")]
#[command(args_override_self = true, args_conflicts_with_subcommands = true)]
#[command(subcommand_negates_reqs = true, max_term_width = 100, next_line_help = true)]
struct Cli {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
struct MachineArgs {
    /// Name of the machine, for the log and 'ctl status'
    #[arg(long, default_value = "drago")]
    name: String,
    /// Linux bzImage, or ELF image with a PVH or 64-bit entry
    #[arg(long, value_name = "FILE", required = true)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", allow_hyphen_values = true)]
    cmdline: String,
    /// Number of processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = mebibytes)]
    memory: u64,
    /// Take RAM from 2 MiB huge pages
    #[arg(long)]
    hugepages: bool,
    /// Serial port COM1: stdio, off or file=PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialConfig,
    /// Control socket for 'drago-vmm ctl'
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// System UUID the guest sees (SMBIOS)
    #[arg(long, value_parser = smbios::parse_uuid)]
    uuid: Option<[u8; 16]>,
    /// Credential for the guest's systemd, read from a file (repeatable)
    #[arg(long, value_name = "NAME=FILE", action = ArgAction::Append)]
    credential: Vec<CredentialConfig>,
    #[arg(long, value_name = "ADDRESS:PORT|unix:PATH[,KEY=VALUE…]", help = SPICE)]
    spice: Option<String>,
    /// Show browsers a page with a SPICE client, on the address of --spice and on this one
    #[arg(long, value_name = "ADDRESS:PORT[,dir=FOLDER]", num_args = 0..=1)]
    #[arg(default_missing_value = "")]
    web: Option<String>,
    /// Serve the screen to VNC clients
    #[arg(
        long,
        value_name = "ADDRESS:PORT[,password-file=FILE][,copy-paste=on|off|to-guest|to-client]"
    )]
    vnc: Option<String>,
    /// PCI devices of the host for the guest, by address or path in /sys (repeatable)
    #[arg(long, value_name = "ADDRESS[,ADDRESS…]", action = ArgAction::Append)]
    #[arg(value_delimiter = ',', help_heading = "Devices")]
    vfio: Vec<HostAddress>,
    /// End with this status when the guest's kernel panics
    #[arg(long, value_name = "STATUS")]
    panic_exit_code: Option<u8>,
    /// Limit what this program and drago-gpu can do to what they need: on, off, or log (what
    /// would be refused is logged by the kernel)
    #[arg(long, value_name = "MODE", default_value = "on")]
    sandbox: seccomp::Mode,
    /// Log filter, such as debug or info,devices=trace
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Talk to a running machine
    Ctl {
        /// Control socket of the machine
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
        #[command(subcommand)]
        action: Action,
    },
    /// Examine this host and say how to mend what is missing
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// What people look for because other programs have it.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["--9p", "--virtfs", "--shared-dir", "--share"],
        "there is no 9p; run virtiofsd and connect to it with --fs tag=TAG,socket=PATH \
         (microvm.nix: proto = \"virtiofs\")",
    ),
    (
        &["--virtio-mem", "--memory-hotplug", "--hotplug-memory", "--hotplug"],
        "memory cannot be added at run time; give the machine the most it may ever need with \
         --memory, and --balloon, which gives what the guest does not use back to the host",
    ),
    (
        &["--bridge"],
        "no bridge is joined; make a tap interface, put it into the bridge, and use --net tap=IFNAME",
    ),
    (
        &["--usb", "--usb-host", "--usbredir"],
        "USB devices of the host cannot be passed through; a whole USB controller can, as a PCI \
         device: --vfio 0000:01:00.0",
    ),
    (
        &["--device", "--host-device", "--pci"],
        "a PCI device of the host is passed through with --vfio 0000:01:00.0; virtio devices have \
         options of their own, see --help",
    ),
    (
        &["--user", "--run-with", "--uid", "--gid"],
        "the user is not changed; start drago-vmm as the user it is to be, a member of the group kvm",
    ),
    (
        &["--cpu", "--accel", "--machine"],
        "guests run on KVM with the host's processor, nothing else; how many they get is --cpus N",
    ),
    (
        &["--drive", "--hda", "--cdrom", "--pmem"],
        "a disk is a raw image or a block device: --disk path=FILE[,ro=on]",
    ),
    (
        &["--virtiofs", "--vhost-user-fs"],
        "run virtiofsd and connect to it with --fs tag=TAG,socket=PATH",
    ),
    (
        &["--watchdog"],
        "there is no watchdog device; the guest's kernel has one of its own, the module softdog, which \
         resets the machine",
    ),
    (&["--display"], "the screen is served by --spice ADDRESS:PORT"),
    (&["--api-socket", "--qmp", "--monitor"], "the socket for 'drago-vmm ctl' is --control PATH"),
];

/// Says what to do instead of an option that does not exist.
fn refusal(error: clap::Error) -> CliError {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
    {
        let name = argument.split('=').next().unwrap_or_default();
        for (options, hint) in REFUSED {
            if let Some(option) = options.iter().find(|option| **option == name) {
                return CliError::Refused { option, hint };
            }
        }
    }
    // Whatever stands alone is a subcommand to clap.
    if error.kind() == ErrorKind::ArgumentConflict
        && let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand)
        && !["ctl", "doctor", "help"].contains(&word.as_str())
    {
        return CliError::Stray(word.clone());
    }
    error.into()
}

/// An option of ours in the way QEMU writes them: with one dash.
fn one_dash(arguments: &[OsString]) -> Option<CliError> {
    let options = command();
    let long = |name: &str| options.get_arguments().any(|option| option.get_long() == Some(name));
    let name = arguments.iter().skip(1).find_map(|argument| {
        argument.to_str()?.strip_prefix('-').filter(|name| name.len() > 1 && long(name))
    })?;
    Some(CliError::OneDash(name.to_owned()))
}

/// Reads `--memory`.
fn mebibytes(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let factor = match text.get(digits.len()..).map(str::to_ascii_lowercase).as_deref() {
            Some("g" | "gb" | "gib") => 1024,
            _ => 1,
        };
        let mib = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        format!("expected a number of MiB, such as {}", mib.filter(|mib| *mib > 0).unwrap_or(1024))
    })
}

fn command() -> clap::Command {
    let mut command = Cli::command().next_help_heading("Devices");
    for module in MODULES {
        let repeatable = match module.count {
            Count::One => "",
            Count::Many => " (repeatable)",
        };
        // In brackets is what may be left away.
        let (name, optional) = match module.value_name.strip_prefix('[') {
            Some(rest) => (rest.replacen(']', "", 1), true),
            None => (module.value_name.to_owned(), false),
        };
        let argument = Arg::new(module.option)
            .long(module.option)
            .value_name(name)
            .help(format!("{}{repeatable}", module.help))
            .action(ArgAction::Append);
        command = command.arg(if optional {
            argument.num_args(0..=1).default_missing_value("")
        } else {
            argument
        });
    }
    command
}

/// Parses the command line; the first argument is the program's name, whatever it is.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, CliError> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let matches = command()
        .try_get_matches_from(&arguments)
        .map_err(|error| one_dash(&arguments).unwrap_or_else(|| refusal(error)))?;
    let cli = Cli::from_arg_matches(&matches)?;
    match cli.task {
        Some(Task::Ctl { control, action }) => Ok(Invocation::Ctl { control, action }),
        Some(Task::Doctor { json }) => Ok(Invocation::Doctor { json }),
        None => {
            let log = cli.machine.log.clone();
            let config = Box::new(machine(cli.machine, &matches)?);
            Ok(Invocation::Run { config, log })
        }
    }
}

fn machine(args: MachineArgs, matches: &ArgMatches) -> Result<VmConfig, CliError> {
    let spice = match &args.spice {
        Some(text) => Some(SpiceConfig::parse(Spec::parse("spice", text)?)?),
        None => None,
    };
    let web = match &args.web {
        Some(text) => Some(WebConfig::parse(Spec::parse("web", text)?)?),
        None => None,
    };
    let vnc = match &args.vnc {
        Some(text) => Some(VncConfig::parse(Spec::parse("vnc", text)?)?),
        None => None,
    };
    let kind = match (&spice, &vnc) {
        (Some(_), _) => Machines::Heard,
        (None, Some(_)) => Machines::Viewed,
        (None, None) => Machines::All,
    };
    Ok(VmConfig {
        name: args.name,
        boot: BootConfig {
            kernel: args.kernel.unwrap_or_default(),
            initrd: args.initrd,
            command_line: args.cmdline,
        },
        cpus: args.cpus,
        memory_mib: args.memory,
        huge_pages: args.hugepages,
        serial: args.serial,
        control: args.control,
        uuid: args.uuid,
        credentials: args.credential,
        panic_exit_code: args.panic_exit_code,
        sandbox: args.sandbox,
        devices: devices(matches, kind)?,
        host_devices: args.vfio,
        spice,
        web,
        vnc,
    })
}

type Devices = Vec<(&'static str, Box<dyn DeviceConfig>)>;

/// The devices in registry order, those of one option in command line order.
fn devices(matches: &ArgMatches, kind: Machines) -> Result<Devices, CliError> {
    let mut devices = Devices::new();
    for module in MODULES {
        let mut values: Vec<&str> = matches
            .get_many::<String>(module.option)
            .map(|values| values.map(String::as_str).collect())
            .unwrap_or_default();
        if module.count == Count::One {
            // As with any other option that makes sense once: the last one wins.
            values = values.split_off(values.len().saturating_sub(1));
        }
        if values.is_empty() {
            let presets = module.presets.iter().filter(|preset| preset.on <= kind);
            values.extend(presets.map(|preset| preset.value));
        }
        if module.can_be_off {
            values.retain(|value| *value != "off");
        }
        for value in values {
            let spec = Spec::parse(module.option, value)?;
            devices.push((module.option, (module.parse)(spec)?));
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &str) -> Result<VmConfig, CliError> {
        let arguments = arguments.split_whitespace().map(OsString::from);
        match parse([OsString::from("microvm@x")].into_iter().chain(arguments))? {
            Invocation::Run { config, .. } => Ok(*config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn repeated_scalars_override() {
        let config = run("--kernel a --memory 64 --kernel b --hugepages --memory 128 --hugepages \
                          --serial off --serial stdio")
        .unwrap();
        assert_eq!(config.boot.kernel, PathBuf::from("b"));
        assert_eq!(config.memory_mib, 128);
        assert_eq!(config.serial, SerialConfig::Stdio);
        assert!(config.huge_pages);
    }

    #[test]
    fn credentials_add_up() {
        let config = run("--kernel a --credential x=1 --credential y=2").unwrap();
        let names: Vec<_> = config.credentials.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["x", "y"]);
        let error = run("--kernel a --credential x").unwrap_err().to_string();
        assert!(error.contains("--credential") && error.contains("NAME=FILE"), "{error}");
    }

    #[test]
    fn devices_of_the_host_add_up() {
        let config =
            run("--kernel a --vfio 0000:01:00.0,02:00.1 --vfio /sys/bus/pci/devices/0000:03:00.0");
        let config = config.unwrap();
        let names: Vec<_> = config.host_devices.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["0000:01:00.0", "0000:02:00.1", "0000:03:00.0"]);
        config.validate().unwrap();
        let error = run("--kernel a --vfio nvme0").unwrap_err().to_string();
        assert!(error.contains("'nvme0'") && error.contains("lspci -D"), "{error}");
        let refused = |arguments| run(arguments).unwrap().validate().unwrap_err().to_string();
        assert!(refused("--kernel a --vfio 01:00.0,0000:01:00.0").contains("twice"));
        assert!(refused("--kernel a --vfio 01:00.0 --balloon").contains("--balloon cannot"));
    }

    #[test]
    fn entropy_is_always_there_and_positionals_are_refused() {
        let config = run("--kernel a").unwrap();
        let rng = |config: &VmConfig| config.devices.iter().filter(|d| d.0 == "rng").count();
        assert_eq!(rng(&config), 1);
        assert_eq!(rng(&run("--kernel a --rng --rng source=/dev/zero").unwrap()), 1);
        let stray = |arguments| run(arguments).unwrap_err().to_string();
        assert!(stray("--kernel a b").starts_with("'b' belongs to no option"));
        assert!(stray("--kernel a --cmdline root=/dev/vda rw x=y").starts_with("'rw' belongs"));
        assert!(!stray("--kernel a doctor").contains("belongs to no option"));
        assert!(run("").is_err(), "a kernel is needed");
    }

    #[test]
    fn sound_comes_with_spice() {
        let sound = |arguments: &str| {
            let config = run(arguments).unwrap();
            config.devices.iter().filter(|(option, _)| *option == "sound").count()
        };
        assert_eq!(sound("--kernel a"), 0);
        assert_eq!(sound("--kernel a --sound"), 1);
        assert_eq!(sound("--kernel a --vnc 127.0.0.1:5901"), 0);
        assert_eq!(sound("--kernel a --spice 127.0.0.1:5900"), 1);
        assert_eq!(sound("--kernel a --spice 127.0.0.1:5900 --sound off"), 0);
        assert_eq!(sound("--kernel a --sound off --sound on"), 1);
        assert!(run("--kernel a --sound loud").is_err());
    }

    #[test]
    fn errors_name_the_option() {
        let text = |arguments: &str| run(arguments).unwrap_err().to_string();
        assert!(text("--kernel a --rng nope=1").starts_with("--rng:"));
        assert!(text("--kernel a --memory 2G").contains("a number of MiB, such as 2048"));
        assert!(text("--kernel a --memory much").contains("a number of MiB, such as 1024"));
        assert!(text("--kernel a --disk").contains("--disk <path=FILE"));
        assert!(text("--kernel a --disk pth=x").starts_with("--disk: unknown key 'pth'"));
        assert!(text("--kernel a --vsock notify=on").starts_with("--vsock: 'cid=' is missing"));
        assert!(text("--kernel a --fs tag=x,sock=y").starts_with("--fs: unknown key 'sock'"));
        assert!(text("--kernel a --spice port=1").starts_with("--spice: unknown key 'port'"));
        assert!(text("--kernel a --spice clients=shared").contains("begins with ADDRESS:PORT"));
        assert!(text("--kernel a --vnc port=1").starts_with("--vnc: unknown key 'port'"));
        for bare in ["password-file", "web-origin", "tls-port"] {
            let error = text(&format!("--kernel a --spice 127.0.0.1:1,{bare}"));
            assert_eq!(error, format!("--spice: '{bare}' needs a value: {bare}=…"));
        }
        assert!(text("--kernel a --serial x").contains("--serial"));
        assert!(text("--kernel a --spice password-file=x").starts_with("--spice:"));
        assert!(text("--kernel a --web dri=x").starts_with("--web: unknown key 'dri'"));
        let error = run("--kernel a --web --memory 64").unwrap().validate().unwrap_err();
        assert!(error.to_string().starts_with("--web:"), "{error}");
    }

    #[test]
    fn what_is_refused_comes_with_a_hint() {
        let text = |arguments| run(arguments).unwrap_err().to_string();
        assert!(text("--kernel a --9p tag=x,path=y").contains("virtiofsd"));
        assert!(text("--kernel a --virtio-mem size=1").contains("--balloon"));
        assert!(text("--kernel a --usb 1:2").starts_with("--usb: USB devices of the host"));
        assert!(text("--kernel a --bridge=br0").contains("tap"));
        assert!(text("--kernel a --net bridge=br0").contains("tap=IFNAME"));
        assert!(text("--kernel a --user nobody").contains("group kvm"));
        assert!(text("--kernel a --watchdog").contains("softdog"));
        assert!(text("--kernel a --cpu kvm64").contains("KVM"));
        assert!(text("--kernel a --cpu 2").contains("--cpus N"));
        assert!(text("-kernel a").starts_with("-kernel: options have two dashes: --kernel"));
        assert!(text("--kernel a -smp 2").contains("unexpected argument"));
        assert!(text("--kernel a --disk path=d,format=qcow2").contains("qemu-img convert -O raw"));
        assert!(run("--kernel a --disk path=d,format=raw").is_ok());
        // No option of ours is among them, and unknown ones are said to be unknown.
        for option in REFUSED.iter().flat_map(|(options, _)| *options) {
            let error = run(&format!("--kernel a {option} x")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{option}: ")), "{error}");
        }
        assert!(text("--kernel a --nonsense").contains("unexpected argument"));
    }

    #[test]
    fn subcommands() {
        let arguments = |text: &str| {
            parse(text.split_whitespace().map(OsString::from).collect::<Vec<_>>()).unwrap()
        };
        assert!(matches!(
            arguments("drago-vmm ctl --control s shutdown --wait"),
            Invocation::Ctl { action: Action::Shutdown { wait: true }, .. }
        ));
        assert!(matches!(arguments("x doctor --json"), Invocation::Doctor { json: true }));
    }
}
