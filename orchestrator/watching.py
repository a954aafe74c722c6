"""Follows a run that somebody else drives, from ledger and bucket alone: takes no lease, changes nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from orchestrator.clock import Clock, Mark, SystemClock, age_s
from orchestrator.errors import UsageError
from orchestrator.guarded import CALL_LIMIT_S
from orchestrator.ledger import Ledger, Run
from orchestrator.mirror import Follower
from orchestrator.news import news_of
from orchestrator.plan import Plan
from orchestrator.runner import Outcome, Snapshot, snapshot_of
from orchestrator.session import is_driven, is_left, plan_of
from orchestrator.signals import heard_by
from tasks.bucket import Bucket, BucketError, open_bucket

OLD_NEWS = 8  # what happened before is told that far back
DRIVEN_EVERY_S = 2.0
LEFT = "nobody drives it: its client is gone"
Tell = Callable[[str, str | None, str, datetime | None], None]


def watch(run_id: str, *, ledger: Ledger, say: Callable[[str], None], until_left: bool) -> Outcome | None:
    """Shows the run until it has ended; None after Ctrl-C, when what goes on was said. Raises UsageError.

    `until_left`: where nobody drives it any more that is an error; else it may be resumed, and is looked at on.
    """
    from orchestrator.live import view_for

    made = plan_of(ledger.run(run_id))
    end = f"`kdcloud down {run_id}` ends it"
    goes_on, resume = f"Ctrl-C leaves it running; {end}", f"{LEFT}; `kdcloud run --resume {run_id}` goes on, {end}"
    view = view_for(made, ledger.run(run_id).bucket, note=goes_on)

    def left(gone: bool) -> None:
        if gone and view.state == "running":
            view.say("warn", None, resume)
        view.state, view.note = ("interrupted", f"{LEFT}; Ctrl-C leaves it so") if gone else ("running", goes_on)

    try:
        with heard() as check, view:

            def turn(snapshot: Snapshot) -> None:
                check()
                view.update(snapshot)

            return watch_run(
                run_id, ledger=ledger, plan=made, on_turn=turn, tell=view.say, left=None if until_left else left
            )
    except KeyboardInterrupt:
        alone = view.state == "interrupted"
        say(resume if alone else f"{run_id} goes on without this window; `kdcloud attach {run_id}` looks again, {end}")
        return None


@contextmanager
def heard() -> Iterator[Callable[[], None]]:
    """Ctrl-C interrupts, and if that is lost (Python drops it inside a finalizer) the next call of the result does."""
    pressed = False

    def press() -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield check
        return
    with heard_by(press, [signal.SIGINT]):
        yield check


def watch_run(
    run_id: str,
    *,
    ledger: Ledger,
    plan: Plan,
    on_turn: Callable[[Snapshot], None],
    tell: Tell = lambda kind, stage, text, at: None,
    left: Callable[[bool], None] | None = None,
    clock: Clock | None = None,
    turn_s: float = 0.5,
) -> Outcome:
    """How the run ended. Where nobody drives it any more: raises UsageError, or with `left` says so and goes on."""
    clock = clock or SystemClock()
    bucket = open_bucket(ledger.run(run_id).bucket)
    news, paper = Follower(ledger, bucket, run_id, clock), _Paper(plan, tell)
    driver = Driver(bucket, clock)
    while True:
        news.look()
        run = ledger.run(run_id)
        paper.read(run)
        outcome = outcome_of(run)
        if outcome is not None:
            return outcome
        if left is not None:
            left(driver.is_gone())
        elif driver.is_gone():
            raise UsageError(
                f"nobody drives {run_id} any more: its client is gone",
                hint=f"go on with `kdcloud run --resume {run_id}`",
            )
        on_turn(snapshot_of(run, plan, bucket, clock))
        clock.sleep(turn_s)


def outcome_of(run: Run) -> Outcome | None:
    """How it ended; None while it goes on, or was resumed since."""
    ends = [e for e in run.entries if e.kind in ("ended", "resumed")]
    if not ends or ends[-1].kind != "ended":
        return None
    return Outcome(**{k: str(ends[-1].data[k]) for k in ("state", "message", "hint")}, stage=ends[-1].stage)


class Driver:
    """Whether a living client drives the run.

    One that waits for its provider may be late with its lease: it is given the time such a call may take. A bucket
    that does not answer says nothing.
    """

    def __init__(self, bucket: Bucket, clock: Clock) -> None:
        self._bucket, self._clock = bucket, clock
        self._silent: Mark | None = None
        self._looked: Mark | None = None
        self._gone = False

    def is_gone(self) -> bool:
        now = self._clock.mark()
        if self._looked is None or age_s(self._looked, now) >= DRIVEN_EVERY_S:
            self._looked = now
            try:
                self._gone = self._look(now)
            except BucketError:
                return self._gone
        return self._gone

    def _look(self, now: Mark) -> bool:
        if is_driven(self._bucket, self._clock):
            self._silent = None
            return False
        self._silent = self._silent or now
        return is_left(self._bucket, self._clock) or age_s(self._silent, now) > CALL_LIMIT_S


class _Paper:
    """Tells the ledger's new entries, each once."""

    def __init__(self, plan: Plan, tell: Tell) -> None:
        self._plan, self._tell = plan, tell
        self._read: int | None = None

    def read(self, run: Run) -> None:
        fresh = run.entries if self._read is None else [e for e in run.entries if e.seq > self._read]
        told = [(entry, news) for entry in fresh if (news := news_of(entry, self._plan)) is not None]
        for entry, (kind, text) in told[-OLD_NEWS:] if self._read is None else told:
            self._tell(kind, entry.stage, text, entry.at)
        self._read = run.entries[-1].seq if run.entries else 0
