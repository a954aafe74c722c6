"""Which machine, how long and how dear, for every stage of a recipe? Pure: values in, a plan out.

Offers are sorted into lots once (market). A stage has an option for each lot, with the settings that are fastest among
those that fit; stages in a row have options together, on one machine of a lot that holds them all (stays). Of these
such are taken that all together cost least within the deadline (fronts). The others that hold the same settings stay in
order for failover.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from orchestrator import access, duration, money, setup_time, spend, teachers
from orchestrator.calibration import Ratios, calibrated, card_of, sum_of, with_ratios, work_key
from orchestrator.catalog import MODELS, ModelShape
from orchestrator.config import Config
from orchestrator.errors import NothingFits, UsageError
from orchestrator.forecast import LEAST_SHARE
from orchestrator.fronts import Point, Spans, cheapest_in_time, fastest, needed_hours, whole_front, worth_a_look
from orchestrator.locks import environments
from orchestrator.market import MACHINES_AN_INFRA, PLACES_A_MACHINE, Lot, lots_of
from orchestrator.offers import known_price
from orchestrator.plan import Micros, Overhead, Part, Plan, Range, Rejected, StagePlan, digest_of, ending_hours
from orchestrator.provision import Need, Offer
from orchestrator.recipe import EvaluateStage, LabelStage, Recipe, Stage, TrainStage, gpu_counts
from orchestrator.setup_time import runs_vllm
from orchestrator.sizing import (
    Machine,
    Measured,
    choices,
    fetched_gb,
    left_gb,
    left_open,
    measure,
    models_gb,
    needed_memory,
    uses_all_gpus,
)
from orchestrator.stays import Cell, Things, stays
from orchestrator.workload import LONGEST_PROMPT_TOKENS, ROWS_UNKNOWN, World
from tasks.contract import LabelSettings, Settings, TrainSettings

OffersFor = Callable[[Need], list[Offer]]
LotsFor = Callable[[Need], list[Lot]]
Allowed = Callable[[str, Lot], bool]  # whether the stage of that name may look at the lot
Calibration = Ratios

STORAGE_USD_MICROS_PER_GB = 23_000  # S3 standard, us-east-1, one month
EGRESS_USD_MICROS_PER_GB = 90_000  # AWS to the internet, first 10 TB; nothing within a region
SLURM_STARTUP_S = Range(20.0, 40.0, 90.0)  # an idle partition, a warm SkyPilot server (measured on one machine)
CLOUD_STARTUP_S = Range(120.0, 300.0, 900.0)  # request to a usable machine; its environment comes on top
LOCAL_STARTUP_S = Range(0.1, 0.5, 2.0)
OLD_PRICE_DAYS = 180
MOST_ADVICE = 3  # changes that are told beside a larger budget
JOIN = True  # whether stages may share a machine


@dataclass(frozen=True)
class _Way:
    """A stage with given settings on a given card: what it takes, whoever rents it out."""

    settings: Settings
    measured: Measured
    hours: Range
    startup: Range
    parts_of: Callable[[], Mapping[str, Part]]  # few ways are asked for them

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        return self.parts_of()

    @property
    def needs_gib(self) -> float:
        return self.measured.memory.total_gib.high


class _Option(NamedTuple):
    """A stage on the cheapest offer of a lot, in the fastest way that fits there. `needed_micros`: what it costs with
    its reserve for latencies and its traffic out of the bucket."""

    lot: Lot
    offer: Offer
    way: _Way
    needed_micros: int

    @property
    def cost(self) -> Micros:
        return _shares(self.offer, (self.way,))[0]

    @property
    def reserve(self) -> int:
        return spend.latency_reserve_micros(self.offer)


@dataclass(frozen=True)
class _Considered:
    """A stage's options, cheapest first, and the lots that have none."""

    options: list[_Option]
    refused: list[tuple[Lot, str]]

    @cached_property
    def front(self) -> list[Point]:
        return _front(self.options)


@dataclass(frozen=True)
class _Stay:
    """Stages in a row on one machine, on the cheapest offer of a lot; `first`: the first of them, `ways`: of each.
    `needed_micros`: what they cost together with one reserve for latencies and their traffic out of the bucket."""

    first: int
    lot: Lot
    offer: Offer
    ways: tuple[_Way, ...]
    needed_micros: int

    @property
    def reserve(self) -> int:
        return spend.latency_reserve_micros(self.offer)

    @property
    def costs(self) -> list[Micros]:
        """Of each stage: its share, by its time, of what the machine costs."""
        return _shares(self.offer, self.ways)


@dataclass(frozen=True)
class _Scene:
    """What all stages are planned under."""

    config: Config
    lots_for: LotsFor
    now: datetime
    cap: int
    deadline_s: float | None
    calibration: Calibration
    join: bool
    allowed: Allowed | None = None


@dataclass(frozen=True)
class FrontPlan:
    """A plan that no other beats in both cost and time. `machines`: the offer of each stage, in order; `joins`: whether
    it is the machine of the stage before. `needed_hours`: see Plan."""

    hours: float
    needed_hours: float
    needed_micros: int
    machines: tuple[Offer, ...]
    joins: tuple[bool, ...]


@dataclass(frozen=True)
class Looked:
    """A card as one stage sees it, at its best offer: why it is not the one. None: it does not fit, or has no price."""

    gpu: str
    spot: bool
    why: str
    offer: Offer | None = None
    vram_gib: Range | None = None
    hours: Range | None = None
    cost_micros: Micros | None = None
    needed_micros: int | None = None
    settings: Settings | None = None
    taken: bool = False
    joins: bool = False  # on the machine of the stage before


class Planner:
    """A recipe and a market, which may be asked more than one thing: offers are sorted and stages measured once."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        config: Config,
        offers_for: OffersFor,
        now: datetime,
        cap_micros: int | None = None,
        deadline_s: float | None = None,
        calibration: Calibration | None = None,
        join: bool = JOIN,
    ) -> None:
        cap = money.cap_micros(recipe.budget, config.rate) if cap_micros is None else cap_micros
        if cap < 0:
            raise UsageError("the budget must be above 0", hint="give --budget or `budget:` an amount such as 50 CNY")
        deadline = recipe.deadline if deadline_s is None else deadline_s
        self.recipe = recipe
        self._scene = _Scene(config, _sorted_once(offers_for), now, cap, deadline, calibration or {}, join)

    def plan(self) -> Plan:
        """The cheapest plan in time, whether it fits under the cap or not (`Plan.fits`). Where no machines are fast
        enough, that of the fastest (`Plan.in_time`).

        Raises NothingFits when a stage fits no machine at any price, with the smallest change that would help.
        """
        with _collector_paused():
            plan = _assemble(self._rows, self._taken)
            if plan.fits and plan.in_time:
                return plan
            advice = _what_would_fit(plan, self._rows, self._taken)
            return replace(plan, notes=(*advice, *plan.notes))

    def of(self, recipe: Recipe, allowed: Allowed) -> Planner:
        """The same for another recipe, whose stages look at allowed lots only."""
        other = copy(self)
        other.recipe, other._scene = recipe, replace(self._scene, allowed=allowed)
        for worked_out in ("_rows", "_taken"):
            other.__dict__.pop(worked_out, None)
        return other

    def frontier(self) -> list[FrontPlan]:
        """Plans from the cheapest to the fastest, whatever deadline and cap are."""
        plan = _assemble(self._rows, self._taken)
        beside = plan.needed_micros - sum(one.needed_micros for one in self._taken)
        return [
            FrontPlan(
                sum((point.hours for point in points), 0.0),
                needed_hours((point.hours, point.ending_hours) for point in points),
                sum(point.micros for point in points) + beside,
                tuple(offer for one in found for offer in [one.offer] * len(one.ways)),
                tuple(at > 0 for one in found for at, _ in enumerate(one.ways)),
            )
            for points in whole_front(self._rows.spans)
            if (found := [self._rows.stay(point) for point in points])
        ]

    def explain(self, name: str) -> list[Looked]:
        """Each card for the stage of that name, at its best offer: the one taken, then by what the whole plan would
        cost with it, then what does not fit. Raises UsageError."""
        names = [stage.name for stage in self.recipe.stages]
        if name not in names:
            raise UsageError(f"there is no stage {name!r}", hint=f"the recipe has {', '.join(names)}")
        index = names.index(name)
        considered, taken = self._rows.considered[index], _at(self._taken, index)
        groups: dict[tuple[str, bool], list[_Option]] = {}
        for option in considered.options:
            groups.setdefault((option.lot.cards, option.offer.spot), []).append(option)
        groups.pop((taken.lot.cards, taken.offer.spot))
        others = sorted((self._with(index, options) for options in groups.values()), key=lambda one: one[0])
        looked = [_looked(taken, index, ""), *(one for _, one in others)]
        seen = {one.gpu for one in looked}
        for gpu, why in dict.fromkeys((lot.cards, why) for lot, why in considered.refused):
            if gpu not in seen:
                looked.append(Looked(gpu, False, why))
        stage = self.recipe.stages[index]
        for gpu in _need(stage, self.recipe).gpus:
            if gpu not in {one.gpu.rpartition("x ")[2] for one in looked}:
                looked.append(Looked(gpu, False, "not on offer where this stage may run"))
        return looked

    def _with(self, index: int, options: list[_Option]) -> tuple[float, Looked]:
        """(what the whole plan would cost, the look) with a stage on the best of these options, be it alone or on one
        machine with others."""
        points = cheapest_in_time(self._rows.restricted(index, options), _hours(self._scene.deadline_s))
        taken = _at(self._taken, index)
        if points is None:
            stay = self._rows.stay(_point(options[0]))
            slower = stay.ways[0].hours.expected > taken.ways[index - taken.first].hours.expected
            return math.inf, _looked(stay, index, "too slow for the deadline" if slower else "too late")
        others = [self._rows.stay(point) for point in points]
        micros = sum(one.needed_micros for one in others)
        stay = _at(others, index)
        return micros, _looked(stay, index, self._lost(stay, others, index))

    def _lost(self, stay: _Stay, others: list[_Stay], index: int) -> str:
        """Why a machine was not taken: what the whole plan would cost with it."""
        rate, currency, taken = self._scene.config.rate, self._scene.config.currency, _at(self._taken, index)
        more = sum(one.needed_micros for one in others) - sum(one.needed_micros for one in self._taken)
        dearer = f"{money.shown(more, rate, currency)} dearer" if more else "costs the same"
        if len(stay.ways) < len(taken.ways):
            return f"{dearer} in all: fewer stages share one"
        if len(stay.ways) == len(taken.ways) and stay.needed_micros < taken.needed_micros:
            return f"{dearer} together, since another stage would have to be faster"
        changed = stay.ways[index - stay.first].hours.expected - taken.ways[index - taken.first].hours.expected
        if abs(changed) * 3600 < 1:
            return f"{dearer}, as fast"
        return f"{dearer}, {money.human_seconds(abs(changed) * 3600)} {'slower' if changed > 0 else 'faster'}"

    @cached_property
    def _rows(self) -> _Rows:
        return _look(World(self.recipe, self._scene.config.rate), self._scene)

    @cached_property
    def _taken(self) -> list[_Stay]:
        return _take(self._rows)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes no cycles worth a collection, and each would walk through all offers: a fifth of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def make_plan(recipe: Recipe, **given: Any) -> Plan:
    """The plan of a recipe: see Planner, which takes the same."""
    return Planner(recipe, **given).plan()


def later_floor_micros(plan: Plan, index: int, apis: Mapping[str, spend.ApiLine] | None = None) -> int:
    """What must stay for the stages after `index`, the last that the machine at hand serves: their low costs, their
    machines' reserves, and overheads.

    `apis`: what the ledger holds of APIs' money; what it does not hold yet stays, too, that of `index` included. Of a
    stage before, which is done, nothing more is needed, unless the ledger knows nothing of it.
    """
    apis = apis or {}
    machines = sum(stage.cost_micros.low + stage.reserve_micros for stage in plan.stages[index + 1 :])
    asking = {stage.name for stage in plan.stages if api_micros(stage) is not None}
    rest = sum(item.cost_micros.low for item in plan.overhead if item.row not in asking)
    needing = [stage for at, stage in enumerate(plan.stages) if at >= index or stage.name not in apis]
    return machines + rest + unbooked_micros(needing, apis)


def unbooked_micros(stages: Iterable[StagePlan], apis: Mapping[str, spend.ApiLine]) -> int:
    """What the APIs of these stages still need and no ledger holds."""
    found = 0
    for stage in stages:
        whole = api_micros(stage)
        if whole is not None:
            found += apis.get(stage.name, spend.ApiLine()).to_book_micros(whole)
    return found


def api_micros(stage: StagePlan) -> int | None:
    """The worst case of the stage's API; None where it asks none."""
    api = getattr(stage.settings, "api", None)
    return None if api is None else int(api.max_cost_micros)


def _sorted_once(offers_for: OffersFor) -> LotsFor:
    known: dict[Need, list[Lot]] = {}
    same: dict[tuple[Offer, ...], Lot] = {}

    def lots_for(need: Need) -> list[Lot]:
        """A lot that serves several needs is one and the same value: stages that share a machine share a lot."""
        if need not in known:
            if len(known) == 1:  # most recipes have one need
                same.update((lot.offers, lot) for lots in known.values() for lot in lots)
            found = lots_of(offers_for(need))
            known[need] = [same.setdefault(lot.offers, lot) for lot in found] if known else found
        return known[need]

    return lots_for


def _needs(recipe: Recipe, scene: _Scene) -> tuple[int, float]:
    """(`Plan.needed_micros`, `needed_hours`) of a changed recipe, without the rest of its plan. Raises NothingFits."""
    world, bucket = World(recipe, scene.config.rate), recipe.bucket_url or scene.config.bucket
    taken = _take(_look(world, scene))
    apis = [getattr(way.settings, "api", None) for one in taken for way in one.ways]
    needed = sum(one.needed_micros for one in taken) + sum(api.max_cost_micros for api in apis if api is not None)
    hours = needed_hours((way.hours.expected, ending_hours(one.offer)) for one in taken for way in one.ways)
    return needed + _month_micros(world, bucket), hours


def _assemble(rows: _Rows, taken: list[_Stay]) -> Plan:
    world, scene, recipe = rows.world, rows.scene, rows.world.recipe
    config, bucket = scene.config, recipe.bucket_url or scene.config.bucket
    stages = tuple(stage for stay in taken for stage in _stage_plans(stay, rows))
    overhead = (*_apis(stages), *_storage(stages, world, bucket))
    plan = Plan(
        name=recipe.name,
        recipe=recipe.path,
        digest="",
        currency=config.currency,
        rate=config.rate,
        made_at=scene.now,
        stages=stages,
        overhead=overhead,
        cap_micros=scene.cap,
        deadline_s=scene.deadline_s,
        idle_s=recipe.idle,
        bucket=bucket,
        on_shortfall=recipe.on_shortfall,
        infra=recipe.infra or (),
        notes=(),
    )
    beside = {"path", "text", "models", "folders", "files", "bucket_url", "labels"}
    meaning = recipe.model_dump(mode="json", exclude=beside)
    hashes = sorted([file.sha256 for file in recipe.files.values()] + [one.sha256 for one in recipe.labels.values()])
    digest = digest_of([meaning, hashes], stages, scene.cap, scene.deadline_s, config.rate)
    notes = (*_plan_notes(plan, recipe, scene.now), *access.notes(plan, recipe.allow_account_key))
    return replace(plan, digest=digest, notes=notes)


# --- choosing a machine


@dataclass(frozen=True)
class _Rows:
    """What all stages may run on, each alone and in a row with others."""

    world: World
    scene: _Scene
    considered: list[_Considered]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.world.recipe.stages

    @cached_property
    def spans(self) -> Spans:
        fronts = {(at, at + 1): list(one.front) for at, one in enumerate(self.considered)}
        if self.scene.join:
            fronts |= _fronts(self._by_lot.values())
        spans: list[dict[int, list[Point]]] = [{} for _ in self.considered]
        for (first, end), front in fronts.items():
            spans[first][end] = front
        return spans

    def restricted(self, index: int, options: list[_Option]) -> Spans:
        """The same where one stage may only run on lots of these of its options."""
        spans = [
            {end: front for end, front in by_end.items() if not first <= index < end}
            for first, by_end in enumerate(self.spans)
        ]
        spans[index][index + 1] = _front(options)
        if self.scene.join:
            lots = [self._by_lot[key] for one in options if (key := id(one.lot)) in self._by_lot]
            for (first, end), front in _fronts(lots).items():
                if first <= index < end:
                    spans[first][end] = front
        return spans

    def stay(self, point: Point) -> _Stay:
        """What a point of the spans stands for."""
        if isinstance(point.what, _Option):
            option, first = point.what, self._index_of[id(point.what)]
            return _Stay(first, option.lot, option.offer, (option.way,), option.needed_micros)
        lot, first, end = point.what
        alone = [option.way for option in self._by_lot[id(lot)][1][first:end] if option is not None]
        ways = _one_after_another(first, alone, lot, self)
        _, which = lot.least_micros(sum((way.hours.expected for way in ways), 0.0) * 3600)
        return _Stay(first, lot, lot.offers[which], ways, point.micros)

    def next(self, at: int, alone: _Way, lot: Lot, have: frozenset[str]) -> tuple[_Way, frozenset[str]]:
        """(a stage's way on a machine that has these things already, what it has then). None: it was just made."""
        packages, models = self._leaves(at, alone, lot)
        there = have | {packages, *models}
        if not have:
            return alone, there
        return _joined(self.stages[at], alone, lot.first.infra, packages, models, have, self.scene), there

    def _leaves(self, at: int, way: _Way, lot: Lot) -> tuple[str, dict[str, float]]:
        """What the stage leaves on a machine: its packages, and models with their GB."""
        stage = self.stages[at]
        environment = way.measured.environment
        models = {} if lot.first.gpu is None else models_gb(stage, way.settings, self.world)
        return f"packages {environment or ''}", models

    @cached_property
    def _index_of(self) -> dict[int, int]:
        return {id(option): at for at, one in enumerate(self.considered) for option in one.options}

    @cached_property
    def _by_lot(self) -> dict[int, tuple[Lot, list[_Option | None], list[Cell | None]]]:
        """Lots that may hold more than one stage, by id: their options and what they take, by stage. A machine of your
        own is no machine to save, and what asks an API needs one for longer than it works."""
        found: dict[int, tuple[Lot, list[_Option | None], list[Cell | None]]] = {}
        things, known = Things(), dict[Any, Any]()
        bucket = self.world.recipe.bucket_url or self.scene.config.bucket
        for at, (stage, considered) in enumerate(zip(self.stages, self.considered, strict=True)):
            if isinstance(stage, LabelStage) and stage.api is not None:
                continue
            egress = _egress_micros(stage, self.world, bucket)
            for option in considered.options:
                lot = option.lot
                if lot.first.infra == "local":
                    continue
                if id(lot) not in found:
                    found[id(lot)] = (lot, [None] * len(self.stages), [None] * len(self.stages))
                more = egress if _pays_for_traffic(lot.first.infra) else 0
                found[id(lot)][1][at] = option
                found[id(lot)][2][at] = self._cell(at, option, more, things, known)
        return found

    def _cell(self, at: int, option: _Option, egress: int, things: Things, known: dict[Any, Any]) -> Cell:
        """`known`: what lots have in common."""
        way, lot, scene = option.way, option.lot, self.scene
        if (at, id(way)) in known:
            cell: Cell = known[at, id(way)]
            return cell
        left = (at, id(way.settings), None if lot.gpu is None else lot.gpu.name, lot.first.gpu)
        if left not in known:
            packages, models = self._leaves(at, way, lot)
            known[left] = packages, models, things.mask(packages), things.mask(packages, *models)
        packages, models, setup_of, leaves = known[left]
        infra = lot.first.infra if scene.calibration else ""  # nothing else of a joined stage depends on it
        key = (infra, packages)
        if key not in known:
            known[key] = {
                mask: duration.hours(calibrated(_joined_setup(*key, ready=bool(mask), scene=scene))).expected
                for mask in (0, setup_of)
            }
        own = (*left, lot.first.gpus, infra)
        if own not in known:
            there = [frozenset[str]()]
            for name in models:
                there += [have | {name} for have in there]
            known[own] = {
                things.mask(*have): _joined_own_hours(way, _missing(models, have), scene).expected
                for have in there
            }
        cell = Cell(way.hours.expected, leaves, setup_of, egress, known[own], known[key])
        known[at, id(way)] = known.setdefault((at, cell.alone_hours, egress, own, key), cell)
        return cast(Cell, known[at, id(way)])


def _fronts(
    lots: Iterable[tuple[Lot, list[_Option | None], list[Cell | None]]],
) -> dict[tuple[int, int], list[Point]]:
    """Of each row of stages on one machine, two or more, what is worth a look."""
    found: dict[tuple[int, int], list[tuple[int, float, float, int, Lot]]] = {}
    alike: dict[tuple[Any, ...], list[Lot]] = {}  # lots on which all stages take the same time
    for lot, _, cells in lots:
        ending = lot.ending_hours
        others = alike.setdefault((ending, *map(id, cells)), [])
        if any(lot.never_cheaper_than(other) for other in others):
            continue
        others.append(lot)
        for first, end, micros, hours in stays(lot, cells):
            rows = found.setdefault((first, end), [])
            rows.append((micros, hours, ending, len(rows), lot))
    return {
        span: [Point(micros, hours, (lot, *span), ending) for micros, hours, ending, _, lot in worth_a_look(rows)]
        for span, rows in found.items()
    }


def _look(world: World, scene: _Scene) -> _Rows:
    """What each stage may run on. Raises NothingFits."""
    found = []
    for stage in world.recipe.stages:
        lots = scene.lots_for(_need(stage, world.recipe))
        if scene.allowed is not None:
            lots = [lot for lot in lots if scene.allowed(stage.name, lot)]
        considered = _consider(stage, world, lots, scene)
        if not considered.options:
            raise _nothing_fits(stage, world, considered, scene)
        found.append(considered)
    return _Rows(world, scene, found)


def _take(rows: _Rows) -> list[_Stay]:
    """The machine of each stage: together the cheapest in time; the fastest where none is in time."""
    points = cheapest_in_time(rows.spans, _hours(rows.scene.deadline_s)) or fastest(rows.spans)
    return [rows.stay(point) for point in points]


def _at(taken: list[_Stay], index: int) -> _Stay:
    """The stay that a stage is part of."""
    return next(one for one in taken if one.first <= index < one.first + len(one.ways))


def _shares(offer: Offer, ways: Sequence[_Way]) -> list[Micros]:
    """What each stage costs of a machine that it shares: by its time, as the ledger parts what a machine has cost."""
    each = []
    for name in ("low", "expected", "high"):
        ends = [0.0, *accumulate(getattr(way.hours, name) for way in ways)]
        whole = spend.cost_micros(offer, ends[-1] * 3600)
        paid = [int(whole * (end / ends[-1])) if ends[-1] else 0 for end in ends[:-1]]
        each.append([end - start for start, end in pairwise([*paid, whole])])
    return [Micros(*costs) for costs in zip(*each, strict=True)]


def _consider(stage: Stage, world: World, lots: Iterable[Lot], scene: _Scene) -> _Considered:
    bucket = world.recipe.bucket_url or scene.config.bucket
    egress = _egress_micros(stage, world, bucket)
    options, refused = [], []
    of_card: dict[tuple[str, bool], _Ways | str] = {}
    of_infra: dict[tuple[str, str, int], _Way | str] = {}
    of_kind: dict[tuple[Any, ...], _Way | str] = {}
    asked, shared = gpu_counts(_gpus_asked(stage, world.recipe)), uses_all_gpus(stage)
    lots = list(lots)
    vram_gib: dict[tuple[str, bool], float] = {}  # the most of each card
    for lot in lots:
        kind = (lot.cards if shared else lot.card, lot.first.infra == "local")
        vram_gib[kind] = max(vram_gib.get(kind, 0.0), lot.first.vram_gib)
    for lot in lots:
        machine = _machine(lot, stage, world, asked)
        if isinstance(machine, str):
            refused.append((lot, machine))
            continue
        infra = lot.first.infra
        kind = (lot.cards if shared else lot.card, infra == "local")
        if kind not in of_card:
            of_card[kind] = _ways(stage, world, machine, scene.calibration, vram_gib[kind])
        alike = (kind, lot.cards, infra, lot.first.vram_gib)
        if alike not in of_kind:
            settings = _first_that_fits(of_card[kind], lot.first.vram_gib)
            if isinstance(settings, str):
                of_kind[alike] = settings
            else:  # what differs from infra to infra is the start, the same for all settings
                key = (lot.cards, infra, id(settings))
                if key not in of_infra:
                    of_infra[key] = _measured_option(stage, settings, world, machine, scene.calibration)
                of_kind[alike] = of_infra[key]
        way = of_kind[alike]
        if isinstance(way, str):
            refused.append((lot, way))
            continue
        needed, which = lot.least_micros(way.hours.expected * 3600)
        more = egress if _pays_for_traffic(infra) else 0
        options.append(_Option(lot, lot.offers[which], way, needed + more))
    return _Considered(sorted(options, key=_order), refused)


def _order(option: _Option) -> tuple[Any, ...]:
    offer = option.offer
    place = (offer.infra, offer.instance, offer.region or "", offer.spot)
    return (option.needed_micros, option.way.hours.expected, *place)


def _point(option: _Option) -> Point:
    return Point(option.needed_micros, option.way.hours.expected, option, option.lot.ending_hours)


def _front(options: Iterable[_Option]) -> list[Point]:
    rows = [
        (one.needed_micros, one.way.hours.expected, one.lot.ending_hours, which, one)
        for which, one in enumerate(options)
    ]
    return [_point(row[-1]) for row in worth_a_look(rows)]


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _need(stage: Stage, recipe: Recipe) -> Need:
    spot = recipe.spot if stage.spot is None else stage.spot
    asked = gpu_counts(_gpus_asked(stage, recipe))
    counts = set(asked.values())
    (count,) = next(iter(counts)) if len(counts) == 1 and len(next(iter(counts))) == 1 else (1,)
    return Need(
        infra=stage.infra or recipe.infra or (),
        gpus=tuple(asked),
        gpu_count=count,
        spot=None if spot else False,
    )


def _gpus_asked(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    asks = isinstance(stage, LabelStage) and stage.api is not None  # an API, and any machine will do
    return stage.gpus or (() if asks else recipe.gpus) or ()


def _machine(lot: Lot, stage: Stage, world: World, asked: Mapping[str, frozenset[int]]) -> Machine | str:
    """An offer of the lot with the speed they share, or why none can be used. `asked`: counts of the cards that the
    recipe names for the stage."""
    offer = lot.first
    if not known_price(offer):
        return "its price is not known"
    allowed = asked.get(offer.gpu or "")
    if allowed and offer.gpus not in allowed:
        return f"the recipe asks for {' or '.join(f'{offer.gpu}:{count}' for count in sorted(allowed))}"
    if offer.gpus > 1 and (why := _not_on_several(offer.gpus, stage)):
        return why
    if offer.gpu is None:
        local = world.recipe.local
        return Machine(offer, duration.cpu_speed(local.gflops if local else None), None)
    if lot.gpu is None:
        if stage.kind == "rehearse":
            return Machine(offer, duration.Speed(True, 1e12, 1e9), None)
        return "the speed of this card is not known"
    key = ("machine", id(lot))
    if key not in world.measured:
        machine = Machine(offer, duration.gpu_speed(lot.gpu), lot.gpu)
        world.measured[key] = (lot, machine)  # the lot stays, so that its id does
    known: Machine = world.measured[key][1]
    return known


def _not_on_several(gpus: int, stage: Stage) -> str | None:
    """Why a stage cannot be done on a machine with so many GPUs. Kinds that use one of them can."""
    if not isinstance(stage, TrainStage):
        return None
    if stage.batch_size < gpus:
        return f"it has {gpus} GPUs, and batch_size {stage.batch_size} leaves some of them without a sample"
    if stage.method == "full" and stage.optimizer == "adamw_8bit":
        return f"it has {gpus} GPUs, and adamw_8bit does not work on shards of a model"
    return None


@dataclass(frozen=True)
class _Ways:
    """A stage's settings on a card with the memory that they need, the fastest first; of all settings, also those that
    no machine holds, the least memory that is needed."""

    ways: list[tuple[Settings, float]]
    least_gib: float


def _ways(
    stage: Stage, world: World, machine: Machine, calibration: Calibration, vram_gib: float
) -> _Ways | str:
    """The stage's settings on a card that fit into so much memory, the fastest first, without those that another beats
    in both time and memory; or why there is none at any size."""
    found: list[tuple[float, float, int, Settings]] = []
    least_gib, why = math.inf, "no settings fit"
    for settings in choices(stage, world, machine):
        refused = _not_on(settings, machine)
        if refused is not None:
            why = refused
            continue
        needs_gib = needed_memory(stage, settings, world, machine).total_gib.high
        least_gib = min(least_gib, needs_gib)
        if needs_gib <= vram_gib:
            hours = _expected_hours(stage, settings, world, machine, calibration)
            found.append((hours, needs_gib, len(found), settings))
    ways: list[tuple[Settings, float]] = []
    for _, needs_gib, _, settings in sorted(found):
        if not ways or needs_gib < ways[-1][1]:
            ways.append((settings, needs_gib))
    return why if least_gib == math.inf else _Ways(ways, least_gib)


def _first_that_fits(ways: _Ways | str, vram_gib: float) -> Settings | str:
    if isinstance(ways, str):
        return ways
    fitting = (settings for settings, needs_gib in ways.ways if needs_gib <= vram_gib)
    return next(fitting, None) or _too_small(ways.least_gib, vram_gib)


def _too_small(needs_gib: float, vram_gib: float) -> str:
    return f"needs {needs_gib:.1f} GiB, has {vram_gib:.1f}"


def _measured_option(
    stage: Stage, settings: Settings, world: World, machine: Machine, calibration: Calibration
) -> _Way | str:
    """The stage with these settings on the machine, whether its memory holds them or not; or why it cannot be."""
    return _not_on(settings, machine) or _way(stage, settings, world, machine, calibration)


def _not_on(settings: Settings, machine: Machine) -> str | None:
    """Why a machine of any memory cannot do these settings."""
    if getattr(settings, "precision", "") == "bf16" and machine.gpu is not None and not machine.gpu.bf16:
        return "it does not compute in bf16"
    if getattr(settings, "engine", "") == "vllm" and machine.offer.infra != "local" and not runs_vllm(machine.gpu):
        return "vLLM does not run on it"
    together = getattr(settings, "tensor_parallel", 1)
    if machine.gpus % together:
        return f"{together} GPUs are to hold the teacher together"
    return None


def _way(stage: Stage, settings: Settings, world: World, machine: Machine, calibration: Calibration) -> _Way:
    measured = measure(stage, settings, world, machine)

    def parts_of() -> dict[str, Part]:
        url = world.recipe.bucket_url or "file:"
        store = "/".join(url.partition("?")[0].split("/")[:3])  # not where in the bucket
        return _parts(stage, settings, measured, machine, calibration, store)

    if not calibration:
        startup_hours = _startup_hours(machine.offer.infra, measured.environment, world)
        return _Way(settings, measured, startup_hours + measured.own_hours, startup_hours, parts_of)
    parts = parts_of()
    startup_hours = duration.hours(sum_of(parts, ["create", "setup"]))
    hours = startup_hours + duration.hours(sum_of(parts, _OWN))
    return _Way(settings, measured, hours, startup_hours, lambda: parts)


def _expected_hours(
    stage: Stage, settings: Settings, world: World, machine: Machine, calibration: Calibration
) -> float:
    """Of `_way`, without the rest of it."""
    if calibration:
        return _way(stage, settings, world, machine, calibration).hours.expected
    measured = measure(stage, settings, world, machine)
    startup_hours = _startup_hours(machine.offer.infra, measured.environment, world)
    return startup_hours.expected + measured.own_hours.expected


def _startup_hours(infra: str, environment: str | None, world: World) -> Range:
    """As the models have it."""
    key = ("startup", infra, environment)
    if key not in world.measured:
        seconds = _startup_s(infra)
        whole = seconds if infra == "local" else seconds + setup_time.setup_s(environment)
        world.measured[key] = duration.hours(whole)
    known: Range = world.measured[key]
    return known


def _startup_s(infra: str) -> Range:
    return {"local": LOCAL_STARTUP_S, "slurm": SLURM_STARTUP_S}.get(infra.partition("/")[0], CLOUD_STARTUP_S)


def _parts(
    stage: Stage, settings: Settings, measured: Measured, machine: Machine, calibration: Calibration, store: str
) -> dict[str, Part]:
    """The parts of the stage's time. This machine has the packages; a rented one gets them, each stage on one of its
    own, so that it is always the first there."""
    offer = machine.offer
    found = {"create": (offer.infra, _startup_s(offer.infra))}
    if offer.infra != "local":
        environment = measured.environment
        found["setup"] = (f"{environment or 'packages'} on {offer.infra}", setup_time.setup_s(environment))
    found["around"] = (f"{stage.kind} itself on {card_of(offer)}", measured.around_s)
    if measured.download_s.expected:
        found["download"] = (f"from the hub to {offer.infra}", measured.download_s)
    if measured.bucket_s.expected:
        found["bucket"] = (f"{store} from {offer.infra}", measured.bucket_s)
    found["work"] = (work_key(stage.kind, settings, measured.uses.get("params"), offer), measured.work_s)
    return {name: with_ratios(f"{name} {key}", seconds, calibration) for name, (key, seconds) in found.items()}


def _joined(
    stage: Stage, alone: _Way, infra: str, packages: str, models: Mapping[str, float], have: frozenset[str],
    scene: _Scene,
) -> _Way:  # fmt: skip
    """The way of a stage that goes on on a machine that has these things: nothing is created, and what is there is not
    fetched again."""
    setup = _joined_setup(infra, packages, ready=packages in have, scene=scene)
    missing = _missing(models, have)
    startup_hours = duration.hours(calibrated(setup))
    return _Way(
        alone.settings, alone.measured, startup_hours + _joined_own_hours(alone, missing, scene), startup_hours,
        lambda: {"setup": setup, **_joined_own(alone, missing, scene)},
    )  # fmt: skip


def _missing(models: Mapping[str, float], have: frozenset[str]) -> float:
    """The share of these models, by their bytes, that is not among what there is."""
    whole = sum(models.values())
    return sum(gigabytes for name, gigabytes in models.items() if name not in have) / whole if whole else 0.0


def _joined_setup(infra: str, packages: str, *, ready: bool, scene: _Scene) -> Part:
    environment = packages.removeprefix("packages ") or None
    seconds = setup_time.setup_s(environment, first=not ready, others=True)
    what = f"{environment or 'packages'} {'found ready' if ready else 'beside others'} on {infra}"
    return with_ratios(f"setup {what}", seconds, scene.calibration)


def _joined_own(alone: _Way, missing: float, scene: _Scene) -> dict[str, Part]:
    """`missing`: the share of its models, by their bytes, that must be fetched."""
    parts = {name: alone.parts[name] for name in _OWN if name in alone.parts}
    fetched = parts.pop("download", None)
    if fetched is not None and missing:
        parts["download"] = with_ratios(fetched.key, fetched.seconds.times(missing), scene.calibration)
    return parts


def _joined_own_hours(alone: _Way, missing: float, scene: _Scene) -> Range:
    if not scene.calibration:
        return alone.measured.own_hours_with(missing)
    return duration.hours(sum_of(_joined_own(alone, missing, scene), _OWN))


_OWN = ("around", "download", "bucket", "work")  # parts of a stage's time beside those before it begins


def _stage_plans(stay: _Stay, rows: _Rows) -> Iterator[StagePlan]:
    """The stages of one machine; others stay as candidates where the settings of all of them fit."""
    others, refused = _fallbacks(stay, rows)
    offers = (stay.offer, *(offer for offer, _ in others))
    for nth, (way, cost) in enumerate(zip(stay.ways, stay.costs, strict=True)):
        stage, considered = rows.stages[stay.first + nth], rows.considered[stay.first + nth]
        ways = (way, *(ways[nth] for _, ways in others))
        uses = dict(way.measured.uses)
        if "setup" in way.parts:
            uses["setup_s"] = round(calibrated(way.parts["setup"]).expected)
        if uses.get("kept_samples"):
            micros = cost.expected + uses.get("api_expected_micros", 0)
            uses["cost_micros_per_kept_sample"] = round(micros / uses["kept_samples"])
        yield StagePlan(
            name=stage.name,
            kind=stage.kind,
            settings=way.settings,
            after=rows.world.after(stage),
            vram_gib=way.measured.memory.total_gib,
            vram_breakdown_gib=dict(way.measured.memory.parts_gib),
            hours=way.hours,
            startup_hours=way.startup,
            candidates=offers,
            candidate_hours=tuple(one.hours for one in ways),
            cost_micros=cost,
            reserve_micros=0 if nth else stay.reserve,
            rejected=tuple(_rejected([*considered.refused, *refused[nth]])),
            notes=tuple(_stage_notes(stage, rows.world)),
            uses=uses,
            chosen=left_open(stage),
            candidate_parts=tuple(one.parts for one in ways),
            joins=nth > 0,
        )


def _fallbacks(stay: _Stay, rows: _Rows) -> tuple[list[tuple[Offer, tuple[_Way, ...]]], list[list[tuple[Lot, str]]]]:
    """Offers to try where the best cannot be had, with its settings, cheapest first, a few of each machine and infra;
    and for each stage the lots that its settings, or those of the others, do not fit. Machines with several GPUs only
    where the best is such a one."""
    first, scene, world = stay.first, rows.scene, rows.world
    stages = rows.stages[first : first + len(stay.ways)]
    egress = sum(_egress_micros(stage, world, world.recipe.bucket_url or scene.config.bucket) for stage in stages)
    fitting: list[dict[int, Callable[[], _Way]]] = []
    refused: list[list[tuple[Lot, str]]] = []
    for nth, (stage, way) in enumerate(zip(stages, stay.ways, strict=True)):
        fits, not_ = _with_settings(stage, way.settings, rows.considered[first + nth], world, scene)
        fitting.append(fits)
        refused.append(not_)
    everywhere = set(fitting[0]).intersection(*fitting[1:])
    for nth in range(len(stages)):
        for option in rows.considered[first + nth].options:
            if id(option.lot) in everywhere or id(option.lot) not in fitting[nth]:
                continue
            away = next(one.name for one, fits in zip(stages, fitting, strict=True) if id(option.lot) not in fits)
            refused[nth].append((option.lot, f"it does not hold {away}, which shares the machine"))
    together: dict[tuple[int, ...], tuple[_Way, ...]] = {}
    found: list[tuple[Any, ...]] = []
    for option in rows.considered[first].options:
        lot = option.lot
        if id(lot) not in everywhere or lot.first.gpus > 1 >= stay.offer.gpus:
            continue
        ways_of = [fits[id(lot)] for fits in fitting]
        key = tuple(map(id, ways_of))
        if key not in together:
            together[key] = _one_after_another(first, [way_of() for way_of in ways_of], lot, rows)
        ways = together[key]
        hours = sum((way.hours.expected for way in ways), 0.0)
        more = egress if _pays_for_traffic(lot.first.infra) else 0
        for micros, offer in zip(lot.needed_micros(hours * 3600), lot.offers, strict=True):
            place = (offer.infra, offer.instance, offer.region or "", offer.spot)
            found.append((micros + more, hours, *place, len(found), offer, ways))
    others: list[tuple[Offer, tuple[_Way, ...]]] = []
    of_infra, of_machine = Counter([stay.offer.infra]), Counter([_machine_of(stay.offer)])
    for row in sorted(found):
        offer, ways = row[-2:]
        if offer is stay.offer or of_infra[offer.infra] > MACHINES_AN_INFRA:
            continue
        if of_machine[_machine_of(offer)] >= PLACES_A_MACHINE:
            continue
        of_infra[offer.infra] += 1
        of_machine[_machine_of(offer)] += 1
        others.append((offer, ways))
    return others, refused


def _with_settings(
    stage: Stage, settings: Settings, considered: _Considered, world: World, scene: _Scene
) -> tuple[dict[int, Callable[[], _Way]], list[tuple[Lot, str]]]:
    """The stage's way with these settings on each lot that they fit, by id, and the lots that they do not fit."""
    asked = gpu_counts(_gpus_asked(stage, world.recipe))
    known: dict[tuple[str, str, int], tuple[Callable[[], _Way], float] | str] = {}  # and the memory it needs
    fitting: dict[int, Callable[[], _Way]] = {}
    refused: list[tuple[Lot, str]] = []
    for option in considered.options:
        lot = option.lot
        key = (lot.cards, lot.first.infra, lot.first.gpus)
        if key not in known:
            machine = _machine(lot, stage, world, asked)
            assert isinstance(machine, Machine)
            known[key] = _not_on(settings, machine) or (
                partial(_way, stage, settings, world, machine, scene.calibration),
                needed_memory(stage, settings, world, machine).total_gib.high,
            )
        found = known[key]
        if isinstance(found, str):
            refused.append((lot, f"with the settings chosen: {found}"))
        elif found[1] > lot.first.vram_gib:
            refused.append((lot, f"with the settings chosen: {_too_small(found[1], lot.first.vram_gib)}"))
        else:
            fitting[id(lot)] = found[0]
    return fitting, refused


def _one_after_another(first: int, alone: list[_Way], lot: Lot, rows: _Rows) -> tuple[_Way, ...]:
    ways, have = [], frozenset[str]()
    for at, one in enumerate(alone, start=first):
        way, have = rows.next(at, one, lot, have)
        ways.append(way)
    return tuple(ways)


def _machine_of(offer: Offer) -> tuple[str, str, bool]:
    return offer.infra, offer.instance, offer.spot


def _rejected(refused: Iterable[tuple[Lot, str]]) -> Iterator[Rejected]:
    """Each card and reason once, with the first place it was seen."""
    seen = set()
    for lot, why in refused:
        gpu = lot.first.gpu or "no GPU"
        if (gpu, why) not in seen:
            seen.add((gpu, why))
            yield Rejected(gpu, why, f"{lot.first.infra} {lot.first.instance}")


def _looked(stay: _Stay, index: int, why: str) -> Looked:
    nth = index - stay.first
    way, cost = stay.ways[nth], stay.costs[nth]
    alone = len(stay.ways) == 1
    return Looked(
        gpu=stay.lot.cards, spot=stay.offer.spot, why=why, offer=stay.offer,
        vram_gib=way.measured.memory.total_gib, hours=way.hours, cost_micros=cost,
        needed_micros=stay.needed_micros if alone else cost.expected + (0 if nth else stay.reserve),
        settings=way.settings, taken=not why, joins=nth > 0,
    )  # fmt: skip


# --- beside the machines


def _apis(stages: tuple[StagePlan, ...]) -> Iterator[Overhead]:
    """What APIs may cost, whole: it counts as spent from the beginning, so that no machine can use it up."""
    for stage in stages:
        api = getattr(stage.settings, "api", None)
        if api is not None:
            most = api.max_cost_micros
            answers, limit = stage.uses["answers"], getattr(stage.settings, "max_new_tokens", 0)
            yield Overhead(
                f"{stage.name}: {answers:.0f} answers of {api.model}, reserved as if each had {limit} tokens",
                Micros(most, most, most),
                row=stage.name,
                by=f"API, {api.model}",
            )


def _storage(stages: tuple[StagePlan, ...], world: World, bucket: str) -> Iterator[Overhead]:
    """A month of what the run leaves in a bucket that is billed, and traffic out of it: to the stages' own machines,
    and at worst all of it three times."""
    if not bucket.startswith("s3:"):
        return
    gigabytes, month = _kept_gb(world), _month_micros(world, bucket)
    paying = [
        one for one, stage in zip(world.recipe.stages, stages, strict=True) if _pays_for_traffic(stage.offer.infra)
    ]
    traffic = sum(_egress_micros(one, world, bucket) for one in paying)
    fetched = sum(fetched_gb(one, world) for one in paying)
    most = max(traffic, math.ceil(3 * gigabytes * EGRESS_USD_MICROS_PER_GB))
    yield Overhead(
        f"{gigabytes:.1f} GB in the bucket for a month, {fetched:.1f} GB of traffic out of its cloud; high: all of it "
        "fetched three times",
        Micros(0, month + traffic, month + most),
        by="storage, traffic",
    )


def _kept_gb(world: World) -> float:
    labels = sum(folder.size for folder in world.recipe.labels.values()) / 1e9
    return labels + sum(left_gb(stage, world) for stage in world.recipe.stages)


def _month_micros(world: World, bucket: str) -> int:
    return math.ceil(_kept_gb(world) * STORAGE_USD_MICROS_PER_GB) if bucket.startswith("s3:") else 0


def _egress_micros(stage: Stage, world: World, bucket: str) -> int:
    """What it costs to read from the bucket what the stage needs, from outside the bucket's cloud."""
    if not bucket.startswith("s3:"):
        return 0
    return math.ceil(fetched_gb(stage, world) * EGRESS_USD_MICROS_PER_GB)


def _pays_for_traffic(infra: str) -> bool:
    """Within AWS it is free, or nearly: the bucket's region is not known here."""
    return infra.partition("/")[0] != "aws"


def _stage_notes(stage: Stage, world: World) -> Iterator[str]:
    if isinstance(stage, LabelStage):
        if stage.api is not None:
            key = f", and the key in {stage.api.key_env} goes to the machine that asks" if stage.api.key_env else ""
            yield f"your prompts go to {urlsplit(stage.api.base_url).hostname}{key}"
        cut = world.label_lengths(stage).cut_share
        if cut > stage.max_cut_share:
            yield (
                f"about {cut:.0%} of the answers will be cut at {world.label_lengths(stage).limit} tokens and are "
                "paid for without a label: raise max_new_tokens"
            )
        if stage.verify is None and world.recipe.data.verify == "none" and stage.keep == "correct":
            yield "answers are not checked: give data.verify to keep right ones only"
    if isinstance(stage, EvaluateStage) and stage.lm_eval:
        yield (
            f"lm_eval ({', '.join(stage.lm_eval)}) is not in these hours, and needs lm-evaluation-harness on the "
            "machine: rented ones have none"
        )
    if isinstance(stage, TrainStage):
        if stage.loss.temperature > 5:
            yield f"temperature {stage.loss.temperature:g} is nearly flat: 1 to 4 teaches more"
        if stage.loss.temperature < 1:
            yield f"temperature {stage.loss.temperature:g} is nearly one-hot: 1 to 4 teaches more"
        stored = world.taught(stage).temperature
        if stage.loss.alpha > 0 and stage.loss.temperature not in (1.0, stored):
            held = "1" if stored == 1 else f"1 and {stored:g}"
            yield f"the labels hold masses at T {held}: at {stage.loss.temperature:g} the tail is not learned"


def _plan_notes(plan: Plan, recipe: Recipe, now: datetime) -> Iterator[str]:
    rented = [stage for stage in plan.stages if stage.offer.infra.partition("/")[0] not in ("local", "slurm")]
    if rented and plan.bucket.startswith("file:"):
        yield "a rented machine cannot reach a folder of yours: set `bucket: s3://...` before you run this"
    if rented:
        minutes = math.ceil(max(stage.startup_hours.high for stage in rented if not stage.joins) * 60)
        yield f"a rented machine is unguarded until its supervisor starts: up to {minutes} min"
    if any(stage.offer.gpu and environments(stage.kind, stage.settings) == ("label", "train") for stage in rented):
        yield "labels: with an NVIDIA driver below 580 transformers write them, several times slower than planned"
    yield from _several_gpus_notes(plan, recipe)
    if plan.offers_as_of is not None and (now - plan.offers_as_of).days > OLD_PRICE_DAYS:
        yield f"the oldest price used is {(now - plan.offers_as_of).days // 30} months old"
    if not plan.in_time:
        takes, needs, allowed = (
            money.human_seconds(seconds)
            for seconds in (plan.hours.expected * 3600, plan.needed_hours * 3600, plan.deadline_s or 0.0)
        )
        yield (
            f"it would take {takes}, and needs a deadline of {needs} since machines take time to end; the deadline is "
            f"{allowed}: no machine on offer is faster"
        )
    if plan.fits and plan.tight:
        yield "if everything goes slowly the cap stops it: finished stages and checkpoints stay"


def _several_gpus_notes(plan: Plan, recipe: Recipe) -> Iterator[str]:
    """Once, where answers are to be labelled on several GPUs and the recipe asks for no number of them."""
    for stage, planned in zip(recipe.stages, plan.stages, strict=True):
        offer, settings = planned.offer, planned.settings
        several = isinstance(settings, LabelSettings) and settings.api is None and offer.gpus > 1
        if not several or gpu_counts(_gpus_asked(stage, recipe)).get(offer.gpu or ""):
            continue
        held_together = getattr(settings, "tensor_parallel", 1) > 1  # one GPU may be too small then
        keeps = "" if held_together else f"; `gpus: [{offer.gpu}:1]` keeps to one"
        yield f"labelling on several GPUs was tried on stand-ins only{keeps}"
        return


# --- what would help


def _what_would_fit(plan: Plan, rows: _Rows, taken: list[_Stay]) -> Iterator[str]:
    """The smallest changes that would fit, each alone: budget and deadline, what costs no learning, then what does."""
    recipe, scene, first = rows.world.recipe, rows.scene, []
    if not plan.in_time:
        first.append(f"--deadline {_deadline_for(plan.needed_hours)}")
    if not plan.fits:
        first.append(f"--budget {money.budget_for(plan.needed_micros, plan.rate, plan.currency)}")
    narrow = replace(scene, lots_for=_near(rows, taken))

    def fits(other: Recipe, where: _Scene = narrow) -> bool:
        try:
            needed, hours = _needs(other, where)
        except NothingFits:
            return False
        return needed <= scene.cap and (scene.deadline_s is None or hours <= scene.deadline_s / 3600)

    changes = []
    if plan.in_time and plan.deadline_s is not None and not plan.fits:
        needed, hours = _needs(recipe, replace(narrow, deadline_s=None))
        if needed <= scene.cap:
            changes.append(f"--deadline {_deadline_for(hours)}")
    if not recipe.spot and fits(recipe.model_copy(update={"spot": True}), scene):
        changes.append("`spot: true`")
    share = _largest_share(lambda share: fits(_evaluated(recipe, share)))
    if share is not None and share >= LEAST_SHARE:
        changes.append(" and ".join(_said_limits(_evaluated(recipe, share))))
    share = _largest_share(lambda share: fits(_fewer_samples(recipe, share)))
    if share is not None and share >= LEAST_SHARE:
        changes.append(" and ".join(_said_samples(_fewer_samples(recipe, share))))
    if not any(changes):
        share = _largest_share(lambda share: fits(_evaluated(_fewer_samples(recipe, share), share)))
        if share is not None and share >= LEAST_SHARE:
            fewer = _evaluated(_fewer_samples(recipe, share), share)
            changes.append(" and ".join([*_said_samples(fewer), *_said_limits(fewer)]))
    lora = _changed(recipe, lambda stage: isinstance(stage, TrainStage) and stage.method == "full", {"method": "lora"})
    if lora != recipe and fits(lora):
        changes.append("`method: lora`")
    yield f"give it {' and '.join(first)}" + "".join(f", or {change}" for change in changes[:MOST_ADVICE] if change)


def _near(rows: _Rows, taken: list[_Stay]) -> LotsFor:
    """Of each stage's lots only those that are worth a look: what fits on them, fits."""
    near: dict[Need, list[Lot]] = {}
    for index, (stage, considered) in enumerate(zip(rows.stages, rows.considered, strict=True)):
        lots = near.setdefault(_need(stage, rows.world.recipe), [])
        for lot in (_at(taken, index).lot, *(point.what.lot for point in considered.front)):
            if all(lot is not one for one in lots):
                lots.append(lot)
    return lambda need: near[need]


def _deadline_for(hours: float) -> str:
    """As --deadline takes it: minutes, rounded up."""
    whole, minutes = divmod(math.ceil(hours * 60), 60)
    return f"{whole}h" * bool(whole) + f"{minutes}min" * bool(minutes or not whole)


def _changed(recipe: Recipe, which: Callable[[Stage], bool], update: dict[str, Any]) -> Recipe:
    stages = tuple(stage.model_copy(update=update) if which(stage) else stage for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


def _fewer_samples(recipe: Recipe, share: float) -> Recipe:
    stages = tuple(
        stage.model_copy(update={"samples": max(1, int(stage.samples * share))})
        if isinstance(stage, LabelStage)
        else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})


def _said_samples(recipe: Recipe) -> list[str]:
    labels = [stage for stage in recipe.stages if isinstance(stage, LabelStage)]
    return [f"set samples: {stage.samples} in stage {stage.name}" for stage in labels]


def _evaluated(recipe: Recipe, share: float) -> Recipe:
    """Evaluated on a share of the problems."""
    stages = tuple(
        stage.model_copy(update={"limit": max(1, int(_problems(stage, recipe) * share))})
        if isinstance(stage, EvaluateStage)
        else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})


def _problems(stage: EvaluateStage, recipe: Recipe) -> int:
    file = recipe.files.get(stage.held_out or recipe.data.held_out or "")
    rows = ROWS_UNKNOWN if file is None else file.rows
    return min(rows, stage.limit or rows)


def _said_limits(recipe: Recipe) -> list[str]:
    stages = [stage for stage in recipe.stages if isinstance(stage, EvaluateStage)]
    return [f"set limit: {stage.limit} in stage {stage.name}" for stage in stages]


def _largest_share(fits: Callable[[float], bool]) -> float | None:
    """Largest share, in hundredths below 1, for which it fits; None when a twentieth does not."""
    low, high = 5, 100
    if not fits(low / 100):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / 100) else (low, middle)
    return low / 100


def _nothing_fits(stage: Stage, world: World, considered: _Considered, scene: _Scene) -> NothingFits:
    need = _need(stage, world.recipe)
    known = isinstance(stage, LabelStage) and stage.api is None and stage.teacher in world.recipe.models
    if isinstance(stage, LabelStage) and known and teachers.needs_several_cards(world.shape(stage.teacher)):
        return NothingFits(
            f"stage {stage.name}: no single card holds {stage.teacher}",
            hint="\n  -> ".join(_other_teachers(stage, world, scene)),
        )
    hint = _widen(stage, world, scene)
    if not considered.refused and need.infra == ("local",) and need.gpus:
        return NothingFits(f"stage {stage.name}: this machine has no {' or '.join(need.gpus)}", hint=hint)
    if not considered.refused:
        where = f" on {', '.join(need.infra)}" if need.infra else ""
        which = f" with {', '.join(need.gpus)}" if need.gpus else ""
        return NothingFits(f"stage {stage.name}: no machine is on offer{where}{which}", hint=hint)
    reasons = "; ".join(dict.fromkeys(f"{lot.cards}: {why}" for lot, why in considered.refused))
    return NothingFits(f"stage {stage.name}: no machine fits ({reasons})", hint=hint)


def _widen(stage: Stage, world: World, scene: _Scene) -> str:
    """The smallest change that makes something fit: first what changes nothing that is learned, then other cards, then
    what is learned, last other infra."""
    need = _need(stage, world.recipe)

    def fits(wider: Need, changed: Stage, other: World = world) -> _Option | None:
        return next(iter(_consider(changed, other, scene.lots_for(wider), scene).options), None)

    for said, update in _same_result(stage):
        found = fits(need, stage.model_copy(update=update))
        if found is not None:
            return f"{said or _said_batch(found)} would fit"
    if need.gpus:
        found = fits(replace(need, gpus=()), stage)
        if found is not None:
            card = found.offer.gpu
            return f"allow gpus: [{', '.join((*need.gpus, card))}]" if card else "leave out gpus: this machine has none"
    if isinstance(stage, TrainStage):
        for said, update in _other_training(stage):
            if fits(need, stage.model_copy(update=update)):
                return f"{said} would fit"
        lengths = world.taught(stage).lengths
        length = stage.max_seq_len or lengths.limit + max(lengths.longest_prompt, LONGEST_PROMPT_TOKENS)
        while length > 512:
            length //= 2
            if fits(need, stage.model_copy(update={"max_seq_len": length})):
                return f"max_seq_len: {length} would fit"
    if isinstance(stage, LabelStage) and stage.api is None and stage.teacher in world.recipe.models:
        smaller = _smaller_teacher(stage, world, need, fits)
        if smaller is not None:
            return f"teacher: {smaller} would fit"
    found = fits(replace(need, gpus=(), infra=()), stage) if need.infra else None
    if found is not None:
        wider = (*need.infra, found.offer.infra)
        return f"allow infra: [{', '.join(wider)}] (--infra {','.join(wider)}), where a {found.offer.gpu} fits"
    return "choose a smaller model or other machines"


def _same_result(stage: Stage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that the recipe holds fast though nothing that is learned depends on them, set free one after another.
    No word: the size that was then chosen is the word."""
    if isinstance(stage, (LabelStage, EvaluateStage)) and stage.batch_size is not None:
        yield "", {"batch_size": None}
    if isinstance(stage, TrainStage):
        if stage.micro_batch is not None:
            yield "", {"micro_batch": None}
        if stage.checkpointing is False:
            yield "checkpointing: true", {"checkpointing": True}
        if stage.micro_batch is not None and stage.checkpointing is False:
            yield "micro_batch: 1 with checkpointing: true", {"micro_batch": 1, "checkpointing": True}


def _said_batch(found: _Option) -> str:
    settings = found.way.settings
    if isinstance(settings, TrainSettings):
        return f"micro_batch: {settings.micro_batch}"
    return f"batch_size: {getattr(settings, 'batch_size', 1)}"


def _other_training(stage: TrainStage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of what is learned, or how, the least first."""
    if stage.precision == "fp32":
        yield "precision: bf16", {"precision": "bf16"}
    if stage.method == "full" and stage.optimizer == "adamw":
        yield "optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}
    if stage.method == "full":
        yield "method: lora", {"method": "lora"}
    if stage.method != "qlora":
        yield "method: qlora", {"method": "qlora"}


def _other_teachers(stage: LabelStage, world: World, scene: _Scene) -> list[str]:
    """What the teacher really takes, and those that fit the cap, one a line."""
    lots = scene.lots_for(_need(stage, world.recipe))

    def best(shape: ModelShape) -> teachers.Found | None:
        changed = stage.model_copy(update={"teacher": shape.name})
        found = next(iter(_consider(changed, _with_teacher(world, changed, shape), lots, scene).options), None)
        if found is None:
            return None
        memory = found.way.measured.memory.total_gib.expected
        return teachers.Found(found.offer, memory, found.way.hours, found.cost, found.reserve)

    offers = [offer for lot in lots for offer in lot.offers]
    beside = teachers.side_by_side(stage, world, offers, best, scene.cap)
    return teachers.lines(beside, world.rate, "CNY" if world.recipe.budget.currency == "CNY" else "USD")


def _with_teacher(world: World, changed: LabelStage, shape: ModelShape) -> World:
    stages = tuple(changed if one.name == changed.name else one for one in world.recipe.stages)
    models = {**world.recipe.models, shape.name: shape}
    return World(world.recipe.model_copy(update={"stages": stages, "models": models}), world.rate)


def _smaller_teacher(
    stage: LabelStage, world: World, need: Need, fits: Callable[[Need, Stage, World], _Option | None]
) -> str | None:
    """The largest known model of the same publisher that fits."""
    publisher = stage.teacher.partition("/")[0]
    size = world.recipe.models[stage.teacher].params
    known = sorted(
        (shape for shape in MODELS.values() if shape.name.startswith(f"{publisher}/") and shape.params < size),
        key=lambda shape: -shape.params,
    )
    for shape in known:
        changed = stage.model_copy(update={"teacher": shape.name})
        if fits(need, changed, _with_teacher(world, changed, shape)):
            return shape.name
    return None
