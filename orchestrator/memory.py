"""How much memory does a stage need? GiB (2^30) as low, expected, high, with the parts it is made of. Pure.

A first model from the shapes of the tensors. On a GPU it counts the whole process (weights, gradients, optimizer,
activations, logits, key-value cache, CUDA context, fragmentation); without one, the resident memory of the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.catalog import ModelShape
from orchestrator.plan import Range

GIB = 2**30

# What a process holds before any model, GiB. GPU: CUDA context and library workspaces. CPU: resident size after
# importing torch and transformers and training a model of 0.2 M parameters (0.50 on Linux, torch 2.13).
CUDA_CONTEXT_GIB = Range(0.5, 0.8, 1.3)
CPU_PROCESS_GIB = Range(0.4, 0.55, 0.9)
BARE_PROCESS_GIB = Range(0.03, 0.05, 0.1)  # the supervisor and a stage that needs no torch

# bitsandbytes, a value: 4 bits, and for 64 of them a scale in 8 bits, whose own scale (fp32) serves 256; one of AdamW's
# two moments: 8 bits, and for 256 of them a scale in fp32.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
EIGHT_BIT_BYTES = 1 + 4 / 256
LOSS_CHUNK_LOGITS = 1 << 24  # logits that exist at once (tasks.losses works in chunks of so many)
LOSS_BYTES_PER_LOGIT = 14  # fp32 logits, fp32 softmax, their gradient in fp32 or bf16, one work copy
FRAGMENTATION = Range(0.0, 0.05, 0.12)  # of everything that is allocated and freed again
UNSURE = Range(0.8, 1.0, 1.25)  # of activations and logits: what the counts below leave out or count twice


@dataclass(frozen=True)
class Memory:
    """What a stage needs, and the expected size of each part, GiB."""

    total_gib: Range
    parts_gib: Mapping[str, float]


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
) -> Memory:
    """Training with AdamW on rows of `seq_len` tokens, `micro_batch` at a time; `half`: bf16 or fp16 products.

    Full training keeps fp32 weights, gradients and moments; LoRA keeps frozen weights in the compute type and its
    adapters, gradients and moments in fp32. `four_bit`: frozen layers in NF4; `eight_bit`: moments in 8 bits. Wrong
    where the loss materialises all logits or attention all scores.
    """
    compute_bytes = 2 if half else 4
    tokens = micro_batch * seq_len
    weights: float = shape.params * (4 if full else compute_bytes) + (shape.params * 2 if full and half else 0)
    if four_bit:
        whole = shape.vocab * shape.hidden * (1 if shape.tied else 2)  # embedding and head
        weights = whole * compute_bytes + (shape.params - whole) * NF4_BYTES
    adapters = 0 if full else trainable * 4
    fixed = {
        "weights": (weights + adapters) / GIB,
        "gradients": trainable * 4 / GIB,
        "optimizer": trainable * 2 * (EIGHT_BIT_BYTES if eight_bit else 4) / GIB,
    }
    varying = {
        "activations": activation_bytes(shape, tokens, compute_bytes, checkpointing=checkpointing) / GIB,
        "logits": min(LOSS_CHUNK_LOGITS, tokens * shape.vocab) * LOSS_BYTES_PER_LOGIT / GIB,
    }
    return _total(fixed, varying, CUDA_CONTEXT_GIB if gpu else CPU_PROCESS_GIB, gpu)


def generation_memory(shape: ModelShape, *, sequences: int, seq_len: int, half: bool, gpu: bool) -> Memory:
    """Generating `sequences` answers at once, each up to `seq_len` tokens with its prompt.

    An engine with a paged cache takes whatever memory is left; this is what it needs to keep that many in flight.
    """
    compute_bytes = 2 if half else 4
    fixed = {"weights": shape.params * compute_bytes / GIB}
    varying = {
        "kv_cache": sequences * seq_len * shape.kv_bytes(compute_bytes) / GIB,
        "activations": prefill_bytes(shape, compute_bytes) / GIB,
        "logits": sequences * shape.vocab * 4 * 3 / GIB,
    }
    return _total(fixed, varying, CUDA_CONTEXT_GIB if gpu else CPU_PROCESS_GIB, gpu)


def loading_memory(shape: ModelShape, *, half: bool, gpu: bool) -> Memory:
    """Holding the weights once, and one more copy of the largest matrix while saving."""
    compute_bytes = 2 if half else 4
    fixed = {
        "weights": shape.params * compute_bytes / GIB,
        "largest matrix": shape.vocab * shape.hidden * compute_bytes / GIB,
    }
    return _total(fixed, {}, CUDA_CONTEXT_GIB if gpu else CPU_PROCESS_GIB, gpu)


def bare_memory() -> Memory:
    """A stage without torch."""
    return Memory(BARE_PROCESS_GIB, {"process": BARE_PROCESS_GIB.expected})


def process_memory() -> Memory:
    """A stage that imports torch and loads no model."""
    return Memory(CPU_PROCESS_GIB, {"process": CPU_PROCESS_GIB.expected})


def largest(memories: list[Memory]) -> Memory:
    """Of models that are loaded one after the other, the one that needs most."""
    return max(memories, key=lambda memory: memory.total_gib.high)


def activation_bytes(shape: ModelShape, tokens: int, compute_bytes: int, *, checkpointing: bool) -> float:
    """What the forward pass keeps for the backward pass, bytes. Checkpointing keeps each layer's input and one layer.

    Values a token and layer: 4 of the hidden size for the residual stream and norms, as much again for the fp32 copies
    that RMSNorm keeps; attention's q, k, v before and after the rotation and its output; gate, up, their activation and
    product. Attention itself keeps no scores (sdpa or flash kernels).
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 4 * shape.hidden * compute_bytes + 2 * shape.hidden * 4
    attention = (3 * q + 5 * kv) * compute_bytes
    mlp = 4 * shape.intermediate * compute_bytes
    layer = norms + attention + mlp
    if checkpointing:
        return tokens * (shape.layers * shape.hidden * compute_bytes + layer)
    return tokens * shape.layers * layer


def prefill_bytes(shape: ModelShape, compute_bytes: int, tokens: int = 2048) -> float:
    """Work space of one forward pass over `tokens` without gradients, bytes: two layers' widest tensors."""
    return tokens * (2 * shape.intermediate + 4 * shape.hidden) * compute_bytes


def _total(fixed: dict[str, float], varying: dict[str, float], base: Range, gpu: bool) -> Memory:
    base_name = "cuda context" if gpu else "process"
    sure, unsure = sum(fixed.values()), sum(varying.values())
    spread = FRAGMENTATION if gpu else Range(0.0, 0.0, 0.1)

    total = Range(
        sure + unsure * UNSURE.low * (1 + spread.low) + base.low,
        sure + unsure * UNSURE.expected * (1 + spread.expected) + base.expected,
        sure + unsure * UNSURE.high * (1 + spread.high) + base.high,
    )
    parts = {**fixed, **varying, base_name: base.expected}
    rest = total.expected - sum(parts.values())
    if rest > 1e-9:
        parts["fragmentation"] = rest
    return Memory(total, parts)
