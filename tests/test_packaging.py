"""Does an install come out the same, and right, on every machine? The lock, the wheel, the declared versions."""

from __future__ import annotations

import importlib
import itertools
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
LOCKS = {
    "lock.txt": ("local", "page", "notify", "quantized", "box", "s3", "dev"),
    "sky.txt": ("local", "page", "notify", "quantized", "box", "s3", "dev", "sky"),
}
# Whole environments of rented machines: the extras that make them up.
ENVIRONMENTS = {
    "train": ("local", "quantized", "s3"),
    "label": ("local", "s3", "label"),
    "train-box": ("local", "quantized", "s3", "box"),
    "label-box": ("local", "s3", "label", "box"),
    "chat": ("chat",),
}
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
    extras = {extra for extras in (*LOCKS.values(), *ENVIRONMENTS.values()) for extra in extras}
    assert extras == set(PROJECT["optional-dependencies"])
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


# -- environments of rented machines


def machine_pins(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """{line without hashes: (what it pins, hashes)} of a whole environment."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    blocks = [line for line in text.replace(" \\\n", " ").splitlines() if not line.startswith("#")]
    found = {}
    for block in blocks:
        line, *hashes = re.split(r"\s+--hash=", block)
        found[line] = (Requirement(line), hashes)
    assert len(found) == len(blocks) > 70
    return found


environments = pytest.mark.parametrize("name", ENVIRONMENTS)
RENTED = [machine for machine in MACHINES if machine["platform_machine"] == "x86_64"]


@environments
def test_an_environment_is_whole_exact_and_by_hash(name: str) -> None:
    for line, (pin, hashes) in machine_pins(name).items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None and not pin.extras, line
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), line
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert not re.search(r"://|@| file:|\+c", text)  # nothing of the machine or index that it was made from
    assert f"\n# {len(machine_pins(name))} packages, " in text


@environments
def test_an_environment_holds_what_its_extras_ask_for_on_each_python(name: str) -> None:
    assert len(RENTED) == 3
    for machine in RENTED:
        here = [pin for pin, _ in machine_pins(name).values() if applies(pin.marker, machine)]
        versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in here}
        assert len(versions) == len(here), "two versions of one package for one machine"
        optional: dict[str, list[str]] = PROJECT["optional-dependencies"]
        for requirement in [Requirement(line) for extra in ENVIRONMENTS[name] for line in optional[extra]]:
            version = versions.get(canonicalize_name(requirement.name))
            if applies(requirement.marker, machine):
                assert version is not None and requirement.specifier.contains(version), f"{requirement}: {version}"


def exact(name: str) -> dict[str, str]:
    pins = [pin for pin, _ in machine_pins(name).values()]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins if pin.marker is None}


@environments
def test_the_documents_say_how_much_a_machine_fetches(name: str) -> None:
    found = re.search(r"(\d+) bytes to fetch", (ROOT / "requirements" / f"{name}.txt").read_text())
    assert found is not None
    said = rf"`requirements/{name}\.txt` \([^)]*{int(found[1]) / 1e9:.1f} GB"
    place = "docs/dev.md" if name.endswith("-box") or name == "chat" else "README.md"
    assert re.search(said, (ROOT / place).read_text()), said


def test_machines_train_with_the_versions_that_are_tested() -> None:
    tested = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins("lock.txt")}
    train = exact("train")
    assert len(train.keys() & tested.keys()) > 50
    assert {name: version for name, version in train.items() if tested.get(name, version) != version} == {}
    brought = {name for name in train if name not in tested}
    assert brought and all(re.match(r"(nvidia|cuda)-|triton$", name) for name in brought)  # the CUDA of its torch


def test_machines_label_with_the_torch_that_vllm_was_built_for() -> None:
    label = exact("label")
    assert (label["vllm"], label["torch"]) == ("0.24.0", "2.11.0")
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton", "peft", "boto3"} <= label.keys()


def test_a_machine_without_uv_installs_the_one_that_is_locked() -> None:
    from tasks.bootstrap import UV

    assert UV in (ROOT / "requirements" / "lock.txt").read_text().splitlines()


def lock_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("lock")


def wheel_entry(tags: str, digit: str, size: int) -> dict[str, Any]:
    return {"url": f"https://x/a/pkg-1.0-{tags}.whl", "size": size, "hashes": {"sha256": digit * 64}}


def test_a_lock_takes_the_files_that_fit_rented_machines_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_script(monkeypatch)
    entries = [
        wheel_entry("cp311-cp311-manylinux_2_28_x86_64", "1", 10),
        wheel_entry("cp312-cp312-manylinux_2_28_x86_64", "2", 20),
        wheel_entry("cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64", "3", 30),
        wheel_entry("cp313-cp313-manylinux_2_28_x86_64", "4", 40),
        wheel_entry("cp313-cp313t-manylinux_2_28_x86_64", "5", 50),
        wheel_entry("cp312-cp312-musllinux_1_2_x86_64", "6", 60),
        wheel_entry("cp312-cp312-manylinux_2_28_aarch64", "7", 70),
        wheel_entry("cp312-cp312-macosx_11_0_arm64", "8", 80),
    ]
    text, size = lock.locked({"name": "pkg", "version": "1.0", "wheels": entries})
    assert re.findall(r"sha256:(\d)", text) == ["1", "2", "3", "4"]
    assert size == 20  # CPython 3.12 prefers the newer glibc
    some = {"name": "pkg", "version": "1.0", "wheels": entries[1:4], "marker": "python_full_version >= '3.12'"}
    assert lock.locked(some)[0].startswith(
        "pkg==1.0 ; python_full_version >= '3.12' and python_full_version < '3.14' \\\n"
    )
    with pytest.raises(SystemExit, match=r"no wheel for CPython 3\.11"):
        lock.locked({"name": "pkg", "version": "1.0", "wheels": entries[1:]})


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


def test_every_test_is_run_by_one_part_of_the_checks_and_by_no_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    parts = importlib.import_module("parts").PARTS
    chosen = [command[-1] for name in ("unit", "integration") for command in parts[name]]
    assert len(chosen) == 3
    names = ("slow", "kill", "slurm", "export", "alone")
    for marks in itertools.product((False, True), repeat=len(names)):
        given = dict(zip(names, marks, strict=True))
        assert sum(eval(words, {}, given) for words in chosen) == (not given["slurm"] and not given["export"]), given


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
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "orchestrator" / "templates").iterdir()}
    assert "orchestrator/templates/report.html" in templates and templates <= names  # what `report --html` fills
    recipes = {f"orchestrator/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert "orchestrator/recipes/quickstart.yaml" in recipes
    assert recipes <= names
    assert f"{info}/licenses/LICENSE" in names
    for name in ("lock", *ENVIRONMENTS):  # for machines
        assert wheel.read(f"orchestrator/{name}.txt") == (ROOT / "requirements" / f"{name}.txt").read_bytes()


def test_the_wheel_has_the_version_of_the_package_and_the_command(wheel: zipfile.ZipFile) -> None:
    info = f"kdcloud-{orchestrator.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {orchestrator.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "kdcloud = orchestrator.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
