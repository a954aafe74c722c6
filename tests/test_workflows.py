"""Do the workflows of GitHub run what `.ci/run` runs, with no more rights than they need and pinned actions?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import orchestrator

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))
each = pytest.mark.parametrize("name", NAMES)


def flow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((FOLDER / name).read_text())
    loaded["on"] = loaded.pop(True)  # YAML reads `on` as true; GitHub does not
    return loaded


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in flow(name)["jobs"].values() for step in job["steps"]]


def test_there_are_two() -> None:
    assert NAMES == ["ci.yml", "release.yml"]


@each
def test_every_action_is_one_exact_commit_with_its_version_beside_it(name: str) -> None:
    used = [step["uses"] for step in steps(name) if "uses" in step]
    lines = re.findall(r"uses: (\S+@[0-9a-f]{40}) # v\d+\.\d+\.\d+$", (FOLDER / name).read_text(), re.MULTILINE)
    assert len(used) >= 2 and lines == used


@each
def test_rights_are_those_to_read_unless_a_job_says_why(name: str) -> None:
    assert flow(name)["permissions"] == {"contents": "read"}
    for job in flow(name)["jobs"].values():
        more = job.get("permissions", {"contents": "read"})
        assert more == {"contents": "read"} or (name == "release.yml" and set(more) - {"contents"} == {
            "id-token", "attestations",
        })  # fmt: skip
        assert 0 < job["timeout-minutes"] <= 120
    checkouts = [step for step in steps(name) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)


@each
def test_what_a_visitor_writes_never_becomes_shell(name: str) -> None:
    runs = [step["run"] for step in steps(name) if "run" in step]
    assert len(runs) >= 2
    for run in runs:
        assert "${{" not in run
        assert subprocess.run(["bash", "-n", "-c", run], check=False).returncode == 0, run
    assert not {"pull_request_target", "workflow_run"} & set(flow(name)["on"])


def test_ci_runs_the_same_check_as_everybody_on_pushes_and_pull_requests() -> None:
    assert set(flow("ci.yml")["on"]) == {"push", "pull_request"}
    assert steps("ci.yml")[-1]["run"] == "bash .ci/run" and (ROOT / ".ci" / "run").is_file()
    (job,) = flow("ci.yml")["jobs"].values()
    assert job["container"].startswith("debian:")  # whose root the Slurm part of it needs
    kept = next(step["with"] for step in steps("ci.yml") if "cache" in step.get("uses", ""))
    assert all(name in kept["key"] for name in ("requirements/*.txt", "pyproject.toml", "scripts/llama_cpp.py"))
    assert "/root/.cache/kdcloud-wheels" in kept["path"].split()  # llama.cpp, built once


def test_a_release_is_built_from_a_tag_that_is_the_version_with_the_locked_builder() -> None:
    assert flow("release.yml")["on"] == {"push": {"tags": ["v*"]}}
    check = next(step["run"] for step in steps("release.yml") if "__version__" in step.get("run", ""))
    for tag, rc in ((f"v{orchestrator.__version__}", 0), (f"w{orchestrator.__version__}", 1), ("v99.0", 1)):
        env = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["bash", "-ec", check], cwd=ROOT, env=env, capture_output=True, check=False)
        assert done.returncode == rc
    build = next(step["run"] for step in steps("release.yml") if "-m build" in step.get("run", ""))
    assert "-c requirements/lock.txt hatchling" in build and "--no-isolation" in build and "--strict" in build
