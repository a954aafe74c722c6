"""When is a run done, and what will it have cost? Pure: by the plan at first, then by what its stages show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator import spend
from orchestrator.plan import Micros, Plan, Range, StagePlan
from orchestrator.provision import Offer
from orchestrator.spend import ApiLine
from tasks.contract import Progress

# The phase that is the work of a stage, where its progress is counted from its begin to its end.
WORK_PHASES = {
    "rehearse": "rehearse",
    "train": "train",
    "pretrain": "train",
    "label": "generate",
    "evaluate": "evaluate",
}
# How far the rest may be off, as a share of it: the more, the more is still unseen. Judged every second, training on
# two idle cores was off by up to 23 % at the beginning and 14 % half-way; on the same cores with ever changing company
# what was left lay within the range in 82 of 100 looks. Models of an evaluation, and shards of labels, differ more.
WIDTH_AT_END = 0.05
WIDTH_UNSEEN = {"evaluate": 0.6, "label": 0.5}
WIDTH_UNSEEN_ELSE = 0.25


def work_share(stage: StagePlan, progress: Progress | None) -> float | None:
    """The part of the stage that is done, 0 to 1; None where its progress does not say."""
    if progress is None or not progress.total or progress.phase != WORK_PHASES.get(stage.kind):
        return None
    return min(1.0, max(0.0, progress.done / progress.total))


def left_s(stage: StagePlan, hours: Range, age_s: float, progress: Progress | None) -> Range | None:
    """Seconds until the stage is done: by its speed, else what the plan's `hours` leave at this age of its machine.

    None where it takes longer than the plan thought possible and does not say how far it is.
    """
    by_speed = None if progress is None else _by_speed(stage, age_s, progress)
    if by_speed is not None:
        return by_speed
    if age_s > hours.high * 3600:
        return None
    low, expected, high = (max(0.0, value * 3600 - age_s) for value in (hours.low, hours.expected, hours.high))
    return Range(low, expected or high / 2, high)


def _by_speed(stage: StagePlan, age_s: float, progress: Progress) -> Range | None:
    """None before anything was seen of the phase that counts."""
    seen = progress.done - progress.phase_from
    if not progress.total or progress.phase != WORK_PHASES.get(stage.kind) or seen <= 0:
        return None
    spent_s = progress.phase_s
    if stage.kind == "evaluate":  # each of its models is also loaded and checked, in phases of their own
        spent_s = max(progress.work_s, age_s - stage.startup_hours.high * 3600)
    if spent_s <= 0:
        return None
    left = max(0.0, progress.total - progress.done)
    unseen = left / (seen + left)
    width = min(0.9, WIDTH_AT_END + WIDTH_UNSEEN.get(stage.kind, WIDTH_UNSEEN_ELSE) * unseen)
    expected = left * spent_s / seen
    return Range(expected * (1 - width), expected, expected * (1 + width))


def together(parts: Iterable[Range | None]) -> Range | None:
    """The sum; None where a part is not known."""
    total = Range(0.0, 0.0, 0.0)
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def machine_micros(offer: Offer, *, age_s: float, left: Range | None, reserved: int) -> Micros:
    """What a machine will have cost when its stage is done; never more than it has reserved.

    Where nobody knows how long that takes: as long again as it took, and at most all of its reservation.
    """
    now = min(reserved, spend.cost_micros(offer, age_s))
    if left is None:
        return Micros(now, min(reserved, spend.cost_micros(offer, 2 * age_s)), reserved)
    low, expected, high = (
        min(reserved, spend.cost_micros(offer, age_s + s)) for s in (left.low, left.expected, left.high)
    )
    return Micros(max(now, low), max(now, expected), max(now, high))


def total_micros(
    plan: Plan,
    *,
    spent: int,
    open_machines: Iterable[Micros],
    waiting: Iterable[StagePlan],
    apis: Mapping[str, ApiLine],
) -> Micros:
    """What the whole run will have cost: settled, machines that are there, stages to come, APIs, storage.

    An API counts as planned until it is settled: what it has cost by now only its stage knows.
    """
    total = Micros(spent, spent, spent)
    for part in open_machines:
        total += part
    for stage in waiting:
        total += stage.cost_micros
    for item in plan.overhead:
        line = apis.get(item.row)
        if line is None or line.open_micros or not line.settled_micros:
            total += item.cost_micros
    return total
