//! The channels the reactor serves: all but display.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Instant,
};

use super::{
    shared::{Shared, lock},
    sound::{PlaybackChannel, RecordChannel},
};
use crate::{
    Button, KeyEvent, Leds, MouseMode, PointerPosition, Scancode,
    agent::hub::ToClient,
    audio::Sound,
    display::resize::Resizer,
    display::state::DisplayShared,
    proto::{
        DecodeError,
        channel::{ChannelType, put_disconnecting, put_notify},
        cursor::{self, Shape},
        framing::{Deframer, Framer},
        inputs::{self, MASK_BUTTONS, MOTION_ACK_BUNCH, ScancodeDecoder, WireButton},
        link::LinkRequest,
        main, playback, record,
    },
};

/// Unsent bytes above which a channel waits before it says more.
pub(crate) const SOFT_LIMIT: usize = 64 * 1024;
/// Pointer images a client is asked to remember.
const CURSOR_CACHE: usize = 32;

/// What a channel works with.
pub(crate) struct Context<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) session: u32,
    /// Bytes to send.
    pub(crate) out: &'a mut Vec<u8>,
}

impl Context<'_> {
    /// A moment on the multimedia clock.
    pub(super) fn time(&self, moment: Instant) -> u32 {
        moment.saturating_duration_since(self.shared.clock).as_millis() as u32
    }
}

/// A channel of an authenticated client.
pub(crate) struct Channel {
    id: u8,
    deframer: Deframer,
    framer: Framer,
    body: Body,
}

enum Body {
    Main(MainChannel),
    Inputs(InputsChannel),
    Cursor(CursorChannel),
    Playback(PlaybackChannel),
    Record(RecordChannel),
}

impl Channel {
    fn new(request: &LinkRequest, body: Body) -> Self {
        Self {
            id: request.channel_id,
            deframer: Deframer::new(request.header_kind()),
            framer: Framer::new(request.header_kind()),
            body,
        }
    }

    pub(crate) fn main(request: &LinkRequest, shared: &Shared, session: u32, clock: u32) -> Self {
        let tokens = shared.agent.attach(session);
        let main = MainChannel {
            mouse_mode: *lock(&shared.mouse_mode),
            notices: lock(&shared.notices).last,
            agent_tokens: tokens,
            clock,
            knows_names: request.channel_caps.has(main::CAP_NAME_AND_UUID),
            knows_tokens: request.channel_caps.has(main::CAP_AGENT_CONNECTED_TOKENS),
            resizer: Resizer::default(),
        };
        Self::new(request, Body::Main(main))
    }

    pub(crate) fn inputs(request: &LinkRequest, shared: &Shared) -> Self {
        let inputs = InputsChannel {
            leds: lock(&shared.leds).unwrap_or_default(),
            keys: BTreeSet::new(),
            buttons: 0,
            decoder: ScancodeDecoder::default(),
            motions: 0,
        };
        Self::new(request, Body::Inputs(inputs))
    }

    pub(crate) fn cursor(request: &LinkRequest, display: Arc<DisplayShared>) -> Self {
        let cursor = CursorChannel { display, shown: None, position: None, cached: HashSet::new() };
        Self::new(request, Body::Cursor(cursor))
    }

    pub(crate) fn playback(request: &LinkRequest, sound: &Sound) -> Self {
        Self::new(request, Body::Playback(PlaybackChannel::new(request, sound)))
    }

    pub(crate) fn record(request: &LinkRequest, sound: &Sound, session: u32) -> Self {
        Self::new(request, Body::Record(RecordChannel::new(request, sound, session)))
    }

    pub(crate) fn kind(&self) -> ChannelType {
        match self.body {
            Body::Main(_) => ChannelType::Main,
            Body::Inputs(_) => ChannelType::Inputs,
            Body::Cursor(_) => ChannelType::Cursor,
            Body::Playback(_) => ChannelType::Playback,
            Body::Record(_) => ChannelType::Record,
        }
    }

    pub(crate) fn key(&self) -> (ChannelType, u8) {
        (self.kind(), self.id)
    }

    /// Says what the client must hear first.
    pub(crate) fn opened(&mut self, context: &mut Context<'_>) {
        let framer = &mut self.framer;
        match &mut self.body {
            Body::Main(main) => main.opened(framer, context),
            Body::Inputs(inputs) => inputs::put_init(framer, context.out, inputs.leds),
            Body::Cursor(_) => cursor::put_init(framer, context.out),
            Body::Playback(_) | Body::Record(_) => {}
        }
    }

    /// Takes bytes from the client.
    pub(crate) fn receive(
        &mut self,
        bytes: &[u8],
        context: &mut Context<'_>,
    ) -> Result<(), DecodeError> {
        self.deframer.receive(bytes);
        match &mut self.body {
            Body::Main(main) => {
                while let Some((kind, body)) = self.deframer.next_message(main::limit)? {
                    main.message(main::decode(kind, body)?, context)?;
                }
            }
            Body::Inputs(inputs) => {
                while let Some((kind, body)) = self.deframer.next_message(inputs::limit)? {
                    inputs.message(inputs::decode(kind, body)?, &mut self.framer, context);
                }
            }
            Body::Cursor(_) => {
                while let Some((kind, body)) = self.deframer.next_message(cursor::limit)? {
                    cursor::decode(kind, body)?;
                }
            }
            Body::Playback(playback) => {
                while let Some((kind, body)) = self.deframer.next_message(playback::limit)? {
                    playback.message(playback::decode(kind, body)?);
                }
            }
            Body::Record(record) => {
                while let Some((kind, body)) = self.deframer.next_message(record::limit)? {
                    record.message(record::decode(kind, body)?)?;
                }
            }
        }
        Ok(())
    }

    /// Messages of the client since the last call that were too many and not looked at.
    pub(crate) fn take_dropped(&mut self) -> u64 {
        match &mut self.body {
            Body::Record(record) => record.take_dropped(),
            _ => 0,
        }
    }

    /// Says what changed on the server since the last time, as long as the client keeps reading.
    pub(crate) fn serve(&mut self, context: &mut Context<'_>) {
        if context.out.len() > SOFT_LIMIT {
            return;
        }
        match &mut self.body {
            Body::Main(main) => main.serve(&mut self.framer, context),
            Body::Inputs(inputs) => inputs.serve(&mut self.framer, context),
            Body::Cursor(cursor) => cursor.serve(&mut self.framer, context),
            Body::Playback(playback) => playback.serve(&mut self.framer, context),
            Body::Record(record) => record.serve(&mut self.framer, context),
        }
    }

    /// When [`timer`](Self::timer) wants to be called.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        match &self.body {
            Body::Main(main) => main.resizer.next_timer(),
            _ => None,
        }
    }

    pub(crate) fn timer(&mut self, now: Instant, context: &mut Context<'_>) {
        if let Body::Main(main) = &mut self.body {
            main.resizer.timer(now, context.shared);
        }
    }

    /// Tells the client that the server ends the connection.
    pub(crate) fn say_goodbye(&mut self, out: &mut Vec<u8>) {
        put_disconnecting(&mut self.framer, out);
    }

    /// The connection is gone.
    pub(crate) fn closed(&mut self, session: u32, shared: &Shared) {
        match &mut self.body {
            Body::Main(_) => shared.agent.detach(session),
            Body::Inputs(inputs) => inputs.release_all(shared),
            Body::Cursor(_) => {}
            Body::Playback(playback) => playback.closed(),
            Body::Record(record) => record.closed(),
        }
    }
}

struct MainChannel {
    /// As last told to the client.
    mouse_mode: MouseMode,
    /// Number of the last notice before those the client has not got.
    notices: u64,
    /// Tokens to announce in INIT.
    agent_tokens: u32,
    clock: u32,
    knows_names: bool,
    knows_tokens: bool,
    resizer: Resizer,
}

impl MainChannel {
    fn opened(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        let shared = context.shared;
        let init = main::Init {
            session: context.session,
            displays: shared.displays.len() as u32,
            mouse_mode: self.mouse_mode,
            agent_tokens: Some(self.agent_tokens),
            mm_time: self.clock,
        };
        main::put_init(framer, context.out, &init);
        // The client will ask for the channels next: telling them now saves a round trip. The
        // display comes first, because its first picture takes longest.
        let mut channels = Vec::new();
        let ids = || (0..=u8::MAX).take(shared.displays.len());
        channels.extend(ids().map(|id| (ChannelType::Display, id)));
        channels.push((ChannelType::Inputs, 0));
        channels.extend(ids().map(|id| (ChannelType::Cursor, id)));
        if shared.config.sound.is_some() {
            channels.extend([(ChannelType::Playback, 0), (ChannelType::Record, 0)]);
        }
        main::put_channels_list(framer, context.out, &channels);
        if self.knows_names {
            if let Some(name) = &shared.config.name {
                main::put_name(framer, context.out, name);
            }
            if let Some(uuid) = &shared.config.uuid {
                main::put_uuid(framer, context.out, uuid);
            }
        }
    }

    fn message(
        &mut self,
        message: main::ClientMessage<'_>,
        context: &mut Context<'_>,
    ) -> Result<(), DecodeError> {
        let shared = context.shared;
        let drives = shared.drives(context.session);
        match message {
            // Answered before it was asked.
            main::ClientMessage::AttachChannels => {}
            main::ClientMessage::MouseModeRequest(_) if !drives => {}
            main::ClientMessage::MouseModeRequest(mode) => {
                *lock(&shared.mouse_mode) = mode;
            }
            main::ClientMessage::AgentStart { tokens } => {
                shared.agent.start(context.session, tokens);
            }
            main::ClientMessage::AgentData(data) => {
                if let Some(monitors) = shared.agent.client_data(context.session, data)?
                    && drives
                {
                    self.resizer.wanted(monitors, Instant::now());
                }
            }
            main::ClientMessage::AgentToken { tokens } => {
                shared.agent.client_tokens(context.session, tokens);
            }
            main::ClientMessage::Base(_) | main::ClientMessage::Ignored => {}
        }
        Ok(())
    }

    fn serve(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        let mode = *lock(&context.shared.mouse_mode);
        if mode != self.mouse_mode {
            self.mouse_mode = mode;
            main::put_mouse_mode(framer, context.out, mode);
        }
        let notices = lock(&context.shared.notices);
        for (severity, text) in notices.after(self.notices) {
            put_notify(framer, context.out, *severity as u32, text);
        }
        self.notices = notices.last;
        drop(notices);
        while context.out.len() < SOFT_LIMIT {
            let Some(item) = context.shared.agent.next_for_client(context.session) else { break };
            match item {
                ToClient::Data(data) => main::put_agent_data(framer, context.out, &data),
                ToClient::Tokens(tokens) => main::put_agent_tokens(framer, context.out, tokens),
                ToClient::Disconnected => main::put_agent_disconnected(framer, context.out),
                ToClient::Connected { tokens } => {
                    main::put_agent_connected(framer, context.out, tokens, self.knows_tokens);
                }
            }
        }
    }
}

struct InputsChannel {
    /// As last told to the client.
    leds: Leds,
    /// Keys the client holds.
    keys: BTreeSet<Scancode>,
    /// Buttons the client holds, as a mask of the wire.
    buttons: u16,
    decoder: ScancodeDecoder,
    /// Motions not yet acknowledged.
    motions: u32,
}

impl InputsChannel {
    fn message(
        &mut self,
        message: inputs::ClientMessage<'_>,
        framer: &mut Framer,
        context: &mut Context<'_>,
    ) {
        let shared = context.shared;
        if !shared.drives(context.session) {
            use inputs::ClientMessage::{Motion, Position};
            if matches!(message, Motion { .. } | Position { .. }) {
                self.acknowledge(framer, context);
            }
            return;
        }
        match message {
            inputs::ClientMessage::Scancodes(bytes) => {
                for byte in bytes.as_slice() {
                    if let Some((scancode, down)) = self.decoder.byte(*byte) {
                        self.key(shared, scancode, down);
                    }
                }
            }
            inputs::ClientMessage::Modifiers(wanted) => self.sync_locks(shared, wanted),
            inputs::ClientMessage::Motion { dx, dy, buttons } => {
                self.sync_buttons(shared, buttons);
                if let Some(input) = &shared.config.input {
                    input.pointer_relative(dx, dy);
                }
                self.acknowledge(framer, context);
            }
            inputs::ClientMessage::Position { x, y, buttons, display } => {
                self.sync_buttons(shared, buttons);
                if let Some(input) = &shared.config.input
                    && let Some(source) = shared.displays.get(usize::from(display))
                {
                    let (width, height) = source.size();
                    input.pointer_absolute(PointerPosition {
                        display: display.into(),
                        x: x.min(width - 1),
                        y: y.min(height - 1),
                        surface_width: width,
                        surface_height: height,
                    });
                }
                self.acknowledge(framer, context);
            }
            inputs::ClientMessage::Press(button) => match button {
                WireButton::Button(button) => self.button(shared, button, true),
                WireButton::WheelUp => self.wheel(shared, 1),
                WireButton::WheelDown => self.wheel(shared, -1),
                WireButton::Other => {}
            },
            inputs::ClientMessage::Release(WireButton::Button(button)) => {
                self.button(shared, button, false);
            }
            inputs::ClientMessage::Release(_) | inputs::ClientMessage::Base(_) => {}
        }
    }

    fn serve(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        if let Some(leds) = *lock(&context.shared.leds)
            && leds != self.leds
        {
            self.leds = leds;
            inputs::put_key_modifiers(framer, context.out, leds);
        }
    }

    fn key(&mut self, shared: &Shared, scancode: Scancode, down: bool) {
        let repeat = if down { !self.keys.insert(scancode) } else { false };
        // A release of a key that is not down still goes through: the guest may know better.
        if !down {
            self.keys.remove(&scancode);
        }
        if let Some(input) = &shared.config.input {
            input.key(KeyEvent { scancode, down, repeat });
        }
    }

    /// Presses lock keys whose lights differ from what the client wants. Only when the guest has
    /// told its lights, and not while such a key is held: its effect may be on the way.
    fn sync_locks(&mut self, shared: &Shared, wanted: Leds) {
        const SCROLL_LOCK: Scancode = Scancode::plain(0x46);
        const NUM_LOCK: Scancode = Scancode::plain(0x45);
        const CAPS_LOCK: Scancode = Scancode::plain(0x3a);
        let Some(leds) = *lock(&shared.leds) else { return };
        let locks = [
            (SCROLL_LOCK, leds.scroll_lock != wanted.scroll_lock),
            (NUM_LOCK, leds.num_lock != wanted.num_lock),
            (CAPS_LOCK, leds.caps_lock != wanted.caps_lock),
        ];
        for (scancode, differs) in locks {
            if differs && !self.keys.contains(&scancode) {
                self.key(shared, scancode, true);
                self.key(shared, scancode, false);
            }
        }
    }

    /// Brings the held buttons in line with a message's mask.
    fn sync_buttons(&mut self, shared: &Shared, mask: u16) {
        for (bit, button) in MASK_BUTTONS {
            if (self.buttons ^ mask) & bit != 0 {
                self.button(shared, button, mask & bit != 0);
            }
        }
    }

    fn button(&mut self, shared: &Shared, button: Button, down: bool) {
        let bit = MASK_BUTTONS.iter().find(|(_, b)| *b == button).map_or(0, |(bit, _)| *bit);
        if (self.buttons & bit != 0) == down {
            return;
        }
        self.buttons ^= bit;
        if let Some(input) = &shared.config.input {
            input.button(button, down);
        }
    }

    fn wheel(&self, shared: &Shared, steps: i32) {
        if let Some(input) = &shared.config.input {
            input.wheel(steps);
        }
    }

    fn acknowledge(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        self.motions += 1;
        if self.motions >= MOTION_ACK_BUNCH {
            self.motions = 0;
            inputs::put_motion_ack(framer, context.out);
        }
    }

    fn release_all(&mut self, shared: &Shared) {
        self.sync_buttons(shared, 0);
        for scancode in std::mem::take(&mut self.keys) {
            if let Some(input) = &shared.config.input {
                input.key(KeyEvent { scancode, down: false, repeat: false });
            }
        }
    }
}

struct CursorChannel {
    display: Arc<DisplayShared>,
    /// The image the client shows, by its content's number; `None` while it shows none.
    shown: Option<u64>,
    /// As last told to the client.
    position: Option<(u32, u32)>,
    cached: HashSet<u64>,
}

impl CursorChannel {
    fn serve(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        let state = self.display.cursor();
        let wanted = state.image.filter(|_| state.visible);
        if wanted.as_ref().map(|(id, _)| *id) != self.shown {
            match &wanted {
                None => cursor::put_hide(framer, context.out),
                Some((id, image)) => {
                    if self.cached.len() >= CURSOR_CACHE && !self.cached.contains(id) {
                        cursor::put_invalidate_all(framer, context.out);
                        self.cached.clear();
                    }
                    let shape = if self.cached.insert(*id) {
                        Shape::New { id: *id, image }
                    } else {
                        Shape::Cached { id: *id, image }
                    };
                    cursor::put_set(framer, context.out, state.position, shape);
                    // spice-gtk looks for the position in MOVE only.
                    self.position = None;
                }
            }
            self.shown = wanted.map(|(id, _)| id);
        }
        // In client mode the pointer is where the client's own is.
        if Some(state.position) != self.position
            && self.shown.is_some()
            && *lock(&context.shared.mouse_mode) == MouseMode::Server
        {
            self.position = Some(state.position);
            cursor::put_move(framer, context.out, state.position);
        }
    }
}
