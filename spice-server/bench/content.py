"""What real work costs: the same frames shown by our server and by QEMU with libspice-server.

QEMU shows them through ramfb, whose frame buffer lies in guest memory that is a shared file: the
frames are painted into it from outside, and the guest halts. Every frame carries the time at which it
was painted in its first pixels; the client reads it back when it has drawn it.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time

from client import Client, Process, cpu_seconds, percentile

# Name, mode, size, frames per second.
ROWS = {
    "idle": ("static", (1280, 720), 30),
    "typing": ("typing", (1280, 720), 10),
    "scroll": ("scroll", (1280, 720), 30),
    "window": ("window", (1280, 720), 30),
    "pan": ("pan", (1280, 720), 30),
    "film": ("film", (1280, 720), 30),
    "film1080": ("film", (1920, 1080), 30),
    "film60": ("film", (1920, 1080), 60),
    "noise": ("noise", (1280, 720), 30),
}
# Round trip in ms, Mbit/s (0: no limit).
LINKS = [(0, 0), (50, 0), (100, 0), (20, 100), (20, 10), (100, 10)]
OFFSET = 0x2000000
MEMORY_MIB = 64


def build_guest(folder, size):
    """The guest that halts; None without a compiler."""
    out = os.path.join(folder, f"ramfb-{size[0]}x{size[1]}.elf")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ramfb.c")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    command = [compiler, "-m32", "-O1", "-ffreestanding", "-nostdlib", "-static", "-fno-pic",
               "-fno-stack-protector", f"-DWIDTH={size[0]}", f"-DHEIGHT={size[1]}", "-Wl,-n",
               "-Wl,-Ttext=0x100000", "-Wl,--build-id=none", source, "-o", out]
    done = subprocess.run(command, stderr=subprocess.DEVNULL)
    return out if done.returncode == 0 else None


class Ours:
    cpu_prefix = "spice-"

    def __init__(self, bin_dir, mode, size, fps, codec="auto", whole=True, host="127.0.0.1"):
        more = ["--whole"] if whole else []
        more += ["--video-codec", codec]
        self.server = Process(
            os.path.join(bin_dir, "test-picture"), "--listen", f"{host}:0", "--mode", mode,
            "--size", f"{size[0]}x{size[1]}", "--fps", str(fps), "--quiet", *more)
        self.address, self.pid = self.server.address, self.server.pid

    def stop(self):
        self.server.__exit__()


class Qemu:
    cpu_prefix = ""

    def __init__(self, bin_dir, mode, size, fps, guest, port, streaming, host="127.0.0.1"):
        self.memory = f"/dev/shm/spice-bench-{os.getpid()}-{port}"
        self.qemu = subprocess.Popen(
            ["qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", str(MEMORY_MIB),
             "-object", f"memory-backend-file,id=m,size={MEMORY_MIB}M,share=on,mem-path={self.memory}",
             "-machine", "memory-backend=m", "-nodefaults", "-vga", "none", "-device", "ramfb",
             "-display", "none", "-kernel", guest, "-spice",
             f"port={port},addr={host},disable-ticketing=on,image-compression=auto_lz,"
             f"streaming-video={streaming}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.painter = None
        self.pid, self.address = self.qemu.pid, (host, port)
        # Until the guest has told QEMU where the frame buffer is.
        time.sleep(4)
        if mode != "static":
            self.painter = Process(
                os.path.join(bin_dir, "test-picture"), "--mode", mode, "--size",
                f"{size[0]}x{size[1]}", "--fps", str(fps), "--into", self.memory, "--offset",
                str(OFFSET))

    def stop(self):
        if self.painter:
            self.painter.__exit__()
        self.qemu.kill()
        self.qemu.wait()
        os.unlink(self.memory)


def measure_row(side, address, seconds):
    client = Client(address)
    client.watch_stamps = True
    client.run(until=lambda: client.first_frame is not None, limit=40)
    # Streams begin, estimates settle.
    client.run(seconds=3)
    start_gap = client.start_gap()
    client.latencies, client.stamp = [], None
    read, cpu = client.bytes_read(), cpu_seconds(side.pid, side.cpu_prefix)
    begin = time.perf_counter()
    client.run(seconds=seconds)
    elapsed = time.perf_counter() - begin
    result = {
        "mbit_per_s": round((client.bytes_read() - read) * 8e-6 / elapsed, 3),
        "cpu": round((cpu_seconds(side.pid, side.cpu_prefix) - cpu) / elapsed, 4),
        "fps": round(len(client.latencies) / elapsed, 1),
    }
    if client.latencies:
        result["latency_ms"] = {"p50": percentile(client.latencies, 0.5),
                                "p95": percentile(client.latencies, 0.95)}
    if start_gap is not None:
        result["start_gap_ms"] = start_gap
    if result["fps"]:
        result["cpu_ms_per_frame"] = round(result["cpu"] * 1000 / result["fps"], 2)
    client.close()
    return result


def measure(options):
    rows = options.rows.split(",") if options.rows else list(ROWS)
    links = LINKS
    if options.links:
        links = [tuple(float(n) for n in link.split(":")) for link in options.links.split(",")]
    sides = options.sides.split(",")
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for name in rows:
            mode, size, fps = ROWS[name]
            for which in sides:
                for streaming in ["off", "all"] if which == "qemu" and "film" in name else ["off"]:
                    if which.startswith("ours"):
                        # "ours-mjpeg": with another codec for films than the best one.
                        codec = which.partition("-")[2] or "auto"
                        side = Ours(options.bin_dir, mode, size, fps, codec, host=options.host)
                    else:
                        guest = build_guest(folder, size)
                        if not guest or not shutil.which("qemu-system-x86_64"):
                            continue
                        side = Qemu(options.bin_dir, mode, size, fps, guest, 5961, streaming,
                                    options.host)
                    label = which + (" stream" if streaming == "all" else "")
                    try:
                        for link in links:
                            result.append(through(options, side, name, label, link))
                    finally:
                        side.stop()
    return result


def through(options, side, name, label, link):
    rtt, mbit = link
    row = {"row": name, "side": label, "rtt_ms": rtt, "limit_mbit": mbit}
    try:
        if not rtt and not mbit:
            row.update(measure_row(side, side.address, options.seconds))
        else:
            target = f"{side.address[0]}:{side.address[1]}"
            proxy = [os.path.join(options.bin_dir, "delay-proxy"), "127.0.0.1:0", target, str(rtt)]
            with Process(*proxy, *([str(mbit)] if mbit else [])) as line:
                row.update(measure_row(side, line.address, options.seconds))
    except SystemExit as error:
        row["error"] = str(error)
    print(format_row(row), file=sys.stderr, flush=True)
    return row


def format_row(row):
    latency = row.get("latency_ms", {})
    return "{:<9} {:<12} {:>4g} ms {:>4} {:>9} Mbit/s {:>5} fps {:>5} {:>5} ms  cpu {:>6} {:>5}".format(
        row["row"], row["side"], row["rtt_ms"], f"{row['limit_mbit']:g}" if row["limit_mbit"] else "-",
        row.get("mbit_per_s", row.get("error", "")), row.get("fps", ""), latency.get("p50", "-"),
        latency.get("p95", "-"), row.get("cpu", ""), row.get("start_gap_ms", ""))


def print_table(rows):
    print("\nrow       side         round trip, limit, rate, frames shown, latency p50 p95, cores, "
          "standstill when a stream begins",
          file=sys.stderr)
    for row in rows:
        print(format_row(row), file=sys.stderr)
