"""How long published and measured cases take, by the time model."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import duration
from orchestrator.cases import Case, Observed, read_cases
from orchestrator.duration_cases import card_of, predict, serving_of, training_of

ROOT = Path(__file__).parents[1]
CASES = read_cases(ROOT / "benchmarks" / "cases" / "times.jsonl")


@pytest.fixture(scope="module")
def spread() -> ModuleType:
    """scripts/time_spread.py"""
    spec = importlib.util.spec_from_file_location("time_spread", ROOT / "scripts" / "time_spread.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules["time_spread"] = module
    spec.loader.exec_module(module)
    return module


def case(like: str, **changes: object) -> Case:
    return replace(next(one for one in CASES if one.id == like), **changes)  # type: ignore[arg-type]


def test_the_published_times_are_met(spread: ModuleType) -> None:
    """Without calibration. Training: median 15 %, nine in ten 35 %; writing: median 20 %."""
    rows = spread.rows(CASES)
    errors = {
        kind: sorted(abs(math.expm1(row.off)) for row in rows if row.kind == kind) for kind in ("train", "generate")
    }
    assert (len(errors["train"]), len(errors["generate"])) == (31, 10)
    assert statistics.median(errors["train"]) <= 0.15
    assert errors["train"][math.ceil(0.9 * 31) - 1] <= 0.35
    assert statistics.median(errors["generate"]) <= 0.20


def test_nine_in_ten_published_times_lie_in_their_range() -> None:
    inside, widths = 0, []
    for one in CASES:
        assert one.measured is not None
        measured, times = one.measured, predict(one)
        value, span = (
            (measured.tokens_per_s, times.tokens_per_s)
            if measured.tokens_per_s
            else (measured.step_seconds, times.step_seconds)
        )
        assert span is not None and value is not None
        inside += span.low <= value <= span.high
        widths.append(span.high / span.low)
    assert len(widths) == 41
    assert inside >= 0.9 * 41
    assert statistics.median(widths) <= 2


def test_the_widths_are_those_that_the_cases_give(spread: ModuleType) -> None:
    """`python scripts/time_spread.py` prints them anew."""
    rows = spread.rows(CASES)
    for kind in ("train", "generate"):
        assert duration.SPREAD[kind] == pytest.approx(spread.spread([r for r in rows if r.kind == kind]), abs=0.01)


def test_the_page_names_every_row_that_is_far_off_and_the_scores(spread: ModuleType) -> None:
    page = (ROOT / "docs" / "time.md").read_text()
    told = re.findall(r"^\| ([a-z0-9.-]+) \| ([0-9]\.[0-9]{2}) \|", page, re.M)
    rows = spread.rows(CASES)
    far = {row.id: math.exp(row.off) for row in rows if abs(math.expm1(row.off)) > 0.145}
    assert {name: float(ratio) for name, ratio in told} == pytest.approx(far, abs=0.006)
    for kind, word in (("train", "training"), ("generate", "generation")):
        errors = sorted(abs(math.expm1(row.off)) for row in rows if row.kind == kind)
        line = next(line for line in page.splitlines() if line.startswith(f"| {word} | {len(errors)} |"))
        said = [float(one) for one in re.findall(r"([0-9.]+) %", line)]
        assert said[0] == pytest.approx(100 * statistics.median(errors), abs=0.06)
        assert said[1] == pytest.approx(100 * errors[math.ceil(0.9 * len(errors)) - 1], abs=0.06)


def test_a_width_is_made_of_the_other_sources_rows(spread: ModuleType) -> None:
    """Ten rows of two sources: of nine others, or one, half as much again as the largest; with two half is added."""
    rows = [spread.Row(f"a{i}", "train", "a", i / 100) for i in range(1, 10)] + [spread.Row("b", "train", "b", -0.5)]
    assert spread.left_out(rows) == pytest.approx({"a": 1.5 * 0.75, "b": 1.5 * 0.135})
    assert spread.quantile([0.1, -0.2, 0.3]) == pytest.approx(0.45)
    assert spread.quantile([i / 100 for i in range(1, 28)]) == pytest.approx(0.27)  # 0.93 x 28 is the 27th
    assert spread.quantile([i / 100 for i in range(1, 31)]) == pytest.approx(0.29)


def test_what_was_measured_is_never_looked_at() -> None:
    for one in CASES:
        assert predict(one) == predict(replace(one, measured=Observed(tokens_per_s=1.0), source="x", caveat="y"))


def test_seconds_steps_and_tokens_agree() -> None:
    one = case("peft-mm-lora-mlp-r10", train_tokens=None)
    times = predict(one)
    assert times.tokens_per_s and times.seconds and times.step_seconds
    assert times.seconds.expected == pytest.approx(5000 * times.step_seconds.expected)
    assert times.tokens_per_s.expected * times.step_seconds.expected == pytest.approx(4 * 209.9)
    assert times.tokens_per_s.low * times.step_seconds.high == pytest.approx(4 * 209.9)
    written = predict(case("mistral-4090-c48"))
    assert written.tokens_per_s and written.seconds
    assert written.tokens_per_s.expected * written.seconds.expected == pytest.approx(300 * 100.3)


@pytest.mark.parametrize("gone", ["gpu", "mean_tokens_per_sample", "batch_size"])
def test_what_cannot_be_known_gives_no_time(gone: str) -> None:
    assert predict(case("tt-3b-compile", **{gone: None})).tokens_per_s is None


@pytest.mark.parametrize("gone", ["prompts", "output_tokens"])
def test_writing_without_a_length_gives_no_time(gone: str) -> None:
    assert predict(case("mistral-4090-c48", **{gone: None})).tokens_per_s is None


def test_a_slow_host_is_within_the_range_where_kernels_are_short() -> None:
    """28 layers with three adapters, 4 x 210 tokens: on a slow host 2.4 x 2.6 ms a layer."""
    times = predict(case("peft-mm-lora-mlp-r10"))
    assert times.step_seconds is not None
    assert times.step_seconds.high >= 28 * 2.4 * (0.9 + 0.8 + 3 * 0.3) / 1000
    small = predict(case("peft-mm-lora-mlp-r10", batch_size=1)).step_seconds
    assert small is not None and small.high > 1.8 * small.expected > 1.8 * small.low


def test_what_is_left_out_widens_the_range() -> None:
    known, unknown = predict(case("tt-3b-compile")), predict(case("tt-3b-compile", gradient_checkpointing=None))
    assert known.step_seconds and unknown.step_seconds
    assert known.step_seconds.low == unknown.step_seconds.low and known.step_seconds.high < unknown.step_seconds.high


def test_every_other_key_may_be_missing() -> None:
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "cases" / "times.jsonl").read_text().splitlines()]
    needed = {"id", "task", "model", "gpu", "batch_size", "mean_tokens_per_sample", "prompts", "output_tokens"}
    from orchestrator.cases import parse_case

    for line in (lines[0], lines[-1], lines[16]):
        bare = parse_case(json.dumps({key: value for key, value in line.items() if key in needed}))
        assert predict(bare).tokens_per_s is not None


ODD = {
    "gpu": ["T4", "V100", "A800", "H100"],
    "gpus": [1, 3, 16, 64],
    "parallel": ["ddp", "zero2", "tp8", "tp2+fsdp4", "pp2"],
    "attention": ["eager", "flex"],
    "optimizer": ["sgd", "paged_adamw", "adamw8bit", "adafactor"],
    "compute_dtype": ["fp32", "fp16"],
    "weights_dtype": ["fp32", "nf4", "int8", "fp8"],
    "engine": ["transformers", "sglang"],
    "batch_size": [1, 512],
    "mean_tokens_per_sample": [1.0, 131_072.0],
    "concurrency": [1, 5000],
    "input_tokens": [0.0, 1e5],
    "output_tokens": [0.5, 1e5],
    "prompts": [1, 100_000],
    "soft_label_k": [0, 64],
    "gradient_checkpointing": [None, True],
}


@given(st.sampled_from(CASES), st.dictionaries(st.sampled_from(list(ODD)), st.integers(0, 9), max_size=6))
def test_whatever_a_case_says_its_ranges_are_in_order(one: Case, picked: dict[str, int]) -> None:
    odd = replace(one, **{key: ODD[key][place % len(ODD[key])] for key, place in picked.items()})  # type: ignore[arg-type]
    times = predict(odd)
    for span in (times.tokens_per_s, times.seconds, times.step_seconds):
        assert span is None or 0 < span.low <= span.expected <= span.high < float("inf")


@pytest.mark.parametrize(
    ("parallel", "gpus", "tensor", "sharded", "ranks"),
    [
        ("none", 1, 1, None, 1),
        ("ddp", 4, 1, None, 4),
        ("zero3", 4, 1, "zero3", 4),
        ("zero2", 4, 1, None, 4),
        ("tp2+fsdp4", 8, 2, "fsdp", 4),
        ("tp4", 4, 4, None, 1),
    ],
)
def test_how_cards_work_together(parallel: str, gpus: int, tensor: int, sharded: str | None, ranks: int) -> None:
    work = training_of(case("nemo-lora-llama3-70b", parallel=parallel, gpus=gpus))
    assert work is not None
    assert (work.tensor, work.sharded, work.ranks) == (tensor, sharded, ranks)


def test_a_published_h100_is_the_larger_form() -> None:
    card = card_of(case("tt-3b-compile", gpu="H100"))
    assert card is not None and card.name == "H100-SXM"


def test_answers_that_end_by_themselves_have_lengths_that_vary() -> None:
    for output, varied in ((128.0, False), (100.3, True)):
        work = serving_of(case("mistral-4090-c48", output_tokens=output))
        assert work is not None and work.varied is varied


def test_a_mixture_of_experts_is_the_catalogues() -> None:
    """A case has no place for experts: by its own shape all 671e9 parameters would be multiplied."""
    plain = case("qwen25-vllm-bs1-7B", gpu="H200", gpus=8, parallel="tp8")
    r1 = replace(plain, shape=replace(plain.shape, name="deepseek-ai/deepseek-r1"))
    work = serving_of(r1)
    assert work is not None and work.shape.experts is not None and work.shape.active_params < 40e9
    assert serving_of(plain).shape is plain.shape  # type: ignore[union-attr]


def test_transformers_gains_no_speed_from_a_second_card() -> None:
    one = predict(case("qwen25-vllm-bs1-7B", engine="transformers"))
    two = predict(case("qwen25-vllm-bs1-7B", engine="transformers", gpus=2, parallel="tp2"))
    assert one == two
