//! From a client's wish for monitors to a request the program can use.

use std::time::{Duration, Instant};

use super::MonitorConfig;
use crate::{ServerEvent, io::shared::Shared};

/// How long wishes are collected: a window being dragged makes many.
const COLLECT: Duration = Duration::from_millis(100);
/// Smallest size asked for.
const MIN_SIZE: (u32, u32) = (320, 200);

/// The wishes of one client.
#[derive(Debug, Default)]
pub(crate) struct Resizer {
    /// The newest wish and when it is passed on.
    pending: Option<(Vec<Option<MonitorConfig>>, Instant)>,
    /// What was asked of the program last, by display.
    asked: Vec<Option<MonitorConfig>>,
}

impl Resizer {
    /// The client wants these monitors, one per display; `None`: disabled, which changes nothing.
    pub(crate) fn wanted(&mut self, monitors: Vec<Option<MonitorConfig>>, now: Instant) {
        let due = self.next_timer().unwrap_or(now + COLLECT);
        self.pending = Some((monitors, due));
    }

    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.pending.as_ref().map(|(_, due)| *due)
    }

    /// Passes wishes on that are due.
    pub(crate) fn timer(&mut self, now: Instant, shared: &Shared) {
        let Some((monitors, _)) = self.pending.take_if(|(_, due)| *due <= now) else { return };
        self.asked.resize(shared.displays.len(), None);
        let displays = shared.displays.iter().zip(&mut self.asked);
        for ((display, asked), (id, monitor)) in displays.zip((0u32..).zip(monitors)) {
            let Some(monitor) = monitor else { continue };
            let monitor = fitted(monitor, shared.config.max_size);
            let shown = display.size() == (monitor.width, monitor.height);
            if *asked == Some(monitor) && shown {
                continue;
            }
            *asked = Some(monitor);
            let (width, height) = (monitor.width, monitor.height);
            shared.emit(ServerEvent::Resize { display: id, width, height });
            if let Some(events) = &shared.config.events {
                events.resize_requested(id, monitor);
            }
        }
    }
}

/// Fractional scaling makes clients ask for odd sizes: the width becomes a multiple of 8, both sides
/// are brought into the limits.
fn fitted(monitor: MonitorConfig, max: (u32, u32)) -> MonitorConfig {
    let width = monitor.width.min(max.0).max(MIN_SIZE.0) & !7;
    let height = monitor.height.min(max.1).max(MIN_SIZE.1);
    MonitorConfig { width, height, ..monitor }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(width: u32, height: u32) -> MonitorConfig {
        MonitorConfig { width, height, x: 0, y: 0, width_mm: 0, height_mm: 0 }
    }

    #[test]
    fn sizes_are_fitted() {
        assert_eq!(fitted(monitor(1023, 767), (8192, 8192)), monitor(1016, 767));
        assert_eq!(fitted(monitor(u32::MAX, u32::MAX), (3840, 2160)), monitor(3840, 2160));
        assert_eq!(fitted(monitor(1, 1), (3840, 2160)), monitor(320, 200));
    }

    #[test]
    fn wishes_are_collected() {
        let mut resizer = Resizer::default();
        let now = Instant::now();
        resizer.wanted(vec![Some(monitor(800, 600))], now);
        resizer.wanted(vec![Some(monitor(808, 600))], now + COLLECT / 2);
        assert_eq!(resizer.next_timer(), Some(now + COLLECT));
    }
}
