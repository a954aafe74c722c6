"""The report page: a document of plain values in, one self-contained HTML file out. Pure; no script, no network.

Numbers of `kdcloud report --json` stand in `<data data-of="where.in.it" value="as it is there">`, so that anyone can
check a page against the report. What models wrote is text: escaped everywhere, cut where long, with what does not
print made visible.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.artifacts import human_bytes
from orchestrator.compare import best_value
from orchestrator.errors import UsageError
from orchestrator.money import MICROS, Rate, human_seconds, shown
from orchestrator.report import QUALITY, QUALITY_NAMES, harness_lines, three
from tasks.contract import install_hint

if TYPE_CHECKING:
    from jinja2 import Environment

NBSP = "\u00a0"
MOST_BYTES = 3_000_000
TEXT_LIMITS = (2000, 300, 100)  # characters of one text: the next one where a page would come out too large
ARTIFACTS_SHOWN = 100
CHANGES = {
    "gained": "Wrong before, right after",
    "lost": "Right before, wrong after",
    "wrong": "Wrong, before and after",
    "right": "Right, before and after",
    "unknown": "Without a student",
}
COMPARED = {
    "teacher": "its teacher",
    "student_before": "the student before",
    "student_hard": "the same student without soft labels",
}
PARTS = (
    ("quality", "Quality"), ("money", "Money and time"), ("training", "Training"), ("labels", "Labels"),
    ("answers", "Answers"), ("again", "Settings"),
)  # fmt: skip


def render_page(document: Mapping[str, Any]) -> str:
    """The page of `page_data.gather`'s document, at most MOST_BYTES. Raises UsageError without the extra `page`."""
    report, rate = document["report"], document["rate"]
    view = {**document, **_view(document), **_figures(document)}
    return _fitting("report.html", view, report, rate)


def render_compare_page(document: Mapping[str, Any], rate: Rate, *, made_at: str, version: str) -> str:
    """The page of `kdcloud compare`'s document."""
    from orchestrator import page_plots as plots

    unit, runs = document["currency"], document["runs"]
    money = _amounts(rate, unit)
    points = [
        {"label": str(at), "cost": money(run["spend_micros"]), "mean": found["mean"], "interval": found.get("interval")}
        for at, run in enumerate(runs, 1)
        if (found := run["accuracy"]["student"])
    ]
    said = "; ".join(f"{point['label']}: {point['mean']:.3f} for {point['cost']:.3g} {unit}" for point in points)
    view = {
        "report": document,
        "made_at": made_at,
        "version": version,
        "best": best_value(runs),
        "against": _marked(plots.against(points, unit)) if points else None,
        "alt": f"Accuracy of each student over the cost of its run; {said}",
        "rate_line": _rate_line(rate),
    }
    return _fitting("compare.html", view, document, rate)


def _rate_line(rate: Rate) -> str:
    return f"1 USD = {rate.usd_to_cny} CNY as of {rate.as_of}."


def _fitting(template: str, view: dict[str, Any], report: Mapping[str, Any], rate: Rate) -> str:
    for limit in TEXT_LIMITS:
        page = _environment(report, rate, limit).get_template(template).render(view)
        if len(page.encode()) <= MOST_BYTES:
            return page
    raise UsageError(f"the page would be larger than {human_bytes(MOST_BYTES)}", hint="use `kdcloud report --json`")


# --- how values are said ---------------------------------------------------------------------------------------------


def _environment(report: Mapping[str, Any], rate: Rate, limit: int) -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup, escape
    except ModuleNotFoundError as error:
        raise UsageError(f"a page needs {error.name}, which is not installed", hint=install_hint("page")) from error
    forms = _forms(rate, str(report.get("currency") or "USD"))

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else printable(str(value), limit)

    def fact(path: str, form: str) -> Markup:
        value = at(report, path)
        attributes = f'data-of="{escape(path)}" value="{escape(json.dumps(value))}"'
        return Markup(f"<data {attributes}>{escape(printable(forms[form](value), limit))}</data>")

    made = Environment(
        loader=PackageLoader("orchestrator"), autoescape=True, undefined=StrictUndefined, finalize=finalize,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= forms
    made.filters["start"] = lambda text, most: str(text)[:most]
    made.filters["whole"] = lambda text: Markup(escape(printable(str(text), 100_000)))
    made.globals["fact"] = fact
    return made


def at(document: Any, path: str) -> Any:
    """The value at `stages.0.actual.hours`; None where there is none on the way."""
    for word in path.split("."):
        if document is None:
            return None
        document = document[int(word)] if isinstance(document, Sequence) else document.get(word)
    return document


def printable(text: str, most: int) -> str:
    """The text with what cannot be seen or turns writing around as `\\u202e`, its middle left out above `most`."""
    if len(text) > most:
        head, tail = text[: most * 2 // 3], text[-(most - most * 2 // 3) :]
        text = f"{head}\n[... {len(text) - most:,} characters left out ...]\n{tail}"
    return "".join(c if c.isprintable() or c in f"\n\t{NBSP}" else f"\\u{ord(c):04x}" for c in text)


def _forms(rate: Rate, currency: str) -> dict[str, Callable[[Any], str]]:
    """Every way in which a value is said; unknown is a dash."""

    def known(say: Callable[[Any], str]) -> Callable[[Any], str]:
        return lambda value: "–" if value is None else say(value)

    return {
        "text": known(str),
        "money": known(lambda micros: shown(micros, rate, currency)),
        "hours": known(lambda hours: human_seconds(hours * 3600)),
        "seconds": known(human_seconds),
        "share": known(lambda share: f"{share:.3f}"),
        "percent": known(lambda share: f"{100 * share:.1f}{NBSP}%"),
        "percent2": known(lambda share: f"{100 * share:.2f}{NBSP}%"),
        "count": known(lambda count: f"{count:,.0f}"),
        "short": known(lambda value: f"{value:.3g}"),
        "three": known(three),
        "ms": known(lambda seconds: f"{1000 * seconds:,.1f}"),
        "gib": known(lambda gib: f"{gib:.2f}"),
        "bytes": known(human_bytes),
        "moment": known(lambda text: f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"),
        "value": known(lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)),
        "machine": known(
            lambda offer: " ".join(
                str(offer[key]) for key in ("infra", "region", "gpu") if offer[key] is not None
            ) + (" spot" if offer["spot"] else "")
        ),
        "price": known(
            lambda offer: "price not found" if offer["price_micros_per_hour"] is None
            else f"{shown(offer['price_micros_per_hour'], rate, currency)} an hour"
        ),
    }  # fmt: skip


# --- what is said ----------------------------------------------------------------------------------------------------


def _view(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything between the document and the template: words, orders, shares."""
    report, quality = document["report"], document["report"]["quality"]
    roles = [(role, QUALITY_NAMES[role]) for role in QUALITY if quality.get(role)]
    seeds = max((len(quality[role]["accuracy"]["seeds"]) for role, _ in roles), default=1)
    used = report["spend_micros"] / report["cap_micros"] if report["cap_micros"] else None
    peaks = [(s["actual"]["peak_gib"], s["name"]) for s in report["stages"] if s["actual"]["peak_gib"] is not None]
    rate = document["rate"]
    return {
        "tone": {"done": "good", "running": "going"}.get(report["state"], "bad"),
        "verdict": verdict(report),
        "so_far": " so far" if report["state"] == "running" else "",
        "used": used,
        "used_width": f"{min(100.0, 100 * (used or 0)):.2f}",
        "done": sum(stage["state"] == "done" for stage in report["stages"]),
        "peak": f"{max(peaks)[0]:.2f} GiB" if peaks else "–",
        "peak_where": f"in {max(peaks)[1]}" if peaks else "not measured",
        "parts": PARTS,
        "roles": roles,
        "several": seeds if seeds > 1 else 0,
        "has_kl": any(quality[role].get("kl_to_teacher") is not None for role, _ in roles),
        "harness": harness_lines(quality),
        "curves": [_curve_words(one) for one in document["curves"]],
        "labels": [_label_words(one) for one in document["labels"]],
        "answers": _answers(document["samples"]),
        "artifacts": report["artifacts"][:ARTIFACTS_SHOWN],
        "rate_line": _rate_line(rate),
    }


def verdict(report: Mapping[str, Any]) -> list[str]:
    """The outcome in one or two sentences; none where nothing was evaluated."""
    quality = report["quality"]
    student = quality.get("student")
    if not student:
        return []

    def percent(share: float) -> str:
        return f"{100 * share:.1f}{NBSP}%"

    found = student["accuracy"]
    text = f"The distilled student answers {percent(found['mean'])} of {found['n']:,} held-out problems right"
    others = [(COMPARED[role], quality[role]["accuracy"]["mean"]) for role in COMPARED if quality.get(role)]
    if others:
        text += "; " + ", ".join(f"{name} {percent(mean)}" for name, mean in others)
    lines = [f"{text}."]
    if found["max"] - found["min"] > 0.1:
        spread = f"from {percent(found['min'])} to {percent(found['max'])}"
        lines.append(f"Its {len(found['seeds'])} trainings differ a lot: {spread}.")
    return lines


def _curve_words(one: Mapping[str, Any]) -> dict[str, Any]:
    arms = one["arms"]
    roles = list(dict.fromkeys(arm["role"] for arm in arms))
    roles.sort(key=lambda role: QUALITY.index(role) if role in QUALITY else -1, reverse=True)
    legend = [(role if role in QUALITY else "teacher", QUALITY_NAMES.get(role, role)) for role in roles]
    several = len(arms) > len(roles)
    binned = max(arm["a_point"] for arm in arms)
    caption = ["Losses in nats a token."]
    caption += ["Strong line: the first training of its kind; faint: further seeds."] if several else []
    caption += [f"A point is the mean of up to {binned} logged steps."] if binned > 1 else []
    if {"student_hard", "student_hard_2x"} & set(roles):
        caption.append(
            "Hard labels train on the cross-entropy alone, so their total is not that of the distilled student."
        )
    last = ", ".join(f"{QUALITY_NAMES.get(arm['role'], arm['role'])} {arm['last']['total']:.3g}"
                     for arm in arms if arm["seed"] == 0 and arm["last"]["total"] is not None)  # fmt: skip
    return {
        **one, "legend": legend, "caption": " ".join(caption),
        "alt": f"Loss and learning rate over the steps of {one['stage']}; last total loss: {last or 'not known'}",
    }  # fmt: skip


def _label_words(one: Mapping[str, Any]) -> dict[str, Any]:
    result, lengths = one["result"] or {}, one["lengths"] or {}
    whole = max(1, result.get("generated") or 0)
    counts = [("kept", result["kept"], "student")] if "kept" in result else []
    dropped = sorted((result.get("dropped") or {}).items(), key=lambda item: -item[1])
    counts += [(f"dropped: {why}", count, "bad") for why, count in dropped]
    shares = [(name, count, f"{100 * count / whole:.2f}", colour) for name, count, colour in counts]
    spreads = [
        (f"tokens of an answer, {kind}", _spread(lengths[kind])) for kind in ("kept", "dropped") if lengths.get(kind)
    ]
    alt = "; ".join(["Histogram of answer lengths", *(f"{name}: {said}" for name, said in spreads)])
    return {**one, "shares": shares, "facts": [*_label_facts(result, one["top_k"]), *spreads], "alt": alt}


def _spread(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:,.1f} on average, median {found['median']:,}, longest {found['longest']:,}"


def _label_facts(result: Mapping[str, Any], top_k: int | None) -> list[tuple[str, str]]:
    """(what, value) of what the stage has told; older runs have told less."""
    told: dict[str, Callable[[Any], str]] = {
        "mass_inside_mean": lambda share: f"{100 * share:.2f}{NBSP}%",
        "cut_share": lambda share: f"{100 * share:.2f}{NBSP}%",
        "logprob_error": lambda error: f"{error['mean']:.2g}, {error['worst']:.2g} at worst",
        "tokens_per_s": lambda speed: f"{speed:,.0f} tokens/s",
        "engine": str,
        "api": lambda bill: (
            f"{bill['calls']:,} calls, {bill['input_tokens']:,} tokens in, {bill['output_tokens']:,} out"
        ),
        "note": str,
    }
    names = {
        "mass_inside_mean": f"probability inside the top {top_k}, mean",
        "cut_share": "cut at the limit of tokens",
        "logprob_error": "error of stored log-probabilities",
        "tokens_per_s": "speed of writing",
        "engine": "written with",
        "api": "asked of the API",
    }
    return [(names.get(key, key), say(result[key])) for key, say in told.items() if result.get(key) is not None]


def _answers(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, rows) by what became of the student's answer; each row with who said something."""
    found = []
    for change, title in CHANGES.items():
        rows = [
            {**row, "right": row.get("right") or {}, "said": [(r, QUALITY_NAMES[r]) for r in QUALITY if r in row]}
            for row in samples
            if row["change"] == change
        ]
        found += [(f"{title} ({len(rows)} shown)", rows)] if rows else []
    return found


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(document: Mapping[str, Any]) -> dict[str, Any]:
    """{figures: {name: {wide, narrow} or None}, alts}; money in the display currency."""
    from orchestrator import page_plots as plots

    report, plan, rate = document["report"], document["plan"], document["rate"]
    unit = report["currency"]
    money = _amounts(rate, unit)
    roles = [
        (role, QUALITY_NAMES[role], report["quality"][role]["accuracy"])
        for role in QUALITY
        if report["quality"].get(role)
    ]
    costs = [
        {
            "name": stage["name"],
            **{key: money(micros) for key, micros in plan["stages"][stage["name"]]["cost_micros"].items()},
            "actual": money(stage["actual"]["cost_micros"]),
        }
        for stage in report["stages"]
    ]
    priced = [row for row in costs if row["high"] or row["actual"]]
    line = document["timeline"]
    spent, expected = report["spend_micros"], plan["cost_micros"]["expected"]
    drawn = {
        "accuracy": plots.accuracy(roles) if roles else None,
        "costs": plots.costs(priced, unit) if priced else None,
        "timeline": plots.timeline(
            line["machines"], [(second, money(micros)) for second, micros in line["money"]], unit=unit,
            planned=money(expected) if expected <= 3 * spent else None,
            cap=money(report["cap_micros"]) if report["cap_micros"] <= 3 * max(spent, expected) else None,
        ) if line["machines"] else None,
        "curves": [plots.curves(one["stage"], one["arms"]) for one in document["curves"]],
        "lengths": [
            one["lengths"] and plots.lengths(one["stage"], one["lengths"], one["limit"]) for one in document["labels"]
        ],
    }  # fmt: skip
    said = ", ".join(f"{name} {found['mean']:.3f}" for _, name, found in roles)
    shown_costs = [
        f"{stage['name']} {shown(stage['actual']['cost_micros'], rate, unit)}"
        for stage in report["stages"]
        if stage["actual"]["cost_micros"] is not None
    ]
    alts = {
        "accuracy": f"Share of right answers: {said}",
        "costs": f"Cost of each stage against its planned range; actual: {', '.join(shown_costs) or 'nothing yet'}",
        "timeline": f"{len(line['machines'])} machines over time, and the money spent by then: "
        f"{shown(spent, rate, unit)} at the end",
    }
    return {"figures": _marked(drawn), "alts": alts}


def _amounts(rate: Rate, currency: str) -> Callable[[float | None], Any]:
    """Micro-USD as a number in the display currency."""
    factor = (float(rate.usd_to_cny) if currency == "CNY" else 1.0) / MICROS
    return lambda micros: None if micros is None else float(micros) * factor


def _marked(value: Any) -> Any:
    """SVG of our own making as markup, wherever it stands."""
    from markupsafe import Markup

    if isinstance(value, str):
        return Markup(value)
    if isinstance(value, Mapping):
        return {key: _marked(one) for key, one in value.items()}
    return [_marked(one) for one in value] if isinstance(value, list) else value
