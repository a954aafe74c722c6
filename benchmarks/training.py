"""How fast is a training step, how much memory does it take? LoRA of the 1.5B shape on one GPU, beside TRL's trainer.

    python -m benchmarks.training [--out FOLDER]     # needs CUDA; TRL and Liger-Kernel are measured where installed

Ours learns from 64 soft labels a token, TRL's SFT trainer from the tokens alone. Random weights at the published shape;
8 sequences of 1,024 tokens a step, bf16, r=8 on q/k/v, dropout 0. Steps before the first timed one are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import kept, measured, versions
from benchmarks.scoring import REAL, qwen
from tasks import models, train
from tasks.contract import LoraSettings

BATCH, LENGTH, K = 8, 1024, 64
WARM, TIMED = 6, 20


def ours(*, checkpointing: bool, compiled: bool) -> dict[str, Any]:
    """Steps of tasks.train's own loop: batch, loss, backward, clipping, AdamW."""
    clock = Clock(WARM)
    step = _step(checkpointing=checkpointing, compiled=compiled)
    for n in range(WARM + TIMED):
        clock.step(n)
        step(n)
    return clock.result(TIMED * BATCH * LENGTH)


def _step(*, checkpointing: bool, compiled: bool) -> Callable[[int], None]:
    base: Any = qwen().train()
    model = models.with_lora(base, LoraSettings(dropout=0.0), special_ids=[], seed=0)
    if checkpointing:
        models.checkpoint_layers(model, frozen=True)
    if compiled:
        models.compile_layers(model)
    if checkpointing or compiled:
        base.enable_input_require_grads()
    examples = _examples()
    how = train.Fit(
        steps=WARM + TIMED, batch_size=BATCH, micro_batch=BATCH, learning_rate=1e-4, alpha=0.7, temperature=2.0,
        use_mass_at_t=True, precision="bf16",
    )  # fmt: skip
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    class Cycle(train.Order):
        def at(self, step: int) -> Tensor:
            return torch.arange(step % 4 * BATCH, step % 4 * BATCH + BATCH)

    ahead = train.Ahead(model, examples, Cycle(len(examples), BATCH, 0))

    def step(n: int) -> None:
        picked, batches = ahead.at(n, how)
        train.accumulate(model, examples, picked, how, None, batches)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


KERNELS = (  # a part of the name of a CUDA kernel -> what it does; the first that fits
    ("flash", "attention"), ("fmha", "attention"), ("gemm", "matrix products"), ("cutlass", "matrix products"),
    ("nvjet", "matrix products"), ("xmma", "matrix products"), ("splitK", "matrix products"),
    ("_loss", "rows of the loss"), ("loss_", "rows of the loss"), ("triton_", "norms, rotation, gate: fused"),
    ("multi_tensor", "optimizer and clipping"), ("adam", "optimizer and clipping"), ("Mem", "copies"),
)  # fmt: skip


def breakdown(*, checkpointing: bool, compiled: bool, steps: int = 3) -> dict[str, Any]:
    """Where a step's time goes, milliseconds, and what the matrix products alone would take at the card's rate.

    4N: two operations a weight forward and two back to the input (frozen weights get no gradient of their own), N
    parameters, the tied embedding once as the head; at the rate of an 8192 x 8192 x 8192 product in the same process.
    """
    from torch.profiler import ProfilerActivity, profile

    step = _step(checkpointing=checkpointing, compiled=compiled)
    for n in range(WARM):
        step(n)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for n in range(steps):
        step(WARM + n)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / steps * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for n in range(steps):
            step(WARM + steps + n)
        torch.cuda.synchronize()
    parts: dict[str, float] = {}
    for event in found.key_averages():
        kind = next((what for word, what in KERNELS if word in event.key), "single operations")
        parts[kind] = parts.get(kind, 0.0) + event.self_device_time_total / 1e3 / steps
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / measured(lambda: a @ a)[0] / 1e9
    ceiling = 4 * 1.5437e9 * BATCH * LENGTH / rate / 1e9
    told = {name: round(ms, 2) for name, ms in sorted(parts.items(), key=lambda item: -item[1])}
    idle = round(wall - sum(parts.values()), 2)
    return {
        "step_ms": round(wall, 2), **told, "GPU idle": idle, "4N ceiling_ms": round(ceiling, 2),
        "matmul_tflops": round(rate),
    }  # fmt: skip


def _examples() -> train.Examples:
    gen = torch.Generator().manual_seed(0)
    count = 4 * BATCH
    ids = torch.randint(0, REAL, (count * LENGTH,), generator=gen)
    rows = count * LENGTH
    logp = torch.log_softmax(torch.randn(rows, K + 1, generator=gen) * 3, 1)
    soft = (
        torch.randint(0, REAL, (rows, K), generator=gen, dtype=torch.int32), logp[:, :K].half(), logp[:, K],
        torch.full((rows,), -0.2),
    )  # fmt: skip
    return train.Examples(
        keys=[str(i) for i in range(count)], ids=ids, offsets=torch.arange(0, rows + 1, LENGTH),
        prompts=torch.ones(count, dtype=torch.long), rows=torch.arange(0, rows, LENGTH),
        soft=lambda at: tuple(part[at] for part in soft),
    )  # fmt: skip


def trl(*, checkpointing: bool, liger: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ids = torch.randint(0, REAL, (BATCH * (WARM + TIMED), LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    clock = Clock(WARM)

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step(state.global_step)

    trainer = SFTTrainer(
        model=qwen(), processing_class=models.tiny_tokenizer(), callbacks=[Timer()],
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
        args=SFTConfig(
            output_dir="/tmp/trl", per_device_train_batch_size=BATCH, max_steps=WARM + TIMED, bf16=True,
            max_length=LENGTH, gradient_checkpointing=checkpointing, use_liger_kernel=liger, report_to=[],
            save_strategy="no", logging_steps=1000, learning_rate=1e-4, disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )  # fmt: skip
    trainer.train()
    return clock.result(TIMED * BATCH * LENGTH)


class Clock:
    """Seconds from step number `warm` on, and the peak of the memory that torch allocated."""

    def __init__(self, warm: int) -> None:
        self.warm, self.born = warm, time.perf_counter()

    def step(self, step: int) -> None:
        if step == self.warm:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()

    def result(self, tokens: int) -> dict[str, Any]:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        return {
            "tokens_per_s": round(tokens / seconds),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
            "warm_up_s": round(self.began - self.born, 1),
        }


WAYS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "kdcloud, 64 soft labels": lambda checkpointing: ours(checkpointing=checkpointing, compiled=False),
    "kdcloud compiled, 64 soft labels": lambda checkpointing: ours(checkpointing=checkpointing, compiled=True),
    "TRL SFT, as it comes": lambda checkpointing: trl(checkpointing=checkpointing, liger=False),
    "TRL SFT with Liger": lambda checkpointing: trl(checkpointing=checkpointing, liger=True),
}


def in_a_process(module: str, words: list[str]) -> dict[str, Any]:
    """The last JSON line of `python -m module words`: nothing compiled or patched by another is left over."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": done.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(WAYS))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--breakdown", action="store_true", help="of ours alone, compiled and not")
    parsed = parser.parse_args()
    if parsed.breakdown:
        compiled = parsed.one is not None and "compiled" in parsed.one
        print(json.dumps(breakdown(checkpointing=parsed.checkpointing, compiled=compiled)))
        return
    if parsed.one:
        print(json.dumps(WAYS[parsed.one](parsed.checkpointing)))
        return
    rows = []
    for checkpointing in (False, True):
        for name in WAYS:
            words = ["--one", name, *["--checkpointing"] * checkpointing]
            rows.append({"trainer": name, "checkpointing": checkpointing, **in_a_process("benchmarks.training", words)})
            print(rows[-1], flush=True)
    where = in_a_process("benchmarks.training", ["--breakdown", "--one", list(WAYS)[1]])
    print("compiled, milliseconds of a step:", where, flush=True)
    kept(
        "training", rows, parsed.out, where_the_time_goes_ms=where,
        shape="Qwen2.5-1.5B, random weights, LoRA r=8 on q/k/v, bf16", batch=BATCH,
        length=LENGTH, k=K, versions=versions("transformers", "peft", "triton", "trl", "liger-kernel"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
