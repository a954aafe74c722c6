"""Amounts, currencies and durations as people write them."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.money import (
    Amount,
    Rate,
    both,
    budget_for,
    cap_micros,
    cny,
    human_seconds,
    parse_amount,
    parse_budget,
    parse_duration,
    price_micros,
    usd,
)

RATE = Rate(Decimal("7.1"), date(2026, 1, 15))


@pytest.mark.parametrize(
    ("text", "value", "currency"),
    [
        ("50 CNY", "50", "CNY"),
        ("50CNY", "50", "CNY"),
        ("50cny", "50", "CNY"),
        ("¥50", "50", "CNY"),
        ("¥ 50.5", "50.5", "CNY"),
        ("50元", "50", "CNY"),
        ("50 rmb", "50", "CNY"),
        ("$7", "7", "USD"),
        ("US$7", "7", "USD"),
        ("7 USD", "7", "USD"),
        ("$7 USD", "7", "USD"),
        ("0.0001USD", "0.0001", "USD"),
        ("1,234.50 USD", "1234.50", "USD"),
        (".5 USD", ".5", "USD"),
    ],
)
def test_an_amount_is_read_as_people_write_it(text: str, value: str, currency: str) -> None:
    assert parse_amount(text) == Amount(Decimal(value), currency)


def test_a_price_an_hour_says_so() -> None:
    assert parse_amount("0.10 USD/h") == Amount(Decimal("0.10"), "USD", hourly=True)
    assert parse_amount("¥0.7/hour").hourly


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("50", "50 CNY or 50 USD"),
        (50, "50 CNY or 50 USD"),
        ("50 JPY", "unknown currency 'JPY'"),
        ("50 CNYY", "did you mean CNY"),
        ("€50", "unknown currency"),
        ("fifty CNY", "is not an amount"),
        ("1.2.3 USD", "is not an amount"),
        ("$5 CNY", "two currencies"),
        ("", "is not an amount"),
        (None, "written like"),
        (True, "written like"),
        ("1,23 USD", "is not an amount"),
        ("nan USD", "is not an amount"),
        ("5 USD/day", "is not an amount"),
    ],
)
def test_a_wrong_amount_is_refused_in_one_sentence(text: object, part: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_amount(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0 CNY", "-1 USD", "5 USD/h", "$-3"])
def test_a_budget_is_above_zero_and_no_price_an_hour(text: str) -> None:
    with pytest.raises(ValueError):
        parse_budget(text)


@given(micros=st.integers(1, 10**12), rate=st.decimals("0.01", "1000", places=4))
def test_rounding_never_raises_a_cap_and_never_lowers_a_price(micros: int, rate: Decimal) -> None:
    amount = Amount(Decimal(micros) / 10**6, "CNY")
    frozen = Rate(rate, date(2026, 1, 1))
    exact = Decimal(micros) / rate  # micro-USD
    assert cap_micros(amount, frozen) <= exact <= price_micros(amount, frozen)
    assert price_micros(amount, frozen) - cap_micros(amount, frozen) <= 1


def test_dollars_are_exact_both_ways() -> None:
    assert cap_micros(parse_amount("0.000001 USD"), RATE) == price_micros(parse_amount("0.000001 USD"), RATE) == 1
    assert cap_micros(parse_amount("0.10 USD"), RATE) == 100_000


@given(micros=st.integers(1, 10**11), currency=st.sampled_from(["CNY", "USD"]))
def test_the_budget_that_is_advised_is_enough_and_hardly_more(micros: int, currency: str) -> None:
    advised = cap_micros(parse_amount(budget_for(micros, RATE, currency)), RATE)
    assert micros <= advised <= micros * 1.1 + 10_000


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "$0.00"),
        (7_041_234, "$7.04"),
        (1_234_567_890, "$1,234.57"),
        (100_000, "$0.10"),
        (10_000, "$0.010"),
        (523, "$0.00052"),
        (1, "$0.0000010"),
        (-2_500_000, "-$2.50"),
    ],
)
def test_money_shows_two_digits_that_say_something(micros: int, text: str) -> None:
    assert usd(micros) == text


def test_both_currencies_are_shown_the_users_own_first() -> None:
    assert both(1_000_000, RATE) == "¥7.10 ($1.00)"
    assert both(1_000_000, RATE, "USD") == "$1.00 (¥7.10)"
    assert cny(100, RATE) == "¥0.00071"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h", 28800),
        ("60min", 3600),
        ("90s", 90),
        ("1h30m", 5400),
        ("1.5 h", 5400),
        ("2 h 30 min", 9000),
        ("1d", 86400),
    ],
)
def test_a_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["8", 8, "h", "", "8 parsecs", "1h and 2m", "-1h", None])
def test_a_wrong_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (48, "48 s"),
        (99, "99 s"),
        (100, "1.7 min"),
        (600, "10 min"),
        (3599, "1.0 h"),
        (4320, "1.2 h"),
        (36000, "10 h"),
        (86400 * 3.5, "3.5 d"),
    ],
)
def test_times_are_shown_in_the_unit_people_think_in(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
