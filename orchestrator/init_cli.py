"""A first recipe for people: `kdcloud init` asks, writes it with the data beside it, and says what is next."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator import first_recipe
from orchestrator.errors import UsageError
from orchestrator.first_recipe import Answers, Draft, Question

if TYPE_CHECKING:
    from orchestrator.config import Home
    from orchestrator.plan import Plan

SKY_LIMIT_S = 20.0  # its server may have to start


def begin(
    path: Path, template: str | None, given: Mapping[str, str | None], *, home: Home, yes: bool, force: bool
) -> Path:
    """Writes the recipe, asking for what `given` lacks unless `yes`; returns its path. Raises UsageError, Abort."""
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if template is not None and named:
        raise UsageError(f"a template is written as it is: {named[0]} goes without one", hint="leave --template out")
    if template is None and not yes and not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to ask on", hint="add --yes to take every default, or --template NAME (or list)"
        )
    draft = _asked(given, home, yes) if template is None else first_recipe.from_template(template)
    write(draft, path, may_replace=lambda there: force or _may_replace(there, yes))
    return path


def _asked(given: Mapping[str, str | None], home: Home, yes: bool) -> Draft:
    from orchestrator.offers import table_infras

    def ask(question: Question, check: Callable[[str], Any]) -> Any:
        answer = given.get(question.option)
        if answer is not None or yes:
            return check(answer if answer is not None else question.default)
        return _ask(question, check)

    found = found_infras(home) if given.get("infra") is None else ()
    answers: Answers = first_recipe.interview(ask, found, (*table_infras(), "kubernetes", "slurm", *_more(home)))
    if answers.prompts is not None:
        _talk(f"{answers.prompts.path}: {answers.prompts}")
    return first_recipe.composed(answers)


def _ask(question: Question, check: Callable[[str], Any]) -> Any:
    """On the terminal, until the answer is a good one; enter takes the default."""
    _talk("")
    while True:
        click.secho(wrapped(question.note), dim=True, err=True)
        text = click.prompt(click.style(question.words, bold=True), default=question.default, err=True)
        try:
            return check(text)
        except UsageError as error:
            _talk(f"{wrapped(error.message)}\n{wrapped(f'-> {error.hint}', '  ')}\n")


def wrapped(text: str, indent: str = "") -> str:
    """As many lines as the terminal needs, broken at blanks."""
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def found_infras(home: Home) -> tuple[str, ...]:
    """Infras that can be had from here: those with prices on file, Slurm's clusters, else what SkyPilot says."""
    from orchestrator import sky_ask
    from orchestrator.access import head

    asked = tuple(dict.fromkeys(head(name) for name in _more(home)))
    if asked:
        return asked
    clusters = _clusters(home)
    if sky_ask.sky_version() is None:
        return clusters
    _talk(f"asking SkyPilot what is enabled (up to {SKY_LIMIT_S:.0f} s)")
    answer = sky_ask.enabled(home.root, SKY_LIMIT_S)
    if answer.enabled is None:
        _talk(f"SkyPilot {answer.trouble}")
    return tuple(dict.fromkeys((*clusters, *(name for name in answer.enabled or () if name != "slurm"))))


def _more(home: Home) -> tuple[str, ...]:
    from orchestrator.price_cache import load

    cache = load(home.offers_cache)
    return tuple(cache.infras) if cache is not None else ()


def _clusters(home: Home) -> tuple[str, ...]:
    from orchestrator.provision_sky import SlurmQueue

    return tuple(f"slurm/{name}" for name in SlurmQueue(home.root / "sky").clusters())


def write(draft: Draft, path: Path, *, may_replace: Callable[[Path], bool]) -> None:
    """Writes the recipe and the files beside it, or nothing. Raises UsageError."""
    from orchestrator.recipe import parse_recipe
    from orchestrator.recipe_words import written

    text = written(draft.raw, str(path), draft.about)
    beside = {path.parent / name: body for name, body in draft.files.items()}
    changed = {file: body for file, body in {**beside, path: text}.items() if _differs(file, body)}
    for file in changed:
        if file.exists() and not may_replace(file):
            raise UsageError(f"{file} is there already", hint="name another file, or add --force to replace it")
    new = [file for file in beside if not file.exists()]
    try:
        for file in [file for file in changed if file != path]:
            _put(file, changed[file])
        parse_recipe(text, path)
    except UsageError:
        for file in new:
            file.unlink(missing_ok=True)
        raise
    _put(path, text)
    extra = f", and {', '.join(draft.files)} beside it" if draft.files else ""
    _talk(f"\nwrote {path}{extra}")


def _differs(file: Path, body: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") != body
    except (OSError, UnicodeDecodeError):
        return True


def _put(file: Path, body: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}", hint="name another place") from error


def _may_replace(file: Path, yes: bool) -> bool:
    return not yes and sys.stdin.isatty() and click.confirm(f"{file} is there already: replace it?", err=True)


def list_templates() -> None:
    for name, words in first_recipe.templates().items():
        click.echo(f"{name:<14} {words}")


def summary(made: Plan) -> str:
    """The plan in one line."""
    from orchestrator.money import both, human_seconds, shown

    expected, held = (
        shown(value, made.rate, made.currency) for value in (made.cost_micros.expected, made.reserve_micros)
    )
    where = ", ".join(dict.fromkeys(stage.offer.infra for stage in made.stages))
    fits = "fits" if made.fits and made.in_time else "misses the deadline" if made.fits else "does not fit"
    return (
        f"plan {fits}: {human_seconds(made.hours.expected * 3600)} on {where}, {expected} expected and {held} held "
        f"back, cap {both(made.cap_micros, made.rate, made.currency)}"
    )


def next_steps(made: Plan, path: Path) -> str:
    """What to type now."""
    from orchestrator.access import account_infras

    word = shlex.quote(str(path))
    rented = any(offer.infra != "local" for stage in made.stages for offer in stage.candidates)
    if not rented:
        return f"  kdcloud run {word}"
    lines = [f"  kdcloud doctor --recipe {word}    what is missing before it can run", f"  kdcloud run {word}"]
    if made.bucket.startswith("file:"):
        lines.insert(0, f"  set `bucket:` in {path} to a store that rented machines reach")
    if account_infras(made):
        lines.insert(-2, f"  set `allow_account_key: true` in {path}, if you accept what the plan says of keys")
    return "\n".join(lines)


def _talk(text: str) -> None:
    click.echo(text, err=True)
