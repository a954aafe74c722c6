"""Predictions of cases, and their score beside the rules of others."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from orchestrator import estimate
from orchestrator.cases import Case, parse_case, read_cases
from orchestrator.cli import kdcloud
from orchestrator.estimate import (
    Estimate,
    Row,
    accelerate_gib,
    as_json,
    deepspeed_gib,
    percentile,
    render_scores,
    rows_of,
    score,
    scores,
)
from orchestrator.memory_cases import habits_of, parallel_of, predict
from orchestrator.plan import Range

ROOT = Path(__file__).parent.parent
CASES = ROOT / "benchmarks" / "cases"
LLAMA: dict[str, Any] = {
    "name": "l",
    "architecture": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # 1,100,048,384 parameters
TRAIN: dict[str, Any] = {
    "id": "a",
    "task": "train",
    "confidence": "high",
    "model": LLAMA,
    "method": "full",
    "weights_dtype": "bf16",
    "compute_dtype": "bf16",
    "optimizer": "adamw",
    "batch_size": 2,
    "seq_len": 512,
    "mean_tokens_per_sample": 512,
    "grad_accum": 1,
    "gradient_checkpointing": False,
    "chunked_loss": False,
    "gpu": "A100-80GB",
    "gpus": 1,
    "parallel": "none",
    "measured": {"peak_gib": 12.5, "memory_basis": "allocated", "tokens_per_s": 9000},
}


def case(**changes: Any) -> Case:
    return parse_case(json.dumps({**TRAIN, **changes}))


def test_a_prediction_is_the_same_without_what_was_measured() -> None:
    cases = [each for file in sorted(CASES.glob("*.jsonl")) for each in read_cases(file)]
    assert len(cases) > 40 and all(each.measured is not None for each in cases)
    for each in [case(), *cases]:
        other = replace(each, measured=replace(each.measured or case().measured, peak_gib=1.0, memory_basis=None))  # type: ignore[type-var]
        assert estimate.estimate(each) == estimate.estimate(replace(each, measured=None)) == estimate.estimate(other)


def test_a_line_holds_each_way_to_count_as_a_range() -> None:
    line = as_json(estimate.estimate(case()))
    assert set(line) >= {"id", "peak_gib", "tokens_per_s", "seconds", "step_seconds"}
    assert set(line["peak_gib"]) == {"allocated", "reserved", "process"}
    for found in (*line["peak_gib"].values(), line["tokens_per_s"], line["step_seconds"]):
        assert found["low"] <= found["expected"] <= found["high"]
    allocated, reserved, process = (line["peak_gib"][name]["expected"] for name in ("allocated", "reserved", "process"))
    assert allocated < reserved < process
    assert sum(line["peak_parts_gib"].values()) == pytest.approx(process, rel=1e-4)


def test_what_a_case_leaves_out_widens_its_range_and_costs_no_answer() -> None:
    known = predict(case())
    less = dict(TRAIN)
    for name in ("gradient_checkpointing", "batch_size", "chunked_loss", "weights_dtype", "seq_len", "grad_accum"):
        del less[name]
    vague = predict(parse_case(json.dumps(less)))
    bare = predict(parse_case(json.dumps({"id": "b", "task": "train", "model": LLAMA})))
    assert known is not None and vague is not None and bare is not None
    width = known.allocated.high / known.allocated.low
    assert vague.allocated.high / vague.allocated.low > 2 * width
    assert bare.allocated.low < known.allocated.expected < bare.allocated.high


def test_no_key_is_needed_but_id_task_and_model() -> None:
    lines = [json.loads(line) for file in sorted(CASES.glob("*.jsonl")) for line in file.read_text().splitlines()]
    dropped = 0
    for line in lines:
        for key in sorted(set(line) - {"id", "task", "model"}):
            made = as_json(estimate.estimate(parse_case(json.dumps({k: v for k, v in line.items() if k != key}))))
            assert made["peak_gib"]["process"] is not None or line["task"] == "generate"
            dropped += 1
    assert dropped > 1000


def test_a_round_length_is_a_limit_that_many_rows_reach() -> None:
    """litgpt with 4 bits holds the inputs of the micro-batch before, if that was as long; the range covers both."""
    source = "https://github.com/Lightning-AI/litgpt/blob/x/y.md"
    packed = {"source": source, "method": "qlora", "weights_dtype": "nf4", "lora": {"r": 8, "targets": ["q_proj"]}}
    packed |= {"chunked_loss": True, "mean_tokens_per_sample": None}
    limit, longest = predict(case(**packed, seq_len=512)), predict(case(**packed, seq_len=513))
    assert limit is not None and longest is not None
    assert limit.moment == "next forward" and longest.moment == "loss"
    assert limit.allocated.low < longest.allocated.expected < limit.allocated.expected < longest.allocated.high


def test_a_generating_case_without_lengths_has_no_memory() -> None:
    line = as_json(estimate.estimate(parse_case(json.dumps({"id": "b", "task": "generate", "model": LLAMA}))))
    assert line["peak_gib"] == {"allocated": None, "reserved": None, "process": None}


def test_an_engine_takes_its_share_of_the_card() -> None:
    served = {"id": "b", "task": "generate", "model": LLAMA, "engine": "vllm", "gpu": "A10G", "prompts": 4}
    found = predict(parse_case(json.dumps({**served, "input_tokens": 10, "output_tokens": 10})), 22.0)
    assert found is not None and found.reserved.expected == pytest.approx(0.9 * 22.0)
    plain = {**served, "engine": "transformers", "input_tokens": 10, "output_tokens": 10}
    written = predict(parse_case(json.dumps(plain)), 22.0)
    assert written is not None and written.allocated.expected == pytest.approx(2 * 1_100_048_384 / 2**30, rel=0.03)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://github.com/Lightning-AI/litgpt/blob/main/x.md", "litgpt"),
        ("https://github.com/pytorch/torchtune/blob/x/README.md", "torchtune"),
        ("https://github.com/AnswerDotAI/fsdp_qlora/blob/x/y.md", "fsdp_qlora"),
        ("https://github.com/huggingface/peft/blob/x/y.json", "peft"),
        ("https://example.org/blog", "transformers"),
        (None, "transformers"),
    ],
)
def test_whose_code_ran_is_read_from_the_source(source: str | None, name: str) -> None:
    assert habits_of(case(source=source)).name == name


@pytest.mark.parametrize(
    ("text", "found"),
    [("none", ("none", 1)), ("fsdp", ("fsdp", 1)), ("zero3", ("zero3", 1)), ("tp2+fsdp4", ("fsdp", 2)),
     ("tp8", ("none", 8))],
)  # fmt: skip
def test_ways_to_share_are_told_apart(text: str, found: tuple[str, int]) -> None:
    assert parallel_of(text) == found


# --- the rules of others; 1,100,048,384 parameters


@pytest.mark.parametrize(
    ("changes", "accelerate", "deepspeed"),
    [
        # half precision: twice the fp32 model, 8 bytes a parameter; ZeRO-2 on one GPU: 4 + 16 bytes
        ({}, 8 * 1_100_048_384, 20 * 1_100_048_384),
        ({"weights_dtype": "fp32", "compute_dtype": "fp32"}, 16 * 1_100_048_384, 20 * 1_100_048_384),
        ({"method": "qlora", "weights_dtype": "nf4"}, None, 20 * 1_100_048_384),
        # ZeRO-3 on 4: 18 / 4 bytes, and 4 of the largest matrix, 32,000 * 2,048
        ({"gpus": 4, "parallel": "zero3"}, 8 * 1_100_048_384, 18 / 4 * 1_100_048_384 + 4 * 65_536_000),
        ({"gpus": 4, "parallel": "ddp"}, 8 * 1_100_048_384, 8 * 1_100_048_384),
        # loading in bf16: half of the fp32 model
        ({"task": "generate"}, 2 * 1_100_048_384, None),
        ({"task": "generate", "weights_dtype": "int4"}, 0.5 * 1_100_048_384, None),
    ],
)
def test_public_rules_give(changes: dict[str, Any], accelerate: float | None, deepspeed: float | None) -> None:
    made = case(**changes)
    for found, expected in ((accelerate_gib(made), accelerate), (deepspeed_gib(made), deepspeed)):
        assert found == (None if expected is None else pytest.approx(expected / 2**30))


# --- the score


def row(measured: float, low: float, expected: float, high: float, **changes: Any) -> Row:
    return Row(case(**changes), "memory", "allocated", measured, Range(low, expected, high), accelerate=2 * measured)


def test_a_score_is_what_a_hand_comes_to() -> None:
    """Errors 0.1, 0.2, 0.05, 0.5: median 0.15, the 90th percentile the last; 3 of 4 not above high, 2 of 4 within."""
    rows = [row(10, 8, 11, 12), row(10, 7, 8, 9), row(10, 9, 9.5, 18), row(10, 14, 15, 16)]
    found = score("four", rows)
    assert (found.rows, found.median_error, found.p90_error) == (4, pytest.approx(0.15), pytest.approx(0.5))
    assert (found.below_high, found.in_range) == (0.75, 0.5)
    assert found.median_width == pytest.approx((9 / 7 + 1.5) / 2)  # of 16/14, 9/7, 12/8 and 18/9
    assert (found.accelerate_error, found.accelerate_rows) == (1.0, 4)
    assert (found.deepspeed_error, found.deepspeed_rows) == (None, 0)


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    assert percentile([float(n) for n in range(1, 11)], 0.9) == 9.0
    assert percentile([3.0], 0.9) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.0


def test_goals_are_about_rows_of_known_length_and_basis() -> None:
    assert row(10, 9, 10, 11).counts
    assert not row(10, 9, 10, 11, caveat="seq_len is the truncation length (upper bound)").counts
    assert not row(10, 9, 10, 11, confidence="medium").counts
    assert not replace(row(10, 9, 10, 11), basis="unknown").counts


def test_each_basis_is_compared_with_its_own_prediction() -> None:
    made = Estimate("a", allocated=Range(1, 1, 1), reserved=Range(2, 2, 2), process=Range(3, 3, 3))
    for basis, expected in (("allocated", 1), ("active", 1), ("reserved", 2), ("process", 3), ("unknown", 3)):
        (found,) = rows_of([case(measured={"peak_gib": 5.0, "memory_basis": basis})], lambda _: made)
        assert (found.basis, found.predicted.expected) == (basis, expected)


def test_every_measured_number_is_scored_once() -> None:
    rows = rows_of([case(), replace(case(), measured=None)])
    assert [each.what for each in rows] == ["memory", "tokens_per_s"]


# --- the command


def test_the_command_prints_a_json_line_a_case(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text("\n".join(json.dumps({**TRAIN, "id": name}) for name in "ab"))
    done = CliRunner().invoke(kdcloud, ["estimate", str(file), "--json"])
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["a", "b"]
    shown = CliRunner().invoke(kdcloud, ["estimate", str(file)])
    assert shown.exit_code == 0 and "allocated" in shown.stdout


def test_the_command_scores(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(TRAIN))
    done = CliRunner().invoke(kdcloud, ["estimate", str(file), "--score", "--json"])
    document = json.loads(done.stdout)
    assert document["schema"] == 1 and [each["what"] for each in document["rows"]] == ["memory", "tokens_per_s"]
    assert document["scores"][0]["group"].startswith("training memory: sure")
    shown = CliRunner().invoke(kdcloud, ["estimate", str(file), "--score"])
    assert shown.exit_code == 0 and "DeepSpeed" in shown.stdout


def test_a_group_is_told_in_one_line_or_two_however_wide_the_console_is() -> None:
    rows = [each for file in sorted(CASES.glob("memory*.jsonl")) for each in rows_of(read_cases(file))]
    for width, tables in ((80, 2), (120, 1)):
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
        render_scores(rows, console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert sum(line.startswith("group ") for line in lines) == tables
        assert sum("accelerate" in line and "DeepSpeed" in line for line in lines) == 1
        assert len(lines) < 1.4 * tables * len(scores(rows)) + 6


def test_a_key_that_nothing_uses_is_told_on_stderr(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps({**TRAIN, "offload": True}))
    done = CliRunner().invoke(kdcloud, ["estimate", str(file), "--json"])
    assert "a: not used: offload" in done.stderr and json.loads(done.stdout)["id"] == "a"


def test_the_page_holds_what_bench_plan_writes() -> None:
    check = [sys.executable, "scripts/bench_plan.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_goals_hold_on_the_packages_own_cases() -> None:
    """What docs/estimates.md says: rows of high confidence, exact length and known basis."""
    rows = [each for file in sorted(CASES.glob("memory*.jsonl")) for each in rows_of(read_cases(file))]
    counted = [each for each in rows if each.what == "memory" and each.counts and each.case.task == "train"]
    assert len(counted) >= 20
    found = score("goals", counted)
    assert found.median_error <= 0.05 and found.p90_error <= 0.12
    assert found.below_high >= 0.97 and found.median_width <= 1.3
