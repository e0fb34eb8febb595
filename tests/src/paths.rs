//! Where things are: the checkout and the cache of what is downloaded or made from downloads.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the checkout.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_path_buf()
}

/// The recipes of test host and guests.
pub fn resources() -> PathBuf {
    workspace().join("resources")
}

/// A folder below the cache, made if missing. The cache is `target/` of the checkout, whatever
/// `CARGO_TARGET_DIR` says, so that several build folders share one copy; `DRAGO_CACHE` moves it.
///
/// # Errors
/// If the folder cannot be made.
pub fn cache(sub: &str) -> Result<PathBuf> {
    let base =
        std::env::var_os("DRAGO_CACHE").map_or_else(|| workspace().join("target"), PathBuf::from);
    let dir = base.join(sub);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    dir.canonicalize().with_context(|| format!("cannot resolve {}", dir.display()))
}
