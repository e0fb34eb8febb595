//! What may pass between clients and the guest's agent: clipboard by direction and size, files.

use crate::proto::agent::{
    CLIPBOARD, CLIPBOARD_GRAB, CLIPBOARD_RELEASE, CLIPBOARD_REQUEST, FILE_XFER_DATA,
    FILE_XFER_START, FILE_XFER_STATUS, Header,
};

/// Which way clipboard content may travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clipboard {
    /// Both ways.
    #[default]
    Both,
    /// From clients into the guest only: nothing copied in the guest can be read by a client.
    ToGuest,
    /// From the guest to clients only: nothing copied on a client's machine can be read by the guest.
    ToClient,
    /// Not at all.
    Off,
}

/// What clients and the guest's agent may exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentPolicy {
    /// Directions of the clipboard.
    pub clipboard: Clipboard,
    /// Largest clipboard content that passes, in bytes. Who asked for more gets an empty answer.
    pub max_clipboard: u32,
    /// Whether clients may send files into the guest.
    pub file_transfer: bool,
}

impl Default for AgentPolicy {
    fn default() -> Self {
        Self { clipboard: Clipboard::Both, max_clipboard: u32::MAX, file_transfer: true }
    }
}

/// Who sent a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    Client,
    Guest,
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
    /// Clipboard content that is too long: an empty one goes in its place, because the other side
    /// waits for it.
    Empty,
    /// A file nobody may send; its sender is told.
    Refuse,
}

impl AgentPolicy {
    pub(crate) fn verdict(&self, from: Sender, header: &Header) -> Verdict {
        match header.kind {
            // These travel with the content, a request travels against it.
            CLIPBOARD_GRAB | CLIPBOARD | CLIPBOARD_RELEASE if !self.clipboard_from(from) => {
                Verdict::Drop
            }
            CLIPBOARD_REQUEST if !self.clipboard_from(from.other()) => Verdict::Drop,
            CLIPBOARD if header.size > self.max_clipboard => Verdict::Empty,
            FILE_XFER_START if !self.file_transfer && from == Sender::Client => Verdict::Refuse,
            FILE_XFER_START | FILE_XFER_STATUS | FILE_XFER_DATA if !self.file_transfer => {
                Verdict::Drop
            }
            _ => Verdict::Pass,
        }
    }

    fn clipboard_from(&self, from: Sender) -> bool {
        match self.clipboard {
            Clipboard::Both => true,
            Clipboard::ToGuest => from == Sender::Client,
            Clipboard::ToClient => from == Sender::Guest,
            Clipboard::Off => false,
        }
    }

    /// The capabilities to withdraw from an announcement, and those to add to the guest's.
    pub(crate) fn capabilities(&self) -> (u32, u32) {
        const CLIPBOARD: u32 = 1 << 3 | 1 << 5 | 1 << 6;
        const FILE_XFER_DISABLED: u32 = 1 << 13;
        (
            if self.clipboard == Clipboard::Off { CLIPBOARD } else { 0 },
            if self.file_transfer { 0 } else { FILE_XFER_DISABLED },
        )
    }
}

impl Sender {
    fn other(self) -> Self {
        match self {
            Self::Client => Self::Guest,
            Self::Guest => Self::Client,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(policy: AgentPolicy, from: Sender, kind: u32) -> Verdict {
        policy.verdict(from, &Header { kind, opaque: 0, size: 100 })
    }

    #[test]
    fn clipboard_directions() {
        use Sender::{Client, Guest};
        for (clipboard, from_client, from_guest) in [
            (Clipboard::Both, true, true),
            (Clipboard::ToGuest, true, false),
            (Clipboard::ToClient, false, true),
            (Clipboard::Off, false, false),
        ] {
            let policy = AgentPolicy { clipboard, ..AgentPolicy::default() };
            let passes = |from, kind| verdict(policy, from, kind) == Verdict::Pass;
            for kind in [CLIPBOARD_GRAB, CLIPBOARD, CLIPBOARD_RELEASE] {
                assert_eq!(passes(Client, kind), from_client, "{clipboard:?} {kind}");
                assert_eq!(passes(Guest, kind), from_guest, "{clipboard:?} {kind}");
            }
            // Who may have the content may ask for it.
            assert_eq!(passes(Guest, CLIPBOARD_REQUEST), from_client, "{clipboard:?}");
            assert_eq!(passes(Client, CLIPBOARD_REQUEST), from_guest, "{clipboard:?}");
        }
    }

    #[test]
    fn size_and_files() {
        let policy = AgentPolicy { max_clipboard: 99, file_transfer: false, ..Default::default() };
        assert_eq!(verdict(policy, Sender::Guest, CLIPBOARD), Verdict::Empty);
        assert_eq!(verdict(policy, Sender::Client, FILE_XFER_START), Verdict::Refuse);
        assert_eq!(verdict(policy, Sender::Client, FILE_XFER_DATA), Verdict::Drop);
        assert_eq!(verdict(policy, Sender::Guest, FILE_XFER_STATUS), Verdict::Drop);
        let larger = AgentPolicy { max_clipboard: 100, ..AgentPolicy::default() };
        assert_eq!(verdict(larger, Sender::Guest, CLIPBOARD), Verdict::Pass);
        assert_eq!(verdict(larger, Sender::Client, FILE_XFER_START), Verdict::Pass);
    }
}
