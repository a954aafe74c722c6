"""Do the supervisor's decisions hold? Tables of what was seen and what follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.contract import Exit, Limit, Progress, RehearseSettings, Task, Watch
from tasks.watch import (
    BUSY_BYTES_PER_S,
    STARTUP_S,
    Activity,
    Decision,
    Sight,
    Usage,
    View,
    advance,
    decide,
    judge,
    may_save_on,
    obeys,
    stage_flush_s,
    stall_limit_s,
)

WATCH = Watch(idle_s=3600, stall_floor_s=300, tick_s=1, flush_s=60)
TRAINING = Progress(phase="train", count=7, done=120, total=600, step_s=2.0)
UPLOADING = replace(TRAINING, phase="upload", declared=True)


def seen(progress: Progress | None = TRAINING, *, quiet_s: float = 0.0, **kwargs: float) -> Activity:
    """Awake for 10,000 s, the counter still for the last `quiet_s`; processor, disk and lease for as long as given."""
    times = {"busy_s": 0.0, "io_s": 0.0, "lease_s": 10_000.0, **kwargs}
    return Activity(Sight(0.0, progress), awake_s=10_000.0, moved_s=10_000.0 - quiet_s, **times)


def view(activity: Activity | None = None, **kwargs: object) -> View:
    values: dict[str, object] = {"watch": WATCH, "activity": activity or seen(), "remaining_s": 5000.0, "attempt": 1}
    return View(**{**values, **kwargs})  # type: ignore[arg-type]


def test_a_stage_that_moves_goes_on() -> None:
    assert decide(view()) == Decision()


@pytest.mark.parametrize(
    ("progress", "watch", "limit_s"),
    [
        (TRAINING, WATCH, 300.0),  # 10 x 2 s is less than the floor
        (replace(TRAINING, step_s=45.0), WATCH, 450.0),  # 10 x 45
        (replace(TRAINING, step_s=900.0), WATCH, 3600.0),  # 10 x 900 is more than idle
        (replace(TRAINING, step_s=None), WATCH, 300.0),
        (TRAINING, replace(WATCH, idle_s=60), 60.0),  # idle wins over the floor
        (None, WATCH, 300.0),
        (None, replace(WATCH, stall_floor_s=1), STARTUP_S),  # imports
        (Progress(), replace(WATCH, stall_floor_s=1), STARTUP_S),
        (None, replace(WATCH, idle_s=5), 5.0),
    ],
)
def test_the_stall_limit_is_ten_steps_at_least_the_floor_and_at_most_idle(
    progress: Progress | None, watch: Watch, limit_s: float
) -> None:
    assert stall_limit_s(progress, watch) == limit_s
    moved = Activity(Sight(0.0, progress), awake_s=limit_s)
    assert decide(view(moved, watch=watch)).stop is None
    assert decide(view(replace(moved, awake_s=limit_s + 0.1), watch=watch)).stop is Exit.STALLED


def test_a_busy_machine_is_no_excuse_for_a_counter_that_stands_still() -> None:
    assert decide(view(seen(quiet_s=301, busy_s=10_000, io_s=10_000))).stop is Exit.STALLED


def test_in_a_declared_phase_moving_bytes_are_work() -> None:
    assert decide(view(seen(UPLOADING, quiet_s=9_000, busy_s=9_900))).stop is None
    assert decide(view(seen(UPLOADING, quiet_s=9_000, busy_s=9_600))).stop is Exit.STALLED


def test_a_declared_phase_is_bounded_by_the_deadline() -> None:
    assert decide(view(seen(UPLOADING, busy_s=10_000), remaining_s=61.0)).stop is Exit.DEADLINE


@pytest.mark.parametrize(("remaining_s", "stop"), [(61.1, None), (61.0, Exit.DEADLINE), (-5.0, Exit.DEADLINE)])
def test_the_deadline_leaves_the_last_upload_and_a_tick(remaining_s: float, stop: Exit | None) -> None:
    assert decide(view(remaining_s=remaining_s)).stop is stop  # 60 s of flush, 1 s of tick


@pytest.mark.parametrize(
    ("lease_s", "quiet_s", "stop"),
    [(None, 9_999.0, None), (20.0, 19.9, None), (20.0, 20.1, Exit.CLIENT_GONE)],
)
def test_a_stage_with_a_client_lease_ends_with_its_client(
    lease_s: float | None, quiet_s: float, stop: Exit | None
) -> None:
    watch = replace(WATCH, client_lease_s=lease_s)
    assert decide(view(seen(lease_s=10_000 - quiet_s), watch=watch)).stop is stop


def test_the_rules_come_in_order_of_what_must_not_happen() -> None:
    everything: dict[str, object] = {
        "newest_attempt": 2, "rebooted": True, "remaining_s": 0.0, "terminated": True,
        "watch": replace(WATCH, client_lease_s=1.0), "activity": seen(quiet_s=4000, lease_s=0),
    }
    mended = {
        "newest_attempt": 1, "rebooted": False, "remaining_s": 5000.0, "terminated": False, "watch": WATCH,
        "activity": seen(),
    }
    order = []
    for key in mended:
        order.append(decide(view(**everything)).stop)  # type: ignore[arg-type]
        everything[key] = mended[key]
    assert order == [Exit.FENCED, Exit.REBOOTED, Exit.DEADLINE, Exit.TERMINATED, Exit.CLIENT_GONE, Exit.STALLED]
    assert decide(view(**everything)).stop is None  # type: ignore[arg-type]


@pytest.mark.parametrize("newest", [None, 0, 1])
def test_only_a_newer_attempt_fences(newest: int | None) -> None:
    assert decide(view(newest_attempt=newest)).stop is None


def test_every_stop_says_what_happened_and_what_to_do() -> None:
    views = [
        view(newest_attempt=2), view(rebooted=True), view(remaining_s=0.0), view(terminated=True),
        view(watch=replace(WATCH, client_lease_s=1.0), activity=seen(lease_s=0)), view(seen(quiet_s=4000)),
    ]
    decisions = [decide(v) for v in views]
    assert len({d.stop for d in decisions}) == 6
    assert all(d.message and d.hint for d in decisions)
    assert decisions[-1].message == "no progress for 4000 s in train, at 120 of 600 steps"


def ticks(
    activity: Activity, count: int, *, progress: Progress | None = None, cpu_share: float = 0.0, io_rate: float = 0.0,
    lease: str | None = None, gap_s: float = 1.0,
) -> Activity:
    for _ in range(count):
        before = activity.sight
        usage = Usage(before.usage.cpu_s + cpu_share * gap_s, before.usage.io_bytes + round(io_rate * gap_s))
        activity = advance(activity, Sight(before.now_s + gap_s, progress or before.progress, usage, lease), WATCH)
    return activity


START = Activity(Sight(1000.0, TRAINING))


@pytest.mark.parametrize(
    ("change", "moves"),
    [({"count": 8}, True), ({"done": 121.0}, True), ({"phase": "evaluate"}, True), ({"numbers": {"loss": 2.0}}, False)],
)
def test_phase_count_and_done_are_movement_and_numbers_are_not(change: dict[str, object], moves: bool) -> None:
    after = ticks(START, 1, progress=replace(TRAINING, **change))  # type: ignore[arg-type]
    assert (after.moved_s == after.awake_s) is moves


@pytest.mark.parametrize(
    ("cpu_share", "io_rate", "busy", "io"),
    [
        (0.0, 0.0, False, False),
        (0.01, 100.0, False, False),  # a heartbeat
        (1.0, 0.0, True, False),
        (0.0, BUSY_BYTES_PER_S, True, True),
    ],
)
def test_usage_counts_from_a_rate_that_honest_work_has(cpu_share: float, io_rate: float, busy: bool, io: bool) -> None:
    after = ticks(START, 50, cpu_share=cpu_share, io_rate=io_rate)
    assert (after.busy_s == 50, after.io_s == 50) == (busy, io)


def test_one_burst_of_a_heartbeat_is_averaged_away() -> None:
    activity = START
    for _ in range(10):
        activity = ticks(activity, 4)
        activity = ticks(activity, 1, io_rate=2 * BUSY_BYTES_PER_S)  # once in five ticks: 0.4 of the rate
    assert activity.busy_s == 0


def test_time_in_which_the_supervisor_did_not_run_is_nobodys_fault() -> None:
    after = ticks(START, 1, gap_s=8 * 3600.0)  # stopped, or a machine that slept on a clock that went on
    assert after.awake_s < 60
    assert decide(view(after)).stop is None


def test_the_lease_is_aged_by_its_content() -> None:
    renewed = ticks(ticks(START, 5, lease="a"), 3, lease="b")
    assert (renewed.awake_s, renewed.lease_s) == (8, 6)
    assert ticks(START, 8).lease_s == 0  # never seen: unchanged from the start


@given(st.lists(st.floats(min_value=-100, max_value=100_000), max_size=20))
def test_no_clock_runs_backwards(gaps: list[float]) -> None:
    activity = START
    for gap_s in gaps:
        after = advance(activity, Sight(activity.sight.now_s + gap_s, TRAINING), WATCH)
        assert after.awake_s >= activity.awake_s
        assert max(after.moved_s, after.busy_s, after.lease_s) <= after.awake_s
        activity = after


@given(
    remaining_s=st.floats(min_value=-1e4, max_value=1e5), quiet_s=st.floats(min_value=0, max_value=9_999),
    busy_s=st.floats(min_value=0, max_value=10_000), declared=st.booleans(), terminated=st.booleans(),
)
def test_whatever_the_stage_does_it_never_passes_the_deadline(
    remaining_s: float, quiet_s: float, busy_s: float, declared: bool, terminated: bool
) -> None:
    activity = seen(replace(TRAINING, declared=declared), quiet_s=quiet_s, busy_s=busy_s)
    stop = decide(view(activity, remaining_s=remaining_s, terminated=terminated)).stop
    if remaining_s <= WATCH.flush_s + WATCH.tick_s:
        assert stop is Exit.DEADLINE
    elif not terminated and quiet_s > WATCH.idle_s and not declared:
        assert stop is Exit.STALLED


@pytest.mark.parametrize(
    ("stop", "since_s", "moved_s", "io_s", "step_s", "goes_on"),
    [
        (Exit.DEADLINE, 5.0, 0.0, 0.0, None, True),  # just told
        (Exit.DEADLINE, 20.0, 0.0, 0.0, None, False),  # 60 / 4 = 15 s in which nothing moved
        (Exit.DEADLINE, 20.0, 0.0, 0.0, 15.0, True),  # in the middle of a step of 15 s
        (Exit.STALLED, 20.0, 0.0, 0.0, 15.0, False),  # a loop that hangs has no step to finish
        (Exit.DEADLINE, 49.0, 48.0, 0.0, None, True),  # counts its upload
        (Exit.DEADLINE, 49.0, 0.0, 48.0, None, True),  # writes its checkpoint
        (Exit.DEADLINE, 50.0, 50.0, 50.0, 99.0, False),  # the other 10 s are the supervisor's
        (Exit.FENCED, 0.0, 0.0, 0.0, None, False),  # may not write at all
    ],
)
def test_a_stopped_stage_saves_for_as_long_as_something_moves(
    stop: Exit, since_s: float, moved_s: float, io_s: float, step_s: float | None, goes_on: bool
) -> None:
    stopped_s = 1000.0
    activity = Activity(
        Sight(0.0, replace(TRAINING, step_s=step_s)), awake_s=stopped_s + since_s,
        moved_s=moved_s and stopped_s + moved_s, io_s=io_s and stopped_s + io_s,
    )
    assert may_save_on(WATCH, activity, stopped_s=stopped_s, stop=stop, remaining_s=61.0 - since_s) is goes_on
    assert not may_save_on(WATCH, activity, stopped_s=stopped_s, stop=stop, remaining_s=10.0)  # the machine slept


@given(st.floats(min_value=0.1, max_value=1e5))
def test_the_supervisor_keeps_a_share_of_the_flush_for_itself(flush_s: float) -> None:
    assert 0 < stage_flush_s(replace(WATCH, flush_s=flush_s)) < flush_s


TAIL = ("Traceback (most recent call last):", "ValueError: 3 is not 4", "")


@pytest.mark.parametrize(
    ("rc", "committed", "failure", "tail", "stop", "message"),
    [
        (0, True, None, (), Exit.DONE, ""),
        (-9, True, None, (), Exit.DONE, ""),  # what is committed is done, whatever came after
        (0, False, None, (), Exit.BUG, "without a committed result"),
        (2, False, ("no such model", "check"), TAIL, Exit.BAD_INPUT, "no such model"),
        (2, False, None, ("error: the disk is full", "free some"), Exit.BAD_INPUT, "the disk is full"),
        (1, False, None, TAIL, Exit.BUG, "ValueError: 3 is not 4"),
        (1, False, ("old news", ""), TAIL, Exit.BUG, "ValueError: 3 is not 4"),
        (1, False, None, (), Exit.BUG, "status 1"),
        (-11, False, None, (), Exit.BUG, "signal 11"),
        (-9, False, None, TAIL, Exit.BAD_INPUT, "want of memory: it held 3.2 of 8.0 GiB"),
        (13, False, None, (), Exit.TERMINATED, "somebody else"),
        (14, False, None, (), Exit.FENCED, "newer attempt"),
    ],
)
def test_the_end_of_the_stages_process_is_explained(
    rc: int, committed: bool, failure: tuple[str, str] | None, tail: tuple[str, ...], stop: Exit, message: str
) -> None:
    decision = judge(rc, committed=committed, failure=failure, tail=tail, peak_gib=3.2, memory_gib=8.0)
    assert decision.stop is stop
    assert message in decision.message
    assert decision.hint or decision.stop is Exit.DONE


@pytest.mark.parametrize(
    ("out_of_memory", "stop"), [(True, Exit.BAD_INPUT), (None, Exit.BAD_INPUT), (False, Exit.TERMINATED)]
)
def test_a_killed_stage_is_only_blamed_on_memory_if_the_kernel_does_not_deny_it(
    out_of_memory: bool | None, stop: Exit
) -> None:
    assert judge(-9, committed=False, out_of_memory=out_of_memory).stop is stop


TASK = Task("r", "train", "rehearse", attempt=2, fence=5, bucket="file:x", settings=RehearseSettings(9, 1.0), gate=True)
LIMIT = Limit(total=100.0, attempt=2, fence=5)


@pytest.mark.parametrize(
    ("limit", "task", "before", "wanted"),
    [
        (LIMIT, TASK, None, True),
        (replace(LIMIT, fence=6), TASK, None, True),  # by the client that took the run over
        (replace(LIMIT, fence=4), TASK, None, False),  # by the one before
        (replace(LIMIT, attempt=1), TASK, None, False),
        (replace(LIMIT, attempt=3), TASK, None, False),
        (LIMIT, replace(TASK, gate=False), None, False),
        (replace(LIMIT, total=0.0), TASK, None, False),
        (LIMIT, TASK, LIMIT, False),
        (replace(LIMIT, total=90.0), TASK, LIMIT, True),
        (replace(LIMIT, total=110.0), TASK, LIMIT, False),  # never more again
        (replace(LIMIT, total=90.0), TASK, replace(LIMIT, fence=6), False),
    ],
)
def test_a_limit_is_for_one_attempt_by_the_client_that_has_the_run(
    limit: Limit, task: Task, before: Limit | None, wanted: bool
) -> None:
    assert obeys(limit, task, before) is wanted
