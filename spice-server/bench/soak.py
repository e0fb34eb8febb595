#!/usr/bin/python3
"""Keeps a server under connects, half of them hostile, while honest viewers look on.

    soak.py --bin-dir target/release/examples [--minutes 60] [--rate 50] [--film]

Clients and hostile peers come plain, with TLS, with WebSockets and with both. The server may not grow, lose a
frame for an honest viewer (both judged in runs of ten minutes and more), fail an honest client, panic, or
have one descriptor or thread more at the end, when all have gone, than in the beginning. Prints JSON, and
fails (status 1) where one of these happened. Hostile peers come from many addresses of the loopback network,
because an address with wrong passwords is locked out, and have the lowest priority, so that the machine is
not what loses frames.

With `--film` there are two honest viewers of a film, behind a line that streams are made for: one takes VP8,
the other H.264. Otherwise there is one, of somebody who types.
"""
import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from client import Client, GLib, Process, percentile

FPS = 10
SIZE = "640x480"
# What an honest viewer of a film prefers (`SpiceVideoCodecType`), by its name in the server's statistics.
CODECS = {"vp8": [2, 1], "h264": [3, 1]}
# Round trip in ms and Mbit/s of the line to the viewers of a film.
FILM_LINE = ("2", "100")
# From here on a run is long enough for judging memory and pictures.
LONG_MINUTES = 10
# How long the server may take to forget those who have gone: what a stalled link has, and some more.
QUIET_SECONDS = 60
LINK_HEADER = b"REDQ" + (2).to_bytes(4, "little") + (2).to_bytes(4, "little")
# Connection 0, main channel, no capabilities.
LINK = LINK_HEADER + (18).to_bytes(4, "little") + bytes(4) + b"\1\0" + bytes(8) + b"\x12\0\0\0"


def address_of_its_own():
    return f"127.{random.randrange(1, 255)}.{random.randrange(255)}.7"


def attempt(server, bodies):
    """A connection from a random address that sends these bytes and reads what comes."""
    with socket.socket() as peer:
        peer.settimeout(20)
        peer.bind((address_of_its_own(), 0))
        try:
            peer.connect(server.address)
            for body in bodies:
                if isinstance(body, float):
                    time.sleep(body)
                else:
                    peer.sendall(body)
                    peer.recv(65536)
        except OSError:
            pass  # cut off, as it should be


def wrong_password(server):
    attempt(server, [LINK, (1).to_bytes(4, "little") + os.urandom(128), b"x"])


def garbage(server):
    attempt(server, [os.urandom(random.randrange(1, 65536))])


def stall(server):
    attempt(server, [LINK[:random.randrange(len(LINK))], 12.0, b"x"])


def oversize(server):
    attempt(server, [LINK_HEADER + b"\xff\xff\xff\x7f" + bytes(1 << 20)])


def half_tls_and_web(server):
    attempt(server, [random.choice([b"\x16\x03\x01\x00\xff", b"GET / HTTP/1.1\r\n"]), 3.0, b"x"])


def peer(server, mode, seconds, password=""):
    """The example `soak-peer`; what it says."""
    host, port = server.address
    done = subprocess.run([server.peer, mode, f"{host}:{port}", address_of_its_own(), str(seconds), password],
                          stdout=subprocess.PIPE, text=True, timeout=120)
    return done.stdout.strip()


def empty_frames(server):
    peer(server, "web-empty", 30)


def empty_records(server):
    peer(server, "tls-empty", 30)


def empty_frames_in_tls(server):
    peer(server, "tls+web-empty", 30)


def wrong_password_in_layers(server):
    peer(server, random.choice(["web", "tls", "tls+web"]), 1, "wrong")


def nothing_from_inside(server):
    """A client with the password that sends empty frames or records as fast as it can."""
    peer(server, random.choice(["web-inside", "tls-inside", "tls+web-inside"]), 3, server.password)


HOSTILE = [wrong_password, garbage, stall, oversize, half_tls_and_web, empty_frames, empty_records,
           empty_frames_in_tls, wrong_password_in_layers, nothing_from_inside]


def flood(client):
    """A client with the password that presses keys as fast as it can."""
    inputs = client.channels["InputsChannel"]
    for code in range(20000):
        inputs.key_press(code % 80 + 1)


class Watcher:
    """An honest viewer: a process of its own, so that nothing else here keeps it from looking."""

    def __init__(self, address, password, codecs=()):
        code = [sys.executable, os.path.abspath(__file__), "--watch"]
        words = [address[0], str(address[1]), password, *map(str, codecs)]
        self.child = subprocess.Popen(code + words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self):
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit("an honest viewer has lost its connection")
        return json.loads(line)

    def ask(self, what):
        self.child.stdin.write(what + "\n")
        self.child.stdin.flush()

    def begin(self):
        """Looks from now on."""
        self.ask("begin")
        self.answer()

    def end(self):
        """What was seen since then: latencies of the frames in ms."""
        self.ask("end")
        return self.answer()

    def sees(self):
        """Whether pictures still come."""
        self.begin()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.5)
            if self.end():
                return True
        return False

    def close(self):
        self.child.kill()
        self.child.wait()


def watch(host, port, password, *codecs):
    """The process of a `Watcher`."""
    client = Client((host, int(port)), password)
    client.run(until=lambda: client.first_frame is not None)
    if codecs:
        display = client.channels["DisplayChannel"]
        display.display_channel_change_preferred_video_codec_types([int(codec) for codec in codecs])
    client.ready()
    lines, asked = GLib.IOChannel.unix_new(0), []
    GLib.io_add_watch(lines, GLib.IO_IN | GLib.IO_HUP, lambda *_: asked.append(sys.stdin.readline()) or True)
    print("{}", flush=True)
    while True:
        client.run(until=lambda: asked, limit=1e9)
        if not (word := asked.pop(0).strip()):
            break
        if word == "begin":
            client.latencies, client.watch_stamps = [], True
        print(json.dumps(client.latencies), flush=True)


class Server(Process):
    """The server under test, which says once a second how many frames it has painted."""

    def __init__(self, *command, log):
        super().__init__(*command, log=log)
        self.painted, self.messages = 0, {}
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.child.stdout:
            words = line.split()
            if words[:1] == ["painted"]:
                self.painted = int(words[1])
            for codec in CODECS:
                if codec in words:
                    count = int(words[words.index(codec) + 1])
                    self.messages[codec] = max(count, self.messages.get(codec, 0))


def vitals(pid):
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        lines = {line.split()[0]: line.split()[1] for line in rollup if line.startswith(("Rss", "Pss:"))}
    return {"rss_kib": int(lines["Rss:"]), "fds": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": len(os.listdir(f"/proc/{pid}/task"))}


def make_certificate(folder):
    """A certificate that is its own authority, and its key."""
    certificate, key = os.path.join(folder, "certificate"), os.path.join(folder, "key")
    subprocess.run(["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-subj", "/CN=soak", "-days", "2", "-addext",
                    "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
                   check=True, stderr=subprocess.DEVNULL)
    return certificate, key


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bin-dir", required=True, help="folder with test-picture and soak-peer")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=50, help="connects per minute")
    parser.add_argument("--film", action="store_true", help="streams of VP8 and H.264 to two honest viewers")
    parser.add_argument("--seed", type=int, default=None, help="of what comes when")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    random.seed(seed)
    if not shutil.which("openssl"):
        raise SystemExit("openssl is not installed")
    with tempfile.TemporaryDirectory() as folder:
        password, log = "soak", os.path.join(folder, "log")
        password_file = os.path.join(folder, "password")
        with open(password_file, "w") as file:
            file.write(password)
        certificate, key = make_certificate(folder)
        with open(log, "w") as errors:
            server = Server(os.path.join(options.bin_dir, "test-picture"), "--listen", "127.0.0.1:0",
                            "--mode", "film" if options.film else "typing", "--fps", str(FPS), "--size", SIZE,
                            "--quiet", "--stats", "--policy", "shared", "--password-file", password_file,
                            "--tls-cert-file", certificate, "--tls-key-file", key, log=errors)
        server.password, server.authority = password, certificate
        server.peer = os.path.join(options.bin_dir, "soak-peer")
        with server:
            result = Soak(server, options).run()
        with open(log) as lines:
            panics = [line.strip() for line in lines if "panicked" in line]
        result["failures"] += panics[:5]
        result["seed"] = seed
    json.dump(result, sys.stdout, indent=2)
    print()
    sys.exit(1 if result["failures"] else 0)


class Soak:
    def __init__(self, server, options):
        self.server, self.options = server, options
        self.counts, self.failures, self.threads = {}, [], []
        self.watchers = {}

    def begin(self, function):
        def at_lowest_priority():
            # Of this thread, and of what it starts.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            function()

        thread = threading.Thread(target=at_lowest_priority, daemon=True)
        thread.start()
        self.threads.append(thread)

    def honest_gtk(self, authority=None, floods=False):
        client = Client(self.server.address, self.server.password, authority)
        client.ready()
        if floods:
            flood(client)
        client.close()

    def honest_layers(self):
        mode = random.choice(["web", "tls", "tls+web"])
        said = peer(self.server, mode, 1, self.server.password)
        if said != "served":
            self.failures.append(f"an honest client ({mode}) was not served: {said}")

    def honest(self, turn):
        kind = turn % 4
        name = ["honest", "honest TLS", "honest layers", "flood"][kind]
        try:
            if kind == 2:
                self.begin(self.honest_layers)
            else:
                self.honest_gtk(self.server.authority if kind == 1 else None, kind == 3)
        except SystemExit as error:
            self.failures.append(f"{name}: {error}")
        return name

    def quiet(self, wanted):
        """Waits until all have gone; what the server has then."""
        end = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < end:
            spin(0.2)
            self.threads = [thread for thread in self.threads if thread.is_alive()]
            now = vitals(self.server.pid)
            if not self.threads and wanted(now):
                break
        return now

    def run(self):
        options, server = self.options, self.server
        if not options.film:
            self.watchers = {"typing": Watcher(server.address, server.password)}
            return self.watched()
        host, port = server.address
        proxy = [os.path.join(options.bin_dir, "delay-proxy"), "127.0.0.1:0", f"{host}:{port}", *FILM_LINE]
        with Process(*proxy) as line:
            for name, codecs in CODECS.items():
                self.watchers[name] = Watcher(line.address, server.password, codecs)
            result = self.watched()
        result["stream_frames"] = server.messages
        for name in self.watchers:
            if options.minutes >= LONG_MINUTES and server.messages.get(name, 0) < options.minutes * 60 * FPS / 2:
                self.failures.append(f"half of the film was not {name}: {server.messages}")
        return result

    def watched(self):
        options = self.options
        # One of each has come and gone: what is made once is there.
        for turn in range(4):
            self.honest(turn)
        seen = []
        # The same ten times in a row, a fifth of a second apart.
        first = self.quiet(lambda now: seen.append((now["fds"], now["threads"])) or
                           (len(seen) >= 10 and len(set(seen[-10:])) == 1))
        shown, painted, samples = self.storm()
        last = self.quiet(lambda now: all(now[what] <= first[what] for what in ("fds", "threads")))
        if self.threads:
            self.failures.append(f"{len(self.threads)} peers are still busy")
        for what in ("fds", "threads"):
            if last[what] > first[what]:
                self.failures.append(f"{what}: {first[what]} at first, {last[what]} at last")
        for name, watcher in self.watchers.items():
            if not watcher.sees():
                self.failures.append(f"the honest viewer ({name}) sees nothing any more")
            watcher.close()
        result = {"minutes": options.minutes, "connects": self.counts, "first": first, "last": last,
                  "frames_painted": painted, "viewers": {}}
        for name, latencies in shown.items():
            result["viewers"][name] = {
                "frames_seen": len(latencies), "latency_ms_p50": percentile(latencies or [0], 0.5),
                "latency_ms_p99": percentile(latencies or [0], 0.99)}
            if options.minutes >= LONG_MINUTES and len(latencies) < painted * 0.99:
                self.failures.append(f"the viewer ({name}) saw {len(latencies)} of {painted} frames")
        third = max(1, len(samples) // 3)
        early = statistics.median(sample["rss_kib"] for sample in samples[:third])
        late = statistics.median(sample["rss_kib"] for sample in samples[-third:])
        growth = (late - early) / early * 100
        result.update(rss_kib_early=early, rss_kib_late=late, growth_percent=round(growth, 2))
        if options.minutes >= LONG_MINUTES:
            if growth > 2:
                self.failures.append(f"the server grew by {growth:.1f} %")
        result["failures"] = self.failures
        return result

    def storm(self):
        """Everybody comes. What the viewers saw, the frames there were, and samples of the server."""
        options = self.options
        samples, turn, painted = [], 0, None
        begin = time.monotonic()
        watched_from = next_sample = begin + min(120, options.minutes * 12)
        end = begin + options.minutes * 60
        next_connect = begin
        while time.monotonic() < end:
            now = time.monotonic()
            if painted is None and now >= watched_from:
                painted = self.server.painted
                for watcher in self.watchers.values():
                    watcher.begin()
            if now >= next_sample:
                samples.append(vitals(self.server.pid))
                next_sample += 15
            if now >= next_connect:
                next_connect += 60 / options.rate
                turn += 1
                if turn % 2:
                    # Each in its turn, so that a short run has them all.
                    kind = HOSTILE[turn // 2 % len(HOSTILE)]
                    self.begin(lambda kind=kind: kind(self.server))
                    name = kind.__name__
                else:
                    name = self.honest(turn // 2)
                self.counts[name] = self.counts.get(name, 0) + 1
            spin(min(0.2, max(0.01, next_connect - time.monotonic())))
        painted = self.server.painted - (painted or 0)
        spin(1)
        shown = {name: watcher.end() for name, watcher in self.watchers.items()}
        samples = samples or [vitals(self.server.pid)]
        return shown, painted, samples


def spin(seconds):
    """Lets clients in this process go their ways for so long."""
    loop = GLib.MainLoop()
    GLib.timeout_add(max(1, round(seconds * 1000)), loop.quit)
    loop.run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch(*sys.argv[2:])
    else:
        main()
