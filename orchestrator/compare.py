"""Which run was worth its money? Cost against accuracy of runs, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.money import Rate, human_seconds, shown
from orchestrator.page_data import flat
from orchestrator.plan import Plan
from orchestrator.report import QUALITY, three

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1
BESIDE = ("planned", "GiB")  # left out where the terminal is narrow


def build_compare(runs: Sequence[tuple[Mapping[str, Any], Plan]]) -> dict[str, Any]:
    """The document of `kdcloud compare --json`, of each run's report and plan. Unknown is null."""
    return {
        "schema": SCHEMA,
        "currency": runs[0][1].currency,
        "runs": [_run(report) for report, _ in runs],
        "settings": differences([_settings(plan) for _, plan in runs]),
    }


def _run(report: Mapping[str, Any]) -> dict[str, Any]:
    hours = [stage["actual"]["hours"] for stage in report["stages"] if stage["actual"]["hours"] is not None]
    peaks = [stage["actual"]["peak_gib"] for stage in report["stages"] if stage["actual"]["peak_gib"] is not None]
    student = report["quality"].get("student") or {}
    return {
        "run": report["run"],
        "recipe": report["recipe"],
        "state": report["state"],
        "spend_micros": report["spend_micros"],
        "planned_micros": sum(stage["predicted"]["cost_micros"] for stage in report["stages"]),
        "machine_hours": sum(hours) if hours else None,
        "peak_gib": max(peaks, default=None),
        "accuracy": {role: (report["quality"].get(role) or {}).get("accuracy") for role in QUALITY},
        "kl_to_teacher": student.get("kl_to_teacher"),
        "tokens_per_s": student.get("tokens_per_s"),
    }


def _settings(plan: Plan) -> dict[str, Any]:
    """`train.lora.r`: value, of every stage; with the machine that was planned."""
    found: dict[str, Any] = {}
    for stage in plan.stages:
        found |= {f"{stage.name}.{name}": value for name, value in flat(asdict(stage.settings))}
        found[f"{stage.name}: machine"] = " ".join(word for word in (stage.offer.infra, stage.offer.gpu) if word)
    return found


def differences(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs, in order; null where a run has none of that name."""
    names = list(dict.fromkeys(name for one in settings for name in one))
    rows = [{"setting": name, "values": [one.get(name) for one in settings]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def best_value(runs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether no other run is as good for less money, or better for as much: what is on the edge of the picture."""
    known = [(run["spend_micros"], _mean(run)) for run in runs]

    def beaten(cost: int, mean: float) -> bool:
        return any(m is not None and c <= cost and m >= mean and (c, m) != (cost, mean) for c, m in known)

    return [mean is not None and not beaten(cost, mean) for cost, mean in known]


def _mean(run: Mapping[str, Any], role: str = "student") -> float | None:
    found = run["accuracy"][role]
    return None if found is None else float(found["mean"])


def render_compare(document: Mapping[str, Any], rate: Rate, console: Console) -> None:
    """Tables for a terminal; names and values are shown as plain text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    runs = document["runs"]
    columns = _columns(runs, rate, document["currency"])
    fewer = {name: cells for name, cells in columns.items() if name not in BESIDE}
    ids, short = [run["run"] for run in runs], [_short(run["run"]) for run in runs]
    for names, cells in ((ids, columns), (ids, fewer), (short, fewer)):
        table = _table(names, cells, runs)
        if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
            break
    console.print(table)
    told = "time of machines; accuracy on held-out problems\nbold: no other run is as good for less"
    console.print(Text(told, "dim"))
    if not document["settings"]:
        console.print("\nsame settings")
        return
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="settings that differ", title_justify="left")
    for name in ("setting", *(_short(run["run"]) for run in runs)):
        table.add_column(Text(name), overflow="fold")
    for row in document["settings"]:
        table.add_row(Text(row["setting"]), *(Text(value_said(value)) for value in row["values"]))
    console.print(table)


def _columns(runs: Sequence[Mapping[str, Any]], rate: Rate, currency: str) -> dict[str, list[str]]:
    """Cells by column, a cell a run."""
    columns = {
        "state": [run["state"] for run in runs],
        "cost": [shown(run["spend_micros"], rate, currency) for run in runs],
        "planned": [shown(run["planned_micros"], rate, currency) for run in runs],
        "time": ["-" if run["machine_hours"] is None else human_seconds(run["machine_hours"] * 3600) for run in runs],
        "GiB": [_said(run["peak_gib"], ".2f") for run in runs],
        "student": [_said(_mean(run, "student"), ".3f") for run in runs],
        "hard": [_said(_mean(run, "student_hard"), ".3f") for run in runs],
        "teacher": [_said(_mean(run, "teacher"), ".3f") for run in runs],
        "KL": ["-" if run["kl_to_teacher"] is None else three(run["kl_to_teacher"]) for run in runs],
    }
    if set(columns["state"]) == {"done"}:
        del columns["state"]
    return columns


def _table(names: Sequence[str], columns: Mapping[str, Sequence[str]], runs: Sequence[Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for at, best in enumerate(best_value(runs)):
        cells = [names[at], *(cells[at] for cells in columns.values())]
        table.add_row(*map(Text, cells), style="bold" if best and len(runs) > 1 else "")
    return table


def _short(run_id: str) -> str:
    return run_id.rpartition("-")[2]


def value_said(value: Any) -> str:
    """A setting in a cell; what does not print is shown as `?`."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else "?" for char in text)


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
