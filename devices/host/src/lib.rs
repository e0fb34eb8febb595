//! What more than one of our processes needs from Linux. Knows no guest, no virtio, no wire format.
//!
//! | module | what it does |
//! |---|---|
//! | [`socket_io`] | bytes and descriptors over a Unix stream socket |
//! | [`process`] | child processes, started by a launcher that is forked off before the sandbox |
//! | [`render_nodes`] | GPUs as programs without a screen use them |
//! | [`threads`] | threads that do not inherit the narrower filter of the thread that wants them |
//! | [`seccomp`] | system call filters made from tables, and a readable report of what they catch |

pub mod process;
pub mod render_nodes;
pub mod seccomp;
pub mod socket_io;
pub mod threads;
