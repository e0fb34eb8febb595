//! A file for guest RAM that may consist of transparent huge pages.
//!
//! Shared memory gets huge pages only where its file system allows them (Linux
//! `admin-guide/mm/transhuge.rst`, "Hugepages in tmpfs/shmem"). The one behind `memfd_create` obeys
//! `shmem_enabled`, which is `never` on almost every host; a tmpfs made with `huge=always` obeys its
//! own option. So the file is made, without a name, in a tmpfs that is mounted nowhere. Making one
//! takes CAP_SYS_ADMIN, which a child process has in a user namespace of its own where the kernel
//! permits those.
//!
//! What this saves: a nested page fault per 4 KiB that the guest touches, some 25,000 of them until
//! its init runs. What it costs: such a file cannot be sealed against being shortened.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, IntoRawFd, OwnedFd, RawFd},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
    process::{getegid, geteuid},
};

use crate::sys;

/// Where the administrator's setting is.
pub const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// What the administrator set for shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// memfds get huge pages, at least where they are asked for.
    Memfds,
    /// Only a file system made for them gets huge pages.
    OwnFileSystem,
    /// Nobody gets any.
    Denied,
}

/// Reads the kernel's setting.
pub fn setting() -> Setting {
    std::fs::read_to_string(SETTING).map_or(Setting::Denied, |text| parse(&text))
}

/// The chosen word of such a file stands in brackets.
fn parse(text: &str) -> Setting {
    let chosen = text.split(['[', ']']).nth(1);
    match chosen {
        Some("never") => Setting::OwnFileSystem,
        Some("always" | "within_size" | "advise" | "force") => Setting::Memfds,
        _ => Setting::Denied,
    }
}

/// Makes an empty file without a name in a tmpfs of its own.
///
/// # Errors
///
/// Where this process may neither mount nor make a user namespace, and before Linux 5.2.
pub fn file() -> io::Result<File> {
    match in_own_tmpfs() {
        Err(Errno::PERM) => {
            let maps =
                [format!("0 {} 1", geteuid().as_raw()), format!("0 {} 1", getegid().as_raw())];
            let fd = sys::in_namespaces_of_its_own(|| as_root_of_namespace(&maps))?;
            Ok(fd.into())
        }
        made => Ok(made?.into()),
    }
}

/// The child's part: must not allocate.
fn as_root_of_namespace(maps: &[String; 2]) -> rustix::io::Result<RawFd> {
    // user_namespaces(7): without privileges a group map is only accepted after this.
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &maps[0])?;
    write("/proc/self/gid_map", &maps[1])?;
    in_own_tmpfs().map(IntoRawFd::into_raw_fd)
}

fn write(path: &str, text: &str) -> rustix::io::Result<()> {
    let file = rustix::fs::openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, text.as_bytes()).map(drop)
}

fn in_own_tmpfs() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "huge", "always")?;
    // No limit but that of the file itself; otherwise half of the host's memory.
    fsconfig_set_string(context.as_fd(), "size", "0")?;
    fsconfig_create(context.as_fd())?;
    let mount = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::openat(mount, ".", flags, Mode::RUSR | Mode::WUSR)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn settings() {
        let text = |chosen| {
            "always within_size advise never deny force".replace(chosen, &format!("[{chosen}]"))
        };
        assert_eq!(parse(&text("never")), Setting::OwnFileSystem);
        assert_eq!(parse(&text("advise")), Setting::Memfds);
        assert_eq!(parse(&text("deny")), Setting::Denied);
        assert_eq!(parse("nonsense"), Setting::Denied);
    }

    #[test]
    fn a_file_of_any_size() {
        let file = match file() {
            Ok(file) => file,
            Err(error) => {
                println!("SKIPPED: no tmpfs of our own here: {error}");
                return;
            }
        };
        // More than half of any host's memory; nothing of it is taken.
        file.set_len(1 << 44).unwrap();
        file.write_all_at(b"end", (1 << 44) - 3).unwrap();
        assert!(
            std::fs::read_to_string("/proc/self/mounts")
                .unwrap()
                .lines()
                .all(|line| { !line.contains("huge=always") })
        );
    }

    #[test]
    fn what_an_unprivileged_process_does() {
        let maps = [format!("0 {} 1", geteuid().as_raw()), format!("0 {} 1", getegid().as_raw())];
        match sys::in_namespaces_of_its_own(|| as_root_of_namespace(&maps)) {
            Ok(fd) => File::from(fd).write_all_at(b"x", 1 << 30).unwrap(),
            Err(error) => println!("SKIPPED: no namespaces here: {error}"),
        }
    }
}
