//! A client of the guest's agent that is no SPICE client: clipboard text only, without I/O. For
//! programs that show the same guest to viewers of another protocol.

use crate::proto::{
    DecodeError,
    agent::{
        ANNOUNCE_CAPABILITIES, CAP_CLIPBOARD_BY_DEMAND, CAP_CLIPBOARD_SELECTION, CLIPBOARD,
        CLIPBOARD_GRAB, CLIPBOARD_REQUEST, ChunkCutter, Cutter, PORT_CLIENT, Piece, capabilities,
        message, put_chunks, wants_capabilities,
    },
};

/// Longest text in bytes.
const MAX_TEXT: usize = 1 << 20;
/// `VD_AGENT_CLIPBOARD_NONE`.
const NONE: u32 = 0;
/// `VD_AGENT_CLIPBOARD_UTF8_TEXT`.
const UTF8_TEXT: u32 = 1;
/// The clipboard proper; others are what is marked with the mouse.
const SELECTION_CLIPBOARD: u8 = 0;
/// Most bytes of a message other than a text.
const MAX_MESSAGE: u32 = 4096;
/// Bytes for a guest that does not read, above which its requests are not answered.
const MAX_OUT: usize = 4 * MAX_TEXT;

/// Exchanges clipboard text with the guest's agent. Bytes from the guest's port go in by
/// [`guest_data`](Self::guest_data), bytes for it are in [`output`](Self::output).
#[derive(Debug, Default)]
pub struct AgentText {
    open: bool,
    chunks: ChunkCutter,
    cutter: Cutter,
    /// The message that is arriving, if it is of interest: type and body so far.
    incoming: Option<(u32, Vec<u8>)>,
    /// What the guest's agent can do, once it has said so.
    guest: Option<u32>,
    /// What viewers have copied last.
    text: Option<String>,
    out: Vec<u8>,
}

impl AgentText {
    /// Longest text in bytes that is taken from the guest and from viewers.
    pub const MAX_LENGTH: usize = MAX_TEXT;

    /// The guest opened or closed its end of the port. Opening it again is a new beginning.
    pub fn guest_opened(&mut self, open: bool) {
        *self = Self { open, text: self.text.take(), ..Self::default() };
        if open {
            self.announce(1);
        }
    }

    /// Bytes from the guest. Returns the texts that were copied there. An agent that talks nonsense is
    /// not heard until it opens the port again.
    pub fn guest_data(&mut self, mut bytes: &[u8]) -> Vec<String> {
        let mut texts = Vec::new();
        while self.open && !bytes.is_empty() {
            let result = match self.chunks.next(&mut bytes) {
                Ok(Some((PORT_CLIENT, data))) => self.guest_chunk(data, &mut texts),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                tracing::warn!(%error, "the guest agent talks nonsense; ignored until it reopens its port");
                self.guest_opened(false);
            }
        }
        texts
    }

    fn guest_chunk(&mut self, mut data: &[u8], texts: &mut Vec<String>) -> Result<(), DecodeError> {
        while let Some(piece) = self.cutter.next(&mut data)? {
            match piece {
                Piece::Begin(header) => {
                    let limit = match header.kind {
                        CLIPBOARD => MAX_TEXT as u32 + 8,
                        ANNOUNCE_CAPABILITIES | CLIPBOARD_GRAB | CLIPBOARD_REQUEST => MAX_MESSAGE,
                        _ => 0,
                    };
                    let wanted = (1..=limit).contains(&header.size);
                    self.incoming = wanted.then(|| (header.kind, Vec::new()));
                }
                Piece::Data(bytes) => {
                    if let Some((_, body)) = &mut self.incoming {
                        body.extend_from_slice(bytes);
                    }
                }
                Piece::End => {
                    if let Some((kind, body)) = self.incoming.take() {
                        texts.extend(self.guest_message(kind, &body));
                    }
                }
            }
        }
        Ok(())
    }

    fn guest_message(&mut self, kind: u32, mut body: &[u8]) -> Option<String> {
        if kind == ANNOUNCE_CAPABILITIES {
            self.guest = Some(capabilities(body));
            if wants_capabilities(body) {
                self.announce(0);
            }
            self.grab();
            return None;
        }
        let mut selection = SELECTION_CLIPBOARD;
        if self.selections() {
            let (head, rest) = body.split_first_chunk::<4>()?;
            (selection, body) = (head[0], rest);
        }
        if selection != SELECTION_CLIPBOARD {
            return None;
        }
        let mut types = body
            .chunks_exact(4)
            .map(|word| word.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte)));
        match kind {
            CLIPBOARD_GRAB if types.any(|kind| kind == UTF8_TEXT) => {
                self.send(CLIPBOARD_REQUEST, &UTF8_TEXT.to_le_bytes());
            }
            CLIPBOARD_REQUEST => {
                let text = self.text.clone().filter(|_| types.next() == Some(UTF8_TEXT));
                let kind = if text.is_some() { UTF8_TEXT } else { NONE };
                let text = text.unwrap_or_default();
                self.send(CLIPBOARD, &[&kind.to_le_bytes(), text.as_bytes()].concat());
            }
            CLIPBOARD if types.next() == Some(UTF8_TEXT) => {
                return Some(String::from_utf8_lossy(body.get(4..)?).into_owned());
            }
            _ => {}
        }
        None
    }

    /// A viewer has copied this text; one that is too long is left out.
    pub fn copy(&mut self, text: &str) {
        if text.len() > MAX_TEXT {
            tracing::info!(bytes = text.len(), "too much text for the guest's clipboard");
            return;
        }
        self.text = Some(text.to_owned());
        self.grab();
    }

    /// Bytes for the guest.
    pub fn output(&self) -> &[u8] {
        &self.out
    }

    /// The guest has taken so many of them.
    pub fn written(&mut self, count: usize) {
        self.out.drain(..count.min(self.out.len()));
    }

    fn selections(&self) -> bool {
        self.guest.is_some_and(|guest| guest & CAP_CLIPBOARD_SELECTION != 0)
    }

    fn announce(&mut self, request: u32) {
        let able = CAP_CLIPBOARD_BY_DEMAND | CAP_CLIPBOARD_SELECTION;
        self.put(ANNOUNCE_CAPABILITIES, &[request.to_le_bytes(), able.to_le_bytes()].concat());
    }

    /// Says that there is something to paste.
    fn grab(&mut self) {
        let able = self.guest.is_some_and(|guest| guest & CAP_CLIPBOARD_BY_DEMAND != 0);
        if able && self.text.is_some() {
            self.send(CLIPBOARD_GRAB, &UTF8_TEXT.to_le_bytes());
        }
    }

    /// Sends a clipboard message.
    fn send(&mut self, kind: u32, body: &[u8]) {
        if self.selections() {
            self.put(kind, &[&[SELECTION_CLIPBOARD, 0, 0, 0], body].concat());
        } else {
            self.put(kind, body);
        }
    }

    fn put(&mut self, kind: u32, body: &[u8]) {
        if self.out.len() <= MAX_OUT {
            put_chunks(&mut self.out, PORT_CLIENT, &message(kind, body));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives the guest's messages in chunks, in pieces of any size.
    fn say(agent: &mut AgentText, messages: &[(u32, &[u8])]) -> Vec<String> {
        let mut wire = Vec::new();
        for (kind, body) in messages {
            put_chunks(&mut wire, PORT_CLIENT, &message(*kind, body));
        }
        wire.chunks(777).flat_map(|piece| agent.guest_data(piece)).collect()
    }

    /// What the guest reads: types and bodies.
    fn hear(agent: &mut AgentText) -> Vec<(u32, Vec<u8>)> {
        let wire = agent.output().to_vec();
        agent.written(wire.len());
        let (mut chunks, mut cutter) = (ChunkCutter::default(), Cutter::default());
        let (mut rest, mut messages) = (&wire[..], Vec::new());
        while let Some((port, mut data)) = chunks.next(&mut rest).unwrap() {
            assert_eq!(port, PORT_CLIENT);
            while let Some(piece) = cutter.next(&mut data).unwrap() {
                match piece {
                    Piece::Begin(header) => messages.push((header.kind, Vec::new())),
                    Piece::Data(bytes) => messages.last_mut().unwrap().1.extend_from_slice(bytes),
                    Piece::End => {}
                }
            }
        }
        messages
    }

    const ABLE: [u8; 8] = [1, 0, 0, 0, 1 << 5 | 1 << 6, 0, 0, 0];

    #[test]
    fn text_both_ways() {
        let mut agent = AgentText::default();
        agent.guest_opened(true);
        assert_eq!(hear(&mut agent), [(ANNOUNCE_CAPABILITIES, vec![1, 0, 0, 0, 0x60, 0, 0, 0])]);
        say(&mut agent, &[(ANNOUNCE_CAPABILITIES, &ABLE)]);
        assert_eq!(hear(&mut agent), [(ANNOUNCE_CAPABILITIES, vec![0, 0, 0, 0, 0x60, 0, 0, 0])]);
        // The guest has HTML and text; what is only marked there is left alone.
        say(&mut agent, &[(CLIPBOARD_GRAB, &[0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0])]);
        assert_eq!(hear(&mut agent), [(CLIPBOARD_REQUEST, vec![0, 0, 0, 0, 1, 0, 0, 0])]);
        say(&mut agent, &[(CLIPBOARD_GRAB, &[1, 0, 0, 0, 1, 0, 0, 0])]);
        assert!(hear(&mut agent).is_empty());
        let long = "ü".repeat(MAX_TEXT / 2);
        let body = [&[0, 0, 0, 0, 1, 0, 0, 0], long.as_bytes()].concat();
        assert_eq!(say(&mut agent, &[(CLIPBOARD, &body)]), [long]);

        agent.copy("zurück");
        assert_eq!(hear(&mut agent), [(CLIPBOARD_GRAB, vec![0, 0, 0, 0, 1, 0, 0, 0])]);
        say(&mut agent, &[(CLIPBOARD_REQUEST, &[0, 0, 0, 0, 1, 0, 0, 0])]);
        let text = [&[0, 0, 0, 0, 1, 0, 0, 0], "zurück".as_bytes()].concat();
        assert_eq!(hear(&mut agent), [(CLIPBOARD, text)]);
        // A picture there is none of.
        say(&mut agent, &[(CLIPBOARD_REQUEST, &[0, 0, 0, 0, 2, 0, 0, 0])]);
        assert_eq!(hear(&mut agent), [(CLIPBOARD, vec![0; 8])]);

        // The next agent hears of it, too.
        agent.guest_opened(false);
        agent.guest_opened(true);
        say(&mut agent, &[(ANNOUNCE_CAPABILITIES, &[0, 0, 0, 0, 1 << 5, 0, 0, 0])]);
        let heard = hear(&mut agent);
        assert_eq!(heard[1..], [(CLIPBOARD_GRAB, vec![1, 0, 0, 0])], "without selections");
    }

    #[test]
    fn no_end_and_no_sense() {
        let mut agent = AgentText::default();
        assert!(say(&mut agent, &[(CLIPBOARD, b"closed")]).is_empty());
        agent.guest_opened(true);
        say(
            &mut agent,
            &[(ANNOUNCE_CAPABILITIES, &ABLE), (CLIPBOARD_GRAB, &[0]), (CLIPBOARD, &[])],
        );
        let endless = vec![0; MAX_TEXT + 9];
        assert!(say(&mut agent, &[(CLIPBOARD, &endless)]).is_empty());
        // A guest that asks and never reads.
        agent.copy(&"x".repeat(MAX_TEXT));
        agent.copy(&"y".repeat(MAX_TEXT + 1));
        for _ in 0..20 {
            say(&mut agent, &[(CLIPBOARD_REQUEST, &[0, 0, 0, 0, 1, 0, 0, 0])]);
        }
        assert!(agent.output().len() < MAX_OUT + 2 * MAX_TEXT);
        assert!(agent.guest_data(&[0xff; 64]).is_empty());
        assert!(agent.output().is_empty(), "ignored until it opens its port again");
    }
}
