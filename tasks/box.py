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
import shutil
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import tasks
from tasks.box_servers import CODE, INPUTS, SCRATCH, WORK, Box, Running, servers
from tasks.box_work import Gauge, Notices, watched_gpus
from tasks.bucket import BucketError
from tasks.contract import (
    BEFORE_PREFIX,
    BOX_READY,
    BoxSettings,
    DataSource,
    ModelSource,
    TaskError,
    inputs_of,
)
from tasks.notebook import NOTEBOOK, notebook
from tasks.stage import Context, write_text
from tasks.supervisor import STATE_FILE, boottime_s

TICK_S = 0.5
SAVE_LIMIT_BYTES = 2 << 30  # what is larger belongs beside work/, where nothing is saved
ARCHIVE = "work.zip"  # a file of the result and of each checkpoint: names in it may be any
NOTICE = "NOTICE.txt"


def run(ctx: Context, settings: BoxSettings) -> dict[str, Any]:
    """Opens the box and keeps it until it is closed, told to end, or JupyterLab is shut down from the browser.

    What ended it is in the result, and its files in ARCHIVE beside it.
    """
    os.umask(0o077)
    box = Box.make(ctx.work)
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
        shutil.copytree(
            Path(str(tasks.__file__)).parent, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__")
        )
        return
    with zipfile.ZipFile(archive) as code:
        for name in code.namelist():
            if name.startswith("tasks/"):
                code.extract(name, folder)


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
        try:
            unpack(folder / ARCHIVE, work)
        except (zipfile.BadZipFile, ValueError) as error:
            hint = "delete that file in the bucket, and open a new box"
            raise TaskError(f"the files of the earlier box cannot be put back: {error}", hint=hint) from error


class Saver:
    """Brings the files below work/ to the bucket when they have changed."""

    def __init__(self, ctx: Context, work: Path) -> None:
        self._ctx, self._work = ctx, work
        self._saved = stamp_of(work)
        self._tried_s = time.monotonic()
        self._step = (found[0] if (found := ctx.latest_checkpoint()) is not None else 0) + 1
        self.fails = False

    def look(self, every_s: float) -> str:
        """Saves what is due. Returns what a person must know, or nothing; `fails` until it goes well again."""
        if time.monotonic() - self._tried_s < every_s:
            return ""
        trouble = self._save()
        self.fails = bool(trouble)
        return trouble

    def _save(self) -> str:
        self._tried_s, stamp = time.monotonic(), stamp_of(self._work)
        if stamp == self._saved:
            return ""
        if size_of(self._work) > SAVE_LIMIT_BYTES:
            return (
                f"{WORK}/ holds more than {SAVE_LIMIT_BYTES >> 30} GiB and is NOT saved: move large files to {SCRATCH}/"
            )
        try:
            self._ctx.checkpoint(self._step, lambda folder: pack(self._work, folder / ARCHIVE))
        except FileNotFoundError:  # a file that goes meanwhile: next time
            return ""
        except (zipfile.LargeZipFile, OSError, BucketError) as error:  # the box goes on: next time may be better
            return f"the files below {WORK}/ could not be saved: {getattr(error, 'message', error)}"
        self._saved, self._step = stamp, self._step + 1
        return ""

    def finish(self, archive: Path) -> int:
        """Bytes of the archive that goes with the result; 0 where the files are too large for it, or for the disk."""
        if size_of(self._work) > SAVE_LIMIT_BYTES:
            return 0
        try:
            pack(self._work, archive)
        except (zipfile.LargeZipFile, OSError) as error:
            archive.unlink(missing_ok=True)
            print(f"the files below {WORK}/ could not be saved: {error}", flush=True)
            return 0
        return archive.stat().st_size


def pack(work: Path, archive: Path) -> None:
    """Every file below `work` that can be read; a link is the file that it leads to."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as out:
        for path, _ in files_below(work):
            try:
                out.write(path, path.relative_to(work).as_posix())
            except (PermissionError, FileNotFoundError, UnicodeError) as error:  # one file must not cost the others
                print(f"{path.name!a} is not saved: {type(error).__name__}", flush=True)


def unpack(archive: Path, work: Path) -> None:
    """Raises ValueError for a name that leads out of `work`, or more than is ever saved: others may have written it."""
    with zipfile.ZipFile(archive) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > SAVE_LIMIT_BYTES:
            raise ValueError(f"{archive.name} holds more than {SAVE_LIMIT_BYTES >> 30} GiB")
        for entry in packed.infolist():
            path = work.joinpath(entry.filename).resolve()
            if not path.is_relative_to(work.resolve()):
                raise ValueError(f"{entry.filename!r} leads out of the box")
            path.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(entry) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
            path.chmod(0o700 if entry.external_attr >> 16 & stat.S_IXUSR else 0o600)


def stamp_of(work: Path) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(path), found.st_size, found.st_mtime_ns) for path, found in files_below(work))


def size_of(work: Path) -> int:
    return sum(found.st_size for _, found in files_below(work))


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Plain files, and those that links lead to, but for JupyterLab's own copies."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != ".ipynb_checkpoints")
        for name in sorted(names):
            path = Path(parent, name)
            with suppress(OSError):
                found = path.stat()
                if stat.S_ISREG(found.st_mode):
                    yield path, found


# --- while it is open -------------------------------------------------------------------------------------------------


def keep_open(ctx: Context, settings: BoxSettings, box: Box, running: Running, saver: Saver) -> tuple[str, int]:
    """(why it ended, how often work was seen). Progress moves with work alone: the idle rule goes by it."""
    gauge, notices = Gauge(ctx.task.watch, gpu_use=watched_gpus()), Notices(ctx.task.watch.idle_s)
    while True:
        left_s = seconds_left(ctx.work) - ctx.task.watch.flush_s
        gauge.look(running.processes())
        notice = notices.of(left_s=left_s, quiet_s=gauge.quiet_s) or saver.look(settings.save_every_s)
        if notice:
            print(notice, flush=True)
            write_text(box.home / NOTICE, f"{time.strftime('%H:%M:%S %Z')}  {notice}\n")
        ctx.progress(
            BOX_READY, gauge.signs, None, "signs of work",
            quiet_s=gauge.quiet_s, left_s=max(0.0, left_s), unsaved=float(saver.fails),
        )  # fmt: skip
        ended = why_ended(ctx, running, quiet_s=gauge.quiet_s, left_s=left_s)
        if ended:
            return ended, gauge.signs
        time.sleep(TICK_S)


def why_ended(ctx: Context, running: Running, *, quiet_s: float, left_s: float) -> str:
    """Empty while the box stays open."""
    if ctx.limit is not None:
        return "its client closed it"
    if quiet_s >= ctx.task.watch.idle_s:  # saving is progress, and no work: the supervisor alone would wait on
        return f"nothing worked on it for {quiet_s / 60:.0f} min"
    if not ctx.stopping:
        return "JupyterLab was shut down" if running.each["jupyter"].process.poll() is not None else ""
    if left_s <= 2 * ctx.task.watch.tick_s:
        return "its time was up"
    return "it was told to end"


def seconds_left(work: Path) -> float:
    """Until this machine must be gone, as the supervisor counts."""
    state = json.loads((work / STATE_FILE).read_text())
    return float(state["remaining_s"]) - (boottime_s() - float(state["at_s"]))
