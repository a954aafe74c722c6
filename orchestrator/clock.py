"""What time is it, and how old is something, on a clock that steps, sleeps and reboots."""

from __future__ import annotations

import sys
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Mark:
    """A moment that can be aged later, even by another process or after the wall clock was set."""

    wall: datetime
    boot_id: str
    boot_s: float  # seconds since boot, counting sleep


class Clock(Protocol):
    def mark(self) -> Mark: ...

    def sleep(self, seconds: float) -> None: ...


def age_s(since: Mark, now: Mark) -> float:
    """Seconds between two marks, never below 0: by the boot clock within one boot, else by the wall."""
    if since.boot_id == now.boot_id:
        return max(0.0, now.boot_s - since.boot_s)
    return max(0.0, (now.wall - since.wall).total_seconds())


class SystemClock:
    """The machine's clock. Boot seconds count sleep: CLOCK_BOOTTIME, on macOS CLOCK_MONOTONIC_RAW."""

    def __init__(self) -> None:
        self._boot_id = _boot_id()

    def mark(self) -> Mark:
        return Mark(datetime.now(UTC), self._boot_id, _boot_s())

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _boot_s() -> float:
    clock = getattr(time, "CLOCK_MONOTONIC_RAW" if sys.platform == "darwin" else "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


def _boot_id() -> str:
    """The kernel's id of this boot; without one an id of this process: other processes then go by the wall clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        pass
    import psutil

    if sys.platform == "darwin":
        return f"boot-{int(psutil.boot_time()) // 60}"
    return str(uuid.uuid4())
