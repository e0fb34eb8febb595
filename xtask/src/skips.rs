//! Tests that could not run here say so, and what they say is shown at the end.

use std::{
    fmt,
    io::{BufRead, BufReader, Read, Write},
};

use drago_tests::progress::note;

/// How a test says that it did not run, or not whole; then why.
const SKIPPED: &str = "SKIPPED";

/// What tests say of a package or program that they miss. `cargo xtask test` installs all that are
/// needed, so in its runs this is a mistake and no reason to be content.
const MISSING: [&str; 2] = ["not installed", "is missing"];

/// All tests of a run that were skipped.
#[derive(Debug, Default)]
pub(crate) struct Skips(Vec<Skip>);

#[derive(Debug, PartialEq, Eq)]
struct Skip {
    test: String,
    reason: String,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.test, self.reason)
    }
}

impl Skips {
    /// Looks at one line of what `test` says.
    pub(crate) fn look(&mut self, test: &str, line: &str) {
        if let Some(reason) = line.trim().strip_prefix(SKIPPED) {
            let reason = reason.trim_start_matches(':').trim().to_owned();
            self.0.push(Skip { test: test.to_owned(), reason });
        }
    }

    /// Takes over others.
    pub(crate) fn add(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    /// Passes on the report of `cargo test -- --show-output`, but not what the tests that passed had to
    /// say: a few of them at work fill a terminal.
    pub(crate) fn relay(&mut self, from: impl Read, mut to: impl Write) {
        let mut test = None;
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            match (&mut test, text.trim_end()) {
                (None, "successes:") => test = Some(String::new()),
                (Some(_), end) if end == "failures:" || end.starts_with("test result:") => {
                    test = None;
                }
                (Some(test), header) if header.starts_with("---- ") => {
                    *test = header.trim_matches('-').trim().trim_end_matches(" stdout").to_owned();
                }
                (Some(test), said) => self.look(test, said),
                // A test without libtest's frame.
                (None, said) => self.look("cargo test", said),
            }
            if test.is_none() {
                let _ = to.write_all(&line).and_then(|()| to.write_all(b"\n"));
            }
        }
        let _ = to.flush();
    }

    /// Lists them. Returns how many were skipped for want of something that was to be installed.
    pub(crate) fn report(&self) -> usize {
        if !self.0.is_empty() {
            eprintln!("==> not run, or not whole, on this machine:");
        }
        for skip in &self.0 {
            note(skip);
        }
        self.0.iter().filter(|skip| MISSING.iter().any(|text| skip.reason.contains(text))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passed_says_only_what_it_skipped() {
        let said = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nsuccesses:\n\n\
                    ---- a stdout ----\nchatter\nSKIPPED: no tun\n\n\nsuccesses:\n    a\n\nfailures:\n\n\
                    ---- b stdout ----\nwhy\n\ntest result: FAILED. 1 passed\n";
        let mut shown = Vec::new();
        let mut skips = Skips::default();
        skips.relay(said.as_bytes(), &mut shown);
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(
            shown,
            "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n\
             ---- b stdout ----\nwhy\n\ntest result: FAILED. 1 passed\n"
        );
        let skip = Skip { test: "a".to_owned(), reason: "no tun".to_owned() };
        assert_eq!(skips.0, [skip]);
        assert_eq!(skips.report(), 0);
    }

    #[test]
    fn what_was_to_be_installed_is_a_mistake() {
        let mut skips = Skips::default();
        skips.look("a", "    SKIPPED tiny: openssl is not installed");
        skips.look("a", "no SKIPPED here");
        assert_eq!(skips.report(), 1);
    }
}
