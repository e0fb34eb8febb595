#!/usr/bin/python3
"""Keeps a server under connects, half of them hostile, while one honest viewer looks on.

    soak.py --bin-dir target/release/examples [--minutes 60] [--rate 50]

The server may neither grow, nor leak descriptors or threads, nor lose a frame for the honest viewer. Prints
JSON, and fails (status 1) where one of these happened. Hostile peers come from many addresses of the
loopback network, because an address with wrong passwords is locked out.
"""
import argparse
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time

from client import Client, Process, GLib, percentile

FPS = 10
LINK_HEADER = b"REDQ" + (2).to_bytes(4, "little") + (2).to_bytes(4, "little")
# Connection 0, main channel, no capabilities.
LINK = LINK_HEADER + (18).to_bytes(4, "little") + bytes(4) + b"\1\0" + bytes(8) + b"\x12\0\0\0"


def attempt(address, bodies):
    """A connection from a random address that sends these bytes and reads what comes."""
    with socket.socket() as peer:
        peer.settimeout(20)
        peer.bind((f"127.{random.randrange(1, 255)}.{random.randrange(255)}.7", 0))
        try:
            peer.connect(address)
            for body in bodies:
                if isinstance(body, float):
                    time.sleep(body)
                else:
                    peer.sendall(body)
                    peer.recv(65536)
        except OSError:
            pass  # cut off, as it should be


def wrong_password(address):
    attempt(address, [LINK, (1).to_bytes(4, "little") + os.urandom(128), b"x"])


def garbage(address):
    attempt(address, [os.urandom(random.randrange(1, 65536))])


def stall(address):
    attempt(address, [LINK[:random.randrange(len(LINK))], 12.0, b"x"])


def oversize(address):
    attempt(address, [LINK_HEADER + b"\xff\xff\xff\x7f" + bytes(1 << 20)])


def tls_and_web(address):
    attempt(address, [random.choice([b"\x16\x03\x01\x00\xff", b"GET / HTTP/1.1\r\n"]), 3.0, b"x"])


HOSTILE = [wrong_password, garbage, stall, oversize, tls_and_web]


def flood(client):
    """A client with the password that presses keys as fast as it can."""
    inputs = client.channels["InputsChannel"]
    for code in range(20000):
        inputs.key_press(code % 80 + 1)


def vitals(pid):
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        lines = {line.split()[0]: line.split()[1] for line in rollup if line.startswith(("Rss", "Pss:"))}
    return {"rss_kib": int(lines["Rss:"]), "fds": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin-dir", required=True, help="folder with test-picture")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=50, help="connects per minute")
    options = parser.parse_args()
    password = "soak"
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(password)
        file.flush()
        server = Process(os.path.join(options.bin_dir, "test-picture"), "--listen", "127.0.0.1:0",
                         "--mode", "typing", "--fps", str(FPS), "--size", "1024x768", "--quiet",
                         "--policy", "shared", "--password-file", file.name)
        with server:
            result = soak(server, options, password)
    json.dump(result, sys.stdout, indent=2)
    print()
    sys.exit(1 if result["failures"] else 0)


def soak(server, options, password):
    viewer = Client(server.address, password)
    viewer.ready()
    warm_up = min(120, options.minutes * 12)
    counts = {}
    samples = []
    begin = time.monotonic()
    watched_from = next_sample = begin + warm_up
    end = begin + options.minutes * 60
    next_connect = begin
    busy = 0
    while time.monotonic() < end:
        now = time.monotonic()
        if not viewer.watch_stamps and now >= watched_from:
            viewer.latencies, viewer.watch_stamps = [], True
            watched_from = now
        if now >= next_sample:
            samples.append(vitals(server.pid))
            next_sample += 15
        if now >= next_connect:
            next_connect += 60 / options.rate
            busy += 1
            if busy % 2:
                kind = random.choice(HOSTILE)
                threading.Thread(target=kind, args=(server.address,), daemon=True).start()
                name = kind.__name__
            else:
                other = Client(server.address, password)
                other.ready()
                name = "honest"
                if busy % 10 == 0:
                    flood(other)
                    name = "flood"
                other.close()
            counts[name] = counts.get(name, 0) + 1
        viewer.run(seconds=min(0.2, max(0.01, next_connect - time.monotonic())))
    watched = time.monotonic() - watched_from
    viewer.run(seconds=1)
    shown = len(viewer.latencies)
    expected = watched * FPS
    third = max(1, len(samples) // 3)
    first = statistics.median(sample["rss_kib"] for sample in samples[:third])
    last = statistics.median(sample["rss_kib"] for sample in samples[-third:])
    growth = (last - first) / first * 100
    failures = []
    if growth > 2:
        failures.append(f"the server grew by {growth:.1f} %")
    if shown < expected * 0.99:
        failures.append(f"the viewer saw {shown} of {expected:.0f} frames")
    for what in ("fds", "threads"):
        early = max(sample[what] for sample in samples[:third])
        late = max(sample[what] for sample in samples[-third:])
        # What is under way at the moment of a sample varies.
        if late > early + 24:
            failures.append(f"{what}: {early} at first, {late} at last")
    return {"minutes": options.minutes, "connects": counts, "rss_kib_first": first, "rss_kib_last": last,
            "growth_percent": round(growth, 2), "frames_expected": round(expected),
            "frames_seen": shown, "latency_ms_p50": percentile(viewer.latencies, 0.5),
            "latency_ms_p99": percentile(viewer.latencies, 0.99), "last": samples[-1],
            "failures": failures}


if __name__ == "__main__":
    main()
