"""Makes the pictures of the README from real runs: a plan, the quickstart while it trains, and its report page.

    python scripts/pictures.py            # all of docs/pictures, in about three minutes; needs tmux and Chromium
    python scripts/pictures.py plan       # only that one

Terminals are tmux's own, so what is drawn is what a person would see; rich draws it as SVG. Nothing is touched up.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
PLANNED = "r1-qwen-1.5b"
TRAINED_SHARE = 55  # per cent of the student's training at which the live view is taken
LIMIT_S = 2400.0  # an idle machine takes three minutes
PAGE = (900, 800)  # of the report that is shown, CSS pixels
COLOURS = 96  # of the PNG
COLUMNS = 110  # of a terminal
# rich's own frame without the fonts it would fetch from a server.
FRAME = re.compile(r"@font-face \{.*?\}\s*", re.S)


class Terminal:
    """One command in a terminal of its own."""

    def __init__(self, home: Path, command: str, *, lines: int) -> None:
        self._server = f"kdcloud-pictures-{os.getpid()}"
        inside = f"{shlex.quote(sys.executable)} -c 'from orchestrator.cli import main; main()' {command}"
        env = {"KDCLOUD_HOME": str(home), "PYTHONPATH": str(ROOT), "COLORTERM": "truecolor", "LANG": "C.UTF-8"}
        told = [word for key, value in env.items() for word in ("-e", f"{key}={value}")]
        size = ["-x", str(COLUMNS), "-y", str(lines), "-c", str(home.parent)]
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, *told, f"{inside}; sleep {LIMIT_S:.0f}")
        self._tmux("set", "-g", "status", "off")

    def shown(self, *, colours: bool = False) -> str:
        """What stands in the terminal now."""
        return self._tmux("capture-pane", "-p", *(["-e"] if colours else [])).rstrip("\n")

    def wait(self, good: Callable[[str], bool]) -> str:
        """The first text that is as wanted, with its colours. Raises TimeoutError."""
        end = time.monotonic() + LIMIT_S
        while not good(self.shown()):
            if time.monotonic() > end:
                raise TimeoutError(self.shown())
            time.sleep(1)
        return self.shown(colours=True)

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *words: str) -> str:
        argv = ["tmux", "-L", self._server, *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Makes the pictures named on the command line, or all."""
    wanted = sys.argv[1:] or ["plan", "run", "report"]
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder) / "home"
        if "plan" in wanted:
            plan(home)
        if "run" in wanted or "report" in wanted:
            run(home)
        if "report" in wanted:
            report(home, Path(folder) / "report.html")
    total = 0
    for file in sorted(PICTURES.iterdir()):
        total += file.stat().st_size
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1000:.0f} kB")
    print(f"{total / 1000:.0f} kB in all")


def plan(home: Path) -> None:
    """What `kdcloud plan` prints of a template in which two lines were taken in: its bucket, and keys on machines."""
    recipe = home.parent / "recipe.yaml"
    kdcloud(home, "init", str(recipe), "--template", PLANNED, "--yes", "--force")
    text = recipe.read_text(encoding="utf-8")
    for key in ("bucket", "allow_account_key"):
        text, times = re.subn(rf"^# ({key}:)", r"\1", text, flags=re.M)
        if times != 1:
            raise ValueError(f"the template {PLANNED} offers {key} {times} times")
    recipe.write_text(text, encoding="utf-8")
    terminal = Terminal(home, "plan recipe.yaml", lines=48)
    try:
        text = terminal.wait(lambda shown: bool(re.search(r"; plan [0-9a-f]{12}", shown)))
    finally:
        terminal.close()
    drawn(text, "plan.svg", "kdcloud plan recipe.yaml")


def run(home: Path) -> None:
    """The live view of `kdcloud run quickstart` in the middle of its training, and the run to its end."""
    terminal = Terminal(home, "run quickstart --yes", lines=28)
    try:
        text = terminal.wait(lambda shown: _trained(shown) >= TRAINED_SHARE)
        drawn(text, "run.svg", "kdcloud run quickstart --yes")
        terminal.wait(lambda _: '"state": "done"' in kdcloud(home, "status", "last", "--json"))
    except TimeoutError:
        kdcloud(home, "down", "last")
        raise
    finally:
        terminal.close()


def kdcloud(home: Path, *words: str) -> str:
    """What the command prints on stdout."""
    env = {**os.environ, "KDCLOUD_HOME": str(home), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", "from orchestrator.cli import main; main()", *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout


def _trained(shown: str) -> int:
    found = re.search(r"^ +▶ train .*\n +train .*?(\d+)%", shown, re.M)
    return int(found[1]) if found else 0


def drawn(text: str, name: str, title: str) -> None:
    """Writes a terminal's text as an SVG picture."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in text.strip("\n").splitlines():
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title=title, unique_id=name.removesuffix(".svg"))
    svg = re.sub(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', r'width="\1" height="\2" \g<0>', FRAME.sub("", svg), count=1)
    (PICTURES / name).write_text(svg, encoding="utf-8")  # with a size, since tables shrink a picture without one


def report(home: Path, page: Path) -> None:
    """The upper part of the report page, as Chromium shows it."""
    from PIL import Image

    kdcloud(home, "report", "last", "--html", str(page))
    browser = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    shot = page.with_suffix(".png")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1.5"]
    flags += [f"--window-size={PAGE[0]},{PAGE[1]}", f"--user-data-dir={page.parent / 'profile'}"]
    subprocess.run([browser, *flags, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
    with Image.open(shot) as image:
        image.convert("RGB").quantize(COLOURS).save(PICTURES / "report.png", optimize=True)


if __name__ == "__main__":
    main()
