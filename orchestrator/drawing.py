"""How does a run look on a terminal? A Scene as lines that fit a width and a height. Pure.

Narrow terminals lose columns, never lines; low ones first lose blank lines, then stages that are done or far off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.money import human_seconds, shown
from orchestrator.plan import Range, machine_name
from orchestrator.provision import Offer
from orchestrator.scene import DONE, RUNNING, STOPPED, WAITING, Scene, StageLine, clean, sparkline

if TYPE_CHECKING:
    from rich.text import Text

MARKS = {DONE: ("✓", "green"), RUNNING: ("▶", "cyan"), WAITING: ("·", "dim"), STOPPED: ("■", "yellow")}
STATE_STYLES = {"running": "cyan", "done": "green"}
SLIM, WIDE = 70, 100  # columns from which machines, and then whole machine names and prices, are shown
NOTICE, ALARM = 0.80, 0.95  # shares of the cap from which the money is yellow, and red
INDENT = "    "


def draw(scene: Scene, width: int, height: int = 1000) -> list[Text]:
    """At most `height` lines, of at most `width` columns each."""
    from rich.text import Text

    title, money, note, work = _title(scene, width), _money(scene, width), _note(scene, width), _work(scene, width)
    header, rows = _table(scene, width)
    at = next((i for i, stage in enumerate(scene.stages) if stage.state == RUNNING), None)
    room = height - len(title) - len(money) - len(work)
    if room - len(note) < min(len(rows), 3):
        note = []
    if room < 1:
        work, room = work[:1], room + len(work[1:])
    room -= len(note)
    roomy = room >= len(rows) + 3
    middle = at if at is not None else sum(stage.state == DONE for stage in scene.stages)
    first, last = window(len(rows), min(middle, len(rows) - 1), room)
    lines = [*([Text()] if room >= len(rows) + 4 else []), *title, *([Text(), header] if roomy else [])]
    if first:
        lines.append(Text(f" ✓ {first} before", "dim"))
    for index in range(first, last):
        lines += [rows[index], *(work if index == at else [])]
    if last < len(rows):
        lines.append(Text(f" · {len(rows) - last} more to come", "dim"))
    lines += [*(work if at is None else []), *([Text()] if roomy else []), *money, *note]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def window(count: int, middle: int, room: int) -> tuple[int, int]:
    """First and last (exclusive) of the rows that fit, around `middle`; a row is left for each side that is cut off."""
    first, last = middle, middle + 1
    while True:
        before = first, last
        for later, earlier in ((1, 0), (0, 1)):
            start, end = first - earlier, last + later
            if start >= 0 and end <= count and end - start + (start > 0) + (end < count) <= room:
                first, last = start, end
        if (first, last) == before:
            return before


def _title(scene: Scene, width: int) -> list[Text]:
    from rich.text import Text

    name = Text.assemble(
        (scene.run, "bold"),
        "  ",
        (scene.state, STATE_STYLES.get(scene.state, "yellow")),
        f" {human_seconds(scene.took_s)}",
    )
    if scene.left is None:
        return [name]
    about = f", {human_seconds(scene.left.expected)} left"
    spread = f" ({span(scene.left)})"
    for more in (about + spread, about):
        if name.cell_len + len(more) <= width:
            return [Text.assemble(name, more)]
    return [name]


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    title: str
    right: bool = False
    at_most: int = 99


def _table(scene: Scene, width: int) -> tuple[Text, list[Text]]:
    """Header and rows, in columns as wide as their longest cell."""
    from rich.text import Text

    columns = [_Column("stage", at_most=20 if width < SLIM else 28)]
    if width >= SLIM:
        columns.append(_Column("machine", at_most=24 if width < WIDE else 40))
    if width >= WIDE:
        columns.append(_Column("price/h", right=True))
    columns += [_Column("took", right=True), _Column("left")]
    if width >= WIDE:
        columns.append(_Column("planned", right=True))
    columns.append(_Column("spent", right=True))
    cells = [_cells(stage, scene, width) for stage in scene.stages]
    widths = [
        min(column.at_most, max(len(column.title), *(Text(row[i]).cell_len for row in cells)))
        for i, column in enumerate(columns)
    ]
    gap = "  " if width >= SLIM else " "
    header = _row([column.title for column in columns], columns, widths, gap)
    header.stylize("dim")
    rows = []
    for stage, row in zip(scene.stages, cells, strict=True):
        mark, style = MARKS[stage.state]
        line = _row(row, columns, widths, gap)
        line.stylize("bold" if stage.state == RUNNING else "dim" if stage.state == WAITING else "")
        rows.append(Text.assemble(" ", (mark, style), " ", line))
    return Text.assemble("   ", header), rows


def _row(cells: Sequence[str], columns: Sequence[_Column], widths: Sequence[int], gap: str) -> Text:
    from rich.text import Text

    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        text = Text(cell)
        text.truncate(width, overflow="ellipsis")
        space = " " * (width - text.cell_len)
        parts.append(space + text.plain if column.right else text.plain + space)
    return Text(gap.join(parts).rstrip())


def _cells(stage: StageLine, scene: Scene, width: int) -> list[str]:
    def amount(micros: int) -> str:
        return shown(micros, scene.rate, scene.currency)

    name = clean(stage.name) + (f" #{stage.attempts}" if stage.attempts > 1 else "")
    cells = [name]
    if width >= SLIM:
        cells.append(clean(_machine(stage.offer, short=width < WIDE)))
    if width >= WIDE:
        price = stage.offer.price_micros_per_hour
        cells.append("not found" if price is None else "free" if price == 0 else amount(price))
    cells.append("" if stage.took_s is None else human_seconds(stage.took_s))
    cells.append(_left(stage, scene, width))
    if width >= WIDE:
        cells.append(amount(stage.planned.expected))
    cells.append(amount(stage.spent_micros) if stage.took_s is not None or stage.spent_micros else "")
    return cells


def _machine(offer: Offer, *, short: bool) -> str:
    """`A100 spot, aws p4d.24xlarge`; the number of cards where there are several."""
    many = f"{offer.gpus} x " if offer.gpus > 1 else ""
    where = "" if short or not offer.region else f", {offer.region}"
    return f"{many}{machine_name(offer, short=short)}{where}"


def _left(stage: StageLine, scene: Scene, width: int) -> str:
    if stage.state == DONE:
        return "done"
    if stage.left is None:
        return "longer than expected" if stage.state == RUNNING and width >= SLIM else "?"
    if stage.left.expected < 1:
        return "soon"
    spread = f" ({span(stage.left)})" if width >= SLIM and stage.left.high >= 3 else ""
    return f"{human_seconds(stage.left.expected)}{spread}"


def span(seconds: Range) -> str:
    """`45–70 s`, `1.5–3.1 min`, `52 s–1.8 min`."""
    low, high = human_seconds(seconds.low), human_seconds(seconds.high)
    number, _, unit = low.partition(" ")
    if low == high or seconds.high < 3:
        return high
    return f"{number}–{high}" if high.endswith(f" {unit}") else f"{low}–{high}"


# --- the running stage -----------------------------------------------------------------------------------------------


def _work(scene: Scene, width: int) -> list[Text]:
    """A bar with its numbers, then loss, speed and load, as many to a line as fit."""
    from rich.text import Text

    work = scene.work
    if work is None:
        return []
    parts = []
    if work.total:
        share = min(1.0, max(0.0, work.done / work.total))
        counts = f"{share:4.0%}  {count_of(work.done)} of {count_of(work.total)} {work.unit}"
        room = width - len(INDENT) - len(work.doing) - len(counts) - 2
        if room >= 8:
            parts.append(Text.assemble(f"{work.doing} ", bar(share, min(40, room), "cyan"), counts))
        else:
            parts.append(Text(f"{work.doing} {counts}"))
    else:
        parts.append(Text(f"{work.doing} …"))
    losses = work.curve.values
    if losses:
        name = f"loss {work.curve.name} " if work.curve.name and width >= WIDE else "loss "
        room = min(48 if width >= WIDE else 24, width // 3)
        line = sparkline(losses, room) if len(losses) > 1 else ""
        first = f"{losses[0]:.3g} " if line else ""
        parts.append(Text.assemble((name, "dim"), first, (line, "cyan"), f" {losses[-1]:.3g}"))
    parts += [Text(text) for text in (work.speed, work.load) if text]
    return _flow(parts, width)


def _flow(parts: Sequence[Text], width: int) -> list[Text]:
    from rich.text import Text

    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + 3 + part.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", part)
        else:
            lines.append(Text.assemble(INDENT, part))
    return lines


def count_of(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def bar(share: float, width: int, style: str) -> Text:
    """A bar, half a column exact."""
    from rich.text import Text

    full, half = divmod(round(2 * width * min(1.0, max(0.0, share))), 2)
    return Text.assemble(("━" * full + "╸" * half, style), ("─" * (width - full - half), "dim"))


# --- money -----------------------------------------------------------------------------------------------------------


def _money(scene: Scene, width: int) -> list[Text]:
    """A bar of the cap: what is spent, what is still to come, what stays; and the figures."""
    from rich.text import Text

    def amount(micros: int) -> str:
        return shown(micros, scene.rate, scene.currency)

    cap, spent, low, likely, high = (
        scene.cap_micros, scene.spent_micros, scene.forecast.low, scene.forecast.expected, scene.forecast.high,
    )  # fmt: skip
    over = "red" if likely > cap else "yellow" if high > cap else ""
    figures = [
        Text.assemble("spent ", (amount(spent), f"bold {money_style(spent, cap)}")),
        Text.assemble("at the end ", (amount(likely), over), (f" ({amount(low)}–{amount(high)})", over or "dim")),
        Text(f"cap {amount(cap)}"),
    ]
    if scene.state not in ("running", "stopping"):
        figures = [figures[0], figures[2]]
    size = min(40, max(12, width // 3))
    share = f"{spent / cap:4.0%}" if cap else ""
    lines = _flow([Text.assemble(("money ", "dim"), _money_bar(scene, size), share), *figures], width)
    if scene.warning:
        lines += _wrapped(f"! {clean(scene.warning)}", "red", width)
    return lines


def money_style(spent: int, cap: int) -> str:
    """Green, from 80 % of the cap yellow, from 95 % red."""
    if spent >= ALARM * cap:
        return "red"
    return "yellow" if spent >= NOTICE * cap else "green"


def _money_bar(scene: Scene, width: int) -> Text:
    from rich.text import Text

    cap = max(1, scene.cap_micros)
    spent = min(width, round(width * scene.spent_micros / cap))
    if scene.spent_micros and not spent:
        spent = 1
    running = scene.state in ("running", "stopping")
    coming = max(0, min(width, round(width * scene.forecast.expected / cap)) - spent) if running else 0
    style = money_style(scene.spent_micros, cap)
    return Text.assemble(("━" * spent, style), ("━" * coming, f"{style} dim"), ("─" * (width - spent - coming), "dim"))


def _note(scene: Scene, width: int) -> list[Text]:
    return _wrapped(scene.note, "dim", width) if scene.note else []


def _wrapped(text: str, style: str, width: int) -> list[Text]:
    from rich.console import Console
    from rich.text import Text

    lines = Text(text, style).wrap(Console(width=width), width)
    for line in lines:
        line.rstrip()
    return list(lines)
