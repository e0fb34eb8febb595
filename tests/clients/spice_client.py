#!/usr/bin/python3
"""A real SPICE client (spice-gtk) for the end-to-end suites.

Reads one JSON command a line on stdin, writes one JSON object a line on stdout: answers have "re" (the
command's number), everything else is an event with "ev". Pixels, clipboard and pointer go the way
they go in remote-viewer, because the library is the same.

usage: spice_client.py HOST PORT [PASSWORD]
"""

import ctypes
import hashlib
import json
import os
import sys

import gi

# Its user has no sound card, and plays at half the volume (a linear eighth).
os.environ["SPICE_GST_AUDIOSINK"] = "appsrc name=appsrc ! volume name=audiosink volume=0.125 ! fakesink"

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import Gio, GLib, GObject, SpiceClientGLib as Spice  # noqa: E402

LEFT = 1
TEXT = 1  # VD_AGENT_CLIPBOARD_UTF8_TEXT
PNG = 2  # VD_AGENT_CLIPBOARD_IMAGE_PNG

loop = GLib.MainLoop()
channels = {}
primary = {}
state = {"agent": False, "mouse": 0, "marked": False, "invalidated": 0, "clipboard": None, "grabbed": False,
         "requested": False, "cursor": None, "image": None}
offered = b""


def say(**fields):
    print(json.dumps(fields), flush=True)


def on(obj, signal, handler):
    # Session.connect and Channel.connect hide GObject's.
    GObject.Object.connect(obj, signal, handler)


def data_bytes(data, size):
    return ctypes.string_at(data, size) if isinstance(data, int) else bytes(data)[:size]


def channel_event(channel, event):
    name = type(channel).__name__
    say(ev="channel", channel=name, event=event.value_nick)
    if name == "MainChannel" and event.value_nick not in ("opened", "none", "switching"):
        loop.quit()


def primary_create(channel, fmt, width, height, stride, shmid, data):
    primary.update(width=width, height=height, stride=stride, data=data)
    say(ev="primary", width=width, height=height)


def primary_destroy(channel):
    primary.clear()
    say(ev="primary-destroy")


def invalidate(channel, x, y, w, h):
    state["invalidated"] += 1


def mark(channel, marked):
    state["marked"] = bool(marked)
    say(ev="mark", marked=bool(marked))


def agent(channel):
    state["agent"] = channel.get_property("agent-connected")
    say(ev="agent", connected=state["agent"])


def mouse(channel):
    state["mouse"] = channel.get_property("mouse-mode")
    say(ev="mouse", mode=state["mouse"])


def grab(channel, selection, types, count):
    state["grabbed"] = True
    say(ev="grab", selection=selection)
    if selection == 0:
        # As a desktop client does when its user pastes.
        channel.clipboard_selection_request(selection, PNG if PNG in types else TEXT)
    return True


def clipboard(channel, selection, kind, data, size):
    data = data_bytes(data, size)
    if kind == PNG:
        state["image"] = hashlib.sha256(data).hexdigest()
        say(ev="image", size=len(data))
        return
    state["clipboard"] = data.decode(errors="replace")
    say(ev="clipboard", text=state["clipboard"])


def clipboard_request(channel, selection, kind):
    state["requested"] = True
    say(ev="request", selection=selection)
    channel.clipboard_selection_notify(selection, kind, offered)
    return True


def file_sent(channel, result):
    try:
        channel.file_copy_finish(result)
        state["sent"] = "whole"
    except GLib.Error as error:
        state["sent"] = error.message
    say(ev="sent", outcome=state["sent"])


def cursor_set(channel, width, height, hot_x, hot_y, rgba):
    pixels = data_bytes(rgba, width * height * 4).hex() if rgba else None
    state["cursor"] = {"width": width, "height": height, "hot": [hot_x, hot_y], "rgba": pixels}
    say(ev="cursor", width=width, height=height, hot=[hot_x, hot_y])


def new_channel(session, channel):
    name = type(channel).__name__
    channels[name] = channel
    on(channel, "channel-event", channel_event)
    if name == "MainChannel":
        on(channel, "main-mouse-update", mouse)
        on(channel, "main-agent-update", agent)
        on(channel, "main-clipboard-selection-grab", grab)
        on(channel, "main-clipboard-selection-request", clipboard_request)
        on(channel, "main-clipboard-selection", clipboard)
    elif name == "DisplayChannel":
        on(channel, "display-primary-create", primary_create)
        on(channel, "display-primary-destroy", primary_destroy)
        on(channel, "display-invalidate", invalidate)
        on(channel, "display-mark", mark)
    elif name == "CursorChannel":
        on(channel, "cursor-set", cursor_set)
    elif name not in ("InputsChannel",):
        return
    Spice.Channel.connect(channel)


def screenshot(path):
    """Writes what the client would show as a PPM."""
    if not primary:
        return {"width": 0, "height": 0}
    width, height, stride = primary["width"], primary["height"], primary["stride"]
    raw = ctypes.string_at(primary["data"], stride * height)
    rows = b"".join(raw[y * stride : y * stride + width * 4] for y in range(height))
    rgb = bytearray(width * height * 3)
    rgb[0::3], rgb[1::3], rgb[2::3] = rows[2::4], rows[1::4], rows[0::4]
    with open(path, "wb") as out:
        out.write(b"P6\n%d %d\n255\n" % (width, height))
        out.write(rgb)
    return {"width": width, "height": height}


def command(name, args):
    global offered
    inputs, main = channels.get("InputsChannel"), channels.get("MainChannel")
    if name == "screenshot":
        return screenshot(args["path"])
    if name == "state":
        return {**state, "width": primary.get("width", 0), "height": primary.get("height", 0)}
    if name == "keys":
        for code, down in args["keys"]:
            (inputs.key_press if down else inputs.key_release)(code)
    elif name == "position":
        inputs.position(args["x"], args["y"], 0, args.get("buttons", 0))
    elif name == "motion":
        inputs.motion(args["x"], args["y"], args.get("buttons", 0))
    elif name == "button":
        if args["down"]:
            inputs.button_press(args["button"], 1 << (args["button"] - 1))
        else:
            inputs.button_release(args["button"], 0)
    elif name == "copy":
        offered = args["text"].encode()
        state["requested"] = False
        main.clipboard_selection_grab(0, [TEXT])
    elif name == "copy-image":
        with open(args["path"], "rb") as image:
            offered = image.read()
        state["requested"] = False
        main.clipboard_selection_grab(0, [PNG])
    elif name == "send-file":
        state["sent"] = None
        main.file_copy_async([Gio.File.new_for_path(args["path"])], Gio.FileCopyFlags.NONE,
                             None, None, None, file_sent)
    elif name == "resize":
        main.update_display_enabled(0, True, False)
        main.update_display(0, 0, 0, args["width"], args["height"], False)
        main.send_monitor_config()
    elif name == "mouse-mode":
        main.request_mouse_mode(args["mode"])
    elif name == "quit":
        loop.quit()
    else:
        raise ValueError("unknown command " + name)
    return {}


unread = b""


def stdin_ready(source, condition):
    global unread
    data = os.read(0, 65536)
    if not data:
        loop.quit()
        return False
    *lines, unread = (unread + data).split(b"\n")
    for line in lines:
        request = json.loads(line)
        try:
            say(re=request["id"], **command(request["do"], request))
        except Exception as error:  # the suite must see it
            say(re=request["id"], error=repr(error))
    return True


session = Spice.Session()
session.set_property("host", sys.argv[1])
session.set_property("port", sys.argv[2])
if len(sys.argv) > 3:
    session.set_property("password", sys.argv[3])
session.set_property("enable-audio", False)
session.set_property("enable-usbredir", False)
on(session, "channel-new", new_channel)
GLib.io_add_watch(sys.stdin.fileno(), GLib.IO_IN | GLib.IO_HUP, stdin_ready)
Spice.Session.connect(session)
loop.run()
session.disconnect()
