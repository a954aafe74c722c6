"""Does somebody work on this box? What kernels, terminals and GPUs do counts; open servers and browsers do not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil

from tasks.contract import Watch
from tasks.gpu import Watcher
from tasks.watch import Activity, Sight, Usage, advance

BUSY_GPU_SHARE = 0.05
BUSY_BYTES_PER_S = 256.0 * 1024  # `top` in a forgotten terminal reads 7 kB a second, a download is above this
DEADLINE_NOTICES_S = (600.0, 120.0)
IDLE_NOTICE_S = 300.0  # before the idle rule, at most half of it


def is_sign(before: Activity, after: Activity, gpu_use: float) -> bool:
    """Whether work was seen between two looks: a window of processor or bytes that ended, or a GPU that computes.

    A kernel that waits for its next cell answers heartbeats, far below what `advance` takes for work.
    """
    return after.busy_s > before.busy_s or gpu_use >= BUSY_GPU_SHARE


class Gauge:
    """Looks at the processes that count. `signs` grows with work, `quiet_s` without."""

    def __init__(
        self, watch: Watch, *, gpu_use: Callable[[], float], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._watch, self._gpu_use, self._now, self._meter = watch, gpu_use, now, Meter()
        self._activity = Activity(Sight(now()))
        self._worked_s = 0.0
        self.signs = 0

    @property
    def quiet_s(self) -> float:
        return self._activity.awake_s - self._worked_s

    def look(self, processes: Iterable[psutil.Process]) -> None:
        before, usage = self._activity, self._meter.read(processes)
        self._activity = advance(
            before, Sight(self._now(), usage=usage), self._watch, busy_bytes_per_s=BUSY_BYTES_PER_S
        )
        if is_sign(before, self._activity, self._gpu_use()):
            self.signs += 1
            self._worked_s = self._activity.awake_s


def watched_gpus() -> Callable[[], float]:
    """How busy the GPUs are, 0 to 1, as a thread last saw them."""
    watcher = Watcher()
    watcher.start()
    return lambda: watcher.numbers.get("gpu_use", 0.0)


class Meter:
    """Processor seconds and bytes of processes that come and go, as sums that never fall."""

    def __init__(self) -> None:
        self._total = Usage()
        self._seen: dict[tuple[int, float], Usage] = {}

    def read(self, processes: Iterable[psutil.Process]) -> Usage:
        """What a new process used before it was first seen counts: it did that just now."""
        seen: dict[tuple[int, float], Usage] = {}
        cpu_s, io_bytes = self._total.cpu_s, self._total.io_bytes
        for process in processes:
            try:
                with process.oneshot():
                    key, usage = (process.pid, process.create_time()), usage_of(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            before = self._seen.get(key, Usage())
            cpu_s += max(0.0, usage.cpu_s - before.cpu_s)
            io_bytes += max(0, usage.io_bytes - before.io_bytes)
            seen[key] = usage
        self._seen, self._total = seen, Usage(cpu_s, io_bytes)
        return self._total


def usage_of(process: psutil.Process) -> Usage:
    """Of children that it has waited for as well: a shell's commands are often gone before anybody looks."""
    times = process.cpu_times()
    cpu_s = times.user + times.system + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    if not hasattr(process, "io_counters"):  # macOS
        return Usage(cpu_s, 0)
    counters = process.io_counters()
    return Usage(cpu_s, int(counters.read_chars + counters.write_chars))


class Notices:
    """What a person who works here must know, each thing once: the end comes near."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._told: set[float] = set()
        self._told_idle = False

    def of(self, *, left_s: float, quiet_s: float) -> str:
        passed = [limit for limit in DEADLINE_NOTICES_S if left_s <= limit]
        if passed and min(passed) not in self._told:
            self._told.update(passed)
            return f"this machine ends in {minutes(left_s)}; files below work/ are saved"
        before_s = min(IDLE_NOTICE_S, self._idle_s / 2)
        due = quiet_s >= self._idle_s - before_s
        if due and not self._told_idle:
            self._told_idle = True
            return f"nothing has worked here for {minutes(quiet_s)}: this machine ends in {minutes(before_s)}"
        self._told_idle = due
        return ""


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0.0, seconds):.0f} s"
