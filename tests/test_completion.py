"""The tab key: names of commands, recipes and runs, quickly, and none that a shell would take for more than a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from orchestrator import completion
from orchestrator.cli import kdcloud
from orchestrator.errors import UsageError
from orchestrator.ledger import Ledger
from orchestrator.runner import mark_to_dict
from orchestrator.shipped import builtin_recipes
from orchestrator.testing import START, VirtualClock

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("pydantic", "rich", "torch", "sky", "boto3", "jinja2", "orchestrator.recipe", "orchestrator.session")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def with_runs(home: Path, *ids: str) -> None:
    home.mkdir()
    ledger = Ledger(home / "ledger.sqlite")
    mark = mark_to_dict(VirtualClock().mark())
    for run_id in ids:
        ledger.create_run(
            run_id, name="r", bucket="file:/nowhere", cap_micros=1, deadline_s=None, mark=mark, at=START,
            data={"schema": 1},
        )  # fmt: skip
    ledger.close()


def pressed(*words: str) -> list[str]:
    """What the tab key offers behind these words, the last one being typed."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "orchestrator.cli"],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "_KDCLOUD_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["kdcloud", *words]), "COMP_CWORD": str(len(words)),
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "click" in loaded and not loaded & set(HEAVY)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_recipes_and_runs_are_completed_without_loading_what_reads_them(home: Path) -> None:
    with_runs(home, "small-abc123", "small-xyz789")
    Path("mine.yaml").write_text("")
    assert pressed("re") == ["reap", "recipe-schema", "report"]
    assert pressed("plan", "") == ["mine.yaml", *builtin_recipes()]
    assert pressed("report", "sm") == ["small-xyz789", "small-abc123"]


def offered(value: list[click.shell_completion.CompletionItem[str]]) -> list[str]:
    return [item.value for item in value]


def ask(source: object, incomplete: str = "") -> list[str]:
    context = click.Context(kdcloud)
    return offered(source(context, context.command.params[0], incomplete))  # type: ignore[operator]


def test_a_run_is_offered_by_its_id_or_by_the_end_of_it_and_last_always(home: Path) -> None:
    assert ask(completion.runs) == ["last"] and not home.exists()  # no ledger is made
    with_runs(home, "small-abc123", "odd $(id)-zzz999")
    assert ask(completion.runs) == ["last", "small-abc123"]
    assert ask(completion.runs, "abc") == ["abc123"]
    assert ask(completion.runs, "nosuch") == []
    (home / "ledger.sqlite").write_bytes(b"not a database" * 100)
    assert ask(completion.runs) == ["last"]


def test_recipes_of_a_folder_are_offered_and_a_name_that_a_shell_would_read_is_not(home: Path) -> None:
    folder = Path("recipes")
    folder.mkdir()
    for name in ("one.yaml", "two.yml", "notes.txt", "a b.yaml", "$(id).yaml"):
        (folder / name).write_text("")
    assert ask(completion.recipes, "recipes/") == ["recipes/one.yaml", "recipes/two.yml"]
    assert ask(completion.recipes, "recipes/o") == ["recipes/one.yaml"]
    (fallback,) = completion.recipes(click.Context(kdcloud), kdcloud.params[0], "nosuch/")
    assert fallback.type == "file"  # the shell completes files itself
    assert ask(completion.templates, "qu") == ["quickstart"]
    assert ask(completion.cards, "RTX") == ["RTX3090", "RTX4090"]
    assert "latencies" in ask(completion.guards)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_gets_its_script_and_it_asks_kdcloud(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    named, own = (CliRunner().invoke(kdcloud, ["completion", *words]).stdout for words in ([shell], []))
    assert named == own and f"_KDCLOUD_COMPLETE={shell}_complete" in named


def test_a_shell_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    done = CliRunner().invoke(kdcloud, ["completion"])
    assert isinstance(done.exception, UsageError) and "tcsh" in done.exception.message


def test_bash_takes_what_is_offered(home: Path) -> None:
    """Bash itself: the script is evaluated, and its function fills COMPREPLY."""
    with_runs(home, "small-abc123")
    program = home / "bin" / "kdcloud"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m orchestrator.cli "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(kdcloud completion bash)"\n'
        'COMP_WORDS=(kdcloud report sma); COMP_CWORD=2; _kdcloud_completion kdcloud; echo "${COMPREPLY[@]}"\n'
    )
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "small-abc123"
