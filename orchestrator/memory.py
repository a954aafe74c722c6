"""How much memory does a stage need? GiB (2^30) as low, expected, high, with the parts it is made of. Pure.

Three ways to count, kept apart: what PyTorch has allocated, what its allocator has reserved, and what the process takes
of the card (CUDA's context with it). What must fit is the last. Without a GPU: the resident memory of the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.catalog import ModelShape
from orchestrator.memory_generation import (
    VLLM_GRAPHS_GIB,
    VLLM_SHARE,
    Generation,
    sharded_scoring,
    transformers_generation,
    vllm_need,
)
from orchestrator.memory_training import GIB, OURS, Habits, Logits, Step, Training, training_step
from orchestrator.plan import Range

# What a process holds before any model, GiB. GPU: CUDA context and the libraries' kernels. CPU: resident size after
# importing torch and transformers and training a model of 0.2 M parameters (0.50 on Linux, torch 2.13).
CUDA_CONTEXT_GIB = Range(0.3, 0.6, 1.1)
CPU_PROCESS_GIB = Range(0.4, 0.55, 0.9)
BARE_PROCESS_GIB = Range(0.03, 0.05, 0.1)  # the supervisor and a stage that needs no torch
NCCL_GIB = Range(0.1, 0.6, 1.5)  # its buffers and kernels, where GPUs work together
CUBLAS_GIB = 32 / 1024  # work space of matrix products (CUBLAS_WORKSPACE_CONFIG: 8 MiB before Hopper, 32 MiB there)

# How far the counts may be off, of what is not weights and optimizer, as shares below and above: no source of published
# cases is off by more (table of residuals in docs/estimates.md). Where the framework's own loop was read, and where the
# code that ran was not.
READ_SPREAD, UNREAD_SPREAD = (0.08, 0.1), (0.27, 0.3)
STATIC_SPREAD = 0.01

MLP_PARTS = 4  # tasks/models.py: MLP_PARTS
LORA_TARGETS = ("q_proj", "k_proj", "v_proj")

# Of what the allocator holds unused, what it cannot give back when the card is full: it frees whole segments only.
STUCK = 0.5  # assumed: in the traces of docs/estimates.md about half lay beside something in use

# What first steps, compiling and rounding leave reserved besides, at most: 0.5 to 1.1 GiB were held beyond what was
# allocated on an H200 where the count says 0.2 to 0.8 (benchmarks/results/training.json).
LEFT_GIB = 0.6

# tasks.losses holds so many logits at once, in fp32 (their gradient in the same place); on CUDA with Triton more.
LOSS_CHUNK_LOGITS, LOSS_BYTES_PER_LOGIT = 1 << 24, 14
FUSED_LOGITS, FUSED_FROZEN_LOGITS, FUSED_BYTES_PER_LOGIT = 1 << 28, 7 << 24, 4


@dataclass(frozen=True)
class Memory:
    """What a stage needs, and the expected size of each part, GiB. `moment`: when it is most.

    `total_gib` is what must fit: a card with its `high` runs it. `process_gib` is what the process grows to where there
    is room: more, since PyTorch gives back what it holds unused only when the card is full.
    """

    total_gib: Range
    parts_gib: Mapping[str, float]
    allocated_gib: Range | None = None
    reserved_gib: Range | None = None
    process_gib: Range | None = None
    moment: str = ""


def training_memory(
    shape: ModelShape,
    *,
    trainable: int,
    full: bool,
    micro_batch: int,
    seq_len: int,
    half: bool,
    checkpointing: bool,
    gpu: bool,
    four_bit: bool = False,
    eight_bit: bool = False,
    compiled: bool = False,
    accumulation: int = 1,
    lora: tuple[int, tuple[str, ...]] | None = None,
    gpus: int = 1,
) -> Memory:
    """One GPU of tasks/train.py on rows of `seq_len` tokens, `micro_batch` at a time; `half`: bf16 or fp16 products.

    Full training keeps fp32 weights, gradients and moments, in shards over `gpus`; LoRA keeps frozen weights in the
    compute type and its adapters, gradients and moments in fp32, on each of them. `four_bit`: frozen layers in NF4;
    `eight_bit`: moments in 8 bits. `lora`: rank and targets, where known; else `trainable` adapters on q, k and v.
    """
    rank, targets = lora or (0, LORA_TARGETS)
    if not full and lora is None:
        rank = round(trainable / max(1, shape.lora_params(1, targets)))
    job = own_training(
        shape, full=full, micro_batch=micro_batch, seq_len=seq_len, half=half, fused=gpu and half, four_bit=four_bit,
        eight_bit=eight_bit, checkpointing=checkpointing, compiled=compiled, accumulation=accumulation,
        lora=(rank, targets), gpus=gpus,
    )  # fmt: skip
    spread = READ_SPREAD if gpus == 1 else UNREAD_SPREAD
    return step_memory(training_step(job), spread, gpu=gpu, gpus=gpus)


def own_training(
    shape: ModelShape,
    *,
    full: bool,
    micro_batch: int,
    seq_len: int,
    half: bool = True,
    fused: bool = True,
    four_bit: bool = False,
    eight_bit: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    accumulation: int = 1,
    lora: tuple[int, tuple[str, ...]] = (8, LORA_TARGETS),
    gpus: int = 1,
) -> Training:
    """A step of tasks/train.py. `fused`: with the loss of tasks/kernels.py. A layer that is computed again with frozen
    weights takes its MLP in parts. On several GPUs a full training is sharded (tasks/shard.py); adapters are on each,
    and their gradients are laid end to end for the sum."""
    habits = own_habits(shape, micro_batch * seq_len, full=full, fused=fused)
    return Training(
        shape,
        micro_batch,
        seq_len,
        method="full" if full else "qlora" if four_bit else "lora",
        rank=0 if full else lora[0],
        targets=() if full else lora[1],
        weights="nf4" if four_bit else "fp32" if full or not half else "bf16",
        compute_bytes=2 if half else 4,
        autocast=half,
        optimizer="adamw8bit" if eight_bit else "adamw",
        accumulation=accumulation,
        checkpointing=checkpointing,
        chunked_loss=True,
        compiled=compiled,
        mlp_parts=MLP_PARTS if checkpointing and not full else 1,
        gpus=gpus,
        parallel="none" if gpus == 1 else "fsdp" if full else "ddp",
        habits=replace(habits, shards_as_stored=True),
    )


def generation_memory(
    shape: ModelShape,
    *,
    sequences: int,
    seq_len: int,
    half: bool,
    gpu: bool,
    prompt_len: int | None = None,
    engine: bool = False,
    soft_labels: bool = False,
    gpus: int = 1,
    weights: str | None = None,
) -> Memory:
    """Generating `sequences` answers at once, each up to `seq_len` tokens with its prompt of up to `prompt_len` (None:
    half of it).

    An engine with a paged cache takes whatever memory is left; this is what it needs to keep that many in flight, on
    each of `gpus` that share every layer. `weights`: as they are held, where not in the compute type.
    """
    prompt = seq_len / 2 if prompt_len is None else min(prompt_len, seq_len)
    job = Generation(
        shape, sequences, prompt, seq_len - prompt, weights=weights or ("bf16" if half else "fp32"),
        cache_bytes=2 if half else 4, soft_labels=soft_labels, tensor_parallel=gpus,
    )  # fmt: skip
    if engine:
        return engine_memory(vllm_need(job), gpus=gpus)
    return step_memory(transformers_generation(job), UNREAD_SPREAD, gpu=gpu)


def scoring_memory(shape: ModelShape, *, gpus: int) -> Memory:
    """One of `gpus` that hold a teacher's weights in parts and look through finished answers together."""
    return step_memory(sharded_scoring(shape, gpus), UNREAD_SPREAD, gpu=True, gpus=gpus)


def loading_memory(shape: ModelShape, *, half: bool, gpu: bool) -> Memory:
    """Holding the weights once, and one more copy of the largest matrix while saving."""
    compute_bytes = 2 if half else 4
    weights = shape.params * compute_bytes / GIB
    parts = {"weights": weights, "largest matrix": shape.vocab * shape.hidden * compute_bytes / GIB}
    return step_memory(Step({"saving": parts}, 0.0, weights), READ_SPREAD, gpu=gpu)


def bare_memory() -> Memory:
    """A stage without torch."""
    return Memory(BARE_PROCESS_GIB, {"process": BARE_PROCESS_GIB.expected})


def process_memory() -> Memory:
    """A stage that imports torch and loads no model."""
    return Memory(CPU_PROCESS_GIB, {"process": CPU_PROCESS_GIB.expected})


def largest(memories: list[Memory]) -> Memory:
    """Of models that are loaded one after the other, the one that needs most."""
    return max(memories, key=lambda memory: memory.total_gib.high)


def step_memory(
    step: Step, spread: tuple[float, float], *, gpu: bool, card_gib: float | None = None, gpus: int = 1
) -> Memory:  # fmt: skip
    """Allocated, reserved and process memory of a step. `spread`: how far its counts may be off, of all but the static
    part, below and above. `card_gib`: what the card has, where it is known: nothing is reserved beyond it, since
    PyTorch gives back what it holds unused when the card is full.
    """
    base = CUDA_CONTEXT_GIB + NCCL_GIB if gpus > 1 else CUDA_CONTEXT_GIB
    if not gpu:
        base = CPU_PROCESS_GIB
    allocated = allocated_range(step, spread, CUBLAS_GIB if gpu else 0.0)
    cached = max(step.cached_gib, step.loaded_gib - allocated.expected) if gpu else 0.0
    reserved = reserved_range(allocated, cached, None if card_gib is None else card_gib - base.low)
    process = Range(
        allocated.low + base.low,
        reserved.expected + base.expected,
        allocated.high + 1.3 * cached + LEFT_GIB + base.high,
    )
    least = allocated.high + STUCK * cached + base.high
    total = Range(process.low, min(process.expected, least), least)
    parts = {**step.parts, "cuda context" if gpu else "process": base.expected}
    rest = total.expected - sum(parts.values())
    if abs(rest) > 1e-9:
        parts["held by the allocator"] = rest
    return Memory(total, parts, allocated, reserved, process, step.peak)


def engine_memory(step: Step, *, gpus: int = 1) -> Memory:
    """Of an engine that takes a share of the card: what must lie in it, CUDA's context with it, and the rest of the
    card, in which its CUDA graphs lie."""
    allocated = allocated_range(step, UNREAD_SPREAD)
    context = CUDA_CONTEXT_GIB + NCCL_GIB if gpus > 1 else CUDA_CONTEXT_GIB

    def card(inside: float) -> float:
        return max(inside / VLLM_SHARE, inside + VLLM_GRAPHS_GIB)

    total = Range(
        card(allocated.low + context.low), card(allocated.expected + context.expected),
        card(allocated.high + context.high),
    )  # fmt: skip
    parts = {**step.parts, "cuda context": context.expected}
    parts["beside its share"] = total.expected - sum(parts.values())
    return Memory(total, parts, allocated, allocated, total, step.peak)


def allocated_range(step: Step, spread: tuple[float, float], more_gib: float = 0.0) -> Range:
    """What PyTorch has allocated at the peak; the static part is a count, the rest may be off by `spread`."""
    expected = step.allocated_gib + more_gib
    static = min(step.static_gib, expected)
    moving = expected - static
    below, above = (STATIC_SPREAD * static + share * moving for share in spread)
    return Range(expected - below, expected, expected + above)


def reserved_range(allocated: Range, cached_gib: float, limit_gib: float | None = None) -> Range:
    """What the allocator has reserved: the peak and what it holds of what was freed before. Where that is more than
    there is (`limit_gib`), it has given back what it could, and ends between the two."""
    expected, high = allocated.expected + cached_gib, allocated.high + 1.3 * cached_gib + LEFT_GIB
    if limit_gib is None:
        return Range(allocated.low, expected, high)
    if expected > limit_gib:
        expected = max(allocated.expected, (allocated.expected + limit_gib) / 2)
    high = max(allocated.high, min(high, limit_gib))
    return Range(min(allocated.low, expected), expected, max(high, expected))


def own_habits(shape: ModelShape, tokens: int, *, full: bool, fused: bool = True) -> Habits:
    """Of tasks/train.py: its loss holds one chunk of logits and, where the head is trained, the head's gradient (fp32)
    and the head in the compute type. On CUDA with Triton the gradient of a chunk replaces its logits."""
    return replace(OURS, chunked_logits=Logits(0, 0), fixed_loss_bytes=_own_loss_bytes(shape, tokens, full, fused))


def _own_loss_bytes(shape: ModelShape, tokens: int, full: bool, fused: bool) -> float:
    logits = float(tokens * shape.vocab)
    head = shape.vocab * shape.hidden * (4.0 + (2.0 if fused else 0.0)) if full else 0.0
    if fused:
        return min(logits, FUSED_LOGITS if full else FUSED_FROZEN_LOGITS) * FUSED_BYTES_PER_LOGIT + head
    return min(logits, LOSS_CHUNK_LOGITS) * LOSS_BYTES_PER_LOGIT + head
