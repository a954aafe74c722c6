"""What a person sees while a run goes on: a live view on a terminal, plain lines anywhere else. Talk, so: stderr."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from orchestrator import spend
from orchestrator.money import human_seconds, shown
from orchestrator.plan import Plan
from orchestrator.runner import Snapshot, offer_from_dict
from orchestrator.states import State
from tasks.contract import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_EVERY_S = 10.0
SPARKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, kind: str, stage: str | None, text: str) -> None: ...

    def update(self, snapshot: Snapshot) -> None: ...


def view_for(plan: Plan) -> View:
    """A RichView on a capable terminal, else a PlainView."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
        return RichView(plan)
    return PlainView(plan)


class PlainView:
    """One line when something happens, and one every ten seconds while a stage works."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._last = plan, 0.0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        sys.stderr.flush()

    def say(self, kind: str, stage: str | None, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {stage or '-':<10} {text}", file=sys.stderr, flush=True)

    def update(self, snapshot: Snapshot) -> None:
        if snapshot.progress is None or time.monotonic() - self._last < PLAIN_EVERY_S:
            return
        self._last = time.monotonic()
        parts = [describe(snapshot.progress), numbers(snapshot.progress), money(snapshot, self._plan)]
        self.say("progress", snapshot.stage, ", ".join(part for part in parts if part))


class RichView:
    """A table of stages that redraws itself; what happens is printed above it and stays."""

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live

        self._plan = plan
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._losses: list[float] = []
        self._phase: tuple[str | None, str] = (None, "")
        self._phase_at: tuple[float, float] = (0.0, 0.0)

    def __enter__(self) -> RichView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def say(self, kind: str, stage: str | None, text: str) -> None:
        from rich.text import Text

        colour = {"warn": "yellow", "done": "green", "stop": "yellow"}.get(kind, "")
        mark = {"warn": "!", "done": "✓", "stop": "■", "up": "·", "gone": "·", "start": "▶"}.get(kind, "·")
        line = Text.assemble(
            (f"{time.strftime('%H:%M:%S')} ", "dim"),
            (f"{mark} ", colour),
            (f"{stage or '':<10} ", "bold"),
            (text, colour),
        )
        self._console.print(line, soft_wrap=True)

    def update(self, snapshot: Snapshot) -> None:
        self._live.update(self._draw(snapshot))

    def _draw(self, snapshot: Snapshot) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(min_width=9)
        grid.add_column()
        for stage in self._plan.stages:
            if stage.name in snapshot.run.done:
                grid.add_row(Text("✓", "green"), stage.name, Text("done", "dim"))
            elif stage.name != snapshot.stage:
                grid.add_row(
                    Text("·", "dim"),
                    Text(stage.name, "dim"),
                    Text(f"about {human_seconds(stage.hours.expected * 3600)}", "dim"),
                )
            else:
                grid.add_row(Text("▶", "cyan"), Text(stage.name, "bold"), Text(self._working(snapshot)))
                if snapshot.progress and snapshot.progress.total:
                    bar = ProgressBar(total=snapshot.progress.total, completed=snapshot.progress.done, width=40)
                    eta = self._eta(snapshot)
                    grid.add_row("", "", _side(bar, eta))
                if len(self._losses) > 1:
                    grid.add_row("", Text("loss", "dim"), Text(sparkline(self._losses), "cyan"))
        return Group(
            grid, Text(money(snapshot, self._plan) + "   Ctrl-C saves a checkpoint and ends the machine", "dim")
        )

    def _working(self, snapshot: Snapshot) -> str:
        if snapshot.machine is None:
            return "choosing a machine"
        if snapshot.progress is None:
            return f"{str(snapshot.machine.state).lower()}, {human_seconds(snapshot.machine_age_s)}"
        loss = snapshot.progress.numbers.get("loss")
        if loss is not None and (not self._losses or self._losses[-1] != loss):
            self._losses = [*self._losses, loss][-48:]
        return ", ".join(part for part in (describe(snapshot.progress), numbers(snapshot.progress)) if part)

    def _eta(self, snapshot: Snapshot) -> str:
        progress = snapshot.progress
        assert progress is not None and progress.total
        now = time.monotonic()
        key = (snapshot.stage, progress.phase)
        if key != self._phase or progress.done < self._phase_at[1]:
            self._phase, self._phase_at = key, (now, progress.done)
            self._losses = self._losses if key[0] == self._phase[0] else []
        moved, took = progress.done - self._phase_at[1], now - self._phase_at[0]
        if moved <= 0 or took < 1:
            return ""
        return f"{human_seconds((progress.total - progress.done) * took / moved)} left"


def _side(bar: RenderableType, text: str) -> RenderableType:
    from rich.table import Table

    row = Table.grid(padding=(0, 1))
    row.add_row(bar, text)
    return row


def describe(progress: Progress) -> str:
    """`train 42 % (336/800 steps)`."""
    if not progress.total:
        return progress.phase
    count = f"{progress.done:,.0f}/{progress.total:,.0f} {progress.unit}"
    return f"{progress.phase} {100 * progress.done / progress.total:.0f} % ({count})"


def numbers(progress: Progress) -> str:
    """Loss, speed and memory, as far as the stage told them."""
    known = progress.numbers
    parts = []
    if "loss" in known:
        parts.append(f"loss {known['loss']:.4g}")
    if "tokens_per_s" in known:
        parts.append(f"{known['tokens_per_s']:,.0f} tokens/s")
    if "gpu_gib" in known:
        parts.append(f"GPU {known['gpu_gib']:.1f} GiB")
    elif "rss_gib" in known:
        parts.append(f"{known['rss_gib']:.1f} GiB")
    return ", ".join(parts)


def money(snapshot: Snapshot, plan: Plan) -> str:
    """`¥0.0213 of ¥1.00 spent`, and the worst case once a machine is older than its reservation pays for."""
    spent = shown(snapshot.spending_micros, plan.rate, plan.currency)
    text = f"{spent} of {shown(snapshot.run.cap_micros, plan.rate, plan.currency)} spent"
    row = snapshot.machine
    if row is None or row.state is State.INTENT:
        return text
    offer = offer_from_dict(row.facts.get("landed") or row.order["offer"])
    worst = spend.worst_case_micros(offer, reserved=row.reserved_micros, age_s=snapshot.machine_age_s)
    if worst <= row.reserved_micros:
        return text
    return f"{text}; {row.name} is not confirmed gone: in the worst case {shown(worst, plan.rate, plan.currency)}"


def sparkline(values: list[float]) -> str:
    """The values as a row of blocks, scaled between their own minimum and maximum."""
    low, high = min(values), max(values)
    if high <= low:
        return SPARKS[0] * len(values)
    return "".join(SPARKS[round((v - low) / (high - low) * (len(SPARKS) - 1))] for v in values)
