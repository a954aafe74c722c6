"""Memory of a training step: every part as a sum, the moments that compete, and how it grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.catalog import ModelShape
from orchestrator.memory import CUDA_CONTEXT_GIB, LEFT_GIB, allocated_range, reserved_range, step_memory
from orchestrator.memory_training import (
    EIGHT_BIT_BYTES,
    FSDP_QLORA,
    GIB,
    LITGPT,
    NF4_BYTES,
    NF4_DOUBLE_BYTES,
    TORCHTUNE,
    TRANSFORMERS,
    Habits,
    Step,
    Training,
    backward_bytes,
    cached_bytes,
    dequantised_head_bytes,
    embedding_gradient_bytes,
    gradient_bytes,
    held_bytes,
    layer_bytes,
    loaded_bytes,
    logit_bytes,
    optimizer_bytes,
    optimizer_work_bytes,
    static_bytes,
    training_step,
    weight_copies_bytes,
)

# 2 layers; hidden 8, inner 16, 4 heads and 2 key heads of 2 values, 10 ids. Embedding 80; a layer: q and o 64 each,
# k and v 32 each, mlp 3 * 128, norms 16 = 592; last norm 8. Tied: 80 + 1,184 + 8 = 1,272.
TINY = ModelShape("tiny", 8, 16, 2, 4, 2, 2, 10, True)
UNTIED = replace(TINY, tied=False)  # 1,352
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = Training(TINY, batch=1, seq_len=10)


def lora(habits: Habits = TRANSFORMERS, targets: tuple[str, ...] = ("q_proj", "v_proj"), **changes: object) -> Training:
    return replace(BASE, method="lora", rank=4, targets=targets, habits=habits, **changes)  # type: ignore[arg-type]


# --- the static part


@pytest.mark.parametrize(
    ("job", "weights"),
    [
        (BASE, 1272 * 2),
        (replace(BASE, weights="fp32"), 1272 * 4),
        (replace(BASE, shape=UNTIED), 1352 * 2),
        # layers and norms 1,192 in 4 bits and their scales, embedding 80 in bf16
        (lora(weights="nf4"), 1192 * NF4_DOUBLE_BYTES + 80 * 2),
        (lora(replace(TRANSFORMERS, double_quantised=False), weights="nf4"), 1192 * NF4_BYTES + 80 * 2),
        # litgpt packs the head too: 1,192 + 80 in 4 bits, the embedding in bf16
        (lora(LITGPT, weights="nf4", shape=UNTIED), 1272 * NF4_BYTES + 80 * 2),
        # two GPUs share layers and embedding; scales of packed weights are no parameters, and are not shared
        (replace(BASE, gpus=2, parallel="fsdp"), 1272 * 2 / 2),
        (lora(FSDP_QLORA, weights="nf4", gpus=2, parallel="fsdp"), (1192 * 0.5 + 160) / 2 + 1192 / 16),
        (replace(BASE, gpus=2, parallel="ddp"), 1272 * 2),
    ],
)
def test_weights_are_stored_and_shared_so(job: Training, weights: float) -> None:
    assert static_bytes(job)["weights"] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("job", "optimizer"),
    [
        (BASE, 1272 * 2 * 2),  # two moments like the parameters
        (replace(BASE, weights="fp32"), 1272 * 2 * 4),
        (replace(BASE, state_bytes=4.0), 1272 * 2 * 4),
        (replace(BASE, optimizer="adamw8bit"), 1272 * 2 * EIGHT_BIT_BYTES),
        (replace(BASE, optimizer="paged_adamw"), 0),  # not in PyTorch's memory
        (replace(BASE, optimizer="sgd"), 0),
        (replace(BASE, optimizer="sgd_momentum"), 1272 * 2),
        (replace(BASE, master_bytes=4.0, state_bytes=4.0), 1272 * (4 + 8)),
        # r 4 on q (8 + 8) and v (8 + 4) of 2 layers: 224 adapters in fp32
        (lora(), 224 * 2 * 4),
        (lora(LITGPT), 224 * 2 * 2),
    ],
)
def test_the_optimizer_holds(job: Training, optimizer: float) -> None:
    assert optimizer_bytes(job) == pytest.approx(optimizer)


def test_gradients_are_like_what_is_trained_and_shared_where_it_is() -> None:
    assert gradient_bytes(BASE) == 1272 * 2
    assert gradient_bytes(lora()) == 224 * 4
    assert gradient_bytes(replace(BASE, gpus=4, parallel="zero3")) == 1272 * 2 / 4
    assert static_bytes(replace(BASE, gpus=2, parallel="ddp"))["buckets"] == 1272 * 2
    assert static_bytes(replace(BASE, gpus=4, parallel="zero2"))["optimizer"] == 1272 * 4 / 4
    assert optimizer_work_bytes(BASE) == 0  # fused
    assert optimizer_work_bytes(replace(BASE, habits=LITGPT)) == 1272 * 2  # foreach: roots of the second moments


def test_sharding_has_work_space_of_its_own() -> None:
    """ZeRO-3: fp32 gradients of a sub-group, and what may stay gathered of its parameters; FSDP: embedding and two
    layers, in bf16 also where they are stored in fp32, and a layer's gradients before they are shared."""
    zero = replace(BASE, gpus=4, parallel="zero3", master_bytes=4.0)
    assert optimizer_work_bytes(zero) == 1272 / 4 * 4
    assert static_bytes(zero)["gathered"] == 1272 * 2  # all of so few
    fsdp = replace(BASE, gpus=2, parallel="fsdp")
    assert static_bytes(fsdp)["gathered"] == 80 * 2 + 2 * 596 * 2
    assert static_bytes(replace(fsdp, weights="fp32"))["gathered"] == 80 * 2 + 2 * 596 * 2
    assert backward_bytes(fsdp) - backward_bytes(BASE) == 596 * 2
    assert static_bytes(replace(BASE, gpus=4, parallel="zero1"))["optimizer"] == 1272 * 4 / 4
    assert gradient_bytes(replace(BASE, gpus=4, parallel="zero1")) == 1272 * 2


def test_who_loads_the_whole_model_first_has_reserved_it() -> None:
    """Weights 2,544, the largest unit once more, 160, and 224 adapters of 2 bytes; one GPU shares nothing."""
    job = lora(FSDP_QLORA, gpus=2, parallel="fsdp")
    assert loaded_bytes(job) == 2544 + 160 + 224 * 2
    assert loaded_bytes(lora(FSDP_QLORA)) == 0
    step = Step({"loss": {"weights": 1.0}}, cached_gib=0.5, static_gib=1.0, loaded_gib=5.0)
    memory = step_memory(step, (0.0, 0.0), gpu=True)
    assert memory.reserved_gib is not None and memory.reserved_gib.expected == pytest.approx(5.0)


def test_packed_integers_are_unpacked_by_operations_that_autograd_sees() -> None:
    """GPTQ: 1,192 weights in 2 bytes; of one layer, 596, with checkpointing. bitsandbytes keeps nothing."""
    packed = lora(weights="int4")
    assert weight_copies_bytes(packed) == 1192 * 2
    assert weight_copies_bytes(replace(packed, checkpointing=True)) == 596 * 2
    assert weight_copies_bytes(lora(weights="nf4")) == 0


def test_a_packed_head_is_unpacked_for_its_backward_product() -> None:
    """litgpt's comes back in fp16 and is cast: two copies of 80 values."""
    assert dequantised_head_bytes(lora(LITGPT, weights="nf4", shape=UNTIED)) == 80 * 2 * 2
    assert dequantised_head_bytes(lora(FSDP_QLORA, weights="nf4", shape=UNTIED)) == 0


def test_inputs_of_packed_products_outlive_their_step_where_the_loop_holds_its_loss() -> None:
    """10 tokens, 2 layers: inputs of q, k and v (8), of o (8), of gate and up (8) and of down (16), in 2 bytes. When
    the next forward pass ends, logits of the last are there (4), the new ones (2) and those in fp32 (4)."""
    job = lora(LITGPT, weights="nf4", shape=UNTIED, chunked_loss=True)
    assert held_bytes(job) == 10 * 2 * 2 * (8 + 8 + 8 + 16)
    assert held_bytes(replace(job, shape=replace(UNTIED, architecture="phi", gated=False))) == 10 * 2 * 2 * (8 + 8 + 16)
    held = training_step(job).moments["next forward"]
    assert held["inputs of the step before"] == pytest.approx(1600 / GIB)
    assert held["logits"] == pytest.approx(10 * 10 * (4 + 2 + 4) / GIB)
    for other in (replace(job, repeated=False), lora(LITGPT), lora(FSDP_QLORA, weights="nf4")):
        assert held_bytes(other) == 0 and "next forward" not in training_step(other).moments


def test_autocast_keeps_a_copy_of_each_fp32_weight_that_is_used() -> None:
    """Layers and norms 1,192 and the head 80, in bf16; with checkpointing of one layer, 596 with its share of norms."""
    fp32 = replace(BASE, weights="fp32", autocast=True)
    assert weight_copies_bytes(fp32) == (1192 + 80) * 2
    assert weight_copies_bytes(replace(fp32, checkpointing=True)) == (596 + 80) * 2
    assert weight_copies_bytes(BASE) == weight_copies_bytes(replace(BASE, weights="fp32")) == 0


# --- what a layer keeps, bytes a token; h 8, inner 16, q 8, kv 4, 4 heads


@pytest.mark.parametrize(
    ("job", "norms", "attention", "mlp"),
    [
        # norms: 2 * (fp32 copy 32 + normed 16); q 16, k 8, v 8, out 16, lse 16, input 16; gate, up, silu 96,
        # input 16, product 32
        (BASE, 96, 80, 144),
        # eager: keys and values at full width 16 each, and 4 heads * 10 scores in 4 + 2 bytes
        (replace(BASE, attention="eager"), 96, 96 + 240, 144),
        # LoRA: no normed values; q and v cast their input to fp32 (32 each) and keep 4 * 2 of their middle each
        (lora(), 64, 64 + 64 + 16, 96),
        # adapters in bf16 share one input
        (lora(replace(TRANSFORMERS, adapter_bytes=2)), 64, 64 + 16 + 16, 96),
        # dropout: the result and a mask, of each its own; of down_proj 16 wide
        (lora(replace(TRANSFORMERS, adapter_bytes=2, dropout=True), ("q_proj", "v_proj", "down_proj")), 64,
         64 + 2 * 24 + 16, 96 + 48 + 8),
        # litgpt: keys and values repeated to 16 each, one dropped input 24, middles 16, the update of q and v 24
        (lora(LITGPT), 64, 16 + 32 + 16 + 16 + 24 + 16 + 24, 96),
        # compiled: norms keep their input, the activated gate is made again
        (replace(BASE, compiled=True), 32, 80, 112),
        # LayerNorm, no gate: input twice, gelu's input, and input and product of the two matrices
        (replace(BASE, shape=replace(TINY, architecture="mpt", gated=False)), 32, 80, 32 + 16 + 32),
        # both branches of a parallel block read one norm's input
        (replace(BASE, shape=replace(TINY, architecture="falcon", gated=False)), 16, 80, 32 + 16 + 32),
        # norms of q and k: 12 values in 4 + 2 bytes
        (replace(BASE, shape=replace(TINY, qk_norm=True)), 96 + 72, 80, 144),
        # two GPUs split heads and inner values, not the stream
        (replace(BASE, gpus=2, tensor_parallel=2), 96, 16 + 32, 16 + 64),
    ],
)  # fmt: skip
def test_a_layer_keeps(job: Training, norms: float, attention: float, mlp: float) -> None:
    assert layer_bytes(job) == pytest.approx({"norms": norms, "attention": attention, "mlp": mlp})


def test_a_fused_product_stays_whole_for_its_values() -> None:
    """litgpt with as many key heads as heads: values are a view of q, k and v, 24 values of 2 bytes."""
    wide = replace(TINY, kv_heads=4)
    # q 16, k 16, qkv 48, out 16, lse 16, dropped input 24, middles 16, update of q and v 32
    assert layer_bytes(lora(LITGPT, shape=wide))["attention"] == 16 + 16 + 48 + 16 + 16 + 24 + 16 + 32


@pytest.mark.parametrize(
    ("job", "at_loss", "after"),
    [
        (BASE, 10 * 10 * 12, 0),  # 10 tokens, 10 ids, 12 bytes
        (replace(BASE, habits=FSDP_QLORA), 10 * 10 * 16, 10 * 10 * 4),
        # litgpt: 8 bytes of all, and 8 of one chunk, which is all there is here
        (replace(BASE, habits=LITGPT, chunked_loss=True), 10 * 10 * 16, 10 * 10 * 4),
        (replace(BASE, habits=LITGPT, chunked_loss=True, seq_len=1280), 1280 * 10 * 8 + 128 * 10 * 8, 1280 * 10 * 4),
        (replace(BASE, habits=TORCHTUNE, chunked_loss=True, seq_len=80), 80 * 10 * 2 + 10 * 10 * 4, 0),
        # 10 ids of 8 values: 2 chunks of 500 tokens, rounded up to 512
        (replace(BASE, chunked_loss=True, seq_len=1000), 512 * 10 * 2, 0),
    ],
)
def test_logits_take_at_the_loss(job: Training, at_loss: float, after: float) -> None:
    assert logit_bytes(job) == pytest.approx((at_loss, after))


def test_a_tied_embedding_gets_its_gradient_twice() -> None:
    assert embedding_gradient_bytes(BASE) == 160
    assert embedding_gradient_bytes(replace(BASE, shape=UNTIED)) == 0
    assert embedding_gradient_bytes(lora()) == 0


# --- moments


def test_the_peak_is_one_moment_and_not_the_sum_of_all() -> None:
    """Few tokens: gradients decide, a tied embedding's twice; many: the loss; many in checkpoints with a chunked loss:
    a layer computed again."""
    words = replace(BASE, shape=replace(TINY, vocab=1000))  # 1,272 and 990 * 8 more
    few, many = training_step(replace(words, seq_len=1)), training_step(replace(BASE, seq_len=100_000))
    assert few.peak == "embedding" and many.peak == "loss"
    assert "gradients" not in many.parts and few.parts["gradients"] == pytest.approx(9192 * 2 / GIB)
    small_head = replace(BASE, seq_len=100_000, chunked_loss=True, checkpointing=True, habits=TRANSFORMERS)
    again = training_step(small_head)
    assert again.peak in ("backward", "first layer")
    assert training_step(replace(BASE, seq_len=1, habits=LITGPT, accumulation=2)).peak == "step"
    for step in (few, many, again):
        assert step.allocated_gib == max(sum(parts.values()) for parts in step.moments.values())
        assert step.allocated_gib < sum(sum(parts.values()) for parts in step.moments.values())


def test_gradients_of_earlier_micro_batches_are_there_at_the_loss() -> None:
    assert "gradients" not in training_step(BASE).moments["loss"]
    assert training_step(replace(BASE, accumulation=2)).moments["loss"]["gradients"] == pytest.approx(1272 * 2 / GIB)


def test_checkpointing_keeps_each_layers_input_and_one_layer() -> None:
    """10 tokens of 8 values of 2 bytes, of 2 layers; a layer keeps 96 + 80 + 144 bytes a token."""
    backward = training_step(replace(BASE, checkpointing=True)).moments["backward"]
    assert backward["activations"] == pytest.approx(10 * 8 * 2 * 2 / GIB)
    assert backward["layer again"] == pytest.approx(10 * 320 / GIB)
    assert training_step(BASE).moments["backward"]["activations"] == pytest.approx(2 * 10 * 320 / GIB)


def test_the_allocator_holds_a_layers_forward_pass_logits_and_half_a_layer() -> None:
    """10 tokens: forward 3 * 16 inner and 3 * 8 stream values of 2 bytes, 144; logits of 2 bytes, 10 ids."""
    job = replace(lora(targets=("q_proj",)), checkpointing=True)
    assert cached_bytes(job, 1000.0) == pytest.approx(10 * 144 + 10 * 10 * 2 + 450)


# --- how it grows

SIZES = st.integers(1, 64)
JOBS = st.builds(
    Training,
    st.sampled_from([TINY, UNTIED, replace(TINY, architecture="phi", gated=False)]),
    SIZES,
    st.integers(1, 4096),
    method=st.sampled_from(["full", "lora"]),
    rank=st.just(4),
    targets=st.just(ALL),
    weights=st.sampled_from(["bf16", "fp32", "nf4"]),
    checkpointing=st.booleans(),
    chunked_loss=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]),
    accumulation=st.integers(1, 2),
    habits=st.sampled_from([TRANSFORMERS, LITGPT, TORCHTUNE, FSDP_QLORA]),
)


@settings(max_examples=150, deadline=None)
@given(JOBS)
def test_more_of_anything_needs_no_less(job: Training) -> None:
    def gib(**changes: object) -> float:
        return training_step(replace(job, **changes)).allocated_gib  # type: ignore[arg-type]

    now = gib()
    assert gib(batch=job.batch + 1) >= now
    assert gib(seq_len=job.seq_len * 2) >= now
    assert gib(seq_len=10**6) > now
    assert gib(shape=replace(job.shape, layers=3)) > now
    assert gib(attention="eager") >= gib(attention="sdpa")
    assert gib(rank=8) >= now
    if job.method == "lora" and job.weights != "nf4":
        assert gib(weights="nf4", habits=TRANSFORMERS) < gib(weights="fp32", habits=TRANSFORMERS)
    step = training_step(job)
    assert all(size > 0 for parts in step.moments.values() for size in parts.values())


# --- the three ways to count


def test_allocated_reserved_and_process_are_kept_apart() -> None:
    step = Step({"loss": {"weights": 4.0, "activations": 6.0}}, cached_gib=1.0, static_gib=4.0)
    memory = step_memory(step, (0.1, 0.2), gpu=True)
    assert memory.allocated_gib is not None and memory.reserved_gib is not None
    assert memory.allocated_gib.expected == pytest.approx(10.03125)  # and 32 MiB of cuBLAS
    assert memory.reserved_gib.expected == pytest.approx(11.03125)
    assert memory.process_gib is not None
    assert memory.process_gib.expected == pytest.approx(11.03125 + CUDA_CONTEXT_GIB.expected)
    assert memory.total_gib.expected == memory.process_gib.expected
    assert sum(memory.parts_gib.values()) == pytest.approx(memory.total_gib.expected)
    # 4 * 1.01 + 6.03125 * 1.2 allocated at most, half of what is held, the context
    assert memory.total_gib.high == pytest.approx(4.04 + 6.03125 * 1.2 + 0.5 + CUDA_CONTEXT_GIB.high)


def test_a_range_is_wide_where_something_moves() -> None:
    step = Step({"loss": {"weights": 4.0, "activations": 6.0}}, 0.0, 4.0)
    found = allocated_range(step, (0.1, 0.2))
    assert (found.low, found.expected, found.high) == pytest.approx((10 - 0.04 - 0.6, 10.0, 10 + 0.04 + 1.2))


def test_nothing_is_reserved_beyond_the_card() -> None:
    allocated = allocated_range(Step({"loss": {"weights": 20.0}}, 0.0, 20.0), (0.0, 0.0))
    free = reserved_range(allocated, 4.0)
    assert (free.low, free.expected, free.high) == pytest.approx((19.8, 24.0, 20.2 + 5.2 + LEFT_GIB))
    tight = reserved_range(allocated, 4.0, 23.0)  # half way between what is needed and what there is
    assert (tight.low, tight.expected, tight.high) == pytest.approx((19.8, 21.5, 23.0))
