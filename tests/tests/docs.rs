//! docs/microvm.md keeps its promises: every option of microvm.nix is in its table, every test that is
//! named there exists, and every error that drago-vmm prints is in the troubleshooting table.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use drago_tests::paths;

/// The options of microvm.nix, as its `options.nix` has them, and what else its runners are asked for.
const OPTIONS: &[&str] = &[
    "vcpu",
    "mem",
    "hugepageMem",
    "hotplugMem",
    "hotpluggedMem",
    "balloon",
    "deflateOnOOM",
    "initialBalloonMem",
    "microvm-balloon",
    "user",
    "forwardPorts",
    "tap",
    "tapMultiQueue",
    "interfaces.*.tap.vhost",
    "macvtap",
    "bridge",
    "volumes.*.image",
    "readOnly",
    "direct",
    "serial",
    "volumes.*.imageType",
    "volumes.*.fsType",
    "label",
    "mkfsExtraArgs",
    "size",
    "autoCreate",
    "mountPoint",
    "virtiofs",
    "9p",
    "shares.*.cache",
    "posixAcl",
    "extraArgs",
    "virtiofsd.*",
    "devices",
    "pci",
    "usb",
    "vsock.cid",
    "vsock.ssh.enable",
    "socket",
    "canShutdown",
    "credentialFiles",
    "cpu",
    "machineId",
    "registerWithMachined",
    "kernel",
    "initrdPath",
    "kernelParams",
    "storeOnDisk",
    "storeDisk",
    "storeDiskType",
    "writableStoreOverlay",
    "registerClosure",
    "graphics.enable",
    "graphics.backend",
    "graphics.vulkan",
    "hostmem",
    "crosvmPackage",
    "preStart",
    "extraArgsScript",
    "prettyProcnames",
    "binScripts",
    "systemSymlink",
    "vmHostPackages",
    "drago-vmm.package",
    "drago-vmm.extraArgs",
    "qemu.machine",
    "machineOpts",
    "serialConsole",
    "pcieRootPorts",
];

/// What a row says that asks for no test.
const NOTHING: &str = "no";

fn page() -> String {
    fs::read_to_string(paths::workspace().join("docs/microvm.md")).unwrap()
}

/// The rows of the table below a heading, without its first two lines.
fn rows(page: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, below) = page.split_once(heading).unwrap_or_else(|| panic!("no {heading}"));
    below
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| {
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

/// What is in backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_option_of_microvm_nix_has_a_row() {
    let rows = rows(&page(), "## What microvm.nix asks for");
    let named: BTreeSet<String> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    let missing: Vec<_> = OPTIONS.iter().filter(|option| !named.contains(**option)).collect();
    assert!(missing.is_empty(), "not in the table: {missing:?}");
}

#[test]
fn every_row_names_tests_that_exist() {
    let page = page();
    let mut wrong = Vec::new();
    for heading in
        ["## What microvm.nix asks for", "What microvm.nix checks", "How it starts and ends:"]
    {
        for row in rows(&page, heading) {
            let names = quoted(&row[2]);
            let nothing = row[1] == NOTHING;
            if names.is_empty() && !nothing {
                wrong.push(format!("no test: {}", row[0]));
            }
            wrong.extend(names.iter().filter(|name| !exists(name)).cloned());
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Whether a test as the page names it exists: `file::test` or `file`.
fn exists(name: &str) -> bool {
    let (file, test) = name.split_once("::").unwrap_or((name, ""));
    let root = paths::workspace();
    let path = match file {
        "cli" => root.join("vmm/src/cli.rs"),
        "tiny" => root.join("vmm/tests/tiny_guest"),
        "nested" => root.join("tests/tests/microvm.rs"),
        "minimal" | "units" | "nix" | "docs" => root.join(format!("tests/tests/{file}.rs")),
        file if file.ends_with(".rs") => root.join(file),
        device => root.join(format!("devices/src/virtio/{device}/tests.rs")),
    };
    // A suite of several files is a folder.
    let folder = path.with_extension("");
    let mut files = vec![path];
    if folder.is_dir() {
        sources(&folder, &mut files);
    }
    let text: String = files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect();
    !text.is_empty() && (test.is_empty() || text.contains(&format!("fn {test}()")))
}

/// All Rust sources below a folder that are no tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            sources(&path, found);
        } else if name.ends_with(".rs") && !["tests.rs", "testing.rs"].contains(&&*name) {
            found.push(path);
        }
    }
}

/// The string literal that begins at the start of `text`, with its pieces of several lines put together.
fn literal(text: &str) -> Option<String> {
    let mut chars = text.strip_prefix('"')?.chars().peekable();
    let mut found = String::new();
    while let Some(next) = chars.next() {
        match next {
            '"' => return Some(found),
            '\\' => match chars.next()? {
                '\n' => while chars.next_if(|next| next.is_whitespace()).is_some() {},
                'n' => found.push('\n'),
                other => found.push(other),
            },
            other => found.push(other),
        }
    }
    None
}

/// A text of the program, or of the page, as the pieces between what is put in at run time.
fn pieces(text: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut depth = 0;
    for next in text.chars() {
        match next {
            '{' => {
                depth += 1;
                all.push(String::new());
            }
            '}' if depth > 0 => depth -= 1,
            '…' => all.push(String::new()),
            other if depth == 0 => all.last_mut().unwrap().push(other),
            _ => {}
        }
    }
    all.retain(|piece| piece.chars().any(char::is_alphabetic));
    all
}

fn longest(pieces: &[String]) -> &str {
    pieces.iter().max_by_key(|piece| piece.len()).map_or("", String::as_str)
}

/// Whether a pattern of the page is about a message. All of a pattern is in the message, but for what
/// stands where the message has something put in.
fn fits(pattern: &[String], message: &str) -> bool {
    let mut rest = message;
    let all = pattern.iter().all(|piece| match rest.split_once(piece.as_str()) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    });
    // What the message begins or ends with may be longer than what the program has as one piece.
    let own = pieces(message);
    let part = longest(&own);
    all || (part.len() >= 16 && pattern.iter().any(|piece| piece.contains(part)))
}

/// The texts of errors in a source: what `#[error]` says, warnings and errors of the log, and what options
/// say of the host.
fn messages(source: &str) -> Vec<String> {
    const BEFORE: &[&str] = &[
        "#[error(",
        "unusable(",
        "unusable(format!(",
        "host(",
        "host(format!(",
        "what: ",
        "what: format!(",
        "what = format!(",
        "reason: ",
        "let reason = ",
        "reason: format!(",
        "Error::other(",
    ];
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut found = Vec::new();
    for before in BEFORE {
        for (at, _) in source.match_indices(before) {
            found.extend(literal(source[at + before.len()..].trim_start()));
        }
    }
    for before in ["tracing::error!(", "tracing::warn!("] {
        for (at, _) in source.match_indices(before) {
            let call = source[at..].split(");\n").next().unwrap();
            // The last literal; others are values.
            let mut text = call.match_indices('"').filter_map(|(at, _)| {
                let starts = call[..at].ends_with(['(', ' ', '\n']);
                starts.then(|| literal(&call[at..])).flatten()
            });
            found.extend(text.next_back());
        }
    }
    found
}

/// Causes of other errors, of which the page has the ones on top, and parts of sentences.
fn is_part(message: &str) -> bool {
    longest(&pieces(message)).len() < 12
}

#[test]
fn every_error_is_in_the_troubleshooting_table() {
    let rows = rows(&page(), "## Troubleshooting");
    let patterns: Vec<Vec<String>> =
        rows.iter().flat_map(|row| quoted(&row[0])).map(|text| pieces(&text)).collect();
    let root = paths::workspace();
    let mut files = Vec::new();
    for folder in
        ["vmm/src", "vmm/vnc-server/src", "devices/src", "devices/host/src", "spice-server/src/io"]
    {
        sources(&root.join(folder), &mut files);
    }
    let mut all = Vec::new();
    // What explains itself, and reasons in the list of system calls.
    files.retain(|file| {
        !file.ends_with("seccomp/tables.rs") && !file.iter().any(|part| part == "doctor")
    });
    for file in &files {
        let text = fs::read_to_string(file).unwrap();
        let place = file.strip_prefix(&root).unwrap().display().to_string();
        all.extend(messages(&text).into_iter().map(|message| (place.clone(), message)));
    }
    assert!(all.len() > 150, "only {} messages were found in the sources", all.len());
    let missing: Vec<String> = all
        .iter()
        .filter(|(_, message)| !is_part(message))
        .filter(|(_, message)| !patterns.iter().any(|pattern| fits(pattern, message)))
        .map(|(place, message)| format!("{place}: {message}"))
        .collect();
    let (count, list) = (missing.len(), missing.join("\n"));
    assert!(missing.is_empty(), "{count} of {} without an entry:\n{list}", all.len());
    // Nor is the page about what nobody says any more.
    let literals: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let literals = literals.replace("\\\n", "").split_whitespace().collect::<Vec<_>>().join(" ");
    let dead: Vec<_> = patterns
        .iter()
        .filter(|pattern| {
            let known = all.iter().any(|(_, message)| fits(pattern, message));
            !known && !literals.contains(longest(pattern))
        })
        .collect();
    assert!(dead.is_empty(), "entries for what drago-vmm does not say: {dead:#?}");
}

#[test]
fn literals_and_patterns() {
    assert_eq!(literal("\"a \\\"b\\\" \\\n      c\" d").unwrap(), "a \"b\" c");
    let text = "#[error(\"one {0}\")]\ntracing::warn!(device = \"x\", %error, \"two {}\", 3);\n\
                unusable(format!(\"three\"));\n#[cfg(test)]\nmod tests { \"four\" }";
    assert_eq!(messages(text), ["one {0}", "three", "two {}"]);
    let fits = |pattern: &str, message: &str| fits(&pieces(pattern), message);
    assert!(fits(
        "the interface '…' cannot be used",
        "the interface '{name}' cannot be used{hint}"
    ));
    assert!(!fits("the interface '…' is gone", "the interface '{name}' cannot be used{hint}"));
    assert!(fits("… cannot be woken", "the balloon cannot be woken"));
}
