"""How do code, packages, data, keys and orders reach a machine? A wheel of the tasks, prompts, argv and environment."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import tasks
from orchestrator import __version__, access, grants
from orchestrator.access import head, hub_models
from orchestrator.catalog import LICENCES
from orchestrator.errors import UsageError
from orchestrator.label_folder import entries_of, label_files
from orchestrator.locks import environments, requirements
from orchestrator.plan import Plan, StagePlan
from tasks.bucket import Bucket, Manifest, files_sha256, read_commit
from tasks.contract import (
    COMMIT_FILE,
    LABELS_PREFIX,
    BoxSettings,
    DataSource,
    EvaluateSettings,
    ExportSettings,
    Link,
    Origin,
    Settings,
    TrainSettings,
    install_hint,
)

S = TypeVar("S")

CODE_URL = "KDCLOUD_CODE_URL"  # these names are read in tasks/bootstrap.py
PACKAGES = "KDCLOUD_PACKAGES"
CONSTRAINTS = "KDCLOUD_CONSTRAINTS"
ENVIRONMENTS = "KDCLOUD_ENVIRONMENTS"
THEN = "KDCLOUD_THEN"
# Where models come from, for readers who cannot reach the hub: passed on as they are set here. The token is secret.
HUB = ("HF_ENDPOINT", "HF_TOKEN", "KDCLOUD_HUB", "MODELSCOPE_DOMAIN")

MIRROR = "UV_DEFAULT_INDEX"  # where packages come from instead of PyPI: passed on too, the hashes stay the same
# Locked environments of machines, by name: requirements/NAME.txt, which lies in the wheel of kdcloud as well. They go
# to a machine in the code's zip, as files with hashes are too large for its environment.
LOCKED = ("label", "train", "label-box", "train-box")
CHAT = "chat"  # no stage works in it: a box makes it for Open WebUI
LOCK_FOLDER = "environments"  # in the zip

# Module -> package: what a kind of stage imports. Where no locked environment serves, the versions are those of
# requirements/lock.txt: every machine gets what was tested, whatever is installed on the client.
_SUPERVISOR = {"psutil": "psutil"}
_STORE = {"boto3": "boto3"}
_LEARNING = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "math_verify": "math-verify",
}
_QUANTIZED = {"bitsandbytes": "bitsandbytes"}
_EXPORT = {"gguf": "gguf"}
_BOX = {"jupyterlab": "jupyterlab", "tensorboard": "tensorboard"}


def code_wheel() -> tuple[bytes, str]:
    """(zip, sha256) of the `tasks` package as installed here, and of the locked environments that it runs in: the same
    bytes for the same sources, on every machine."""
    root = Path(tasks.__file__).parent
    files = {f"tasks/{source.relative_to(root).as_posix()}": source for source in sorted(root.glob("**/*.py"))}
    files |= {f"{LOCK_FOLDER}/{name}.txt": requirements(name) for name in (*LOCKED, CHAT)}
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, source in files.items():
            wheel.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), source.read_bytes(), zipfile.ZIP_DEFLATED)
    data = memory.getvalue()
    return data, hashlib.sha256(data).hexdigest()


def put_code(bucket: Bucket, data: bytes, sha256: str) -> None:
    key = f"code/{sha256}.whl"
    if bucket.head(key) is None:
        bucket.put(key, data)


def fetch_code(bucket: Bucket, sha256: str, folder: Path) -> Path:
    """The run's own wheel in `folder`, verified. Raises UsageError when its bytes are not those it was started with."""
    path = folder / f"{sha256}.whl"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    data, _ = bucket.get(f"code/{sha256}.whl")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(
            "the code kept with this run does not match its hash", hint="somebody changed the bucket: start a new run"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.replace(path)
    return path


def upload_data(bucket: Bucket, settings: S) -> S:
    """The same settings with every local jsonl file put to `data/<sha>-<name>` in the run and named by that key.

    A folder of labels goes to LABELS_PREFIX with the hash of all its files, which the machine compares.
    """
    if isinstance(settings, BoxSettings):
        return replace(settings, settings=upload_data(bucket, settings.settings))
    if not is_dataclass(settings):
        return settings
    changed: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, DataSource) and value.sha256 is None and not value.source.startswith("builtin:"):
            changed[item.name] = _put_data(bucket, Path(value.source))
    if isinstance(settings, TrainSettings) and Path(settings.labels).is_absolute():
        changed["labels"] = _put_labels(bucket, Path(settings.labels))
    return replace(settings, **changed)  # type: ignore[type-var]


def with_origin(stage: StagePlan, plan: Plan, recipe_text: str) -> Settings:
    """The stage's settings; those of an export with what the student's model card tells and only the client knows."""
    if not isinstance(stage.settings, ExportSettings):
        return stage.settings
    before = plan.stages[: plan.stages.index(stage)]
    named = {name for one in plan.stages for name in hub_models(one.settings)}
    origin = Origin(
        version=__version__,
        recipe=plan.name,
        recipe_sha256=hashlib.sha256(recipe_text.encode()).hexdigest(),
        evaluation=next(
            (
                one.name
                for one in reversed(before)
                if isinstance(one.settings, EvaluateSettings) and one.settings.student == stage.settings.student
            ),
            None,
        ),
        licences={name: LICENCES[name] for name in sorted(named) if name in LICENCES},
    )
    return replace(stage.settings, origin=origin)


def _put_data(bucket: Bucket, path: Path) -> DataSource:
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check `data:` in the recipe") from error
    key = f"data/{sha256[:12]}-{path.name}"
    if bucket.head(key) is None:
        bucket.put_file(path, key)
    return DataSource(source=key, sha256=sha256)


def _put_labels(bucket: Bucket, path: Path) -> str:
    files = label_files(path)
    entries = entries_of(files)
    key = f"{LABELS_PREFIX}{files_sha256(entries)}"
    if read_commit(bucket, key) is None:
        for rel, file in files.items():
            bucket.put_file(file, f"{key}/{rel}")
        bucket.put(f"{key}/{COMMIT_FILE}", Manifest(fence=0, files=entries).to_json().encode())
    return key


def supervisor_argv(
    bucket_url: str, stage: str, attempt: int, remaining_s: float, *, then: Sequence[Link] = ()
) -> Sequence[str]:
    """`then`: the stages that the same machine goes on with, in turn."""
    more = ("--then", ",".join(map(str, then))) if then else ()
    return (
        "python",
        "-m",
        "tasks.supervisor",
        "--bucket",
        bucket_url,
        "--stage",
        stage,
        "--attempt",
        str(attempt),
        "--remaining-s",
        f"{remaining_s:.3f}",
        *more,
    )


def supervisor_env(wheel: Path) -> dict[str, str]:
    """The run's own code first, whatever is installed; no user site, no bytecode beside the wheel."""
    return {"PYTHONPATH": str(wheel), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def machine_env(
    bucket: Bucket,
    wheel: Path,
    settings: object,
    *,
    kind: str,
    infra: str,
    seconds: float,
    allow_account_key: bool,
    then: Sequence[tuple[str, object]] = (),
) -> dict[str, str]:
    """Environment of one job: `supervisor_env`, and for a rented machine keys, code, packages and hub.

    `then`: kind and settings of the stages that the same job goes on with; each has packages of its own.
    Holds secrets: for Provisioner.run only. Keys and link are made anew for every job and outlive `seconds`, the time
    until the machine must be gone. Raises BucketError when the keys cannot be had.
    """
    env = supervisor_env(wheel)
    if head(infra) == "local":
        return env
    keys = grants.grant(bucket, seconds, allow_account_key=allow_account_key)
    link = grants.link(bucket, f"code/{wheel.stem}.whl", seconds, keys) if keys else None
    if link is not None:
        env[CODE_URL] = link
    env[PACKAGES] = json.dumps(_packages_of(kind, settings, s3=bool(keys)))
    env[CONSTRAINTS] = json.dumps(lock())  # no line ends: it may pass through a shell's export
    env[ENVIRONMENTS] = " ".join(environments(kind, settings))
    if then:
        later = [
            {PACKAGES: _packages_of(one, own, s3=bool(keys)), ENVIRONMENTS: environments(one, own)}
            for one, own in then
        ]
        env[THEN] = json.dumps(later)
    env["VLLM_NO_USAGE_STATS"] = "1"  # else it tells its makers about each start
    if os.environ.get(MIRROR):
        env[MIRROR] = os.environ[MIRROR]
    hubs = [hub_env(own, os.environ) for own in (settings, *(own for _, own in then))]
    return {**env, **keys, **next(filter(None, hubs), {}), **api_env(settings, os.environ)}


def hub_env(settings: object, env: Mapping[str, str]) -> dict[str, str]:
    """What leads to the hub, for a stage that fetches a model from one: others get no token."""
    return {name: env[name] for name in HUB if env.get(name)} if hub_models(settings) else {}


def api_env(settings: object, env: Mapping[str, str]) -> dict[str, str]:
    """The key of a teacher behind an API, for the stage that asks it: others get none."""
    name = access.api_key_env(settings)
    return {name: env[name]} if name is not None and env.get(name) else {}


def _quantized(settings: object) -> bool:
    if not isinstance(settings, TrainSettings):
        return False
    return settings.method == "qlora" or settings.optimizer == "adamw_8bit"


def _packages_of(kind: str, settings: object, *, s3: bool) -> dict[str, str]:
    if isinstance(settings, BoxSettings):
        own = _packages_of(settings.kind, settings.settings, s3=s3)
        return own | _pinned(_BOX)
    return packages(kind, s3=s3, quantized=_quantized(settings))


def packages(kind: str, *, s3: bool, quantized: bool = False) -> dict[str, str]:
    """{module: requirement} of a kind of stage, in the locked versions.

    What a Python must have to be used as it is, and what is installed where no locked environment serves. On Linux
    PyPI's torch brings its CUDA.
    """
    learning = {} if kind == "rehearse" else {**_LEARNING, **(_QUANTIZED if quantized else {})}
    return _pinned({**_SUPERVISOR, **(_STORE if s3 else {}), **learning, **(_EXPORT if kind == "export" else {})})


def _pinned(packages: Mapping[str, str]) -> dict[str, str]:
    pins = locked(lock())
    return {module: pins.get(package, package) for module, package in packages.items()}


def check_installed(stages: Iterable[StagePlan], there: Callable[[str], object] = importlib.util.find_spec) -> None:
    """Raises UsageError when a stage may run on this computer, whose Python lacks what it needs."""
    for stage in stages:
        if any(head(offer.infra) == "local" for offer in stage.candidates):
            missing = sorted(name for name in packages(stage.kind, s3=False) if there(name) is None)
            if missing:
                raise UsageError(
                    f"stage {stage.name} runs on this computer and needs {', '.join(missing)}, not installed here",
                    hint=install_hint("local"),
                )


def locked(lines: Sequence[str]) -> dict[str, str]:
    """name -> `name==version` of the lines of a lock file; a package with several lines is left out."""
    found: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)==", line)
        if match:
            found.setdefault(match[1].lower(), []).append(line.strip())
    return {name: lines[0] for name, lines in found.items() if len(lines) == 1}


@cache
def lock() -> tuple[str, ...]:
    """The locked versions, a line each."""
    return tuple(line for line in requirements("lock").read_text().splitlines() if line and not line.startswith("#"))
