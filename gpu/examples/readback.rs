//! How long it takes to get a picture from the renderer into a frame slot: medians in milliseconds, as
//! JSON. `readback [virgl|2d]`; virgl uses the first render node, or draws in software.

#![allow(clippy::unwrap_used, reason = "a measuring program")]

use std::{sync::Arc, time::Instant};

use drago_gpu::renderer::{
    FenceSink, Layout, Timeline,
    choice::{Choice, settle, start},
};
use gpu_protocol::{Rect, format::PixelFormat};
use vm_memory::{MmapRegion, VolatileMemory};

struct Deaf;

impl FenceSink for Deaf {
    fn retired(&self, _timeline: Timeline, _id: u64) {}
}

const ROUNDS: usize = 101;

fn main() {
    let choice: Choice = std::env::args().nth(1).as_deref().unwrap_or("virgl").parse().unwrap();
    let (choice, node) = settle(choice, None);
    let mut renderer = start(choice, node, None, Arc::new(Deaf)).unwrap();
    let mut lines = vec![format!("\"renderer\": {:?}", renderer.describe())];
    for (id, (width, height)) in (1..).zip([(1280, 800), (1920, 1080), (2560, 1440), (3840, 2160)])
    {
        let layout = Layout { format: PixelFormat::B8G8R8X8, width, height };
        renderer.create_2d(id, layout).unwrap();
        let slot = MmapRegion::<()>::new(layout.bytes() as usize).unwrap();
        let stride = layout.stride() as usize;
        let parts = [
            (format!("{width}x{height}"), Rect::of_size(width, height)),
            (format!("256x256 of {width}x{height}"), Rect::new(512, 300, 256, 256)),
        ];
        for (name, rect) in parts {
            let at = rect.y as usize * stride + rect.x as usize * 4;
            let length = (rect.height as usize - 1) * stride + rect.width as usize * 4;
            let mut times: Vec<f64> = (0..ROUNDS)
                .map(|_| {
                    let target = slot.get_slice(at, length).unwrap();
                    let begin = Instant::now();
                    renderer.read_pixels(id, rect, &target, stride).unwrap();
                    begin.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let (least, median) = (times[0], times[ROUNDS / 2]);
            lines.push(format!("\"{name}\": {{\"median\": {median:.3}, \"least\": {least:.3}}}"));
        }
        renderer.destroy(id);
    }
    println!("{{{}}}", lines.join(",\n "));
}
