"""Looks for forgotten machines again and again, until it is told to stop: nothing that goes wrong ends it."""

from __future__ import annotations

import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from orchestrator.clock import Clock
from orchestrator.config import Config, Home
from orchestrator.errors import KdcloudError
from orchestrator.ledger import Ledger
from orchestrator.reap import Reaped, reap
from orchestrator.session import opened_ledger, reapable_providers
from orchestrator.signals import heard_by

SCHEMA = 1
NOTHING = Reaped((), (), (), (), {}, {})


@dataclass(frozen=True)
class Wish:
    """What the command line asked for."""

    do_end: bool
    orphans: bool = False
    older_than: timedelta | None = None
    infra: tuple[str, ...] = ()  # looked at even if no run here was there


def look(
    wish: Wish, home: Home, config: Config, clock: Clock, *, say: Callable[[str], None], stop: Callable[[], bool]
) -> Reaped:
    """One look everywhere. A ledger that cannot be used is said; what is certain without it is done all the same."""
    with ExitStack() as stack:
        ledger: Ledger | None = None
        trouble: tuple[str, ...] = ()
        try:
            ledger = stack.enter_context(opened_ledger(home))
            for run in ledger.runs():
                ledger.run(run)
        except (KdcloudError, sqlite3.Error, ValueError, KeyError, OSError) as error:
            ledger, trouble = None, (f"the ledger: {error}",)
        result = reap(
            ledger=ledger,
            providers=reapable_providers(home, ledger, infra=wish.infra),
            owner=config.owner,
            clock=clock,
            do_end=wish.do_end,
            orphans=wish.orphans,
            older_than=wish.older_than,
            say=say,
            stop=stop,
            buckets=[config.bucket],
        )
    return replace(result, unanswered=(*trouble, *result.unanswered))


def watch(
    one_look: Callable[[], Reaped],
    *,
    every_s: float,
    wait: Callable[[float], bool],
    on_round: Callable[[Reaped], None],
) -> Reaped:
    """Looks, tells, waits, until `wait(seconds)` says that it was told to stop. Returns the last look."""
    while True:
        try:
            result = one_look()
        except Exception as error:  # noqa: BLE001 - a reaper that dies of somebody else's error ends nothing any more
            result = replace(NOTHING, unanswered=(f"this look failed: {type(error).__name__}: {error}",))
        on_round(result)
        if wait(every_s):
            return result


@dataclass
class News:
    """Lines that were not said before. What was said comes again only after a look that answered without it."""

    _said: set[str] = field(default_factory=set)

    def of(self, result: Reaped) -> list[str]:
        lines = lines_of(result)
        fresh = [line for line in lines if line not in self._said]
        self._said = {*lines, *(self._said if result.unanswered else ())}
        return fresh


def lines_of(result: Reaped) -> list[str]:
    """What a person reads of one look: a line for each machine, and for each place that did not answer."""
    found = [f"{f.action:<8} {f.name}  {f.why}" for f in result.findings]
    return [*found, *(f"no answer from {text}" for text in result.unanswered)]


def document(result: Reaped, at: datetime) -> dict[str, Any]:
    """The document of `kdcloud reap --json`; one line a look with --watch. Unknown is null."""
    rows = [
        {
            **asdict(finding),
            "created_at": finding.created_at and finding.created_at.isoformat(),
            "run": result.runs.get(finding.name),
            "providers": list(result.where.get(finding.name, ())),
        }
        for finding in result.findings
    ]
    return {
        "schema": SCHEMA,
        "at": at.isoformat(),
        "machines": rows,
        "ended": list(result.ended),
        "left": list(result.left),
        "asked": list(result.asked),
        "unanswered": list(result.unanswered),
        "saved_micros_per_hour": result.saved_micros_per_hour,
        "ended_without_price": list(result.unpriced),
    }


@contextmanager
def until_told() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending this process in the middle of a teardown."""
    told = threading.Event()
    with heard_by(told.set, [signal.SIGTERM, signal.SIGINT]):
        yield told
