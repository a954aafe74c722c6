"""How do labels look to a person, and how do they become lines of JSON and labels again?

A line is {"input": prompt, "target": completion, "soft_label": [{id: log-probability, ...}, ... one a token]}. Export
adds what makes the way back exact: key, teacher, tokenizer (hash of its vocabulary), temperature, input_ids,
target_ids, log_tail_mass and log_mass_at_t (null: -infinity). Where ids are there, they are used and the texts are not
read; with target_ids a number in soft_label is an id, any other name (and without target_ids every name) a token of the
vocabulary or a text of one token. One value above 0 makes all of a line's soft_label probabilities.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks import models
from tasks.contract import ModelSource, TaskError
from tasks.labels import TOKENIZER_FOLDER, Header, Labels, Sample, read_labels, shard_name, write_shard

SHARD_SAMPLES = 256


def shown(folder: Path, *, first: int, limit: int) -> Iterator[dict[str, Any]]:
    """Samples from number `first` (0 is the first by key), with texts: what `kdcloud labels show` prints."""
    labels, tokenizer = read_labels(folder), _tokenizer(folder / TOKENIZER_FOLDER)
    if not 0 <= first < len(labels):
        raise TaskError(f"there is no sample {first}", hint=f"they are numbered 0 to {len(labels) - 1}")
    for index in range(first, min(first + limit, len(labels))):
        sample = labels.sample(index)
        tails = sample.log_tail_mass.exp().tolist()
        rows = zip(sample.completion_ids.tolist(), _soft_label(sample), tails, strict=True)
        yield {
            "sample": index,
            "key": sample.key,
            "prompt": tokenizer.decode(sample.prompt_ids.tolist()),
            "completion": tokenizer.decode(sample.completion_ids.tolist()),
            "tokens": [
                {
                    "id": token,
                    "text": tokenizer.decode([token]),
                    "top": [
                        {"id": int(i), "text": tokenizer.decode([int(i)]), "probability": math.exp(logp)}
                        for i, logp in row.items()
                    ],
                    "tail_mass": tail if labels.header.top_k else None,
                }
                for token, row, tail in rows
            ],
        }


def export_jsonl(folder: Path, file: Path) -> int:
    """Writes one line a sample, in the order of their keys. Returns how many."""
    labels, tokenizer = read_labels(folder), _tokenizer(folder / TOKENIZER_FOLDER)
    with file.open("w", encoding="utf-8") as out:
        for index in range(len(labels)):
            out.write(json.dumps(_line(labels, index, tokenizer), ensure_ascii=False, allow_nan=False) + "\n")
    return len(labels)


def _line(labels: Labels, index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    sample = labels.sample(index)
    prompt, completion = sample.prompt_ids.tolist(), sample.completion_ids.tolist()
    line = {"input": tokenizer.decode(prompt), "target": tokenizer.decode(completion)}
    if labels.header.top_k:
        line["soft_label"] = _soft_label(sample)
        line |= {name: _nulls(getattr(sample, name)) for name in ("log_tail_mass", "log_mass_at_t")}
    return line | {
        "input_ids": prompt, "target_ids": completion, "key": sample.key, "teacher": labels.header.teacher,
        "tokenizer": labels.header.ordinary_sha256, "temperature": labels.header.temperature,
    }  # fmt: skip


def _soft_label(sample: Sample) -> list[dict[str, float]]:
    rows = zip(sample.topk_ids.tolist(), sample.topk_logprobs.tolist(), strict=True)
    return [{str(i): _short(logp) for i, logp in zip(*row, strict=True) if i >= 0} for row in rows]


def _short(value: float) -> float:
    return float(f"{value:.9g}")  # all that fp32 holds


def _nulls(values: Tensor) -> list[float | None]:
    return [_short(value) if math.isfinite(value) else None for value in values.tolist()]


def import_jsonl(file: Path, folder: Path, tokenizer: str) -> int:
    """Writes the samples of `file` as labels into `folder`, the tokenizer beside them. Returns how many.

    Without masses, the tail is one minus the sum of the k probabilities, and the temperature 1. Raises TaskError.
    """
    if any(folder.glob("labels-*.safetensors")):
        raise TaskError(f"{folder} holds labels already", hint="name a new folder")
    known = _tokenizer(tokenizer)
    hashes = models.vocabulary_hashes(known)
    told = [  # only what the header needs: a file may be larger than memory
        (line.get("teacher", "import"), line.get("tokenizer", hashes.ordinary), float(line.get("temperature", 1.0)),
         max(map(len, line.get("soft_label") or ()), default=0))
        for _, line in _lines(file)
    ]  # fmt: skip
    if not told:
        raise TaskError(f"{file} holds no samples", hint="one JSON object a line: input, target, soft_label")
    if any(one[:3] != told[0][:3] for one in told) or len({one[3] == 0 for one in told}) > 1:
        raise TaskError(
            f"the lines of {file} differ in teacher, tokenizer or temperature, or some have no soft_label",
            hint="import each kind into a folder of its own",
        )
    if told[0][1] != hashes.ordinary:
        raise TaskError(f"{file} was made with another tokenizer than {tokenizer}", hint="name the teacher's")
    header = Header(
        told[0][0], hashes.ordinary, hashes.special, max(one[3] for one in told), told[0][2], vocabulary=len(known)
    )
    folder.mkdir(parents=True, exist_ok=True)
    lines = _lines(file)
    for index in range(-(-len(told) // SHARD_SAMPLES)):
        part = islice(lines, SHARD_SAMPLES)
        try:
            samples = [_sample(line, f"line {number} of {file}", known, header) for number, line in part]
        except TaskError:
            for shard in folder.glob("labels-*.safetensors"):  # half an import would pass for a whole one
                shard.unlink()
            raise
        write_shard(folder / shard_name(index), header, samples)
    known.save_pretrained(folder / TOKENIZER_FOLDER)
    return len(told)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    line = json.loads(text)
                    if not isinstance(line, dict) or not {"input", "target"} <= line.keys():
                        raise ValueError("it has no input and target")
                    yield number, line
    except OSError as error:
        raise TaskError(f"cannot read {file}: {error.strerror}", hint="name a file of JSON lines") from error
    except ValueError as error:
        raise TaskError(f"line {number} of {file} is no sample: {error}", hint="see kdcloud labels export") from error


def _sample(line: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, header: Header) -> Sample:
    prompt = line.get("input_ids") or models.prompt_ids(tokenizer, line["input"])
    completion, soft = line.get("target_ids"), line.get("soft_label")
    as_ids = completion is not None
    if completion is None:
        completion = tokenizer.encode(line["target"], add_special_tokens=False)
        if (soft is None or len(soft) == len(completion) + 1) and tokenizer.eos_token_id is not None:
            completion.append(tokenizer.eos_token_id)
    n, k = len(completion), header.top_k
    soft = soft if soft is not None else [{}] * n
    if len(soft) != n or n == 0:
        raise TaskError(
            f"{where}: target has {n} tokens, soft_label {len(soft)}", hint="give target_ids, and one soft_label each"
        )
    ids, logprobs = torch.full((n, k), -1, dtype=torch.int32), torch.full((n, k), -math.inf)
    chances = any(value > 0 for row in soft for value in row.values())
    for j, row in enumerate(soft):
        for m, (name, value) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            ids[j, m] = int(name) if as_ids and name.isdecimal() else _token_id(name, where, tokenizer)
            logprobs[j, m] = (math.log(value) if value > 0 else -65504.0) if chances else value
    if min(*prompt, *completion) < 0 or max(*prompt, *completion, *ids.flatten().tolist()) >= header.vocabulary:
        raise TaskError(f"{where}: an id is outside the vocabulary", hint="name the tokenizer the labels came from")
    inside = logprobs.double().exp().sum(1).clamp(max=1.0)
    tail = _values(line, "log_tail_mass", torch.log1p(-inside) if k else torch.zeros(n), where)
    mass = _values(line, "log_mass_at_t", inside.log() if k else torch.zeros(n), where)
    key = line.get("key") or hashlib.sha256(line["input"].encode()).hexdigest()
    return Sample(key, torch.tensor(prompt), torch.tensor(completion), ids, logprobs, tail, mass)


def _values(line: dict[str, Any], name: str, otherwise: Tensor, where: str) -> Tensor:
    if name not in line:
        if name == "log_mass_at_t" and float(line.get("temperature", 1.0)) != 1.0:
            raise TaskError(f"{where}: {name} is missing", hint="leave temperature out, or give the mass at it")
        return otherwise.float()
    values = torch.tensor([-math.inf if value is None else value for value in line[name]], dtype=torch.float32)
    if len(values) != len(otherwise):
        raise TaskError(f"{where}: {name} has {len(values)} values for {len(otherwise)} tokens", hint="one a token")
    return values


def _token_id(name: str, where: str, tokenizer: PreTrainedTokenizerBase) -> int:
    known = tokenizer.get_vocab().get(name)
    ids = [known] if known is not None else tokenizer.encode(name, add_special_tokens=False)
    if len(ids) != 1:
        raise TaskError(f"{where}: {name!r} is not one token", hint="give target_ids, and ids in soft_label")
    return int(ids[0])


def _tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    if isinstance(place, Path) and not place.is_dir():
        raise TaskError(f"{place.parent} has no tokenizer beside its labels", hint="fetch the whole label stage")
    return models.load_tokenizer(ModelSource(path=str(place)))
