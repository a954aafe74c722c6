"""What would published cases have taken, and how far off is that? What `kdcloud estimate` says, and its score. Pure.

A prediction never reads what was measured. Beside the score stands what two public rules of thumb give on the same
cases, computed here from their published formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from orchestrator import duration_cases, memory_cases
from orchestrator.cases import Case
from orchestrator.catalog import ModelShape
from orchestrator.gpus import gpu_named
from orchestrator.memory_training import FOUR_BIT, GIB
from orchestrator.plan import Range

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
TIMES = ("tokens_per_s", "seconds", "step_seconds")
# The basis on which a row was measured, and which prediction it is compared with. An unknown tool most often reads the
# whole process.
BASIS = {"allocated": "allocated", "active": "allocated", "reserved": "reserved", "process": "process",
         "unknown": "process"}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Of one case; None where it does not say enough."""

    id: str
    allocated: Range | None = None
    reserved: Range | None = None
    process: Range | None = None
    tokens_per_s: Range | None = None
    seconds: Range | None = None
    step_seconds: Range | None = None
    parts_gib: dict[str, float] | None = None
    moment: str | None = None


@dataclass(frozen=True)
class Row:
    """One measured number of one case, and what was predicted for it."""

    case: Case
    what: str  # memory, or a time
    basis: str
    measured: float
    predicted: Range
    accelerate: float | None = None
    deepspeed: float | None = None

    @property
    def error(self) -> float:
        return self.predicted.expected / self.measured - 1.0

    @property
    def exact(self) -> bool:
        """Whether the length that set the peak is known, not only bounded."""
        return "upper bound" not in (self.case.caveat or "")

    @property
    def counts(self) -> bool:
        """Whether the goals are about it: surely complete, of a known length and basis."""
        return self.case.confidence == "high" and self.exact and self.basis != "unknown"


@dataclass(frozen=True)
class Score:
    """Of a group of rows: errors as shares, the share of rows not above `high`, and of those in the range."""

    group: str
    rows: int
    median_error: float
    p90_error: float
    below_high: float
    in_range: float
    median_width: float  # high / low
    accelerate_error: float | None = None
    accelerate_rows: int = 0
    deepspeed_error: float | None = None
    deepspeed_rows: int = 0


def estimate(case: Case) -> Estimate:
    """What the case should take, as if it had not been run."""
    case = replace(case, measured=None)
    peaks = memory_cases.predict(case, card_gib(case.gpu))
    times = duration_cases.predict(case)
    found = Estimate(case.id, **{name: getattr(times, name) for name in TIMES})
    if peaks is None:
        return found
    return replace(
        found, allocated=peaks.allocated, reserved=peaks.reserved, process=peaks.process, parts_gib=peaks.parts,
        moment=peaks.moment,
    )  # fmt: skip


def card_gib(name: str | None) -> float | None:
    """Memory of a card by the names that cases use, GiB; None where it is not known."""
    gpu = gpu_named(name or "")
    return None if gpu is None else gpu.vram_gib.value


def as_json(found: Estimate) -> dict[str, Any]:
    """One line of `kdcloud estimate --json`."""
    peak = {basis: _range(getattr(found, basis)) for basis in ("allocated", "reserved", "process")}
    return {
        "id": found.id,
        "peak_gib": peak,
        **{name: _range(getattr(found, name)) for name in TIMES},
        "peak_moment": found.moment,
        "peak_parts_gib": None if found.parts_gib is None else {k: _round(v) for k, v in found.parts_gib.items()},
    }


def _range(value: Range | None) -> dict[str, float] | None:
    if value is None:
        return None
    return {"low": _round(value.low), "expected": _round(value.expected), "high": _round(value.high)}


def _round(value: float) -> float:
    return float(f"{value:.6g}")


# --- the rules of others


def accelerate_gib(case: Case) -> float | None:
    """What `accelerate estimate-memory` answers for the model, GiB; None where its table has no number.

    It counts the model in fp32: S = 4 bytes a parameter. Training with Adam in float32: the largest stage is the step,
    4 S; in float16 or bfloat16: 2 S; in 4 bits: nothing. Loading: S, half or an eighth of it. Batch, length and LoRA do
    not enter. Source: accelerate/commands/estimate.py, estimate_training_usage and gather_data.
    """
    size, weights = 4.0 * case.shape.params / GIB, case.weights_dtype or "bf16"
    if case.task == "generate":
        return size * {"fp32": 1.0, "int8": 0.25, "fp8": 0.25}.get(weights, 0.125 if weights in FOUR_BIT else 0.5)
    if weights in FOUR_BIT:
        return None
    return size * (4.0 if (weights, case.compute_dtype) == ("fp32", "fp32") else 2.0)


def deepspeed_gib(case: Case) -> float | None:
    """What DeepSpeed's estimators answer without offloading, GiB of one GPU; None for generation.

    ZeRO-3: 4 bytes a parameter of the largest layer, and 18 a parameter over all GPUs; ZeRO-2, which is asked where
    weights are not sharded: 4, and 16 over all GPUs. Activations, batch and what is frozen do not enter. Source:
    deepspeed/runtime/zero, estimate_zero3_model_states_mem_needs and estimate_zero2_model_states_mem_needs.
    """
    if case.task == "generate":
        return None
    params, gpus = case.shape.params, case.gpus or 1
    if memory_cases.parallel_of(case.parallel or "none")[0] in ("fsdp", "zero3"):
        return (4 * _largest_module(case.shape) + 18 * params / gpus) / GIB
    return (4 * params + 16 * params / gpus) / GIB


def _largest_module(shape: ModelShape) -> int:
    return shape.hidden * max(shape.vocab, shape.intermediate, shape.heads * shape.head_dim)


# --- the score


def rows_of(cases: Iterable[Case], predict: Callable[[Case], Estimate] = estimate) -> list[Row]:
    """Every measured number that something was predicted for."""
    found = []
    for case in cases:
        measured, made = case.measured, predict(case)
        if measured is None:
            continue
        basis = measured.memory_basis or "unknown"
        peak = getattr(made, BASIS[basis])
        if measured.peak_gib is not None and peak is not None:
            rules = accelerate_gib(case), deepspeed_gib(case)
            found.append(Row(case, "memory", basis, measured.peak_gib, peak, *rules))
        for name in TIMES:
            value, time = getattr(measured, name), getattr(made, name)
            if value is not None and time is not None:
                found.append(Row(case, name, "", value, time))
    return found


def scores(rows: list[Row]) -> list[Score]:
    """Scores of the groups that the goals are about, then of each task, method, card and basis. Groups without rows are
    left out."""
    groups: list[tuple[str, Callable[[Row], bool]]] = [
        ("training memory: sure, exact length, known basis", lambda r: _memory(r, "train") and r.counts),
        ("training memory: length is an upper bound", lambda r: _memory(r, "train") and not r.exact),
        ("training memory: basis unknown", lambda r: _memory(r, "train") and r.exact and r.basis == "unknown"),
        ("training memory: lower confidence", lambda r: _memory(r, "train") and r.exact and r.basis != "unknown"
         and r.case.confidence != "high"),
        ("generation memory", lambda r: _memory(r, "generate")),
        ("training tokens/s", lambda r: r.what == "tokens_per_s" and r.case.task == "train"),
        ("training step", lambda r: r.what == "step_seconds"),
        ("generation tokens/s", lambda r: r.what == "tokens_per_s" and r.case.task == "generate"),
    ]  # fmt: skip
    memory = [row for row in rows if row.what == "memory"]
    kinds: list[tuple[str, Callable[[Row], str | None]]] = [
        ("task", lambda row: row.case.task),
        ("method", lambda row: row.case.method),
        ("card", lambda row: row.case.gpu),
        ("basis", lambda row: row.basis),
    ]
    found = [(name, [row for row in rows if wanted(row)]) for name, wanted in groups]
    speed = [row for row in rows if row.what == "tokens_per_s"]
    for what, of_this, by in (("memory", memory, kinds), ("tokens/s", speed, kinds[:3])):
        for kind, of in by:
            for value in sorted({name for row in of_this if (name := of(row))}):
                found.append((f"{what}, {kind} {value}", [row for row in of_this if of(row) == value]))
    return [score(name, chosen) for name, chosen in found if chosen]


def _memory(row: Row, task: str) -> bool:
    return row.what == "memory" and row.case.task == task


def score(group: str, rows: list[Row]) -> Score:
    """Of rows, at least one."""
    errors = [abs(row.error) for row in rows]
    accelerate = [abs(row.accelerate / row.measured - 1) for row in rows if row.accelerate is not None]
    deepspeed = [abs(row.deepspeed / row.measured - 1) for row in rows if row.deepspeed is not None]
    return Score(
        group,
        len(rows),
        median(errors),
        percentile(errors, 0.9),
        sum(row.measured <= row.predicted.high for row in rows) / len(rows),
        sum(row.predicted.low <= row.measured <= row.predicted.high for row in rows) / len(rows),
        median(row.predicted.high / row.predicted.low for row in rows),
        median(accelerate) if accelerate else None,
        len(accelerate),
        median(deepspeed) if deepspeed else None,
        len(deepspeed),
    )


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def score_json(rows: list[Row]) -> dict[str, Any]:
    """The document of `kdcloud estimate --score --json`; errors and shares as fractions."""
    return {
        "schema": SCHEMA,
        "scores": [{name: _rounded(value) for name, value in vars(each).items()} for each in scores(rows)],
        "rows": [
            {
                "id": row.case.id, "what": row.what, "basis": row.basis or None, "measured": row.measured,
                "predicted": _range(row.predicted), "error": _round(row.error), "counts": row.counts,
                "accelerate": _rounded(row.accelerate), "deepspeed": _rounded(row.deepspeed),
            }
            for row in rows
        ],
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    return _round(value) if isinstance(value, float) else value


# --- tables


def render(found: list[Estimate], console: Console) -> None:
    """A line a case: memory on each basis, the whole process as a range, and times."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="GiB of one GPU; times as expected", title_justify="left")
    for name in ("case", "allocated", "reserved", "process", "most at", "tokens/s", "step s"):
        table.add_column(name, justify="left" if name in ("case", "most at") else "right")
    for each in found:
        numbers = [_expected(each.allocated), _expected(each.reserved), _shown(each.process)]
        table.add_row(each.id, *numbers, each.moment or "", _expected(each.tokens_per_s), _expected(each.step_seconds))
    console.print(table)


def _expected(value: Range | None) -> str:
    return "not found" if value is None else f"{value.expected:.4g}"


def _shown(value: Range | None) -> str:
    return "not found" if value is None else f"{value.low:.1f} - {value.expected:.1f} - {value.high:.1f}"


def render_scores(rows: list[Row], console: Console) -> None:
    """A line a group; where the console is narrow the rules' errors stand in a table of their own."""
    cells = [dict(zip(SCORE_COLUMNS, score_cells(each), strict=True)) for each in scores(rows)]
    if console.width >= SCORES_WIDTH:
        _print_columns(SCORE_COLUMNS, cells, console)
        return
    _print_columns(SCORE_COLUMNS[: -len(RULES)], cells, console)
    ruled = [{**each, "kdcloud": each["median"]} for each in cells if any(each[rule] != "-" for rule in RULES)]
    if ruled:
        console.print("\nmedian error beside that of other rules, theirs on the rows that they have a number for")
        _print_columns(("group", "kdcloud", *RULES), ruled, console)


def _print_columns(names: Sequence[str], cells: Sequence[Mapping[str, str]], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in names:
        first = name == "group"
        table.add_column(name, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    for each in cells:
        table.add_row(*(each[name] for name in names))
    console.print(table)


SCORES_WIDTH = 110  # of a console that holds all columns
RULES = ("accelerate", "DeepSpeed")
SCORE_COLUMNS = ("group", "rows", "median", "90th", "<= high", "inside", "high/low", "accelerate", "DeepSpeed")


def score_cells(each: Score) -> tuple[str, ...]:
    """Cells under SCORE_COLUMNS: median and 90th percentile of |error|, the share not above `high`, and of those in the
    range, and the two rules' median |error| with the rows that they have a number for."""
    return (
        each.group, str(each.rows), f"{each.median_error:.1%}", f"{each.p90_error:.1%}", f"{each.below_high:.0%}",
        f"{each.in_range:.0%}", f"{each.median_width:.2f}", _rule(each.accelerate_error, each.accelerate_rows),
        _rule(each.deepspeed_error, each.deepspeed_rows),
    )  # fmt: skip


def _rule(error: float | None, rows: int) -> str:
    return "-" if error is None else f"{error:.0%} ({rows})"
