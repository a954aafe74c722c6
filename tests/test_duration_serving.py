"""How long writing answers takes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.catalog import MODELS
from orchestrator.duration_serving import (
    Serving,
    cache_tokens,
    decode_step_s,
    in_flight,
    prefill_s,
    serving_parts,
    serving_s,
)
from orchestrator.gpus import GPUS, Gpu

QWEN, LLAMA = MODELS["Qwen/Qwen2.5-1.5B"], MODELS["meta-llama/Llama-3.1-8B"]
A100, H200, A10G, L4 = GPUS["A100-80GB-SXM"], GPUS["H200"], GPUS["A10G"], GPUS["L4"]
OURS = Serving(QWEN, 256, 128, 256, 256)


def test_one_answer_is_bound_by_reading_the_weights() -> None:
    """Layers and head of an 8 B model, 7.50e9 weights, at 0.93 x 1735 GB/s; 32 x 14 kernels of 4 us, host 1.2 ms."""
    weights = 2 * (32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) + 4096 * 128256)
    step = decode_step_s(A100, Serving(LLAMA, 1, 1, 1, 1), 1, 0)
    assert step == pytest.approx(weights / (0.93 * 1735e9) + 32 * 14 * 4e-6 + 1.2e-3, rel=0.01)


def test_the_cache_is_what_the_weights_leave() -> None:
    """22 GiB x 0.9, less 16.06 GB of weights, 1.5 GiB beside torch, the trial run of 8,192 tokens, 256 sampled rows."""
    work = Serving(LLAMA, 1000, 200, 200, 1000)
    trial = 8192 * (3 * 14336 + 4 * 4096) * 2
    room = 22 * 2**30 * 0.9 - 2 * 8_030_261_248 - trial - 256 * 128256 * 4 * 3 - 1.5 * 2**30
    assert cache_tokens(A10G, work) == pytest.approx(room / 131_072)
    assert in_flight(A10G, work) == pytest.approx(room / 131_072 / 400)
    assert in_flight(H200, work) == 1000  # a large card's own limit is 1,024
    assert in_flight(A100, work) == 256
    assert in_flight(A100, replace(work, concurrency=16)) == 16


def test_prompts_are_read_at_the_cards_rate_or_never() -> None:
    """100,000 tokens of an 8 B model: 7.0e9 weights a token, twice, at up to 0.9 x 0.85 of 266e12."""
    seconds = prefill_s(A100, Serving(LLAMA, 100, 1000, 1, 100), 100_000, 8192)
    products = 100_000 * 2 * 6.98e9 / (266e12 * 0.9 * 0.85)
    assert products < seconds < 1.3 * products
    assert prefill_s(A100, OURS, 0, 8192) == 0.0


def test_the_last_answers_run_in_small_batches() -> None:
    even, varied = serving_parts(A100, OURS), serving_parts(A100, replace(OURS, varied=True))
    assert "tail" not in even and varied["tail"] > 0
    assert sum(varied.values()) > sum(even.values())
    many = serving_parts(A100, replace(OURS, varied=True, prompts=2560))
    ends = 256 * (1 - math.exp(-math.log(256)))  # mean answers' worth of steps that the last 256 write while they leave
    whole = (2560 - ends) * decode_step_s(A100, OURS, 256, 128 + 256)
    assert 0.9 * whole < many["decode"] < whole  # a prompt read beside others spares some of its weights' reading
    waiting = replace(OURS, shape=LLAMA, varied=True, prompts=480, concurrency=48)
    alone = 48 * 10 * 256 / 48 - 256 * (1 - math.exp(-math.log(48)))
    spared = alone * decode_step_s(A100, waiting, 48, 128 + 256) - serving_parts(A100, waiting)["decode"]
    weights = 2 * 6.98e9 / (0.93 * 1735e9)
    assert 0.3 * 432 * weights < spared < 1.01 * 432 * weights  # 432 prompts come while others write
    cut = serving_parts(A100, replace(OURS, varied=True, longest=300))
    assert sum(cut.values()) < sum(varied.values())


def test_several_cards_share_layers_or_take_whole_answers() -> None:
    one = serving_s(H200, replace(OURS, shape=LLAMA))
    assert one / 2 < serving_s(H200, replace(OURS, shape=LLAMA, tensor=2)) < one
    assert serving_s(H200, replace(OURS, shape=LLAMA, replicas=2)) < serving_s(H200, replace(OURS, shape=LLAMA))
    # through PCIe 64 sums of 60 us are waited for; kernels and the host are not shared
    alone, fixed = decode_step_s(A10G, Serving(LLAMA, 1, 1, 1, 1), 1, 0), 32 * 14 * 4e-6 + 1.2e-3
    shared = decode_step_s(A10G, Serving(LLAMA, 1, 1, 1, 1, tensor=2), 1, 0)
    assert shared == pytest.approx((alone - fixed) / 2 + fixed + 64 * 60e-6, rel=0.01)


def test_plain_generation_starts_its_kernels_from_python() -> None:
    """24 layers of 0.83 ms: 50 tokens a second, of which 49.94 were measured on an A100 (qwen.readthedocs.io v2.0)."""
    work = Serving(MODELS["Qwen/Qwen2-0.5B"], 1, 1, 2048, 1, plain=True)
    assert 2048 / serving_s(A100, work) == pytest.approx(49.94, rel=0.08)
    assert serving_s(A100, replace(work, plain=False)) < serving_s(A100, work) / 3


@pytest.mark.parametrize(
    ("prompts", "logprobs", "measured"),
    [(256, 0, (21_321, 30_507)), (1024, 0, (26_003, 28_897)), (256, 20, (6_670,)), (256, 64, (5_579, 6_644))],
)
def test_labelling_on_an_h200_takes_what_was_measured(prompts: int, logprobs: int, measured: tuple[int, ...]) -> None:
    """benchmarks/results/labelling.json and the run before it; 128 tokens of prompt, 256 new ones."""
    work = replace(OURS, prompts=prompts, concurrency=prompts, logprobs=logprobs)
    rate = prompts * 256 / serving_s(H200, work)
    assert 0.9 * min(measured) < rate < 1.1 * max(measured)


@given(
    card=st.sampled_from(list(GPUS.values())),
    prompts=st.integers(1, 2000),
    prompt=st.integers(1, 4000),
    answer=st.integers(1, 4000),
    concurrency=st.integers(1, 1024),
    varied=st.booleans(),
    plain=st.booleans(),
)
def test_more_work_takes_longer(
    card: Gpu, prompts: int, prompt: int, answer: int, concurrency: int, varied: bool, plain: bool
) -> None:
    work = Serving(QWEN, prompts, prompt, answer, concurrency, varied=varied, plain=plain)
    seconds = serving_s(card, work)
    assert seconds > 0
    assert serving_s(card, replace(work, prompts=2 * prompts)) >= seconds * 0.999
    assert serving_s(card, replace(work, answer_len=2 * answer)) > seconds
    assert serving_s(card, replace(work, logprobs=64)) >= seconds
