"""Which choice of each stage costs least together within the deadline, and what would an hour less cost? Pure, exact.

Every stage has options of a cost and a time. One that is neither cheaper nor faster than another is never needed; what
stays is a front, cheapest and slowest first. Stages follow one another, so costs and times add up. The work of each
must be done some time before the deadline, so much as its machine may take to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

ROUNDING = 1e-9  # sums of hours in another order differ by less, as a share
MOST_POINTS = 500  # of a front of whole plans: between two of so many nobody chooses


@dataclass(frozen=True)
class Point:
    """An option: what it costs (integer micro-USD), how long it takes, whatever it stands for, and how long before the
    deadline it must be done."""

    micros: int
    hours: float
    what: Any = None
    ending_hours: float = 0.0


Path = tuple[Any, ...]  # (path before, point), empty at the start: shared by all that begin alike


@dataclass(frozen=True)
class _Partial:
    micros: int
    hours: float
    path: Path = ()


def front_of(points: Iterable[Point]) -> list[Point]:
    """Those that are worth a look, cheapest first; each is faster, or ends sooner, than all before it. Of equal ones
    the first."""
    found: list[Point] = []
    for one in sorted(points, key=lambda one: (one.micros, one.hours, one.ending_hours)):
        if not any(other.hours <= one.hours and other.ending_hours <= one.ending_hours for other in found):
            found.append(one)
    return found


def needed_hours(times: Iterable[tuple[float, float]]) -> float:
    """The shortest deadline for stages of (hours, hours before the deadline at which they must be done)."""
    total = most = 0.0
    for hours, ending_hours in times:
        total += hours
        most = max(most, total + ending_hours)
    return most


def fastest(fronts: Sequence[Sequence[Point]]) -> list[Point]:
    """A point of each front: those of the shortest deadline, the cheaper of equals."""
    found: list[Point] = []
    rest = 0.0
    for front in reversed(fronts):
        best = min(front, key=lambda one: (one.hours + max(one.ending_hours, rest), one.micros))
        rest = best.hours + max(best.ending_hours, rest)
        found.append(best)
    return found[::-1]


def cheapest_in_time(fronts: Sequence[Sequence[Point]], limit_hours: float | None) -> list[Point] | None:
    """A point of each front: together the cheapest in time, the faster of equals. None when not even the fastest are.

    Fronts are merged stage by stage; a beginning is dropped where no end can be in time, or where it costs more than a
    plan already known even if the rest had its time at the price of an hour at which that plan stopped.
    """
    first = [front[0] for front in fronts]
    if limit_hours is None or _needed(first) <= limit_hours:
        return first
    soonest, slack = fastest(fronts), ROUNDING * max(1.0, limit_hours)
    if _needed(soonest) > limit_hours + slack:
        return None
    known, rate = _hurried(fronts, limit_hours)
    if known is None and _needed(soonest) <= limit_hours:
        known = soonest
    most = math.inf if known is None else sum(one.micros for one in known)
    rest, least = [0.0], [0.0]  # of the stages still to come, in reverse: the time they need, and what they cost
    for front in reversed(fronts):
        rest.append(min(one.hours + max(one.ending_hours, rest[-1]) for one in front))
        least.append(least[-1] + min(one.micros + rate * one.hours for one in front))
    worked = limit_hours - min(one.ending_hours for one in fronts[-1])
    beginnings = [_Partial(0, 0.0)]
    for index, front in enumerate(fronts):
        to_come = len(fronts) - index - 1
        latest = limit_hours + slack - rest[to_come]
        bound = most + rate * worked - least[to_come]
        bound += ROUNDING * max(1.0, abs(bound)) if known else 0.0
        beginnings = _front(
            longer
            for longer in _in_time(beginnings, front, limit_hours)
            if longer.hours <= latest and longer.micros + rate * longer.hours <= bound
        )
    best = min(beginnings, key=lambda one: (one.micros, one.hours), default=None)
    return known if best is None else _points(best.path)


def whole_front(fronts: Sequence[Sequence[Point]], most: int = MOST_POINTS) -> list[list[Point]]:
    """A point of each front, for each plan that no other beats in both cost and time, cheapest first.

    Of more than `most`, at any stage, the cheapest in each of so many equal spans of time, and the fastest: the ends
    stay exact, and between them a plan may be dearer than the one that would be there, by what a span is worth.
    """
    plans = [_Partial(0, 0.0)]
    for front in fronts:
        plans = _thinned(_front(_longer(plans, front)), most)
    return [_points(one.path) for one in plans]


def _needed(points: Iterable[Point]) -> float:
    return needed_hours((one.hours, one.ending_hours) for one in points)


def _longer(beginnings: Iterable[_Partial], front: Sequence[Point]) -> Iterable[_Partial]:
    return (
        _Partial(before.micros + one.micros, before.hours + one.hours, (before.path, one))
        for before in beginnings
        for one in front
    )


def _in_time(beginnings: Iterable[_Partial], front: Sequence[Point], limit_hours: float) -> Iterable[_Partial]:
    return (
        _Partial(before.micros + one.micros, hours, (before.path, one))
        for before in beginnings
        for one in front
        if (hours := before.hours + one.hours) + one.ending_hours <= limit_hours
    )


def _front(partials: Iterable[_Partial]) -> list[_Partial]:
    found: list[_Partial] = []
    for one in sorted(partials, key=lambda one: (one.micros, one.hours)):
        if not found or one.hours < found[-1].hours:
            found.append(one)
    return found


def _points(path: Path) -> list[Point]:
    found: list[Point] = []
    while path:
        path, point = path
        found.append(point)
    return found[::-1]


def _thinned(plans: list[_Partial], most: int) -> list[_Partial]:
    if len(plans) <= most:
        return plans
    fastest, slowest = plans[-1].hours, plans[0].hours
    width = (slowest - fastest) / (most - 1)
    spans: dict[int, _Partial] = {}
    for one in plans:  # cheapest first, so the first of a span is its cheapest
        spans.setdefault(int((one.hours - fastest) / width), one)
    return _front([*spans.values(), plans[-1]])


def _hurried(fronts: Sequence[Sequence[Point]], limit_hours: float) -> tuple[list[Point] | None, float]:
    """(a plan in time, or None, and what it paid for an hour at last): from the cheapest, always the step that pays
    least for an hour saved. The steps are those along the lower hull of each front, whose prices rise."""
    hulls = [_hull(front) for front in fronts]
    steps = sorted(
        ((later.micros - one.micros) / (one.hours - later.hours), index, position)
        for index, hull in enumerate(hulls)
        for position, (one, later) in enumerate(pairwise(hull), start=1)
    )
    taken = [hull[0] for hull in hulls]
    paid = 0.0
    for price, index, position in steps:
        taken[index], paid = hulls[index][position], price
        if _needed(taken) <= limit_hours:
            return taken, paid
    return None, paid


def _hull(front: Sequence[Point]) -> list[Point]:
    """The points at which the price of an hour rises, cheapest first."""
    found: list[Point] = []
    for one in front:
        if found and one.hours >= found[-1].hours:
            continue
        while len(found) > 1 and _cross(found[-2], found[-1], one) <= 0:
            found.pop()
        found.append(one)
    return found


def _cross(first: Point, second: Point, third: Point) -> float:
    """Above 0 where an hour saved costs more from the second to the third than from the first to the second."""
    return (third.micros - second.micros) * (first.hours - second.hours) - (second.micros - first.micros) * (
        second.hours - third.hours
    )
