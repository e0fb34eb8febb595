"""A SPICE client on spice-gtk for measurements, and helpers around it."""
import ctypes
import glob
import os
import statistics
import subprocess
import time

import gi

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import GLib, GObject, SpiceClientGLib as S  # noqa: E402

def on(obj, signal, handler):
    GObject.Object.connect(obj, signal, handler)


class Client:
    """A connected client; counts pixels drawn and bytes read."""

    def __init__(self, address, password=None, authority=None):
        """`authority`: file with its certificate, for TLS."""
        host, port = address
        self.loop = GLib.MainLoop()
        self.channels = {}
        self.pixels = 0
        self.on_invalidate = None
        self.watch_stamps = False
        self.stamp = None
        self.latencies = []
        self.changes = []
        self.stream_at = None
        self.data = None
        self.first_frame = None
        self.size = (0, 0)
        self.started = time.perf_counter()
        self.session = S.Session()
        for name, value in (("host", host), ("port", str(port)), ("enable-audio", False)):
            self.session.set_property(name, value)
        if authority:
            self.session.set_property("port", None)
            self.session.set_property("tls-port", str(port))
            self.session.set_property("ca-file", authority)
        if password:
            self.session.set_property("password", password)
        on(self.session, "channel-new", self.new_channel)
        S.Session.connect(self.session)

    def new_channel(self, session, channel):
        name = type(channel).__name__
        self.channels[name] = channel
        if name == "DisplayChannel":
            on(channel, "display-primary-create", self.primary)
            on(channel, "display-invalidate", self.invalidate)
        S.Channel.connect(channel)

    def primary(self, channel, fmt, width, height, stride, shmid, data):
        self.size = (width, height)
        self.data = (data, stride)

    def invalidate(self, channel, x, y, width, height):
        if self.first_frame is None:
            self.first_frame = time.perf_counter() - self.started
        elif self.stream_at is None and height > 128:
            # Pictures come in rows of 64 pixels.
            self.stream_at = time.perf_counter()
        self.pixels += width * height
        if self.watch_stamps and x < 128 and y < 8:
            self.read_stamp()
        if self.on_invalidate:
            self.on_invalidate()

    def read_stamp(self):
        """Reads the time at which the picture shown was painted, from its first pixels."""
        data, stride = self.data
        if self.size[0] < 128:
            return
        row = ctypes.string_at(data + 4 * stride, 512)
        stamp = sum((row[bit * 32 + 16] > 127) << bit for bit in range(16))
        stamp, check = stamp >> 4, stamp & 15
        if check != ((stamp & 15) * 3 + (stamp >> 4 & 15) * 5 + (stamp >> 8) * 7 + 6) & 15:
            return  # half painted
        if stamp != self.stamp:
            self.stamp = stamp
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000
            self.latencies.append((now - stamp) % 4096)
            self.changes.append(time.perf_counter())

    def start_gap(self):
        """Milliseconds the picture stood still at most while the first video stream began."""
        if self.stream_at is None:
            return None
        near = [at for at in self.changes if abs(at - self.stream_at) < 1.5]
        return round(max((b - a for a, b in zip(near, near[1:])), default=0) * 1000)

    def bytes_read(self):
        return sum(int(c.get_property("total-read-bytes")) for c in self.channels.values())

    def run(self, seconds=None, until=None, limit=120):
        """Runs the main loop for a time, or until something is true."""
        end = time.perf_counter() + (seconds if seconds is not None else limit)
        context = GLib.MainContext.default()
        timer = GLib.timeout_add(5, lambda: True)
        while time.perf_counter() < end and not (until and until()):
            context.iteration(True)
        GLib.source_remove(timer)
        if until and not until():
            raise SystemExit("the server did not answer in time")

    def ready(self):
        self.run(until=lambda: self.first_frame is not None and "InputsChannel" in self.channels)
        self.run(seconds=0.3)

    def close(self):
        self.session.disconnect()
        self.run(seconds=0.05)


class Process:
    """A helper program that says where it listens."""

    def __init__(self, *command, log=subprocess.DEVNULL):
        self.pid = None
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.pid = self.child.pid
        line = self.child.stdout.readline()
        if "listening" not in line:
            return
        host, port = line.split()[-1].rsplit(":", 1)
        self.address = (host, int(port))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def summary(values):
    return {"p50": round(statistics.median(values), 2), "p95": round(percentile(values, 0.95), 2),
            "min": round(min(values), 2), "max": round(max(values), 2), "n": len(values)}




def cpu_seconds(pid, prefix=""):
    """Processor time of a process's threads whose names begin so."""
    total = 0
    for task in glob.glob(f"/proc/{pid}/task/*"):
        try:
            with open(task + "/comm") as name, open(task + "/schedstat") as stat:
                if name.read().startswith(prefix):
                    total += int(stat.read().split()[0])
        except OSError:
            pass  # a thread that has just ended
    return total / 1e9
