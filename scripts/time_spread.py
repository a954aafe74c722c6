"""How far is the time model off? Errors by kind of the cases of a file, and the widths that `duration.SPREAD` holds.

    python scripts/time_spread.py [benchmarks/cases/times.jsonl]

A width is made from |ln(measured / expected)|: for each source, the value below which 93 in 100 of the other sources'
rows lie (of n rows the ceil(0.93 (n + 1))-th; half as much again as the largest where n is too small for that); their
mean over the k sources, and 1/k more, since few sources say little of the next one. `inside` counts each row against
the width that its own source had no part in.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cases import Case, read_cases
from orchestrator.duration_cases import predict

CASES = Path(__file__).parents[1] / "benchmarks" / "cases" / "times.jsonl"
COVERED = 0.93  # so that 90 in 100 are left where a source is like none of these


@dataclass(frozen=True)
class Row:
    """How far one case is off: ln(measured time / expected time)."""

    id: str
    kind: str
    source: str
    off: float


def rows(cases: list[Case]) -> list[Row]:
    """The cases that were timed and that the model has a time for."""
    found = [Row(case.id, case.task, case.source or case.id, off) for case in cases if (off := miss(case)) is not None]
    return [row for row in found if math.isfinite(row.off)]


def miss(case: Case) -> float | None:
    """ln(measured time / expected time), by the tokens a second where they were measured."""
    times, measured = predict(case), case.measured
    if measured is None:
        return None
    if measured.tokens_per_s and times.tokens_per_s:
        return math.log(times.tokens_per_s.expected / measured.tokens_per_s)
    if measured.step_seconds and times.step_seconds:
        return math.log(measured.step_seconds / times.step_seconds.expected)
    return None


def quantile(misses: list[float]) -> float:
    """The |miss| below which 93 in 100 further ones should lie, of those seen."""
    sizes = sorted(abs(one) for one in misses)
    place = math.ceil(COVERED * (len(sizes) + 1))
    return sizes[place - 1] if place <= len(sizes) else 1.5 * sizes[-1]


def left_out(kind: list[Row]) -> dict[str, float]:
    """By source: the quantile of all other sources' rows, and a share more for how few they are."""
    sources = sorted({row.source for row in kind})
    few = 1 + 1 / len(sources)
    return {source: few * quantile([row.off for row in kind if row.source != source]) for source in sources}


def spread(kind: list[Row]) -> float:
    """The factor of time within which the range of this kind reaches."""
    return math.exp(statistics.mean(left_out(kind).values()))


def main(path: Path) -> None:
    found = rows(read_cases(path))
    for kind in ("train", "generate"):
        mine = [row for row in found if row.kind == kind]
        if len({row.source for row in mine}) < 2:
            continue
        widths = left_out(mine)
        errors = sorted(abs(math.expm1(row.off)) for row in mine)
        inside = sum(abs(row.off) <= widths[row.source] for row in mine)
        print(
            f"{kind}: {len(mine)} rows of {len(widths)} sources, median |error| {statistics.median(errors):.1%}, "
            f"90th percentile {errors[math.ceil(0.9 * len(errors)) - 1]:.1%}, spread {spread(mine):.3f}, "
            f"inside with their source left out {inside / len(mine):.0%}"
        )
        for row in sorted(mine, key=lambda row: -abs(row.off))[:6]:
            print(f"    {row.id}: measured time is {math.exp(row.off):.2f} of the expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CASES)
