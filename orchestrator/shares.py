"""What did a machine do for each of its stages, for how long and for how much? Pure: a ledger row in, visits out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestrator.ledger import MachineRow
from orchestrator.states import State

OF_ONE_STAGE = ("forecast", "limit", "size", "short")  # facts of the stage at hand: they end with it


@dataclass(frozen=True)
class Visit:
    """One stage on one machine. `seconds` and `micros` are its share once the machine is settled, else None."""

    row: MachineRow
    stage: str
    attempt: int
    facts: Mapping[str, Any]  # of the machine, as far as they are this stage's
    from_s: float = 0.0  # age of the machine when its time began
    seconds: float | None = None
    micros: int | None = None

    @property
    def is_last(self) -> bool:
        """Whether the machine serves, or ended with, this stage."""
        return self.stage == self.row.serves


def visits(row: MachineRow) -> tuple[Visit, ...]:
    """Every stage that the machine came to, in turn. Their micros add up to what it was settled at."""
    told: Mapping[str, Mapping[str, Any]] = row.facts.get("passed", {})
    numbers, here = dict(row.chain), row.stages.index(row.serves)
    passed = {name: told[name] for name in row.stages[:here] if name in told}
    cleared = {**row.facts, **dict.fromkeys((*OF_ONE_STAGE, "ended", "begun"))}
    facts = {name: {**cleared, **own, "begun": True} for name, own in passed.items()} | {row.serves: row.facts}
    ends_s = [float(own["until_s"]) for own in passed.values()]
    return tuple(
        Visit(row, name, numbers[name], own, from_s, *share)
        for (name, own), from_s, share in zip(facts.items(), [0.0, *ends_s], _shares(row, ends_s), strict=True)
    )


def _shares(row: MachineRow, ends_s: list[float]) -> list[tuple[float, int] | tuple[None, None]]:
    """(seconds, micros) of each stage: by the ages at which all but the last ended, and the one at which it did."""
    if row.state is not State.GONE or "billed_s" not in row.facts:
        return [(None, None)] * (len(ends_s) + 1)
    whole_s, micros = float(row.facts["billed_s"]), row.settled_micros
    bounds = [0.0]
    for end_s in ends_s:
        bounds.append(min(whole_s, max(bounds[-1], end_s)))
    paid = [int(micros * bound / whole_s) if whole_s > 0 else 0 for bound in bounds]
    return [
        (end_s - start_s, end - start)
        for (start_s, end_s), (start, end) in zip(pairwise([*bounds, whole_s]), pairwise([*paid, micros]), strict=True)
    ]
