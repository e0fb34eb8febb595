//! Commands as a guest gives them, decoded from a private copy of its bytes.

use alloc::vec::Vec;

use zerocopy::FromBytes;

use super::*;
use crate::rect::Rect;

/// A piece of guest memory behind a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingEntry {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
}

/// What RESOURCE_CREATE_3D asks for; the fields are those of [`ResourceCreate3d`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Create3d {
    pub target: u32,
    pub format: u32,
    pub bind: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub array_size: u32,
    pub last_level: u32,
    pub nr_samples: u32,
    pub flags: u32,
}

/// What RESOURCE_CREATE_BLOB asks for; the fields are those of [`CreateBlob`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Blob {
    pub memory: u32,
    pub flags: u32,
    pub id: u64,
    pub size: u64,
}

/// What a 3D transfer moves; the fields are those of [`TransferHost3d`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Transfer3d {
    pub x: u32,
    pub y: u32,
    pub z: u32,
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub offset: u64,
    pub level: u32,
    pub stride: u32,
    pub layer_stride: u32,
}

/// The picture in a blob; the fields are those of [`SetScanoutBlob`], of its first plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct BlobPicture {
    pub width: u32,
    pub height: u32,
    pub format: u32,
    pub stride: u32,
    pub offset: u32,
}

/// A decoded command of the control or cursor queue. The context of a 3D command is in its header.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of the wire structures
pub enum Command<'a> {
    GetDisplayInfo,
    GetEdid {
        scanout: u32,
    },
    ResourceCreate2d {
        resource: u32,
        format: u32,
        width: u32,
        height: u32,
    },
    ResourceUnref {
        resource: u32,
    },
    SetScanout {
        scanout: u32,
        resource: u32,
        rect: Rect,
    },
    ResourceFlush {
        resource: u32,
        rect: Rect,
    },
    TransferToHost2d {
        resource: u32,
        rect: Rect,
        offset: u64,
    },
    AttachBacking {
        resource: u32,
        entries: Vec<BackingEntry>,
    },
    DetachBacking {
        resource: u32,
    },
    GetCapsetInfo {
        index: u32,
    },
    UpdateCursor {
        scanout: u32,
        x: u32,
        y: u32,
        resource: u32,
        hot_x: u32,
        hot_y: u32,
    },
    MoveCursor {
        scanout: u32,
        x: u32,
        y: u32,
    },
    GetCapset {
        set: u32,
        version: u32,
    },
    AssignUuid {
        resource: u32,
    },
    CreateBlob {
        resource: u32,
        blob: Blob,
        entries: Vec<BackingEntry>,
    },
    MapBlob {
        resource: u32,
        offset: u64,
    },
    UnmapBlob {
        resource: u32,
    },
    SetScanoutBlob {
        scanout: u32,
        resource: u32,
        rect: Rect,
        picture: BlobPicture,
    },
    ContextCreate {
        capset: u32,
        name: &'a [u8],
    },
    ContextDestroy,
    ContextAttach {
        resource: u32,
    },
    ContextDetach {
        resource: u32,
    },
    ResourceCreate3d {
        resource: u32,
        create: Create3d,
    },
    TransferToHost3d {
        resource: u32,
        transfer: Transfer3d,
    },
    TransferFromHost3d {
        resource: u32,
        transfer: Transfer3d,
    },
    Submit3d {
        commands: &'a [u8],
    },
    /// Unknown, or known and never to be seen by this device.
    Other {
        kind: u32,
    },
}

fn fixed<T: FromBytes>(bytes: &[u8]) -> Result<T, Refusal> {
    T::read_from_prefix(bytes).map(|(value, _)| value).map_err(|_| Refusal::InvalidParameter)
}

/// Decodes a command; `bytes` is everything device-readable of its descriptor chain. The header is
/// returned for as long as there is one, so that an answer can be given to a bad command.
pub fn decode(bytes: &[u8]) -> (CtrlHdr, Result<Command<'_>, Refusal>) {
    let Ok((hdr, _)) = CtrlHdr::read_from_prefix(bytes) else {
        return (CtrlHdr::default(), Err(Refusal::InvalidParameter));
    };
    (hdr, decode_body(hdr.kind.get(), bytes))
}

fn decode_body(kind: u32, bytes: &[u8]) -> Result<Command<'_>, Refusal> {
    Ok(match kind {
        kind::GET_DISPLAY_INFO => Command::GetDisplayInfo,
        kind::GET_EDID => {
            let c: GetEdid = fixed(bytes)?;
            Command::GetEdid { scanout: c.scanout.get() }
        }
        kind::RESOURCE_CREATE_2D => {
            let c: ResourceCreate2d = fixed(bytes)?;
            Command::ResourceCreate2d {
                resource: c.resource_id.get(),
                format: c.format.get(),
                width: c.width.get(),
                height: c.height.get(),
            }
        }
        kind::RESOURCE_UNREF => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::ResourceUnref { resource: c.resource_id.get() }
        }
        kind::SET_SCANOUT => {
            let c: SetScanout = fixed(bytes)?;
            Command::SetScanout {
                scanout: c.scanout_id.get(),
                resource: c.resource_id.get(),
                rect: c.rect.into(),
            }
        }
        kind::RESOURCE_FLUSH => {
            let c: ResourceFlush = fixed(bytes)?;
            Command::ResourceFlush { resource: c.resource_id.get(), rect: c.rect.into() }
        }
        kind::TRANSFER_TO_HOST_2D => {
            let c: TransferToHost2d = fixed(bytes)?;
            Command::TransferToHost2d {
                resource: c.resource_id.get(),
                rect: c.rect.into(),
                offset: c.offset.get(),
            }
        }
        kind::RESOURCE_ATTACH_BACKING => decode_backing(bytes)?,
        kind::RESOURCE_DETACH_BACKING => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::DetachBacking { resource: c.resource_id.get() }
        }
        kind::GET_CAPSET_INFO => {
            let c: GetCapsetInfo = fixed(bytes)?;
            Command::GetCapsetInfo { index: c.index.get() }
        }
        kind::GET_CAPSET => {
            let c: GetCapset = fixed(bytes)?;
            Command::GetCapset { set: c.capset_id.get(), version: c.capset_version.get() }
        }
        kind::RESOURCE_ASSIGN_UUID => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::AssignUuid { resource: c.resource_id.get() }
        }
        kind::RESOURCE_CREATE_BLOB => {
            let (c, rest) =
                CreateBlob::read_from_prefix(bytes).map_err(|_| Refusal::InvalidParameter)?;
            Command::CreateBlob {
                resource: c.resource_id.get(),
                blob: Blob {
                    memory: c.blob_mem.get(),
                    flags: c.blob_flags.get(),
                    id: c.blob_id.get(),
                    size: c.size.get(),
                },
                entries: decode_entries(c.entries.get(), rest)?,
            }
        }
        kind::SET_SCANOUT_BLOB => {
            let c: SetScanoutBlob = fixed(bytes)?;
            Command::SetScanoutBlob {
                scanout: c.scanout_id.get(),
                resource: c.resource_id.get(),
                rect: c.rect.into(),
                picture: BlobPicture {
                    width: c.width.get(),
                    height: c.height.get(),
                    format: c.format.get(),
                    stride: c.strides[0].get(),
                    offset: c.offsets[0].get(),
                },
            }
        }
        kind::RESOURCE_MAP_BLOB => {
            let c: MapBlob = fixed(bytes)?;
            Command::MapBlob { resource: c.resource_id.get(), offset: c.offset.get() }
        }
        kind::RESOURCE_UNMAP_BLOB => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::UnmapBlob { resource: c.resource_id.get() }
        }
        kind::CTX_CREATE..=kind::SUBMIT_3D => decode_3d(kind, bytes)?,
        kind::UPDATE_CURSOR => {
            let c: UpdateCursor = fixed(bytes)?;
            Command::UpdateCursor {
                scanout: c.pos.scanout_id.get(),
                x: c.pos.x.get(),
                y: c.pos.y.get(),
                resource: c.resource_id.get(),
                hot_x: c.hot_x.get(),
                hot_y: c.hot_y.get(),
            }
        }
        kind::MOVE_CURSOR => {
            let c: UpdateCursor = fixed(bytes)?;
            Command::MoveCursor {
                scanout: c.pos.scanout_id.get(),
                x: c.pos.x.get(),
                y: c.pos.y.get(),
            }
        }
        kind => Command::Other { kind },
    })
}

fn decode_3d(kind: u32, bytes: &[u8]) -> Result<Command<'_>, Refusal> {
    let transfer = || -> Result<(u32, Transfer3d), Refusal> {
        let c: TransferHost3d = fixed(bytes)?;
        let transfer = Transfer3d {
            x: c.part.x.get(),
            y: c.part.y.get(),
            z: c.part.z.get(),
            width: c.part.width.get(),
            height: c.part.height.get(),
            depth: c.part.depth.get(),
            offset: c.offset.get(),
            level: c.level.get(),
            stride: c.stride.get(),
            layer_stride: c.layer_stride.get(),
        };
        Ok((c.resource_id.get(), transfer))
    };
    Ok(match kind {
        kind::CTX_CREATE => {
            let (c, _) =
                ContextCreate::ref_from_prefix(bytes).map_err(|_| Refusal::InvalidParameter)?;
            let length = (c.name_length.get() as usize).min(c.debug_name.len());
            Command::ContextCreate {
                // The higher bits have no meaning yet.
                capset: c.context_init.get() & 0xff,
                name: &c.debug_name[..length],
            }
        }
        kind::CTX_DESTROY => Command::ContextDestroy,
        kind::CTX_ATTACH_RESOURCE => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::ContextAttach { resource: c.resource_id.get() }
        }
        kind::CTX_DETACH_RESOURCE => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::ContextDetach { resource: c.resource_id.get() }
        }
        kind::RESOURCE_CREATE_3D => {
            let c: ResourceCreate3d = fixed(bytes)?;
            Command::ResourceCreate3d {
                resource: c.resource_id.get(),
                create: Create3d {
                    target: c.target.get(),
                    format: c.format.get(),
                    bind: c.bind.get(),
                    width: c.width.get(),
                    height: c.height.get(),
                    depth: c.depth.get(),
                    array_size: c.array_size.get(),
                    last_level: c.last_level.get(),
                    nr_samples: c.nr_samples.get(),
                    flags: c.flags.get(),
                },
            }
        }
        kind::TRANSFER_TO_HOST_3D => {
            let (resource, transfer) = transfer()?;
            Command::TransferToHost3d { resource, transfer }
        }
        kind::TRANSFER_FROM_HOST_3D => {
            let (resource, transfer) = transfer()?;
            Command::TransferFromHost3d { resource, transfer }
        }
        kind::SUBMIT_3D => {
            let (c, rest) =
                Submit3d::read_from_prefix(bytes).map_err(|_| Refusal::InvalidParameter)?;
            let size = c.size.get() as usize;
            if size > MAX_SUBMIT || !size.is_multiple_of(4) {
                return Err(Refusal::InvalidParameter);
            }
            let commands = rest.get(..size).ok_or(Refusal::InvalidParameter)?;
            Command::Submit3d { commands }
        }
        kind => Command::Other { kind },
    })
}

fn decode_backing(bytes: &[u8]) -> Result<Command<'_>, Refusal> {
    let (c, rest) =
        AttachBacking::read_from_prefix(bytes).map_err(|_| Refusal::InvalidParameter)?;
    let entries = decode_entries(c.entries.get(), rest)?;
    Ok(Command::AttachBacking { resource: c.resource_id.get(), entries })
}

fn decode_entries(count: u32, bytes: &[u8]) -> Result<Vec<BackingEntry>, Refusal> {
    if count > MAX_BACKING_ENTRIES {
        return Err(Refusal::InvalidParameter);
    }
    let (wire, _) = <[MemEntry]>::ref_from_prefix_with_elems(bytes, count as usize)
        .map_err(|_| Refusal::InvalidParameter)?;
    let entry = |e: &MemEntry| BackingEntry { address: e.address.get(), length: e.length.get() };
    Ok(wire.iter().map(entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernel_header() {
        assert_eq!(size_of::<CtrlHdr>(), 24);
        assert_eq!(size_of::<RespDisplayInfo>(), 408);
        assert_eq!(size_of::<RespEdid>(), 1056);
        assert_eq!(size_of::<ResourceCreate2d>(), 40);
        assert_eq!(size_of::<SetScanout>(), 48);
        assert_eq!(size_of::<TransferToHost2d>(), 56);
        assert_eq!(size_of::<AttachBacking>(), 32);
        assert_eq!(size_of::<MemEntry>(), 16);
        assert_eq!(size_of::<UpdateCursor>(), 56);
        assert_eq!(size_of::<Config>(), 16);
        assert_eq!(size_of::<ContextCreate>(), 96);
        assert_eq!(size_of::<ResourceCreate3d>(), 72);
        assert_eq!(size_of::<TransferHost3d>(), 72);
        assert_eq!(size_of::<Submit3d>(), 32);
        assert_eq!(size_of::<RespCapsetInfo>(), 40);
        assert_eq!(size_of::<GetCapset>(), 32);
        assert_eq!(size_of::<RespResourceUuid>(), 40);
        assert_eq!(size_of::<CreateBlob>(), 56);
        assert_eq!(size_of::<SetScanoutBlob>(), 96);
        assert_eq!(size_of::<MapBlob>(), 40);
        assert_eq!(size_of::<RespMapInfo>(), 32);
    }

    #[test]
    fn truncated_commands_are_refused_with_their_header() {
        let mut hdr = CtrlHdr::new(kind::SET_SCANOUT);
        hdr.flags = FLAG_FENCE.into();
        hdr.fence_id = 7.into();
        let (seen, command) = decode(hdr.as_bytes());
        assert_eq!(seen, hdr);
        assert_eq!(command, Err(Refusal::InvalidParameter));
        let answer = seen.answer(kind::ERR_INVALID_PARAMETER);
        assert_eq!((answer.fence_id.get(), answer.flags.get()), (7, FLAG_FENCE));
        assert_eq!(decode(&hdr.as_bytes()[..23]).1, Err(Refusal::InvalidParameter));
        assert_eq!(decode(&[]).1, Err(Refusal::InvalidParameter));
    }

    #[test]
    fn backing_lists_are_bounded_by_what_is_there() {
        let attach = |entries: u32, present: usize| {
            let c = AttachBacking {
                hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
                resource_id: 1.into(),
                entries: entries.into(),
            };
            let mut bytes = c.as_bytes().to_vec();
            for i in 0..present {
                let entry = MemEntry {
                    address: (i as u64 * 4096).into(),
                    length: 4096.into(),
                    padding: 0.into(),
                };
                bytes.extend_from_slice(entry.as_bytes());
            }
            decode(&bytes).1.map(|command| match command {
                Command::AttachBacking { entries, .. } => entries.len(),
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(attach(3, 3), Ok(3));
        assert_eq!(attach(3, 2), Err(Refusal::InvalidParameter));
        assert_eq!(attach(u32::MAX, 3), Err(Refusal::InvalidParameter));
        assert_eq!(attach(MAX_BACKING_ENTRIES + 1, 0), Err(Refusal::InvalidParameter));
    }

    #[test]
    fn submissions_are_bounded_by_what_is_there() {
        let submit = |size: u32, present: usize| {
            let c = Submit3d {
                hdr: CtrlHdr::new(kind::SUBMIT_3D),
                size: size.into(),
                padding: 0.into(),
            };
            let bytes = [c.as_bytes(), &vec![7; present]].concat();
            decode(&bytes).1.map(|command| match command {
                Command::Submit3d { commands } => commands.len(),
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(submit(8, 12), Ok(8));
        assert_eq!(submit(0, 0), Ok(0));
        for (size, present) in [(12, 8), (6, 8), (u32::MAX, 8), (MAX_SUBMIT as u32 + 4, 8)] {
            assert_eq!(submit(size, present), Err(Refusal::InvalidParameter), "{size}");
        }
    }

    #[test]
    fn names_of_contexts_end_where_their_field_ends() {
        let c = ContextCreate {
            hdr: CtrlHdr::new(kind::CTX_CREATE),
            name_length: u32::MAX.into(),
            context_init: 0x1_0002.into(),
            debug_name: [b'x'; 64],
        };
        let expected = Command::ContextCreate { capset: 2, name: &[b'x'; 64] };
        assert_eq!(decode(c.as_bytes()).1, Ok(expected));
        assert_eq!(decode(&c.as_bytes()[..95]).1, Err(Refusal::InvalidParameter));
    }
}
