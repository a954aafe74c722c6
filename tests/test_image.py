"""Does an image made by the Dockerfile have what a rented machine looks for? Read from its text, and tried with a uv
that installs nothing: no Docker is needed."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import shlex
import time
from pathlib import Path
from types import ModuleType

import pytest

from orchestrator import handover
from tasks import bootstrap
from tasks.bootstrap import Seen, Wanted

ROOT = Path(__file__).parents[1]
WORDS = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def instructions(name: str) -> list[list[str]]:
    """The words of every such instruction of the Dockerfile."""
    return [shlex.split(line)[1:] for line in WORDS.splitlines() if line.startswith(f"{name} ")]


def test_every_base_is_one_exact_image_or_a_stage_of_this_file() -> None:
    stages = [words[2] for words in instructions("FROM")]
    assert stages == ["machine", "label", "train", "both"]
    (base,) = {words[0] for words in instructions("FROM")} - set(stages)
    assert re.fullmatch(r"nvidia/cuda:[0-9.]+-base-ubuntu[0-9.]+@sha256:[0-9a-f]{64}", base)


def test_the_base_is_for_the_cuda_and_the_python_of_the_locks() -> None:
    (base,) = {words[0] for words in instructions("FROM") if ":" in words[0]}
    cuda, ubuntu = re.findall(r":([0-9]+)\.[0-9.]+-base-ubuntu([0-9.]+)@", base)[0]
    for name in handover.LOCKED:
        assert f"\nnvidia-cudnn-cu{cuda}==" in (ROOT / "requirements" / f"{name}.txt").read_text()
    python = {"22.04": (3, 10), "24.04": (3, 12)}[ubuntu]
    assert bootstrap.OLDEST <= python <= bootstrap.NEWEST


def test_what_is_copied_is_there_and_is_all_that_the_builder_is_sent() -> None:
    sources = {source for *some, _ in instructions("COPY") for source in some}
    assert len(sources) == 5 and all((ROOT / source).is_file() for source in sources)
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*" and {line.removeprefix("!") for line in lines[1:]} == sources
    assert all(line.startswith("!") for line in lines[1:]) and not any(fnmatch.filter(sources, "*.env"))


def test_each_stage_lays_the_environments_of_its_name() -> None:
    runs = [line for line in WORDS.splitlines() if "lay_environments.py" in line and line.startswith("RUN")]
    laid = [line.split()[-1] for line in runs]
    assert laid == ["label", "train", "label"]
    assert set(laid) == {name for name in handover.LOCKED if not name.endswith("-box")}  # a box has its own, fetched


def test_what_compiles_on_the_way_is_installed_and_no_secret_is_passed() -> None:
    (packages,) = re.findall(r"--no-install-recommends(.*?)&&", WORDS)
    assert {"gcc", "libc6-dev", "python3-dev", "python3-pip"} <= set(packages.split())
    assert {"rsync", "curl", "wget", "patch", "openssh-server", "fuse"} <= set(packages.split())  # SkyPilot's own list
    assert not instructions("ARG")
    assert not re.search(r"KEY|TOKEN|SECRET|PASSW", " ".join(word for env in instructions("ENV") for word in env))


@pytest.fixture
def lay(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/lay_environments.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("lay_environments")


def stand_in(folder: Path) -> None:
    """A uv that makes an environment whose Python has every module, and writes down what it is asked."""
    folder.mkdir()
    text = f"""#!/bin/sh
echo "$@" >> {folder}/asked
[ "$1" = venv ] || exit 0
for last; do :; done
mkdir -p "$last/bin" && printf '#!/bin/sh\\nexit 0\\n' > "$last/bin/python" && chmod 755 "$last/bin/python"
"""
    (folder / "uv").write_text(text)
    (folder / "uv").chmod(0o755)


@pytest.mark.parametrize("name", handover.LOCKED)
def test_a_machine_takes_the_environment_that_its_image_brings(
    name: str, lay: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**12}))
    python = lay.lay(name, tmp_path / "own")
    asked = (tmp_path / "bin" / "asked").read_text()
    assert "pip sync --quiet --require-hashes --no-build" in asked

    code = tmp_path / "code.whl"
    code.write_bytes(handover.code_wheel()[0])  # what a run sends
    monkeypatch.setattr(bootstrap, "look", lambda: Seen(580, (8, 6)))
    wanted = Wanted({"in_no_python_of_this_machine": "x"}, [], [name], bootstrap.locks_in(code), gpu=True)
    env: dict[str, str] = {"PATH": "/usr/bin"}
    assert bootstrap.make_ready(tmp_path / "own", wanted, env, time.monotonic() + 60) == python
    assert json.loads(env[bootstrap.SETUP])["environment"] == name
    assert (tmp_path / "bin" / "asked").read_text() == asked, "it was installed again"
