//! What a guest that has taken over this process cannot do.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::{
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    process::{Command, Output},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_drago-gpu");
const SIGSYS: i32 = 31;

struct Seen {
    out: String,
    log: String,
    signal: Option<i32>,
}

impl From<Output> for Seen {
    fn from(output: Output) -> Self {
        Self {
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
            signal: output.status.signal(),
        }
    }
}

const TWO_D: [&str; 2] = ["--renderer", "2d"];
const DRIVER: [&str; 2] = ["--renderer", "virgl"];

fn attempt(what: &str, options: &[&str]) -> Seen {
    Command::new(PROGRAM).args(["--self-test", what]).args(options).output().unwrap().into()
}

#[test]
fn what_is_not_in_the_table_ends_the_process_and_is_named() {
    for (what, call) in
        [("connect", "socket"), ("fork", "clone"), ("kill", "kill"), ("code", "mmap")]
    {
        let seen = attempt(what, &TWO_D);
        assert_eq!(seen.signal, Some(SIGSYS), "{what}: {} {}", seen.out, seen.log);
        let named = format!("({call}), which its table does not allow");
        assert!(seen.log.contains("thread 'drago-gpu'"), "{}", seen.log);
        assert!(seen.log.contains(&named), "{}", seen.log);
        assert_eq!(seen.out, "", "{what}");
    }
    // The C library blocks all signals around this one, so that there is no message.
    assert_eq!(attempt("exec", &TWO_D).signal, Some(SIGSYS));
}

#[test]
fn files_are_out_of_reach_and_threads_are_not() {
    for what in ["open", "create"] {
        let seen = attempt(what, &TWO_D);
        assert!(seen.out.starts_with("refused"), "{what}: {} {}", seen.out, seen.log);
    }
    assert_eq!(attempt("thread", &TWO_D).out, "started a thread\n");
}

/// With a graphics driver inside there are more ways to go on, but none out.
#[test]
fn a_driver_may_make_code_and_nothing_else_leads_out() {
    assert_eq!(attempt("code", &DRIVER).out, "made code\n");
    assert_eq!(attempt("thread", &DRIVER).out, "started a thread\n");
    let landlock = !attempt("thread", &DRIVER).log.contains("refused: Landlock");
    for what in ["open", "create", "connect"] {
        let seen = attempt(what, &DRIVER);
        if landlock || what == "connect" {
            assert!(seen.out.starts_with("refused"), "{what}: {} {}", seen.out, seen.log);
        }
    }
    for what in ["fork", "exec", "kill"] {
        assert_eq!(attempt(what, &DRIVER).signal, Some(SIGSYS), "{what}");
    }
}

/// The render server may read what the kernel tells about it, not about who waits for it. Here a shell
/// stands in for it.
#[test]
fn the_render_server_may_look_at_itself() {
    let script = "read -r line </proc/self/stat && echo \"looked at $line\"";
    let mut command = Command::new(PROGRAM);
    command.args(["--probe", "--renderer", "virgl", "--vulkan", "venus"]);
    command.args(["/bin/sh", "-c", script].map(|word| format!("--render-server={word}")));
    let seen: Seen = command.output().unwrap().into();
    // Its name in brackets is that of who looks.
    let looked =
        seen.out.lines().any(|line| line.starts_with("looked at ") && line.contains("(sh)"));
    assert!(looked, "{} {}", seen.out, seen.log);
}

/// The other walls stand when system calls are only logged.
#[test]
fn each_wall_stands_by_itself() {
    let seen = attempt("connect", &["--renderer", "2d", "--sandbox", "log"]);
    assert_eq!(seen.signal, None, "{}", seen.log);
    if seen.log.contains("network") && !seen.log.contains("refused: network") {
        assert!(seen.out.starts_with("refused"), "own network namespace: {}", seen.out);
    }
    if seen.log.contains("Landlock") && !seen.log.contains("refused: Landlock") {
        let seen = attempt("open", &["--renderer", "2d", "--sandbox", "log"]);
        assert!(seen.out.starts_with("refused"), "Landlock: {}", seen.out);
    }
    assert_eq!(attempt("exec", &["--renderer", "2d", "--sandbox", "off"]).out, "ran a program\n");
    assert_eq!(
        attempt("open", &["--renderer", "2d", "--sandbox", "off"]).out,
        "opened /etc/passwd\n"
    );
}

/// As in a unit with `User=`.
#[test]
fn an_unprivileged_user_gets_a_sandbox_too() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can become somebody else");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path(), mode).unwrap();
    let program = folder.path().join("drago-gpu");
    // By another process: a child that another test forks meanwhile would have our end of the copy open
    // for writing until it executes its program, and what is open for writing cannot be executed.
    assert!(Command::new("cp").arg(PROGRAM).arg(&program).status().unwrap().success());
    let run = |what: &str| -> Seen {
        let mut command = Command::new(&program);
        command
            .args(["--self-test", what, "--renderer", "2d"])
            .uid(65534)
            .gid(65534)
            .current_dir("/");
        command.output().unwrap().into()
    };
    assert!(run("open").out.starts_with("refused"));
    let seen = run("connect");
    assert_eq!(seen.signal, Some(SIGSYS), "{}", seen.log);
    assert!(seen.log.contains("sandbox: no new privileges"), "{}", seen.log);
}

#[test]
fn what_the_system_refuses_is_named_in_one_line() {
    // No namespaces inside the namespaces of this shell.
    let script = format!(
        "for limit in user net ipc uts mnt; do echo 0 > /proc/sys/user/max_${{limit}}_namespaces; done; \
         exec {PROGRAM} --renderer 2d --self-test open"
    );
    let output = Command::new("unshare").args(["-U", "-r", "sh", "-ec", &script]).output();
    let seen: Seen = output.unwrap().into();
    if !seen.log.contains("sandbox:") {
        println!("SKIPPED: no user namespaces here: {}", seen.log);
        return;
    }
    assert!(seen.out.starts_with("refused"), "{} {}", seen.out, seen.log);
    let line = seen.log.lines().find(|line| line.contains("this system refused")).unwrap();
    assert!(line.contains("user namespace ("), "{line}");
    assert!(line.contains("network, IPC, UTS and mount namespaces ("), "{line}");
    let lines = seen.log.lines().filter(|line| line.contains("sandbox:")).count();
    assert_eq!(lines, 1, "{}", seen.log);
}
