"""Which machines were forgotten? Ledger, lease and provider side by side; what is doubtful is listed, never ended.

A machine is ended without being asked for only when it is this owner's and one of these holds: the deadline in its
name has passed; the ledger holds it for gone; its run has ended; its run's client is gone and its stage is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from orchestrator.ledger import MachineRow
from orchestrator.names import parse_machine_name
from orchestrator.provision import Observation, Status
from orchestrator.states import State

GRACE = timedelta(minutes=2)  # after a deadline: the machine's own supervisor and the client come first


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
    driven: bool  # a living client holds its lease
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
    orphans: bool = False,
    older_than: timedelta | None = None,
) -> list[Finding]:
    """A finding for every machine that the provider lists; pure. `orphans` ends what is doubtful, too.

    `older_than` spares what is younger, whatever else is found.
    """
    return [
        _judge(one, known.get(one.name), owner, now, orphans, older_than)
        for one in seen
        if one.state is not Status.ABSENT
    ]


def _judge(
    seen: Observation, known: Known | None, owner: str, now: datetime, orphans: bool, older_than: timedelta | None
) -> Finding:
    action, why = _fate(seen, known, owner, now)
    if action is Action.ASK and orphans:
        action = Action.END
    if (
        action is Action.END
        and older_than is not None
        and (seen.created_at is None or now - seen.created_at < older_than)
    ):
        action, why = Action.KEEP, f"{why}, but it is younger than --older-than"
    price = seen.landed_offer.price_micros_per_hour if seen.landed_offer else None
    return Finding(seen.name, action, why, price, seen.created_at)


def _fate(seen: Observation, known: Known | None, owner: str, now: datetime) -> tuple[Action, str]:
    name = parse_machine_name(seen.name)
    if name is None:
        return Action.FOREIGN, "its name is not one of kdcloud's"
    if name.owner != owner:
        return Action.FOREIGN, "it belongs to another owner"
    overdue = now > name.deadline_at + GRACE
    if known is None:
        if overdue:
            return Action.END, "the deadline in its name has passed and no run here knows it"
        return Action.ASK, "no run here knows it; its deadline has not passed"
    if known.driven:
        return Action.KEEP, "a living client drives its run"
    if known.row.state is State.GONE:
        return Action.END, "the ledger holds it for gone"
    if overdue:
        return Action.END, "the deadline in its name has passed"
    if known.ended:
        return Action.END, "its run has ended"
    if known.stage_done:
        return Action.END, "its stage is done and its client is gone"
    return Action.KEEP, "its client is gone, its stage works on and its deadline has not passed"
