"""How do labels look to a person, and how do they become lines of JSON and labels again?

A line is {"input": prompt, "target": completion, "soft_label": [{id: log-probability, ...}, ... one a token]}. Export
adds what makes the way back exact: key, teacher, tokenizer (hash of its vocabulary), temperature, input_ids,
target_ids, log_tail_mass and log_mass_at_t (null: -infinity). Where ids are there, they are used and the texts are not
read; with target_ids a number in soft_label is an id, any other name (and without target_ids every name) a token of the
vocabulary or a text of one token. One value above 0 makes all of a line's soft_label probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks import models
from tasks.contract import ModelSource, TaskError
from tasks.labels import TOKENIZER_FOLDER, Labels, Sample, read_labels
from tasks.labels_import import import_jsonl

__all__ = ["export_jsonl", "import_jsonl", "shown", "stored"]


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


def stored(folder: Path) -> dict[str, Any]:
    """How the log-probabilities are stored, and how far that is from what the teacher said: null where nobody tells."""
    labels = read_labels(folder)
    error = labels.rounding if labels.header.top_k else None
    return {
        "top_k": labels.header.top_k,
        "logprob_bits": labels.header.logprob_bits,
        "logprob_error": None if error is None else {"mean": error.mean, "worst": error.worst},
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


def _tokenizer(place: Path) -> PreTrainedTokenizerBase:
    if not place.is_dir():
        raise TaskError(f"{place.parent} has no tokenizer beside its labels", hint="fetch the whole label stage")
    return models.load_tokenizer(ModelSource(path=str(place)))
