"""The servers of a box: started on loopback, with secrets made here that only the machine's owner can read.

Ports, and what each server asks for, stand in CONNECT_FILE once all of them answer.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tasks.contract import BOX_FOLDER, CONNECT_FILE, BoxSettings, TaskError
from tasks.notebook import BOX_ENV, NOTEBOOK
from tasks.stage import Context

HOST = "127.0.0.1"
TOKEN_BYTES = 32
START_LIMIT_S = 300.0
PEOPLE_ENV = "KDCLOUD_BOX_PEOPLE"  # in the environment of what people start, also of what leaves its terminal (tmux)
END_LIMIT_S = 3.0
WORK, INPUTS, CODE, SCRATCH = "work", "inputs", "code", "scratch"  # folders that the browser shows
# Not for what people run here: keys of the bucket, and what torchrun told this process of others.
HELD_BACK = ("AWS_", "KDCLOUD_CODE_URL", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "JUPYTER")
HELD_BACK_WORDS = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})


@dataclass(frozen=True)
class Box:
    """Where things lie on the machine."""

    root: Path

    @staticmethod
    def make(work: Path) -> Box:
        """In the stage's folder, for its owner alone, without what an earlier attempt said of its servers."""
        box = Box(work / BOX_FOLDER)
        box.root.mkdir(parents=True, exist_ok=True)
        box.root.chmod(0o700)
        (box.root / CONNECT_FILE).unlink(missing_ok=True)
        for folder in (*(box.home / name for name in (WORK, INPUTS, SCRATCH)), *box.jupyter.values()):
            folder.mkdir(parents=True, exist_ok=True)
        return box

    @property
    def home(self) -> Path:
        """What the browser shows."""
        return self.root / "home"

    @property
    def jupyter(self) -> dict[str, Path]:
        """JupyterLab's own folders: nobody's settings at home are read or changed."""
        names = {"config": "JUPYTER_CONFIG_DIR", "data": "JUPYTER_DATA_DIR", "runtime": "JUPYTER_RUNTIME_DIR"}
        return {key: self.root / "jupyter" / name for name, key in {**names, "ipython": "IPYTHONDIR"}.items()}

    def log(self, name: str) -> Path:
        """Its words stay here: JupyterLab's may hold the token, and the stage's log is uploaded."""
        return self.root / f"{name}.log"


@dataclass
class Server:
    """One that was started. `ready` says whether it answers; `door` is what the client is told of it."""

    called: str
    process: subprocess.Popen[bytes]
    ready: Callable[[], bool]
    door: dict[str, Any] | None = None
    counts: bool = False  # what it does itself is work: people wait for its answers
    limit_s: float = START_LIMIT_S


@dataclass
class Running:
    """Every server, by name. `mark`: of what people start, in PEOPLE_ENV."""

    each: dict[str, Server] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    _marked: dict[psutil.Process, bool] = field(default_factory=dict)  # of every process, looked at once

    def processes(self) -> list[psutil.Process]:
        """Those whose work keeps the box: what people started, JupyterLab itself not; the chat's model as a whole."""
        found = self._of_people()
        for server in self.each.values():
            with suppress(psutil.NoSuchProcess):
                if server.counts:
                    one = psutil.Process(server.process.pid)
                    found |= {one, *one.children(recursive=True)}
        return list(found)

    def _of_people(self) -> set[psutil.Process]:
        """By descent from JupyterLab, and by the mark: a terminal's jobs may outlive it."""
        now = set(psutil.process_iter())
        self._marked = {one: self._marked[one] if one in self._marked else self._has_mark(one) for one in now}
        found = {one for one, marked in self._marked.items() if marked}
        with suppress(psutil.NoSuchProcess, KeyError):
            server = psutil.Process(self.each["jupyter"].process.pid)
            found = (found | set(server.children(recursive=True))) - {server}
        return found

    def _has_mark(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(PEOPLE_ENV) == self.mark
        except (psutil.Error, OSError):  # gone, or somebody else's
            return False

    def end(self) -> None:
        for server in self.each.values():
            server.process.terminate()
        until = time.monotonic() + END_LIMIT_S
        for server in self.each.values():
            try:
                server.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                server.process.kill()  # what it started carries the supervisor's mark, and ends with the stage


@contextmanager
def servers(ctx: Context, settings: BoxSettings, box: Box) -> Iterator[Running]:
    """Everything that listens, up and told of. Raises TaskError when something does not start."""
    running, env = Running(), people_env(os.environ, ctx.work, box)
    try:
        running.each["jupyter"] = jupyter(box, {**env, PEOPLE_ENV: running.mark})
        running.each["tensorboard"] = tensorboard(box, env)
        if settings.chat is not None:
            from tasks import chat

            running.each |= chat.servers(ctx, settings.chat, box, env)
        for name, server in running.each.items():
            wait_for(ctx, server, box.log(name))
        doors = {name: server.door for name, server in running.each.items() if server.door is not None}
        write_private(box.root / CONNECT_FILE, json.dumps(doors))
        yield running
    finally:
        (box.root / CONNECT_FILE).unlink(missing_ok=True)
        running.end()


def people_env(env: Mapping[str, str], work: Path, box: Box) -> dict[str, str]:
    """Environment of what people run: the run's code, their own token for the hub, no key of the bucket."""
    kept = {k: v for k, v in env.items() if not k.startswith(HELD_BACK) and k not in HELD_BACK_WORDS}
    own = {"PYTHONPATH": str(box.home / CODE), BOX_ENV: str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**kept, **own, **{name: str(folder) for name, folder in box.jupyter.items()}}


def jupyter(box: Box, env: Mapping[str, str]) -> Server:
    port, token = free_port(), secrets.token_urlsafe(TOKEN_BYTES)
    config = box.jupyter["JUPYTER_CONFIG_DIR"] / "jupyter_server_config.json"
    write_private(config, json.dumps(jupyter_config(box.home, port, token)))
    process = start([sys.executable, "-m", "jupyterlab"], box, "jupyter", env)
    door = {"port": port, "path": f"/lab/tree/{WORK}/{NOTEBOOK}?token={token}"}
    return Server("JupyterLab", process, lambda: answers(port, "/api/status", f"token {token}"), door)


def jupyter_config(home: Path, port: int, token: str) -> dict[str, Any]:
    """What JupyterLab is told in a file, since arguments can be seen by everybody on the machine."""
    return {
        "ServerApp": {
            "ip": HOST,
            "port": port,
            "port_retries": 0,
            "open_browser": False,
            "root_dir": str(home),
            "allow_root": True,  # rented machines know nobody else
            "allow_remote_access": False,
            "shutdown_no_activity_timeout": 0,  # the supervisor's rule ends an idle box
        },
        "IdentityProvider": {"token": token},
        "KernelManager": {"transport_encryption": "auto"},  # others on the machine see its ports, too
        "PasswordIdentityProvider": {"hashed_password": "", "allow_password_change": False},
        "LabApp": {"news_url": None, "check_for_updates_class": "jupyterlab.NeverCheckForUpdate"},
    }


def tensorboard(box: Box, env: Mapping[str, str]) -> Server:
    """Below a path that nobody can guess, since it asks for no password."""
    port, place = free_port(), f"/{secrets.token_urlsafe(TOKEN_BYTES)}/"
    orders = box.root / "tensorboard.json"
    write_private(orders, json.dumps({"logdir": str(box.home), "port": port, "path": place.rstrip("/")}))
    own = box.root / "tmp"  # it leaves a file with its path in the folder for these, which everybody can read
    own.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "tasks.box_board", str(orders)]
    process = start(words, box, "tensorboard", {**env, "TMPDIR": str(own)})
    return Server("TensorBoard", process, lambda: answers(port, place), {"port": port, "path": place})


def start(argv: Sequence[str], box: Box, name: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with box.log(name).open("wb") as log:
        return subprocess.Popen(
            argv, cwd=box.root / "jupyter", env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def wait_for(ctx: Context, server: Server, log: Path) -> None:
    began, phase = time.monotonic(), f"start {server.called}"
    while not server.ready():
        ctx.progress(phase, time.monotonic() - began, declared=True)
        if ctx.stopping or server.process.poll() is not None or time.monotonic() - began > server.limit_s:
            raise TaskError(f"{server.called} did not start: {last_words(log)}", hint="resume it for another machine")
        time.sleep(0.2)


def last_words(log: Path) -> str:
    """The end of a server's log, without what only its owner may know."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        return "it said nothing"
    return "its words may hold its token" if "token" in lines[-1].lower() else lines[-1][:300]


def answers(port: int, path: str, authorization: str = "") -> bool:
    headers = {"Authorization": authorization} if authorization else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{HOST}:{port}{path}", headers=headers), timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def write_private(path: Path, text: str) -> None:
    """For its owner alone, and whole or not there."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)
