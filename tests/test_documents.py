"""Is what the documents say so? Commands are understood, links lead somewhere, both languages say the same."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import click
import pytest

from orchestrator.cli import kdcloud
from orchestrator.recipe import builtin_recipes, parse_recipe

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [ENGLISH, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 600_000  # of all pictures together
NAMES = {f"kdcloud {name}" for name in kdcloud.commands} | {
    f"kdcloud {name} {part}"
    for name, group in kdcloud.commands.items()
    if isinstance(group, click.Group)
    for part in group.commands
}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# -- reading Markdown


def parts(text: str) -> Iterator[tuple[bool, str]]:
    """(whether it is code, the line) of every line; fences themselves are left out."""
    fence, after_blank, listed = "", True, False
    for line in text.splitlines():
        mark = re.match(r"\s*(```+)", line)
        if mark:
            fence = "" if fence else mark[1]
            continue
        indent = len(line) - len(line.lstrip())
        if line.strip() and not fence:
            listed = bool(re.match(r"\s*([-*]|\d+\.) ", line)) or (listed and indent > 0)
        deep = 8 if listed else 4
        code = bool(fence) or (indent >= min(deep, 7) and bool(line.strip()) and (after_blank or not listed))
        yield code, line
        after_blank = not line.strip()


def code_lines(page: Path) -> list[str]:
    """Commands and other code, each without its comment and what stands around it."""
    lines = [line.strip() for code, line in parts(page.read_text(encoding="utf-8")) if code]
    return [bare for line in lines if (bare := re.sub(r"(^|\s+)#( .*)?$", "", line))]


def prose(page: Path) -> str:
    return "\n".join(line for code, line in parts(page.read_text(encoding="utf-8")) if not code)


def spans(page: Path) -> list[str]:
    """Code in the middle of text."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))


def links(page: Path) -> list[str]:
    without_code = re.sub(r"`[^`]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: Counter[str] = Counter()
    made = set()
    for line in prose(page).splitlines():
        heading = re.match(r"#+ (.*)", line)
        if heading:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            made.add(f"{slug}-{found[slug]}" if found[slug] else slug)
            found[slug] += 1
    return made


def first_cells(page: Path) -> list[str]:
    """What stands in the first column of each row of a table."""
    rows = [line for line in prose(page).splitlines() if line.startswith("| ")]
    return [row.split(" | ")[0].removeprefix("| ").strip() for row in rows]


# -- commands


def commands(page: Path) -> list[str]:
    """Every `kdcloud ...` of a page; in the middle of text a command's mere name is a name, not a line to type."""
    whole = [line for line in code_lines(page) if re.match(r"kdcloud ", line)]
    inline = [span for span in spans(page) if re.match(r"kdcloud [a-z-]", span)]
    return whole + [span for span in inline if span not in NAMES]


def words_of(command: str) -> list[str]:
    """What the shell would hand over; what is optional in a table is taken, and of what may follow only the command."""
    plain = re.split(r"\s(?:\||<|>|>>|&&|;)\s|;", command.replace("[", "").replace("]", "").replace("...", ""))[0]
    return [{"SHELL": "bash"}.get(word, word) for word in shlex.split(plain, comments=True)[1:]]


def parsed(words: list[str]) -> click.Context | None:
    """The command line as the parser takes it, nothing executed; None where help or the version is asked for."""
    command: click.Command = kdcloud
    name, rest = "kdcloud", list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in command.commands:
            raise click.UsageError(f"there is no command {name}")
        command = command.commands[name]
    try:
        return command.make_context(name, rest)
    except click.exceptions.Exit:
        return None


@pages
def test_every_command_line_is_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # with whatever a line takes to be there
    (tmp_path / "DIR").mkdir()
    for name in ("FILE", "CASES.jsonl", "cases.jsonl", "mine.jsonl", "recipe.yaml"):
        (tmp_path / name).touch()
    wrong = []
    for line in commands(page):
        try:
            parsed(words_of(line))
        except click.ClickException as error:
            wrong.append(f"{line}: {error.message}")
    assert not wrong, "\n".join(wrong)


def test_so_many_command_lines_were_looked_at() -> None:
    assert len(commands(ENGLISH)) > 30
    assert sum(len(commands(page)) for page in PAGES) > 120


@pages
def test_recipes_that_are_named_come_with_kdcloud(page: Path) -> None:
    for line in commands(page):
        words = words_of(line)
        if words[0] not in ("plan", "run", "dev") or len(words) < 2:
            continue
        name = words[1]
        if name.startswith("recipes/"):
            assert (ROOT / name).is_file(), line
        elif re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) and not name.endswith(".yaml"):
            assert name in builtin_recipes(), line


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_readme_says_no_command_but_the_real_ones_and_each_of_them(page: Path) -> None:
    table = {cell.split()[1].strip("`") for cell in first_cells(page) if cell.startswith("`kdcloud ")}
    assert table == set(kdcloud.commands)


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_readme_lists_every_exit_code_of_the_help(page: Path) -> None:
    known = re.findall(r"(?:^|, |: )(\d+) ", " ".join((kdcloud.help or "").partition("Exit codes")[2].split()))
    assert len(known) == 9
    assert [cell for cell in first_cells(page) if cell.isdecimal()] == known


def test_the_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", ENGLISH.read_text(encoding="utf-8"), re.S)
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text('{"input": "1 + 1", "answer": "2"}\n')
    recipe = parse_recipe(text, tmp_path / "recipe.yaml")
    assert [stage.kind for stage in recipe.stages] == ["label", "train", "evaluate", "export"]


# -- links


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in links(page):
        if re.match(r"[a-z]+://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            lost.append(link)
        elif anchor and anchor not in anchors(target):
            lost.append(f"{link}: {target.name} has {', '.join(sorted(anchors(target)))}")
    assert not lost, "\n".join(lost)


def test_so_many_links_were_looked_at() -> None:
    assert sum(len(links(page)) for page in PAGES) > 120


def test_the_index_names_every_document() -> None:
    listed = set(links(ROOT / "docs" / "README.md"))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


# -- the two languages


def test_both_readmes_show_the_same_commands_in_the_same_order() -> None:
    assert code_lines(CHINESE) == code_lines(ENGLISH)
    assert len(code_lines(ENGLISH)) > 30


def test_both_readmes_have_the_same_links_and_pictures() -> None:
    there = {"README.md", "README.zh-CN.md"}
    english, chinese = ([link for link in links(page) if link not in there] for page in (ENGLISH, CHINESE))
    assert Counter(chinese) == Counter(english)
    assert (links(ENGLISH)[0], links(CHINESE)[0]) == ("README.zh-CN.md", "README.md")


def test_both_readmes_have_the_same_tables_and_chapters() -> None:
    english, chinese = (
        [cell for cell in first_cells(page) if cell.startswith(("`", "[")) or cell.isdecimal()]
        for page in (ENGLISH, CHINESE)
    )
    assert [re.sub(r"（(.*?)）", r" (\1)", cell) for cell in chinese] == english
    headings = [re.findall(r"^(#+) ", prose(page), re.M) for page in (ENGLISH, CHINESE)]
    assert headings[0] == headings[1]


def test_both_readmes_name_the_same_options_files_and_keys() -> None:
    english, chinese = (Counter(spans(page)) for page in (ENGLISH, CHINESE))
    assert chinese == english, f"only in English: {english - chinese}; only in Chinese: {chinese - english}"


# -- what is made by scripts


def test_the_recipe_reference_is_what_the_types_say() -> None:
    made = script("recipe_reference")
    assert made.FILE.read_text(encoding="utf-8") == made.reference(), "run python scripts/recipe_reference.py"


@pytest.mark.slow
def test_outputs_in_the_documents_are_what_the_commands_print() -> None:
    made = script("doc_outputs")
    held = [page for page in PAGES if made.BLOCK.search(page.read_text(encoding="utf-8"))]
    assert {"gpus.md", "staged.md"} <= {page.name for page in held}
    for page in held:
        text = page.read_text(encoding="utf-8")
        assert made.renewed(text) == text, f"{page.name}: run python scripts/doc_outputs.py"


def test_blocks_are_those_that_the_script_knows() -> None:
    made = script("doc_outputs")
    found = [block for page in PAGES for block in made.BLOCK.finditer(page.read_text(encoding="utf-8"))]
    known = [block["table"] for block in found if block["table"]]
    assert set(made.TABLES) <= set(known)
    assert sum(1 for block in found if block["command"]) >= 3


def test_pictures_are_small_whole_and_fetch_nothing() -> None:
    files = sorted(PICTURES.iterdir())
    assert {"plan.svg", "run.svg", "report.png", "flow.svg"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    for file in files:
        if file.suffix == ".svg":
            text = file.read_text(encoding="utf-8")
            ElementTree.fromstring(text)
            assert not re.search(r"(?:href|src|url\()\s*=?\s*[\"']?https?:", text), file
        else:
            assert file.read_bytes().startswith(b"\x89PNG"), file


def test_every_picture_is_shown_somewhere() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if "pictures/" in link}
    assert shown == set(PICTURES.iterdir())
