"""What does a notebook in a box begin with? `stage()` for the stage's own functions, and a notebook that uses them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.bucket import open_bucket
from tasks.contract import BOX_FOLDER, TASK_FILE, BoxSettings, DataSource, LabelSettings, Task, TaskError
from tasks.stage import StageContext

BOX_ENV = "KDCLOUD_BOX"  # the stage's work folder on this machine
NOTEBOOK = "start.ipynb"


class NotebookContext(StageContext):
    """The stage's view of the world, without the run: inputs from this disk, and nothing leaves it."""

    def __init__(self, task: Task, work: Path, place: Path) -> None:
        super().__init__(task, place, open_bucket(f"file:{place / 'bucket'}"))
        self._inputs, self._data = work.parent / "inputs", work / "data"

    def input(self, stage: str) -> Path:
        folder = self._inputs / stage
        if not folder.is_dir():
            raise TaskError(f"{stage} is not in this box", hint="start the box anew once a run has made it")
        return folder

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        from tasks import data

        if source.source.startswith("builtin:"):
            return list(data.builtin(source.source))
        return list(data.read_rows(self._data / Path(source.source).name))


def stage(**changes: Any) -> tuple[NotebookContext, Any]:
    """(context, settings) of the stage in whose place this box is; `changes` to its settings.

    The context works in a new folder below scratch/, which is not saved; TensorBoard shows what it writes.
    """
    work = Path(os.environ[BOX_ENV])
    box = Task.from_json((work / TASK_FILE).read_text())
    assert isinstance(box.settings, BoxSettings)
    settings: Any = box.settings.settings
    task = replace(box, kind=box.settings.kind, settings=settings, gate=False)
    place = _new_folder(work / BOX_FOLDER / "home" / "scratch", box.settings.kind)
    return NotebookContext(task, work, place), replace(settings, **changes)


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        try:
            (parent / f"{name}-{number}").mkdir(parents=True)
            return parent / f"{name}-{number}"
        except FileExistsError:
            number += 1


# --- the first notebook -----------------------------------------------------------------------------------------------

_WELCOME = """# A box in the place of a `{kind}` stage

- `work/` (this folder) is saved to the bucket every minute and at the end, and is here again in the next box.
- `inputs/` is what the stage reads, `code/` what it runs; notebooks here take a copy of `code/tasks` in `work/`.
- `scratch/` is what the cells below write; it is not saved. TensorBoard shows its curves.
- The machine ends when nothing computes for a while: an open notebook is no work. `NOTICE.txt` says when it is near."""

_STEPS: dict[str, list[str]] = {
    "train": [
        """
from tasks.contract import ModelSource
from tasks.labels import read_labels
from tasks.models import load_tokenizer

folder = ctx.input(settings.labels)
labels = read_labels(folder)
tokenizer = load_tokenizer(ModelSource(path=str(folder / "tokenizer")))
prompt, completion = labels.tokens(0)
print(len(labels), "labelled answers; the first:")
print(tokenizer.decode(prompt), "->", tokenizer.decode(completion))
""",
        """
from tasks import train

ctx, settings = stage(
    steps=1, epochs=None, compare_hard=False, compare_seeds=1, learning_rates=(), early_stop_patience=None
)
result = train.run(ctx, settings)
print("loss of one step:", result["arms"][0]["final_loss"])
""",
    ],
    "pretrain": [
        """
from tasks import pretrain

ctx, settings = stage(steps=5)
pretrain.run(ctx, settings)
"""
    ],
    "label": [
        """
rows = ctx.data(settings.prompts)
print(len(rows), "prompts; the first:", rows[0])
""",
        """
from tasks import label

ctx, settings = stage(samples=2, keep="all", max_cut_share=1.0)
label.run(ctx, settings)
""",
    ],
    "evaluate": [
        """
from tasks import evaluate

ctx, settings = stage(limit=4, seeds=1, lm_eval=())
evaluate.run(ctx, settings)
"""
    ],
    "export": [
        """
from tasks import export

export.run(ctx, settings)
"""
    ],
    "rehearse": [
        """
from tasks import rehearse

ctx, settings = stage(steps=3, seconds_per_step=0.1)
rehearse.run(ctx, settings)
"""
    ],
}
_PAID = "# This stage asks an API for money. The box has no key of it: what it would cost is not set apart."


def notebook(settings: BoxSettings) -> dict[str, Any]:
    """A notebook (nbformat 4.5) that loads what the stage loads and does a little of what it does."""
    steps = _STEPS[settings.kind]
    if isinstance(settings.settings, LabelSettings) and settings.settings.api is not None:
        steps = [steps[0], _PAID]
    cells = ["from tasks.notebook import stage\n\nctx, settings = stage()\nsettings", *steps]
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [_cell(0, "markdown", _WELCOME.format(kind=settings.kind)), *_code(cells)],
    }


def _code(cells: Sequence[str]) -> list[dict[str, Any]]:
    code = enumerate((text.strip() for text in cells), 1)
    return [{**_cell(number, "code", text), "execution_count": None, "outputs": []} for number, text in code]


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    return {"id": f"start-{number}", "cell_type": kind, "metadata": {}, "source": text}
