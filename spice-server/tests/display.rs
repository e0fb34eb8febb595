//! Pictures, compared pixel by pixel in spicy-screenshot and spice-gtk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    net::SocketAddr,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use spice_server::{
    ClientPolicy, Codec, FrameSource, MemoryFrame, Rect, SurfaceInfo, VideoCodec, VideoCodecs,
};
use support::{
    Client, CountedFrame, PATIENCE, SlowLine, eventually, hash, have, have_client,
    picture::{self, Event, Mode, Picture, Scene, content::Canvas},
    setup,
};

/// What spicy-screenshot saw: width, height, RGB bytes.
fn screenshot(address: SocketAddr, options: &[&str]) -> Option<(u32, u32, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shot.ppm");
    let status = Command::new("timeout")
        .args(["120", "spicy-screenshot", "-h", &address.ip().to_string()])
        .args(["-p", &address.port().to_string(), "-o"])
        .arg(&file)
        .args(options)
        .output()
        .unwrap()
        .status;
    if !status.success() {
        return None;
    }
    let bytes = std::fs::read(file).unwrap();
    let mut header = bytes.splitn(4, |byte| byte.is_ascii_whitespace());
    assert_eq!(header.next(), Some(&b"P6"[..]));
    let mut number =
        || -> u32 { std::str::from_utf8(header.next().unwrap()).unwrap().parse().unwrap() };
    let (width, height) = (number(), number());
    let pixels = header.next().unwrap().strip_prefix(b"255\n").unwrap();
    Some((width, height, pixels.to_vec()))
}

fn rgb(pixels: &[u8]) -> Vec<u8> {
    pixels.chunks_exact(4).flat_map(|p| [p[2], p[1], p[0]]).collect()
}

#[test]
fn screenshots_are_exact() {
    if !have("spicy-screenshot") {
        return;
    }
    for size in [(1024, 768), (1366, 768), (333, 201), (1, 1)] {
        let setup = setup(|builder| builder);
        let pixels = setup.show_background(size);
        let (width, height, got) = screenshot(setup.address(), &[]).unwrap();
        assert_eq!((width, height), size);
        assert!(got == rgb(&pixels), "{size:?}: pixels differ");
    }
}

#[test]
fn every_compression_is_exact() {
    if !have_client() {
        return;
    }
    let size = (700, 500);
    let setup = setup(|builder| builder);
    setup.show_background(size);
    let mut client = Client::connect_ready(&setup);
    let sent = || setup.server.status().clients[0].bytes_sent;
    let mut change = 0u8;
    for (compression, is_raw) in [("off", true), ("lz4", false), ("off", true), ("auto-glz", false)]
    {
        client.tell(&format!("compression {compression}"));
        // The wish and the pictures race; a picture that differs everywhere tells who won.
        eventually(compression, || {
            change = change.wrapping_add(17);
            let mut pixels = picture::background(size.0, size.1);
            pixels.iter_mut().for_each(|byte| *byte ^= change);
            let before = sent();
            setup.show(size, pixels.clone());
            let wanted = hash(&pixels);
            eventually("the picture", || client.pixels() == wanted);
            (sent() - before > u64::from(size.0 * size.1 * 4)) == is_raw
        });
    }
}

#[test]
fn a_picture_made_on_demand_is_the_first_thing_seen() {
    if !have("spicy-screenshot") {
        return;
    }
    let setup = setup(|builder| builder);
    let size = (320, 240);
    setup.show(size, vec![0xff; 320 * 240 * 4]);
    setup.display.release_frame();
    let address = setup.address();
    let pixels = picture::background(size.0, size.1);
    let client = std::thread::spawn(move || screenshot(address, &[]));
    // The server waits a second for the picture that it asks for.
    setup.event("a viewer", |event| (event == Event::Viewers(true)).then_some(()));
    setup.show(size, pixels.clone());
    let (_, _, got) = client.join().unwrap().unwrap();
    assert!(got == rgb(&pixels));
}

#[test]
fn noise_is_exact() {
    if !have("spicy-screenshot") {
        return;
    }
    let setup = setup(|builder| builder);
    let mut picture = Picture::new(setup.display.clone(), Mode::Noise, (800, 600));
    picture.tick();
    let snapshot = setup.display.snapshot().unwrap();
    let (_, _, got) = screenshot(setup.address(), &[]).unwrap();
    assert!(got == rgb(&snapshot.pixels));
}

#[test]
fn a_wrong_password_shows_nothing_and_the_right_one_works() {
    if !have("spicy-screenshot") {
        return;
    }
    let password = spice_server::Secret::new("open sesame").unwrap();
    let setup = setup(|builder| builder.password(Some(password)));
    setup.show_background((64, 64));
    assert!(screenshot(setup.address(), &["-w", "open sesam"]).is_none());
    assert!(screenshot(setup.address(), &[]).is_none());
    assert!(screenshot(setup.address(), &["-w", "open sesame"]).is_some());
}

#[test]
fn updates_arrive_exactly_whatever_is_damaged() {
    if !have_client() {
        return;
    }
    let size = (500, 400);
    let setup = setup(|builder| builder);
    let mut pixels = setup.show_background(size);
    let mut client = Client::connect_ready(&setup);
    assert_eq!(client.pixels(), hash(&pixels));
    let mut state = 3u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    for _ in 0..100 {
        let rect = Rect::new(random(500), random(400), 1 + random(150), 1 + random(150));
        let rect = rect.clipped(size.0, size.1);
        let colour = random(1 << 24).to_le_bytes();
        for y in rect.y..rect.bottom() {
            for x in rect.x..rect.right() {
                let at = (y * size.0 + x) as usize * 4;
                pixels[at..at + 4].copy_from_slice(&colour);
            }
        }
        let frame = MemoryFrame::new(size.0, size.1, pixels.clone()).unwrap();
        setup.display.present(Arc::new(frame), &[rect]);
    }
    let wanted = hash(&pixels);
    eventually("the client shows the last frame", || client.pixels() == wanted);
}

#[test]
fn damage_that_changed_nothing_is_not_sent() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    let size = (1024, 768);
    let mut pixels = setup.show_background(size);
    let mut client = Client::connect_ready(&setup);
    let sent = || setup.server.status().clients[0].bytes_sent;
    let whole = sent();
    for step in 0..50u8 {
        pixels[(400 * 1024 + 500) * 4] = step;
        setup.show(size, pixels.clone());
        let wanted = hash(&pixels);
        eventually("the changed pixel", || client.pixels() == wanted);
    }
    assert!(sent() - whole < whole, "{} bytes for 50 pixels", sent() - whole);
}

#[test]
fn other_sizes_and_no_picture() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    let mut client = Client::connect_ready(&setup);
    assert_eq!(client.pixels(), hash(&[0; 1024 * 768 * 4]), "black before the first frame");
    for size in [(640, 480), (1920, 1080), (200, 100)] {
        let pixels = setup.show_background(size);
        let wanted = hash(&pixels);
        client.event("new size", |e| {
            (e["ev"] == "primary" && e["width"] == size.0 && e["height"] == size.1).then_some(())
        });
        eventually("the new picture", || client.pixels() == wanted);
    }
    setup.display.set_surface(None);
    let black = hash(&[0; 200 * 100 * 4]);
    eventually("black", || client.pixels() == black);
    setup.display.set_surface(Some(SurfaceInfo { width: 200, height: 100 }));
    let wanted = hash(&setup.show_background((200, 100)));
    eventually("the picture again", || client.pixels() == wanted);
}

#[test]
fn a_client_resizes_the_display_without_any_guest_agent() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.max_size(1000, 700));
    setup.show_background((640, 480));
    let mut client = Client::connect_ready(&setup);
    for (asked, wanted) in [((803, 601), (800, 601)), ((5000, 5000), (1000, 700))] {
        client.tell(&format!("monitor {} {}", asked.0, asked.1));
        let got = setup.event("resize", |event| match event {
            Event::Resize(0, monitor) => Some((monitor.width, monitor.height)),
            _ => None,
        });
        assert_eq!(got, wanted);
        setup.show_background(got);
        client.event("new size", |e| {
            (e["ev"] == "primary" && e["width"] == got.0 && e["height"] == got.1).then_some(())
        });
    }
}

#[test]
fn the_pointer_has_its_shape_and_colours() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background((640, 480));
    let client = Client::connect_ready(&setup);
    let cursor = picture::cursor();
    setup.display.set_cursor(cursor.clone());
    let shape = client.named("cursor");
    assert_eq!((&shape["width"], &shape["height"]), (&24.into(), &24.into()));
    assert_eq!(shape["hot"], serde_json::json!([12, 12]));
    let pixels = client.named("cursor-pixels");
    // RGBA with straight alpha: opaque red, and half transparent half red.
    assert_eq!(pixels["middle"], serde_json::json!([255, 0, 0, 255]));
    assert_eq!(pixels["rim"], serde_json::json!([128, 0, 0, 128]));
    setup.display.hide_cursor();
    client.named("cursor-hide");
    setup.display.set_cursor(cursor);
    assert_eq!(client.named("cursor-pixels")["middle"], serde_json::json!([255, 0, 0, 255]));
}

#[test]
fn an_idle_picture_costs_no_bytes() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background((640, 480));
    let client = Client::connect_ready(&setup);
    let sent = || setup.server.status().clients.iter().map(|c| c.bytes_sent).sum::<u64>();
    let mut before = sent();
    // The handshake may still be ending; after that a whole second without a byte must come soon. (That
    // nothing happens is no event one could wait for.)
    eventually("a second without traffic", || {
        std::thread::sleep(Duration::from_secs(1));
        let now = sent();
        std::mem::replace(&mut before, now) == now
    });
    drop(client);
}

#[test]
fn a_stalled_client_costs_a_bounded_amount_and_nobody_else_anything() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.client_policy(ClientPolicy::Shared));
    let size = (800, 600);
    setup.show_background(size);
    let stalled = Client::connect_ready(&setup);
    let mut healthy = Client::connect_ready(&setup);
    let stop = Command::new("kill").args(["-STOP", &stalled.pid().to_string()]).status().unwrap();
    assert!(stop.success());
    let dropped = Arc::new(AtomicUsize::new(0));
    let mut noise = vec![0u8; (size.0 * size.1 * 4) as usize];
    let mut state = 1u64;
    let frames = 60;
    for _ in 0..frames {
        for bytes in noise.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.copy_from_slice(&state.to_le_bytes());
        }
        let inner = MemoryFrame::new(size.0, size.1, noise.clone()).unwrap();
        let frame = CountedFrame { inner, dropped: dropped.clone() };
        setup.display.present(Arc::new(frame), &[Rect::new(0, 0, size.0, size.1)]);
        let wanted = hash(&noise);
        eventually("the healthy client goes on", || healthy.pixels() == wanted);
    }
    // Only the newest frame is kept for the stalled one: 115 MB were shown.
    eventually("old frames are let go", || dropped.load(Ordering::SeqCst) == frames - 1);
    let status = setup.server.status();
    let bytes: Vec<u64> = status.clients.iter().map(|c| c.bytes_sent).collect();
    assert!(bytes[0] < 16 << 20, "the stalled client was sent {bytes:?}");
    assert!(bytes[1] > 100 << 20, "the healthy client was sent {bytes:?}");
    let go = Command::new("kill").args(["-CONT", &stalled.pid().to_string()]).status().unwrap();
    assert!(go.success());
    let mut stalled = stalled;
    let wanted = hash(&noise);
    eventually("the stalled client catches up", || stalled.pixels() == wanted);
}

/// Who makes frames on demand makes none in vain, and the last one is seen.
#[test]
fn frames_are_asked_for_as_viewers_take_them() {
    struct Asked(Mutex<Sender<()>>);
    impl FrameSource for Asked {
        fn want_next(&self) {
            let _ = self.0.lock().unwrap().send(());
        }
    }
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    let size = (800, 600);
    let (sender, asked) = channel();
    setup.display.set_source(Arc::new(Asked(Mutex::new(sender))));
    setup.show_background(size);
    let mut client = Client::connect_ready(&setup);
    let mut state = 1u64;
    let mut noise = || {
        let mut pixels = vec![0u8; (size.0 * size.1 * 4) as usize];
        for bytes in pixels.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.copy_from_slice(&state.to_le_bytes());
        }
        pixels
    };
    let mut last = noise();
    for _ in 0..5 {
        asked.recv_timeout(PATIENCE).expect("a viewer that shows everything wants more");
        last = noise();
        setup.show(size, last.clone());
    }
    let wanted = hash(&last);
    eventually("the last frame", || client.pixels() == wanted);
    let signal = |name: &str| {
        let pid = client.pid().to_string();
        assert!(Command::new("kill").args([name, pid.as_str()]).status().unwrap().success());
    };
    let blocked = || {
        let status = setup.server.status();
        let displays = status.clients.iter().flat_map(|client| &client.displays);
        displays.map(|display| display.blocked).sum::<u64>()
    };
    // It takes nothing any more: after what fits into buffers nobody asks.
    signal("-STOP");
    let (mut frames, mut in_vain) = (0, 0);
    while in_vain < 10 {
        // Those that were on their way.
        while asked.try_recv().is_ok() {}
        let before = blocked();
        last = noise();
        setup.show(size, last.clone());
        let mut wanted = false;
        eventually("it asks, or is blocked", || {
            wanted |= asked.try_recv().is_ok();
            wanted || blocked() > before
        });
        // Blocked twice: what the client had answered before it stopped has been read.
        assert!(!wanted || in_vain < 2, "it asks for a client that takes nothing");
        in_vain = if wanted { 0 } else { in_vain + 1 };
        frames += 1;
        assert!(frames < 100, "{frames} frames for a client that takes none");
    }
    assert!(asked.try_recv().is_err(), "it asks for a client that takes nothing");
    signal("-CONT");
    // Having been blocked is no reason to ask less from now on: every frame that is shown makes it ask for one more.
    for _ in 0..5 {
        let wanted = hash(&last);
        eventually("the last frame", || client.pixels() == wanted);
        asked.recv_timeout(PATIENCE).expect("it wants more again, after each frame");
        while asked.try_recv().is_ok() {}
        last = noise();
        setup.show(size, last.clone());
    }
    let wanted = hash(&last);
    eventually("the last frame", || client.pixels() == wanted);
}

#[test]
fn a_slow_line_gets_photographs_lossy_first_and_exact_when_they_rest() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    let size = (640, 480);
    setup.show_background(size);
    let line = SlowLine::to(setup.address(), 2_000_000);
    let mut client = Client::connect(line.address);
    client.wait_ready();
    // Like a photograph: neighbours differ a little, and no two rows are alike.
    let mut state = 9u32;
    let mut photo = move || {
        let mut pixels = Vec::new();
        for y in 0..size.1 {
            for x in 0..size.0 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let grain = (state >> 28) as u8;
                pixels.extend_from_slice(&[(x / 3) as u8 + grain, (y / 2) as u8 ^ grain, grain, 0]);
            }
        }
        pixels
    };
    eventually("a JPEG", || {
        show_and_wait(&setup, size, photo());
        line.jpeg_seen.load(Ordering::SeqCst)
    });
    let last = photo();
    setup.show(size, last.clone());
    let wanted = hash(&last);
    eventually("the exact picture", || client.pixels() == wanted);
}

/// Presents a picture and waits until the viewer has looked at it.
fn show_and_wait(setup: &support::Setup, size: (u32, u32), pixels: Vec<u8>) {
    let seen = || {
        let status = setup.server.status();
        let displays = status.clients.iter().flat_map(|client| &client.displays);
        displays.map(|display| display.frames + display.unchanged_frames).sum::<u64>()
    };
    let before = seen();
    setup.show(size, pixels);
    eventually("the viewer's look at it", || seen() > before);
}

fn codec(setup: &support::Setup, codec: Codec) -> u64 {
    let status = setup.server.status();
    let stats = status.clients.iter().flat_map(|client| &client.displays);
    stats.flat_map(|d| &d.codecs).filter(|c| c.codec == codec).map(|c| c.messages).sum()
}

#[test]
fn what_scrolls_pans_or_is_dragged_moves_and_is_exact() {
    if !have_client() {
        return;
    }
    let size = (800, 600);
    for mode in [Mode::Scroll, Mode::Window, Mode::Pan] {
        let setup = setup(|builder| builder);
        let mut scene = Scene::new(mode, size);
        scene.next(0);
        setup.show(size, scene.pixels().to_vec());
        let mut client = Client::connect_ready(&setup);
        let sent = || setup.server.status().clients[0].bytes_sent;
        let first = sent();
        // One after the other, so that no two become one on a busy machine.
        for step in 1..=40 {
            scene.next(step);
            setup.show(size, scene.pixels().to_vec());
            let wanted = hash(scene.pixels());
            eventually("the next picture", || client.pixels() == wanted);
        }
        assert!(codec(&setup, Codec::Move) >= 10, "{mode:?}");
        // 40 pictures for less than the price of ten.
        assert!(sent() - first < first * 10, "{mode:?}: {first}, then {}", sent() - first);
    }
}

#[test]
fn what_comes_back_costs_nothing_and_is_exact() {
    if !have_client() {
        return;
    }
    let size = (640, 480);
    let setup = setup(|builder| builder);
    let pages: Vec<_> = (1..3)
        .map(|seed| {
            let mut page = Canvas::new(size.0, size.1, 0xff_ffff);
            page.text(seed);
            page.pixels
        })
        .collect();
    setup.show(size, pages[0].clone());
    let mut client = Client::connect_ready(&setup);
    for page in pages.iter().cycle().take(12) {
        setup.show(size, page.clone());
        let wanted = hash(page);
        eventually("the page", || client.pixels() == wanted);
    }
    eventually("kept images", || {
        for page in &pages {
            setup.show(size, page.clone());
            let wanted = hash(page);
            eventually("the page", || client.pixels() == wanted);
            // What changes all the time is not kept.
            std::thread::sleep(Duration::from_millis(250));
        }
        codec(&setup, Codec::Cached) > 0
    });
}

#[test]
fn a_film_on_a_thin_line_is_a_stream_and_exact_when_it_stops() {
    if !have_client() {
        return;
    }
    let size = (640, 480);
    let mjpeg = VideoCodecs::Prefer(VideoCodec::Mjpeg);
    let setup = setup(|builder| builder.video_codecs(mjpeg));
    let mut scene = Scene::new(Mode::Film, size);
    setup.show(size, scene.pixels().to_vec());
    let line = SlowLine::to(setup.address(), 1_500_000);
    let mut client = Client::connect(line.address);
    client.wait_ready();
    let mut step = 0;
    eventually("stream frames", || {
        for _ in 0..20 {
            step += 1;
            scene.next(step);
            show_and_wait(&setup, size, scene.pixels().to_vec());
        }
        codec(&setup, Codec::Stream) > 20
    });
    let wanted = hash(scene.pixels());
    eventually("the exact picture", || client.pixels() == wanted);
    // And it stays: what is drawn from now on is not covered by a frame of the stream that comes late.
    let mut pixels = scene.pixels().to_vec();
    for step in 1..=20u8 {
        pixels[..400].fill(step * 10);
        setup.show(size, pixels.clone());
        let wanted = hash(&pixels);
        eventually("the picture with a line", || client.pixels() == wanted);
    }
}

#[test]
fn text_is_never_lossy() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    let size = (640, 480);
    let mut pixels = setup.show_background(size);
    let line = SlowLine::to(setup.address(), 500_000);
    let mut client = Client::connect(line.address);
    client.wait_ready();
    for _ in 0..60 {
        pixels.rotate_left(4 * 640);
        show_and_wait(&setup, size, pixels.clone());
    }
    let wanted = hash(&pixels);
    eventually("the last picture", || client.pixels() == wanted);
    assert!(!line.jpeg_seen.load(Ordering::SeqCst));
}

#[test]
fn remote_viewer_shows_the_picture_in_its_window() {
    if !(have("remote-viewer") && have("Xvfb") && have("xdotool") && have("import")) {
        return;
    }
    let setup = setup(|builder| builder);
    let size = (640, 480);
    let pixels = rgb(&setup.show_background(size));
    let screen = support::xvfb::Xvfb::start(1000, 800).unwrap();
    let mut viewer = Command::new("remote-viewer")
        .args(["--spice-disable-audio", &format!("spice://{}", setup.address())])
        .env("DISPLAY", &screen.display)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.ppm");
    let row = &pixels[..(size.0 * 3) as usize];
    eventually("the picture on the screen", || {
        let import = Command::new("import")
            .args(["-window", "root", "-depth", "8"])
            .arg(&file)
            .env("DISPLAY", &screen.display)
            .output()
            .unwrap();
        let root = std::fs::read(&file).unwrap_or_default();
        // The picture's rows lie 1000 pixels apart somewhere on the screen.
        let found = root.windows(row.len()).position(|window| window == row);
        import.status.success()
            && found.is_some_and(|at| {
                pixels.chunks_exact(row.len()).enumerate().all(|(y, row)| {
                    let start = at + y * 1000 * 3;
                    root.get(start..start + row.len()) == Some(row)
                })
            })
    });
    let _ = viewer.kill();
    let _ = viewer.wait();
}
