"""What will be done, where, and what may it cost? The approved plan as a value, as JSON, and as a table people read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from orchestrator.fronts import needed_hours
from orchestrator.money import Rate, both, human_seconds, shown
from orchestrator.provision import Latencies, Offer
from tasks.contract import SETTINGS, Settings, build

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SCHEMA = 1
NAME_WIDTH = 20  # columns of a stage's name beside what is said of it


@dataclass(frozen=True)
class Range:
    """An estimate: about one run in ten should end below `low`, one in ten above `high`."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __sub__(self, part: Range) -> Range:
        """The rest of a sum that holds `part`."""
        return Range(self.low - part.low, self.expected - part.expected, self.high - part.high)

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.expected * factor, self.high * factor)


@dataclass(frozen=True)
class Micros:
    """A cost as a range, integer micro-USD."""

    low: int
    expected: int
    high: int

    def __add__(self, other: Micros) -> Micros:
        return Micros(self.low + other.low, self.expected + other.expected, self.high + other.high)


@dataclass(frozen=True)
class Rejected:
    """A machine that was looked at and not taken."""

    gpu: str
    why: str
    infra: str = ""


@dataclass(frozen=True)
class Part:
    """Some of a stage's time: the model's own estimate, and how far off it was in earlier runs of the same kind."""

    key: str  # what it is compared with: kind of work and machine
    seconds: Range  # before calibration
    ratios: tuple[float, ...] = ()  # actual / estimated, newest first


@dataclass(frozen=True)
class StagePlan:
    """One stage: its settings in full, the machines to try in order, and what it should take."""

    name: str
    kind: str
    settings: Settings
    after: tuple[str, ...]  # stages whose results it needs
    vram_gib: Range
    vram_breakdown_gib: Mapping[str, float]
    hours: Range  # of the chosen machine, its start included
    startup_hours: Range  # part of `hours`: until the stage's own work begins
    candidates: tuple[Offer, ...]  # the first is chosen; the others in the order to try them
    candidate_hours: tuple[Range, ...]  # of each candidate
    cost_micros: Micros  # of the chosen machine
    reserve_micros: int  # held back for latencies while the machine lives; comes back when it ends in time
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]
    uses: Mapping[str, float]  # what the estimate rests on: expected lengths, counts, shares
    chosen: tuple[str, ...] = ()  # names of the settings that the recipe left to the planner
    candidate_parts: tuple[Mapping[str, Part], ...] = ()  # of each candidate; see orchestrator.calibration
    joins: bool = False  # it runs on the machine of the stage before it, which is not ended in between

    @property
    def parts(self) -> Mapping[str, Part]:
        """Of the chosen machine."""
        return self.candidate_parts[0] if self.candidate_parts else {}

    @property
    def offer(self) -> Offer:
        return self.candidates[0]


@dataclass(frozen=True)
class Overhead:
    """A cost beside the machines: storage, traffic, an API."""

    what: str
    cost_micros: Micros
    row: str = "bucket"  # what the table calls it
    by: str = "storage"  # who or what is paid


@dataclass(frozen=True)
class Plan:
    """What the user approves, by its digest."""

    name: str
    recipe: str  # path of the recipe
    digest: str
    currency: str
    rate: Rate
    made_at: datetime
    stages: tuple[StagePlan, ...]
    overhead: tuple[Overhead, ...]
    cap_micros: int
    deadline_s: float | None
    idle_s: float
    bucket: str
    on_shortfall: str
    infra: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> Range:
        return sum((stage.hours for stage in self.stages), Range(0.0, 0.0, 0.0))

    @property
    def cost_micros(self) -> Micros:
        costs = [stage.cost_micros for stage in self.stages] + [item.cost_micros for item in self.overhead]
        return sum(costs, Micros(0, 0, 0))

    @property
    def reserve_micros(self) -> int:
        return sum(stage.reserve_micros for stage in self.stages)

    @property
    def needed_micros(self) -> int:
        """The smallest cap this plan fits under."""
        return self.cost_micros.expected + self.reserve_micros

    @property
    def fits(self) -> bool:
        return self.needed_micros <= self.cap_micros

    @property
    def tight(self) -> bool:
        return self.cost_micros.high > self.cap_micros

    @property
    def needed_hours(self) -> float:
        """The shortest deadline this plan is in time for: a run ends the work on each machine so long before it as the
        machine may take to end."""
        return needed_hours((stage.hours.expected, ending_hours(stage.offer)) for stage in self.stages)

    @property
    def in_time(self) -> bool:
        return self.deadline_s is None or self.needed_hours <= self.deadline_s / 3600

    @property
    def offers_as_of(self) -> datetime | None:
        """Date of the oldest price that is used; None when every machine is the user's own."""
        return min((stage.offer.as_of for stage in self.stages if stage.offer.infra != "local"), default=None)


def ending_hours(offer: Offer) -> float:
    """How long before the deadline a run ends the work on a machine."""
    return offer.latencies.total_s / 3600


def digest_of(recipe: Any, stages: tuple[StagePlan, ...], cap_micros: int, deadline_s: float | None, rate: Rate) -> str:
    """sha256 of all that is approved: the recipe's meaning, settings, machines with their prices, cap and rate."""
    machines = [
        [[o.infra, o.region, o.instance, o.gpu, o.gpus, o.spot, o.price_micros_per_hour] for o in stage.candidates]
        for stage in stages
    ]
    body: dict[str, Any] = {
        "recipe": recipe,
        "settings": [asdict(stage.settings) for stage in stages],
        "machines": machines,
        "cap_micros": cap_micros,
        "deadline_s": deadline_s,
        "rate": str(rate.usd_to_cny),
    }
    if joined := [stage.name for stage in stages if stage.joins]:
        body["joins"] = joined
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


# --- JSON for programs (`plan --json`)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The document of `kdcloud plan --json`: money in integer micro-USD, GiB of 2^30, hours, ISO-8601 UTC."""
    as_of = plan.offers_as_of
    return {
        "schema": SCHEMA,
        "recipe": plan.name,
        "recipe_path": plan.recipe,
        "digest": plan.digest,
        "currency": plan.currency,
        "rate": {"usd_to_cny": float(plan.rate.usd_to_cny), "as_of": plan.rate.as_of.isoformat()},
        "made_at": _iso(plan.made_at),
        "offers_as_of": None if as_of is None else _iso(as_of),
        "stages": [_stage_to_json(stage) for stage in plan.stages],
        "overhead": [{"what": item.what, "cost_micros": asdict(item.cost_micros)} for item in plan.overhead],
        "total": {"hours": asdict(plan.hours), "cost_micros": asdict(plan.cost_micros)},
        "reserve_micros": plan.reserve_micros,
        "needed_micros": plan.needed_micros,
        "needed_hours": plan.needed_hours,
        "cap_micros": plan.cap_micros,
        "fits": plan.fits,
        "tight": plan.tight,
        "deadline_s": plan.deadline_s,
        "in_time": plan.in_time,
        "idle_s": plan.idle_s,
        "bucket": plan.bucket,
        "on_shortfall": plan.on_shortfall,
        "notes": list(plan.notes),
    }


def _stage_to_json(stage: StagePlan) -> dict[str, Any]:
    from orchestrator import calibration

    return {
        "name": stage.name,
        "kind": stage.kind,
        "after": list(stage.after),
        "vram_gib": asdict(stage.vram_gib),
        "vram_breakdown_gib": dict(stage.vram_breakdown_gib),
        "hours": asdict(stage.hours),
        "startup_hours": asdict(stage.startup_hours),
        "offer": offer_to_json(stage.offer),
        "candidates": [offer_to_json(offer) for offer in stage.candidates],
        "joins": stage.joins,
        "cost_micros": asdict(stage.cost_micros),
        "reserve_micros": stage.reserve_micros,
        "settings": asdict(stage.settings),
        "chosen": list(stage.chosen),
        "rejected": [asdict(one) for one in stage.rejected],
        "uses": dict(stage.uses),
        "calibration": calibration.to_json(stage.parts),
        "notes": list(stage.notes),
    }


def offer_to_json(offer: Offer) -> dict[str, Any]:
    return {
        "infra": offer.infra,
        "region": offer.region,
        "instance": offer.instance,
        "gpu": offer.gpu,
        "gpus": offer.gpus,
        "spot": offer.spot,
        "price_micros_per_hour": offer.price_micros_per_hour,
        "as_of": _iso(offer.as_of),
        "source": offer.source,
    }


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- JSON for the ledger: nothing lost


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain JSON data; `plan_from_dict` gives the same plan back."""
    raw = asdict(plan)
    raw["rate"] = {"usd_to_cny": str(plan.rate.usd_to_cny), "as_of": plan.rate.as_of.isoformat()}
    raw["made_at"] = plan.made_at.isoformat()
    for stage in raw["stages"]:
        for offer in stage["candidates"]:
            offer["as_of"] = offer["as_of"].isoformat()
    return {"plan_schema": SCHEMA, **raw}


def plan_from_dict(raw: Mapping[str, Any]) -> Plan:
    """The plan that `plan_to_dict` wrote. Raises ValueError, KeyError or TypeError for other data."""
    if raw.get("plan_schema") != SCHEMA:
        raise ValueError(f"plan has schema {raw.get('plan_schema')}, this kdcloud reads {SCHEMA}")
    values = {field.name: raw[field.name] for field in fields(Plan)}
    values["rate"] = Rate(Decimal(raw["rate"]["usd_to_cny"]), date.fromisoformat(raw["rate"]["as_of"]))
    values["made_at"] = datetime.fromisoformat(raw["made_at"])
    values["stages"] = tuple(_stage_from_dict(stage) for stage in raw["stages"])
    values["overhead"] = tuple(_overhead_from_dict(item) for item in raw["overhead"])
    values["infra"] = tuple(raw["infra"])
    values["notes"] = tuple(raw["notes"])
    return Plan(**values)


def _overhead_from_dict(raw: Mapping[str, Any]) -> Overhead:
    return Overhead(**{**raw, "cost_micros": Micros(**raw["cost_micros"])})


def _stage_from_dict(raw: Mapping[str, Any]) -> StagePlan:
    values = {field.name: raw[field.name] for field in fields(StagePlan) if field.name in raw}
    values["settings"] = build(SETTINGS[raw["kind"]], raw["settings"])
    for name in ("vram_gib", "hours", "startup_hours"):
        values[name] = Range(**raw[name])
    values["cost_micros"] = Micros(**raw["cost_micros"])
    values["candidates"] = tuple(_offer_from_dict(offer) for offer in raw["candidates"])
    values["candidate_hours"] = tuple(Range(**hours) for hours in raw["candidate_hours"])
    values["rejected"] = tuple(Rejected(**one) for one in raw["rejected"])
    for name in ("after", "notes", "chosen"):
        values[name] = tuple(raw[name])
    each = raw.get("candidate_parts", ())  # plans of older versions have none
    values["candidate_parts"] = tuple({name: _part_from_dict(part) for name, part in one.items()} for one in each)
    return StagePlan(**values)


def _part_from_dict(raw: Mapping[str, Any]) -> Part:
    return Part(raw["key"], Range(**raw["seconds"]), tuple(raw["ratios"]))


def _offer_from_dict(raw: Mapping[str, Any]) -> Offer:
    return Offer(**{**raw, "as_of": datetime.fromisoformat(raw["as_of"]), "latencies": Latencies(**raw["latencies"])})


# --- the table


def render_plan(plan: Plan, console: Console) -> None:
    """Prints the plan as a table: a row a stage, chosen settings below, the total against the cap."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble("\n", (plan.name, "bold"), f"  {_where(plan)}"))
    console.print(_table(plan, console.width))
    told = Table.grid(padding=(0, 2))
    told.add_column(overflow="fold", max_width=NAME_WIDTH, style="bold")
    told.add_column()
    for stage in plan.stages:
        details = _details(stage, plan)
        if details is not None:
            told.add_row(Text(stage.name), details)
    console.print(Padding(told, (0, 0, 0, 1)))
    console.print()
    for line in _sums(plan):
        console.print(line)
    console.print()


def _where(plan: Plan) -> str:
    infra = dict.fromkeys(stage.offer.infra for stage in plan.stages)
    stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages"
    return f"{stages} on {', '.join(infra)}; files in {plan.bucket}"


def _table(plan: Plan, width: int) -> RenderableType:
    """A row a stage. Below 100 columns machines have short names, below 72 memory, low and high are left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    narrow, slim = width < 100, width < 72
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_footer=True)
    total = plan.cost_micros
    table.add_column("stage", footer="total", no_wrap=True)
    if not slim:
        table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("time", footer=human_seconds(plan.hours.expected * 3600), justify="right", no_wrap=True)
    table.add_column("machine", overflow="fold")
    table.add_column("price/h", justify="right", no_wrap=True)
    for name, value in _costs(total, slim).items():
        table.add_column(name, footer=shown(value, plan.rate, plan.currency), justify="right", no_wrap=True)
    for column in table.columns:
        column.header_style = column.footer_style = "bold"
    for stage in plan.stages:
        memory = [] if slim else [_gib(stage.vram_gib.expected)]
        costs = [shown(value, plan.rate, plan.currency) for value in _costs(stage.cost_micros, slim).values()]
        machine = Text("same machine" if stage.joins else machine_name(stage.offer, short=narrow))
        price = "" if stage.joins else _price(stage.offer, plan)
        time = human_seconds(stage.hours.expected * 3600)
        table.add_row(stage.name, *memory, time, machine, price, *costs)
    for item in plan.overhead:
        costs = [shown(value, plan.rate, plan.currency) for value in _costs(item.cost_micros, slim).values()]
        table.add_row(item.row, *([] if slim else [""]), "", item.by, "", *costs)
    return table


def _costs(cost: Micros, slim: bool) -> dict[str, int]:
    """Columns of cost, by heading."""
    return {"expected": cost.expected} if slim else {"low": cost.low, "expected": cost.expected, "high": cost.high}


def _price(offer: Offer, plan: Plan) -> str:
    price = offer.price_micros_per_hour
    return "not found" if price is None else "free" if price == 0 else shown(price, plan.rate, plan.currency)


def machine_name(offer: Offer, *, short: bool) -> str:
    if offer.infra == "local":
        name = "your own machine" if offer.price_micros_per_hour == 0 else "this machine"
        return name if short or not offer.instance else f"{name}, {offer.instance}"
    count = f"{offer.gpus}x " if offer.gpus > 1 else ""
    name = f"{count}{offer.gpu or 'CPU'}{' spot' if offer.spot else ''}, {offer.infra}"
    return name if short else f"{name} {offer.instance}"


def _gib(gib: float) -> str:
    return f"{gib:.1f}" if gib < 99.95 else f"{gib:.0f}"


def _details(stage: StagePlan, plan: Plan) -> RenderableType | None:
    """Chosen settings, what the estimate rests on, notes; None when there is nothing to say."""
    from rich.text import Text

    lines = Text()
    said = [*_said_settings(stage), *_said_uses(stage, plan)]
    if len(stage.candidates) > 1 and not stage.joins:
        others = len(stage.candidates) - 1
        said.append(f"{others} other {'machine' if others == 1 else 'machines'} to fall back on")
    if not said and not stage.notes:
        return None
    lines.append("; ".join(said))
    for note in stage.notes:
        lines.append(f"\n{note}" if lines else note, style="yellow")
    return lines


_WORDS = {
    "micro_batch": "micro-batch",
    "max_seq_len": "rows up to",
    "precision": "in",
    "label_temperature": "labels at T",
    "max_new_tokens": "answers up to",
    "batch_size": "batches of",
}


def _said_settings(stage: StagePlan) -> list[str]:
    """The settings that were chosen, in words."""
    said = []
    for name in stage.chosen:
        value = getattr(stage.settings, name)
        if name == "checkpointing":
            said.append("gradient checkpointing" if value else "no gradient checkpointing")
        elif name == "compile":
            said += ["compiled layers"] if value else []
        elif name == "checkpoint_every_s":
            said.append(f"checkpoint every {human_seconds(value)}")
        elif name in _WORDS:
            unit = " tokens" if name in ("max_seq_len", "max_new_tokens") else ""
            said.append(f"{_WORDS[name]} {f'{value:g}' if isinstance(value, float) else value}{unit}")
    return said


def _said_uses(stage: StagePlan, plan: Plan) -> list[str]:
    """What the estimate rests on, in words."""
    from orchestrator import calibration

    uses, said = stage.uses, []
    if "expected_answer_tokens" in uses:
        said.append(f"answers of about {uses['expected_answer_tokens']:.0f} tokens")
    if "kept_samples" in uses:
        said.append(f"about {uses['kept_samples']:.0f} of {uses['answers']:.0f} kept")
    if uses.get("cost_micros_per_kept_sample"):
        said.append(f"{shown(int(uses['cost_micros_per_kept_sample']), plan.rate, plan.currency)} a kept sample")
    if "steps_in_all" in uses:
        more = (
            ""
            if uses["steps_in_all"] == uses["steps"]
            else f", {uses['steps_in_all']:.0f} with seeds, control arms and search"
        )
        said.append(f"{uses['steps']:.0f} steps{more}")
    if uses.get("setup_s", 0.0) >= 60.0:
        said.append(f"its packages take {human_seconds(uses['setup_s'])} to install")
    said += _said_gpus(stage)
    measured = calibration.said(stage.parts)
    return [*said, measured] if measured else said


def _said_gpus(stage: StagePlan) -> list[str]:
    """What a stage does with several GPUs of its machine."""
    gpus, together = stage.offer.gpus, getattr(stage.settings, "tensor_parallel", 1)
    if gpus < 2:
        return []
    if stage.kind == "train":
        whole = stage.settings.method != "full"  # type: ignore[union-attr]
        return [f"{gpus} GPUs share the rows of a step, {'the model on each' if whole else 'each with its part of it'}"]
    if stage.kind == "label" and getattr(stage.settings, "api", None) is None:
        engines = gpus // together
        each = f", each on {together} of the {gpus} GPUs together" if engines > 1 else f" on {gpus} GPUs together"
        if together > 1:
            return [f"{engines} engines{each}" if engines > 1 else f"one engine{each}"]
        return [f"an engine on each of the {gpus} GPUs"]
    if stage.kind == "evaluate":
        return [f"{gpus} GPUs write answers, each its part"]
    return [f"one of the {gpus} GPUs works"]


def _bullets(notes: Sequence[str]) -> list[RenderableType]:
    """A list whose further lines begin below the words, not below the dash."""
    from rich.table import Table
    from rich.text import Text

    listed = Table.grid(padding=(0, 1))
    listed.add_column()
    listed.add_column(style="yellow")
    for note in notes:
        listed.add_row(Text("-", "yellow"), Text(note))
    return [listed] if notes else []


def _sums(plan: Plan) -> list[RenderableType]:
    """Total, reserve and cap; the verdict; notes; age of prices."""
    from rich.text import Text

    def amount(micros: int) -> str:
        return both(micros, plan.rate, plan.currency)

    lines: list[RenderableType] = [
        Text(
            f"expected {amount(plan.cost_micros.expected)} + {amount(plan.reserve_micros)} held back while machines end"
            f" = {amount(plan.needed_micros)}, cap {amount(plan.cap_micros)}"
        )
    ]
    if not plan.fits:
        lines.append(
            Text(f"does not fit: {amount(plan.needed_micros - plan.cap_micros)} over the cap", style="bold red")
        )
    elif not plan.in_time:
        lines.append(Text("fits under the cap, but misses the deadline", style="bold yellow"))
    elif plan.tight:
        lines.append(Text("fits, but is tight: the high estimate is above the cap", style="bold yellow"))
    else:
        lines.append(Text("fits under the cap", style="bold green"))
    lines += _bullets(plan.notes)
    as_of = plan.offers_as_of
    dated = f"oldest price read {as_of:%Y-%m-%d}; " if as_of is not None else ""
    lines.append(
        Text(f"{dated}1 USD = {plan.rate.usd_to_cny} CNY as of {plan.rate.as_of}; plan {plan.digest[:12]}", style="dim")
    )
    return lines
