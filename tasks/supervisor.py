"""What ends a stage in time, and saves what it has? The first process of every stage; it decides by tasks.watch.

    python -m tasks.supervisor --bucket file:/runs/r1 --stage train --attempt 1 --remaining-s 3600

With `--then evaluate:1:60,export:1:30` the machine goes on with these stages, in turn, each with a watch and a clock of
its own, until one is not done: no client has to be there for that.

Its own loop never waits for the bucket: a thread beside it talks to the store, so that a deadline holds while the store
hangs. Whatever the stage started ends with it: by descent, by session, and by a mark in the environment. Should the
supervisor itself be killed, a guard process ends the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NoReturn, TypeVar

import psutil

from tasks.bootstrap import SETUP
from tasks.bucket import Bucket, BucketError, NotFound, open_bucket, os_trouble, read_commit, sha256_of
from tasks.contract import (
    BOX,
    ENDED_FILE,
    LIMIT_FILE,
    LOG_FILE,
    METRICS_FILE,
    PROGRESS_FILE,
    TASK_FILE,
    Ended,
    Exit,
    Limit,
    Link,
    Progress,
    Task,
    TaskError,
    kept_s,
    links_of,
)
from tasks.gpu import Watcher
from tasks.peers import stage_argv
from tasks.stage import (
    CHECKPOINTS,
    EVENTS,
    FAILED_FILE,
    SUPERVISOR_ENV,
    Fenced,
    check_fence,
    commit_checkpoint,
    committed_checkpoints,
    end_process,
    end_with_traceback,
    explain,
    local_checkpoints,
    newest_attempt,
    write_text,
)
from tasks.watch import Activity, Decision, Sight, Usage, View, advance, decide, judge, may_save_on, obeys

LEASE_FILE = "lease.json"  # below the run, kept fresh by the client
STATE_FILE = "supervisor.json"  # in work: what a restart must know
MARK_ENV = "KDCLOUD_STAGE_MARK"  # in the environment of everything the stage starts
ROWS_EVERY_S = 10.0  # metrics, events and log go up that often
CORES_OVER_S = 3.0
LOG_TAIL_BYTES = 4 << 20  # more of a log is not uploaded
LOCK_WAIT_S = 60.0  # a supervisor that was replaced needs that long to leave
GIB = 2**30
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

# Waits for the end of its input, which is the end of the supervisor, then ends what carries the mark.
_GUARD = "import sys; sys.stdin.buffer.read(); from tasks.supervisor import end_marked; end_marked(sys.argv[1])"

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Ends with contract.Exit, at once: threads that still hang in a store are left behind."""
    began_s = boottime_s()
    parser = argparse.ArgumentParser(prog="python -m tasks.supervisor", description="watches one stage")
    parser.add_argument("--bucket", required=True, help="url of the run's own prefix")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--remaining-s", type=float, required=True, help="seconds until this machine must be gone")
    parser.add_argument("--work", type=Path, help="default: work/<stage>")
    parser.add_argument("--then", type=links_of, default=(), help="stage:attempt:seconds to leave to it, with commas")
    args = parser.parse_args(argv)
    sys.excepthook = end_with_traceback
    links = (Link(args.stage, args.attempt, 0.0), *args.then)
    work = args.work or Path("work", args.stage)
    end_process(supervise_all(args.bucket, links, began_s + args.remaining_s, work))


def supervise_all(
    url: str, links: Sequence[Link], until_s: float, work: Path, *, child_argv: Sequence[str] | None = None
) -> Exit:
    """Runs stage after stage until one is not done; says why the last one ended.

    `until_s`: on the clock of boottime_s, when this machine must be gone. `work`: of the first stage, the others'
    folders lie beside it.
    """
    code = Exit.DONE
    with _signals() as signals:  # a stop that comes between two stages is the next one's
        for index, link in enumerate(links):
            left_s = until_s - boottime_s() - kept_s(links[index + 1 :])
            place = work.with_name(link.stage) if index else work
            code = supervise(url, link.stage, link.attempt, left_s, place, child_argv=child_argv, signals=signals)
            if code is not Exit.DONE:
                break
    return code


def supervise(
    url: str,
    stage: str,
    attempt: int,
    remaining_s: float,
    work: Path,
    *,
    child_argv: Sequence[str] | None = None,
    signals: _Signals | None = None,
) -> Exit:
    """Runs the stage to its end and says why it ended. Owns the process: every child of it is ended.

    `child_argv` replaces the stage's process, for tests.
    """
    given_at_s, work = boottime_s(), work.absolute()
    with _signals() if signals is None else nullcontext(signals) as signals:
        try:
            _make(work)
            with _only_one(work, remaining_s):
                state, before, rebooted = _State.take(work, attempt, remaining_s - (boottime_s() - given_at_s))
                if before is not None:  # a supervisor that was killed together with its guard may have left something
                    end_marked(before.mark)
                bucket = open_bucket(url)
                task = within(max(1.0, left_s(state)), lambda: _read_task(bucket, stage, attempt))
                return _Supervision(bucket, task, work, state, signals, rebooted).run(child_argv)
        except Fenced as error:
            return _refuse(Exit.FENCED, str(error))
        except OutOfTime:
            return _refuse(Exit.DEADLINE, "the time paid for was used up before the bucket answered")
        except Occupied as error:  # that one goes on: the client is told nothing
            return _refuse(Exit.BAD_INPUT, f"{error.message}\n{error.hint}")
        except (TaskError, BucketError, OSError) as error:
            known = explain(error, work)
            if known is None:
                raise
            _tell(url, stage, attempt, known)
            return _refuse(Exit.BAD_INPUT, f"{known.message}\n{known.hint}".rstrip())


def _make(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_trouble(error, work) from error


def _tell(url: str, stage: str, attempt: int, error: TaskError) -> None:
    """Leaves ended.json for the client, if the bucket takes it: the stage never started."""
    code = Exit.BAD_INPUT
    ended = Ended(code.name.lower(), int(code), error.message, error.hint, attempt=attempt).to_json().encode()
    with suppress(BucketError, OutOfTime):
        within(5.0, lambda: open_bucket(url).put(f"{stage}/{ENDED_FILE}", ended))


def _refuse(code: Exit, text: str) -> Exit:
    say(f"error: {text}")
    return code


def _read_task(bucket: Bucket, stage: str, attempt: int) -> Task:
    try:
        raw, _ = bucket.get(f"{stage}/{TASK_FILE}")
    except NotFound as error:
        raise TaskError(f"{bucket.url} has no task for stage {stage}", hint="resume the run from the client") from error
    task = Task.from_json(raw.decode())
    if task.attempt > attempt:
        raise Fenced(f"attempt {task.attempt} owns stage {stage} now, this is attempt {attempt}")
    if task.attempt < attempt:
        text = f"task.json is of attempt {task.attempt}, this is attempt {attempt}"
        raise TaskError(text, hint="resume the run from the client")
    _check_code(task)
    return replace(task, bucket=bucket.url)  # as this machine reaches it


def _check_code(task: Task) -> None:
    """Raises TaskError when this code comes from another wheel than the run's own."""
    wheel = getattr(__spec__.loader, "archive", None)
    if task.code_sha256 is not None and wheel is not None and sha256_of(Path(wheel)) != task.code_sha256:
        raise TaskError(f"{wheel} is not the code this run was started with", hint="resume the run: it is sent again")


class _Supervision:
    """One stage, from its start to its last upload."""

    def __init__(
        self, bucket: Bucket, task: Task, work: Path, state: _State, signals: _Signals, rebooted: bool
    ) -> None:
        self._bucket, self._task, self._work, self._state, self._signals = bucket, task, work, state, signals
        self._rebooted = rebooted
        self._began_s = time.monotonic()
        self._log = _Log(work / LOG_FILE)
        self._courier = _Courier(bucket, task, work)
        self._meter, self._gpus = _Meter(), Watcher()
        self._oom_kills = _oom_kills()
        self._activity = Activity(Sight(time.monotonic()))

    def run(self, child_argv: Sequence[str] | None) -> Exit:
        if within(max(1.0, left_s(self._state)), self._is_done):
            return Exit.DONE
        decision = decide(self._view())
        if decision.stop is not None:
            return self._end(decision, rc=0, end_s=time.monotonic() + self._flush_s())
        within(max(1.0, left_s(self._state)), self._prepare)
        guard = self._start_guard()
        child = self._start(child_argv)
        self._courier.start()
        self._gpus.start()
        try:
            decision = self._watch(child, guard)
            end_s = time.monotonic() + self._flush_s()
            if decision.stop is not None:
                self._log.say(f"ending the stage: {decision.message}")
                self._let_save(child, guard, decision.stop)
            rc = child.poll()
        finally:
            end_tree(child.pid, self._state.mark, spare=guard)
            guard.kill()
            self._courier.stop()
        self._log.finish()
        self._see_progress()
        return self._end(decision, rc=-signal.SIGKILL if rc is None else rc, end_s=end_s)

    def _flush_s(self) -> float:
        return max(1.0, min(self._task.watch.flush_s, left_s(self._state)))

    def _is_done(self) -> bool:
        """Whether the result is committed already. Says so in ended.json, if the one who committed it could not."""
        if read_commit(self._bucket, self._task.stage) is None:
            return False
        stage = self._bucket.at(self._task.stage)
        if stage.head(ENDED_FILE) is None or Ended.from_json(stage.get(ENDED_FILE)[0].decode()).rc != Exit.DONE:
            stage.put(ENDED_FILE, self._ended(Decision(Exit.DONE), None).to_json().encode())
        return True

    def _prepare(self) -> None:
        """Makes work folder and bucket ready for this attempt."""
        stage = self._bucket.at(self._task.stage)
        stage.delete(ENDED_FILE)  # of an earlier attempt: it would be taken for ours
        for name in (LOG_FILE, METRICS_FILE):  # a new machine goes on with the rows of the one before
            if not (self._work / name).exists() and stage.head(name) is not None:
                stage.get_file(name, self._work / name)
        for name in (PROGRESS_FILE, FAILED_FILE, LIMIT_FILE):
            (self._work / name).unlink(missing_ok=True)
        write_text(self._work / TASK_FILE, self._task.to_json())
        stage.put(PROGRESS_FILE, Progress(attempt=self._task.attempt).to_json().encode())
        self._log.say(f"attempt {self._task.attempt} of stage {self._task.stage}, {left_s(self._state):.0f} s left")
        if SETUP in os.environ:
            setup = json.loads(os.environ[SETUP])
            why = f"; {setup['why']}" if setup["why"] else ""
            self._log.say(f"environment: {setup['environment']}, ready in {setup['seconds']:.0f} s{why}")

    def _start_guard(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", _GUARD, self._state.mark]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    def _start(self, child_argv: Sequence[str] | None) -> subprocess.Popen[bytes]:
        if sys.platform == "linux":  # what a child of the stage leaves behind becomes ours, and can be found
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        own = ["-m", "tasks.stage", "--task", str(self._work / TASK_FILE), "--work", str(self._work)]
        alone = self._task.kind == BOX  # what people start there takes the GPUs
        argv = child_argv or ([sys.executable, *own] if alone else stage_argv(own, os.environ))
        env = {**os.environ, MARK_ENV: self._state.mark, SUPERVISOR_ENV: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(
            argv, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        assert child.stdout is not None
        self._log.follow(child.stdout)
        threading.Thread(target=self._wake_at_end, args=(child,), daemon=True).start()
        return child

    def _wake_at_end(self, child: subprocess.Popen[bytes]) -> None:
        child.wait()
        self._signals.wake()

    def _watch(self, child: subprocess.Popen[bytes], guard: subprocess.Popen[bytes]) -> Decision:
        """Returns when the stage has ended by itself (stop None) or is to be ended."""
        while child.poll() is None:
            self._tick(guard)
            decision = decide(self._view())
            if decision.stop is not None:
                return decision
            self._signals.sleep(self._task.watch.tick_s)
        return Decision()

    def _let_save(self, child: subprocess.Popen[bytes], guard: subprocess.Popen[bytes], stop: Exit) -> None:
        stopped_s = self._activity.awake_s
        if stop is not Exit.FENCED:
            child.terminate()
        while child.poll() is None:
            self._tick(guard)
            left = left_s(self._state)
            if not may_save_on(self._task.watch, self._activity, stopped_s=stopped_s, stop=stop, remaining_s=left):
                return
            self._signals.sleep(min(self._task.watch.tick_s, 0.2))

    def _tick(self, guard: subprocess.Popen[bytes]) -> None:
        usage = self._meter.read(guard)
        sight = Sight(time.monotonic(), self._see_progress(), usage, self._courier.lease)
        self._activity = advance(self._activity, sight, self._task.watch)

    def _see_progress(self) -> Progress | None:
        progress = _read_progress(self._work)
        if progress is not None:
            seen = {"rss_gib": round(self._meter.peak_gib, 3), "cpu_cores": round(self._meter.cores, 2)}
            numbers = {**progress.numbers, **seen, **self._gpus.numbers}
            self._courier.progress = replace(progress, numbers=numbers, attempt=self._task.attempt)
        return progress

    def _view(self) -> View:
        return View(
            watch=self._task.watch, activity=self._activity,
            remaining_s=left_s(self._state), attempt=self._task.attempt, newest_attempt=self._courier.newest_attempt,
            rebooted=self._rebooted, terminated=self._signals.terminated,
        )

    def _end(self, decision: Decision, *, rc: int, end_s: float) -> Exit:
        """The last upload and ended.json, until `end_s` (monotonic). Says why the stage ended."""
        if decision.stop is Exit.FENCED:
            return _refuse(Exit.FENCED, decision.message)
        last, troubles = _LastUpload(self._bucket, self._task, self._work, self._courier), _Troubles()
        committed = None
        try:
            with troubles:
                committed = within((end_s - time.monotonic()) / 2, last.rows)
            if committed or decision.stop is None:
                decision = self._judge(rc, committed, troubles)
            if not committed:
                with troubles:
                    within(end_s - self._task.watch.flush_s / 10 - time.monotonic(), last.checkpoint)
            ended = self._ended(decision, last.checkpoint_name)
            with suppress(OSError):  # a full disk is no reason not to tell the bucket
                write_text(self._work / ENDED_FILE, ended.to_json())
            with troubles:
                within(end_s - time.monotonic(), lambda: last.ended(ended))
        except Fenced as error:
            return _refuse(Exit.FENCED, str(error))
        assert decision.stop is not None
        for text in troubles.texts:
            say(f"error: the last upload failed: {text}")
        if decision.stop is not Exit.DONE:
            say(f"{decision.stop.name.lower()}: {decision.message}")
        return decision.stop

    def _judge(self, rc: int, committed: bool | None, troubles: _Troubles) -> Decision:
        if committed is None and rc == 0:
            text = f"the bucket did not say whether it has the result: {troubles.texts[-1]}"
            return Decision(Exit.BAD_INPUT, text, "resume the run")
        return judge(
            rc, committed=bool(committed), failure=_read_failure(self._work), tail=list(self._log.tail),
            out_of_memory=None if self._oom_kills is None else _oom_kills() != self._oom_kills,
            peak_gib=self._meter.peak_gib, memory_gib=psutil.virtual_memory().total / GIB,
        )

    def _ended(self, decision: Decision, checkpoint: str | None) -> Ended:
        assert decision.stop is not None
        progress = self._activity.sight.progress
        gpu_gib = 0.0 if progress is None else progress.numbers.get("gpu_gib", 0.0)
        last = self._last_progress()
        return Ended(
            reason=decision.stop.name.lower(), rc=int(decision.stop), message=decision.message, hint=decision.hint,
            seconds=round(time.monotonic() - self._began_s, 3), peak_gib=gpu_gib or self._meter.peak_gib or None,
            last_checkpoint=checkpoint, attempt=self._task.attempt,
            work_s=None if last is None else round(last.work_s, 3),
            phases_s={} if last is None else {name: round(seconds, 3) for name, seconds in last.phases_s.items()},
            moved_bytes={} if last is None else last.moved_bytes,
        )

    def _last_progress(self) -> Progress | None:
        with suppress(OSError, ValueError, TaskError):
            return _read_progress(self._work)
        return None


class Occupied(TaskError):
    """Another supervisor holds the work folder."""


class OutOfTime(Exception):
    """The work was not done within its limit; it may go on in its thread."""


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it does within the limit. Raises OutOfTime; never waits longer."""
    if limit_s <= 0:
        raise OutOfTime
    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    if not wait([future], timeout=limit_s).done:
        raise OutOfTime
    return future.result()


class _Troubles:
    """Collects what went wrong with the bucket, so that the steps after it are still tried."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, OutOfTime):
            self.texts.append("the bucket did not answer in time; check the network and the store")
        elif isinstance(error, BucketError):
            self.texts.append(f"{error.message}; {error.hint}".rstrip("; "))
        else:
            return False
        return True


@dataclass(frozen=True)
class _State:
    """What survives the supervisor's own death on this machine. `at_s` is on the clock that counts sleep."""

    boot_id: str
    attempt: int
    at_s: float
    remaining_s: float
    mark: str

    @staticmethod
    def take(work: Path, attempt: int, remaining_s: float) -> tuple[_State, _State | None, bool]:
        """The state for now, the one found, and whether the machine was rebooted in the middle of this attempt.

        The same attempt never gains time; a new one was paid for anew.
        """
        now_s, boot = boottime_s(), boot_id()
        path = work / STATE_FILE
        before = _State(**json.loads(path.read_text())) if path.exists() else None
        same = before is not None and before.attempt == attempt
        rebooted = before is not None and same and before.boot_id != boot
        if before is not None and same and not rebooted:
            remaining_s = min(remaining_s, before.remaining_s - (now_s - before.at_s))
        state = _State(
            boot_id=before.boot_id if before is not None and rebooted else boot,
            attempt=attempt, at_s=now_s, remaining_s=remaining_s, mark=uuid.uuid4().hex,
        )
        write_text(path, json.dumps(asdict(state)))
        return state, before, rebooted


def left_s(state: _State) -> float:
    """Seconds until this machine must be gone."""
    return state.remaining_s - (boottime_s() - state.at_s)


def boottime_s() -> float:
    """Seconds on a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC_RAW)


def boot_id() -> str:
    """Another one after every boot of the machine."""
    if BOOT_ID.exists():
        return BOOT_ID.read_text().strip()
    done = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class _Signals:
    """SIGTERM, Ctrl-C and a lost terminal set `terminated`; they, and `wake`, end a sleep."""

    def __init__(self) -> None:
        self.terminated = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def on_signal(self, *_: object) -> None:
        self.terminated = True
        self.wake()

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._write, b"!")

    def sleep(self, seconds: float) -> None:
        if select.select([self._read], [], [], seconds)[0]:
            os.read(self._read, 4096)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signals.on_signal) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _only_one(work: Path, limit_s: float) -> Iterator[None]:
    """One supervisor a work folder: a new attempt waits until the one it replaces has left."""
    with (work / ".lock").open("a") as lock:
        until_s = time.monotonic() + min(limit_s, LOCK_WAIT_S)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    text = f"another supervisor works in {work}"
                    raise Occupied(text, hint="wait for it to end, then resume") from None
                time.sleep(0.1)
        yield


class _Log:
    """log.txt: what the stage prints, here, in the work folder, and its last lines in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tail: deque[str] = deque(maxlen=200)
        self._reader: threading.Thread | None = None

    def follow(self, pipe: IO[bytes]) -> None:
        def read() -> None:
            for line in iter(lambda: pipe.readline(1 << 16), b""):
                self.tail.append(line.decode(errors="replace"))
                self._add(line)

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def say(self, text: str) -> None:
        self._add(f"[supervisor] {text}\n".encode())

    def _add(self, line: bytes) -> None:
        with suppress(OSError), self._path.open("ab") as file:  # a full disk must not block the stage
            file.write(line)
        with suppress(OSError):  # whoever read our output is gone
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

    def finish(self) -> None:
        """All lines of a process that is gone are in."""
        if self._reader is not None:
            self._reader.join(timeout=2)


def say(text: str) -> None:
    with suppress(OSError):
        print(text, flush=True)


class _Rows:
    """Uploads log, metrics and TensorBoard events when they have changed."""

    def __init__(self, bucket: Bucket, task: Task, work: Path) -> None:
        self._stage, self._work = bucket.at(task.stage), work
        self._sent: dict[Path, tuple[int, int]] = {}

    def upload(self) -> None:
        for path in [self._work / LOG_FILE, self._work / METRICS_FILE, *sorted((self._work / EVENTS).glob("*"))]:
            try:
                status = path.stat()
                stamp = (status.st_size, status.st_mtime_ns)
                if self._sent.get(path) == stamp:
                    continue
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            if path.name == LOG_FILE and len(data) > LOG_TAIL_BYTES:
                data = b"[supervisor] the beginning is cut off\n" + data[-LOG_TAIL_BYTES:]
            self._stage.put(path.relative_to(self._work).as_posix(), data)
            self._sent[path] = stamp


class _Courier(threading.Thread):
    """Talks to the bucket while the stage runs. The supervisor's loop only reads what it last heard."""

    def __init__(self, bucket: Bucket, task: Task, work: Path) -> None:
        super().__init__(daemon=True)
        near = bucket.url.startswith("file:")
        self._bucket, self._task, self._work = bucket, task, work
        self.rows = _Rows(bucket, task, work)
        self.progress: Progress | None = None
        self.lease: str | None = None
        self.newest_attempt: int | None = None
        self._sent: Progress | None = None
        self._limit: Limit | None = None
        self._trouble = ""
        self._ended = threading.Event()
        self._jobs: list[tuple[float, Callable[[], None]]] = [
            (max(3 * task.watch.tick_s, 0.0 if near else 5.0), self._look_for_newer),
            (1.0 if near else 5.0, self.send_progress),
            (ROWS_EVERY_S, self.rows.upload),
        ]
        if task.gate:
            self._jobs.append((1.0 if near else 10.0, self._look_for_limit))
        if task.watch.client_lease_s is not None:
            self._jobs.insert(0, (min(5.0, task.watch.client_lease_s / 5), self._look_at_lease))

    def run(self) -> None:
        due_s = [0.0] * len(self._jobs)
        while not self._ended.wait(0.1):
            for index, (every_s, job) in enumerate(self._jobs):
                if time.monotonic() >= due_s[index] and not self._ended.is_set() and not self._is_replaced():
                    self._try(job)
                    due_s[index] = time.monotonic() + every_s

    def stop(self) -> None:
        self._ended.set()
        self.join(timeout=0.5)  # one that hangs in the store is left behind

    def send_progress(self) -> None:
        progress = self.progress
        if progress is not None and progress != self._sent:
            self._bucket.put(f"{self._task.stage}/{PROGRESS_FILE}", progress.to_json().encode())
            self._sent = progress

    def _try(self, job: Callable[[], None]) -> None:
        trouble = ""
        try:
            job()
        except BucketError as error:  # the stage goes on: its own uploads, the lease and the deadline bound the damage
            trouble = error.message
        except OSError as error:  # a full disk: whoever looks must go on looking
            trouble = f"this machine's disk: {error}"
        if trouble and trouble != self._trouble:
            say(f"[supervisor] {trouble}")
        self._trouble = trouble

    def _is_replaced(self) -> bool:
        return self.newest_attempt is not None and self.newest_attempt > self._task.attempt

    def _look_for_newer(self) -> None:
        self.newest_attempt = newest_attempt(self._bucket, self._task.stage)

    def _look_for_limit(self) -> None:
        """Hands the client's limit on to the stage. One that cannot be read is none: the stage goes on as planned."""
        with suppress(NotFound, ValueError, TypeError, TaskError):
            found = Limit.from_json(self._bucket.get(f"{self._task.stage}/{LIMIT_FILE}")[0].decode())
            if obeys(found, self._task, self._limit):
                write_text(self._work / LIMIT_FILE, found.to_json())
                self._limit = found

    def _look_at_lease(self) -> None:
        found = self._bucket.head(LEASE_FILE)
        self.lease = None if found is None else found.etag


class _LastUpload:
    """What the supervisor itself saves after the stage's process is gone."""

    def __init__(self, bucket: Bucket, task: Task, work: Path, courier: _Courier) -> None:
        self._bucket, self._task, self._work, self._courier = bucket, task, work, courier
        self.checkpoint_name: str | None = None

    def rows(self) -> bool:
        """Uploads what can be read by people; whether the stage is committed."""
        check_fence(self._bucket, self._task)
        self._courier.rows.upload()
        self._courier.send_progress()
        self._note_checkpoint()
        return read_commit(self._bucket, self._task.stage) is not None

    def checkpoint(self) -> None:
        """Commits the newest complete checkpoint of this machine, if the bucket has none as new."""
        local = local_checkpoints(self._work)
        committed = committed_checkpoints(self._bucket, self._task.stage)
        if local and local[-1] > max(committed, default=-1):
            folder = self._work / CHECKPOINTS / f"step-{local[-1]}"
            commit_checkpoint(self._bucket, self._task, folder, guard=lambda: check_fence(self._bucket, self._task))
        self._note_checkpoint()

    def ended(self, ended: Ended) -> None:
        check_fence(self._bucket, self._task)
        self._bucket.put(f"{self._task.stage}/{ENDED_FILE}", ended.to_json().encode())

    def _note_checkpoint(self) -> None:
        committed = committed_checkpoints(self._bucket, self._task.stage)
        self.checkpoint_name = f"step-{committed[-1]}" if committed else None


class _Meter:
    """Processor, disk and memory of everything the supervisor started."""

    def __init__(self) -> None:
        self.peak_gib = 0.0  # resident, shared pages counted in each process
        self.cores = 0.0  # that were busy, over the last seconds
        self._since = (time.monotonic(), 0.0)
        self._total = Usage()
        self._seen: dict[tuple[int, float], Usage] = {}

    def read(self, guard: subprocess.Popen[bytes]) -> Usage:
        seen: dict[tuple[int, float], Usage] = {}
        resident, total = 0, self._total
        for process in descendants(guard):
            try:
                with process.oneshot():
                    key, times = (process.pid, process.create_time()), process.cpu_times()
                    usage = Usage(times.user + times.system, _io_bytes(process))
                    resident += process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            before = self._seen.get(key, Usage())
            total = Usage(total.cpu_s + usage.cpu_s - before.cpu_s, total.io_bytes + usage.io_bytes - before.io_bytes)
            seen[key] = usage
        self._seen, self._total = seen, total
        self.peak_gib = max(self.peak_gib, resident / GIB)
        now, (since, before_s) = time.monotonic(), self._since
        if now - since >= CORES_OVER_S:
            self.cores, self._since = (total.cpu_s - before_s) / (now - since), (now, total.cpu_s)
        return total


def _io_bytes(process: psutil.Process) -> int:
    """Bytes passed to read and write, of files, pipes and most sockets; 0 where the system does not say (macOS)."""
    if not hasattr(process, "io_counters"):
        return 0
    counters = process.io_counters()
    return int(counters.read_chars + counters.write_chars)


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since boot; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def descendants(spare: subprocess.Popen[bytes] | None) -> list[psutil.Process]:
    """Every process below this one, but for `spare`."""
    return [p for p in psutil.Process().children(recursive=True) if spare is None or p.pid != spare.pid]


def end_tree(child_pid: int | None, mark: str, *, spare: subprocess.Popen[bytes] | None = None) -> None:
    """Ends by SIGKILL what the stage started: what descends from here, shares its session or carries its mark."""
    until_s = time.monotonic() + 5.0
    while time.monotonic() < until_s:
        alive = {p.pid: p for p in [*descendants(spare), *_marked(mark), *_in_session(child_pid)]}
        if not [p for p in alive.values() if _kill(p)]:
            return
        time.sleep(0.02)
    say("[supervisor] some processes of the stage cannot be ended: they wait for the system")


def end_marked(mark: str) -> None:
    """The same without a supervisor: called by the guard after its death."""
    end_tree(None, mark)


def _kill(process: psutil.Process) -> bool:
    """Whether it was alive."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
        return True
    except psutil.NoSuchProcess:
        return False


def _marked(mark: str) -> Iterator[psutil.Process]:
    me = os.getpid()
    for process in psutil.process_iter():
        try:
            if process.pid != me and process.environ().get(MARK_ENV) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue  # gone, or somebody else's


def _in_session(leader: int | None) -> Iterator[psutil.Process]:
    for process in psutil.process_iter() if leader is not None else ():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                yield process


def _read_progress(work: Path) -> Progress | None:
    try:
        return Progress.from_json((work / PROGRESS_FILE).read_text())
    except FileNotFoundError:
        return None


def _read_failure(work: Path) -> tuple[str, str] | None:
    try:
        raw = json.loads((work / FAILED_FILE).read_text())
    except FileNotFoundError:
        return None
    return raw["message"], raw["hint"]


if __name__ == "__main__":
    # As `python -m tasks.supervisor` this file is `__main__`: go on under its real name.
    from tasks.supervisor import main as real_main

    real_main()
