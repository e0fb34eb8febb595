#!/usr/bin/python3
"""Counts the round trips from a client's first packet to the whole picture, ours beside QEMU's.

    reconnect.py --bin-dir target/release/examples [--rtt 50,100] [--connects 10] [--mode typing]

The line is made of two network devices, one of them in a namespace of its own where the client (spice-gtk)
runs; every packet is carried with a delay, so that TCP's handshakes and slow start are the kernel's. Needs
root and /dev/net/tun. A line for each side and round trip on stderr, JSON on stdout; with `--timeline` the
packets with data of each side's last connect.
"""
import argparse
import collections
import ctypes
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time

from client import Client, Process, summary  # noqa: E402
import content  # noqa: E402

NEAR, FAR = "10.99.8.1", "10.99.8.2"
DEVICE = "spice-line"
PORT = 5972
CHANNELS = {1: "main", 2: "display", 3: "inputs", 4: "cursor", 5: "playback", 6: "record"}
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
CLONE_NEWNET = 0x40000000


def device(address, peer):
    line = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(line, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    subprocess.run(["ip", "addr", "add", address, "peer", peer, "dev", DEVICE], check=True)
    subprocess.run(["ip", "link", "set", DEVICE, "up"], check=True)
    return line


class Timeline:
    """Tells of the packets with data, since the first of the newest session."""

    def __init__(self):
        self.start, self.names = 0, {}

    def look(self, packet, outward):
        header = (packet[0] & 15) * 4
        data = packet[header + (packet[header + 12] >> 4) * 4:]
        client = struct.unpack_from(">H", packet, header + (2 if outward else 0))[0]
        if packet[0] >> 4 != 4 or packet[9] != 6 or not data:
            return
        if not outward and data[:4] == b"REDQ":
            self.names[client] = CHANNELS.get(data[20], str(data[20]))
            if data[20] == 1:
                self.start = time.perf_counter()
                print("the link of the main channel arrives", file=sys.stderr)
        ms = (time.perf_counter() - self.start) * 1000
        print(f"{ms:8.1f} ms {self.names.get(client, client):<9}{'<' if outward else '>'} {len(data):>5}  "
              f"{data[:12].hex()}", file=sys.stderr, flush=True)


def carry(rtt, namespace, tell):
    """The line, until its standard input ends. Times told are those at the near end."""
    libc = ctypes.CDLL(None, use_errno=True)
    near = device(NEAR, FAR)
    here, there = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(there, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    far = device(FAR, NEAR)
    libc.setns(here, CLONE_NEWNET)
    print(f"listening on {NEAR}:0", flush=True)
    under_way, timeline = collections.deque(), Timeline()
    while True:
        now = time.perf_counter()
        while under_way and under_way[0][0] <= now:
            _, to, packet = under_way.popleft()
            if tell and to == near:
                timeline.look(packet, False)
            os.write(to, packet)
        wait = max(0, under_way[0][0] - now) if under_way else None
        ready, _, _ = select.select([near, far, 0], [], [], wait)
        if 0 in ready:
            return
        for line in ready:
            try:
                while True:
                    packet = os.read(line, 65536)
                    if tell and line == near:
                        timeline.look(packet, True)
                    due = time.perf_counter() + rtt / 2000
                    under_way.append((due, far if line == near else near, packet))
            except BlockingIOError:
                pass


class Whole(Client):
    """Notes when everything of the picture has been drawn."""

    whole = None

    def invalidate(self, channel, x, y, width, height):
        super().invalidate(channel, x, y, width, height)
        if self.whole is None and self.size[0] and self.pixels >= self.size[0] * self.size[1]:
            self.whole = (time.perf_counter() - self.started) * 1000


def connect(port, count):
    times = []
    for _ in range(count + 1):
        client = Whole((NEAR, port))
        client.run(until=lambda: client.whole is not None)
        times.append(client.whole)
        read = client.bytes_read()
        client.close()
    json.dump({"ms": summary(times[1:]), "bytes": read}, sys.stdout)


def measure(options, start, rtt):
    """One side behind one line."""
    namespace = f"spice-bench-{os.getpid()}"
    again = [sys.executable, os.path.abspath(__file__)]
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        line = subprocess.Popen(
            [*again, "--line", str(rtt), "--namespace", namespace, *(["--timeline"] * options.timeline)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line.stdout.readline()
        if options.initcwnd:
            subprocess.run(["ip", "route", "change", FAR, "dev", DEVICE, "src", NEAR, "initcwnd",
                            str(options.initcwnd)], check=True)
        side = start()
        try:
            out = subprocess.run(
                ["ip", "netns", "exec", namespace, *again, "--client", str(side.address[1]), "--connects",
                 str(options.connects)], stdout=subprocess.PIPE, check=True)
        finally:
            side.stop()
            line.stdin.close()
            line.wait()
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)
    row = json.loads(out.stdout)
    row["round_trips"] = round(row["ms"]["p50"] / rtt, 2)
    return row


class Ours:
    def __init__(self, options):
        self.server = Process(
            os.path.join(options.bin_dir, "test-picture"), "--listen", f"{NEAR}:0", "--mode", options.mode,
            "--size", options.size, "--fps", "10", "--quiet")
        self.address = self.server.address

    def stop(self):
        self.server.__exit__()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin-dir", help="folder with test-picture")
    parser.add_argument("--rtt", default="50,100", help="round trips in ms")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--mode", default="typing", help="what the test picture shows")
    parser.add_argument("--connects", type=int, default=10)
    parser.add_argument("--sides", default="ours,qemu")
    parser.add_argument("--initcwnd", type=int, help="segments TCP may begin with, of the servers' route")
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--line", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--namespace", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line:
        return carry(options.line, options.namespace, options.timeline)
    if options.client:
        return connect(options.client, options.connects)
    if not options.bin_dir:
        parser.error("--bin-dir")
    size = tuple(int(number) for number in options.size.split("x"))
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        guest = content.build_guest(folder, size) if "qemu" in options.sides else None
        starts = {"ours": lambda: Ours(options),
                  "qemu": lambda: content.Qemu(
                      options.bin_dir, options.mode, size, 10, guest, PORT, "off", NEAR)}
        for rtt in (float(rtt) for rtt in options.rtt.split(",")):
            for which in options.sides.split(","):
                row = measure(options, starts[which], rtt)
                result.setdefault(f"{rtt:g}", {})[which] = row
                print(f"{which:>5} at {rtt:g} ms: {json.dumps(row)}", file=sys.stderr)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
