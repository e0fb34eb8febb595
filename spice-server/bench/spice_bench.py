#!/usr/bin/python3
"""Measures a SPICE server with spice-gtk as the client; JSON on stdout, a table on stderr.

    spice_bench.py --bin-dir target/release/examples [--rtt 0,50,100] [--size 1024x768]
    spice_bench.py --address HOST:PORT   only what needs no test picture: connect, idle

The test picture and the delay proxy are the crate's examples:
    cargo build --release -p spice-server --examples
"""
import argparse
import json
import os
import random
import sys
import time

from client import Client, Process, S, summary  # noqa: E402
import content  # noqa: E402

KEY = 30


def measure_connect(address, count):
    times = []
    for _ in range(count):
        client = Client(address)
        client.run(until=lambda: client.first_frame is not None)
        times.append(client.first_frame * 1000)
        client.close()
    return summary(times)


def measure_keys(address, count):
    client = Client(address)
    client.ready()
    inputs = client.channels["InputsChannel"]
    times = []
    state = {}

    def updated():
        if "pressed" in state:
            state["latency"] = time.perf_counter() - state.pop("pressed")

    client.on_invalidate = updated
    for _ in range(count):
        client.run(seconds=random.uniform(0.01, 0.05))
        state.clear()
        state["pressed"] = time.perf_counter()
        inputs.key_press(KEY)
        client.run(until=lambda: "latency" in state)
        times.append(state["latency"] * 1000)
        inputs.key_release(KEY)
    client.close()
    return summary(times)


def measure_frames(address, seconds):
    client = Client(address)
    client.ready()
    client.run(seconds=1)
    pixels, read, begin = client.pixels, client.bytes_read(), time.perf_counter()
    client.run(seconds=seconds)
    elapsed = time.perf_counter() - begin
    width, height = client.size
    result = {
        "fps": round((client.pixels - pixels) / (width * height) / elapsed, 1),
        "mbit_per_s": round((client.bytes_read() - read) * 8e-6 / elapsed, 1),
    }
    client.close()
    return result


def measure_idle(address, seconds):
    client = Client(address)
    client.ready()
    client.run(seconds=1)
    read = client.bytes_read()
    client.run(seconds=seconds)
    result = (client.bytes_read() - read) / seconds
    client.close()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin-dir", help="folder with test-picture and delay-proxy")
    parser.add_argument("--address", help="measure this server instead")
    parser.add_argument("--rtt", default="0,50,100", help="round trips in ms")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--connects", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--no-content", action="store_true", help="not what is shown, only how fast")
    parser.add_argument("--no-basics", action="store_true", help="only what is shown")
    parser.add_argument("--rows", help="of the content bench, for example scroll,film")
    parser.add_argument("--links", help="of the content bench: RTT_MS:MBIT, 0 for no limit")
    parser.add_argument("--sides", default="ours,qemu")
    options = parser.parse_args()
    if options.address:
        host, port = options.address.rsplit(":", 1)
        address = (host, int(port))
        json.dump({"connect_ms": measure_connect(address, options.connects),
                   "idle_bytes_per_s": measure_idle(address, options.seconds)}, sys.stdout, indent=2)
        print()
        return
    if not options.bin_dir:
        parser.error("--bin-dir or --address")
    rtts = [] if options.no_basics else [float(rtt) for rtt in options.rtt.split(",")]
    result = {"client": "spice-gtk " + S.util_get_version_string(), "size": options.size, "rtt": {}}

    def server(mode, *more):
        return Process(os.path.join(options.bin_dir, "test-picture"), "--listen", "127.0.0.1:0",
                       "--mode", mode, "--size", options.size, "--quiet", *more)

    def through(rtt, address, measure, *arguments):
        if not rtt:
            return measure(address, *arguments)
        target = f"{address[0]}:{address[1]}"
        proxy = os.path.join(options.bin_dir, "delay-proxy")
        with Process(proxy, "127.0.0.1:0", target, str(rtt)) as line:
            return measure(line.address, *arguments)

    for rtt in rtts:
        row = {}
        with server("key") as key:
            row["connect_ms"] = through(rtt, key.address, measure_connect,
                                        options.connects if not rtt else 5)
            row["key_ms"] = through(rtt, key.address, measure_keys,
                                    options.keys if not rtt else 50)
        for mode in ("texture", "noise"):
            with server(mode) as moving:
                row[mode] = through(rtt, moving.address, measure_frames, options.seconds)
        result["rtt"][f"{rtt:g}"] = row
    if rtts:
        with server("static") as still:
            result["idle_bytes_per_s"] = measure_idle(still.address, options.seconds)
    if not options.no_content:
        result["content"] = content.measure(options)

    first = result["rtt"].get("0")
    if first:
        last = result["rtt"][f"{max(rtts):g}"]
        ratios = {mode: round(last[mode]["fps"] / first[mode]["fps"], 3)
                  for mode in ("texture", "noise") if first[mode]["fps"]}
        result["fps_ratio_at_longest_rtt"] = ratios
        result["bars"] = {
            "connect_p50_le_20_ms": first["connect_ms"]["p50"] <= 20,
            "key_p50_le_4_ms": first["key_ms"]["p50"] <= 4,
            "key_p95_le_8_ms": first["key_ms"]["p95"] <= 8,
            "fps_ratio_ge_0.9": min(ratios.values()) >= 0.9,
            "idle_0_bytes": result["idle_bytes_per_s"] == 0,
        }
    json.dump(result, sys.stdout, indent=2)
    print()
    if not options.no_content:
        content.print_table(result["content"])
    if not rtts:
        return
    line = "{:>6} {:>12} {:>9} {:>9} " + "{:>9} {:>9} " * 2
    print(line.format("RTT", "connect", "key p50", "key p95", "texture", "Mbit/s", "noise",
                      "Mbit/s"), file=sys.stderr)
    for rtt, row in result["rtt"].items():
        cells = [rtt, row["connect_ms"]["p50"], row["key_ms"]["p50"], row["key_ms"]["p95"]]
        for mode in ("texture", "noise"):
            cells += [row[mode]["fps"], row[mode]["mbit_per_s"]]
        print(line.format(*cells), file=sys.stderr)


if __name__ == "__main__":
    main()
