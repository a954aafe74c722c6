"""How much memory a stage needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.catalog import MODELS, ModelShape
from orchestrator.memory import (
    CPU_PROCESS_GIB,
    CUDA_CONTEXT_GIB,
    FUSED_BYTES_PER_LOGIT,
    FUSED_FROZEN_LOGITS,
    FUSED_LOGITS,
    GIB,
    LOSS_CHUNK_LOGITS,
    MLP_PARTS,
    READ_SPREAD,
    Memory,
    generation_memory,
    largest,
    loading_memory,
    own_training,
    step_memory,
    training_memory,
)
from orchestrator.memory_generation import VLLM_GRAPHS_GIB, weight_bytes
from orchestrator.memory_training import layer_bytes, training_step

ROOT = Path(__file__).parent.parent
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())["rows"]
SMALL = MODELS["Qwen/Qwen2.5-1.5B"]
LARGE = MODELS["Qwen/Qwen2.5-7B"]


def training(
    shape: ModelShape = SMALL,
    *,
    micro: int = 1,
    seq: int = 1024,
    full: bool = False,
    half: bool = True,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Memory:
    trainable = shape.params if full else shape.lora_params(8, ("q_proj", "k_proj", "v_proj"))
    return training_memory(
        shape,
        trainable=trainable,
        full=full,
        micro_batch=micro,
        seq_len=seq,
        half=half,
        checkpointing=checkpointing,
        gpu=True,
        compiled=compiled,
    )


def generation(shape: ModelShape = SMALL, sequences: int = 4, seq: int = 1024) -> Memory:
    return generation_memory(shape, sequences=sequences, seq_len=seq, half=True, gpu=True)


@pytest.mark.parametrize(
    "memory", [training(), training(full=True), generation(), loading_memory(SMALL, half=True, gpu=False)]
)
def test_parts_sum_to_what_is_expected_between_low_and_high(memory: Memory) -> None:
    assert memory.total_gib.low < memory.total_gib.expected < memory.total_gib.high
    assert sum(memory.parts_gib.values()) == pytest.approx(memory.total_gib.expected)
    assert all(part >= 0 for part in memory.parts_gib.values())


@pytest.mark.parametrize("point", ["low", "expected", "high"])
def test_more_of_anything_needs_more(point: str) -> None:
    def gib(memory: Memory) -> float:
        return float(getattr(memory.total_gib, point))

    assert gib(training(micro=2)) > gib(training())
    assert gib(training(seq=2048)) > gib(training())
    assert gib(training(full=True)) > gib(training())
    assert gib(training(half=False)) > gib(training())
    assert gib(training(LARGE)) > gib(training())
    assert gib(training(checkpointing=True)) < gib(training())
    assert gib(generation(sequences=8)) > gib(generation())
    assert gib(generation(LARGE)) > gib(generation())


def test_full_training_holds_sixteen_bytes_a_parameter_and_its_copies() -> None:
    """fp32 weights, gradient and two moments, 4 + 4 + 8, when the backward passes have ended; the tied embedding's
    gradient once more. At the loss no gradient is there, but each weight's copy in bf16."""
    step = training_step(own_training(SMALL, full=True, micro_batch=1, seq_len=8))
    embedding, end, loss = SMALL.vocab * SMALL.hidden, step.moments["embedding"], step.moments["loss"]
    assert end["weights"] + end["gradients"] + end["optimizer"] == pytest.approx(16 * SMALL.params / GIB)
    assert end["embedding gradient"] == pytest.approx(4 * embedding / GIB)
    assert loss["weight copies"] == pytest.approx(2 * (SMALL.params - embedding) / GIB)
    assert step.peak == "embedding"


def test_lora_freezes_two_bytes_a_parameter_and_pays_sixteen_for_its_own() -> None:
    job = own_training(SMALL, full=False, micro_batch=1, seq_len=1024)
    end, trained = training_step(job).moments["step"], SMALL.lora_params(8, ("q_proj", "k_proj", "v_proj"))
    held = end["weights"] + end["adapters"] + end["gradients"] + end["optimizer"]
    assert held == pytest.approx((2 * SMALL.params + 16 * trained) / GIB)


def test_the_loss_makes_the_heads_gradient_itself_and_it_is_counted_once() -> None:
    """At the loss 4 bytes a value of the head for its gradient and 2 for the head in bf16, beside a chunk of logits;
    afterwards the gradient alone. Of earlier micro-batches all gradients are there besides."""
    job = own_training(SMALL, full=True, micro_batch=1, seq_len=8)
    moments, head = training_step(job).moments, SMALL.vocab * SMALL.hidden
    chunk = FUSED_BYTES_PER_LOGIT * 8 * SMALL.vocab
    assert "gradients" not in moments["loss"] and moments["loss"]["logits"] == pytest.approx((6 * head + chunk) / GIB)
    assert moments["backward"]["gradients"] == pytest.approx(4 * head / GIB)
    earlier = training_step(replace(job, accumulation=2)).moments["loss"]
    assert earlier["gradients"] == pytest.approx(4 * SMALL.params / GIB)


def test_adapters_of_4_bit_layers_share_their_inputs_and_others_cast_their_own() -> None:
    """Under autocast, bytes a token and layer: q, k and v read one input, gate and up another, 2 bytes a value each;
    o's is there anyway. Adapters of layers in bf16 keep 2 bytes for each of the seven."""
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    job = own_training(SMALL, full=False, micro_batch=1, seq_len=1024, lora=(8, every))
    four_bit = replace(job, weights="nf4", method="qlora")
    more = sum(layer_bytes(job).values()) - sum(layer_bytes(four_bit).values())
    assert more == 2 * (2 + 1 + 1) * SMALL.hidden  # two more for q, k, v; one for o; one for gate and up


def test_segments_that_grow_hold_less_of_what_was_freed() -> None:
    job = own_training(SMALL, full=True, micro_batch=8, seq_len=512)
    fixed = replace(job, habits=replace(job.habits, cached_share=1.0))
    assert training_step(job).cached_gib == pytest.approx(0.4 * training_step(fixed).cached_gib)
    assert training_step(job).allocated_gib == training_step(fixed).allocated_gib


@pytest.mark.parametrize("row", [row for row in MEASURED if row["trainer"].startswith("kdcloud")])
def test_our_own_training_takes_what_was_measured(row: dict[str, Any]) -> None:
    """benchmarks/results/training.json: allocated and reserved on an H200, 8 rows of 1,024 tokens, fixed segments."""
    job = own_training(
        SMALL, full=False, micro_batch=8, seq_len=1024, checkpointing=row["checkpointing"],
        compiled="compiled" in row["trainer"],
    )  # fmt: skip
    fixed = replace(job, habits=replace(job.habits, cached_share=1.0))
    memory = step_memory(training_step(fixed), READ_SPREAD, gpu=True)
    assert memory.allocated_gib is not None and memory.reserved_gib is not None
    assert memory.allocated_gib.expected == pytest.approx(row["peak_gib"], rel=0.03)
    assert memory.reserved_gib.expected == pytest.approx(row["reserved_gib"], rel=0.11)
    assert memory.allocated_gib.low < row["peak_gib"] < memory.allocated_gib.high
    assert memory.reserved_gib.low < row["reserved_gib"] < memory.reserved_gib.high


def test_measured_rows_are_there() -> None:
    assert len([row for row in MEASURED if row["trainer"].startswith("kdcloud")]) == 4


def test_an_mlp_in_parts_has_the_gradients_of_one_part_in_flight() -> None:
    """A token: 3 * 8,960 values of 2 bytes, of a quarter of the rows, and 2 * 1,536 of the stream."""
    work = training_step(own_training(SMALL, full=False, micro_batch=8, seq_len=1024, checkpointing=True))
    assert work.moments["backward"]["work"] == pytest.approx(8192 * 2 * (3 * 8960 / MLP_PARTS + 2 * 1536) / GIB)


def test_chunks_and_parts_are_those_of_the_tasks() -> None:
    """Read from their text: they import torch."""
    models, losses = ((ROOT / "tasks" / name).read_text() for name in ("models.py", "losses.py"))
    assert f"\nMLP_PARTS = {MLP_PARTS}\n" in models
    for name, ours, at in (("CHUNK", LOSS_CHUNK_LOGITS, "1 << 24"), ("FUSED", FUSED_LOGITS, "1 << 28"),
                           ("FROZEN", FUSED_FROZEN_LOGITS, "7 << 24")):  # fmt: skip
        factor, bits = at.split(" << ")
        assert f"\n{name}_ELEMENTS = {at} " in losses and ours == int(factor) << int(bits)


def test_our_loss_holds_a_chunk_of_logits() -> None:
    """Frozen head: 7 * 2^24 logits in fp32, 0.4375 GiB; trained: 2^28, and the head's gradient in fp32 and its copy."""
    head = SMALL.vocab * SMALL.hidden
    frozen = training_step(own_training(SMALL, full=False, micro_batch=8, seq_len=1024)).moments["loss"]["logits"]
    trained = training_step(own_training(SMALL, full=True, micro_batch=8, seq_len=1024)).moments["loss"]["logits"]
    assert frozen == pytest.approx(0.4375)
    assert trained == pytest.approx(1.0 + 6 * head / GIB)


def test_the_articles_cases_come_out_as_it_says() -> None:
    """Inference of 1.5 B in about 6 GB; full fine-tuning wants an A100; LoRA with checkpointing fits 16 GB."""
    assert 3.5 < generation(sequences=8, seq=2048).total_gib.expected < 7
    assert 22 < training(full=True, seq=2048, checkpointing=True).total_gib.high < 39.4
    assert training(seq=8192, checkpointing=True).total_gib.high < 14.9


def test_the_cache_is_two_values_a_layer_head_and_token() -> None:
    # 2 * 28 layers * 2 heads * 128 * 2 bytes = 28,672 a token
    memory = generation_memory(SMALL, sequences=3, seq_len=1000, half=True, gpu=True, prompt_len=10)
    assert memory.moment == "last token"
    assert memory.parts_gib["cache"] == pytest.approx(3 * 1000 * 28_672 / GIB)


def test_a_long_prompt_is_read_with_a_layers_widest_tensors() -> None:
    """A token: 4 * 1,536 of the stream and 3 * 8,960 of the MLP, in 2 bytes; the cache of 8,000 tokens."""
    memory = generation_memory(SMALL, sequences=1, seq_len=8100, half=True, gpu=True, prompt_len=8000)
    assert memory.moment == "prompt"
    assert memory.parts_gib["work"] == pytest.approx(8000 * 2 * (4 * 1536 + 3 * 8960) / GIB)
    assert memory.parts_gib["cache"] == pytest.approx(8000 * 28_672 / GIB)


def test_an_engine_needs_its_profile_run_and_the_rest_of_a_card_of_which_it_takes_a_share() -> None:
    """Logits of 256 sequences in fp32, twice (sorted); with soft labels a log-softmax of them, too. A prefill of 8,192
    tokens. Everything and the context in 0.9 of the card."""
    parts = generation_memory(SMALL, sequences=4, seq_len=1000, half=True, gpu=True, engine=True).parts_gib
    assert parts["logits"] == pytest.approx(256 * 151_936 * 4 * 2 / GIB)
    assert parts["work"] == pytest.approx(8192 * 2 * (4 * 1536 + 3 * 8960) / GIB)
    inside = sum(parts[name] for name in ("weights", "cache", "work", "logits")) + CUDA_CONTEXT_GIB.expected
    assert parts["beside its share"] == pytest.approx(VLLM_GRAPHS_GIB) and inside / 9 < VLLM_GRAPHS_GIB
    large = generation_memory(LARGE, sequences=4, seq_len=1000, half=True, gpu=True, engine=True).parts_gib
    inside = sum(large[name] for name in ("weights", "cache", "work", "logits")) + CUDA_CONTEXT_GIB.expected
    assert large["beside its share"] == pytest.approx(inside / 9)
    labels = generation_memory(SMALL, sequences=4, seq_len=1000, half=True, gpu=True, engine=True, soft_labels=True)
    assert labels.parts_gib["logits"] == pytest.approx(256 * 151_936 * 4 * 3 / GIB)


@pytest.mark.parametrize(
    ("weights", "bytes_"),
    [
        ("bf16", 1_543_714_304 * 2),
        # 1,543,714,304 - 233,373,696 of the embedding, which stays in 2 bytes
        ("nf4", 1_310_340_608 * (0.5 + 4 / 64) + 233_373_696 * 2),
        ("int4", 1_310_340_608 * (0.5 + 2.5 / 128) + 233_373_696 * 2),
        ("int8", 1_310_340_608 * (1 + 3 / 128) + 233_373_696 * 2),
        ("fp8", 1_310_340_608 + 233_373_696 * 2),
    ],
)
def test_weights_are_stored_in(weights: str, bytes_: float) -> None:
    assert weight_bytes(SMALL, weights) == pytest.approx(bytes_)


def test_without_a_gpu_a_tiny_model_is_the_process_itself() -> None:
    tiny = ModelShape("tiny", 96, 256, 2, 4, 2, 24, 64, True)
    memory = training_memory(
        tiny, trainable=tiny.params, full=True, micro_batch=128, seq_len=38, half=False, checkpointing=False, gpu=False
    )
    assert 0.5 < memory.total_gib.expected < 1.0
    assert "cuda context" not in memory.parts_gib and memory.parts_gib["process"] == CPU_PROCESS_GIB.expected


def test_of_models_loaded_in_turn_the_largest_counts() -> None:
    assert largest([generation(), generation(LARGE)]) == generation(LARGE)
    assert CUDA_CONTEXT_GIB.low < CUDA_CONTEXT_GIB.expected < CUDA_CONTEXT_GIB.high
