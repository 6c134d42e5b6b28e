"""Headless Chromium over its DevTools protocol, through two pipes: no package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

# Elements that reach beyond the window and do not lie in a box that scrolls by itself.
OVERFLOWING = """
(() => {
  const wide = document.documentElement.clientWidth;
  const boxed = e => e.closest('.scroll') !== null && !e.classList.contains('scroll');
  const found = [...document.querySelectorAll('body *')].filter(
    e => !boxed(e) && (e.getBoundingClientRect().right > wide + 1
                       || e.getBoundingClientRect().left < -1));
  const page = document.documentElement.scrollWidth > wide ? ['the page'] : [];
  return [...page, ...found.map(e => e.outerHTML.slice(0, 80))];
})()
"""


class Browser:
    """One tab."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._numbers = send, itertools.count(1)
        self._receive = os.fdopen(receive, "rb")
        self.complaints: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command; what the console says meanwhile is added to `complaints`."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a page in a window of this width (pixels), `scheme` light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while (event := self._next())["method"] != "Page.loadEventFired":
            self._note(event)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG file."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            text += byte
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(event["params"])[:500])
        elif event["method"] == "Log.entryAdded":
            self.complaints.append(event["params"]["entry"]["text"])
        elif event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.complaints.append(f"asks a network for {url}")


def look(tab: Browser, page: Path) -> None:
    """Wide and narrow, light and dark, everything unfolded: nothing overflows, no scheme is missed.

    What the console says is in `tab.complaints`.
    """
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            tab.open(page, width, scheme)
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.evaluate(OVERFLOWING) == []
            colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, ended afterwards."""
    assert CHROMIUM is not None
    here, theirs = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = (
            f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --hide-scrollbars "
            f"--user-data-dir={profile} --remote-debugging-pipe 3<&{here[0]} 4>&{theirs[1]}"
        )
        process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(here[0], theirs[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(here[0])
        os.close(theirs[1])
        try:
            yield Browser(here[1], theirs[0])
        finally:
            process.kill()
            process.wait()
            os.close(here[1])
