"""Does a rehearsal end in the same place, however often it is stopped or killed?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import rehearse
from tasks.bucket import open_bucket
from tasks.contract import RehearseSettings, Task, TaskError
from tasks.stage import StageContext, Stopped

STEPS = 8


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs after it."""


class Breaking(StageContext):
    """Asks for a stop, or dies, when a step is done."""

    stop_at: int | None = None
    kill_at: int | None = None
    kill_in_checkpoint = False

    def metric(self, step: int, **values: float) -> None:
        (self.work.parent / "steps").open("a").write(f"{step}\n")
        if step == self.stop_at:
            self.ask_to_stop()
        if step == self.kill_at and not self.kill_in_checkpoint:
            raise Killed

    def checkpoint(self, step: int, write: Any) -> None:
        if self.kill_at is not None and self.kill_in_checkpoint and step >= self.kill_at:
            def dying(folder: Path) -> None:
                write(folder)
                raise Killed

            super().checkpoint(step, dying)
        super().checkpoint(step, write)


def attempt(root: Path, number: int, every: int, *, machine: int = 1, **breaks: Any) -> dict[str, Any] | None:
    """The result, or None if the attempt was broken off."""
    bucket = open_bucket(f"file:{root / 'bucket'}")
    plan = RehearseSettings(steps=STEPS, seconds_per_step=0.0, checkpoint_every_steps=every, payload_bytes=100)
    task = Task("run1", "try", "rehearse", attempt=number, fence=number, bucket=bucket.url, settings=plan)
    bucket.put("try/task.json", task.to_json().encode())
    ctx = Breaking(task, root / f"machine-{machine}", bucket)
    for name, value in breaks.items():
        setattr(ctx, name, value)
    try:
        result = rehearse.run(ctx, plan)
        ctx.finish(result)
        return result
    except (Stopped, Killed):
        return None


def steps_of(root: Path) -> list[int]:
    """Every step done, over all attempts and machines in their order."""
    return [int(line) for line in (root / "steps").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("unbroken")
    result = attempt(root, 1, every=5)
    assert result is not None and steps_of(root) == list(range(1, STEPS + 1))
    return result


@settings(max_examples=8, deadline=None)
@given(
    stops=st.lists(st.integers(1, STEPS - 1), max_size=4), every=st.integers(1, STEPS), one_machine=st.booleans()
)
def test_stopped_and_resumed_it_repeats_no_step_and_leaves_none_out(
    stops: list[int], every: int, one_machine: bool, unbroken: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = None
        for number, stop_at in enumerate([*sorted(set(stops)), None], start=1):
            assert result is None
            machine = 1 if one_machine else number
            result = attempt(Path(folder), number, every, machine=machine, stop_at=stop_at)
        assert result == unbroken
        assert steps_of(Path(folder)) == list(range(1, STEPS + 1))


@settings(max_examples=8, deadline=None)
@given(
    kills=st.lists(st.tuples(st.integers(1, STEPS), st.booleans()), max_size=4), every=st.integers(1, STEPS),
    one_machine=st.booleans(),
)
def test_killed_and_resumed_it_goes_on_from_the_last_checkpoint_to_the_same_result(
    kills: list[tuple[int, bool]], every: int, one_machine: bool, unbroken: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, result, number = Path(folder), None, 0
        for number, (kill_at, in_checkpoint) in enumerate(kills, start=1):
            machine = 1 if one_machine else number
            breaks = {"kill_at": kill_at, "kill_in_checkpoint": in_checkpoint}
            result = attempt(root, number, every, machine=machine, **breaks)
            if result is not None:
                break
        result = result or attempt(root, number + 1, every)
        assert result == unbroken
        done = steps_of(root)
        for before, after in zip([0, *done], done, strict=False):
            assert after == before + 1 or (after <= before and (after - 1) % every == 0)  # on, or back to a checkpoint


def test_it_takes_the_time_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(rehearse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rehearse.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    bucket = open_bucket(f"file:{tmp_path / 'bucket'}")
    plan = RehearseSettings(steps=3, seconds_per_step=2.0)
    ctx = StageContext(Task("r", "try", "rehearse", 1, 1, bucket.url, plan), tmp_path / "w", bucket)
    rehearse.run(ctx, plan)
    assert now[0] == pytest.approx(6.0)


def test_a_stop_in_the_middle_of_a_long_step_does_not_count_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    bucket = open_bucket(f"file:{tmp_path / 'bucket'}")
    plan = RehearseSettings(steps=3, seconds_per_step=60.0)
    ctx = StageContext(Task("r", "try", "rehearse", 1, 1, bucket.url, plan), tmp_path / "w", bucket)

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 70:
            ctx.ask_to_stop()

    monkeypatch.setattr(rehearse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rehearse.time, "sleep", sleep)
    with pytest.raises(Stopped):
        rehearse.run(ctx, plan)
    assert now[0] < 71
    found = ctx.latest_checkpoint()
    assert found is not None and found[0] == 1
    assert json.loads((found[1] / rehearse.STATE_FILE).read_text())["step"] == 1


@pytest.mark.parametrize("plan", [RehearseSettings(0, 0.0), RehearseSettings(5, 0.0, checkpoint_every_steps=0)])
def test_a_rehearsal_of_nothing_is_refused(plan: RehearseSettings, tmp_path: Path) -> None:
    bucket = open_bucket(f"file:{tmp_path / 'bucket'}")
    ctx = StageContext(Task("r", "try", "rehearse", 1, 1, bucket.url, plan), tmp_path / "w", bucket)
    with pytest.raises(TaskError, match="at least one step"):
        rehearse.run(ctx, plan)
