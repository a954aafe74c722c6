"""Labels for people: `kdcloud labels show`, `export` and `import`. What needs torch is loaded in the commands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from orchestrator import completion
from orchestrator.errors import UsageError
from orchestrator.plain import json_text

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_ALTERNATIVES = 4
SHOWN_TOKEN_WIDTH = 12


@click.group(short_help="The teacher's labels: read them, or to JSON and back.")
def labels() -> None:
    """What the teacher said: samples with its alternatives, or all of them as lines of JSON and back.

    \b
    kdcloud labels show last --limit 3
    kdcloud labels export last labels.jsonl
    """


@labels.command(
    short_help="Prompt, answer, and the teacher's likeliest tokens with their shares."
)
@click.argument("place", metavar="[RUN|FOLDER]", required=False, shell_complete=completion.runs_or_folders)
@click.option("--stage", help="The label stage, where a run has several.")
@click.option("--sample", "first", type=int, default=0, metavar="N", help="Begin with sample N (0).")
@click.option("--limit", type=click.IntRange(min=1), default=1, metavar="N", help="How many samples (1).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def show(place: str | None, stage: str | None, first: int, limit: int, as_json: bool) -> None:
    """Samples as text: prompt, completion, and below them a line a token: what the teacher wrote there, its likeliest
    tokens with their probabilities (the one it wrote in green), and the tail: what all others had together.

    Without RUN or FOLDER the newest run. It needs the extra [local], since labels are tensors.

    \b
    kdcloud labels show last --limit 3
    kdcloud labels show ./fetched/label --sample 17 --json
    """
    from rich.console import Console

    text = _text()
    with _folder(place, stage) as folder:
        samples = text.shown(folder, first=first, limit=limit)
        how = text.stored(folder)
        if as_json:
            click.echo(json_text({"schema": 1, **how, "samples": list(samples)}, indent=1))
            return
        console = Console(highlight=False)
        console.print(stored_words(how))
        for sample in samples:
            render_sample(sample, console)


@labels.command("export", short_help="Labels of a run or folder to lines of JSON.")
@click.argument("place", metavar="RUN|FOLDER", shell_complete=completion.runs_or_folders)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.jsonl")
@click.option("--stage", help="The label stage, where a run has several.")
def export_(place: str, file: Path, stage: str | None) -> None:
    """Write labels as JSON lines: input, target, soft_label [{id: log-probability} a token], and what makes it exact.

    \b
    kdcloud labels export last labels.jsonl
    kdcloud labels export ./fetched/label labels.jsonl
    """
    text = _text()
    with _folder(place, stage) as folder:
        count = text.export_jsonl(folder, file)
    click.echo(f"{count} samples in {file}", err=True)


@labels.command("import", short_help="Lines of JSON to labels, which `labels: ./FOLDER` in a recipe trains on.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.jsonl")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tokenizer", required=True, metavar="PATH", help="The teacher's: a folder or hub id.")
def import_(file: Path, folder: Path, tokenizer: str) -> None:
    """Make labels of JSON lines: input, target, and soft_label [{token: probability} a token] if any.

    Ids are taken as they are where the line has target_ids (soft_label then names ids) and input_ids.

    \b
    kdcloud labels import labels.jsonl ./labels --tokenizer Qwen/Qwen2.5-Math-1.5B
    """
    count = _text().import_jsonl(file, folder, tokenizer)
    click.echo(f"{count} samples in {folder}", err=True)


def _text() -> Any:
    try:
        from tasks import labels_text
    except ModuleNotFoundError as error:
        from tasks.contract import install_hint

        raise UsageError(f"labels need {error.name}, which is not installed", hint=install_hint("local")) from error
    return labels_text


@contextmanager
def _folder(place: str | None, stage: str | None) -> Iterator[Path]:
    """The folder of labels: the one named, or the finished label stage of a run, fetched where it is remote."""
    if place is not None and Path(place).is_dir():
        yield Path(place)
        return
    from orchestrator.artifacts import bytes_bar, fetch, look, wanted
    from orchestrator.config import Home
    from orchestrator.session import newest, opened_ledger, plan_of
    from tasks.bucket import open_bucket

    if place is not None and _is_path(place):
        raise UsageError(f"{place} is no folder", hint="name a folder of labels, or a run: its id, or last")
    with opened_ledger(Home.from_env(), say=lambda text: click.echo(text, err=True)) as ledger:
        run = ledger.run(newest(ledger, place))
        names = [one.name for one in plan_of(run).stages if one.kind == "label" and stage in (None, one.name)]
    if len(names) != 1:
        there = f"it has {', '.join(names)}" if names else "it has none of that name" if stage else "it has none"
        raise UsageError(f"name the one label stage of {run.id}: {there}", hint="use --stage, or name a folder")
    bucket = open_bucket(run.bucket)
    found = look(bucket, names)
    if not any(one.folder == names[0] for one in found):
        raise UsageError(f"stage {names[0]} of {run.id} is not done", hint="look at `kdcloud status`")
    if run.bucket.startswith("file:"):
        yield Path(bucket.url.removeprefix("file:")) / names[0]
        return
    with TemporaryDirectory(prefix="kdcloud-labels-") as dest:
        with bytes_bar(sum(wanted(found).values()), "fetching") as moved:
            fetch(bucket, found, Path(dest), moved=moved)
        yield Path(dest) / names[0]


def _is_path(place: str) -> bool:
    return ":" not in place and (place.startswith((".", "~")) or "/" in place)


def stored_words(how: dict[str, Any]) -> str:
    """`64 ids a token; log-probabilities of 8 bit, off by 0.038, 0.13 at worst`."""
    if how["top_k"] == 0:
        return "hard labels only"
    error = how["logprob_error"]
    off = "error not measured" if error is None else f"off by {error['mean']:.2g}, {error['worst']:.2g} at worst"
    return f"{how['top_k']} ids a token; log-probabilities of {how['logprob_bits']} bit, {off}"


def render_sample(sample: dict[str, Any], console: Console) -> None:
    """One sample on a terminal of 80 columns or more; texts are a model's and are shown as plain text."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    console.print(Rule(Text(f"sample {sample['sample']}  {sample['key'][:12]}"), align="left", style="dim"))
    for name in ("prompt", "completion"):
        console.print(Text(name, "bold"))
        console.print(Text(_printable(sample[name], keep="\n")))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("token", no_wrap=True)
    table.add_column("teacher's likeliest")
    table.add_column("tail", justify="right", no_wrap=True)
    for token in sample["tokens"]:
        line = Text()
        for one in token["top"][:SHOWN_ALTERNATIVES]:
            chosen = one["id"] == token["id"]
            line.append(f"{_cell(one['text'])} ", "green" if chosen else "")
            line.append(f"{_share(one['probability'])}  ", "bold" if chosen else "dim")
        tail = "" if token["tail_mass"] is None else _share(token["tail_mass"])
        table.add_row(Text(_cell(token["text"])), line, Text(tail, "dim"))
    console.print(table)


def _share(value: float) -> str:
    """`97.2%`; below 0.05 % as a power of ten: `1e-7`."""
    if value >= 0.0005:
        return f"{100 * value:.1f}%"
    return f"1e{math.floor(math.log10(value))}" if value > 0.0 else "0"


def _cell(text: str) -> str:
    """A token within SHOWN_TOKEN_WIDTH, its blanks and line ends visible."""
    text = _printable(text.replace(" ", "·").replace("\n", "\\n"))
    return text if len(text) <= SHOWN_TOKEN_WIDTH else text[: SHOWN_TOKEN_WIDTH - 1] + "…"


def _printable(text: str, keep: str = "") -> str:
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)
