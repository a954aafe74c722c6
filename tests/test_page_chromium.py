"""Does a browser show the report page as it is meant? In Debian's headless Chromium, at two widths, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.page import at, render_page
from tests.chromium import Chromium, chromium
from tests.pages import HOSTILE, document

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium: apt-get install --no-install-recommends chromium"
)
LOOKS = [(1280, False), (1280, True), (375, False), (375, True)]
BOXES = """[...document.querySelectorAll('figure')].map(figure => [...figure.querySelectorAll('svg')].map(svg => {
    const box = svg.getBoundingClientRect();
    return {shown: box.width > 0 && box.height > 0, left: box.left, right: box.right, height: box.height,
            lines: [...svg.querySelectorAll('path')].filter(p => p.getBoundingClientRect().width > 0).length,
            out: [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
                return b.width > 0 && (b.left < 0 || b.right > document.documentElement.clientWidth);
            }).map(t => t.textContent),
            small: [...svg.querySelectorAll('text')].some(t => { const b = t.getBoundingClientRect();
                return Math.min(b.width, b.height) > 0 && Math.min(b.width, b.height) < 6; })};
}))"""
CONTRAST = """(() => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const under = el => { for (; el; el = el.parentElement) { const c = getComputedStyle(el).backgroundColor;
        if (c !== 'rgba(0, 0, 0, 0)') return c; } };
    const all = [];
    const words = 'p, th, td, dd, dt, li, summary, figcaption, caption, h1, h2, h3, span, a, text';
    for (const el of document.querySelectorAll(words)) {
        if (!el.textContent.trim() || !el.getBoundingClientRect().width) continue;
        const svg = el.tagName === 'text', style = getComputedStyle(el);
        const [a, b] = [light(svg ? style.fill : style.color), light(under(el))].sort((x, y) => y - x);
        all.push([(a + 0.05) / (b + 0.05), el.textContent.slice(0, 40)]);
    }
    return [all.length, ...all.sort((x, y) => x[0] - y[0])[0]];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    made = Chromium(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report, and the address of its page."""
    made = document(tmp_path_factory.mktemp("bucket"))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(made), encoding="utf-8")
    return made["report"], path.as_uri()


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_every_figure_is_seen_and_nothing_is_wrong(
    browser: Chromium, shown: tuple[dict[str, Any], str], width: int, dark: bool
) -> None:
    browser.show(shown[1], width=width, dark=dark)
    assert browser.errors == [] and browser.requests == [shown[1]]
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    figures = browser.js(BOXES)
    assert len(figures) == 6
    for wide, narrow in figures:
        seen, other = (narrow, wide) if width < 640 else (wide, narrow)
        assert seen["shown"] and not other["shown"]
        assert seen["left"] >= 0 and seen["right"] <= width and seen["height"] >= 100
        assert seen["lines"] >= 3 and seen["out"] == [] and not seen["small"]
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
    count, worst, text = browser.js(CONTRAST)
    assert count > 200 and worst >= 4.5, text  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [1280, 375])
def test_what_is_shown_is_what_the_report_says(
    browser: Chromium, shown: tuple[dict[str, Any], str], width: int
) -> None:
    browser.show(shown[1], width=width)
    code = """[...document.querySelectorAll('data')].map(el => { const box = el.getBoundingClientRect();
        const whole = box.width > 0 && box.right <= innerWidth && el.getClientRects().length === 1;
        return [el.dataset.of, el.getAttribute('value'), el.innerText, whole]; })"""
    facts = browser.js(code)
    assert len(facts) >= 50
    for path, value, text, visible in facts:
        assert json.loads(value) == at(shown[0], path) and text.strip() and visible, path


def test_hostile_answers_stay_text(browser: Chromium, shown: tuple[dict[str, Any], str]) -> None:
    browser.show(shown[1], width=1280)
    assert (
        browser.js("document.scripts.length + document.images.length + document.querySelectorAll('[onload]').length")
        == 0
    )
    assert (
        browser.js("document.title") == "addition-abc123: done"
        and browser.js("document.querySelectorAll('h1').length") == 1
    )
    texts = browser.js("[...document.querySelectorAll('.said')].map(el => el.textContent)")
    for hostile in HOSTILE[:4]:
        assert hostile in texts


def test_a_script_that_got_in_would_not_run(
    browser: Chromium, shown: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    """The page's own policy refuses it, and this test would see it."""
    text = Path(shown[1].removeprefix("file://")).read_text()
    path = tmp_path / "broken.html"
    path.write_text(
        text.replace("<main>", "<main><script>document.title = 'stolen'</script><img src='http://x.test/y'>")
    )
    browser.show(path.as_uri(), width=1280)
    assert browser.js("document.title") == "addition-abc123: done"
    assert len(browser.errors) == 2 and all("Content Security Policy" in text for text in browser.errors)


def test_on_paper_everything_is_open(browser: Chromium, shown: tuple[dict[str, Any], str]) -> None:
    code = "[...document.querySelectorAll('details > :not(summary)')].map(el => el.checkVisibility())"
    for media, seen in (("screen", False), ("print", True)):
        browser.show(shown[1], width=1000, media=media)
        assert browser.js(code) == [seen] * len(browser.js(code)) and len(browser.js(code)) >= 5


@pytest.mark.parametrize("done", [False, True])
def test_a_page_of_a_run_with_little_in_it_is_whole(browser: Chromium, tmp_path: Path, done: bool) -> None:
    path = tmp_path / "page.html"
    path.write_text(render_page(document(tmp_path / "bucket", done=done, filled=done)), encoding="utf-8")
    browser.show(path.as_uri(), width=375)
    assert browser.errors == []
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
