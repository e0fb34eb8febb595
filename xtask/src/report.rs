//! What a run of tests had to say, in the order in which it is looked for: a reader of CI's output begins at
//! its end, so what failed tests said is said again there, whole.
//!
//! libtest keeps what a test prints, and shows it when the test has failed. What programs print that tests
//! start (`drago-gpu`, viewers) goes past it, from all tests at once: that goes to a file, of which the end is
//! shown with a failure.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
};

use drago_tests::progress::note;

use crate::skips::Skips;

/// How many lines of the programs' log are shown with a failure.
const LAST_WORDS: usize = 30;

/// What is known at the end of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) skips: Skips,
    /// What libtest says of failed tests.
    failed: Vec<u8>,
    /// The last words of the programs that were started by test executables with a failed test.
    last_words: Vec<LastWords>,
}

#[derive(Debug)]
struct LastWords {
    /// As cargo names the test executable.
    of: String,
    lines: VecDeque<String>,
    log: PathBuf,
}

/// Where libtest's report is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Progress,
    Passed,
    Failed,
}

/// Whether this is how libtest begins.
fn is_begin(line: &str) -> bool {
    line.starts_with("running ") && (line.ends_with(" test") || line.ends_with(" tests"))
}

impl Report {
    /// Passes on the report of `cargo test -- --show-output`, but not what the tests that passed had to
    /// say: a few of them at work fill a terminal. `log` is where cargo's standard error goes.
    pub(crate) fn relay(&mut self, from: impl Read, mut to: impl Write, log: &mut Log) {
        let mut part = Part::Progress;
        let mut test = "cargo test".to_owned();
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            match (part, text) {
                (Part::Progress, "successes:") => part = Part::Passed,
                (Part::Progress | Part::Passed, "failures:") => part = Part::Failed,
                (_, end) if end.starts_with("test result:") => part = Part::Progress,
                // Of the next executable, if the last one came to no result.
                (Part::Failed, begin) if is_begin(begin) => part = Part::Progress,
                (Part::Passed, header) if header.starts_with("---- ") => {
                    test = header.trim_matches('-').trim().trim_end_matches(" stdout").to_owned();
                }
                (Part::Passed, said) => self.skips.look(&test, said),
                // A test without libtest's frame.
                (Part::Progress, said) => self.skips.look("cargo test", said),
                (Part::Failed, _) => {}
            }
            if is_begin(text) {
                log.show_cargo();
            }
            if part == Part::Failed {
                self.failed.extend_from_slice(&line);
                self.failed.push(b'\n');
            }
            if part != Part::Passed {
                let _ = to.write_all(&line).and_then(|()| to.write_all(b"\n"));
            }
        }
        let _ = to.flush();
        log.show_cargo();
        self.last_words.append(&mut log.last_words);
    }

    /// Says at the end what was skipped, then why tests failed. Returns how many were skipped for want of
    /// something that was to be installed.
    pub(crate) fn end(&self, to: &mut impl Write) -> usize {
        let missing = self.skips.report();
        let _ = self.say_failures(to);
        missing
    }

    fn say_failures(&self, to: &mut impl Write) -> io::Result<()> {
        for LastWords { of, lines, log } in &self.last_words {
            writeln!(to, "==> failed: {of}; what its programs said last, of {}:", log.display())?;
            lines.iter().try_for_each(|line| writeln!(to, "    {line}"))?;
        }
        if !self.failed.is_empty() {
            writeln!(to, "==> what the failed tests said:")?;
            to.write_all(&self.failed)?;
        }
        to.flush()
    }
}

/// The file with what cargo and the programs of tests write to standard error.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    from: BufReader<File>,
    /// A line whose end has not been written yet.
    line: Vec<u8>,
    /// The last lines since cargo started a test executable.
    lines: VecDeque<String>,
    /// That one has failed: what follows is how it died, if it did.
    is_over: bool,
    last_words: Vec<LastWords>,
}

impl Log {
    /// Makes the file anew; also the end that is written to.
    pub(crate) fn create(path: &Path) -> io::Result<(Self, File)> {
        File::create(path)?;
        let to = File::options().append(true).open(path)?;
        let log = Self {
            path: path.to_owned(),
            from: BufReader::new(File::open(path)?),
            line: Vec::new(),
            lines: VecDeque::new(),
            is_over: false,
            last_words: Vec::new(),
        };
        Ok((log, to))
    }

    /// Says what cargo itself has said meanwhile.
    fn show_cargo(&mut self) {
        while self.from.read_until(b'\n', &mut self.line).is_ok_and(|count| count > 0) {
            if self.line.pop_if(|byte| *byte == b'\n').is_none() {
                return;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            self.take(line);
        }
    }

    fn take(&mut self, line: String) {
        let said = line.trim_start();
        if said.starts_with("Running ") || said.starts_with("Doc-tests ") {
            self.lines.clear();
            self.is_over = false;
            eprintln!("{line}");
        } else if let Some(of) = said.strip_prefix("error: test failed, to rerun pass ") {
            let (of, lines) = (of.to_owned(), std::mem::take(&mut self.lines));
            self.last_words.push(LastWords { of, lines, log: self.path.clone() });
            self.is_over = true;
        } else if let Some(last) = self.last_words.last_mut().filter(|_| self.is_over) {
            last.lines.extend((!line.is_empty()).then_some(line));
        } else {
            // Also cargo's reason where no test executable was to blame.
            self.lines.push_back(line);
            if self.lines.len() > LAST_WORDS {
                self.lines.pop_front();
            }
        }
    }

    /// What was said after all test executables, for when cargo failed: which of them did, or why none
    /// was run.
    pub(crate) fn rest(&self) {
        self.lines.iter().for_each(note);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nsuccesses:\n\n\
                        ---- a stdout ----\nchatter\nSKIPPED: no tun\n\n\nsuccesses:\n    a\n\n\
                        failures:\n\n---- b stdout ----\nwhy\n\n\nfailures:\n    b\n\n\
                        test result: FAILED. 1 passed\n\nrunning 1 test\ntest c ... ok\n";

    fn log(folder: &tempfile::TempDir, said: &str) -> Log {
        let (log, mut to) = Log::create(&folder.path().join("log")).unwrap();
        to.write_all(said.as_bytes()).unwrap();
        log
    }

    #[test]
    fn what_passed_says_only_what_it_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let mut shown = Vec::new();
        let mut report = Report::default();
        report.relay(SAID.as_bytes(), &mut shown, &mut log(&folder, ""));
        assert_eq!(
            String::from_utf8(shown).unwrap(),
            "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n\
             ---- b stdout ----\nwhy\n\n\nfailures:\n    b\n\ntest result: FAILED. 1 passed\n\n\
             running 1 test\ntest c ... ok\n"
        );
        assert_eq!(report.skips.to_string(), "a: no tun\n");
    }

    #[test]
    fn a_failure_comes_last_after_its_programs_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let chatter = "drago-gpu: hm\n".repeat(LAST_WORDS + 5);
        let log = &mut log(
            &folder,
            &format!(
                "     Running x\nof x\n     Running y\n{chatter}drago-gpu: ouch\nerror: test failed, \
                 to rerun pass `--lib`\n\nCaused by:\n  signal 6\n     Running z\nof z\nerror: 1 target \
                 failed:\n    `--lib`\n"
            ),
        );
        let mut report = Report::default();
        report.relay(SAID.as_bytes(), io::sink(), log);
        let mut said = Vec::new();
        assert_eq!(report.end(&mut said), 0);
        let said = String::from_utf8(said).unwrap();
        let (words, why) = said.split_once("==> what the failed tests said:\n").unwrap();
        assert!(words.starts_with("==> failed: `--lib`; "), "{words}");
        let end = "    drago-gpu: ouch\n    Caused by:\n      signal 6\n";
        assert!(words.ends_with(end), "{words}");
        assert_eq!(words.lines().count(), 1 + LAST_WORDS + 2);
        assert_eq!(why, "failures:\n\n---- b stdout ----\nwhy\n\n\nfailures:\n    b\n\n");
        assert!(log.lines.contains(&"error: 1 target failed:".to_owned()));
    }

    #[test]
    fn a_line_is_shown_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (mut log, mut to) = Log::create(&folder.path().join("log")).unwrap();
        to.write_all(b"drago-").unwrap();
        log.show_cargo();
        assert!(log.lines.is_empty());
        to.write_all(b"gpu\n").unwrap();
        log.show_cargo();
        assert_eq!(log.lines, ["drago-gpu"]);
    }
}
