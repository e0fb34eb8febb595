//! Tests that could not run here say so, and what they say is shown at the end.

use std::fmt;

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

impl fmt::Display for Skips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|skip| writeln!(f, "{skip}"))
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
    fn what_was_to_be_installed_is_a_mistake() {
        let mut skips = Skips::default();
        skips.look("a", "    SKIPPED tiny: openssl is not installed");
        skips.look("a", "no SKIPPED here");
        assert_eq!(skips.report(), 1);
    }
}
