//! Frames and cursors.

use gpu_protocol::{format::PixelFormat, virtio::kind};
use zerocopy::IntoBytes;

use super::{commands::*, rig::*, sink::*, *};

#[test]
fn the_first_picture_appears_bit_exact() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let screen = Resource::new(1, 1280, 800);
        rig.create(&screen);
        rig.draw(&screen, screen.whole(), noise(1));
        rig.show(1, screen.whole());
        rig.transfer(&screen, screen.whole());
        rig.flush(&screen, screen.whole());
        rig.expect_picture(&screen, screen.whole(), "the first picture");
    }
}

#[test]
fn partial_damage_odd_sizes_and_formats() {
    for back_end in ALL {
        for format in PixelFormat::ALL {
            println!("{back_end:?} {format:?}");
            // QEMU's back end sends the pixels of other formats as they are, and those of a part
            // from the wrong place.
            if back_end == BackEnd::Qemu && format != PixelFormat::B8G8R8X8 {
                continue;
            }
            let Some(mut rig) = Rig::new(back_end) else { continue };
            let screen = Resource { format, ..Resource::new(1, 641, 479) };
            rig.create(&screen);
            let part = match back_end {
                BackEnd::Qemu | BackEnd::Null => screen.whole(),
                BackEnd::Shared | BackEnd::Plain => Rect::new(3, 5, 631, 471),
            };
            rig.show(1, part);
            rig.paint(&screen, screen.whole(), noise(1));
            rig.expect_picture(&screen, part, "the whole picture");
            let rects = [
                Rect::new(0, 0, 1, 1),
                Rect::new(2, 4, 2, 2),
                Rect::new(633, 475, 8, 4),
                Rect::new(100, 0, 7, 479),
                Rect::new(0, 77, 641, 3),
                Rect::new(5, 5, 300, 200),
            ];
            for (seed, rect) in rects.into_iter().enumerate() {
                rig.paint(&screen, rect, noise(seed as u32 + 2));
                rig.expect_picture(&screen, part, "the damaged part");
            }
            // Many flushes at once: whatever is merged on the way, the end is the same.
            for seed in 0..60 {
                let rect = Rect::new(seed * 9, seed * 7, 40, 30);
                rig.paint(&screen, rect, noise(seed + 100));
            }
            rig.expect_picture(&screen, part, "many small changes");
        }
    }
}

#[test]
fn resize_in_the_middle_of_a_frame() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let sizes = [(800, 600), (1366, 768), (799, 601), (64, 48), (1280, 1024)];
        for (index, (width, height)) in sizes.into_iter().enumerate() {
            let screen = Resource::new(1 + (index as u32 % 2), width, height);
            rig.create(&screen);
            rig.show(screen.id, screen.whole());
            // The frames of this flush may still be under way when the next size comes.
            rig.paint(&screen, screen.whole(), noise(index as u32));
            if index % 2 == 0 {
                rig.expect_picture(&screen, screen.whole(), "a new size");
            }
            if index > 0 {
                rig.unref(2 - (index as u32 % 2));
            }
            rig.paint(&screen, screen.whole(), noise(index as u32 + 9));
            rig.expect_picture(&screen, screen.whole(), "a new size");
        }
        rig.show(0, Rect::default());
        rig.sink.wait("the scanout is off", |seen| seen.size.is_none().then_some(()));
    }
}

#[test]
fn page_flips_between_two_buffers() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let buffers = [Resource::new(1, 320, 200), Resource::new(2, 320, 200)];
        buffers.iter().for_each(|buffer| rig.create(buffer));
        for flip in 0..20 {
            let buffer = &buffers[flip as usize % 2];
            rig.draw(buffer, buffer.whole(), noise(flip / 4));
            rig.transfer(buffer, buffer.whole());
            rig.show(buffer.id, buffer.whole());
            rig.flush(buffer, buffer.whole());
        }
        rig.expect_picture(&buffers[1], buffers[1].whole(), "the last buffer");
        let scanouts = rig.sink.seen.lock().unwrap().scanouts;
        assert!(scanouts <= 2, "a flip is no change of size: {scanouts}");
    }
}

#[test]
fn cursor_image_hot_spot_and_moves() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let image = Resource { format: PixelFormat::B8G8R8A8, ..Resource::new(3, 64, 64) };
        rig.create(&image);
        // Upside down or mirrored would show.
        rig.draw(&image, image.whole(), |x, y| [x as u8, y as u8, (x * y) as u8, 255 - x as u8]);
        rig.transfer(&image, image.whole());
        let ok = rig.cursor(kind::UPDATE_CURSOR, 10, 20, 3, (5, 9));
        assert_eq!(ok, kind::OK_NODATA);
        let pixels = image.read(&rig.driver.memory);
        rig.sink.wait("the cursor's image", |seen| {
            (seen.cursor == Some(CursorSeen { hot: (5, 9), pixels: pixels.clone() })
                && seen.cursor_pos == (10, 20))
                .then_some(())
        });
        for step in 0..200 {
            rig.cursor(kind::MOVE_CURSOR, step * 3, step * 2, 3, (5, 9));
        }
        rig.sink.wait("the cursor's last place", |seen| {
            (seen.cursor_pos == (597, 398) && seen.cursor.is_some()).then_some(())
        });
        rig.cursor(kind::UPDATE_CURSOR, 0, 0, 0, (0, 0));
        // QEMU's back end sends an image without any opaque pixel instead.
        rig.sink.wait("no cursor", |seen| {
            let cursor = seen.cursor.as_ref();
            cursor.is_none_or(|cursor| cursor.pixels.iter().all(|b| *b == 0)).then_some(())
        });
    }
}

#[test]
fn two_flushes_while_no_slot_is_free() {
    let mut rig = Rig::new(BackEnd::Shared).unwrap();
    let screen = Resource::new(1, 200, 100);
    rig.create(&screen);
    // Questions after the wishes of the rig: when they are answered, so are the wishes, and no
    // complete frame that was asked for takes a slot later.
    rig.display_info();
    rig.display_info();
    rig.show(1, screen.whole());
    rig.sink.seen.lock().unwrap().keep = true;
    for seed in 0..3 {
        rig.paint(&screen, screen.whole(), noise(seed));
        rig.expect_picture(&screen, screen.whole(), "a frame per slot");
    }
    assert_eq!(rig.sink.seen.lock().unwrap().kept.len(), 3);
    let before = rig.sink.seen.lock().unwrap().picture.clone();
    // Answered at once although nobody gives a slot back.
    rig.paint(&screen, Rect::new(1, 1, 10, 10), noise(50));
    rig.paint(&screen, Rect::new(150, 50, 20, 20), noise(51));
    {
        let mut seen = rig.sink.seen.lock().unwrap();
        assert_eq!(seen.frames, 3);
        assert_eq!(seen.picture, before, "frames that are held do not change");
        let mut again = vec![0; before.len()];
        let last = seen.kept.pop().unwrap();
        last.copy_rect(Rect::of_size(200, 100), &mut again, 800).unwrap();
        assert_eq!(again, before);
        seen.kept.push(last);
    }
    let freed = rig.sink.seen.lock().unwrap().kept.remove(0);
    drop(freed);
    rig.expect_picture(&screen, screen.whole(), "the newest state in one frame");
    let seen = rig.sink.seen.lock().unwrap();
    assert_eq!(seen.frames, 4);
    assert_eq!(seen.damage[3], [Rect::new(1, 1, 10, 10), Rect::new(150, 50, 20, 20)]);
    assert_eq!(seen.sequences, [1, 2, 3, 4]);
}

/// Read back is what somebody takes, the newest of it; the guest never waits, and the last picture comes.
#[test]
fn a_viewer_that_takes_its_time_gets_the_newest_picture() {
    let mut rig = Rig::new(BackEnd::Shared).unwrap();
    for blob in [false, true] {
        let screen = Resource::new(1 + u32::from(blob), 300, 200);
        if blob {
            rig.ok_raw(&screen.create_blob());
            rig.ok_raw(screen.show_blob(screen.whole()).as_bytes());
        } else {
            rig.create(&screen);
            rig.show(screen.id, screen.whole());
        }
        let paint = |rig: &mut Rig, seed| {
            rig.draw(&screen, screen.whole(), noise(seed));
            if !blob {
                rig.transfer(&screen, screen.whole());
            }
            rig.flush(&screen, screen.whole());
        };
        let frames = |rig: &Rig| rig.sink.seen.lock().unwrap().frames;
        paint(&mut rig, 1);
        rig.expect_picture(&screen, screen.whole(), "a picture");
        rig.handle.want_frames_one_by_one(0, 1000);
        // When a question after the wish is answered, so is the wish (one socket, in order); and a frame
        // comes before the answer to the next question.
        let settle = |rig: &mut Rig| {
            rig.display_info();
            rig.display_info();
        };
        settle(&mut rig);
        let before = frames(&rig);
        (2..12).for_each(|seed| paint(&mut rig, seed));
        settle(&mut rig);
        assert_eq!(frames(&rig), before, "nobody has taken one");
        rig.handle.want_next_frame(0);
        rig.expect_picture(&screen, screen.whole(), "the newest picture");
        settle(&mut rig);
        assert_eq!(frames(&rig), before + 1);
        // Asked for, however often, before there is one.
        (0..9).for_each(|_| rig.handle.want_next_frame(0));
        settle(&mut rig);
        assert_eq!(frames(&rig), before + 1);
        paint(&mut rig, 20);
        rig.expect_picture(&screen, screen.whole(), "the next picture");
        paint(&mut rig, 21);
        settle(&mut rig);
        assert_eq!(frames(&rig), before + 2);
        // Another size is seen by who asks for it, as are pictures of the next viewer.
        let small = Resource::new(3, 100, 50);
        rig.create(&small);
        rig.show(small.id, small.whole());
        rig.paint(&small, small.whole(), noise(22));
        rig.handle.want_next_frame(0);
        rig.expect_picture(&small, small.whole(), "another size");
        rig.paint(&small, small.whole(), noise(23));
        rig.new_viewer();
        rig.expect_picture(&small, small.whole(), "a new viewer's picture");
        rig.handle.want_frames(0, 1000);
        rig.unref(small.id);
    }
}

#[test]
fn nobody_looking_costs_nothing_and_the_next_look_is_complete() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let screen = Resource::new(1, 300, 200);
        rig.create(&screen);
        rig.show(1, screen.whole());
        rig.paint(&screen, screen.whole(), noise(1));
        rig.expect_picture(&screen, screen.whole(), "a picture");
        rig.handle.want_frames(0, 0);
        // A question after the wish: when it is answered, so is the wish (one socket, in order).
        rig.display_info();
        let frames = rig.sink.seen.lock().unwrap().frames;
        for seed in 0..5 {
            rig.paint(&screen, screen.whole(), noise(seed + 5));
        }
        rig.display_info();
        assert_eq!(rig.sink.seen.lock().unwrap().frames, frames);
        rig.handle.want_frames(0, 30);
        rig.expect_picture(&screen, screen.whole(), "the state of now");
        assert_eq!(rig.sink.seen.lock().unwrap().damage[frames as usize], [screen.whole()]);
        // Without any change of the guest's, a viewer that asks again gets a complete frame too.
        rig.handle.want_frames(0, 30);
        rig.sink.wait("a frame on request", |seen| {
            (seen.frames > frames + 1 && seen.damage.last() == Some(&vec![screen.whole()]))
                .then_some(())
        });
        // So does a viewer that is new.
        rig.new_viewer();
        rig.expect_picture(&screen, screen.whole(), "the state of now, for a new viewer");
    }
}
