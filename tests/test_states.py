"""The table of machine states and the decisions on it."""

from __future__ import annotations

import pytest

from orchestrator.provision import Job, JobState, Observation, Status
from orchestrator.states import TRANSITIONS, Do, Event, Machine, State, after, next_action
from orchestrator.testing import START, fake_offer


def machine(state: State, **changes: object) -> Machine:
    values: dict[str, object] = {
        "state": state,
        "age_s": 10.0,
        "lifetime_s": 1000.0,
        "provision_limit_s": 300.0,
        "hard_limit_s": 1100.0,
    }
    return Machine(**{**values, **changes})  # type: ignore[arg-type]


def seen(state: Status, job: JobState = JobState.NONE, rc: int | None = None) -> Observation:
    return Observation("kd-x", state, fake_offer(), START, Job("j", job, rc), START)


DECISIONS = [
    # state, what is seen, changes, stopping -> action
    (State.INTENT, None, {}, False, Do.SEND),
    (State.INTENT, None, {}, True, Do.DROP),
    (State.CREATING, seen(Status.ABSENT), {}, False, Do.STOP),  # the client died before, in or after the call
    (State.CREATING, seen(Status.ABSENT), {"launched": True}, False, Do.STOP),
    (State.CREATING, seen(Status.CREATING), {}, False, Do.WAIT),
    (State.CREATING, seen(Status.CREATING), {"age_s": 300.0}, False, Do.STOP),  # never ready
    (State.CREATING, seen(Status.CREATING), {"age_s": 50.0, "lifetime_s": 50.0}, False, Do.STOP),  # money used up
    (State.CREATING, seen(Status.FAILED), {}, False, Do.STOP),
    (State.CREATING, seen(Status.UNKNOWN), {}, False, Do.WAIT),
    (State.CREATING, seen(Status.RUNNING), {}, False, Do.MARK_UP),
    (State.CREATING, seen(Status.RUNNING), {}, True, Do.STOP),
    (State.LIVE, seen(Status.RUNNING), {}, False, Do.RUN_JOB),
    (State.LIVE, seen(Status.RUNNING), {"age_s": 1000.0}, False, Do.STOP),  # too late to begin
    (State.LIVE, seen(Status.RUNNING, JobState.RUNNING), {}, False, Do.WAIT),
    (State.LIVE, seen(Status.RUNNING, JobState.RUNNING), {"age_s": 1050.0}, False, Do.WAIT),  # its supervisor is saving
    (State.LIVE, seen(Status.RUNNING, JobState.RUNNING), {"age_s": 1100.0}, False, Do.STOP),
    (State.LIVE, seen(Status.UNKNOWN), {"age_s": 1100.0}, False, Do.STOP),
    (State.LIVE, seen(Status.RUNNING, JobState.RUNNING), {}, True, Do.STOP),
    (State.LIVE, seen(Status.RUNNING, JobState.DONE, 0), {}, False, Do.MARK_ENDED),
    (State.LIVE, seen(Status.RUNNING, JobState.DONE, 0), {"age_s": 30_000.0}, False, Do.MARK_ENDED),  # nobody looked
    (State.LIVE, seen(Status.RUNNING, JobState.DONE, 0), {}, True, Do.MARK_ENDED),  # its result is not thrown away
    (State.LIVE, seen(Status.RUNNING, JobState.LOST), {}, False, Do.STOP),
    (State.LIVE, seen(Status.ABSENT), {}, False, Do.STOP),  # preempted
    (State.LIVE, seen(Status.UNKNOWN), {}, False, Do.WAIT),
    (State.DRAINING, seen(Status.RUNNING), {}, False, Do.STOP),
    (State.TEARDOWN_PENDING, seen(Status.RUNNING), {}, False, Do.TERMINATE),
    (State.TEARDOWN_PENDING, seen(Status.STOPPING), {}, False, Do.TERMINATE),
    (State.TEARDOWN_PENDING, seen(Status.UNKNOWN), {}, False, Do.TERMINATE),  # no answer is not gone
    (State.TEARDOWN_PENDING, seen(Status.UNKNOWN), {"absent_seen": True}, False, Do.TERMINATE),
    (State.TEARDOWN_PENDING, seen(Status.ABSENT), {}, False, Do.MARK_ABSENT),
    (State.TEARDOWN_PENDING, seen(Status.ABSENT), {"absent_seen": True}, False, Do.MARK_GONE),
    (State.TEARDOWN_PENDING, seen(Status.RUNNING), {"absent_seen": True}, False, Do.MARK_PRESENT),  # it came back
    (State.GONE, seen(Status.ABSENT), {}, False, Do.WAIT),
]


@pytest.mark.parametrize(("state", "observation", "changes", "stopping", "expected"), DECISIONS)
def test_next_action(state, observation, changes, stopping, expected):
    assert next_action(machine(state, **changes), observation, stopping=stopping)[0] is expected


def test_every_state_but_gone_has_a_way_to_gone():
    reaches = {State.GONE}
    for _ in State:
        reaches |= {source for (source, _), target in TRANSITIONS.items() if target in reaches}
    assert reaches == set(State)


def test_nothing_leaves_gone_and_money_that_was_sent_is_only_settled_at_the_end():
    assert not [move for move in TRANSITIONS if move[0] is State.GONE]
    assert {source for (source, event), target in TRANSITIONS.items() if target is State.GONE} == {
        State.INTENT,
        State.TEARDOWN_PENDING,
    }


def test_a_move_the_table_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="LIVE cannot take sent"):
        after(State.LIVE, Event.SENT)
