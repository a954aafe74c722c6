"""What do the labels in a folder hold? Read from the heads of their shards, without torch: counts, lengths, teacher."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import UsageError
from tasks.bucket import FileEntry, files_sha256, sha256_of

SCHEMA = 2  # LABELS_SCHEMA of tasks/labels.py
TOKENIZER_FOLDER = "tokenizer"  # as there
MOST_HEAD = 1 << 30  # bytes: keys of ten million samples


@dataclass(frozen=True)
class LabelFolder:
    """A folder of finished labels: uploaded to the run before its first stage. Lengths in tokens."""

    path: str
    sha256: str  # of every file that is used
    size: int  # bytes
    teacher: str
    top_k: int  # 0 = hard labels only
    temperature: float
    vocabulary: int
    samples: int
    prompt: float  # mean
    answer: float  # mean
    longest_prompt: int
    longest: int  # prompt and answer of one sample


def read_label_folder(path: Path) -> LabelFolder:
    """Raises UsageError for what is no folder of whole labels with their tokenizer."""
    files = label_files(path)
    shards = [_shard(file) for rel, file in files.items() if "/" not in rel]
    headers = [header for header, _, _ in shards]
    if any(header != headers[0] for header in headers):
        raise UsageError(f"the shards in {path} differ in their settings", hint="give each a folder of its own")
    prompts = [length for _, lengths, _ in shards for length in lengths]
    answers = [length for _, _, lengths in shards for length in lengths]
    if not prompts:
        raise UsageError(f"the labels in {path} hold no sample", hint="label more prompts")
    entries = entries_of(files)
    header = headers[0]
    return LabelFolder(
        path=str(path),
        sha256=files_sha256(entries),
        size=sum(entry.size for entry in entries.values()),
        teacher=str(header["teacher"]),
        top_k=int(header["top_k"]),
        temperature=float(header["temperature"]),
        vocabulary=int(header["vocabulary"]),
        samples=len(prompts),
        prompt=sum(prompts) / len(prompts),
        answer=sum(answers) / len(answers),
        longest_prompt=max(prompts),
        longest=max(a + b for a, b in zip(prompts, answers, strict=True)),
    )


def label_files(path: Path) -> dict[str, Path]:
    """The files that training reads, by their names below `path`: shards and tokenizer, nothing else."""
    shards = sorted(path.glob("labels-*.safetensors"))
    tokenizer = sorted(file for file in (path / TOKENIZER_FOLDER).rglob("*") if file.is_file())
    if not shards:
        raise UsageError(f"{path} holds no labels", hint="name a label stage, or make it with `kdcloud labels import`")
    if not tokenizer:
        raise UsageError(f"{path} has no tokenizer beside its labels", hint="fetch the whole label stage")
    return {file.relative_to(path).as_posix(): file for file in [*shards, *tokenizer]}


def entries_of(files: Mapping[str, Path]) -> dict[str, FileEntry]:
    """Raises UsageError."""
    try:
        return {rel: FileEntry(size=file.stat().st_size, sha256=sha256_of(file)) for rel, file in files.items()}
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}", hint="check `labels:`") from error


def _shard(file: Path) -> tuple[dict[str, Any], list[int], list[int]]:
    """Header, and the lengths of prompts and of answers."""
    try:
        with file.open("rb") as opened:
            head, data = _head(opened)
            told = json.loads(head["__metadata__"]["kdcloud"])
            header = told["header"]
            if header["schema"] != SCHEMA:
                raise UsageError(
                    f"{file} has label schema {header['schema']}, this kdcloud reads {SCHEMA}",
                    hint="label again, or export it with the kdcloud version that wrote it and import that",
                )
            prompts, answers = (list(_lengths(opened, head, data, name)) for name in ("prompt", "completion"))
            if not len(prompts) == len(answers) == len(told["keys"]):
                raise ValueError("lengths")
            if file.stat().st_size != data + max(tensor["data_offsets"][1] for tensor in _tensors(head)):
                raise ValueError("size")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint="check `labels:`") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{file} is damaged, or holds no labels of kdcloud", hint="make it again") from error
    return header, prompts, answers


def _head(opened: BinaryIO) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of itself, and where its data begins (docs of safetensors, "Format")."""
    size = int.from_bytes(opened.read(8), "little")
    if not 2 <= size <= MOST_HEAD:
        raise ValueError("head")
    found = json.loads(opened.read(size))
    if not isinstance(found, dict):
        raise ValueError("head")
    return found, 8 + size


def _tensors(head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (tensor for name, tensor in head.items() if name != "__metadata__")


def _lengths(opened: BinaryIO, head: dict[str, Any], data: int, name: str) -> Iterator[int]:
    tensor = head[f"{name}_offsets"]
    begin, end = tensor["data_offsets"]
    if tensor["dtype"] != "I64" or not 0 < end - begin <= MOST_HEAD:
        raise ValueError(name)
    opened.seek(data + begin)
    offsets = array("q", opened.read(end - begin))
    for first, last in pairwise(offsets):
        if last < first:
            raise ValueError(name)
        yield last - first
