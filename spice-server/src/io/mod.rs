//! Sockets and threads around the protocol core.
//!
//! - `reactor`: one thread with epoll for listening, links and all channels but display.
//! - `viewer`: one thread per display channel, which encodes and sends at its client's pace.
//! - `keys`: one thread that makes ticket keys and opens tickets.

pub(crate) mod channels;
pub(crate) mod flow;
pub(crate) mod guard;
pub(crate) mod keys;
pub(crate) mod links;
pub(crate) mod listen;
pub(crate) mod password;
pub(crate) mod reactor;
pub(crate) mod shared;
mod sound;
pub(crate) mod stream;
pub(crate) mod sys;
pub(crate) mod viewer;
pub(crate) mod wake;
