"""Watching a run that another client drives: every piece of news once, and an end when there is one."""

from __future__ import annotations

import signal

import pytest

from orchestrator import watching
from orchestrator.errors import UsageError
from orchestrator.guarded import CALL_LIMIT_S
from orchestrator.lease import Lease
from orchestrator.news import news_of
from orchestrator.runner import Outcome
from orchestrator.watching import OLD_NEWS, outcome_of, watch_run
from tasks.bucket import BucketError
from tests.test_scene import PLAN, World


class Watched(World):
    """A run that a script plays, one step a turn of whoever watches."""

    def __init__(self, *steps) -> None:
        super().__init__()
        self.lease = Lease.acquire(self.bucket, "owner1", self.clock)
        self.steps, self.told, self.seen, self.gone_words = list(steps), [], [], []
        self.driven = True
        real = self.clock.sleep

        def sleep(seconds: float) -> None:
            real(5.0)
            if self.driven:
                self.lease.renew_if_due()
            if not self.steps:
                raise KeyboardInterrupt
            self.steps.pop(0)(self)

        self.clock.sleep = sleep

    def watch(self, monkeypatch, **more) -> Outcome:
        monkeypatch.setattr(watching, "open_bucket", lambda url: self.bucket)
        return watch_run(
            "r-abc123", ledger=self.ledger, plan=PLAN, on_turn=self.seen.append, clock=self.clock,
            tell=lambda kind, stage, text, at: self.told.append((kind, stage, text)), **more,
        )  # fmt: skip

    def end(self, state: str = "done", message: str = "") -> None:
        data = {"state": state, "message": message, "hint": "h"}
        self.ledger.note("r-abc123", "ended", self.clock.mark().wall, stage="export", data=data)


def nothing(world: Watched) -> None: ...


def test_what_happens_is_told_once_and_in_order(monkeypatch):
    world = Watched(
        lambda w: w.up(w.order("label")),
        nothing,
        lambda w: w.gone("kd-label-1", 80_000, 80.0),
        lambda w: w.done("label"),
        lambda w: w.end("stopped", "every machine is gone"),
    )
    outcome = world.watch(monkeypatch)
    assert outcome == Outcome("stopped", "every machine is gone", "h", "export")
    assert [text for _, _, text in world.told] == [
        "on fake 1xRTX3090",
        "its machine is gone; ¥0.57",  # 80,000 micro-USD at 7.1
        "done",
        "stopped: every machine is gone",
    ]
    assert len(world.seen) == 5


def test_of_what_happened_before_only_the_last_is_told(monkeypatch):
    world = Watched(lambda w: w.end())
    for attempt in range(1, 9):
        world.gone(world.order("label", attempt=attempt, reserved=200_000), 10, 1.0)
    world.watch(monkeypatch)
    assert len(world.told) == OLD_NEWS + 1 and world.told[-1][2] == "done"


def test_a_run_that_was_resumed_has_not_ended():
    world = World()
    world.ledger.note("r-abc123", "ended", world.clock.mark().wall, data={"state": "cap", "message": "", "hint": ""})
    assert outcome_of(world.ledger.run("r-abc123")) == Outcome("cap")
    world.ledger.note("r-abc123", "resumed", world.clock.mark().wall)
    assert outcome_of(world.ledger.run("r-abc123")) is None


def leave(world: Watched) -> None:
    world.driven = False
    world.lease.release()


def test_attach_ends_when_nobody_drives_the_run(monkeypatch):
    with pytest.raises(UsageError, match="nobody drives") as error:
        Watched(leave, nothing, nothing).watch(monkeypatch)
    assert "kdcloud run --resume r-abc123" in error.value.hint


def test_a_watch_goes_on_and_sees_it_resumed(monkeypatch):
    def resume(world: Watched) -> None:
        world.driven, world.lease = True, Lease.acquire(world.bucket, "owner1", world.clock)

    words: list[bool] = []
    world = Watched(nothing, leave, nothing, resume, nothing, lambda w: w.end())
    assert world.watch(monkeypatch, left=words.append).state == "done"
    assert words[0] is False and True in words and words[-1] is False


def test_a_client_that_is_late_is_given_the_time_a_provider_may_take(monkeypatch):
    def late(world: Watched) -> None:
        world.driven = False

    words: list[bool] = []
    world = Watched(late, *[nothing] * 60)
    with pytest.raises(KeyboardInterrupt):
        world.watch(monkeypatch, left=words.append)
    assert words[-1] is True
    assert 5.0 * words.index(True) > CALL_LIMIT_S


def test_a_bucket_that_does_not_answer_says_nothing_of_the_client(monkeypatch):
    def away(*args: object) -> bool:
        raise BucketError("the store is away")

    words: list[bool] = []
    world = Watched(lambda w: monkeypatch.setattr(watching, "is_driven", away), nothing, lambda w: w.end())
    assert world.watch(monkeypatch, left=words.append).state == "done"
    assert not any(words)


def test_a_ctrl_c_that_python_dropped_is_heard_at_the_next_turn():
    usual = signal.getsignal(signal.SIGINT)
    with watching.heard() as check:
        check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is usual


def test_watching_changes_neither_ledger_nor_lease(monkeypatch):
    world = Watched(nothing, nothing)
    before = (len(world.ledger.run("r-abc123").entries), {stat.key for stat in world.bucket.list()})
    with pytest.raises(KeyboardInterrupt):
        world.watch(monkeypatch)
    assert (len(world.ledger.run("r-abc123").entries), {stat.key for stat in world.bucket.list()}) == before


def test_the_gate_and_whoever_stops_a_run_are_news_and_bookkeeping_is_not():
    world = World()
    name = world.order("label")
    at = world.clock.mark().wall

    def note(kind: str, machine: str | None = name, **data) -> tuple[str, str] | None:
        world.ledger.note("r-abc123", kind, at, stage="label", machine=machine, data=data)
        return news_of(world.ledger.run("r-abc123").entries[-1], PLAN)

    assert note("gate", forecast={"hours": 0.5, "cost_micros": 1_000_000}) == (
        "gate", "at its speed it takes 30 min, ¥7.10",
    )  # fmt: skip
    assert note("limit", limit=12.0) == ("warn", "the money would not last: by on_shortfall it ends at 12")
    assert note("short", short={"message": "too slow", "bound": "cap"}) == ("warn", "too slow")
    assert note("stop_requested", None) == ("stop", "the run was asked to stop")
    assert note("launched", launched=True) is None and note("took", None, parts=[]) is None
    world.up(name)
    world.gone(name, 10, 1.0)
    stops = [e for e in world.ledger.run("r-abc123").entries if e.kind == "stop"]
    assert news_of(stops[0], PLAN) is None  # its work is done: that it is gone says as much
