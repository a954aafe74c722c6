"""How does a person get to the servers of a box? Its ports and token are read over SSH, its ports forwarded over SSH.

On this machine both are there already. Ports listen on loopback at both ends, and nothing is kept. One connection does
it all, since making one may take half a minute (on Slurm it goes through SkyPilot's server and a step of the job).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
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
    "ConnectTimeout": "120",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "LogLevel": "ERROR",
    "ForwardAgent": "no",
}
READ_LIMIT_S = 60.0
UP_LIMIT_S = 150.0
AGAIN_S = 3.0
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
        if login is not None and not (
            isinstance(login, list) and len(login) == 2 and all(_WORD.fullmatch(str(word)) for word in login)
        ):
            raise ValueError(f"{name} has no usable login")
        doors.append(Door(name, port, path, (str(login[0]), str(login[1])) if login else None))
    if not doors:
        raise ValueError("it names no server")
    return tuple(doors)


def read_script(reach: Reach, stage: str) -> str:
    """Prints the file with ports and token, for a shell on the machine."""
    places = [f"{folder}/work/{shlex.quote(stage)}/{BOX_FOLDER}/{CONNECT_FILE}" for folder in reach.folders]
    return " || ".join([*(f"cat {place} 2>/dev/null" for place in places[:-1]), f"cat {places[-1]}"])


def connect_argv(reach: Reach, control: Path) -> list[str]:
    """ssh that holds the connection, for whoever knows the socket, and does nothing by itself."""
    options = [word for name, value in SSH_OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return [*reach.ssh, *options, "-M", "-S", str(control), "-N", "-T", "--", reach.host]


def check_argv(reach: Reach, control: Path) -> list[str]:
    return [*reach.ssh, "-S", str(control), "-O", "check", "--", reach.host]


def read_argv(reach: Reach, control: Path, stage: str) -> list[str]:
    return [*reach.ssh, "-S", str(control), "-T", "--", reach.host, read_script(reach, stage)]


def forward_argv(reach: Reach, control: Path, ports: Mapping[int, int]) -> list[str]:
    """Has the connection forward each port of this machine, the key, to one of the box; loopback on both ends."""
    forwards = [word for here, there in ports.items() for word in ("-L", f"{HOST}:{here}:{HOST}:{there}")]
    return [*reach.ssh, "-S", str(control), "-O", "forward", *forwards, "--", reach.host]


def read_doors(reach: Reach, stage: str, control: Path | None = None) -> tuple[Door, ...]:
    """`control`: of the connection, unless it is this machine. Raises ProvisionError."""
    try:
        if control is None:
            path = Path(reach.folders[0], "work", stage, BOX_FOLDER, CONNECT_FILE)
            return parse_doors(path.read_text())
        return parse_doors(called(read_argv(reach, control, stage), "the box does not answer over SSH"))
    except (OSError, subprocess.TimeoutExpired, ValueError, AttributeError) as error:
        raise ProvisionError(f"the box does not say where its servers are: {type(error).__name__}") from error


def called(argv: list[str], trouble: str) -> str:
    """What a short command prints. Raises ProvisionError with its last words when it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=READ_LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise ProvisionError(f"{trouble}: it takes too long") from error
    if done.returncode != 0:
        raise ProvisionError(f"{trouble}: {one_line(done.stderr)}")
    return done.stdout


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
    """The machine of a box, and its job. `is_open`: its servers answer."""

    machine: str
    job: str
    stage: str
    is_open: bool = True


class Doorman(threading.Thread):
    """Keeps the way to the box open, and tells its addresses when they are new. It talks to nobody else's threads."""

    def __init__(self, provider: Reachable, tell: Callable[[list[str]], None], say: Callable[[str], None]) -> None:
        super().__init__(name="doors", daemon=True)
        self._provider, self._tell, self._say = provider, tell, say
        self._target: Target | None = None
        self._ended = threading.Event()
        self._way: Way | None = None
        self._here: dict[str, int] = {}  # kept when the way is made anew, so that addresses stay
        self._told: list[str] = []
        self._trouble = ""

    def look(self, target: Target | None) -> None:
        """What there is now; None while there is no machine."""
        self._target = target

    def close(self) -> None:
        """The way is closed and the thread gone, or left behind in a call that hangs."""
        self._ended.set()
        self.join(timeout=2)
        if self._way is not None:
            self._way.close()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            target = self._target
            if target is None:
                continue
            try:
                self._serve(target)
                self._trouble = ""
            except Exception as error:  # noqa: BLE001  # whatever it is, the box costs money: the way is tried again
                self._troubled(error, target)
                self._ended.wait(AGAIN_S)
            finally:
                if self._way is not None:
                    self._way.close()

    def _troubled(self, error: Exception, target: Target) -> None:
        text = error.message if isinstance(error, ProvisionError) else f"the way to the box: {error!r:.200}"
        if text != self._trouble and self._goes_on(target):
            self._say(f"{text}; it is tried again")
        self._trouble = text

    def _serve(self, target: Target) -> None:
        """Until there is another machine, or none, or the way breaks (ProvisionError)."""
        reach = self._provider.reach(target.machine, target.job)
        way = self._way = Way(reach)
        way.open(lambda: self._goes_on(target))
        while self._goes_on(target) and not self._is_open():
            way.check()
            self._ended.wait(0.2)
        if not self._goes_on(target):
            return
        doors = read_doors(reach, target.stage, way.control)
        if reach.ssh:
            for door in doors:
                self._here.setdefault(door.name, free_port(USUAL_PORTS[door.name]))
            try:
                way.forward({self._here[door.name]: door.port for door in doors})
            except ProvisionError:  # somebody else may have taken a port meanwhile: the next try gets another
                way.close()  # which may hold some of them
                self._here = {name: port for name, port in self._here.items() if free_port(port) == port}
                raise
        else:
            self._here = {door.name: door.port for door in doors}
        lines = lines_of(doors, self._here)
        if lines != self._told:
            self._tell(lines)
        elif self._trouble:
            self._say("the way to the box is open again, at the same addresses")
        self._told = lines
        while self._goes_on(target):  # also while it is at something else, such as saving
            way.check()
            self._ended.wait(0.2)

    def _goes_on(self, target: Target) -> bool:
        now = self._target
        return not self._ended.is_set() and now is not None and (now.machine, now.job) == (target.machine, target.job)

    def _is_open(self) -> bool:
        now = self._target
        return now is not None and now.is_open


class Way:
    """One SSH connection to a machine; nothing where it is this one."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._ssh: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def control(self) -> Path | None:
        """The socket by which others use the connection."""
        return None if self._folder is None else self._folder / "s"

    def open(self, go_on: Callable[[], bool]) -> None:
        """Raises ProvisionError."""
        if not self._reach.ssh:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="kd-", dir="/tmp"))  # short: a socket's name has 104 bytes at most
        assert self.control is not None
        with (self._folder / "words").open("wb") as words:
            try:
                self._ssh = subprocess.Popen(
                    connect_argv(self._reach, self.control), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=words, start_new_session=True,  # Ctrl-C closes it by way of close(), when the box is closed
                )  # fmt: skip
            except FileNotFoundError as error:
                raise ProvisionError("there is no ssh on this computer (Debian: apt install openssh-client)") from error
        until = time.monotonic() + UP_LIMIT_S
        while not self.control.exists():
            self.check()
            if time.monotonic() > until:
                raise ProvisionError("the machine does not answer over SSH")
            if not go_on():
                return
            time.sleep(0.1)
        called(check_argv(self._reach, self.control), "the machine does not answer over SSH")

    def forward(self, ports: Mapping[int, int]) -> None:
        """Raises ProvisionError."""
        assert self.control is not None
        trouble = "the ports of the box could not be forwarded over SSH"
        called(forward_argv(self._reach, self.control, ports), trouble)
        if not all(listens(port) for port in ports):
            raise ProvisionError(trouble)

    def check(self) -> None:
        """Raises ProvisionError when the connection has ended."""
        if self._ssh is not None and self._ssh.poll() is not None:
            assert self._folder is not None
            words = (self._folder / "words").read_text(errors="replace")
            raise ProvisionError(f"the connection to the box ended: {one_line(words)}")

    def close(self) -> None:
        ssh, folder, self._ssh, self._folder = self._ssh, self._folder, None, None
        if ssh is not None and ssh.poll() is None:
            ssh.terminate()
            try:
                ssh.wait(timeout=3)
            except subprocess.TimeoutExpired:
                ssh.kill()
                ssh.wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
