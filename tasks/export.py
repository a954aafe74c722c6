"""What does the user take home? The student as a Hugging Face folder, as GGUF files with a Modelfile, with a card."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tasks import card, gguf_file, hub, modelfile, models
from tasks.contract import ExportSettings, ModelSource, TaskError
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
    told = card.story(ctx, settings)
    manner = _manner(told, loaded.tokenizer)
    _say_how(out, manner)
    _for_older_readers(out)
    parameters, tokenizer = sum(p.numel() for p in loaded.model.parameters()), loaded.tokenizer
    del loaded  # from here on the weights are on the disk
    gc.collect()
    files: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    if "gguf" in settings.formats and refused is None:
        files, notes = _gguf(ctx, out, tokenizer, told, manner)
    arm = json.loads((folder / STUDENTS_FILE).read_text())["arms"][0]  # the one under model/
    said = (*notes, *([] if refused is None else [refused]))
    made = [name for name in settings.formats if name == "hf" or files]
    licences = _licences(ctx, told)
    for name in made:
        use = card.Use(name, tuple(made), files, said)
        text = card.card(ctx, settings, told, arm=arm, parameters=parameters, use=use)
        (ctx.out / name / "README.md").write_text(text)
        for path in licences:
            shutil.copyfile(path, ctx.out / name / path.name)
    size = sum(path.stat().st_size for name in made for path in (ctx.out / name).rglob("*") if path.is_file())
    ctx.progress("export", 1, 1, "formats")
    result = {"formats": made, "path": made[0], "parameters": parameters, "bytes": size, "gguf": files}
    return result if refused is None else {**result, "note": refused}


def _licences(ctx: Context, told: card.Story) -> list[Path]:
    """Texts of the licence that the student's model had before: most ask to be handed on with it."""
    source = card.origin(ctx, told.train.student) if told.train is not None else ModelSource()
    if source.path is None:
        return []
    try:
        folder = Path(source.path) if Path(source.path).is_dir() else Path(hub.local_path(source, weights=False))
    except TaskError as error:  # fetched before, perhaps on another machine: no reason to fail now
        print(f"{error.message}: its licence is not beside the student", flush=True)
        return []
    return sorted(path for name in hub.LICENCES for path in folder.glob(name) if path.is_file())


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
    ctx: Context, folder: Path, tokenizer: Any, told: card.Story, manner: Manner
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
    text = modelfile.modelfile(
        tokenizer, f"student-{OLLAMA_TAKES}.gguf", add_bos=words.add_bos, stops=_stops(folder, tokenizer),
        context=_context(folder, told), temperature=manner.temperature, top_p=manner.top_p, thinks=manner.thinks,
    )  # fmt: skip
    (out / "Modelfile").write_text(text)
    return sizes, words.notes


@dataclass(frozen=True)
class Manner:
    """How the student is best asked."""

    thinks: bool  # its answers begin with thoughts
    temperature: float  # 0: greedily
    top_p: float | None


def _manner(told: card.Story, tokenizer: Any) -> Manner:
    """Thoughts are known to the template, or stood in most of the answers that it learned from."""
    taught = 2 * int(told.labelled.get("thoughts", 0)) > int(told.labelled.get("kept", 0))
    thinks = taught or modelfile.knows_thoughts(tokenizer)
    return Manner(thinks, *_sampling(told, thinks=thinks))


def _say_how(folder: Path, manner: Manner) -> None:
    """In generation_config.json, which transformers' `generate` and vLLM's server follow, as in the Modelfile.

    It cannot say "greedily" to vLLM: transformers do not write a temperature of 0.
    """
    if manner.temperature:
        there = (folder / "generation_config.json").is_file()  # not of a class that cannot generate by itself
        config = GenerationConfig.from_pretrained(str(folder)) if there else GenerationConfig()
        config.update(do_sample=True, temperature=manner.temperature, top_p=manner.top_p or 1.0, top_k=0)
        config.save_pretrained(str(folder))


def _for_older_readers(folder: Path) -> None:
    """The same said in the names of transformers 4 as well, which would read other positions and no tokenizer at all.

    Since version 5, `rope_parameters` holds the base and the scaling of the positions, `dtype` was `torch_dtype`, a
    tokenizer that is none of a family's is a TokenizersBackend and lists its special tokens under another name.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        for name in {"rope_theta", "partial_rotary_factor"} & rope.keys():
            config.setdefault(name, rope[name])
        scaling = {name: value for name, value in rope.items() if name not in config}
        if rope.get("rope_type") == "longrope":  # three keys and no more
            scaling = {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", scaling)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")


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
    """Tokens that Ollama makes room for: the longest answer learned from or judged, and as much as a prompt takes."""
    most = int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    answers = [asked.max_new_tokens for asked in (told.label, told.evaluate) if asked is not None]
    learned = told.train.max_seq_len if told.train is not None and told.label is None else 0  # others' labels
    return min(most, max(OLLAMA_CONTEXT, learned, max(answers, default=0) + OLLAMA_CONTEXT // 4))
