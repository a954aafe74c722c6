"""What was run and measured? One case of training or generation a JSON line, as a typed value. Pure but for reading.

A key that is left out is None: not known. A wrong one is an error that names its line and key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.catalog import ModelShape
from orchestrator.errors import UsageError

TASKS = ("train", "generate")
METHODS = ("full", "lora", "qlora")
BASES = ("allocated", "reserved", "active", "process", "unknown")
UNGATED = ("phi", "gpt_neox", "falcon", "mpt", "gpt2", "gptj", "opt", "bloom", "gpt_bigcode", "starcoder2")
QKV_BIAS = ("qwen", "qwen2")
QK_NORM = ("qwen3",)


class CaseError(UsageError):
    """A line that is no case: which line, which key, what was expected."""


@dataclass(frozen=True)
class Lora:
    """Adapters: rank, and the matrices that have one (q/k/v/o/gate/up/down_proj, lm_head)."""

    r: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Observed:
    """What was measured; `peak_gib` of one GPU on `memory_basis`, seconds and tokens/s over all GPUs."""

    peak_gib: float | None = None
    memory_basis: str | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    step_seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """One configuration; `measured` is what came of it and never enters a prediction.

    `batch_size`: sequences of one micro-batch of one GPU, each of `seq_len` tokens where memory peaks. `weights_dtype`
    nf4 and int4: 4 bits. `parallel`: none, ddp, fsdp, zero2, zero3, tpA, tpA+fsdpB. Of generation: `input_tokens` and
    `output_tokens` are means of a prompt, `concurrency` requests in flight.
    """

    id: str
    task: str
    shape: ModelShape
    source: str | None = None
    confidence: str | None = None
    caveat: str | None = None
    method: str | None = None
    lora: Lora | None = None
    weights_dtype: str | None = None
    compute_dtype: str | None = None
    optimizer: str | None = None
    optimizer_state_dtype: str | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    mean_tokens_per_sample: float | None = None
    grad_accum: int | None = None
    gradient_checkpointing: bool | None = None
    attention: str | None = None
    chunked_loss: bool | None = None
    compile: bool | None = None
    gpu: str | None = None
    gpus: int | None = None
    parallel: str | None = None
    train_tokens: float | None = None
    steps: int | None = None
    engine: str | None = None
    engine_version: str | None = None
    prompts: int | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    concurrency: int | None = None
    soft_label_k: int | None = None
    measured: Observed | None = None
    unused: tuple[str, ...] = ()  # keys of the line that nothing here knows


def read_cases(path: str | Path) -> list[Case]:
    """The cases of a file, one JSON object a line; empty lines are skipped. Raises CaseError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise CaseError(f"cannot read {path}: {why}", hint="name a file of JSON lines, one case a line") from error
    return parse_cases(text.splitlines(), str(path))


def parse_cases(lines: Iterable[str], where: str = "cases") -> list[Case]:
    """The cases of `lines`. Raises CaseError on the first wrong one and on an id that comes twice."""
    cases: list[Case] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        case = parse_case(line, f"{where} line {number}")
        if case.id in seen:
            raise CaseError(f"{where} line {number}: id {case.id!r} is that of line {seen[case.id]}", hint="rename one")
        seen[case.id] = number
        cases.append(case)
    return cases


def parse_case(line: str, where: str = "case") -> Case:
    """One case of one JSON line. Raises CaseError."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise CaseError(f"{where}: not JSON: {error}", hint="one JSON object a line") from error
    if not isinstance(values, dict):
        raise CaseError(f"{where}: not a JSON object", hint="one JSON object a line")
    reader = _Reader(values, where)
    plain = {name: reader.value(name, kind) for kind, names in _PLAIN.items() for name in names}
    lora = reader.inner("lora")
    measured = reader.inner("measured")
    known = {field.name for field in fields(Case)} - {"shape", "unused"} | {"model"}
    return Case(
        id=reader.needed("id", str),
        task=reader.one_of("task", TASKS, needed=True) or "",
        shape=model_shape(reader.needed("model", dict), where),
        method=reader.one_of("method", METHODS),
        lora=Lora(lora.needed("r", int), lora.names("targets")) if lora else None,
        measured=_observed(measured) if measured else None,
        unused=tuple(sorted(set(values) - known)),
        **plain,
    )


_PLAIN: dict[type, tuple[str, ...]] = {
    str: (
        "source",
        "confidence",
        "caveat",
        "weights_dtype",
        "compute_dtype",
        "optimizer",
        "optimizer_state_dtype",
        "attention",
        "gpu",
        "parallel",
        "engine",
        "engine_version",
    ),
    int: ("batch_size", "seq_len", "grad_accum", "gpus", "steps", "prompts", "concurrency", "soft_label_k"),
    float: ("mean_tokens_per_sample", "train_tokens", "input_tokens", "output_tokens"),
    bool: ("gradient_checkpointing", "chunked_loss", "compile"),
}


def model_shape(model: Mapping[str, Any], where: str = "case") -> ModelShape:
    """The shape of a case's `model`. `params` counts where the layers are not those that the shape would give.

    `tie_word_embeddings` is as run: published parameters of a tied model that was run untied lack the head.
    """
    reader = _Reader(model, f"{where}: model")
    kind = (reader.value("architecture", str) or "llama").lower()
    hidden, heads = reader.needed("hidden_size", int), reader.needed("num_attention_heads", int)
    shape = ModelShape(
        reader.value("name", str) or "",
        hidden,
        reader.needed("intermediate_size", int),
        reader.needed("num_hidden_layers", int),
        heads,
        reader.value("num_key_value_heads", int) or heads,
        reader.value("head_dim", int) or hidden // heads,
        reader.needed("vocab_size", int),
        bool(reader.value("tie_word_embeddings", bool)),
        qkv_bias=kind in QKV_BIAS,
        qk_norm=kind in QK_NORM,
        source=where,
        architecture=kind,
        gated=kind not in UNGATED,
    )
    params, counted = reader.value("params", int), shape.params
    head = shape.vocab * shape.hidden
    if params is None or abs(params - counted) <= 0.001 * counted:
        return shape
    if not shape.tied and abs(params + head - counted) <= 0.005 * counted:
        params += head
    return replace(shape, fixed_params=params, fixed_active_params=params if shape.tied else params - head)


def _observed(reader: _Reader) -> Observed:
    numbers = ("peak_gib", "tokens_per_s", "seconds", "step_seconds")
    return Observed(
        memory_basis=reader.one_of("memory_basis", BASES), **{name: reader.value(name, float) for name in numbers}
    )


class _Reader:
    """Takes values out of a JSON object and says where a wrong one stands."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def value(self, key: str, kind: type) -> Any:
        """The value, or None where it is left out or null."""
        value: Any = self._values.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not kind:
            raise self._wrong(key, f"is {value!r}, not {_KINDS[kind]}")
        if kind in (int, float) and not _counts(value, zero=key in _MAY_BE_ZERO):
            raise self._wrong(key, f"is {value!r}, not above 0")
        return value

    def needed(self, key: str, kind: type) -> Any:
        value = self.value(key, kind)
        if value is None:
            raise self._wrong(key, "is missing")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], *, needed: bool = False) -> str | None:
        value: str | None = (self.needed if needed else self.value)(key, str)
        if value is not None and value not in allowed:
            raise self._wrong(key, f"is {value!r}, not one of {', '.join(allowed)}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        values = self._values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self._wrong(key, f"is {values!r}, not a list of names")
        return tuple(values)

    def inner(self, key: str) -> _Reader | None:
        values = self.value(key, dict)
        return None if values is None else _Reader(values, f"{self._where}: {key}")

    def _wrong(self, key: str, what: str) -> CaseError:
        return CaseError(f"{self._where}: {key} {what}", hint="docs/estimates.md lists the keys of a case")


def _counts(value: Any, *, zero: bool) -> bool:
    return 0 < value < float("inf") or (zero and value == 0)


_MAY_BE_ZERO = ("input_tokens", "soft_label_k")
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
