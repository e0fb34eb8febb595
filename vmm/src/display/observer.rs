//! The SPICE server's events as JSON, for `ctl events`.

use std::sync::Arc;

use serde_json::json;
use spice_server::{EventSink, ServerEvent};

use crate::control::events::EventHub;

/// Publishes what the SPICE server tells.
pub(super) struct Observer(pub(super) Arc<EventHub>);

impl EventSink for Observer {
    fn event(&self, event: ServerEvent) {
        let (kind, details) = match event {
            ServerEvent::ClientConnected { session, peer, transport } => (
                "spice-client-connected",
                json!({ "session": session, "peer": peer.to_string(), "transport": transport }),
            ),
            ServerEvent::ClientDisconnected {
                session,
                peer,
                after,
                bytes_sent,
                bytes_received,
            } => (
                "spice-client-disconnected",
                json!({
                    "session": session,
                    "peer": peer.to_string(),
                    "seconds": after.as_secs_f64(),
                    "bytes_sent": bytes_sent,
                    "bytes_received": bytes_received,
                }),
            ),
            ServerEvent::WrongPassword { peer, locked_out } => (
                "spice-wrong-password",
                json!({
                    "peer": peer.to_string(),
                    "locked_out_seconds": locked_out.map(|pause| pause.as_secs()),
                }),
            ),
            ServerEvent::Refused { peer, reason } => {
                ("spice-refused", json!({ "peer": peer.to_string(), "reason": reason.name() }))
            }
            ServerEvent::Agent { open } => ("spice-agent", json!({ "open": open })),
            ServerEvent::VideoCodec { session, display, codec, why } => (
                "spice-video-codec",
                json!({
                    "session": session,
                    "display": display,
                    "codec": codec.map(|codec| codec.name()),
                    "why": why.name(),
                }),
            ),
            ServerEvent::Resize { display, width, height } => {
                ("spice-resize", json!({ "display": display, "width": width, "height": height }))
            }
            _ => return,
        };
        self.0.publish(kind, details);
    }
}
