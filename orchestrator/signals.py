"""Who hears this process's signals, and for how long? Only the main thread may ask (Python's rule)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

TOLD_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, the terminal's window is closed


@contextmanager
def heard_by(handler: Callable[[], object], numbers: Iterable[int] = TOLD_TO_END) -> Iterator[None]:
    """Calls `handler` for each of these signals; afterwards they are heard by whom they were heard before."""
    before = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
