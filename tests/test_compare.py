"""Are runs put beside each other as they were, and does one see what differs and which was worth its money?"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.compare import best_value, build_compare, differences, render_compare
from orchestrator.page import at, render_compare_page
from orchestrator.report import QUALITY, build_report
from tests.chromium import Chromium, chromium
from tests.pages import plan_made, run_made
from tests.test_page import Reader


@pytest.fixture
def compared(tmp_path: Path) -> tuple[dict[str, Any], Any]:
    """A run that is done, one that failed, one with another setting and a hostile one."""
    plan = plan_made(tmp_path)
    stages = [replace(s, settings=replace(s.settings, alpha=0.5)) if s.kind == "train" else s for s in plan.stages]
    stages = [
        replace(s, settings=replace(s.settings, corpus="</td><script>1</script>\u202e")) if s.kind == "pretrain" else s
        for s in stages
    ]
    other = replace(plan, stages=tuple(stages))
    runs = [
        (run_made(plan), plan),
        (run_made(plan, done=False), plan),
        (replace(run_made(other), id="other-xyz789"), other),
    ]
    reports = [(build_report(run, made, []), made) for run, made in runs]
    reports[1][0]["state"] = "failed"
    return build_compare(reports), plan.rate


def terminal(document: dict[str, Any], rate: Any, width: int = 100) -> str:
    out = io.StringIO()
    render_compare(document, rate, Console(file=out, width=width, color_system=None, legacy_windows=False))
    return out.getvalue()


def test_each_run_has_the_numbers_of_its_report(compared: tuple[dict[str, Any], Any]) -> None:
    document, _ = compared
    first, failed, _ = document["runs"]
    # 60, 600, 3,600 and 300 s at 0.5 USD an hour, each rounded up; and 7 micros more for each of 4 machines
    assert first["planned_micros"] == 8_334 + 83_334 + 500_000 + 41_667 and first["spend_micros"] == 633_363
    assert first["machine_hours"] == pytest.approx(4560 / 3600)
    assert first["accuracy"]["student"]["mean"] == pytest.approx(0.6679) and first["kl_to_teacher"] == 0.1102
    assert (
        failed["accuracy"] == dict.fromkeys(QUALITY) and failed["state"] == "failed" and failed["kl_to_teacher"] is None
    )


def test_only_settings_that_differ_are_named(compared: tuple[dict[str, Any], Any]) -> None:
    rows = {row["setting"]: row["values"] for row in compared[0]["settings"]}
    assert set(rows) == {"train.alpha", "pretrain.corpus"}
    assert rows["train.alpha"] == [0.7, 0.7, 0.5]
    assert differences([{"a": 1}, {"a": 1, "b": 2}]) == [{"setting": "b", "values": [None, 2]}]


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(10, 0.5), (20, 0.6), (30, 0.55)], [True, True, False]),
        ([(10, 0.5), (10, 0.6)], [False, True]),
        ([(10, 0.5), (10, 0.5)], [True, True]),
        ([(10, None), (20, 0.1)], [False, True]),
    ],
)
def test_a_run_is_worth_its_money_when_none_is_as_good_for_less(
    points: list[tuple[int, float | None]], best: list[bool]
) -> None:
    runs = [{"spend_micros": c, "accuracy": {"student": None if m is None else {"mean": m}}} for c, m in points]
    assert best_value(runs) == best


def test_a_terminal_shows_runs_and_differences_within_100_columns(compared: tuple[dict[str, Any], Any]) -> None:
    text = terminal(*compared)
    for words in ("addition-abc123  failed", "planned", "other-xyz789", "¥4.50", "0.668", "train.alpha", "0.5"):
        assert words in text
    assert "</td><script>" in text
    assert "\u202e" not in text and max(map(len, text.splitlines())) <= 100
    assert "same settings" in terminal({**compared[0], "settings": []}, compared[1])


def test_a_run_keeps_a_name_in_one_piece_on_80_columns(compared: tuple[dict[str, Any], Any]) -> None:
    """Here the six characters that every command takes; a long name leaves no room for more."""
    document, rate = compared
    long = {**document, "runs": [{**run, "run": f"{'n' * 50}-{run['run'][-6:]}"} for run in document["runs"]]}
    for shown in (document, long):
        text = terminal(shown, rate, 80)
        assert max(map(len, text.splitlines())) <= 80
        names = [line.split()[0] for line in text.splitlines() if line.split()[1:2] in (["running"], ["failed"])]
        assert names == [run["run"] if "n" * 9 not in run["run"] else run["run"][-6:] for run in shown["runs"]]


def test_a_run_without_an_end_is_told_apart_and_runs_that_are_done_need_no_column(
    compared: tuple[dict[str, Any], Any],
) -> None:
    document, rate = compared
    assert "state" in terminal(document, rate)
    done = {**document, "runs": [{**run, "state": "done"} for run in document["runs"]]}
    assert len(done["runs"]) == 3 and "state" not in terminal(done, rate)


def test_the_page_has_the_same_numbers_and_hostile_settings_stay_text(compared: tuple[dict[str, Any], Any]) -> None:
    document, rate = compared
    text = render_compare_page(document, rate, made_at="2026-01-01T00:00:00+00:00", version="0.1.0")
    read = Reader(text)
    assert len(read.facts) >= 24 and all(value == at(document, path) for path, value, _ in read.facts)
    assert "script" not in {tag for tag, _ in read.tags} and "</td><script>1</script>\\u202e" in read.text
    assert text.count("<svg") == 2 and "1: 0.668 for 4.5 CNY; 3: 0.668" in text


def test_runs_without_an_evaluation_have_a_page(compared: tuple[dict[str, Any], Any]) -> None:
    document, rate = compared
    without = {**document, "runs": [document["runs"][1]] * 2, "settings": []}
    text = render_compare_page(without, rate, made_at="2026-01-01T00:00:00+00:00", version="0.1.0")
    assert "None of these runs was evaluated." in text and "<svg" not in text


@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install --no-install-recommends chromium")
def test_a_browser_shows_the_comparison_at_both_widths(compared: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    path.write_text(render_compare_page(*compared, made_at="2026-01-01T00:00:00+00:00", version="0.1.0"))
    browser = Chromium(tmp_path / "profile")
    try:
        for width in (1280, 375):
            browser.show(path.as_uri(), width=width, dark=width == 375)
            assert browser.errors == [] and browser.requests == [path.as_uri()]
            assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert browser.js("[...document.querySelectorAll('data')].every(el => el.getClientRects().length === 1)")
            code = "[...document.querySelectorAll('figure svg')].map(el => el.getBoundingClientRect().width)"
            wide, narrow = browser.js(code)
            assert (wide > 300 and narrow == 0) if width == 1280 else (narrow > 300 and wide == 0)
    finally:
        browser.close()
