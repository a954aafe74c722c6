"""Which prompts, answers and corpora does a stage see? Reads jsonl files and makes the generated sets."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from tasks.contract import TaskError

Row = dict[str, Any]

_INPUT = ("input", "prompt", "question")
_ANSWER = ("answer", "target")
_HELD_OUT = 1000  # problems
_SPLIT_SEED = 20260101  # fixed: train and held-out problems are the same in every run
_SETS = ("addition/train", "addition/held_out", "addition/corpus")


def key_of(text: str) -> str:
    """The stable key of a prompt: sha256 of its text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_rows(path: Path) -> list[Row]:
    """Rows {"input", "answer", "key"} of a jsonl file, other fields kept as they are.

    `input` may also be spelled prompt or question, `answer` target; an answer may be missing (None). A `key` in the
    file wins. Raises TaskError naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TaskError(f"{path} is not there", hint="check the path in the recipe's data section") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text", hint="save it as UTF-8, one JSON object a line") from error
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _row(line, f"{path}, line {number}")
        if row["key"] in lines:
            raise TaskError(
                f"{path}, line {number}: the same key as line {lines[row['key']]}",
                hint="remove the repeated prompt, or give each row a key of its own",
            )
        lines[row["key"]] = number
        rows.append(row)
    if not rows:
        raise TaskError(f"{path} holds no rows", hint='one JSON object a line: {"input": "...", "answer": "..."}')
    return rows


def _row(line: str, where: str) -> Row:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: not JSON ({error.msg})", hint="one JSON object a line") from error
    if not isinstance(raw, dict):
        raise TaskError(f"{where}: a {type(raw).__name__}, not an object", hint="one JSON object a line")
    text = _first(raw, _INPUT)
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f"{where}: no text under {', '.join(_INPUT)}", hint='write {"input": "...", "answer": "..."}')
    answer = _first(raw, _ANSWER)
    if isinstance(answer, (dict, list)):
        raise TaskError(f"{where}: the answer is neither text nor a number", hint='write {"answer": "95"}')
    key = raw.get("key")
    if key is not None and not isinstance(key, str):
        raise TaskError(f"{where}: key is not text", hint="leave key out, or write it in quotes")
    rest = {name: value for name, value in raw.items() if name not in (*_INPUT, *_ANSWER, "key")}
    return {**rest, "input": text, "answer": None if answer is None else str(answer), "key": key or key_of(text)}


def _first(raw: Row, names: tuple[str, ...]) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), None)


@dataclass(frozen=True)
class Addition:
    """Options of `builtin:addition/corpus?slips=0.3`."""

    slips: float = 0.3  # probability that a digit written in the working is wrong; answers are always right


def is_builtin(source: str) -> bool:
    return source.startswith("builtin:")


def builtin(source: str) -> list[Row]:
    """Rows of `builtin:addition/train` or `builtin:addition/held_out`, always the same ones in the same order."""
    name, _ = _parse(source)
    if name == "addition/corpus":
        raise TaskError(f"{source} is a corpus, not a set of prompts", hint="use builtin:addition/train")
    held_out = held_out_pairs()
    pairs = held_out if name == "addition/held_out" else [pair for pair in _all_pairs() if pair not in set(held_out)]
    return [_problem(a, b) for a, b in pairs]


def corpus(source: str, examples: int, seed: int) -> list[Row]:
    """Rows {"input", "output", "answer", "key"} to pretrain on; `output` is what follows the opened `<think>` line.

    Only training problems, each met about equally often, with slips of its own each time. Same seed, same rows.
    """
    name, options = _parse(source)
    if name != "addition/corpus":
        raise TaskError(f"{source} is not a corpus", hint="use builtin:addition/corpus?slips=0.3")
    rng = random.Random(f"corpus-{seed}")
    held_out = set(held_out_pairs())
    pairs = [pair for pair in _all_pairs() if pair not in held_out]
    rows: list[Row] = []
    while len(rows) < examples:
        rng.shuffle(pairs)
        for a, b in pairs[: examples - len(rows)]:
            rows.append({**_problem(a, b), "output": worked(a, b, slips=options.slips, rng=rng)})
    return rows


def worked(a: int, b: int, *, slips: float, rng: random.Random) -> str:
    """The working, `</think>` and the answer. Each digit of the working is wrong with probability `slips`."""
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    lines = [f"{ones:02d}", f"{tens:02d}"]
    working = "\n".join("".join(_slip(char, slips, rng) for char in line) for line in lines)
    return f"{working}\n</think>{a + b}"


def _slip(char: str, slips: float, rng: random.Random) -> str:
    if not char.isdigit() or rng.random() >= slips:
        return char
    return rng.choice([digit for digit in "0123456789" if digit != char])


def _problem(a: int, b: int) -> Row:
    text = f"{a}+{b}"
    return {"input": text, "answer": str(a + b), "key": key_of(text)}


def _all_pairs() -> list[tuple[int, int]]:
    return [(a, b) for a in range(10, 100) for b in range(10, 100)]


@cache
def held_out_pairs() -> list[tuple[int, int]]:
    """The 1,000 problems that no teacher or student sees in training; a+b and b+a are always on the same side."""
    unordered = [(a, b) for a, b in _all_pairs() if a <= b]
    random.Random(_SPLIT_SEED).shuffle(unordered)
    chosen: list[tuple[int, int]] = []
    for a, b in unordered:
        both = [(a, b)] if a == b else [(a, b), (b, a)]
        if len(chosen) + len(both) <= _HELD_OUT:
            chosen += both
    return chosen


def _parse(source: str) -> tuple[str, Addition]:
    name, _, query = source.removeprefix("builtin:").partition("?")
    if name not in _SETS:
        near = get_close_matches(name, _SETS, n=1, cutoff=0.0)[0]
        raise TaskError(f"there is no generated set {source}", hint=f"did you mean builtin:{near}?")
    options: dict[str, float] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if name != "addition/corpus" or key != "slips":
            raise TaskError(f"{source}: unknown option {key}", hint="only a corpus takes one: ?slips=0.3")
        try:
            options[key] = float(value)
        except ValueError as error:
            raise TaskError(f"{source}: {key} is not a number", hint="write ?slips=0.3") from error
        if not 0.0 <= options[key] < 1.0:
            raise TaskError(f"{source}: {key} must be at least 0 and below 1", hint="write ?slips=0.3")
    return name, Addition(**options)
