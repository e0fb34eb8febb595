#!/usr/bin/python3
"""A SPICE client on spice-gtk for sound: keeps what it would play, records a sine.

    sound_client.py HOST PORT PLAYED [FREQUENCY [SPEED]]

What arrives on the playback channel is appended to the file PLAYED (S16LE, stereo); where it asks to
record, it says a sine of FREQUENCY Hz, 20 ms at a time, on a clock that runs SPEED times as fast as
the system's. Every line of stdout is a JSON object with "ev". Ends with its stdin. If SPEAKER is set, spice-gtk
plays it as well, by GStreamer.
"""
import array
import ctypes
import json
import math
import os
import sys
import time

import gi

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import GLib, GObject, SpiceClientGLib as S  # noqa: E402

host, port, path = sys.argv[1:4]
frequency = float(sys.argv[4]) if len(sys.argv) > 4 else 440.0
speed = float(sys.argv[5]) if len(sys.argv) > 5 else 1.0
loop = GLib.MainLoop()
played = open(path, "wb", buffering=0)
RATE = 48000
last_loud = 0
PIECE = 960


def say(ev, **fields):
    print(json.dumps({"ev": ev, "at": time.monotonic(), **fields}), flush=True)


def on(obj, signal, handler):
    # Session.connect and Channel.connect shadow GObject's.
    GObject.Object.connect(obj, signal, handler)


def playback_data(channel, data, size):
    data = ctypes.string_at(data, size) if isinstance(data, int) else bytes(data[:size])
    played.write(data)
    samples = array.array("h", data)
    loud = next((i for i, sample in enumerate(samples) if abs(sample) > 16000), None)
    global last_loud
    if loud is not None:
        # Opus rings on for a packet or two.
        if time.monotonic() - last_loud > 0.1:
            say("loud")
        last_loud = time.monotonic()


class Microphone:
    """Says a sine as its own clock goes."""

    def __init__(self, channel):
        self.channel = channel
        self.began = time.monotonic()
        self.said = 0
        self.timer = GLib.timeout_add(10, self.say)

    def say(self):
        due = (time.monotonic() - self.began) * RATE * speed
        while self.said + PIECE <= due:
            samples = array.array("h")
            for i in range(self.said, self.said + PIECE):
                value = round(10000 * math.sin(2 * math.pi * frequency * i / RATE))
                samples.extend((value, value))
            self.said += PIECE
            address, _ = samples.buffer_info()
            self.channel.send_data(address, len(samples) * 2, int(time.monotonic() * 1000) & 0xFFFFFFFF)
        return True

    def stop(self):
        GLib.source_remove(self.timer)


microphone = None


def record_start(channel, fmt, channels, rate):
    global microphone
    say("record-start", format=fmt, channels=channels, rate=rate)
    microphone = Microphone(channel)


def record_stop(channel):
    global microphone
    say("record-stop")
    if microphone:
        microphone.stop()
        microphone = None


def new_channel(session, channel):
    name = type(channel).__name__
    on(channel, "channel-event", lambda c, event: say("channel", channel=name, event=event.value_nick))
    if name == "PlaybackChannel":
        on(channel, "playback-start",
           lambda c, fmt, channels, rate: say("start", format=fmt, channels=channels, rate=rate))
        on(channel, "playback-data", playback_data)
        on(channel, "playback-stop", lambda c: say("stop"))
        on(channel, "notify::volume", lambda c, _: say("volume", channels=c.get_property("nchannels")))
        on(channel, "notify::mute", lambda c, _: say("mute", mute=c.get_property("mute")))
        on(channel, "notify::min-latency",
           lambda c, _: say("latency", ms=c.get_property("min-latency")))
    elif name == "RecordChannel":
        on(channel, "record-start", record_start)
        on(channel, "record-stop", record_stop)
    elif name not in ("MainChannel",):
        return
    # A speaker takes those channels that nobody has connected.
    if name == "MainChannel" or not speaker:
        S.Channel.connect(channel)


session = S.Session()
session.set_property("host", host)
session.set_property("port", port)
session.set_property("enable-audio", True)
speaker = S.Audio.get(session, None) if "SPEAKER" in os.environ else None
on(session, "channel-new", new_channel)


def stdin_ready(source, condition):
    if not os.read(0, 4096):
        session.disconnect()
        loop.quit()
        return False
    return True


GLib.io_add_watch(sys.stdin.fileno(), GLib.IO_IN | GLib.IO_HUP, stdin_ready)
S.Session.connect(session)
loop.run()
