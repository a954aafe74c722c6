"""Choices of several stages together: exactly the cheapest in time, and all that are worth a look."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.fronts import Point, Spans, apart, cheapest_in_time, fastest, front_of, needed_hours, whole_front

hours = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, 3.1])
points = st.builds(Point, st.integers(0, 12), hours, ending_hours=st.sampled_from([0.0, 0.1, 0.3, 1.5]))
stages = st.lists(st.lists(points, min_size=1, max_size=5), min_size=1, max_size=4)


def total(chosen: list[Point] | tuple[Point, ...]) -> tuple[int, float]:
    return sum(one.micros for one in chosen), sum((one.hours for one in chosen), 0.0)


def needed(chosen: list[Point] | tuple[Point, ...]) -> float:
    return needed_hours((one.hours, one.ending_hours) for one in chosen)


def test_each_stage_must_be_done_before_the_deadline_by_what_its_machine_takes_to_end() -> None:
    assert needed_hours([]) == 0.0
    assert needed_hours([(2.0, 0.0), (1.0, 0.5)]) == 3.5
    assert needed_hours([(2.0, 1.5), (1.0, 0.25)]) == 3.5  # the first: 2 + 1.5; the second: 3 + 0.25


@given(stages, st.floats(0.1, 10))
@settings(max_examples=400)
@example([[Point(0, 2.0), Point(5, 1.0), Point(6, 0.5)], [Point(0, 2.0), Point(4, 1.0)]], 2.5)
@example([[Point(0, 2.0, None, 1.0)], [Point(0, 0.5, None, 0.4), Point(1, 0.5, None, 0.1)]], 3.0)
@example([[Point(0, 2.0, None, 1.5), Point(2, 2.5, None, 0.5)], [Point(0, 0.1)]], 3.0)
def test_the_cheapest_in_time_is_that_of_all_assignments(options: list[list[Point]], limit: float) -> None:
    """The examples: steps that pay least for an hour end at 9 and more, 6 is right; a machine that ends late at the
    end, and one before the end."""
    in_time = [total(chosen) for chosen in itertools.product(*options) if needed(chosen) <= limit]
    found = cheapest_in_time(apart(front_of(one) for one in options), limit)
    assert (None if found is None else total(found)) == min(in_time, default=None)


@given(stages)
def test_the_fastest_need_the_shortest_deadline_of_all_assignments(options: list[list[Point]]) -> None:
    found = needed(fastest(apart(front_of(one) for one in options)))
    assert found == pytest.approx(min(needed(chosen) for chosen in itertools.product(*options)))


@given(stages)
def test_without_a_limit_each_stage_takes_its_cheapest(options: list[list[Point]]) -> None:
    found = cheapest_in_time(apart(front_of(one) for one in options), None)
    assert found == [min(one, key=lambda point: (point.micros, point.hours, point.ending_hours)) for one in options]


@given(stages)
@settings(max_examples=200)
def test_the_front_holds_each_plan_that_no_other_beats_and_no_other(options: list[list[Point]]) -> None:
    plans = {total(chosen) for chosen in itertools.product(*options)}
    unbeaten = {
        one for one in plans if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in plans)
    }
    found = [total(chosen) for chosen in whole_front(apart(front_of(one) for one in options))]
    assert len(found) == len(set(found)) and set(found) == unbeaten
    assert found == sorted(found)


@st.composite
def shared(draw: st.DrawFn) -> Spans:
    """Some stages, each with options of its own, and some rows of them with options together."""
    count = draw(st.integers(1, 4))
    spans: list[dict[int, list[Point]]] = []
    for at in range(count):
        ends = {at + 1, *draw(st.sets(st.integers(at + 1, count)))}
        spans.append({end: draw(st.lists(points, min_size=1, max_size=4)) for end in sorted(ends)})
    return spans


def all_ways(spans: Spans, at: int = 0) -> Iterator[tuple[Point, ...]]:
    """Every way to part the stages into rows, with every option of each row."""
    if at == len(spans):
        yield ()
        return
    for end, options in spans[at].items():
        for one, rest in itertools.product(options, all_ways(spans, end)):
            yield (one, *rest)


def fronts_of(spans: Spans) -> Spans:
    return [{end: front_of(options) for end, options in by_end.items()} for by_end in spans]


@given(shared(), st.floats(0.1, 8))
@settings(max_examples=600)
def test_stages_that_share_machines_are_the_cheapest_in_time_of_all_ways_to_part_them(
    spans: Spans, limit: float
) -> None:
    ways = list(all_ways(spans))
    found = cheapest_in_time(fronts_of(spans), limit)
    in_time = [total(chosen) for chosen in ways if needed(chosen) <= limit]
    assert (None if found is None else total(found)) == min(in_time, default=None)
    free = cheapest_in_time(fronts_of(spans), None)
    assert free is not None and total(free) == pytest.approx(min(total(chosen) for chosen in ways))
    assert needed(fastest(fronts_of(spans))) == pytest.approx(min(needed(chosen) for chosen in ways))


@given(shared())
@settings(max_examples=300)
def test_the_front_of_stages_that_share_machines_holds_each_plan_that_no_other_beats(spans: Spans) -> None:
    plans = {total(chosen) for chosen in all_ways(spans)}
    unbeaten = {
        one for one in plans if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in plans)
    }
    assert {total(chosen) for chosen in whole_front(fronts_of(spans))} == unbeaten


def test_a_large_front_keeps_both_ends_and_some_between() -> None:
    draw = random.Random(1)
    fronts = [
        front_of(Point(round(1e6 / hours), hours) for hours in (draw.uniform(1, 2) for _ in range(8))) for _ in range(5)
    ]
    whole, few = ([total(one) for one in whole_front(apart(fronts), most=most)] for most in (10**6, 20))
    assert len(whole) > 60 and 10 < len(few) <= 21
    assert few[0] == whole[0] and few[-1] == whole[-1]
    assert [cost for cost, _ in few] == sorted({cost for cost, _ in few})
    assert [hours for _, hours in few] == sorted((hours for _, hours in few), reverse=True)


def test_twenty_stages_with_forty_options_each_are_searched_in_a_moment() -> None:
    draw = random.Random(2)
    fronts = [
        front_of(Point(round(1e7 / (hours + draw.random() / 9)), hours) for hours in (draw.random() for _ in range(40)))
        for _ in range(20)
    ]
    slowest, fastest = (sum(front[at].hours for front in fronts) for at in (0, -1))
    for share in (0.1, 0.4, 0.8):
        limit = fastest + share * (slowest - fastest)
        started = time.process_time()
        found = cheapest_in_time(apart(fronts), limit)
        assert time.process_time() - started < 5  # tenths of a second, where every combination would be 40 ** 20
        assert found is not None and total(found)[1] <= limit
