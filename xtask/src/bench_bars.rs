//! The bars that the figures of `cargo xtask bench` have to meet.

use std::fmt;

use serde_json::Value;

/// Which side of the limit is the good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Good {
    AtMost,
    AtLeast,
}
use Good::{AtLeast, AtMost};

/// A figure and what it has to be.
struct Bar {
    name: &'static str,
    /// Where it is in the report.
    pointer: &'static str,
    good: Good,
    limit: f64,
    unit: &'static str,
}

const fn bar(
    name: &'static str,
    pointer: &'static str,
    good: Good,
    limit: f64,
    unit: &'static str,
) -> Bar {
    Bar { name, pointer, good, limit, unit }
}

/// Of `boot.json`.
#[rustfmt::skip]
const BOOT: &[Bar] = &[
    bar("exec→init, of the faster of QEMU's q35 and microvm", "/init_ratio/median", AtMost, 0.8, ""),
    bar("memory without a display", "/drago/memory_mib", AtMost, 10.0, "MiB"),
];

/// Of `boot.json`, where something is shown.
#[rustfmt::skip]
const DISPLAY: &[Bar] = &[
    bar("memory with a display, drago-gpu and a viewer", "/drago + display/viewed_memory_mib", AtMost, 25.0, "MiB"),
];

/// Of `gpu.json`.
#[rustfmt::skip]
const GPU: &[Bar] = &[
    bar("glmark2 through our device, of virglrenderer's own server", "/glmark2/percent/drago_of_vtest_fps", AtLeast, 90.0, "%"),
    bar("glmark2 with a viewer, of without", "/glmark2/percent/viewer_of_none_fps", AtLeast, 90.0, "%"),
    bar("reading 1920x1080 back", "/readback_ms/virgl/1920x1080/median", AtMost, 2.0, "ms"),
    bar("reading 256x256 back", "/readback_ms/virgl/256x256 of 1920x1080/median", AtMost, 0.1, "ms"),
];

/// Of `spice.json`.
#[rustfmt::skip]
const SPICE: &[Bar] = &[
    bar("connect and first picture, p50", "/rtt/0/ours/connect_ms/p50", AtMost, 20.0, "ms"),
    bar("key to picture, p50", "/rtt/0/ours/key_ms/p50", AtMost, 4.0, "ms"),
    bar("key to picture, p95", "/rtt/0/ours/key_ms/p95", AtMost, 8.0, "ms"),
    bar("texture at 100 ms, of its rate at 0 ms", "/fps_ratio_at_longest_rtt/ours/texture", AtLeast, 0.9, ""),
    bar("noise at 100 ms, of its rate at 0 ms", "/fps_ratio_at_longest_rtt/ours/noise", AtLeast, 0.9, ""),
    bar("a still picture", "/idle_bytes_per_s/ours", AtMost, 0.0, "B/s"),
];

/// A bar and what was measured.
pub(crate) struct Verdict {
    bar: &'static Bar,
    /// `None`: there is no such figure, which does not meet the bar either.
    figure: Option<f64>,
}

impl Verdict {
    pub(crate) fn is_met(&self) -> bool {
        self.figure.is_some_and(|figure| match self.bar.good {
            AtMost => figure <= self.bar.limit,
            AtLeast => figure >= self.bar.limit,
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bar { name, good, limit, unit, .. } = self.bar;
        let sign = if *good == AtMost { '≤' } else { '≥' };
        write!(f, "{:<7} {name}: ", if self.is_met() { "met" } else { "NOT met" })?;
        match self.figure {
            Some(figure) => write!(f, "{figure:.2}")?,
            None => f.write_str("not measured")?,
        }
        write!(f, " (bar: {sign} {limit}{}{unit})", if unit.is_empty() { "" } else { " " })
    }
}

/// What was measured of a part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Boots.
    Boot,
    /// Machines with a display.
    Display,
    /// OpenGL.
    Gpu,
    /// The SPICE server.
    Spice,
}

/// Holds the report of a part against its bars.
pub(crate) fn judge(part: Part, report: &Value) -> Vec<Verdict> {
    let bars = match part {
        Part::Boot => BOOT,
        Part::Display => DISPLAY,
        Part::Gpu => GPU,
        Part::Spice => SPICE,
    };
    let figure = |bar: &Bar| report.pointer(bar.pointer).and_then(Value::as_f64);
    bars.iter().map(|bar| Verdict { bar, figure: figure(bar) }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spice(connect: f64, p95: f64, noise: f64, idle: f64) -> Value {
        json!({
            "rtt": { "0": { "ours": {
                "connect_ms": { "p50": connect }, "key_ms": { "p50": 4.0, "p95": p95 },
            } } },
            "fps_ratio_at_longest_rtt": { "ours": { "texture": 1.0, "noise": noise } },
            "idle_bytes_per_s": { "ours": idle, "qemu": 4.0 },
        })
    }

    fn missed(part: Part, report: &Value) -> Vec<&'static str> {
        let verdicts = judge(part, report);
        verdicts.iter().filter(|verdict| !verdict.is_met()).map(|v| v.bar.pointer).collect()
    }

    #[test]
    fn what_is_at_the_limit_meets_the_bar() {
        assert!(missed(Part::Spice, &spice(20.0, 8.0, 0.9, 0.0)).is_empty());
        let boot = json!({ "drago": { "memory_mib": 10.0 }, "init_ratio": { "median": 0.8 } });
        assert!(missed(Part::Boot, &boot).is_empty());
        let display = json!({ "drago + display": { "viewed_memory_mib": 25.0 } });
        assert!(missed(Part::Display, &display).is_empty());
        let gpu = json!({
            "glmark2": { "percent": { "drago_of_vtest_fps": 90.0, "viewer_of_none_fps": 90.0 } },
            "readback_ms": { "virgl": {
                "1920x1080": { "median": 2.0 }, "256x256 of 1920x1080": { "median": 0.1 },
            } },
        });
        assert!(missed(Part::Gpu, &gpu).is_empty());
    }

    #[test]
    fn what_is_beyond_it_or_missing_does_not() {
        for (report, pointer) in [
            (spice(20.1, 8.0, 0.9, 0.0), "/rtt/0/ours/connect_ms/p50"),
            (spice(20.0, 8.1, 0.9, 0.0), "/rtt/0/ours/key_ms/p95"),
            (spice(20.0, 8.0, 0.89, 0.0), "/fps_ratio_at_longest_rtt/ours/noise"),
            (spice(20.0, 8.0, 0.9, 0.2), "/idle_bytes_per_s/ours"),
        ] {
            assert_eq!(missed(Part::Spice, &report), [pointer]);
        }
        assert_eq!(missed(Part::Boot, &json!({})).len(), BOOT.len());
        // What is no number does not pass for one.
        assert_eq!(missed(Part::Boot, &json!({ "drago": { "memory_mib": null } })).len(), 2);
    }

    #[test]
    fn a_verdict_says_figure_and_limit() {
        let verdicts = judge(Part::Boot, &json!({ "init_ratio": { "median": 0.95 } }));
        let lines: Vec<String> = verdicts.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "NOT met exec→init, of the faster of QEMU's q35 and microvm: 0.95 (bar: ≤ 0.8)",
                "NOT met memory without a display: not measured (bar: ≤ 10 MiB)",
            ]
        );
    }
}
