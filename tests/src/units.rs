//! A microvm.nix host inside the test host: Debian 13's systemd as the first process of a container, and
//! in it the units of microvm.nix with the runners that `resources/nix` makes.
//!
//! The container has the test host's kernel, devices and network, so `/dev/kvm`, taps and `AF_VSOCK` are
//! what they are outside.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::{
    guest::{DEBIAN, Nixos, Shape},
    paths, progress,
    testbed::{RemoteOutput, Testbed},
};

/// Where the store is inside, for a virtiofsd to share.
pub const STORE: &str = "/run/units";

/// What tells where a machine stands, for `$name`: what drago-vmm says of itself, where its threads are
/// in the test host's kernel, the guest's serial port.
const EVIDENCE: &str = r#"
pid=$(systemctl show --value -p MainPID microvm@$name)
socket=/var/lib/microvms/$name/$name.sock
if [ -e $socket ]; then
    echo "--- drago-vmm ctl status:"
    for _ in 1 2 3; do
        timeout 10 /nix/store/drago-vmm/bin/drago-vmm ctl --control $socket status 2>&1 | grep ^cpu
    done
fi
if [ "$pid" -gt 0 ]; then
    echo "--- threads of drago-vmm ($pid):"
    for task in /proc/$pid/task/*; do
        echo "$(<$task/comm) $(grep -E '^(State|.*ctxt)' $task/status | tr '\n\t' '  ')" \
            "system call $(<$task/syscall) in $(<$task/wchan)"
        sed 's/^/    /' $task/stack
    done
fi
echo "--- the test host's kernel:"
dmesg | tail -n 30
echo "--- the serial port of $name, and its unit:"
id=$(systemctl show --value -p InvocationID microvm@$name)
journalctl --no-pager -o cat _SYSTEMD_INVOCATION_ID=$id | tail -n 250
"#;

/// So that a guest which is stuck says where, on the serial port.
const BACKTRACES: [&str; 3] = [
    // The last one of a name counts; backtraces are warnings, and every character costs three exits.
    "loglevel=5",
    "sysctl.kernel.softlockup_all_cpu_backtrace=1",
    "sysctl.kernel.hung_task_all_cpu_backtrace=1",
];

/// What a guest's kernel says when it cannot go on.
const STUCK: &str = "soft lockup|detected stalls|rcu_preempt kthread starved|blocked for more than";

/// What is said of a guest that went astray without having done anything for it.
const ASTRAY: [&str; 5] = [
    "soft lockup",
    "detected stalls",
    "rcu_preempt kthread starved",
    "reset itself by a triple fault",
    "KVM internal error",
];

/// How often such a guest is started.
const ATTEMPTS: usize = 3;

/// The system of units.
#[derive(Debug)]
pub struct Units {
    /// The test host that it runs in.
    pub testbed: Testbed,
    first: String,
    results: PathBuf,
    /// Machines that were installed.
    machines: RefCell<Vec<String>>,
}

impl Units {
    /// Starts it in a test host. `programs` is the folder with drago-vmm.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(testbed: Testbed, nixos: &Nixos, programs: &Path) -> Result<Self> {
        let results = paths::cache("e2e/units")?;
        let places = [paths::workspace(), programs.to_path_buf(), nixos.store(), results.clone()];
        let mut shared: Vec<String> = Vec::new();
        for place in places {
            let place = place.canonicalize().with_context(|| place.display().to_string())?;
            // The first folder of the path, with all mounts below.
            let top = place.iter().nth(1).context("a path of one part")?;
            let top = format!("/{}", top.to_string_lossy());
            if !shared.contains(&top) {
                shared.push(top);
            }
        }
        let units = paths::resources().join("testbed/units");
        let script = units.join("start");
        let output = progress::step("starting systemd in the test host", || {
            testbed
                .command("sh")
                .arg(script.display().to_string())
                .env("STORE", nixos.store().canonicalize()?.display().to_string())
                .env("DEBIAN", DEBIAN)
                .env("UNITS", units.display().to_string())
                .env("PROGRAMS", programs.canonicalize()?.display().to_string())
                .env("SHARED", shared.join(" "))
                .output()
        })?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.code == 0, "{}: {said}\n{errors}", script.display());
        let first = said.lines().last().unwrap_or_default().to_owned();
        ensure!(first.parse::<u32>().is_ok(), "no process: {said}\n{errors}");
        Ok(Self { testbed, first, results, machines: RefCell::default() })
    }

    /// Runs a shell script inside, to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn output(&self, script: &str) -> Result<RemoteOutput> {
        self.testbed
            .command("nsenter")
            .args(["--target", &self.first, "--mount", "--pid", "--cgroup", "--uts", "--ipc"])
            .args(["--", "/bin/bash", "-c"])
            .arg(format!("cd /; {script}"))
            .output()
    }

    /// Runs a shell script inside; what it said.
    ///
    /// # Errors
    /// If it fails.
    pub fn run(&self, script: &str) -> Result<String> {
        let output = self.output(script)?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if output.code != 0 {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("{script}: ended with {}: {said}\n{errors}", output.code);
        }
        Ok(said)
    }

    /// Starts a machine and returns when its guest has reported that it is ready.
    ///
    /// The test host is emulated, and so is what its processors do for guests. On a busy machine a guest
    /// with several processors now and then goes astray there: where it is seen to have, its evidence is
    /// shown and it gets another try.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_machine(&self, name: &str) -> Result<()> {
        for attempt in 1.. {
            let Err(error) = self.start_once(name) else { break };
            let evidence = self.evidence(name);
            if attempt == ATTEMPTS || !ASTRAY.iter().any(|sign| evidence.contains(sign)) {
                return Err(error);
            }
            eprintln!("=== attempt {attempt} to start {name}: {error:#}\n{evidence}");
            self.run(&format!(
                "systemctl kill -s KILL microvm@{name}; systemctl stop microvm@{name}; \
                 systemctl reset-failed microvm@{name}; true"
            ))?;
        }
        Ok(())
    }

    /// One whose kernel says that it is stuck is not waited for.
    fn start_once(&self, name: &str) -> Result<()> {
        self.run(&format!(
            // Seldom: a look at the journal takes the emulated processors a second.
            "before=$(systemctl show --value -p InvocationID microvm@{name})
            systemctl start microvm@{name} & job=$!
            while :; do
                sleep 20 >/dev/null 2>&1 & nap=$!
                wait -n $job $nap
                code=$?
                kill -0 $job 2>/dev/null || exit $code
                id=$(systemctl show --value -p InvocationID microvm@{name})
                # Until there is a new one, this is what an earlier start said.
                [ \"$id\" != \"$before\" ] || continue
                if journalctl -q -o cat -n 50 _SYSTEMD_INVOCATION_ID=$id | grep -E '{STUCK}'; then
                    kill $job
                    echo 'the guest is stuck'
                    exit 1
                fi
            done"
        ))
        .map(|_| ())
    }

    /// Where a machine stands, for people.
    fn evidence(&self, name: &str) -> String {
        match self.output(&format!("name={name}; {EVIDENCE}")) {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => format!("{error:#}"),
        }
    }

    /// Installs a machine as `install-microvm-NAME` does. What is not in `own` has microvm.nix's defaults.
    ///
    /// # Errors
    /// If Nix refuses the configuration.
    pub fn install(
        &self,
        name: &str,
        nixos: &Nixos,
        kernel: &Path,
        shape: &Shape,
        own: Value,
    ) -> Result<()> {
        self.machines.borrow_mut().push(name.to_owned());
        let folder = self.results.join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("kernel"))?;
        // The runner only knows this name; what it is the VMM sees itself.
        std::os::unix::fs::symlink(kernel, folder.join("kernel/bzImage"))?;
        let initrd = nixos.initrd(shape, &folder)?;
        let (_, parameters) = nixos.cmdline().split_once("panic=-1 ").map_or_else(
            || (String::new(), nixos.cmdline()),
            |(before, after)| (before.to_owned(), after.to_owned()),
        );
        let mut configuration = json!({
            "hostName": name,
            "kernel": { "out": folder.join("kernel").display().to_string() },
            "initrdPath": initrd.display().to_string(),
            "kernelParams": parameters.split(' ').chain(BACKTRACES).collect::<Vec<_>>(),
            "storeDisk": nixos.store().display().to_string(),
            "socket": format!("{name}.sock"),
        });
        if let (Some(all), Value::Object(own)) = (configuration.as_object_mut(), own) {
            all.extend(own);
        }
        let package = runner(name, &configuration)?;
        let current = folder.join("current");
        fs::create_dir_all(&current)?;
        let status = Command::new("bash")
            .args(["-euc", &package.script])
            .env("out", &current)
            .status()
            .context("cannot run bash")?;
        ensure!(status.success(), "the runner's package cannot be made");
        for (script, text) in &package.scripts {
            let text = format!("#!/bin/bash\n{}", text.as_str().unwrap_or_default());
            let path = current.join("bin").join(script);
            let _ = fs::remove_file(&path);
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        self.run(&format!(
            "install -d -o microvm -g kvm /var/lib/microvms/{name} && cd /var/lib/microvms/{name} && \
             ln -sfn {0} current && ln -sfn {0} booted",
            current.display()
        ))?;
        Ok(())
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for name in self.machines.borrow().iter() {
            eprintln!("=== the machine {name} after the failure:\n{}", self.evidence(name));
        }
        let log = fs::read_to_string(self.testbed.log()).unwrap_or_default();
        eprintln!("=== the test host's serial port:\n{log}");
    }
}

/// The runner's package of a machine.
struct Package {
    /// Makes it in `$out`.
    script: String,
    scripts: Map<String, Value>,
}

/// Has Nix evaluate `resources/nix`.
fn runner(name: &str, configuration: &Value) -> Result<Package> {
    let machines = json!({ name: configuration });
    let out = Command::new("nix-instantiate")
        .args(["--store", "dummy://", "--eval", "--strict", "--json"])
        .args(["--argstr", "package", "/nix/store/drago-vmm"])
        .args(["--argstr", "machines", &machines.to_string()])
        .args(["-A", &format!("machines.{name}")])
        .arg(paths::resources().join("nix/tests/default.nix"))
        .output()
        .context("cannot run nix-instantiate (package nix-bin)")?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut value: Value = serde_json::from_slice(&out.stdout)?;
    let script = value["script"].as_str().context("no script")?.to_owned();
    match value["scripts"].take() {
        Value::Object(scripts) => Ok(Package { script, scripts }),
        _ => bail!("no scripts"),
    }
}
