"""How fast is the scoring pass: top-64 log-probabilities, tail mass and mass at T of finished text, on one GPU?

    python -m benchmarks.scoring [--out FOLDER]     # needs CUDA; random weights at the 1.5B shape of Qwen2.5

Tokens of prompts are counted: they are computed too. Beside it the plain way: transformers' forward pass with all the
head's work in torch, in chunks of 2,048 rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import kept, versions
from tasks import label, models

K, T = 64, 2.0
PROMPT, COMPLETION, SAMPLES = 128, 256, 512
REAL = 151_665  # ids of Qwen2.5's tokenizer; the head is wider


def qwen(layers: int = 28) -> nn.Module:
    """Qwen2.5-1.5B's published shape, random weights, bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2", vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def samples(count: int) -> list[tuple[list[int], list[int]]]:
    ids = torch.randint(0, REAL, (count, PROMPT + COMPLETION), generator=torch.Generator().manual_seed(0)).tolist()
    return [(row[:PROMPT], row[PROMPT:]) for row in ids]


@torch.inference_mode()
def plain(model: nn.Module, pairs: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    found = []
    for at in range(0, len(pairs), 42):
        part = pairs[at : at + 42]
        ids = torch.tensor([p + c for p, c in part], device="cuda")
        hidden = models.hidden_states(model, ids)[:, PROMPT - 1 : -1].reshape(-1, 1536)
        for rows in hidden.split(2048):
            z = (rows @ models.head_weight(model).T).float()
            top, places = z.topk(K, 1)
            found.append((top - torch.logsumexp(z, 1, keepdim=True)).cpu())
            found.append(places.int().cpu())
    return found


def ours(model: nn.Module, pairs: list[tuple[list[int], list[int]]]) -> None:
    for batch in label.batches([len(p) + len(c) for p, c in pairs], label.SCORE_TOKENS):
        label.score(model, [pairs[i] for i in batch], K, T, real_vocabulary=REAL)


def agreement(model: nn.Module) -> dict[str, float]:
    """Largest difference from plain torch on the same hidden states, and the share of rows with the same ids."""
    hidden = torch.randn(2048, 1536, device="cuda", generator=torch.Generator("cuda").manual_seed(3)).bfloat16() * 3
    head = models.head_weight(model)
    ids, logp, tail, mass = label._top(hidden, head, K, T, REAL)
    z = torch.mm(hidden, head.T, out_dtype=torch.float32).double()
    lse = torch.logsumexp(z, 1, keepdim=True)
    top, there = z[:, :REAL].topk(K, 1)
    rest = torch.logsumexp(z.scatter(1, there, float("-inf")), 1) - lse[:, 0]
    at_t = torch.logsumexp(top / T, 1) - torch.logsumexp(z / T, 1)
    return {
        "rows_with_the_same_ids": float((ids.long().sort(1).values == there.sort(1).values).all(1).double().mean()),
        "log_probability": float((logp - (top - lse)).abs().max()),
        "log_tail_mass": float((tail - rest).abs().max()),
        "log_mass_at_t": float((mass - at_t).abs().max()),
    }  # fmt: skip


def timed(work: Any, tokens: int) -> tuple[float, float]:
    """(tokens/s of the median of three warm runs, seconds of the first one)"""
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return tokens / sorted(seconds[1:])[1], seconds[0]


def profile(work: Any, top: int = 16) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    work()
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events)
    print(f"GPU busy {total / 1e3:.1f} ms")
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:top]:
        print(f"  {event.self_device_time_total / total:6.1%} {event.count:5d} {event.key[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true")
    parsed = parser.parse_args()
    model = qwen()
    print("agreement", {name: f"{value:.3g}" for name, value in agreement(model).items()})
    pairs = samples(SAMPLES)
    tokens = SAMPLES * (PROMPT + COMPLETION)
    rows = []
    for name, work in (("plain", plain), ("kdcloud", ours)):
        speed, first = timed(lambda work=work: work(model, pairs), tokens)
        rows.append({"pass": name, "tokens_per_s": round(speed), "first_run_s": round(first, 1)})
    models.compile_layers(model)
    speed, first = timed(lambda: ours(model, pairs), tokens)
    rows.append({"pass": "kdcloud, layers compiled", "tokens_per_s": round(speed), "first_run_s": round(first, 1)})
    if parsed.profile:
        profile(lambda: ours(model, pairs[:84]))
    kept(
        "scoring", rows, parsed.out, agreement=agreement(model), shape="Qwen2.5-1.5B, random weights, bf16",
        prompt=PROMPT, completion=COMPLETION, samples=SAMPLES, k=K, versions=versions("transformers", "triton"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
