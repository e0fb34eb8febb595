//! The GPU (VIRTIO 1.3 §5.7), served by a process of its own: front end of vhost-user and of
//! QEMU's vhost-user-gpu socket.
//!
//! | module | what it does |
//! |---|---|
//! | [`config`] | `--gpu` |
//! | [`process`] | starts `drago-gpu` or connects to a back end that runs already |
//! | [`vhost_user`] | features, memory, rings: the back end gets what the driver set up |
//! | [`server`] | the GPU socket, on a thread of its own, because a back end may wait for answers |
//! | [`display`] | the state behind it: monitors, scanouts, cursors, frames |
//! | [`frame`] | a picture in memory that the back end writes |
//! | [`handle`] | what the VMM does with the device at run time |
//! | [`device`] | the virtio device |
//! | [`recovery`] | life and death of the back end: starts it again, hands it what the last one left |
//! | [`orphan`] | answers the driver while there is no back end |

mod config;
mod device;
mod display;
mod frame;
pub mod fuzz;
mod handle;
mod orphan;
mod process;
mod recovery;
mod server;
mod sys;
#[cfg(test)]
mod tests;
mod vhost_user;

pub use gpu_protocol::Rect;

pub use self::{
    config::{GpuConfig, MODULE, Renderer},
    frame::{CopyError, Frame},
    handle::{CursorImage, DisplayMode, DisplaySink, GpuHandle},
    recovery::RestartPolicy,
};
