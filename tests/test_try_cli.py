"""`kdcloud try`: what was typed is understood, and the prompt does what it says. Models are made up here."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator import try_cli
from orchestrator.answering import Answer, Loaded, usual_tokens
from orchestrator.cli import kdcloud
from orchestrator.config import Home
from orchestrator.errors import UsageError
from orchestrator.session import opened_ledger
from orchestrator.student import Role
from orchestrator.try_cli import told_apart
from tasks.contract import DataSource, EvaluateSettings, LabelSettings, ModelSource, TrainSettings
from tests.recorded_runs import recorded, stages


class Parrot:
    """Models that repeat the question."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.loaded = {Role.STUDENT: Loaded(Role.STUDENT, "stage export", 1, "float32", False, False)}

    def ask(self, question: str, *, seed: int) -> Iterator[Answer]:
        self.asked.append((question, seed))
        yield Answer(Role.STUDENT, f"you said {question}", tokens=3, seconds=1.0, finish="stop")

    def stop(self) -> None:
        raise AssertionError("nobody pressed Ctrl-C")


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    bird = Parrot()

    @contextmanager
    def asking(*_: Any) -> Iterator[Any]:
        yield bird, SimpleNamespace(run="r-abc123", missing={Role.TEACHER: "it is away"})

    monkeypatch.setattr(try_cli, "_asking", asking)
    return bird


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ((None, None), (None, None)),
        (("last", None), ("last", None)),
        (("quickstart-k3x9ab", None), ("quickstart-k3x9ab", None)),
        (("s3://bucket/kd/quickstart-k3x9ab", None), ("s3://bucket/kd/quickstart-k3x9ab", None)),
        (("12+30", None), (None, "12+30")),
        (("What is 1 + 1?", None), (None, "What is 1 + 1?")),
        (("last", "hello"), ("last", "hello")),
    ],
)
def test_a_word_alone_is_a_run_where_it_can_name_one(words: tuple[Any, Any], meant: tuple[Any, Any]):
    assert told_apart(*words) == meant


def test_an_empty_question_is_refused():
    with pytest.raises(UsageError, match="the question is empty"):
        told_apart("last", "  ")


def test_a_question_is_answered_once(parrot: Parrot):
    done = CliRunner().invoke(kdcloud, ["try", "last", "12+30", "--seed", "7"])
    assert done.exit_code == 0 and "you said 12+30" in done.stdout and "> " not in done.stdout
    assert parrot.asked == [("12+30", 7)]


def test_each_line_of_stdin_is_a_question(parrot: Parrot):
    done = CliRunner().invoke(kdcloud, ["try"], input="1+1\n\n  \n2+2\n")
    assert [question for question, _ in parrot.asked] == ["1+1", "2+2"]
    assert [line for line in done.stdout.splitlines() if line.startswith("> ")] == ["> 1+1", "> 2+2"]


def test_without_a_question_no_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(try_cli, "_asking", lambda *_: pytest.fail("models were loaded"))
    done = CliRunner().invoke(kdcloud, ["try"], input="\n \n")
    assert isinstance(done.exception, UsageError) and "no question came" in done.exception.message


def test_json_is_one_document_whatever_was_asked(parrot: Parrot):
    done = CliRunner().invoke(kdcloud, ["try", "--json"], input="1+1\n2+2\n")
    document = json.loads(done.stdout)
    assert (document["schema"], document["run"], document["missing"]) == (1, "r-abc123", {"teacher": "it is away"})
    assert [one["question"] for one in document["asked"]] == ["1+1", "2+2"]
    assert document["asked"][0]["answers"][0]["text"] == "you said 1+1"


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]) -> None:
    lines = iter(typed)

    def line(prompt: str) -> str:
        said = next(lines)
        if isinstance(said, str):
            return said
        raise said

    monkeypatch.setattr("builtins.input", line)


def test_the_prompt_answers_until_it_is_told_to_end(
    parrot: Parrot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal whose echo could be switched off
    at_a_terminal(monkeypatch, "1+1", "", "/help", "/nonsense", "/ 2 is half", KeyboardInterrupt, "/quit", "3+3")
    try_cli._prompt(parrot, 5)  # type: ignore[arg-type]
    assert parrot.asked == [("1+1", 5), ("/ 2 is half", 5)]
    out, err = capsys.readouterr()
    assert "you said 1+1" in out and "Each stands alone" in out
    assert "there is no /nonsense" in err and "/quit or Ctrl-D ends" in err
    at_a_terminal(monkeypatch, EOFError)
    try_cli._prompt(parrot, 0)  # type: ignore[arg-type]


def test_a_run_without_a_student_is_no_reason_to_load_anything(nothing_of_the_user: Path, tmp_path: Path):
    teacher = ModelSource(path="some/teacher")
    plan = stages(label=LabelSettings(teacher=teacher, prompts=DataSource("p"), verify="exact", samples=1))
    recorded(Home(nothing_of_the_user), "r-abc123", f"file:{tmp_path}/bucket/r-abc123", plan)
    for words, message in ((["try", "last", "1"], "trains no student"), (["try", "other", "1"], "no run 'other'")):
        done = CliRunner().invoke(kdcloud, words)
        assert isinstance(done.exception, UsageError) and message in done.exception.message


def test_the_last_run_is_the_last_that_has_a_student(
    nothing_of_the_user: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    home = Home(nothing_of_the_user)
    label = LabelSettings(teacher=ModelSource(path="some/teacher"), prompts=DataSource("p"), verify="exact", samples=1)
    train = TrainSettings(ModelSource(path="some/base"), "label")
    recorded(home, "old-abc123", f"file:{tmp_path}/bucket/old-abc123", stages(label=label, train=train))
    recorded(home, "new-abc124", f"file:{tmp_path}/bucket/new-abc124", stages(label=label))
    with opened_ledger(home, say=print) as ledger:
        assert try_cli._last_with_student(ledger) == "old-abc123"
        assert "new-abc124 trains no student" in capsys.readouterr().err


def test_answers_are_as_long_as_the_evaluation_allows():
    label = LabelSettings(teacher=ModelSource(path="t"), prompts=DataSource("p"), verify="exact", samples=1)
    evaluate = EvaluateSettings("train", None, DataSource("p"), "exact", max_new_tokens=16)
    assert usual_tokens(stages(label=label, evaluate=evaluate)) == 16
    assert usual_tokens(stages(label=label)) == label.max_new_tokens
    assert usual_tokens([]) == 1024
