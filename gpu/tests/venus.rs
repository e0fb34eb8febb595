//! Vulkan for guests: the real virglrenderer with its render server behind our device. Command streams
//! are made by hand (numbers from Venus' protocol, `vn_protocol_renderer_defines.h`): a version, an
//! instance, and the name of the device, which lavapipe or a GPU's driver gives.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;

use std::{
    collections::VecDeque,
    fs::{self, File},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use gpu_protocol::{
    host_memory::{Map, Unmap},
    socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side},
    virtio::{
        CreateBlob, CtrlHdr, MapBlob, ResourceCommand, RespMapInfo, blob_flag, blob_mem, kind,
    },
};
use rustix::net::RecvFlags;
use support::{FrontEnd, three_d::fenced};
use zerocopy::IntoBytes;

const VENUS: u32 = 4;
const VIRGL2: u32 = 2;
const PAGE: u64 = 4096;

const CREATE_INSTANCE: u32 = 0;
const ENUMERATE_PHYSICAL_DEVICES: u32 = 2;
const GET_PHYSICAL_DEVICE_PROPERTIES: u32 = 6;
const ENUMERATE_INSTANCE_VERSION: u32 = 137;
const SET_REPLY_COMMAND_STREAM: u32 = 178;
const GENERATE_REPLY: u32 = 1;

/// The program, its arguments, and why it cannot be tried here.
fn arguments() -> Vec<String> {
    let mut arguments = ["--renderer", "virgl", "--vulkan", "venus"].map(str::to_owned).to_vec();
    if let Some(root) = std::env::var_os("DRAGO_TEST_ROOT") {
        let root = Path::new(&root);
        let loader = root.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
        for word in [loader, root.join("usr/libexec/virgl_render_server")] {
            arguments.extend(["--render-server".to_owned(), word.display().to_string()]);
        }
    }
    arguments
}

/// A device with Vulkan, or `None` (and a word about it) where there is no render server.
fn device() -> Option<Vulkan> {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
    let arguments = arguments();
    let tried = support::command(program).arg("--probe").args(&arguments).output().unwrap();
    let said = String::from_utf8_lossy(&tried.stdout).into_owned();
    if !tried.status.success() {
        assert!(std::env::var_os("DRAGO_TEST_ROOT").is_none(), "{tried:?}");
        println!("SKIPPED: {}", String::from_utf8_lossy(&tried.stderr));
        return None;
    }
    assert!(said.contains("Vulkan by venus"), "{said}");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut front = FrontEnd::spawn(program, &arguments, 0);
    let mut decoder = Decoder::new(Side::FrontEnd);
    front.receive_until(&mut decoder, |m| *m == FromBackEnd::GetProtocolFeatures);
    let features = ProtocolFeatures::HOST_MEMORY | ProtocolFeatures::EDID;
    front.send(&FromFrontEnd::ProtocolFeatures(features.bits()), &[]);
    front.receive_until(&mut decoder, |m| *m == FromBackEnd::SetProtocolFeatures(features.bits()));
    Some(Vulkan { front, decoder, fds: VecDeque::new() })
}

/// The device and the front end's side of its GPU socket.
struct Vulkan {
    front: FrontEnd,
    decoder: Decoder,
    fds: VecDeque<OwnedFd>,
}

/// What it asks for.
#[derive(Debug)]
enum Asked {
    Map(Map, File),
    Unmap(Unmap),
}

impl Vulkan {
    /// The next message about memory.
    fn asked(&mut self) -> Asked {
        let mut buffer = [0; 4096];
        loop {
            while let Some(raw) = self.decoder.next_message().unwrap() {
                match FromBackEnd::decode(&raw).unwrap() {
                    FromBackEnd::Map(map) => {
                        return Asked::Map(map, self.fds.pop_front().unwrap().into());
                    }
                    FromBackEnd::Unmap(unmap) => return Asked::Unmap(unmap),
                    _ => {}
                }
            }
            let socket = &self.front.gpu;
            let flags = RecvFlags::empty();
            let count =
                host::socket_io::receive(socket, &mut buffer, &mut self.fds, flags).unwrap();
            assert_ne!(count, 0, "the back end hung up");
            self.decoder.push(&buffer[..count]);
        }
    }

    fn create_blob(&mut self, id: u32, context: u32, size: u64, blob_id: u64) -> u32 {
        let command = CreateBlob {
            hdr: CtrlHdr { ctx_id: context.into(), ..CtrlHdr::new(kind::RESOURCE_CREATE_BLOB) },
            resource_id: id.into(),
            blob_mem: blob_mem::HOST3D.into(),
            blob_flags: blob_flag::MAPPABLE.into(),
            entries: 0.into(),
            blob_id: blob_id.into(),
            size: size.into(),
        };
        self.front.run(&[command.as_bytes()])
    }

    fn submit_map(&mut self, id: u32, offset: u64) -> u16 {
        let hdr = CtrlHdr::new(kind::RESOURCE_MAP_BLOB);
        let (resource_id, padding, offset) = (id.into(), 0.into(), offset.into());
        self.front.submit(0, MapBlob { hdr, resource_id, padding, offset }.as_bytes())
    }

    /// Maps a blob as a guest does; returns what the front end gets to show.
    fn map(&mut self, id: u32, offset: u64) -> (Map, File) {
        let slot = self.submit_map(id, offset);
        let Asked::Map(map, file) = self.asked() else { panic!("not a MAP") };
        assert!(!self.front.is_done(0, slot), "the guest must not look before it is there");
        self.front.send(&FromFrontEnd::Mapped(0), &[]);
        let answer: RespMapInfo = self.front.wait_for(0, slot);
        assert_eq!(answer.hdr.kind.get(), kind::OK_MAP_INFO);
        assert!((1..=3).contains(&answer.map_info.get()), "a way of caching");
        (map, file)
    }

    fn unmap(&mut self, id: u32) -> u32 {
        let hdr = CtrlHdr::new(kind::RESOURCE_UNMAP_BLOB);
        let command = ResourceCommand { hdr, resource_id: id.into(), padding: 0.into() };
        self.front.run(&[command.as_bytes()])
    }

    /// Executes commands of Venus, to their end.
    fn execute(&mut self, context: u32, words: &[u32]) -> u32 {
        let hdr = fenced(kind::SUBMIT_3D, context, 9, Some(0));
        let slot = self.front.submit_3d(hdr, words);
        self.front.wait_for::<CtrlHdr>(0, slot).kind.get()
    }
}

/// Numbers as Venus writes them: 64 bits in two words.
fn wide(values: &[u64]) -> Vec<u32> {
    values.iter().flat_map(|value| [*value as u32, (*value >> 32) as u32]).collect()
}

/// Answers go into this resource.
fn answers_to(resource: u32, size: u64) -> Vec<u32> {
    [vec![SET_REPLY_COMMAND_STREAM, 0], wide(&[1]), vec![resource], wide(&[0, size])].concat()
}

fn words(file: &File, count: usize) -> Vec<u32> {
    let mut bytes = vec![0; count * 4];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn a_driver_answers_into_shared_memory() {
    let Some(mut vulkan) = device() else { return };
    let size = 4 * PAGE;
    assert_eq!(vulkan.front.create_context(7, VENUS), kind::OK_NODATA);
    assert_eq!(vulkan.create_blob(1, 7, size, 0), kind::OK_NODATA);
    let (map, file) = vulkan.map(1, 3 * PAGE);
    assert_eq!((map.offset, map.length, map.file_offset), (3 * PAGE, size, 0));
    assert_eq!(file.metadata().unwrap().len(), size);

    let stream = answers_to(1, size);
    let version = [vec![ENUMERATE_INSTANCE_VERSION, GENERATE_REPLY], wide(&[1])].concat();
    assert_eq!(vulkan.execute(7, &[stream.clone(), version].concat()), kind::OK_NODATA);
    let answer = words(&file, 5);
    assert_eq!(answer[..4], [ENUMERATE_INSTANCE_VERSION, 0, 1, 0], "success, and a number");
    let api = (answer[4] >> 22, answer[4] >> 12 & 0x3ff);
    println!("Vulkan {}.{}", api.0, api.1);
    assert!(api >= (1, 1));

    // VkInstanceCreateInfo: its type, no pNext, no flags, no application, layers and extensions.
    let info = [vec![1], wide(&[0]), vec![0], wide(&[0]), vec![0], wide(&[0]), vec![0], wide(&[0])];
    let instance =
        [vec![CREATE_INSTANCE, GENERATE_REPLY], wide(&[1]), info.concat(), wide(&[0, 1, 1])]
            .concat();
    assert_eq!(vulkan.execute(7, &[stream.clone(), instance].concat()), kind::OK_NODATA);
    let answer = words(&file, 2);
    assert_eq!(answer[0], CREATE_INSTANCE);
    if answer[1] != 0 {
        assert!(std::env::var_os("DRAGO_TEST_ROOT").is_none(), "{}", answer[1] as i32);
        println!("SKIPPED the rest: this host has no Vulkan driver ({})", answer[1] as i32);
        return;
    }
    // The instance is object 1; the first device shall be 2.
    let devices =
        [vec![ENUMERATE_PHYSICAL_DEVICES, GENERATE_REPLY], wide(&[1, 1]), vec![1], wide(&[1, 2])]
            .concat();
    assert_eq!(vulkan.execute(7, &[stream.clone(), devices].concat()), kind::OK_NODATA);
    let answer = words(&file, 5);
    assert_eq!((answer[0], answer[4]), (ENUMERATE_PHYSICAL_DEVICES, 1), "{answer:x?}");
    let properties = [vec![GET_PHYSICAL_DEVICE_PROPERTIES, GENERATE_REPLY], wide(&[2, 1])].concat();
    assert_eq!(vulkan.execute(7, &[stream, properties].concat()), kind::OK_NODATA);
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    let name: String =
        text[28..].chars().skip_while(|c| !c.is_ascii_alphabetic()).take(40).collect();
    println!("drawn by {name:?}");
    if std::env::var_os("DRAGO_TEST_ROOT").is_some() {
        assert!(text.contains("llvmpipe"), "{name:?}");
    }
}

#[test]
fn memory_is_mapped_once_and_taken_out_again() {
    let Some(mut vulkan) = device() else { return };
    assert_eq!(vulkan.front.create_context(1, VENUS), kind::OK_NODATA);
    assert_eq!(vulkan.create_blob(1, 1, PAGE, 0), kind::OK_NODATA);
    assert_eq!(vulkan.create_blob(1, 1, PAGE, 0), kind::ERR_INVALID_RESOURCE_ID);
    for (context, size) in [(1, 0), (1, 100), (9, PAGE), (1, 1 << 40)] {
        assert!(vulkan.create_blob(2, context, size, 0) >= kind::ERR_UNSPEC, "{context}, {size}");
    }
    assert_eq!(vulkan.unmap(1), kind::ERR_UNSPEC, "not mapped");
    assert_eq!(vulkan.unmap(2), kind::ERR_INVALID_RESOURCE_ID);
    let (first, _) = vulkan.map(1, 0);
    let slot = vulkan.submit_map(1, PAGE);
    assert_eq!(vulkan.front.wait_for::<CtrlHdr>(0, slot).kind.get(), kind::ERR_UNSPEC, "twice");
    assert_eq!(vulkan.unmap(1), kind::OK_NODATA);
    let Asked::Unmap(unmap) = vulkan.asked() else { panic!("not an UNMAP") };
    assert_eq!(unmap, Unmap { offset: 0, mapping: first.mapping });
    // The front end may refuse; the guest hears of it, and may try elsewhere.
    let slot = vulkan.submit_map(1, PAGE);
    assert!(matches!(vulkan.asked(), Asked::Map(..)));
    vulkan.front.send(&FromFrontEnd::Mapped(22), &[]);
    assert_eq!(vulkan.front.wait_for::<CtrlHdr>(0, slot).kind.get(), kind::ERR_UNSPEC);
    let slot = vulkan.submit_map(1, PAGE + 1);
    let answer = vulkan.front.wait_for::<CtrlHdr>(0, slot).kind.get();
    assert_eq!(answer, kind::ERR_INVALID_PARAMETER);
    let (second, _) = vulkan.map(1, 2 * PAGE);
    assert_ne!(first.mapping, second.mapping);
    // What is gone cannot be seen.
    assert_eq!(vulkan.front.about_resource(kind::RESOURCE_UNREF, 0, 1), kind::OK_NODATA);
    let Asked::Unmap(unmap) = vulkan.asked() else { panic!("not an UNMAP") };
    assert_eq!(unmap, Unmap { offset: 2 * PAGE, mapping: second.mapping });
}

/// OpenGL's buffers are no files, so its contexts have no memory to show.
#[test]
fn contexts_of_opengl_have_no_memory_to_map() {
    let Some(mut vulkan) = device() else { return };
    assert_eq!(vulkan.front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert!(vulkan.create_blob(1, 1, PAGE, 1) >= kind::ERR_UNSPEC);
}

/// The server and its processes end with the device, whatever they are doing.
#[test]
fn nothing_is_left_behind() {
    let Some(mut vulkan) = device() else { return };
    for context in 1..=8 {
        assert_eq!(vulkan.front.create_context(context, VENUS), kind::OK_NODATA);
    }
    let family = descendants(vulkan.front.child.id());
    assert!(family.len() >= 9, "a server, and a process for each context: {family:?}");
    // Nor do those stay that have no part in it, where they are in a PID namespace of their own.
    let space = |pid: &u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let stopped = &family[family.len() - 4..];
    if stopped.iter().all(|pid| space(pid) != space(&std::process::id())) {
        stopped.iter().for_each(|pid| signal(*pid, rustix::process::Signal::STOP));
    } else {
        println!("SKIPPED stopped processes: no PID namespaces here");
    }
    drop(vulkan);
    // They end by themselves; how fast is the kernel's business.
    wait_until("the processes' end", || family.iter().all(|pid| !is_running(*pid)));
}

/// The VMM's socket is drago-gpu's alone, and so is all the rest that it has open.
#[test]
fn the_server_inherits_its_own_socket_only() {
    let Some(mut vulkan) = device() else { return };
    let device = vulkan.front.child.id();
    // Before there are contexts: their connections are the server's making, it hands out the ends.
    let of_device = sockets(device);
    assert_eq!(vulkan.front.create_context(1, VENUS), kind::OK_NODATA);
    // What `--fd 0` names.
    let front = fs::read_link(format!("/proc/{device}/fd/0")).unwrap();
    assert!(front.to_string_lossy().starts_with("socket:"), "{}", front.display());
    let family = descendants(device);
    assert!(family.len() >= 2, "a server, and a process for the context: {family:?}");
    assert!(of_device.contains(&front));
    for pid in family {
        let shared: Vec<_> =
            sockets(pid).into_iter().filter(|socket| of_device.contains(socket)).collect();
        assert!(shared.is_empty(), "{pid} has {shared:?} of the device");
    }
}

/// The names of a process' open sockets, as in `socket:[123]`; without its standard output and errors,
/// which the test's surroundings decide about.
fn sockets(pid: u32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    entries
        .flatten()
        .filter(|entry| !["1", "2"].iter().any(|stream| entry.file_name() == *stream))
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|name| name.to_string_lossy().starts_with("socket:"))
        .collect()
}

/// Waits for what only takes the time that a busy machine takes.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited two minutes for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Its programs have to be started again; OpenGL does not notice.
#[test]
fn another_server_follows_one_that_died() {
    let Some(mut vulkan) = device() else { return };
    assert_eq!(vulkan.front.create_context(2, VIRGL2), kind::OK_NODATA);
    let device = vulkan.front.child.id();
    for round in 0..3 {
        let (old, new) = (10 + round, 20 + round);
        assert_eq!(vulkan.front.create_context(old, VENUS), kind::OK_NODATA);
        let blob = 100 + round;
        assert_eq!(vulkan.create_blob(blob, old, PAGE, 0), kind::OK_NODATA);
        let [keeper] = children(device)[..] else { panic!("one process beside the device") };
        // What the last server left is its heir for a moment.
        wait_until("one server", || running_children(keeper).len() == 1);
        let server = running_children(keeper)[0];
        let family = descendants(keeper);
        assert!(family.len() >= 2, "a server, and a process for the context: {family:?}");
        // In mid-life, or when it has just died.
        kill(server);
        if round > 0 {
            family.iter().for_each(|pid| kill(*pid));
            wait_until("their end", || family.iter().all(|pid| !is_running(*pid)));
        }
        wait_until("a new server", || {
            let made = vulkan.front.create_context(new, VENUS) == kind::OK_NODATA;
            let fresh = running_children(keeper).iter().any(|pid| !family.contains(pid));
            if made && !fresh {
                vulkan.front.destroy_context(new);
            }
            made && fresh
        });
        if round > 0 {
            let words = [ENUMERATE_INSTANCE_VERSION, 0, 1, 0];
            // Refused or ignored, but answered.
            vulkan.execute(old, &words);
            assert!(vulkan.create_blob(50, old, PAGE, 0) >= kind::ERR_UNSPEC);
        }
        // What the guest does to the old one is nothing to the new one.
        assert_eq!(vulkan.front.destroy_context(old), kind::OK_NODATA);
        let size = PAGE;
        assert_eq!(vulkan.create_blob(51, new, size, 0), kind::OK_NODATA);
        let (_, file) = vulkan.map(51, 0);
        let version = [vec![ENUMERATE_INSTANCE_VERSION, GENERATE_REPLY], wide(&[1])].concat();
        let commands = [answers_to(51, size), version].concat();
        assert_eq!(vulkan.execute(new, &commands), kind::OK_NODATA);
        assert_eq!(words(&file, 2), [ENUMERATE_INSTANCE_VERSION, 0]);
        assert_eq!(vulkan.front.about_resource(kind::RESOURCE_UNREF, 0, 51), kind::OK_NODATA);
        assert!(matches!(vulkan.asked(), Asked::Unmap(_)));
        assert_eq!(vulkan.front.destroy_context(new), kind::OK_NODATA);
    }
    assert_eq!(vulkan.front.draw(2, &support::three_d::prologue()), kind::OK_NODATA);
}

/// Without the process that starts them there are no more servers, and OpenGL goes on.
#[test]
fn no_server_follows_where_nobody_starts_it() {
    let Some(mut vulkan) = device() else { return };
    assert_eq!(vulkan.front.create_context(2, VIRGL2), kind::OK_NODATA);
    let keeper = children(vulkan.front.child.id())[0];
    let servers = running_children(keeper);
    kill(keeper);
    servers.iter().for_each(|pid| kill(*pid));
    wait_until("their end", || servers.iter().all(|pid| !is_running(*pid)));
    assert!(vulkan.front.create_context(3, VENUS) != kind::OK_NODATA);
    assert_eq!(vulkan.front.draw(2, &support::three_d::prologue()), kind::OK_NODATA);
}

/// A guest cannot have servers started for ever.
#[test]
fn servers_are_not_started_for_ever() {
    let Some(mut vulkan) = device() else { return };
    assert_eq!(vulkan.front.create_context(2, VIRGL2), kind::OK_NODATA);
    let mut deaths = 0;
    wait_until("a refusal", || {
        let keeper = children(vulkan.front.child.id())[0];
        let servers = running_children(keeper);
        servers.iter().for_each(|pid| kill(*pid));
        wait_until("its end", || servers.iter().all(|pid| !is_running(*pid)));
        deaths += 1;
        let refused = vulkan.front.create_context(3, VENUS) != kind::OK_NODATA;
        if !refused {
            vulkan.front.destroy_context(3);
        }
        refused
    });
    assert!((3..30).contains(&deaths), "{deaths}");
    assert_eq!(vulkan.front.draw(2, &support::three_d::prologue()), kind::OK_NODATA);
}

fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// The processes that a process started, whichever of its threads did.
fn children(of: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn running_children(of: u32) -> Vec<u32> {
    children(of).into_iter().filter(|pid| is_running(*pid)).collect()
}

fn descendants(of: u32) -> Vec<u32> {
    let children = children(of);
    children.iter().copied().chain(children.iter().flat_map(|child| descendants(*child))).collect()
}

/// A server that was taken over starts no other program, not even from the folders of libraries.
#[test]
fn the_server_executes_no_other_program() {
    const OTHER: &str = "/usr/libexec/virgl_render_server";
    if std::env::var_os("DRAGO_TEST_ROOT").is_some() || !Path::new(OTHER).is_file() {
        println!("SKIPPED: no {OTHER} for this system's libraries");
        return;
    }
    let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
    let out = support::command(program)
        .args(["--probe", "--renderer", "virgl", "--vulkan", "venus", "--sandbox", "log"])
        .args(["--render-server", "/usr/bin/env", &format!("--render-server=-S{OTHER}")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("Landlock (") {
        println!("SKIPPED: this system refuses Landlock: {said}");
        return;
    }
    assert!(!out.status.success());
    assert!(said.contains("env: ") && said.contains("Permission denied"), "{said}");
}

/// What is wrong is said, and no machine starts without what was asked for.
#[test]
fn a_server_that_does_not_work_is_named() {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
    let try_with = |server: &str| {
        let arguments = ["--probe", "--renderer", "virgl", "--vulkan", "venus"];
        let mut command = support::command(program);
        let out = command.args(arguments).args(["--render-server", server]).output().unwrap();
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    for server in ["/nowhere/server", "/bin/false"] {
        let said = try_with(server);
        assert!(said.contains("no Vulkan: the render server does not work"), "{server}: {said}");
    }
    assert!(try_with("/nowhere/server").contains("/nowhere/server"), "the program is named");
}
