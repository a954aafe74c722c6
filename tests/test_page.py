"""Does the report page show what the report says, whatever is missing, and does hostile text stay text?"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator import page, page_data
from orchestrator.errors import UsageError
from orchestrator.page import MOST_BYTES, at, printable, render_page
from orchestrator.page_data import arms_of, change_of, command, flat
from orchestrator.testing import START
from tasks.contract import install_hint
from tests.pages import HOSTILE, document, plan_made, run_made

OURS = """
    html head meta link title style body header h1 h2 h3 p span div dl dt dd nav a main section figure figcaption ul li
    i table caption thead tbody tfoot tr th td data small details summary article pre code footer strong
    svg g path defs clippath use text rect line
"""


class Reader(HTMLParser):
    """Tags, attributes and the facts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.facts: list[tuple[str, Any, str]] = []
        self.text = ""
        self._fact: tuple[str, Any] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append((tag, given))
        if tag == "data":
            self._fact = given["data-of"], json.loads(given["value"])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._fact is not None:
            self.facts.append((*self._fact, data))
            self._fact = None


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    made = document(tmp_path_factory.mktemp("bucket"))
    return made, render_page(made)


def test_every_number_is_that_of_the_report(full: tuple[dict[str, Any], str]) -> None:
    """Value for value; and what is shown of it is the value, rounded."""
    made, text = full
    facts = Reader(text).facts
    assert len(facts) >= 50
    assert {path.partition(".")[0] for path, _, _ in facts} >= {
        "spend_micros",
        "cap_micros",
        "quality",
        "stages",
        "state",
    }
    for path, value, _ in facts:
        assert value == at(made["report"], path), path
    said = {path: text for path, _, text in facts}
    assert said["quality.student.accuracy.mean"] in ("66.8\u00a0%", "0.668")  # (0.4451 + 0.8907) / 2 = 0.6679
    assert said["quality.student.first_token_s"] == "10.9" and said["quality.student.tokens_per_s"] == "5,271"
    assert said["quality.teacher.kl_to_teacher"] == "–"
    assert said["cap_micros"] == "¥14.20"  # 2 USD at 7.1
    assert said["stages.2.actual.hours"] == "1.0 h" and said["stages.2.actual.peak_gib"] == "11.50"


def test_all_that_a_model_wrote_is_text(full: tuple[dict[str, Any], str]) -> None:
    """No tag, no attribute of theirs; what does not print is shown; what is long is cut."""
    _, text = full
    read = Reader(text)
    assert {tag for tag, _ in read.tags} <= set(OURS.split())
    names = {name for _, attributes in read.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")} and "src" not in names
    assert sum(tag == "h1" for tag, _ in read.tags) == 1
    for hostile in HOSTILE[:4]:
        assert hostile in read.text and hostile not in text
    assert "\\u202e around, \\u001b[31m and \\u0000, half a pair \\ud800" in read.text
    assert "{{ 7 * 7 }}" in read.text and "characters left out" in read.text
    assert "49" not in re.findall(r"turned|\b49\b", read.text)
    assert not [c for c in text if not c.isprintable() and c not in "\n\t\u00a0"]


def test_nothing_is_fetched_and_no_script_may_run(full: tuple[dict[str, Any], str]) -> None:
    _, text = full
    read = Reader(text)
    (policy,) = [a["content"] for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "http" not in policy
    links = [
        value for _, a in read.tags for name, value in a.items() if name in ("href", "xlink:href", "src", "action")
    ]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert re.findall(r"https?://\S+?[\"<]", text) == []or set(re.findall(r"https?://[^\"< ]+", text)) == {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip


def test_ids_are_unique_and_every_reference_has_one(full: tuple[dict[str, Any], str]) -> None:
    tags = Reader(full[1]).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids)) > 20
    assert {a["href"][1:] for tag, a in tags if tag == "a"} <= set(ids)
    assert {a["xlink:href"][1:] for tag, a in tags if tag == "use"} <= set(ids)


def test_every_figure_has_words_and_both_sizes_and_colours_follow_the_page(full: tuple[dict[str, Any], str]) -> None:
    _, text = full
    figures = re.findall(r'<figure role="img" aria-label="([^"]+)">(.*?)</figure>', text, re.DOTALL)
    assert len(figures) == 6  # accuracy, costs, timeline, two curves, lengths
    for words, inner in figures:
        assert len(words) > 20 and inner.count("<svg") == 2 and 'class="wide"' in inner and 'class="narrow"' in inner
        assert not re.search(r"(fill|stroke): #", inner) and "DejaVu" not in inner and "mathdefault" not in inner
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined
    dark = text.partition("prefers-color-scheme: dark")[2].partition("* {")[0]
    assert set(re.findall(r"(--\w+):", dark)) == defined


def test_a_page_comes_out_the_same_twice(full: tuple[dict[str, Any], str]) -> None:
    assert render_page(full[0]) == full[1]


def test_a_page_stays_below_its_size_whatever_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 answers of 100,000 characters that take six each: cut once more than usual."""
    made = document(tmp_path)
    (label,) = made["labels"]
    label["samples"] = [{**label["samples"][0], "text": "\x00" * 100_000}] * 400
    text = render_page(made)
    assert len(text.encode()) <= MOST_BYTES == 3_000_000
    assert "[... 99,700 characters left out ...]" in text
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    with pytest.raises(UsageError, match=r"larger than 1\.0 kB"):
        render_page(made)


def test_a_failed_run_has_a_page_with_its_reason_and_its_log(tmp_path: Path) -> None:
    text = render_page(document(tmp_path, done=False))
    read = Reader(text)
    assert "Nothing was evaluated." in read.text and "out of memory" in read.text
    assert f"stage train failed: {HOSTILE[1]}" in read.text and "look at kdcloud logs" in read.text
    assert ("stages.2.actual.hours", None, "–") in read.facts and ("state", "failed", "failed") in read.facts


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    plan = plan_made(tmp_path)
    run = replace(run_made(plan), machines=(), done={})
    report = page_data_report(run, plan) | {"state": "running"}
    read = Reader(render_page(page_data.gather(run, plan, report, now=START)))
    for words in (
        "Nothing was evaluated yet.",
        "No machine was asked for.",
        "No training has logged anything.",
        "no labels yet",
    ):
        assert words in read.text


def page_data_report(run: Any, plan: Any) -> dict[str, Any]:
    from orchestrator.report import build_report

    return build_report(run, plan, [])


def test_a_run_of_an_older_version_that_told_less_has_a_page(tmp_path: Path) -> None:
    """No interval over problems, no mass, no samples."""
    made = document(tmp_path)
    accuracy = {"mean": 0.5, "min": 0.5, "max": 0.5, "n": 100, "seeds": [0.5]}
    made["report"]["quality"] = dict.fromkeys(made["report"]["quality"]) | {"student": {"accuracy": accuracy}}
    made["labels"][0] |= {"result": {"kept": 3, "generated": 4}, "lengths": None, "samples": []}
    made["samples"] = [{"input": "1", "answer": None, "change": "unknown"}]
    read = Reader(render_page(made))
    assert ("quality.student.accuracy.mean", 0.5, "0.500") in read.facts
    assert "wrote 4 answers to – prompts" in read.text and "expected: –" in read.text


def test_a_bucket_that_cannot_be_read_is_said_and_leaves_the_rest(tmp_path: Path) -> None:
    plan = plan_made(tmp_path)
    run = replace(run_made(plan), bucket="nowhere:at/all")
    made = page_data.gather(run, plan, page_data_report(run, plan) | {"state": "done"}, now=START)
    assert made["curves"] == [] and made["labels"][0]["lengths"] is None
    read = Reader(render_page(made))
    assert "Not shown: curves and lengths: the bucket cannot be opened" in read.text
    assert any(path == "quality.student.accuracy.mean" for path, _, _ in read.facts)


def test_without_the_extra_the_page_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = document(tmp_path)
    for module in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(UsageError, match=module) as raised:
                render_page(made)
        assert raised.value.hint == install_hint("page")


def test_curves_are_arms_without_searches_and_count_repeated_steps_once() -> None:
    rows = [{"step": s, "hard-1/loss/total": v, "hard-1/learning_rate": 0.1} for s, v in ((0, 4.0), (1, 9.0), (1, 2.0))]
    rows += [
        {"step": 0, "search-soft-0.1/loss/total": 1.0},
        {"step": 0, "tokens_per_s": 1.0},
        {"step": 0, "loss/total": None},
    ]
    hard, soft = arms_of(rows)
    assert (hard["role"], hard["seed"], hard["total"], hard["kl"]) == ("student_hard", 1, [4.0, 2.0], [None, None])
    assert (soft["role"], soft["seed"], soft["name"], soft["total"]) == ("student", 0, "student", [None])


def test_long_curves_become_means_of_neighbours() -> None:
    (arm,) = arms_of([{"step": step, "loss/total": float(step)} for step in range(1000)])
    assert len(arm["steps"]) == 200 and arm["a_point"] == 5
    assert arm["total"][:2] == [2.0, 7.0] and arm["steps"] == arm["total"] and arm["last"]["total"] == 999.0


def test_the_money_line_ends_at_what_was_spent_and_never_falls(full: tuple[dict[str, Any], str]) -> None:
    made, _ = full
    amounts = [amount for _, amount in made["timeline"]["money"]]
    assert amounts == sorted(amounts) and amounts[0] == 0
    assert amounts[-1] == pytest.approx(made["report"]["spend_micros"], abs=1)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [(False, True, "gained"), (True, False, "lost"), (True, True, "right"), (False, False, "wrong"),
     (None, True, "right"), (False, None, "unknown")],
)  # fmt: skip
def test_what_became_of_an_answer(before: bool | None, after: bool | None, change: str) -> None:
    right = {name: value for name, value in (("student_before", before), ("student", after)) if value is not None}
    assert change_of(right) == change


def test_lengths_are_counted_in_bins_that_hold_every_answer(full: tuple[dict[str, Any], str]) -> None:
    found = full[0]["labels"][0]["lengths"]
    assert sum(found["kept_counts"]) == found["kept"]["n"] == 180 and sum(found["dropped_counts"]) == 20
    assert (found["kept_counts"][0], found["dropped_counts"][0]) == (10, 5)  # of 5 to 7 tokens; each length five times
    assert found["edges"][0] == 5 and found["edges"][-1] > 44 == found["kept"]["longest"]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("infra: fake\n", "kdcloud run addition.yaml --budget 14.20CNY"),
        ("infra: [aws]\n", "kdcloud run addition.yaml --budget 14.20CNY --infra fake"),
        ("not: [closed", "kdcloud run addition.yaml --budget 14.20CNY --infra fake"),
    ],
)
def test_the_command_makes_the_same_run_again(tmp_path: Path, recipe: str, says: str) -> None:
    plan = plan_made(tmp_path)
    assert command(replace(run_made(plan), data={"recipe_text": recipe}), plan) == says


def test_small_things() -> None:
    assert flat({"a": 1, "b": {"c": (2,), "d": {}}}) == [("a", 1), ("b.c", (2,)), ("b.d", {})]
    assert printable("abcdefghij", 6) == "abcd\n[... 4 characters left out ...]\nij"
    assert at({"a": [{"b": None}]}, "a.0.b.c") is None
    assert set(page.PARTS) and all(
        f'id="{id_}"' in (Path(page.__file__).parent / "templates/report.html").read_text() for id_, _ in page.PARTS
    )
