"""The arithmetic of the cap: costs round up, lifetimes round down, the bound holds for every offer."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import spend
from orchestrator.offers import CLOUD_LATENCIES, MINIMUM_S
from orchestrator.provision import Latencies
from orchestrator.testing import fake_offer

# offer price an hour, quantum, minimum, seconds -> cost in micro-USD, and the sum
COSTS = [
    (3_600_000, 1, 0, 10.0, 10_000),  # 10 s at 1,000 a second
    (3_600_000, 1, 0, 10.2, 11_000),  # a begun second is billed
    (3_600_000, 60, 0, 61.0, 120_000),  # two begun minutes
    (3_600_000, 1, 60, 10.0, 60_000),  # minimum charge of 60 s
    (1, 1, 0, 1.0, 1),  # 1/3600 of a micro-dollar is one
    (500_000, 3600, 0, 1.0, 500_000),  # whole hours
]


@pytest.mark.parametrize(("price", "quantum", "minimum", "seconds", "expected"), COSTS)
def test_a_cost_is_billed_in_steps_and_rounded_up(price, quantum, minimum, seconds, expected):
    offer = fake_offer(price, quantum_s=quantum, minimum_s=minimum)
    assert spend.cost_micros(offer, seconds) == expected


@given(
    price=st.integers(1, 50_000_000),
    quantum=st.sampled_from([1, 60, 3600]),
    minimum=st.sampled_from([0, 60, 600]),
    reserved=st.integers(0, 100_000_000),
)
def test_a_machine_that_ends_within_its_lifetime_and_latencies_never_costs_more_than_its_reservation(
    price, quantum, minimum, reserved
):
    offer = fake_offer(price, quantum_s=quantum, minimum_s=minimum)
    lifetime = spend.lifetime_s(offer, reserved)
    if lifetime > 0:
        assert spend.cost_micros(offer, lifetime + offer.latencies.total_s) <= reserved


@given(price=st.integers(1, 50_000_000), quantum=st.sampled_from([1, 60]), reserved=st.integers(1, 100_000_000))
def test_a_lifetime_wastes_less_than_two_billing_steps_of_its_reservation(price, quantum, reserved):
    offer = fake_offer(price, quantum_s=quantum)
    lifetime = spend.lifetime_s(offer, reserved)
    if 0 < lifetime < spend.MAX_LIFETIME_S:
        assert Fraction(price) * Fraction(lifetime + offer.latencies.total_s + 2 * quantum) / 3600 > reserved


def test_a_reservation_below_the_minimum_charge_buys_nothing():
    offer = fake_offer(3_600_000, minimum_s=60)
    assert spend.lifetime_s(offer, 59_999) < 0


@pytest.mark.parametrize("price", [None, -1, 0])
def test_an_unknown_price_is_never_free(price):
    with pytest.raises(ValueError):
        spend.cost_micros(fake_offer(price), 10)


def test_zero_is_a_price_on_the_own_machine_only():
    assert spend.cost_micros(fake_offer(0, infra="local"), 1e6) == 0
    assert spend.lifetime_s(fake_offer(0, infra="local"), 0) == spend.MAX_LIFETIME_S


def test_a_stage_may_not_reserve_what_later_stages_need_at_least():
    assert spend.available_micros(cap=100, spent=20, open_=30, later_floor=40) == 10
    assert spend.available_micros(cap=100, spent=90, open_=30, later_floor=40) == 0


@pytest.mark.parametrize(
    ("until_s", "alive_s", "reserved", "expected"),
    [
        (100.0, 95.0, 500_000, 100_000),  # 100 s at 1,000 a second
        (30_000.0, 95.0, 500_000, 500_000),  # nobody looked for hours: its watchdog held the reservation
        (30_000.0, 900.0, 500_000, 900_000),  # seen alive beyond its reservation: that is what it cost
    ],
)
def test_a_machine_is_settled_at_what_was_seen_and_else_at_most_at_its_reservation(
    until_s, alive_s, reserved, expected
):
    assert spend.settled_micros(fake_offer(3_600_000), until_s=until_s, alive_s=alive_s, reserved=reserved) == expected


@given(
    price=st.integers(1, 50_000_000),
    quantum=st.sampled_from([1, 60, 3600]),
    minimum=st.sampled_from([0, 60, 3600]),
    reserved=st.integers(0, 100_000_000),
)
def test_a_machine_that_lands_at_twice_its_price_and_is_ended_by_its_create_limit_stays_within_its_reservation(
    price, quantum, minimum, reserved
):
    offer = fake_offer(price, quantum_s=quantum, minimum_s=minimum)
    limit, life = spend.create_limit_s(offer, reserved), spend.order_lifetime_s(offer, reserved)
    assert life < 0 or limit > 0
    if life > 0:
        landed = fake_offer(2 * price, quantum_s=quantum, minimum_s=minimum)
        assert spend.cost_micros(landed, limit + offer.latencies.ending_s) <= reserved
        assert spend.reserve_micros(offer, life) <= reserved
        assert spend.create_limit_s(offer, spend.reserve_micros(offer, life)) > 0


def test_two_machines_of_one_order_at_twice_its_price_are_paid_for_though_each_is_billed_a_whole_hour():
    offer = fake_offer(1_000_000, quantum_s=3600)
    assert spend.order_lifetime_s(offer, 3_999_999) < 0 < spend.order_lifetime_s(offer, 4_000_000)
    assert spend.reserve_micros(offer, 60) == 4_000_000


@pytest.mark.parametrize(("reserved", "expected"), [(500_000, 200_000), (150_000, 150_000), (50_000, 90_000)])
def test_what_never_came_up_is_settled_as_if_it_had_cost_twice_as_much(reserved, expected):
    offer = fake_offer(3_600_000)
    settled = spend.settled_micros(offer, until_s=100.0, alive_s=90.0, reserved=reserved, landed=False)
    assert settled == expected


def test_the_supervisor_has_its_last_upload_on_top_of_the_lifetime_and_not_what_is_gone_already():
    latencies = Latencies(tick_s=5, flush_s=120)
    assert spend.supervisor_remaining_s(1000, 40, latencies) == 1000 + 5 + 120 - 40

@pytest.mark.parametrize("minimum_s", sorted({0, *MINIMUM_S.values()}))
@pytest.mark.parametrize("latencies", [CLOUD_LATENCIES, Latencies()])
def test_what_a_plan_holds_back_also_pays_for_the_worst_that_may_land(latencies: Latencies, minimum_s: int) -> None:
    """A plan that fits its cap is one that may be ordered: on every infra that the package has prices of."""
    offer = fake_offer(900_000, minimum_s=minimum_s, latencies=latencies)
    needed = spend.cost_micros(offer, 1) + spend.latency_reserve_micros(offer)
    assert spend.order_lifetime_s(offer, needed) >= 0
