"""Which state is a machine in, and what happens next? Pure: one table of transitions, one function of decisions.

INTENT            money is reserved, nothing was sent
CREATING          the request was, or is being, sent: the provider may bill
LIVE              the machine runs; its job is the supervisor
DRAINING          the job has ended, or a stop was asked for: nothing new starts
TEARDOWN_PENDING  the end was asked for and is not confirmed: may still bill
GONE              seen gone twice, settled
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.provision import JobState, Observation, Status

TWINS = "two machines carry its name"
LOST = "the machine was lost"
LOST_ORDER = "whether its order arrived is not known"  # its client died; asked again it might be billed twice
FAILED = "the provider failed to create it"
SHORT = "what is left would not pay for the rest of the stage"  # see orchestrator.forecast


class State(StrEnum):
    INTENT = "INTENT"
    CREATING = "CREATING"
    LIVE = "LIVE"
    DRAINING = "DRAINING"
    TEARDOWN_PENDING = "TEARDOWN_PENDING"
    GONE = "GONE"


class Event(StrEnum):
    """Ledger entries that move a machine."""

    SENT = "sent"  # written before the provider is called
    UP = "up"
    JOB_ENDED = "job_ended"
    STOP = "stop"  # cap, deadline, Ctrl-C, lost job, refused order: end it
    DROPPED = "dropped"  # reserved, never sent
    ABSENT = "absent"  # seen gone once
    PRESENT = "present"  # seen again after it was gone once
    GONE = "gone"  # seen gone a second time; settled with this entry


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.INTENT, Event.SENT): State.CREATING,
    (State.INTENT, Event.DROPPED): State.GONE,
    (State.CREATING, Event.UP): State.LIVE,
    (State.CREATING, Event.STOP): State.TEARDOWN_PENDING,
    (State.LIVE, Event.JOB_ENDED): State.DRAINING,
    (State.LIVE, Event.STOP): State.TEARDOWN_PENDING,
    (State.DRAINING, Event.STOP): State.TEARDOWN_PENDING,
    (State.TEARDOWN_PENDING, Event.ABSENT): State.TEARDOWN_PENDING,
    (State.TEARDOWN_PENDING, Event.PRESENT): State.TEARDOWN_PENDING,
    (State.TEARDOWN_PENDING, Event.GONE): State.GONE,
}


def after(state: State, event: Event) -> State:
    """The next state. Raises ValueError for a move the table does not know."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"a machine in {state} cannot take {event}") from None


class Do(StrEnum):
    """What the runner does next with one machine."""

    SEND = "send"  # record SENT, then launch
    DROP = "drop"  # give the reservation back: nothing was sent
    MARK_UP = "mark_up"
    RUN_JOB = "run_job"
    MARK_ENDED = "mark_ended"
    STOP = "stop"
    TERMINATE = "terminate"
    MARK_ABSENT = "mark_absent"
    MARK_PRESENT = "mark_present"
    MARK_GONE = "mark_gone"
    WAIT = "wait"


@dataclass(frozen=True)
class Machine:
    """What the ledger knows of one machine, as far as decisions need it."""

    state: State
    age_s: float  # since SENT
    lifetime_s: float  # D: the age at which work must have stopped
    provision_limit_s: float  # the age by which it must be up
    hard_limit_s: float  # D + what the supervisor may need for its last upload: past it the client ends the machine
    absent_seen: bool = False
    launched: bool = False  # launch() returned
    absent_s: float = 0.0  # since it was first seen gone
    gap_s: float = 0.0  # between the two looks that make it gone: long where a create may still come true
    copies: int = 1  # machines that carry its name
    short: bool = False  # the forecast says that its stage cannot be finished


def next_action(machine: Machine, seen: Observation | None, *, stopping: bool) -> tuple[Do, str]:
    """What to do now and why. `seen` is None when the provider was not asked (INTENT) ; `stopping`: the run ends."""
    match machine.state:
        case State.INTENT:
            return (Do.DROP, "the run stops") if stopping else (Do.SEND, "")
        case State.CREATING:
            return _creating(machine, seen, stopping)
        case State.LIVE:
            return _live(machine, seen, stopping)
        case State.DRAINING:
            return Do.STOP, "its work is done"
        case State.TEARDOWN_PENDING:
            return _ending(machine, seen)
        case State.GONE:
            return Do.WAIT, ""


def _creating(machine: Machine, seen: Observation | None, stopping: bool) -> tuple[Do, str]:
    if stopping:
        return Do.STOP, "the run stops"
    if machine.age_s >= min(machine.lifetime_s, machine.provision_limit_s):
        return Do.STOP, "not up in time"
    if machine.copies > 1:
        return Do.STOP, TWINS
    if seen is None or seen.state is Status.UNKNOWN:
        return Do.WAIT, ""
    if seen.state is Status.RUNNING:
        return Do.MARK_UP, ""
    if seen.state is Status.FAILED:
        return Do.STOP, FAILED
    if seen.state is Status.ABSENT:
        return Do.STOP, "it vanished while being created" if machine.launched else LOST_ORDER
    if seen.state is Status.STOPPING:
        return Do.STOP, "it was ended while being created"
    return Do.WAIT, ""


def _live(machine: Machine, seen: Observation | None, stopping: bool) -> tuple[Do, str]:
    known = seen is not None and seen.state not in (Status.UNKNOWN, Status.CREATING)
    job = seen.job.state if seen is not None else JobState.NONE
    if known and seen is not None and seen.state is Status.RUNNING and job is JobState.DONE:
        return Do.MARK_ENDED, ""
    if stopping:
        return Do.STOP, "the run stops"
    if machine.copies > 1:
        return Do.STOP, TWINS
    if known and seen is not None and seen.state is not Status.RUNNING:
        return Do.STOP, LOST
    if machine.short:
        return Do.STOP, SHORT
    if machine.age_s >= machine.hard_limit_s:
        return Do.STOP, "its time is used up"
    if not known:
        return Do.WAIT, ""
    if job is JobState.LOST:
        return Do.STOP, "the job was lost"
    if job is not JobState.NONE:
        return Do.WAIT, ""
    if machine.age_s >= machine.lifetime_s:
        return Do.STOP, "its time is used up"
    return Do.RUN_JOB, ""


def _ending(machine: Machine, seen: Observation | None) -> tuple[Do, str]:
    if seen is None or seen.state is Status.UNKNOWN:
        return Do.TERMINATE, ""
    if seen.state is Status.ABSENT:
        if not machine.absent_seen:
            return Do.MARK_ABSENT, ""
        return (Do.MARK_GONE, "") if machine.absent_s >= machine.gap_s else (Do.WAIT, "")
    if machine.absent_seen:
        return Do.MARK_PRESENT, ""
    return Do.TERMINATE, ""
