"""How long does a stage work? Low, expected, high: rooflines on a GPU, counted operations on this machine. Pure.

The rooflines are in duration_kernels, duration_training and duration_serving; the width of a range is what they missed
published measurements by (SPREAD).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.catalog import GPUS, Gpu, ModelShape
from orchestrator.duration_kernels import all_reduce_s, memory_s
from orchestrator.duration_serving import Serving, serving_s
from orchestrator.duration_serving import step_share as serving_step_share
from orchestrator.duration_training import SLOW_HOST, Training, forward_parts, micro_parts, one_micro_batch, step_s
from orchestrator.memory import MLP_PARTS
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

# --- rented GPUs. How far off the rooflines are, as factors of the time: within these lie 93 in 100 published rows, as
# seen from the rows of all other sources (scripts/time_spread.py over benchmarks/cases/times.jsonl).
SPREAD = {"train": 1.38, "generate": 1.39}
OWN_HOST = Range(0.9, 1.0, 1.25)  # generation and scoring on rented machines: hosts of one kind differ by a quarter
LOGIT_BYTES = 8.0  # scoring, a logit: written, read for its top candidates, read for the tail
SCORE_BATCH_TOKENS = 8192  # tasks.label scores about so many tokens at once
LENGTHS_DIFFER = 0.5  # standard deviation of the rows' lengths, of their mean: assumed, for answers of reasoning models
COMPILE_FROM_TOKENS = 5e6  # scoring compiles the layers from so many on (tasks.label: COMPILE_TOKENS)
GPU_STAGE = Range(30.0, 60.0, 180.0)  # process start, imports, weights onto the card
# vLLM 0.24 with a 1.5 B model on an H200: 75 s until it answers (weights, compiling, graphs); elsewhere assumed.
ENGINE_START_S = Range(40.0, 75.0, 180.0)
DOWNLOAD_GB_S = Range(0.04, 0.1, 0.4)  # weights from the hub to a rented machine
BUCKET_GB_S = Range(0.03, 0.1, 0.4)  # between a rented machine and the bucket: assumed


@dataclass(frozen=True)
class Speed:
    """What a machine can do, as far as time depends on it. `bytes_s` 0: not known (a CPU); `card`: with a GPU."""

    gpu: bool
    flops_s: float
    bytes_s: float = 0.0
    vram_bytes: float = 0.0
    card: Gpu | None = None


def gpu_speed(gpu: Gpu) -> Speed:
    return Speed(
        True, gpu.reached_tflops.value * 1e12, gpu.reached_gb_s.value * 1e9, gpu.vram_gib.value * 2**30, card=gpu
    )


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
    lora_r: int = 8,
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    half: bool = True,
    four_bit: bool = False,
    eight_bit: bool = False,
    compiled: bool = False,
    gpus: int = 1,
) -> Range:
    """Seconds of `steps` optimizer steps over rows of `mean_len` tokens, by the project's own training.

    `gpus` share the rows of a step. Expected as on the rented machines that were measured, whose hosts are slow; low as
    on a fast one.
    """
    if speed.card is None:
        per_row = mean_len * training_flops_per_token(shape, mean_len, full=full, checkpointing=checkpointing)
        return _spread(steps * (batch_size * per_row / speed.flops_s + LOCAL_TRAIN_STEP_S))
    work = own_step(
        shape, rows=math.ceil(batch_size / gpus), micro_batch=micro_batch, mean_len=mean_len, full=full,
        checkpointing=checkpointing, lora_r=lora_r, lora_targets=lora_targets, half=half, four_bit=four_bit,
        eight_bit=eight_bit, compiled=compiled, gpus=gpus,
    )  # fmt: skip
    steps *= longest_share(gpus, math.ceil(batch_size / gpus))
    fast, slow = _steps_s(speed.card.name, work)
    return Range(steps * fast / SPREAD["train"], steps * slow, steps * slow * SPREAD["train"])


def own_step(
    shape: ModelShape,
    *,
    rows: int,
    micro_batch: int,
    mean_len: float,
    full: bool,
    checkpointing: bool,
    lora_r: int = 8,
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    half: bool = True,
    four_bit: bool = False,
    eight_bit: bool = False,
    compiled: bool = False,
    gpus: int = 1,
) -> Training:
    """One optimizer step of tasks/train.py, `rows` of its rows on each of `gpus`.

    Full training on several is sharded, and moves weights and gradients in fp32 (tasks/shard.py); adapters' gradients
    are summed at the end of a step (tasks/peers.py: add).
    """
    micro_batch = min(micro_batch, rows)
    return Training(
        shape,
        micro_batch,
        mean_len,
        accumulation=math.ceil(rows / micro_batch),
        full=full,
        lora_r=0 if full else lora_r,
        lora_targets=() if full else lora_targets,
        half=half,
        weight_bytes=4 if full or not half else 2,
        four_bit="nf4" if four_bit else None,
        fp32_adapters=True,
        optimizer="8bit" if eight_bit else "fused",
        state_bytes=4.0,
        checkpointing=checkpointing,
        compiled=compiled,
        loss="own",
        mlp_parts=MLP_PARTS if checkpointing and not full else 1,
        gpus=gpus,
        sharded="fsdp" if full and gpus > 1 else None,
        moved_bytes=4.0 if full else 2.0,
        overlaps=False,
    )


def longest_share(gpus: int, rows: int) -> float:
    """How much longer than the mean the longest of `gpus` shares of `rows` rows is: all wait for it.

    The largest of n values lies about sqrt(2 ln n) / 1.4 standard deviations above their mean (0.8 of 2, 1.2 of 4,
    1.5 of 8; exactly 0.56, 1.03 and 1.42 of normal ones, and rows have a longer tail).
    """
    return 1.0 + LENGTHS_DIFFER * math.sqrt(2 * math.log(gpus) / rows) / 1.4


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
    gpus: int = 1,
    weight_bytes: float = 2.0,
) -> Range:
    """Seconds to write `sequences` answers of `answer_len` tokens on average. `engine`: a paged-cache engine (vLLM), on
    `gpus` that share each layer; else transformers. Both take batches one after the other, each as long as its longest
    answer, at most `longest`.
    """
    rounds = sequences / batch_size if engine else math.ceil(sequences / batch_size)
    if speed.card is None:
        flops = sequences * (prompt_len + longest) * forward_flops_per_token(shape, prompt_len)
        return _spread(flops / speed.flops_s + math.ceil(rounds) * longest * LOCAL_TOKEN_STEP_S)
    batch = min(float(batch_size), sequences)
    work = _serving(shape, batch, prompt_len, answer_len, longest, engine=engine, gpus=gpus, weight_bytes=weight_bytes)
    return around(max(rounds, sequences / batch) * _serving_s(speed.card.name, work), "generate", OWN_HOST)


def step_share(
    speed: Speed, shape: ModelShape, *, batch_size: float, prompt_len: float, answer_len: float, longest: int,
    gpus: int = 1, weight_bytes: float = 2.0,
) -> float:  # fmt: skip
    """The share of an engine's step that is the same for one answer as for a whole batch; 1 where it is not known."""
    if speed.card is None:
        return 1.0
    work = _serving(shape, batch_size, prompt_len, answer_len, longest, gpus=gpus, weight_bytes=weight_bytes)
    return _serving_step_share(speed.card.name, work)


def _serving(
    shape: ModelShape, batch: float, prompt_len: float, answer_len: float, longest: int, *, engine: bool = True,
    gpus: int = 1, weight_bytes: float = 2.0,
) -> Serving:  # fmt: skip
    return Serving(
        shape, batch, prompt_len, answer_len, batch, varied=answer_len < longest, plain=not engine, longest=longest,
        tensor=gpus, weight_bytes=weight_bytes,
    )  # fmt: skip


def scoring_s(speed: Speed, shape: ModelShape, *, tokens: float, mean_len: float, sharded: int = 1) -> Range:
    """Seconds of one forward pass over finished answers, for soft labels. `sharded`: GPUs that hold a part of every
    weight each, and gather them layer by layer for every batch; they have their own batches."""
    if speed.card is None or tokens <= 0:
        return _spread(tokens * forward_flops_per_token(shape, mean_len) / speed.flops_s)
    rows = max(1, round(SCORE_BATCH_TOKENS / mean_len))
    work = Training(shape, rows, mean_len, full=False, compiled=tokens >= COMPILE_FROM_TOKENS and sharded == 1)
    gathering = all_reduce_s(speed.card, 2.0 * shape.params, sharded) / 2  # taken as if nothing hid it
    batches = math.ceil(tokens / (rows * mean_len) / sharded) if sharded > 1 else tokens / (rows * mean_len)
    return around(batches * (_score_s(speed.card.name, work) + gathering), "generate", OWN_HOST)


def stage_s(speed: Speed, *, downloads_gb: float, bare: bool = False, engine: bool = False) -> Range:
    """Seconds a stage takes beside its own work, its process start and fetching of weights included."""
    if not speed.gpu:
        return _spread(LOCAL_BARE_S if bare else LOCAL_STAGE_S)
    if bare:
        return Range(2.0, 5.0, 15.0)
    return _gpu_stage_s(downloads_gb, engine)


@functools.lru_cache(4096)
def _gpu_stage_s(downloads_gb: float, engine: bool) -> Range:
    return GPU_STAGE + _fetch_s(downloads_gb) + (ENGINE_START_S if engine else Range(0.0, 0.0, 0.0))


def fetch_s(speed: Speed, gb: float) -> Range:
    """Seconds to fetch weights from the hub, of what stage_s holds."""
    return _fetch_s(gb) if speed.gpu else Range(0.0, 0.0, 0.0)


@functools.lru_cache(4096)
def _fetch_s(gb: float) -> Range:
    return Range(gb / DOWNLOAD_GB_S.high, gb / DOWNLOAD_GB_S.expected, gb / DOWNLOAD_GB_S.low)


def bucket_s(speed: Speed, gb: float) -> Range:
    """Seconds to read from the bucket and to write to it, beside what stage_s holds."""
    if not speed.gpu:
        return Range(0.0, 0.0, 0.0)
    return Range(gb / BUCKET_GB_S.high, gb / BUCKET_GB_S.expected, gb / BUCKET_GB_S.low)


def hours(seconds: Range) -> Range:
    return seconds.times(1 / 3600)


def around(seconds: float, kind: str, host: Range | None = None) -> Range:
    """The range of a time by the rooflines: as far off as they were on measurements of that kind."""
    spread, slower = SPREAD[kind], host or Range(1.0, 1.0, 1.0)
    return Range(seconds / spread * slower.low, seconds * slower.expected, seconds * spread * slower.high)


@functools.lru_cache(4096)
def _steps_s(card: str, work: Training) -> tuple[float, float]:
    """A step on a usual host and on a slow one: the same for every offer of a card."""
    micro = _micro_parts(card, one_micro_batch(work))
    return step_s(GPUS[card], work, micro), step_s(GPUS[card], replace(work, host=SLOW_HOST), micro)


@functools.lru_cache(4096)
def _micro_parts(card: str, work: Training) -> Mapping[str, float]:
    return micro_parts(GPUS[card], work)


@functools.lru_cache(4096)
def _serving_s(card: str, work: Serving) -> float:
    return serving_s(GPUS[card], work)


@functools.lru_cache(4096)
def _serving_step_share(card: str, work: Serving) -> float:
    return serving_step_share(GPUS[card], work)


@functools.lru_cache(4096)
def _score_s(card: str, work: Training) -> float:
    """One batch of finished answers read, and the head's values over all of it looked through."""
    tokens = work.micro_batch * work.length
    reading = sum(forward_parts(GPUS[card], work, head_rows=tokens).values())
    return reading + memory_s(GPUS[card], tokens * work.shape.vocab * LOGIT_BYTES)


def _spread(seconds: float) -> Range:
    return Range(seconds * LOCAL_SPREAD.low, seconds * LOCAL_SPREAD.expected, seconds * LOCAL_SPREAD.high)
