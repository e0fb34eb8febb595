//! Notices a test host that has come to a standstill.
//!
//! The emulator now and then leads the test host's own kernel astray (docs/testing.md), which then says
//! nothing any more, not even that it is stuck. Without this each test would wait for it as long as for a
//! slow one, and nobody could tell why it failed.

use std::process::Child;
use std::sync::mpsc::{self, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::remote::RemoteCommand;
use crate::progress;

/// What is said of such a test host, before it is ended.
pub const STILL: &str = "the test host does not answer any more";

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(20);
/// Who starts no program for so long does nothing any more, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(180);

/// As long as it is there it is looked whether the test host answers.
#[derive(Debug)]
pub(super) struct Watch {
    _over: Sender<()>,
}

impl Watch {
    pub(super) fn new(agent_port: u16, token: &str, qemu: Arc<Mutex<Child>>) -> Self {
        Self::with_times(agent_port, token, qemu, PAUSE, LIMIT)
    }

    fn with_times(
        agent_port: u16,
        token: &str,
        qemu: Arc<Mutex<Child>>,
        pause: Duration,
        limit: Duration,
    ) -> Self {
        let (over, told) = mpsc::channel::<()>();
        let token = token.to_owned();
        thread::spawn(move || {
            while told.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let answer = RemoteCommand::new(agent_port, token.clone(), "true".to_owned())
                    .spawn(|_, _| ())
                    .and_then(|mut child| child.wait_timeout(limit));
                if answer.is_err() && told.try_recv() == Err(TryRecvError::Empty) {
                    progress::note(format_args!("{STILL}: it is ended"));
                    let _ = qemu.lock().unwrap_or_else(PoisonError::into_inner).kill();
                    return;
                }
            }
        });
        Self { _over: over }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    /// A program in QEMU's place.
    fn sleep() -> Arc<Mutex<Child>> {
        Arc::new(Mutex::new(Command::new("sleep").arg("3600").spawn().unwrap()))
    }

    #[test]
    fn a_test_host_that_takes_commands_and_runs_none_is_ended() {
        let agent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = agent.local_addr().unwrap().port();
        let qemu = sleep();
        let watch = Watch::with_times(port, "secret", Arc::clone(&qemu), SHORT, SHORT);
        let (command, _) = agent.accept().unwrap();
        let status = loop {
            if let Some(status) = qemu.lock().unwrap().try_wait().unwrap() {
                break status;
            }
            thread::yield_now();
        };
        assert_eq!(status.signal(), Some(9));
        drop((command, watch));
    }

    #[test]
    fn one_that_is_given_up_is_left_alone() {
        let agent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = agent.local_addr().unwrap().port();
        let qemu = sleep();
        let watch = Watch::with_times(port, "secret", Arc::clone(&qemu), SHORT, PAUSE * 100);
        let (command, _) = agent.accept().unwrap();
        drop(watch);
        // Now the command fails, and the watch sees that nobody needs it.
        drop((command, agent));
        while Arc::strong_count(&qemu) > 1 {
            thread::yield_now();
        }
        let mut qemu = qemu.lock().unwrap();
        assert_eq!(qemu.try_wait().unwrap(), None);
        qemu.kill().unwrap();
        qemu.wait().unwrap();
    }
}
