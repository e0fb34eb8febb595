#!/usr/bin/python3
"""Measures a SPICE server with spice-gtk as the client, beside QEMU's; JSON on stdout, a table on stderr.

    spice_bench.py --bin-dir target/release/examples [--rtt 0,50,100] [--size 1024x768]
    spice_bench.py --address HOST:PORT   only what needs no test picture: connect, idle

Both sides show the same pictures: ours the test picture, QEMU a guest that changes a square when a key
goes down (vga.c) and frames painted into its memory from outside (content.py). Test picture and delay
proxy are the crate's examples:
    cargo build --release -p spice-server --examples
"""
import argparse
import glob
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

from client import Client, Process, S, summary  # noqa: E402
import content  # noqa: E402

KEY = 30
MOVING = ("texture", "noise")
PORT = 5971


def queued_ms(pid):
    """How long a process's threads were ready and had no processor, all together."""
    total = 0
    for task in glob.glob(f"/proc/{pid}/task/*/schedstat"):
        try:
            with open(task) as stat:
                total += int(stat.read().split()[1])
        except OSError:
            pass  # a thread that has just ended
    return total / 1e6


def measure_connect(address, count, pid=None):
    """From the first packet to the first picture. The first one of a server is told apart: it may wait
    for what is made once. Of the slowest: how long both sides waited for a processor."""
    times, slowest = [], (0, 0)
    for _ in range(count + 1):
        before = queued_ms(pid) + queued_ms(os.getpid()) if pid else 0
        client = Client(address)
        client.run(until=lambda: client.first_frame is not None)
        times.append(client.first_frame * 1000)
        queued = queued_ms(pid) + queued_ms(os.getpid()) - before if pid else 0
        if len(times) > 1:
            slowest = max(slowest, (times[-1], queued))
        client.close()
    result = summary(times[1:])
    result["first"] = round(times[0], 2)
    if pid:
        result["max_queued"] = round(slowest[1], 2)
    return result


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
    return round(result, 1)


class Ours:
    """The test picture on our server."""

    def __init__(self, options, mode):
        self.server = Process(
            os.path.join(options.bin_dir, "test-picture"), "--listen", "127.0.0.1:0", "--mode", mode,
            "--size", options.size, "--quiet")
        self.address, self.pid = self.server.address, self.server.pid

    def stop(self):
        self.server.__exit__()


class QemuKeys:
    """A guest of QEMU's that answers keys, on the adapter and the server that it has by itself."""

    def __init__(self, options, guest):
        self.qemu = subprocess.Popen(
            ["qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", "64", "-nodefaults",
             "-vga", "std", "-display", "none", "-kernel", guest, "-spice",
             f"port={PORT},addr=127.0.0.1,disable-ticketing=on,image-compression=auto_lz,"
             "streaming-video=off"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.pid, self.address = self.qemu.pid, ("127.0.0.1", PORT)
        try:
            self.wait(tuple(int(number) for number in options.size.split("x")))
        except BaseException:
            self.stop()
            raise

    def wait(self, size):
        """Until the guest shows its picture."""
        for _ in range(100):
            client = Client(self.address)
            end = time.perf_counter() + 1
            while client.size != size and time.perf_counter() < end:
                client.run(seconds=0.05)
            client.close()
            if client.size == size:
                return
        raise SystemExit("QEMU's guest shows nothing")

    def stop(self):
        self.qemu.kill()
        self.qemu.wait()


def qemu_guests(folder, size):
    """The guest that answers keys and the one that is painted from outside; None without a compiler."""
    out = os.path.join(folder, "vga.elf")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vga.c")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler or not shutil.which("qemu-system-x86_64"):
        return None
    command = [compiler, "-m32", "-O1", "-ffreestanding", "-nostdlib", "-static", "-fno-pic",
               "-fno-stack-protector", "-mgeneral-regs-only", f"-DWIDTH={size[0]}",
               f"-DHEIGHT={size[1]}", "-Wl,-n", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none",
               source, "-o", out]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        return None
    painted = content.build_guest(folder, size)
    return painted and (out, painted)


def basics(options):
    """Connecting, keys, full frames and idling, each round trip on both sides in turns."""
    rtts = [float(rtt) for rtt in options.rtt.split(",")]
    size = tuple(int(number) for number in options.size.split("x"))
    result = {"rtt": {}, "idle_bytes_per_s": {}}

    def through(rtt, side, measure, *arguments):
        if not rtt:
            return measure(side.address, *arguments)
        target = f"{side.address[0]}:{side.address[1]}"
        proxy = os.path.join(options.bin_dir, "delay-proxy")
        with Process(proxy, "127.0.0.1:0", target, str(rtt)) as line:
            return measure(line.address, *arguments)

    def rows(which, mode, start):
        """All that a program shows, at each round trip, then it ends."""
        side = start()
        try:
            for rtt in rtts:
                row = result["rtt"].setdefault(f"{rtt:g}", {}).setdefault(which, {})
                if mode == "key":
                    connects, keys = (options.connects, options.keys) if not rtt else (10, 50)
                    row["connect_ms"] = through(rtt, side, measure_connect, connects, side.pid)
                    row["key_ms"] = through(rtt, side, measure_keys, keys)
                else:
                    row[mode] = through(rtt, side, measure_frames, options.seconds)
            if mode == "key":
                result["idle_bytes_per_s"][which] = measure_idle(side.address, options.seconds)
        finally:
            side.stop()

    with tempfile.TemporaryDirectory() as folder:
        guests = qemu_guests(folder, size) if "qemu" in options.sides.split(",") else None
        for mode in ("key", *MOVING):
            rows("ours", mode, lambda mode=mode: Ours(options, mode))
            if guests and mode == "key":
                rows("qemu", mode, lambda: QemuKeys(options, guests[0]))
            elif guests:
                rows("qemu", mode, lambda mode=mode: content.Qemu(
                    options.bin_dir, mode, size, 60, guests[1], PORT, "off"))
    # What the longest line leaves of the frames.
    first, last = result["rtt"][f"{min(rtts):g}"], result["rtt"][f"{max(rtts):g}"]
    result["fps_ratio_at_longest_rtt"] = {
        which: {mode: round(last[which][mode]["fps"] / first[which][mode]["fps"], 3)
                for mode in MOVING if first[which][mode]["fps"]}
        for which in first}
    return result


FIGURES = (
    ("connect p50 ms", lambda row: row["connect_ms"]["p50"]),
    ("connect p95 ms", lambda row: row["connect_ms"]["p95"]),
    ("key p50 ms", lambda row: row["key_ms"]["p50"]),
    ("key p95 ms", lambda row: row["key_ms"]["p95"]),
    ("texture fps", lambda row: row["texture"]["fps"]),
    ("texture Mbit/s", lambda row: row["texture"]["mbit_per_s"]),
    ("noise fps", lambda row: row["noise"]["fps"]),
    ("noise Mbit/s", lambda row: row["noise"]["mbit_per_s"]),
)


def print_basics(result):
    line = "{:>6} {:<16} {:>9} {:>9} {:>7}"
    print(line.format("RTT", "", "ours", "QEMU", "ratio"), file=sys.stderr)

    def compare(rtt, name, ours, peer):
        ratio = f"{ours / peer:.2f}" if peer else "-"
        print(line.format(rtt, name, ours, "-" if peer is None else peer, ratio), file=sys.stderr)

    for rtt, sides in result["rtt"].items():
        for name, figure in FIGURES:
            compare(rtt, name, figure(sides["ours"]), figure(sides["qemu"]) if "qemu" in sides else None)
    for rtt, sides in result["rtt"].items():
        for which, row in sides.items():
            one = row["connect_ms"]
            print(f"{rtt:>6} connect, {which}: the first {one['first']} ms; the slowest after it {one['max']} ms, "
                  f"of which both sides' threads waited {one['max_queued']} ms for a processor",
                  file=sys.stderr)
    idle = result["idle_bytes_per_s"]
    compare("0", "idle B/s", idle["ours"], idle.get("qemu"))
    longest = list(result["rtt"])[-1]
    for mode in MOVING:
        kept = {which: ratios.get(mode) for which, ratios in result["fps_ratio_at_longest_rtt"].items()}
        compare(longest, f"{mode} of 0 ms", kept["ours"], kept.get("qemu"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin-dir", help="folder with test-picture and delay-proxy")
    parser.add_argument("--address", help="measure this server instead")
    parser.add_argument("--rtt", default="0,50,100", help="round trips in ms")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--connects", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--no-content", action="store_true", help="not what is shown, only how fast")
    parser.add_argument("--no-basics", action="store_true", help="only what is shown")
    parser.add_argument("--rows", help="of the content bench, for example scroll,film")
    parser.add_argument("--links", help="of the content bench: RTT_MS:MBIT, 0 for no limit")
    parser.add_argument("--sides", default="ours,qemu")
    parser.add_argument("--host", default="127.0.0.1",
                        help="where the servers listen; over another address of this machine than "
                        "loopback ours takes clients for distant ones, and sends them films as streams")
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
    result = {"client": "spice-gtk " + S.util_get_version_string(), "size": options.size}
    if not options.no_basics:
        result.update(basics(options))
    if not options.no_content:
        result["content"] = content.measure(options)
    json.dump(result, sys.stdout, indent=2)
    print()
    if not options.no_content:
        content.print_table(result["content"])
    if not options.no_basics:
        print_basics(result)


if __name__ == "__main__":
    main()
