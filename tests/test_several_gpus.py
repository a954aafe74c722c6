"""What do several GPUs of one machine take and save, and when does a plan take them?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator import duration, memory, teachers
from orchestrator.catalog import GPUS, MODELS
from orchestrator.duration import longest_share, own_step, training_s
from orchestrator.duration_kernels import all_reduce_s
from orchestrator.duration_serving import Serving, cache_tokens
from orchestrator.duration_training import step_parts
from orchestrator.errors import NothingFits, UsageError
from orchestrator.memory_generation import Generation, cache_shares, vllm_need
from orchestrator.memory_training import GIB, backward_bytes, root_gradient_bytes, static_bytes, training_step
from orchestrator.plan import Plan, plan_to_json, render_plan
from orchestrator.planner import Planner, _need
from orchestrator.provision import Offer
from orchestrator.recipe import gpu_counts
from tasks.contract import LabelSettings, TrainSettings
from tests.recipes import RENTED, recipe
from tests.test_plan import table
from tests.test_planner import CONFIG, NOW, card, offering, plan

SMALL, LARGE = MODELS["Qwen/Qwen2.5-1.5B"], MODELS["deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"]
R1 = MODELS["deepseek-ai/DeepSeek-R1"]
A100, H100 = GPUS["A100-80GB"], GPUS["H100-SXM"]
NO_TEACHER = RENTED.replace(", teacher: label}", "}")
BIG_TEACHER = NO_TEACHER.replace("R1-Distill-Qwen-7B", "R1-Distill-Qwen-32B")
HARD = NO_TEACHER.replace("samples: 1200", "samples: 1200, soft_labels: {top_k: 0}").replace(
    "loss: {temperature: 3}", "loss: {alpha: 0}"
)
LONG = RENTED.replace("samples: 1200", "samples: 20000")


def machine(gpu: str, usd_each: float, gpus: int) -> Offer:
    return card(gpu, round(usd_each * gpus * 1_000_000), gpus=gpus, instance=f"{gpus}x {gpu}")


def machines(gpu: str, usd_each: float) -> list[Offer]:
    return [machine(gpu, usd_each, gpus) for gpus in (1, 2, 4, 8)]


# --- memory of one GPU


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_full_training_leaves_each_gpu_its_part_and_what_is_gathered(gpus: int) -> None:
    """fp32: weights 4, moments 8 bytes a parameter, a part on each; gathered whole: the tied embedding and two layers,
    in fp32 as they are stored. A layer's gradients: bf16, fp32, those laid end to end, and the layer's before."""
    one, many = (memory.own_training(SMALL, full=True, micro_batch=1, seq_len=512, gpus=n) for n in (1, gpus))
    embedding = SMALL.vocab * SMALL.hidden
    layers = SMALL.params - embedding
    parts = static_bytes(many)
    assert parts["weights"] == pytest.approx(4 * SMALL.params / gpus)
    assert parts["optimizer"] == pytest.approx(8 * SMALL.params / gpus)
    assert parts["gathered"] == pytest.approx(4 * (embedding + 2 * layers / SMALL.layers))
    assert backward_bytes(many) - backward_bytes(one) == pytest.approx((2 + 4 + 4 + 4) * layers / SMALL.layers)
    assert root_gradient_bytes(many) == 4 * embedding and root_gradient_bytes(one) == 0
    assert sum(training_step(many).moments["loading"].values()) == pytest.approx(4 * SMALL.params / GIB)


def test_adapters_lie_on_every_gpu_with_the_whole_model() -> None:
    """Twice the rows on twice the GPUs: the same on each, but for the gradients that are laid end to end."""
    lora = (8, ("q_proj", "v_proj"))
    one, two = (memory.own_training(SMALL, full=False, micro_batch=2, seq_len=512, lora=lora, gpus=n) for n in (1, 2))
    assert static_bytes(two) == {**static_bytes(one), "buckets": 4 * SMALL.lora_params(*lora)}


@pytest.mark.parametrize(("model", "cards", "shares"), [(SMALL, 4, 2), (LARGE, 4, 4), (LARGE, 8, 8), (R1, 8, 1)])
def test_a_cache_is_spread_over_as_many_gpus_as_there_are_heads_of_keys(model: Any, cards: int, shares: int) -> None:
    """Two heads of keys on four GPUs lie twice; latent attention's one lies on each."""
    assert cache_shares(model, cards) == shares
    one, many = (vllm_need(Generation(model, 2, 100, 900, tensor_parallel=n)).parts for n in (1, cards))
    assert many["cache"] == pytest.approx(one["cache"] / shares)
    assert many["weights"] == pytest.approx(one["weights"] / cards)


def test_gpus_that_share_a_model_have_more_room_for_answers_than_one_has() -> None:
    work = Serving(LARGE, 256, 200, 2000, 256)
    assert cache_tokens(A100, replace(work, tensor=2)) > 10 * cache_tokens(A100, work)


# --- time


@pytest.mark.parametrize(
    ("gpus", "rows", "longer"),
    [(1, 8, 1.0), (2, 4, 1 + 0.5 * 1.1774 / 2 / 1.4), (8, 1, 1 + 0.5 * 2.0393 / 1.4)],  # sqrt(2 ln 2), sqrt(2 ln 8)
)
def test_a_step_waits_for_the_longest_rows(gpus: int, rows: int, longer: float) -> None:
    assert longest_share(gpus, rows) == pytest.approx(longer, rel=1e-4)


def test_shards_travel_in_fp32_and_adapters_gradients_after_the_last_pass() -> None:
    """Two gathers of 4 bytes a parameter and a scatter of as many; half of it hides behind computing (NVLink)."""
    full = own_step(SMALL, rows=4, micro_batch=4, mean_len=1024, full=True, checkpointing=False, gpus=2)
    moved = 1.5 * all_reduce_s(H100, 4.0 * SMALL.params, 2)
    assert step_parts(H100, full)["traffic"] == pytest.approx(0.5 * moved)
    lora = own_step(SMALL, rows=4, micro_batch=4, mean_len=1024, full=False, checkpointing=False, gpus=2)
    assert step_parts(H100, lora)["traffic"] == pytest.approx(all_reduce_s(H100, 4.0 * lora.trainable, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(GPUS)), st.booleans(), st.sampled_from([2, 4, 8]), st.sampled_from([8, 16, 32]),
    st.integers(128, 8192),
)  # fmt: skip
def test_n_gpus_are_never_more_than_n_times_as_fast(name: str, full: bool, gpus: int, batch: int, length: int) -> None:
    def seconds(n: int, micro: int) -> float:
        return training_s(
            duration.gpu_speed(GPUS[name]), SMALL, steps=10, batch_size=batch, micro_batch=micro, mean_len=length,
            full=full, checkpointing=False, gpus=n,
        ).expected  # fmt: skip

    micro = batch // gpus  # the same passes on each, so that only what GPUs say to each other differs
    assert seconds(gpus, micro) >= seconds(1, micro) / gpus


# --- what a plan takes


def test_one_gpu_is_taken_while_several_cost_more_and_several_when_there_is_no_time() -> None:
    """At n times the price n GPUs save time and no money; a deadline pays for them, where they help most."""
    cheap = plan(LONG, *machines("A100-80GB", 1.39))
    assert [stage.offer.gpus for stage in cheap.stages] == [1, 1, 1, 1]
    soon = plan(LONG, *machines("A100-80GB", 1.39), deadline_s=6 * 3600)
    assert soon.stages[0].offer.gpus > 1 and soon.in_time
    assert soon.hours.expected < 6 < cheap.hours.expected
    assert soon.cost_micros.expected > cheap.cost_micros.expected


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(100_000, 9_000_000)), min_size=1, max_size=6))
def test_no_plan_with_fewer_gpus_is_cheaper_than_the_one_taken(prices: list[tuple[int, int]]) -> None:
    offers = [card("A100-80GB", usd, gpus=n, instance=f"{n}x {i}") for i, (n, usd) in enumerate(prices)]
    taken = plan(RENTED, *offers)
    for offer in offers:
        assert taken.needed_micros <= plan(RENTED, offer).needed_micros


def test_a_teacher_that_fits_no_single_gpu_is_held_by_several_together() -> None:
    """Qwen-32B, 61 GiB in bf16: on four A100 of 40 GB."""
    with pytest.raises(NothingFits):
        plan(BIG_TEACHER, machine("A100", 0.76, 1))
    label, *others = plan(BIG_TEACHER, *machines("A100", 0.76)).stages
    assert isinstance(label.settings, LabelSettings)
    assert (label.offer.gpus, label.settings.tensor_parallel) == (4, 4)
    assert label.vram_gib.high < 39.4
    assert [stage.offer.gpus for stage in others] == [1, 1, 1]
    why = {one.why for one in label.rejected}
    assert any(text.startswith("needs") for text in why)


def test_two_gpus_that_hold_a_teacher_together_may_be_cheaper_than_one() -> None:
    """On one A100 of 80 GB its cache has room for an answer or two at a time, on two for many."""
    label = plan(BIG_TEACHER, *machines("A100-80GB", 1.39)).stages[0]
    assert isinstance(label.settings, LabelSettings)
    assert (label.offer.gpus, label.settings.tensor_parallel) == (2, 2)


def test_several_gpus_that_nobody_asked_for_are_said_with_what_keeps_to_one() -> None:
    said = "labelling on several GPUs was tried on stand-ins only; `gpus: [A100-80GB:1]` keeps to one"
    soon = plan(LONG, *machines("A100-80GB", 1.39), deadline_s=6 * 3600)
    assert plan_to_json(soon)["notes"].count(said) == 1 and said in " ".join(table(soon, 120).split())
    cheap = plan(LONG, *machines("A100-80GB", 1.39))
    asked = plan(f"{LONG}gpus: [A100-80GB:8]\n", *machines("A100-80GB", 1.39))
    assert asked.stages[0].offer.gpus == 8
    for made in (cheap, asked):
        assert not [note for note in made.notes if "several GPUs" in note]
    together = plan(BIG_TEACHER, *machines("A100", 0.76))  # `:1` would be no cure
    assert "labelling on several GPUs was tried on stand-ins only" in together.notes


@pytest.mark.parametrize(("gpus", "engines"), [(2, 3 / 5), (4, 2 / 5), (8, 1 / 5)])
def test_shards_of_prompts_are_what_engines_share(gpus: int, engines: float) -> None:
    """1,200 prompts are 5 shards of 256: one of two engines has 3 of them, 768 of 1,200 answers."""
    stage = recipe(RENTED).stages[0]
    from orchestrator.sizing import _longest_share

    sharded = LabelSettings(teacher=None, prompts=None, verify="none", samples=1200)  # type: ignore[arg-type]
    assert _longest_share(stage, sharded, gpus) == pytest.approx(engines * 5 * 256 / 1200)  # type: ignore[arg-type]


def test_the_batch_of_the_recipe_stays_whatever_the_number_of_gpus() -> None:
    for offer in machines("A100-80GB", 1.39):
        train = plan(RENTED, offer).stages[1]
        assert isinstance(train.settings, TrainSettings) and train.settings.batch_size == 8
        share = math.ceil(8 / offer.gpus)
        assert train.settings.micro_batch <= share
        assert train.uses["accumulation"] == math.ceil(share / train.settings.micro_batch)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("batch_size: 4", "it has 8 GPUs, and batch_size 4 leaves some of them without a sample"),
        ("method: full, optimizer: adamw_8bit", "it has 8 GPUs, and adamw_8bit does not work on shards of a model"),
    ],
)
def test_a_training_that_cannot_be_shared_out_so_is_not_put_there(change: str, why: str) -> None:
    text = RENTED.replace("labels: label,", f"labels: label, {change},")
    train = plan(text, machine("A100-80GB", 1.39, 1), machine("A100-80GB", 0.1, 8)).stages[1]
    assert train.offer.gpus == 1 and why in {one.why for one in train.rejected}


def test_deepseek_r1_is_written_by_eight_h200_and_only_with_hard_labels() -> None:
    """625 GiB in 8 bits on 8 x 139.7; its scoring pass would take 1,250. H100s are too small, A100s hold 16 bits."""
    offers = [machine("H200", 3.5, 8), machine("H100-SXM", 3.0, 8), machine("A100-80GB", 1.4, 8)]
    text = HARD.replace("R1-Distill-Qwen-7B", "R1").replace("50 CNY", "2000 CNY")
    label = plan(text, *offers).stages[0]
    assert isinstance(label.settings, LabelSettings)
    assert (label.offer.gpu, label.offer.gpus, label.settings.tensor_parallel) == ("H200", 8, 8)
    assert label.vram_gib.expected > 625 / 8
    soft = NO_TEACHER.replace("R1-Distill-Qwen-7B", "R1").replace("50 CNY", "2000 CNY")
    with pytest.raises(NothingFits) as refused:
        plan(soft, *offers)
    hint = str(refused.value.hint)
    assert "hard labels only (`soft_labels: {top_k: 0}`): scoring takes 1,250 GiB, in 16 bits" in hint
    assert "one card" not in hint
    assert teachers.in_8_bits(R1, GPUS["H200"]) and not teachers.in_8_bits(R1, A100)


# --- what people say and read


@pytest.mark.parametrize(
    ("gpus", "counts"),
    [
        (["A100"], {"A100": set()}),
        (["A100:8", "A100:4", "L4"], {"A100": {4, 8}, "L4": set()}),
        (["A100:8", "A100"], {"A100": set()}),  # any number is among them
    ],
)
def test_a_recipe_says_how_many(gpus: Iterable[str], counts: dict[str, set[int]]) -> None:
    assert gpu_counts(gpus) == counts


def test_only_machines_with_as_many_are_looked_at() -> None:
    text = RENTED.replace("infra: [runpod, aws]", "infra: [runpod, aws]\ngpus: [nvidia-a100-80gb:2, A100:8]")
    made = plan(text, *machines("A100-80GB", 1.39), *machines("A100", 3.0))
    assert {(stage.offer.gpu, stage.offer.gpus) for stage in made.stages} == {("A100-80GB", 2)}
    assert "the recipe asks for A100-80GB:2" in {one.why for one in made.stages[0].rejected}
    asked = recipe(RENTED.replace("infra: [runpod, aws]", "infra: [slurm/lab]\ngpus: [A100:8, L4:8]"))
    assert (_need(asked.stages[0], asked).gpus, _need(asked.stages[0], asked).gpu_count) == (("A100", "L4"), 8)
    either = recipe(text)
    assert _need(either.stages[0], either).gpu_count == 1


@pytest.mark.parametrize("word", ["A100:0", "A100:x", "A100:", "A100:17", "A100:2:2"])
def test_a_number_that_no_machine_has_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="no number of GPUs from 1 to 16 after the colon; write it like A100:8"):
        recipe(RENTED.replace("infra: [runpod, aws]", f"infra: [runpod, aws]\ngpus: ['{word}']"))


def told(made: Plan) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render_plan(made, console)
    return " ".join(console.export_text().split())


def test_the_plan_shows_how_many_and_what_they_do() -> None:
    made = plan(RENTED, machine("A100-80GB", 1.39, 4))
    text, shown = told(made), json.loads(json.dumps(plan_to_json(made)))
    assert "4x A100-80GB, runpod 4x A100-80GB" in text
    assert "4 GPUs share the rows of a step, the model on each" in text
    assert "4 GPUs write answers, each its part" in text and "one of the 4 GPUs works" in text
    for stage in shown["stages"]:
        assert stage["offer"]["gpus"] == 4
        assert stage["vram_gib"]["high"] <= 79.1  # of one of them
    assert "2 engines, each on 2 of the 4 GPUs together" in text
    assert "one engine on 4 GPUs together" in told(plan(BIG_TEACHER, machine("A100", 0.76, 4)))


def test_explain_names_machines_by_their_number_of_gpus() -> None:
    planner = Planner(recipe(RENTED), config=CONFIG, offers_for=offering(*machines("A100-80GB", 1.39)), now=NOW)
    looked = planner.explain("train")
    assert [one.gpu for one in looked if one.taken] == ["A100-80GB"]
    assert {one.gpu for one in looked} == {"A100-80GB", "2x A100-80GB", "4x A100-80GB", "8x A100-80GB"}
