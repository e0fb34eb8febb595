#!/usr/bin/python3
"""A headless Chromium that does what it is told on stdin and says on stdout how it went.

Argument: the address to open. Every line of stdin is a command with arguments, every line of stdout
a JSON object with "ev". Chromium is spoken to through its DevTools pipe (descriptors 3 and 4).
"""
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile

profile = tempfile.mkdtemp(prefix="browser-")
to_read, to_write = os.pipe()
from_read, from_write = os.pipe()


def descriptors():
    low = os.dup2(to_read, 10), os.dup2(from_write, 11)
    os.dup2(low[0], 3)
    os.dup2(low[1], 4)


browser = subprocess.Popen(
    [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--remote-debugging-pipe", "--user-data-dir=" + profile, "--no-first-run",
        "--force-device-scale-factor=1", "--force-color-profile=srgb", "--window-size=1000,900",
        "--ignore-certificate-errors", "--disable-extensions", "--disable-background-networking",
        "about:blank",
    ],
    preexec_fn=descriptors, close_fds=False, stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
os.close(to_read)
os.close(from_write)
unread = b""
number = 0
session = None
loaded = False


def say(ev, **fields):
    print(json.dumps({"ev": ev, **fields}), flush=True)


def message():
    global unread
    while b"\0" not in unread:
        data = os.read(from_read, 65536)
        if not data:
            raise EOFError("the browser has ended")
        unread += data
    text, unread = unread.split(b"\0", 1)
    return json.loads(text)


def call(method, **params):
    global number, loaded
    number += 1
    request = {"id": number, "method": method, "params": params}
    if session:
        request["sessionId"] = session
    os.write(to_write, json.dumps(request).encode() + b"\0")
    while True:
        answer = message()
        loaded |= answer.get("method") == "Page.loadEventFired"
        if answer.get("method") == "Runtime.consoleAPICalled":
            words = [str(a.get("value", a.get("description"))) for a in answer["params"]["args"]]
            say("console", text=" ".join(words)[:500])
        if answer.get("id") == number:
            if "error" in answer:
                raise RuntimeError(method + ": " + answer["error"]["message"])
            return answer["result"]


def command(line):
    words = line.split(" ", 1)
    name, rest = words[0], words[1] if len(words) > 1 else ""
    if name == "eval":
        result = call("Runtime.evaluate", expression=rest, returnByValue=True, awaitPromise=True)
        say("value", value=result["result"].get("value"), error="exceptionDetails" in result)
    elif name == "screenshot":
        picture = call("Page.captureScreenshot", format="png")["data"]
        with open(rest, "wb") as file:
            file.write(base64.b64decode(picture))
        say("screenshot", file=rest)
    elif name == "key":
        # The letter's code is its place in the alphabet, as a browser has it.
        for kind in ("rawKeyDown", "keyUp"):
            call("Input.dispatchKeyEvent", type=kind, windowsVirtualKeyCode=ord(rest.upper()),
                 code="Key" + rest.upper(), key=rest)
        say("done")
    elif name == "mouse":
        kind, x, y = rest.split()
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        call("Input.dispatchMouseEvent", type=kind, x=float(x), y=float(y), **button)
        say("done")
    else:
        say("error", text="unknown command " + line)


try:
    targets = call("Target.getTargets")["targetInfos"]
    page = next(target for target in targets if target["type"] == "page")
    session = call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
    call("Runtime.enable")
    call("Page.enable")
    call("Page.navigate", url=sys.argv[1])
    while not loaded:
        # In the midst of a redirect there is no page to look at.
        call("Runtime.getIsolateId")
    say("started")
    for line in sys.stdin:
        command(line.strip())
except Exception as error:  # the test must see it
    say("error", text=repr(error))
finally:
    browser.kill()
    browser.wait()
    shutil.rmtree(profile, ignore_errors=True)
