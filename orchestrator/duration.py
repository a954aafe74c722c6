"""How long does a stage work? Low, expected, high, from counted operations and bytes at a stated efficiency. Pure.

A first model. Every constant that was measured or assumed stands at the top of this file, with how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.catalog import Gpu, ModelShape
from orchestrator.plan import Range

# --- this machine (infra: local). From steps timed on 2 cores, torch 2.13, transformers' Qwen2, while nothing else
# ran: 207 k parameters, 128 rows of 38 tokens 50 to 68 ms; 53 k parameters, 64 rows 18 ms; a token for 64 answers 3 ms,
# for 256 answers 12 ms. `local.gflops` in the recipe replaces the first constant.
LOCAL_GFLOPS = 110.0  # 1e9 operations a second that matrix products of small models reach
LOCAL_TRAIN_STEP_S = 0.012  # an optimizer step beside its products: Python, kernel starts, AdamW
LOCAL_TOKEN_STEP_S = 0.005  # a token of a whole batch of answers, beside its products
LOCAL_STAGE_S = 6.0  # process start, imports (3 to 4 s), data, models from and to the bucket, teardown
LOCAL_BARE_S = 1.5  # the same for a stage that needs no torch
LOCAL_SIDE_BY_SIDE = 0.58  # of a core more work for each further arm that trains at once (2 at once: 144 s in 91 s)
LOCAL_SPREAD = Range(0.6, 1.0, 2.0)  # other programs on the machine, turbo, memory speed

# --- rented GPUs. Share of the vendor's dense rate that training reaches (public reports for 1 to 8 B models, sdpa,
# no compile: 0.3 to 0.5), and share of the bandwidth that decoding reaches.
TRAIN_EFFICIENCY = Range(0.25, 0.38, 0.5)
QLORA_SLOWER = Range(1.0, 1.3, 2.0)  # weights are unpacked in each pass: assumed, not measured
SCORE_EFFICIENCY = Range(0.2, 0.3, 0.45)
DECODE_EFFICIENCY = Range(0.4, 0.6, 0.75)
GPU_LAYER_STEP_S = 0.0012  # floor of a forward and backward pass, a layer: kernel starts
# vLLM beside the bytes it reads: an H200 with a 1.5 B model gave 21,321 tokens/s at 256 and 26,003 at 1,024 sequences,
# that is 12 ms and 39 ms a step, of which reading weights and cache is 2 ms and 3 ms. Other hosts are faster or slower.
ENGINE_STEP_S = 0.002
ENGINE_SEQUENCE_STEP_S = 33e-6
ENGINE_HOST = Range(0.7, 1.0, 1.8)
ENGINE_MEMORY_SHARE = 0.9
ENGINE_MAX_SEQUENCES = 256
PLAIN_LAYER_STEP_S = 0.0006  # transformers' generate, a layer and token of the whole batch
GPU_STAGE = Range(60.0, 120.0, 300.0)  # imports, compile and warm-up of the engine, upload of results
DOWNLOAD_GB_S = Range(0.04, 0.1, 0.4)  # weights from the hub to a rented machine


@dataclass(frozen=True)
class Speed:
    """What a machine can do, as far as time depends on it. `bytes_s` 0: not known (a CPU)."""

    gpu: bool
    flops_s: float
    bytes_s: float = 0.0
    vram_bytes: float = 0.0


def gpu_speed(gpu: Gpu) -> Speed:
    return Speed(True, gpu.half_tflops.value * 1e12, gpu.bandwidth_gb_s.value * 1e9, gpu.vram_gib.value * 2**30)


def cpu_speed(gflops: float | None) -> Speed:
    return Speed(False, (gflops or LOCAL_GFLOPS) * 1e9)


def training_flops_per_token(shape: ModelShape, seq_len: float, *, full: bool, checkpointing: bool) -> float:
    """Operations for one trained token: forward 2 a parameter, backward 4 (2 where weights are frozen), attention.

    Causal attention adds 2 * layers * width * seq_len forward. Checkpointing repeats the forward pass.
    """
    forward = forward_flops_per_token(shape, seq_len)
    backward = 2 * forward if full else forward
    return forward + backward + (forward if checkpointing else 0.0)


def forward_flops_per_token(shape: ModelShape, seq_len: float) -> float:
    """Operations of one token's forward pass in a row of `seq_len` tokens."""
    return 2.0 * shape.active_params + 2.0 * shape.layers * shape.heads * shape.head_dim * seq_len


def training_s(
    speed: Speed,
    shape: ModelShape,
    *,
    steps: float,
    batch_size: int,
    micro_batch: int,
    mean_len: float,
    full: bool,
    checkpointing: bool,
) -> Range:
    """Seconds of `steps` optimizer steps over rows of `mean_len` tokens."""
    per_step = batch_size * mean_len * training_flops_per_token(shape, mean_len, full=full, checkpointing=checkpointing)
    if not speed.gpu:
        return _spread(steps * (per_step / speed.flops_s + LOCAL_TRAIN_STEP_S))
    floor = math.ceil(batch_size / micro_batch) * shape.layers * GPU_LAYER_STEP_S

    def at(efficiency: float) -> float:
        return steps * max(per_step / (speed.flops_s * efficiency), floor)

    return Range(at(TRAIN_EFFICIENCY.high), at(TRAIN_EFFICIENCY.expected), at(TRAIN_EFFICIENCY.low))


def side_by_side(arms: int) -> float:
    """The share of its time that a stage takes whose arms train `arms` at a time on a CPU."""
    return 1.0 / (1.0 + LOCAL_SIDE_BY_SIDE * (max(1, arms) - 1))


def generation_s(
    speed: Speed,
    shape: ModelShape,
    *,
    sequences: float,
    prompt_len: float,
    answer_len: float,
    longest: int,
    batch_size: int,
    engine: bool,
) -> Range:
    """Seconds to write `sequences` answers of `answer_len` tokens on average. `engine`: a paged-cache engine (vLLM);
    else transformers in batches, each as long as its longest answer, at most `longest`.
    """
    if not speed.gpu:
        rounds = math.ceil(sequences / batch_size)
        flops = sequences * (prompt_len + longest) * forward_flops_per_token(shape, prompt_len)
        return _spread(flops / speed.flops_s + rounds * longest * LOCAL_TOKEN_STEP_S)
    if engine:
        return _engine_s(
            speed, shape, sequences=sequences, prompt_len=prompt_len, answer_len=answer_len, batch_size=batch_size
        )
    rounds = math.ceil(sequences / batch_size)

    def at(efficiency: float) -> float:
        cache = min(batch_size, sequences) * (prompt_len + longest / 2) * shape.kv_bytes(2)
        step = max((shape.active_params * 2 + cache) / (speed.bytes_s * efficiency), shape.layers * PLAIN_LAYER_STEP_S)
        return rounds * longest * step

    return Range(at(DECODE_EFFICIENCY.high), at(DECODE_EFFICIENCY.expected), at(DECODE_EFFICIENCY.low))


def scoring_s(speed: Speed, shape: ModelShape, *, tokens: float, mean_len: float) -> Range:
    """Seconds of one forward pass over finished answers, for soft labels."""
    flops = tokens * forward_flops_per_token(shape, mean_len)
    if not speed.gpu:
        return _spread(flops / speed.flops_s)
    low, expected, high = SCORE_EFFICIENCY.high, SCORE_EFFICIENCY.expected, SCORE_EFFICIENCY.low
    return Range(*(flops / (speed.flops_s * efficiency) for efficiency in (low, expected, high)))


def stage_s(speed: Speed, *, downloads_gb: float, bare: bool = False) -> Range:
    """Seconds a stage takes beside its own work, its process start and fetching of weights included."""
    if not speed.gpu:
        return _spread(LOCAL_BARE_S if bare else LOCAL_STAGE_S)
    fetch = Range(
        downloads_gb / DOWNLOAD_GB_S.high, downloads_gb / DOWNLOAD_GB_S.expected, downloads_gb / DOWNLOAD_GB_S.low
    )
    return Range(2.0, 5.0, 15.0) if bare else GPU_STAGE + fetch


def hours(seconds: Range, calibration: float | None = None) -> Range:
    """Hours; `calibration` is the ratio of actual to predicted time seen before on such a machine."""
    return seconds.times((calibration or 1.0) / 3600)


def _engine_s(
    speed: Speed, shape: ModelShape, *, sequences: float, prompt_len: float, answer_len: float, batch_size: int
) -> Range:
    weights = shape.params * 2
    per_sequence = (prompt_len + answer_len) * shape.kv_bytes(2)
    room = speed.vram_bytes * ENGINE_MEMORY_SHARE - weights - 1.5 * 2**30
    flight = max(1.0, min(room / per_sequence, sequences, batch_size, ENGINE_MAX_SEQUENCES))
    tokens = sequences * answer_len
    prefill = sequences * prompt_len * forward_flops_per_token(shape, prompt_len)

    def at(efficiency: float, host: float) -> float:
        cache = flight * (prompt_len + answer_len / 2) * shape.kv_bytes(2)
        reading = (min(weights, shape.active_params * 2) + cache) / (speed.bytes_s * efficiency)
        computing = flight * forward_flops_per_token(shape, answer_len) / (speed.flops_s * efficiency)
        step = max(reading, computing) + host * (ENGINE_STEP_S + flight * ENGINE_SEQUENCE_STEP_S)
        return tokens / flight * step + prefill / (speed.flops_s * efficiency)

    return Range(
        at(DECODE_EFFICIENCY.high, ENGINE_HOST.low),
        at(DECODE_EFFICIENCY.expected, ENGINE_HOST.expected),
        at(DECODE_EFFICIENCY.low, ENGINE_HOST.high),
    )


def _spread(seconds: float) -> Range:
    return Range(seconds * LOCAL_SPREAD.low, seconds * LOCAL_SPREAD.expected, seconds * LOCAL_SPREAD.high)
