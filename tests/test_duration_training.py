"""How long an optimizer step takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.catalog import MODELS
from orchestrator.duration_kernels import bytes_s
from orchestrator.duration_training import (
    SLOW_HOST,
    Training,
    layer_bytes,
    micro_parts,
    one_micro_batch,
    optimizer_s,
    step_parts,
    step_s,
)
from orchestrator.gpus import GPUS, Gpu

QWEN, LLAMA = MODELS["Qwen/Qwen2.5-1.5B"], MODELS["meta-llama/Llama-2-7b-hf"]
H200, A100, RTX3090 = GPUS["H200"], GPUS["A100-80GB-SXM"], GPUS["RTX3090"]
QKV = ("q_proj", "k_proj", "v_proj")
OWN = Training(QWEN, 8, 1024, full=False, lora_r=8, lora_targets=QKV, fp32_adapters=True, loss="own")


def test_the_parts_of_a_full_step() -> None:
    """Products, attention and element-wise work: forward once, backward 2, 2.5 and 2 times, recomputed once more."""
    plain = step_parts(A100, Training(LLAMA, 4, 2048))
    again = step_parts(A100, Training(LLAMA, 4, 2048, checkpointing=True))
    assert again["products"] / plain["products"] == pytest.approx(4 / 3)
    assert again["attention"] / plain["attention"] == pytest.approx(4.5 / 3.5)
    assert again["memory"] / plain["memory"] == pytest.approx(4 / 3)
    assert (again["head"], again["loss"], again["optimizer"]) == (plain["head"], plain["loss"], plain["optimizer"])


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    """Two passes of products for three; the adapters' work is their own."""
    full = step_parts(A100, Training(LLAMA, 4, 2048))
    lora = step_parts(A100, Training(LLAMA, 4, 2048, full=False, lora_r=8, lora_targets=QKV))
    assert lora["products"] / full["products"] == pytest.approx(2 / 3)
    assert lora["head"] / full["head"] == pytest.approx(2 / 3)
    assert "adapters" not in full and lora["adapters"] > 0
    assert lora["optimizer"] < full["optimizer"] / 100


def test_bytes_of_a_layer_a_token() -> None:
    """Llama 2 7B, half precision, as transformers writes it: two norms of 36 bytes and residuals of 6 a value of 4096;
    rotation 20 and copies 8 of q and k; silu and product 10 of 11008."""
    work = Training(LLAMA, 1, 1)
    assert layer_bytes(work) == 2 * 4096 * (36 + 6) + 8192 * (20 + 8) + 11008 * 10
    assert layer_bytes(replace(work, fused=True)) == 2 * 4096 * (4 + 4) + 8192 * (4 + 8) + 11008 * 6


def test_the_optimizers_bytes() -> None:
    """1.5437e9 weights in bf16, fused: p twice, g, both moments twice, 2 bytes each; clipping 3 passes."""
    work = Training(QWEN, 1, 1, optimizer="fused", state_bytes=2.0)
    assert optimizer_s(A100, work) == pytest.approx(1_543_714_304 * (7 * 2 + 3 * 2) / bytes_s(A100))
    eight = replace(work, optimizer="8bit")
    assert optimizer_s(A100, eight) == pytest.approx(1_543_714_304 * (3 * 2 + 4 * 1 + 3 * 2) / bytes_s(A100))


def test_four_bit_weights_are_unpacked_in_each_pass() -> None:
    """6.476e9 weights of the layers, 5 bytes each, forward, backward and again: at 831 GB/s."""
    work = Training(LLAMA, 1, 512, full=False, four_bit="nf4", checkpointing=True, lora_r=8, lora_targets=QKV)
    layers = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert step_parts(RTX3090, work)["unpacking"] == pytest.approx(layers * 5 * 3 / 831e9)


def test_small_batches_wait_for_the_host() -> None:
    """28 layers of 0.95 ms forward and 0.9 ms backward, whatever the card; the host may be slower."""
    small = Training(QWEN, 1, 16, optimizer="fused")
    parts = step_parts(H200, small)
    assert sum(parts.values()) - parts["optimizer"] == pytest.approx(28 * 1.85e-3)
    slow = step_parts(H200, replace(small, host=2.0))
    assert sum(slow.values()) - slow["optimizer"] == pytest.approx(2 * 28 * 1.85e-3)
    assert step_parts(H200, replace(small, micro_batch=64, length=512))["host"] == 0


def test_accumulation_repeats_all_but_the_optimizer() -> None:
    one = step_parts(A100, Training(QWEN, 4, 512))
    four = step_parts(A100, Training(QWEN, 4, 512, accumulation=4))
    assert four["optimizer"] == one["optimizer"]
    assert four["products"] == pytest.approx(4 * one["products"])


def test_traffic_hides_behind_computing_with_nvlink_and_not_through_host_memory() -> None:
    """Weights of 13.5 GB, gathered twice by two ranks: half of it each time."""
    sharded = Training(LLAMA, 6, 2048, full=False, lora_r=64, lora_targets=QKV, gpus=2, sharded="fsdp")
    moved = 2 * LLAMA.params * 2 / 2
    assert step_parts(RTX3090, sharded)["traffic"] == pytest.approx(0.7 * moved / 4e9)
    assert step_parts(A100, sharded)["traffic"] == pytest.approx(0.5 * moved / 205e9)


@given(
    card=st.sampled_from(list(GPUS.values())),
    model=st.sampled_from(list(MODELS.values())),
    rows=st.integers(1, 32),
    length=st.integers(16, 4096),
    full=st.booleans(),
    checkpointing=st.booleans(),
    compiled=st.booleans(),
)
def test_more_work_takes_longer_and_every_part_is_counted(
    card: Gpu, model: object, rows: int, length: int, full: bool, checkpointing: bool, compiled: bool
) -> None:
    work = Training(
        model,  # type: ignore[arg-type]
        rows,
        length,
        full=full,
        lora_r=8,
        lora_targets=() if full else QKV,
        checkpointing=checkpointing,
        compiled=compiled,
    )
    parts = step_parts(card, work)
    assert all(seconds >= 0 for seconds in parts.values())
    step = step_s(card, work)
    assert step == pytest.approx(sum(parts.values()))
    assert step_s(card, replace(work, micro_batch=rows + 1)) >= step * 0.97  # a wave of tiles may just be filled
    assert step_s(card, replace(work, micro_batch=2 * rows)) > step * 0.999
    assert step_s(card, replace(work, accumulation=2)) > step
    assert step_s(card, replace(work, checkpointing=True)) >= step * (1 - 1e-9)  # the host may be all that counts
    assert step_s(card, replace(work, eager_attention=True)) >= step * (1 - 1e-9)


@pytest.mark.parametrize(
    ("work", "measured"),
    [
        (OWN, 47_350),
        (replace(OWN, compiled=True), 71_705),
        (replace(OWN, checkpointing=True), 29_486),
        (replace(OWN, compiled=True, checkpointing=True), 39_473),
        (replace(OWN, loss="materialised"), 41_954),
        (replace(OWN, fused=True, loss="chunked"), 46_681),
        (replace(OWN, checkpointing=True, loss="materialised"), 29_945),
        (replace(OWN, checkpointing=True, fused=True, loss="chunked"), 29_337),
    ],
)
def test_the_projects_own_training_on_an_h200_takes_what_was_measured(
    work: Training, measured: int
) -> None:
    """benchmarks/results/training.json: ours, TRL's, TRL's with Liger, on one slow host. What TRL's trainer does
    besides is not counted: the one that the host decides takes a fifth longer."""
    rel = 0.2 if measured == 41_954 else 0.13
    assert work.tokens / step_s(H200, replace(work, host=SLOW_HOST)) == pytest.approx(measured, rel=rel)


def test_a_compiled_steps_time_goes_where_it_was_measured_to_go() -> None:
    """benchmarks/results/training.json: products 71.4 ms, fused kernels and single operations 16.9, attention 7.7, loss
    3.8 of 110.6."""
    parts = step_parts(H200, replace(OWN, compiled=True, host=SLOW_HOST))
    ms = {name: seconds * 1000 for name, seconds in parts.items()}
    assert ms["products"] + ms["head"] == pytest.approx(71.4, rel=0.1)
    assert ms["memory"] == pytest.approx(14.7 + 2.2, rel=0.1)
    assert ms["attention"] == pytest.approx(7.7, rel=0.35)
    assert ms["loss"] == pytest.approx(3.8, rel=0.15)


def test_the_host_starts_an_mlps_parts_and_unpacks_4_bit_weights_one_by_one() -> None:
    """A layer, ms: three more parts of an MLP with three adapters forward, again and half as much backward; seven
    weights, and three more for each of three parts, unpacked in three passes."""
    work = Training(QWEN, 1, 16, full=False, lora_r=8, lora_targets=("q_proj", "gate_proj", "up_proj", "down_proj"))
    again = replace(work, checkpointing=True)

    def host(one: Training) -> float:
        return sum(step_parts(H200, one).values()) - step_parts(H200, one)["optimizer"]

    parts = host(replace(again, mlp_parts=4)) - host(again)
    assert parts == pytest.approx(28 * 3 * (0.08e-3 + 3 * 0.1e-3) * 2.5)
    packed = replace(again, mlp_parts=4, four_bit="nf4")
    assert host(packed) - host(replace(again, mlp_parts=4)) == pytest.approx(28 * (7 + 9) * 0.075e-3 * 3)


def test_adamw_in_8_bits_goes_tensor_by_tensor() -> None:
    small = Training(QWEN, 1, 16, full=False, lora_r=1, lora_targets=QKV, optimizer="8bit")
    assert step_parts(H200, small)["optimizer"] == pytest.approx(28 * 6 * 0.04e-3)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("sharded", [None, "fsdp"])
@pytest.mark.parametrize("full", [True, False])
def test_micro_batches_that_count_as_one_take_as_long(gpus: int, sharded: str | None, full: bool) -> None:
    work = Training(
        QWEN, 2, 512, accumulation=4, full=full, lora_r=0 if full else 8, lora_targets=() if full else QKV,
        weight_bytes=4, gpus=gpus, sharded=sharded, host=SLOW_HOST,
    )  # fmt: skip
    assert step_parts(A100, work, micro_parts(A100, one_micro_batch(work))) == step_parts(A100, work)
