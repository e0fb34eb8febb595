//! `cargo xtask guest`: makes a guest and says where its parts are.

use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use drago_tests::guest::{Desktop, Guest};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which guest
    pub(crate) guest: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// A busybox system with a text console
    Minimal,
    /// Debian with weston
    Weston,
    /// Debian with GNOME
    Gnome,
    /// Debian with programs that draw
    Graphics,
    /// Debian in the shape that microvm.nix gives to NixOS; its disk is read-only
    Nixos,
}

impl Kind {
    pub(crate) fn make(self) -> Result<Guest> {
        match self {
            Self::Minimal => Guest::minimal(),
            Self::Weston => Guest::desktop(Desktop::Weston),
            Self::Gnome => Guest::desktop(Desktop::Gnome),
            Self::Graphics => Guest::desktop(Desktop::Graphics),
            Self::Nixos => Guest::nixos(),
        }
    }

    /// Whether there is a desktop on its screen: else a text console, or nothing.
    pub(crate) fn has_desktop(self) -> bool {
        matches!(self, Self::Weston | Self::Gnome)
    }

    /// What can be looked at.
    pub(crate) fn screen(self) -> &'static str {
        if self.has_desktop() { "desktop" } else { "console" }
    }

    /// Whether somebody in it hears the power button.
    pub(crate) fn hears_power_button(self) -> bool {
        self != Self::Minimal
    }

    /// What its serial port says when people may log in, if they may.
    pub(crate) fn prompt(self) -> Option<&'static str> {
        match self {
            Self::Minimal => Some("minimal# "),
            Self::Weston | Self::Gnome | Self::Graphics => Some("login:"),
            Self::Nixos => None,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let guest = args.guest.make()?;
    println!("KERNEL={}", guest.kernel.display());
    println!("INITRD={}", guest.initrd.display());
    println!("CMDLINE='{}'", guest.cmdline);
    if let Some(disk) = &guest.disk {
        println!("DISK={}", disk.display());
    }
    if let Some(key) = &guest.ssh_key {
        println!("SSH_KEY={}", key.display());
    }
    println!("MEMORY={}", guest.memory_mib);
    Ok(ExitCode::SUCCESS)
}
