"""The view of a run: which one a terminal gets, what it writes there, and that nothing it meets disturbs the run."""

from __future__ import annotations

import io
import re
import signal
import sys
import time

import pytest
from rich.text import Text

from orchestrator import live
from orchestrator.live import (
    HANG,
    PlainView,
    RichView,
    Screen,
    _Above,
    erased,
    hung,
    note_of_run,
    stopping_words,
    told,
    view_for,
)
from orchestrator.testing import fake_offer
from tasks.contract import Progress
from tests.plans import make_plan
from tests.test_scene import PLAN, World

SEQUENCE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal of some size; `resize` between two drawings."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        super().__init__()
        self.columns, self.lines = columns, lines

    def isatty(self) -> bool:
        return True

    encoding = "utf-8"  # type: ignore[assignment]


def take_terminal(monkeypatch) -> Terminal:
    """In the test itself: what a fixture puts there pytest takes away again."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setattr(Screen, "size", lambda self: (found.columns, found.lines))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


def running(done: float = 50.0):
    world = World()
    world.up(world.order("label"))
    world.clock.sleep(20)
    numbers = {"loss": 1.25, "rss_gib": 0.4}
    return world.snapshot(Progress("rehearse", 1, done=done, total=100, phase_s=20.0, attempt=1, numbers=numbers))


# --- which view


def test_a_terminal_gets_the_picture_and_everything_else_plain_lines(monkeypatch):
    take_terminal(monkeypatch)
    assert isinstance(view_for(PLAN, "fake:"), RichView)
    for term in ("dumb", ""):
        monkeypatch.setenv("TERM", term)
        assert isinstance(view_for(PLAN, "fake:"), PlainView)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    assert isinstance(view_for(PLAN, "fake:"), PlainView)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(view_for(PLAN, "fake:"), PlainView)


# --- plain lines


def test_plain_lines_come_when_something_happens_and_every_ten_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "200")
    view = PlainView(PLAN)
    view.say("start", "label", "on this machine")
    view.say("warn", None, "prices are old")
    for second in range(25):
        now[0] = 100.0 + second
        view.update(running())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 + 3  # at 0, 10 and 20 s
    assert re.fullmatch(r"\d\d:\d\d:\d\d  label      on this machine", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d  prices are old", lines[1])
    for part in (
        "rehearse 50 % (50/100 steps)",
        "loss 1.25",
        "2.5 steps/s",
        "0.40 GiB",
        "20 s left (",
        "spent",
        "cap ¥",
    ):
        assert part in lines[2]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (80, r"50/100 steps, loss 1.25, 20 s left, ¥0\.\d+ spent"),
        (60, "50/100 steps, loss 1.25, 20 s left"),
        (50, "50/100 steps, 20 s left"),
    ],
)
def test_what_a_narrow_line_has_no_room_for_is_left_out(monkeypatch, capsys, columns, told):
    monkeypatch.setenv("COLUMNS", str(columns))
    PlainView(PLAN).update(running())
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= columns and re.fullmatch(r"\d\d:\d\d:\d\d  label      " + told, line)


def test_what_a_provider_says_cannot_make_a_second_line(capsys):
    PlainView(PLAN).say("warn", "label", "no\nroom\x1b[2J left\r")
    assert capsys.readouterr().err.count("\n") == 1


# --- the screen


def test_a_picture_takes_back_the_one_before():
    assert erased([10, 0, 79], 80) == "\r\x1b[3A\x1b[J"
    assert erased([], 80) == "\r\x1b[J"


def test_a_terminal_that_became_narrower_has_wrapped_the_old_lines_and_all_are_taken_back():
    assert erased([119, 60, 61, 0], 60) == "\r\x1b[6A\x1b[J"  # 2 + 1 + 2 + 1 rows


def test_the_picture_is_drawn_for_the_size_the_terminal_has_now(monkeypatch):
    terminal = take_terminal(monkeypatch)
    screen, sizes = Screen(terminal), []

    def lines_of(width: int, height: int) -> list[Text]:
        sizes.append((width, height))
        return [Text("x" * width)] * 2

    screen.paint([], lines_of)
    terminal.columns, terminal.lines = 40, 10
    screen.paint([Text("12:00:00 ▶ label      begins")], lines_of)
    assert sizes == [(79, 23), (39, 9)]
    written = terminal.getvalue()
    assert written.count("\x1b[4A") == 1  # two lines of 79 columns are four rows of 40
    assert written.index("\x1b[4A") < written.index("begins") < written.rindex("x" * 39)


def test_what_happened_stays_and_the_picture_goes_when_it_ends(monkeypatch):
    terminal = take_terminal(monkeypatch)
    screen = Screen(terminal)
    screen.begin()
    screen.paint([], lambda width, height: [Text("picture")])
    screen.end([Text("12:00:00 ✓ label      done")])
    after = terminal.getvalue().rsplit("\x1b[J", 1)[1]
    assert "picture" not in after and "done" in after
    assert terminal.getvalue().index("\x1b[?25l") < terminal.getvalue().rindex("\x1b[?25h")  # the cursor is back


def test_what_happened_is_wrapped_at_words_below_itself():
    (first, second, *_) = hung([told("warn", "train", "a machine that cannot be had for the moment", None)], 50)
    assert first.plain.startswith(told("warn", "train", "").plain[:HANG]) and len(first.plain) <= 50
    assert second.plain.startswith(" " * HANG) and not second.plain[HANG:].startswith(" ")
    words = " ".join(part.plain[HANG:].strip() for part in (first, second))
    assert words == "train      a machine that cannot be had for the moment"


def test_no_colour_is_used_where_none_is_wanted(monkeypatch):
    terminal = take_terminal(monkeypatch)

    def codes() -> set[str]:
        screen = Screen(terminal)
        screen.paint([], lambda width, height: [Text("done", "green bold")])
        return set(re.findall(r"\x1b\[([0-9;]+)m", terminal.getvalue()))

    assert any("32" in code for code in codes())
    terminal.seek(0)
    terminal.truncate()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("3" in code for code in codes())


# --- the view as a whole


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_view_draws_the_run_and_tells_what_happens_above_it(tmp_path, monkeypatch):
    terminal = take_terminal(monkeypatch)
    with RichView(PLAN, f"file:{tmp_path}", note=note_of_run("r-abc123")) as view:
        view.say("start", "label", "on this machine")
        view.update(running())
        wait_for(lambda: "50 of 100 steps" in terminal.getvalue())
        print("a library speaks")
        wait_for(lambda: "a library speaks" in terminal.getvalue())
    text = SEQUENCE.sub("", terminal.getvalue())
    assert "on this machine" in text and "Ctrl-C saves a checkpoint" in text
    assert sys.stderr is terminal and sys.stdout is not None
    assert not view._threads[0].is_alive()


def test_losses_come_from_the_bucket_while_they_grow(tmp_path, monkeypatch):
    take_terminal(monkeypatch)
    monkeypatch.setattr(live, "CURVE_EVERY_S", 0.02)
    folder = tmp_path / "label"
    folder.mkdir()
    view = RichView(PLAN, f"file:{tmp_path}")
    with view:
        view.update(running())
        for count in (1, 2):
            rows = "".join(f'{{"step": {i}, "loss/total": {9 - i}}}\n' for i in range(count))
            (folder / "metrics.jsonl").write_text(rows)
            wait_for(lambda count=count: len(view._curve[1].values) == count)
    assert view._curve[0] == "label"


def test_a_view_that_cannot_be_drawn_gives_way_to_plain_lines(tmp_path, monkeypatch):
    terminal = take_terminal(monkeypatch)

    def broken(*args: object) -> list[Text]:
        raise ValueError("bad luck")

    monkeypatch.setattr(live, "draw", broken)
    with RichView(PLAN, f"file:{tmp_path}") as view:
        print("half a line", end="")
        view.update(running())
        wait_for(lambda: view._plain is not None)
        view.say("done", "label", "done all the same")
    assert "the live view failed (ValueError('bad luck'))" in terminal.getvalue()
    assert "done all the same" in terminal.getvalue() and terminal.getvalue().count("half a line") == 1


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path, monkeypatch):
    terminal = take_terminal(monkeypatch)
    with RichView(PLAN, f"file:{tmp_path}") as view:
        monkeypatch.setattr(terminal, "write", gone)
        view.say("start", "label", "on this machine")
        wait_for(lambda: view._plain is not None)
        view.say("done", "label", "done")
        view.update(running())


def gone(text: str) -> int:
    raise OSError(5, "Input/output error")


def test_word_may_be_left_from_a_signal_handler(tmp_path, monkeypatch):
    """Even while the main thread is inside of the view: nothing there waits for a lock that it holds."""
    terminal = take_terminal(monkeypatch)
    heard: list[None] = []
    with RichView(PLAN, f"file:{tmp_path}") as view:
        before = signal.signal(signal.SIGALRM, lambda *_: heard.append(view.say("stop", None, "stopping now")))
        try:
            snapshot = running()
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.02)
            until = time.monotonic() + 10
            while len(heard) < 8 and time.monotonic() < until:
                view.update(snapshot)
                view.say("up", "label", "still here")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert "stopping now" in terminal.getvalue()


def test_what_is_printed_meanwhile_becomes_whole_lines_without_control_characters():
    heard = []
    above = _Above(lambda kind, stage, text: heard.append(text))
    above.write("half a ")
    above.write("line\nand \x1b[31mred\n\n")
    assert heard == ["half a line", "and \x1b[31mred"]
    assert told("print", None, heard[1]).plain.endswith("and red")


# --- Ctrl-C


def test_the_first_ctrl_c_says_what_happens_and_how_to_go_on_and_the_second_what_it_cannot_do():
    first, second = (stopping_words("r-abc123", PLAN, times) for times in (1, 2))
    assert "saves a checkpoint" in first and "its machine is ended" in first
    assert "kdcloud run --resume r-abc123" in first
    assert "does not hurry" in second and "kdcloud down r-abc123" in second


def test_how_long_a_stop_may_take_comes_from_the_machines_own_delays():
    offer = fake_offer()
    longest = offer.latencies.flush_s + offer.latencies.ending_s
    assert longest == 240.0 and "within 4.0 min" in stopping_words("r", make_plan({"a": 1.0}, offers=(offer,)), 1)
