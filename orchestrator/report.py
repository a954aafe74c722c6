"""What came out of a run: money against plan and cap, every stage predicted against actual, quality side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.ledger import Run
from orchestrator.plan import Plan
from orchestrator.session import state_of
from orchestrator.states import State

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
QUALITY = ("teacher", "student_before", "student_hard", "student_hard_2x", "student")
QUALITY_NAMES = {
    "teacher": "teacher",
    "student_before": "student before",
    "student_hard": "student, hard labels",
    "student_hard_2x": "student, hard labels, twice the steps",
    "student": "student, distilled",
}


def build_report(run: Run, plan: Plan, live: list[dict[str, Any]]) -> dict[str, Any]:
    """The document of `kdcloud report --json`. Money is integer micro-USD; unknown is null."""
    return {
        "schema": SCHEMA,
        "run": run.id,
        "recipe": run.name,
        "state": state_of(run),
        "started_at": run.created_at.isoformat(),
        "currency": plan.currency,
        "bucket": run.bucket,
        "cap_micros": run.cap_micros,
        "spend_micros": run.spent_micros,
        "reserved_micros": run.open_micros,
        "live": live,
        "stages": [_stage(run, stage) for stage in plan.stages],
        "quality": _quality(run),
        "labels": next((_result(run, s.name) for s in plan.stages if s.kind == "label" and s.name in run.done), None),
        "artifacts": [
            {"stage": stage, "key": f"{stage}/{name}", "bytes": size}
            for stage, data in run.done.items()
            for name, size in sorted(data["files"].items())
        ],
        "message": run.ends[-1].data["message"] if run.ends else "",
        "hint": run.ends[-1].data["hint"] if run.ends else "",
    }


def _stage(run: Run, stage: Any) -> dict[str, Any]:
    rows = [m for m in run.machines if m.stage == stage.name]
    gone = [m for m in rows if m.state is State.GONE and "billed_s" in m.facts]
    peaks = [m.facts["ended"]["peak_gib"] for m in rows if m.facts.get("ended") and m.facts["ended"].get("peak_gib")]
    state = (
        "done"
        if stage.name in run.done
        else "running"
        if any(m.state is not State.GONE for m in rows)
        else "open"
        if rows
        else "waiting"
    )
    offer = (gone or rows)[-1].order["offer"] if rows else None
    return {
        "name": stage.name,
        "kind": stage.kind,
        "state": state,
        "attempts": len(rows),
        "offer": offer
        and {
            k: offer[k]
            for k in ("infra", "region", "instance", "gpu", "gpus", "spot", "price_micros_per_hour", "as_of")
        },
        "predicted": {
            "hours": stage.hours.expected,
            "cost_micros": stage.cost_micros.expected,
            "vram_gib": stage.vram_gib.expected,
            "hours_low": stage.hours.low,
            "hours_high": stage.hours.high,
        },
        "actual": {
            "hours": sum(m.facts["billed_s"] for m in gone) / 3600 if gone else None,
            "cost_micros": sum(m.settled_micros for m in gone) if gone else None,
            "peak_gib": max(peaks, default=None),
        },
        "ends": [m.reasons[-1] for m in rows if m.reasons],
    }


def _result(run: Run, stage: str) -> Mapping[str, Any]:
    result = run.done[stage]["result"]
    return {k: v for k, v in result.items() if k != "samples"}


def _quality(run: Run) -> dict[str, Any]:
    for data in run.done.values():
        found = data["result"].get("quality")
        if found:
            return {key: found.get(key) for key in QUALITY}
    return dict.fromkeys(QUALITY)


def render_report(report: Mapping[str, Any], plan: Plan, console: Console) -> None:
    """The report for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from orchestrator.money import both, shown

    def money(micros: int | None) -> str:
        return "-" if micros is None else both(micros, plan.rate, plan.currency)

    def short(micros: int | None) -> str:
        return "-" if micros is None else shown(micros, plan.rate, plan.currency)

    state = report["state"]
    colour = {"done": "green", "running": "cyan"}.get(state, "yellow")
    console.print(Text.assemble(("run ", "bold"), (report["run"], "bold"), "  ", (state, colour)))
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="stages: predicted -> actual",
        title_justify="left",
        title_style="bold",
    )
    for name, justify in (
        ("stage", "left"),
        ("machine", "left"),
        ("time", "right"),
        ("cost", "right"),
        ("memory", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage in report["stages"]:
        predicted, actual, offer = stage["predicted"], stage["actual"], stage["offer"]
        where = (
            "-"
            if offer is None
            else "this machine"
            if offer["infra"] == "local"
            else f"{offer['infra']} {offer['gpu'] or offer['instance']}"
        )
        table.add_row(
            stage["name"],
            where,
            f"{_hours(predicted['hours'])} -> {_hours(actual['hours'])}",
            f"{short(predicted['cost_micros'])} -> {short(actual['cost_micros'])}",
            f"{_gib(predicted['vram_gib'])} -> {_gib(actual['peak_gib'])}",
            stage["state"] + (f", {stage['attempts']} attempts" if stage["attempts"] > 1 else ""),
        )
    console.print(table)
    console.print(
        f"spent {money(report['spend_micros'])} of {money(report['cap_micros'])}"
        + (f"; {len(report['live'])} machines may still bill" if report["live"] else "; nothing is running")
    )
    if any(report["quality"].values()):
        console.print()
        console.print(_quality_table(report["quality"]))
    if report["message"]:
        console.print(f"[bold]{state}[/]: {report['message']}" + (f"\n  -> {report['hint']}" if report["hint"] else ""))


def _quality_table(quality: Mapping[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="quality on the held-out set",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("model")
    for name in ("accuracy", "min - max", "seeds", "tokens/s", "first token", "memory"):
        table.add_column(name, justify="right")
    for key in QUALITY:
        row = quality.get(key)
        if row is None:
            continue
        accuracy, seeds = row["accuracy"], len(row["accuracy"]["seeds"])
        table.add_row(
            QUALITY_NAMES[key],
            f"{accuracy['mean']:.3f}",
            f"{accuracy['min']:.3f} - {accuracy['max']:.3f}" if seeds > 1 else "",
            str(seeds),
            _number(row.get("tokens_per_s"), "{:,.0f}"),
            _number(row.get("first_token_s"), "{:.4f} s"),
            _gib(row.get("peak_gib")),
            style="bold" if key == "student" else "",
        )
    sizes = {row["accuracy"]["n"] for row in quality.values() if row}
    count = ", ".join(map(str, sorted(sizes)))
    table.caption = f"{count} held-out problems; students on the same labels, at equal steps unless named"
    table.caption_justify = "left"
    return table


def _hours(hours: float | None) -> str:
    from orchestrator.money import human_seconds

    return "-" if hours is None else human_seconds(hours * 3600)


def _gib(gib: float | None) -> str:
    return _number(gib, "{:.2f} GiB")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
