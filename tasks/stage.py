"""What a stage's working code may use: inputs, progress, metrics, checkpoints, results. Also the stage's process."""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, TextIO

from tasks.bootstrap import SETUP
from tasks.bucket import (
    Bucket,
    BucketError,
    Corrupt,
    Moved,
    NotFound,
    PreconditionFailed,
    commit_folder,
    delete_prefix,
    fetch_folder,
    files_sha256,
    open_bucket,
    read_commit,
    sha256_of,
)
from tasks.contract import (
    COMMIT_FILE,
    LABELS_PREFIX,
    LIMIT_FILE,
    METRICS_FILE,
    PROGRESS_FILE,
    RESULT_FILE,
    TASK_FILE,
    DataSource,
    Exit,
    Limit,
    Progress,
    Task,
    TaskError,
)
from tasks.peers import LAUNCHED_ENV, rank_of

SUPERVISOR_ENV = "KDCLOUD_SUPERVISOR"  # process id of the supervisor, for the stage's own process
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(Exception):
    """The stage was asked to stop and has saved a checkpoint (or has none to save)."""


class Context(Protocol):
    """One stage's view of the world. `tasks/<kind>.py` exposes `run(ctx: Context, settings) -> dict` (the result)."""

    task: Task
    work: Path  # scratch folder on the machine
    out: Path  # what is put here is uploaded and committed with the result, as <run>/<stage>/<relative path>

    def progress(
        self, phase: str, done: float = 0, total: float | None = None, unit: str = "steps", *,
        declared: bool = False, **numbers: float,
    ) -> None:
        """Says that work moved; call it from the working loop, as often as you like (writing is throttled).

        Also raises Stopped when a stop was asked for and no checkpoint is being kept by the caller (see `stopping`).
        """
        ...

    @property
    def stopping(self) -> bool:
        """A stop was asked for: save a checkpoint at once, then raise Stopped."""
        ...

    @property
    def limit(self) -> float | None:
        """Where the stage is to end instead of its total, in the units of its progress; None = as planned."""
        ...

    def metric(self, step: int, **values: float) -> None:
        """A row of metrics.jsonl and TensorBoard scalars (names as `loss/total` become `loss__total` in keywords)."""
        ...

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Calls `write(folder)`, uploads the folder as checkpoints/step-N and commits it; keeps the newest two."""
        ...

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The newest committed checkpoint of this stage, fetched and verified."""
        ...

    def keep(self, name: str) -> None:
        """Uploads out/<name> (a file or folder) now, so that it survives a stop. Folders get a COMMIT of their own."""
        ...

    def kept(self, name: str) -> bool:
        """Whether out/<name> was kept by an earlier attempt (it is fetched into out/ then)."""
        ...

    def input(self, stage: str) -> Path:
        """Folder with the committed artefacts of an earlier stage, fetched and verified. Raises TaskError."""
        ...

    def told(self, stage: str) -> tuple[Task, dict[str, Any]] | None:
        """What an earlier stage was asked and what came out, without its files; None where it is not committed."""
        ...

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        """Rows of prompts: {"input": str, "answer": str | None, "key": str}."""
        ...


class Fenced(Exception):
    """A newer attempt owns this stage: nothing more may be written."""


CHECKPOINTS = "checkpoints"  # folder in work and in the bucket
EVENTS = "events"  # TensorBoard's files, likewise
FAILED_FILE = "failed.json"  # in work: what a failed stage has to say to a person
KEEP_CHECKPOINTS = 2  # the newest may turn out to be corrupt
WRITE_S = 0.2  # progress.json is written at most that often
STOP_CALLS = 3  # a loop that never asks `stopping` is stopped in this call of `progress` after the stop
MEDIAN_OF = 20  # movements


class StageContext:
    """The context of a stage that runs under the supervisor, with a bucket behind it."""

    def __init__(self, task: Task, work: Path, bucket: Bucket) -> None:
        self.task = task
        self.work = work
        self.out = work / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self._bucket = bucket
        self._now = Progress()
        self._gaps: deque[float] = deque(maxlen=MEDIAN_OF)
        self._moved_at = self._written_at = self._ticked_at = time.monotonic()
        self._phases: dict[str, tuple[float, float]] = {}  # `done` at its first report, seconds in it since then
        self._work_s = 0.0
        self._declared_s: dict[str, float] = {}
        self._moved_bytes: dict[str, float] = {}
        self._lock = threading.RLock()  # uploads report from threads of their own
        self._stop = False
        self._asked_in: str | None = None  # the phase in which the caller last looked at `stopping`
        self._calls_after_stop = 0
        self._saved_step: int | None = None
        self._metrics: TextIO | None = None
        self._events: _Events | None = None

    def ask_to_stop(self) -> None:
        """May be called from a signal handler."""
        self._stop = True

    @property
    def stopping(self) -> bool:
        self._asked_in = self._now.phase
        return self._stop

    @property
    def limit(self) -> float | None:
        if not self.task.gate:
            return None
        try:
            return Limit.from_json((self.work / LIMIT_FILE).read_text()).total
        except FileNotFoundError:
            return None

    def progress(
        self, phase: str, done: float = 0, total: float | None = None, unit: str = "steps", *,
        declared: bool = False, **numbers: float,
    ) -> None:
        if self._stop and self._asked_in != phase:
            self._calls_after_stop += 1
            if self._calls_after_stop >= STOP_CALLS:
                raise Stopped
        self._report(phase, done, total, unit, declared, numbers)

    def _report(
        self, phase: str, done: float, total: float | None, unit: str, declared: bool, numbers: Mapping[str, float]
    ) -> None:
        with self._lock:
            now, before = time.monotonic(), self._now
            self._tick(now)
            moved = (phase, done) != (before.phase, before.done)
            phase_from, phase_s = self._phases.setdefault(phase, (done, 0.0))
            if phase != before.phase:
                self._gaps.clear()
            elif moved:
                self._gaps.append(now - self._moved_at)
            self._moved_at = now if moved else self._moved_at
            finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
            self._now = Progress(
                phase=phase, count=before.count + moved, done=done, total=total, unit=unit, declared=declared,
                step_s=statistics.median(self._gaps) if self._gaps else None, numbers={**before.numbers, **finite},
                phase_from=phase_from, phase_s=phase_s if moved else before.phase_s,
                work_s=self._work_s if moved else before.work_s,
            )
            due = phase != before.phase or done == total or now - self._written_at >= WRITE_S
            if due and self._now != before:
                self._write(now)

    def _tick(self, now: float) -> None:
        """Adds the time since the last report to the phase that was then."""
        span_s, self._ticked_at = now - self._ticked_at, now
        if self._now.phase in self._phases:
            first, seconds = self._phases[self._now.phase]
            self._phases[self._now.phase] = first, seconds + span_s
            self._work_s += 0.0 if self._now.declared else span_s
            if self._now.declared:
                self._declared_s[self._now.phase] = self._declared_s.get(self._now.phase, 0.0) + span_s

    def _write(self, now: float) -> None:
        told = replace(self._now, phases_s=dict(self._declared_s), moved_bytes=dict(self._moved_bytes))
        write_text(self.work / PROGRESS_FILE, told.to_json())
        self._written_at = now

    @contextmanager
    def _moving(self, phase: str) -> Iterator[Moved]:
        """A declared phase inside the caller's own; yields what counts its bytes, and puts the caller's phase back."""
        with self._lock:
            outer, gaps, moved_bytes = self._now, list(self._gaps), 0
            self._report(phase, 0, None, "bytes", True, {})

        def moved(count: int) -> None:
            nonlocal moved_bytes
            with self._lock:
                moved_bytes += count
                self._moved_bytes[phase] = self._moved_bytes.get(phase, 0.0) + count
                self._report(phase, moved_bytes, None, "bytes", True, {})

        try:
            yield moved
        finally:
            with self._lock:
                self._tick(time.monotonic())
                self._now = replace(outer, count=self._now.count + 1)
                self._gaps, self._moved_at = deque(gaps, maxlen=MEDIAN_OF), time.monotonic()
                self._write(self._moved_at)

    def metric(self, step: int, **values: float) -> None:
        named = {name.replace("__", "/"): float(value) for name, value in values.items()}
        if self._metrics is None:
            self._metrics = _open_rows(self.work / METRICS_FILE)
            self._events = _Events.open(self.work / EVENTS)
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in named.items()}}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._events is not None:
            self._events.add(step, named)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if step == self._saved_step:
            return
        folder = self.work / CHECKPOINTS / f"step-{step}"
        making = folder.with_suffix(".tmp")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        with self._moving("checkpoint") as moved:
            write(making)
            _sync(making)
            shutil.rmtree(folder, ignore_errors=True)
            making.rename(folder)
            commit_checkpoint(self._bucket, self.task, folder, moved=moved, guard=self._guard)
        self._saved_step = step
        _prune_checkpoints(self._bucket, self.task, self.work, step)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        local = local_checkpoints(self.work)
        committed = committed_checkpoints(self._bucket, self.task.stage)
        for step in sorted({*local, *committed}, reverse=True):
            folder = self.work / CHECKPOINTS / f"step-{step}"
            if step not in committed:
                print(f"going on from checkpoint step-{step}, which this machine has and the bucket has not")
                return step, folder
            try:
                with self._moving("download") as moved:
                    fetch_folder(self._bucket, f"{self.task.stage}/{CHECKPOINTS}/step-{step}", folder, moved=moved)
            except Corrupt as error:
                print(f"checkpoint step-{step} is corrupt, taking the one before: {error.message}")
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._saved_step = step
            return step, folder
        return None

    def keep(self, name: str) -> None:
        path, key = self.out / name, f"{self.task.stage}/{name}"
        with self._moving("upload") as moved:
            self._guard()
            if path.is_dir():
                commit_folder(self._bucket, path, key, fence=self.task.fence, moved=moved, guard=self._guard)
            else:
                self._bucket.put_file(path, key, moved)

    def kept(self, name: str) -> bool:
        path, key = self.out / name, f"{self.task.stage}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._moving("download") as moved:
                if self._bucket.head(key) is not None:  # a file: it was written whole or not at all
                    self._bucket.get_file(key, path, moved)
                elif read_commit(self._bucket, key) is not None:
                    fetch_folder(self._bucket, key, path, moved=moved)
                else:
                    return False
        except Corrupt as error:
            print(f"{name}, kept by an earlier attempt, is corrupt and is made again: {error.message}")
            if path.is_dir():
                shutil.rmtree(path)
            return False
        return True

    def input(self, stage: str) -> Path:
        folder = self.work.parent / "inputs" / stage
        try:
            if stage.startswith(LABELS_PREFIX):
                self._check_labels(stage)
            with self._moving("download") as moved:
                return fetch_folder(self._bucket, stage, folder, moved=moved)
        except NotFound as error:
            raise TaskError(f"stage {stage} has no committed result", hint="resume the run to make it") from error
        except Corrupt as error:
            raise TaskError(f"the result of stage {stage} is corrupt: {error.message}", hint=error.hint) from error

    def told(self, stage: str) -> tuple[Task, dict[str, Any]] | None:
        manifest = read_commit(self._bucket, stage)
        entry = None if manifest is None else manifest.files.get(RESULT_FILE)
        if entry is None:
            return None
        result, _ = self._bucket.get(f"{stage}/{RESULT_FILE}")
        if hashlib.sha256(result).hexdigest() != entry.sha256:
            raise TaskError(f"the result of stage {stage} is corrupt", hint="resume the run to make it again")
        order, _ = self._bucket.get(f"{stage}/{TASK_FILE}")
        return Task.from_json(order.decode()), json.loads(result)

    def _check_labels(self, key: str) -> None:
        """Each file is checked against the manifest; here the manifest against the hash that the client named."""
        manifest = read_commit(self._bucket, key)
        if manifest is None:
            raise TaskError(f"{key} is not in the bucket of this run", hint="start a new run from the client")
        if files_sha256(manifest.files) != key.removeprefix(LABELS_PREFIX):
            raise TaskError(
                "the labels in the bucket are not those this run was started with", hint="start a new run for new ones"
            )

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        from tasks import data

        if source.source.startswith("builtin:"):
            return list(data.builtin(source.source))
        path = self.work / "data" / Path(source.source).name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._moving("download") as moved:
                self._bucket.get_file(source.source, path, moved)
        except NotFound as error:
            text = f"{source.source} is not in the bucket of this run"
            raise TaskError(text, hint="resume the run from the client") from error
        if source.sha256 is not None and sha256_of(path) != source.sha256:
            raise TaskError(
                f"{source.source} in the bucket is not the file this run was started with",
                hint="start a new run for the new file",
            )
        return list(data.read_rows(path))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Commits out/ and result.json: from now on the stage counts."""
        result = {**result, **({"setup": json.loads(os.environ[SETUP])} if SETUP in os.environ else {})}
        write_text(self.out / RESULT_FILE, json.dumps(_without_nan(result), indent=1, sort_keys=True))
        with self._moving("upload") as moved:
            commit_folder(
                self._bucket, self.out, self.task.stage, fence=self.task.fence, moved=moved, guard=self._guard
            )

    def close(self) -> None:
        """Nothing is left in buffers."""
        with self._lock:
            self._write(time.monotonic())
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            self._events.close()

    def _guard(self) -> None:
        check_fence(self._bucket, self.task)


class FollowerContext(StageContext):
    """The context of a process that does not lead: it reads as the first one does, and writes to its own disk only."""

    def __init__(self, task: Task, work: Path, bucket: Bucket) -> None:
        super().__init__(task, work / "work", bucket)

    def metric(self, step: int, **values: float) -> None:
        pass

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        pass

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        return None  # the first one says where to go on

    def keep(self, name: str) -> None:
        pass

    def finish(self, result: Mapping[str, Any]) -> None:
        pass


def check_fence(bucket: Bucket, task: Task) -> None:
    """Raises Fenced once the bucket holds a task.json of a newer attempt at this stage."""
    newest = newest_attempt(bucket, task.stage)
    if newest is not None and newest > task.attempt:
        raise Fenced(f"attempt {newest} owns this stage now")


def newest_attempt(bucket: Bucket, stage: str) -> int | None:
    """The attempt of the task.json in the bucket; None if there is none."""
    try:
        raw, _ = bucket.get(f"{stage}/{TASK_FILE}")
    except NotFound:
        return None
    return int(json.loads(raw)["attempt"])


def local_checkpoints(work: Path) -> list[int]:
    """Steps of the complete checkpoints on this machine, rising."""
    return sorted(step for path in (work / CHECKPOINTS).glob("step-*") if (step := _step_of(path.name)) is not None)


def committed_checkpoints(bucket: Bucket, stage: str) -> list[int]:
    """Steps of the committed checkpoints in the bucket, rising."""
    keys = [stat.key.split("/") for stat in bucket.at(f"{stage}/{CHECKPOINTS}").list()]
    names = [parts[0] for parts in keys if len(parts) == 2 and parts[1] == COMMIT_FILE]
    return sorted(step for name in names if (step := _step_of(name)) is not None)


def commit_checkpoint(
    bucket: Bucket, task: Task, folder: Path, *, moved: Moved | None = None, guard: Callable[[], None] | None = None
) -> None:
    """Uploads the local checkpoint `folder` and makes it count."""
    prefix = f"{task.stage}/{CHECKPOINTS}/{folder.name}"
    commit_folder(bucket, folder, prefix, fence=task.fence, moved=moved, guard=guard)


def _prune_checkpoints(bucket: Bucket, task: Task, work: Path, step: int) -> None:
    """Leaves the newest committed ones up to `step`, here and in the bucket; later ones were given up as corrupt."""
    kept = [s for s in committed_checkpoints(bucket, task.stage) if s <= step][-KEEP_CHECKPOINTS:]
    there = {stat.key.split("/")[0] for stat in bucket.at(f"{task.stage}/{CHECKPOINTS}").list()}
    for name in there:
        if _step_of(name) not in kept:
            delete_prefix(bucket, f"{task.stage}/{CHECKPOINTS}/{name}")
    for path in (work / CHECKPOINTS).iterdir():
        if _step_of(path.name) not in kept:
            shutil.rmtree(path)


def _step_of(name: str) -> int | None:
    head, dash, digits = name.partition("-")
    return int(digits) if head == "step" and dash and digits.isascii() and digits.isdigit() else None


def _sync(folder: Path) -> None:
    """So that a complete checkpoint is complete after a power cut, too."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: a reader sees the old text or the new one."""
    temp = path.with_name(f".{path.name}.tmp")
    temp.write_text(text)
    os.replace(temp, path)


def _open_rows(path: Path) -> TextIO:
    """For appending; a row that an earlier attempt left half-written is cut off."""
    path.touch()
    with path.open("rb+") as file:
        rows = file.read()
        file.truncate(rows.rfind(b"\n") + 1)
    return path.open("a")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what is not a number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


class _Events:
    """TensorBoard scalars, through tensorboard's own writer: it needs no torch."""

    def __init__(self, writer: Any, event: Any, summary: Any) -> None:
        self._writer, self._event, self._summary = writer, event, summary

    @staticmethod
    def open(folder: Path) -> _Events | None:
        """None, and a line in the log, where tensorboard is not installed."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            print("tensorboard is not installed here: numbers go to metrics.jsonl alone")
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return _Events(EventFileWriter(str(folder), flush_secs=5), Event, Summary)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        rows = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=self._summary(value=rows)))

    def close(self) -> None:
        self._writer.close()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one stage and ends the process with contract.Exit."""
    parser = argparse.ArgumentParser(prog="python -m tasks.stage", description="the working process of one stage")
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args(argv)
    die_with_parent()
    sys.excepthook = end_with_traceback
    grow_segments(os.environ)
    work = args.work.absolute()
    end_process(run_stage(args.task, work) if rank_of(os.environ) == 0 else follow_stage(args.task, work))


def grow_segments(env: MutableMapping[str, str]) -> None:
    """PyTorch's CUDA memory in segments that grow, unless told otherwise; before torch is imported.

    Rows of uneven lengths left 22 GiB reserved that fixed segments could not use again, and 1 GiB with these, at the
    same speed (one H200: benchmarks/own_cases.py).
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second up to torch 2.8
    if not any(name in env for name in names):
        env.update(dict.fromkeys(names, "expandable_segments:True"))


def end_process(code: Exit) -> NoReturn:
    """Ends at once, whatever threads a library left behind."""
    with suppress(OSError):  # whoever read our output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end_with_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook: what nobody caught is a bug."""
    traceback.print_exception(kind, error, trace)
    end_process(Exit.BUG)


def run_stage(task_path: Path, work: Path, run: Callable[[Context, Any], Mapping[str, Any]] | None = None) -> Exit:
    """Why the stage ended; `run` is that of `tasks.<kind>` unless given. A bug is raised."""
    try:
        task = Task.from_json(task_path.read_text())
        ctx = StageContext(task, work, open_bucket(task.bucket))
        signal.signal(signal.SIGTERM, lambda *_: ctx.ask_to_stop())
        try:
            if run is None:
                run = importlib.import_module(f"tasks.{task.kind}").run
            ctx.finish(run(ctx, task.settings))
        finally:
            with suppress(OSError):
                ctx.close()
        return Exit.DONE
    except Stopped:
        print("stopped as asked")
        return Exit.TERMINATED
    except (Fenced, PreconditionFailed) as error:
        print(f"stopped: {error}")
        return Exit.FENCED
    except (TaskError, BucketError, OSError, MemoryError, RuntimeError) as error:
        known = explain(error, work)
        if known is None:
            raise
        return _failed(known, work)


def follow_stage(task_path: Path, work: Path) -> Exit:
    """What a process does that does not lead: what its kind says in `follow(ctx, settings)`, else nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the leader saves, and tells when it is over
    task = Task.from_json(task_path.read_text())
    follow = getattr(importlib.import_module(f"tasks.{task.kind}"), "follow", None)
    if follow is None:
        print(f"a stage of kind {task.kind} is done by one process: this one leaves")
    else:
        ctx = FollowerContext(task, work / f"rank-{rank_of(os.environ)}", open_bucket(task.bucket))
        try:
            follow(ctx, task.settings)
        except (TaskError, BucketError, OSError, MemoryError, RuntimeError) as error:
            known = explain(error, work)
            if known is None:
                raise
            return _failed(known, work)  # torchrun ends the others, which may wait for this one
    return Exit.DONE


def _failed(known: TaskError, work: Path) -> Exit:
    """Tells a person what to do, through the log and the supervisor. Of several processes the first one is heard."""
    print(f"error: {known.message}\n{known.hint}".rstrip())
    with suppress(OSError):  # a full disk: the supervisor then finds the sentence in what was printed
        if not (work / FAILED_FILE).exists():
            write_text(work / FAILED_FILE, json.dumps({"message": known.message, "hint": known.hint}))
    return Exit.BAD_INPUT


def explain(error: BaseException, work: Path) -> TaskError | None:
    """What a person can do about it; None for a bug."""
    if isinstance(error, TaskError):
        return error
    if isinstance(error, BucketError):
        return TaskError(error.message, hint=error.hint)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"the disk that holds {error.filename or work} is full"
        return TaskError(text, hint="free some space there and resume")
    if _is_out_of_memory(error):
        first = str(error).strip().split("\n")[0]
        return TaskError(
            f"the stage ran out of memory{': ' + first if first else ''}",
            hint="take a machine with more memory, a smaller batch or gradient checkpointing, and resume",
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """torch is known by name here, since it may not be installed."""
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "CUDA out of memory" in str(error)
    )


def die_with_parent() -> None:
    """This process ends when its supervisor does, even by SIGKILL. Without a supervisor nothing happens."""
    supervisor = os.environ.get(SUPERVISOR_ENV)
    if supervisor is None:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(int(supervisor),), daemon=True).start()
    if os.getppid() != int(supervisor) and LAUNCHED_ENV not in os.environ:
        os._exit(Exit.TERMINATED)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    # As `python -m tasks.stage` this file is `__main__`: the stage kinds know its classes by their real name.
    from tasks.stage import main as real_main

    real_main()
