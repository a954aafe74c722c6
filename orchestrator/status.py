"""What is going on and what may cost money right now, over all runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from orchestrator.clock import SystemClock
from orchestrator.ledger import Run
from orchestrator.money import Rate, shown
from orchestrator.provision import Provisioner
from orchestrator.runner import machine_age_s, spending_micros
from orchestrator.session import is_driven, live_machines, state_of
from tasks.bucket import BucketError, open_bucket

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1


def build_status(runs: Sequence[Run], provider_of: Callable[[Run], Provisioner | None]) -> dict[str, Any]:
    """The document of `kdcloud status --json`; providers are asked only about machines that may bill."""
    return {"schema": SCHEMA, "runs": [_one(run, provider_of) for run in runs]}


def _one(run: Run, provider_of: Callable[[Run], Provisioner | None]) -> dict[str, Any]:
    plan, clock = run.data["plan"], SystemClock()
    live = live_machines(run, provider_of(run) if run.live else None)
    state = state_of(run)
    if state == "running" and not _driven(run):
        state = "interrupted"
    return {
        "run": run.id,
        "recipe": run.name,
        "state": state,
        "currency": plan["currency"],
        "rate": {"usd_to_cny": float(plan["rate"]["usd_to_cny"]), "as_of": plan["rate"]["as_of"]},
        "started_at": run.created_at.isoformat(),
        "stages_done": len(run.done),
        "stages": len(plan["stages"]),
        "cap_micros": run.cap_micros,
        "spend_micros": run.spent_micros,
        "spending_micros": spending_micros(run, lambda row: machine_age_s(row, clock)),
        "reserved_micros": run.open_micros,
        "bucket": run.bucket,
        "worst_case_micros": run.spent_micros + run.api_open_micros + sum(m["worst_case_micros"] for m in live),
        "live": live,
    }


def _driven(run: Run) -> bool:
    try:
        return is_driven(open_bucket(run.bucket), SystemClock())
    except BucketError:
        return False


def render_status(document: Mapping[str, Any], console: Console) -> None:
    from rich import box
    from rich.table import Table

    if not document["runs"]:
        console.print("nothing has run yet; try `kdcloud run quickstart`")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (
        ("run", "left"),
        ("state", "left"),
        ("stages", "right"),
        ("spent", "right"),
        ("cap", "right"),
        ("machines", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=name == "run", overflow="fold")  # type: ignore[arg-type]
    for run in document["runs"]:
        colour = {"done": "green", "running": "cyan"}.get(run["state"], "yellow")
        table.add_row(
            run["run"],
            f"[{colour}]{run['state']}[/]",
            f"{run['stages_done']}/{run['stages']}",
            _amount(run["spending_micros"], run),
            _amount(run["cap_micros"], run),
            str(len(run["live"]) or "none"),
        )
    console.print(table)
    for machine in (one for run in document["runs"] for one in run["live"]):
        state = f"{machine['state'].lower()} for {machine['stage']}"
        text = f"{machine['name']}: {state}; provider says {machine['provider']}"
        console.print(text, markup=False, soft_wrap=True)
    for run in document["runs"]:
        if run["state"] == "interrupted":
            console.print(
                f"{run['run']}: its client is gone; `kdcloud run --resume {run['run']}` goes on, "
                f"`kdcloud down {run['run']}` ends it",
                soft_wrap=True,
            )
    console.print(may_bill(document["runs"]), soft_wrap=True)


def _amount(micros: int, run: Mapping[str, Any]) -> str:
    """In the currency of the run, at the rate that it was approved at."""
    rate = Rate(Decimal(str(run["rate"]["usd_to_cny"])), date.fromisoformat(run["rate"]["as_of"]))
    return shown(micros, rate, run["currency"])


def may_bill(runs: Sequence[Mapping[str, Any]]) -> str:
    """What open machines hold, and the most they may come to: more than that once an end is not confirmed in time.

    In the currency of the newest run that has one: amounts of several runs are one sum.
    """
    live = [machine for run in runs for machine in run["live"]]
    if not live:
        return "nothing is running, nothing bills"
    newest = next(run for run in runs if run["live"])
    reserved, worst = (sum(m[key] for m in live) for key in ("reserved_micros", "worst_case_micros"))
    if worst > reserved:
        return (
            f"{len(live)} may still bill beyond their reservations of {_amount(reserved, newest)}: in the worst case "
            f"{_amount(worst, newest)} by now, and it grows until their end is confirmed; "
            "`kdcloud reap --yes` tries again"
        )
    many = "1 machine may bill" if len(live) == 1 else f"{len(live)} machines may bill"
    return f"{many}, {_amount(reserved, newest)} at most: so much is reserved for it until it is gone"
