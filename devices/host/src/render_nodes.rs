//! GPUs as programs without a screen use them.

use std::{fs, path::PathBuf};

/// Where render nodes are.
pub const FOLDER: &str = "/dev/dri";

/// The render nodes there are, in order; whether they can be opened is not looked at.
pub fn all() -> Vec<PathBuf> {
    let mut nodes: Vec<PathBuf> = fs::read_dir(FOLDER)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("renderD"))
        })
        .collect();
    nodes.sort();
    nodes
}
