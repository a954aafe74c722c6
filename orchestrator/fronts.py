"""Which choice for each stage costs least together within the deadline, and what would an hour less cost? Pure, exact.

Every stage has options of a cost and a time; one that is neither cheaper nor faster than another is never needed, and
what stays is a front, cheapest and slowest first. Stages in a row may have options together, on one machine: `Spans`.
Stages follow one another, so costs and times add up. The work on each machine must be done some time before the
deadline, so much as the machine may take to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

ROUNDING = 1e-9  # sums of hours in another order differ by less, as a share
MOST_POINTS = 500  # of a front of whole plans: between two of so many nobody chooses
MOST_RATES = 50  # prices of an hour that are tried; each halves what is left, or nearly


@dataclass(frozen=True)
class Point:
    """An option: what it costs (integer micro-USD), how long it takes, whatever it stands for, and how long before the
    deadline it must be done."""

    micros: int
    hours: float
    what: Any = None
    ending_hours: float = 0.0


Spans = Sequence[Mapping[int, Sequence[Point]]]  # Spans[i][j]: the front of stages i to j - 1 on one machine
Path = tuple[Any, ...]  # (path before, point), empty at the start: shared by all that begin alike
Partial = tuple[int, float, Path]  # micros, hours
Row = tuple[Any, ...]  # of a point that is not made yet
_cost_and_time = itemgetter(0, 1)
_row_order = itemgetter(0, 1, 2, 3)


def front_of(points: Iterable[Point]) -> list[Point]:
    """Those that are worth a look, cheapest first; each is faster, or ends sooner, than all before it. Of equal ones
    the first."""
    rows = [(one.micros, one.hours, one.ending_hours, which, one) for which, one in enumerate(points)]
    return [row[-1] for row in worth_a_look(rows)]


def worth_a_look(rows: Iterable[Row]) -> list[Row]:
    """The same of rows (micros, hours, ending_hours, which, ...), `which` in their order: before they are points."""
    found: list[Row] = []
    soonest: dict[float, float] = {}  # by ending_hours: the fewest hours so far
    for one in sorted(rows, key=_row_order):
        hours, ending_hours = one[1], one[2]
        if hours >= soonest.get(ending_hours, math.inf):
            continue
        if all(hours < fewest or ending_hours < ending for ending, fewest in soonest.items()):
            soonest[ending_hours] = hours
            found.append(one)
    return found


def apart(fronts: Iterable[Sequence[Point]]) -> Spans:
    """Spans of stages that share no machine."""
    return [{at: front} for at, front in enumerate(fronts, start=1)]


def needed_hours(times: Iterable[tuple[float, float]]) -> float:
    """The shortest deadline for stages of (hours, hours before the deadline at which they must be done)."""
    total = most = 0.0
    for hours, ending_hours in times:
        total += hours
        most = max(most, total + ending_hours)
    return most


def fastest(spans: Spans) -> list[Point]:
    """Those of the shortest deadline, the cheaper of equals."""
    ends: list[tuple[float, int]] = [(0.0, 0)] * (len(spans) + 1)
    steps: list[tuple[int, Point]] = []
    for at in range(len(spans) - 1, -1, -1):
        found = [
            (one.hours + max(one.ending_hours, ends[end][0]), one.micros + ends[end][1], end, one)
            for end, front in spans[at].items()
            for one in front
        ]
        hours, micros, end, one = min(found, key=_cost_and_time)
        ends[at] = (hours, micros)
        steps.append((end, one))
    return _walked(steps[::-1])


def cheapest_in_time(spans: Spans, limit_hours: float | None) -> list[Point] | None:
    """Together the cheapest in time, the faster of equals. None when not even the fastest are in time.

    Fronts are merged stage by stage; a beginning is dropped where no end can be in time, or where it costs more than a
    plan already known even if the rest had its time at the price of an hour at which that plan stopped.
    """
    first = _least(spans, 0.0)
    if limit_hours is None or _needed(first) <= limit_hours:
        return first
    soonest, slack = fastest(spans), ROUNDING * max(1.0, limit_hours)
    if _needed(soonest) > limit_hours + slack:
        return None
    known, rate = _hurried(spans, limit_hours, first, soonest)
    most = math.inf if known is None else sum(one.micros for one in known)
    latest, least, worked = _bounds(spans, rate)
    starts: list[list[Partial]] = [[(0, 0.0, ())], *([] for _ in spans)]
    for at, by_end in enumerate(spans):
        before = _front(starts[at])
        for end, front in by_end.items():
            by = limit_hours + slack - latest[end]
            bound = most + rate * (limit_hours - worked) - least[end]
            bound += ROUNDING * max(1.0, abs(bound)) if known else 0.0
            starts[end] += [
                (micros, hours, (path, one))
                for so_far, until, path in before
                for one in front
                if (hours := until + one.hours) + one.ending_hours <= limit_hours
                and hours <= by
                and (micros := so_far + one.micros) + rate * hours <= bound
            ]
    best = min(starts[-1], key=_cost_and_time, default=None)
    return known if best is None else _points(best[2])


def whole_front(spans: Spans, most: int = MOST_POINTS) -> list[list[Point]]:
    """The points of each plan that no other beats in both cost and time, cheapest first.

    Of more than `most`, at any stage, the cheapest in each of so many equal spans of time, and the fastest: the ends
    stay exact, and between them a plan may be dearer than the one that would be there, by what a span is worth.
    """
    starts: list[list[Partial]] = [[(0, 0.0, ())], *([] for _ in spans)]
    for at, by_end in enumerate(spans):
        before = _thinned(_front(starts[at]), most)
        for end, front in by_end.items():
            longer = [(so_far + p.micros, until + p.hours, (path, p)) for so_far, until, path in before for p in front]
            starts[end] = _front([*starts[end], *longer])
    return [_points(path) for _, _, path in _thinned(_front(starts[-1]), most)]


def _needed(points: Iterable[Point]) -> float:
    return needed_hours((one.hours, one.ending_hours) for one in points)


def _least(spans: Spans, rate: float) -> list[Point]:
    """Those that cost least where an hour costs `rate` more; at 0 the faster of equals."""
    best: list[tuple[float, float]] = [(0.0, 0.0)] * (len(spans) + 1)
    steps: list[tuple[int, Point]] = []
    for at in range(len(spans) - 1, -1, -1):
        found = [
            (one.micros + rate * one.hours + best[end][0], one.hours + best[end][1], end, one)
            for end, front in spans[at].items()
            for one in (front if rate else front[:1])
        ]
        cost, hours, end, one = min(found, key=_cost_and_time)
        best[at] = (cost, hours)
        steps.append((end, one))
    return _walked(steps[::-1])


def _walked(steps: Sequence[tuple[int, Point]]) -> list[Point]:
    """`steps`: from each stage the point to take, and the stage after it."""
    found, at = [], 0
    while at < len(steps):
        at, point = steps[at]
        found.append(point)
    return found


def _bounds(spans: Spans, rate: float) -> tuple[list[float], list[float], float]:
    """For each stage and the end: the time that is needed from there on, and the least that it costs where an hour
    costs `rate` more. Then: how long before the deadline all work is done at the latest."""
    latest, least = [0.0] * (len(spans) + 1), [0.0] * (len(spans) + 1)
    last = math.inf
    for at in range(len(spans) - 1, -1, -1):
        pairs = [(end, one) for end, front in spans[at].items() for one in front]
        latest[at] = min(one.hours + max(one.ending_hours, latest[end]) for end, one in pairs)
        least[at] = min(one.micros + rate * one.hours + least[end] for end, one in pairs)
        last = min([last, *(one.ending_hours for end, one in pairs if end == len(spans))])
    return latest, least, last


def _hurried(
    spans: Spans, limit_hours: float, slow: list[Point], soon: list[Point]
) -> tuple[list[Point] | None, float]:
    """(a plan in time, or None, and the price of an hour at which it was found): between a plan that is too slow and
    the soonest one, that price is tried at which both cost the same, until nothing costs less there."""
    known, rate = soon if _needed(soon) <= limit_hours else None, 0.0
    for _ in range(MOST_RATES):
        more, saved = _micros(soon) - _micros(slow), _hours(slow) - _hours(soon)
        if more <= 0 or saved <= 0:
            break
        rate = more / saved
        found = _least(spans, rate)
        if _micros(found) + rate * _hours(found) >= (_micros(slow) + rate * _hours(slow)) * (1 - ROUNDING):
            break
        if _needed(found) <= limit_hours:
            known = soon = found
        else:
            slow = found
    return known, rate


def _micros(points: Iterable[Point]) -> int:
    return sum(one.micros for one in points)


def _hours(points: Iterable[Point]) -> float:
    return sum((one.hours for one in points), 0.0)


def _front(partials: Iterable[Partial]) -> list[Partial]:
    found: list[Partial] = []
    fastest_hours = math.inf
    for one in sorted(partials, key=_cost_and_time):
        if one[1] < fastest_hours:
            fastest_hours = one[1]
            found.append(one)
    return found


def _points(path: Path) -> list[Point]:
    found: list[Point] = []
    while path:
        path, point = path
        found.append(point)
    return found[::-1]


def _thinned(plans: list[Partial], most: int) -> list[Partial]:
    if len(plans) <= most:
        return plans
    soonest, slowest = plans[-1][1], plans[0][1]
    width = (slowest - soonest) / (most - 1)
    kept: dict[int, Partial] = {}
    for one in plans:  # cheapest first, so the first of a span of time is its cheapest
        kept.setdefault(int((one[1] - soonest) / width), one)
    return _front([*kept.values(), plans[-1]])
