//! The runners that `resources/nix` makes for microvm.nix, for a matrix of configurations: their text
//! against `resources/nix/tests/expected`, their command lines against our own parser, their scripts
//! against shellcheck and a real shell.
//!
//! Nix evaluates without a network and without a store. After a wanted change `DRAGO_UPDATE=1 cargo test
//! -p drago-tests --test nix` writes the expected files anew; read the difference before committing it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt::Write as _,
    fs,
    io::Write as _,
    os::unix::{ffi::OsStringExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use drago_tests::{paths, progress::note};
use drago_vmm::cli::{self, Invocation};
use serde::Deserialize;
use serde_json::Value;

/// Where the evaluated package pretends to be.
const PACKAGE: &str = "/nix/store/drago-vmm";

/// What `resources/nix/tests/default.nix` evaluates to.
#[derive(Deserialize)]
struct Evaluated {
    accepted: BTreeMap<String, Accepted>,
    refused: BTreeMap<String, Vec<String>>,
    throws: BTreeMap<String, bool>,
    modules: Value,
}

#[derive(Deserialize)]
struct Accepted {
    command: String,
    scripts: BTreeMap<String, String>,
    passthru: Value,
    /// Makes the package in `$out`.
    script: String,
}

fn folder() -> PathBuf {
    paths::resources().join("nix")
}

fn there(program: &str, package: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok();
    if !there {
        note(format_args!("SKIPPED: no {program} (Debian package {package})"));
    }
    there
}

/// Evaluates with programs in `package`; `None` where there is no Nix.
fn evaluate(package: &str) -> Option<Evaluated> {
    if !there("nix-instantiate", "nix-bin") {
        return None;
    }
    let out = Command::new("nix-instantiate")
        .args(["--store", "dummy://", "--eval", "--strict", "--json", "--show-trace"])
        .args(["--argstr", "package", package])
        .arg(folder().join("tests/default.nix"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(serde_json::from_slice(&out.stdout).unwrap())
}

/// The words of a command line, as a shell understands it.
fn words(command: &str) -> Vec<OsString> {
    let script = format!("printf '%s\\0' {command}");
    let out = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
    let mut words: Vec<OsString> =
        out.stdout.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
    words.pop();
    words
}

/// Runs the script that makes the package; what is in it then, by path.
fn build(case: &Accepted) -> BTreeMap<String, String> {
    let out = tempfile::tempdir().unwrap();
    let status =
        Command::new("bash").args(["-euc", &case.script]).env("out", out.path()).status().unwrap();
    assert!(status.success(), "{}", case.script);
    let mut found = BTreeMap::new();
    collect(out.path(), out.path(), &mut found);
    found
}

fn collect(root: &Path, folder: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            collect(root, &path, found);
        } else if kind.is_symlink() {
            found.insert(name, format!("-> {}\n", fs::read_link(&path).unwrap().display()));
        } else {
            found.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

/// A case as a person reads it: an option a line, then scripts and files.
fn describe(case: &Accepted) -> String {
    let mut text = String::from("command");
    for word in words(&case.command) {
        let word = word.to_string_lossy();
        let separator = if word.starts_with("--") { "\n  " } else { " " };
        write!(text, "{separator}{word}").unwrap();
    }
    writeln!(text, "\n\nattributes\n  {}", case.passthru).unwrap();
    for (name, content) in build(case) {
        if !name.starts_with("bin/") {
            writeln!(text, "\n{name}\n{}", indented(&content)).unwrap();
        }
    }
    for (name, script) in &case.scripts {
        let script = script.replace(&case.command, "COMMAND");
        writeln!(text, "\nbin/{name}\n{}", indented(&script)).unwrap();
    }
    text
}

fn indented(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines.map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// Compares with the file, or writes it if that is wanted; the complaint if they differ.
fn compare(name: &str, text: &str) -> Option<String> {
    let file = folder().join("tests/expected").join(format!("{name}.txt"));
    if env::var_os("DRAGO_UPDATE").is_some() {
        fs::write(&file, text).unwrap();
        return None;
    }
    let expected = fs::read_to_string(&file).unwrap_or_default();
    (expected != text)
        .then(|| format!("{} expects\n{expected}\nbut there is\n{text}", file.display()))
}

fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "{}", complaints.join("\n\n"));
}

#[test]
fn runners_are_as_expected() {
    let Some(evaluated) = evaluate(PACKAGE) else { return };
    let mut complaints: Vec<String> = evaluated
        .accepted
        .iter()
        .filter_map(|(name, case)| compare(name, &describe(case)))
        .collect();
    let refused: String = evaluated
        .refused
        .iter()
        .map(|(name, reasons)| format!("{name}\n{}\n\n", indented(&reasons.join("\n"))))
        .collect();
    complaints.extend(compare("refused", &refused));
    let modules = format!("{:#}\n", evaluated.modules);
    complaints.extend(compare("modules", &modules));
    none(&complaints);

    // Nothing is left over from a case that is no more.
    for entry in fs::read_dir(folder().join("tests/expected")).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned();
        let known = evaluated.accepted.contains_key(&name);
        assert!(known || name == "refused" || name == "modules", "no case is called {name}");
    }
}

/// What the guest or another hypervisor is told.
#[test]
fn options_of_others_change_nothing() {
    let Some(evaluated) = evaluate(PACKAGE) else { return };
    let [plain, other] = ["plain", "indifferent"].map(|name| &evaluated.accepted[name]);
    assert_eq!(describe(plain), describe(other));
}

#[test]
fn what_is_refused_throws() {
    let Some(evaluated) = evaluate(PACKAGE) else { return };
    for (name, reasons) in &evaluated.refused {
        assert!(!reasons.is_empty(), "{name} is accepted");
    }
    for (name, throws) in &evaluated.throws {
        assert!(throws, "{name} has a command line");
    }
}

#[test]
fn our_parser_takes_every_command_line() {
    let Some(evaluated) = evaluate(PACKAGE) else { return };
    let mut complaints = Vec::new();
    for (name, case) in &evaluated.accepted {
        match cli::parse(words(&case.command)) {
            Ok(Invocation::Run { config, .. }) => {
                config.validate().unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(config.name, "guest");
                let disk = config.devices.iter().position(|(option, _)| *option == "disk");
                assert_eq!(disk, (name != "virtiofs").then_some(0), "{name}: disks come first");
            }
            Ok(other) => complaints.push(format!("{name}: {other:?}")),
            Err(error) => complaints.push(format!("{name}: {error}")),
        }
        // The scripts that call ctl: everything after the shell's own words, on the last line.
        for script in ["microvm-shutdown", "microvm-balloon"] {
            let Some(text) = case.scripts.get(script) else { continue };
            let line = text.lines().rfind(|line| line.starts_with("exec ")).unwrap();
            let line = line.trim_start_matches("exec ").replace("\"$SIZE\"", "256");
            match cli::parse(words(&line)) {
                Ok(Invocation::Ctl { control, .. }) => assert_eq!(control, Path::new("guest.sock")),
                Ok(other) => complaints.push(format!("{name}: {script}: {other:?}")),
                Err(error) => complaints.push(format!("{name}: {script}: {error}")),
            }
        }
    }
    none(&complaints);
}

#[test]
fn scripts_please_shellcheck() {
    let Some(evaluated) = evaluate(PACKAGE) else { return };
    if !there("shellcheck", "shellcheck") {
        return;
    }
    let mut complaints = Vec::new();
    for (name, case) in &evaluated.accepted {
        for (script, text) in &case.scripts {
            let mut child = Command::new("shellcheck")
                .args(["--shell", "bash", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
            let out = child.wait_with_output().unwrap();
            if !out.status.success() {
                let said = String::from_utf8_lossy(&out.stdout);
                complaints.push(format!("{name}: {script}:\n{said}"));
            }
        }
    }
    none(&complaints);
}

/// The script as the host's unit runs it, with a program in place of drago-vmm that tells its arguments.
#[test]
fn a_run_makes_volumes_once_and_adds_arguments() {
    let place = tempfile::tempdir().unwrap();
    let package = place.path().join("package");
    fs::create_dir_all(package.join("bin")).unwrap();
    let program = package.join("bin/drago-vmm");
    fs::write(&program, "#!/bin/bash\nprintf '%s\\n' \"$@\"\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let more = place.path().join("more-arguments");
    fs::write(&more, "#!/bin/bash\necho --spice 127.0.0.1:5999\n").unwrap();
    fs::set_permissions(&more, fs::Permissions::from_mode(0o755)).unwrap();
    let Some(evaluated) = evaluate(&package.display().to_string()) else { return };
    let script = &evaluated.accepted["volumes"].scripts["microvm-run"];

    let run = || {
        let out = Command::new("bash")
            .args(["-c", script])
            .current_dir(place.path())
            // The packages of the stub are not there; these have the same programs.
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let arguments = run();
    assert!(arguments.contains("\n--disk\npath=my data.img,format=raw,direct=on\n"), "{arguments}");
    assert!(arguments.ends_with("\n--spice\n127.0.0.1:5999\n"), "{arguments}");
    assert!(place.path().join("started").exists(), "preStart was not run");

    let image = place.path().join("var.img");
    assert_eq!(fs::metadata(&image).unwrap().len(), 64 << 20);
    assert!(!place.path().join("var.img.part").exists());
    let superblock = |image: &Path| fs::read(image).unwrap()[1024..2048].to_vec();
    let before = superblock(&image);
    assert_eq!(before[56..58], [0x53, 0xef], "no ext4");
    assert_eq!(&before[120..124], b"var\0", "no label");
    assert!(place.path().join("my data.img").exists());

    run();
    assert_eq!(superblock(&image), before, "the image was made again");
}

#[test]
fn every_file_is_nix() {
    if !there("nix-instantiate", "nix-bin") {
        return;
    }
    for file in
        ["guest.nix", "host.nix", "package.nix", "example/flake.nix", "example/agent-drago.nix"]
            .map(|file| folder().join(file))
            .into_iter()
            .chain([paths::workspace().join("flake.nix")])
    {
        let out = Command::new("nix-instantiate").arg("--parse").arg(&file).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}
