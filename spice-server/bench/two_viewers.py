#!/usr/bin/python3
"""Does a viewer on a long thin line disturb one that is near? JSON on stdout, a table on stderr.

    two_viewers.py --bin-dir target/release/examples [--rows typing,scroll,film,noise] [--link 100:10]

For each row the near viewer is measured alone, with the far one beside it (policy `shared`), and alone again,
each in turn `--rounds` times; viewers are processes of their own. Latency is painted -> drawn.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from client import Client, Process, cpu_seconds, percentile
from content import ROWS

NEAR_LOSS = 0.05
FAR_LATENCY_MS = 100


def view(address, seconds):
    """One viewer: frames per second and latency, after its line has been got to know."""
    client = Client(address)
    client.run(until=lambda: client.first_frame is not None, limit=40)
    client.run(seconds=3)
    client.watch_stamps, client.latencies, client.stamp = True, [], None
    read, begin = client.bytes_read(), time.perf_counter()
    client.run(seconds=seconds)
    elapsed = time.perf_counter() - begin
    seen = client.latencies
    result = {"fps": round(len(seen) / elapsed, 2),
              "mbit_per_s": round((client.bytes_read() - read) * 8e-6 / elapsed, 3)}
    if seen:
        result.update(p50_ms=percentile(seen, 0.5), p95_ms=percentile(seen, 0.95))
    client.close()
    return result


def start_view(address, seconds):
    command = [sys.executable, os.path.abspath(__file__), "--view", f"{address[0]}:{address[1]}",
               "--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def result_of(viewer):
    out, _ = viewer.communicate(timeout=120)
    return json.loads(out)


def measure_row(options, name):
    mode, size, fps = ROWS[name]
    server = Process(os.path.join(options.bin_dir, "test-picture"), "--listen", "127.0.0.1:0", "--mode", mode,
                     "--size", f"{size[0]}x{size[1]}", "--fps", str(fps), "--quiet", "--whole", "--policy", "shared")
    rtt, mbit = options.link.split(":")
    row = {"row": name, "rtt_ms": float(rtt), "mbit": float(mbit), "alone": [], "together": [], "far": []}
    with server:
        target = f"{server.address[0]}:{server.address[1]}"
        with Process(os.path.join(options.bin_dir, "delay-proxy"), "127.0.0.1:0", target, rtt, mbit) as line:
            for _ in range(options.rounds):
                row["alone"].append(result_of(start_view(server.address, options.seconds)))
                # The far one is there before and after.
                far = start_view(line.address, options.seconds + 4)
                time.sleep(2)
                busy = cpu_seconds(server.pid, "spice-")
                row["together"].append(result_of(start_view(server.address, options.seconds)))
                row["cpu_seconds_together"] = round(cpu_seconds(server.pid, "spice-") - busy, 3)
                row["far"].append(result_of(far))
            row["alone"].append(result_of(start_view(server.address, options.seconds)))

    def median(who, what):
        return statistics.median(result.get(what, 0) for result in row[who])

    alone, together = median("alone", "fps"), median("together", "fps")
    row["near_fps"] = {"alone": alone, "together": together, "ratio": round(together / max(alone, 0.01), 3)}
    row["far_p95_ms"] = median("far", "p95_ms")
    row["bars"] = {"near_within_5_percent": together >= alone * (1 - NEAR_LOSS),
                   "far_p95_within_rtt_and_100_ms": row["far_p95_ms"] <= float(rtt) + FAR_LATENCY_MS}
    line = "{:<8} near {:>5} fps alone, {:>5} together ({:.3f}), p95 {:>4} / {:>4} ms; far {:>5} fps, p95 {:>4} ms"
    print(line.format(name, alone, together, row["near_fps"]["ratio"], median("alone", "p95_ms"),
                      median("together", "p95_ms"), median("far", "fps"), row["far_p95_ms"]),
          file=sys.stderr, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin-dir", help="folder with test-picture and delay-proxy")
    parser.add_argument("--view", help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="typing,scroll,window,pan,film,noise")
    parser.add_argument("--link", default="100:10", help="the far viewer's: RTT_MS:MBIT")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.view:
        host, port = options.view.rsplit(":", 1)
        json.dump(view((host, int(port)), options.seconds), sys.stdout)
        return
    if not options.bin_dir:
        parser.error("--bin-dir")
    rows = [measure_row(options, name) for name in options.rows.split(",")]
    json.dump({"load": os.getloadavg(), "rows": rows}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
