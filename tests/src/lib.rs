//! The nested-KVM test host, the guests and what the end-to-end suites share.
//!
//! [`testbed`] boots a small Linux under QEMU's TCG whose KVM is real (SVM is emulated faithfully), with
//! this machine's root file system mounted inside. It is how the project is tested on machines without
//! usable KVM, and how `cargo xtask demo` runs there.

pub mod client;
pub mod console;
pub mod cpio;
pub mod debian;
pub mod desktop;
pub mod guest;
pub mod keys;
pub mod modules;
pub mod paths;
pub mod picture;
pub mod progress;
pub mod stop;
pub mod testbed;
#[path = "../../spice-server/tests/support/tone.rs"]
pub mod tone;
pub mod units;
pub mod viewer;
pub mod vm;
#[path = "../../spice-server/tests/support/xvfb.rs"]
pub mod xvfb;
