"""Does an install come out the same, and right, on every machine? The lock, the wheel, the declared versions."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import Environment, Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orchestrator

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {"lock.txt": ("local", "quantized", "s3", "dev"), "sky.txt": ("local", "quantized", "s3", "dev", "sky")}
MACHINES = [
    {
        "sys_platform": system,
        "platform_machine": machine,
        "python_full_version": f"{python}.4",
        "python_version": python,
    }
    for system, machine in [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
    for python in ("3.11", "3.12", "3.13")
]
lock_files = pytest.mark.parametrize("name", LOCKS)


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def wanted(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for: the bare install and those extras."""
    optional: dict[str, list[str]] = PROJECT["optional-dependencies"]
    return [
        Requirement(line)
        for group in (PROJECT["dependencies"], *(optional[extra] for extra in extras))
        for line in group
    ]


def applies(marker: Marker | None, machine: dict[str, str]) -> bool:
    environment: Any = {"platform_python_implementation": "CPython", "implementation_name": "cpython", **machine}
    context: Environment = environment
    return marker is None or marker.evaluate(context)  # type: ignore[arg-type]


@lock_files
def test_a_lock_pins_every_dependency_once_on_every_machine(name: str) -> None:
    locked = pins(name)
    assert len(locked) > 80
    assert {extra for extras in LOCKS.values() for extra in extras} == set(PROJECT["optional-dependencies"])
    for machine in MACHINES:
        here = [pin for pin in locked if applies(pin.marker, machine)]
        versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in here}
        assert len(versions) == len(here), "two versions of one package for one machine"
        for requirement in wanted(LOCKS[name]):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not in {name}"
            assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


@lock_files
def test_a_lock_names_exact_public_versions_and_nothing_of_one_machine(name: str) -> None:
    for pin in pins(name):
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and re.fullmatch(r"[0-9]+(\.[0-9]+)*(\.post[0-9]+)?", specifier.version), str(
            pin
        )
        assert pin.url is None and not pin.extras, str(pin)
    text = (ROOT / "requirements" / name).read_text()
    for trace in ("+", "--", "://", "@", "\\", " file:", "sha256"):
        assert trace not in text, trace


@lock_files
def test_no_lock_brings_cuda(name: str) -> None:
    names = {canonicalize_name(pin.name) for pin in pins(name)}
    assert "torch" in names
    assert {found for found in names if re.match(r"(nvidia|cuda|cupy|triton|pytorch-triton)\b", found)} == set()


def test_both_locks_hold_the_same_torch() -> None:
    assert {str(pin) for name in LOCKS for pin in pins(name) if pin.name == "torch"} == {"torch==2.13.0"}


def test_the_bare_install_needs_neither_torch_nor_skypilot_nor_boto3() -> None:
    bare = {canonicalize_name(requirement.name) for requirement in wanted(())}
    assert bare == {"click", "pydantic", "pyyaml", "rich", "psutil"}
    assert {str(r) for r in wanted(("sky",)) if r.name == "skypilot"} == {"skypilot[slurm]==0.14.*"}


def test_every_direct_dependency_gives_its_reason() -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    lines = section.strip().splitlines()
    assert len(lines) == len(PROJECT["dependencies"])
    assert all("  # " in line for line in lines)


def test_every_make_target_that_people_call_is_in_its_help() -> None:
    text = (ROOT / "Makefile").read_text()
    described = set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
    assert {"help", "demo", "test", "unit", "lint", "lock", "wheel", "clean"} <= described
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == described


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/install.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("install")


def test_an_old_python_is_told_what_to_do(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"3\.11 or newer(.|\n)*make demo PYTHON="):
        install.refuse_what_cannot_work({"local"})


def test_what_was_installed_counts_until_the_lock_changes(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(install, "LOCK", tmp_path / "lock")
    install.LOCK.write_text("a==1")
    before = install.fingerprint()
    assert install.installed(before) == set()
    install.STAMP.write_text(f"{before}\ndev\nlocal\n")
    assert install.installed(install.fingerprint()) == {"dev", "local"}
    install.LOCK.write_text("a==2")
    assert install.installed(install.fingerprint()) == set()


def test_the_cpu_index_is_taken_only_if_it_lists_the_locked_torch(install: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text('<a href="torch-2.13.0%2Bcpu-cp311.whl">torch-2.13.0+cpu-cp311.whl</a>')
    assert install.answers(page.as_uri(), "2.13.0")
    assert not install.answers(page.as_uri(), "2.14.0")
    assert not install.answers((tmp_path / "nothing").as_uri(), "2.13.0")


def demo_report(soft: list[float], hard: list[float], **changes: object) -> dict[str, object]:
    quality = {"student": {"accuracy": {"seeds": soft}}, "student_hard": {"accuracy": {"seeds": hard}}, "teacher": None}
    return {"state": "done", "live": [], "spend_micros": 5, "cap_micros": 5, "quality": quality, **changes}


@pytest.mark.parametrize(
    ("report", "complaint"),
    [
        (demo_report([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]), ""),
        (demo_report([0.9, 0.8, 0.7], [0.8, 0.7, 0.7]), "seeds [2]"),
        (demo_report([0.9, 0.8, 0.7], [0.88, 0.78, 0.68]), "0.020 only"),
        (demo_report([0.9, 0.8], [0.8, 0.7]), "2 and 2 seeds"),
        (demo_report([0.9] * 3, [0.8] * 3, spend_micros=6), "more than the cap"),
        (demo_report([0.9] * 3, [0.8] * 3, live=["kd-1"]), "still live"),
        (demo_report([0.9] * 3, [0.8] * 3, state="failed"), "the run is failed"),
        (demo_report([0.9] * 3, [0.8] * 3, quality={"student": None}), "no quality"),
        (
            demo_report([0.9] * 3, [0.8] * 3, quality={
                "student": {"accuracy": {"seeds": [0.9] * 3, "mean": 0.9, "interval": [0.91, 0.95]}},
                "student_hard": {"accuracy": {"seeds": [0.8] * 3, "mean": 0.8, "interval": [0.7, 0.9]}},
            }),
            "the interval of student (0.91, 0.95)",
        ),
    ],
)
def test_the_check_of_the_demo_finds_each_broken_promise(
    monkeypatch: pytest.MonkeyPatch, report: dict[str, object], complaint: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    broken = importlib.import_module("check_demo").broken_promises(report)
    assert len(broken) == bool(complaint)
    assert all(complaint in line for line in broken)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_orchestrator_tasks_and_the_recipes_only(wheel: zipfile.ZipFile) -> None:
    info = f"kdcloud-{orchestrator.__version__}.dist-info"
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names} == {"orchestrator", "tasks", info}
    for package in ("orchestrator", "tasks"):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert len(sources) >= 8
        assert sources <= names
    recipes = {f"orchestrator/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert "orchestrator/recipes/quickstart.yaml" in recipes
    assert recipes <= names
    assert f"{info}/licenses/LICENSE" in names
    assert wheel.read("orchestrator/lock.txt") == (ROOT / "requirements" / "lock.txt").read_bytes()  # for machines


def test_the_wheel_has_the_version_of_the_package_and_the_command(wheel: zipfile.ZipFile) -> None:
    info = f"kdcloud-{orchestrator.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {orchestrator.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "kdcloud = orchestrator.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
