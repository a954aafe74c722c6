"""How long does writing answers take? Prefill and decoding steps, from bytes, products and host work. Pure.

An engine (vLLM) keeps as many answers in flight as its limits and its cache allow; transformers writes whole batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.catalog import ModelShape
from orchestrator.duration_kernels import (
    KERNEL_S,
    all_reduce_s,
    attention_s,
    bytes_s,
    memory_s,
    product_s,
)
from orchestrator.duration_training import Training, layer_bytes
from orchestrator.gpus import Gpu
from orchestrator.memory_generation import cache_shares

GIB = 2**30
# vLLM's defaults (vllm/engine/arg_utils.py, get_batch_defaults): cards of 70 GiB and more that are no A100 take larger
# ones. (sequences at once, tokens of a step) for the library and for the server.
LARGE_CARD_GIB = 70.0
LIBRARY_LIMITS, LIBRARY_LIMITS_LARGE = (256, 8192), (1024, 16384)
SERVER_LIMITS, SERVER_LIMITS_LARGE = (256, 2048), (1024, 8192)
MEMORY_SHARE = 0.9  # gpu_memory_utilization
ENGINE_GIB = 1.5  # CUDA context 0.5, attention's work space 0.4, buffers outside of torch
# A step's work on the host: scheduling, inputs, sampling, detokenising. An H200 wrote 21,321 to 30,507 tokens/s at 256
# answers of a 1.5 B model and 26,003 to 28,897 at 1,024 (benchmarks/README.md): 8 to 12 ms and 35 to 39 ms a step, of
# which the card works 3 and 7.
HOST_STEP_S, HOST_SEQUENCE_S = 1.2e-3, 24e-6
# Log-probabilities become Python objects, a token: 117 microseconds for 64 of them, 103 for 20 (as above; flat 36).
LOGPROBS_S, LOGPROB_S = 93e-6, 0.4e-6
GRAPH_KERNELS = 14  # a layer and decoding step inside a CUDA graph: 4 products, norms, rotation, cache, attention in 2
CACHE_SHARE = 0.8  # of the bandwidth, for reading a paged cache
DECODE_SHARE = 0.93  # of it, for products of a few rows, which end before the memory has come up to speed
PREFILL_SHARE = 0.85  # of the products' rate in training: a step's rows belong to many requests
TENSOR_SUM_S = 20e-6  # a sum over ranks of few rows: latency with NVLink; through PCIe three times as long
SAMPLE_BYTES = 24.0  # a logit of a sampled row: fp32, temperature, softmax, top-p's sort
# transformers' generate writes a layer's kernels from Python: HOST_FORWARD_S a layer was 0.83 ms on a host of 2024 with
# cache and mask; its cache is written anew each step.
GENERATE_LAYER_S = 0.83e-3
PLAIN_CACHE_PASSES = 3.0  # joined (read, written), read by attention; and once more for each query head of a group
# Where lengths vary they are taken as exponential: n in flight leave over ln n mean lengths once nobody waits any more.
TAIL_ANSWERS = 6.0  # at most


@dataclass(frozen=True)
class Serving:
    """`prompts` of `prompt_len` tokens, answers of `answer_len` tokens on average, at most `concurrency` at once.

    `varied`: answers end by themselves, so the last ones run in small batches. `server`: asked over HTTP. `logprobs`:
    candidates told a token. `tensor`: cards that share each layer; `replicas`: whole engines beside each other.
    """

    shape: ModelShape
    prompts: float
    prompt_len: float
    answer_len: float
    concurrency: float
    varied: bool = False
    server: bool = False
    plain: bool = False
    logprobs: int = 0
    weight_bytes: float = 2.0
    four_bit: bool = False
    tensor: int = 1
    replicas: int = 1
    longest: float | None = None  # most tokens of an answer


def serving_s(card: Gpu, work: Serving) -> float:
    """Seconds until the last answer is written."""
    return sum(serving_parts(card, work).values())


def serving_parts(card: Gpu, work: Serving) -> dict[str, float]:
    """Seconds of prefill, of the decoding steps with all in flight, and of those in which the last answers end."""
    if work.replicas > 1:
        share = replace(
            work, replicas=1, prompts=work.prompts / work.replicas, concurrency=work.concurrency / work.replicas
        )
        return serving_parts(card, share)
    if work.plain:
        return _plain_parts(card, work)
    flight = in_flight(card, work)
    full = math.ceil(work.prompts / flight) if not work.varied else work.prompts / flight
    steps = full * work.answer_len
    prefill = prefill_s(card, work, work.prompts * work.prompt_len, _limits(card, work)[1])
    context = _context(work)
    if not work.varied or flight <= 1:
        in_last = work.prompts - (full - 1) * flight
        whole = (full - 1) * work.answer_len * decode_step_s(card, work, flight, context)
        return {"prefill": prefill, "decode": whole + work.answer_len * decode_step_s(card, work, in_last, context)}
    # once nobody waits any more those in flight leave one after the other
    end = min(work.answer_len * min(math.log(flight), TAIL_ANSWERS), work.longest or math.inf)
    pieces = 8
    tail, written = 0.0, 0.0
    for piece in range(pieces):
        alive = flight * math.exp(-(piece + 0.5) / pieces * end / work.answer_len)
        tail += end / pieces * decode_step_s(card, work, max(1.0, alive), work.prompt_len + 2 * work.answer_len)
        written += end / pieces * alive
    before = max(0.0, steps - written / flight) * decode_step_s(card, work, flight, context)
    shared = max(0.0, work.prompts - flight) * _shared_step_s(card, work, flight)
    return {"prefill": prefill, "decode": max(0.5 * before, before - shared), "tail": tail}


def in_flight(card: Gpu, work: Serving) -> float:
    """Answers an engine writes at once: asked for, allowed by its limits, held by its cache."""
    held = max(1.0, cache_tokens(card, work) / (work.prompt_len + work.answer_len))
    return max(1.0, min(work.concurrency, work.prompts, _limits(card, work)[0], held))


def _context(work: Serving) -> float:
    """Tokens behind a newly written one, on average: half an answer; where lengths vary, long ones stay longer."""
    return work.prompt_len + work.answer_len * (1.0 if work.varied else 0.5)


def cache_tokens(card: Gpu, work: Serving) -> float:
    """Tokens that the cache has room for, beside weights and what the engine's trial run takes."""
    shape, (sequences, tokens) = work.shape, _limits(card, work)
    weights = shape.params * work.weight_bytes
    widest = tokens * (3 * shape.intermediate + 4 * shape.hidden) * 2.0
    sampling = sequences * shape.vocab * 4.0 * 3
    room = card.vram_gib.value * GIB * MEMORY_SHARE - (weights + widest) / work.tensor - sampling - ENGINE_GIB * GIB
    return max(0.0, room * cache_shares(shape, work.tensor) / shape.kv_bytes(2))


def prefill_s(card: Gpu, work: Serving, tokens: float, at_once: float) -> float:
    """Seconds of reading `tokens` of prompts, `at_once` a step."""
    shape = work.shape
    chunk = min(at_once, tokens)
    if chunk <= 0:
        return 0.0
    layer = sum(product_s(card, chunk, a, b) for a, b in _sides(work))
    per_chunk = shape.layers * layer / PREFILL_SHARE
    width = shape.heads * shape.head_dim / work.tensor
    row = max(1.0, work.prompt_len)
    per_chunk += shape.layers * attention_s(card, chunk, row, width, eager=False, half=True, heads=shape.heads)
    per_chunk += memory_s(card, chunk * shape.layers * layer_bytes(_as_training(work)), chunk * shape.hidden * 2)
    per_chunk += 2 * shape.layers * _sum_s(card, work, chunk) + HOST_STEP_S
    return tokens / chunk * per_chunk


def decode_step_s(card: Gpu, work: Serving, flight: float, context: float) -> float:
    """Seconds of one step that writes a token of each of `flight` answers with `context` tokens behind them."""
    shape = work.shape
    layers = shape.layers * sum(_few_rows_s(card, work, flight, a, b) for a, b in _sides(work))
    layers += _more_experts(shape, flight) * work.weight_bytes / work.tensor / (bytes_s(card) * DECODE_SHARE)
    head = _few_rows_s(card, work, flight, shape.hidden, shape.vocab / work.tensor)
    cache = flight * context * shape.kv_bytes(2) / cache_shares(shape, work.tensor) / (bytes_s(card) * CACHE_SHARE)
    sampling = memory_s(card, flight * shape.vocab * SAMPLE_BYTES)
    kernels = shape.layers * GRAPH_KERNELS * KERNEL_S + 2 * shape.layers * _sum_s(card, work, flight)
    host = HOST_STEP_S + flight * HOST_SEQUENCE_S
    if work.logprobs:
        host += flight * (LOGPROBS_S + work.logprobs * LOGPROB_S)
    return layers + head + cache + sampling + kernels + host


def step_share(card: Gpu, work: Serving) -> float:
    """What one answer's decoding step takes of one with as many in flight as there can be."""
    context = _context(work)
    return decode_step_s(card, work, 1.0, context) / decode_step_s(card, work, in_flight(card, work), context)


def _more_experts(shape: ModelShape, rows: float) -> float:
    """Weights of the experts that `rows` tokens reach together, beyond those that one of them does."""
    experts = shape.experts
    if experts is None:
        return 0.0
    idle = 1.0 - experts.active / experts.routed
    reached = experts.routed * (1.0 - math.pow(idle, max(1.0, rows)))
    each = (3 if shape.gated else 2) * shape.hidden * experts.width
    return (shape.layers - experts.dense_layers) * each * max(0.0, reached - experts.active)


def _shared_step_s(card: Gpu, work: Serving, flight: float) -> float:
    """Seconds saved where a prompt is read in a step in which others write: the weights are read once for both."""
    rows, saved = work.prompt_len, 0.0
    for side_in, side_out in _sides(work):
        alone = _few_rows_s(card, work, flight, side_in, side_out)
        prompt = product_s(card, max(rows, 2048.0), side_in, side_out) * rows / max(rows, 2048.0) / PREFILL_SHARE
        saved += max(0.0, alone + prompt - _few_rows_s(card, work, flight + rows, side_in, side_out))
    return work.shape.layers * saved


def _few_rows_s(card: Gpu, work: Serving, rows: float, side_in: float, side_out: float) -> float:
    """Seconds of a product of few rows: its weights are read once, at least."""
    reading = side_in * side_out * (0.55 if work.four_bit else work.weight_bytes) / (bytes_s(card) * DECODE_SHARE)
    computing = product_s(card, rows, side_in, side_out) - KERNEL_S if rows > 32 else 0.0
    return max(reading, computing)


def _sides(work: Serving) -> list[tuple[float, float]]:
    shape = work.shape
    if shape.experts is None and shape.latent is None:
        return [(a, b / work.tensor) for a, b in shape.matrices().values()]
    per_layer = (shape.active_params - shape.vocab * shape.hidden) / shape.layers
    return [(shape.hidden, per_layer / shape.hidden / work.tensor)]


def _sum_s(card: Gpu, work: Serving, rows: float) -> float:
    """Seconds of one sum over the ranks of a layer."""
    if work.tensor == 1:
        return 0.0
    latency = TENSOR_SUM_S * (1 if card.link_gb_s.value >= 100 else 3)
    return latency + all_reduce_s(card, rows * work.shape.hidden * 2.0, work.tensor)


def _limits(card: Gpu, work: Serving) -> tuple[int, int]:
    large = card.vram_gib.value >= LARGE_CARD_GIB and not card.name.startswith("A100")
    if work.server:
        return SERVER_LIMITS_LARGE if large else SERVER_LIMITS
    return LIBRARY_LIMITS_LARGE if large else LIBRARY_LIMITS


def _as_training(work: Serving) -> Training:
    return Training(work.shape, 1, work.prompt_len or 1.0, fused=True, tensor=work.tensor)


def _plain_parts(card: Gpu, work: Serving) -> dict[str, float]:
    """transformers' generate: batches, each as long as its longest answer, kernels started from Python."""
    shape, batch = work.shape, max(1.0, min(work.concurrency, work.prompts))
    rounds = math.ceil(work.prompts / batch)
    longest = work.answer_len * (min(1 + math.log(batch) / 2, TAIL_ANSWERS) if work.varied else 1.0)
    longest = min(longest, work.longest or math.inf)
    context = work.prompt_len + longest / 2
    weights = shape.layers * sum(_few_rows_s(card, work, batch, a, b) for a, b in _sides(work))
    head = _few_rows_s(card, work, batch, shape.hidden, shape.vocab / work.tensor)
    passes = PLAIN_CACHE_PASSES + (shape.heads / shape.kv_heads if shape.kv_heads < shape.heads else 0.0)
    cache = passes * batch * context * shape.kv_bytes(2) / bytes_s(card)
    device = weights + head + cache + memory_s(card, batch * shape.vocab * SAMPLE_BYTES)
    if work.four_bit:  # unpacked for each use
        device += shape.params * 2.5 / bytes_s(card)
    step = max(device, shape.layers * GENERATE_LAYER_S)
    prefill = prefill_s(card, work, batch * work.prompt_len, batch * max(work.prompt_len, 1.0))
    return {"prefill": rounds * prefill, "decode": rounds * longest * step}
