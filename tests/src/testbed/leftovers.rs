//! What earlier test hosts left in the cache.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

const HOUR: Duration = Duration::from_secs(3600);

/// Logs are looked at after a failure, not a week later.
const LOGS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Something in the cache is used again, and so is not old.
pub(super) fn used(path: &Path) {
    // Somebody else's may stay as it is.
    let _ = fs::File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes from the test host's cache what nobody needs any more: logs of last week, initial RAM disks of
/// other recipes than the present one that nobody has [`used`] for as long, and the folders that the
/// driver once made for each boot: no boot takes an hour, and QEMU reads them when it starts.
pub(super) fn forget(cache: &Path, initramfs: &Path) {
    forget_older(cache, HOUR, |name| name.starts_with("boot-"));
    let current = initramfs.file_name().unwrap_or_default();
    forget_older(cache, LOGS_KEPT, |name| name.starts_with("initramfs-") && name != current);
    forget_older(&cache.join("logs"), LOGS_KEPT, |name| name.starts_with("serial-"));
}

/// Removes what has such a name and was not written to for so long. What cannot be removed stays: others
/// may be at it at the same time.
fn forget_older(folder: &Path, age: Duration, has_name: impl Fn(&str) -> bool) {
    let Some(limit) = SystemTime::now().checked_sub(age) else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_old = entry.metadata().and_then(|data| data.modified()).is_ok_and(|at| at < limit);
        if !is_old || !entry.file_name().to_str().is_some_and(&has_name) {
            continue;
        }
        let path = entry.path();
        let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_old_is_forgotten() {
        let cache = tempfile::tempdir().unwrap();
        let at = |name: &str, hours: u32| {
            let path = cache.path().join(name);
            if name.starts_with("boot-") {
                fs::create_dir(&path).unwrap();
                fs::write(path.join("initramfs"), "").unwrap();
            } else {
                fs::write(&path, "").unwrap();
            }
            let then = SystemTime::now() - HOUR * hours;
            fs::File::open(&path).unwrap().set_modified(then).unwrap();
            path
        };
        fs::create_dir(cache.path().join("logs")).unwrap();
        let old = [at("boot-a", 2), at("initramfs-1.cpio", 200), at("logs/serial-1.log", 200)];
        let kept = [
            at("boot-b", 0),
            at("initramfs-2.cpio", 200),
            at("initramfs-3.cpio", 20),
            at("logs/serial-2.log", 20),
            at("other", 200),
            at("initramfs-4.cpio", 200),
        ];
        // By another checkout.
        used(&kept[5]);
        forget(cache.path(), &kept[1]);
        assert!(old.iter().all(|path| !path.exists()));
        assert!(kept.iter().all(|path| path.exists()));
    }
}
