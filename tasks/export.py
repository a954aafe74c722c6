"""What does the user take home? The student as a Hugging Face folder, as GGUF files with a Modelfile, with a card."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from tasks import card, gguf_file, modelfile, models
from tasks.contract import ExportSettings, TaskError
from tasks.stage import Context
from tasks.train import STUDENTS_FILE

FORMATS = ("hf", "gguf")
OLLAMA_TAKES = "q8_0"  # half the size of f16, and as good where weights are ordinary
OLLAMA_CONTEXT = 4096  # tokens; at least, where the model has so many


def run(ctx: Context, settings: ExportSettings) -> dict[str, Any]:
    """The merged student under `hf/` (safetensors, tokenizer with its template) and `gguf/`, with a README.md.

    What cannot be a GGUF file is told in the result where an hf/ comes out as well; else it raises TaskError.
    """
    for name in settings.formats:
        if name not in FORMATS:
            raise TaskError(f"unknown export format {name}", hint=f"use one of {', '.join(FORMATS)}")
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("export", declared=True)
    folder = ctx.input(settings.student)
    # bf16 for real models; small ones from scratch stay as they were trained.
    loaded = models.load_stage(folder, ctx, dtype=_stored_dtype(folder))
    refused = _refusal(loaded, settings) if "gguf" in settings.formats else None
    out = (ctx.out if "hf" in settings.formats else ctx.work) / "hf"
    models.save(out, loaded.model, loaded.tokenizer)
    parameters, tokenizer = sum(p.numel() for p in loaded.model.parameters()), loaded.tokenizer
    del loaded  # from here on the weights are on the disk
    gc.collect()
    told = card.story(ctx, settings)
    files: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    if "gguf" in settings.formats and refused is None:
        files, notes = _gguf(ctx, settings, out, tokenizer, told)
    arm = json.loads((folder / STUDENTS_FILE).read_text())["arms"][0]  # the one under model/
    said = (*notes, *([] if refused is None else [refused]))
    made = [name for name in settings.formats if name == "hf" or files]
    for name in made:
        use = card.Use(name, tuple(made), files, said)
        text = card.card(ctx, settings, told, arm=arm, parameters=parameters, use=use)
        (ctx.out / name / "README.md").write_text(text)
    size = sum(path.stat().st_size for name in made for path in (ctx.out / name).rglob("*") if path.is_file())
    ctx.progress("export", 1, 1, "formats")
    result = {"formats": made, "path": made[0], "parameters": parameters, "bytes": size, "gguf": files}
    return result if refused is None else {**result, "note": refused}


def _stored_dtype(folder: Path) -> torch.dtype:
    if (folder / models.MODEL_FOLDER / models.STUDENT_FILE).exists():
        return models.working_dtype(models.pick_device())
    return torch.float32


def _refusal(loaded: models.Loaded, settings: ExportSettings) -> str | None:
    """Why there can be no GGUF file, where something else comes out. Raises TaskError where nothing does."""
    try:
        gguf_file.check(loaded.model.config, loaded.tokenizer)
    except TaskError as error:
        if "hf" not in settings.formats:
            raise
        print(f"{error.message}: hf/ is written, gguf/ is not", flush=True)
        return error.message
    return None


def _gguf(
    ctx: Context, settings: ExportSettings, folder: Path, tokenizer: Any, told: card.Story
) -> tuple[dict[str, int], tuple[str, ...]]:
    """gguf/student-FORM.gguf and a Modelfile: sizes in bytes by name, and what llama.cpp does otherwise."""
    out = ctx.out / "gguf"
    out.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for nth, form in enumerate(gguf_file.FORMS):

        def moved(done: int, total: int, before: int = nth) -> None:
            ctx.progress("export", before + done / total, len(gguf_file.FORMS), "files")

        path = out / f"student-{form}.gguf"
        words = gguf_file.write(folder, path, form, tokenizer, name=ctx.task.run, moved=moved)
        sizes[path.name] = path.stat().st_size
    temperature, top_p = _sampling(told, thinks=modelfile.thinks(tokenizer))
    text = modelfile.modelfile(
        tokenizer, f"student-{OLLAMA_TAKES}.gguf", add_bos=words.add_bos, stops=_stops(folder, tokenizer),
        context=_context(folder, told), temperature=temperature, top_p=top_p,
    )  # fmt: skip
    (out / "Modelfile").write_text(text)
    return sizes, words.notes


def _sampling(told: card.Story, *, thinks: bool) -> tuple[float, float | None]:
    """Temperature and top-p as in the evaluation, else as in the answers that it learned from.

    A student that thinks is sampled, however it was evaluated: DeepSeek's and Qwen's cards warn that greedy thoughts
    may repeat without end.
    """
    if told.evaluate is not None and (told.evaluate.seeds > 1 or not thinks):
        return (told.evaluate.temperature, told.evaluate.top_p) if told.evaluate.seeds > 1 else (0.0, None)
    asked = told.label
    return (asked.temperature, asked.top_p) if asked is not None and asked.temperature else (0.6, 0.95)


def _stops(folder: Path, tokenizer: Any) -> list[str]:
    """What ends an answer: the tokenizer's end, and others that the model's generation_config names."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError):
        ends = None
    ids = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in ids if isinstance(i, int) and i < len(tokenizer)]


def _context(folder: Path, told: card.Story) -> int:
    """Tokens that Ollama makes room for: the longest answer learned from and as much as a prompt takes."""
    most = int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    wanted = (told.label.max_new_tokens if told.label is not None else 0) + OLLAMA_CONTEXT // 4
    return min(most, max(OLLAMA_CONTEXT, wanted))
