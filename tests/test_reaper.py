"""The reaper ends what was forgotten and harms nobody."""

from __future__ import annotations

from datetime import timedelta

import pytest

from orchestrator.names import machine_name
from orchestrator.provision import Job, Observation, Status
from orchestrator.reaper import Action, Known, judge
from orchestrator.states import State
from orchestrator.testing import START, fake_offer
from tests.plans import make_row

LATER, EARLIER = START + timedelta(hours=2), START - timedelta(hours=2)


def machine(owner: str = "owner1", deadline=LATER, created=EARLIER, state: Status = Status.RUNNING) -> Observation:
    return Observation(machine_name(owner, "r-abc123", "train", deadline), state, fake_offer(), created, Job(), START)


def knows(seen: Observation, state: State = State.LIVE, **changes: bool) -> dict[str, Known]:
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


def test_reaping_over_a_provider_ends_the_overdue_and_leaves_a_healthy_run_alone(tmp_path):
    from orchestrator.ledger import Ledger
    from orchestrator.provision import Order
    from orchestrator.reap import reap
    from orchestrator.testing import FakeBucket, FakeProvisioner, VirtualClock

    clock = VirtualClock()
    provider = FakeProvisioner(clock, FakeBucket(clock), {})
    now = START
    deadlines = {"old": now - timedelta(hours=1), "new": now + timedelta(hours=1)}
    names = {key: machine_name("owner1", "r-abc123", "train", at) for key, at in deadlines.items()}
    for key, name in names.items():
        provider.launch(Order(name, "r-abc123", "train", fake_offer(), deadlines[key], 3600.0))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    common = {
        "ledger": ledger,
        "providers": {"fake": provider},
        "owner": "owner1",
        "clock": clock,
        "call_limit_s": None,
    }
    assert reap(**common, do_end=False).ended == ()
    assert len(provider.live()) == 2
    result = reap(**common, do_end=True)
    assert result.ended == (names["old"],)
    assert result.saved_micros_per_hour == 500_000
    assert provider.live() == [names["new"]]
    assert reap(**common, do_end=True, orphans=True).ended == (names["new"],)
    assert provider.live() == []
