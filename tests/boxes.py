"""A box as a person meets it: the client's talk, its addresses, and JupyterLab's own interface behind them."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.whole_runs import Home

ADDRESS = re.compile(r"^(JupyterLab|TensorBoard|Open WebUI) +(http://127\.0\.0\.1:\d+/\S*)$", re.MULTILINE)


@dataclass
class OpenBox:
    """`jupyter` and `tensorboard` are addresses without token; nothing else of this test knows it."""

    client: subprocess.Popen[str]
    jupyter: str
    tensorboard: str
    token: str
    seconds: float

    def get(self, path: str, token: str | None = None) -> int:
        return status_of(f"{self.jupyter}{path}", token)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """JupyterLab's own interface, with the token."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.jupyter}{path}", data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def write(self, name: str, text: str) -> None:
        self.call("PUT", f"/api/contents/{name}", {"type": "file", "format": "text", "content": text})

    def read(self, name: str) -> str:
        return str(self.call("GET", f"/api/contents/{name}")["content"])


def open_box(home: Home, *words: str, limit_s: float = 480) -> OpenBox:
    """Starts `kdcloud dev` and waits for its addresses; fails with the client's own words."""
    log, began = home.folder / "client.log", time.monotonic()
    at = len(log.read_text()) if log.exists() else 0
    client = home.start("dev", *words)
    while True:
        talk = log.read_text()[at:]
        found = dict(ADDRESS.findall(talk))
        if {"JupyterLab", "TensorBoard"} <= set(found):
            break
        assert client.poll() is None, talk
        assert time.monotonic() - began < limit_s, talk
        time.sleep(0.2)
    lab = urlsplit(found["JupyterLab"])
    token = parse_qs(lab.query)["token"][0]
    assert len(token) >= 40
    return OpenBox(client, f"http://{lab.netloc}", found["TensorBoard"], token, time.monotonic() - began)


def status_of(url: str, token: str | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"token {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def holders_of(secret: str, home: Home) -> list[str]:
    """Files of the run's bucket and the ledger that hold it."""
    places = [home.folder / "home" / "bucket", *(home.folder / "home").glob("ledger.sqlite*")]
    files = [path for place in places for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file()]
    assert len(files) > 5
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


def arguments() -> list[str]:
    """The command line of everything on this machine."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    assert any("tasks.supervisor" in line for line in found)
    return found


def listeners(port: int) -> set[str]:
    """Addresses of this machine, in /proc's hexadecimal, on which somebody listens at the port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for words in (line.split() for line in lines.readlines()[1:]):
                address, _, number = words[1].partition(":")
                if words[3] == "0A" and int(number, 16) == port:
                    found.add(address)
    return found


LOOPBACK = "0100007F"  # 127.0.0.1
