"""Can what a model writes steer the terminal that shows it?"""

from __future__ import annotations

import json

import pytest

from orchestrator import cli
from orchestrator.plain import json_text, printable


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[31m\x9b\r\u200e\u2028b\n\tc蒸") == "a?[31m????b\n\tc蒸"


@pytest.mark.parametrize("text", ["全角\u3000空格", "10\u00a0GB", "\U0001f469\u200d\U0001f467"])
def test_blanks_of_other_scripts_and_joined_pictures_stay(text: str) -> None:
    assert printable(text) == text


def test_a_document_says_the_same_with_nothing_that_steers() -> None:
    told = {"answer": "蒸\x1b[2J\x9b31m\u202e\u2028\x7f\U000e0001 é\n", "list": [1, None]}
    for indent in (None, 1):
        text = json_text(told, indent=indent)
        assert json.loads(text) == told and "蒸" in text and " é" in text
        assert all(c.isprintable() or c == "\n" for c in text)


def test_an_error_of_somebody_else_cannot_steer_either(capsys: pytest.CaptureFixture[str]) -> None:
    cli._explain("no\x1b]0;title\x07 such\nfile", "look\x9b")
    said = capsys.readouterr().err
    assert said == "error: no?]0;title? such\nfile\n  -> look?\n"
