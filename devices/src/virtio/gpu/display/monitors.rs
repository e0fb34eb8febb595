//! What the guest is told about its monitors.

use gpu_protocol::{
    Rect,
    edid::{self, Monitor},
    virtio::{CtrlHdr, RespDisplayInfo, RespEdid, kind},
};

use super::{Scanout, State};
use crate::virtio::gpu::handle::DisplayMode;

impl State {
    pub(super) fn display_info(&self) -> RespDisplayInfo {
        let hdr = CtrlHdr::new(kind::OK_DISPLAY_INFO);
        let mut info = RespDisplayInfo { hdr, ..RespDisplayInfo::default() };
        // Side by side, as drivers that know positions expect it.
        let mut x = 0;
        for (one, scanout) in info.scanouts.iter_mut().zip(&self.scanouts) {
            if let Some(mode) = scanout.mode {
                one.rect = Rect::new(x, 0, mode.width, mode.height).into();
                one.enabled = 1.into();
                x += mode.width;
            }
        }
        info
    }

    pub(super) fn edid(&self, scanout: u32) -> RespEdid {
        match self.scanouts.get(scanout as usize) {
            None => RespEdid::new(CtrlHdr::new(kind::ERR_INVALID_SCANOUT_ID), &[]),
            Some(Scanout { mode: None, .. }) => {
                let monitor = Monitor::new(scanout, 1024, 768);
                RespEdid::new(CtrlHdr::new(kind::OK_EDID), &edid::generate(&monitor))
            }
            Some(Scanout { mode: Some(mode), .. }) => {
                let DisplayMode { width, height, width_mm, height_mm } = *mode;
                let monitor =
                    Monitor { width_mm, height_mm, ..Monitor::new(scanout, width, height) };
                RespEdid::new(CtrlHdr::new(kind::OK_EDID), &edid::generate(&monitor))
            }
        }
    }
}
