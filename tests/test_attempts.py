"""What follows from how attempts ended."""

from __future__ import annotations

import pytest

from orchestrator.attempts import FRUITLESS_ALLOWED, UNPREPARED, Attempt, Candidate, Fate, spot_efficiency, verdict
from tasks import bootstrap
from tasks.contract import Exit


def attempt(rc: int | None = None, **changes: object) -> Attempt:
    values: dict[str, object] = {"offer_index": 0, "came_up": True, "rc": rc, "reason": "r"}
    return Attempt(**{**values, **changes})  # type: ignore[arg-type]


TWO = [Candidate(500_000, 1.0, spot=False), Candidate(600_000, 1.0, spot=False)]
SPOT = Candidate(300_000, 1.0, spot=True)
ON_DEMAND = Candidate(1_000_000, 1.0, spot=False)
CASES = [
    ([], Fate.TRY),
    ([attempt(Exit.DEADLINE)], Fate.CAP),
    ([attempt(Exit.DEADLINE, bound="deadline")], Fate.DEADLINE),
    ([attempt(Exit.DEADLINE, bound="limit")], Fate.FAILED),
    ([attempt(None, time_used_up=True)], Fate.CAP),  # the client ended it: its supervisor was dead
    ([attempt(Exit.BUG)], Fate.FAILED),
    ([attempt(Exit.BAD_INPUT)], Fate.FAILED),
    ([attempt(Exit.DONE)], Fate.FAILED),  # said done, left no result
    ([attempt(Exit.STALLED)], Fate.TRY),
    ([attempt(Exit.STALLED), attempt(Exit.STALLED)], Fate.FAILED),
    ([attempt(None)], Fate.TRY),  # lost
    ([attempt(Exit.CLIENT_GONE)], Fate.TRY),
    ([attempt(Exit.TERMINATED)], Fate.TRY),
    ([attempt(Exit.REBOOTED)], Fate.TRY),
    ([attempt(None, came_up=False)], Fate.TRY),
    ([attempt(None, came_up=False), attempt(None, came_up=False)], Fate.NO_CAPACITY),
    ([attempt(UNPREPARED)], Fate.TRY),
    ([attempt(UNPREPARED), attempt(UNPREPARED, offer_index=1)], Fate.TRY),
    ([attempt(UNPREPARED)] * 3, Fate.FAILED),  # not as often as machines that are taken away: each is paid for
    ([attempt(None)] * FRUITLESS_ALLOWED, Fate.FAILED),
    ([attempt(None, checkpoint=f"s{i}") for i in range(50)], Fate.TRY),  # bounded by money, not by a counter
    ([attempt(None, lost=True)] * 50, Fate.TRY),  # taken away without a checkpoint: the cap bounds that too
    ([attempt(None, user_stop=True, came_up=False)] * 20, Fate.TRY),  # stopping is nobody's fault
]


@pytest.mark.parametrize(("attempts", "fate"), CASES)
def test_fate(attempts, fate):
    assert verdict(attempts, TWO).fate is fate


def test_an_offer_that_cannot_be_had_is_followed_by_the_next_and_a_lost_machine_by_the_same():
    assert verdict([attempt(None, came_up=False)], TWO).offer_index == 1
    assert verdict([attempt(None)], TWO).offer_index == 0


def test_an_offer_whose_machine_cannot_have_its_packages_is_followed_by_the_next():
    assert verdict([attempt(UNPREPARED)], TWO).offer_index == 1
    assert verdict([attempt(UNPREPARED)], TWO[:1]).offer_index == 0  # there is no other
    assert bootstrap.NO_PACKAGES == UNPREPARED


def test_fruitless_attempts_wait_longer_and_longer():
    waits = [verdict([attempt(None)] * n, TWO).wait_s for n in range(1, FRUITLESS_ALLOWED)]
    assert waits == sorted(waits) and waits[-1] > waits[0]


def taken(share: float, *, after_s: float = 3600.0) -> Attempt:
    return attempt(None, lost=True, billed_s=after_s, share=share, checkpoint=str(share))


@pytest.mark.parametrize(
    ("attempts", "index"),
    [
        ([], 0),
        ([taken(0.5)], 0),  # half the work for an hour: the rest costs 0.5 h / 0.5 * 0.3 = 0.30, on demand 0.50
        ([taken(0.2)], 1),  # a fifth: 0.8 / 0.2 * 0.3 = 1.20, on demand 0.80
        ([taken(0.2), taken(0.9)], 0),  # then it went better: 0.1 / 0.45 * 0.3 = 0.07, on demand 0.10
        ([taken(0.0)], 1),  # nothing at all
        ([taken(0.1), attempt(None, came_up=False, offer_index=1)], 0),  # on demand cannot be had
    ],
)
def test_spot_is_left_when_finishing_there_is_expected_to_cost_more_than_on_demand(attempts, index):
    assert verdict(attempts, [SPOT, ON_DEMAND]).offer_index == index


def test_how_well_spot_did_is_work_over_time_paid():
    assert spot_efficiency([], [SPOT]) is None
    assert spot_efficiency([taken(0.25), taken(0.5)], [SPOT]) == 0.25  # half the work of an hour for two hours
    assert spot_efficiency([attempt(None, lost=True)], [ON_DEMAND]) is None


def test_on_spot_alone_it_goes_on_until_the_money_ends():
    assert verdict([taken(0.0)] * 30, [SPOT]).fate is Fate.TRY
