"""How are teacher labels stored? Shards of safetensors with a header, and the set of them that training reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tasks.contract import TaskError

LABELS_SCHEMA = 1
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Header:
    """What every label of a shard has in common. Shards of one stage have equal headers."""

    teacher: str
    ordinary_sha256: str  # id -> bytes of the ordinary vocabulary
    special_sha256: str  # special tokens and template
    top_k: int  # 0 = hard labels only
    temperature: float  # T of log_mass_at_t
    schema: int = LABELS_SCHEMA


@dataclass(frozen=True)
class Sample:
    """One kept completion with its soft labels; row j is the teacher's distribution of completion_ids[j]."""

    key: str
    prompt_ids: Tensor  # [P]
    completion_ids: Tensor  # [C], end of sequence included
    topk_ids: Tensor  # [C, k] int32, -1 where there are fewer than k
    topk_logprobs: Tensor  # [C, k] at T = 1, -inf where there are fewer
    log_tail_mass: Tensor  # [C] fp32, T = 1
    log_mass_at_t: Tensor  # [C] fp32


def shard_name(index: int) -> str:
    return f"labels-{index:05d}.safetensors"


def write_shard(path: Path, header: Header, samples: Sequence[Sample]) -> None:
    """Writes one shard: ids int32, log-probabilities fp16, masses fp32 (from fp16 they would be off by far).

    fp16 keeps a log-probability within 0.05 %; below -65,504 it would become -inf, so it is clamped to there.
    """
    k = header.top_k

    def joined(parts: list[Tensor], dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.cat(parts).to(dtype) if parts else torch.zeros(0, *shape, dtype=dtype)

    logprobs = joined([s.topk_logprobs for s in samples], torch.float32, k)
    finite = logprobs > float("-inf")
    logprobs = torch.where(finite, logprobs.clamp(min=-65504.0), logprobs).to(torch.float16)
    tensors = {
        "prompt_ids": joined([s.prompt_ids for s in samples], torch.int32),
        "prompt_offsets": _offsets([len(s.prompt_ids) for s in samples]),
        "completion_ids": joined([s.completion_ids for s in samples], torch.int32),
        "completion_offsets": _offsets([len(s.completion_ids) for s in samples]),
        "topk_ids": joined([s.topk_ids for s in samples], torch.int32, k),
        "topk_logprobs": logprobs,
        "log_tail_mass": joined([s.log_tail_mass for s in samples], torch.float32),
        "log_mass_at_t": joined([s.log_mass_at_t for s in samples], torch.float32),
    }
    told = {"header": asdict(header), "keys": [s.key for s in samples]}
    save_file(tensors, path, metadata={"kdcloud": json.dumps(told)})  # one key: safetensors keeps no order of several


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


@dataclass(frozen=True)
class Labels:
    """All samples of a label stage, end to end: sample i owns rows offsets[i]:offsets[i + 1]."""

    header: Header
    keys: list[str]  # a prompt with several kept samples is there several times
    prompt_ids: Tensor
    prompt_offsets: Tensor
    completion_ids: Tensor
    completion_offsets: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    log_tail_mass: Tensor
    log_mass_at_t: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, index: int) -> Sample:
        p = slice(*self.prompt_offsets[index : index + 2].tolist())
        c = slice(*self.completion_offsets[index : index + 2].tolist())
        return Sample(
            self.keys[index], self.prompt_ids[p], self.completion_ids[c], self.topk_ids[c], self.topk_logprobs[c],
            self.log_tail_mass[c], self.log_mass_at_t[c],
        )  # fmt: skip


def read_labels(folder: Path) -> Labels:
    """Every shard of `folder`, ordered by sample key, so that nothing depends on how the shards were cut.

    Raises TaskError when there are none, one is damaged, or they do not belong together.
    """
    paths = sorted(folder.glob("labels-*.safetensors"))
    if not paths:
        raise TaskError(f"{folder} holds no labels", hint="name a label stage under labels")
    headers: list[Header] = []
    keys: list[str] = []
    parts: list[dict[str, Tensor]] = []
    for path in paths:
        header, its_keys, tensors = _read_shard(path)
        headers.append(header)
        keys += its_keys
        parts.append(tensors)
    if any(header != headers[0] for header in headers):
        raise TaskError(f"the shards in {folder} were made with different settings", hint="label again in a new run")
    if not keys:
        raise TaskError("no sample was kept, so there is nothing to learn from", hint="label more prompts")
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        if name.endswith("_offsets"):
            joined[name] = _offsets(torch.cat([part[name].diff() for part in parts]).tolist())
        else:
            joined[name] = torch.cat([part[name] for part in parts])
    return _sorted(Labels(header=headers[0], keys=keys, **joined))


def _read_shard(path: Path) -> tuple[Header, list[str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TaskError(f"{path.name} is damaged: {error}", hint="label again in a new run") from error
    if "kdcloud" not in metadata:
        raise TaskError(f"{path.name} has no header of kdcloud labels", hint="name a label stage under labels")
    told = json.loads(metadata["kdcloud"])
    raw = told["header"]
    if raw.get("schema") != LABELS_SCHEMA:
        raise TaskError(
            f"{path.name} has label schema {raw.get('schema')}, this kdcloud reads {LABELS_SCHEMA}",
            hint="use the kdcloud version that wrote it",
        )
    return Header(**raw), told["keys"], tensors


def _sorted(labels: Labels) -> Labels:
    order = sorted(range(len(labels)), key=lambda i: labels.keys[i])
    samples = [labels.sample(i) for i in order]
    return Labels(
        header=labels.header,
        keys=[s.key for s in samples],
        prompt_ids=torch.cat([s.prompt_ids for s in samples]),
        prompt_offsets=_offsets([len(s.prompt_ids) for s in samples]),
        completion_ids=torch.cat([s.completion_ids for s in samples]),
        completion_offsets=_offsets([len(s.completion_ids) for s in samples]),
        topk_ids=torch.cat([s.topk_ids for s in samples]),
        topk_logprobs=torch.cat([s.topk_logprobs for s in samples]),
        log_tail_mass=torch.cat([s.log_tail_mass for s in samples]),
        log_mass_at_t=torch.cat([s.log_mass_at_t for s in samples]),
    )
