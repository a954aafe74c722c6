"""What may stand here? Names for the shell's tab key, and the script that asks for them: `kdcloud completion`.

Asked at every press of the key: nothing here loads what reads recipes or draws tables, and what fails offers no name.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem, get_completion_class

from orchestrator.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
NEWEST = "SELECT id FROM run ORDER BY created_at DESC, rowid DESC LIMIT ?"
SHOWN_RUNS = 20  # the newest
VARIABLE = "_KDCLOUD_COMPLETE"
PLAIN = re.compile(r"[A-Za-z0-9._/+-]+")  # bash splits and expands what is offered: names of anything else stay out
Items: TypeAlias = "list[CompletionItem[str]]"  # a string: click before 8.2, which SkyPilot holds, knows no [str]


@click.command(short_help="Lets the tab key complete commands, recipes and runs.")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def completion(shell: str | None) -> None:
    """The script that lets the tab key complete commands, options, recipes and runs; for your shell, or the one named.

    To have it in every new shell, put the line of your shell into ~/.bashrc, or into ~/.zshrc below
    compinit, or write the file for fish.

    \b
    eval "$(kdcloud completion bash)"
    eval "$(kdcloud completion zsh)"
    kdcloud completion fish > ~/.config/fish/completions/kdcloud.fish
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    found = get_completion_class(name) if name in SHELLS else None
    if found is None:
        raise UsageError(f"there is no completion for {name or 'an unknown shell'}", hint="name one: bash, zsh or fish")
    root = click.get_current_context().find_root().command
    click.echo(found(root, {}, "kdcloud", VARIABLE).source())


def runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """`last` and ids of runs, the newest first; their last six characters, where those are typed."""
    ids = _run_ids()
    whole = _of(["last", *ids], incomplete)
    return whole or _of((run_id.rpartition("-")[2] for run_id in ids), incomplete)


def runs_or_folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    return runs(ctx, param, incomplete) or [CompletionItem(incomplete, type="dir")]


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Recipe files here (or in the folder that is typed), then those that come with kdcloud; else any file."""
    from orchestrator.shipped import builtin_recipes

    folder = Path(os.path.expanduser(os.path.dirname(incomplete) or "."))
    with suppress(OSError):
        there = sorted(file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
        start = incomplete[: len(incomplete) - len(os.path.basename(incomplete))]
        found = _of([*(start + name for name in there), *(() if start else builtin_recipes())], incomplete)
        if found:
            return found
    return [CompletionItem(incomplete, type="file")]


def templates(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    from orchestrator.shipped import builtin_recipes

    return _of(["list", *builtin_recipes()], incomplete)


def cards(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    from orchestrator.gpus import GPUS

    return _of(GPUS, incomplete)


def guards(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    from orchestrator.drill_guards import GUARDS

    return _of(["list", *GUARDS], incomplete)


def _of(names: Iterable[str], incomplete: str) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(incomplete) and PLAIN.fullmatch(name)]


def _run_ids() -> list[str]:
    """Of the ledger, read only: a press of the tab key makes no ledger and waits for none."""
    from orchestrator.config import Home

    path = Home.from_env().ledger
    if not path.is_file():
        return []
    with (
        suppress(sqlite3.Error, OSError),
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0.2)) as db,
    ):
        rows = db.execute("SELECT id FROM run ORDER BY created_at DESC, rowid DESC LIMIT ?", (SHOWN_RUNS,))
        return [str(row[0]) for row in rows]
    return []
