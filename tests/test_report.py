"""Can people read how good the student is, with how sure that is, in a terminal of 80 columns?"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.report import QUALITY, _quality_table, harness_lines

GOLDEN = Path(__file__).parent / "golden"


def row(*seeds: float, **more: Any) -> dict[str, Any]:
    mean = sum(seeds) / len(seeds)
    accuracy = {"mean": mean, "min": min(seeds), "max": max(seeds), "n": 1000, "seeds": list(seeds)}
    accuracy |= {"interval": [max(0.0, mean - 0.03), min(1.0, mean + 0.03)], "answers": len(seeds)}
    return {"accuracy": accuracy, "tokens_per_s": 12345.6, "first_token_s": 0.0123, "peak_gib": 14.125, **more}


def shown(quality: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None, legacy_windows=False)
    console.print(_quality_table({**dict.fromkeys(QUALITY), **quality}))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    return "\n".join(lines).strip() + "\n"


@pytest.mark.parametrize("name", ["compared", "single", "older"])
def test_the_quality_table_is_as_in_the_golden_file(name: str) -> None:
    arms = {"student_hard": row(0.16, 0.1, 0.2, kl_to_teacher=1.25), "student_hard_2x": row(0.14, kl_to_teacher=1.5)}
    quality = {
        "compared": {
            "teacher": row(1.0), "student_before": row(0.0, kl_to_teacher=10.5), **arms,
            "student": row(0.5, 0.4, 0.6, kl_to_teacher=0.125),
        },
        "single": {"student_before": row(0.25), "student": row(0.5)},
        "older": {"student": {"accuracy": {"mean": 0.5, "min": 0.5, "max": 0.5, "n": 100, "seeds": [0.5]}}},
    }[name]  # fmt: skip
    path = GOLDEN / f"quality_{name}.txt"
    assert shown(quality) == path.read_text()


def test_numbers_of_the_harness_stand_below_a_line_each() -> None:
    numbers = {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01}}
    quality = {"teacher": row(1.0, lm_eval=numbers), "student": row(0.5, lm_eval=numbers), "student_hard": row(0.5)}
    assert harness_lines(quality) == ["gsm8k exact_match,strict-match: teacher 0.250, distilled 0.250"]
    assert harness_lines(dict.fromkeys(QUALITY)) == []
