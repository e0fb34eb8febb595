//! Contexts and what they draw with.

use gpu_protocol::{
    format::PixelFormat,
    frames::MAX_SIZE,
    virtio::{Create3d, Refusal, Transfer3d},
};

use super::{
    Control,
    resources::{Kind, Resource},
};
use crate::renderer::Layout;

/// Gallium's `PIPE_BUFFER`.
const TARGET_BUFFER: u32 = 0;
/// Gallium's `PIPE_TEXTURE_2D`.
const TARGET_2D: u32 = 2;
/// Gallium's `PIPE_TEXTURE_RECT`.
const TARGET_RECT: u32 = 5;
/// Gallium's `PIPE_TEXTURE_CUBE_ARRAY`, the last one.
const LAST_TARGET: u32 = 8;

/// Depth of a 3D texture, layers of an array: what OpenGL implementations offer.
const MAX_LAYERS: u32 = 2048;
/// A picture of [`MAX_SIZE`] has 15 levels.
const MAX_LEVEL: u32 = 14;
const MAX_SAMPLES: u32 = 32;

/// Bytes of a pixel, not less than there are except for a few rare formats, for the limit on memory.
fn bytes_per_pixel(format: u32) -> u64 {
    match format {
        // R32G32B32A32 in its variants, R64 and their like.
        25..=31 => 16,
        // One and two bytes.
        9..=13 | 16 | 23 | 64 => 2,
        5..=7 => 2,
        // The common 32-bit formats and depth with stencil.
        1..=4 | 8 | 14..=22 | 65..=68 | 100..=104 | 121 | 134 => 4,
        _ => 8,
    }
}

/// Checks sizes; returns what the resource counts for.
fn check(create: &Create3d) -> Result<u64, Refusal> {
    let Create3d { target, width, height, depth, array_size, last_level, nr_samples, .. } = *create;
    if target == TARGET_BUFFER {
        let one = |n: u32| n <= 1;
        return match width > 0
            && one(height)
            && one(depth)
            && one(array_size)
            && last_level == 0
            && one(nr_samples)
        {
            true => Ok(width.into()),
            false => Err(Refusal::InvalidParameter),
        };
    }
    let sides = 1..=MAX_SIZE;
    let layers = 1..=MAX_LAYERS;
    if target > LAST_TARGET
        || !sides.contains(&width)
        || !sides.contains(&height)
        || !layers.contains(&depth)
        || !layers.contains(&array_size)
        || last_level > MAX_LEVEL
        || nr_samples > MAX_SAMPLES
    {
        return Err(Refusal::InvalidParameter);
    }
    // At most 2^14 * 2^14 * 2^11 * 2^11 * 2^5 * 2^4: fits.
    let pixels = u64::from(width) * u64::from(height) * u64::from(depth) * u64::from(array_size);
    let bytes = pixels * u64::from(nr_samples.max(1)) * bytes_per_pixel(create.format);
    // Smaller pictures take a third of the big one together.
    Ok(if last_level > 0 { bytes + bytes / 3 } else { bytes })
}

/// What of it can be shown.
fn layout(create: &Create3d) -> Option<Layout> {
    let flat = matches!(create.target, TARGET_2D | TARGET_RECT)
        && create.depth == 1
        && create.array_size == 1
        && create.nr_samples <= 1;
    let format = PixelFormat::from_wire(create.format).filter(|_| flat)?;
    Some(Layout { format, width: create.width, height: create.height })
}

impl Control {
    pub(super) fn create_3d(&mut self, id: u32, create: &Create3d) -> Result<(), Refusal> {
        self.check_new(id)?;
        let cost = check(create)?;
        self.charge(cost)?;
        if let Err(refusal) = self.renderer.create_3d(id, create) {
            self.bytes -= cost;
            return Err(refusal);
        }
        let kind = Kind::ThreeD(layout(create));
        self.resources.insert(id, Resource { kind, cost, backing: None });
        Ok(())
    }

    pub(super) fn create_context(
        &mut self,
        context: u32,
        capset: u32,
        name: &[u8],
    ) -> Result<(), Refusal> {
        if context == 0 || self.contexts.contains(&context) {
            return Err(Refusal::InvalidContext);
        }
        if capset != 0 && !self.renderer.capsets().iter().any(|set| set.id == capset) {
            return Err(Refusal::InvalidParameter);
        }
        if self.contexts.len() >= self.limits.contexts {
            return Err(Refusal::OutOfMemory);
        }
        self.renderer.create_context(context, capset, name)?;
        // The program's name, as Linux gives it.
        tracing::debug!(context, capset, name = %name.escape_ascii(), "a 3D context is made");
        self.contexts.insert(context);
        Ok(())
    }

    pub(super) fn destroy_context(&mut self, context: u32) -> Result<(), Refusal> {
        if !self.contexts.remove(&context) {
            return Err(Refusal::InvalidContext);
        }
        self.renderer.destroy_context(context);
        Ok(())
    }

    /// A context and a resource that exist.
    fn check_pair(&self, context: u32, id: u32) -> Result<(), Refusal> {
        if !self.contexts.contains(&context) {
            return Err(Refusal::InvalidContext);
        }
        if !self.resources.contains_key(&id) {
            return Err(Refusal::InvalidResource);
        }
        Ok(())
    }

    pub(super) fn attach_to_context(&mut self, context: u32, id: u32) -> Result<(), Refusal> {
        self.check_pair(context, id)?;
        self.renderer.attach_resource(context, id);
        Ok(())
    }

    pub(super) fn detach_from_context(&mut self, context: u32, id: u32) -> Result<(), Refusal> {
        self.check_pair(context, id)?;
        self.renderer.detach_resource(context, id);
        Ok(())
    }

    /// Checks what can be checked without knowing the format; the renderer does the rest.
    fn check_transfer(&self, context: u32, id: u32, transfer: &Transfer3d) -> Result<(), Refusal> {
        // Context 0 is the device itself.
        if context != 0 && !self.contexts.contains(&context) {
            return Err(Refusal::InvalidContext);
        }
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        if matches!(resource.kind, Kind::Blob { .. } | Kind::Host { .. }) {
            return Err(Refusal::InvalidResource);
        }
        let backing = resource.backing.as_ref().ok_or(Refusal::Unspecified)?;
        let ends = [
            transfer.x.checked_add(transfer.width),
            transfer.y.checked_add(transfer.height),
            transfer.z.checked_add(transfer.depth),
        ];
        if ends.contains(&None)
            || transfer.offset >= backing.pieces().len()
            || transfer.level > MAX_LEVEL
        {
            return Err(Refusal::InvalidParameter);
        }
        Ok(())
    }

    pub(super) fn transfer_to_host(
        &mut self,
        context: u32,
        id: u32,
        transfer: &Transfer3d,
    ) -> Result<(), Refusal> {
        self.check_transfer(context, id, transfer)?;
        self.renderer.transfer_to_host(context, id, transfer)
    }

    pub(super) fn transfer_from_host(
        &mut self,
        context: u32,
        id: u32,
        transfer: &Transfer3d,
    ) -> Result<(), Refusal> {
        self.check_transfer(context, id, transfer)?;
        self.renderer.transfer_from_host(context, id, transfer)
    }

    pub(super) fn submit(&mut self, context: u32, commands: &[u8]) -> Result<(), Refusal> {
        if !self.contexts.contains(&context) {
            return Err(Refusal::InvalidContext);
        }
        if commands.is_empty() {
            return Ok(());
        }
        self.renderer.submit(context, commands)
    }
}
