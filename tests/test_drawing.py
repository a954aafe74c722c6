"""How a run looks on a terminal: nothing is wider or higher than it, and narrow ones lose columns, not stages."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from decimal import Decimal

import pytest

from orchestrator.drawing import bar, draw, money_style, span, window
from orchestrator.money import Rate
from orchestrator.plan import Micros, Range
from orchestrator.scene import DONE, RUNNING, STOPPED, WAITING, Curve, Scene, StageLine, Work
from orchestrator.testing import fake_offer

OFFER = replace(fake_offer(1_300_000, infra="aws"), region="us-east-1", instance="g5.xlarge", gpu="A10G", spot=True)


def line(name: str, state: str, **more) -> StageLine:
    values = {"attempts": 1, "took_s": None, "left": None, "spent_micros": 0, "planned": Micros(1, 400_000, 3)}
    return StageLine(name, state, OFFER, **{**values, **more})


SCENE = Scene(
    run="r1-k3x9ab",
    state="running",
    took_s=7500.0,
    left=Range(1800, 2300, 3000),
    stages=(
        line("label", DONE, took_s=5400.0, spent_micros=1_950_000, attempts=2),
        line("train", RUNNING, took_s=1900.0, left=Range(1200, 1500, 1900), spent_micros=680_000),
        line("evaluate", WAITING, left=Range(300, 500, 900)),
        line("export", WAITING, left=Range(50, 80, 130)),
    ),
    work=Work(
        "train",
        4344,
        9480,
        "steps",
        "26,714 tokens/s",
        "GPU 97 %, 61.2 of 80 GiB",
        Curve("soft-0", tuple(5 / (1 + i / 9) for i in range(300))),
    ),
    spent_micros=2_750_000,
    forecast=Micros(3_200_000, 3_400_000, 3_900_000),
    cap_micros=7_040_000,
    rate=Rate(Decimal("7.1"), date(2026, 1, 1)),
    currency="CNY",
    note="Ctrl-C saves a checkpoint and ends the machine; `kdcloud run --resume r1-k3x9ab` then goes on",
)


def plain(scene: Scene, width: int, height: int = 40) -> list[str]:
    return [text.plain.rstrip() for text in draw(scene, width, height)]


def test_at_80_columns_everything_that_matters_is_there():
    assert plain(SCENE, 80) == [
        "",
        "r1-k3x9ab  running 2.1 h, 38 min left (30–50 min)",
        "",
        "   stage     machine           took  left                   spent",
        " ✓ label #2  A10G spot, aws   1.5 h  done                  ¥13.85",
        " ▶ train     A10G spot, aws  32 min  25 min (20–32 min)     ¥4.83",
        "    train ━━━━━━━━━━━━━━━━━━╸───────────────────── 46%  4,344 of 9,480 steps",
        "    loss 5 █▇▆▅▄▄▄▃▃▃▃▃▂▂▂▂▂▂▂▁▁▁▁▁ 0.146   26,714 tokens/s",
        "    GPU 97 %, 61.2 of 80 GiB",
        " · evaluate  A10G spot, aws          8.3 min (5.0–15 min)",
        " · export    A10G spot, aws          80 s (50 s–2.2 min)",
        "",
        "    money ━━━━━━━━━━━━━───────────── 39%   spent ¥19.53",
        "    at the end ¥24.14 (¥22.72–¥27.69)   cap ¥49.98",
        "Ctrl-C saves a checkpoint and ends the machine; `kdcloud run --resume r1-k3x9ab`",
        "then goes on",
    ]


@pytest.mark.parametrize("width", [40, 60, 69, 70, 80, 99, 100, 120, 200])
@pytest.mark.parametrize("height", [8, 12, 20, 24, 40])
def test_no_line_is_wider_than_the_terminal_and_no_picture_higher(width, height):
    for scene in (SCENE, replace(SCENE, state="stopping", left=None), replace(SCENE, work=None, note="")):
        lines = draw(scene, width, height)
        assert len(lines) <= height
        assert max(text.cell_len for text in lines) <= width


def test_narrow_terminals_lose_columns_and_keep_every_stage():
    wide, middle, narrow = ("\n".join(plain(SCENE, width)) for width in (120, 80, 60))
    for text in (wide, middle, narrow):
        for word in (
            "label #2",
            "train",
            "evaluate",
            "export",
            "¥19.53",
            "¥24.14",
            "¥49.98",
            "26,714 tokens/s",
            "GPU 97",
        ):
            assert word in text
    assert "us-east-1" in wide and "price/h" in wide and "planned" in wide
    assert "A10G spot, aws" in middle and "us-east-1" not in middle and "price/h" not in middle
    assert "A10G" not in narrow and "25 min" in narrow and "(20–32 min)" not in narrow


def test_low_terminals_keep_the_running_stage_and_count_the_others():
    stages = tuple(line(f"s{i}", DONE if i < 9 else RUNNING if i == 9 else WAITING, took_s=1.0) for i in range(20))
    text = plain(replace(SCENE, stages=stages), 80, 13)
    assert any("▶ s9" in row for row in text) and any("before" in row for row in text)
    assert any("more to come" in row for row in text)
    counted = sum(int(row.split()[1]) for row in text if "before" in row or "to come" in row)
    assert counted + sum(row.lstrip()[2:].startswith("s") and row.lstrip()[0] in "✓▶·" for row in text) == 20


@pytest.mark.parametrize("count", [1, 4, 5, 20])
@pytest.mark.parametrize("room", [1, 2, 3, 4, 7, 30])
def test_a_window_holds_its_middle_and_fits(count, room):
    for middle in range(count):
        first, last = window(count, middle, room)
        assert 0 <= first <= middle < last <= count
        assert last - first == 1 or last - first + (first > 0) + (last < count) <= room


def styles_of(scene: Scene) -> set[str]:
    money = next(text for text in draw(scene, 100) if "money" in text.plain)
    return {str(span.style) for span in money.spans}


@pytest.mark.parametrize(
    ("spent", "colour"), [(79, "green"), (80, "yellow"), (94, "yellow"), (95, "red"), (100, "red")]
)
def test_money_changes_colour_at_80_and_95_percent_of_the_cap(spent, colour):
    assert money_style(spent, 100) == colour
    micros = SCENE.cap_micros * spent // 100 + 1
    assert f"bold {colour}" in styles_of(replace(SCENE, spent_micros=micros))


def test_a_forecast_over_the_cap_is_red_and_one_that_may_pass_it_yellow():
    def colour(forecast: Micros) -> set[str]:
        lines = draw(replace(SCENE, forecast=forecast), 100)
        text = next(one for one in lines if "at the end" in one.plain)
        return {str(span.style) for span in text.spans}

    assert "red" in colour(Micros(1, 8_000_000, 9_000_000))
    assert "yellow" in colour(Micros(1, 7_000_000, 9_000_000))
    assert colour(Micros(1, 2, 3)).isdisjoint({"red", "yellow"})


def test_a_warning_is_not_cut_however_narrow():
    words = "kd-x is not confirmed gone: in the worst case ¥12.34"
    text = " ".join(plain(replace(SCENE, warning=words), 40)[-8:])
    assert all(word in text for word in words.split())


def test_what_others_wrote_cannot_steer_the_terminal():
    evil = replace(OFFER, instance="g5\x1b[2J\x1b]0;title\x07", gpu="A10G\x9b31m")
    scene = replace(SCENE, stages=(replace(SCENE.stages[1], offer=evil),))
    assert all(char.isprintable() for row in draw(scene, 120) for char in row.plain)


def test_a_stage_that_takes_longer_than_anybody_thought_says_so_and_one_that_sends_its_results_is_done_soon():
    scene = replace(SCENE, stages=(line("train", RUNNING, took_s=9.0),))
    assert "longer than expected" in "\n".join(plain(scene, 80))
    scene = replace(SCENE, stages=(line("train", RUNNING, took_s=9.0, left=Range(0, 0, 0)),))
    assert "soon" in "\n".join(plain(scene, 80))
    assert "■ train" in "\n".join(plain(replace(SCENE, stages=(line("train", STOPPED, took_s=9.0),)), 80))


def test_spans_share_their_unit():
    assert span(Range(45, 50, 70)) == "45–70 s"
    assert span(Range(90, 120, 190)) == "90 s–3.2 min"
    assert span(Range(50, 50, 50)) == "50 s"


@pytest.mark.parametrize(
    ("share", "drawn"), [(0.0, "────"), (0.5, "━━──"), (0.625, "━━╸─"), (1.0, "━━━━"), (7.0, "━━━━")]
)
def test_a_bar_is_half_a_column_exact(share, drawn):
    assert bar(share, 4, "cyan").plain == drawn
