//! Regions that become video streams.

use super::*;

#[test]
fn films_become_streams_and_end_exactly() {
    let mut bench = Bench::new((800, 600), 9);
    bench.text(Rect::new(0, 0, 800, 600));
    bench.show(&[Rect::new(0, 0, 800, 600)]);
    bench.settle("the page");
    bench.line = Line { slow: false, rate: Some(2e6), ..bench.line };
    let film = Rect::new(90, 100, 480, 270);
    for _ in 0..40 {
        bench.noise(film);
        bench.show(&[Rect::new(0, 0, 800, 600)]);
        bench.steps(u32::MAX);
        bench.pass(33);
    }
    assert!(bench.sent(Codec::Stream) > 20, "{}", bench.sent(Codec::Stream));
    assert_eq!(bench.model.streams.values().copied().collect::<Vec<_>>(), [film]);
    // Somebody writes beside the film, and over its edge.
    for round in 0..10 {
        bench.noise(film);
        bench.text(Rect::new(560 + round, 90, 60, 40));
        bench.show(&[Rect::new(0, 0, 800, 600)]);
        bench.steps(u32::MAX);
        bench.pass(33);
    }
    bench.settle("the end");
    assert_eq!(bench.model.streams.len(), 0);
    // A client that cannot show streams gets pictures.
    for round in 0..60 {
        bench.noise(film);
        bench.show(&[film]);
        bench.steps(u32::MAX);
        bench.pass(33);
        if let Some(id) = bench.model.streams.keys().next().copied() {
            let (unique, drops) = (round, u32::MAX);
            let report = StreamReport { stream: id, unique, frames: 0, drops, last_delay: 0 };
            bench.encoder.report(report, bench.now);
            bench.deliver();
        }
    }
    assert_eq!(bench.stats.stats(0).streams, 2);
    bench.settle("pictures");
}

/// A picture on a thin line that may have films as VP8; `None` without libvpx.
fn with_vp8(size: (u32, u32)) -> Option<Bench> {
    with_codecs(size, VideoCodecs::Prefer(VideoCodec::Vp8))
}

/// A picture on a thin line that may have films with some codecs; `None` without their libraries.
fn with_codecs(size: (u32, u32), codecs: VideoCodecs) -> Option<Bench> {
    let wanted = if codecs == VideoCodecs::Auto { 3 } else { 2 };
    let video = Video::load(codecs).unwrap_or_default();
    if video.codecs().len() < wanted {
        eprintln!("SKIPPED: libvpx or OpenH264 is not installed");
        return None;
    }
    let mut bench = Bench::new(size, 9);
    bench.encoder.set_video(Arc::new(video), |_| true);
    bench.settle("black");
    bench.line = Line { slow: false, rate: Some(2e6), ..bench.line };
    Some(bench)
}

impl Bench {
    /// Plays so many frames of a film.
    fn play(&mut self, film: Rect, frames: usize) {
        for _ in 0..frames {
            self.noise(film);
            self.show(&[Rect::new(0, 0, self.size.0, self.size.1)]);
            self.steps(u32::MAX);
            self.pass(33);
        }
    }

    /// The codecs of the streams that run.
    fn running(&self) -> Vec<u8> {
        let mut codecs: Vec<u8> =
            self.model.streams.keys().map(|id| self.model.codecs[id]).collect();
        codecs.sort_unstable();
        codecs
    }

    /// The client says that it cannot show a codec.
    fn refuse(&mut self, codec: u8) {
        let mut ids = self.model.streams.keys().copied();
        let id = ids.find(|id| self.model.codecs[id] == codec).unwrap();
        let drops = u32::MAX;
        let report = StreamReport { stream: id, unique: 0, frames: 0, drops, last_delay: 0 };
        // Clients say it for every frame that was on its way.
        for _ in 0..3 {
            self.encoder.report(report, self.now);
        }
        self.deliver();
        assert!(!self.running().contains(&codec));
    }
}

#[test]
fn films_are_vp8_until_the_client_cannot_show_it() {
    let Some(mut bench) = with_vp8((801, 601)) else { return };
    // Of odd size, at an odd place.
    let film = Rect::new(91, 101, 485, 271);
    bench.play(film, 40);
    let rect = *bench.model.streams.values().next().unwrap();
    assert_eq!((rect.width % 2, rect.height % 2), (0, 0), "{rect:?}");
    assert_eq!(super::super::super::tiles::bounds(rect, film), rect);
    assert!(bench.model.frames[&VP8] > 20 && bench.sent(Codec::Vp8) > 20);
    assert_eq!(
        bench.encoder.take_news(),
        Some((Some(VideoCodec::Vp8), VideoChange::Chosen)),
        "the program is told"
    );
    bench.settle("the end of VP8");
    bench.play(film, 30);
    assert_eq!(bench.encoder.take_news(), None, "nothing new");
    let drawn = bench.model.kinds[&304];
    bench.refuse(VP8);
    // The film goes on where it was.
    assert_eq!(bench.running(), [MJPEG]);
    bench.play(film, 20);
    assert_eq!(bench.model.kinds[&304], drawn, "no pictures between");
    assert_eq!(bench.encoder.take_news(), Some((Some(VideoCodec::Mjpeg), VideoChange::NotShown)));
    bench.play(film, 20);
    bench.refuse(MJPEG);
    assert_eq!(bench.encoder.take_news(), Some((None, VideoChange::NotShown)));
    let before = bench.stats.stats(0).streams;
    bench.play(film, 40);
    let stats = bench.stats.stats(0);
    assert_eq!(stats.streams, before, "pictures only");
    assert_eq!((stats.video_codec, stats.video_fallbacks), (None, 2));
    bench.settle("pictures");
}

#[test]
fn a_client_that_cannot_show_vp8_gets_h264_then_mjpeg() {
    let Some(mut bench) = with_codecs((800, 600), VideoCodecs::Auto) else { return };
    let film = Rect::new(100, 100, 480, 320);
    bench.play(film, 60);
    assert_eq!(bench.running(), [VP8], "what costs less");
    for (refused, next) in [(VP8, H264), (H264, MJPEG)] {
        bench.refuse(refused);
        bench.play(film, 60);
        assert_eq!(bench.running(), [next]);
    }
    assert!(bench.model.frames[&H264] > 40 && bench.sent(Codec::H264) > 40);
    assert_eq!(bench.stats.stats(0).video_fallbacks, 2);
    bench.settle("the end");
}

#[test]
fn what_a_stream_may_take_decides_on_its_profile() {
    let films = [Rect::new(0, 0, 480, 320), Rect::new(576, 0, 480, 320)];
    // Enough for one film in the Baseline profile: 400 kbit/s.
    for (films, rate, profiles) in [
        (&films[..1], Some(6e4), &[66][..]),
        (&films, Some(6e4), &[77, 77]),
        (&films, Some(1.2e5), &[66, 66]),
        (&films, None, &[66, 66]),
    ] {
        let codecs = VideoCodecs::Prefer(VideoCodec::H264);
        let Some(mut bench) = with_codecs((1056, 320), codecs) else { return };
        bench.line.rate = rate;
        for _ in 0..15 {
            films.iter().for_each(|film| bench.noise(*film));
            bench.show(&[Rect::new(0, 0, 1056, 320)]);
            bench.steps(u32::MAX);
            bench.pass(33);
        }
        assert!(bench.model.profiles.values().eq(profiles), "{rate:?}: {:?}", bench.model.profiles);
    }
}

#[test]
fn a_host_that_is_too_slow_for_one_predictive_codec_is_too_slow_for_all() {
    let Some(mut bench) = with_codecs((800, 600), VideoCodecs::Auto) else { return };
    let film = Rect::new(100, 100, 480, 320);
    bench.encoder.frame_cost = Some(Duration::from_millis(50));
    bench.play(film, 220);
    assert_eq!(bench.running(), [MJPEG]);
    assert!(!bench.model.frames.contains_key(&H264), "no detour");
    bench.settle("the end");
}

#[test]
fn mjpeg_shows_a_film_until_the_client_can_have_built_a_decoder() {
    let Some(mut bench) = with_vp8((800, 600)) else { return };
    let film = Rect::new(100, 100, 480, 320);
    while bench.running().is_empty() {
        bench.play(film, 1);
    }
    // Half a second after the first frame.
    for frame in 0..14 {
        assert_eq!(bench.running(), [MJPEG, VP8], "frame {frame}");
        assert_eq!(bench.model.frames[&MJPEG], bench.model.frames[&VP8], "each frame twice");
        bench.play(film, 1);
    }
    bench.play(film, 4);
    assert_eq!(bench.running(), [VP8]);
    let mjpeg = bench.model.frames[&MJPEG];
    bench.play(film, 10);
    assert_eq!(bench.model.frames[&MJPEG], mjpeg);
    bench.settle("the end");
    // A client that cannot show MJPEG has nothing to look at meanwhile, and VP8 none the less.
    while bench.running().is_empty() {
        bench.play(film, 1);
    }
    bench.refuse(MJPEG);
    assert_eq!(bench.running(), [VP8]);
    bench.settle("its end");
    // One that ends early takes both with it.
    let mut bench = with_vp8((800, 600)).unwrap();
    while bench.running().is_empty() {
        bench.play(film, 1);
    }
    bench.settle("a short film");
    assert_eq!(bench.running(), []);
}

#[test]
fn a_host_that_is_too_slow_for_vp8_sends_smaller_frames_then_mjpeg_for_a_while() {
    let Some(mut bench) = with_vp8((800, 600)) else { return };
    let film = Rect::new(100, 100, 480, 320);
    bench.play(film, 60);
    assert_eq!(bench.running(), [VP8]);
    let whole = bench.encoder.streams[0].frame_size();
    let half = (whole.0 / 2, whole.1 / 2);
    bench.encoder.take_news();
    bench.encoder.frame_cost = Some(Duration::from_millis(50));
    bench.play(film, 100);
    assert_eq!(bench.running(), [VP8]);
    assert_eq!(bench.encoder.streams[0].frame_size(), half);
    // Not even these: the film goes on as MJPEG, whose frames stay small.
    bench.play(film, 100);
    assert_eq!(bench.running(), [MJPEG]);
    assert_eq!(bench.encoder.streams[0].frame_size(), half);
    assert_eq!(bench.encoder.take_news(), Some((Some(VideoCodec::Mjpeg), VideoChange::TooSlow)));
    bench.settle("slow");
    bench.encoder.frame_cost = Some(Duration::ZERO);
    bench.play(film, 40);
    assert_eq!(bench.running(), [MJPEG], "not at once");
    bench.settle("fast again");
    bench.pass(30_000);
    bench.play(film, 40);
    assert!(bench.running().contains(&VP8), "later");
    bench.settle("the end");
}

#[test]
fn what_vp8_cannot_make_small_enough_is_sent_in_half_its_size() {
    let Some(mut bench) = with_vp8((1280, 720)) else { return };
    // 4 Mbit/s for noise.
    bench.line.rate = Some(5e5);
    let film = Rect::new(0, 0, 1280, 720);
    bench.play(film, 60);
    assert_eq!(bench.encoder.streams[0].frame_size(), (640, 360));
    assert!(bench.running().contains(&VP8));
    bench.settle("the end");
}

#[test]
fn a_part_of_a_film_becomes_the_whole_of_it() {
    let mut bench = Bench::new((800, 600), 9);
    bench.settle("black");
    bench.line = Line { slow: false, rate: Some(2e6), ..bench.line };
    let (part, film) = (Rect::new(100, 100, 240, 300), Rect::new(100, 100, 600, 300));
    let mut was_stream = false;
    for frame in 0..90 {
        bench.noise(if frame < 15 { part } else { film });
        bench.show(&[Rect::new(0, 0, 800, 600)]);
        bench.steps(u32::MAX);
        bench.pass(33);
        assert!(bench.model.streams.len() <= 1);
        // The larger stream begins with the frame that the smaller one ends with.
        assert!(!was_stream || !bench.model.streams.is_empty(), "none at frame {frame}");
        was_stream = !bench.model.streams.is_empty();
    }
    assert!(bench.encoder.tiles.is_known());
    assert_eq!(bench.model.streams.values().copied().collect::<Vec<_>>(), [film]);
    assert_eq!(bench.stats.stats(0).streams, 2);
    bench.settle("the end");
}
