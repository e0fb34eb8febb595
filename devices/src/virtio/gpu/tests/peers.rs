//! What only one foreign back end does.

use gpu_protocol::virtio::{CtrlHdr, RespDisplayInfo, kind};
use zerocopy::{FromBytes, IntoBytes};

use super::{commands::*, rig::*};

/// A second implementation of QEMU's socket, in Rust: handshake, and answers to the commands with which
/// a driver starts. It has no monitors in this mode and asks us nothing.
#[test]
fn the_back_end_of_vhost_device_gets_along() {
    let Some(mut rig) = Rig::new(BackEnd::Null) else { return };
    let hdr = CtrlHdr::new(kind::GET_DISPLAY_INFO);
    let answer = rig.command_raw(hdr.as_bytes(), size_of::<RespDisplayInfo>());
    let (hdr, _) = CtrlHdr::read_from_prefix(&answer).unwrap();
    assert_eq!(hdr.kind.get(), kind::OK_NODATA, "no error, and no monitors");
    let screen = Resource::new(1, 64, 64);
    rig.create(&screen);
    rig.show(1, screen.whole());
    rig.paint(&screen, screen.whole(), |x, y| [x as u8, y as u8, 0, 0]);
    rig.unref(1);
    assert!(rig.handle.is_alive());
}
