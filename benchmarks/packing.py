"""What does laying samples end to end save, and is each still as if alone? LoRA of the 1.5B shape on one GPU.

    python -m benchmarks.packing [--out FOLDER]     # needs CUDA from Ampere on

Steps of 64 samples between 64 and 2,048 tokens (log-uniform, the same for all), 64 soft labels a token, bf16, r=8 on
q/k/v. Padded ones go four at a time, alike lengths together; packed rows hold as many tokens as four of the longest.
Tokens are real ones, padding not counted. Each way in a process of its own; the first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept, versions
from benchmarks.scoring import REAL, qwen
from benchmarks.training import Clock, K, in_a_process
from tasks import models, train
from tasks.contract import LoraSettings

BATCH, MICRO, SHORTEST, LONGEST = 64, 4, 64, 2048
WARM, TIMED = 3, 6


def examples() -> train.Examples:
    gen = torch.Generator().manual_seed(0)
    count = BATCH * (WARM + TIMED)
    between = math.log(LONGEST) - math.log(SHORTEST)
    lengths = (math.log(SHORTEST) + between * torch.rand(count, generator=gen)).exp().long()
    lengths[0] = LONGEST
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    rows = int(offsets[-1])
    logp = torch.log_softmax(torch.randn(rows, K + 1, generator=gen) * 3, 1)
    ids = torch.randint(0, REAL, (rows, K), generator=gen, dtype=torch.int32)
    soft = (ids, logp[:, :K].half(), logp[:, K], torch.full((rows,), -0.2))
    return train.Examples(
        keys=[str(i) for i in range(count)], ids=torch.randint(0, REAL, (rows,), generator=gen), offsets=offsets,
        prompts=torch.ones(count, dtype=torch.long), rows=offsets[:-1], soft=lambda at: tuple(p[at] for p in soft),
    )  # fmt: skip


HOW = train.Fit(
    steps=WARM + TIMED, batch_size=BATCH, micro_batch=MICRO, learning_rate=1e-4, alpha=0.7, temperature=2.0,
    use_mass_at_t=True, precision="bf16", max_seq_len=LONGEST,
)  # fmt: skip


class InOrder(train.Order):
    def at(self, step: int) -> torch.Tensor:
        return torch.arange(step * BATCH, step * BATCH + BATCH)


def steps(*, packed: bool, compiled: bool, checkpointing: bool) -> dict[str, Any]:
    model, weights = _model(packed=packed, compiled=compiled, checkpointing=checkpointing)
    data = examples()
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    ahead = train.Ahead(model, data, InOrder(len(data), BATCH, 0))
    clock, tokens = Clock(WARM), 0
    for step in range(WARM + TIMED):
        clock.step(step)
        picked, batches = ahead.at(step, HOW)
        train.accumulate(model, data, picked, HOW, None, batches)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(data.lengths[picked].sum()) * (step >= WARM)
    return clock.result(tokens)


def cross_talk() -> dict[str, float]:
    """Relative L2 difference of a step's gradients from each sample alone in fp32: two layers of the same shape, since
    many layers of random weights make much of any rounding. `seeing_each_other`: what one long sample would give."""
    data = examples().take(range(MICRO * 2))
    wanted = _gradients(data, "fp32", packed=False, compiled=False)
    found = {
        "padded": _gradients(data, "bf16", packed=False, compiled=False),
        "packed": _gradients(data, "bf16", packed=True, compiled=False),
        "packed, compiled": _gradients(data, "bf16", packed=True, compiled=True),
    }
    real = train.Examples.batch

    def joined(self: train.Examples, *args: Any, **how: Any) -> train.Batch:
        made = real(self, *args, **how)
        return replace(made, runs=((1, made.ids.shape[1]),))

    train.Examples.batch = joined  # type: ignore[method-assign]
    found["seeing_each_other"] = _gradients(data, "bf16", packed=True, compiled=False)
    return {name: float((got - wanted).norm() / wanted.norm()) for name, got in found.items()}


def _gradients(data: train.Examples, precision: str, *, packed: bool, compiled: bool) -> torch.Tensor:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model, weights = _model(packed=packed, compiled=compiled, checkpointing=False, dtype=dtype, layers=2)
    train.accumulate(model, data, torch.arange(len(data)), replace(HOW, precision=precision))
    return torch.cat([p.grad.flatten().double() for p in weights])


def _model(
    *, packed: bool, compiled: bool, checkpointing: bool, dtype: torch.dtype = torch.bfloat16, layers: int = 28
) -> tuple[Any, list[Any]]:
    base: Any = qwen(layers).to(dtype).train()
    model = models.with_lora(base, LoraSettings(dropout=0.0), special_ids=[], seed=0)
    gen = torch.Generator("cuda").manual_seed(1)
    for name, p in model.named_parameters():  # adapters begin at 0, where half of their gradients are 0
        if "lora_B" in name:
            p.data.normal_(0.0, 0.01, generator=gen)
    if checkpointing:
        models.checkpoint_layers(model, frozen=True)
    if packed and not models.use_packing(model):
        raise SystemExit("this model does not pack here")
    if compiled:
        models.compile_layers(model)
    if checkpointing or compiled:
        base.enable_input_require_grads()
    return model, [p for p in model.parameters() if p.requires_grad]


WAYS = {
    "padded": {"packed": False, "compiled": False},
    "packed": {"packed": True, "compiled": False},
    "padded, compiled": {"packed": False, "compiled": True},
    "packed, compiled": {"packed": True, "compiled": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=[*WAYS, "cross-talk"])
    parser.add_argument("--checkpointing", action="store_true")
    parsed = parser.parse_args()
    if parsed.one == "cross-talk":
        print(json.dumps(cross_talk()))
        return
    if parsed.one:
        print(json.dumps(steps(**WAYS[parsed.one], checkpointing=parsed.checkpointing)))
        return
    rows = []
    for name, checkpointing in [*((name, False) for name in WAYS), ("packed, compiled", True)]:
        words = ["--one", name, *["--checkpointing"] * checkpointing]
        rows.append({"rows": name, "checkpointing": checkpointing, **in_a_process("benchmarks.packing", words)})
        print(rows[-1], file=sys.stderr, flush=True)
    kept(
        "packing", rows, parsed.out, cross_talk=in_a_process("benchmarks.packing", ["--one", "cross-talk"]),
        shape="Qwen2.5-1.5B, random weights, LoRA r=8 on q/k/v, bf16", batch=BATCH, micro_batch=MICRO,
        lengths=[SHORTEST, LONGEST], k=K, versions=versions("transformers", "peft", "triton"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
