"""What does a person see of answers? Panels side by side where they fit, else one after the other, as they are written.

Texts are models': control characters are shown as `?`, and nothing in them is markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.answering import Answer, Loaded
from orchestrator.plain import printable
from orchestrator.student import Role

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

TITLES = {Role.BEFORE: "student before training", Role.STUDENT: "student", Role.TEACHER: "teacher"}
PANEL_COLUMNS = 38  # at least, for each of several
FRAME_LINES = 6  # of a terminal: frame, figures, the question above, the line below
MARKS = ("<think>", "</think>")
DRAW_PER_S = 8


def answers_to_json(question: str, answers: Sequence[Answer], loaded: Mapping[Role, Loaded]) -> dict[str, Any]:
    """One question in the document of `kdcloud try --json`."""
    return {
        "question": question,
        "answers": [
            {
                "role": str(one.role),
                "model": loaded[one.role].name,
                "text": one.text,
                "thinking": one.thinking or None,
                "answer": one.answer or None,
                "tokens": one.tokens,
                "seconds": one.seconds,
                "tokens_per_s": one.tokens_per_s,
                "first_token_s": one.first_token_s,
                "finish": one.finish,
            }
            for one in answers
        ],
    }


def show(saying: Iterable[Answer], roles: Sequence[Role], console: Console) -> list[Answer]:
    """Shows answers of these roles while they are written; what they are at the end."""
    wide = console.is_terminal and not console.is_dumb_terminal and fits_beside(len(roles), console.width)
    return (_beside if wide else _in_turn)(saying, roles, console)


def fits_beside(count: int, columns: int) -> bool:
    return count > 1 and columns >= count * PANEL_COLUMNS


# -- one after the other -----------------------------------------------------------------------------------------------


def _in_turn(saying: Iterable[Answer], roles: Sequence[Role], console: Console) -> list[Answer]:
    from rich.rule import Rule
    from rich.text import Text

    now: dict[Role, Answer] = {}
    pieces = Pieces(False)
    for one in saying:
        if one.role not in now:
            pieces = Pieces(one.opens_thinking)
            if len(roles) > 1:
                console.print(Rule(Text(TITLES[one.role]), align="left", style="dim"))
        now[one.role] = one
        for piece in pieces.of(one.text, ended=one.tokens is not None):
            console.print(Text(piece.text, "dim" if piece.thinking else ""), end="", soft_wrap=True)
        if one.tokens is not None:
            console.print(
                Text(f"{'' if pieces.at_line_start else chr(10)}{figures(one)}", "dim italic"), soft_wrap=True
            )
    return list(now.values())


@dataclass(frozen=True)
class Piece:
    text: str
    thinking: bool


class Pieces:
    """Cuts a text that grows into what is new, without the marks around thinking, which may come in two halves."""

    def __init__(self, thinking: bool) -> None:
        self._thinking, self._read, self._blank = thinking, 0, True
        self.at_line_start = True

    def of(self, text: str, *, ended: bool) -> list[Piece]:
        """What `text` has more than before."""
        found = []
        while self._read < len(text):
            rest = text[self._read :]
            mark = next((mark for mark in MARKS if rest.startswith(mark)), None)
            if mark is not None:
                self._read += len(mark)
                found += self._turn(mark == MARKS[0])
                continue
            if not ended and any(mark.startswith(rest) for mark in MARKS):
                break
            end = min((at for mark in "<" if (at := rest.find(mark, 1)) > 0), default=len(rest))
            self._read += end
            found += self._piece(rest[:end])
        return found

    def _turn(self, thinking: bool) -> list[Piece]:
        before, self._thinking = self._thinking, thinking
        found = [] if self._blank or before == thinking else [Piece("\n" if self.at_line_start else "\n\n", before)]
        self._blank = True
        self.at_line_start = True if found else self.at_line_start
        return found

    def _piece(self, text: str) -> list[Piece]:
        text = printable(text)
        if self._blank:
            text = text.lstrip("\n")
        if not text:
            return []
        self._blank, self.at_line_start = False, text.endswith("\n")
        return [Piece(text, self._thinking)]


# -- side by side ------------------------------------------------------------------------------------------------------


def _beside(saying: Iterable[Answer], roles: Sequence[Role], console: Console) -> list[Answer]:
    from rich.live import Live

    now: dict[Role, Answer] = {}
    # While it grows only the end of a text has room; the whole of it stands there when it is done.
    lines = max(3, console.height - FRAME_LINES)
    with Live(console=console, refresh_per_second=DRAW_PER_S, transient=True, vertical_overflow="crop") as live:
        for one in saying:
            now[one.role] = one
            live.update(panels(now, roles, console.width, lines=lines))
    console.print(panels(now, roles, console.width, waits="not asked"))
    return list(now.values())


def panels(
    now: Mapping[Role, Answer], roles: Sequence[Role], columns: int, *, lines: int = 0, waits: str = "waits"
) -> RenderableType:
    """A panel for each role, all of one height; with `lines`, no more than the last ones of each text."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    width = columns // len(roles)
    inside = Console(width=width - 4)
    wrapped = [list((body_of(now[role]) if role in now else Text()).wrap(inside, inside.width)) for role in roles]
    shown = [each[-lines:] if lines else each for each in wrapped]
    grid = Table.grid(padding=0)
    cells = []
    for role, body in zip(roles, shown, strict=True):
        one = now.get(role)
        told = waits if one is None else "writes" if one.tokens is None else figures(one)
        grid.add_column(width=width)
        cells.append(
            Panel(
                Text("\n").join(body), title=Text(TITLES[role]), title_align="left", subtitle=Text(told, "dim"),
                subtitle_align="left", border_style="green" if role is Role.STUDENT else "dim", width=width,
                height=2 + max(1, *map(len, shown)),
            )
        )  # fmt: skip
    grid.add_row(*cells)
    return grid


def body_of(one: Answer) -> Text:
    """Thinking dimmed, then the answer."""
    from rich.text import Text

    body = Text()
    for piece in Pieces(one.opens_thinking).of(one.text, ended=one.tokens is not None):
        body.append(piece.text, "dim" if piece.thinking else "")
    body.rstrip()
    return body


# -- words -------------------------------------------------------------------------------------------------------------


def figures(one: Answer) -> str:
    """`12 tokens, 85/s`; and why it ends, unless by itself."""
    if one.finish == "too_long":
        return "the question is longer than this model reads"
    speed = "" if one.tokens_per_s is None else f", {one.tokens_per_s:,.3g}/s"
    why = {"length": ", cut off", "stopped": ", stopped"}.get(one.finish, "")
    return f"{one.tokens:,} token{'' if one.tokens == 1 else 's'}{speed}{why}"
