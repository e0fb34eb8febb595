//! Executes the commands of a journal.

use std::collections::HashMap;

use gpu_protocol::{
    Rect,
    format::BYTES_PER_PIXEL,
    virtio::{Command, CtrlHdr, Refusal, decode},
};

use crate::{
    GuestMemory,
    control::{Control, Outcome},
    ring::is_error,
};

/// Brings back resources, backing and scanouts, and fills them with what the guest has in its memory
/// now. Returns the commands for cursors, which are executed after the others.
pub fn execute(
    control: &mut Control,
    memory: &GuestMemory,
    commands: Vec<Vec<u8>>,
) -> Vec<Vec<u8>> {
    let mut sizes = HashMap::new();
    let mut cursors = Vec::new();
    let (count, mut lost) = (commands.len(), 0_usize);
    for bytes in commands {
        let (hdr, command) = decode(&bytes);
        let then = match &command {
            Ok(Command::ResourceCreate2d { resource, width, height, .. }) => {
                sizes.insert(*resource, (*width, *height));
                None
            }
            Ok(Command::AttachBacking { resource, entries }) => {
                let there = entries.iter().map(|entry| u64::from(entry.length)).sum();
                sizes.get(resource).and_then(|size| upload(*resource, *size, there))
            }
            Ok(Command::SetScanout { resource, rect, .. }) => {
                Some(Command::ResourceFlush { resource: *resource, rect: *rect })
            }
            Ok(Command::SetScanoutBlob { resource, picture, .. }) => {
                let rect = Rect::of_size(picture.width, picture.height);
                Some(Command::ResourceFlush { resource: *resource, rect })
            }
            Ok(Command::UpdateCursor { .. }) => {
                cursors.push(bytes);
                continue;
            }
            _ => None,
        };
        if !succeeds(control, memory, &hdr, command) {
            lost += 1;
            continue;
        }
        if let Some(then) = then {
            succeeds(control, memory, &CtrlHdr::default(), Ok(then));
        }
    }
    if count > 0 {
        tracing::info!(commands = count, lost, "the state of the last process is back");
    }
    cursors
}

/// Uploads as many whole rows as there are in the backing.
fn upload(resource: u32, (width, height): (u32, u32), there: u64) -> Option<Command<'static>> {
    let stride = u64::from(width) * u64::from(BYTES_PER_PIXEL);
    let rows = there.checked_div(stride)?.min(u64::from(height)) as u32;
    let rect = Rect::of_size(width, rows);
    (rows > 0).then_some(Command::TransferToHost2d { resource, rect, offset: 0 })
}

fn succeeds(
    control: &mut Control,
    memory: &GuestMemory,
    hdr: &CtrlHdr,
    command: Result<Command<'_>, Refusal>,
) -> bool {
    match control.execute(memory, hdr, command) {
        Outcome::Answer(bytes) => !is_error(&bytes),
        Outcome::Ask(_) => false,
    }
}
