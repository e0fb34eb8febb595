//! Memory of the host in the guest's shared memory region: Vulkan's, through the real render server.

use std::{path::Path, process::Command, sync::Arc};

use gpu_protocol::virtio::{
    ContextCreate, CreateBlob, CtrlHdr, FLAG_FENCE, FLAG_INFO_RING_IDX, MapBlob, ResourceCommand,
    RespMapInfo, SHM_HOST_VISIBLE, Submit3d, blob_flag, blob_mem, capset, kind,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{recovery::AT_ONCE, recovery::kill, rig::*, *};
use crate::virtio::shared_memory::SharedMemory;

const PAGE: u64 = 4096;

fn hdr(kind: u32) -> CtrlHdr {
    CtrlHdr { ctx_id: 3.into(), ..CtrlHdr::new(kind) }
}

impl Rig {
    fn make_context(&mut self) {
        let (name_length, debug_name) = (0.into(), [0; 64]);
        let context_init = capset::VENUS.into();
        let hdr = hdr(kind::CTX_CREATE);
        self.ok(&ContextCreate { hdr, name_length, context_init, debug_name });
    }

    fn make_blob(&mut self, id: u32) {
        self.ok(&CreateBlob {
            hdr: hdr(kind::RESOURCE_CREATE_BLOB),
            resource_id: id.into(),
            blob_mem: blob_mem::HOST3D.into(),
            blob_flags: blob_flag::MAPPABLE.into(),
            entries: 0.into(),
            blob_id: 0.into(),
            size: PAGE.into(),
        });
    }

    fn map_blob(&mut self, id: u32, offset: u64) -> u32 {
        let hdr = CtrlHdr::new(kind::RESOURCE_MAP_BLOB);
        let command =
            MapBlob { hdr, resource_id: id.into(), padding: 0.into(), offset: offset.into() };
        let answer = self.command_raw(command.as_bytes(), size_of::<RespMapInfo>());
        CtrlHdr::read_from_prefix(&answer).unwrap().0.kind.get()
    }

    /// Asks the host's Vulkan for its version, by a command of Venus; the answer goes into a blob.
    fn ask_version(&mut self, blob: u32) {
        let stream = [178, 0, 1, 0, blob, 0, 0, PAGE as u32, 0];
        let version = [137, 1, 1, 0];
        let words = [&stream[..], &version].concat();
        let hdr = CtrlHdr {
            flags: (FLAG_FENCE | FLAG_INFO_RING_IDX).into(),
            fence_id: 1.into(),
            ..hdr(kind::SUBMIT_3D)
        };
        let size = (size_of_val(&words[..]) as u32).into();
        let command = Submit3d { hdr, size, padding: 0.into() };
        self.ok_raw(&[command.as_bytes(), words.as_bytes()].concat());
    }
}

/// What drago-gpu says where the render server is missing, or does not work even without our sandbox.
/// Any other error is the test's business.
fn without_vulkan() -> Option<String> {
    let own = std::env::current_exe().unwrap();
    let program = own.parent().and_then(Path::parent).unwrap().join("drago-gpu");
    let words = ["--probe", "--renderer", "virgl", "--vulkan", "venus", "--sandbox", "off"];
    let out = Command::new(program).args(words).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let missing = ["there is no virgl_render_server", "no Vulkan: the render server does not work"];
    let is_missing = !out.status.success() && missing.iter().any(|text| said.contains(text));
    is_missing.then_some(said)
}

fn word(region: &SharedMemory, offset: u64) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|byte| region.read(offset + byte)))
}

#[test]
fn the_guest_sees_memory_of_the_host_as_long_as_it_is_mapped() {
    drago_gpu();
    let config = GpuConfig {
        renderer: Renderer::Virgl,
        vulkan: true,
        host_memory: Some(1 << 20),
        restart: AT_ONCE,
        ..GpuConfig::default()
    };
    if let Some(said) = without_vulkan() {
        println!("SKIPPED: no Vulkan here: {said}");
        return;
    }
    let mut rig = Rig::with(BackEnd::Shared, config).unwrap();
    let (id, region): (u8, Arc<SharedMemory>) = rig.device.shared_memory().unwrap();
    assert_eq!((id, region.size()), (SHM_HOST_VISIBLE, 1 << 20));
    for round in 0..3 {
        // The back end's question comes behind that for the features: when it is answered, they are agreed on.
        rig.display_info();
        rig.make_context();
        rig.make_blob(1);
        rig.make_blob(2);
        // Outside, odd, and where something is.
        assert_eq!(rig.map_blob(1, 1 << 20), kind::ERR_UNSPEC);
        assert_eq!(rig.map_blob(1, 1), kind::ERR_INVALID_PARAMETER);
        assert_eq!(rig.map_blob(1, 2 * PAGE), kind::OK_MAP_INFO);
        assert_eq!(rig.map_blob(2, 2 * PAGE), kind::ERR_UNSPEC);
        assert_eq!(rig.map_blob(2, 3 * PAGE), kind::OK_MAP_INFO);
        rig.ask_version(1);
        let answer = [0, 4, 16].map(|at| word(&region, 2 * PAGE + at));
        assert_eq!(answer[..2], [137, 0], "the answer to the question, and success");
        assert!(answer[2] >= 1 << 22, "Vulkan {:#x}", answer[2]);
        // Its neighbour is a resource of its own, which nobody has written to.
        assert_eq!(word(&region, 3 * PAGE), 0);
        match round {
            0 => {
                for blob in [1, 2] {
                    rig.ok(&ResourceCommand {
                        hdr: CtrlHdr::new(kind::RESOURCE_UNMAP_BLOB),
                        resource_id: blob.into(),
                        padding: 0.into(),
                    });
                    rig.unref(blob);
                }
                rig.ok(&hdr(kind::CTX_DESTROY));
                // Answered by the same thread that takes it out.
                rig.display_info();
            }
            1 => {
                kill(&rig);
                rig.sink.wait("a successor", |seen| (seen.successors == 1).then_some(()));
            }
            _ => rig.device.reset(),
        }
        assert_eq!(word(&region, 2 * PAGE), 0, "after round {round}");
    }
}
