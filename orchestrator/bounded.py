"""A bucket that cannot hang a client: every short call has a time limit, and after one that ran out a moment's rest.

A client that waits for a store ends no machine. What is given up may still arrive later: conditional writes and leases
are made for that. Whole files go through without a limit: they may take long, and nothing is running then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from orchestrator.clock import Clock, Mark, age_s
from tasks.bucket import Bucket, BucketError, Moved, Stat

CALL_LIMIT_S = 15.0
REST_S = 10.0  # after a call that ran out of time, all others fail at once for that long

T = TypeVar("T")


@dataclass
class _Sick:
    """Since when the store is left alone; shared by every prefix of it."""

    since: Mark | None = None


@dataclass
class Bounded:
    """A Bucket over another one. Raises BucketError for what takes longer than `limit_s`."""

    inner: Bucket
    clock: Clock
    limit_s: float = CALL_LIMIT_S
    _sick: _Sick = field(default_factory=_Sick)

    @property
    def url(self) -> str:
        return self.inner.url

    def put(self, key: str, data: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        return self._call(lambda: self.inner.put(key, data, if_none_match=if_none_match, if_match=if_match))

    def get(self, key: str) -> tuple[bytes, Stat]:
        return self._call(lambda: self.inner.get(key))

    def head(self, key: str) -> Stat | None:
        return self._call(lambda: self.inner.head(key))

    def list(self, prefix: str = "") -> Iterator[Stat]:
        return iter(self._call(lambda: list(self.inner.list(prefix))))

    def put_file(self, path: Path, key: str, moved: Moved | None = None) -> str:
        return self.inner.put_file(path, key, moved)

    def get_file(self, key: str, path: Path, moved: Moved | None = None) -> None:
        self.inner.get_file(key, path, moved)

    def delete(self, key: str) -> None:
        self._call(lambda: self.inner.delete(key))

    def now(self) -> datetime:
        return self._call(self.inner.now)

    def at(self, prefix: str) -> Bucket:
        return Bounded(self.inner.at(prefix), self.clock, self.limit_s, self._sick)

    def _call(self, call: Callable[[], T]) -> T:
        if self._sick.since is not None and age_s(self._sick.since, self.clock.mark()) < REST_S:
            raise self._no_answer()
        result: list[T] = []
        error: list[Exception] = []

        def work() -> None:
            try:
                result.append(call())
            except Exception as caught:  # noqa: BLE001 - raised again by whoever waits
                error.append(caught)

        thread = threading.Thread(target=work, name="bucket", daemon=True)
        thread.start()
        thread.join(self.limit_s)
        self._sick.since = None if result or error else self.clock.mark()
        if error:
            raise error[0]
        if not result:
            raise self._no_answer()
        return result[0]

    def _no_answer(self) -> BucketError:
        return BucketError(
            f"{self.url} did not answer within {self.limit_s:.0f} s", hint="check the network and the store"
        )
