//! The SPICE server's counters as JSON, for `ctl spice-clients`.

use serde_json::{Value, json};
use spice_server::{ChannelStatus, ClientStatus, DisplayStats, ServerStatus};

/// One client: who it is and what its channels sent. Times are in seconds, sizes in bytes.
pub(super) fn client(client: &ClientStatus) -> Value {
    json!({
        "peer": client.peer.to_string(),
        "session": client.session,
        "connected_seconds": client.connected_for.as_secs_f64(),
        "drives": client.drives,
        "channels": client.channels.iter().map(channel).collect::<Vec<_>>(),
        "bytes_sent": client.bytes_sent,
        "bytes_received": client.bytes_received,
        "displays": client.displays.iter().map(display).collect::<Vec<_>>(),
    })
}

/// What happened at the server's door since its start.
pub(super) fn totals(status: &ServerStatus) -> Value {
    let refused: serde_json::Map<_, _> =
        status.refused.iter().map(|(why, count)| (why.name().to_owned(), json!(count))).collect();
    json!({
        "connections": status.connections,
        "pending_connections": status.pending_connections,
        "wrong_passwords": status.wrong_passwords,
        "refused": refused,
    })
}

fn channel(channel: &ChannelStatus) -> Value {
    json!({
        "name": channel.name,
        "transport": channel.transport,
        "bytes_sent": channel.bytes_sent,
        "bytes_received": channel.bytes_received,
        "bytes_waiting": channel.bytes_waiting,
        "messages_dropped": channel.messages_dropped,
    })
}

fn display(stats: &DisplayStats) -> Value {
    let codecs: serde_json::Map<_, _> = stats
        .codecs
        .iter()
        .filter(|codec| codec.messages > 0)
        .map(|codec| {
            let counters = json!({
                "messages": codec.messages,
                "bytes": codec.bytes,
                "seconds": codec.time.as_secs_f64(),
            });
            (codec.codec.name().to_owned(), counters)
        })
        .collect();
    json!({
        "display": stats.display,
        "frames": stats.frames,
        "skipped_frames": stats.skipped_frames,
        "unchanged_frames": stats.unchanged_frames,
        "compare_seconds": stats.compare_time.as_secs_f64(),
        "refined_parts": stats.refined_parts,
        "streams": stats.streams,
        "video_codec": stats.video_codec.map(|codec| codec.name()),
        "video_fallbacks": stats.video_fallbacks,
        "halved_streams": stats.halved_streams,
        "late_stream_frames": stats.late_stream_frames,
        "bytes_in_flight": stats.bytes_in_flight,
        "round_trip_seconds": stats.round_trip.as_secs_f64(),
        "line_bytes_per_second": stats.line_rate,
        "memory": stats.memory,
        "codecs": codecs,
    })
}
