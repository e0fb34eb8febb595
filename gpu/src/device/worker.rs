//! The device's thread: the books, the renderer and the control queue live on it and nowhere else,
//! because OpenGL belongs to a thread.
//!
//! Everybody else sends it [`Job`]s. It sleeps on their arrival, on the renderer's own descriptor and
//! on the time of the next frame; between two commands of the guest it looks for jobs, so a busy
//! control queue delays neither cursors nor the front end.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    time::Instant,
};

use gpu_protocol::{
    socket::{FromBackEnd, FromFrontEnd},
    virtio::{CtrlHdr, FLAG_FENCE, FLAG_INFO_RING_IDX, Refusal, decode, kind},
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use zerocopy::{FromBytes, IntoBytes};

use super::fences::Fences;
use crate::{
    GuestMemory,
    control::{Control, Outcome, Question},
    journal::restore,
    link::{CursorImage, Link, Listener},
    renderer::Timeline,
    ring::{Memory, Next, Request, Ring},
};

/// Jobs that may wait; who sends more than that waits too.
const JOBS: usize = 64;

/// Work for the device's thread.
pub(super) enum Job {
    /// The control queue was notified.
    Kick(Ring),
    /// There is a new GPU socket.
    Connect(UnixStream, Weak<dyn Listener>, SyncSender<io::Result<()>>),
    /// A message of the front end.
    Message(FromFrontEnd, Option<OwnedFd>),
    /// The GPU socket has room.
    Room,
    /// Connection `0` of the GPU socket ended.
    Closed(u64),
    /// The cursor queue needs the pixels of this resource.
    CursorImage(u32, SyncSender<Result<CursorImage, Refusal>>),
    /// The control queue stops.
    Stop(SyncSender<()>),
    /// The device starts afresh.
    Reset(SyncSender<()>),
    /// The front end resets the device.
    ResetDevice(SyncSender<()>),
    /// Brings back what a predecessor had, by its commands; the answer is those for cursors.
    Restore(Vec<Vec<u8>>, SyncSender<Vec<Vec<u8>>>),
    /// Answer when all jobs before this one are done.
    Settle(SyncSender<()>),
}

/// Sends jobs; the thread ends with the last one.
pub(super) struct Jobs {
    sender: Option<SyncSender<Job>>,
    wake: Arc<OwnedFd>,
}

impl Jobs {
    /// Sends a job; it is dropped if the thread has ended.
    pub(super) fn send(&self, job: Job) {
        if let Some(sender) = &self.sender
            && sender.send(job).is_ok()
        {
            wake(&self.wake);
        }
    }

    /// Sends a job and waits for its answer; `None` if the thread has ended.
    pub(super) fn ask<T>(&self, job: impl FnOnce(SyncSender<T>) -> Job) -> Option<T> {
        let (sender, receiver) = sync_channel(1);
        self.send(job(sender));
        receiver.recv().ok()
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.sender = None;
        wake(&self.wake);
    }
}

fn wake(eventfd: &OwnedFd) {
    // The counter cannot overflow in practice; a full one wakes just as well.
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}

/// The receiving end.
pub(super) struct Inbox {
    receiver: Receiver<Job>,
    wake: Arc<OwnedFd>,
}

/// A way to send jobs.
pub(super) fn jobs() -> io::Result<(Jobs, Inbox)> {
    let eventfd = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let eventfd = Arc::new(eventfd);
    let (sender, receiver) = sync_channel(JOBS);
    Ok((Jobs { sender: Some(sender), wake: eventfd.clone() }, Inbox { receiver, wake: eventfd }))
}

/// What queue threads and the device's thread both look at.
pub(super) struct Common {
    pub(super) memory: OnceLock<Memory>,
    pub(super) link: Arc<Link>,
    pub(super) event_idx: AtomicBool,
    /// A [`Job::Kick`] is on its way.
    pub(super) kicked: AtomicBool,
    pub(super) fences: Arc<Fences>,
}

impl Common {
    /// Asks for notifications again; `true` if there is already more to do.
    pub(super) fn rearm(&self, ring: &Ring) -> bool {
        self.event_idx.load(Ordering::Relaxed)
            && ring.get_ref().is_enabled()
            && ring.enable_notification().unwrap_or(false)
    }
}

/// A command on which the queue pauses.
struct Paused {
    request: Request,
    hdr: CtrlHdr,
    question: Question,
}

/// The thread's state.
pub(super) struct Worker {
    common: Arc<Common>,
    control: Control,
    ring: Option<Ring>,
    /// There may be more in the ring.
    more: bool,
    paused: Option<Paused>,
    /// Questions whose replies have not come yet, oldest first; the front end replies in order.
    asked: Vec<Question>,
}

impl Worker {
    pub(super) fn new(common: Arc<Common>, control: Control) -> Self {
        Self { common, control, ring: None, more: false, paused: None, asked: Vec::new() }
    }

    /// Works until nobody can send jobs any more.
    pub(super) fn run(mut self, inbox: &Inbox) {
        // A device without its thread would keep the guest waiting for ever; a process that is gone
        // is noticed.
        let _abort = AbortOnPanic;
        loop {
            loop {
                match inbox.receiver.try_recv() {
                    Ok(job) => self.job(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if self.more {
                self.execute_next();
            } else {
                self.sleep(inbox);
            }
        }
    }

    fn sleep(&mut self, inbox: &Inbox) {
        let deadline = self.control.deadline();
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let woken = {
            let renderer = self.control.renderer().poll_fd();
            let wake = inbox.wake.as_fd();
            let mut fds = [
                PollFd::from_borrowed_fd(wake, PollFlags::IN),
                PollFd::from_borrowed_fd(renderer.unwrap_or(wake), PollFlags::IN),
            ];
            if let Err(error) = rustix::event::poll(&mut fds, timeout.as_ref())
                && error != rustix::io::Errno::INTR
            {
                tracing::error!(%error, "the device cannot wait for work");
            }
            if fds[0].revents().contains(PollFlags::IN) {
                let _ = rustix::io::read(&inbox.wake, &mut [0; 8]);
            }
            renderer.is_some() && !fds[1].revents().is_empty()
        };
        if woken {
            self.control.renderer_mut().poll();
        }
        if deadline.is_some_and(|at| at <= Instant::now()) {
            self.control.pump();
        }
    }

    fn job(&mut self, job: Job) {
        match job {
            Job::Kick(ring) => {
                self.common.kicked.store(false, Ordering::SeqCst);
                self.kick(&ring);
            }
            Job::Connect(socket, listener, reply) => {
                let _ = reply.send(self.connect(socket, listener));
            }
            Job::Message(message, fd) => self.message(message, fd),
            Job::Room => self.control.pump(),
            Job::Closed(generation) => self.closed(generation),
            Job::CursorImage(resource, reply) => {
                let _ = reply.send(self.control.cursor_image(resource));
            }
            Job::Stop(reply) => {
                self.stop();
                let _ = reply.send(());
            }
            Job::Reset(reply) => {
                self.reset();
                let _ = reply.send(());
            }
            Job::ResetDevice(reply) => {
                self.reset();
                self.control.tell_reset();
                let _ = reply.send(());
            }
            Job::Restore(commands, reply) => {
                let memory = self.common.memory.get().map(GuestAddressSpace::memory);
                let cursors =
                    memory.map(|memory| restore::execute(&mut self.control, &memory, commands));
                let _ = reply.send(cursors.unwrap_or_default());
            }
            Job::Settle(reply) => {
                while self.more {
                    self.execute_next();
                }
                let _ = reply.send(());
            }
        }
    }

    fn kick(&mut self, ring: &Ring) {
        if self.ring.is_none() {
            let (ready, fresh) = {
                let state = ring.get_ref();
                let ring = state.get_queue();
                (ring.ready(), ring.next_avail() == 0 && ring.next_used() == 0)
            };
            if ready && fresh && !ring.has_journal() {
                // A driver that has just started, after a reset of which not every front end tells
                // us: what the one before it left behind would be in its way.
                self.control.reset();
            }
            if let (true, Some(memory)) = (ready, self.common.memory.get()) {
                self.common.fences.start(ring, memory);
                self.ring = Some(ring.clone());
            }
        }
        self.more = self.ring.is_some();
    }

    fn reset(&mut self) {
        if let Some(Question::Map(mapping)) = self.paused.take().map(|p| p.question) {
            self.control.take_out(mapping);
        }
        self.common.fences.stop();
        self.ring = None;
        self.more = false;
        self.control.reset();
    }

    fn stop(&mut self) {
        // The front end may be waiting for this ring to stop before it answers anything, so the
        // paused command is answered with what was known before.
        if let Some(question) = self.paused.as_ref().map(|paused| paused.question) {
            self.resume(question, None);
        }
        self.common.fences.stop();
        self.ring = None;
        self.more = false;
    }

    /// Executes one command of the control queue.
    fn execute_next(&mut self) {
        self.more = false;
        if self.paused.is_some() {
            return;
        }
        let common = self.common.clone();
        let (Some(memory), Some(ring)) = (common.memory.get(), &self.ring) else { return };
        let request = match ring.next(memory) {
            Next::Request(request) => request,
            Next::Refused(request) => {
                ring.refuse(&request, &memory.memory());
                self.more = true;
                return;
            }
            Next::Empty => {
                self.more = common.rearm(ring);
                return;
            }
            Next::Stopped => return,
        };
        self.more = true;
        self.execute(request, &memory.memory());
    }

    fn execute(&mut self, request: Request, guest: &GuestMemory) {
        let (hdr, command) = decode(&request.command);
        match self.control.execute(guest, &hdr, command) {
            Outcome::Answer(bytes) => self.answer(request, &hdr, bytes, guest),
            Outcome::Ask(question) => {
                self.paused = Some(Paused { request, hdr, question });
                if !self.common.link.is_connected() {
                    self.go_without();
                } else if let Err(refusal) = self.ask(question) {
                    tracing::debug!(%refusal, ?question, "a command was refused");
                    self.resume(question, Some(hdr.answer(refusal as u32).as_bytes().to_vec()));
                }
            }
        }
    }

    /// There is no front end: what it was to be asked is answered with what was known before, unless
    /// nobody can know that ([`Question::can_be_guessed`]). In that case the end of the ring, or the next
    /// connection, lets the guest go on.
    fn go_without(&mut self) {
        let question = self.paused.as_ref().map(|paused| paused.question);
        if let Some(question) = question.filter(Question::can_be_guessed) {
            self.resume(question, None);
        }
    }

    /// Answers at once, or when what the driver waits for is done.
    fn answer(&mut self, request: Request, hdr: &CtrlHdr, bytes: Vec<u8>, guest: &GuestMemory) {
        let Some(ring) = &self.ring else { return };
        let bytes = ring.settle(&request, hdr, bytes);
        let fences = &self.common.fences;
        let ok = CtrlHdr::read_from_prefix(&bytes)
            .is_ok_and(|(answer, _)| answer.kind.get() < kind::ERR_UNSPEC);
        if ok && hdr.kind.get() == kind::CTX_DESTROY {
            fences.forget_context(hdr.ctx_id.get());
        }
        let flags = hdr.flags.get();
        if flags & FLAG_FENCE == 0 {
            request.answer(ring, guest, &bytes);
            return;
        }
        let timeline = match flags & FLAG_INFO_RING_IDX {
            0 => Timeline::Global,
            _ => Timeline::Ring { context: hdr.ctx_id.get(), ring: hdr.ring_idx },
        };
        // All other commands are done when they return: transfers are copies.
        let draws = ok && hdr.kind.get() == kind::SUBMIT_3D;
        if !draws && !fences.is_busy(timeline) {
            request.answer(ring, guest, &bytes);
            return;
        }
        let id = fences.hold(timeline, request, bytes, !draws);
        if draws && let Err(refusal) = self.control.renderer_mut().fence(timeline, id) {
            tracing::debug!(%refusal, ?timeline, "a fence could not be made");
            fences.no_fence(timeline, id);
        }
    }

    /// Sends a question unless the same one is already on its way.
    fn ask(&mut self, question: Question) -> Result<(), Refusal> {
        let message = match question {
            Question::Map(mapping) => {
                self.control.send_map(mapping)?;
                self.asked.push(question);
                return Ok(());
            }
            Question::Forget(resource) => FromBackEnd::ForgetMemory { resource },
            _ if self.asked.contains(&question) => return Ok(()),
            Question::Edid(scanout) => FromBackEnd::GetEdid { scanout },
            Question::DisplayInfo | Question::EdidFromInfo(_) => FromBackEnd::GetDisplayInfo,
        };
        self.asked.push(question);
        self.common.link.send(&message);
        Ok(())
    }

    /// The oldest question of a kind was answered.
    fn answered(&mut self, is_kind: impl Fn(&Question) -> bool) -> Option<Question> {
        let index = self.asked.iter().position(is_kind)?;
        Some(self.asked.remove(index))
    }

    /// Answers the paused command, if it waits for this: with these bytes, or with what is known.
    fn resume(&mut self, question: Question, answer: Option<Vec<u8>>) {
        match self.paused.take() {
            Some(paused) if paused.question == question => {
                if let (Question::Map(mapping), None) = (question, &answer) {
                    // The guest hears of an error. Said now and not when the front end has answered:
                    // by then the next driver may want the place.
                    self.control.take_out(mapping);
                }
                let known = || self.control.answer_to(&paused.hdr, question);
                let bytes = answer.unwrap_or_else(known);
                let common = self.common.clone();
                if let Some(memory) = common.memory.get() {
                    self.answer(paused.request, &paused.hdr, bytes, &memory.memory());
                }
                self.more = true;
            }
            other => self.paused = other,
        }
    }

    fn connect(&mut self, socket: UnixStream, listener: Weak<dyn Listener>) -> io::Result<()> {
        self.common.link.connect(socket, listener)?;
        self.asked.clear();
        self.control.connected();
        // A command that was paused on the old front end asks the new one.
        if let Some(question) = self.paused.as_ref().map(|paused| paused.question) {
            match question {
                // The memory's way to the old one is the last that is known of it; and what the old
                // one knew, the new one does not.
                Question::Map(..) | Question::Forget(_) => self.resume(question, None),
                _ => {
                    let _ = self.ask(question);
                }
            }
        }
        Ok(())
    }

    fn message(&mut self, message: FromFrontEnd, fd: Option<OwnedFd>) {
        match message {
            FromFrontEnd::ProtocolFeatures(bits) => self.control.negotiate(bits),
            FromFrontEnd::DisplayInfo(info) => {
                self.control.set_display(&info);
                let is_info =
                    |q: &Question| matches!(q, Question::DisplayInfo | Question::EdidFromInfo(_));
                if let Some(question) = self.answered(is_info) {
                    self.resume(question, None);
                }
            }
            FromFrontEnd::Edid(edid) => {
                let question = self.answered(|question| matches!(question, Question::Edid(_)));
                if let Some(Question::Edid(scanout)) = question {
                    self.control.set_edid(scanout, edid);
                }
                if let Some(question) = question {
                    self.resume(question, None);
                }
            }
            FromFrontEnd::Mapped(status) => self.mapped(status),
            FromFrontEnd::MemoryForgotten => {
                if let Some(question) = self.answered(|asked| matches!(asked, Question::Forget(_)))
                {
                    self.resume(question, None);
                }
            }
            // Never asked for.
            FromFrontEnd::DmabufUpdated => {}
            FromFrontEnd::ShmScanout(layout) => self.control.set_slots(layout, fd),
            FromFrontEnd::Release(release) => self.control.release(&release),
            FromFrontEnd::Want(want) => self.control.want(&want),
        }
    }

    fn closed(&mut self, generation: u64) {
        if self.common.link.generation() != generation {
            return;
        }
        self.asked.clear();
        self.go_without();
    }

    /// The front end shows what it was asked to, or cannot.
    fn mapped(&mut self, status: u32) {
        let Some(question) = self.answered(|question| matches!(question, Question::Map(..))) else {
            return;
        };
        let Question::Map(mapping) = question else { return };
        if let Some(paused) = self.paused.as_ref().filter(|paused| paused.question == question) {
            let answer = self.control.mapped(&paused.hdr, mapping, status);
            self.resume(question, Some(answer));
        }
    }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}
