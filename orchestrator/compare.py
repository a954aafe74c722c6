"""Which run was worth its money? Cost against accuracy of runs, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.money import Rate, human_seconds, shown
from orchestrator.page_data import flat
from orchestrator.plan import Plan
from orchestrator.report import QUALITY

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1


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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for name in ("cost", "planned", "machine time", "GiB", "student", "hard", "teacher", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for run, best in zip(runs, best_value(runs), strict=True):
        cells = [
            shown(run["spend_micros"], rate, document["currency"]),
            shown(run["planned_micros"], rate, document["currency"]),
            "-" if run["machine_hours"] is None else human_seconds(run["machine_hours"] * 3600),
            _said(run["peak_gib"], ".2f"),
            *(_said(_mean(run, role), ".3f") for role in ("student", "student_hard", "teacher")),
            _said(run["kl_to_teacher"], ".3g"),
        ]
        name = run["run"] if run["state"] == "done" else f"{run['run']} ({run['state']})"
        table.add_row(Text(name), *map(Text, cells), style="bold" if best and len(runs) > 1 else "")
    console.print(table)
    console.print(Text("bold: no other run is as good for less", "dim"))
    if not document["settings"]:
        console.print("\nsame settings")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="settings that differ", title_justify="left")
    for name in ("setting", *(run["run"].rpartition("-")[2] for run in runs)):
        table.add_column(Text(name), overflow="fold")
    for row in document["settings"]:
        table.add_row(Text(row["setting"]), *(Text(value_said(value)) for value in row["values"]))
    console.print(table)


def value_said(value: Any) -> str:
    """A setting in a cell; what does not print is shown as `?`."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else "?" for char in text)


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
