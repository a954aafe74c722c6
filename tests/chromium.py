"""A headless Chromium that tests drive over the pipe of the DevTools protocol: no driver, no port, no download."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ANSWER_S = 30.0


def chromium() -> str | None:
    """The browser of this machine; Debian calls it chromium."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Chromium:
    """One browser with one page. What goes wrong in the page (console, exceptions, security policy) is in `errors`."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._in = os.pipe()
        self._out, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
        browser = chromium()
        assert browser is not None
        # Chromium reads from descriptor 3 and writes to 4; bash (others want one digit) puts ours there and becomes it.
        argv = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", browser, *flags, "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(argv, pass_fds=(to_browser, from_browser), stdout=quiet, stderr=quiet)
        os.close(to_browser)
        os.close(from_browser)
        self._read, self._id, self._session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def show(self, url: str, *, width: int, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Loads the page at this width. Phones: below 600."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.errors, self.requests, self._loaded = [], [], False
        told = self.call("Page.navigate", url=url)
        assert not told.get("errorText"), told
        end = time.monotonic() + ANSWER_S
        while not self._loaded:
            self._heard(self._message(end))
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def js(self, code: str) -> Any:
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def call(self, method: str, **params: Any) -> Any:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._in, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + ANSWER_S
        while True:
            told = self._message(end)
            if told.get("id") == self._id:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._heard(told)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(ANSWER_S)
        os.close(self._in)
        os.close(self._out)

    def _message(self, end: float) -> Any:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium said nothing for {ANSWER_S:g} s"
            more = os.read(self._out, 1 << 20)
            assert more, f"Chromium ended with {self._process.poll()}"
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _heard(self, told: Any) -> None:
        method, params = told.get("method"), told.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
