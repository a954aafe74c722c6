"""What does the user take home? The student as an ordinary Hugging Face folder with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tasks import models
from tasks.contract import ExportSettings, TaskError
from tasks.stage import Context
from tasks.train import STUDENTS_FILE

_FORMATS = ("hf",)


def run(ctx: Context, settings: ExportSettings) -> dict[str, Any]:
    """The merged student under `hf/`: weights in safetensors, tokenizer with its template, README.md."""
    for name in settings.formats:
        if name == "gguf":
            raise TaskError("export to gguf is not there yet", hint="use formats: [hf]; llama.cpp converts that folder")
        if name not in _FORMATS:
            raise TaskError(f"unknown export format {name}", hint=f"use one of {', '.join(_FORMATS)}")
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("export", declared=True)
    folder = ctx.input(settings.student)
    # bf16 for real models; small ones from scratch stay as they were trained.
    loaded = models.load_stage(folder, ctx, dtype=_stored_dtype(folder))
    out = ctx.out / "hf"
    models.save(out, loaded.model, loaded.tokenizer)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    (out / "README.md").write_text(_card(ctx, settings, folder, parameters))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    ctx.progress("export", 1, 1, "formats")
    return {"formats": list(settings.formats), "path": "hf", "parameters": parameters, "bytes": size}


def _stored_dtype(folder: Path) -> torch.dtype:
    if (folder / models.MODEL_FOLDER / models.STUDENT_FILE).exists():
        return models.working_dtype(models.pick_device())
    return torch.float32


def _card(ctx: Context, settings: ExportSettings, folder: Path, parameters: int) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation]",
        "---",
        "",
        f"# {ctx.task.run}: student of stage {settings.student}",
        "",
        f"{parameters:,} parameters, distilled with kdcloud from a teacher's verified answers and soft labels.",
        "Load it with `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)`;",
        "ask it through the tokenizer's chat template.",
        "",
        "## Training",
        "",
        *_training_rows(folder),
    ]
    return "\n".join(lines) + "\n"


def _training_rows(folder: Path) -> list[str]:
    arms = json.loads((folder / STUDENTS_FILE).read_text())["arms"]
    arm = arms[0]  # the one under model/
    return [
        "| | |",
        "|---|---|",
        f"| labels | {'soft and hard' if arm['kind'] == 'soft' else 'hard'} |",
        f"| optimizer steps | {arm['steps']} |",
        f"| learning rate | {arm['learning_rate']:g} |",
        f"| supervised tokens seen | {arm['tokens']:,} |",
        f"| final training loss | {arm['final_loss']:.4f} |",
    ]
