"""What a person sees of answers: thinking apart from the answer, nothing that a terminal would obey."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.answering import Answer, Loaded, loaded_words
from orchestrator.answers_view import Pieces, answers_to_json, figures, fits_beside, panels, show
from orchestrator.student import Role

BOTH = [Role.STUDENT, Role.TEACHER]
DONE = {"tokens": 8, "seconds": 0.5, "first_token_s": 0.1, "finish": "stop"}


def told(text: str, *, opened: bool, step: int = 1) -> list[tuple[str, str]]:
    """(kind, text) of a text that comes `step` characters at a time, pieces of a kind joined."""
    pieces, found = Pieces(opened), list[tuple[str, str]]()
    for at in range(step, len(text) + step, step):
        for piece in pieces.of(text[:at], ended=at >= len(text)):
            kind = "thinking" if piece.thinking else "answer"
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + piece.text)
            else:
                found.append((kind, piece.text))
    return found


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("02\n04\n</think>42", True, [("thinking", "02\n04\n\n"), ("answer", "42")]),
        ("so 1<2</think>\n\nyes", True, [("thinking", "so 1<2\n\n"), ("answer", "yes")]),
        ("<think>hm</think>ok", False, [("thinking", "hm\n\n"), ("answer", "ok")]),
        ("</think>42", True, [("answer", "42")]),
        ("a <b> c", False, [("answer", "a <b> c")]),
        ("ends in <thi", True, [("thinking", "ends in <thi")]),
    ],
)
def test_thinking_is_told_from_the_answer_however_the_text_comes(
    text: str, opened: bool, parts: list[tuple[str, str]], step: int
):
    assert told(text, opened=opened, step=step) == parts


def test_the_answer_is_what_an_evaluation_would_judge():
    from tasks.verify import answer_part

    for text, opened in [("a</think>b", True), ("a", True), ("<think>a", False), ("x</think>y</think> z", True)]:
        one = Answer(Role.STUDENT, text, opened)
        assert (one.answer.strip() or None) == answer_part(text, thinking=opened), text
    assert Answer(Role.STUDENT, "<think>\na\n</think>\nb", False).thinking == "a"
    assert (Answer(Role.STUDENT, "b", False).thinking, Answer(Role.STUDENT, "b", False).answer) == ("", "b")


def drawn(width: int, *answers: Answer, terminal: bool = True, roles: list[Role] = BOTH) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=20, force_terminal=terminal, highlight=False, color_system=None)
    assert show(iter(answers), roles, console) == [a for a in answers if a.tokens is not None]
    return out.getvalue()


SAID = (
    Answer(Role.STUDENT, "wor", True),
    Answer(Role.STUDENT, "working</think>[bold]42[/bold]\x1b[2J\u202e", True, **DONE),  # type: ignore[arg-type]
    Answer(Role.TEACHER, "42", False, **{**DONE, "finish": "length"}),  # type: ignore[arg-type]
)


@pytest.mark.parametrize(("width", "terminal"), [(120, True), (60, True), (120, False)])
def test_answers_stand_beside_each_other_where_a_terminal_is_wide_enough(width: int, terminal: bool):
    text = drawn(width, *SAID, terminal=terminal)
    assert ("╭" in text) == (width == 120 and terminal)
    assert "[bold]42[/bold]?[2J?" in text and "</think>" not in text and "\u202e" not in text and "\x1b[2J" not in text
    assert "8 tokens, 16/s" in text and "8 tokens, 16/s, cut off" in text
    assert text.index("student") < text.index("teacher")


def test_one_model_needs_no_title_and_pieces_come_once():
    assert drawn(80, SAID[0], SAID[1], roles=[Role.STUDENT]).splitlines() == [
        "working", "", "[bold]42[/bold]?[2J?", "8 tokens, 16/s",
    ]  # fmt: skip


def test_panels_are_of_one_height_and_show_the_end_of_what_grows():
    console = Console(width=80, record=True, file=io.StringIO())
    long = Answer(Role.STUDENT, "\n".join(map(str, range(50))), False)
    console.print(panels({Role.STUDENT: long}, BOTH, 80, lines=4))
    lines = console.export_text().splitlines()
    assert len(lines) == 6 and "46" in lines[1] and "49" in lines[4]
    assert "writes" in lines[5] and "waits" in lines[5] and lines[5].count("╯") == 2


def test_two_need_76_columns():
    assert [fits_beside(2, 75), fits_beside(2, 76), fits_beside(1, 200)] == [False, True, False]


def test_figures_say_why_an_answer_ended():
    def of(finish: str, tokens: int = 1) -> str:
        return figures(Answer(Role.STUDENT, "x", tokens=tokens, seconds=0.5 * tokens, finish=finish))

    assert of("stop") == "1 token, 2/s"
    assert of("length", 1200) == "1,200 tokens, 2/s, cut off"
    assert of("stopped", 0) == "0 tokens, stopped"
    assert "longer than this model reads" in of("too_long", 0)


def test_the_document_has_what_was_said_and_unknown_is_null():
    loaded = {Role.TEACHER: Loaded(Role.TEACHER, "some/teacher", 7_000_000_000, "bfloat16", True, False)}
    document = answers_to_json("6*7", [SAID[2]], loaded)
    assert document["question"] == "6*7"
    assert document["answers"] == [{
        "role": "teacher", "model": "some/teacher", "text": "42", "thinking": None, "answer": "42", "tokens": 8,
        "seconds": 0.5, "tokens_per_s": 16.0, "first_token_s": 0.1, "finish": "length",
    }]  # fmt: skip
    assert loaded_words(loaded[Role.TEACHER]).startswith("some/teacher, 7.00 billion parameters, bfloat16; more bits")
