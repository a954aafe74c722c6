"""How much memory a stage needs."""

from __future__ import annotations

import pytest

from orchestrator.catalog import MODELS, ModelShape
from orchestrator.memory import (
    CUDA_CONTEXT_GIB,
    GIB,
    Memory,
    activation_bytes,
    generation_memory,
    largest,
    loading_memory,
    training_memory,
)

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


def test_full_training_holds_eighteen_bytes_a_parameter() -> None:
    """fp32 weights, gradient and two moments, and the half precision copy that autocast keeps: 4 + 4 + 8 + 2."""
    parts = training(full=True).parts_gib
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == pytest.approx(18 * SMALL.params / GIB)


def test_lora_freezes_two_bytes_a_parameter_and_pays_sixteen_for_its_own() -> None:
    parts, own = training().parts_gib, SMALL.lora_params(8, ("q_proj", "k_proj", "v_proj"))
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == pytest.approx((2 * SMALL.params + 16 * own) / GIB)


def test_activations_grow_with_the_tokens_however_they_are_cut() -> None:
    one = activation_bytes(SMALL, 1000, 2, checkpointing=False)
    assert activation_bytes(SMALL, 4000, 2, checkpointing=False) == 4 * one
    # checkpointing: 28 inputs of layers and one whole layer instead of 28 whole layers
    assert activation_bytes(SMALL, 1000, 2, checkpointing=True) == pytest.approx(one / 28 + 1000 * 28 * 1536 * 2)


def test_the_articles_cases_come_out_as_it_says() -> None:
    """Inference of 1.5 B in about 6 GB; full fine-tuning wants an A100; LoRA with checkpointing fits 16 GB."""
    assert 4 < generation(sequences=8, seq=2048).total_gib.expected < 7
    assert 22 < training(full=True, seq=2048, checkpointing=True).total_gib.high < 39.4
    assert training(seq=8192, checkpointing=True).total_gib.high < 14.9


def test_the_cache_is_two_values_a_layer_head_and_token() -> None:
    # 2 * 28 layers * 2 heads * 128 * 2 bytes = 28,672 a token
    assert generation(sequences=3, seq=1000).parts_gib["kv_cache"] == pytest.approx(3 * 1000 * 28_672 / GIB)


def test_without_a_gpu_a_tiny_model_is_the_process_itself() -> None:
    tiny = ModelShape("tiny", 96, 256, 2, 4, 2, 24, 64, True)
    memory = training_memory(
        tiny, trainable=tiny.params, full=True, micro_batch=128, seq_len=38, half=False, checkpointing=False, gpu=False
    )
    assert 0.5 < memory.total_gib.expected < 1.0
    assert "cuda context" not in memory.parts_gib and memory.parts_gib["process"] > 0.5


def test_of_models_loaded_in_turn_the_largest_counts() -> None:
    assert largest([generation(), generation(LARGE)]) == generation(LARGE)
    assert CUDA_CONTEXT_GIB.low < CUDA_CONTEXT_GIB.expected < CUDA_CONTEXT_GIB.high
