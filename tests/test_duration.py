"""How long a stage works."""

from __future__ import annotations

import pytest

from orchestrator import duration
from orchestrator.catalog import GPUS, MODELS, ModelShape
from orchestrator.duration import (
    Speed,
    cpu_speed,
    forward_flops_per_token,
    generation_s,
    gpu_speed,
    hours,
    scoring_s,
    stage_s,
    training_flops_per_token,
    training_s,
)
from orchestrator.plan import Range

SHAPE = MODELS["Qwen/Qwen2.5-1.5B"]
A10G, H200, CPU = gpu_speed(GPUS["A10G"]), gpu_speed(GPUS["H200"]), cpu_speed(None)


def training(
    speed: Speed, *, steps: float = 1000, full: bool = False, checkpointing: bool = False, batch: int = 8
) -> Range:
    return training_s(
        speed,
        SHAPE,
        steps=steps,
        batch_size=batch,
        micro_batch=4,
        mean_len=1000,
        full=full,
        checkpointing=checkpointing,
    )


def writing(
    speed: Speed, *, sequences: float = 1000, answer: float = 500, engine: bool = True, batch: int = 256
) -> Range:
    return generation_s(
        speed,
        SHAPE,
        sequences=sequences,
        prompt_len=150,
        answer_len=answer,
        longest=1000,
        batch_size=batch,
        engine=engine,
    )


@pytest.mark.parametrize("speed", [A10G, H200, CPU])
def test_a_range_is_ordered_and_work_adds_up(speed: Speed) -> None:
    for one, two in [
        (training(speed), training(speed, steps=2000)),
        (scoring_s(speed, SHAPE, tokens=1e6, mean_len=500), scoring_s(speed, SHAPE, tokens=2e6, mean_len=500)),
        (writing(speed, sequences=1024), writing(speed, sequences=2048)),
        (writing(speed, engine=False, batch=64, sequences=640), writing(speed, engine=False, batch=64, sequences=1280)),
    ]:
        assert 0 < one.low < one.expected < one.high
        assert two.expected == pytest.approx(2 * one.expected)


def test_flops_follow_from_what_is_computed_and_repeated() -> None:
    forward = forward_flops_per_token(SHAPE, 1000)
    assert forward == 2 * SHAPE.active_params + 2 * 28 * 12 * 128 * 1000

    def flops(full: bool, checkpointing: bool) -> float:
        return training_flops_per_token(SHAPE, 1000, full=full, checkpointing=checkpointing) / forward

    assert (flops(True, False), flops(True, True), flops(False, False), flops(False, True)) == (3, 4, 2, 3)


def test_a_faster_card_takes_less_time() -> None:
    assert training(H200).expected < training(A10G).expected
    assert writing(H200).expected < writing(A10G).expected
    assert writing(A10G, engine=True).expected < writing(A10G, engine=False, batch=8).expected


def test_full_training_and_checkpointing_take_longer() -> None:
    assert training(A10G, full=True).expected > training(A10G).expected
    assert training(A10G, checkpointing=True).expected > training(A10G).expected


def test_the_articles_thousand_steps_on_an_a10g_take_some_fifteen_minutes() -> None:
    """1.5 B, LoRA, rows of 250 tokens (problems with a short solution), batch 8, checkpointing."""
    took = training_s(
        A10G, SHAPE, steps=1000, batch_size=8, micro_batch=8, mean_len=250, full=False, checkpointing=True
    )
    assert took.low < 15 * 60 < 2 * took.high


def test_labelling_on_an_h200_is_as_fast_as_it_was_measured() -> None:
    """21,321 tokens/s: vLLM, Qwen2.5-1.5B, 256 prompts of 128 tokens, 256 new tokens each."""
    took = generation_s(
        H200, SHAPE, sequences=256, prompt_len=128, answer_len=256, longest=256, batch_size=256, engine=True
    )
    assert took.low < 256 * 256 / 21_321 < took.high
    assert took.expected == pytest.approx(256 * 256 / 21_321, rel=0.15)


def test_the_recipes_measured_speed_replaces_the_assumed_one() -> None:
    assert training(cpu_speed(600.0)).expected < training(cpu_speed(60.0)).expected
    tiny = ModelShape("tiny", 96, 256, 2, 4, 2, 24, 64, True)
    floor = training_s(
        cpu_speed(1e9), tiny, steps=100, batch_size=8, micro_batch=8, mean_len=30, full=True, checkpointing=False
    )
    assert floor.expected > 0.5  # steps cost Python time however fast the products are


def test_settings_of_the_projects_training_show_in_its_time() -> None:
    plain = training(A10G).expected

    def other(**more: object) -> float:
        return training_s(
            A10G, SHAPE, steps=1000, batch_size=8, micro_batch=4, mean_len=1000, full=False, checkpointing=False, **more
        ).expected  # type: ignore[arg-type]

    assert other() == plain
    assert other(compiled=True) < plain
    assert other(four_bit=True) > plain
    assert other(lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")) > plain
    assert other(half=False) > 2 * plain  # fp32 products: 23 of 66


def test_scoring_on_an_h200_is_as_fast_as_it_was_measured() -> None:
    """benchmarks/results/scoring.json: 129,038 tokens/s, 165,352 with compiled layers, a third of them prompts."""
    assert scoring_s(H200, SHAPE, tokens=2e7, mean_len=384).expected < 19 * (
        scoring_s(H200, SHAPE, tokens=1e6, mean_len=384).expected
    )
    for tokens, measured in ((1e6, 129_038), (2e7, 165_352)):
        took = scoring_s(H200, SHAPE, tokens=tokens, mean_len=384)
        assert took.low < tokens / measured < took.high


def test_weights_are_fetched_by_rented_machines_only() -> None:
    assert stage_s(A10G, downloads_gb=15).expected > stage_s(A10G, downloads_gb=0).expected + 60
    assert stage_s(CPU, downloads_gb=15) == stage_s(CPU, downloads_gb=0)
    assert stage_s(CPU, downloads_gb=0, bare=True).expected < stage_s(CPU, downloads_gb=0).expected
    assert stage_s(A10G, downloads_gb=0, engine=True).expected > stage_s(A10G, downloads_gb=0).expected


def test_hours_are_3600_seconds() -> None:
    assert hours(Range(1800, 3600, 7200)) == Range(0.5, 1, 2)


def test_arms_that_train_side_by_side_take_less_time_but_not_half():
    assert duration.side_by_side(1) == 1.0
    assert 0.5 < duration.side_by_side(2) < 1.0


def test_the_projects_own_training_takes_what_it_took_on_a_rented_machine() -> None:
    """benchmarks/results/training.json: 8 x 1,024 tokens, LoRA r 8 on q, k and v, on an H200; machines differed, and
    what the host takes is the same for these and for the thirty of benchmarks/cases/own.jsonl."""
    for more, measured in (
        ({"checkpointing": False}, (47_350, 41_804)),
        ({"checkpointing": True}, (29_486, 26_071)),
        ({"checkpointing": False, "compiled": True}, (71_705, 65_062)),
        ({"checkpointing": True, "compiled": True}, (39_473,)),
    ):
        work = {"steps": 1, "batch_size": 8, "micro_batch": 8, "mean_len": 1024, "full": False}
        took = training_s(H200, SHAPE, **work, **more)  # type: ignore[arg-type]
        assert took.expected == pytest.approx(8192 / measured[0], rel=0.1)
        assert all(took.low < 8192 / rate < took.high for rate in measured)
