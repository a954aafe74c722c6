"""What follows from how a stage's attempts ended: try again, move to the next offer, or end the run? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tasks.contract import Exit

STALLS_ALLOWED = 1  # a stall is tried again once: a second one is the work's own fault
UNPREPARED = 69  # the job's status where a machine could not be given its packages (tasks/bootstrap.py: NO_PACKAGES)
UNPREPARED_ALLOWED = 2  # an old driver, a full disk, no way to PyPI: the next offer may differ, a third one will not
FRUITLESS_ALLOWED = 8  # attempts in a row that ended without a new checkpoint, where money sets no bound
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 30.0, 60.0)


class Fate(StrEnum):
    TRY = "try"
    CAP = "cap"
    DEADLINE = "deadline"
    FAILED = "failed"
    NO_CAPACITY = "no_capacity"


@dataclass(frozen=True)
class Attempt:
    """How one machine of the stage ended. `rc` None: its job never reported. `came_up` False: never got a machine."""

    offer_index: int
    came_up: bool
    rc: int | None
    reason: str
    message: str = ""
    hint: str = ""
    bound: str = "cap"  # what limited its lifetime: cap | month | deadline | limit
    time_used_up: bool = False
    checkpoint: str | None = None
    user_stop: bool = False
    lost: bool = False  # taken away by its provider
    billed_s: float = 0.0
    share: float | None = None  # of the stage's work that was done when it ended; None = not known
    short: str = ""  # it was ended since its stage would not have been finished: what that means, in words


@dataclass(frozen=True)
class Candidate:
    """One offer of the plan: what finishing the whole stage there takes."""

    micros_per_hour: int
    hours: float
    spot: bool


@dataclass(frozen=True)
class Verdict:
    fate: Fate
    offer_index: int = 0
    wait_s: float = 0.0
    message: str = ""
    hint: str = ""


def verdict(attempts: Sequence[Attempt], candidates: Sequence[Candidate]) -> Verdict:
    """What to do after these attempts (oldest first) of a stage whose candidates are ranked by the plan."""
    if not attempts:
        return Verdict(Fate.TRY)
    last = attempts[-1]
    if last.short:
        fate = Fate.DEADLINE if last.bound == "deadline" else Fate.CAP
        return Verdict(fate, message=last.short, hint=last.hint)
    if last.rc == Exit.DEADLINE or last.time_used_up:
        return _out_of_time(last)
    if last.rc in (Exit.BUG, Exit.BAD_INPUT):
        return Verdict(Fate.FAILED, message=last.message or last.reason, hint=last.hint)
    if last.rc == Exit.DONE:
        return Verdict(
            Fate.FAILED,
            message="its job ended well but left no committed result",
            hint="look at `kdcloud logs`; the bucket may have lost an upload",
        )
    if last.rc == Exit.STALLED and sum(a.rc == Exit.STALLED for a in attempts) > STALLS_ALLOWED:
        return Verdict(
            Fate.FAILED,
            message=f"it stalled {STALLS_ALLOWED + 1} times: {last.message or 'no progress'}",
            hint="look at `kdcloud logs`; a longer `idle` helps only if the work is honestly slow",
        )
    unprepared = sum(a.rc == UNPREPARED for a in attempts)
    if last.rc == UNPREPARED and unprepared > UNPREPARED_ALLOWED:
        return Verdict(
            Fate.FAILED,
            message=f"{unprepared} machines could not be given their packages",
            hint="`kdcloud logs` says why: an old driver, a full disk, no way to PyPI; allow other gpus or infra",
        )
    refused = sum(1 for a in attempts if not a.came_up and not a.user_stop)
    if refused >= len(candidates):
        return Verdict(
            Fate.NO_CAPACITY,
            message=f"none of {len(candidates)} offers could be had ({last.reason})",
            hint="try again later, or allow more gpus or infra in the recipe",
        )
    index = next_offer(attempts, candidates)
    fruitless = _fruitless(attempts, candidates)
    if fruitless >= FRUITLESS_ALLOWED:
        return Verdict(
            Fate.FAILED,
            message=f"{fruitless} attempts in a row ended without a new checkpoint ({last.reason})",
            hint="look at `kdcloud logs`; checkpoint more often on machines that are taken away",
        )
    return Verdict(
        Fate.TRY,
        offer_index=index,
        wait_s=BACKOFF_S[min(fruitless, len(BACKOFF_S) - 1)] if not last.user_stop else 0.0,
    )


def _out_of_time(last: Attempt) -> Verdict:
    match last.bound:
        case "deadline":
            return Verdict(
                Fate.DEADLINE,
                message="the deadline was reached",
                hint="resume it with a later --deadline; its checkpoint is kept",
            )
        case "month":
            return Verdict(
                Fate.CAP,
                message="this month's budget was reached",
                hint="raise it with `kdcloud budget --month AMOUNT`, then resume; its checkpoint is kept",
            )
        case "cap":
            return Verdict(
                Fate.CAP, message="the cap was reached", hint="resume it with a larger --budget; its checkpoint is kept"
            )
        case _:
            return Verdict(
                Fate.FAILED, message="it ran longer than any machine may", hint="split the stage, or use a faster GPU"
            )


def next_offer(attempts: Sequence[Attempt], candidates: Sequence[Candidate]) -> int:
    """Index of the candidate to try: the plan's order, until finishing on spot is expected to cost more than elsewhere.

    Spot is judged by what it did here: hours of work it brought for the hours it was paid for.
    """
    refused = {a.offer_index for a in attempts if (not a.came_up and not a.user_stop) or a.rc == UNPREPARED}
    left = [index for index in range(len(candidates)) if index not in refused] or [len(candidates) - 1]
    efficiency = spot_efficiency(attempts, candidates)
    if efficiency is None:
        return left[0]
    share = max((a.share or 0.0 for a in attempts), default=0.0)

    def cost(index: int) -> float:
        one = candidates[index]
        whole = (1.0 - share) * one.hours * one.micros_per_hour
        if not one.spot:
            return whole
        return whole / efficiency if efficiency > 0 else float("inf")

    best = min(cost(index) for index in left)
    return next(index for index in left if cost(index) == best)


def spot_efficiency(attempts: Sequence[Attempt], candidates: Sequence[Candidate]) -> float | None:
    """Work done over time paid on spot, 0 to 1; None before the first spot machine was taken away."""
    if not any(a.lost and candidates[a.offer_index].spot for a in attempts):
        return None
    useful = paid = before = 0.0
    for attempt in attempts:
        share = max(before, attempt.share or 0.0)
        one = candidates[attempt.offer_index]
        if one.spot:
            useful += (share - before) * one.hours
            paid += attempt.billed_s / 3600
        before = share
    return min(1.0, useful / paid) if paid else 1.0


def _fruitless(attempts: Sequence[Attempt], candidates: Sequence[Candidate]) -> int:
    """Attempts at the end of the list that left no checkpoint newer than the one before them.

    A machine that was taken away and cost money counts for nothing: the cap bounds those.
    """
    count = 0
    best = None
    for attempt in attempts:
        if attempt.user_stop:
            count = 0
        elif attempt.lost and candidates[attempt.offer_index].micros_per_hour > 0:
            best = attempt.checkpoint or best
        elif attempt.checkpoint is not None and attempt.checkpoint != best:
            best, count = attempt.checkpoint, 0
        else:
            count += 1
    return count
