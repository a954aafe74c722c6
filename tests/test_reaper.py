"""The reaper ends what was forgotten and harms nobody."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.names import machine_name
from orchestrator.provision import Job, Observation, Status
from orchestrator.reaper import Action, Heard, Known, judge
from orchestrator.states import State
from orchestrator.testing import START, fake_offer
from tests.plans import make_row

LATER, EARLIER = START + timedelta(hours=2), START - timedelta(hours=2)


def machine(owner: str = "owner1", deadline=LATER, created=EARLIER, state: Status = Status.RUNNING) -> Observation:
    return Observation(machine_name(owner, "r-abc123", "train", deadline), state, fake_offer(), created, Job(), START)


def knows(seen: Observation, state: State = State.LIVE, **changes: bool | None) -> dict[str, Known]:
    facts = {"ended": False, "driven": False, "stage_done": False, **changes}
    return {seen.name: Known(row=make_row(seen.name, state), **facts)}


CASES = [
    # machine, what is known of it -> action
    (machine(), {}, Action.ASK),  # an empty ledger beside a healthy run touches nothing
    (machine(deadline=EARLIER), {}, Action.END),
    (machine(deadline=START - timedelta(seconds=30)), {}, Action.ASK),  # its own supervisor comes first
    (machine(owner="other1"), {}, Action.FOREIGN),
    (machine(owner="other1", deadline=EARLIER), {}, Action.FOREIGN),  # somebody else's, never
    (machine(), {"driven": True}, Action.KEEP),
    (machine(deadline=EARLIER), {"driven": True}, Action.KEEP),  # its client ends it
    (machine(), {"driven": True, "outlived": True}, Action.END),  # whatever its client does, it does not end it
    (machine(), {"driven": None, "ended": True}, Action.KEEP),  # nobody can tell whether it is driven
    (machine(deadline=EARLIER), {"driven": None}, Action.END),
    (machine(), {"state": State.GONE}, Action.END),
    (machine(), {"ended": True}, Action.END),
    (machine(), {"stage_done": True}, Action.END),
    (machine(), {"state": State.CREATING}, Action.KEEP),
    (machine(deadline=EARLIER), {"state": State.CREATING}, Action.END),
]


@pytest.mark.parametrize(("seen", "facts", "action"), CASES)
def test_fate(seen, facts, action):
    known = knows(seen, **facts) if facts else {}
    (finding,) = judge([seen], known, owner="owner1", now=START)
    assert finding.action is action
    assert finding.why


HEARD = [
    # machine no run here knows, (driven, stage done) as its run's bucket has it -> action, and with --orphans
    (machine(), (True, False), Action.KEEP, Action.KEEP),  # a healthy run of another computer
    (machine(), (True, True), Action.KEEP, Action.KEEP),
    (machine(deadline=EARLIER), (True, False), Action.KEEP, Action.KEEP),  # the clock that named it was wrong
    (machine(deadline=START - timedelta(hours=4)), (True, False), Action.END, Action.END),  # not by that much
    (machine(), (False, True), Action.END, Action.END),
    (machine(), (False, False), Action.ASK, Action.END),
    (machine(deadline=EARLIER), (False, False), Action.END, Action.END),
    (machine(owner="other1"), (False, True), Action.FOREIGN, Action.FOREIGN),
]


@pytest.mark.parametrize(("seen", "heard", "action", "with_orphans"), HEARD)
def test_fate_by_what_the_bucket_says(seen, heard, action, with_orphans):
    told = {seen.name: Heard(*heard)}
    for orphans, expected in ((False, action), (True, with_orphans)):
        (finding,) = judge([seen], {}, heard=told, owner="owner1", now=START, orphans=orphans)
        assert finding.action is expected, finding


def test_the_price_is_the_providers_else_the_ledgers_else_unknown():
    seen = machine()
    silent = replace(seen, landed_offer=None)
    row = replace(make_row(seen.name, State.LIVE), order={"offer": {"price_micros_per_hour": 7}})
    known = {seen.name: Known(row, ended=False, driven=True, stage_done=False)}
    for one, knows_it, price in ((seen, {}, 500_000), (silent, known, 7), (silent, {}, None)):
        assert judge([one], knows_it, owner="owner1", now=START)[0].price_micros_per_hour == price


def test_older_than_spares_what_has_no_age():
    ageless = machine(deadline=EARLIER, created=None)
    (finding,) = judge([ageless], {}, owner="owner1", now=START, older_than=timedelta(hours=1))
    assert finding.action is Action.KEEP
    assert "not known" in finding.why


def test_orphans_are_ended_only_when_asked_for_and_strangers_not_even_then():
    findings = judge([machine(), machine(owner="other1")], {}, owner="owner1", now=START, orphans=True)
    assert [f.action for f in findings] == [Action.END, Action.FOREIGN]


def test_a_name_that_is_not_ours_is_never_touched():
    seen = Observation("kd-notes", Status.RUNNING, None, EARLIER, Job(), START)
    (finding,) = judge([seen], {}, owner="owner1", now=START, orphans=True)
    assert finding.action is Action.FOREIGN


def test_older_than_spares_the_young():
    young = machine(deadline=EARLIER, created=START - timedelta(minutes=5))
    (finding,) = judge([young], {}, owner="owner1", now=START, older_than=timedelta(hours=1))
    assert finding.action is Action.KEEP


def test_what_is_gone_is_no_finding():
    assert judge([machine(state=Status.ABSENT)], {}, owner="owner1", now=START) == []
