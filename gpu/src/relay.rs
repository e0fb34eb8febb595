//! Stands between the front end's socket and [`vhost_user_backend`] and passes messages on.
//!
//! Three things need it. `vhost` 0.18 wraps the socket of `VHOST_USER_GPU_SET_SOCKET` into a type that
//! can send the standard's requests and nothing else, so that message is taken out here.
//! `vhost_user_backend` knows no in-flight buffers and keeps the error descriptors of rings to itself,
//! so their messages are taken out as well ([`Direct`]). And QEMU
//! acknowledges features of its own transport that a back end never offered (for this device it does
//! not mask them), which `vhost_user_backend` answers by hanging up: bits that were not offered are
//! cleared on the way.
//!
//! The cost is a copy of a few dozen small messages when a device is set up.

use std::{
    collections::VecDeque,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
};

use host::socket_io;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest payload, the same limit as in crate `vhost`.
const MAX_PAYLOAD: usize = 4096;

const SET_FEATURES: u32 = 2;
const SET_VRING_ERR: u32 = 14;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const GPU_SET_SOCKET: u32 = 33;

/// SET_VRING_ERR: no descriptor comes with the message.
const NO_FD: u64 = 1 << 8;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct Inflight {
    mmap_size: u64,
    mmap_offset: u64,
    queues: u16,
    queue_size: u16,
    padding: [u8; 4],
}

/// What the device does with the messages that the library does not see.
pub trait Direct {
    /// Uses this GPU socket.
    fn gpu_socket(&mut self, socket: UnixStream) -> io::Result<()>;

    /// Makes an in-flight buffer for queues of up to this size; returns its length and descriptor.
    fn make_inflight(&mut self, queue_size: u16) -> io::Result<(u64, OwnedFd)>;

    /// Goes on with the in-flight buffer of a predecessor.
    fn take_inflight(&mut self, fd: OwnedFd, length: u64, queue_size: u16) -> io::Result<()>;

    /// Where to tell that this ring cannot be served any more.
    fn ring_error(&mut self, queue: u16, fd: Option<OwnedFd>);
}

struct Message {
    header: Header,
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// `None` at the end of the stream.
    fn receive(socket: &UnixStream) -> io::Result<Option<Self>> {
        let mut fds = VecDeque::new();
        let mut header = [0; size_of::<Header>()];
        if !socket_io::receive_exact(socket, &mut header, &mut fds)? {
            return Ok(None);
        }
        let header = Header::read_from_bytes(&header)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let size = header.size as usize;
        if size > MAX_PAYLOAD {
            return Err(io::Error::other(format!(
                "vhost-user message {} announces {size} bytes",
                header.request
            )));
        }
        let mut payload = vec![0; size];
        if size > 0 && !socket_io::receive_exact(socket, &mut payload, &mut fds)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(Self { header, payload, fds: fds.into() }))
    }

    /// An answer to this request.
    fn reply(&self, payload: &[u8], fds: Vec<OwnedFd>) -> Self {
        let (request, size) = (self.header.request, payload.len() as u32);
        let header = Header { request, flags: VERSION | REPLY, size };
        Self { header, payload: payload.to_vec(), fds }
    }

    /// Tells the front end what became of a request, if it wants to know.
    fn acknowledge(&self, outcome: &io::Result<()>, front: &UnixStream) -> io::Result<()> {
        if self.header.flags & NEED_REPLY == 0 {
            return Ok(());
        }
        self.reply(u64::from(outcome.is_err()).as_bytes(), Vec::new()).send(front)
    }

    fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let bytes = [self.header.as_bytes(), &self.payload].concat();
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        socket_io::send_all(socket, &bytes, &fds)
    }
}

/// Passes messages between the front end and the library until one of them hangs up. `direct` gets
/// those that the library does not. `features` are what the device offers.
pub fn run(
    front: &UnixStream,
    device: &UnixStream,
    features: u64,
    direct: &mut dyn Direct,
) -> io::Result<()> {
    let (back_front, back_device) = (front.try_clone()?, device.try_clone()?);
    let replies = thread::Builder::new().name("relay-replies".into()).spawn(move || {
        let result = pass_replies(&back_device, &back_front);
        // The other direction must not go on alone.
        let _ = back_front.shutdown(Shutdown::Both);
        result
    })?;
    let result = pass_requests(front, device, features, direct);
    let _ = device.shutdown(Shutdown::Both);
    let replies =
        replies.join().unwrap_or_else(|_| Err(io::Error::other("the relay's thread panicked")));
    // A front end that closes its socket before it has read everything has hung up, too.
    match result.and(replies) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn pass_requests(
    front: &UnixStream,
    device: &UnixStream,
    features: u64,
    direct: &mut dyn Direct,
) -> io::Result<()> {
    while let Some(mut message) = Message::receive(front)? {
        match message.header.request {
            GPU_SET_SOCKET => {
                let fd = message.fds.pop().ok_or_else(|| {
                    io::Error::other("VHOST_USER_GPU_SET_SOCKET came without a socket")
                })?;
                let outcome = direct.gpu_socket(UnixStream::from(fd));
                if let Err(error) = &outcome {
                    tracing::error!(%error, "the GPU socket cannot be used");
                }
                message.acknowledge(&outcome, front)?;
            }
            GET_INFLIGHT_FD => make_inflight(&message, direct).send(front)?,
            SET_INFLIGHT_FD => {
                let outcome = take_inflight(&mut message, direct);
                if let Err(error) = &outcome {
                    tracing::error!(%error, "what the last back end left cannot be used");
                }
                message.acknowledge(&outcome, front)?;
            }
            SET_VRING_ERR => {
                let value = u64::read_from_bytes(&message.payload).unwrap_or(NO_FD);
                let fd = message.fds.pop().filter(|_| value & NO_FD == 0);
                direct.ring_error((value & 0xff) as u16, fd);
                message.acknowledge(&Ok(()), front)?;
            }
            SET_FEATURES => {
                if let Ok(wanted) = u64::read_from_bytes(&message.payload) {
                    let unknown = wanted & !features;
                    if unknown != 0 {
                        tracing::debug!("the front end acknowledged {unknown:#x} unasked");
                    }
                    message.payload = (wanted & features).as_bytes().to_vec();
                }
                message.send(device)?;
            }
            _ => message.send(device)?,
        }
    }
    Ok(())
}

/// The answer to GET_INFLIGHT_FD; without a descriptor if there is no buffer.
fn make_inflight(message: &Message, direct: &mut dyn Direct) -> Message {
    let made = Inflight::read_from_bytes(&message.payload)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        .and_then(|asked| direct.make_inflight(asked.queue_size).map(|made| (asked, made)));
    match made {
        Ok((asked, (length, fd))) => {
            let answer = Inflight { mmap_size: length, mmap_offset: 0, ..asked };
            message.reply(answer.as_bytes(), vec![fd])
        }
        Err(error) => {
            tracing::error!(%error, "no in-flight buffer can be made");
            message.reply(&[0; size_of::<Inflight>()], Vec::new())
        }
    }
}

fn take_inflight(message: &mut Message, direct: &mut dyn Direct) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let given = Inflight::read_from_bytes(&message.payload).map_err(|_| invalid())?;
    let fd = message.fds.pop().ok_or_else(invalid)?;
    if given.mmap_offset != 0 {
        return Err(invalid());
    }
    direct.take_inflight(fd, given.mmap_size, given.queue_size)
}

fn pass_replies(device: &UnixStream, front: &UnixStream) -> io::Result<()> {
    while let Some(message) = Message::receive(device)? {
        message.send(front)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::fd::AsFd,
    };

    use super::*;

    const GET_FEATURES: u32 = 1;

    #[derive(Default)]
    struct Taken {
        sockets: Vec<UnixStream>,
        errors: Vec<(u16, bool)>,
    }

    impl Direct for Taken {
        fn gpu_socket(&mut self, socket: UnixStream) -> io::Result<()> {
            self.sockets.push(socket);
            Ok(())
        }

        fn make_inflight(&mut self, _: u16) -> io::Result<(u64, OwnedFd)> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn take_inflight(&mut self, _: OwnedFd, _: u64, _: u16) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn ring_error(&mut self, queue: u16, fd: Option<OwnedFd>) {
            self.errors.push((queue, fd.is_some()));
        }
    }

    fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
        Header { request, flags, size }.as_bytes().to_vec()
    }

    #[test]
    fn takes_the_gpu_socket_out_and_masks_features() {
        let (mut vmm, front) = UnixStream::pair().unwrap();
        let (device, mut backend) = UnixStream::pair().unwrap();
        let (gpu_vmm, gpu_backend) = UnixStream::pair().unwrap();
        let worker = thread::spawn(move || {
            let mut taken = Taken::default();
            let result = run(&front, &device, 0b0110, &mut taken);
            (result, taken)
        });
        let set_features = [header(SET_FEATURES, VERSION, 8), vec![0xff; 8]].concat();
        vmm.write_all(&set_features).unwrap();
        socket_io::send_all(
            &vmm,
            &header(GPU_SET_SOCKET, VERSION | NEED_REPLY, 0),
            &[gpu_backend.as_fd()],
        )
        .unwrap();
        for (value, fds) in [(1, vec![gpu_vmm.as_fd()]), (NO_FD, Vec::new())] {
            let message = [header(SET_VRING_ERR, VERSION, 8), u64::as_bytes(&value).to_vec()];
            socket_io::send_all(&vmm, &message.concat(), &fds).unwrap();
        }
        vmm.write_all(&header(GET_FEATURES, VERSION, 0)).unwrap();

        let mut seen = [0; 32];
        backend.read_exact(&mut seen).unwrap();
        assert_eq!(seen[12..20], 0b0110_u64.to_ne_bytes());
        assert_eq!(seen[20..], header(GET_FEATURES, VERSION, 0), "message 33 is not passed on");
        let mut ack = [0; 20];
        vmm.read_exact(&mut ack).unwrap();
        assert_eq!(ack[12..], [0; 8]);
        backend.write_all(&header(GET_FEATURES, VERSION | REPLY, 0)).unwrap();
        vmm.read_exact(&mut ack[..12]).unwrap();

        drop(vmm);
        assert_eq!(backend.read(&mut seen).unwrap(), 0, "the end is passed on");
        let (result, taken) = worker.join().unwrap();
        result.unwrap();
        assert_eq!(taken.sockets.len(), 1);
        assert_eq!(taken.errors, [(1, true), (0, false)]);
        drop(taken);
        drop(gpu_vmm);
    }

    #[test]
    fn oversized_messages_end_the_connection() {
        let (mut vmm, front) = UnixStream::pair().unwrap();
        let (device, _backend) = UnixStream::pair().unwrap();
        vmm.write_all(&header(5, VERSION, 4097)).unwrap();
        assert!(run(&front, &device, 0, &mut Taken::default()).is_err());
    }
}
