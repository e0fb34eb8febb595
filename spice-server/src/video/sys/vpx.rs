//! libvpx (`vpx/vpx_encoder.h`, `vpx/vp8cx.h`): encoders for VP8.

use std::{
    ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void},
    ptr::{self, NonNull},
};

use super::{
    super::{I420, VideoError, encoder::Coder},
    Library, check_size,
};

/// The versions of libvpx whose headers were compared: name, and the number under which
/// `vpx_codec_enc_init_ver` knows the structures below (`VPX_ENCODER_ABI_VERSION`), which differ in
/// what follows the fields used here. 1.11 and 1.12; 1.13; 1.14 and 1.15.0; 1.15.1; 1.16.
const VPX_VERSIONS: [(&CStr, &[c_int]); 5] = [
    (c"libvpx.so.12", &[39]),
    (c"libvpx.so.11", &[37]),
    (c"libvpx.so.9", &[36, 34]),
    (c"libvpx.so.8", &[30]),
    (c"libvpx.so.7", &[25]),
];
const VPX_CODEC_OK: c_int = 0;
const VPX_CODEC_ABI_MISMATCH: c_int = 3;
const VPX_IMG_FMT_I420: c_int = 0x102;
const VPX_DL_REALTIME: c_ulong = 1;
const VPX_RC_CBR: c_int = 1;
const VPX_KF_DISABLED: c_int = 0;
/// `enum vp8e_enc_control_id`.
const VP8E_SET_CPUUSED: c_int = 13;
const VP8E_SET_STATIC_THRESHOLD: c_int = 17;
const VP8E_SET_TOKEN_PARTITIONS: c_int = 18;
const VP8E_GET_LAST_QUANTIZER_64: c_int = 20;
const VP8E_SET_MAX_INTRA_BITRATE_PCT: c_int = 26;

/// `vpx_codec_enc_cfg_t` up to `kf_max_dist`, the same in all of [`VPX_VERSIONS`], and room for what
/// follows.
#[repr(C)]
#[derive(Clone, Copy)]
struct VpxConfig {
    usage: c_uint,
    threads: c_uint,
    profile: c_uint,
    width: c_uint,
    height: c_uint,
    bit_depth: c_int,
    input_bit_depth: c_uint,
    timebase: [c_int; 2],
    error_resilient: c_uint,
    pass: c_int,
    lag_in_frames: c_uint,
    dropframe_threshold: c_uint,
    resize_allowed: c_uint,
    scaled: [c_uint; 2],
    resize_thresholds: [c_uint; 2],
    end_usage: c_int,
    twopass_stats_in: [usize; 2],
    firstpass_mb_stats_in: [usize; 2],
    /// Kilobits per second.
    target_bitrate: c_uint,
    min_quantizer: c_uint,
    max_quantizer: c_uint,
    undershoot_percent: c_uint,
    overshoot_percent: c_uint,
    /// Milliseconds of the target bit rate.
    buffer: c_uint,
    buffer_initial: c_uint,
    buffer_optimal: c_uint,
    twopass: [c_uint; 4],
    keyframe_mode: c_int,
    keyframe_distance: [c_uint; 2],
    /// About 400 bytes in the versions known.
    rest: [u64; 512],
}

impl VpxConfig {
    const EMPTY: Self = Self {
        usage: 0,
        threads: 0,
        profile: 0,
        width: 0,
        height: 0,
        bit_depth: 0,
        input_bit_depth: 0,
        timebase: [0; 2],
        error_resilient: 0,
        pass: 0,
        lag_in_frames: 0,
        dropframe_threshold: 0,
        resize_allowed: 0,
        scaled: [0; 2],
        resize_thresholds: [0; 2],
        end_usage: 0,
        twopass_stats_in: [0; 2],
        firstpass_mb_stats_in: [0; 2],
        target_bitrate: 0,
        min_quantizer: 0,
        max_quantizer: 0,
        undershoot_percent: 0,
        overshoot_percent: 0,
        buffer: 0,
        buffer_initial: 0,
        buffer_optimal: 0,
        twopass: [0; 4],
        keyframe_mode: 0,
        keyframe_distance: [0; 2],
        rest: [0; 512],
    };

    /// Whether the library filled it as these versions do: its fields are where they are thought to
    /// be.
    fn has_known_layout(&self) -> bool {
        (self.width, self.height, self.timebase) == (320, 240, [1, 30])
            && (self.target_bitrate, self.min_quantizer, self.max_quantizer) == (256, 4, 63)
            && (self.undershoot_percent, self.overshoot_percent) == (100, 100)
            && (self.buffer, self.buffer_initial, self.buffer_optimal) == (6000, 4000, 5000)
            && (self.keyframe_mode, self.keyframe_distance) == (1, [0, 128])
            && self.rest.last() == Some(&0)
    }
}

/// `vpx_codec_ctx_t` is 56 bytes.
type VpxContext = [u64; 32];
/// `vpx_image_t` is about 140 bytes.
type VpxImage = [u64; 64];

/// `vpx_codec_cx_pkt_t` with a frame.
#[repr(C)]
struct VpxPacket {
    kind: c_int,
    data: *const u8,
    size: usize,
    time: i64,
    duration: c_ulong,
}

functions! { VpxFunctions:
    interface = "vpx_codec_vp8_cx": extern "C" fn() -> *const c_void;
    config_default = "vpx_codec_enc_config_default":
        unsafe extern "C" fn(*const c_void, *mut VpxConfig, c_uint) -> c_int;
    init = "vpx_codec_enc_init_ver":
        unsafe extern "C" fn(*mut VpxContext, *const c_void, *const VpxConfig, c_long, c_int) -> c_int;
    config_set = "vpx_codec_enc_config_set":
        unsafe extern "C" fn(*mut VpxContext, *const VpxConfig) -> c_int;
    control = "vpx_codec_control_": unsafe extern "C" fn(*mut VpxContext, c_int, ...) -> c_int;
    wrap = "vpx_img_wrap":
        unsafe extern "C" fn(*mut VpxImage, c_int, c_uint, c_uint, c_uint, *const u8) -> *mut VpxImage;
    encode = "vpx_codec_encode":
        unsafe extern "C" fn(*mut VpxContext, *const VpxImage, i64, c_ulong, c_long, c_ulong) -> c_int;
    packet = "vpx_codec_get_cx_data":
        unsafe extern "C" fn(*mut VpxContext, *mut *const c_void) -> *const VpxPacket;
    destroy = "vpx_codec_destroy": unsafe extern "C" fn(*mut VpxContext) -> c_int;
    version = "vpx_codec_version_str": extern "C" fn() -> *const c_char;
}

/// libvpx, of a version that is known.
pub(crate) struct Vpx {
    functions: VpxFunctions,
    abi: c_int,
    defaults: VpxConfig,
    version: String,
    _library: Library,
}

impl Vpx {
    /// Loads the newest version that is there.
    pub(crate) fn load() -> Result<Self, VideoError> {
        Library::newest(&VPX_VERSIONS, Self::check)
    }

    fn check(library: Library, abis: &&[c_int]) -> Result<Self, VideoError> {
        let functions = VpxFunctions::load(&library)?;
        let text = (functions.version)();
        let version = match text.is_null() {
            true => "of an unknown version".to_owned(),
            // SAFETY: not null: a string of the library that stays.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        };
        let mut defaults = VpxConfig::EMPTY;
        // SAFETY: the library writes one structure, far smaller than what there is.
        let result =
            unsafe { (functions.config_default)((functions.interface)(), &raw mut defaults, 0) };
        if result != VPX_CODEC_OK || !defaults.has_known_layout() {
            return Err(VideoError::Version);
        }
        // The library refuses structures of another version than its own.
        let vpx = Self { functions, abi: 0, defaults, version, _library: library };
        for abi in *abis {
            match VpxEncoder::start(&vpx, *abi, &defaults) {
                Ok(_) => return Ok(Self { abi: *abi, ..vpx }),
                Err(VPX_CODEC_ABI_MISMATCH) => {}
                Err(code) => return Err(VideoError::Library { what: "a first encoder", code }),
            }
        }
        Err(VideoError::Version)
    }

    /// As the library says it.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }
}

/// Settings of a VP8 encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VpxSettings {
    pub(crate) size: (u32, u32),
    pub(crate) threads: u32,
    /// Kilobits per second.
    pub(crate) rate: u32,
    /// Quantizers, 0 to 63; small is good.
    pub(crate) quantizers: (u32, u32),
    /// 0 to 16; large is fast.
    pub(crate) speed: u32,
    /// Largest key frame in percent of a frame's share of the rate.
    pub(crate) key_percent: u32,
}

/// A VP8 encoder.
pub(crate) struct VpxEncoder {
    functions: VpxFunctions,
    /// The library keeps pointers into it.
    context: Box<VpxContext>,
    config: Box<VpxConfig>,
    /// Size it was made for.
    largest: (u32, u32),
}

// SAFETY: an encoder may be used by one thread after the other; the library has no thread-local state
// and `&mut self` keeps threads apart.
unsafe impl Send for VpxEncoder {}

impl VpxEncoder {
    pub(crate) fn new(vpx: &Vpx, settings: VpxSettings) -> Result<Self, VideoError> {
        let VpxSettings { size, quantizers, .. } = settings;
        let config = VpxConfig {
            threads: settings.threads,
            width: size.0,
            height: size.1,
            // Milliseconds.
            timebase: [1, 1000],
            // Nothing is lost on the way, and nothing may wait for later frames.
            error_resilient: 0,
            lag_in_frames: 0,
            dropframe_threshold: 0,
            resize_allowed: 0,
            end_usage: VPX_RC_CBR,
            target_bitrate: settings.rate,
            min_quantizer: quantizers.0,
            max_quantizer: quantizers.1,
            undershoot_percent: 100,
            overshoot_percent: 10,
            buffer: 400,
            buffer_initial: 200,
            buffer_optimal: 200,
            keyframe_mode: VPX_KF_DISABLED,
            ..vpx.defaults
        };
        let failed = |code| VideoError::Library { what: "an encoder", code };
        let mut encoder = Self::start(vpx, vpx.abi, &config).map_err(failed)?;
        let speed = c_int::try_from(settings.speed).unwrap_or(0);
        let partitions = settings.threads.max(1).ilog2().min(3);
        // Negative: this speed, whatever the clock says.
        encoder.control(VP8E_SET_CPUUSED, -speed)?;
        encoder.control(VP8E_SET_STATIC_THRESHOLD, 1)?;
        encoder.control(VP8E_SET_TOKEN_PARTITIONS, partitions as c_int)?;
        encoder.control(VP8E_SET_MAX_INTRA_BITRATE_PCT, settings.key_percent as c_int)?;
        Ok(encoder)
    }

    fn start(vpx: &Vpx, abi: c_int, config: &VpxConfig) -> Result<Self, c_int> {
        let functions = vpx.functions;
        let (mut context, config) = (Box::new([0; 32]), Box::new(*config));
        let (interface, flags) = ((functions.interface)(), 0);
        // SAFETY: the structures live as long as the encoder, are larger than the library's, and it
        // refuses to read them if `abi` is not its own.
        let result = unsafe {
            (functions.init)(&raw mut *context, interface, &raw const *config, flags, abi)
        };
        let largest = (config.width, config.height);
        // After a failure there is nothing to destroy.
        if result == VPX_CODEC_OK {
            Ok(Self { functions, context, config, largest })
        } else {
            Err(result)
        }
    }

    fn control(&mut self, what: c_int, value: c_int) -> Result<(), VideoError> {
        // SAFETY: the encoder is alive, and all controls used here take one int.
        let code = unsafe { (self.functions.control)(&raw mut *self.context, what, value) };
        check(code, "a setting")
    }

    /// The configuration has changed.
    fn reconfigure(&mut self, what: &'static str) -> Result<(), VideoError> {
        // SAFETY: encoder and configuration are alive, and of the size and version it was made with.
        let code =
            unsafe { (self.functions.config_set)(&raw mut *self.context, &raw const *self.config) };
        check(code, what)
    }
}

impl Coder for VpxEncoder {
    /// Of the frames the library finds out by their times.
    fn set_rate(&mut self, bits: f64, _: f64) -> Result<(), VideoError> {
        self.config.target_bitrate = (bits / 1000.0) as c_uint;
        self.reconfigure("a bit rate")
    }

    fn set_size(&mut self, size: (u32, u32)) -> Result<(), VideoError> {
        if (self.config.width, self.config.height) == size {
            return Ok(());
        }
        check_size(size, self.largest)?;
        (self.config.width, self.config.height) = size;
        self.reconfigure("a size")
    }

    fn code(
        &mut self,
        picture: &I420,
        time: i64,
        duration: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), VideoError> {
        let (width, height) = (self.config.width, self.config.height);
        if picture.size() != (width, height) {
            return Err(VideoError::Size);
        }
        let mut image: VpxImage = [0; 64];
        // SAFETY: the structure is larger than the library's. With an alignment of 1 and an
        // even size it takes the planes to follow one another without gaps: what `I420` holds,
        // which lives until the call to `encode` below is over.
        let wrapped = unsafe {
            let bytes = picture.bytes().as_ptr();
            (self.functions.wrap)(&raw mut image, VPX_IMG_FMT_I420, width, height, 1, bytes)
        };
        if wrapped.is_null() {
            return Err(VideoError::Size);
        }
        // SAFETY: encoder, image and its pixels are alive; the library keeps no pointer to them.
        let code = unsafe {
            (self.functions.encode)(
                &raw mut *self.context,
                &raw const image,
                time,
                duration.max(1).into(),
                0,
                VPX_DL_REALTIME,
            )
        };
        check(code, "a frame")?;
        let mut cursor = ptr::null();
        loop {
            // SAFETY: the encoder is alive, and the cursor is null or what the last call made it.
            let packet =
                unsafe { (self.functions.packet)(&raw mut *self.context, &raw mut cursor) };
            // SAFETY: null, or a packet that stays until the next call of `encode`.
            let Some(packet) = (unsafe { packet.as_ref() }) else { return Ok(()) };
            // Kind 0 is a frame.
            if packet.kind == 0 && !packet.data.is_null() {
                // SAFETY: a frame's packet names its bytes, which stay as long as it.
                out.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(packet.data, packet.size)
                });
            }
        }
    }

    fn quantizer(&mut self) -> Option<u32> {
        let mut value: c_int = 0;
        // SAFETY: the encoder is alive; this control takes a pointer to an int and writes to it.
        let code = unsafe {
            let value = &raw mut value;
            (self.functions.control)(&raw mut *self.context, VP8E_GET_LAST_QUANTIZER_64, value)
        };
        check(code, "its quantizer").ok().and_then(|()| u32::try_from(value).ok())
    }
}

impl Drop for VpxEncoder {
    fn drop(&mut self) {
        // SAFETY: the encoder was started and is used no more.
        unsafe { (self.functions.destroy)(&raw mut *self.context) };
    }
}

fn check(code: c_int, what: &'static str) -> Result<(), VideoError> {
    if code == VPX_CODEC_OK { Ok(()) } else { Err(VideoError::Library { what, code }) }
}
