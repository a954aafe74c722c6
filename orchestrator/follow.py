"""What do the stages of a run print? Their logs as they stand, or line by line until the run has ended.

A log is in the bucket, where it comes in lumps; the machine itself often has its last lines sooner. Both hold the same
lines of an attempt from its first one on, so whichever is longer is taken.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from orchestrator.clock import Clock, Mark, SystemClock, age_s
from orchestrator.errors import UsageError
from orchestrator.guarded import Guarded
from orchestrator.ledger import Ledger, MachineRow, Run
from orchestrator.mirror import Follower
from orchestrator.plan import Plan
from orchestrator.provision import Provisioner, ProvisionError
from orchestrator.runner import Outcome
from orchestrator.scene import clean
from orchestrator.session import plan_of
from orchestrator.states import State
from orchestrator.watching import Driver, outcome_of
from tasks.bucket import Bucket, BucketError, NotFound, open_bucket
from tasks.contract import LOG_FILE

CUT = "[supervisor] the beginning is cut off"  # first line of a log that was too long to be uploaded whole
OVERLAPS = (50, 20, 8, 3, 1)  # so many lines of what was told are looked for in a log that lost its beginning
LOOK_S = 2.0  # at the bucket
NEAR_S, FAR_S, REST_S = 0.5, 5.0, 20.0  # at this machine, at another one, and after it did not answer
MACHINE_LIMIT_S = 30.0
_NEWLINES = re.compile(r"\r\n|\r|\n")


def show_logs(
    run_id: str,
    *,
    ledger: Ledger,
    stage: str | None,
    last: int,
    follow: bool,
    provider: Provisioner | None,
    out: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Prints what there is and, with `follow`, what comes, then how the run ended. Raises UsageError, BucketError."""
    run = ledger.run(run_id)
    plan = plan_of(run)
    try:
        if not follow:
            lines = read_log(run, plan, stage)[1]
            for line in lines[-last:] if last else lines:
                out(clean(line))
            return
        outcome = follow_logs(
            run_id, ledger=ledger, plan=plan, stage=stage, last=last, provider=provider,
            out=lambda line: out(clean(line)), say=say,
        )  # fmt: skip
    except BrokenPipeError:  # whoever read has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except KeyboardInterrupt:
        say(f"\n{run_id} goes on; `kdcloud attach {run_id}` watches it, `kdcloud down {run_id}` ends it")
        return
    say(f"--- {run_id}: {outcome.state}{f': {clean(outcome.message)}' if outcome.message else ''} ---")
    if outcome.hint:
        say(f"  -> {clean(outcome.hint)}")


def read_log(run: Run, plan: Plan, stage: str | None) -> tuple[str, list[str]]:
    """The stage (the newest one with a log unless given) and its lines. Raises UsageError."""
    bucket = open_bucket(run.bucket)
    names = _names(run, plan, stage)
    for name in [stage] if stage else reversed(names):
        try:
            return name, lines_of(bucket.get(f"{name}/{LOG_FILE}")[0])
        except NotFound:
            continue
    raise UsageError(
        f"run {run.id} has no log{f' of stage {stage}' if stage else ''} yet",
        hint="a log appears once its stage has started; `kdcloud logs -f` waits for it",
    )


def _names(run: Run, plan: Plan, stage: str | None) -> list[str]:
    names = [one.name for one in plan.stages]
    if stage is not None and stage not in names:
        raise UsageError(f"run {run.id} has no stage {stage!r}", hint=f"its stages: {', '.join(names)}")
    return names


def lines_of(data: bytes) -> list[str]:
    """Whole lines and the last one, however they end: a bar that redraws itself is a line each time."""
    lines = _NEWLINES.split(data.decode(errors="replace"))
    return lines[:-1] if lines[-1] == "" else lines


# --- which lines are new: pure ---------------------------------------------------------------------------------------


@dataclass
class Tape:
    """Tells each line of a log once, although the log is read again and again and may lose its beginning."""

    told: list[str] = field(default_factory=list)

    def fresh(self, lines: Sequence[str]) -> list[str]:
        """The lines that were not told yet."""
        if self._last_has_grown(lines):
            self.told.pop()
        count = min(len(self.told), len(lines))
        new = list(lines[count:]) if self.told[:count] == list(lines[:count]) else self._after_overlap(lines)
        self.told += new
        return new

    def _last_has_grown(self, lines: Sequence[str]) -> bool:
        """Whether only half of the last line was told: then it is told again, whole."""
        at = len(self.told) - 1
        if not 0 <= at < len(lines) or lines[at] == self.told[at] or self.told[:at] != list(lines[:at]):
            return False
        return lines[at].startswith(self.told[at])

    def _after_overlap(self, lines: Sequence[str]) -> list[str]:
        for size in OVERLAPS:
            end = self.told[-size:]
            for at in range(len(lines), len(end) - 1, -1):
                if list(lines[at - len(end) : at]) == end:
                    return list(lines[at:])
        return list(lines)


def split_at_attempt(lines: Sequence[str], stage: str, attempt: int) -> tuple[list[str], list[str]]:
    """What stands before the attempt, and the attempt; all of it is before where the attempt is not there yet."""
    start = f"[supervisor] attempt {attempt} of stage {stage},"
    at = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].startswith(start)), None)
    return (list(lines), []) if at is None else (list(lines[:at]), list(lines[at:]))


def joined(stored: Sequence[str], printed: Sequence[str], stage: str, attempt: int) -> list[str]:
    """The log as both together tell it: earlier attempts from the bucket, this one from who has more of it."""
    before, here = split_at_attempt(stored, stage, attempt)
    _, there = split_at_attempt(printed, stage, attempt)
    if there and not here and before[:1] == [CUT]:
        return there  # its beginning was cut off in the bucket
    return before + (there if len(there) > len(here) else here)


# --- following -------------------------------------------------------------------------------------------------------


def follow_logs(
    run_id: str,
    *,
    ledger: Ledger,
    plan: Plan,
    stage: str | None,
    last: int,
    provider: Provisioner | None,
    out: Callable[[str], None],
    say: Callable[[str], None],
    clock: Clock | None = None,
) -> Outcome:
    """Tells lines from the stage (the one at work unless given) until it, or the run, has ended. Raises UsageError.

    `last`: only so many lines of what is there at first; 0 is all. `provider` None: only the bucket is asked.
    """
    clock = clock or SystemClock()
    run = ledger.run(run_id)
    names, bucket = _names(run, plan, stage), open_bucket(run.bucket)
    news, driver = Follower(ledger, bucket, run_id, clock), Driver(bucket, clock)
    machine = _Machine(provider, clock)
    current = stage or _first(run, names)
    reader = _Reader(bucket, current, last)
    say(f"--- {current} ---")
    while True:
        news.look()
        run = ledger.run(run_id)
        outcome, done = outcome_of(run), current in run.done
        gone = outcome is None and driver.is_gone() and not _works_alone(run)
        row = None if done or outcome or gone else _row_at_work(run, current)
        if reader.is_due(clock) or row is None:
            reader.read(clock, whole=bool(done or outcome or gone))
        for line in reader.fresh(row, machine.lines(row)):
            out(line)
        if outcome is not None:
            return outcome
        if gone:
            return Outcome(
                "interrupted", "nobody drives the run any more", f"go on with `kdcloud run --resume {run_id}`", current
            )
        if done and current == (stage or names[-1]):
            if stage:
                return Outcome("done", f"stage {stage} is done", stage=stage)
        elif done:
            current = names[names.index(current) + 1]
            reader = _Reader(bucket, current, 0)
            say(f"--- {current} ---")
            continue
        clock.sleep(NEAR_S)


def _first(run: Run, names: Sequence[str]) -> str:
    """The stage at work, or the last one."""
    return next((name for name in names if name not in run.done), names[-1])


def _row_at_work(run: Run, stage: str) -> MachineRow | None:
    """The machine whose job belongs to the stage."""
    rows = [row for row in run.machines if row.state is State.LIVE and "job" in row.facts]
    return next((row for row in rows if str(row.facts["job"]).rpartition("-")[0] == stage), None)


def _works_alone(run: Run) -> bool:
    """Whether a rented machine may go on without its client."""
    return any(row.order["offer"]["infra"] != "local" for row in run.live)


class _Reader:
    """The log of one stage, from the bucket and its machine."""

    def __init__(self, bucket: Bucket, stage: str, last: int) -> None:
        self._bucket, self._stage, self._last = bucket, stage, last
        self._stored: list[str] = []
        self._known: tuple[str, bool] = ("", False)
        self._read: Mark | None = None
        self._tape = Tape()
        self._before: dict[str, Tape] = {}  # what a machine printed before its attempt began, by job

    def is_due(self, clock: Clock) -> bool:
        return self._read is None or age_s(self._read, clock.mark()) >= LOOK_S

    def read(self, clock: Clock, *, whole: bool) -> None:
        """A log that is not there yet, or a bucket that does not answer, changes nothing.

        Without `whole` a last line that has no end yet is left for later.
        """
        self._read, key = clock.mark(), f"{self._stage}/{LOG_FILE}"
        try:
            found = self._bucket.head(key)
            if found is not None and (found.etag, whole) != self._known:
                data, stat = self._bucket.get(key)
                ends = whole or data.endswith((b"\n", b"\r"))
                self._stored, self._known = lines_of(data)[: None if ends else -1], (stat.etag, whole)
        except BucketError:
            return

    def fresh(self, row: MachineRow | None, printed: Sequence[str]) -> Iterator[str]:
        """Lines nobody was told yet; what the machine prints before the attempt begins comes first."""
        lines = self._stored
        if row is not None and printed:
            job, attempt = str(row.facts["job"]), int(str(row.facts["job"]).rpartition("-")[2])
            before, _ = split_at_attempt(printed, self._stage, attempt)
            yield from self._before.setdefault(job, Tape()).fresh(before)
            lines = joined(self._stored, printed, self._stage, attempt)
        new = self._tape.fresh(lines)
        if self._last and new:
            new, self._last = new[-self._last :], 0
        yield from new


class _Machine:
    """What the job on a machine has printed, as its provider tells it; nothing where it does not."""

    def __init__(self, provider: Provisioner | None, clock: Clock) -> None:
        self._clock = clock
        self._provider = provider and Guarded(provider, lambda: clock.mark().wall, limit_s=MACHINE_LIMIT_S)
        self._asked: tuple[str, Mark, float] | None = None
        self._lines: list[str] = []
        self._sure: list[str] = []

    def lines(self, row: MachineRow | None) -> list[str]:
        """Without a last line that may still be half written: one that was there twice is whole."""
        if row is None or self._provider is None:
            return []
        now, job = self._clock.mark(), f"{row.name} {row.facts['job']}"
        if self._asked is None or self._asked[0] != job:
            self._lines, self._sure = [], []
        elif age_s(self._asked[1], now) < self._asked[2]:
            return self._sure
        pause = NEAR_S if row.order["offer"]["infra"] == "local" else FAR_S
        try:
            found = list(self._provider.logs(row.name, str(row.facts["job"]))) or self._lines
            self._sure = found if found == self._lines else found[:-1]
            self._lines = found
        except ProvisionError:
            pause = REST_S
        self._asked = (job, self._clock.mark(), pause)
        return self._sure
