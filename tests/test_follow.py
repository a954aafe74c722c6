"""Logs that are followed: each line once, in order, whatever happens to the file and from whoever has it first."""

from __future__ import annotations

import random

import pytest

from orchestrator.errors import UsageError
from orchestrator.follow import (
    CUT,
    Tape,
    _Machine,
    follow_logs,
    joined,
    lines_of,
    read_log,
    show_logs,
    split_at_attempt,
)
from orchestrator.lease import Lease
from orchestrator.provision import ProvisionError
from orchestrator.testing import VirtualClock
from tests.test_scene import PLAN, World

START_LINE = "[supervisor] attempt {} of stage label, 300 s left"


def numbered(count: int) -> list[str]:
    return [f"line {i}" for i in range(count)]


# --- which lines are new


def test_each_line_of_a_growing_log_is_told_once():
    tape, told = Tape(), []
    for count in (0, 3, 3, 10, 40):
        told += tape.fresh(numbered(count))
    assert told == numbered(40)


def test_a_log_that_is_shorter_for_a_while_tells_nothing_twice():
    tape = Tape()
    assert tape.fresh(numbered(10)) == numbered(10)
    assert tape.fresh(numbered(4)) == []  # the bucket is behind the machine
    assert tape.fresh(numbered(12)) == ["line 10", "line 11"]


def test_a_log_that_lost_its_beginning_goes_on_where_it_was():
    tape = Tape()
    tape.fresh(numbered(100))
    assert tape.fresh([CUT, *numbered(130)[60:]]) == numbered(130)[100:]
    assert tape.fresh([CUT, *numbered(140)[70:]]) == numbered(140)[130:]


def test_alike_lines_are_not_taken_for_each_other():
    tape = Tape()
    before = ["loss", "step"] * 40
    tape.fresh(before)
    assert tape.fresh([CUT, *before[20:], "end"]) == ["end"]


def test_a_line_that_comes_again_is_not_taken_for_the_last_one_that_was_told():
    tape = Tape()
    tape.fresh([*numbered(30), "a", "step"])
    assert tape.fresh([CUT, *numbered(30)[20:], "a", "step", "b", "step", "c"]) == ["b", "step", "c"]


def test_a_line_of_which_half_was_told_is_told_again_whole_and_nothing_else():
    tape = Tape()
    tape.fresh([*numbered(5), "load"])
    assert tape.fresh([*numbered(5), "loading", "next"]) == ["loading", "next"]


def test_a_log_with_nothing_known_in_it_is_told_whole():
    tape = Tape()
    tape.fresh(numbered(5))
    assert tape.fresh(["other", "lines"]) == ["other", "lines"]


def test_whatever_is_cut_and_repeated_every_line_comes_once_and_in_order():
    for seed in range(200):
        rng = random.Random(seed)
        whole = [f"{i} {rng.choice('ab')}" for i in range(rng.randrange(60, 200))]
        tape, told, end = Tape(), [], 0
        while end < len(whole):
            end = min(len(whole), end + rng.randrange(0, 40))
            start = rng.randrange(0, max(1, len(told) - 20)) if rng.random() < 0.5 else 0
            told += tape.fresh([CUT, *whole[start:end]] if start else whole[:end])
        assert told == whole, seed


def test_lines_end_in_every_way_and_a_bar_that_redraws_itself_is_a_line_each_time():
    assert lines_of(b"a\nb\r\nc\rd\n") == ["a", "b", "c", "d"]
    assert lines_of(b"a\nhalf") == ["a", "half"]
    assert lines_of(b"") == [] and lines_of(b"\xff\n") == ["�"]


def test_an_attempt_begins_at_its_own_line_the_last_of_that_kind():
    first, second = START_LINE.format(1), START_LINE.format(2)
    assert split_at_attempt([first, "a", second, "b"], "label", 2) == ([first, "a"], [second, "b"])
    assert split_at_attempt([first, "a"], "label", 2) == ([first, "a"], [])


def test_bucket_and_machine_are_one_log_with_the_lines_of_whoever_has_more():
    first, second = START_LINE.format(1), START_LINE.format(2)
    stored, printed = [first, "old", second, "b"], ["installing", second, "b", "c"]
    assert joined(stored, printed, "label", 2) == [first, "old", second, "b", "c"]
    assert joined(stored, printed[:2], "label", 2) == stored
    assert joined([first, "old"], printed, "label", 2) == [first, "old", second, "b", "c"]
    assert joined([CUT, "x"], printed, "label", 2) == [second, "b", "c"]


# --- following a run


class Followed(World):
    """A run that a script plays: what is in the bucket and on the machine changes with the clock."""

    def __init__(self, *steps) -> None:
        super().__init__()
        self.steps, self.out, self.said, self.printed = list(steps), [], [], {}
        self.lease = Lease.acquire(self.bucket, "owner1", self.clock)
        real = self.clock.sleep

        def sleep(seconds: float) -> None:
            real(6.0)
            self.lease.renew_if_due()
            if self.steps:
                self.steps.pop(0)(self)
            elif len(self.out) > 1000 or self.clock.elapsed_s > 5000:
                raise AssertionError("it does not end")

        self.clock.sleep = sleep

    def put(self, stage: str, *lines: str) -> None:
        self.bucket.put(f"{stage}/log.txt", "".join(f"{line}\n" for line in lines).encode())

    def job(self, name: str, stage: str, attempt: int = 1) -> None:
        self.up(name)
        data = {"job": f"{stage}-{attempt}", "job_age_s": 1.0}
        self.ledger.note("r-abc123", "job", self.clock.mark().wall, stage=stage, machine=name, data=data)

    def end(self, state: str = "done") -> None:
        data = {"state": state, "message": "", "hint": ""}
        self.ledger.note("r-abc123", "ended", self.clock.mark().wall, data=data)

    def logs(self, name: str, job: str):
        if self.printed.get(job) is None:
            raise ProvisionError("it does not answer")
        yield from self.printed[job]

    def follow(self, monkeypatch, **more):
        monkeypatch.setattr("orchestrator.follow.open_bucket", lambda url: self.bucket)
        monkeypatch.setattr("orchestrator.follow.Guarded", lambda provider, now, limit_s: provider)
        return follow_logs(
            "r-abc123", ledger=self.ledger, plan=PLAN, stage=more.pop("stage", None), last=more.pop("last", 0),
            provider=more.pop("provider", None), out=self.out.append, say=self.said.append, clock=self.clock,
        )  # fmt: skip


def nothing(world: Followed) -> None: ...


def finish(world: Followed, stage: str) -> None:
    world.gone(f"kd-{stage}-1", 10, 1.0)
    world.done(stage)


def test_it_goes_from_stage_to_stage_until_the_run_has_ended(monkeypatch):
    world = Followed(
        lambda w: w.put("label", "a", "b"),
        lambda w: w.put("label", "a", "b", "c"),
        lambda w: (w.put("label", "a", "b", "c", "d"), w.done("label")),
        lambda w: w.put("train", "t"),
        lambda w: (w.put("train", "t", "u"), w.done("train")),
        lambda w: (w.put("export", "e"), w.done("export")),
        lambda w: w.end(),
    )
    assert world.follow(monkeypatch).state == "done"
    assert world.out == ["a", "b", "c", "d", "t", "u", "e"]
    assert world.said == ["--- label ---", "--- train ---", "--- export ---"]


def test_one_stage_alone_ends_with_it(monkeypatch):
    world = Followed(
        lambda w: w.put("train", "t"), lambda w: w.done("label"), lambda w: (w.put("train", "t", "u"), w.done("train"))
    )
    assert world.follow(monkeypatch, stage="train").state == "done"
    assert world.out == ["t", "u"]


def test_only_the_last_lines_of_what_is_there_and_then_all_that_comes(monkeypatch):
    world = Followed(lambda w: w.put("label", *numbered(12)), lambda w: w.end("stopped"))
    world.put("label", *numbered(10))
    assert world.follow(monkeypatch, last=2).state == "stopped"
    assert world.out == ["line 8", "line 9", "line 10", "line 11"]


def test_the_machine_is_heard_before_the_bucket_and_no_line_comes_twice(monkeypatch):
    begin = START_LINE.format(1)

    def prints(*lines: str):
        return lambda w: w.printed.__setitem__("label-1", list(lines))

    world = Followed(
        lambda w: (prints()(w), w.job(w.order("label"), "label")),
        prints("fetching packages"),
        nothing,
        prints("fetching packages", begin, "a", "b"),
        nothing,
        lambda w: w.put("label", begin, "a"),
        lambda w: w.printed.__setitem__("label-1", None),
        lambda w: w.put("label", begin, "a", "b", "c"),
        lambda w: finish(w, "label"),
        lambda w: w.end("stopped"),
    )
    world.follow(monkeypatch, provider=world)
    assert world.out == ["fetching packages", begin, "a", "b", "c"]


def test_a_line_that_is_half_written_waits_for_its_other_half():
    world = Followed()
    world.job(world.order("label"), "label")
    (row,) = world.ledger.run("r-abc123").machines
    machine = _Machine(world, world.clock)
    world.printed["label-1"] = ["one", "tw"]
    assert machine.lines(row) == ["one"]
    assert machine.lines(row) == ["one"]  # remembered: it is not asked that often
    world.printed["label-1"] = ["one", "two", "thr"]
    VirtualClock.sleep(world.clock, 10)
    assert machine.lines(row) == ["one", "two"]
    VirtualClock.sleep(world.clock, 10)
    assert machine.lines(row) == ["one", "two", "thr"]  # there for a while: nothing is being written
    assert machine.lines(None) == []


def test_half_a_line_in_the_bucket_waits_until_there_is_no_more_to_come(monkeypatch):
    world = Followed(
        lambda w: w.bucket.put("label/log.txt", b"one\ntw"),
        lambda w: w.bucket.put("label/log.txt", b"one\ntwo\nthr"),
        nothing,
        lambda w: w.done("label"),
        lambda w: w.end(),
    )
    world.follow(monkeypatch)
    assert world.out == ["one", "two", "thr"]


def test_a_run_that_nobody_drives_is_not_waited_for(monkeypatch):
    world = Followed(lambda w: w.lease.release())
    world.put("label", "a")
    outcome = world.follow(monkeypatch)
    assert outcome.state == "interrupted" and "kdcloud run --resume r-abc123" in outcome.hint
    assert world.out == ["a"]


def test_a_stage_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    with pytest.raises(UsageError, match="no stage 'lable'") as error:
        Followed().follow(monkeypatch, stage="lable")
    assert "label, train, export" in error.value.hint


def test_without_following_it_is_the_newest_log_that_there_is(monkeypatch):
    world = World()
    monkeypatch.setattr("orchestrator.follow.open_bucket", lambda url: world.bucket)
    run = world.ledger.run("r-abc123")
    with pytest.raises(UsageError, match="no log") as error:
        read_log(run, PLAN, None)
    assert "logs -f" in error.value.hint
    world.bucket.put("label/log.txt", b"one\n")
    world.bucket.put("train/log.txt", b"two\nthree\n")
    assert read_log(run, PLAN, None) == ("train", ["two", "three"])
    assert read_log(run, PLAN, "label") == ("label", ["one"])


def test_what_a_stage_printed_cannot_steer_the_terminal(monkeypatch):
    world, out, said = Followed(lambda w: w.end()), [], []
    world.put("label", "\x1b]0;owned\x07\x1b[2Jred\x1b[0m", "tab\there")
    monkeypatch.setattr("orchestrator.follow.open_bucket", lambda url: world.bucket)
    monkeypatch.setattr("orchestrator.follow.plan_of", lambda run: PLAN)
    monkeypatch.setattr("orchestrator.follow.SystemClock", lambda: world.clock)
    for follow in (False, True):
        show_logs(
            "r-abc123", ledger=world.ledger, stage=None, last=0, follow=follow, provider=None, out=out.append,
            say=said.append,
        )  # fmt: skip
    assert out == ["red", "tab here"] * 2
    assert said[-1] == "--- r-abc123: done ---"
