"""What came out of a run: money against plan and cap, every stage predicted against actual, quality side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.ledger import Run
from orchestrator.plan import Plan
from orchestrator.session import state_of
from orchestrator.shares import visits
from orchestrator.smoke import NOTE
from orchestrator.states import State

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1
QUALITY = ("teacher", "student_before", "student_hard", "student_hard_2x", "student")
QUALITY_NAMES = {
    "teacher": "teacher",
    "student_before": "student before",
    "student_hard": "hard labels",
    "student_hard_2x": "hard, 2x steps",
    "student": "distilled",
}


def build_report(run: Run, plan: Plan, live: list[dict[str, Any]]) -> dict[str, Any]:
    """The document of `kdcloud report --json`. Money is integer micro-USD; unknown is null."""
    return {
        "schema": SCHEMA,
        "run": run.id,
        "recipe": run.name,
        "smoke": is_smoke(run),
        "state": state_of(run),
        "started_at": run.created_at.isoformat(),
        "currency": plan.currency,
        "bucket": run.bucket,
        "cap_micros": run.cap_micros,
        "spend_micros": run.spent_micros,
        "api_micros": run.api_spent_micros,
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


def is_smoke(run: Run) -> bool:
    """Whether it was a trial with few samples."""
    return bool(run.data.get("smoke"))


def _stage(run: Run, stage: Any) -> dict[str, Any]:
    seen = [visit for row in run.machines for visit in visits(row) if visit.stage == stage.name]
    gone = [visit for visit in seen if visit.seconds is not None]
    ends = [visit.facts["ended"] for visit in seen if visit.facts.get("ended")]
    peaks = [ended["peak_gib"] for ended in ends if ended.get("peak_gib")]
    state = (
        "done"
        if stage.name in run.done
        else "running"
        if any(visit.row.state is not State.GONE and visit.is_last for visit in seen)
        else "open"
        if seen
        else "waiting"
    )
    offer = (gone or seen)[-1].row.order["offer"] if seen else None
    return {
        "name": stage.name,
        "kind": stage.kind,
        "state": state,
        "attempts": len(seen),
        "joins": stage.joins,
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
            "hours": sum(visit.seconds or 0.0 for visit in gone) / 3600 if gone else None,
            "cost_micros": sum(visit.micros or 0 for visit in gone) if gone else None,
            "peak_gib": max(peaks, default=None),
        },
        "forecast": seen[-1].facts.get("forecast") if seen else None,
        "limited": run.done[stage.name]["result"].get("limited") if stage.name in run.done else None,
        "ends": [visit.row.reasons[-1] for visit in seen if visit.is_last and visit.row.reasons],
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
    """The report for a terminal, 80 columns or wider."""
    from rich.text import Text

    from orchestrator.money import both

    state = report["state"]
    colour = {"done": "green", "running": "cyan"}.get(state, "yellow")
    console.print(Text.assemble(("run ", "bold"), (report["run"], "bold"), "  ", (state, colour)))
    if report["smoke"]:
        console.print(Text(NOTE, style="yellow"))
    console.print()
    console.print(_stage_table(report["stages"], plan))
    spent, cap, api = (both(report[f"{key}_micros"], plan.rate, plan.currency) for key in ("spend", "cap", "api"))
    asked = f" ({api} on APIs)" if report["api_micros"] else ""
    console.print(f"spent {spent}{asked} of {cap}; {_running(report['live'], plan)}")
    if any(report["quality"].values()):
        console.print()
        console.print(_quality_table(report["quality"]))
        for line in harness_lines(report["quality"]):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if report["message"]:
        console.print(Text.assemble((f"{state}: ", "bold"), report["message"]), soft_wrap=True)
    if report["hint"]:
        console.print(f"  -> {report['hint']}", soft_wrap=True, markup=False)


def _running(live: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    from orchestrator.money import both

    if not live:
        return "nothing is running"
    worst, reserved = (sum(m[key] for m in live) for key in ("worst_case_micros", "reserved_micros"))
    grows = ", growing until their end is confirmed" if worst > reserved else ""
    many = "1 machine" if len(live) == 1 else f"{len(live)} machines"
    return f"{many} may still bill, in the worst case {both(worst, plan.rate, plan.currency)}{grows}"


def _stage_table(stages: Sequence[Mapping[str, Any]], plan: Plan) -> Table:
    from orchestrator.money import human_seconds, shown

    def hours(value: float | None) -> str:
        return "-" if value is None else human_seconds(value * 3600)

    def money(micros: int | None) -> str:
        return "-" if micros is None else shown(micros, plan.rate, plan.currency)

    table = _table("stages, planned → actual")
    table.collapse_padding = True
    for name, justify in (("stage", "left"), ("on", "left"), ("time", "right"), ("cost", "right"), ("GiB", "right")):
        table.add_column(name, justify=justify, no_wrap=name != "on")  # type: ignore[arg-type]
    table.add_column("")
    for stage in stages:
        predicted, actual, offer = stage["predicted"], stage["actual"], stage["offer"]
        table.add_row(
            stage["name"],
            "-" if offer is None else offer["infra"] + (f" {offer['gpu']}" if offer["gpu"] else ""),
            f"{hours(predicted['hours'])} → {hours(actual['hours'])}",
            f"{money(predicted['cost_micros'])} → {money(actual['cost_micros'])}",
            f"{_number(predicted['vram_gib'], '{:.2f}')} → {_number(actual['peak_gib'], '{:.2f}')}",
            stage["state"]
            + (f", {stage['attempts']} attempts" if stage["attempts"] > 1 else "")
            + (f", {limited['done']} of {limited['planned']}" if (limited := stage.get("limited")) else ""),
        )
    return table


def _quality_table(quality: Mapping[str, Any]) -> Table:
    """A row a model. Columns that no row has a number for are left out; it fits 80 columns."""
    rows = {key: quality[key] for key in QUALITY if quality.get(key) is not None}
    seeds = max(len(row["accuracy"]["seeds"]) for row in rows.values())
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "accuracy, 95 %": lambda row: _accuracy(row["accuracy"]),
        "seeds": lambda row: _span(row["accuracy"]["min"], row["accuracy"]["max"]) if seeds > 1 else "",
        "KL": lambda row: "" if row.get("kl_to_teacher") is None else three(row["kl_to_teacher"]),
        "tokens/s": lambda row: _number(row.get("tokens_per_s"), "{:,.0f}"),
        "1st, ms": lambda row: _number(row.get("first_token_s"), "{:,.1f}", times=1000),
        "GiB": lambda row: _number(row.get("peak_gib"), "{:.2f}"),
    }
    told = {name: [said(row) for row in rows.values()] for name, said in columns.items()}
    told = {name: cells for name, cells in told.items() if any(cells)}
    table = _table("quality on the held-out set")
    table.collapse_padding, table.show_edge = True, False
    table.add_column("model", no_wrap=True)
    for name in told:
        table.add_column(name, justify="right", no_wrap=True)
    for at, key in enumerate(rows):
        cells = [told[name][at] for name in told]
        table.add_row(QUALITY_NAMES[key], *cells, style="bold" if key == "student" else "")
    count = ", ".join(sorted({str(row["accuracy"]["n"]) for row in rows.values()}))
    many = f", mean of {seeds} seeds" if seeds > 1 else ""
    notes = ["95 %: over problems, not over trainings"] if seeds > 1 else []
    notes += ["KL: from the teacher, nats a token"] if "KL" in told else []
    below = "\n" + "; ".join(notes) if notes else ""
    table.caption = f"{count} held-out problems{many}; same labels and steps unless named{below}"
    return table


def harness_lines(quality: Mapping[str, Any]) -> list[str]:
    """A line a number of lm-evaluation-harness: what it is, and how much of which model. Standard errors stay away."""
    told: dict[str, list[str]] = {}
    for key in QUALITY:
        for task, numbers in ((quality.get(key) or {}).get("lm_eval") or {}).items():
            for name, value in numbers.items():
                if "stderr" not in name:
                    told.setdefault(f"{task} {name}", []).append(f"{QUALITY_NAMES[key]} {value:.3f}")
    return [f"{what}: {', '.join(values)}" for what, values in told.items()]


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    """The mean with its interval over problems, where there is one: older runs have none."""
    interval = accuracy.get("interval")
    return f"{accuracy['mean']:.3f}" + (f" ({_span(*interval)})" if interval else "")


def _span(low: float, high: float) -> str:
    return f"{low:.2f}-{high:.2f}"


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
    )


def three(value: float) -> str:
    """Three figures, zeros too: `0.139`, `1.00`, `12.3`."""
    return f"{value:#.3g}".rstrip(".")


def _number(value: float | None, form: str, *, times: float = 1, none: str = "-") -> str:
    return none if value is None else form.format(value * times)
