//! Films with codecs that clients need GStreamer for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    collections::VecDeque,
    process::Command,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    time::{Duration, Instant},
};

use spice_server::{
    Codec, Error, EventSink, ServerEvent, SpiceServer, VideoChange, VideoCodec, VideoCodecs,
};
use support::{
    Client, PATIENCE, Setup, SlowLine, eventually, hash, have_client,
    picture::{Mode, Scene},
    setup,
};

const SIZE: (u32, u32) = (640, 480);
/// The time between two frames.
const FRAME: Duration = Duration::from_millis(33);
/// Bytes per second.
const LINE: u32 = 1_500_000;

/// A codec that needs something on both sides.
struct Needs {
    codec: VideoCodec,
    counter: Codec,
    /// What decodes it in spice-gtk.
    elements: &'static [&'static str],
    package: &'static str,
    /// Takes its decoders away from spice-gtk's player, which has said by then that it knows it.
    refused_by: &'static str,
}

const VP8: Needs = Needs {
    codec: VideoCodec::Vp8,
    counter: Codec::Vp8,
    elements: &["vp8dec"],
    package: "gstreamer1.0-plugins-good",
    refused_by: "vp8dec:NONE,vp8alphadecodebin:NONE,avdec_vp8:NONE",
};
const H264: Needs = Needs {
    codec: VideoCodec::H264,
    counter: Codec::H264,
    elements: &["h264parse", "openh264dec"],
    package: "gstreamer1.0-plugins-bad",
    refused_by: "openh264dec:NONE,avdec_h264:NONE",
};

impl Needs {
    /// Whether all of it is there; says that the test is skipped if not.
    fn are_there(&self) -> bool {
        have_client() && have_library(self.codec) && self.have_decoder()
    }

    fn have_decoder(&self) -> bool {
        let found = self.elements.iter().all(|element| {
            let found = Command::new("gst-inspect-1.0").args(["--exists", element]).status();
            found.is_ok_and(|status| status.success())
        });
        if !found {
            let Self { codec, package, .. } = self;
            eprintln!("SKIPPED: no decoder of {codec}: {package} or gstreamer1.0-tools is missing");
        }
        found
    }
}

/// Whether the server finds a codec's library.
fn have_library(codec: VideoCodec) -> bool {
    let builder = SpiceServer::builder().listen(([127, 0, 0, 1], 0).into());
    match builder.video_codecs(VideoCodecs::Prefer(codec)).start() {
        Ok(_) => true,
        Err(error @ Error::Video { .. }) => {
            eprintln!("SKIPPED: {error}: {}", std::error::Error::source(&error).unwrap());
            false
        }
        Err(error) => panic!("{error}"),
    }
}

fn messages(setup: &Setup, codec: Codec) -> u64 {
    let status = setup.server.status();
    let stats = status.clients.iter().flat_map(|client| &client.displays);
    stats.flat_map(|d| &d.codecs).filter(|c| c.codec == codec).map(|c| c.messages).sum()
}

/// A film of 30 frames per second.
struct Film {
    scene: Scene,
    step: u32,
    /// The newest frames, without grain.
    recent: VecDeque<Vec<u8>>,
    /// How much of it there is, and the newest frame with it.
    grain: i16,
    last: Vec<u8>,
}

impl Film {
    fn new(setup: &Setup) -> Self {
        let scene = Scene::new(Mode::Film, SIZE);
        let last = scene.pixels().to_vec();
        setup.show(SIZE, last.clone());
        Self { scene, step: 0, recent: VecDeque::new(), grain: 0, last }
    }

    /// The next frame.
    fn next(&mut self) {
        self.step += 1;
        self.scene.next(self.step);
        let clean = self.scene.pixels().to_vec();
        let mut state = self.step.wrapping_mul(0x9e37_79b9) | 1;
        let grain = |byte: &u8| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            let change = (state >> 17) as i16 % (self.grain + 1) - self.grain / 2;
            (i16::from(*byte) + change).clamp(0, 255) as u8
        };
        self.last = clean.iter().map(grain).collect();
        self.recent.truncate(90);
        self.recent.push_front(clean);
    }

    /// Plays until something is true.
    fn play(&mut self, setup: &Setup, what: &str, mut until: impl FnMut(&Self) -> bool) {
        let (mut due, end) = (Instant::now(), Instant::now() + PATIENCE);
        while !until(self) {
            assert!(Instant::now() < end, "{what} did not happen");
            self.next();
            // On a slow machine again, as frames that nobody gets to see: it is a film with the same rate.
            for _ in 0..8 {
                setup.show(SIZE, self.last.clone());
                due += FRAME;
                if due > Instant::now() {
                    break;
                }
            }
            due = due.max(Instant::now());
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }

    /// How near what the client shows comes to one of the newest frames, in dB; tries until it is so
    /// near.
    fn looks_like(&mut self, setup: &Setup, client: &mut Client, near: f64) -> f64 {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("picture");
        let (mut best, mut shots) = (0.0, 0);
        self.play(setup, "a good picture", |film| {
            client.tell(&format!("save {}", file.display()));
            client.named("saved");
            let shown = std::fs::read(&file).unwrap();
            best = film.recent.iter().map(|frame| psnr(frame, &shown)).fold(best, f64::max);
            shots += 1;
            best > near || shots > 40
        });
        best
    }

    /// Stops, and waits for the exact picture.
    fn stop(&self, client: &mut Client) {
        let wanted = hash(&self.last);
        eventually("the exact picture", || client.pixels() == wanted);
        // And it stays: no frame of the stream comes late.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(client.pixels(), wanted);
    }
}

/// Peak signal to noise ratio of two pictures in dB, of some of their pixels all over them: the film does
/// not wait.
fn psnr(a: &[u8], b: &[u8]) -> f64 {
    let (mut sum, mut count) = (0u64, 0u64);
    for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(4)).step_by(13) {
        for channel in 0..3 {
            sum += u64::from(a[channel].abs_diff(b[channel])).pow(2);
            count += 1;
        }
    }
    10.0 * (255.0 * 255.0 * count as f64 / sum.max(1) as f64).log10()
}

/// A server that goes on with what a machine is slow at.
fn patient_setup(codecs: VideoCodecs) -> Setup {
    setup(|builder| builder.video_codecs(codecs).keep_slow_codecs(true))
}

/// A film is sent with a codec, shown as it is, and exact when it stops.
fn is_shown(needs: &Needs) {
    if !needs.are_there() {
        return;
    }
    let setup = patient_setup(VideoCodecs::Prefer(needs.codec));
    let mut film = Film::new(&setup);
    let line = SlowLine::to(setup.address(), LINE);
    let mut client = Client::connect(line.address);
    client.wait_ready();
    film.play(&setup, "the codec", |_| messages(&setup, needs.counter) > 60);
    // MJPEG was there while the client built its decoder, and is gone. (It comes again where a busy machine
    // made the film stand still.)
    let (mut opener, mut before) = (0, 0);
    film.play(&setup, "it alone", |_| {
        let (mjpeg, coded) = (messages(&setup, Codec::Stream), messages(&setup, needs.counter));
        if mjpeg != opener {
            (opener, before) = (mjpeg, coded);
        }
        coded > before + 20
    });
    assert!(opener > 0);
    // What the client shows is one of the newest frames, in their colours.
    let best = film.looks_like(&setup, &mut client, 30.0);
    assert!(best > 30.0, "{best} dB");
    eprintln!("{best:.1} dB");
    film.stop(&mut client);
    assert!(messages(&setup, needs.counter) > 60);
}

#[test]
fn a_film_is_vp8_looks_right_and_is_exact_when_it_stops() {
    is_shown(&VP8);
}

#[test]
fn a_film_is_h264_looks_right_and_is_exact_when_it_stops() {
    is_shown(&H264);
}

/// What a codec cannot make small enough is sent in half its size, and looks right.
fn is_halved(needs: &Needs) {
    if !needs.are_there() {
        return;
    }
    let setup = patient_setup(VideoCodecs::Prefer(needs.codec));
    let mut film = Film::new(&setup);
    film.grain = 200;
    // So thin that also the few frames that a busy machine makes are too much for it.
    let line = SlowLine::to(setup.address(), LINE / 15);
    let mut client = Client::connect(line.address);
    client.wait_ready();
    let halved = |setup: &Setup| {
        let status = setup.server.status();
        status.clients.iter().flat_map(|c| &c.displays).map(|d| d.halved_streams).sum::<u64>()
    };
    film.play(&setup, "smaller frames", |_| halved(&setup) > 0);
    let before = messages(&setup, needs.counter);
    film.play(&setup, "more of them", |_| messages(&setup, needs.counter) > before + 30);
    let best = film.looks_like(&setup, &mut client, 18.0);
    assert!(best > 18.0, "{best} dB");
    eprintln!("{best:.1} dB");
    film.stop(&mut client);
}

#[test]
fn what_vp8_cannot_make_small_enough_is_halved_and_looks_right() {
    is_halved(&VP8);
}

#[test]
fn what_h264_cannot_make_small_enough_is_halved_and_looks_right() {
    is_halved(&H264);
}

/// Hands events to a channel.
struct Observer(Sender<ServerEvent>);

impl EventSink for Observer {
    fn event(&self, event: ServerEvent) {
        let _ = self.0.send(event);
    }
}

/// A client that says that it knows a codec and does not gets MJPEG.
fn falls_back(needs: &Needs) {
    if !needs.are_there() {
        return;
    }
    let (sender, events) = channel();
    let setup = setup(|builder| {
        let builder = builder.video_codecs(VideoCodecs::Prefer(needs.codec));
        builder.observer(Arc::new(Observer(sender))).keep_slow_codecs(true)
    });
    let mut film = Film::new(&setup);
    let line = SlowLine::to(setup.address(), LINE);
    // spice-gtk finds the decoder and says that it knows the codec; its player does not take it.
    let refusing = [("GST_PLUGIN_FEATURE_RANK", needs.refused_by)];
    let mut client = Client::with_environment(line.address, &refusing);
    client.wait_ready();
    let fallbacks = |setup: &Setup| setup.server.status().clients[0].displays[0].video_fallbacks;
    film.play(&setup, "a fall-back", |_| fallbacks(&setup) > 0);
    let before = messages(&setup, Codec::Stream);
    film.play(&setup, "MJPEG", |_| messages(&setup, Codec::Stream) > before + 20);
    assert!(messages(&setup, needs.counter) > 0, "it was tried");
    film.stop(&mut client);
    // The program has heard of both.
    let changes: Vec<_> = events
        .try_iter()
        .filter_map(|event| match event {
            ServerEvent::VideoCodec { display: 0, codec, why, .. } => Some((codec, why)),
            _ => None,
        })
        .collect();
    let wanted = [
        (Some(needs.codec), VideoChange::Chosen),
        (Some(VideoCodec::Mjpeg), VideoChange::NotShown),
    ];
    assert_eq!(changes, wanted);
    assert_eq!(setup.server.status().clients[0].displays[0].video_codec, Some(VideoCodec::Mjpeg));
}

#[test]
fn a_client_that_cannot_decode_vp8_after_all_gets_mjpeg() {
    falls_back(&VP8);
}

#[test]
fn a_client_that_cannot_decode_h264_after_all_gets_mjpeg() {
    falls_back(&H264);
}

#[test]
fn a_client_without_gstreamer_gets_mjpeg() {
    if !(have_client() && have_library(VideoCodec::Vp8)) {
        return;
    }
    let setup = patient_setup(VideoCodecs::Auto);
    let mut film = Film::new(&setup);
    let line = SlowLine::to(setup.address(), LINE);
    let folder = tempfile::tempdir().unwrap();
    let registry = folder.path().join("registry").display().to_string();
    let none = [("GST_PLUGIN_SYSTEM_PATH_1_0", "/nonexistent"), ("GST_REGISTRY", &*registry)];
    let mut client = Client::with_environment(line.address, &none);
    client.wait_ready();
    film.play(&setup, "MJPEG", |_| messages(&setup, Codec::Stream) > 20);
    assert_eq!(messages(&setup, Codec::Vp8) + messages(&setup, Codec::H264), 0);
    film.stop(&mut client);
}

#[test]
fn a_client_gets_the_codec_it_prefers() {
    if !(VP8.are_there() && H264.are_there()) {
        return;
    }
    // Numbers of `SpiceVideoCodecType`: MJPEG, VP8, H.264.
    for (order, codec) in [("1 2 3", Codec::Stream), ("3 2 1", Codec::H264)] {
        let setup = patient_setup(VideoCodecs::Auto);
        let mut film = Film::new(&setup);
        let line = SlowLine::to(setup.address(), LINE);
        let mut client = Client::connect(line.address);
        client.wait_ready();
        client.tell(&format!("codecs {order}"));
        film.play(&setup, order, |_| messages(&setup, codec) > 20);
        assert_eq!(messages(&setup, Codec::Vp8), 0, "{order}");
        film.stop(&mut client);
    }
}

#[test]
fn a_client_without_vp8_gets_h264() {
    if !(VP8.are_there() && H264.are_there()) {
        return;
    }
    let setup = patient_setup(VideoCodecs::Auto);
    let mut film = Film::new(&setup);
    let line = SlowLine::to(setup.address(), LINE);
    let mut client =
        Client::with_environment(line.address, &[("GST_PLUGIN_FEATURE_RANK", VP8.refused_by)]);
    client.wait_ready();
    film.play(&setup, "H.264", |_| messages(&setup, Codec::H264) > 40);
    let best = film.looks_like(&setup, &mut client, 30.0);
    assert!(best > 30.0, "{best} dB");
    film.stop(&mut client);
}

#[test]
fn no_streams_when_they_are_off() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.video_codecs(VideoCodecs::Off));
    let mut film = Film::new(&setup);
    let line = SlowLine::to(setup.address(), LINE);
    let mut client = Client::connect(line.address);
    client.wait_ready();
    film.play(&setup, "pictures", |film| film.step > 60);
    let streamed = [Codec::Stream, Codec::Vp8, Codec::H264].map(|codec| messages(&setup, codec));
    assert_eq!(streamed, [0; 3]);
    film.stop(&mut client);
}
