"""How do code, data and orders reach a machine? A wheel of the tasks, the prompts, and the supervisor's argv."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tasks
from orchestrator.errors import UsageError
from tasks.bucket import Bucket
from tasks.contract import DataSource

S = TypeVar("S")


def code_wheel() -> tuple[bytes, str]:
    """(zip, sha256) of the `tasks` package as installed here: the same bytes for the same sources, on every machine."""
    root = Path(tasks.__file__).parent
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as wheel:
        for source in sorted(root.glob("**/*.py")):
            name = f"tasks/{source.relative_to(root).as_posix()}"
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
    """The same settings with every local jsonl file put to `data/<sha>-<name>` in the run and named by that key."""
    if not is_dataclass(settings):
        return settings
    changed: dict[str, Any] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, DataSource) and value.sha256 is None and not value.source.startswith("builtin:"):
            changed[item.name] = _put_data(bucket, Path(value.source))
    return replace(settings, **changed)  # type: ignore[type-var]


def _put_data(bucket: Bucket, path: Path) -> DataSource:
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="check `data:` in the recipe") from error
    key = f"data/{sha256[:12]}-{path.name}"
    if bucket.head(key) is None:
        bucket.put_file(path, key)
    return DataSource(source=key, sha256=sha256)


def supervisor_argv(bucket_url: str, stage: str, attempt: int, remaining_s: float) -> Sequence[str]:
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
    )


def supervisor_env(wheel: Path) -> Mapping[str, str]:
    """The run's own code first, whatever is installed; no user site, no bytecode beside the wheel."""
    return {"PYTHONPATH": str(wheel), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
