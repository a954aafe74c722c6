"""`kdcloud try`: what does a run's student say, beside its teacher and what it was before training?"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from orchestrator import completion
from orchestrator.errors import UsageError
from orchestrator.plain import json_text, printable
from orchestrator.signals import heard_by

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.answering import Asking
    from orchestrator.ledger import Ledger
    from orchestrator.student import Found, Role

SCHEMA = 1
RUN_WORDS = re.compile(r"[A-Za-z0-9._-]+|(?:file|s3):\S+")  # anything else is a question
HELP = """\
Type a question and press Enter. Each stands alone: no model sees earlier ones.
Dimmed text is thinking; the rest is the answer.
Ctrl-C stops an answer, the arrow keys bring back what you typed.
/quit or Ctrl-D ends."""


@click.command("try", short_help="Ask a run's student, beside its teacher.")
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=completion.runs)
@click.argument("question", metavar='["QUESTION"]', required=False)
@click.option("--only", type=click.Choice(["student", "teacher", "before"]), multiple=True,
              help="Ask this one; repeatable. Default: all that are at hand.")  # fmt: skip
@click.option("--stage", help="The export or train stage whose student is meant (default: the last one done).")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Of an answer (default: the evaluation's).")
@click.option("--temperature", type=click.FloatRange(0.0), default=0.0, metavar="T", help="0 (default) is greedy.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of sampled answers: the same one, the same answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def try_(
    run_id: str | None, question: str | None, only: tuple[str, ...], stage: str | None, max_new_tokens: int | None,
    temperature: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Ask a run's student on this machine, beside its teacher; without a question a prompt, or a line of stdin each.

    \b
    kdcloud try
    kdcloud try last "12+30"
    kdcloud try last --only student --json < questions.txt
    """
    from orchestrator.answering import check_installed

    run_id, question = told_apart(run_id, question)
    if question is None and as_json and sys.stdin.isatty():
        raise UsageError("--json needs a question", hint='kdcloud try last "12+30" --json, or one a line on stdin')
    check_installed()
    questions = None if question is None and sys.stdin.isatty() else questions_of(question)  # before models are loaded
    with _asking(run_id, stage, only, max_new_tokens, temperature) as (asking, found):
        if questions is None:
            _prompt(asking, seed)
        elif as_json:
            _as_json(asking, found, questions, seed)
        else:
            _one_by_one(asking, questions, seed, named=question is None)


def told_apart(run_id: str | None, question: str | None) -> tuple[str | None, str | None]:
    """(run, question): one word alone that cannot name a run is a question to the newest one. Raises UsageError."""
    if run_id is not None and question is None and not RUN_WORDS.fullmatch(run_id):
        run_id, question = None, run_id
    if question is not None and not question.strip():
        raise UsageError("the question is empty", hint='kdcloud try last "12+30"')
    return run_id, question


def questions_of(question: str | None) -> Iterator[str]:
    """The one that was given, else the lines of stdin that are not blank. Raises UsageError where there is none."""
    if question is not None:
        return iter([question])
    lines = (line.strip() for line in sys.stdin if line.strip())
    first = next(lines, None)
    if first is None:
        raise UsageError("no question came on stdin", hint='kdcloud try last "12+30"')
    return chain([first], lines)


def _last_with_student(ledger: Ledger) -> str:
    """The newest run that trains a student, told when a newer one does not; the newest where none does."""
    from orchestrator.session import newest

    last = newest(ledger, None)
    for name in ledger.runs():
        kinds = {stage["kind"] for stage in ledger.run(name).data.get("plan", {}).get("stages", ())}
        if kinds & {"train", "export"}:
            if name != last:
                _talk(f"{last} trains no student: asking that of {name}")
            return name
    return last


@contextmanager
def _asking(
    run_id: str | None, stage: str | None, only: tuple[str, ...], max_new_tokens: int | None, temperature: float
) -> Iterator[tuple[Asking, Found]]:
    from orchestrator.answering import Asking, usual_tokens
    from orchestrator.artifacts import bytes_bar
    from orchestrator.config import Home
    from orchestrator.session import newest, opened_ledger, plan_of
    from orchestrator.student import Role, fetch, find
    from tasks.bucket import open_bucket

    home = Home.from_env()
    with opened_ledger(home, say=_talk) as ledger:
        run = ledger.run(newest(ledger, run_id) if run_id not in (None, "last") else _last_with_student(ledger))
    bucket = open_bucket(run.bucket)
    found = find(run, bucket, stage=stage, roles=[Role(name) for name in only] or list(Role))
    for role, why in found.missing.items():
        if only:
            raise UsageError(f"the {role} cannot be asked: {why}", hint=f"leave --only {role} out")
        _talk(f"{role}: is not asked: {why}")
    with bytes_bar(found.size, "fetching") as moved:
        root = fetch(found, bucket, home, moved=moved)
    tokens = max_new_tokens or usual_tokens(plan_of(run).stages)
    with Asking(found, root, max_new_tokens=tokens, temperature=temperature) as asking:
        _talk(f"run {run.id}; answers of up to {tokens:,} tokens")
        for role, what in asking.load():
            if what:
                _talk(f"{role}: {what}")
        yield asking, found


def _as_json(asking: Asking, found: Found, questions: Iterator[str], seed: int) -> None:
    from orchestrator.answers_view import answers_to_json

    asked = []
    for question in questions:
        answers = {}
        with _ctrl_c(asking.stop):
            for one in asking.ask(question, seed=seed):
                answers[one.role] = one
        asked.append(answers_to_json(question, list(answers.values()), asking.loaded))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "run": found.run,
        "missing": {str(role): why for role, why in found.missing.items()},
        "asked": asked,
    }
    click.echo(json_text(document, indent=1))


def _one_by_one(asking: Asking, questions: Iterator[str], seed: int, *, named: bool) -> None:
    """`named`: each question stands above its answers."""
    from rich.text import Text

    console = _console()
    for question in questions:
        if named:
            console.print(Text(f"> {printable(question)}", "bold"), soft_wrap=True)
        _answer(asking, question, seed, console)


def _prompt(asking: Asking, seed: int) -> None:
    """Questions at the terminal, with what the line editor of this Python offers, until /quit or Ctrl-D."""
    with suppress(ImportError):  # not in every Python
        import readline  # noqa: F401

    console = _console()
    _talk("type a question; /help says more, /quit or Ctrl-D ends")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            _talk("\n/quit or Ctrl-D ends")
            continue
        match line:
            case "":
                continue
            case "/quit" | "/exit" | "/q":
                return
            case "/help" | "/?":
                click.echo(HELP)
            case _ if line.startswith("/") and re.fullmatch(r"/[a-z]+", line):
                _talk(f"there is no {line}; /help says what there is")
            case _:
                _answer(asking, line, seed, console)


def _answer(asking: Asking, question: str, seed: int, console: Console) -> None:
    from orchestrator.answers_view import show

    with _ctrl_c(asking.stop), _no_echo():
        show(asking.ask(question, seed=seed), _roles(asking), console)


def _roles(asking: Asking) -> list[Role]:
    from orchestrator.answering import ORDER

    return [role for role in ORDER if role in asking.loaded]


@contextmanager
def _ctrl_c(first: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `first`, the next ones end the command."""

    def pressed() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        first()

    with heard_by(pressed, [signal.SIGINT]):
        yield


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed meanwhile, `^C` too, stays out of what is drawn; it is there at the next prompt."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _talk(text: str) -> None:
    click.echo(text, err=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
