"""Does what tests can only try on a CPU work on a GPU: 4-bit weights, 8-bit moments, a step repeated in less memory?

    python -m benchmarks.on_cuda [--out FOLDER]     # needs CUDA and bitsandbytes; ends with 1 where a check fails

Four layers of the 1.5B shape with random weights, LoRA r=8 on q/k/v, 8 samples of 1,024 tokens, 64 soft labels a token.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept, versions
from benchmarks.scoring import qwen
from benchmarks.training import BATCH, _examples
from tasks import models, train
from tasks.contract import LoraSettings, ModelSource

LAYERS, STEPS = 4, 12
HOW = train.Fit(
    steps=STEPS, batch_size=BATCH, micro_batch=BATCH, learning_rate=3e-3, alpha=0.7, temperature=2.0,
    use_mass_at_t=True, precision="bf16",
)  # fmt: skip
PICKED = torch.arange(BATCH)


def learner(folder: Path, *, four_bit: bool) -> tuple[Any, list[Any], float]:
    """(model with adapters, what is trained, GiB that it takes)."""
    before = torch.cuda.memory_allocated()
    base = models._pretrained(ModelSource(path=str(folder)), torch.bfloat16, four_bit)
    model = models.with_lora(base, LoraSettings(dropout=0.0), special_ids=[], seed=0)
    if not four_bit:
        model.to("cuda")
    held = (torch.cuda.memory_allocated() - before) / 2**30
    return model.train(), [p for p in model.parameters() if p.requires_grad], held


def learning(folder: Path, *, four_bit: bool, optimizer: str) -> dict[str, Any]:
    """The loss of one batch before and after some steps on it alone."""
    model, weights, held = learner(folder, four_bit=four_bit)
    how = replace(HOW, optimizer=optimizer)
    named = {str(n): p for n, p in enumerate(weights)}
    steps, seen = train._optimizer(named, how, torch.device("cuda")), []
    for _ in range(STEPS):
        loss, _ = train.accumulate(model, _examples(), PICKED, how)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        steps.step()
        steps.zero_grad(set_to_none=True)
        seen.append(float(loss.total))
    moments = [v for state in steps.state.values() for v in state.values() if torch.is_tensor(v) and v.numel() > 1]
    kinds = sorted({str(v.dtype).removeprefix("torch.") for v in moments})
    return {"first_loss": seen[0], "last_loss": seen[-1], "model_gib": round(held, 3), "moments": "+".join(kinds)}


def short_of_memory(folder: Path) -> dict[str, Any]:
    """A step that may take what a quarter of it needs, against the same step with all memory."""
    model, weights, _ = learner(folder, four_bit=False)
    data = _examples()

    def gradients(how: train.Fit) -> tuple[torch.Tensor, int]:
        _, _, after = train.accumulate_within_memory(model, data, PICKED, how)
        found = torch.cat([p.grad.flatten().double() for p in weights])
        model.zero_grad(set_to_none=True)
        return found, after.micro_batch

    wanted, _ = gradients(HOW)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    gradients(replace(HOW, micro_batch=2))
    limit = torch.cuda.max_memory_reserved() * 1.15
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    got, micro = gradients(HOW)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"micro_batch_after": micro, "gradient_difference": float((got - wanted).norm() / wanted.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        qwen(LAYERS).save_pretrained(folder)
        rows: list[dict[str, Any]] = [
            {"check": "bf16, AdamW", **learning(folder, four_bit=False, optimizer="adamw")},
            {"check": "bf16, 8-bit AdamW", **learning(folder, four_bit=False, optimizer="adamw_8bit")},
            {"check": "NF4, 8-bit AdamW", **learning(folder, four_bit=True, optimizer="adamw_8bit")},
            {"check": "short of memory", **short_of_memory(folder)},
        ]
    for row in rows[:3]:
        row["good"] = row["last_loss"] < row["first_loss"]
    rows[2]["good"] &= rows[2]["model_gib"] < rows[0]["model_gib"]
    rows[3]["good"] = 1 <= rows[3]["micro_batch_after"] < BATCH and rows[3]["gradient_difference"] < 0.02
    shape = f"{LAYERS} layers of Qwen2.5-1.5B's shape, random weights, LoRA r=8 on q/k/v"
    kept("on_cuda", rows, parsed.out, shape=shape, versions=versions("transformers", "peft", "bitsandbytes"))
    sys.exit(0 if all(row["good"] for row in rows) else 1)


if __name__ == "__main__":
    main()
