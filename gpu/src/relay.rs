//! Stands between the front end's socket and [`vhost_user_backend`] and passes messages on.
//!
//! Two things need it. `vhost` 0.18 wraps the socket of `VHOST_USER_GPU_SET_SOCKET` into a type that
//! can send the standard's requests and nothing else, so that message is taken out here. And QEMU
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
const GPU_SET_SOCKET: u32 = 33;

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

    fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let bytes = [self.header.as_bytes(), &self.payload].concat();
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        socket_io::send_all(socket, &bytes, &fds)
    }
}

/// Passes messages between the front end and the device until one of them hangs up. `gpu_socket` is
/// called with each GPU socket. `features` are what the device offers.
pub fn run(
    front: &UnixStream,
    device: &UnixStream,
    features: u64,
    mut gpu_socket: impl FnMut(UnixStream) -> io::Result<()>,
) -> io::Result<()> {
    let (back_front, back_device) = (front.try_clone()?, device.try_clone()?);
    let replies = thread::Builder::new().name("relay-replies".into()).spawn(move || {
        let result = pass_replies(&back_device, &back_front);
        // The other direction must not go on alone.
        let _ = back_front.shutdown(Shutdown::Both);
        result
    })?;
    let result = pass_requests(front, device, features, &mut gpu_socket);
    let _ = device.shutdown(Shutdown::Both);
    let replies =
        replies.join().unwrap_or_else(|_| Err(io::Error::other("the relay's thread panicked")));
    result.and(replies)
}

fn pass_requests(
    front: &UnixStream,
    device: &UnixStream,
    features: u64,
    gpu_socket: &mut impl FnMut(UnixStream) -> io::Result<()>,
) -> io::Result<()> {
    while let Some(mut message) = Message::receive(front)? {
        match message.header.request {
            GPU_SET_SOCKET => {
                let fd = message.fds.pop().ok_or_else(|| {
                    io::Error::other("VHOST_USER_GPU_SET_SOCKET came without a socket")
                })?;
                let outcome = gpu_socket(UnixStream::from(fd));
                if let Err(error) = &outcome {
                    tracing::error!(%error, "the GPU socket cannot be used");
                }
                if message.header.flags & NEED_REPLY != 0 {
                    let payload = u64::from(outcome.is_err()).as_bytes().to_vec();
                    let header = Header {
                        request: GPU_SET_SOCKET,
                        flags: VERSION | REPLY,
                        size: payload.len() as u32,
                    };
                    Message { header, payload, fds: Vec::new() }.send(front)?;
                }
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

fn pass_replies(device: &UnixStream, front: &UnixStream) -> io::Result<()> {
    while let Some(message) = Message::receive(device)? {
        message.send(front)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const GET_FEATURES: u32 = 1;

    fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
        Header { request, flags, size }.as_bytes().to_vec()
    }

    #[test]
    fn takes_the_gpu_socket_out_and_masks_features() {
        let (mut vmm, front) = UnixStream::pair().unwrap();
        let (device, mut backend) = UnixStream::pair().unwrap();
        let (gpu_vmm, gpu_backend) = UnixStream::pair().unwrap();
        let worker = thread::spawn(move || {
            let mut sockets = Vec::new();
            let result = run(&front, &device, 0b0110, |socket| {
                sockets.push(socket);
                Ok(())
            });
            (result, sockets)
        });
        let set_features = [header(SET_FEATURES, VERSION, 8), vec![0xff; 8]].concat();
        vmm.write_all(&set_features).unwrap();
        socket_io::send_all(
            &vmm,
            &header(GPU_SET_SOCKET, VERSION | NEED_REPLY, 0),
            &[gpu_backend.as_fd()],
        )
        .unwrap();
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
        let (result, sockets) = worker.join().unwrap();
        result.unwrap();
        assert_eq!(sockets.len(), 1);
        drop(sockets);
        drop(gpu_vmm);
    }

    #[test]
    fn oversized_messages_end_the_connection() {
        let (mut vmm, front) = UnixStream::pair().unwrap();
        let (device, _backend) = UnixStream::pair().unwrap();
        vmm.write_all(&header(5, VERSION, 4097)).unwrap();
        assert!(run(&front, &device, 0, |_| Ok(())).is_err());
    }
}
