"""What follows from how attempts ended."""

from __future__ import annotations

import pytest

from orchestrator.attempts import FRUITLESS_ALLOWED, Attempt, Fate, verdict
from tasks.contract import Exit


def attempt(rc: int | None = None, **changes: object) -> Attempt:
    values: dict[str, object] = {"offer_index": 0, "came_up": True, "rc": rc, "reason": "r"}
    return Attempt(**{**values, **changes})  # type: ignore[arg-type]


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
    ([attempt(None)] * FRUITLESS_ALLOWED, Fate.FAILED),
    ([attempt(None, checkpoint=f"s{i}") for i in range(50)], Fate.TRY),  # bounded by money, not by a counter
    ([attempt(None, user_stop=True, came_up=False)] * 20, Fate.TRY),  # stopping is nobody's fault
]


@pytest.mark.parametrize(("attempts", "fate"), CASES)
def test_fate(attempts, fate):
    assert verdict(attempts, offers=2).fate is fate


def test_an_offer_that_cannot_be_had_is_followed_by_the_next_and_a_lost_machine_by_the_same():
    assert verdict([attempt(None, came_up=False)], offers=2).offer_index == 1
    assert verdict([attempt(None)], offers=2).offer_index == 0


def test_fruitless_attempts_wait_longer_and_longer():
    waits = [verdict([attempt(None)] * n, offers=2).wait_s for n in range(1, FRUITLESS_ALLOWED)]
    assert waits == sorted(waits) and waits[-1] > waits[0]
