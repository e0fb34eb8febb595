#!/usr/bin/python3
"""A SPICE client on spice-gtk that does what it is told on stdin and says on stdout what it sees.

Every line of stdin is a command with arguments, every line of stdout a JSON object with "ev".
Arguments: host, port (`-` for none), perhaps a password, and properties of SpiceSession as KEY=VALUE.
"""
import ctypes
import hashlib
import json
import os
import sys

import gi

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import GLib, GObject, SpiceClientGLib as S  # noqa: E402

properties = dict(word.split("=", 1) for word in sys.argv[3:] if "=" in word)
host, port = sys.argv[1], sys.argv[2]
password = next((word for word in sys.argv[3:] if "=" not in word), None)
loop = GLib.MainLoop()
channels = {}
# Display channels and what they show, by number.
displays = {}
primaries = {}


def say(ev, **fields):
    print(json.dumps({"ev": ev, **fields}), flush=True)


def on(obj, signal, handler):
    # Session.connect and Channel.connect shadow GObject's.
    GObject.Object.connect(obj, signal, handler)


session = S.Session()
session.set_property("host", host)
if port != "-":
    session.set_property("port", port)
session.set_property("enable-audio", False)
if password is not None:
    session.set_property("password", password)
for key, value in properties.items():
    listed = key == "secure-channels"
    verify = {"pubkey": 1, "hostname": 2, "subject": 4}
    if key == "verify":
        value = S.SessionVerify(verify[value])
    session.set_property(key, value.split("+") if listed else value)


def channel_event(channel, event):
    name = type(channel).__name__
    say("channel", channel=name, event=event.value_nick)
    if name == "MainChannel" and event.value_nick not in ("opened", "none"):
        loop.quit()


def primary_create(channel, fmt, width, height, stride, shmid, data):
    number = channel.get_property("channel-id")
    primaries[number] = (width, height, stride, data)
    say("primary", display=number, width=width, height=height)


def primary_destroy(channel):
    primaries.pop(channel.get_property("channel-id"), None)
    say("primary-destroy", display=channel.get_property("channel-id"))


def cursor_set(channel, width, height, hot_x, hot_y, rgba):
    shape = channel.get_property("cursor")
    say("cursor", width=width, height=height, hot=[hot_x, hot_y], data=bool(rgba or shape))
    if isinstance(rgba, int):
        pixels = ctypes.string_at(rgba, width * height * 4)
        middle = (hot_y * width + hot_x) * 4
        say("cursor-pixels", middle=list(pixels[middle : middle + 4]),
            rim=list(pixels[(hot_y * width + 2) * 4 : (hot_y * width + 2) * 4 + 4]))


def new_channel(session, channel):
    name = type(channel).__name__
    number = channel.get_property("channel-id")
    if number == 0 or name not in channels:
        channels[name] = channel
    on(channel, "channel-event", channel_event)
    if name == "MainChannel":
        on(channel, "main-mouse-update",
           lambda c: say("mouse", mode=c.get_property("mouse-mode")))
        on(channel, "main-agent-update",
           lambda c: say("agent", connected=c.get_property("agent-connected")))
        on(channel, "main-clipboard-selection-grab",
           lambda c, sel, types, n: (say("grab", selection=sel), True)[1])
        on(channel, "main-clipboard-selection-request", clipboard_request)
        on(channel, "main-clipboard-selection",
           lambda c, sel, kind, data, size: say(
               "clipboard", kind=kind,
               text=(ctypes.string_at(data, size) if isinstance(data, int) else bytes(data)).decode()))
    elif name == "DisplayChannel":
        on(channel, "display-primary-create", primary_create)
        on(channel, "display-primary-destroy", primary_destroy)
        displays[number] = channel
        on(channel, "display-mark", lambda c, mark: say("mark", display=number, mark=mark))
        on(channel, "display-invalidate",
           lambda c, x, y, w, h: say("invalidate", rect=[x, y, w, h]))
    elif name == "InputsChannel":
        on(channel, "inputs-modifiers",
           lambda c: say("leds", bits=int(c.get_property("key-modifiers"))))
    elif name == "CursorChannel":
        on(channel, "cursor-set", cursor_set)
        on(channel, "cursor-hide", lambda c: say("cursor-hide"))
        on(channel, "cursor-move", lambda c, x, y: say("cursor-move", x=x, y=y))
    S.Channel.connect(channel)


clipboard_text = ""
# SpiceImageCompression of spice-protocol.
S_COMPRESSIONS = {"off": 1, "auto-glz": 2, "lz4": 7}


def clipboard_request(channel, selection, kind):
    say("request", selection=selection, kind=kind)
    data = clipboard_text.encode()
    channel.clipboard_selection_notify(selection, kind, data)
    return True


def command(line):
    global clipboard_text
    words = line.split()
    inputs, main = channels.get("InputsChannel"), channels.get("MainChannel")
    numbers = [int(w) for w in words[1:] if w.lstrip("-").isdigit()]
    name = words[0]
    if name == "key-press":
        inputs.key_press(*numbers)
    elif name == "key-release":
        inputs.key_release(*numbers)
    elif name == "position":
        inputs.position(*numbers)
    elif name == "motion":
        inputs.motion(*numbers)
    elif name == "button-press":
        inputs.button_press(*numbers)
    elif name == "button-release":
        inputs.button_release(*numbers)
    elif name == "locks":
        inputs.set_key_locks(*numbers)
    elif name == "mouse-mode":
        main.request_mouse_mode(*numbers)
    elif name == "monitor":
        main.update_display_enabled(0, True, False)
        main.update_display(0, 0, 0, numbers[0], numbers[1], False)
        main.send_monitor_config()
    elif name == "monitors":
        # WIDTH HEIGHT X Y of every monitor that is wanted; the others are off.
        wanted = [numbers[at:at + 4] for at in range(0, len(numbers), 4)]
        for number in range(len(displays)):
            main.update_display_enabled(number, number < len(wanted), False)
        for number, (width, height, x, y) in enumerate(wanted):
            main.update_display(number, x, y, width, height, False)
        main.send_monitor_config()
    elif name == "compression":
        channels["DisplayChannel"].display_channel_change_preferred_compression(S_COMPRESSIONS[words[1]])
    elif name == "copy":
        clipboard_text = line.split(" ", 1)[1]
        main.clipboard_selection_grab(0, [1])
    elif name == "paste":
        main.clipboard_selection_request(0, 1)
    elif name == "pixels":
        number = numbers[0] if numbers else 0
        if number not in primaries:
            say("pixels", hash=None)
        else:
            width, height, stride, data = primaries[number]
            raw = bytearray(ctypes.string_at(data, stride * height))
            raw[3::4] = bytes(len(raw) // 4)
            say("pixels", hash=hashlib.sha1(raw).hexdigest())
    elif name == "codecs":
        channels["DisplayChannel"].display_channel_change_preferred_video_codec_types(numbers)
    elif name == "save":
        width, height, stride, data = primaries[0]
        with open(words[1], "wb") as file:
            file.write(ctypes.string_at(data, stride * height))
        say("saved")
    elif name == "bytes":
        say("bytes", total={n: int(c.get_property("total-read-bytes")) for n, c in channels.items()})
    elif name == "quit":
        session.disconnect()
        loop.quit()
    else:
        say("error", text="unknown command " + line)


unread = b""


def stdin_ready(source, condition):
    global unread
    data = os.read(0, 4096)
    if not data:
        loop.quit()
        return False
    *lines, unread = (unread + data).split(b"\n")
    for line in lines:
        try:
            command(line.decode().strip())
        except Exception as error:  # the test must see it
            say("error", text=repr(error))
    return True


on(session, "channel-new", new_channel)
GLib.io_add_watch(sys.stdin.fileno(), GLib.IO_IN | GLib.IO_HUP, stdin_ready)
S.Session.connect(session)
say("started")
loop.run()
say("stopped")
