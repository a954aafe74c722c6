"""Which teachers could write the labels? A large one's true needs, smaller ones and an API, side by side. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from orchestrator import duration, money
from orchestrator.catalog import GPUS, MODELS, ModelShape
from orchestrator.duration_serving import Serving, serving_s
from orchestrator.gpus import Gpu, gpu_named
from orchestrator.plan import Micros, Range
from orchestrator.provision import Offer
from orchestrator.recipe import LabelStage
from orchestrator.spend import cost_micros
from orchestrator.workload import World
from tasks.contract import ApiTeacher

GIB = 2**30
MEMORY_SHARE = 0.9  # of a card's memory that an engine takes
ENGINE_GIB = 2.5  # of it beside weights and cache, a card
LEAST_FLIGHT = 8  # answers that the cache must hold at once, or no machine earns its price
FP8 = ("deepseek_v3",)  # published in 8 bits, with a scale of 4 bytes for 128 x 128
FP8_BYTES = 1 + 4 / 128**2
FP8_CARDS = ("H", "L4", "RTX4090")  # by how their names begin: compute in 8 bits; others hold such weights in 16
ROUGH = Range(0.6, 1.0, 2.0)  # beyond a host nothing was measured: interconnects differ most
SMALLER = 3  # teachers shown beside the one asked for
HOST_CARDS = 8  # of a host that can be tied to others: smaller ones have no network for it


@dataclass(frozen=True)
class Price:
    """What a million tokens of a public API cost, on the day it was read."""

    input_usd: Decimal
    output_usd: Decimal
    as_of: date
    source: str


LIST_PRICES = {
    "deepseek-ai/DeepSeek-R1": Price(
        Decimal("0.55"),
        Decimal("2.19"),
        date(2025, 2, 8),
        "DeepSeek's list for deepseek-reasoner (api-docs.deepseek.com/quick_start/pricing-details-usd)",
    ),
}


@dataclass(frozen=True)
class Choice:
    """One teacher: where it runs, what it needs, how long it writes and at what price. None: not found."""

    teacher: str
    where: str
    memory_gib: float | None = None
    cards: int = 0
    hours: Range | None = None
    cost_micros: Micros | None = None
    fits: bool = False
    note: str = ""


@dataclass(frozen=True)
class Found:
    """The cheapest machine for a smaller teacher, as the planner found it; `cost_micros` and what it holds back."""

    offer: Offer
    memory_gib: float
    hours: Range
    cost_micros: Micros
    reserve_micros: int


def needs_several_cards(shape: ModelShape) -> bool:
    """Whether no known card holds the weights."""
    largest = max(GPUS.values(), key=lambda card: card.vram_gib.value)
    return weights_gib(shape, largest) > largest.vram_gib.value * MEMORY_SHARE - ENGINE_GIB


def side_by_side(
    stage: LabelStage, world: World, offers: list[Offer], best: Callable[[ModelShape], Found | None], cap_micros: int
) -> list[Choice]:
    """The teacher asked for, an API that serves it, and the largest smaller ones that fit under `cap_micros`.

    `best`: the cheapest machine for a smaller teacher, or None. The nearest of the family come first.
    """
    shape = world.shape(stage.teacher)
    asked = whole(stage, world, shape, offers, cap_micros)
    served = [*_apis(stage, world, cap_micros)]
    smaller: list[Choice] = []
    for other in family(shape):
        found = best(other)
        if found is None:
            continue
        fits = found.cost_micros.expected + found.reserve_micros <= cap_micros
        card = f"{found.offer.gpu}, {found.offer.infra}"
        smaller.append(Choice(other.name, card, found.memory_gib, 1, found.hours, found.cost_micros, fits))
        if sum(one.fits for one in smaller) == SMALLER:
            break
    fitting = [one for one in smaller if one.fits]
    return [asked, *served, *(fitting or smaller[-1:])]


def family(shape: ModelShape) -> list[ModelShape]:
    """Smaller known models of the same publisher, the largest first; of one size the first only."""
    publisher = f"{shape.name.partition('/')[0]}/"
    smaller = [one for one in MODELS.values() if one.name.startswith(publisher) and one.params < shape.params]
    found: dict[int, ModelShape] = {}
    for one in sorted(smaller, key=lambda one: -one.params):
        found.setdefault(one.params, one)
    return list(found.values())


def whole(stage: LabelStage, world: World, shape: ModelShape, offers: list[Offer], cap_micros: int) -> Choice:
    """The teacher itself, on as many whole machines of one kind as hold it: those that cost least."""
    choices = [choice for offer in offers if (choice := _on(stage, world, shape, offer, cap_micros)) is not None]
    if choices:
        return min(choices, key=lambda choice: (choice.cost_micros or Micros(0, 0, 0)).expected)
    card = max(GPUS.values(), key=lambda one: one.vram_gib.value)
    count = cards_for(stage, world, shape, card)
    memory = weights_gib(shape, card)
    return Choice(shape.name, f"{count} x {card.name}", memory, count, note="no machine that could is on offer")


def cards_for(stage: LabelStage, world: World, shape: ModelShape, card: Gpu) -> int:
    """Cards that hold the weights and a cache for a few answers in flight."""
    lengths = world.label_lengths(stage)
    cache = LEAST_FLIGHT * (lengths.longest_prompt + lengths.limit) * shape.kv_bytes(2) / GIB
    free = card.vram_gib.value * MEMORY_SHARE - ENGINE_GIB
    return math.ceil((weights_gib(shape, card) + cache) / free)


def weights_gib(shape: ModelShape, card: Gpu) -> float:
    """GiB of the weights on such a card: in 8 bits where they are published so and the card computes in them."""
    return shape.params * _weight_bytes(shape, card) / GIB


def in_8_bits(shape: ModelShape, card: Gpu) -> bool:
    """Whether an engine holds the weights as they are published, in 8 bits."""
    return shape.architecture in FP8 and card.name.startswith(FP8_CARDS)


def lines(choices: Iterable[Choice], rate: money.Rate, currency: str) -> list[str]:
    """One line a teacher, for people."""
    return [_line(choice, rate, currency) for choice in choices]


def _on(stage: LabelStage, world: World, shape: ModelShape, offer: Offer, cap_micros: int) -> Choice | None:
    card = gpu_named(offer.gpu or "", offer.instance)
    if card is None or not offer.price_micros_per_hour:
        return None
    needed = cards_for(stage, world, shape, card)
    machines = math.ceil(needed / offer.gpus)
    if machines > 1 and offer.gpus < HOST_CARDS:
        return None
    cards, lengths = machines * offer.gpus, world.label_lengths(stage)
    answers = float(stage.samples * stage.samples_per_prompt)
    work = Serving(
        shape,
        answers,
        lengths.prompt,
        lengths.answer,
        256.0,
        varied=True,
        weight_bytes=_weight_bytes(shape, card),
        tensor=cards,
        longest=lengths.limit,
    )
    seconds = serving_s(card, work)
    start = duration.stage_s(
        duration.gpu_speed(card), downloads_gb=shape.params * _weight_bytes(shape, card) / 1e9, engine=True
    )
    spread = Range(seconds * ROUGH.low, seconds, seconds * ROUGH.high) + start
    cost = Micros(*(machines * cost_micros(offer, at) for at in (spread.low, spread.expected, spread.high)))
    where = f"{machines} x {offer.instance}, {offer.infra}" if machines > 1 else f"{offer.instance}, {offer.infra}"
    note = "more than one host: rough, and kdcloud rents one machine a stage" if machines > 1 else ""
    if not note and stage.soft_labels.top_k and in_8_bits(shape, card):
        note = _scored_note(shape, offer, card)
    return Choice(
        shape.name,
        where,
        weights_gib(shape, card),
        cards,
        spread.times(1 / 3600),
        cost,
        cost.expected <= cap_micros,
        note=note,
    )


def _scored_note(shape: ModelShape, offer: Offer, card: Gpu) -> str:
    """What soft labels ask of a machine that writes with weights in 8 bits; nothing where it has that."""
    need = shape.params * 2.0 / GIB
    if need < offer.gpus * (card.vram_gib.value - ENGINE_GIB):
        return ""
    return f"hard labels only (`soft_labels: {{top_k: 0}}`): scoring takes {need:,.0f} GiB, in 16 bits"


def _weight_bytes(shape: ModelShape, card: Gpu) -> float:
    return FP8_BYTES if in_8_bits(shape, card) else 2.0


def _apis(stage: LabelStage, world: World, cap_micros: int) -> Iterable[Choice]:
    """APIs that the recipe prices; else one whose list price is on record for this teacher; else which keys to give."""
    lengths, answers = world.label_lengths(stage), stage.samples * stage.samples_per_prompt
    priced = [(one, api) for one in world.recipe.stages if isinstance(one, LabelStage) and (api := world.api(one))]
    for _, api in priced:
        yield _api_choice(api.model, f"API at {api.base_url}", api, answers, lengths.prompt, lengths.answer, cap_micros)
    if priced:
        return
    listed = LIST_PRICES.get(stage.teacher)
    if listed is None:
        note = "give `api:` with base_url, model, input_price and output_price, and it is priced"
        yield Choice(stage.teacher, "an API", note=note)
        return
    api = ApiTeacher("", stage.teacher, None, int(listed.input_usd * 10**6), int(listed.output_usd * 10**6), 0)
    note = (
        f"{listed.source} of {listed.as_of}: {listed.input_usd} and {listed.output_usd} USD for a million tokens; who "
        "serves it now asks other prices: give them as `api:`"
    )
    yield _api_choice(stage.teacher, "its API", api, answers, lengths.prompt, lengths.answer, cap_micros, note)


def _api_choice(
    name: str, where: str, api: ApiTeacher, answers: int, prompt: float, answer: float, cap_micros: int, note: str = ""
) -> Choice:
    cost = answers * api.cost_micros(math.ceil(prompt), math.ceil(answer))
    speeds = (150.0, 50.0, 20.0)  # tokens/s of one answer: sizing.API_TOKENS_S
    hours = Range(*(answers * answer / api.max_parallel / speed / 3600 for speed in speeds))
    # answers may be twice as long as expected, or a third shorter
    return Choice(name, where, None, 0, hours, Micros(cost * 2 // 3, cost, 2 * cost), cost <= cap_micros, note)


def _line(choice: Choice, rate: money.Rate, currency: str) -> str:
    memory = "" if choice.memory_gib is None else f", {choice.memory_gib:,.0f} GiB"
    cards = f" on {choice.cards} cards" if choice.cards > 1 else ""
    time = "not found" if choice.hours is None else money.human_seconds(choice.hours.expected * 3600)
    price = "not found" if choice.cost_micros is None else money.both(choice.cost_micros.expected, rate, currency)
    verdict = "fits the cap" if choice.fits else "over the cap" if choice.cost_micros is not None else "no price"
    note = f"; {choice.note}" if choice.note else ""
    return f"{choice.teacher}: {choice.where}{memory}{cards}: {time}, {price}, {verdict}{note}"
