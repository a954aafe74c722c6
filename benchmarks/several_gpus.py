"""How much faster are two GPUs of one machine than one, and how much of each do they take? Beside what plans say.

    python -m benchmarks.several_gpus [--out FOLDER]     # needs CUDA and two GPUs; three minutes

Training steps of the project's own loop: LoRA r=8 on q/k/v with the whole model on each GPU, and every weight in shards
(FSDP), on one GPU and on all of them. Random weights at the 1.5B shape, 8 sequences of 1,024 tokens a step, all of one
length, 64 soft labels a token, bf16. First the sum of 1 GiB over the GPUs: NCCL's bus bandwidth, on which times rest.
`--tiny` tries the script where there is no GPU, over gloo; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import kept, versions
from orchestrator import duration, memory
from orchestrator.catalog import ModelShape, shape_from_config
from orchestrator.duration_training import SLOW_HOST, step_s
from orchestrator.gpus import GPUS, gpu_named
from orchestrator.memory_training import training_step
from tasks import models, shard, train
from tasks.contract import LoraSettings
from tasks.peers import Peers, size_of

BATCH, LENGTH, K = 8, 1024, 64
WARM, TIMED = 4, 10
TARGETS = ("q_proj", "k_proj", "v_proj")
SUM_BYTES, SUMS = 2**30, 10
WAYS = ("lora", "full", "full, checkpointing")
SHAPE = {
    "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**SHAPE, "vocab_size": 512, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}


def model_of(shape: dict[str, Any], dtype: torch.dtype, device: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape), dtype=dtype)


def adapted(model: Any) -> Any:
    """With LoRA: peft's where it is installed, else the same products written out."""
    if find_spec("peft") is not None:
        return models.with_lora(model, LoraSettings(dropout=0.0, targets=TARGETS), special_ids=[], seed=0)
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in TARGETS:
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    return model


class Adapted(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(8, base.in_features, device=device) / base.in_features)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, 8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * (x.float() @ self.a.T @ self.b.T).to(x.dtype)


def examples(vocab: int, length: int) -> train.Examples:
    """As many samples as a step takes twice, all of one length."""
    gen = torch.Generator().manual_seed(0)
    rows = 2 * BATCH * length
    logp = torch.log_softmax(torch.randn(rows, K + 1, generator=gen) * 3, 1)
    soft = (
        torch.randint(0, vocab, (rows, K), generator=gen, dtype=torch.int32), logp[:, :K].half(), logp[:, K],
        torch.full((rows,), -0.2),
    )  # fmt: skip
    return train.Examples(
        keys=[str(n) for n in range(2 * BATCH)], ids=torch.randint(0, vocab, (rows,), generator=gen),
        offsets=torch.arange(0, rows + 1, length), prompts=torch.ones(2 * BATCH, dtype=torch.long),
        rows=torch.arange(0, rows, length), soft=lambda at: tuple(part[at] for part in soft),
    )  # fmt: skip


class Turns(train.Order):
    """The same two batches in turn."""

    def at(self, step: int) -> Tensor:
        return torch.arange(step % 2 * BATCH, step % 2 * BATCH + BATCH)


def steps(way: str, *, tiny: bool) -> dict[str, Any]:
    """Median seconds of a step and this process's peak, as the steps of tasks.train.fit go."""
    peers = Peers() if size_of(os.environ) > 1 else None
    device = "cpu" if not torch.cuda.is_available() else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    full, shape, length = way.startswith("full"), TINY if tiny else SHAPE, 32 if tiny else LENGTH
    low = torch.float32 if tiny else torch.bfloat16
    model: Any = model_of(shape, torch.float32 if full else low, device).train()
    if not full:
        model = adapted(model)
    if "checkpointing" in way:
        models.checkpoint_layers(model, frozen=not full)
    models.use_packing(model)
    if peers is not None and full:
        shard.shard(model, train.loss_of)
    how = train.Fit(
        steps=WARM + TIMED, batch_size=BATCH, micro_batch=max(1, BATCH // size_of(os.environ)), learning_rate=1e-4,
        alpha=0.7, temperature=2.0, use_mass_at_t=True, precision="auto" if tiny else "bf16", max_seq_len=length,
    )  # fmt: skip
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = train._optimizer(weights, how, torch.device(device))
    known = examples(shape["vocab_size"] - 8, length)
    ahead = train.Ahead(model, known, Turns(len(known), BATCH, 0), peers)
    model.train()
    seconds, loss = [], 0.0
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for n in range(WARM + TIMED):
        began = time.perf_counter()
        picked, batches = ahead.at(n, how)
        found, _, how = train.accumulate_within_memory(model, known, picked, how, peers, batches)
        torch.nn.utils.clip_grad_norm_(weights.values(), how.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(found.total)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = (0, 0) if device == "cpu" else (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    most = [peers.most(size) for size in peak] if peers is not None else list(peak)
    told = {
        "step_s": statistics.median(seconds[WARM:]), "slowest_step_s": max(seconds[WARM:]),
        "allocated_gib": most[0] / 2**30, "reserved_gib": most[1] / 2**30, "last_loss": loss,
    }  # fmt: skip
    if peers is not None:
        peers.leave()
    return told


def bus(*, tiny: bool) -> dict[str, Any]:
    """NCCL's bus bandwidth of an all-reduce, GB/s (1e9): 2 (n - 1) / n of the bytes over the time."""
    peers = Peers()
    device = "cpu" if not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}"
    held = torch.ones((SUM_BYTES if not tiny else 2**16) // 2, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        torch.distributed.all_reduce(held)
    if device != "cpu":
        torch.cuda.synchronize()
    peers.most(0)
    began = time.perf_counter()
    for _ in range(SUMS):
        torch.distributed.all_reduce(held)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / SUMS
    told = {"bus_gb_s": 2 * (peers.size - 1) / peers.size * held.nbytes / seconds / 1e9}
    peers.leave()
    return told


def predicted(way: str, gpus: int, card: str, *, tiny: bool) -> dict[str, Any]:
    """What plans rest on, for rows of one length: a step on a fast and on a slow host, and a GPU's memory."""
    shape, full, length = shape_of(TINY if tiny else SHAPE), way.startswith("full"), 32 if tiny else LENGTH
    micro, again = max(1, BATCH // gpus), "checkpointing" in way
    job = memory.own_training(
        shape, full=full, micro_batch=micro, seq_len=length, checkpointing=again, lora=(8, TARGETS), gpus=gpus
    )
    counted = training_step(job)
    found = memory.step_memory(counted, memory.READ_SPREAD, gpu=True, gpus=gpus)
    work = duration.own_step(
        shape, rows=micro, micro_batch=micro, mean_len=length, full=full, checkpointing=again, lora_targets=TARGETS,
        gpus=gpus,
    )  # fmt: skip
    assert found.allocated_gib is not None and found.reserved_gib is not None
    times = [step_s(GPUS[card], each) for each in (work, replace(work, host=SLOW_HOST))]
    return {
        "predicted_step_s": times[0], "on_a_slow_host_s": times[1], "peak_at": counted.peak,
        "predicted_allocated_gib": found.allocated_gib.expected, "predicted_reserved_gib": found.reserved_gib.expected,
    }  # fmt: skip


def shape_of(config: dict[str, Any]) -> ModelShape:
    return shape_from_config("1.5B", {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **config})


def in_processes(count: int, words: list[str]) -> dict[str, Any]:
    """The last JSON line of this script in `count` processes that work together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] * (count > 1)
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "benchmarks.several_gpus", *words],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": done.stderr.strip()[-1500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=[*WAYS, "bus"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
    parsed = parser.parse_args()
    if parsed.one:
        told = bus(tiny=parsed.tiny) if parsed.one == "bus" else steps(parsed.one, tiny=parsed.tiny)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(told), flush=True)
        return
    here = torch.cuda.device_count() if torch.cuda.is_available() else 2
    named = gpu_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    card = named.name if named is not None else "H100-SXM"
    tiny, rows = ["--tiny"] * parsed.tiny, []
    found = in_processes(here, ["--one", "bus", *tiny])
    print(f"the sum of 1 GiB over {here} GPUs:", found, flush=True)
    for way in WAYS:
        for gpus in (1, here):
            measured = in_processes(gpus, ["--one", way, *tiny])
            rows.append({"way": way, "gpus": gpus, **measured, **predicted(way, gpus, card, tiny=parsed.tiny)})
            print({name: value for name, value in rows[-1].items() if name != "failed"}, flush=True)
            if "failed" in measured:
                print(measured["failed"], flush=True)
    kept(
        "several_gpus", rows, parsed.out, link=found, link_assumed_gb_s=GPUS[card].link_gb_s.value, predicted_for=card,
        shape="Qwen2.5-1.5B, random weights, bf16; LoRA r=8 on q/k/v", batch=BATCH, length=LENGTH, k=K,
        versions=versions("transformers", "peft", "triton"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
