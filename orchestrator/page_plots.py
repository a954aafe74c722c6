"""The figures of a report page as SVG, drawn by matplotlib. Values in, markup out: each for wide pages and for phones.

Colours are names that the page's style sheet gives a value (`var(--student)`), so a figure follows light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from orchestrator.errors import UsageError
from tasks.contract import install_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 760, 340  # units of the drawing; a page shows them at about that many pixels
NAMES = (
    "ink",
    "muted",
    "line",
    "soft",
    "teacher",
    "student_before",
    "student_hard",
    "student_hard_2x",
    "student",
    "bad",
)
COLOURS = {name: f"#0000{at:02x}" for at, name in enumerate(NAMES, 1)}  # stand-ins, replaced in the SVG
ROLE_ORDER = ("student_hard_2x", "student_hard", "student")  # drawn in this order: the last one lies on top
_HEX = re.compile(r"#0000([0-9a-f]{2})\b")
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the reader's own font
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 11,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "figure.constrained_layout.use": True,
}


def drawn(name: str, height: Callable[[bool], float], draw: Callable[[Figure, bool], None]) -> dict[str, str]:
    """{wide, narrow}: the same figure twice. `draw` gets the figure and whether it is the narrow one."""
    return {
        kind: _svg(f"{name}-{kind}", width, height(narrow), draw, narrow)
        for kind, width, narrow in (("wide", WIDE, False), ("narrow", NARROW, True))
    }


def _svg(name: str, width: float, height: float, draw: Callable[[Figure, bool], None], narrow: bool) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UsageError(f"a page needs {error.name}, which is not installed", hint=install_hint("page")) from error
    with matplotlib.rc_context(
        {**_STYLE, "svg.hashsalt": name}
    ):  # ids that differ between figures and not between runs
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure, narrow)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True)
    return cleaned(out.getvalue())


def cleaned(svg: bytes) -> str:
    """The SVG without what a page has no use for: sizes, fonts, unused ids, metadata, a style for everything."""
    root = ElementTree.fromstring(svg)
    used = {ref.lstrip("#") for el in root.iter() for ref in [el.get(f"{{{_XLINK}}}href")] if ref}
    used |= {ref for el in root.iter() for value in el.attrib.values() for ref in re.findall(r"url\(#([^)]+)\)", value)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        style = element.get("style")
        if style:
            style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)
            style = re.sub(r"font-family:[^;]*;?", "", style)
            element.set("style", _HEX.sub(lambda found: f"var(--{NAMES[int(found[1], 16) - 1]})", style))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")  # the figure around it says what there is to see
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


# --- what the page shows ---------------------------------------------------------------------------------------------


def accuracy(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> dict[str, str]:
    """Bars of (role, name, accuracy): the mean, its 95 % interval, and a ring for every seed."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        for at, (role, _, found) in enumerate(rows):
            axes.barh(at, found["mean"], height=0.5, color=COLOURS[role])
            low, high = found.get("interval") or (None, None)
            if low is not None:
                axes.plot([low, high], [at, at], color=COLOURS["ink"], linewidth=1.4, solid_capstyle="butt")
            if len(found["seeds"]) > 1:
                axes.plot(
                    found["seeds"], [at] * len(found["seeds"]), "o", markersize=5, markerfacecolor="none",
                    markeredgecolor=COLOURS["ink"], markeredgewidth=0.9, clip_on=False,
                )  # fmt: skip
        labels = [f"{name}  {found['mean']:.3f}" for _, name, found in rows]
        axes.set_yticks(range(len(rows)), labels, color=COLOURS["ink"])
        _rows(axes, len(rows))
        axes.set_xlim(0, 1)
        axes.set_xlabel("right answers, share" if narrow else "share of held-out problems answered right")

    return drawn("accuracy", lambda narrow: 50 + 30 * len(rows), draw)


def costs(rows: Sequence[Mapping[str, Any]], unit: str) -> dict[str, str]:
    """Planned range and actual cost of a stage each; rows: {name, low, expected, high, actual} in `unit`."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        for at, row in enumerate(rows):
            axes.barh(at, row["high"] - row["low"], left=row["low"], height=0.42, color=COLOURS["soft"])
            axes.plot([row["expected"]] * 2, [at - 0.3, at + 0.3], color=COLOURS["muted"], linewidth=1.6)
            if row["actual"] is not None:
                axes.plot(row["actual"], at, "o", markersize=7, color=COLOURS["student"], clip_on=False)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=COLOURS["ink"])
        _rows(axes, len(rows))
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4 if narrow else 7)
        axes.set_xlabel(f"cost, {unit}")

    return drawn("costs", lambda narrow: 50 + 28 * len(rows), draw)


def timeline(
    machines: Sequence[Mapping[str, Any]], money: Sequence[tuple[float, float]], *, unit: str, planned: float | None,
    cap: float | None,
) -> dict[str, str]:  # fmt: skip
    """Machines over time and, below, what was spent by then in `unit`; money: (seconds, amount)."""
    end_s = max([row["end_s"] for row in machines] + [at for at, _ in money] + [1.0])
    seconds, time_unit = next(
        (s, u)
        for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
        if end_s >= 2 * s or s == 1
    )

    def draw(figure: Figure, narrow: bool) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(22 * len(machines) + 10, 130))
        for at, row in enumerate(machines):
            work = row["work_s"] if row["work_s"] is not None else row["end_s"]
            worked = row["worked_s"] if row["worked_s"] is not None else row["end_s"]
            for start, end, colour in (
                (row["start_s"], work, "muted"), (work, worked, "student"), (worked, row["end_s"], "muted"),
            ):  # fmt: skip
                if end > start:
                    above.barh(at, (end - start) / seconds, left=start / seconds, height=0.55, color=COLOURS[colour])
        again = [row["stage"] + (f" #{row['attempt']}" if (row["attempt"] or 1) > 1 else "") for row in machines]
        above.set_yticks(range(len(machines)), again, color=COLOURS["ink"])
        _rows(above, len(machines))
        times, amounts = [at / seconds for at, _ in money], [amount for _, amount in money]
        below.plot(times, amounts, color=COLOURS["student"], linewidth=1.8)
        below.fill_between(times, amounts, color=COLOURS["soft"], linewidth=0)
        for level, text in ((planned, "plan, expected"), (cap, "cap")):
            if level is not None:
                below.axhline(level, color=COLOURS["bad" if text == "cap" else "muted"], linewidth=1, linestyle="--")
                below.annotate(
                    text, (0, level), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
                    color=COLOURS["muted"], fontsize=10,
                )  # fmt: skip
        below.set_ylim(0, max([*amounts, *(level for level in (planned, cap) if level is not None), 1e-12]) * 1.15)
        below.set_xlim(0, end_s / seconds)
        below.locator_params(axis="y", nbins=4)
        below.grid(axis="y")
        below.tick_params(length=0, pad=6)
        below.set_ylabel(f"spent, {unit}")
        below.set_xlabel(f"{time_unit} since the run began")

    return drawn("timeline", lambda narrow: 190 + 22 * len(machines), draw)


PANELS = (
    ("total", "total loss"),
    ("kl", "KL to the teacher"),
    ("ce", "cross-entropy to the answers"),
    ("learning_rate", "learning rate"),
)


def curves(stage: str, arms: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Losses and learning rate over steps; one line an arm, the first seed of each role in full strength."""
    panels = [(key, title) for key, title in PANELS if _shown(key, arms)]

    def draw(figure: Figure, narrow: bool) -> None:
        columns = 1 if narrow else min(2, len(panels))
        rows = -(-len(panels) // columns)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
        for at, axes in enumerate(grid):
            if at >= len(panels):
                axes.set_visible(False)
                continue
            _curve_panel(axes, *panels[at], arms, narrow)
            if at >= len(panels) - columns:
                axes.set_xlabel("optimizer step")
                axes.tick_params(labelbottom=True)

    return drawn(f"curves-{stage}", lambda narrow: len(panels) * 165 if narrow else -(-len(panels) // 2) * 190, draw)


def _shown(key: str, arms: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a panel says something: not all 0, and not what the total loss says already."""
    values = [value for arm in arms for value in arm[key] if value]
    return bool(values) and (key in ("total", "learning_rate") or any(arm[key] != arm["total"] for arm in arms))


def _curve_panel(axes: Axes, key: str, title: str, arms: Sequence[Mapping[str, Any]], narrow: bool) -> None:
    known = [value for arm in arms for value in arm[key] if value]
    logarithmic = key != "learning_rate" and min(known) > 0 and max(known) > 20 * min(known)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, at: f"{value:g}")  # matplotlib's own writes mathematics
    for arm in sorted(arms, key=lambda arm: ROLE_ORDER.index(arm["role"]) if arm["role"] in ROLE_ORDER else -1):
        if not any(arm[key]):
            continue
        first = arm["seed"] == min(other["seed"] for other in arms if other["role"] == arm["role"])
        colour = COLOURS.get(arm["role"], COLOURS["teacher"])
        values = [float("nan") if v is None or (logarithmic and v <= 0) else v for v in arm[key]]
        axes.plot(arm["steps"], values, color=colour, linewidth=1.5 if first else 0.8, alpha=1 if first else 0.4)
    unit = "" if key == "learning_rate" or narrow else ", nats a token"
    unit += " (log)" if logarithmic else ""
    axes.set_title(f"{title}{unit}", color=COLOURS["ink"])
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.minorticks_off()
    if not logarithmic:
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=4)


def lengths(stage: str, found: Mapping[str, Any], limit: int | None) -> dict[str, str]:
    """Histogram of answer lengths, dropped ones stacked on kept ones."""
    edges, kept, dropped = found["edges"], found["kept_counts"], found["dropped_counts"]
    widths = [after - before for before, after in pairwise(edges)]

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        inner = [width * 0.9 for width in widths]
        centres = [edge + (width - 1) / 2 for edge, width in zip(edges, widths, strict=False)]
        axes.bar(centres, kept, width=inner, color=COLOURS["student"])
        axes.bar(centres, dropped, width=inner, bottom=kept, color=COLOURS["bad"])
        if limit is not None and limit <= edges[-1] + widths[-1]:
            axes.axvline(limit, color=COLOURS["muted"], linewidth=1, linestyle="--")
            axes.annotate(
                "limit", (limit, 1), xycoords=("data", "axes fraction"), xytext=(-4, -12), ha="right",
                textcoords="offset points", color=COLOURS["muted"], fontsize=10,
            )  # fmt: skip
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.locator_params(axis="both", integer=True, nbins=5 if narrow else 8)
        axes.set_xlabel("tokens of an answer")
        axes.set_ylabel("answers")

    return drawn(f"lengths-{stage}", lambda narrow: 200, draw)


def against(points: Sequence[Mapping[str, Any]], unit: str) -> dict[str, str]:
    """Accuracy over cost, a numbered dot a run; points: {label, cost, mean, interval or None}."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        for point in points:
            low, high = point["interval"] or (point["mean"], point["mean"])
            axes.plot([point["cost"]] * 2, [low, high], color=COLOURS["muted"], linewidth=1.4)
            axes.plot(point["cost"], point["mean"], "o", markersize=6, color=COLOURS["student"], clip_on=False)
            axes.annotate(
                point["label"], (point["cost"], point["mean"]), xytext=(8, 4), textcoords="offset points",
                color=COLOURS["ink"], annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(0, max(point["cost"] for point in points) * 1.15 or 1)
        axes.set_ylim(0, 1)
        axes.grid()
        axes.tick_params(length=0, pad=6)
        axes.locator_params(axis="x", nbins=4 if narrow else 7)
        axes.set_xlabel(f"cost of the run, {unit}")
        axes.set_ylabel("right answers of the student, share")

    return drawn("against", lambda narrow: 300, draw)


def _rows(axes: Axes, count: int) -> None:
    """Rows from the top down, no marks on the axis of names."""
    axes.set_ylim(count - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
