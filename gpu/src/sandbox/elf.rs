//! The dynamic loader of a program (elf(5)), which execve(2) executes too.

use std::{
    ffi::OsString,
    fs::File,
    os::unix::{ffi::OsStringExt, fs::FileExt},
    path::{Path, PathBuf},
};

/// `PT_INTERP`.
const INTERPRETER: u32 = 3;
/// More than the header has for its path is none.
const PATH_MAX: u64 = 4096;

/// The path in the program header `PT_INTERP`. None for a static program, and for what is no 64-bit ELF
/// file of this machine's byte order.
pub(super) fn interpreter(program: &Path) -> Option<PathBuf> {
    let file = File::open(program).ok()?;
    let header: [u8; 64] = read(&file, 0)?;
    if !header.starts_with(b"\x7fELF\x02") {
        return None;
    }
    let (offset, size, count) =
        (wide(&header, 32)?, half(&header, 54)?, usize::from(half(&header, 56)?));
    (0..count).find_map(|index| {
        let at = offset.checked_add(index as u64 * u64::from(size))?;
        let entry: [u8; 56] = read(&file, at)?;
        if u32::from_ne_bytes(entry[..4].try_into().ok()?) != INTERPRETER {
            return None;
        }
        let (at, length) = (wide(&entry, 8)?, wide(&entry, 32)?);
        let mut path = vec![0; usize::try_from(length.min(PATH_MAX)).ok()?];
        file.read_exact_at(&mut path, at).ok()?;
        let end = path.iter().position(|byte| *byte == 0)?;
        path.truncate(end);
        Some(OsString::from_vec(path).into())
    })
}

fn read<const SIZE: usize>(file: &File, at: u64) -> Option<[u8; SIZE]> {
    let mut bytes = [0; SIZE];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn wide(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_names_its_loader() {
        let own = std::env::current_exe().unwrap();
        let loader = interpreter(&own).unwrap();
        assert!(loader.is_absolute() && loader.is_file(), "{}", loader.display());
        assert_eq!(interpreter(&loader), None, "itself static");
    }

    #[test]
    fn other_files_have_none() {
        assert_eq!(interpreter(Path::new("/proc/self/cmdline")), None);
        assert_eq!(interpreter(Path::new("/nowhere")), None);
    }
}
