"""A machine to work on by hand, in a stage's place: JupyterLab and TensorBoard beside what the stage would have.

Everything lies in one folder for its owner alone. Servers listen on loopback; their ports, and the token made here,
stand in CONNECT_FILE, which the client reads over SSH: no argument, log or object in the bucket holds them. The files
below `work/` go to the bucket while they change and at the end, and are put back where they were by the next box.

What keeps the machine is work: of notebooks' kernels, terminals, GPUs and the chat's model. Servers that are open and
browsers that look at them are none: see tasks.box_work.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import tasks
from tasks.box_work import Gauge, Notices
from tasks.contract import (
    BEFORE_PREFIX,
    BOX_FOLDER,
    BOX_READY,
    CONNECT_FILE,
    BoxSettings,
    DataSource,
    ModelSource,
    TaskError,
    inputs_of,
)
from tasks.notebook import BOX_ENV, NOTEBOOK, notebook
from tasks.stage import Context, write_text
from tasks.supervisor import STATE_FILE, boottime_s

HOST = "127.0.0.1"
TOKEN_BYTES = 32
TICK_S = 0.5
START_LIMIT_S = 120.0
END_LIMIT_S = 3.0
SAVE_LIMIT_BYTES = 2 << 30  # what is larger belongs beside work/, where nothing is saved
WORK, INPUTS, CODE, SCRATCH = "work", "inputs", "code", "scratch"  # folders that the browser shows
ARCHIVE = "work.tar"  # a file of the result and of each checkpoint: names in it may be any
NOTICE = "NOTICE.txt"
# Not for what people run here: keys of the bucket, and what torchrun told this process of others.
HELD_BACK = ("AWS_", "KDCLOUD_CODE_URL", "TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_")
HELD_BACK_WORDS = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "JUPYTER_TOKEN"})


def run(ctx: Context, settings: BoxSettings) -> dict[str, Any]:
    """Opens the box and keeps it until it is closed, told to end, or JupyterLab is shut down from the browser.

    What ended it is in the result, and its files in ARCHIVE beside it.
    """
    os.umask(0o077)
    box = Box.make(ctx.work / BOX_FOLDER)
    missing = lay_out(ctx, settings, box)
    began, saver = time.monotonic(), Saver(ctx, box.home / WORK)
    with servers(ctx, settings, box) as running:
        for text in missing:
            print(text, flush=True)
        print(f"the box is open; files below {WORK}/ are saved", flush=True)
        ended, signs = keep_open(ctx, settings, box, running, saver)
    saved = saver.finish(ctx.out / ARCHIVE)
    print(f"the box is closed: {ended}", flush=True)
    seconds = round(time.monotonic() - began, 1)
    return {"ended": ended, "seconds": seconds, "signs_of_work": signs, "saved_bytes": saved, "missing": missing}


# --- the folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """Where things lie on the machine."""

    root: Path

    @staticmethod
    def make(root: Path) -> Box:
        """For its owner alone, and without what an earlier attempt said of its servers."""
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
        (root / CONNECT_FILE).unlink(missing_ok=True)
        box = Box(root)
        for name in (WORK, INPUTS, SCRATCH):
            (box.home / name).mkdir(parents=True, exist_ok=True)
        return box

    @property
    def home(self) -> Path:
        """What the browser shows."""
        return self.root / "home"


def lay_out(ctx: Context, settings: BoxSettings, box: Box) -> list[str]:
    """Code, inputs and earlier files as they are wanted; what could not be had, a sentence each."""
    ctx.progress("lay out", declared=True)
    unpack_code(box.home / CODE)
    missing = []
    for name in inputs_of(settings):
        try:
            link(ctx.input(name), box.home / INPUTS / name)
        except TaskError as error:
            missing.append(f"{name} is not here: {error.message}")
    for source in sources_of(settings.settings, DataSource):
        if not source.source.startswith("builtin:"):
            ctx.data(source)
    for model in [*sources_of(settings.settings, ModelSource), *([settings.chat] if settings.chat else [])]:
        if model.path is not None:
            missing += fetched(ctx, model)
    restore(ctx, settings, box.home / WORK)
    start = box.home / WORK / NOTEBOOK
    if not start.exists():
        start.write_text(json.dumps(notebook(settings), indent=1))
    return missing


def sources_of(settings: object, kind: type[Any]) -> list[Any]:
    return [value for value in vars(settings).values() if isinstance(value, kind)]


def fetched(ctx: Context, source: ModelSource) -> list[str]:
    """A sentence if a model of the hub cannot be had: the rest of the box is of use without."""
    from tasks import models

    try:
        models.fetch(ctx, source)
    except (TaskError, OSError) as error:
        return [f"{source.path} could not be fetched: {getattr(error, 'message', error)}"]
    return []


def unpack_code(folder: Path) -> None:
    """The run's own `tasks`, to be read; a copy of it in work/ is what notebooks there take instead."""
    shutil.rmtree(folder, ignore_errors=True)
    archive = getattr(tasks.__spec__.loader, "archive", None) if tasks.__spec__ else None
    if archive is None:
        shutil.copytree(Path(str(tasks.__file__)).parent, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
        return
    with zipfile.ZipFile(archive) as code:
        code.extractall(folder, [name for name in code.namelist() if name.startswith("tasks/")])


def link(target: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def restore(ctx: Context, settings: BoxSettings, work: Path) -> None:
    """Files of this box before its machine was lost, else those of an earlier box."""
    found = ctx.latest_checkpoint()
    folder = found[1] if found is not None else None
    if folder is None and settings.before:
        folder = ctx.input(BEFORE_PREFIX)
    if folder is not None and (folder / ARCHIVE).is_file():
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(work, filter="data")  # nothing outside, no devices


class Saver:
    """Brings the files below work/ to the bucket when they have changed."""

    def __init__(self, ctx: Context, work: Path) -> None:
        self._ctx, self._work = ctx, work
        self._saved = stamp_of(work)
        self._tried_s = time.monotonic()
        self._step = (found[0] if (found := ctx.latest_checkpoint()) is not None else 0) + 1

    def look(self, every_s: float) -> str:
        """Saves what is due. Returns what a person must know, or nothing."""
        if time.monotonic() - self._tried_s < every_s:
            return ""
        self._tried_s, stamp = time.monotonic(), stamp_of(self._work)
        if stamp == self._saved:
            return ""
        if size_of(self._work) > SAVE_LIMIT_BYTES:
            return f"{WORK}/ holds more than {SAVE_LIMIT_BYTES >> 30} GiB and is NOT saved: move large files to {SCRATCH}/"
        with suppress(tarfile.TarError, FileNotFoundError):  # a file that changes meanwhile: next time
            self._ctx.checkpoint(self._step, lambda folder: pack(self._work, folder / ARCHIVE))
            self._saved, self._step = stamp, self._step + 1
        return ""

    def finish(self, archive: Path) -> int:
        """Bytes of the archive that goes with the result; 0 where the files are too large for it."""
        if size_of(self._work) > SAVE_LIMIT_BYTES:
            return 0
        pack(self._work, archive)
        return archive.stat().st_size


def pack(work: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as out:
        for path in sorted(work.iterdir()):
            if path.name != ".ipynb_checkpoints":
                out.add(path, path.name)


def stamp_of(work: Path) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files_below(work))


def size_of(work: Path) -> int:
    return sum(stat.st_size for _, stat in files_below(work))


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):
            stat = path.lstat()
            if not path.is_dir() and ".ipynb_checkpoints" not in path.parts:
                yield path, stat


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """Servers that were started. `works`: those below which people compute, or which compute for them."""

    each: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    works: list[str] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """What counts: everything below JupyterLab, not itself; the chat's model as a whole."""
        found = []
        for name, server in self.each.items():
            with suppress(psutil.NoSuchProcess):
                one = psutil.Process(server.pid)
                found += one.children(recursive=True) if name == "jupyter" or name in self.works else []
                found += [one] if name in self.works else []
        return found

    def end(self) -> None:
        for server in self.each.values():
            server.terminate()
        until = time.monotonic() + END_LIMIT_S
        for server in self.each.values():
            try:
                server.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                server.kill()  # what it started carries the supervisor's mark, and ends with the stage


@contextmanager
def servers(ctx: Context, settings: BoxSettings, box: Box) -> Iterator[Running]:
    """Everything that listens, up and told of in CONNECT_FILE. Raises TaskError when something does not start."""
    running, token, env = Running(), secrets.token_urlsafe(TOKEN_BYTES), people_env(os.environ, ctx.work, box)
    told: dict[str, dict[str, Any]] = {}
    try:
        told["jupyter"] = start_jupyter(ctx, box, running, token, env)
        told["tensorboard"] = start_tensorboard(ctx, box, running, env)
        if settings.chat is not None:
            from tasks import chat

            told |= chat.start(ctx, settings.chat, box.root, running, env)
        write_private(box.root / CONNECT_FILE, json.dumps(told))
        yield running
    finally:
        (box.root / CONNECT_FILE).unlink(missing_ok=True)
        running.end()


def people_env(env: Mapping[str, str], work: Path, box: Box) -> dict[str, str]:
    """Environment of what people run: the run's code, their own token for the hub, no key of the bucket."""
    kept = {
        name: value
        for name, value in env.items()
        if not name.startswith(HELD_BACK) and name not in HELD_BACK_WORDS and not name.startswith("JUPYTER")
    }
    own = {"PYTHONPATH": str(box.home / CODE), BOX_ENV: str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    places = {name: str(box.root / "jupyter" / name) for name in ("config", "data", "runtime")}
    jupyter = {f"JUPYTER_{name.upper()}_DIR": place for name, place in places.items()}
    return {**kept, **own, **jupyter, "IPYTHONDIR": str(box.root / "jupyter" / "ipython")}


def start_jupyter(ctx: Context, box: Box, running: Running, token: str, env: Mapping[str, str]) -> dict[str, Any]:
    port, config = free_port(), box.root / "jupyter" / "config"
    for name in ("config", "data", "runtime", "ipython"):
        (box.root / "jupyter" / name).mkdir(parents=True, exist_ok=True)
    write_private(config / "jupyter_server_config.json", json.dumps(jupyter_config(box.home, port, token)))
    start(running, "jupyter", [sys.executable, "-m", "jupyterlab"], box, env)
    wait_for(ctx, running, "jupyter", "JupyterLab", box, lambda: answers(port, "/api/status", token))
    return {"port": port, "token": token, "path": f"/lab/tree/{WORK}/{NOTEBOOK}?token={token}"}


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
        "PasswordIdentityProvider": {"hashed_password": "", "allow_password_change": False},
        "LabApp": {"news_url": None, "check_for_updates_class": "jupyterlab.NeverCheckForUpdate"},
    }


def start_tensorboard(ctx: Context, box: Box, running: Running, env: Mapping[str, str]) -> dict[str, Any]:
    """Below a path that nobody can guess, since it asks for no password."""
    port, place = free_port(), f"/{secrets.token_urlsafe(TOKEN_BYTES)}"
    orders = box.root / "tensorboard.json"
    write_private(orders, json.dumps({"logdir": str(box.home), "port": port, "path": place}))
    start(running, "tensorboard", [sys.executable, "-m", "tasks.box_board", str(orders)], box, env)
    wait_for(ctx, running, "tensorboard", "TensorBoard", box, lambda: answers(port, f"{place}/"))
    return {"port": port, "path": f"{place}/"}


def start(running: Running, name: str, argv: Sequence[str], box: Box, env: Mapping[str, str]) -> None:
    """Its words go to a file here: JupyterLab's may hold the token, and the stage's log is uploaded."""
    with log_of(box, name).open("wb") as log:
        running.each[name] = subprocess.Popen(
            argv, cwd=box.root / "jupyter", env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def wait_for(ctx: Context, running: Running, name: str, called: str, box: Box, ready: Callable[[], bool]) -> None:
    until, ctx_s = time.monotonic() + START_LIMIT_S, 0
    while not ready():
        ctx.progress(f"start {called}", ctx_s, declared=True)
        if running.each[name].poll() is not None or time.monotonic() > until:
            lines = [line for line in log_of(box, name).read_text(errors="replace").splitlines() if line.strip()]
            said = hide(lines[-1], box) if lines else "it said nothing"
            raise TaskError(f"{called} did not start: {said}", hint="resume the run for another machine")
        time.sleep(0.2)
        ctx_s += 1


def hide(line: str, box: Box) -> str:
    """A line of a server's log without what only its owner may know."""
    return "its words may hold its token" if "token" in line.lower() else line.replace(str(box.root), "")


def log_of(box: Box, name: str) -> Path:
    return box.root / f"{name}.log"


def answers(port: int, path: str, token: str = "") -> bool:
    headers = {"Authorization": f"token {token}"} if token else {}
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


# --- while it is open -------------------------------------------------------------------------------------------------


def keep_open(ctx: Context, settings: BoxSettings, box: Box, running: Running, saver: Saver) -> tuple[str, int]:
    """(why it ended, how often work was seen). Progress moves with work alone: the supervisor's idle rule goes by it."""
    gauge, notices = Gauge(ctx.task.watch, bool(settings.chat)), Notices(ctx.task.watch.idle_s)
    while True:
        left_s = seconds_left(ctx.work) - ctx.task.watch.flush_s
        gauge.look(running.processes())
        notice = notices.of(left_s=left_s, quiet_s=gauge.quiet_s) or saver.look(settings.save_every_s)
        if notice:
            print(notice, flush=True)
            write_text(box.home / NOTICE, f"{time.strftime('%H:%M:%S %Z')}  {notice}\n")
        ctx.progress(BOX_READY, gauge.signs, None, "signs of work", quiet_s=gauge.quiet_s, left_s=max(0.0, left_s))
        ended = why_ended(ctx, running, quiet_s=gauge.quiet_s, left_s=left_s)
        if ended:
            return ended, gauge.signs
        time.sleep(TICK_S)


def why_ended(ctx: Context, running: Running, *, quiet_s: float, left_s: float) -> str:
    """Empty while the box stays open."""
    if running.each["jupyter"].poll() is not None:
        return "JupyterLab was shut down"
    if ctx.limit is not None:
        return "its client closed it"
    if not ctx.stopping:
        return ""
    if left_s <= 2 * ctx.task.watch.tick_s:
        return "its time was up"
    if quiet_s >= ctx.task.watch.idle_s:
        return f"nothing worked on it for {quiet_s / 60:.0f} min"
    return "it was told to end"


def seconds_left(work: Path) -> float:
    """Until this machine must be gone, as the supervisor counts."""
    state = json.loads((work / STATE_FILE).read_text())
    return float(state["remaining_s"]) - (boottime_s() - float(state["at_s"]))


