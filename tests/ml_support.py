"""What do the tests of the learning stages share? A context in a folder, and a tiny run of stages through it."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tasks import data
from tasks.contract import DataSource, Settings, Task, TaskError
from tasks.stage import Stopped

torch.set_num_threads(1)  # models this small only lose by more


class FolderContext:
    """A stage's world in a local folder. `stop_after` asks for a stop after so many progress calls of training."""

    def __init__(self, root: Path, task: Task, *, stop_after: int | None = None) -> None:
        self.root, self.task = root, task
        self.work = root / task.stage / "work"
        self.out = root / task.stage / f"out-{task.attempt}"
        self.stored = root / task.stage / "stored"
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.phases: list[tuple[str, float]] = []
        self.checkpoints: list[int] = []
        self._left = stop_after
        self.limit: float | None = None
        for folder in (self.work, self.out, self.stored):
            folder.mkdir(parents=True, exist_ok=True)

    def progress(
        self, phase: str, done: float = 0, total: float | None = None, unit: str = "steps", *,
        declared: bool = False, **numbers: float,
    ) -> None:  # fmt: skip
        self.phases.append((phase, done))
        if self._left is not None and phase == "train":
            self._left -= 1

    @property
    def stopping(self) -> bool:
        return self._left is not None and self._left <= 0

    def metric(self, step: int, **values: float) -> None:
        self.metrics.append((step, values))

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        folder = self.root / self.task.stage / "checkpoints" / f"step-{step:09d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        self.checkpoints.append(step)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        found = sorted((self.root / self.task.stage / "checkpoints").glob("step-*"))
        return (int(found[-1].name[5:]), found[-1]) if found else None

    def keep(self, name: str) -> None:
        copy(self.out / name, self.stored / name)

    def kept(self, name: str) -> bool:
        if (self.stored / name).exists():
            copy(self.stored / name, self.out / name)
            return True
        return False

    def input(self, stage: str) -> Path:
        folder = self.root / stage / "done"
        if not folder.is_dir():
            raise TaskError(f"stage {stage} has no result")
        return folder

    def told(self, stage: str) -> tuple[Task, dict[str, Any]] | None:
        path = self.root / stage / "told.json"
        if not path.is_file():
            return None
        order, result = json.loads(path.read_text())
        return Task.from_json(order), result

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        if data.is_builtin(source.source):
            return data.builtin(source.source)
        return data.read_rows(self.root / source.source)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def context(
    root: Path, stage: str, kind: str, settings: Settings, *, attempt: int = 1, stop_after: int | None = None
) -> FolderContext:
    task = Task(run="test", stage=stage, kind=kind, attempt=attempt, fence=1, bucket="file:test", settings=settings)
    return FolderContext(root, task, stop_after=stop_after)


def run_stage(
    root: Path, stage: str, kind: str, settings: Settings, *, attempt: int = 1, stop_after: int | None = None
) -> dict[str, Any] | None:
    """The stage's result, committed for later stages; None when it was stopped on the way."""
    ctx = context(root, stage, kind, settings, attempt=attempt, stop_after=stop_after)
    try:
        result: dict[str, Any] = importlib.import_module(f"tasks.{kind}").run(ctx, settings)
    except Stopped:
        return None
    shutil.rmtree(root / stage / "done", ignore_errors=True)
    shutil.copytree(ctx.out, root / stage / "done")
    (root / stage / "told.json").write_text(json.dumps([ctx.task.to_json(), result]))
    return result
