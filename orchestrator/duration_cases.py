"""How long does a case take? Tokens a second, seconds and step time of one published or measured configuration. Pure.

What a case leaves out is taken as most people run it; `measured` is never read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from orchestrator.cases import Case
from orchestrator.catalog import MODELS, ModelShape
from orchestrator.duration import OWN_HOST, SPREAD, around, gpu_speed, scoring_s
from orchestrator.duration_serving import Serving, serving_s
from orchestrator.duration_training import SLOW_HOST, Training, step_s
from orchestrator.gpus import GPUS, Gpu, gpu_named
from orchestrator.memory import MLP_PARTS
from orchestrator.plan import Range

USUAL_HOST = 1.25  # between a fast host and a slow one, nearer to the fast
OWN = "kdcloud"  # in a case's source: this package's code ran


@dataclass(frozen=True)
class Times:
    """Of a case; None where it does not say enough."""

    tokens_per_s: Range | None = None
    seconds: Range | None = None
    step_seconds: Range | None = None


def predict(case: Case) -> Times:
    """Tokens a second over all cards (trained, or written), seconds of the whole, seconds of an optimizer step."""
    card = card_of(case)
    if card is None:
        return Times()
    return _train(case, card) if case.task == "train" else _generate(case, card)


def card_of(case: Case) -> Gpu | None:
    """The case's card. Of an A100-80GB or an H100 the SXM form, which published measurements mean when they say nothing
    else."""
    found = gpu_named(case.gpu or "")
    return None if found is None else GPUS.get(f"{found.name}-SXM", found)


def shape_of(case: Case) -> ModelShape:
    """The case's shape; of a mixture of experts, which a case cannot describe, the catalogue's of that name."""
    known = {name.lower(): shape for name, shape in MODELS.items()}.get(case.shape.name.lower())
    return known if known is not None and known.experts is not None else case.shape


def training_of(case: Case) -> Training | None:
    """How the case trains; None where batch or length are not known."""
    length = case.mean_tokens_per_sample
    if length is None or case.batch_size is None:
        return None
    gpus = case.gpus or 1
    tensor, sharded = _parallel(case.parallel or "none", gpus)
    full, lora = (case.method or "full") == "full", case.lora
    stored = case.weights_dtype or ("bf16" if not full else "fp32" if sharded else "bf16")
    compute = case.compute_dtype or ("bf16" if stored != "fp32" else "fp32")
    compiled, chunked, own = bool(case.compile), bool(case.chunked_loss), _is_own(case)
    return Training(
        shape_of(case),
        case.batch_size,
        length,
        case.grad_accum or 1,
        full=full,
        lora_r=lora.r if lora else 0,
        lora_targets=lora.targets if lora else (),
        half=compute != "fp32",
        weight_bytes=4 if stored == "fp32" else 2,
        four_bit=stored if stored in ("nf4", "int4") else None,
        fp32_adapters=None if case.optimizer_state_dtype is None else case.optimizer_state_dtype == "fp32",
        optimizer="fused" if own and case.optimizer == "adamw" else _optimizer(case.optimizer or "adamw"),
        state_bytes=2.0 if case.optimizer_state_dtype in ("bf16", "fp16") else 4.0,
        checkpointing=bool(case.gradient_checkpointing),
        eager_attention=case.attention == "eager",
        fused=full and case.attention == "flash",
        compiled=compiled,
        mlp_parts=MLP_PARTS if own and case.gradient_checkpointing and not full else 1,
        loss="own" if own else "compiled" if compiled else "chunked" if chunked else "materialised",
        gpus=gpus,
        tensor=tensor,
        sharded=sharded,
    )


def _train(case: Case, card: Gpu) -> Times:
    work = training_of(case)
    if work is None:
        return Times()
    step = _step(card, work, _is_own(case))
    if case.gradient_checkpointing is None:  # it may have been on
        again = _step(card, replace(work, checkpointing=True), _is_own(case))
        step = Range(step.low, (step.expected + again.expected) / 2, again.high)
    rate = Range(work.tokens / step.high, work.tokens / step.expected, work.tokens / step.low)
    steps = case.steps if case.train_tokens is None else case.train_tokens / work.tokens
    return Times(rate, None if steps is None else step.times(steps), step)


def _step(card: Gpu, work: Training, own: bool) -> Range:
    """Seconds of a step on a host that nobody names: as far off as published ones were, or as long as on a slow one.
    Of this package's code as it is planned: orchestrator.duration.training_s."""
    if own:
        fast, slow = step_s(card, work), step_s(card, replace(work, host=SLOW_HOST))
        return Range(fast / SPREAD["train"], slow, slow * SPREAD["train"])
    usual = around(step_s(card, replace(work, host=USUAL_HOST)), "train")
    return Range(usual.low, usual.expected, max(usual.high, step_s(card, replace(work, host=SLOW_HOST))))


def serving_of(case: Case) -> Serving | None:
    """How the case writes; None where the number of prompts or the length of answers is not known.

    Means that are no whole numbers are of answers that ended by themselves.
    """
    if case.prompts is None or case.output_tokens is None:
        return None
    gpus, stored = case.gpus or 1, case.weights_dtype or "bf16"
    tensor, _ = _parallel(case.parallel or "none", gpus)
    plain = (case.engine or "vllm") in ("transformers", "hf", "huggingface")
    if plain:  # several cards hold a layer each, and wait for each other
        tensor = 1
    return Serving(
        shape_of(case),
        case.prompts,
        case.input_tokens or 1.0,
        case.output_tokens,
        case.concurrency or case.prompts,
        varied=case.output_tokens != round(case.output_tokens),
        server=True,
        plain=plain,
        logprobs=0 if _is_own(case) else case.soft_label_k or 0,  # this package scores in a pass of its own
        weight_bytes={"fp32": 4.0, "nf4": 0.55, "int4": 0.55, "fp8": 1.0, "int8": 1.0}.get(stored, 2.0),
        four_bit=stored in ("nf4", "int4"),
        tensor=tensor,
        replicas=1 if plain else max(1, gpus // tensor),
    )


def _generate(case: Case, card: Gpu) -> Times:
    work = serving_of(case)
    if work is None:
        return Times()
    if _is_own(case):
        return _label(case, card, work)
    seconds = serving_s(card, work)
    rate = work.prompts * work.answer_len / seconds
    return Times(around(rate, "generate"), around(seconds, "generate"))


def _label(case: Case, card: Gpu, work: Serving) -> Times:
    """Written, then scored: orchestrator.duration.generation_s and scoring_s."""
    seconds = around(serving_s(card, work), "generate", OWN_HOST)
    if case.soft_label_k:
        length = work.prompt_len + work.answer_len
        seconds += scoring_s(gpu_speed(card), work.shape, tokens=work.prompts * length, mean_len=length)
    written = work.prompts * work.answer_len
    return Times(Range(written / seconds.high, written / seconds.expected, written / seconds.low), seconds)


def _is_own(case: Case) -> bool:
    return OWN in (case.source or "").lower()


def _parallel(word: str, gpus: int) -> tuple[int, str | None]:
    """(tensor-parallel ranks, how the weights are sharded over the others) of `tp2+fsdp4`, `zero3` and the like."""
    found = re.search(r"tp(\d+)", word)
    tensor = min(gpus, int(found[1])) if found else 1
    return tensor, next((kind for kind in ("fsdp", "zero3") if kind in word), None)


def _optimizer(word: str) -> str:
    plain = word.lower().replace("_", "").replace("-", "")
    return "8bit" if "8bit" in plain else "sgd" if plain.startswith("sgd") else "unknown"
