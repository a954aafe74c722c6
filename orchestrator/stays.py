"""What do stages in a row cost on one machine that is not ended between them? Pure.

One creation, one minimum charge, one reserve for latencies; packages and models that the machine has are not fetched
again. How long a stage takes then depends on what the machine has: a mask of bits, one for each of these things.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.market import Lot


@dataclass(frozen=True)
class Cell:
    """A stage on the machines of a lot. `alone_hours`: on one of its own; `own_hours`: its work and what is around it,
    by what it finds of the things it leaves; `setup_hours`: its packages, in the same way."""

    alone_hours: float
    leaves: int  # things that are on the machine afterwards
    setup_of: int  # those of them that its packages are
    egress_micros: int
    own_hours: Mapping[int, float]
    setup_hours: Mapping[int, float]

    def joined_hours(self, there: int) -> float:
        """On a machine that has these things already."""
        there &= self.leaves
        return self.setup_hours[there & self.setup_of] + self.own_hours[there & ~self.setup_of]


@dataclass
class Things:
    """Names of what machines may have, as bits."""

    bits: dict[str, int] = field(default_factory=dict)

    def mask(self, *names: str) -> int:
        found = 0
        for name in names:
            found |= self.bits.setdefault(name, 1 << len(self.bits))
        return found

    def names(self, mask: int) -> frozenset[str]:
        return frozenset(name for name, bit in self.bits.items() if bit & mask)


def stays(lot: Lot, cells: Sequence[Cell | None]) -> Iterator[tuple[int, int, int, float]]:
    """(first stage, the one after the last, micro-USD with reserve and traffic, hours) of all stages in a row, two or
    more, that the machines of the lot hold. `cells`: by stage, None where it cannot be there."""
    for first, head in enumerate(cells[:-1]):
        if head is None:
            continue
        hours, there, egress = head.alone_hours, head.leaves, head.egress_micros
        for last in range(first + 1, len(cells)):
            cell = cells[last]
            if cell is None:
                break
            hours += cell.joined_hours(there)
            there |= cell.leaves
            egress += cell.egress_micros
            yield first, last + 1, lot.least_micros(hours * 3600)[0] + egress, hours
