//! Bytes and descriptors over a Unix stream socket (unix(7), `SCM_RIGHTS`).

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags,
    },
};

/// Most descriptors a peer may send ahead of the messages that use them, and most that go out with
/// one message. A vhost-user memory table has up to 32.
pub const MAX_FDS: usize = 32;

/// Receives what is there, up to `buffer.len()` bytes; `Ok(0)` is the end of the stream. Received
/// descriptors are appended to `fds`, closed on exec.
///
/// # Errors
///
/// Those of recvmsg(2), `WouldBlock` included where the socket or `flags` say so, and a peer that
/// sends more than [`MAX_FDS`] descriptors which nobody takes out of `fds`.
pub fn receive(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
    flags: RecvFlags,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        let mut iov = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut iov, &mut control, flags) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    if fds.len() > MAX_FDS {
        return Err(io::Error::other("the peer sent descriptors that belong to no message"));
    }
    Ok(message.bytes)
}

/// Sends as much as fits; descriptors go with the first byte. No signal is raised where the peer
/// has hung up.
///
/// # Errors
///
/// Those of sendmsg(2), `WouldBlock` included where the socket or `flags` say so.
pub fn send(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let flags = flags | SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Reads exactly `buffer.len()` bytes, waiting for them; `Ok(false)` if the stream ended before the
/// first.
///
/// # Errors
///
/// Those of [`receive`], and `UnexpectedEof` for an end in the middle.
pub fn receive_exact(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match receive(socket, &mut buffer[filled..], fds, RecvFlags::empty())? {
            0 if filled == 0 => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(true)
}

/// Sends everything, waiting for room; descriptors go with the first byte.
///
/// # Errors
///
/// Those of [`send`].
pub fn send_all(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut sent = send(socket, bytes, fds, SendFlags::empty())?;
    while sent < bytes.len() {
        sent += send(socket, &bytes[sent..], &[], SendFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
        os::fd::AsFd,
    };

    use super::*;

    #[test]
    fn descriptors_travel_with_their_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        send_all(&ours, b"hello", &[memory.as_fd()]).unwrap();
        File::from(memory).write_all(b"inside").unwrap();
        let (mut bytes, mut fds) = ([0; 5], VecDeque::new());
        assert!(receive_exact(&theirs, &mut bytes, &mut fds).unwrap());
        assert_eq!(&bytes, b"hello");
        let mut file = File::from(fds.pop_front().unwrap());
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        drop(ours);
        assert!(!receive_exact(&theirs, &mut bytes, &mut fds).unwrap());
    }

    #[test]
    fn descriptors_nobody_asked_for_do_not_pile_up() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fd = ours.as_fd();
        let mut fds = VecDeque::new();
        send_all(&ours, b"x", &[fd; MAX_FDS]).unwrap();
        receive(&theirs, &mut [0; 1], &mut fds, RecvFlags::empty()).unwrap();
        send_all(&ours, b"x", &[fd]).unwrap();
        assert!(receive(&theirs, &mut [0; 1], &mut fds, RecvFlags::empty()).is_err());
    }
}
