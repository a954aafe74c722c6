"""What a person sees while a run goes on: a live view on a terminal, plain lines anywhere else. Talk, so: stderr."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol

from orchestrator.drawing import count_of, draw, span
from orchestrator.money import human_seconds, shown
from orchestrator.plan import Plan
from orchestrator.runner import Snapshot
from orchestrator.scene import Curve, Scene, Told, clean, curve_of, load_of, phase_of, scene_of, speed_of, told_by
from tasks.bucket import BucketError, open_bucket
from tasks.contract import METRICS_FILE, Progress

if TYPE_CHECKING:
    from rich.text import Text

PLAIN_EVERY_S = 10.0
HANG = 11  # columns of the time and the mark before what happened
DRAW_EVERY_S = 0.5
CURVE_EVERY_S = 5.0
CURVE_BYTES_S = 200_000  # of metrics.jsonl; larger ones are read less often
MARKS = {
    "warn": ("!", "yellow"), "done": ("✓", "green"), "stop": ("■", "yellow"), "start": ("▶", "cyan"), "gate": ("≈", ""),
}  # fmt: skip


class View(Protocol):
    note: str  # what Ctrl-C does, or is doing
    state: str  # running, stopping ...

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, kind: str, stage: str | None, text: str, at: datetime | None = None) -> None: ...

    def update(self, snapshot: Snapshot) -> None: ...


def view_for(plan: Plan, url: str, *, note: str = "") -> View:
    """A RichView on a terminal that can be drawn on, else a PlainView. `url`: the run's place in its bucket."""
    able = os.environ.get("TERM") not in (None, "", "dumb") and "utf" in (sys.stderr.encoding or "").lower()
    return RichView(plan, url, note=note) if able and sys.stderr.isatty() else PlainView(plan, note=note)


def note_of_run(run_id: str) -> str:
    """What Ctrl-C does in `kdcloud run`."""
    return f"Ctrl-C saves a checkpoint and ends the machine; `kdcloud run --resume {run_id}` then goes on"


def stopping_words(run_id: str, plan: Plan, times: int) -> str:
    """What the first and each further Ctrl-C in `kdcloud run` says."""
    if times > 1:
        return (
            f"it ends already, and Ctrl-C does not hurry it; should this terminal die, `kdcloud down {run_id}` ends it"
        )
    latencies = [stage.offer.latencies for stage in plan.stages]
    longest_s = max((one.flush_s + one.ending_s for one in latencies), default=0.0)
    return (
        f"stopping: the stage saves a checkpoint, then its machine is ended, within {human_seconds(longest_s)}; "
        f"`kdcloud run --resume {run_id}` goes on from there"
    )


class PlainView:
    """One line when something happens, and one every ten seconds while a stage works."""

    def __init__(self, plan: Plan, *, note: str = "") -> None:
        self.note, self.state = note, "running"
        self._plan, self._last, self._told = plan, -PLAIN_EVERY_S, _Memory(plan)

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def say(self, kind: str, stage: str | None, text: str, at: datetime | None = None) -> None:
        with contextlib.suppress(OSError):  # whoever read has left: the run goes on without them
            name = f"{clean(stage):<10} " if stage else ""
            print(f"{clock_of(at)}  {name}{clean(text)}", file=sys.stderr, flush=True)

    def update(self, snapshot: Snapshot) -> None:
        told = self._told.at(snapshot)
        if snapshot.progress is None or time.monotonic() - self._last < PLAIN_EVERY_S:
            return
        self._last = time.monotonic()
        scene = scene_of(snapshot, self._plan, now=datetime.now(UTC), curve=Curve(), state=self.state, told=told)
        room = shutil.get_terminal_size().columns - HANG - max(HANG, len(clean(snapshot.stage or "")) + 1)
        self.say("progress", snapshot.stage, plain_line(scene, snapshot, self._plan, room))


class RichView:
    """A picture that redraws itself below what happens, which stays. One thread draws, another reads the losses.

    Nothing that goes wrong in either may disturb the run: then plain lines go on in its place.
    """

    def __init__(self, plan: Plan, url: str, *, note: str = "") -> None:
        self.note, self.state = note, "running"
        self._plan, self._url = plan, url
        self._inbox: SimpleQueue[Text | None] = SimpleQueue()  # a signal handler may put, whatever it interrupts
        self._seen: tuple[Snapshot, Told | None, float] | None = None
        self._told = _Memory(plan)
        self._curve: tuple[str | None, Curve] = (None, Curve())
        self._screen = Screen(sys.stderr)
        self._plain: PlainView | None = None
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._draw_on, self._read_on)]
        self._streams = contextlib.ExitStack()

    def __enter__(self) -> RichView:
        self._screen.begin()
        above = _Above(self.say)
        self._streams.enter_context(contextlib.redirect_stdout(above))
        self._streams.enter_context(contextlib.redirect_stderr(above))
        self._streams.callback(above.write, "\n")  # what has no end yet is told as it is
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._inbox.put(None)
        self._threads[0].join(timeout=2)
        self._streams.close()
        with contextlib.suppress(OSError, ValueError):
            self._screen.end(self._taken())

    def say(self, kind: str, stage: str | None, text: str, at: datetime | None = None) -> None:
        """Also from a signal handler: it only leaves word."""
        if self._plain is not None:
            self._plain.say(kind, stage, text, at)
        else:
            self._inbox.put(told(kind, stage, text, at))

    def update(self, snapshot: Snapshot) -> None:
        before = self._seen
        self._seen = (snapshot, self._told.at(snapshot), time.monotonic())
        if self._plain is not None:
            self._plain.update(snapshot)
        elif before is None or before[0].stage != snapshot.stage:
            self._inbox.put(None)

    def scene(self) -> Scene | None:
        """What is to be drawn now; None before anything was seen."""
        if self._seen is None:
            return None
        snapshot, told, at = self._seen
        stage, curve = self._curve
        return scene_of(
            snapshot, self._plan, now=datetime.now(UTC), curve=curve if stage == snapshot.stage else Curve(),
            state=self.state, note=self.note, since_s=time.monotonic() - at, told=told,
        )  # fmt: skip

    def _taken(self, wait_s: float = 0.0) -> list[Text]:
        """What was said, after a wait for the first word; None is a word that only wakes."""
        found: list[Text | None] = []
        with contextlib.suppress(Empty):
            found.append(self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait())
            while True:
                found.append(self._inbox.get_nowait())
        return [line for line in found if line is not None]

    def _draw_on(self) -> None:
        said: list[Text] = []
        try:
            while not self._ended.is_set():
                said = self._taken(DRAW_EVERY_S)
                scene = self.scene()
                self._screen.paint(said, partial(draw, scene) if scene is not None else _nothing)
        except Exception as error:  # noqa: BLE001 - a picture that cannot be drawn must not end a run that costs money
            self._streams.close()  # first: until then what is printed comes back here
            self._plain = PlainView(self._plan, note=self.note)
            self._plain.say("warn", None, f"the live view failed ({error!r}); plain lines from here")
            for line in [*said, *self._taken()]:
                self._plain.say("said", None, line.plain[HANG:])

    def _read_on(self) -> None:
        """Losses of the running stage; a bucket that does not answer is asked again."""
        pause = 1.0
        while not self._ended.wait(pause):
            stage = self._seen[0].stage if self._seen else None
            if stage is None:
                continue
            pause = CURVE_EVERY_S
            with contextlib.suppress(BucketError, OSError, ImportError):
                data, _ = open_bucket(self._url).get(f"{stage}/{METRICS_FILE}")
                self._curve = (stage, curve_of(data.decode(errors="replace")))
                pause = max(CURVE_EVERY_S, len(data) / CURVE_BYTES_S)
                self._inbox.put(None)


class _Memory:
    """What a stage last told of its work."""

    def __init__(self, plan: Plan) -> None:
        self._stages = {stage.name: stage for stage in plan.stages}
        self._told: Told | None = None

    def at(self, snapshot: Snapshot) -> Told | None:
        stage = self._stages.get(snapshot.stage or "")
        self._told = (told_by(snapshot, stage) if stage is not None else None) or self._told
        return self._told


def _nothing(width: int, height: int) -> list[Text]:
    return []


class Screen:
    """The last lines of a terminal, drawn again and again; what is to stay goes above them.

    A terminal that was made narrower has wrapped the old lines by itself: so many rows are taken back.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._widths: list[int] = []

    def begin(self) -> None:
        self._write("\x1b[?25l")

    def paint(self, above: list[Text], lines_of: Callable[[int, int], list[Text]]) -> None:
        width, height = self.size()
        lines = lines_of(width - 1, height - 1)
        back = erased(self._widths, width)
        self._widths = [line.cell_len for line in lines]
        self._write(back + self._ansi(hung(above, width), width) + self._ansi(lines, width))

    def end(self, above: list[Text]) -> None:
        """Leaves what was said; the picture goes."""
        width, _ = self.size()
        self._write(erased(self._widths, width) + self._ansi(hung(above, width), width) + "\x1b[?25h")
        self._widths = []

    def size(self) -> tuple[int, int]:
        try:
            found = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return 80, 24
        return (found.columns or 80), (found.lines or 24)

    def _ansi(self, lines: list[Text], width: int) -> str:
        from rich.console import Console

        console = Console(file=self._stream, force_terminal=True, width=width, highlight=False)
        with console.capture() as text:
            for line in lines:
                console.print(line, soft_wrap=True)
        return text.get()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def erased(widths: list[int], columns: int) -> str:
    """What takes back lines that were so wide, now that the terminal has so many columns; the cursor is below them."""
    rows = sum(max(1, math.ceil(width / columns)) for width in widths)
    return f"\r\x1b[{rows}A\x1b[J" if rows else "\r\x1b[J"


def hung(lines: list[Text], width: int) -> list[Text]:
    """What happened, wrapped at words below its own text."""
    from rich.console import Console
    from rich.text import Text

    console, found, room = Console(width=width), [], max(HANG, width - HANG)
    for line in lines:
        for index, part in enumerate(line[HANG:].wrap(console, room)):
            part.rstrip()
            found.append(Text.assemble(" " * HANG if index else line[:HANG], part))
    return found


class _Above:
    """What anybody prints meanwhile, as lines above the picture."""

    encoding = "utf-8"

    def __init__(self, say: Callable[[str, str | None, str], None]) -> None:
        self._say, self._rest = say, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if clean(line).strip():
                self._say("print", None, line)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def told(kind: str, stage: str | None, text: str, at: datetime | None = None) -> Text:
    """One line of what happened."""
    from rich.text import Text

    mark, style = MARKS.get(kind, ("·", ""))
    name = clean(stage) if stage else ""
    return Text.assemble(
        (f"{clock_of(at)} ", "dim"), (f"{mark} ", style), (f"{name:<10} " if name else "", "bold"), (clean(text), style)
    )


def clock_of(at: datetime | None) -> str:
    return (at.astimezone() if at else datetime.now()).strftime("%H:%M:%S")  # noqa: DTZ005 - the clock on the wall


# --- plain lines -----------------------------------------------------------------------------------------------------


def plain_line(scene: Scene, snapshot: Snapshot, plan: Plan, room: int) -> str:
    """`train 42 % (336/800 steps), loss 1.2, 900 tokens/s, 40 s left (35–50 s), ¥0.02 spent ...`; where there is no
    room for it `336/800 steps, loss 1.2, 40 s left, ¥0.02 spent`, or less. A warning always stays."""
    progress = snapshot.progress
    assert progress is not None
    stage = next((one for one in plan.stages if one.name == snapshot.stage), None)
    line = next((one for one in scene.stages if one.name == snapshot.stage), None)
    left = line.left if line is not None and line.state == "running" else None
    loss = f"loss {progress.numbers['loss']:.4g}" if "loss" in progress.numbers else ""
    soon = f"{human_seconds(left.expected)} left" if left is not None else ""
    speed = [speed_of(stage, progress) if stage else "", load_of(progress.numbers)]
    whole = _joined(
        describe(progress), loss, *speed, f"{soon} ({span(left)})" if left is not None else "", money(scene)
    )
    spent = f"{shown(scene.spent_micros, scene.rate, scene.currency)} spent"
    warning = f"; {scene.warning}" if scene.warning else ""
    short = [_joined(_count(progress), *parts) + warning for parts in ((loss, soon, spent), (loss, soon), (soon,))]
    return next((text for text in (whole, *short) if len(text) <= room), short[-1])


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def describe(progress: Progress) -> str:
    """`train 42 % (336/800 steps)`."""
    if not progress.total:
        return phase_of(progress)
    return f"{progress.phase} {100 * progress.done / progress.total:.0f} % ({_count(progress)})"


def _count(progress: Progress) -> str:
    """`336/800 steps`."""
    if not progress.total:
        return phase_of(progress)
    return f"{count_of(progress.done)}/{count_of(progress.total)} {progress.unit}"


def money(scene: Scene) -> str:
    """`¥0.0213 spent, ¥0.03 at the end (¥0.02–¥0.04), cap ¥1.00`, and the worst case where an end is not confirmed."""

    def amount(micros: int) -> str:
        return shown(micros, scene.rate, scene.currency)

    low, likely, high = (amount(m) for m in (scene.forecast.low, scene.forecast.expected, scene.forecast.high))
    text = f"{amount(scene.spent_micros)} spent, {likely} at the end ({low}–{high}), cap {amount(scene.cap_micros)}"
    return f"{text}; {scene.warning}" if scene.warning else text
