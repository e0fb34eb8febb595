//! The bars that the figures of `cargo xtask bench` have to meet.

use std::{borrow::Cow, fmt};

use serde_json::Value;

/// Which side of the limit is the good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Good {
    AtMost,
    AtLeast,
}
use Good::{AtLeast, AtMost};

/// A figure and what it has to be.
#[derive(Clone)]
struct Bar {
    name: Cow<'static, str>,
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
    Bar { name: Cow::Borrowed(name), pointer, good, limit, unit }
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
    bar: Bar,
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
        let Bar { name, good, limit, unit, .. } = &self.bar;
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
    bars.iter().map(|bar| Verdict { bar: bar.clone(), figure: figure(bar) }).collect()
}

fn verdict(
    name: String,
    figure: Option<f64>,
    good: Good,
    limit: f64,
    unit: &'static str,
) -> Verdict {
    Verdict { bar: Bar { name: name.into(), pointer: "", good, limit, unit }, figure }
}

/// Holds `io.json`, the ratios in which it has, against 1.
pub(crate) fn judge_io(report: &Value) -> Vec<Verdict> {
    let rows = report.as_object().into_iter().flatten();
    rows.map(|(name, row)| {
        let name = format!(
            "{}, of QEMU's",
            name.rsplit_once(", ").map_or(name.as_str(), |(name, _)| name)
        );
        verdict(name, row["median_of_ratios"].as_f64(), AtLeast, 1.0, "")
    })
    .collect()
}

/// Holds what real work costs (`content` of `spice.json`) against its bars, and QEMU's figures on the same
/// line.
pub(crate) fn judge_content(report: &Value) -> Vec<Verdict> {
    let rows = report["content"].as_array().map(Vec::as_slice).unwrap_or_default();
    // What a side showed of the same on a line.
    let find = |row: &Value, side: &str, rtt: f64, limit: f64| {
        rows.iter().find(|other| {
            other["row"] == row["row"]
                && other["side"] == side
                && other["rtt_ms"] == rtt
                && other["limit_mbit"] == limit
        })
    };
    let mut verdicts = Vec::new();
    for row in rows.iter().filter(|row| row["side"] == "ours") {
        let (name, rtt) =
            (row["row"].as_str().unwrap_or("?"), row["rtt_ms"].as_f64().unwrap_or(0.0));
        let limit = row["limit_mbit"].as_f64().unwrap_or(0.0);
        let line = match limit {
            0.0 => format!("{name}, {rtt} ms"),
            _ => format!("{name}, {rtt} ms, {limit} Mbit/s"),
        };
        let mut push = |what: &str, figure, good, limit, unit| {
            verdicts.push(verdict(format!("{line}: {what}"), figure, good, limit, unit));
        };
        let of = |row: &Value, key: &str| row[key].as_f64();
        let is_drawn = name != "idle";
        if let Some(theirs) = find(row, "qemu", rtt, limit) {
            let ratio = |key| Some(of(row, key)? / of(theirs, key)?);
            if is_drawn {
                push("CPU per frame, of QEMU's", ratio("cpu_ms_per_frame"), AtMost, 1.0, "");
            }
            if name == "scroll" && limit == 0.0 {
                push("bytes, of QEMU's", ratio("mbit_per_s"), AtMost, 0.05, "");
            }
        }
        if limit == 10.0 && is_drawn {
            push("p95", row["latency_ms"]["p95"].as_f64(), AtMost, rtt + 100.0, "ms");
        }
        if limit == 10.0 && name == "film1080" {
            push("rate", of(row, "mbit_per_s"), AtMost, 8.0, "Mbit/s");
            push("frames", of(row, "fps"), AtLeast, 29.0, "/s");
        }
        let near = find(row, "ours", 0.0, 0.0);
        if let (100.0, 0.0, true, Some(near)) = (rtt, limit, is_drawn, near) {
            let ratio = of(row, "fps").zip(of(near, "fps")).map(|(far, near)| far / near);
            push("frames, of those at 0 ms", ratio, AtLeast, 0.9, "");
        }
    }
    verdicts
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
    fn rows_are_held_against_those_of_qemu() {
        let io = json!({
            "disk write 1M, MB/s": { "median_of_ratios": 0.99 },
            "tap in, 1 stream, Mbit/s": { "median_of_ratios": 1.0 },
        });
        let lines: Vec<String> = judge_io(&io).iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "NOT met disk write 1M, of QEMU's: 0.99 (bar: ≥ 1)",
                "met     tap in, 1 stream, of QEMU's: 1.00 (bar: ≥ 1)",
            ]
        );
        let row = |name: &str, side: &str, rtt: f64, limit: f64, mbit: f64, fps: f64, cpu: f64| {
            json!({
                "row": name, "side": side, "rtt_ms": rtt, "limit_mbit": limit, "mbit_per_s": mbit,
                "fps": fps, "cpu_ms_per_frame": cpu, "latency_ms": { "p50": 1.0, "p95": 130.0 },
            })
        };
        let missed = |rows: &[Value]| -> Vec<String> {
            let verdicts = judge_content(&json!({ "content": rows }));
            verdicts.iter().filter(|v| !v.is_met()).map(|v| v.bar.name.to_string()).collect()
        };
        let good = [
            row("scroll", "ours", 0.0, 0.0, 1.0, 30.0, 2.0),
            row("scroll", "qemu", 0.0, 0.0, 20.0, 30.0, 2.0),
            row("scroll", "ours", 100.0, 0.0, 1.0, 27.0, 2.0),
            row("film1080", "ours", 100.0, 10.0, 8.0, 29.0, 2.0),
        ];
        assert!(missed(&good).is_empty(), "{:?}", missed(&good));
        let bad = [
            row("scroll", "ours", 0.0, 0.0, 1.1, 30.0, 2.1),
            row("scroll", "qemu", 0.0, 0.0, 20.0, 30.0, 2.0),
            row("scroll", "ours", 100.0, 0.0, 1.0, 26.0, 2.0),
            row("film1080", "ours", 20.0, 10.0, 8.1, 28.0, 2.0),
        ];
        assert_eq!(
            missed(&bad),
            [
                "scroll, 0 ms: CPU per frame, of QEMU's",
                "scroll, 0 ms: bytes, of QEMU's",
                "scroll, 100 ms: frames, of those at 0 ms",
                "film1080, 20 ms, 10 Mbit/s: p95",
                "film1080, 20 ms, 10 Mbit/s: rate",
                "film1080, 20 ms, 10 Mbit/s: frames",
            ]
        );
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
