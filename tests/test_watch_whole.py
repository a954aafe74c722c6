"""Real runs on this machine, looked at from real terminals and pipes while they go on."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

import pytest

from tests.whole_runs import Home, make_home

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # keys are pressed while a short run goes on

RECIPE = """
name: seen
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: first, kind: rehearse, steps: 60, seconds_per_step: 0.1}
  - {name: second, kind: rehearse, steps: 60, seconds_per_step: 0.1}
"""
SEQUENCE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal:
    """A command on a terminal of some size; `seen` is all that it wrote."""

    def __init__(self, home: Home, columns: int, lines: int, *words: str) -> None:
        self._own, theirs = pty.openpty()
        self.resize(columns, lines)
        env = {key: value for key, value in home.env.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            home.command(*words), cwd=home.folder, env={**env, "TERM": "xterm-256color"}, stdin=theirs, stdout=theirs,
            stderr=theirs, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read_until(self, text: str, limit_s: float = 60.0) -> str:
        """What was written since the last call, up to a picture or line that holds the text."""
        began, until = len(self.seen), time.monotonic() + limit_s
        while text not in SEQUENCE.sub("", self.seen[began:]):
            assert time.monotonic() < until, self.seen[-4000:]
            assert self._read(), self.seen[-4000:]
        return self.seen[began:]

    def read_to_end(self, limit_s: float = 120.0) -> int:
        until = time.monotonic() + limit_s
        while self._read() and time.monotonic() < until:
            continue
        return self.process.wait(timeout=10)

    def _read(self) -> bool:
        if not select.select([self._own], [], [], 1.0)[0]:
            return self.process.poll() is None
        try:
            self.seen += os.read(self._own, 1 << 16).decode(errors="replace")
        except OSError:  # the last one who held it has left
            return False
        return True

    def press(self, keys: bytes) -> None:
        os.write(self._own, keys)


def test_a_run_on_a_terminal_is_drawn_redrawn_after_a_resize_and_stopped_by_ctrl_c(tmp_path):
    home = make_home(tmp_path, RECIPE)
    terminal = Terminal(home, 120, 40, "run", "recipe.yaml", "--yes")
    wide = SEQUENCE.sub("", terminal.read_until("of 60 steps"))
    assert "price/h" in wide and "at the end" in wide
    terminal.resize(60, 20)
    terminal.read_until("steps")
    terminal.read_until("steps")
    narrow = terminal.read_until("steps").split("\x1b[J")[-1]
    assert "price/h" not in narrow
    assert max(len(line) for line in SEQUENCE.sub("", narrow).replace("\r", "").split("\n")) <= 60
    terminal.press(b"\x03")
    terminal.read_until("stopping: the stage saves a checkpoint")
    assert terminal.read_to_end() == 130
    assert terminal.seen.count("\x1b[?25h") == 1  # the cursor is back
    assert "go on with `kdcloud run --resume" in SEQUENCE.sub("", terminal.seen)
    home.check_over()


def test_others_watch_a_detached_run_and_end_when_it_ends(tmp_path):
    home = make_home(tmp_path, RECIPE)
    started = home.call("run", "recipe.yaml", "--yes", "--detach")
    assert started.returncode == 0, started.stderr
    run = started.stdout.strip()
    leaver = Terminal(home, 80, 24, "attach")
    leaver.read_until("of 60 steps")
    leaver.press(b"\x03")
    assert leaver.read_to_end() == 0
    assert f"{run} goes on without this window" in SEQUENCE.sub("", leaver.seen)
    watch = subprocess.Popen(
        home.command("status", "--watch"), cwd=tmp_path, env=home.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    logs = home.call("logs", "-f")
    assert logs.returncode == 0 and logs.stdout.count("[supervisor] attempt 1 of stage") == 2
    assert f"--- {run}: done ---" in logs.stderr and "--- second ---" in logs.stderr
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0 and "\x1b" not in err
    assert run in out and "nothing bills" in out
    assert "second     done" in err and re.search(r"first +\d+/60 steps, .* spent", err)
    home.check_over()


def test_watch_and_json_do_not_go_together(tmp_path):
    done = make_home(tmp_path, RECIPE).call("status", "--watch", "--json")
    assert done.returncode == 2 and "leave one of them out" in done.stderr
