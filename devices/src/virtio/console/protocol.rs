//! Messages of the control queues (VIRTIO 1.3 §5.3.6.2).

/// Driver: the device is (1) or is not (0) ready for use.
pub(super) const DEVICE_READY: u16 = 0;
/// Device: a port exists.
pub(super) const PORT_ADD: u16 = 1;
/// Driver: a port is (1) or is not (0) ready for use.
pub(super) const PORT_READY: u16 = 3;
/// Device: the port is a console.
pub(super) const CONSOLE_PORT: u16 = 4;
/// Device: the console's new size.
pub(super) const RESIZE: u16 = 5;
/// Both: this side opened (1) or closed (0) the port.
pub(super) const PORT_OPEN: u16 = 6;
/// Device: the port's name.
pub(super) const PORT_NAME: u16 = 7;

/// Bytes of a message without payload.
pub(super) const HEADER_SIZE: usize = 8;

/// The fixed part of a control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    /// Port the message is about.
    pub(super) port: u32,
    /// One of the constants above.
    pub(super) event: u16,
    /// Meaning depends on the event.
    pub(super) value: u16,
}

impl Message {
    pub(super) fn decode(bytes: [u8; HEADER_SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    /// The message as bytes, with `payload` behind it.
    pub(super) fn encode(self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
        bytes.extend(self.port.to_le_bytes());
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(payload);
        bytes
    }
}

/// Text size of a console in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsoleSize {
    /// Characters per line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl ConsoleSize {
    /// Columns, then rows, as both configuration space and RESIZE have it.
    pub(super) fn encode(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.columns.to_le_bytes(), self.rows.to_le_bytes());
        [a, b, c, d]
    }
}
