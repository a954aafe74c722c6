"""What a stage's working code may use: inputs, progress, metrics, checkpoints, results. Also the stage's process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tasks.contract import DataSource, Task


class Stopped(Exception):
    """The stage was asked to stop and has saved a checkpoint (or has none to save)."""


class Context(Protocol):
    """One stage's view of the world. `tasks/<kind>.py` exposes `run(ctx: Context, settings) -> dict` (the result)."""

    task: Task
    work: Path  # scratch folder on the machine
    out: Path  # what is put here is uploaded and committed with the result, as <run>/<stage>/<relative path>

    def progress(
        self, phase: str, done: float = 0, total: float | None = None, unit: str = "steps", *,
        declared: bool = False, **numbers: float,
    ) -> None:
        """Says that work moved; call it from the working loop, as often as you like (writing is throttled).

        Also raises Stopped when a stop was asked for and no checkpoint is being kept by the caller (see `stopping`).
        """
        ...

    @property
    def stopping(self) -> bool:
        """A stop was asked for: save a checkpoint at once, then raise Stopped."""
        ...

    def metric(self, step: int, **values: float) -> None:
        """A row of metrics.jsonl and TensorBoard scalars (names as `loss/total` become `loss__total` in keywords)."""
        ...

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Calls `write(folder)`, uploads the folder as checkpoints/step-N and commits it; keeps the newest two."""
        ...

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The newest committed checkpoint of this stage, fetched and verified."""
        ...

    def keep(self, name: str) -> None:
        """Uploads out/<name> (a file or folder) now, so that it survives a stop. Folders get a COMMIT of their own."""
        ...

    def kept(self, name: str) -> bool:
        """Whether out/<name> was kept by an earlier attempt (it is fetched into out/ then)."""
        ...

    def input(self, stage: str) -> Path:
        """Folder with the committed artefacts of an earlier stage, fetched and verified. Raises TaskError."""
        ...

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        """Rows of prompts: {"input": str, "answer": str | None, "key": str}."""
        ...
