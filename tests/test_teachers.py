"""A large teacher's needs, and the teachers beside it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from orchestrator import teachers
from orchestrator.catalog import GPUS, MODELS, ModelShape
from orchestrator.errors import NothingFits
from orchestrator.money import cap_micros, parse_amount
from orchestrator.plan import Micros, Range
from orchestrator.provision import Offer
from orchestrator.recipe import LabelStage
from orchestrator.teachers import Choice, Found
from orchestrator.workload import World
from tests.recipes import API, RENTED, recipe
from tests.test_planner import CARDS, CONFIG, card, plan

R1 = MODELS["deepseek-ai/DeepSeek-R1"]
BIG = RENTED.replace("DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1")
EIGHT_H100 = replace(card("H100-SXM", 31_920_000), gpus=8, instance="8x H100")
EIGHT_H200 = replace(card("H200", 40_000_000), gpus=8, instance="8x H200")
EIGHT_A100 = replace(card("A100-80GB", 22_320_000), gpus=8, instance="8x A100")


def world(text: str = BIG) -> tuple[LabelStage, World]:
    made = World(recipe(text), CONFIG.rate)
    return made.label("label"), made


def beside(
    *offers: Offer, text: str = BIG, cap: int = 50_000_000, costs: dict[str, int] | None = None
) -> list[Choice]:
    stage, made = world(text)

    def best(shape: ModelShape) -> Found | None:
        cost = (costs or {}).get(shape.name.rpartition("-")[2])
        if cost is None:
            return None
        return Found(CARDS[0], 20.0, Range(1, 2, 3), Micros(cost // 2, cost, 2 * cost), 100_000)

    return teachers.side_by_side(stage, made, list(offers), best, cap)


def test_a_teacher_of_671_billion_needs_two_hosts_of_h100_or_one_of_h200() -> None:
    """8 bits: 671.0e9 bytes and their scales are 625 GiB; an H100 gives it 79.1 x 0.9 - 2.5 = 68.7, an H200 123.2."""
    stage, made = world()
    assert teachers.weights_gib(R1, GPUS["H100-SXM"]) == pytest.approx(671.026e9 * (1 + 4 / 16384) / 2**30, rel=1e-5)
    assert teachers.cards_for(stage, made, R1, GPUS["H100-SXM"]) == 10
    assert teachers.cards_for(stage, made, R1, GPUS["H200"]) == 6
    assert teachers.cards_for(stage, made, R1, GPUS["A100-80GB"]) == 19  # it does not compute in 8 bits
    assert (beside(EIGHT_H100)[0].cards, beside(EIGHT_H200)[0].cards, beside(EIGHT_A100)[0].cards) == (16, 8, 24)


def test_whole_machines_are_paid_for() -> None:
    one = beside(EIGHT_H100)[0]
    assert one.cost_micros is not None and one.hours is not None
    assert one.cost_micros.expected == pytest.approx(2 * 31_920_000 * one.hours.expected, rel=1e-4)
    assert not one.fits and "more than one host" in one.note
    assert beside(EIGHT_H100, cap=10**10)[0].fits


def test_the_cheapest_way_is_shown_and_single_cards_are_not_tied_together() -> None:
    dear = replace(EIGHT_H200, price_micros_per_hour=900_000_000)
    assert "H100" in beside(EIGHT_H100, dear)[0].where
    assert "H200" in beside(EIGHT_H100, EIGHT_H200)[0].where
    nothing = beside(card("H100-SXM", 1_870_000), replace(EIGHT_H100, price_micros_per_hour=None))[0]
    assert nothing.cost_micros is None and nothing.cards == 6 and "on offer" in nothing.note


def test_smaller_teachers_of_the_family_come_largest_first_and_must_fit() -> None:
    costs = {"70B": 90_000_000, "32B": 30_000_000, "14B": 9_000_000, "8B": 5_000_000, "7B": 4_000_000}
    names = [one.teacher.rpartition("-")[2] for one in beside(EIGHT_H100, costs=costs)[2:]]
    assert names == ["32B", "14B", "8B"]
    assert [one.fits for one in beside(costs={"70B": 90_000_000})[2:]] == [False]  # the nearest, if none fits
    reserve = beside(costs={"32B": 50_000_000})[2]
    assert not reserve.fits  # what is held back counts


def test_the_family_has_each_size_once() -> None:
    """Base and instruct models of one size are one teacher's size."""
    assert len(teachers.family(R1)) == 6
    sizes = [one.params for one in teachers.family(MODELS["Qwen/Qwen2.5-72B"])]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) > 10


def test_an_api_costs_what_its_tokens_cost() -> None:
    """1,200 answers of 3,500 tokens to prompts of 150: 0.18e6 in and 4.2e6 out, at 0.55 and 2.19 USD a million."""
    stage, _ = world()
    answers = stage.samples * stage.samples_per_prompt
    one = beside()[1]
    assert one.cost_micros is not None
    exact = answers * (150 * Decimal("0.55") + 3500 * Decimal("2.19"))
    assert float(exact) <= one.cost_micros.expected <= float(exact) + answers
    assert "2025-02-08" in one.note and "0.55" in one.note


def test_the_recipes_own_api_prices_come_first() -> None:
    label = API.split("stages:\n")[1].split("  - {name: train")[0].replace("name: label", "name: served")
    both = BIG.replace("stages:\n", "stages:\n" + label)
    asked, served = beside(text=both)
    assert asked.teacher == R1.name
    assert served.teacher == "big-reasoner" and "api.example.com" in served.where


def test_without_any_price_the_keys_to_give_are_named() -> None:
    big = RENTED.replace("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "meta-llama/Llama-3.1-405B-Instruct")
    one = beside(text=big)[1]
    assert one.cost_micros is None and "input_price" in one.note


def test_only_what_no_card_holds_is_called_large() -> None:
    large = [name for name, shape in MODELS.items() if teachers.needs_several_cards(shape)]
    assert {"deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-235B-A22B", "meta-llama/Llama-3.1-405B"} <= set(large)
    assert not any("32B" in name or "14B" in name for name in large)


def test_the_plan_says_what_the_teacher_takes_and_what_fits_instead() -> None:
    with pytest.raises(NothingFits) as caught:
        plan(BIG, *CARDS, EIGHT_H100, cap_micros=cap_micros(parse_amount("50 CNY"), CONFIG.rate))
    assert caught.value.exit_code == 4
    told = caught.value.hint.split("\n")
    assert "625 GiB on 16 cards" in told[0] and "over the cap" in told[0]
    assert "its API" in told[1]
    assert sum("fits the cap" in line for line in told[2:]) >= 1
    assert all("Distill" in line for line in told[2:])
