"""How far are the plan's models off? Scores the package's own cases and writes the tables into docs/estimates.md.

    python scripts/bench_plan.py [--check]     # --check writes nothing and fails where the page is not up to date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator import memory_cases
from orchestrator.cases import Case, read_cases
from orchestrator.estimate import SCORE_COLUMNS, Row, rows_of, score_cells, scores
from orchestrator.memory import CUBLAS_GIB
from orchestrator.memory_training import training_step

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "estimates.md"
LARGE = 0.08  # an error to give a line of its own


def rows() -> list[Row]:
    """Of all files of cases."""
    files = sorted((ROOT / "benchmarks" / "cases").glob("*.jsonl"))
    return [row for file in files for row in rows_of(read_cases(file))]


def tables(found: list[Row]) -> dict[str, str]:
    """The page's tables, by the name between its markers."""
    measured = [row for row in found if row.what == "memory"]
    far = sorted((row for row in measured if abs(row.error) > LARGE), key=lambda row: -abs(row.error))
    numbers = [
        (row.case.id, row.basis, f"{row.measured:.2f}", f"{row.predicted.low:.2f}", f"{row.predicted.expected:.2f}",
         f"{row.predicted.high:.2f}", f"{row.error:+.1%}")
        for row in measured
    ]  # fmt: skip
    heads = ("case", "basis", "measured", "low", "expected", "high", "error")
    kinds = residuals([row.case for row in measured])
    return {
        "residuals": _table(
            ("code that ran", "source", "rows", "lowest", "highest"),
            [(*kind, str(len(off)), f"{min(off):+.1%}", f"{max(off):+.1%}") for kind, off in sorted(kinds.items())],
        ),
        "scores": _table(SCORE_COLUMNS, [score_cells(each) for each in scores(found)]),
        "far": _table(("case", "error", "basis"), [(r.case.id, f"{r.error:+.1%}", r.basis) for r in far]),
        "rows": _table(heads, numbers),
        "before": _table(
            ("case", "segments", "GiB said", "measured", "off", "tokens/s said", "measured", "off"), list(said_before())
        ),
    }


def said_before() -> Iterator[tuple[str, ...]]:
    """What was said of the package's own cases before they were measured, beside what was measured then: allocated
    memory (of vLLM the process's) and tokens a second."""
    asked = ROOT / "benchmarks" / "asked" / "own_predicted.jsonl"
    said = {(row["id"], row["gpu"]): row for row in map(json.loads, asked.read_text(encoding="utf-8").splitlines())}
    results = json.loads((ROOT / "benchmarks" / "results" / "own_cases.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        told = said[row["id"], row["gpu"]]
        basis = "allocated" if "allocated_gib" in row else "process"
        memory, speed = told["peak_gib"][basis]["expected"], told["tokens_per_s"]["expected"]
        took, rate = row[f"{basis}_gib"], row["tokens_per_s"]
        yield (
            row["id"].removeprefix("own-"), row["segments"], f"{memory:.2f}", f"{took:.2f}",
            f"{memory / took - 1:+.1%}", f"{speed:,.0f}", f"{rate:,.0f}", f"{speed / rate - 1:+.1%}",
        )  # fmt: skip


def residuals(cases: list[Case]) -> dict[tuple[str, str], list[float]]:
    """(measured - counted) / what is counted beside weights and optimizer, of allocated memory, by what is known of the
    code and by source."""
    found: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        observed = case.measured
        if case.task != "train" or observed is None or observed.peak_gib is None:
            continue
        if observed.memory_basis not in ("allocated", "active"):
            continue
        job = next(memory_cases.trainings(case))
        step = training_step(job)
        counted = step.allocated_gib + CUBLAS_GIB
        off = (observed.peak_gib - counted) / (counted - step.static_gib)
        read = "not read" if job.habits.name not in memory_cases.READ else "read, 4 bit" if job.four_bit else "read"
        source = (case.source or "").removeprefix("https://").split("/blob")[0].split(" (")[0]
        found.setdefault((read, f"{source}, {case.gpu}"), []).append(off)
    return found


def page(text: str, made: dict[str, str]) -> str:
    """The page with its tables between `<!-- name -->` and `<!-- end -->`."""
    for name, table in made.items():
        before, found, after = text.partition(f"<!-- {name} -->\n")
        if not found:
            raise SystemExit(f"{PAGE.name} has no place for the table {name!r}")
        text = before + found + table + "<!-- end -->" + after.partition("<!-- end -->")[2]
    return text


def _table(heads: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" if n == 0 else "---:" for n in range(len(heads))), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, tables(rows()))
    if "--check" in sys.argv:
        raise SystemExit(0 if new == old else f"{PAGE.name} is not up to date: make bench-plan")
    PAGE.write_text(new, encoding="utf-8")
    print(f"{PAGE}: written")


if __name__ == "__main__":
    main()
