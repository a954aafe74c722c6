"""Offers sorted into lots: what is left out is never needed."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator import spend
from orchestrator.market import MACHINES_AN_INFRA, PLACES_A_MACHINE, lots_of
from orchestrator.provision import Offer
from tests.test_planner import LOCAL, card

prices = st.tuples(st.integers(1, 40), st.integers(0, 40), st.sampled_from("abc"), st.sampled_from([None, "r1", "r2"]))


def priced(found: list[tuple[int, int, str, str | None]]) -> list[Offer]:
    return [
        card("A10G", price * 10_000, instance=machine, region=region, spot=True, ceiling_micros_per_hour=top * 10_000)
        for price, top, machine, region in found
    ]


@given(st.lists(prices, min_size=1, max_size=60), st.floats(0, 20_000))
@example([(price, 40, "a", None) for price in (1, 2, 3)] + [(4, 4, "a", None)], 0.0)  # dearest now, least at worst
def test_the_cheapest_offer_of_a_lot_is_the_cheapest_of_all(
    found: list[tuple[int, int, str, str | None]], seconds: float
) -> None:
    offers = priced(found)
    (lot,) = lots_of(offers)
    costs = [spend.cost_micros(one, seconds) + spend.latency_reserve_micros(one) for one in offers]
    assert min(lot.needed_micros(seconds)) == min(costs)
    assert lot.count == len(offers) and set(lot.offers) <= set(offers)


@given(
    st.lists(prices, min_size=1, max_size=9), st.floats(0, 20_000), st.sampled_from([1, 60, 3600]), st.integers(0, 600)
)
def test_the_least_that_a_lot_costs_is_billed_as_each_offer_is(
    found: list[tuple[int, int, str, str | None]], seconds: float, quantum_s: int, minimum_s: int
) -> None:
    (lot,) = lots_of(replace(one, quantum_s=quantum_s, minimum_s=minimum_s) for one in priced(found))
    costs = [spend.cost_micros(one, seconds) + spend.latency_reserve_micros(one) for one in lot.offers]
    assert lot.least_micros(seconds) == (min(costs), costs.index(min(costs)))


@given(st.lists(prices, min_size=1, max_size=30), st.sampled_from([1, 60, 3600]), st.sampled_from([0, 60, 7200]))
def test_a_lot_counts_as_spending_counts(
    found: list[tuple[int, int, str, str | None]], quantum_s: int, minimum_s: int
) -> None:
    (lot,) = lots_of([replace(one, quantum_s=quantum_s, minimum_s=minimum_s) for one in priced(found)])
    assert lot.needed_micros(5000.5) == [
        spend.cost_micros(one, 5000.5) + spend.latency_reserve_micros(one) for one in lot.offers
    ]


def test_regions_of_one_machine_leave_room_for_other_machines() -> None:
    near = [card("A10G", 100 + at, instance="one", region=f"r{at}") for at in range(50)]
    far = [card("A10G", 10_000 + at, instance=f"other{at}") for at in range(50)]
    (lot,) = lots_of([*far, *near])
    assert [one.instance for one in lot.offers] == ["one"] * PLACES_A_MACHINE + [
        f"other{at}" for at in range(MACHINES_AN_INFRA - PLACES_A_MACHINE)
    ]


def test_what_decides_time_memory_or_billing_makes_a_lot_of_its_own() -> None:
    one = card("A100", 500_000)
    others = [
        replace(one, infra="aws"), replace(one, spot=True), replace(one, vram_gib=79.0), replace(one, gpus=2),
        replace(one, minimum_s=60), replace(one, quantum_s=60), replace(one, price_micros_per_hour=None),
        replace(one, gpu="L4"), replace(one, latencies=LOCAL.latencies), LOCAL,
    ]  # fmt: skip
    assert len(lots_of([one, *others])) == len(others) + 1
    assert len(lots_of([one, replace(one, region="elsewhere"), replace(one, price_micros_per_hour=1)])) == 1
    forms = [card("A100-80GB", 1, instance=name) for name in ("8x A100 SXM", "1x A100 PCIe")]
    assert {lot.gpu.name for lot in lots_of(forms) if lot.gpu} == {"A100-80GB-SXM", "A100-80GB"}


def test_a_price_of_nothing_costs_nothing() -> None:
    (lot,) = lots_of([replace(LOCAL, price_micros_per_hour=0)])
    assert lot.needed_micros(1000.0) == [0]
