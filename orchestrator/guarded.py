"""A provider that cannot hang or surprise the runner: every call has a time limit, every surprise is a ProvisionError.

What is behind the seam is other people's code and other people's network. The runner must go on deciding whatever it
does, since a client that waits for ever ends no machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TypeVar

from orchestrator.provision import (
    Job,
    Need,
    Observation,
    Offer,
    Order,
    Provisioner,
    ProvisionError,
    Status,
)

CALL_LIMIT_S = 90.0
LOOK_UP_S = 2.0  # the caller looks up from its waiting that often
T = TypeVar("T")


class Guarded:
    """Wraps a Provisioner. `limit_s` None calls directly: for providers that live in memory.

    `waiting` is called by the one who waits, every few seconds: a lease must not run out over a slow provider.

    A call that is given up may still happen later: a machine it makes is found by name at the end of the run.
    """

    def __init__(
        self,
        provider: Provisioner,
        now: Callable[[], datetime],
        *,
        limit_s: float | None = CALL_LIMIT_S,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._provider, self._now, self._limit_s, self._waiting = provider, now, limit_s, waiting

    def offers(self, need: Need) -> list[Offer]:
        return self._call("offers", lambda: self._provider.offers(need))

    def launch(self, order: Order) -> None:
        self._call("launch", lambda: self._provider.launch(order))

    def observe(self, name: str) -> Observation:
        """No answer, or none that can be used, is UNKNOWN."""
        try:
            return self._call("observe", lambda: self._provider.observe(name))
        except ProvisionError:
            return Observation(name, Status.UNKNOWN, None, None, Job(), self._now())

    def run(self, name: str, job_id: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._call("run", lambda: self._provider.run(name, job_id, argv, env))

    def logs(self, name: str, job_id: str) -> Iterator[str]:
        return iter(self._call("logs", lambda: list(self._provider.logs(name, job_id))))

    def terminate(self, name: str) -> None:
        self._call("terminate", lambda: self._provider.terminate(name))

    def ours(self) -> list[Observation]:
        return self._call("ours", self._provider.ours)

    def _call(self, what: str, function: Callable[[], T]) -> T:
        if self._limit_s is None:
            return _translated(what, function)
        result: list[T] = []
        error: list[ProvisionError] = []

        def work() -> None:
            try:
                result.append(_translated(what, function))
            except ProvisionError as caught:
                error.append(caught)

        thread = threading.Thread(target=work, name=f"provider-{what}", daemon=True)
        thread.start()
        until_s = time.monotonic() + self._limit_s
        while thread.is_alive() and (left_s := until_s - time.monotonic()) > 0:
            thread.join(min(left_s, LOOK_UP_S))
            if thread.is_alive():
                self._waiting()
        if error:
            raise error[0]
        if not result:
            raise ProvisionError(f"the provider did not answer to {what} within {self._limit_s:.0f} s")
        return result[0]


def _translated(what: str, function: Callable[[], T]) -> T:
    try:
        return function()
    except ProvisionError:
        raise
    except Exception as error:
        raise ProvisionError(f"the provider failed in {what}: {type(error).__name__}: {error}") from error
