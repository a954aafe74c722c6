"""What a person meets: help, JSON, exit codes, and for all that can be wrong one clear sentence with a next step."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import pytest
from click.testing import CliRunner

from orchestrator import __version__, cli
from orchestrator.cli import SECTIONS, kdcloud
from tests.whole_runs import ROOT, Home, make_home

GOOD = """
name: tiny
budget: 1 CNY
infra: local
local: {price: 0.10 USD/h}
stages:
  - {name: only, kind: rehearse, steps: 5, seconds_per_step: 0.01}
"""


@pytest.fixture
def home(tmp_path) -> Home:
    return make_home(tmp_path, GOOD)


def refused(home: Home, rc: int, *words: str) -> str:
    done = home.call(*words)
    assert done.returncode == rc, done.stderr
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr
    assert "  -> " in done.stderr  # what to do
    return done.stderr


def walked(group: click.Group = kdcloud, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command by its words, those of groups too."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        found[*before, name] = command
        if isinstance(command, click.Group):
            found |= walked(command, (*before, name))
    return found


def examples_of(command: click.Command) -> list[str]:
    return [line.strip() for line in (command.epilog or "").splitlines() if "kdcloud " in line]


def test_every_command_stands_in_a_section():
    assert sorted(kdcloud.commands) == sorted(name for names in SECTIONS.values() for name in names)
    assert len(kdcloud.commands) >= 8


@pytest.mark.parametrize("words", walked(), ids=" ".join)
def test_the_help_of_a_command_ends_with_examples_of_it_whose_options_exist(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("labels.jsonl").touch()
    command = walked()[words]
    shown = CliRunner().invoke(kdcloud, [*words, "--help"], prog_name="kdcloud").stdout
    examples = examples_of(command)
    assert 1 <= len(examples) <= 3
    assert [line.strip() for line in shown.splitlines()[-len(examples) :]] == examples
    for example in examples:
        said = re.search(r"kdcloud [^|<>)]*", example)
        typed = shlex.split(said[0])[1:]
        size = max(size for size in (1, 2) if tuple(typed[:size]) in walked())
        named, rest = walked()[tuple(typed[:size])], typed[size:]
        assert tuple(typed[: len(words)]) == words
        options = {name for param in named.params if isinstance(param, click.Option) for name in param.opts}
        assert {word for word in rest if word.startswith("-")} <= options
        named.make_context(" ".join(words), list(rest))  # it parses: what an option needs, and enough arguments


def test_the_list_of_commands_takes_a_line_each_on_80_columns():
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(kdcloud, ["--help"], prog_name="kdcloud", terminal_width=80).stdout
    for name in kdcloud.commands:
        (line,) = re.findall(rf"^  {name} .*$", shown, re.M)
        assert len(line) <= 80 and kdcloud.commands[name].get_short_help_str(200) in line


def test_the_version_is_told():
    assert f"kdcloud, version {__version__}" in CliRunner().invoke(kdcloud, ["--version"], prog_name="kdcloud").stdout


def test_every_command_stands_in_the_readme_and_every_command_there_exists():
    readme = (ROOT / "README.md").read_text()
    table = set(re.findall(r"^\| `kdcloud ([a-z-]+)", readme, re.M))
    assert table == set(kdcloud.commands)
    named = set(re.findall(r"`?kdcloud ([a-z]+(?:-[a-z]+)*)\b", readme)) & {
        "plan",
        "run",
        "reap",
        "offers",
        "doctor",
        "drill",
    }
    assert named <= set(kdcloud.commands)


def test_options_in_the_readme_exist():
    readme = "\n".join(line for line in (ROOT / "README.md").read_text().splitlines() if "pipx " not in line)
    known = [kdcloud, *kdcloud.commands.values()]
    options = {option for command in known for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<![-|])--[a-z][a-z-]*", readme)) <= options


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake ([a-z]+)\b(?=`| {2,}|\n)", (ROOT / "README.md").read_text())
    assert len(targets) >= 2
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: [", "line"),
        ("", "empty"),
        (GOOD.replace("budget", "bugdet"), "budget"),
        (GOOD.replace("1 CNY", "0 CNY"), "above 0"),
        (GOOD.replace("1 CNY", "-3 CNY"), "above 0"),
        (GOOD.replace("1 CNY", "3 EUR"), "EUR"),
        (GOOD.replace("kind: rehearse", "kind: rehearze"), "rehearse"),
        (GOOD.replace("infra: local", "infra: lokal"), "lokal"),
        (GOOD + "  - {name: t, kind: train, student: Qwen/Qwen9-1B, labels: nothing}\n", "nothing"),
    ],
)
def test_a_wrong_recipe_is_refused_with_2_and_names_what_is_wrong(home, text, says):
    home.recipe.write_text(text)
    assert says in refused(home, 2, "plan", "recipe.yaml")


def test_a_missing_recipe_names_the_built_in_ones(home):
    assert "quickstart" in refused(home, 2, "run", "nosuch.yaml", "--yes")
    assert "`kdcloud init` writes one" in refused(home, 2, "plan", "elsewhere/recipe.yaml")


@pytest.mark.parametrize(("budget", "rc"), [("0CNY", 2), ("-1USD", 2), ("7EUR", 2), ("lots", 2), ("0.0001USD", 3)])
def test_a_wrong_budget_starts_nothing(home, budget, rc):
    refused(home, rc, "run", "recipe.yaml", "--yes", f"--budget={budget}")
    assert home.json("status")["runs"] == []
    assert not (home.folder / "home" / "bucket").exists()


def test_without_a_terminal_it_does_not_start_unasked(home):
    assert "--yes" in refused(home, 2, "run", "recipe.yaml")
    assert home.json("status")["runs"] == []


def test_a_bucket_that_cannot_be_written_is_refused_before_anything_starts(home):
    (home.folder / "a-file").write_text("")
    home.recipe.write_text(GOOD + "bucket: file:a-file/kd\n")
    refused(home, 2, "run", "recipe.yaml", "--yes")
    assert home.json("status")["runs"] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(home):
    (home.folder / "home").mkdir()
    os.symlink("/dev/full", home.folder / "home" / "ledger.sqlite")
    refused(home, 2, "run", "recipe.yaml", "--yes")


def test_a_corrupt_ledger_is_told_and_left_as_it_is(home):
    (home.folder / "home").mkdir()
    ledger = home.folder / "home" / "ledger.sqlite"
    ledger.write_bytes(b"not a database" * 100)
    for words in (["status"], ["report"], ["run", "recipe.yaml", "--yes"]):
        assert "ledger" in refused(home, 2, *words)
    assert ledger.read_bytes() == b"not a database" * 100


def test_nothing_has_run_yet(home):
    assert "quickstart" in refused(home, 2, "report")
    assert "--html" in refused(home, 2, "report", "--open")
    assert home.json("status") == {"schema": 1, "runs": []}
    assert "nothing has run yet" in home.call("status").stdout


@pytest.mark.slow
def test_a_run_from_plan_to_report(home):
    plan = home.json("plan", "recipe.yaml")
    assert plan["schema"] == 1
    assert plan["fits"]
    assert set(plan["stages"][0]) >= {
        "name",
        "kind",
        "vram_gib",
        "vram_breakdown_gib",
        "hours",
        "offer",
        "cost_micros",
        "settings",
        "rejected",
    }
    done = home.call("run", "recipe.yaml", "--yes")
    assert done.returncode == 0, done.stderr
    assert "nothing is running" in done.stdout
    report = home.check_over()
    assert f"kdcloud report {report['run'][-6:]} --html" in done.stderr  # what may be next
    assert "nothing of it was running" in home.call("down", "last").stderr
    assert set(report) >= {
        "schema",
        "run",
        "recipe",
        "state",
        "cap_micros",
        "spend_micros",
        "live",
        "stages",
        "quality",
        "artifacts",
    }
    assert report["state"] == "done"
    (stage,) = report["stages"]
    assert set(stage) >= {"name", "kind", "state", "offer", "predicted", "actual"}
    assert stage["actual"]["hours"] > 0
    assert stage["actual"]["peak_gib"] > 0
    assert report["artifacts"]
    made = home.call("report", "--html", "page.html", "--json")
    assert json.loads(made.stdout) == report and "page.html" in made.stderr, made.stderr
    assert report["run"] in (home.folder / "page.html").read_text()
    assert "alone" in refused(home, 2, "compare", "last", report["run"])
    assert "cannot write" in refused(home, 2, "report", "--html", "no/such/folder/page.html")
    assert home.call("run", "--resume", "last").returncode == 0  # done already: nothing to do
    assert "rehears" in home.call("logs").stdout or home.call("logs").stdout


@pytest.mark.slow
def test_a_planned_run_leaves_no_secret_of_the_environment_in_home_or_bucket(home, monkeypatch):
    secret = "hf_planted0123456789"
    monkeypatch.setenv("HF_TOKEN", secret)
    assert home.call("run", "recipe.yaml", "--yes").returncode == 0
    files = [f for f in (home.folder / "home").rglob("*") if f.is_file()]
    assert len(files) > 8
    for file in files:
        assert secret.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_run_whose_result_was_noted_stays_done_when_the_store_loses_it(home):
    started = home.start("run", "recipe.yaml", "--yes")
    started.wait(timeout=60)
    run = home.bucket
    (run / "only" / "COMMIT").unlink()  # the store lost the result after it was noted: a resume finds it done
    assert home.call("run", "--resume", "last").returncode == 0


def test_the_schema_accepts_every_shipped_recipe_and_refuses_an_unknown_key(home):
    import yaml

    schema = home.call("recipe-schema")
    assert schema.returncode == 0
    validator = jsonschema.Draft202012Validator(json.loads(schema.stdout))
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        validator.validate(yaml.safe_load(recipe.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**yaml.safe_load(GOOD), "bugdet": "1 CNY"})


@pytest.mark.slow
def test_json_goes_to_stdout_alone_and_talk_to_stderr(home):
    done = home.call("run", "recipe.yaml", "--yes")
    assert "only" in done.stderr
    assert json.loads(home.call("report", "--json").stdout)["schema"] == 1


def test_ctrl_c_says_that_nothing_was_started_only_where_it_was_asked_for(monkeypatch, capsys):
    """In `attach`, `down` or `reap` things run, whoever interrupts them."""

    def interrupted(*args: object, **named: object) -> None:
        raise click.Abort

    monkeypatch.setattr(cli.click, "confirm", interrupted)
    monkeypatch.setattr(cli.sys.stdin, "isatty", lambda: True, raising=False)
    for call, says in ((lambda: cli._ask("Run it?"), "nothing was started"), (cli.main, "stopped")):
        monkeypatch.setattr(kdcloud, "main", interrupted)
        with pytest.raises(SystemExit) as left:
            call()
        assert left.value.code == 130 and capsys.readouterr().err.strip() == says


def test_a_bug_keeps_its_traceback(home):
    (home.folder / "sitecustomize.py").write_text(
        "import orchestrator.session as s\ndef boom(*a, **k): raise RuntimeError('a bug')\ns.newest = boom\n"
    )
    done = subprocess.run(
        home.command("report"),
        cwd=home.folder,
        env={**home.env, "PYTHONPATH": f"{home.folder}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_no_colour_codes_when_not_on_a_terminal(home):
    done = home.call("plan", "recipe.yaml")
    assert "\x1b[" not in done.stdout + done.stderr


def test_the_bare_install_needs_no_torch_and_no_sky():
    code = (
        "import sys, orchestrator.cli, orchestrator.session, orchestrator.report, orchestrator.planner\n"
        "bad = {'torch', 'sky', 'boto3', 'transformers', 'numpy'} & set(sys.modules)\nassert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert shutil.which("sh")


def test_a_plan_with_other_looks_is_the_same_plan_with_more_keys(home):
    plain = json.loads(home.call("plan", "recipe.yaml", "--json").stdout)
    words = ("--frontier", "--explain", "only", "--what-if", "spot=yes", "--what-if", "spot=no")
    more = json.loads(home.call("plan", "recipe.yaml", "--json", *words).stdout)
    assert set(more) - set(plain) == {"frontier", "explain", "what_if"}
    same = set(plain) - {"made_at", "stages"}  # this machine's price is as old as the plan
    assert {key: more[key] for key in same} == {key: plain[key] for key in same}
    assert list(more["stages"][0]) == list(plain["stages"][0])
    assert [one["machines"]["only"]["infra"] for one in more["frontier"]] == ["local"]
    assert [one["taken"] for one in more["explain"]["only"]] == [True]
    assert [one["what_if"] for one in more["what_if"]] == ["spot=yes", "spot=no"]
    shown = home.call("plan", "recipe.yaml", *words).stdout
    assert "what if" in shown and "cost against time" in shown and "taken" in shown


def test_looks_at_what_is_not_there_are_refused(home):
    assert "no stage 'train'" in refused(home, 2, "plan", "recipe.yaml", "--explain", "train")
    assert "is not a change" in refused(home, 2, "plan", "recipe.yaml", "--what-if", "RTX3090")
