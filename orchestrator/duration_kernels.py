"""How long does one kernel of a class take on a card? Rooflines: products, memory-bound work, attention, traffic. Pure.

Seconds, bytes and operations are plain floats. Every constant stands here with where it is from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from orchestrator.gpus import Gpu

# A product of w waves of 128 x 128 tiles runs at w / (w + WAVE_LOSS) of the large-product rate: 1024 and 2048 cubed
# against 8192 cubed on A10G, RTX 4090, L20 and L4 (torch-performance-test-data, issues 126, 78, 107, 120) give 0.05 to
# 0.3.
TILE = 128
WAVE_LOSS = 0.2
# Inside a model products run at this share of the large-product rate: 71.4 ms of a compiled LoRA step on an H200
# (benchmarks/results/training.json), where 64.5 would be all of it. Taken for other cards as well.
MODEL_SHARE = 0.90
# Element-wise kernels that follow each other reach this share of a large copy's bandwidth: a training step on an H200
# (benchmarks/results/training.json: eager less compiled).
CHAIN_SHARE = 0.75
CACHED_SHARE = 0.5  # of the bytes of such a chain are read where the kernel before wrote them
# Fused attention, of the operations that a causal mask leaves, forward and backward together, against the large-product
# rate: it rises with the length of the rows to ATTENTION_SHARE, half of which rows of ATTENTION_LENGTH reach. From
# FlashAttention-2's figures for heads of 128 (arXiv:2307.08691, figures 4 to 7): A100 137 at 2k and 175 at 8k of 266;
# H100 about 310 and 390 of 786.
ATTENTION_SHARE, ATTENTION_SHARE_HOPPER, ATTENTION_LENGTH = 0.71, 0.55, 750.0
ATTENTION_SHORTEST = 256.0  # shorter rows are as many blocks of a kernel: no slower than this
SCORE_BYTES = 24.0  # eager attention, a score: written, scaled, masked, softmax in fp32, cast, read again
KERNEL_S = 4e-6  # a kernel's start and tail on the device, when the next one is already queued: 3 to 5 microseconds


def product_s(card: Gpu, m: float, k: float, n: float, *, half: bool = True) -> float:
    """Seconds of one (m x k) (k x n) product: at the card's rate for that many tiles, or at its bandwidth."""
    waves = math.ceil(m / TILE) * math.ceil(n / TILE) / card.processors.value
    rate = rate_s(card, half=half) * MODEL_SHARE * waves / (waves + WAVE_LOSS)
    size = 2 if half else 4
    # a product that cannot fill the card with tiles is split along k: it never falls below the bytes it moves
    computing = 2.0 * m * k * n / max(rate, 0.25 * rate_s(card, half=half) * min(1.0, m / TILE))
    moving = size * (m * k + k * n + m * n) / bytes_s(card)
    return max(computing if m >= TILE / 2 else 0.0, moving) + KERNEL_S


def products_s(card: Gpu, m: float, sides: Iterable[tuple[int, int]], *, half: bool = True) -> float:
    """Seconds of the products of `m` rows with matrices of (in, out) `sides`."""
    return sum(product_s(card, m, side_in, side_out, half=half) for side_in, side_out in sides)


def hopper(card: Gpu) -> bool:
    return card.name.startswith("H")


def rate_s(card: Gpu, *, half: bool) -> float:
    """Operations a second that large products reach."""
    return (card.reached_tflops.value if half else card.fp32_tflops.value) * 1e12


def bytes_s(card: Gpu) -> float:
    """Bytes a second of one large copy."""
    return card.reached_gb_s.value * 1e9


def memory_s(card: Gpu, moved: float, tensor: float | None = None, *, kernels: float = 0.0) -> float:
    """Seconds of `kernels` element-wise kernels that move `moved` bytes, in chains over tensors of `tensor` bytes.

    What one kernel wrote the next one finds in the cache, as far as two such tensors fit.
    """
    kept = 0.0 if tensor is None else min(1.0, card.cache_mb.value * 1e6 / (2 * max(tensor, 1.0)))
    return moved * (1 - CACHED_SHARE * kept) / (bytes_s(card) * CHAIN_SHARE) + kernels * KERNEL_S


def attention_s(card: Gpu, tokens: float, length: float, width: float, *, eager: bool, half: bool, heads: int) -> float:
    """Seconds of causal self-attention forward over `tokens` in rows of `length`; `width`: heads x head size."""
    if eager:  # both products whole, scores to memory and back
        computing = 4.0 * tokens * length * width / (rate_s(card, half=half) * 0.6)
        return computing + memory_s(card, tokens * length * heads * SCORE_BYTES)
    share = ATTENTION_SHARE_HOPPER if hopper(card) else ATTENTION_SHARE
    share *= max(length, ATTENTION_SHORTEST) / (max(length, ATTENTION_SHORTEST) + ATTENTION_LENGTH)
    return 2.0 * tokens * length * width / (rate_s(card, half=half) * share)


def all_reduce_s(card: Gpu, size: float, ranks: int, link_gb_s: float | None = None) -> float:
    """Seconds of a ring all-reduce of `size` bytes; a gather or a reduce-scatter takes half."""
    link = (card.link_gb_s.value if link_gb_s is None else link_gb_s) * 1e9
    return 2.0 * (ranks - 1) / ranks * size / link if ranks > 1 else 0.0
