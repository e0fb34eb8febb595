//! A driver, a device, a back end and a viewer.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
    time::Instant,
};

use gpu_protocol::virtio::{CtrlHdr, GetEdid, RespDisplayInfo, RespEdid, kind};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    commands::{Resource, cursor, memory, show},
    sink::Sink,
    *,
};
use crate::virtio::{
    gpu::device::{VirtioGpu, build as build_device},
    testing::{Driver, Part},
};

const QEMU: &str = "/usr/lib/qemu/vhost-user-gpu";

/// Builds `drago-gpu` once, where the device looks for it.
pub(super) fn drago_gpu() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "drago-gpu", "--bin", "drago-gpu"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "drago-gpu could not be built");
    });
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BackEnd {
    /// drago-gpu, frames in shared memory.
    Shared,
    /// drago-gpu, pixels through the socket.
    Plain,
    /// QEMU's.
    Qemu,
    /// rust-vmm's, which draws nothing in its mode `null`.
    Null,
}

pub(super) const ALL: [BackEnd; 3] = [BackEnd::Shared, BackEnd::Plain, BackEnd::Qemu];

/// A process of the test's own, ended with it.
pub(super) struct Peer(pub(super) Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Installed, or made by `cargo xtask`.
pub(super) fn vhost_device_gpu() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin");
    let mut programs = std::env::split_paths(&path).chain([tools]);
    programs.find_map(|dir| Some(dir.join("vhost-device-gpu")).filter(|program| program.is_file()))
}

/// A driver, a device, a back end and a viewer.
pub(super) struct Rig {
    pub(super) driver: Driver,
    pub(super) device: VirtioGpu,
    pub(super) handle: GpuHandle,
    pub(super) sink: Arc<Sink>,
    peer: Option<Peer>,
    _directory: tempfile::TempDir,
}

pub(super) fn build(config: &GpuConfig) -> (VirtioGpu, GpuHandle) {
    build_device(config).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

impl Rig {
    /// `None` (and a word about it) if that back end is not installed.
    pub(super) fn new(back_end: BackEnd) -> Option<Self> {
        Self::with(back_end, GpuConfig::default())
    }

    pub(super) fn with(back_end: BackEnd, mut config: GpuConfig) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut peer = None;
        match back_end {
            BackEnd::Shared => drago_gpu(),
            BackEnd::Plain => {
                drago_gpu();
                config.shared_frames = false;
            }
            BackEnd::Qemu => {
                let path = directory.path().join("qemu");
                let child = Command::new(QEMU)
                    .arg("-s")
                    .arg(&path)
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn();
                let Ok(child) = child else {
                    println!("SKIPPED: {QEMU} is not installed (package qemu-system-gui)");
                    return None;
                };
                peer = Some(Peer(child));
                wait_for_socket(&path);
                config.socket = Some(path);
            }
            BackEnd::Null => {
                let Some(program) = vhost_device_gpu() else {
                    println!(
                        "SKIPPED: no vhost-device-gpu (cargo xtask test --suite slow makes it)"
                    );
                    return None;
                };
                let path = directory.path().join("null");
                let child = Command::new(program)
                    .args(["--gpu-mode", "null", "--socket-path"])
                    .arg(&path)
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                peer = Some(Peer(child));
                wait_for_socket(&path);
                config.socket = Some(path);
            }
        }
        let (mut device, handle) = build(&config);
        let sink = Arc::new(Sink::default());
        handle.set_sink(sink.clone());
        handle.want_frames(0, 1000);
        let features = device.features();
        let driver = Driver::start_with(&mut device, features, memory());
        Some(Self { driver, device, handle, sink, peer, _directory: directory })
    }

    /// With a `drago-gpu` that the test has started, which has no successor.
    pub(super) fn on_a_socket(back_end: BackEnd) -> Self {
        drago_gpu();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gpu");
        let exe = std::env::current_exe().unwrap();
        let program = exe.parent().unwrap().parent().unwrap().join("drago-gpu");
        let peer = Peer(Command::new(program).arg("--socket-path").arg(&path).spawn().unwrap());
        wait_for_socket(&path);
        let config = GpuConfig { socket: Some(path), ..GpuConfig::default() };
        let mut rig = Self::with(back_end, config).unwrap();
        rig.peer = Some(peer);
        rig
    }

    /// Ends the program that the test has started.
    pub(super) fn kill_peer(&mut self) {
        drop(self.peer.take().expect("a program of the test's own"));
    }

    /// Another viewer in place of the one before.
    pub(super) fn new_viewer(&mut self) {
        let viewer = Arc::new(Sink::default());
        self.handle.set_sink(viewer.clone());
        self.sink = viewer;
    }

    pub(super) fn command_raw(&mut self, command: &[u8], room: usize) -> Vec<u8> {
        self.driver.queues[0].send(&[Part::Out(command), Part::In(room as u32)]);
        self.driver.queues[0].wait_used().1
    }

    pub(super) fn command(&mut self, command: &(impl IntoBytes + Immutable)) -> u32 {
        let answer = self.command_raw(command.as_bytes(), size_of::<CtrlHdr>());
        CtrlHdr::read_from_bytes(&answer).unwrap().kind.get()
    }

    pub(super) fn ok(&mut self, command: &(impl IntoBytes + Immutable)) {
        assert_eq!(self.command(command), kind::OK_NODATA);
    }

    pub(super) fn ok_raw(&mut self, command: &[u8]) {
        let answer = self.command_raw(command, size_of::<CtrlHdr>());
        assert_eq!(CtrlHdr::read_from_bytes(&answer).unwrap().kind.get(), kind::OK_NODATA);
    }

    pub(super) fn create(&mut self, resource: &Resource) {
        self.ok_raw(&resource.create());
        self.ok_raw(&resource.attach());
    }

    /// The guest draws, into its own memory.
    pub(super) fn draw(
        &self,
        resource: &Resource,
        rect: Rect,
        pixel: impl Fn(u32, u32) -> [u8; 4],
    ) {
        let mut bytes = resource.read(&self.driver.memory);
        for y in rect.y..rect.y + rect.height {
            for x in rect.x..rect.x + rect.width {
                let at = (y * resource.width + x) as usize * 4;
                bytes[at..at + 4].copy_from_slice(&pixel(x, y));
            }
        }
        resource.write(&self.driver.memory, &bytes);
    }

    pub(super) fn transfer(&mut self, resource: &Resource, rect: Rect) {
        self.ok_raw(&resource.transfer(rect));
    }

    pub(super) fn flush(&mut self, resource: &Resource, rect: Rect) {
        self.ok_raw(&resource.flush(rect));
    }

    pub(super) fn show(&mut self, resource: u32, rect: Rect) {
        self.ok(&show(resource, rect));
    }

    pub(super) fn unref(&mut self, resource: u32) {
        self.ok_raw(&Resource::new(resource, 1, 1).unref());
    }

    /// Draws, uploads and flushes.
    pub(super) fn paint(
        &mut self,
        resource: &Resource,
        rect: Rect,
        pixel: impl Fn(u32, u32) -> [u8; 4],
    ) {
        self.draw(resource, rect, pixel);
        self.transfer(resource, rect);
        self.flush(resource, rect);
    }

    /// Waits until the viewer sees exactly what the guest has in `part` of the resource.
    pub(super) fn expect_picture(&self, resource: &Resource, part: Rect, what: &str) {
        let bytes = resource.read(&self.driver.memory);
        let mut expected = Vec::new();
        for y in part.y..part.y + part.height {
            let at = (y * resource.width + part.x) as usize * 4;
            expected.extend_from_slice(&bytes[at..at + part.width as usize * 4]);
        }
        resource.format.to_bgrx(&mut expected);
        // The fourth byte means nothing.
        let same = |seen: &[u8]| {
            let mut pixels = seen.chunks_exact(4).zip(expected.chunks_exact(4));
            seen.len() == expected.len() && pixels.all(|(a, b)| a[..3] == b[..3])
        };
        self.sink.wait(what, |seen| {
            let size = seen.size == Some((part.width, part.height));
            (size && same(&seen.picture)).then_some(())
        });
    }

    pub(super) fn cursor(
        &mut self,
        kind: u32,
        x: u32,
        y: u32,
        resource: u32,
        hot: (u32, u32),
    ) -> u32 {
        let command = cursor(kind, x, y, resource, hot);
        let room = size_of::<CtrlHdr>() as u32;
        self.driver.queues[1].send(&[Part::Out(command.as_bytes()), Part::In(room)]);
        let (_, answer) = self.driver.queues[1].wait_used();
        // QEMU's back end gives cursor commands back without an answer, as drivers expect none.
        CtrlHdr::read_from_bytes(&answer).map_or(kind::OK_NODATA, |hdr| hdr.kind.get())
    }

    pub(super) fn display_info(&mut self) -> RespDisplayInfo {
        let command = CtrlHdr::new(kind::GET_DISPLAY_INFO);
        let answer = self.command_raw(command.as_bytes(), size_of::<RespDisplayInfo>());
        RespDisplayInfo::read_from_bytes(&answer).unwrap()
    }

    pub(super) fn edid(&mut self) -> Vec<u8> {
        let command =
            GetEdid { hdr: CtrlHdr::new(kind::GET_EDID), scanout: 0.into(), padding: 0.into() };
        let answer = self.command_raw(command.as_bytes(), size_of::<RespEdid>());
        let answer = RespEdid::read_from_bytes(&answer).unwrap();
        assert_eq!(answer.hdr.kind.get(), kind::OK_EDID);
        answer.bytes().to_vec()
    }

    pub(super) fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

/// Waits until somebody listens at `path`: that the file is there is not enough.
pub(super) fn wait_for_socket(path: &Path) {
    const LISTENING: &str = "00010000";
    let name = path.to_str().unwrap();
    let until = Instant::now() + PATIENCE;
    loop {
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        let mut lines = sockets.lines();
        if lines.any(|line| line.ends_with(name) && line.contains(LISTENING)) {
            return;
        }
        assert!(Instant::now() < until, "no back end listens at {name}");
        std::thread::yield_now();
    }
}
