//! OpenH264 (`wels/codec_api.h`, `wels/codec_app_def.h`): encoders for H.264.
//!
//! Its objects begin with a pointer to a table of functions, which C knows as structures.

use std::{
    ffi::{CStr, c_int, c_long, c_uchar, c_uint, c_ushort, c_void},
    ops::RangeInclusive,
    ptr::{self, NonNull},
    slice,
};

use super::{
    super::{I420, VideoError, encoder::Coder},
    Library, check_size,
};

/// The versions whose headers were compared: name, major and minor numbers, and whether frames have
/// PSNR values, which 2.6 added to its structures.
const VERSIONS: [(&CStr, Version); 2] = [
    (c"libopenh264.so.8", Version { major: 2, minors: 6..=6, psnr: true }),
    (c"libopenh264.so.7", Version { major: 2, minors: 3..=5, psnr: false }),
];

struct Version {
    major: c_uint,
    minors: RangeInclusive<c_uint>,
    psnr: bool,
}

const SUCCESS: c_int = 0;
/// `EVideoFormatType`.
const VIDEO_FORMAT_I420: c_int = 23;
/// `EUsageType`.
const CAMERA_VIDEO_REAL_TIME: c_int = 0;
/// `RC_MODES`.
const RC_BITRATE_MODE: c_int = 1;
/// `EParameterSetStrategy`.
const CONSTANT_ID: c_int = 0;
/// `ENCODER_OPTION`.
const ENCODER_OPTION_SVC_ENCODE_PARAM_EXT: c_int = 3;
const ENCODER_OPTION_FRAME_RATE: c_int = 4;
const ENCODER_OPTION_BITRATE: c_int = 5;
const ENCODER_OPTION_TRACE_LEVEL: c_int = 25;
/// `LAYER_NUM`.
const SPATIAL_LAYER_ALL: c_int = 4;
/// `WELS_LOG_QUIET`.
const QUIET: c_int = 0;
/// `MAX_LAYER_NUM_OF_FRAME`.
const LAYERS: usize = 128;

/// The begin of the next access unit (Rec. ITU-T H.264 7.3.2.3 and 7.3.2.4): an access unit delimiter
/// for all slice types, and supplemental information that is empty filling. A parser that is not told
/// where units end takes the slice for whole when something follows it, and shows the picture when
/// the delimiter is whole, too: without these bytes GStreamer's h264parse is two frames late.
const NEXT_UNIT: [u8; 14] = [0, 0, 0, 1, 9, 0xf0, 0, 0, 0, 1, 6, 3, 0, 0x80];

/// `SSpatialLayerConfig`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Layer {
    width: c_int,
    height: c_int,
    frame_rate: f32,
    bit_rate: c_int,
    max_bit_rate: c_int,
    profile: c_int,
    level: c_int,
    quantizer: c_int,
    slice_mode: c_int,
    slices: c_uint,
    slice_blocks: [c_uint; 35],
    slice_size: c_uint,
    /// What is said of colours: nothing.
    colours: [u8; 7],
    aspect_ratio_present: c_uchar,
    aspect_ratio: c_int,
    aspect_ratio_sides: [c_ushort; 2],
}

/// `SEncParamExt`. What is `bool` there is a byte here: until the layout has been compared, any may be in it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Parameters {
    usage: c_int,
    width: c_int,
    height: c_int,
    bit_rate: c_int,
    rate_control: c_int,
    frame_rate: f32,
    temporal_layers: c_int,
    spatial_layers: c_int,
    layers: [Layer; 4],
    complexity: c_int,
    intra_period: c_uint,
    reference_frames: c_int,
    parameter_sets: c_int,
    prefix_nal: c_uchar,
    sei: c_uchar,
    simulcast: c_uchar,
    padding: c_int,
    /// 0 is CAVLC, 1 CABAC.
    entropy_coding: c_int,
    frame_skip: c_uchar,
    max_bit_rate: c_int,
    max_quantizer: c_int,
    min_quantizer: c_int,
    max_nal_size: c_uint,
    long_term_reference: c_uchar,
    long_term_references: c_int,
    long_term_period: c_uint,
    threads: c_ushort,
    load_balancing: c_uchar,
    loop_filter: [c_int; 3],
    denoise: c_uchar,
    background_detection: c_uchar,
    adaptive_quantization: c_uchar,
    cropping: c_uchar,
    scene_change_detection: c_uchar,
    lossless_link: c_uchar,
    fix_overshoot: c_uchar,
    idr_percent: c_int,
    /// From 2.6 on.
    psnr: [c_uchar; 3],
    /// For what may follow.
    rest: [u64; 64],
}

impl Parameters {
    /// Whether the library filled it as these versions do: its fields are where they are thought to
    /// be.
    fn has_known_layout(&self) -> bool {
        let [layer, ..] = &self.layers;
        (self.frame_rate, self.temporal_layers, self.spatial_layers) == (60.0, 1, 1)
            && (self.reference_frames, self.parameter_sets) == (-1, 1)
            && (self.max_quantizer, self.min_quantizer) == (51, 0)
            && (self.long_term_period, self.threads, self.idr_percent) == (30, 1, 400)
            && (layer.frame_rate, layer.quantizer, layer.slice_size) == (60.0, 26, 1500)
            && self.rest == [0; 64]
    }
}

/// `SBitrateInfo`.
#[repr(C)]
struct BitRate {
    layer: c_int,
    bit_rate: c_int,
}

/// `SSourcePicture`.
#[repr(C)]
struct Source {
    format: c_int,
    strides: [c_int; 4],
    planes: [*const u8; 4],
    width: c_int,
    height: c_int,
    /// Milliseconds.
    time: i64,
    /// From 2.6 on.
    psnr: [c_uchar; 3],
    /// For what may follow.
    rest: [u64; 64],
}

/// `SLayerBSInfo`, with so many PSNR values.
#[repr(C)]
#[derive(Clone, Copy)]
struct CodedLayer<const PSNR: usize> {
    ids: [c_uchar; 3],
    kind: c_int,
    layer_kind: c_uchar,
    sub_sequence: c_int,
    nals: c_int,
    nal_sizes: *const c_int,
    data: *const u8,
    psnr: [f32; PSNR],
}

/// `SFrameBSInfo`.
#[repr(C)]
struct CodedFrame<const PSNR: usize> {
    count: c_int,
    layers: [CodedLayer<PSNR>; LAYERS],
    kind: c_int,
    size: c_int,
    time: i64,
    /// For what may follow.
    rest: [u64; 64],
}

impl<const PSNR: usize> CodedFrame<PSNR> {
    const EMPTY: Self = {
        let layer = CodedLayer {
            ids: [0; 3],
            kind: 0,
            layer_kind: 0,
            sub_sequence: 0,
            nals: 0,
            nal_sizes: ptr::null(),
            data: ptr::null(),
            psnr: [0.0; PSNR],
        };
        Self { count: 0, layers: [layer; LAYERS], kind: 0, size: 0, time: 0, rest: [0; 64] }
    };
}

/// `ISVCEncoder`.
#[repr(C)]
struct Object {
    functions: *const ObjectFunctions,
}

/// `ISVCEncoderVtbl`.
#[repr(C)]
struct ObjectFunctions {
    _initialize: *const c_void,
    initialize: unsafe extern "C" fn(*mut Object, *const Parameters) -> c_int,
    defaults: unsafe extern "C" fn(*mut Object, *mut Parameters) -> c_int,
    uninitialize: unsafe extern "C" fn(*mut Object) -> c_int,
    /// The last one is a `CodedFrame` of the library's version.
    encode: unsafe extern "C" fn(*mut Object, *const Source, *mut c_void) -> c_int,
    _encode_parameter_sets: *const c_void,
    _force_intra_frame: *const c_void,
    set_option: unsafe extern "C" fn(*mut Object, c_int, *const c_void) -> c_int,
}

functions! { Functions:
    create = "WelsCreateSVCEncoder": unsafe extern "C" fn(*mut *mut Object) -> c_int;
    destroy = "WelsDestroySVCEncoder": unsafe extern "C" fn(*mut Object);
    version = "WelsGetCodecVersionEx": unsafe extern "C" fn(*mut [c_uint; 4]);
}

/// OpenH264, of a version that is known.
pub(crate) struct OpenH264 {
    functions: Functions,
    psnr: bool,
    defaults: Parameters,
    version: String,
    _library: Library,
}

impl OpenH264 {
    /// Loads the newest version that is there.
    pub(crate) fn load() -> Result<Self, VideoError> {
        Library::newest(&VERSIONS, Self::check)
    }

    fn check(library: Library, known: &Version) -> Result<Self, VideoError> {
        let functions = Functions::load(&library)?;
        let mut numbers = [0; 4];
        // SAFETY: the library writes four numbers.
        unsafe { (functions.version)(&raw mut numbers) };
        let [major, minor, revision, _] = numbers;
        if major != known.major || !known.minors.contains(&minor) {
            return Err(VideoError::Version);
        }
        let defaults = Encoder::create(functions)?.defaults()?;
        if !defaults.has_known_layout() {
            return Err(VideoError::Version);
        }
        let version = format!("{major}.{minor}.{revision}");
        Ok(Self { functions, psnr: known.psnr, defaults, version, _library: library })
    }

    /// Its numbers.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }
}

/// Settings of an H.264 encoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct H264Settings {
    pub(crate) size: (u32, u32),
    /// Bits and frames per second.
    pub(crate) rate: (u32, f32),
    /// Quantizers, 0 to 51; small is good.
    pub(crate) quantizers: (u8, u8),
    /// `EProfileIdc`.
    pub(crate) profile: u8,
    /// CABAC instead of CAVLC: fewer bytes, more work.
    pub(crate) arithmetic: bool,
    /// 0 to 2; small is fast.
    pub(crate) complexity: u8,
    /// Whole frames but the first, in percent of the others.
    pub(crate) key_percent: u32,
}

/// An object of the library, which may not have been initialized.
struct Encoder {
    functions: Functions,
    object: NonNull<Object>,
}

impl Encoder {
    fn create(functions: Functions) -> Result<Self, VideoError> {
        let mut object = ptr::null_mut();
        // SAFETY: the library writes one pointer.
        let code = unsafe { (functions.create)(&raw mut object) };
        let object = NonNull::new(object).filter(|_| code == SUCCESS);
        let object = object.ok_or(VideoError::Library { what: "an encoder", code })?;
        let encoder = Self { functions, object };
        // It writes to standard error otherwise.
        encoder.set(ENCODER_OPTION_TRACE_LEVEL, &QUIET, "silence")?;
        Ok(encoder)
    }

    /// Its functions.
    fn table(&self) -> &ObjectFunctions {
        // SAFETY: the object lives as long as `self`.
        let object = unsafe { self.object.as_ref() };
        // SAFETY: it begins with a pointer to its functions, which live as long as it.
        unsafe { &*object.functions }
    }

    fn defaults(&self) -> Result<Parameters, VideoError> {
        // SAFETY: zeros are valid in all of its fields.
        let mut parameters: Parameters = unsafe { std::mem::zeroed() };
        // SAFETY: the object is alive, and writes one structure, smaller than what there is.
        let code = unsafe { (self.table().defaults)(self.object.as_ptr(), &raw mut parameters) };
        check(code, "its defaults")?;
        Ok(parameters)
    }

    /// Sets an option whose value is a `T` in the library's headers.
    fn set<T>(&self, option: c_int, value: &T, what: &'static str) -> Result<(), VideoError> {
        let value = ptr::from_ref(value).cast();
        // SAFETY: the object is alive. It reads the value and keeps no pointer to it.
        let code = unsafe { (self.table().set_option)(self.object.as_ptr(), option, value) };
        check(code, what)
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // SAFETY: the object is alive. Uninitializing one that was not initialized does nothing.
        unsafe { (self.table().uninitialize)(self.object.as_ptr()) };
        // SAFETY: it is used no more.
        unsafe { (self.functions.destroy)(self.object.as_ptr()) };
    }
}

/// An H.264 encoder.
pub(crate) struct H264Encoder {
    encoder: Encoder,
    parameters: Box<Parameters>,
    psnr: bool,
    /// Size it was made for.
    largest: (u32, u32),
}

// SAFETY: an encoder may be used by one thread after the other; the library has no thread-local state
// and `&mut self` keeps threads apart.
unsafe impl Send for H264Encoder {}

impl H264Encoder {
    pub(crate) fn new(library: &OpenH264, settings: H264Settings) -> Result<Self, VideoError> {
        let (bits, frames) = settings.rate;
        let mut parameters = Box::new(Parameters {
            usage: CAMERA_VIDEO_REAL_TIME,
            bit_rate: clamp(bits),
            rate_control: RC_BITRATE_MODE,
            frame_rate: frames,
            complexity: settings.complexity.into(),
            // One IDR frame, and more only where the size changes: nothing is lost on the way.
            intra_period: 0,
            scene_change_detection: 0,
            reference_frames: 1,
            parameter_sets: CONSTANT_ID,
            entropy_coding: settings.arithmetic.into(),
            // Cost a millisecond per frame of 1920 by 1080, and films are no better for it.
            adaptive_quantization: 0,
            background_detection: 0,
            idr_percent: clamp(settings.key_percent),
            // Frames that are asked for are there: what is too much is never encoded.
            frame_skip: 0,
            max_quantizer: settings.quantizers.1.into(),
            min_quantizer: settings.quantizers.0.into(),
            threads: 1,
            ..library.defaults
        });
        let [layer, ..] = &mut parameters.layers;
        layer.profile = settings.profile.into();
        (layer.bit_rate, layer.frame_rate) = (clamp(bits), frames);
        let encoder = Encoder::create(library.functions)?;
        let (psnr, largest) = (library.psnr, settings.size);
        let mut encoder = Self { encoder, parameters, psnr, largest };
        encoder.put_size(settings.size);
        let object = encoder.encoder.object.as_ptr();
        // SAFETY: the object is alive, and copies the parameters, whose layout was compared.
        let code =
            unsafe { (encoder.encoder.table().initialize)(object, &raw const *encoder.parameters) };
        check(code, "an encoder")?;
        Ok(encoder)
    }

    fn put_size(&mut self, (width, height): (u32, u32)) {
        let (width, height) = (clamp(width), clamp(height));
        (self.parameters.width, self.parameters.height) = (width, height);
        let [layer, ..] = &mut self.parameters.layers;
        (layer.width, layer.height) = (width, height);
    }

    /// Encodes a picture into a frame of the library's version.
    fn code_as<const PSNR: usize>(
        &mut self,
        source: &Source,
        out: &mut Vec<u8>,
    ) -> Result<(), VideoError> {
        let mut frame = CodedFrame::<PSNR>::EMPTY;
        let object = self.encoder.object.as_ptr();
        // SAFETY: object, picture and its pixels are alive, and the frame is of the size the library
        // knows, or larger. It keeps no pointer to any of them.
        let code = unsafe {
            (self.encoder.table().encode)(object, ptr::from_ref(source), (&raw mut frame).cast())
        };
        check(code, "a frame")?;
        if frame.rest != [0; 64] {
            // Its frames are longer than those of the versions that are known.
            return Err(VideoError::Version);
        }
        let layers = usize::try_from(frame.count).unwrap_or(0);
        for layer in frame.layers.iter().take(layers) {
            let count = usize::try_from(layer.nals).unwrap_or(0);
            if layer.data.is_null() || layer.nal_sizes.is_null() {
                continue;
            }
            // SAFETY: a layer has the sizes of so many units, which stay until the next call.
            let sizes = unsafe { slice::from_raw_parts(layer.nal_sizes, count) };
            let size = sizes.iter().filter_map(|size| usize::try_from(*size).ok()).sum();
            // SAFETY: the units lie one after the other, each with its start code, and stay as long.
            out.extend_from_slice(unsafe { slice::from_raw_parts(layer.data, size) });
        }
        Ok(())
    }
}

impl Coder for H264Encoder {
    fn set_rate(&mut self, bits: f64, frames: f64) -> Result<(), VideoError> {
        let (bits, frames) = (clamp(bits as u32), frames as f32);
        (self.parameters.bit_rate, self.parameters.frame_rate) = (bits, frames);
        let [layer, ..] = &mut self.parameters.layers;
        (layer.bit_rate, layer.frame_rate) = (bits, frames);
        self.encoder.set(ENCODER_OPTION_FRAME_RATE, &frames, "a frame rate")?;
        let rate = BitRate { layer: SPATIAL_LAYER_ALL, bit_rate: bits };
        self.encoder.set(ENCODER_OPTION_BITRATE, &rate, "a bit rate")
    }

    fn set_size(&mut self, size: (u32, u32)) -> Result<(), VideoError> {
        let now = (self.parameters.width, self.parameters.height);
        if (clamp(size.0), clamp(size.1)) == now {
            return Ok(());
        }
        check_size(size, self.largest)?;
        self.put_size(size);
        self.encoder.set(ENCODER_OPTION_SVC_ENCODE_PARAM_EXT, &*self.parameters, "a size")
    }

    fn code(
        &mut self,
        picture: &I420,
        time: i64,
        _: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), VideoError> {
        let (width, height) = (self.parameters.width, self.parameters.height);
        let size = picture.size();
        if (clamp(size.0), clamp(size.1)) != (width, height) {
            return Err(VideoError::Size);
        }
        let (y, u, v) = picture.planes();
        let source = Source {
            format: VIDEO_FORMAT_I420,
            strides: [width, width / 2, width / 2, 0],
            planes: [y.as_ptr(), u.as_ptr(), v.as_ptr(), ptr::null()],
            width,
            height,
            time,
            psnr: [0; 3],
            rest: [0; 64],
        };
        match self.psnr {
            true => self.code_as::<3>(&source, out)?,
            false => self.code_as::<0>(&source, out)?,
        }
        out.extend_from_slice(&NEXT_UNIT);
        Ok(())
    }

    /// The library does not say.
    fn quantizer(&mut self) -> Option<u32> {
        None
    }
}

fn clamp(value: u32) -> c_int {
    c_int::try_from(value).unwrap_or(c_int::MAX)
}

fn check(code: c_int, what: &'static str) -> Result<(), VideoError> {
    if code == SUCCESS { Ok(()) } else { Err(VideoError::Library { what, code }) }
}

// The sizes of the headers' structures on x86-64.
#[cfg(target_arch = "x86_64")]
const _: () = {
    assert!(size_of::<Layer>() == 200 && std::mem::offset_of!(Parameters, complexity) == 832);
    assert!(std::mem::offset_of!(Parameters, idr_percent) == 916);
    assert!(size_of::<CodedFrame<0>>() == 5656 && size_of::<CodedFrame<3>>() == 7704);
    assert!(std::mem::offset_of!(Source, time) == 64 && size_of::<Source>() == 592);
    assert!(size_of::<c_long>() == 8);
};
