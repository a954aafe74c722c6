"""Who owns a run? One object in the bucket, written only conditionally, aged by the store's own clock.

The fencing number grows with every owner; a machine's task carries it, so that an old owner's orders are recognised.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache

from orchestrator.clock import Clock, age_s
from orchestrator.errors import NotOwner, UsageError
from tasks.bucket import Bucket, BucketError, NotFound, PreconditionFailed, put_if

LEASE_KEY = "lease.json"
LEASE_S = 20.0
RENEW_S = 4.0


@dataclass(frozen=True)
class Holder:
    """Who holds the lease: enough to see on the same host that its process is dead."""

    client: str
    host: str
    boot_id: str
    pid: int
    started: float  # process start time, so that a reused pid is not taken for the holder
    fence: int
    beat: int = 0
    released: bool = False
    token: str = ""  # of this one acquisition: tells a renewal of our own from everybody else's


class Lease:
    """Held from `acquire` to `release`; `renew_if_due` belongs into the runner's loop, not into a thread beside it."""

    def __init__(self, bucket: Bucket, holder: Holder, etag: str, clock: Clock) -> None:
        self._bucket, self._holder, self._etag, self._clock = bucket, holder, etag, clock
        self._renewed = clock.mark()

    @property
    def fence(self) -> int:
        return self._holder.fence

    @staticmethod
    def acquire(bucket: Bucket, client: str, clock: Clock) -> Lease:
        """Takes a free, expired or orphaned lease. Raises NotOwner while somebody else holds it."""
        for _ in range(3):
            try:
                raw, stat = bucket.get(LEASE_KEY)
            except NotFound:
                old, held = None, None
            else:
                old, held, now = _read(raw), stat.etag, bucket.now()
                if not is_free(old, stat.modified, now=now, clock=clock):
                    wait_s = LEASE_S - (now - stat.modified).total_seconds()
                    raise NotOwner(
                        f"this run belongs to another client (process {old.pid} on {old.host})",
                        hint=f"watch it with `kdcloud attach`; if that client is gone, wait {max(1, round(wait_s))} s",
                    )
            holder = _me(client, clock, fence=old.fence + 1 if old else 1)
            try:
                etag = put_if(bucket, LEASE_KEY, _dump(holder), if_match=held)
            except PreconditionFailed:
                continue
            return Lease(bucket, holder, etag, clock)
        raise NotOwner("another client took this run a moment ago", hint="watch it with `kdcloud attach`")

    def renew_if_due(self) -> None:
        """Raises NotOwner when somebody else took the run."""
        if age_s(self._renewed, self._clock.mark()) >= RENEW_S:
            self.confirm()

    def confirm(self) -> None:
        """Renews now: whoever returns from this held the run at that moment. Raises NotOwner, BucketError."""
        self._put(released=False)

    def release(self) -> None:
        """So that the next client need not wait. Somebody else's lease is left alone; a dead store lets it expire."""
        with suppress(NotOwner, BucketError):
            self._put(released=True)

    def _put(self, *, released: bool) -> None:
        for _ in range(3):
            holder = replace(self._holder, beat=self._holder.beat + 1, released=released)
            try:
                self._etag = put_if(self._bucket, LEASE_KEY, _dump(holder), if_match=self._etag)
            except (PreconditionFailed, NotFound):
                self._find_again()
                continue
            self._holder, self._renewed = holder, self._clock.mark()
            return
        raise _taken_over()

    def _find_again(self) -> None:
        """Takes up a renewal of our own whose answer never arrived. Raises NotOwner when it is not ours."""
        try:
            raw, stat = self._bucket.get(LEASE_KEY)
        except NotFound:
            raise _taken_over() from None
        there = _read(raw)
        if there.token != self._holder.token or there.released:
            raise _taken_over()
        self._holder, self._etag = replace(self._holder, beat=there.beat), stat.etag


class NoLease(Lease):
    """For ending machines while the bucket is away: owns nothing, so that nothing can be made with it."""

    def __init__(self) -> None:
        """Nothing is asked of any store."""

    @property
    def fence(self) -> int:
        return 0

    def renew_if_due(self) -> None: ...

    def confirm(self) -> None:
        raise NotOwner("the run's bucket does not answer", hint="nothing can be started without it")

    def release(self) -> None: ...


def _taken_over() -> NotOwner:
    return NotOwner(
        "another client took this run over", hint="this one stops; the run goes on there (`kdcloud attach`)"
    )


def read_holder(bucket: Bucket) -> tuple[Holder, datetime] | None:
    """The holder and when it last renewed; None when nobody ever held the run."""
    try:
        raw, stat = bucket.get(LEASE_KEY)
    except NotFound:
        return None
    return _read(raw), stat.modified


def is_free(holder: Holder, renewed_at: datetime, *, now: datetime, clock: Clock) -> bool:
    """Whether the lease may be taken: given back, expired by the store's clock, or its process on this host is dead."""
    return holder.released or (now - renewed_at).total_seconds() >= LEASE_S or _dead(holder, clock)


@cache
def _started(pid: int) -> float:
    import psutil

    return psutil.Process(pid).create_time()


def _me(client: str, clock: Clock, *, fence: int) -> Holder:
    return Holder(
        client=client,
        host=socket.gethostname(),
        boot_id=clock.mark().boot_id,
        pid=os.getpid(),
        started=_started(os.getpid()),
        fence=fence,
        token=uuid.uuid4().hex,
    )


def _dead(holder: Holder, clock: Clock) -> bool:
    """Whether the holder was a process of this host and boot that no longer runs (a zombie does not run)."""
    import psutil

    if holder.host != socket.gethostname() or holder.boot_id != clock.mark().boot_id:
        return False
    try:
        process = psutil.Process(holder.pid)
        return abs(process.create_time() - holder.started) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _read(raw: bytes) -> Holder:
    try:
        return Holder(**json.loads(raw))
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{LEASE_KEY} of this run cannot be read: {error}", hint="another version of kdcloud wrote it"
        ) from error


def _dump(holder: Holder) -> bytes:
    return json.dumps(vars(holder)).encode()
