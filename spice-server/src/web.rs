//! The page for browsers: files that were read once, because a server in a sandbox opens none.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::Error;

/// Most bytes and files of a page, and most folders in folders.
const MAX_BYTES: u64 = 32 << 20;
const MAX_FILES: usize = 1024;
const MAX_DEPTH: usize = 8;

/// Where a browser begins: what spice-html5 has for a page that needs no typing, and what others
/// have.
const STARTS: [&str; 3] = ["spice_auto.html", "index.html", "spice.html"];

/// A page and all it needs, in memory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct WebPage {
    files: Arc<BTreeMap<String, Arc<[u8]>>>,
    start: &'static str,
}

impl WebPage {
    /// Reads a folder such as `/usr/share/spice-html5`.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        let mut left = MAX_BYTES;
        read(folder, "", &mut files, &mut left, 0)
            .map_err(|source| Error::WebFolder { path: folder.to_owned(), source })?;
        let start = STARTS.into_iter().find(|name| files.contains_key(*name));
        let Some(start) = start else {
            let path: PathBuf = folder.to_owned();
            return Err(Error::WebNothing { path, expected: STARTS.join(", ") });
        };
        Ok(Self { files: Arc::new(files), start })
    }

    /// The path a browser is sent to when it asks for `/`.
    pub(crate) fn start(&self) -> String {
        format!("/{}", self.start)
    }

    /// A file and what it is, by the path of a request.
    pub(crate) fn file(&self, path: &str) -> Option<(&'static str, Arc<[u8]>)> {
        let name = path.strip_prefix('/')?;
        let content = self.files.get(name)?.clone();
        Some((kind(name), content))
    }
}

fn read(
    folder: &Path,
    prefix: &str,
    files: &mut BTreeMap<String, Arc<[u8]>>,
    left: &mut u64,
    depth: usize,
) -> io::Result<()> {
    let too_much = || io::Error::other("this is more than a page: too many files, or too large");
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
        // Packages link to other packages' files.
        let metadata = fs::metadata(entry.path())?;
        if metadata.is_dir() {
            if depth >= MAX_DEPTH {
                return Err(too_much());
            }
            read(&entry.path(), &format!("{prefix}{name}/"), files, left, depth + 1)?;
        } else if metadata.is_file() {
            *left = left.checked_sub(metadata.len()).ok_or_else(too_much)?;
            if files.len() >= MAX_FILES {
                return Err(too_much());
            }
            files.insert(format!("{prefix}{name}"), fs::read(entry.path())?.into());
        }
    }
    Ok(())
}

fn kind(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        Some("ico") => "image/x-icon",
        Some("json" | "map") => "application/json",
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_becomes_a_page() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("js")).unwrap();
        fs::write(folder.path().join("js/main.js"), "1").unwrap();
        fs::write(folder.path().join(".hidden"), "2").unwrap();
        let error = WebPage::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("spice_auto.html"), "{error}");
        fs::write(folder.path().join("index.html"), "<p>").unwrap();
        let page = WebPage::from_folder(folder.path()).unwrap();
        assert_eq!(page.start(), "/index.html");
        let (kind, content) = page.file("/js/main.js").unwrap();
        assert_eq!((kind, &*content), ("text/javascript; charset=utf-8", &b"1"[..]));
        for path in ["/.hidden", "/js", "/js/../index.html", "//index.html", "index.html", "/"] {
            assert!(page.file(path).is_none(), "{path}");
        }
        assert!(WebPage::from_folder("/nonexistent".as_ref()).is_err());
    }
}
