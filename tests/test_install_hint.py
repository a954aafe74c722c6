"""Where a package is missing: is what is to be typed right for how kdcloud was installed?"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tasks.contract import Installation, install_hint, installation

ROOT = Path(__file__).parents[1]
REQUIRES = (
    "click>=8.1",
    "boto3>=1.36; extra == 's3'",
    "skypilot[slurm]==0.14.*; extra == 'sky'",
    "boto3>=1.36; extra == 'sky'",
    'kdcloud-skyline>=1; extra == "skyline"',
)
VENV = Installation("/v/bin/python", requires=REQUIRES)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (VENV, "/v/bin/python -m pip install 'skypilot[slurm]==0.14.*' 'boto3>=1.36'"),
        (
            Installation("/v/bin/python", has_pip=False, requires=REQUIRES),  # `uv tool`, `uv venv`
            "uv pip install --python /v/bin/python 'skypilot[slurm]==0.14.*' 'boto3>=1.36'",
        ),
        (
            Installation("/p/kd-new/bin/python", has_pip=False, pipx="kd-new", requires=REQUIRES),
            "pipx inject --force --include-apps kd-new 'skypilot[slurm]==0.14.*' && "
            "pipx inject --force kd-new 'boto3>=1.36'",
        ),
        (
            Installation("/c d/.venv/bin/python", clone="/c d", requires=REQUIRES),
            "'/c d/.venv/bin/python' -m pip install -e '/c d[sky]'",
        ),
        (
            Installation("/c/.venv/bin/python", has_pip=False, clone="/c", requires=REQUIRES),
            "uv pip install --python /c/.venv/bin/python -e '/c[sky]'",
        ),
        (
            Installation("/p/kd/bin/python", pipx="kd", clone="/c", requires=REQUIRES),  # pipx install -e
            "pipx inject --force --include-apps kd 'skypilot[slurm]==0.14.*' && "
            "pipx inject --force kd 'boto3>=1.36'",
        ),
        (
            Installation("/v/bin/python", requires=None),  # a rented machine: code without metadata
            "install what kdcloud's extra [sky] names into the environment of /v/bin/python",
        ),
    ],
)
def test_an_extra_is_named_as_this_installation_takes_it(how: Installation, words: str) -> None:
    assert install_hint("sky", how=how) == words


def test_further_packages_go_into_the_same_environment() -> None:
    assert install_hint("s3", "skypilot[aws]==0.14.*", how=VENV).endswith(
        "install 'boto3>=1.36' 'skypilot[aws]==0.14.*'"
    )
    assert install_hint("sky", "skypilot[aws,slurm]==0.14.*", how=VENV).endswith(
        "install 'skypilot[slurm,aws]==0.14.*' 'boto3>=1.36'"
    )
    clone = Installation("/c/bin/python", clone="/c", requires=REQUIRES)
    assert install_hint("s3", "x>=1", how=clone) == "/c/bin/python -m pip install -e '/c[s3]' 'x>=1'"
    assert install_hint("", "x>=1", how=clone) == "/c/bin/python -m pip install 'x>=1'"
    assert install_hint("", "x>=1", how=Installation("/v/python")) == "/v/python -m pip install 'x>=1'"


def test_kdcloud_itself_is_never_taken_from_an_index_by_its_name() -> None:
    for how in (VENV, Installation("/p/env/bin/python", pipx="env", requires=REQUIRES)):
        assert "kdcloud" not in install_hint("sky", how=how)


class Metadata:
    """What importlib.metadata gives of an installed distribution."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self.origin, self.requires = origin, list(REQUIRES)

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.mark.parametrize(
    ("origin", "files", "found"),
    [
        (None, (), (None, None)),  # from an index
        ({"url": "file:///d/kdcloud.whl", "archive_info": {}}, (), (None, None)),
        ({"url": "file:///my%20clone", "dir_info": {"editable": True}}, (), (None, "/my clone")),
        ({"url": "file:///clone", "dir_info": {}}, (), (None, None)),  # copied: the folder is no part of it
        ({"url": "file:///d/kdcloud.whl", "archive_info": {}}, ("pipx_metadata.json",), ("env", None)),
        ({"url": "file:///d/kdcloud.whl", "archive_info": {}}, ("uv-receipt.toml",), (None, None)),
    ],
)
def test_how_it_was_installed_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    origin: dict[str, Any] | None,
    files: tuple[str, ...],
    found: tuple[str | None, str | None],
) -> None:
    (tmp_path / "env").mkdir()
    for name in files:
        (tmp_path / "env" / name).write_text("")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Metadata(origin))
    how = installation()
    assert (how.pipx, how.clone) == found
    assert how.python == sys.executable and how.requires == REQUIRES


def test_code_without_metadata_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert installation().requires is None
    assert "[quantized]" in install_hint("quantized")


def test_every_extra_that_a_message_names_is_one_and_none_speaks_of_a_clone() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named: list[str] = []
    for path in [*(ROOT / "orchestrator").glob("*.py"), *(ROOT / "tasks").glob("*.py")]:
        text = path.read_text()
        assert "in a clone: pip" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "install_hint":
                named += [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and arg.value]
    assert len(named) >= 8 and set(named) <= extras
