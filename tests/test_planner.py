"""From a recipe and offers to a plan."""

from __future__ import annotations

import gc
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import planner as bench
from orchestrator import planner, spend
from orchestrator.catalog import GPUS
from orchestrator.config import Config
from orchestrator.duration import fetch_s, gpu_speed
from orchestrator.errors import NothingFits, UsageError
from orchestrator.money import cap_micros, parse_amount, parse_duration, price_micros
from orchestrator.plan import Plan, StagePlan, digest_of, plan_from_dict, plan_to_dict, plan_to_json
from orchestrator.planner import later_floor_micros, make_plan
from orchestrator.provision import Latencies, Need, Offer
from orchestrator.recipe import Stage
from orchestrator.setup_time import environment_of, setup_s
from orchestrator.sizing import Machine, choices, fetched_gb, models_gb
from orchestrator.spend import ApiLine
from orchestrator.testing import fake_offer
from orchestrator.workload import World
from tasks.contract import EvaluateSettings, LabelSettings, ModelSource, PretrainSettings, TrainSettings
from tests.recipes import API, DATA, RENTED, SMALL, recipe

TEACHER = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
NOW = datetime(2026, 6, 1, tzinfo=UTC)
CONFIG = Config(owner="abc123", bucket="file:/home/b")
LOCAL = fake_offer(
    100_000,
    gpu=None,
    infra="local",
    instance="2 cores",
    gpus=0,
    vram_gib=8.0,
    as_of=NOW,
    latencies=Latencies(tick_s=1, flush_s=15, api_s=2, provision_s=3, handover_s=2, slack_s=5),
)


SHORT, LONG = Latencies(slack_s=0.0), Latencies(slack_s=3600.0)  # until a machine has ended: 275 s, 3,875 s
ROOMY = replace(LOCAL, vram_gib=64.0)


def card(gpu: str, usd_micros: int | None, **changes: Any) -> Offer:
    return fake_offer(usd_micros, gpu=gpu, infra="runpod", vram_gib=GPUS[gpu].vram_gib.value, as_of=NOW, **changes)


CARDS = [card("RTX3090", 340_000), card("A10G", 1_006_000), card("A100-80GB", 1_390_000), card("L4", 800_000)]


def offering(*offers: Offer) -> Callable[[Need], list[Offer]]:
    """A market: what a need's gpus and infra leave of `offers`."""

    def offers_for(need: Need) -> list[Offer]:
        return [
            offer
            for offer in offers
            if (not need.gpus or offer.gpu in need.gpus) and (not need.infra or offer.infra in need.infra)
        ]

    return offers_for


def plan(text: str = SMALL, *offers: Offer, **changes: Any) -> Plan:
    return make_plan(recipe(text), config=CONFIG, offers_for=offering(*(offers or (LOCAL,))), now=NOW, **changes)


def test_every_stage_gets_full_settings_and_what_it_waits_for() -> None:
    made = plan()
    pretrain, label, train, evaluate, export = made.stages
    assert [stage.after for stage in made.stages] == [(), ("pretrain",), ("label",), ("train", "pretrain"), ("train",)]
    assert isinstance(pretrain.settings, PretrainSettings) and pretrain.settings.model.hidden_size == 96
    assert isinstance(label.settings, LabelSettings)
    assert label.settings.teacher == ModelSource(stage="pretrain")
    assert (label.settings.prompts.source, label.settings.verify) == ("builtin:addition/train", "exact")
    assert isinstance(train.settings, TrainSettings)
    assert train.settings.student.architecture is not None and train.settings.student.architecture.hidden_size == 48
    assert (train.settings.compare_hard, train.settings.compare_seeds, train.settings.steps, train.settings.epochs) == (
        True,
        3,
        800,
        None,
    )
    assert isinstance(evaluate.settings, EvaluateSettings)
    assert evaluate.settings.teacher == ModelSource(stage="pretrain")  # a label stage means its teacher
    assert evaluate.settings.held_out.source == "builtin:addition/held_out"
    assert export.settings.student == "train"  # type: ignore[union-attr]


def test_what_the_recipe_says_is_never_changed() -> None:
    text = SMALL.replace(
        "batch_size: 64",
        "batch_size: 64\n    micro_batch: 16\n    precision: fp32\n    checkpointing: true\n    compile: true\n"
        "    max_seq_len: 100\n    checkpoint_every: 7s",
    )
    train = plan(text).stages[2]
    assert isinstance(train.settings, TrainSettings)
    assert (train.settings.micro_batch, train.settings.precision, train.settings.checkpointing) == (16, "fp32", True)
    assert (train.settings.max_seq_len, train.settings.checkpoint_every_s, train.chosen) == (100, 7.0, ())
    assert train.settings.compile


def test_labels_are_stored_at_the_temperature_of_the_training_that_uses_them() -> None:
    label = plan(RENTED, *CARDS).stages[0]
    assert isinstance(label.settings, LabelSettings) and label.settings.label_temperature == 3.0
    said = plan(RENTED.replace("samples: 1200", "samples: 1200, soft_labels: {temperature: 2}"), *CARDS)
    assert said.stages[0].settings.label_temperature == 2.0  # type: ignore[union-attr]
    assert any("tail is not learned" in note for note in said.stages[1].notes)


def test_labels_in_8_bit_are_planned_with_their_bytes() -> None:
    made = {}
    for bits in (16, 8):
        soft = f"samples: 1200, soft_labels: {{logprob_bits: {bits}}}"
        label = plan(RENTED.replace("samples: 1200", soft), *CARDS).stages[0]
        assert isinstance(label.settings, LabelSettings) and label.settings.logprob_bits == bits
        made[bits] = label.uses["label_gib"]
    # ids 4, masses 8, 64 packed ids of 18 bits 144, 64 log-probabilities
    assert made[8] / made[16] == pytest.approx((4 + 8 + 144 + 64) / (4 + 8 + 144 + 128))


def test_the_cheapest_machine_that_fits_is_taken_and_the_others_stay_for_failover() -> None:
    made = plan(RENTED, *CARDS)
    for stage in made.stages:
        assert len(stage.candidates) == len(stage.candidate_hours)
        assert stage.candidate_hours[0] == stage.hours
        costs = [
            spend.cost_micros(offer, hours.expected * 3600) + spend.latency_reserve_micros(offer)
            for offer, hours in zip(stage.candidates, stage.candidate_hours, strict=True)
        ]
        assert costs[0] == min(costs)
    assert len(made.stages[0].candidates) == len(CARDS)


def test_every_candidate_holds_what_the_stage_needs() -> None:
    for stage in plan(RENTED, *CARDS, card("T4", 100_000)).stages:
        assert all(offer.vram_gib >= stage.vram_gib.high for offer in stage.candidates)


def test_knobs_are_chosen_so_that_the_smallest_card_holds_the_training() -> None:
    text = RENTED.replace("loss:", "batch_size: 16, compile: false, loss:")
    roomy = plan(text, card("H200", 500_000)).stages[1].settings
    tight = plan(text, card("A10G", 500_000)).stages[1].settings
    assert isinstance(roomy, TrainSettings) and isinstance(tight, TrainSettings)
    assert not roomy.checkpointing and tight.checkpointing
    assert tight.micro_batch < tight.batch_size == 16 and tight.batch_size % tight.micro_batch == 0
    assert tight.precision == "bf16"


def test_a_card_without_bf16_trains_in_fp32_and_is_no_fallback_for_bf16() -> None:
    text = RENTED.replace("loss:", "max_seq_len: 1024, loss:").replace(
        "samples: 1200", "samples: 1200, max_new_tokens: 900"
    )
    assert (
        plan(text.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-1.5B"), card("V100", 100_000))
        .stages[1]
        .settings.precision
        == "fp32"
    )  # type: ignore[union-attr]
    train = plan(
        text.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-1.5B"), card("A10G", 100_000), card("V100", 900_000)
    ).stages[1]
    assert [offer.gpu for offer in train.candidates] == ["A10G"]
    assert any("bf16" in one.why for one in train.rejected)


def test_cards_that_are_not_taken_say_why() -> None:
    label = plan(
        RENTED,
        *CARDS,
        card("T4", 100_000),
        card("H100", None),
        replace(card("L4", 5), gpu="RTX9999"),
    ).stages[0]
    why = {one.gpu: one.why for one in label.rejected}
    assert "needs" in why["T4"] and "has 14.6" in why["T4"]
    assert why["H100"] == "its price is not known"
    assert "speed" in why["RTX9999"]


def test_cost_is_price_times_hours_rounded_up_to_what_is_billed() -> None:
    hourly = replace(CARDS[0], quantum_s=3600)
    for stage in plan(RENTED, hourly, join=False).stages:
        for micros, hours in ((stage.cost_micros.low, stage.hours.low), (stage.cost_micros.high, stage.hours.high)):
            assert micros % 340_000 == 0 and micros >= 340_000 * hours > micros - 340_000
    minimum = plan(RENTED, replace(CARDS[0], minimum_s=10 * 24 * 3600), join=False).stages[3]
    assert minimum.cost_micros.low == minimum.cost_micros.high == 240 * 340_000


def test_each_machine_holds_back_its_latencies() -> None:
    for stage in plan().stages:
        assert stage.reserve_micros == 778  # 28 s of 100,000 an hour, rounded up


def test_a_plan_fits_when_expected_costs_overheads_and_reserves_are_within_the_cap() -> None:
    made = plan(RENTED, *CARDS)
    needed = sum(stage.cost_micros.expected + stage.reserve_micros for stage in made.stages) + sum(
        item.cost_micros.expected for item in made.overhead
    )
    assert made.overhead  # a bucket that is billed
    assert plan(RENTED, *CARDS, cap_micros=needed).fits
    assert not plan(RENTED, *CARDS, cap_micros=needed - 1).fits
    high = made.cost_micros.high
    assert plan(RENTED, *CARDS, cap_micros=high - 1).tight and not plan(RENTED, *CARDS, cap_micros=high).tight


def test_the_cap_is_the_recipes_unless_one_is_given() -> None:
    assert plan().cap_micros == cap_micros(parse_amount("1 CNY"), CONFIG.rate) == 140_845
    assert plan(cap_micros=5).cap_micros == 5
    with pytest.raises(UsageError):
        plan(cap_micros=-1)


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    made = plan(RENTED, *CARDS, cap_micros=1_000_000)
    advice = made.notes[0]
    assert not made.fits and "--budget" in advice and "set samples:" in advice
    budget = advice.split("--budget ")[1].split(",")[0]
    assert plan(RENTED, *CARDS, cap_micros=cap_micros(parse_amount(budget), CONFIG.rate)).fits
    samples = advice.split("samples: ")[1].split(" ")[0]
    assert plan(RENTED.replace("samples: 1200", f"samples: {samples}"), *CARDS, cap_micros=1_000_000).fits


def test_nothing_fits_names_the_smallest_change_that_would() -> None:
    def hint(text: str, *offers: Offer) -> str:
        with pytest.raises(NothingFits) as caught:
            plan(text, *offers)
        assert caught.value.exit_code == 4
        return caught.value.hint

    big = RENTED.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-32B")
    narrow = big.replace("budget:", "gpus: [A10G]\nbudget:")
    assert "gpus: [A10G, A100-80GB]" in hint(narrow, *CARDS)
    assert hint(big, card("A10G", 1)) == "teacher: deepseek-ai/DeepSeek-R1-Distill-Qwen-7B would fit"
    full = RENTED.replace("loss:", "method: full, loss:")
    assert hint(full, card("RTX3090", 1)) == "optimizer: adamw_8bit would fit"
    small = full.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-1.5B").replace("method:", "max_seq_len: 2048, method:")
    assert hint(small, card("T4", 1)) == "method: lora would fit"
    assert hint(SMALL.replace("budget:", "gpus: [A10G]\nbudget:"), LOCAL) == "leave out gpus: this machine has none"
    elsewhere = RENTED.replace("[runpod, aws]", "[aws]")
    assert "allow infra: [aws, runpod]" in hint(elsewhere, *CARDS)
    held = RENTED.replace("loss: {", "micro_batch: 8, compile: false, checkpointing: false, loss: {")
    assert hint(held, card("RTX3090", 1)) == "checkpointing: true would fit"
    assert hint(held.replace("micro_batch: 8", "micro_batch: 4"), card("A100", 1)) == "micro_batch: 1 would fit"
    long = RENTED.replace("loss: {", "max_seq_len: 131072, loss: {")
    assert hint(long, card("A10G", 1)) == "max_seq_len: 65536 would fit"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["RTX3090", "L4", "A10G", "A100", "H100", "T4", "H200"]),
            st.integers(20, 400),
            st.booleans(),
            st.sampled_from(["runpod", "aws"]),
            st.sampled_from([SHORT, LONG]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.2, 1.2),
)
@settings(max_examples=60, deadline=None)
def test_the_plan_is_the_cheapest_of_all_offers_and_settings_in_time(
    drawn: list[tuple[str, int, bool, str, Latencies]], share: float
) -> None:
    """Against all ways to part the stages into rows on one machine each, all assignments and all settings that fit,
    counted as spending counts."""
    offers = [card("A100-80GB", 3_000_000)] + [
        replace(
            card(gpu, price * 10_000, instance=f"i{at}", spot=spot, minimum_s=600 * (at % 2)), infra=infra,
            ceiling_micros_per_hour=price * 20_000 if spot else None, latencies=latencies,
        )
        for at, (gpu, price, spot, infra, latencies) in enumerate(drawn)
    ]  # fmt: skip
    text = RENTED.replace("budget:", "spot: true\nbudget:")
    asked = recipe(text)
    world = World(asked, CONFIG.rate)
    rows = _all_rows(asked.stages, world, offers)
    slowest = sum(max(hours for _, hours, _ in rows[at, at + 1]) for at in range(len(asked.stages)))
    deadline_s = share * slowest * 3600
    made = plan(text, *offers, deadline_s=deadline_s)
    sums = [_sums(chosen) for chosen in _all_plans(rows, len(asked.stages))]
    in_time = [one[:2] for one in sums if one[2] <= deadline_s]
    assert made.in_time == bool(in_time)
    storage = made.overhead[0].cost_micros.expected
    traffic = sum(_traffic(stage, world, one.offer) for stage, one in zip(asked.stages, made.stages, strict=True))
    assert storage >= traffic  # told beside the machines
    if in_time:
        micros, hours = min(in_time)
        assert (made.needed_micros - storage + traffic, made.hours.expected) == (micros, pytest.approx(hours))
    else:
        assert made.needed_hours * 3600 == pytest.approx(min(needed_s for *_, needed_s in sums))


Row = tuple[int, float, float]  # cost with reserve and traffic, hours, seconds that the machine may take to end


def _sums(chosen: tuple[Row, ...]) -> tuple[int, float, float]:
    """(cost, hours, the shortest deadline in seconds). Work must be done before the deadline by all that its machine
    may take to end, since the runner takes that off a machine's lifetime (`Runner._reserve`)."""
    ends = list(itertools.accumulate(hours for _, hours, _ in chosen))
    needed_s = max(end * 3600 + ending_s for end, (_, _, ending_s) in zip(ends, chosen, strict=True))
    return sum(micros for micros, _, _ in chosen), ends[-1], needed_s


def _all_plans(rows: dict[tuple[int, int], set[Row]], count: int, at: int = 0) -> Iterator[tuple[Row, ...]]:
    if at == count:
        yield ()
        return
    for end in range(at + 1, count + 1):
        for one in rows[at, end]:
            for rest in _all_plans(rows, count, end):
                yield (one, *rest)


def _all_rows(stages: tuple[Stage, ...], world: World, offers: list[Offer]) -> dict[tuple[int, int], set[Row]]:
    """By first stage and the one after the last: all of them on one machine, each offer with all settings that fit."""
    found: dict[tuple[int, int], set[Row]] = {
        (at, end): set() for at in range(len(stages)) for end in range(at + 1, len(stages) + 1)
    }
    for offer in offers:
        ways = [list(_all_ways(stage, world, offer)) for stage in stages]
        for at, end in found:
            for chosen in itertools.product(*ways[at:end]):
                seconds = _row_s(stages[at:end], chosen, world, offer)
                micros = spend.cost_micros(offer, seconds) + spend.latency_reserve_micros(offer)
                micros += sum(_traffic(stage, world, offer) for stage in stages[at:end])
                found[at, end].add((micros, seconds / 3600, offer.latencies.total_s))
    return found


def _all_ways(stage: Stage, world: World, offer: Offer) -> Iterator[planner._Way]:
    machine = Machine(offer, gpu_speed(GPUS[offer.gpu or ""]), GPUS[offer.gpu or ""])
    seen = set()
    for chosen in choices(stage, world, machine):
        way = planner._measured_option(stage, chosen, world, machine, {})
        if not isinstance(way, str) and way.needs_gib <= offer.vram_gib and way.hours.expected not in seen:
            seen.add(way.hours.expected)
            yield way


def _row_s(stages: tuple[Stage, ...], ways: tuple[planner._Way, ...], world: World, offer: Offer) -> float:
    """Expected seconds on one machine: it is created once, makes each environment once, and fetches each model once."""
    total, environments, models = 0.0, set[str | None](), set[str]()
    for stage, way in zip(stages, ways, strict=True):
        environment = environment_of(stage.kind, way.settings, GPUS[offer.gpu or ""])
        fetched = models_gb(stage, way.settings, world)
        if not environments:
            total += way.hours.expected * 3600
        else:
            total += setup_s(environment, first=environment not in environments, others=True).expected
            total += way.measured.around_s.expected + way.measured.work_s.expected
            have_gb = sum(gigabytes for name, gigabytes in fetched.items() if name in models)
            total -= fetch_s(gpu_speed(GPUS[offer.gpu or ""]), have_gb).expected
            total += way.measured.download_s.expected + way.measured.bucket_s.expected
        environments.add(environment)
        models.update(fetched)
    return total


def _traffic(stage: Stage, world: World, offer: Offer) -> int:
    """0.09 USD a GB of what earlier stages left in the bucket, but for a machine of its own cloud."""
    return 0 if offer.infra == "aws" else math.ceil(fetched_gb(stage, world) * 90_000)


def test_traffic_out_of_the_bucket_is_part_of_the_choice() -> None:
    """Labels: 864 answers of 3,500 tokens of 284 bytes, 0.86 GB, 0.077 USD to a machine outside the bucket's cloud."""
    near, far = card("RTX3090", 500_000, instance="near"), card("RTX3090", 450_000, instance="far")
    made = plan(RENTED, replace(near, infra="aws"), far, join=False)
    assert [stage.offer.infra for stage in made.stages] == ["runpod", "aws", "runpod", "runpod"]
    assert made.overhead[0].cost_micros.expected - made.overhead[0].cost_micros.low < 110_000
    outside = plan(RENTED, far).overhead[0]
    gb = 864 * 3500 * 284 / 1e9
    assert outside.cost_micros.expected - plan(RENTED, replace(near, infra="aws")).overhead[0].cost_micros.expected == (
        pytest.approx(90_000 * gb, rel=0.02)
    )
    at_home = RENTED.replace("bucket: s3://bucket/kd\n", "")
    assert [stage.offer.infra for stage in plan(at_home, replace(near, infra="aws"), far).stages] == ["runpod"] * 4


def test_layers_are_compiled_where_training_takes_long_enough_and_the_card_has_bf16() -> None:
    def compiled(text: str, gpu: str) -> bool:
        settings = plan(text, card(gpu, 500_000)).stages[1].settings
        assert isinstance(settings, TrainSettings)
        return settings.compile

    small = RENTED.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-1.5B").replace("loss:", "max_seq_len: 2048, loss:")
    long = small.replace("max_seq_len", "epochs: 5, max_seq_len")
    assert compiled(long, "RTX3090") and compiled(long, "H100")
    assert not compiled(small, "H200")  # it takes less than five minutes
    assert not compiled(long, "T4")
    assert not compiled(long.replace("epochs: 5", "epochs: 5, compile: false"), "RTX3090")
    assert compiled(small.replace("max_seq_len", "compile: true, max_seq_len"), "H200")
    assert "compile" in plan(long, card("H100", 1)).stages[1].chosen


def test_a_deadline_that_cannot_be_kept_is_answered_with_one_that_can() -> None:
    late = plan(RENTED, *CARDS, deadline_s=600.0)
    advice = late.notes[0]
    assert not late.in_time and advice.startswith("give it --deadline ")
    said = advice.removeprefix("give it --deadline ").split(",")[0]
    assert plan(RENTED, *CARDS, deadline_s=parse_duration(said)).in_time
    assert late.hours.expected == min(one.hours for one in planner_of(RENTED, *CARDS).frontier())


def test_a_plan_is_in_time_when_its_last_machine_may_end_before_the_deadline() -> None:
    """The runner ends the work on a machine its latencies before the deadline: 365 s here (`Runner._reserve`)."""
    made = plan(RENTED, CARDS[0])
    assert made.needed_hours == pytest.approx(made.hours.expected + CARDS[0].latencies.total_s / 3600)
    needed_s = made.needed_hours * 3600
    assert plan(RENTED, CARDS[0], deadline_s=needed_s + 1).in_time
    late = plan(RENTED, CARDS[0], deadline_s=needed_s - 1)
    assert not late.in_time and late.hours.expected * 3600 < needed_s - 1
    said = late.notes[0].removeprefix("give it --deadline ").split(",")[0]
    assert 0 <= parse_duration(said) - needed_s < 60
    assert any("machines take time to end" in note for note in late.notes)


def test_fewer_samples_are_advised_where_they_are_in_time() -> None:
    needed_s = plan(RENTED, CARDS[0]).needed_hours * 3600
    advice = plan(RENTED, CARDS[0], deadline_s=0.7 * needed_s).notes[0]
    samples = int(advice.split("samples: ")[1].split(" ")[0])
    fewer = RENTED.replace("samples: 1200", f"samples: {samples}")
    assert plan(fewer, CARDS[0], deadline_s=0.7 * needed_s).in_time
    more = RENTED.replace("samples: 1200", f"samples: {samples + 13}")
    assert not plan(more, CARDS[0], deadline_s=0.7 * needed_s).in_time


def test_a_machine_that_ends_late_needs_an_earlier_end_of_its_own_stage_only() -> None:
    late, soon = card("RTX3090", 100_000, latencies=LONG), card("RTX3090", 1_000_000, latencies=SHORT)
    made = plan(RENTED, late, soon, join=False)
    assert [stage.offer.latencies for stage in made.stages] == [LONG] * 4
    hurried = plan(RENTED, late, soon, deadline_s=made.needed_hours * 3600 - 1, join=False)
    assert hurried.in_time and hurried.hours == made.hours
    assert [stage.offer.latencies for stage in hurried.stages] == [LONG, LONG, LONG, SHORT]


def test_what_a_tight_cap_allows_together_is_told_where_nothing_alone_helps() -> None:
    made = plan(RENTED, *CARDS, cap_micros=900_000)
    advice = made.notes[0]
    assert "samples:" in advice
    samples = advice.split("samples: ")[1].split(" ")[0]
    text = RENTED.replace("samples: 1200", f"samples: {samples}")
    if "limit:" in advice:
        limit = advice.split("limit: ")[1].split(" ")[0]
        text = text.replace("kind: evaluate", f"kind: evaluate, limit: {limit}")
    assert plan(text, *CARDS, cap_micros=900_000).fits


def planner_of(text: str, *offers: Offer, **changes: Any) -> planner.Planner:
    return planner.Planner(recipe(text), config=CONFIG, offers_for=offering(*offers), now=NOW, **changes)


def test_the_deadline_buys_speed_where_an_hour_costs_least_and_says_when_it_cannot() -> None:
    slow, fast = card("L4", 100_000), card("H100", 3_000_000)
    cheap = plan(RENTED, slow, fast)
    hurried = plan(RENTED, slow, fast, deadline_s=0.6 * cheap.hours.expected * 3600)
    assert cheap.in_time and hurried.in_time
    assert hurried.hours.expected < 0.6 * cheap.hours.expected
    assert hurried.cost_micros.expected > cheap.cost_micros.expected
    late = plan(RENTED, slow, fast, deadline_s=60.0)
    assert not late.in_time and any("deadline" in note for note in late.notes)


def test_stages_share_a_machine_that_is_created_once_and_holds_back_once() -> None:
    made, apart = plan(RENTED, CARDS[0]), plan(RENTED, CARDS[0], join=False)
    assert [stage.joins for stage in made.stages] == [False, True, True, True]
    assert not any(stage.joins for stage in apart.stages)
    assert made.needed_micros < apart.needed_micros and made.hours.expected < apart.hours.expected
    assert [stage.reserve_micros for stage in made.stages] == [spend.latency_reserve_micros(CARDS[0]), 0, 0, 0]
    for name in ("low", "expected", "high"):  # shares of what the machine costs, by time
        seconds = [getattr(stage.hours, name) * 3600 for stage in made.stages]
        shares = [getattr(stage.cost_micros, name) for stage in made.stages]
        assert sum(shares) == spend.cost_micros(CARDS[0], sum(seconds))
        assert shares == pytest.approx([sum(shares) * one / sum(seconds) for one in seconds], abs=2)
    for stage, alone in zip(made.stages[1:], apart.stages[1:], strict=True):
        assert "create" in alone.parts and "create" not in stage.parts
        assert stage.settings == alone.settings
    once = plan(RENTED, replace(CARDS[0], minimum_s=24 * 3600))
    assert [stage.joins for stage in once.stages] == [False, True, True, True]
    assert sum(stage.cost_micros.high for stage in once.stages) == 24 * 340_000


def test_a_machine_makes_each_environment_once_and_fetches_each_model_once() -> None:
    made, apart = plan(RENTED, CARDS[0]), plan(RENTED, CARDS[0], join=False)
    setup = {stage.name: stage.parts["setup"].seconds for stage in made.stages}
    assert setup["label"] == setup_s("label")
    assert setup["train"] == setup_s("train", others=True)
    assert setup["evaluate"] == setup["export"] == setup_s("label", first=False)
    saved_s = {
        stage.name: _download_s(alone) - _download_s(stage)
        for stage, alone in zip(made.stages, apart.stages, strict=True)
    }
    shapes = recipe(RENTED).models
    teacher, student = (2e-9 * shapes[name].params for name in (TEACHER, "Qwen/Qwen2.5-1.5B"))
    expected = {"label": 0.0, "train": 0.0, "evaluate": teacher + student, "export": student}
    assert saved_s == pytest.approx(
        {name: fetch_s(gpu_speed(GPUS["RTX3090"]), gb).expected for name, gb in expected.items()}
    )
    assert {part.key for part in made.stages[1].parts.values()} & {part.key for part in apart.stages[1].parts.values()}
    assert made.stages[1].parts["setup"].key != apart.stages[1].parts["setup"].key  # other work: not compared with it


def _download_s(stage: StagePlan) -> float:
    return stage.parts["download"].seconds.expected if "download" in stage.parts else 0.0


def test_every_candidate_of_a_shared_machine_holds_all_its_stages() -> None:
    made = plan(RENTED, *CARDS, card("T4", 100_000))
    first, *others = made.stages
    assert all(stage.joins and stage.candidates == first.candidates for stage in others)
    assert "T4" not in {offer.gpu for offer in first.candidates} and len(first.candidates) == len(CARDS)
    for stage in made.stages:
        assert len(stage.candidate_hours) == len(stage.candidate_parts) == len(stage.candidates)
        assert all(offer.vram_gib >= stage.vram_gib.high for offer in stage.candidates)
    assert ("T4", "it does not hold label, which shares the machine") in {
        (one.gpu, one.why) for one in made.stages[3].rejected
    }
    costs = [
        spend.cost_micros(offer, sum(stage.candidate_hours[at].expected for stage in made.stages) * 3600)
        for at, offer in enumerate(first.candidates)
    ]
    assert costs == sorted(costs)


def test_only_rented_machines_are_shared_and_only_by_stages_that_may_run_on_them() -> None:
    assert not any(stage.joins for stage in plan().stages)  # your own machine
    asks = plan(API.replace("infra: local", "infra: runpod"), *CARDS).stages
    assert [stage.joins for stage in asks] == [False, False, True]  # the first asks an API
    other = RENTED.replace("kind: train,", "kind: train, gpus: [A100-80GB],")
    assert [stage.joins for stage in plan(other, *CARDS).stages][1] is False
    same = RENTED.replace("kind: train,", "kind: train, gpus: [RTX3090],")  # a need of its own, and the same machine
    assert [stage.joins for stage in plan(same, *CARDS).stages] == [False, True, True, True]


def test_a_machine_that_is_best_for_no_stage_alone_is_taken_where_it_is_for_all_together() -> None:
    """The A100 alone is dearer for each of them than the two others are."""
    small, large = card("T4", 60_000), card("A100-80GB", 450_000)
    text = RENTED.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-32B")
    apart = plan(text, small, large, join=False)
    made = plan(text, small, large)
    assert {stage.offer.gpu for stage in apart.stages} == {"T4", "A100-80GB"}
    assert [stage.offer.gpu for stage in made.stages] == ["A100-80GB"] * 4 and made.stages[3].joins


def test_sharing_is_part_of_what_is_approved_and_kept() -> None:
    made = plan(RENTED, CARDS[0])
    apart = tuple(replace(stage, joins=False) for stage in made.stages)
    digests = [digest_of("recipe", stages, 1, None, CONFIG.rate) for stages in (made.stages, apart)]
    assert len(set(digests)) == 2
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(made)))) == made
    raw = json.loads(json.dumps(plan_to_dict(plan(RENTED, CARDS[0], join=False))))
    for stage in raw["stages"]:
        del stage["joins"]  # older plans
    assert not any(stage.joins for stage in plan_from_dict(raw).stages)
    assert [stage["joins"] for stage in plan_to_json(made)["stages"]] == [False, True, True, True]


def test_what_stays_for_later_machines_leaves_a_shared_one_room_for_all_its_stages() -> None:
    made = plan(RENTED, CARDS[0])
    needed = sum(stage.cost_micros.expected for stage in made.stages) + made.stages[0].reserve_micros
    roomy = plan(RENTED, CARDS[0], cap_micros=made.needed_micros)
    assert roomy.fits and roomy.cap_micros - later_floor_micros(roomy, 3) >= needed


def test_control_arms_and_the_search_are_priced() -> None:
    train = plan().stages[2]
    # 3 seeds * (soft 1 + hard 1 + hard twice 2) * 800 steps + 2 kinds * 2 rates * 100 steps
    assert train.uses["steps_in_all"] == 3 * 4 * 800 + 2 * 2 * 100
    alone = plan(
        SMALL.replace("compare: {hard_labels: true, seeds: 3, learning_rates: [1e-3, 3e-3], search_steps: 100}\n", "")
    )
    assert alone.stages[2].uses["steps_in_all"] == 800
    assert alone.stages[2].cost_micros.expected < train.cost_micros.expected / 5
    assert alone.stages[2].settings.compare_hard is False  # type: ignore[union-attr]


def test_answers_of_several_seeds_and_the_distance_from_the_teacher_are_priced() -> None:
    line = next(line for line in SMALL.splitlines() if "kind: evaluate" in line)

    def hours(changed: str) -> float:
        return plan(SMALL.replace(line, changed)).stages[3].hours.expected

    three = line.replace("kind: evaluate", "kind: evaluate, seeds: 3, temperature: 1.0, lm_eval: [gsm8k]")
    made = plan(SMALL.replace(line, three)).stages[3]
    settings = made.settings
    assert isinstance(settings, EvaluateSettings)
    assert (settings.seeds, settings.temperature, settings.top_p, settings.lm_eval) == (3, 1.0, 0.95, ("gsm8k",))
    assert made.hours.expected > 1.5 * hours(line)
    assert any("gsm8k" in note and "not in these hours" in note for note in made.notes)


def test_only_the_last_student_is_compared() -> None:
    text = SMALL + (
        "  - {name: again, kind: label, teacher: train, samples: 100}\n"
        "  - {name: small, kind: train, student: {hidden_size: 32}, labels: again, method: full, steps: 5}\n"
    )
    made = plan(text)
    assert [stage.settings.compare_hard for stage in made.stages if isinstance(stage.settings, TrainSettings)] == [
        False,
        True,
    ]


def test_epochs_become_steps_of_what_is_expected_to_be_kept() -> None:
    train = plan(RENTED.replace("loss:", "epochs: 2, loss:"), *CARDS).stages[1]
    label = plan(RENTED, *CARDS).stages[0]
    assert train.settings.steps is None and train.settings.epochs == 2.0  # type: ignore[union-attr]
    assert train.uses["steps"] == -(-label.uses["kept_samples"] * 2 // 8)


def test_what_stays_for_later_stages_leaves_each_stage_room_for_its_own() -> None:
    made = plan(RENTED, *CARDS, cap_micros=plan(RENTED, *CARDS).needed_micros)
    for index, stage in enumerate(made.stages):
        before = sum(one.cost_micros.expected for one in made.stages[:index])
        left = made.cap_micros - before - later_floor_micros(made, index)
        assert left >= stage.cost_micros.expected + stage.reserve_micros
    assert later_floor_micros(made, len(made.stages) - 1) == made.overhead[0].cost_micros.low


def test_a_free_own_machine_costs_nothing_and_fits_a_cap_of_nothing() -> None:
    made = plan(SMALL, replace(LOCAL, price_micros_per_hour=0), cap_micros=0)
    assert made.needed_micros == 0 and made.fits and made.offers_as_of is None


def test_the_digest_is_of_what_is_approved_and_of_nothing_else() -> None:
    first = plan(RENTED, *CARDS).digest
    aged = [replace(offer, as_of=NOW - timedelta(days=3)) for offer in CARDS]
    assert plan(f"# a comment\n{RENTED}", *aged).digest == first
    assert (
        make_plan(recipe(RENTED), config=CONFIG, offers_for=offering(*CARDS), now=NOW + timedelta(days=1)).digest
        == first
    )
    dearer = [replace(CARDS[0], price_micros_per_hour=340_001), *CARDS[1:]]
    others = [
        plan(RENTED, *dearer),
        plan(RENTED, *CARDS, cap_micros=7_000_000),
        plan(RENTED, *CARDS, deadline_s=9e9),
        plan(RENTED.replace("samples: 1200", "samples: 1201"), *CARDS),
    ]
    assert len({first, *(other.digest for other in others)}) == 5


def test_a_row_of_stages_takes_what_its_stages_take_where_networks_were_measured_too() -> None:
    """A slow hub and bucket of one infra say nothing of another's, with the same cards and prices."""
    offers = [replace(one, infra=infra) for one in CARDS for infra in ("runpod", "aws")]
    slow = {"download from the hub to aws": (9.0,) * 4, "bucket s3://bucket from aws": (9.0,) * 4}
    rows = planner_of(RENTED, *offers, calibration=slow)._rows
    pairs = [(point, rows.stay(point)) for by_end in rows.spans for points in by_end.values() for point in points]
    assert {len(stay.ways) for _, stay in pairs} == {1, 2, 3, 4}
    for point, stay in pairs:
        assert point.hours == pytest.approx(sum(way.hours.expected for way in stay.ways))


def test_calibration_of_a_kind_on_a_card_scales_its_work() -> None:
    usual = plan(calibration={})
    part = usual.stages[2].parts["work"]
    slower = plan(calibration={part.key: (2.0,), "work train full 0.13B on A100": (9.0,)})
    assert slower.stages[0].hours == usual.stages[0].hours
    more = part.seconds.expected / 3600
    assert slower.stages[2].hours.expected == pytest.approx(usual.stages[2].hours.expected + more)


def test_rented_machines_and_folders_at_home_do_not_meet() -> None:
    notes = plan(RENTED.replace("bucket: s3://bucket/kd\n", ""), *CARDS).notes
    assert any("bucket: s3://" in note for note in notes)
    assert plan(RENTED, *CARDS).overhead[0].cost_micros.expected > 0 and not plan().overhead


def test_what_an_api_may_cost_is_reserved_whole_and_has_its_own_line() -> None:
    made = plan(API, ROOMY)
    label = made.stages[0]
    assert isinstance(label.settings, LabelSettings) and label.settings.api is not None
    api, rate = label.settings.api, CONFIG.rate
    assert (api.input_micros, api.output_micros) == (550_000, price_micros(parse_amount("15.549 CNY"), rate))
    longest = max(len(line.encode()) for line in (DATA / "algebra.jsonl").read_text().splitlines())
    # 300 answers, each: bytes of the longest line and 256 tokens more at 0.55 USD, 4,096 at 15.549 CNY a million
    worst = 300 * math.ceil(((longest + 256) * api.input_micros + 4096 * api.output_micros) / 1_000_000)
    assert api.max_cost_micros == worst
    (item,) = made.overhead
    assert (item.cost_micros.low, item.cost_micros.expected, item.cost_micros.high) == (worst, worst, worst)
    assert (item.row, item.by) == ("label", "API, big-reasoner") and "300 answers" in item.what and "4096" in item.what
    for index in range(3):  # whatever stage is at hand, machines never get the API's money
        assert later_floor_micros(made, index) >= worst
    bare = [later_floor_micros(made, index) - worst for index in range(3)]
    line = ApiLine(settled_micros=0, open_micros=worst, limit_micros=worst)  # the ledger has it: not kept twice
    assert [later_floor_micros(made, index, {"label": line}) for index in range(3)] == bare
    ended = replace(line, settled_micros=worst // 3, open_micros=0)  # what is left must be set apart before it goes on
    rest = worst - worst // 3
    assert [later_floor_micros(made, index, {"label": ended}) for index in range(3)] == [bare[0] + rest, *bare[1:]]
    needed = made.needed_micros
    assert plan(API, ROOMY, cap_micros=needed).fits and not plan(API, ROOMY, cap_micros=needed - 1).fits
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(made)))) == made
    assert any("prompts go to api.example.com" in note and "EXAMPLE_API_KEY" in note for note in label.notes)


def test_a_stage_that_asks_an_api_needs_no_gpu_and_tells_soft_labels_at_t_1() -> None:
    label = plan(API, ROOMY, CARDS[0]).stages[0]
    assert label.vram_gib.high < 1 and label.offer is ROOMY
    settings = label.settings
    assert isinstance(settings, LabelSettings)
    assert (settings.top_k, settings.label_temperature, settings.batch_size) == (20, 1.0, 32)
    assert settings.teacher == ModelSource(path="Qwen/Qwen2.5-1.5B")
    asked: list[Need] = []

    def noting(need: Need) -> list[Offer]:
        asked.append(need)
        return [ROOMY]

    cards = API.replace("infra: local\n", "infra: local\ngpus: [A10G]\n", 1)
    make_plan(recipe(cards), config=CONFIG, offers_for=noting, now=NOW)
    assert [need.gpus for need in asked] == [(), ("A10G",)]  # which cards learn is not its business
    slow = plan(API.replace("key_env:", "requests_per_minute: 1\n      key_env:"), ROOMY).stages[0]
    assert slow.hours.low >= 300 / 60  # a minute each


def test_what_labels_of_an_api_cannot_teach_is_said_where_it_is_learned() -> None:
    said = [note for note in plan(API, ROOMY).stages[1].notes if "the tail is not learned" in note]
    assert said == ["the labels hold masses at T 1: at 3 the tail is not learned"]
    hard = API.replace("loss: {temperature: 3}", "loss: {temperature: 3, alpha: 0}")
    assert not any("tail" in note for note in plan(hard, ROOMY).stages[1].notes)


def test_older_plans_hold_overheads_of_storage() -> None:
    raw = json.loads(json.dumps(plan_to_dict(plan(RENTED, *CARDS))))
    for item in raw["overhead"]:
        del item["row"], item["by"]
    assert [(item.row, item.by) for item in plan_from_dict(raw).overhead] == [("bucket", "storage")]


def test_old_prices_and_unguarded_minutes_are_said() -> None:
    notes = plan(RENTED, *(replace(offer, as_of=NOW - timedelta(days=400)) for offer in CARDS)).notes
    assert any("13 months old" in note for note in notes)
    assert any("unguarded until its supervisor starts: up to 20 min" in note for note in notes)
    assert not plan().notes


def test_a_limit_that_cuts_answers_is_said() -> None:
    label = plan(RENTED.replace("samples: 1200", "samples: 1200, max_new_tokens: 2048"), *CARDS).stages[0]
    assert any("cut at 2048 tokens" in note for note in label.notes)


def test_a_rehearsal_runs_on_anything_that_has_a_price() -> None:
    text = "name: r\nbudget: 1 USD\nstages: [{name: rehearse, kind: rehearse, steps: 100, seconds_per_step: 0.5}]\n"
    stage = plan(text, replace(CARDS[0], gpu="RTX9999")).stages[0]
    assert stage.hours.expected * 3600 > 50
    assert plan(text, LOCAL).stages[0].hours.expected * 3600 == pytest.approx(53, abs=2)


@given(prices=st.lists(st.integers(1, 10**7), min_size=1, max_size=6))
@settings(max_examples=30)
def test_the_order_of_offers_changes_nothing(prices: list[int]) -> None:
    offers = [card("A10G", price, instance=f"i{index}") for index, price in enumerate(prices)]
    one, other = plan(RENTED, *offers), plan(RENTED, *reversed(offers))
    assert one.digest == other.digest
    assert one.stages[0].offer.price_micros_per_hour == min(prices)


def test_planning_is_linear_in_the_offers() -> None:
    def seconds(count: int) -> float:
        offers = [card("A10G", 1000 + index, instance=f"i{index}") for index in range(count)]
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            plan(RENTED, *offers)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(400) < 8 * seconds(100)


def test_twenty_stages_and_fifty_thousand_offers_are_planned_in_a_moment() -> None:
    """About a second where it was measured (benchmarks/planner.py); five times that is allowed, for busy machines."""
    asked, market = bench.recipe(20), bench.offers(50_000)
    started = time.process_time()
    made = make_plan(asked, config=CONFIG, offers_for=lambda need: market, now=NOW)
    assert time.process_time() - started < 5
    assert len(made.stages) == 20 and all(len(stage.candidates) < 60 for stage in made.stages)


@pytest.mark.parametrize(("text", "offers"), [(RENTED, CARDS), (API, [ROOMY, *CARDS]), (SMALL, [LOCAL])])
def test_advice_counts_as_the_plan_does(text: str, offers: list[Offer]) -> None:
    made = planner_of(text, *offers)
    assert planner._needs(made.recipe, made._scene) == (made.plan().needed_micros, made.plan().needed_hours)


def test_the_collector_is_as_it_was_after_a_plan_and_after_none() -> None:
    plan(RENTED, *CARDS)
    with pytest.raises(NothingFits):
        plan(RENTED, replace(card("T4", 100_000), vram_gib=1.0))
    assert gc.isenabled()
    gc.disable()
    try:
        plan(RENTED, *CARDS)
        assert not gc.isenabled()
    finally:
        gc.enable()
