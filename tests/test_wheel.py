"""What people take home: do wheel and sdist hold all that kdcloud needs, and does it run from there, outside a clone?

Nothing of the user's is touched: every installation has a home of its own below pytest's folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orchestrator

ROOT = Path(__file__).parents[1]
VERSION = orchestrator.__version__
UV = Path(sys.executable).parent / "uv"
PIPX = "pipx==1.18.4"
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
NO_COST = "0.0001USD"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout, and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build("sdist", ROOT, folder)
    with tarfile.open(sdist_in(folder)) as archive:
        archive.extractall(folder / "source", filter="data")
    build("wheel", folder / "source" / f"kdcloud-{VERSION}", folder)
    return folder


def build(kind: str, source: Path, folder: Path) -> None:
    code = f"import hatchling.build; hatchling.build.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)


def sdist_in(dist: Path) -> Path:
    return dist / f"kdcloud-{VERSION}.tar.gz"


def wheel_in(dist: Path) -> Path:
    return dist / f"kdcloud-{VERSION}-py3-none-any.whl"


# -- what is in them


def test_the_sdist_holds_the_sources_their_locks_and_the_documents_and_no_tests(dist: Path) -> None:
    with tarfile.open(sdist_in(dist)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = {"orchestrator", "tasks", "recipes", "docs", "requirements"}
    files = {
        "README.md",
        "CHANGELOG.md",
        "README.zh-CN.md",
        "SECURITY.md",
        "LICENSE",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    }
    assert {name.partition("/")[0] for name in names} == tops | files
    for top in tops:
        tracked = tracked_below(top)
        assert len(tracked) >= 4 and tracked <= names, top
    assert not {name for name in names if "test_" in name or "__pycache__" in name}


def tracked_below(top: str) -> set[str]:
    """Files of a folder, less what tools leave in it."""
    found = (path for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_wheel_from_the_sdist_is_that_of_the_checkout(dist: Path, tmp_path: Path) -> None:
    build("wheel", ROOT, tmp_path)
    assert wheel_in(tmp_path).read_bytes() == wheel_in(dist).read_bytes()


def test_the_wheel_holds_what_is_read_at_run_time(dist: Path) -> None:
    with zipfile.ZipFile(wheel_in(dist)) as wheel:
        names = set(wheel.namelist())
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert len(here) >= 8 and {f"orchestrator/{name}" for name in here} <= names  # recipes with their data
    assert {"orchestrator/py.typed", "tasks/py.typed", "tasks/bootstrap.py", "orchestrator/__main__.py"} <= names
    assert {"orchestrator/lock.txt", "orchestrator/label.txt", "orchestrator/train.txt"} <= names
    assert not {name for name in names if "test_" in name or "__pycache__" in name or name.startswith("tests")}


def test_the_metadata_is_valid_and_names_the_licence_and_every_extra(dist: Path) -> None:
    with zipfile.ZipFile(wheel_in(dist)) as wheel:
        text = wheel.read(f"kdcloud-{VERSION}.dist-info/METADATA")
    metadata = Metadata.from_email(text, validate=True)
    assert (metadata.name, str(metadata.version)) == ("kdcloud", VERSION)
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert {"local", "page", "s3", "sky", "notify", "quantized"} <= set(metadata.provides_extra or [])


# -- a place where nothing is but what was asked for


class Installed:
    """A command `kdcloud` somewhere, run in an empty folder with an empty home."""

    def __init__(self, home: Path, command: Path) -> None:
        self.home, self.command, self.folder = home, command, home / "empty"
        self.folder.mkdir(parents=True)
        self.env = bare_env(home)

    def run(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.command), *words],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip


def bare_env(home: Path) -> dict[str, str]:
    """An environment of nobody's. What says where packages come from is kept: a mirror may be all there is."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))}
    return {**kept, "HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "NO_COLOR": "1"}


def check_plans_and_reports(kd: Installed) -> None:
    """What needs neither torch nor SkyPilot nor a clone."""
    assert kd.run("--version").stdout.split()[-1] == VERSION
    assert len(RECIPES) >= 6
    for name in RECIPES:
        planned = kd.run("plan", name, "--json")
        assert planned.returncode == 0, planned.stderr
        assert len(json.loads(planned.stdout)["stages"]) >= 1
    started = kd.run("init", "--template", "quickstart", "--yes", "mine.yaml")
    assert started.returncode == 0 and kd.run("plan", "mine.yaml").returncode == 0, started.stderr
    refused = kd.run("run", "quickstart", "--yes", "--budget", NO_COST)
    assert refused.returncode == 3, refused.stderr
    none = kd.run("report")
    assert none.returncode == 2 and "nothing has run yet" in none.stderr, none.stderr
    assert "Traceback" not in none.stderr + refused.stderr


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where no package index can be reached, but never in CI."""
    asked = subprocess.run([UV, "tool", "run", PIPX, "--version"], capture_output=True, text=True, check=False)
    if asked.returncode and not os.environ.get("CI"):
        pytest.skip(f"no package index can be reached: {asked.stderr[-200:]}")
    assert asked.returncode == 0, asked.stderr


@pytest.mark.slow
def test_pipx_installs_the_bare_wheel_and_it_plans_every_recipe(index: None, dist: Path, tmp_path: Path) -> None:
    words = ["install", "--backend", "pip", "--python", base_python(), str(wheel_in(dist))]
    subprocess.run(
        [UV, "tool", "run", PIPX, *words], env=bare_env(tmp_path), check=True, capture_output=True, timeout=300
    )
    kd = Installed(tmp_path, tmp_path / ".local" / "bin" / "kdcloud")
    check_plans_and_reports(kd)
    said = kd.run("doctor", "--offline").stdout
    assert "pipx inject --force kdcloud 'jinja2>=3.1'" in " ".join(said.split())


@pytest.mark.slow
def test_uv_tool_installs_the_bare_wheel_and_it_plans_every_recipe(index: None, dist: Path, tmp_path: Path) -> None:
    words = ["tool", "install", "--python", base_python(), str(wheel_in(dist))]
    subprocess.run([UV, *words], env=bare_env(tmp_path), check=True, capture_output=True, timeout=300)
    kd = Installed(tmp_path, tmp_path / ".local" / "bin" / "kdcloud")
    check_plans_and_reports(kd)
    assert "uv pip install --python" in kd.run("doctor", "--offline").stdout


def base_python() -> str:
    """The Python below the virtual environment of the tests."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


# -- the quickstart, with what its extras name and not one package more


@pytest.mark.slow
def test_the_quickstart_runs_from_a_wheel_with_its_extras_alone(dist: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([base_python(), "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python3*/site-packages")
    linked = link_packages(site, wheel_in(dist), ["local", "page"])
    assert (
        {"torch", "transformers", "click", "matplotlib"} <= linked and "boto3" not in linked and "pytest" not in linked
    )
    words = ["pip", "install", "--offline", "--no-deps", "--python", str(venv / "bin" / "python"), str(wheel_in(dist))]
    subprocess.run([UV, *words], check=True, capture_output=True)
    kd = Installed(tmp_path / "home", venv / "bin" / "kdcloud")
    done = kd.run("run", "quickstart", "--smoke", "--yes", "--budget", "1CNY", timeout_s=600)  # a slow machine, too
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(kd.run("report", "--json").stdout)
    assert report["state"] == "done" and not report["live"]
    assert report["quality"]["student"] is not None
    assert kd.run("report", "--html", "page.html").returncode == 0
    assert "<html" in (kd.folder / "page.html").read_text()
    assert (kd.home / ".kdcloud" / "ledger.sqlite").is_file()


def link_packages(site: Path, wheel: Path, extras: list[str]) -> set[str]:
    """Links what a wheel and some of its extras name, and all that this needs in turn, into a folder of packages.

    From the environment of the tests: nothing is fetched or copied. Returns their names.
    """
    theirs = Path(sysconfig.get_path("purelib"))
    with zipfile.ZipFile(wheel) as opened:
        lines = Metadata.from_email(opened.read(f"kdcloud-{VERSION}.dist-info/METADATA")).requires_dist or []
    seen: set[tuple[str, str]] = set()
    for extra in ["", *extras]:
        for needed in lines:
            if applies(needed, extra):
                close(needed, seen)
    names = {name for name, _ in seen}
    for name in names:
        for top in {file.parts[0] for file in importlib.metadata.files(name) or () if file.parts[0] != ".."}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(theirs / top)
    return names


def close(wanted: Requirement, seen: set[tuple[str, str]]) -> None:
    """Adds (distribution, extra) of a requirement and of all that it requires here."""
    name = canonicalize_name(wanted.name)
    for extra in ["", *sorted(wanted.extras)]:
        if (name, extra) not in seen:
            seen.add((name, extra))
            for line in importlib.metadata.requires(name) or ():
                if applies(Requirement(line), extra):
                    close(Requirement(line), seen)


def applies(needed: Requirement, extra: str) -> bool:
    return needed.marker is None or needed.marker.evaluate({"extra": extra})
