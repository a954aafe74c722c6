"""How does a person get to the servers of a box? Its ports and token are read over SSH, its ports forwarded over SSH.

On this machine both are there already. Ports listen on loopback at both ends, and nothing is kept.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.provision import ProvisionError, Reach, Reachable
from tasks.contract import BOX_FOLDER, CONNECT_FILE

HOST = "127.0.0.1"
CALLED = {"jupyter": "JupyterLab", "tensorboard": "TensorBoard", "chat": "Open WebUI"}  # in the order they are told
USUAL_PORTS = {"jupyter": 8888, "tensorboard": 6006, "chat": 8080}  # of the user's own machine, where they are free
SSH_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "20",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "LogLevel": "ERROR",
    "ControlMaster": "no",  # a connection that others share would end with them
    "ControlPath": "none",
    "ForwardAgent": "no",
}
READ_LIMIT_S = 60.0
UP_LIMIT_S = 60.0
AGAIN_S = 5.0
_PATH = re.compile(r"/[A-Za-z0-9_\-./?=&]*")
_WORD = re.compile(r"[A-Za-z0-9_\-.@+]{1,200}")


@dataclass(frozen=True)
class Door:
    """One server of a box. `path` may hold a token; `login` (user, password) only where a page asks for them."""

    name: str
    port: int
    path: str
    login: tuple[str, str] | None = None


def parse_doors(text: str) -> tuple[Door, ...]:
    """What CONNECT_FILE says. The machine is not ours, so anything else than what is expected raises ValueError."""
    told = json.loads(text)
    if not isinstance(told, dict) or not set(told) <= set(CALLED):
        raise ValueError("it names servers that nobody knows")
    doors = []
    for name in (name for name in CALLED if name in told):
        port, path, login = told[name].get("port"), told[name].get("path"), told[name].get("login")
        if type(port) is not int or not 1024 <= port <= 65535:
            raise ValueError(f"{name} has no usable port")
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ValueError(f"{name} has no usable address")
        if login is not None and not (len(login) == 2 and all(_WORD.fullmatch(str(word)) for word in login)):
            raise ValueError(f"{name} has no usable login")
        doors.append(Door(name, port, path, (str(login[0]), str(login[1])) if login else None))
    if not doors:
        raise ValueError("it names no server")
    return tuple(doors)


def place_of(reach: Reach, stage: str) -> str:
    """The file with ports and token, as a shell on the machine takes it."""
    return f"{reach.folder}/work/{shlex.quote(stage)}/{BOX_FOLDER}/{CONNECT_FILE}"


def ssh_words(reach: Reach) -> list[str]:
    return [*reach.ssh, *(word for name, value in SSH_OPTIONS.items() for word in ("-o", f"{name}={value}"))]


def read_argv(reach: Reach, stage: str) -> list[str]:
    return [*ssh_words(reach), "--", reach.host, f"cat {place_of(reach, stage)}"]


def forward_argv(reach: Reach, ports: Mapping[int, int]) -> list[str]:
    """ssh that only forwards each port of this machine, the key, to one of the box; loopback on both ends."""
    forwards = [word for here, there in ports.items() for word in ("-L", f"{HOST}:{here}:{HOST}:{there}")]
    return [*ssh_words(reach), "-N", "-T", "-o", "ExitOnForwardFailure=yes", *forwards, "--", reach.host]


def read_doors(reach: Reach, stage: str) -> tuple[Door, ...]:
    """Raises ProvisionError when the box does not tell, or not what it should."""
    try:
        if not reach.ssh:
            path = Path(reach.folder, "work", stage, BOX_FOLDER, CONNECT_FILE)
            return parse_doors(path.read_text())
        done = subprocess.run(
            read_argv(reach, stage), capture_output=True, text=True, timeout=READ_LIMIT_S, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise ProvisionError(f"the box does not answer over SSH: {one_line(done.stderr)}")
        return parse_doors(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError, AttributeError) as error:
        raise ProvisionError(f"the box does not say where its servers are: {type(error).__name__}") from error


def one_line(text: str) -> str:
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
    return "".join(char for char in last if char.isprintable())[:200]


def lines_of(doors: tuple[Door, ...], here: Mapping[str, int]) -> list[str]:
    """The addresses as a person opens them on this machine."""
    lines = []
    for door in doors:
        lines.append(f"{CALLED[door.name]:<12} http://{HOST}:{here[door.name]}{door.path}")
        if door.login is not None:
            lines.append(f"{'':<12} log in as {door.login[0]} with {door.login[1]}")
    return lines


def free_port(usual: int) -> int:
    """A port of this machine on which nobody listens: the usual one, else any."""
    for port in (usual, 0):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UsageError("no port is free on this machine", hint="end something that listens")


@dataclass(frozen=True)
class Target:
    """The machine of a box that is open, and its job."""

    machine: str
    job: str
    stage: str


class Doorman(threading.Thread):
    """Keeps the way to the box open, and tells its addresses when they are new. It talks to nobody else's threads."""

    def __init__(self, provider: Reachable, tell: Callable[[list[str]], None], say: Callable[[str], None]) -> None:
        super().__init__(name="doors", daemon=True)
        self._provider, self._tell, self._say = provider, tell, say
        self._target: Target | None = None
        self._ended = threading.Event()
        self._ssh: subprocess.Popen[bytes] | None = None
        self._here: dict[str, int] = {}  # kept when the way is made anew, so that addresses stay
        self._trouble = ""

    def look(self, target: Target | None) -> None:
        """What is open now; None while there is nothing."""
        self._target = target

    def close(self) -> None:
        """The way is closed and the thread gone, or left behind in a call that hangs."""
        self._ended.set()
        self._close_way()
        self.join(timeout=2)
        self._close_way()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            target = self._target
            if target is None:
                continue
            try:
                self._serve(target)
                self._trouble = ""
            except ProvisionError as error:
                if error.message != self._trouble and self._target == target:
                    self._say(f"{error.message}; it is tried again")
                self._trouble = error.message
                self._ended.wait(AGAIN_S)
            finally:
                self._close_way()

    def _serve(self, target: Target) -> None:
        """Until the box is another one, or the way breaks (ProvisionError)."""
        reach = self._provider.reach(target.machine, target.job)
        doors = read_doors(reach, target.stage)
        if not reach.ssh:
            self._tell(lines_of(doors, {door.name: door.port for door in doors}))
            while self._target == target and not self._ended.wait(0.2):
                pass
            return
        for door in doors:
            self._here.setdefault(door.name, free_port(USUAL_PORTS[door.name]))
        ssh = self._open_way(reach, doors)
        self._tell(lines_of(doors, self._here))
        while self._target == target and not self._ended.wait(0.2):
            if ssh.poll() is not None:
                raise ProvisionError("the way to the box broke")

    def _open_way(self, reach: Reach, doors: tuple[Door, ...]) -> subprocess.Popen[bytes]:
        argv = forward_argv(reach, {self._here[door.name]: door.port for door in doors})
        self._ssh = ssh = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C closes it by way of close(), when the box is closed
        )  # fmt: skip
        until = time.monotonic() + UP_LIMIT_S
        while not all(listens(self._here[door.name]) for door in doors):
            if ssh.poll() is not None or time.monotonic() > until or self._ended.is_set():
                raise ProvisionError("the ports of the box could not be forwarded over SSH")
            time.sleep(0.2)
        return ssh

    def _close_way(self) -> None:
        ssh, self._ssh = self._ssh, None
        if ssh is not None and ssh.poll() is None:
            ssh.terminate()
            try:
                ssh.wait(timeout=3)
            except subprocess.TimeoutExpired:
                ssh.kill()
                ssh.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
