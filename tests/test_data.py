"""Are rows read as people write them, and is what is held out never seen?"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tasks import data
from tasks.contract import TaskError


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("question", ["input", "prompt", "question"])
@pytest.mark.parametrize("answer", ["answer", "target"])
def test_rows_are_read_in_every_spelling(tmp_path: Path, question: str, answer: str) -> None:
    rows = data.read_rows(write(tmp_path, f'{{"{question}": "1+1", "{answer}": 2}}', ""))
    assert rows == [{"input": "1+1", "answer": "2", "key": data.key_of("1+1")}]


def test_rows_in_the_article_form_keep_their_soft_label(tmp_path: Path) -> None:
    path = write(tmp_path, '{"input": "1+1", "target": "2", "soft_label": [0.1, 0.9]}', '{"input": "open question"}')
    first, second = data.read_rows(path)
    assert first["answer"] == "2" and first["soft_label"] == [0.1, 0.9]
    assert second["answer"] is None


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    assert data.read_rows(write(tmp_path, '{"input": "a\u2028b"}'))[0]["input"] == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        ('{"answer": "2"}', "no text under input"),
        ('{"input": "  "}', "no text under input"),
        ('{"input": 3}', "no text under input"),
        ('{"input": "x", "answer": {}}', "neither text nor a number"),
        ('{"input": "x", "key": 3}', "key is not text"),
        ('{"input": "fine"}', "the same key as line 1"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(TaskError, match=rf"rows.jsonl, line 3: .*{says}") as raised:
        data.read_rows(write(tmp_path, '{"input": "fine"}', "", line))
    assert raised.value.hint


@pytest.mark.parametrize("text", [None, "", "\n\n"])
def test_a_missing_or_empty_file_is_said(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "rows.jsonl" if text is None else write(tmp_path, text)
    with pytest.raises(TaskError, match=r"is not there|holds no rows"):
        data.read_rows(path)


def test_other_encodings_are_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"input": "é"}'.encode("utf-16"))
    with pytest.raises(TaskError, match="UTF-8"):
        data.read_rows(path)


def test_a_thousand_problems_are_held_out_and_never_trained_on_not_even_swapped() -> None:
    held_out = data.builtin("builtin:addition/held_out")
    train = data.builtin("builtin:addition/train")
    corpus = data.corpus("builtin:addition/corpus?slips=0.3", 20_000, 0)
    assert len(held_out) == 1000 and len(train) == 8100 - 1000

    def unordered(rows: list[data.Row]) -> set[frozenset[str]]:
        return {frozenset(row["input"].split("+")) for row in rows}

    assert len(unordered(corpus)) > 3000
    assert not unordered(held_out) & unordered(train)
    assert not unordered(held_out) & unordered(corpus)
    assert len({row["key"] for row in (*held_out, *train)}) == 8100


def test_answers_are_right_whatever_the_slips() -> None:
    rows = data.corpus("builtin:addition/corpus?slips=0.9", 500, 1)
    for row in rows:
        a, b = map(int, row["input"].split("+"))
        assert row["output"].rpartition("</think>")[2] == row["answer"] == str(a + b)


def test_slips_come_as_often_as_asked_and_only_in_the_working() -> None:
    rng = random.Random(0)
    right = data.worked(47, 38, slips=0.0, rng=rng)
    wrong = total = 0
    for _ in range(500):
        slipped = data.worked(47, 38, slips=0.3, rng=rng)
        assert re.sub(r"\d", "#", slipped) == re.sub(r"\d", "#", right)
        assert slipped.rpartition("</think>")[2] == "85"
        pairs = [(x, y) for x, y in zip(right.partition("</think>")[0], slipped, strict=False) if x.isdigit()]
        wrong += sum(x != y for x, y in pairs)
        total += len(pairs)
    assert 0.27 < wrong / total < 0.33


def test_the_same_seed_writes_the_same_corpus_and_another_one_does_not() -> None:
    source = "builtin:addition/corpus"
    assert data.corpus(source, 300, 1) == data.corpus(source, 300, 1) != data.corpus(source, 300, 2)
    assert data.builtin("builtin:addition/train") == data.builtin("builtin:addition/train")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("builtin:addition/trian", "builtin:addition/train"),
        ("builtin:additon/held_out", "builtin:addition/held_out"),
        ("builtin:addition/train?slips=0.3", "only a corpus"),
        ("builtin:addition/corpus", "builtin:addition/train"),
    ],
)
def test_an_unknown_set_names_the_nearest_one(source: str, hint: str) -> None:
    with pytest.raises(TaskError) as raised:
        data.builtin(source)
    assert hint in raised.value.hint


@pytest.mark.parametrize("query", ["slips=1.0", "slips=-0.1", "slips=many", "slip=0.3"])
def test_impossible_options_of_a_corpus_are_refused(query: str) -> None:
    with pytest.raises(TaskError):
        data.corpus(f"builtin:addition/corpus?{query}", 10, 0)
