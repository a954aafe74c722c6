"""Other looks at a plan: cost against time, why each other card lost, and what a change would make of it.

Each as a table that people read and as what `kdcloud plan --json` adds: `frontier`, `explain` and `what_if`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import NothingFits, UsageError
from orchestrator.money import both, human_seconds, shown
from orchestrator.offers import card_named
from orchestrator.plan import Plan, machine_name, offer_to_json
from orchestrator.planner import FrontPlan, Looked
from orchestrator.provision import Offer
from orchestrator.recipe import LabelStage, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.market import Lot
    from orchestrator.planner import Allowed, Planner

SHOWN_PLANS = 12  # of a frontier, in the table
_SHARED = "; a + b: on one machine"


@dataclass(frozen=True)
class WhatIf:
    """What `--what-if` says, like `gpu=RTX3090 spot=yes`. `stage`: only that one; None: as the recipe has it."""

    text: str
    gpu: str | None = None
    gpus: int | None = None
    spot: bool | None = None
    infra: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Compared:
    """A change and the plan it makes, or why there is none."""

    what_if: WhatIf
    plan: Plan | None
    why: str = ""


def parse_what_if(text: str) -> WhatIf:
    """`gpu=RTX3090 spot=yes gpus=2 infra=aws stage=train`, apart by blanks or commas. Raises UsageError."""
    values: dict[str, Any] = {}
    for word in text.replace(",", " ").split():
        key, equals, value = word.partition("=")
        if key not in ("gpu", "gpus", "spot", "infra", "stage") or not equals or not value:
            raise UsageError(
                f"--what-if: {word!r} is not a change",
                hint="give gpu=CARD, gpus=N, spot=yes|no, infra=WHERE, stage=NAME",
            )
        values[key] = card_named(value) if key == "gpu" else value
    if not values.keys() - {"stage"}:
        raise UsageError("--what-if says nothing to change", hint="like --what-if gpu=RTX3090")
    if "gpus" in values:
        if not values["gpus"].isdecimal() or values["gpus"] == "0":
            raise UsageError("--what-if: gpus is a number from 1 on", hint="like --what-if 'gpu=A100 gpus=2'")
        values["gpus"] = int(values["gpus"])
    if "spot" in values:
        if values["spot"].lower() not in ("yes", "no", "true", "false"):
            raise UsageError("--what-if: spot is yes or no", hint="like --what-if spot=yes")
        values["spot"] = values["spot"].lower() in ("yes", "true")
    return WhatIf(text, **values)


def changed(recipe: Recipe, what_if: WhatIf) -> tuple[Recipe, Allowed]:
    """The recipe as the change has it, and which lots its stages may look at. Who asks an API keeps its machine."""
    update: dict[str, Any] = {}
    if what_if.gpu is not None:
        update["gpus"] = (what_if.gpu,)
    if what_if.spot is not None:
        update["spot"] = what_if.spot
    if what_if.infra is not None:
        update["infra"] = (what_if.infra,)
    names = [stage.name for stage in recipe.stages]
    if what_if.stage is not None and what_if.stage not in names:
        raise UsageError(f"--what-if: there is no stage {what_if.stage!r}", hint=f"the recipe has {', '.join(names)}")
    meant = [
        stage.name
        for stage in recipe.stages
        if what_if.stage in (None, stage.name) and not (isinstance(stage, LabelStage) and stage.api is not None)
    ]

    def allowed(stage: str, lot: Lot) -> bool:
        one = lot.first
        return stage not in meant or (what_if.gpus in (None, one.gpus) and what_if.spot in (None, one.spot))

    stages = tuple(stage.model_copy(update=update) if stage.name in meant else stage for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages}), allowed


# --- JSON


def frontier_to_json(front: Sequence[FrontPlan], plan: Plan) -> list[dict[str, Any]]:
    """`frontier`: plans from the cheapest to the fastest. `needed_micros`: expected costs, overheads and reserves;
    `needed_hours`: the shortest deadline; `joins`: stages on the machine of the stage before."""
    return [
        {
            "hours": one.hours,
            "needed_hours": one.needed_hours,
            "needed_micros": one.needed_micros,
            "fits": one.needed_micros <= plan.cap_micros,
            "in_time": _in_time(one, plan),
            "machines": {
                stage.name: offer_to_json(offer) for stage, offer in zip(plan.stages, one.machines, strict=True)
            },
            "joins": [stage.name for stage, joins in zip(plan.stages, one.joins, strict=True) if joins],
        }
        for one in front
    ]


def explain_to_json(looked: Sequence[Looked]) -> list[dict[str, Any]]:
    """A stage's part of `explain`: each card at its best offer. Null: it does not fit, or has no price."""
    return [
        {
            "gpu": one.gpu,
            "spot": one.spot,
            "taken": one.taken,
            "why": one.why,
            "offer": None if one.offer is None else offer_to_json(one.offer),
            "vram_gib": None if one.vram_gib is None else asdict(one.vram_gib),
            "hours": None if one.hours is None else asdict(one.hours),
            "cost_micros": None if one.cost_micros is None else asdict(one.cost_micros),
            "needed_micros": one.needed_micros,
            "settings": None if one.settings is None else asdict(one.settings),
            "joins": one.joins,
        }
        for one in looked
    ]


def what_if_to_json(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """`what_if`: each change with what the whole plan would be."""
    return [
        {
            "what_if": one.what_if.text,
            "why_not": one.why or None,
            "hours": None if one.plan is None else asdict(one.plan.hours),
            "needed_hours": None if one.plan is None else one.plan.needed_hours,
            "cost_micros": None if one.plan is None else asdict(one.plan.cost_micros),
            "needed_micros": None if one.plan is None else one.plan.needed_micros,
            "fits": one.plan is not None and one.plan.fits,
            "in_time": one.plan is not None and one.plan.in_time,
            "machines": {}
            if one.plan is None
            else {stage.name: offer_to_json(stage.offer) for stage in one.plan.stages},
            "joins": [] if one.plan is None else [stage.name for stage in one.plan.stages if stage.joins],
        }
        for one in compared
    ]


# --- tables


def render_frontier(front: Sequence[FrontPlan], plan: Plan, console: Console) -> None:
    """Cost against time: some of the plans that none beats in both."""
    rows = _spread(front)
    table = _table("time", "needed", "machines")
    for one in rows:
        planned = tuple(stage.offer for stage in plan.stages), tuple(stage.joins for stage in plan.stages)
        mark = " (this plan)" if (one.machines, one.joins) == planned else ""
        limits = [] if one.needed_micros <= plan.cap_micros else ["over the cap"]
        limits += [] if _in_time(one, plan) else ["late"]
        said = f" ({', '.join(limits)})" if limits else mark
        table.add_row(
            human_seconds(one.hours * 3600),
            shown(one.needed_micros, plan.rate, plan.currency),
            _machines([stage.name for stage in plan.stages], one.machines, one.joins) + said,
        )
    shared = _SHARED if any(any(one.joins) for one in rows) else ""
    console.print(
        f"cost against time, reserves included: {_counted(len(front), 'plan')} that none beats in both{shared}"
    )
    console.print(table)
    if len(rows) < len(front):
        console.print(f"{len(front) - len(rows)} more between them: --json shows all\n")


def render_explained(name: str, looked: Sequence[Looked], plan: Plan, console: Console) -> None:
    """A row a card: what the stage would need there, and why it is not the one."""
    table = _table("card", "GiB", "of", "time", "cost", "why")
    for one in looked:
        if one.offer is None:
            table.add_row(one.gpu, "", "", "", "", one.why)
            continue
        assert one.vram_gib is not None and one.hours is not None and one.needed_micros is not None
        table.add_row(
            f"{one.gpu} spot, {one.offer.infra}" if one.spot else f"{one.gpu}, {one.offer.infra}",
            f"{one.vram_gib.high:.1f}",
            f"{one.offer.vram_gib:.1f}",
            human_seconds(one.hours.expected * 3600),
            shown(one.needed_micros, plan.rate, plan.currency),
            f"taken{', on the machine of the stage before' if one.joins else ''}" if one.taken else one.why,
        )
    console.print(
        f"{name}: each card at its cheapest offer; memory at most, cost with its reserve, of a shared machine its share"
    )
    console.print(table)


def render_what_if(compared: Sequence[Compared], plan: Plan, console: Console) -> None:
    """The plan and each change of it, side by side."""
    table = _table("", "time", "expected", "needed", "machines")
    names = [stage.name for stage in plan.stages]

    def row(said: str, one: Plan) -> None:
        limits = [] if one.fits else ["over the cap"]
        limits += [] if one.in_time else ["late"]
        more = f" ({', '.join(limits)})" if limits else ""
        table.add_row(
            said,
            human_seconds(one.hours.expected * 3600),
            shown(one.cost_micros.expected, one.rate, one.currency),
            shown(one.needed_micros, one.rate, one.currency),
            _machines(names, [stage.offer for stage in one.stages], [stage.joins for stage in one.stages]) + more,
        )

    row("as planned", plan)
    for each in compared:
        if each.plan is None:
            table.add_row(each.what_if.text, "", "", "", each.why)
        else:
            row(each.what_if.text, each.plan)
    cap = both(plan.cap_micros, plan.rate, plan.currency)
    plans = [plan, *(each.plan for each in compared if each.plan is not None)]
    shared = _SHARED if any(stage.joins for one in plans for stage in one.stages) else ""
    console.print(f"what if; needed: expected and what is held back, cap {cap}{shared}")
    console.print(table)


def compared(planner: Planner, what_if: WhatIf) -> Compared:
    """A change of what `planner` plans."""
    try:
        return Compared(what_if, planner.of(*changed(planner.recipe, what_if)).plan())
    except NothingFits as error:
        return Compared(what_if, None, error.message)


def _in_time(one: FrontPlan, plan: Plan) -> bool:
    return plan.deadline_s is None or one.needed_hours <= plan.deadline_s / 3600


def _spread(front: Sequence[FrontPlan]) -> list[FrontPlan]:
    """At most SHOWN_PLANS of them, evenly in time, both ends among them."""
    if len(front) <= SHOWN_PLANS:
        return list(front)
    slowest, fastest = front[0].hours, front[-1].hours
    picked: dict[int, FrontPlan] = {}
    for one in front[:-1]:
        picked.setdefault(int((slowest - one.hours) / (slowest - fastest) * (SHOWN_PLANS - 1)), one)
    return [*picked.values(), front[-1]]


def _machines(names: Sequence[str], offers: Sequence[Offer], joins: Sequence[bool]) -> str:
    """`RTX3090, vast: label + train, export; A100, vast: evaluate`: label and train on one machine."""
    groups: dict[str, str] = {}
    for name, offer, joined in zip(names, offers, joins, strict=True):
        machine = machine_name(offer, short=True)
        before = groups.get(machine)
        groups[machine] = name if before is None else f"{before}{' + ' if joined else ', '}{name}"
    if len(groups) == 1 and not any(joins):
        return next(iter(groups))
    return "; ".join(f"{machine}: {stages}" for machine, stages in groups.items())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, header_style="bold")
    for name in columns:
        numbers = name in ("time", "needed", "GiB", "of", "cost", "expected")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    return table
