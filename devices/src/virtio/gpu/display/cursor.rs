//! Pointers.

use std::sync::Arc;

use gpu_protocol::socket::CursorPos;

use super::{Event, State};

/// A pointer's image.
pub(in crate::virtio::gpu) struct Cursor {
    pub(super) hot: (u32, u32),
    pub(super) pixels: Vec<u8>,
}

impl State {
    pub(super) fn define_cursor(&mut self, pos: CursorPos, cursor: Cursor) {
        let Some(scanout) = self.scanouts.get_mut(pos.scanout as usize) else { return };
        let cursor = Arc::new(cursor);
        scanout.cursor = Some(cursor.clone());
        scanout.cursor_pos = (pos.x, pos.y);
        scanout.cursor_visible = true;
        self.events.push_back(Event::CursorDefine(pos.scanout, cursor));
        self.events.push_back(Event::CursorMove(pos.scanout, pos.x, pos.y));
    }

    pub(super) fn move_cursor(&mut self, pos: CursorPos) {
        let Some(scanout) = self.scanouts.get_mut(pos.scanout as usize) else { return };
        scanout.cursor_pos = (pos.x, pos.y);
        // "Set/show the cursor position": a hidden cursor comes back.
        if let Some(cursor) = scanout.cursor.clone().filter(|_| !scanout.cursor_visible) {
            scanout.cursor_visible = true;
            self.events.push_back(Event::CursorDefine(pos.scanout, cursor));
        }
        self.events.push_back(Event::CursorMove(pos.scanout, pos.x, pos.y));
    }

    pub(super) fn hide_cursor(&mut self, id: u32) {
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        if std::mem::take(&mut scanout.cursor_visible) {
            self.events.push_back(Event::CursorHide(id));
        }
    }
}
