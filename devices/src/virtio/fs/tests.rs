use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use super::{FsConfig, config::sample, device::Fs, supervisor::Supervisor};
use crate::{
    spec::Spec,
    virtio::{
        VirtioDevice,
        testing::{Driver, Part},
    },
};

/// Debian 12 has the one, later versions the other.
const PROGRAMS: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];

// linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const INIT: u32 = 26;
const ROOT: u64 = 1;
const OUT_HEADER: usize = 16;

const REQUESTS: usize = 1;

#[test]
fn options() {
    let parse = |text| FsConfig::parse(Spec::parse("fs", text).unwrap());
    parse("tag=ro-store,socket=s.sock").unwrap();
    for (wrong, says) in [
        ("socket=s", "'tag=' is missing"),
        ("tag=t", "'socket=' is missing"),
        ("tag=,socket=s", "1 to 36"),
        ("tag=0123456789012345678901234567890123456,socket=s", "1 to 36"),
        ("tag=t,socket=s,path=/x", "--shared-dir"),
        ("tag=t,socket=s,cache=always", "unknown key 'cache'"),
    ] {
        let error = parse(wrong).unwrap_err().to_string();
        assert!(error.starts_with("--fs: ") && error.contains(says), "{wrong}: {error}");
    }
}

#[test]
fn the_guest_reads_the_tag() {
    let device = Fs::new("ro-store", None);
    let mut space = [0xff; 44];
    device.read_config(0, &mut space);
    assert_eq!(&space[..9], b"ro-store\0");
    assert_eq!(space[36..], [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert!(sample().is_ok());
}

fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((40 + body.len()) as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn init(unique: u64) -> Vec<u8> {
    let body: Vec<u8> = [7u32, 31, 65536, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    request(INIT, unique, 0, &body)
}

/// Error and number of an answer, and what follows.
fn answer(bytes: &[u8]) -> (i32, u64, &[u8]) {
    assert!(bytes.len() >= OUT_HEADER, "{bytes:?}");
    let error = i32::from_le_bytes(bytes[4..8].try_into().unwrap());
    (error, u64::from_le_bytes(bytes[8..16].try_into().unwrap()), &bytes[OUT_HEADER..])
}

fn ask(driver: &mut Driver, request: &[u8]) -> Vec<u8> {
    let queue = &mut driver.queues[REQUESTS];
    queue.send(&[Part::Out(request), Part::In(200)]);
    queue.wait_used().1
}

struct Virtiofsd {
    child: Child,
}

impl Virtiofsd {
    fn program() -> Option<&'static str> {
        let found = PROGRAMS.into_iter().find(|path| Path::new(path).exists());
        // It has to change what it sees as the root folder.
        let root = rustix::process::geteuid().is_root();
        if found.is_none() || !root {
            println!("SKIPPED: there is no virtiofsd, or the tests do not run as root");
        }
        found.filter(|_| root)
    }

    fn start(program: &str, socket: &Path, folder: &Path) -> Self {
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", socket.display()));
        if program.contains("qemu") {
            command.args(["-o", "sandbox=chroot"]);
            command.args(["-o", &format!("source={}", folder.display())]);
        } else {
            command.args(["--sandbox=chroot", "--shared-dir"]).arg(folder);
        }
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { child }
    }

    /// Returns when none of its threads runs any more: one that is awake sees the signal later.
    fn stop(&self) {
        use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP).unwrap();
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        assert!(status.stopped(), "{status:?}");
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn look_up_hello(driver: &mut Driver, unique: u64) -> (i32, u64) {
    let bytes = ask(driver, &request(LOOKUP, unique, ROOT, b"hello\0"));
    let (error, number, body) = answer(&bytes);
    assert_eq!(number, unique);
    // struct fuse_entry_out: node and times, then the attributes, of which size is the second.
    let size = body.get(48..56).map_or(0, |size| u64::from_le_bytes(size.try_into().unwrap()));
    (error, size)
}

#[test]
fn a_folder_of_a_real_virtiofsd_outlives_its_death() {
    let Some(program) = Virtiofsd::program() else { return };
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("hello"), "twelve bytes").unwrap();
    let socket = folder.path().join("socket");
    // The device is there first, and waits.
    let path = socket.clone();
    let waiting = thread::spawn(move || Supervisor::start("t", &path).unwrap());
    let daemon = Virtiofsd::start(program, &socket, &shared);
    let mut device = Fs::new("t", Some(waiting.join().unwrap()));

    let mut driver = Driver::start(&mut device);
    let bytes = ask(&mut driver, &init(1));
    let (error, number, body) = answer(&bytes);
    assert_eq!((error, number, &body[..4]), (0, 1, &[7, 0, 0, 0][..]));
    assert_eq!(look_up_hello(&mut driver, 2), (0, 12));
    driver.queues[0].send(&[Part::Out(&request(FORGET, 3, ROOT, &[0; 8]))]);
    driver.queues[0].wait_used();

    // A driver that goes and comes again.
    device.reset();
    let (features, memory) = (device.features(), driver.memory.clone());
    let mut driver = Driver::start_with(&mut device, features, memory);
    assert_eq!(answer(&ask(&mut driver, &init(4))).0, 0);
    assert_eq!(look_up_hello(&mut driver, 5), (0, 12));

    // It dies with a request in its hands, and one that it has not seen.
    daemon.stop();
    driver.queues[REQUESTS].send(&[Part::Out(&request(GETATTR, 6, ROOT, &[0; 16])), Part::In(200)]);
    driver.queues[REQUESTS].send(&[Part::Out(&request(GETATTR, 7, ROOT, &[0; 16])), Part::In(200)]);
    drop(daemon);
    for unique in [6, 7] {
        let bytes = driver.queues[REQUESTS].wait_used().1;
        assert_eq!(answer(&bytes), (-libc::ENOTCONN, unique, &[][..]));
    }
    // No answer is owed to this one; it comes back all the same.
    driver.queues[0].send(&[Part::Out(&request(FORGET, 8, ROOT, &[0; 8]))]);
    assert_eq!(driver.queues[0].wait_used().1, b"");
    assert_eq!(look_up_hello(&mut driver, 9).0, -libc::ENOTCONN);

    // The next one serves whoever mounts again; until then every request fails.
    let _daemon = Virtiofsd::start(program, &socket, &shared);
    let mut unique = 10;
    while answer(&ask(&mut driver, &init(unique))).0 != 0 {
        unique += 1;
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(look_up_hello(&mut driver, unique + 1), (0, 12));
    assert!(!driver.interrupt.needs_reset());
    device.reset();
    device.reset();
}

/// Has everybody who waits for an eventfd that virtiofsd holds believe that virtiofsd wrote to it.
fn write_to_eventfds(daemon: &Virtiofsd) {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pidfd = pidfd_open(Pid::from_child(&daemon.child), PidfdFlags::empty()).unwrap();
    let folder = format!("/proc/{}/fd", daemon.child.id());
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let target = std::fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy() == "anon_inode:[eventfd]" {
            let number = path.file_name().unwrap().to_string_lossy().parse().unwrap();
            let fd = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).unwrap();
            rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
        }
    }
}

#[test]
fn a_ring_that_virtiofsd_finds_broken_needs_a_reset() {
    let Some(program) = Virtiofsd::program() else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let path = socket.clone();
    let waiting = thread::spawn(move || Supervisor::start("t", &path).unwrap());
    let daemon = Virtiofsd::start(program, &socket, folder.path());
    let mut device = Fs::new("t", Some(waiting.join().unwrap()));
    let mut driver = Driver::start(&mut device);
    assert_eq!(answer(&ask(&mut driver, &init(1))).0, 0);
    assert!(!driver.interrupt.needs_reset());
    // Those that are known have other ways to fail than to say so.
    write_to_eventfds(&daemon);
    driver.interrupt.wait_config_change();
    assert!(driver.interrupt.needs_reset());
    device.reset();
}

#[test]
fn nobody_waits_for_virtiofsd_once_the_machine_is_to_end() {
    static VISITS: AtomicUsize = AtomicUsize::new(0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
            VISITS.fetch_add(1, Ordering::SeqCst);
        }
    });
    let told_to_end = || VISITS.load(Ordering::SeqCst) >= 3;
    let error = Supervisor::start_unless("t", &path, told_to_end).err().unwrap().to_string();
    assert!(error.starts_with("--fs: socket=") && error.contains("no virtiofsd"), "{error}");
    assert!(VISITS.load(Ordering::SeqCst) <= 4, "{VISITS:?}");

    // One that does not say a word.
    static ACCEPTED: AtomicUsize = AtomicUsize::new(0);
    let path = folder.path().join("silent");
    let listener = UnixListener::bind(&path).unwrap();
    let silent = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 12]).unwrap();
        ACCEPTED.fetch_add(1, Ordering::SeqCst);
        // Until the connection is cut.
        while stream.read(&mut [0]).is_ok_and(|count| count > 0) {}
    });
    let told_to_end = || ACCEPTED.load(Ordering::SeqCst) > 0;
    assert!(Supervisor::start_unless("t", &path, told_to_end).is_err());
    silent.join().unwrap();
}

#[test]
fn waiting_ends_when_somebody_listens_or_time_is_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let limit = Duration::from_millis(200);
    let error = super::supervisor::connect_patiently(&path, limit, || false).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    // A stale socket counts like none.
    drop(UnixListener::bind(&path).unwrap());
    let error = super::supervisor::connect_patiently(&path, limit, || false).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    // Any other error is final.
    let error =
        super::supervisor::connect_patiently(&PathBuf::from("x").join("\0"), limit, || false);
    assert!(error.is_err());
    std::fs::remove_file(&path).unwrap();
    let (late, there) = (path.clone(), path.clone());
    let listening = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        UnixListener::bind(late).unwrap()
    });
    let _stream: UnixStream =
        super::supervisor::connect_patiently(&there, Duration::from_secs(60), || false).unwrap();
    listening.join().unwrap();
}

#[test]
fn a_peer_that_is_no_virtiofsd_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = thread::spawn(move || {
        // One that hangs up was on its way out, and the next one speaks another language.
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 12]).unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        // It leaves the end to us.
        let _ = stream.read(&mut [0]);
    });
    let error = Supervisor::start("t", &path).err().unwrap().to_string();
    assert!(error.starts_with("--fs: socket=") && error.contains("no virtiofsd"), "{error}");
    peer.join().unwrap();
}
