"""Which kinds of machine are on offer, and what is the cheapest of each? Pure.

How long a stage takes depends on the kind alone: a market is sorted once, and every stage looks at a few hundred lots.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator import spend
from orchestrator.gpus import Gpu, gpu_named
from orchestrator.offers import checked, known_price
from orchestrator.plan import ending_hours
from orchestrator.provision import Latencies, Offer

PLACES_A_MACHINE = 3  # regions of one machine that a stage may fall back on
MACHINES_AN_INFRA = 8  # machines of one infra that a stage may fall back on

_Priced = tuple[int, int, str, str, int, Offer]  # price, the highest it may become, machine, region, which, the offer


@dataclass(frozen=True)
class Lot:
    """Offers of one infra that differ in machine, region and price only, by price; dearer ones than a stage would ever
    fall back on are left out. `count`: with those."""

    offers: tuple[Offer, ...]
    gpu: Gpu | None
    count: int

    @cached_property
    def first(self) -> Offer:
        return self.offers[0]

    def needed_micros(self, seconds: float) -> list[int]:
        """What each offer costs for `seconds` with its reserve for latencies: spend.cost_micros and
        spend.latency_reserve_micros, whose billed seconds all of a lot share."""
        work = spend.billed_s(self.first, seconds)
        held = spend.billed_s(self.first, self.first.latencies.total_s)
        return [-(-price * work // 3600) - (-burn * held // 3600) for price, burn in self._prices]

    def least_micros(self, seconds: float) -> tuple[int, int]:
        """(the least of `needed_micros`, which offer it is of: the first of equals)."""
        quantum, minimum_s, unbeaten = self._terms
        work = max(minimum_s, math.ceil(seconds / quantum) * quantum) if seconds > 0 else minimum_s
        if len(unbeaten) == 1:
            price, reserve, which = unbeaten[0]
            return -(-price * work // 3600) + reserve, which
        return min((-(-price * work // 3600) + reserve, which) for price, reserve, which in unbeaten)

    def never_cheaper_than(self, other: Lot) -> bool:
        """Whether `other` costs no more for any time, by `least_micros`."""
        return self._terms[:2] == other._terms[:2] and all(
            any(less[0] <= price and less[1] <= reserve for less in other._unbeaten)
            for price, reserve, _ in self._unbeaten
        )

    @cached_property
    def _terms(self) -> tuple[int, int, tuple[tuple[int, int, int], ...]]:
        """What spend.billed_s needs, and the prices: asked too often to look at an offer each time."""
        return max(1, self.first.quantum_s), self.first.minimum_s, self._unbeaten

    @cached_property
    def card(self) -> str:
        """Its name, as the project writes it."""
        return self.gpu.name if self.gpu is not None else self.first.gpu or "no GPU"

    @cached_property
    def cards(self) -> str:
        """The same with their number, where a machine has several."""
        return f"{self.first.gpus}x {self.card}" if self.first.gpus > 1 else self.card

    @cached_property
    def ending_hours(self) -> float:
        """How long before the deadline a run ends the work on each of these machines."""
        return ending_hours(self.first)

    @cached_property
    def _unbeaten(self) -> tuple[tuple[int, int, int], ...]:
        """(price an hour, reserve, which offer), without those that cost and hold back no less than one before."""
        held = spend.billed_s(self.first, self.first.latencies.total_s)
        found: list[tuple[int, int, int]] = []
        for which, (price, burn) in enumerate(self._prices):
            reserve = -(-burn * held // 3600)
            if not any(one[0] <= price and one[1] <= reserve for one in found):
                found.append((price, reserve, which))
        return tuple(found)

    @cached_property
    def _prices(self) -> tuple[tuple[int, int], ...]:
        prices = [one.price_micros_per_hour or 0 for one in self.offers]
        burns = [max(price, one.ceiling_micros_per_hour or 0) for price, one in zip(prices, self.offers, strict=True)]
        return tuple((price, burn if price else 0) for price, burn in zip(prices, burns, strict=True))


def lots_of(offers: Iterable[Offer]) -> list[Lot]:
    """The offers by kind. Those without a known price have lots of their own."""
    cards: dict[str | None, tuple[Gpu | None, Gpu | None]] = {None: (None, None)}  # by name: its form and the SXM one
    alike: dict[int, tuple[Latencies, int]] = {}  # by id: to hash one for each offer takes long
    numbers: dict[Latencies, int] = {}
    kinds: dict[tuple[Any, ...], tuple[Gpu | None, list[_Priced]]] = {}
    for one in offers:
        if one.gpu is not None and one.gpu not in cards:
            cards[one.gpu] = gpu_named(one.gpu), gpu_named(one.gpu, "SXM")
        card, other_form = cards[one.gpu]
        if other_form is not card and one.gpu is not None:
            card = gpu_named(one.gpu, one.instance)
        latencies = one.latencies
        if id(latencies) not in alike:
            alike[id(latencies)] = (latencies, numbers.setdefault(latencies, len(numbers)))
        price = one.price_micros_per_hour
        kind = (
            one.infra, one.gpu, id(card), one.gpus, one.vram_gib, one.spot, one.quantum_s, one.minimum_s,
            alike[id(latencies)][1], known_price(one),
        )  # fmt: skip
        if kind not in kinds:
            kinds[kind] = (card, [])
        found = kinds[kind][1]
        ceiling = one.ceiling_micros_per_hour
        burn = max(price or 0, ceiling) if ceiling else price or 0
        found.append((price or 0, burn, one.instance, one.region or "", len(found), one))
    lots = [Lot(_cheapest(found), card, len(found)) for card, found in kinds.values()]
    return sorted(lots, key=_order)


def worth_a_look(offers: Iterable[Offer]) -> list[Offer]:
    """Those that a plan may take or fall back on. It holds for every recipe: what one asks for is part of the kind."""
    return [one for lot in lots_of(map(checked, offers)) for one in lot.offers]


def _cheapest(offers: list[_Priced]) -> tuple[Offer, ...]:
    """By price, without those that a stage can do without: as many others as it may fall back on cost no more, neither
    now nor at the highest price they may be billed at."""
    kept: list[Offer] = []
    all_burns: list[int] = []
    burns: dict[str, list[int]] = {}
    for _, burn, instance, _, _, offer in sorted(offers):
        own = burns.setdefault(instance, [])
        if _beaten(burn, own, PLACES_A_MACHINE) or _beaten(burn, all_burns, MACHINES_AN_INFRA):
            continue
        kept.append(offer)
        insort(own, burn)
        insort(all_burns, burn)
    return tuple(kept)


def _beaten(burn: int, others: list[int], by: int) -> bool:
    """Whether so many of the others, none of which has a higher price, burn no more."""
    return len(others) >= by and others[by - 1] <= burn


def _order(lot: Lot) -> tuple[Any, ...]:
    one = lot.first
    return (
        one.gpu or "", one.infra, one.spot, one.gpus, one.vram_gib, one.price_micros_per_hour or 0, one.quantum_s,
        one.minimum_s, one.latencies.total_s, one.instance, one.region or "",
    )  # fmt: skip
