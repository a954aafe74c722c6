"""Which machines were forgotten? Ledger, lease, bucket and provider side by side; what is doubtful is never ended.

A machine is ended without being asked for only when it is this owner's and

- a run here knows it: the ledger holds it for gone; or by the boot clock it has outlived what its reservation pays
  for; or its client is gone and the deadline in its name has passed, its run has ended, or its stage is done;
- no run here knows it: no client drives it and the deadline in its name has passed, or the run's bucket was found, its
  lease has expired and its stage's result is committed. A deadline that passed hours ago ends it whatever the lease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from orchestrator.ledger import MachineRow
from orchestrator.names import MachineName, parse_machine_name
from orchestrator.provision import Observation, Status
from orchestrator.states import State

GRACE = timedelta(minutes=2)  # after a deadline: the machine's own supervisor and the client come first
CLOCK_WRONG = timedelta(hours=3)  # the clock that named a machine may have been wrong by less than this


class Action(StrEnum):
    KEEP = "keep"  # a healthy run's
    END = "end"  # forgotten
    ASK = "ask"  # doubtful: only with --orphans
    FOREIGN = "foreign"  # somebody else's: never


@dataclass(frozen=True)
class Known:
    """What this computer knows of a machine's run."""

    row: MachineRow
    ended: bool  # the run has ended (done, stopped, capped ...)
    driven: bool | None  # a living client holds its lease; None: its bucket does not answer
    stage_done: bool
    outlived: bool = False  # older, by the boot clock, than what its reservation pays for


@dataclass(frozen=True)
class Heard:
    """What the run's bucket says of a machine that no run here knows."""

    driven: bool
    stage_done: bool


@dataclass(frozen=True)
class Finding:
    """One machine that exists, and what to do with it."""

    name: str
    action: Action
    why: str
    price_micros_per_hour: int | None
    created_at: datetime | None


def judge(
    seen: Sequence[Observation],
    known: Mapping[str, Known],
    *,
    owner: str,
    now: datetime,
    heard: Mapping[str, Heard] | None = None,
    orphans: bool = False,
    older_than: timedelta | None = None,
) -> list[Finding]:
    """A finding for every machine that the provider lists; pure. `orphans` ends what is doubtful, too.

    `older_than` spares what is younger, whatever else is found.
    """
    told = heard or {}
    return [
        _judge(one, known.get(one.name), told.get(one.name), owner, now, orphans, older_than)
        for one in seen
        if one.state is not Status.ABSENT
    ]


def overdue(name: MachineName, now: datetime) -> bool:
    return now > name.deadline_at + GRACE


def _judge(
    seen: Observation,
    known: Known | None,
    heard: Heard | None,
    owner: str,
    now: datetime,
    orphans: bool,
    older_than: timedelta | None,
) -> Finding:
    action, why = _fate(seen, known, heard, owner, now)
    if action is Action.ASK and orphans:
        action = Action.END
    if action is Action.END and older_than is not None:
        if seen.created_at is None:
            action, why = Action.KEEP, f"{why}, but its age is not known and --older-than was given"
        elif now - seen.created_at < older_than:
            action, why = Action.KEEP, f"{why}, but it is younger than --older-than"
    return Finding(seen.name, action, why, _price(seen, known), seen.created_at)


def _fate(seen: Observation, known: Known | None, heard: Heard | None, owner: str, now: datetime) -> tuple[Action, str]:
    name = parse_machine_name(seen.name)
    if name is None:
        return Action.FOREIGN, "its name is not one of kdcloud's"
    if known is None and name.owner != owner:
        return Action.FOREIGN, "it belongs to another owner"
    return _stranger(name, heard, now) if known is None else _acquaintance(name, known, now)


def _stranger(name: MachineName, heard: Heard | None, now: datetime) -> tuple[Action, str]:
    if now > name.deadline_at + CLOCK_WRONG:
        return Action.END, "the deadline in its name passed hours ago and no run here knows it"
    if heard is not None and heard.driven:
        return Action.KEEP, "a living client elsewhere drives its run"
    if overdue(name, now):
        return Action.END, "the deadline in its name has passed and no run here knows it"
    if heard is not None and heard.stage_done:
        return Action.END, "its stage is done and its client, which was elsewhere, is gone"
    if heard is not None:
        return Action.ASK, "its client, which was elsewhere, is gone; its stage is not done, its deadline not passed"
    return Action.ASK, "no run here knows it; its deadline has not passed"


def _acquaintance(name: MachineName, known: Known, now: datetime) -> tuple[Action, str]:
    if known.row.state is State.GONE:
        return Action.END, "the ledger holds it for gone"
    if known.outlived:
        return Action.END, "it is older than its reservation pays for"
    if known.driven:
        return Action.KEEP, "a living client drives its run"
    if overdue(name, now):
        return Action.END, "the deadline in its name has passed"
    if known.driven is None:
        return Action.KEEP, "its bucket does not answer, and its deadline has not passed"
    if known.ended:
        return Action.END, "its run has ended"
    if known.stage_done:
        return Action.END, "its stage is done and its client is gone"
    return Action.KEEP, "its client is gone, its stage works on and its deadline has not passed"


def _price(seen: Observation, known: Known | None) -> int | None:
    """Micro-USD an hour: the provider's word, else what the ledger has of it; None where nobody knows."""
    if seen.landed_offer is not None and seen.landed_offer.price_micros_per_hour is not None:
        return seen.landed_offer.price_micros_per_hour
    offer = {} if known is None else known.row.facts.get("landed") or known.row.order.get("offer") or {}
    return offer.get("price_micros_per_hour")
