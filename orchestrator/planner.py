"""Which machine, how long and how dear, for every stage of a recipe? Pure: values in, a plan out.

Every offer is measured with the first choice of settings that fits it; the cheapest is taken, and the others that hold
the same settings stay in order for failover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from orchestrator import access, duration, money, setup_time, spend, teachers
from orchestrator.catalog import MODELS, ModelShape
from orchestrator.config import Config
from orchestrator.errors import NothingFits, UsageError
from orchestrator.gpus import gpu_named
from orchestrator.handover import environments
from orchestrator.offers import known_price
from orchestrator.plan import Micros, Overhead, Plan, Range, Rejected, StagePlan, digest_of
from orchestrator.provision import Need, Offer
from orchestrator.recipe import EvaluateStage, LabelStage, Recipe, Stage, TrainStage
from orchestrator.setup_time import runs_vllm
from orchestrator.sizing import Machine, Measured, choices, left_open, measure
from orchestrator.workload import LONGEST_PROMPT_TOKENS, World
from tasks.contract import Settings

OffersFor = Callable[[Need], list[Offer]]
Calibration = Mapping[str, float]  # actual / predicted time, by `<kind>:<gpu or cpu>`

STORAGE_USD_MICROS_PER_GB = 23_000  # S3 standard, us-east-1, one month
EGRESS_USD_MICROS_PER_GB = 90_000  # AWS to the internet, first 10 TB; nothing within a region
SLURM_STARTUP_S = Range(20.0, 40.0, 90.0)  # an idle partition, a warm SkyPilot server (measured on one machine)
CLOUD_STARTUP_S = Range(120.0, 300.0, 900.0)  # request to a usable machine; its environment comes on top
LOCAL_STARTUP_S = Range(0.1, 0.5, 2.0)
NOTHING_S = Range(0.0, 0.0, 0.0)
OLD_PRICE_DAYS = 180
LEAST_SHARE = 0.25  # of the samples: fewer is another experiment, not advice


@dataclass(frozen=True)
class _Option:
    machine: Machine
    settings: Settings
    measured: Measured
    hours: Range
    startup: Range
    cost: Micros
    reserve: int


def make_plan(
    recipe: Recipe,
    *,
    config: Config,
    offers_for: OffersFor,
    now: datetime,
    cap_micros: int | None = None,
    deadline_s: float | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The cheapest plan for the recipe, whether it fits under the cap or not (`Plan.fits`).

    Raises NothingFits when a stage fits no machine at any price, with the smallest change that would help.
    """
    cap = money.cap_micros(recipe.budget, config.rate) if cap_micros is None else cap_micros
    if cap < 0:
        raise UsageError("the budget must be above 0", hint="give --budget or `budget:` an amount such as 50 CNY")
    deadline = recipe.deadline if deadline_s is None else deadline_s
    plan = _assemble(recipe, config, offers_for, now, cap, deadline, calibration or {})
    if plan.fits:
        return plan
    advice = _what_would_fit(
        recipe, plan, lambda other: _assemble(other, config, offers_for, now, cap, deadline, calibration or {})
    )
    return replace(plan, notes=(advice, *plan.notes))


def later_floor_micros(plan: Plan, index: int, apis: Mapping[str, spend.ApiLine] | None = None) -> int:
    """What must stay for the stages after `index`: their low costs, their machines' reserves, and overheads.

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


def _assemble(
    recipe: Recipe,
    config: Config,
    offers_for: OffersFor,
    now: datetime,
    cap: int,
    deadline: float | None,
    calibration: Calibration,
) -> Plan:
    world = World(recipe, config.rate)
    ranked = [_rank(stage, world, offers_for, calibration, cap) for stage in recipe.stages]
    picked = _in_time([options for options, _ in ranked], deadline)
    stages = tuple(
        _stage_plan(stage, world, options, rejected, calibration)
        for stage, options, (_, rejected) in zip(recipe.stages, picked, ranked, strict=True)
    )
    bucket = recipe.bucket_url or config.bucket
    overhead = (*_apis(stages), *_storage(stages, world, bucket))
    plan = Plan(
        name=recipe.name,
        recipe=recipe.path,
        digest="",
        currency=config.currency,
        rate=config.rate,
        made_at=now,
        stages=stages,
        overhead=overhead,
        cap_micros=cap,
        deadline_s=deadline,
        idle_s=recipe.idle,
        bucket=bucket,
        on_shortfall=recipe.on_shortfall,
        infra=recipe.infra or (),
        notes=(),
    )
    beside = {"path", "text", "models", "folders", "files", "bucket_url", "labels"}
    meaning = recipe.model_dump(mode="json", exclude=beside)
    hashes = sorted([file.sha256 for file in recipe.files.values()] + [one.sha256 for one in recipe.labels.values()])
    digest = digest_of([meaning, hashes], stages, cap, deadline, config.rate)
    return replace(plan, digest=digest, notes=(*_plan_notes(plan, now), *access.notes(plan, recipe.allow_account_key)))


# --- choosing a machine


def _rank(
    stage: Stage, world: World, offers_for: OffersFor, calibration: Calibration, cap: int
) -> tuple[list[_Option], list[Rejected]]:
    """Options, cheapest first, and what was refused. Raises NothingFits."""
    options, rejected = _consider(stage, world, offers_for(_need(stage, world.recipe)), calibration)
    if not options:
        raise _nothing_fits(stage, world, offers_for, rejected, calibration, cap)
    return sorted(options, key=_order), rejected


def _consider(
    stage: Stage, world: World, offers: list[Offer], calibration: Calibration
) -> tuple[list[_Option], list[Rejected]]:
    options, rejected = [], []
    for offer in offers:
        found = _machine(offer, stage, world)
        result = _option(stage, world, found, calibration) if isinstance(found, Machine) else found
        if isinstance(result, _Option):
            options.append(result)
        else:
            rejected.append(Rejected(offer.gpu or "no GPU", result, f"{offer.infra} {offer.instance}"))
    return options, rejected


def _order(option: _Option) -> tuple[Any, ...]:
    offer = option.machine.offer
    return (option.cost.expected + option.reserve, option.hours.expected, offer.infra, offer.instance, offer.spot)


def _need(stage: Stage, recipe: Recipe) -> Need:
    spot = recipe.spot if stage.spot is None else stage.spot
    asks = isinstance(stage, LabelStage) and stage.api is not None  # an API, and any machine will do
    return Need(
        infra=stage.infra or recipe.infra or (),
        gpus=stage.gpus or (() if asks else recipe.gpus) or (),
        spot=None if spot else False,
    )


def _machine(offer: Offer, stage: Stage, world: World) -> Machine | str:
    """The offer with its speed, or why it cannot be used."""
    if not known_price(offer):
        return "its price is not known"
    if offer.gpus > 1:
        return f"it has {offer.gpus} GPUs, and a stage uses one"
    if offer.gpu is None:
        local = world.recipe.local
        return Machine(offer, duration.cpu_speed(local.gflops if local else None), None)
    gpu = gpu_named(offer.gpu, offer.instance)
    if gpu is None:
        if stage.kind == "rehearse":
            return Machine(offer, duration.Speed(True, 1e12, 1e9), None)
        return "the speed of this card is not known"
    return Machine(offer, duration.gpu_speed(gpu), gpu)


def _option(stage: Stage, world: World, machine: Machine, calibration: Calibration) -> _Option | str:
    """The first choice of settings that fits the machine, or why none does."""
    why = "no settings fit"
    for settings in choices(stage, world, machine):
        result = _measured_option(stage, settings, world, machine, calibration)
        if isinstance(result, _Option):
            return result
        why = result
    return why


def _measured_option(
    stage: Stage, settings: Settings, world: World, machine: Machine, calibration: Calibration
) -> _Option | str:
    if getattr(settings, "precision", "") == "bf16" and machine.gpu is not None and not machine.gpu.bf16:
        return "it does not compute in bf16"
    if getattr(settings, "engine", "") == "vllm" and machine.offer.infra != "local" and not runs_vllm(machine.gpu):
        return "vLLM does not run on it"
    measured = measure(stage, settings, world, machine)
    needed, there = measured.memory.total_gib.high, machine.offer.vram_gib
    if needed > there:
        return f"needs {needed:.1f} GiB, has {there:.1f}"
    setup = _setup_s(stage, settings, machine)
    startup = _startup_s(machine.offer.infra) + (setup or NOTHING_S)
    if setup is not None:
        measured = replace(measured, uses={**measured.uses, "setup_s": round(setup.expected)})
    factor = calibration.get(f"{stage.kind}:{machine.offer.gpu or 'cpu'}")
    startup_hours = duration.hours(startup)
    hours = startup_hours + duration.hours(measured.seconds, factor)
    cost = Micros(*(spend.cost_micros(machine.offer, at * 3600) for at in (hours.low, hours.expected, hours.high)))
    reserve = spend.latency_reserve_micros(machine.offer)
    return _Option(machine, settings, measured, hours, startup_hours, cost, reserve)


def _startup_s(infra: str) -> Range:
    return {"local": LOCAL_STARTUP_S, "slurm": SLURM_STARTUP_S}.get(infra.partition("/")[0], CLOUD_STARTUP_S)


def _setup_s(stage: Stage, settings: Settings, machine: Machine) -> Range | None:
    """Seconds until a rented machine has the stage's packages; None on this one, which has them. Each stage is planned
    on a machine of its own, so that it is always the first there."""
    if machine.offer.infra == "local":
        return None
    return setup_time.setup_s(setup_time.environment_of(stage.kind, settings, machine.gpu))


def _in_time(ranked: list[list[_Option]], deadline_s: float | None) -> list[list[_Option]]:
    """The same options, a faster one first where the deadline needs it: the one that costs least for an hour saved."""
    picked = [list(options) for options in ranked]
    while deadline_s is not None and sum(options[0].hours.expected for options in picked) * 3600 > deadline_s:
        best: tuple[float, int, int] | None = None
        for index, options in enumerate(picked):
            for position, option in enumerate(options):
                saved = options[0].hours.expected - option.hours.expected
                if saved > 1e-9:
                    price = (option.cost.expected - options[0].cost.expected) / saved
                    best = min(best or (price, index, position), (price, index, position))
        if best is None:
            break
        _, index, position = best
        picked[index].insert(0, picked[index].pop(position))
    return picked


def _stage_plan(
    stage: Stage, world: World, options: list[_Option], rejected: list[Rejected], calibration: Calibration
) -> StagePlan:
    """The stage on its first option; others stay as candidates where its settings fit them too."""
    best = options[0]
    others: list[_Option] = []
    refused = list(rejected)
    for option in options[1:]:
        result = _measured_option(stage, best.settings, world, option.machine, calibration)
        if isinstance(result, _Option):
            others.append(result)
        else:
            offer = option.machine.offer
            refused.append(
                Rejected(
                    offer.gpu or "no GPU", f"with the settings chosen it {result}", f"{offer.infra} {offer.instance}"
                )
            )
    uses = dict(best.measured.uses)
    if uses.get("kept_samples"):
        cost = best.cost.expected + uses.get("api_expected_micros", 0)
        uses["cost_micros_per_kept_sample"] = round(cost / uses["kept_samples"])
    return StagePlan(
        name=stage.name,
        kind=stage.kind,
        settings=best.settings,
        after=world.after(stage),
        vram_gib=best.measured.memory.total_gib,
        vram_breakdown_gib=dict(best.measured.memory.parts_gib),
        hours=best.hours,
        startup_hours=best.startup,
        candidates=(best.machine.offer, *(other.machine.offer for other in others)),
        candidate_hours=(best.hours, *(other.hours for other in others)),
        cost_micros=best.cost,
        reserve_micros=best.reserve,
        rejected=tuple(refused),
        notes=tuple(_stage_notes(stage, world)),
        uses=uses,
        chosen=left_open(stage),
    )


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
    """A month of what the run leaves in a bucket that is billed, and traffic out of it at worst."""
    if not bucket.startswith("s3:"):
        return
    labels = sum(stage.uses.get("label_gib", 0.0) for stage in stages)
    labels += sum(folder.size for folder in world.recipe.labels.values()) / 2**30
    trained = [world.student_shape(stage) for stage in world.recipe.stages if isinstance(stage, TrainStage)]
    gigabytes = labels * 1.074 + sum(shape.params * 2 / 1e9 for shape in trained)
    month = math.ceil(gigabytes * STORAGE_USD_MICROS_PER_GB)
    yield Overhead(
        f"{gigabytes:.1f} GB in the bucket for a month; high: fetched from it three times",
        Micros(0, month, month + math.ceil(3 * gigabytes * EGRESS_USD_MICROS_PER_GB)),
    )


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


def _plan_notes(plan: Plan, now: datetime) -> Iterator[str]:
    rented = [stage for stage in plan.stages if stage.offer.infra.partition("/")[0] not in ("local", "slurm")]
    if rented and plan.bucket.startswith("file:"):
        yield "a rented machine cannot reach a folder of yours: set `bucket: s3://...` before you run this"
    if rented:
        minutes = math.ceil(max(stage.startup_hours.high for stage in rented) * 60)
        yield f"a rented machine is unguarded until its supervisor starts: up to {minutes} min"
    if any(stage.offer.gpu and environments(stage.kind, stage.settings) == ("label", "train") for stage in rented):
        yield "labels: with an NVIDIA driver below 580 transformers write them, several times slower than planned"
    if plan.offers_as_of is not None and (now - plan.offers_as_of).days > OLD_PRICE_DAYS:
        yield f"the oldest price used is {(now - plan.offers_as_of).days // 30} months old"
    if not plan.in_time:
        need, allowed = money.human_seconds(plan.hours.expected * 3600), money.human_seconds(plan.deadline_s or 0)
        yield f"it would take {need}, the deadline is {allowed}: no machine on offer is faster"
    if plan.fits and plan.tight:
        yield "if everything goes slowly the cap stops it: finished stages and checkpoints stay"


# --- what would help


def _what_would_fit(recipe: Recipe, plan: Plan, again: Callable[[Recipe], Plan]) -> str:
    """The smallest budget, and the largest number of samples, that would fit."""
    enough = money.budget_for(plan.needed_micros, plan.rate, plan.currency)
    advice = f"give it --budget {enough}"
    share = _largest_share(lambda share: again(_fewer_samples(recipe, share)).fits)
    if share is None or share < LEAST_SHARE:
        return advice
    fewer = [
        (stage.name, stage.samples) for stage in _fewer_samples(recipe, share).stages if isinstance(stage, LabelStage)
    ]
    return f"{advice}, or " + " and ".join(f"set samples: {samples} in stage {name}" for name, samples in fewer)


def _fewer_samples(recipe: Recipe, share: float) -> Recipe:
    stages = tuple(
        stage.model_copy(update={"samples": max(1, int(stage.samples * share))})
        if isinstance(stage, LabelStage)
        else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})


def _largest_share(fits: Callable[[float], bool]) -> float | None:
    """Largest share, in twentieths, for which it fits; None when not even the smallest does."""
    low, high = 0, 20
    if not fits(1 / 20):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle / 20) else (low, middle)
    return max(low, 1) / 20


def _nothing_fits(
    stage: Stage, world: World, offers_for: OffersFor, rejected: list[Rejected], calibration: Calibration, cap: int
) -> NothingFits:
    need = _need(stage, world.recipe)
    known = isinstance(stage, LabelStage) and stage.api is None and stage.teacher in world.recipe.models
    if isinstance(stage, LabelStage) and known and teachers.needs_several_cards(world.shape(stage.teacher)):
        return NothingFits(
            f"stage {stage.name}: no single card holds {stage.teacher}",
            hint="\n  -> ".join(_other_teachers(stage, world, offers_for, calibration, cap)),
        )
    head = f"stage {stage.name}: no machine fits"
    if not rejected:
        where = f" on {', '.join(need.infra)}" if need.infra else ""
        which = f" with {', '.join(need.gpus)}" if need.gpus else ""
        return NothingFits(
            f"stage {stage.name}: no machine is on offer{where}{which}",
            hint=_widen(stage, world, offers_for, calibration),
        )
    reasons = dict.fromkeys(f"{one.gpu}: {one.why}" for one in rejected)
    return NothingFits(f"{head} ({'; '.join(reasons)})", hint=_widen(stage, world, offers_for, calibration))


def _widen(stage: Stage, world: World, offers_for: OffersFor, calibration: Calibration) -> str:
    """The smallest change that makes something fit: other cards, LoRA, shorter rows, a smaller teacher, other infra."""
    need = _need(stage, world.recipe)

    def fits(wider: Need, changed: Stage, other: World = world) -> _Option | None:
        options, _ = _consider(changed, other, offers_for(wider), calibration)
        return min(options, key=_order, default=None)

    if need.gpus:
        found = fits(replace(need, gpus=()), stage)
        if found is not None:
            card = found.machine.offer.gpu
            return f"allow gpus: [{', '.join((*need.gpus, card))}]" if card else "leave out gpus: this machine has none"
    if (
        isinstance(stage, TrainStage)
        and stage.method == "full"
        and fits(need, stage.model_copy(update={"method": "lora"}))
    ):
        return "method: lora would fit"
    if isinstance(stage, TrainStage):
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
        offer = found.machine.offer
        return f"allow infra: [{', '.join((*need.infra, offer.infra))}], where a {offer.gpu} fits"
    return "choose a smaller model or other machines"


def _other_teachers(
    stage: LabelStage, world: World, offers_for: OffersFor, calibration: Calibration, cap: int
) -> list[str]:
    """What the teacher really takes, and those that fit the cap, one a line."""
    offers = offers_for(_need(stage, world.recipe))

    def best(shape: ModelShape) -> teachers.Found | None:
        changed = stage.model_copy(update={"teacher": shape.name})
        options, _ = _consider(changed, _with_teacher(world, changed, shape), offers, calibration)
        found = min(options, key=_order, default=None)
        if found is None:
            return None
        memory = found.measured.memory.total_gib.expected
        return teachers.Found(found.machine.offer, memory, found.hours, found.cost, found.reserve)

    choices = teachers.side_by_side(stage, world, offers, best, cap)
    return teachers.lines(choices, world.rate, "CNY" if world.recipe.budget.currency == "CNY" else "USD")


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
