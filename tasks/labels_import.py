"""How do lines of JSON become labels? Every line is checked whole before it counts: whoever wrote it may have erred.

The form of a line is told in labels_text.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks import models
from tasks.contract import ModelSource, TaskError
from tasks.labels import TOKENIZER_FOLDER, Header, Sample, shard_name, write_shard

SHARD_SAMPLES = 256
LONGEST_LINE = 256 << 20  # bytes; 64 soft labels of 128 thousand tokens
ROUNDING = 1e-3  # log-probabilities and masses above 0 by no more are rounding
MOST_IN_A_ROW = 1.01  # probabilities of a row, rounded, sum up to no more
NUMBER = re.compile(r"-?[0-9]{1,18}")
FORM = 'one JSON object a line: {"input": ..., "target": ..., "soft_label": [{token: probability}, ... one a token]}'


class _Wrong(Exception):
    """What is wrong with a line, and what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class _Line:
    """A line whose types are right; whether its ids are those of the tokenizer is another question."""

    input: str
    target: str
    input_ids: list[int] | None
    target_ids: list[int] | None
    soft: list[dict[str, float]] | None
    log_tail_mass: list[float | None] | None
    log_mass_at_t: list[float | None] | None
    key: str | None
    teacher: str
    tokenizer: str | None
    temperature: float


def import_jsonl(file: Path, folder: Path, tokenizer: str) -> int:
    """Writes the samples of `file` as labels into `folder`, the tokenizer beside them. Returns how many.

    Without masses, the tail is one minus the sum of the k probabilities, and the temperature 1. Raises TaskError that
    names the line.
    """
    if any(folder.glob("labels-*.safetensors")):
        raise TaskError(f"{folder} holds labels already", hint="name a new folder")
    known = models.load_tokenizer(ModelSource(path=tokenizer))
    header, count = _header(file, known, tokenizer)
    lines, words = _lines(file), known.get_vocab()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(-(-count // SHARD_SAMPLES)):
            samples = []
            for number, line in islice(lines, SHARD_SAMPLES):
                try:
                    samples.append(_sample(line, known, words, header))
                except _Wrong as wrong:
                    raise _told(file, number, wrong) from wrong
            write_shard(folder / shard_name(index), header, samples)
        known.save_pretrained(folder / TOKENIZER_FOLDER)
    except OSError as error:
        _take_back(folder)
        raise TaskError(f"cannot write to {folder}: {error.strerror}", hint="name a folder with room") from error
    except BaseException:
        _take_back(folder)
        raise
    return count


def _take_back(folder: Path) -> None:
    """Half an import would pass for a whole one."""
    for shard in folder.glob("labels-*.safetensors"):
        shard.unlink()


def _header(file: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[Header, int]:
    """What all lines have in common, and how many there are. Only that is held: a file may be larger than memory."""
    hashes = models.vocabulary_hashes(tokenizer)
    first: tuple[Any, ...] | None = None
    first_number = count = top_k = 0
    for number, line in _lines(file):
        k = max(map(len, line.soft or ()), default=0)
        common = (line.teacher, line.tokenizer or hashes.ordinary, line.temperature, k == 0)
        if first is None:
            first, first_number = common, number
        if common != first:
            what = ("teacher", "tokenizer", "temperature", "whether there is a soft_label")
            differ = [word for word, a, b in zip(what, common, first, strict=True) if a != b]
            raise TaskError(
                f"line {number} of {file} differs from line {first_number} in {' and '.join(differ)}",
                hint="import each kind into a folder of its own",
            )
        count, top_k = count + 1, max(top_k, k)
    if first is None:
        raise TaskError(f"{file} holds no samples", hint=FORM)
    if first[1] != hashes.ordinary:
        raise TaskError(f"{file} was made with another tokenizer than {name}", hint="name the teacher's")
    return Header(first[0], hashes.ordinary, hashes.special, top_k, first[2], vocabulary=len(tokenizer)), count


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[tuple[int, _Line]]:
    """(number, line) of all that are not blank. Raises TaskError."""
    try:
        with file.open("rb") as lines:
            number = 0
            while text := lines.readline(LONGEST_LINE + 1):
                number += 1
                if len(text) > LONGEST_LINE:
                    hint = f"{FORM}; is it one JSON array, or without line ends?"
                    raise TaskError(f"line {number} of {file} is longer than {LONGEST_LINE >> 20} MiB", hint=hint)
                if text.strip():
                    try:
                        yield number, _parsed(text)
                    except _Wrong as wrong:
                        raise _told(file, number, wrong) from wrong
    except OSError as error:
        raise TaskError(f"cannot read {file}: {error.strerror}", hint="name a file of JSON lines") from error


def _told(file: Path, number: int, wrong: _Wrong) -> TaskError:
    return TaskError(f"line {number} of {file}: {wrong.message}", hint=wrong.hint)


def _parsed(text: bytes) -> _Line:
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise _Wrong(f"it is not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"it is not JSON: {error}", FORM) from error
    if not isinstance(raw, dict) or not {"input", "target"} <= raw.keys():
        raise _Wrong("it has no input and target", FORM)
    raw = {name: value for name, value in raw.items() if value is not None}
    return _Line(
        input=_text(raw, "input"), target=_text(raw, "target"),
        input_ids=_ids(raw, "input_ids"), target_ids=_ids(raw, "target_ids"), soft=_soft(raw),
        log_tail_mass=_masses(raw, "log_tail_mass"), log_mass_at_t=_masses(raw, "log_mass_at_t"),
        key=_text(raw, "key") if raw.get("key") else None,
        teacher=_text(raw, "teacher") if "teacher" in raw else "import",
        tokenizer=_text(raw, "tokenizer") if "tokenizer" in raw else None,
        temperature=_temperature(raw),
    )  # fmt: skip


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"{_quoted(twice)} stands twice in one object", "leave one of them out")
    return found


def _no_number(name: str) -> float:
    raise _Wrong(f"{name} is no number", "leave the token out; -Infinity as a mass is null")


def _text(raw: dict[str, Any], name: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise _Wrong(f"{name} is {_quoted(value)}, not text", "write it in quotes")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise _Wrong(f"{name} holds half a character", r"\ud800 to \udfff are pairs in JSON: write both, or neither")
    return value


def _ids(raw: dict[str, Any], name: str) -> list[int] | None:
    values = raw.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or not values:
        raise _Wrong(f"{name} is {_quoted(values)}, not a list of token ids", "write it like [151, 8, 42]")
    for place, value in enumerate(values):
        if type(value) is not int:
            raise _Wrong(f"{name}[{place}] is {_quoted(value)}, not a token id", "ids are whole numbers, not in quotes")
    return values


def _soft(raw: dict[str, Any]) -> list[dict[str, float]] | None:
    rows = raw.get("soft_label")
    if rows is None:
        return None
    if not isinstance(rows, list):
        raise _Wrong(f"soft_label is {_quoted(rows)}, not a list", "one {token: probability} for each token of target")
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _Wrong(f"soft_label[{place}] is {_quoted(row)}", "one {token: probability} for each token of target")
        for name, value in row.items():
            _number(value, f"soft_label[{place}] of {_quoted(name)}")
    values = [(value, place) for place, row in enumerate(rows) for value in row.values()]
    most, at = max(values, default=(0.0, 0))
    least, below = min(values, default=(0.0, 0))
    if most > ROUNDING and least < 0:
        hint = "write probabilities (0 to 1) or log-probabilities (0 and below), not both in one line"
        raise _Wrong(f"soft_label[{at}] holds {most:g}, and soft_label[{below}] {least:g}", hint)
    if most > 1 + ROUNDING:
        raise _Wrong(f"soft_label[{at}] holds {most:g}: no probability is above 1", "or give log-probabilities")
    chances = _are_chances(rows)
    for place, row in enumerate(rows):
        whole = math.fsum(row.values()) if chances else math.fsum(map(math.exp, row.values()))
        if whole > MOST_IN_A_ROW:
            raise _Wrong(f"the probabilities of soft_label[{place}] sum up to {whole:.3g}", "they are of one token: 1")
    return rows


def _are_chances(rows: list[dict[str, float]]) -> bool:
    """Whether these are probabilities; what is no more than ROUNDING above 0 among log-probabilities is one of them."""
    values = [value for row in rows for value in row.values()]
    return max(values, default=0.0) > 0 and min(values) >= 0


def _masses(raw: dict[str, Any], name: str) -> list[float | None] | None:
    values = raw.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise _Wrong(f"{name} is {_quoted(values)}, not a list", "one number for each token of target")
    for place, value in enumerate(values):
        if value is not None and _number(value, f"{name}[{place}]") > ROUNDING:
            raise _Wrong(f"{name}[{place}] is {value:g}", "the log of a mass is 0 or below")
    return values


def _temperature(raw: dict[str, Any]) -> float:
    value = _number(raw.get("temperature", 1.0), "temperature")
    if value <= 0:
        raise _Wrong(f"temperature is {value:g}", "it is above 0; leave it out for 1")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float):
        raise _Wrong(f"{what} is {_quoted(value)}, not a number", "write it without quotes")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Wrong(f"{what} is too large a number", "write a number below 1e308")
    return number


def _quoted(value: Any) -> str:
    """As JSON, short, without what moves a terminal's cursor."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- samples ---------------------------------------------------------------------------------------------------------


def _sample(line: _Line, tokenizer: PreTrainedTokenizerBase, words: dict[str, int], header: Header) -> Sample:
    prompt = line.input_ids or models.prompt_ids(tokenizer, line.input)
    completion, soft = line.target_ids, line.soft
    if completion is None:
        completion = list(tokenizer.encode(line.target, add_special_tokens=False))
        if (soft is None or len(soft) == len(completion) + 1) and tokenizer.eos_token_id is not None:
            completion.append(tokenizer.eos_token_id)
    n, k = len(completion), header.top_k
    soft = soft if soft is not None else [{}] * n
    if len(soft) != n or n == 0:
        raise _Wrong(
            f"target has {n} tokens, soft_label {len(soft)}", "give target_ids, and one soft_label for each of them"
        )
    ids, logprobs = torch.full((n, k), -1, dtype=torch.int32), torch.full((n, k), -math.inf)
    chances = _are_chances(soft)
    for j, row in enumerate(soft):
        found = sorted(row.items(), key=lambda item: -item[1])
        row_ids = [_token_id(name, tokenizer, words, as_id=line.target_ids is not None) for name, _ in found]
        _check_ids(row_ids, f"soft_label[{j}]", header)
        if len(set(row_ids)) < len(row_ids):
            twice = next(name for (name, _), i in zip(found, row_ids, strict=True) if row_ids.count(i) > 1)
            raise _Wrong(f"soft_label[{j}] names the token {_quoted(twice)} twice", "add their probabilities up")
        for m, ((_, value), i) in enumerate(zip(found, row_ids, strict=True)):
            ids[j, m] = i
            logprobs[j, m] = (math.log(value) if value > 0 else -65504.0) if chances else value
    _check_ids(prompt, "input_ids", header)
    _check_ids(completion, "target_ids", header)
    inside = logprobs.double().exp().sum(1).clamp(max=1.0)
    tail = _values(line.log_tail_mass, "log_tail_mass", torch.log1p(-inside) if k else torch.zeros(n))
    if line.log_mass_at_t is None and line.temperature != 1.0:
        raise _Wrong("log_mass_at_t is missing", "leave temperature out, or give the mass at it")
    mass = _values(line.log_mass_at_t, "log_mass_at_t", inside.log() if k else torch.zeros(n))
    key = line.key or hashlib.sha256(line.input.encode()).hexdigest()
    return Sample(key, torch.tensor(prompt), torch.tensor(completion), ids, logprobs, tail, mass)


def _check_ids(ids: list[int], what: str, header: Header) -> None:
    for i in ids:
        if not 0 <= i < header.vocabulary:
            raise _Wrong(
                f"{what} holds {i}, which is outside the vocabulary of {header.vocabulary}",
                "name the tokenizer the labels came from",
            )


def _values(told: list[float | None] | None, name: str, otherwise: Tensor) -> Tensor:
    if told is None:
        return otherwise.float()
    if len(told) != len(otherwise):
        raise _Wrong(f"{name} has {len(told)} values for {len(otherwise)} tokens", "one a token")
    return torch.tensor([-math.inf if value is None else value for value in told], dtype=torch.float32)


def _token_id(name: str, tokenizer: PreTrainedTokenizerBase, words: dict[str, int], *, as_id: bool) -> int:
    if as_id and NUMBER.fullmatch(name):
        return int(name)
    known = words.get(name)
    try:
        ids = [known] if known is not None else tokenizer.encode(name, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):  # half a character
        ids = []
    if len(ids) != 1:
        raise _Wrong(f"{_quoted(name)} is not one token", "give target_ids, and ids in soft_label")
    return int(ids[0])
