"""When does a stage end, and why? Pure: what was seen goes in, a decision comes out; every clock is passed in.

Work is the progress counter, moved by the working loop itself. Processor, GPU and network prove nothing (a heartbeat
thread outlives a hung loop, a deadlock can show 100 %), except in phases that declare themselves: download, upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.contract import Exit, Limit, Progress, Task, Watch

STALL_STEPS = 10  # a stall is no earlier than this many median steps
STARTUP_S = 120.0  # imports take that long on a cold disk: nothing is a stall before the first progress
BUSY_CPU_SHARE = 0.05  # of one core: what counts as work in a declared phase ...
BUSY_BYTES_PER_S = 4096.0  # ... or this many bytes read and written
BUSY_WINDOW_TICKS = 5  # both as a mean over so many ticks, so that one line of a heartbeat is no work
MAX_GAP_S = 10.0  # a longer gap between two ticks means that the supervisor itself did not run: nobody is blamed for it
RESUME = "resume the run: it goes on from the last checkpoint"
QUIET_SHARE = 0.25  # of flush_s: a stopped stage that moves nothing for so long is not saving anything


@dataclass(frozen=True)
class Usage:
    """Sums over the process tree since it started; they never fall."""

    cpu_s: float = 0.0
    io_bytes: int = 0


@dataclass(frozen=True)
class Sight:
    """What one tick saw. `now_s` is a clock that stands still while the machine sleeps."""

    now_s: float
    progress: Progress | None = None
    usage: Usage = Usage()
    lease: str | None = None  # content or ETag of the client's lease; None = none was ever seen


@dataclass(frozen=True)
class Activity:
    """What moved, and when, in seconds awake since the stage began."""

    sight: Sight
    awake_s: float = 0.0
    moved_s: float = 0.0  # the progress counter
    busy_s: float = 0.0  # processor, disk or network of the process tree
    io_s: float = 0.0  # disk or network alone
    lease_s: float = 0.0  # the client's lease
    window_s: float = 0.0  # start of the window in which usage is averaged
    window: Usage = Usage()


def advance(
    before: Activity, sight: Sight, watch: Watch, *, busy_bytes_per_s: float = BUSY_BYTES_PER_S
) -> Activity:
    """The activity after one more tick."""
    gap_s = max(0.0, sight.now_s - before.sight.now_s)
    awake_s = before.awake_s + min(gap_s, max(MAX_GAP_S, 2 * watch.tick_s))
    after = replace(before, sight=sight, awake_s=awake_s)
    if _position(sight.progress) != _position(before.sight.progress):
        after = replace(after, moved_s=awake_s)
    if sight.lease != before.sight.lease:
        after = replace(after, lease_s=awake_s)
    span_s = awake_s - before.window_s
    if span_s < BUSY_WINDOW_TICKS * watch.tick_s:
        return after
    moves_bytes = sight.usage.io_bytes - before.window.io_bytes >= busy_bytes_per_s * span_s
    computes = sight.usage.cpu_s - before.window.cpu_s >= BUSY_CPU_SHARE * span_s
    return replace(
        after,
        busy_s=awake_s if moves_bytes or computes else before.busy_s,
        io_s=awake_s if moves_bytes else before.io_s,
        window_s=awake_s,
        window=sight.usage,
    )


def _position(progress: Progress | None) -> tuple[str, int, float] | None:
    return None if progress is None else (progress.phase, progress.count, progress.done)


@dataclass(frozen=True)
class View:
    """All that a decision depends on."""

    watch: Watch
    activity: Activity
    remaining_s: float  # until the machine must be gone, on a clock that counts sleep too
    attempt: int
    newest_attempt: int | None = None  # in the bucket's task.json; None = not known
    rebooted: bool = False
    terminated: bool = False  # SIGTERM came


@dataclass(frozen=True)
class Decision:
    """`stop` None = go on."""

    stop: Exit | None = None
    message: str = ""
    hint: str = ""


def decide(view: View) -> Decision:
    """Whether the stage ends now. The first rule that holds wins: not allowed to write, to spend, then the rest."""
    watch, activity = view.watch, view.activity
    if view.newest_attempt is not None and view.newest_attempt > view.attempt:
        return Decision(
            Exit.FENCED, f"attempt {view.newest_attempt} owns this stage now, this was attempt {view.attempt}",
            "nothing to do: the newer attempt goes on from the last checkpoint",
        )
    if view.rebooted:
        return Decision(
            Exit.REBOOTED, "the machine was started anew in the middle of the stage: its time is not known any more",
            RESUME,
        )
    if view.remaining_s <= watch.flush_s + watch.tick_s:
        return Decision(
            Exit.DEADLINE, f"the time paid for is used up, but for {max(0.0, view.remaining_s):.0f} s to save the work",
            "resume the run with a larger budget or a later deadline: it goes on from the last checkpoint",
        )
    if view.terminated:
        return Decision(Exit.TERMINATED, "the stage was told to end", RESUME)
    unseen_s = activity.awake_s - activity.lease_s
    if watch.client_lease_s is not None and unseen_s > watch.client_lease_s:
        return Decision(
            Exit.CLIENT_GONE, f"nothing was heard of the client that started this stage for {unseen_s:.0f} s",
            RESUME,
        )
    quiet_s = activity.awake_s - _last_work_s(activity)
    if quiet_s > stall_limit_s(activity.sight.progress, watch):
        return Decision(
            Exit.STALLED, f"no progress for {quiet_s:.0f} s {_where(activity.sight.progress)}",
            "read the end of log.txt; resume to go on from the last checkpoint",
        )
    return Decision()


def stall_limit_s(progress: Progress | None, watch: Watch) -> float:
    """Seconds without movement that are still no stall."""
    if progress is None or progress.phase == Progress().phase:
        return min(max(STARTUP_S, watch.stall_floor_s), watch.idle_s)
    return min(max(STALL_STEPS * (progress.step_s or 0.0), watch.stall_floor_s), watch.idle_s)


def _last_work_s(activity: Activity) -> float:
    progress = activity.sight.progress
    if progress is not None and progress.declared:
        return max(activity.moved_s, activity.busy_s)
    return activity.moved_s


def _where(progress: Progress | None) -> str:
    if progress is None or progress.phase == Progress().phase:
        return "while the stage starts"
    total = "" if progress.total is None else f" of {progress.total:g}"
    return f"in {progress.phase}, at {progress.done:g}{total} {progress.unit}"


def obeys(limit: Limit, task: Task, before: Limit | None) -> bool:
    """Whether a limit in the bucket holds: for this attempt, by a client that has the run, and less than before."""
    meant = task.gate and limit.attempt == task.attempt and limit.fence >= task.fence and limit.total > 0
    return meant and (before is None or (limit.fence >= before.fence and limit.total < before.total))


def stage_flush_s(watch: Watch) -> float:
    """Seconds a stopped stage may take to save itself; what is left of flush_s is the supervisor's own last upload."""
    return watch.flush_s - min(10.0, watch.flush_s / 4)


def may_save_on(watch: Watch, activity: Activity, *, stopped_s: float, stop: Exit, remaining_s: float) -> bool:
    """Whether a stage that was told to stop at `stopped_s` (awake) may go on saving: in time, and something moves.

    One that works may first finish the step it is in; one that hung has no step to finish.
    """
    own_s = watch.flush_s - stage_flush_s(watch)
    if stop is Exit.FENCED or remaining_s <= own_s or activity.awake_s - stopped_s >= stage_flush_s(watch):
        return False
    progress = activity.sight.progress
    step_s = 0.0 if stop is Exit.STALLED or progress is None else 2 * (progress.step_s or 0.0)
    last_s = max(stopped_s, activity.moved_s, activity.io_s)
    return activity.awake_s - last_s < max(QUIET_SHARE * watch.flush_s, step_s)


def judge(
    rc: int, *, committed: bool, failure: tuple[str, str] | None = None, tail: Sequence[str] = (),
    out_of_memory: bool | None = None, peak_gib: float = 0.0, memory_gib: float = 0.0,
) -> Decision:
    """Why the stage's process ended by itself. `failure` is the message and hint it left, `tail` its last lines.

    `out_of_memory`: the kernel killed something for want of memory meanwhile; None = it does not say.
    """
    if committed:
        return Decision(Exit.DONE)
    if rc == 0:
        return Decision(
            Exit.BUG, "the stage ended without an error and without a committed result", "report this, with log.txt"
        )
    if failure is not None and rc == Exit.BAD_INPUT:
        return Decision(Exit.BAD_INPUT, *failure)
    last = next((line.strip() for line in reversed(tail) if line.strip()), "")
    if rc == -9:
        held = f"it held {peak_gib:.1f} of {memory_gib:.1f} GiB of memory"
        if out_of_memory is False:
            return Decision(Exit.TERMINATED, f"the stage's process was killed from outside; {held}", RESUME)
        return Decision(
            Exit.BAD_INPUT, f"the system killed the stage, most likely for want of memory: {held}",
            "take a machine with more memory, or a smaller batch or model, and resume",
        )
    if rc == Exit.FENCED:
        return Decision(Exit.FENCED, "a newer attempt owns this stage", "nothing to do: the newer attempt goes on")
    if rc in (Exit.TERMINATED, -15):
        return Decision(Exit.TERMINATED, "the stage's process was told to end by somebody else", "resume the run")
    if rc == Exit.BAD_INPUT:  # it could not leave a file: the disk may be full
        said = next((line for line in reversed(tail) if line.startswith("error: ")), f"error: {last}")
        return Decision(Exit.BAD_INPUT, said.removeprefix("error: ").strip(), "read the end of log.txt")
    if rc < 0:
        return Decision(Exit.BUG, f"the stage's process died of signal {-rc}", "this is a bug: log.txt may say where")
    return Decision(Exit.BUG, last or f"the stage failed with status {rc}", "this is a bug: log.txt has the traceback")
