//! Where things are: the checkout and the cache of what is downloaded or made from downloads.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

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

/// A cargo for the checkout. Started by cargo, it would take over what its parent sets for the program
/// that it runs (`CARGO_MANIFEST_DIR` and such), on which build scripts of other crates depend: they
/// would be built again, and once more by whoever calls cargo next without.
pub fn cargo() -> Command {
    const KEPT: &[&str] =
        &["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_INCREMENTAL", "CARGO_TERM_COLOR"];
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let kept = KEPT.contains(&&*text)
            || [
                "CARGO_BUILD_",
                "CARGO_NET_",
                "CARGO_HTTP_",
                "CARGO_PROFILE_",
                "CARGO_REGISTR",
                "CARGO_TARGET_X",
            ]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        if text.starts_with("CARGO") && !kept {
            command.env_remove(&name);
        }
    }
    command
}
