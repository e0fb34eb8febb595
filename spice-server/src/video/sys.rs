//! Libraries of video encoders as they are at run time: loaded with `dlopen`, every call behind a
//! safe method.
#![allow(
    unsafe_code,
    reason = "the C interface of libvpx (vpx/vpx_encoder.h) is called through dlopen"
)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_ulong, c_void},
    ptr::{self, NonNull},
};

use super::{
    I420, VideoError,
    convert::{self, Factors, TwoRows},
};

/// The conversion of two rows of pixels that suits this processor.
pub(super) fn two_rows() -> fn(&Factors, TwoRows<'_>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn with_avx2(factors: &Factors, rows: TwoRows<'_>) {
            convert::two_rows(factors, rows);
        }
        // SAFETY: the processor knows the instructions.
        return |factors, rows| unsafe { with_avx2(factors, rows) };
    }
    convert::two_rows
}

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
const VPX_EFLAG_FORCE_KF: c_long = 1;
const VPX_RC_CBR: c_int = 1;
const VPX_KF_DISABLED: c_int = 0;
const VPX_FRAME_IS_KEY: u32 = 1;
/// `enum vp8e_enc_control_id`.
const VP8E_SET_CPUUSED: c_int = 13;
const VP8E_SET_STATIC_THRESHOLD: c_int = 17;
const VP8E_SET_TOKEN_PARTITIONS: c_int = 18;
const VP8E_GET_LAST_QUANTIZER_64: c_int = 20;
const VP8E_SET_MAX_INTRA_BITRATE_PCT: c_int = 26;

/// A loaded library; never unloaded.
struct Library(NonNull<c_void>);

// SAFETY: the handle is only used for `dlsym`, which any thread may call.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    fn open(name: &CStr) -> Result<Self, VideoError> {
        // SAFETY: a valid string. The library's initialisers are trusted like the library.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        NonNull::new(handle).map(Self).ok_or_else(|| {
            // SAFETY: no preconditions.
            let error = unsafe { libc::dlerror() };
            let reason = match error.is_null() {
                true => "unknown reason".to_owned(),
                // SAFETY: not null: a string that stays until the next call of `dlerror`.
                false => unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned(),
            };
            VideoError::Missing { reason }
        })
    }

    fn symbol(&self, name: &'static str) -> Result<NonNull<c_void>, VideoError> {
        let text = CString::new(name).ok();
        let found = text.and_then(|text| {
            // SAFETY: the library is open and the name is a string.
            NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), text.as_ptr()) })
        });
        found.ok_or(VideoError::Symbol { name })
    }
}

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
    flags: u32,
}

/// Functions of a library: fields with their names there and their types.
macro_rules! functions {
    ($table:ident: $($field:ident = $name:literal: $type:ty;)*) => {
        #[derive(Clone, Copy)]
        struct $table {
            $($field: $type,)*
        }

        impl $table {
            fn load(library: &Library) -> Result<Self, VideoError> {
                Ok(Self {
                    $($field: {
                        let symbol = library.symbol($name)?;
                        // SAFETY: the function has this name and this type in the library's headers
                        // of all known versions.
                        unsafe { std::mem::transmute::<NonNull<c_void>, $type>(symbol) }
                    },)*
                })
            }
        }
    };
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
pub(super) struct Vpx {
    functions: VpxFunctions,
    abi: c_int,
    defaults: VpxConfig,
    version: String,
    _library: Library,
}

impl Vpx {
    /// Loads the newest version that is there.
    pub(super) fn load() -> Result<Self, VideoError> {
        let mut error = None;
        for (name, abis) in VPX_VERSIONS {
            match Library::open(name).and_then(|library| Self::check(library, abis)) {
                Ok(vpx) => return Ok(vpx),
                // One that is there and does not fit says more than one that is missing.
                Err(new) if error.is_none() || !matches!(new, VideoError::Missing { .. }) => {
                    error = Some(new);
                }
                Err(_) => {}
            }
        }
        Err(error.unwrap_or(VideoError::Version))
    }

    fn check(library: Library, abis: &[c_int]) -> Result<Self, VideoError> {
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
        for abi in abis {
            match VpxEncoder::start(&vpx, *abi, &defaults) {
                Ok(_) => return Ok(Self { abi: *abi, ..vpx }),
                Err(VPX_CODEC_ABI_MISMATCH) => {}
                Err(code) => return Err(VideoError::Library { what: "a first encoder", code }),
            }
        }
        Err(VideoError::Version)
    }

    /// As the library says it.
    pub(super) fn version(&self) -> &str {
        &self.version
    }
}

/// Settings of a VP8 encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VpxSettings {
    pub(super) size: (u32, u32),
    pub(super) threads: u32,
    /// Kilobits per second.
    pub(super) rate: u32,
    /// Quantizers, 0 to 63; small is good.
    pub(super) quantizers: (u32, u32),
    /// 0 to 16; large is fast.
    pub(super) speed: u32,
    /// Largest key frame in percent of a frame's share of the rate.
    pub(super) key_percent: u32,
}

/// A VP8 encoder.
pub(super) struct VpxEncoder {
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
    pub(super) fn new(vpx: &Vpx, settings: VpxSettings) -> Result<Self, VideoError> {
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

    /// Pictures of this even size from now on, none larger than the first; the next one is whole.
    pub(super) fn set_size(&mut self, size: (u32, u32)) -> Result<(), VideoError> {
        if (self.config.width, self.config.height) == size {
            return Ok(());
        }
        if size.0 == 0 || size.1 == 0 || size.0 > self.largest.0 || size.1 > self.largest.1 {
            return Err(VideoError::Size);
        }
        (self.config.width, self.config.height) = size;
        self.reconfigure("a size")
    }

    /// The quantizer of the last frame, 0 to 63.
    pub(super) fn quantizer(&mut self) -> Result<u32, VideoError> {
        let mut value: c_int = 0;
        // SAFETY: the encoder is alive; this control takes a pointer to an int and writes to it.
        let code = unsafe {
            let value = &raw mut value;
            (self.functions.control)(&raw mut *self.context, VP8E_GET_LAST_QUANTIZER_64, value)
        };
        check(code, "its quantizer")?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Kilobits per second from now on, and the best quality.
    pub(super) fn set_rate(&mut self, rate: u32) -> Result<(), VideoError> {
        if self.config.target_bitrate == rate {
            return Ok(());
        }
        self.config.target_bitrate = rate;
        self.reconfigure("a bit rate")
    }

    /// The configuration has changed.
    fn reconfigure(&mut self, what: &'static str) -> Result<(), VideoError> {
        // SAFETY: encoder and configuration are alive, and of the size and version it was made with.
        let code =
            unsafe { (self.functions.config_set)(&raw mut *self.context, &raw const *self.config) };
        check(code, what)
    }

    /// Encodes a picture of the encoder's size, shown from `time` for `duration` milliseconds, and
    /// appends the frame; `key` makes it one that needs none before it. `Ok(true)` if it became one.
    pub(super) fn encode(
        &mut self,
        picture: &I420,
        (time, duration): (i64, u32),
        key: bool,
        out: &mut Vec<u8>,
    ) -> Result<bool, VideoError> {
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
        let flags = if key { VPX_EFLAG_FORCE_KF } else { 0 };
        // SAFETY: encoder, image and its pixels are alive; the library keeps no pointer to them.
        let code = unsafe {
            (self.functions.encode)(
                &raw mut *self.context,
                &raw const image,
                time,
                duration.max(1).into(),
                flags,
                VPX_DL_REALTIME,
            )
        };
        check(code, "a frame")?;
        let mut cursor = ptr::null();
        let mut is_key = false;
        loop {
            // SAFETY: the encoder is alive, and the cursor is null or what the last call made it.
            let packet =
                unsafe { (self.functions.packet)(&raw mut *self.context, &raw mut cursor) };
            // SAFETY: null, or a packet that stays until the next call of `encode`.
            let Some(packet) = (unsafe { packet.as_ref() }) else { return Ok(is_key) };
            // Kind 0 is a frame.
            if packet.kind == 0 && !packet.data.is_null() {
                is_key |= packet.flags & VPX_FRAME_IS_KEY != 0;
                // SAFETY: a frame's packet names its bytes, which stay as long as it.
                out.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(packet.data, packet.size)
                });
            }
        }
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
