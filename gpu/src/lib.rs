//! `drago-gpu`: a virtio-gpu back end in a process of its own (vhost-user, QEMU's
//! vhost-user-gpu socket, and this project's frames in shared memory).
//!
//! ```text
//!  front end ──vhost-user── [daemon: relay] ── vhost_user_backend ──┐
//!      │                                                            ▼
//!      │                         control, cursor queue ──▶ [device] ──▶ [control] ──▶ [renderer]
//!      │                                                 its thread        │ [scanout]
//!      └──────GPU socket────────── socket thread ◀──────▶ [link] ◀─────────┘
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`daemon`] | one connection from handshake to hang-up |
//! | [`relay`] | passes vhost-user messages on and keeps the GPU socket for us |
//! | [`device`] | queues: takes commands out, puts answers in |
//! | [`ring`] | one queue: chains out, answers in, a driver's violations |
//! | [`control`] | what the commands mean: resources, scanouts, limits |
//! | [`renderer`] | who holds pixels: the seam between 2D and 3D |
//! | [`scanout`] | which part of which resource is shown; frames and updates made of it |
//! | [`journal`] | what a successor needs to go on after this process died |
//! | [`sandbox`] | what this process may still do once commands arrive |
//! | [`link`] | the GPU socket: never blocks a queue, never grows without bound |
//!
//! Locks are taken in this order: fences, then ring, then link.

pub mod backing;
pub mod control;
pub mod daemon;
pub mod device;
pub mod journal;
pub mod link;
pub mod relay;
pub mod render_server;
pub mod renderer;
pub mod ring;
pub mod sandbox;
pub mod scanout;
pub mod sys;

/// Guest memory as vhost-user hands it to us.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
