//! The guest agent's byte stream (spice-vdagent) between a virtio port and the clients.

pub(crate) mod bridge;
pub(crate) mod hub;
mod policy;
mod text;

use std::sync::Arc;

pub use policy::{AgentPolicy, Clipboard};
pub use text::AgentText;

/// The program's end of the guest agent's port (`com.redhat.spice.0`).
///
/// Methods are called from the server's threads and must not block.
pub trait AgentPort: Send + Sync {
    /// Gives bytes to the guest. Returns how many were taken; when that is less than all, call
    /// [`AgentHandle::writable`](crate::AgentHandle::writable) once there is room again.
    fn to_guest(&self, bytes: &[u8]) -> usize;

    /// [`AgentHandle::guest_data`](crate::AgentHandle::guest_data) would take bytes again after it
    /// had refused some.
    fn guest_data_wanted(&self) {}
}

impl<T: AgentPort + ?Sized> AgentPort for Arc<T> {
    fn to_guest(&self, bytes: &[u8]) -> usize {
        (**self).to_guest(bytes)
    }

    fn guest_data_wanted(&self) {
        (**self).guest_data_wanted();
    }
}
