//! The nested-KVM test host: a machine with real KVM, made from one that has none.
//!
//! QEMU's TCG emulates AMD's SVM well enough for a stock kernel's kvm_amd. The test host is Debian's
//! generic kernel with a small initramfs; it mounts this machine's root read-only and some folders
//! read-write over 9p and runs this machine's own programs. `vgem` gives it `/dev/dri`, and tun, vhost
//! and udmabuf are there too.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use drago_tests::testbed::{Options, Testbed};
//! let host = Testbed::boot(&Options::new("target/debug/drago-testbed-agent".into()))?;
//! let out = host.command("ls").arg("/dev/kvm").output()?;
//! assert_eq!(out.code, 0);
//! # Ok(())
//! # }
//! ```

pub mod agent;
mod carry;
mod host;
mod image;
mod leftovers;
pub mod proto;
mod remote;
mod watch;

pub use host::{Options, Testbed};
pub use remote::{RemoteChild, RemoteCommand, RemoteOutput, RemoteStdin, Stream};
pub use watch::STILL;
