//! Own namespaces (namespaces(7)): no network, nobody else's System V IPC, and for 2D no files.
//!
//! An unprivileged process gets them inside a user namespace of its own, where that is permitted; a
//! privileged one (root in a chroot, where user namespaces are refused) also without. There is
//! no PID namespace, which would concern children only and drago-gpu makes none (the filter of system calls
//! permits threads only), but for the render server: that one makes a process for each context.

use std::{fs, io};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{chdir, chroot, pivot_root},
    thread::UnshareFlags,
};

use super::{Needs, Sandbox, sys};

/// Where an empty file system can be put in the own mount namespace; the first that exists.
const PLACES: [&str; 3] = ["/tmp", "/run", "/"];

/// Enters them.
pub(super) fn enter(sandbox: &mut Sandbox) {
    let inner =
        UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNS;
    let what = "network, IPC, UTS and mount namespaces";
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let mounts = match sys::unshare(inner | UnshareFlags::NEWUSER) {
        Ok(()) => {
            sandbox.note("user namespace", Ok(()));
            // Numbers stay what they are.
            let _ = fs::write("/proc/self/setgroups", "deny");
            let mapped = fs::write("/proc/self/uid_map", format!("{0} {0} 1", uid.as_raw()))
                .and_then(|()| fs::write("/proc/self/gid_map", format!("{0} {0} 1", gid.as_raw())));
            if let Err(error) = mapped {
                sandbox.note("mapping of the user", Err(error));
            }
            sandbox.note(what, Ok(()));
            true
        }
        Err(error) => {
            sandbox.note("user namespace", Err(error));
            let result = sys::unshare(inner);
            let mounts = result.is_ok();
            sandbox.note(what, result);
            mounts
        }
    };
    if matches!(sandbox.needs, Needs::RenderServer { .. }) {
        // By itself: where only this one is refused, the others stand.
        let result = sys::unshare(UnshareFlags::NEWPID);
        sandbox.own_processes = result.is_ok();
        sandbox.note("PID namespace", result);
    }
    if !mounts {
        return;
    }
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    if let Err(error) = mount_change("/", private) {
        sandbox.note("private mounts", Err(error.into()));
        return;
    }
    if sandbox.needs == Needs::Nothing {
        let result = empty_root();
        sandbox.note("empty file system", result);
    }
}

/// Puts an empty, read-only file system in the place of all others.
fn empty_root() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    let mut result = Err(io::ErrorKind::NotFound.into());
    for place in PLACES {
        result = mount("none", place, "tmpfs", flags, c"size=4k,nr_inodes=2,mode=555")
            .and_then(|()| chdir(place))
            .map_err(io::Error::from);
        if result.is_ok() {
            break;
        }
    }
    result?;
    // Not possible in a chroot or on an initial RAM disk; without capabilities, chroot does as well.
    match pivot_root(".", ".") {
        Ok(()) => unmount(".", UnmountFlags::DETACH)?,
        Err(_) => chroot(".")?,
    }
    chdir("/")?;
    Ok(())
}
