"""What must never happen: a secret where it can be read, text that becomes a command, bytes that are not checked."""

from __future__ import annotations

import ast
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import access
from orchestrator.config import Config
from orchestrator.errors import UsageError
from orchestrator.handover import api_env, hub_env
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_to_dict, plan_to_json
from orchestrator.planner import make_plan
from orchestrator.provision_sky import Note, job_task, launch_task
from orchestrator.recipe import parse_recipe
from orchestrator.testing import START, fake_offer
from tasks.contract import ModelSource, RehearseSettings
from tests.recipes import API, recipe
from tests.test_access import allows, endpoint  # noqa: F401 - a store with a token service, on loopback
from tests.test_provision_sky import NAME, ORDER
from tests.whole_runs import ROOT, Home, make_home

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-0001",
    "HF_TOKEN": "hf_planted_token_0002",
    "RUNPOD_API_KEY": "planted-runpod-key-0003",
}
NASTY = 'it\'s "a" `touch hacked`; touch hacked & $(touch hacked)'
RENTED = "budget: 1 CNY\ninfra: azure\nstages:\n  - {name: only, kind: rehearse, steps: 30, seconds_per_step: 0.1}\n"


# -- a whole run on a rented machine, watched from outside


class Watcher:
    """Reads command lines, machine folders and environments while a run goes on."""

    def __init__(self, home: Home) -> None:
        self.home, self.lines, self.notes = home, set[str](), set[str]()
        self.node: dict[str, str] = {}  # environment of the supervisor
        self.files: set[str] = set()  # on the machine

    def look(self) -> None:
        for process in psutil.process_iter():
            try:
                self.lines.add("\0".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue
        for process in self.home.machine_processes():
            try:
                words = process.cmdline()
                if words[1:3] == ["-m", "tasks.supervisor"]:
                    self.node = process.environ() or self.node
            except (psutil.Error, OSError):
                continue
        with suppress(OSError):  # a folder may go away while it is read
            for path in (self.home.folder / "home" / "machines").rglob("*"):
                self.files.add(path.name)
                self.notes.add(path.read_text(errors="replace") if path.is_file() else "")


@pytest.fixture(scope="module")
def seen(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watcher, str, dict[str, bytes]]]:  # noqa: F811
    """(what was seen, all that the client printed, every object in the store) of one whole run."""
    import boto3

    folder = tmp_path_factory.mktemp("rented")
    name = "kd-security"
    own = {"aws_access_key_id": "AKIDPLANTED", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    store = boto3.client("s3", endpoint_url=endpoint, **own)
    store.create_bucket(Bucket=name)
    place = NASTY.split(" & ")[0]  # no $: a policy would take that for a variable of its own
    home = make_home(folder, f"name: rented\nbucket: {ascii_yaml(f's3://{name}/{place}')}\n{RENTED}")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            **PLANTED, "AWS_ACCESS_KEY_ID": "AKIDPLANTED", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint, "KDCLOUD_PROVIDER": "tests.providers:rented", "HF_HUB_OFFLINE": "1",
        }.items():  # fmt: skip
            patch.setenv(key, value)
        watcher = Watcher(home)
        client = home.start("run", str(home.recipe), "--yes")
        limit = time.monotonic() + 120
        while client.poll() is None and time.monotonic() < limit:
            watcher.look()
            time.sleep(0.05)
        printed = (folder / "client.log").read_text()
        assert client.wait(10) == 0, printed
        for words in (("report",), ("report", "--json"), ("status", "--json"), ("logs",)):
            done = home.call(*words)
            printed += done.stdout + done.stderr
        objects = {
            item["Key"]: store.get_object(Bucket=name, Key=item["Key"])["Body"].read()
            for item in store.list_objects_v2(Bucket=name)["Contents"]
        }
        yield watcher, printed, objects


def ascii_yaml(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def secrets_of(watcher: Watcher) -> list[str]:
    issued = [watcher.node["AWS_SECRET_ACCESS_KEY"], watcher.node["AWS_SESSION_TOKEN"]]
    assert all(len(secret) > 15 for secret in issued)
    return [*PLANTED.values(), *issued, "X-Amz-Signature"]


@pytest.mark.slow
def test_a_run_on_a_rented_machine_ends_well_with_its_own_code_and_keys(seen: Any) -> None:
    watcher, printed, objects = seen
    run = next(iter(objects)).split("/")[1]
    assert any(key.endswith("/only/COMMIT") for key in objects)
    assert f"s3://kd-security/{NASTY.split(' & ')[0]}/{run}" in printed
    assert watcher.node["PYTHONPATH"].endswith(".whl")


@pytest.mark.slow
def test_no_secret_is_in_a_command_line_a_note_the_ledger_a_log_or_the_bucket(seen: Any) -> None:
    watcher, printed, objects = seen
    secrets = secrets_of(watcher)
    assert any("tasks.supervisor" in line for line in watcher.lines)
    kept = [path for path in (watcher.home.folder / "home").rglob("*") if path.is_file()]
    assert {"ledger.sqlite", "config.yaml"} <= {path.name for path in kept}
    assert any(key.endswith("/log.txt") for key in objects)
    places = {
        "argv": "\n".join(watcher.lines).encode(),
        "notes": "\n".join(watcher.notes).encode(),
        "printed": printed.encode(),
        **{str(path): path.read_bytes() for path in kept},
        **objects,
    }
    found = [(place, secret) for place, text in places.items() for secret in secrets if secret.encode() in text]
    assert found == []


@pytest.mark.slow
def test_the_machine_has_no_key_of_any_account_in_its_environment_or_files(seen: Any) -> None:
    watcher, _, _ = seen
    env = "\n".join(f"{key}={value}" for key, value in watcher.node.items())
    assert not any(secret in env for secret in [*PLANTED.values(), "AKIDPLANTED"])
    assert {"AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"} <= set(watcher.node)
    assert "KDCLOUD_CODE_URL" not in watcher.node  # a stage has no use for it
    assert watcher.files and not watcher.files & {
        "credentials",
        "config",
        "config.toml",
        "lambda_keys",
        ".aws",
        "token",
    }


@pytest.mark.slow
def test_what_a_recipe_names_never_became_a_command(seen: Any) -> None:
    watcher, _, _ = seen
    assert "hacked" not in watcher.files
    assert not list(watcher.home.folder.rglob("hacked")) and not (ROOT / "hacked").exists()


@pytest.mark.slow
def test_quotes_and_commands_in_a_recipe_do_nothing_on_this_machine(tmp_path: Path) -> None:
    folder = f"runs {NASTY}\nx"
    text = f"name: nasty\nbucket: {dump(f'file:{folder}')}\nlocal: {{price: 0.10 USD/h}}\n"
    home = make_home(tmp_path, text + RENTED.replace("azure", "local").replace("steps: 30", "steps: 2"))
    done = home.call("run", str(home.recipe), "--yes")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / folder).is_dir() and list((tmp_path / folder).rglob("COMMIT"))
    assert not list(tmp_path.rglob("hacked"))


def dump(text: str) -> str:
    import json

    return json.dumps(text)


@pytest.mark.parametrize("place", ["name: rented", "name: only", "infra: azure"], ids=["name", "stage", "infra"])
@pytest.mark.parametrize("value", ["a$(id)", "a'b", 'a"b', "a;b", "a b", "a\nb", "../a", "-rf"])
def test_what_becomes_part_of_a_machines_name_or_place_holds_no_such_thing(place: str, value: str) -> None:
    text = f"name: rented\n{RENTED}"
    assert parse_recipe(text, ROOT / "recipe.yaml") and place in text
    with pytest.raises(UsageError):
        parse_recipe(text.replace(place, f"{place.split(':')[0]}: {dump(value)}"), ROOT / "recipe.yaml")


def test_tasks_for_skypilot_keep_secrets_in_its_secrets_and_values_in_quotes() -> None:
    secrets = {"HF_TOKEN": "hush", "AWS_SESSION_TOKEN": "hush", "PYTHONPATH": "/x/ab.whl"}
    task = job_task(Note(NAME), "only-1", ["python", "--bucket", f"s3://kd/{NASTY}"], secrets)
    assert task["secrets"] == {"HF_TOKEN": "hush", "AWS_SESSION_TOKEN": "hush"}
    assert "hush" not in str({key: value for key, value in task.items() if key != "secrets"})
    launched = launch_task(ORDER)
    assert not {"secrets", "envs", "file_mounts", "workdir", "setup"} & set(launched)


def test_a_token_of_the_hub_goes_to_stages_that_fetch_from_it_only() -> None:
    from types import SimpleNamespace

    env = {"HF_TOKEN": "hush", "HF_ENDPOINT": "https://mirror", "OTHER": "x"}
    fetching = SimpleNamespace(teacher=ModelSource(path="owner/name"))
    assert hub_env(fetching, env) == {"HF_TOKEN": "hush", "HF_ENDPOINT": "https://mirror"}
    for source in (ModelSource(stage="train"), ModelSource(path="/models/x")):
        assert hub_env(SimpleNamespace(teacher=source), env) == {}
    assert hub_env(RehearseSettings(steps=1, seconds_per_step=1.0), env) == {}


def test_the_key_of_an_api_goes_to_the_stage_that_asks_it_only_and_must_be_there_before_anything_starts() -> None:
    made = make_plan(
        recipe(API), config=Config(owner="abc123", bucket="file:/home/b"), now=START,
        offers_for=lambda need: [fake_offer(100_000, gpu=None, infra="local", vram_gib=64.0)],
    )  # fmt: skip
    env = {"EXAMPLE_API_KEY": "planted-key", "OTHER_API_KEY": "x"}
    label, train, evaluate = made.stages
    assert api_env(label.settings, env) == {"EXAMPLE_API_KEY": "planted-key"}
    assert api_env(train.settings, env) == api_env(evaluate.settings, env) == {}
    access.check(made, allow_account_key=False, env=env)
    for missing in ({}, {"EXAMPLE_API_KEY": " "}):
        with pytest.raises(UsageError, match="EXAMPLE_API_KEY, which is not set"):
            access.check(made, allow_account_key=False, env=missing)
    assert "planted-key" not in json.dumps(plan_to_dict(made)) + json.dumps(plan_to_json(made))


# -- what lies at home


def test_ledger_and_home_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Ledger(tmp_path / "home" / "ledger.sqlite").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home" / "ledger.sqlite").stat().st_mode) == 0o600


# -- code that could be made to run or to write what others sent


FORBIDDEN = {
    "extractall": "archive members could leave their folder",
    "unpack_archive": "archive members could leave their folder",
    "system": "a shell",
    "popen": "a shell",
    "getoutput": "a shell",
    "getstatusoutput": "a shell",
    "eval": "text would run",
    "exec": "text would run",
    "mktemp": "a name that others can take first",
}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "tarfile"}


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        shell = named.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            yield "shell=True"
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in FORBIDDEN and not (is_method and name in ("eval", "exec") and owner not in ("", "builtins")):
            yield f"{owner}.{name}".strip(".")
        if name == "load" and owner == "torch":
            safe = named.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield "torch.load"
        if name in ("load", "load_all", "unsafe_load", "full_load") and owner == "yaml":
            yield f"yaml.{name}"
        if name == "from_pretrained" and "AutoModel" in owner:
            safe = named.get("use_safetensors")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield "from_pretrained without use_safetensors"


@pytest.mark.parametrize(
    "line",
    ["zipfile.ZipFile(x).extractall(y)", "shutil.unpack_archive(x)", "import pickle", "from pickle import loads",
     "torch.load(x)", "torch.load(x, weights_only=False)", "subprocess.run(x, shell=True)",
     "subprocess.run(x, shell=y)", "os.system(x)", "os.popen(x)", "eval(x)", "exec(x)", "yaml.load(x)",
     "AutoModelForCausalLM.from_pretrained(x)"],
)  # fmt: skip
def test_the_reader_of_the_code_sees_each_offence(line: str) -> None:
    assert list(offences(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["torch.load(x, weights_only=True)", "model.eval()", "self._api.exec(x)", "yaml.safe_load(x)"]
)
def test_the_reader_of_the_code_lets_the_rest_be(line: str) -> None:
    assert list(offences(ast.parse(line))) == []


def test_nothing_unpacks_archives_loads_pickles_or_gives_text_to_a_shell() -> None:
    """Nothing that arrives is unpacked: code is imported from its zip, folders travel file by file, with hashes."""
    files = [*sorted((ROOT / "orchestrator").rglob("*.py")), *sorted((ROOT / "tasks").rglob("*.py"))]
    assert len(files) >= 50
    assert {path.name: found for path in files if (found := list(offences(ast.parse(path.read_text()))))} == {}
