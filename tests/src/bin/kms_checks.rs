//! `drago-kms-checks`, run in a guest as root while nobody has the screen: what the kernel's mode setting
//! promises programs, tried on the guest's GPU. Each check bears the name of the test of igt (`kms_*`) that
//! looks at the same promises; it is written from what those promise, not from their text.
//!
//!     drago-kms-checks          prints a line for each check, and ends with 1 if one failed
//!     drago-kms-checks show     shows four colours until it is ended

#![allow(clippy::print_stdout, reason = "a program for a terminal")]

use std::{
    fs::{File, OpenOptions},
    io,
    num::NonZeroU32,
    os::fd::{AsFd, BorrowedFd},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};
use drm::{
    ClientCapability, Device as _, DriverCapability,
    buffer::{Buffer, DrmFourcc, DrmModifier, Handle as BufferHandle, PlanarBuffer},
    control::{
        AtomicCommitFlags, ClipRect, Device as _, Event, FbCmd2Flags, Mode, PageFlipFlags,
        ResourceHandle, atomic::AtomicModeReq, connector, crtc, dumbbuffer::DumbBuffer,
        framebuffer, from_u32, plane, property,
    },
};
use rustix::io::Errno;

#[derive(Debug)]
struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

impl Card {
    fn open() -> Result<Self> {
        let path = "/dev/dri/card0";
        let file = OpenOptions::new().read(true).write(true).open(path).context(path)?;
        Ok(Self(file))
    }

    /// Properties of an object, by name: handle and value.
    fn property(&self, object: impl ResourceHandle, name: &str) -> Result<(property::Handle, u64)> {
        for (&handle, &value) in &self.get_properties(object)? {
            if self.get_property(handle)?.name().to_str() == Ok(name) {
                return Ok((handle, value));
            }
        }
        bail!("no property {name}")
    }
}

/// The screen with all that belongs to it.
struct Screen {
    card: Card,
    connector: connector::Handle,
    modes: Vec<Mode>,
    crtc: crtc::Handle,
    primary: plane::Handle,
}

/// A picture that can be shown.
struct Picture {
    buffer: DumbBuffer,
    id: framebuffer::Handle,
}

impl Screen {
    fn open() -> Result<Self> {
        let card = Card::open()?;
        for capability in [
            ClientCapability::UniversalPlanes,
            ClientCapability::Atomic,
            ClientCapability::CursorPlaneHotspot,
        ] {
            // The last one is for clients of virtual machines, since Linux 6.6.
            card.set_client_capability(capability, true)
                .with_context(|| format!("{capability:?}"))?;
        }
        let resources = card.resource_handles()?;
        let connectors = resources.connectors().iter().map(|id| card.get_connector(*id, true));
        let connector = connectors
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .find(|connector| connector.state() == connector::State::Connected)
            .context("no monitor")?;
        let crtc = *resources.crtcs().first().context("no CRTC")?;
        let mut primary = None;
        for id in card.plane_handles()? {
            let crtcs = resources.filter_crtcs(card.get_plane(id)?.possible_crtcs());
            // Overlay, primary, cursor.
            if crtcs.contains(&crtc) && card.property(id, "type")?.1 == 1 {
                primary = Some(id);
            }
        }
        let primary = primary.context("no primary plane")?;
        let (connector, modes) = (connector.handle(), connector.modes().to_vec());
        Ok(Self { card, connector, modes, crtc, primary })
    }

    fn size(&self) -> Result<(u32, u32)> {
        let (width, height) = self.modes.first().context("no mode")?.size();
        Ok((width.into(), height.into()))
    }

    fn picture(&self, size: (u32, u32), pixel: impl Fn(u32, u32) -> [u8; 4]) -> Result<Picture> {
        let mut buffer = self.card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32)?;
        let pitch = buffer.pitch() as usize;
        let mut map = self.card.map_dumb_buffer(&mut buffer)?;
        for (y, row) in (0..size.1).zip(map.as_mut().chunks_mut(pitch)) {
            for (x, target) in (0..size.0).zip(row.chunks_exact_mut(4)) {
                target.copy_from_slice(&pixel(x, y));
            }
        }
        drop(map);
        let id = self.card.add_framebuffer(&buffer, 24, 32)?;
        Ok(Picture { buffer, id })
    }

    fn remove(&self, picture: &Picture) -> Result<()> {
        self.card.destroy_framebuffer(picture.id)?;
        Ok(self.card.destroy_dumb_buffer(picture.buffer)?)
    }

    fn show(&self, picture: &Picture, mode: Mode) -> io::Result<()> {
        self.card.set_crtc(self.crtc, Some(picture.id), (0, 0), &[self.connector], Some(mode))
    }

    /// Everything that shows a picture, as one request.
    fn request(
        &self,
        picture: framebuffer::Handle,
        mode: u64,
        size: (u32, u32),
    ) -> Result<AtomicModeReq> {
        let mut request = AtomicModeReq::new();
        let mut put = |object: u32, name: &str, property: property::Handle, value: u64| {
            let object = NonZeroU32::new(object).with_context(|| format!("{name} of nothing"))?;
            request.add_raw_property(object, property, value);
            anyhow::Ok(())
        };
        let (connector, crtc) = (u32::from(self.connector), u32::from(self.crtc));
        put(connector, "CRTC_ID", self.card.property(self.connector, "CRTC_ID")?.0, crtc.into())?;
        for (name, value) in [("ACTIVE", 1), ("MODE_ID", mode)] {
            put(crtc, name, self.card.property(self.crtc, name)?.0, value)?;
        }
        let (width, height) = (u64::from(size.0), u64::from(size.1));
        for (name, value) in [
            ("FB_ID", u32::from(picture).into()),
            ("CRTC_ID", crtc.into()),
            ("SRC_X", 0),
            ("SRC_Y", 0),
            ("SRC_W", width << 16),
            ("SRC_H", height << 16),
            ("CRTC_X", 0),
            ("CRTC_Y", 0),
            ("CRTC_W", width),
            ("CRTC_H", height),
        ] {
            put(self.primary.into(), name, self.card.property(self.primary, name)?.0, value)?;
        }
        Ok(request)
    }

    /// Waits for the event of a flip; its CRTC and number.
    fn flipped(&self) -> Result<(crtc::Handle, u32)> {
        for event in self.card.receive_events()? {
            if let Event::PageFlip(flip) = event {
                return Ok((flip.crtc, flip.frame));
            }
        }
        bail!("an event that is none of a flip")
    }
}

/// That something is refused, and with which error.
fn refused<T>(what: &str, errors: &[Errno], result: io::Result<T>) -> Result<()> {
    match result {
        Ok(_) => bail!("{what} was accepted"),
        Err(error) => {
            let known = errors.iter().any(|one| error.raw_os_error() == Some(one.raw_os_error()));
            ensure!(known, "{what}: {error}, expected {errors:?}");
            Ok(())
        }
    }
}

/// A framebuffer as somebody describes it.
struct Described<'a> {
    buffer: &'a DumbBuffer,
    size: (u32, u32),
    pitch: u32,
    format: DrmFourcc,
}

impl PlanarBuffer for Described<'_> {
    fn size(&self) -> (u32, u32) {
        self.size
    }
    fn format(&self) -> DrmFourcc {
        self.format
    }
    fn modifier(&self) -> Option<DrmModifier> {
        None
    }
    fn pitches(&self) -> [u32; 4] {
        [self.pitch, 0, 0, 0]
    }
    fn handles(&self) -> [Option<BufferHandle>; 4] {
        [Some(self.buffer.handle()), None, None, None]
    }
    fn offsets(&self) -> [u32; 4] {
        [0; 4]
    }
}

fn addfb_basic(screen: &Screen) -> Result<()> {
    let picture = screen.picture((256, 128), |_, _| [0; 4])?;
    let buffer = &picture.buffer;
    let add = |size, pitch, format| {
        let described = Described { buffer, size, pitch, format };
        screen.card.add_planar_framebuffer(&described, FbCmd2Flags::empty())
    };
    let xrgb = DrmFourcc::Xrgb8888;
    let invalid = &[Errno::INVAL, Errno::RANGE, Errno::NOENT];
    refused("no pitch", invalid, add((256, 128), 0, xrgb))?;
    refused("a pitch that is too small", invalid, add((256, 128), 256 * 4 - 1, xrgb))?;
    refused("no width", invalid, add((0, 128), 1024, xrgb))?;
    refused("no height", invalid, add((256, 0), 1024, xrgb))?;
    refused("a width beyond all", invalid, add((1 << 20, 128), 1 << 22, xrgb))?;
    refused("three planes in one buffer", invalid, add((256, 128), 1024, DrmFourcc::Yuv420))?;
    let good = add((256, 128), 1024, xrgb)?;
    screen.card.destroy_framebuffer(good)?;
    refused("removing it twice", &[Errno::NOENT], screen.card.destroy_framebuffer(good))?;
    screen.remove(&picture)
}

/// Linux' driver does not compare a framebuffer with its buffer (a known failure of igt's `bo-too-small`):
/// the device has to refuse to show it, and goes on.
fn bo_too_small(screen: &Screen) -> Result<()> {
    let size = screen.size()?;
    let small = screen.picture((64, 64), |_, _| [0; 4])?;
    let described =
        Described { buffer: &small.buffer, size, pitch: size.0 * 4, format: DrmFourcc::Xrgb8888 };
    if let Ok(id) = screen.card.add_planar_framebuffer(&described, FbCmd2Flags::empty()) {
        let mode = screen.modes[0];
        let _ =
            screen.card.set_crtc(screen.crtc, Some(id), (0, 0), &[screen.connector], Some(mode));
        screen.card.destroy_framebuffer(id)?;
    }
    let good = screen.picture(size, |_, _| [0; 4])?;
    screen.show(&good, screen.modes[0])?;
    screen.remove(&small)?;
    screen.remove(&good)
}

fn getfb(screen: &Screen) -> Result<()> {
    let picture = screen.picture((256, 128), |_, _| [0; 4])?;
    let info = screen.card.get_framebuffer(picture.id)?;
    ensure!(info.size() == (256, 128) && info.bpp() == 32 && info.depth() == 24, "{info:?}");
    ensure!(info.pitch() == picture.buffer.pitch() && info.buffer().is_some(), "{info:?}");
    let planar = screen.card.get_planar_framebuffer(picture.id)?;
    ensure!(planar.pixel_format() == DrmFourcc::Xrgb8888, "{planar:?}");
    let id = picture.id;
    screen.remove(&picture)?;
    refused("a picture that is gone", &[Errno::NOENT], screen.card.get_framebuffer(id))?;
    let crtc = from_u32(screen.crtc.into()).context("a CRTC's number")?;
    refused("a CRTC as a picture", &[Errno::NOENT], screen.card.get_framebuffer(crtc))
}

fn prop_blob(screen: &Screen) -> Result<()> {
    let value: [u8; 68] = std::array::from_fn(|at| at as u8);
    let blob = property::RawValue::from(screen.card.create_property_blob(&value)?);
    ensure!(screen.card.get_property_blob(blob)? == value, "a blob has changed");
    let other = Card::open()?;
    ensure!(other.get_property_blob(blob)? == value, "others read something else");
    refused("another's blob", &[Errno::PERM], other.destroy_property_blob(blob))?;
    screen.card.destroy_property_blob(blob)?;
    let gone = &[Errno::NOENT];
    refused("a blob that is gone", gone, screen.card.get_property_blob(blob))?;
    refused("ending it twice", gone, screen.card.destroy_property_blob(blob))?;
    let empty: [u8; 0] = [];
    refused("an empty blob", &[Errno::INVAL], screen.card.create_property_blob(&empty))
}

fn properties(screen: &Screen) -> Result<()> {
    let mut count = 0;
    let sets = [
        screen.card.get_properties(screen.connector)?,
        screen.card.get_properties(screen.crtc)?,
        screen.card.get_properties(screen.primary)?,
    ];
    for set in &sets {
        for (&handle, &value) in set {
            let info = screen.card.get_property(handle)?;
            ensure!(!info.name().is_empty(), "{info:?}");
            if let property::ValueType::Blob = info.value_type()
                && value != 0
            {
                screen.card.get_property_blob(value).with_context(|| format!("{info:?}"))?;
            }
            count += 1;
        }
    }
    ensure!(count > 20, "only {count} properties");
    let (edid, value) = screen.card.property(screen.connector, "EDID")?;
    let bytes = screen.card.get_property_blob(value)?;
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let begins = bytes.starts_with(&[0, 255, 255, 255, 255, 255, 255, 0]);
    ensure!(begins && bytes.len() % 128 == 0 && sum == 0, "no EDID: {bytes:?}");
    let set = screen.card.set_property(screen.connector, edid, 0);
    refused("an EDID of one's own", &[Errno::INVAL, Errno::ACCESS], set)
}

fn atomic(screen: &Screen) -> Result<()> {
    let size = screen.size()?;
    let picture = screen.picture(size, |_, _| [0x40; 4])?;
    let mode = property::RawValue::from(screen.card.create_property_blob(&screen.modes[0])?);
    let modeset = AtomicCommitFlags::ALLOW_MODESET;
    let test = modeset | AtomicCommitFlags::TEST_ONLY;
    let good = screen.request(picture.id, mode, size)?;
    screen.card.atomic_commit(test, good.clone()).context("a test")?;
    screen.card.atomic_commit(modeset, good.clone()).context("in earnest")?;
    // Nothing of a refused request is done.
    let refuse = |what, object: u32, name: &str, value| {
        let mut request = good.clone();
        let property = match object {
            object if object == u32::from(screen.crtc) => {
                screen.card.property(screen.crtc, name)?
            }
            _ => screen.card.property(screen.primary, name)?,
        };
        let object = NonZeroU32::new(object).context("an object")?;
        request.add_raw_property(object, property.0, value);
        let errors = &[Errno::INVAL, Errno::RANGE, Errno::NOSPC, Errno::NOENT];
        refused(what, errors, screen.card.atomic_commit(modeset, request))
    };
    let (crtc, primary) = (screen.crtc.into(), screen.primary.into());
    refuse("a CRTC as a picture", primary, "FB_ID", u64::from(crtc))?;
    refuse("a picture without a CRTC", primary, "CRTC_ID", 0)?;
    refuse("more than the picture has", primary, "SRC_W", u64::from(size.0 + 1) << 16)?;
    refuse("a picture that is enlarged", primary, "CRTC_W", u64::from(size.0 * 2))?;
    refuse("a blob that is no mode", crtc, "MODE_ID", u64::from(primary))?;
    let bytes = [0_u8; 68];
    let bad = property::RawValue::from(screen.card.create_property_blob(&bytes)?);
    refuse("a mode of nothing", crtc, "MODE_ID", bad)?;
    refuse("half alive", crtc, "ACTIVE", 2)?;
    let now = screen.card.get_crtc(screen.crtc)?;
    ensure!(now.mode() == Some(screen.modes[0]), "{now:?}");
    ensure!(screen.card.property(screen.primary, "FB_ID")?.1 == u64::from(u32::from(picture.id)));
    // The same without waiting, with an event.
    let flags = AtomicCommitFlags::NONBLOCK | AtomicCommitFlags::PAGE_FLIP_EVENT;
    for _ in 0..20 {
        screen.card.atomic_commit(flags, good.clone())?;
        ensure!(screen.flipped()?.0 == screen.crtc, "another's event");
    }
    // A client that did not say that it knows what that is.
    let other = Card::open()?;
    screen.card.release_master_lock()?;
    other.acquire_master_lock()?;
    let errors = &[Errno::OPNOTSUPP, Errno::INVAL];
    let unknown = refused("without the capability", errors, other.atomic_commit(test, good));
    drop(other);
    screen.card.acquire_master_lock()?;
    unknown?;
    screen.remove(&picture)
}

fn setmode(screen: &Screen) -> Result<()> {
    // The first and the last few of dozens.
    let (first, last) = (screen.modes.iter().take(4), screen.modes.iter().rev().take(4));
    for mode in first.chain(last) {
        let (width, height) = mode.size();
        let picture =
            screen.picture((width.into(), height.into()), |x, y| [x as u8, y as u8, 0, 0])?;
        screen.show(&picture, *mode).with_context(|| format!("{mode:?}"))?;
        let now = screen.card.get_crtc(screen.crtc)?;
        ensure!(now.mode() == Some(*mode) && now.framebuffer().is_some(), "{now:?}");
        screen.remove(&picture)?;
    }
    let small = screen.picture((64, 64), |_, _| [0; 4])?;
    let errors = &[Errno::NOSPC, Errno::INVAL];
    refused("a picture that is too small", errors, screen.show(&small, screen.modes[0]))?;
    screen.remove(&small)?;
    screen.card.set_crtc(screen.crtc, None, (0, 0), &[], None)?;
    ensure!(screen.card.get_crtc(screen.crtc)?.mode().is_none(), "it does not go off");
    Ok(())
}

fn flip(screen: &Screen) -> Result<()> {
    let size = screen.size()?;
    let pictures = [screen.picture(size, |_, _| [0; 4])?, screen.picture(size, |_, _| [0xff; 4])?];
    screen.show(&pictures[0], screen.modes[0])?;
    let flip = |crtc, picture| screen.card.page_flip(crtc, picture, PageFlipFlags::EVENT, None);
    for round in 0..60 {
        flip(screen.crtc, pictures[1 - round % 2].id).with_context(|| format!("flip {round}"))?;
        let (crtc, _) = screen.flipped()?;
        ensure!(crtc == screen.crtc, "another's event");
    }
    let small = screen.picture((64, 64), |_, _| [0; 4])?;
    let errors = &[Errno::NOSPC, Errno::INVAL];
    refused("a picture that is too small", errors, flip(screen.crtc, small.id))?;
    let no_crtc = from_u32(u32::from(screen.primary)).context("a plane's number")?;
    refused("a plane as a CRTC", &[Errno::NOENT], flip(no_crtc, pictures[0].id))?;
    refused("a flip with a flag that nobody knows", &[Errno::INVAL], {
        let flags = PageFlipFlags::from_bits_retain(1 << 30);
        screen.card.page_flip(screen.crtc, pictures[0].id, flags, None)
    })?;
    screen.remove(&small)?;
    // A picture that is shown goes: the screen is switched off.
    pictures.iter().try_for_each(|picture| screen.remove(picture))?;
    ensure!(screen.card.get_crtc(screen.crtc)?.framebuffer().is_none(), "it stays to be seen");
    Ok(())
}

#[expect(deprecated, reason = "what legacy means")]
fn cursor_legacy(screen: &Screen) -> Result<()> {
    let size = screen.size()?;
    let [width, height] = [DriverCapability::CursorWidth, DriverCapability::CursorHeight]
        .map(|capability| screen.card.get_driver_capability(capability));
    ensure!((width?, height?) == (64, 64), "a pointer of another size");
    let pictures = [screen.picture(size, |_, _| [0; 4])?, screen.picture(size, |_, _| [0xff; 4])?];
    screen.show(&pictures[0], screen.modes[0])?;
    let mut cursor = screen.card.create_dumb_buffer((64, 64), DrmFourcc::Argb8888, 32)?;
    screen.card.map_dumb_buffer(&mut cursor)?.as_mut().fill(0x80);
    screen.card.set_cursor2(screen.crtc, Some(&cursor), (3, 5))?;
    // Between flips that are under way, beyond all edges, and with another image now and then.
    for round in 0..120_i32 {
        let next = pictures[round as usize % 2].id;
        screen.card.page_flip(screen.crtc, next, PageFlipFlags::EVENT, None)?;
        for step in 0..4 {
            let place = (round * 29 % 2400 - 300 + step, round * 17 % 1600 - 300);
            screen.card.move_cursor(screen.crtc, place)?;
        }
        if round % 10 == 0 {
            screen.card.map_dumb_buffer(&mut cursor)?.as_mut().fill(round as u8);
            screen.card.set_cursor2(screen.crtc, Some(&cursor), (round % 64, 5))?;
        }
        screen.flipped()?;
    }
    let large = screen.card.create_dumb_buffer((256, 256), DrmFourcc::Argb8888, 32)?;
    // Linux' driver takes it although it says 64 × 64; the device refuses it and goes on.
    let _ = screen.card.set_cursor2(screen.crtc, Some(&large), (0, 0));
    screen.card.set_cursor2(screen.crtc, Some(&cursor), (1, 2))?;
    screen.card.set_cursor2::<DumbBuffer>(screen.crtc, None, (0, 0))?;
    screen.card.destroy_dumb_buffer(large)?;
    screen.card.destroy_dumb_buffer(cursor)?;
    pictures.iter().try_for_each(|picture| screen.remove(picture))
}

fn universal_plane(screen: &Screen) -> Result<()> {
    let all = screen.card.plane_handles()?.len();
    let crtcs = screen.card.resource_handles()?.crtcs().len();
    ensure!(all == 2 * crtcs, "{all} planes for {crtcs} CRTCs");
    let old = Card::open()?;
    ensure!(old.plane_handles()?.is_empty(), "overlays that nobody has promised");
    // The plane alone: off, and on again.
    let size = screen.size()?;
    let picture = screen.picture(size, |_, _| [0x20; 4])?;
    screen.show(&picture, screen.modes[0])?;
    let whole = (0, 0, size.0, size.1);
    let place = (0, 0, size.0 << 16, size.1 << 16);
    let set =
        |picture| screen.card.set_plane(screen.primary, screen.crtc, picture, 0, whole, place);
    set(Some(picture.id))?;
    set(None).or_else(|error| match error.raw_os_error() {
        // The driver's choice: its CRTC needs the plane.
        Some(number) if number == Errno::INVAL.raw_os_error() => Ok(()),
        _ => Err(error),
    })?;
    set(Some(picture.id))?;
    let part = (0, 0, (size.0 + 1) << 16, size.1 << 16);
    let beyond =
        screen.card.set_plane(screen.primary, screen.crtc, Some(picture.id), 0, whole, part);
    refused("more than the picture has", &[Errno::NOSPC, Errno::INVAL, Errno::RANGE], beyond)?;
    screen.remove(&picture)
}

fn dirtyfb(screen: &Screen) -> Result<()> {
    let size = screen.size()?;
    let picture = screen.picture(size, |_, _| [0x20; 4])?;
    screen.show(&picture, screen.modes[0])?;
    for at in 0..20 {
        let clips = [ClipRect::new(at, at, at + 30, at + 1), ClipRect::new(0, 2, 1, 3)];
        screen.card.dirty_framebuffer(picture.id, &clips)?;
    }
    let beyond = [ClipRect::new(0, 0, u16::MAX, u16::MAX)];
    screen.card.dirty_framebuffer(picture.id, &beyond)?;
    let id = picture.id;
    screen.remove(&picture)?;
    refused("a picture that is gone", &[Errno::NOENT], screen.card.dirty_framebuffer(id, &beyond))
}

fn lease(screen: &Screen) -> Result<()> {
    let objects = [u32::from(screen.connector), screen.crtc.into(), screen.primary.into()];
    let objects = objects.map(NonZeroU32::new).into_iter().flatten().collect::<Vec<_>>();
    let (id, fd) = screen.card.create_lease(&objects, 0)?;
    let lessee = Card(File::from(fd));
    let seen = lessee.resource_handles()?;
    ensure!(seen.crtcs() == [screen.crtc] && seen.connectors() == [screen.connector], "{seen:?}");
    ensure!(screen.card.list_lessees()?.contains(&id), "nobody has it");
    let again = screen.card.create_lease(&objects, 0);
    refused("the same to somebody else", &[Errno::BUSY], again)?;
    screen.card.revoke_lease(id)?;
    ensure!(lessee.resource_handles()?.crtcs().is_empty(), "it was not taken back");
    Ok(())
}

type Check = fn(&Screen) -> Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("kms_addfb_basic", addfb_basic),
    ("kms_addfb_basic@bo-too-small", bo_too_small),
    ("kms_getfb", getfb),
    ("kms_prop_blob", prop_blob),
    ("kms_properties", properties),
    ("kms_atomic", atomic),
    ("kms_setmode", setmode),
    ("kms_flip", flip),
    ("kms_cursor_legacy", cursor_legacy),
    ("kms_universal_plane", universal_plane),
    ("kms_dirtyfb", dirtyfb),
    ("kms_lease", lease),
];

/// Four quarters: red, green, blue, white.
fn show(screen: &Screen) -> Result<()> {
    let size = screen.size()?;
    let picture = screen.picture(size, |x, y| match (x < size.0 / 2, y < size.1 / 2) {
        (true, true) => [0, 0, 0xff, 0],
        (false, true) => [0, 0xff, 0, 0],
        (true, false) => [0xff, 0, 0, 0],
        (false, false) => [0xff; 4],
    })?;
    screen.show(&picture, screen.modes[0])?;
    println!("shown");
    loop {
        std::thread::park();
    }
}

fn main() -> Result<ExitCode> {
    let screen = Screen::open()?;
    if std::env::args().nth(1).as_deref() == Some("show") {
        show(&screen)?;
    }
    let mut failed = false;
    for (name, check) in CHECKS {
        match check(&screen) {
            Ok(()) => println!("{name}: pass"),
            Err(error) => {
                println!("{name}: FAIL: {error:#}");
                failed = true;
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
