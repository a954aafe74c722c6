"""How much memory does a published case take? Allocated, reserved and process memory of one GPU. Pure.

What a case leaves out is taken as most people run it, and the range covers the other ways; `measured` is never read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cases import Case
from orchestrator.memory import (
    MLP_PARTS,
    READ_SPREAD,
    UNREAD_SPREAD,
    Memory,
    engine_memory,
    own_habits,
    step_memory,
)
from orchestrator.memory_generation import VLLM_SHARE, Generation, transformers_generation, vllm_need
from orchestrator.memory_training import (
    FSDP_QLORA,
    LITGPT,
    OURS,
    TORCHTUNE,
    TRANSFORMERS,
    WEIGHT_BYTES,
    Habits,
    Training,
    training_step,
)
from orchestrator.plan import Range

# Whose code ran, by what stands in a case's source. TRL is transformers, and with Liger-Kernel keeps the norms' inputs
# only, and gate and up; so do the fused kernels of TinyLlama's authors.
FRAMEWORKS: dict[str, Habits] = {
    "kdcloud, fixed segments": replace(OURS, cached_share=1.0),  # until its stages let PyTorch's segments grow
    "kdcloud": OURS,
    "trl with liger": replace(TRANSFORMERS, name="liger", norm="fused"),
    "lightning-ai/litgpt": LITGPT,
    "lightning.ai/pages/community/lora": LITGPT,
    "pytorch/torchtune": TORCHTUNE,
    "answerdotai/fsdp_qlora": FSDP_QLORA,
    "huggingface/peft": replace(TRANSFORMERS, name="peft", repeats_keys=True),
    "qwenlm/qwen/": replace(TRANSFORMERS, name="qwen", dropout=True),
    "whynlp/tinyllama": replace(TRANSFORMERS, name="fused kernels", norm="fused"),
    "jzhang38/tinyllama": replace(TRANSFORMERS, name="fused kernels", norm="fused"),
}
READ = ("litgpt", "torchtune", "fsdp_qlora", "kdcloud")  # frameworks whose training loop was read line by line
STATE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": None}


@dataclass(frozen=True)
class Peaks:
    """GiB of one GPU, and the parts of the peak."""

    allocated: Range
    reserved: Range
    process: Range
    parts: dict[str, float]
    moment: str


def predict(case: Case, card_gib: float | None = None) -> Peaks | None:
    """The peaks of a case; None where it does not say enough. `card_gib`: memory of its card."""
    found = _training(case, card_gib) if case.task == "train" else _generation(case, card_gib)
    if not found:
        return None
    first = found[0]
    ways = [(memory.allocated_gib, memory.reserved_gib, memory.process_gib) for memory in found]
    allocated, reserved, process = (_over([way[at] for way in ways]) for at in range(3))
    return Peaks(allocated, reserved, process, dict(first.parts_gib), first.moment)


def _over(ranges: list[Range | None]) -> Range:
    known = [each for each in ranges if each is not None]
    return Range(min(r.low for r in known), known[0].expected, max(r.high for r in known))


def habits_of(case: Case) -> Habits:
    """Of the code that ran, where the source tells; else of plain transformers."""
    source = (case.source or "").lower()
    return next((habits for part, habits in FRAMEWORKS.items() if part in source), TRANSFORMERS)


def _training(case: Case, card_gib: float | None) -> list[Memory]:
    made = []
    for job in trainings(case):
        spread = READ_SPREAD if job.habits.name in READ else UNREAD_SPREAD
        made.append(step_memory(training_step(job), spread, gpu=True, card_gib=card_gib, gpus=job.gpus))
    return made


def trainings(case: Case) -> Iterator[Training]:
    """The case as a training step, as most people run it, then with each thing that it leaves out the other way."""
    method = case.method or ("lora" if case.lora else "full")
    quantised = method == "qlora"
    choices: dict[str, tuple[Any, ...]] = {
        "weights": _known(case.weights_dtype, ("nf4",) if quantised else ("bf16", "fp32")),
        "batch": _known(case.batch_size, (1, 8)),
        "seq_len": _known(case.seq_len or _whole(case.mean_tokens_per_sample), (2048, 512, 4096)),
        "accumulation": _known(case.grad_accum, (1, 2)),
        "checkpointing": _known(case.gradient_checkpointing, (False, True)),
        "chunked_loss": _known(case.chunked_loss, (False, True)) if habits_of(case).name != "litgpt" else
                        (bool(case.chunked_loss),),
        "compiled": (bool(case.compile),),
        "repeated": _repeated(case),
    }  # fmt: skip
    for values in itertools.product(*choices.values()):
        yield _job(case, method, **dict(zip(choices, values, strict=True)))


def _repeated(case: Case) -> tuple[bool, ...]:
    """Whether one micro-batch after the other is as long as the longest: surely where all rows are, likely where
    `seq_len` is round and so a limit that many rows reach; the length of a longest sample comes once."""
    length = case.seq_len
    if length is None or length == case.mean_tokens_per_sample:
        return (True,)
    return (True, False) if length % 64 == 0 else (False, True)


def _known(value: Any, otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
    return otherwise if value is None else (value,)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _job(case: Case, method: str, *, weights: str, **settings: Any) -> Training:
    habits = habits_of(case)
    gpus, lora = case.gpus or 1, case.lora
    parallel, tensor = parallel_of(case.parallel or "none")
    compute = case.compute_dtype or ("bf16" if weights != "fp32" else "fp32")
    state = STATE_BYTES.get(case.optimizer_state_dtype or "")
    if method != "full" and habits.adapter_bytes == 4 and state == 2.0:
        habits = replace(habits, adapter_bytes=2)  # moments are made like the adapters
    if habits.name == OURS.name:
        share = habits.cached_share
        habits = own_habits(case.shape, settings["batch"] * settings["seq_len"], full=method == "full")
        habits = replace(habits, cached_share=share)
        settings["chunked_loss"] = True
    zero = parallel.startswith("zero")  # DeepSpeed holds fp32 master weights of what is trained
    again = bool(settings["checkpointing"]) and method != "full" and habits.name == OURS.name
    return Training(
        case.shape,
        method=method,
        rank=lora.r if lora else (0 if method == "full" else 16),
        targets=lora.targets if lora else ("q_proj", "v_proj"),
        weights=weights if weights in WEIGHT_BYTES else "bf16",
        compute_bytes=4 if compute == "fp32" else 2,
        autocast=compute != "fp32" and (weights == "fp32" or (method != "full" and habits.adapter_bytes == 4)),
        optimizer=(case.optimizer or "adamw").replace("adamw_8bit", "adamw8bit"),
        state_bytes=state,
        master_bytes=4.0 if zero and weights != "fp32" else 0.0,
        attention=case.attention or "sdpa",
        gpus=gpus,
        parallel=parallel,
        tensor_parallel=min(tensor, gpus),
        mlp_parts=MLP_PARTS if again else 1,
        habits=habits,
        **settings,
    )


def parallel_of(text: str) -> tuple[str, int]:
    """("fsdp", 2) of "tp2+fsdp4": how data parallel ranks share, and GPUs that share each product."""
    tensor, kind = 1, "none"
    for part in text.lower().split("+"):
        name = part.rstrip("0123456789") if part.startswith(("tp", "fsdp", "ddp")) else part
        if name == "tp":
            tensor = int(part[2:] or 1)
        else:
            kind = name
    return kind, tensor


def _generation(case: Case, card_gib: float | None) -> list[Memory]:
    prompt, answer = case.input_tokens, case.output_tokens
    flight = min(case.concurrency or case.prompts or 1, case.prompts or case.concurrency or 1)
    if prompt is None and answer is None:
        return []
    _, tensor = parallel_of(case.parallel or "none")
    weights = case.weights_dtype or case.compute_dtype or "bf16"
    job = Generation(
        case.shape,
        flight,
        prompt or 0.0,
        answer or 0.0,
        weights=weights if weights in WEIGHT_BYTES else "bf16",
        soft_labels=bool(case.soft_label_k),
        tensor_parallel=tensor,
    )
    if (case.engine or "vllm") == "transformers":
        return [step_memory(transformers_generation(job), READ_SPREAD, gpu=True, card_gib=card_gib)]
    least = vllm_need(replace(job, sequences=1)).allocated_gib
    return [_served(engine_memory(vllm_need(job)), least, card_gib)]


def _served(need: Memory, least_gib: float, card_gib: float | None) -> Memory:
    """An engine with a paged cache: it takes its share of the card, whatever it needs, and never less than one
    sequence takes."""
    if card_gib is None:
        return need
    share = VLLM_SHARE * card_gib
    taken = Range(max(least_gib * 0.9, 0.8 * card_gib), max(share, least_gib), 0.97 * card_gib)
    total = Range(taken.low + 0.3, min(taken.expected + 1.0, card_gib), card_gib)
    return replace(need, allocated_gib=taken, reserved_gib=taken, process_gib=total)
