"""How is a recipe written down so that it explains itself? Every key on a line of its own, with its meaning. Pure."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from orchestrator.recipe import (
    KINDS,
    ApiPart,
    ArchitecturePart,
    ComparePart,
    DataPart,
    LocalPart,
    LoraPart,
    LossPart,
    RecipeSpec,
    SoftLabelsPart,
)

WIDTH = 120
COLUMN = 44  # where a meaning begins; beside a longer line it stands above

PARTS: Mapping[str, type[BaseModel]] = {
    "recipe": RecipeSpec,
    "local": LocalPart,
    "data": DataPart,
    "compare": ComparePart,
    "soft_labels": SoftLabelsPart,
    "api": ApiPart,
    "lora": LoraPart,
    "loss": LossPart,
    "model": ArchitecturePart,
    **KINDS,
}
NESTED = {"student": "model"}  # a key that holds another part than its own name says

# Meaning of a key, by "part.key" or "key" alone. Keys that take a few words only have those named from the types.
WORDS: Mapping[str, str] = {
    "recipe.name": "what the run is called",
    "recipe.budget": "hard cap of everything together, CNY or USD; --budget overrides it",
    "recipe.deadline": "all done within; the plan takes faster machines for it",
    "recipe.idle": "a machine without progress for so long is ended",
    "recipe.bucket": "where all results go: s3://, or file:FOLDER for local and Slurm",
    "recipe.infra": "where it may run: local, slurm/CLUSTER, or clouds; in a stage, too",
    "recipe.gpus": "which cards it may take; left out: every one known; in a stage, too",
    "recipe.spot": "true takes spot machines: cheaper, may be taken away",
    "recipe.local": "this computer",
    "recipe.on_shortfall": "when the money will not last",
    "recipe.allow_account_key": "true lets account-wide rights onto machines: docs/credentials.md",
    "recipe.data": "paths start at this file's folder",
    "recipe.compare": "control rows of the evaluation, priced like everything",
    "recipe.stages": "in this order; `kdcloud plan` shows what each costs",
    "local.price": "what an hour of it costs; 0 USD/h is allowed",
    "data.prompts": 'lines of {"input": "...", "answer": "..."}',
    "data.held_out": "the same, for the evaluation: never trained on",
    "data.verify": "how an answer is compared with the right one",
    "compare.hard_labels": "true also trains without soft labels",
    "compare.seeds": "trained so many times; the mean is shown",
    "compare.learning_rates": "the best of these, for each arm",
    "compare.search_steps": "steps of each try in that search",
    "compare.at_once": "arms that train side by side",
    "name": "a-z, 0-9 and -, at most 12 characters",
    "seed": "of everything random",
    "infra": "where this stage runs; left out: as above",
    "gpus": "which cards this stage may take",
    "threads": "CPU threads; left out: all",
    "batch_size": "at once; left out: what fits",
    "learning_rate": "peak, after the warm-up",
    "pretrain.kind": "makes a small teacher from scratch",
    "pretrain.model": "its shape",
    "pretrain.corpus": "generated text to learn from",
    "pretrain.examples": "how much of it",
    "pretrain.steps": "optimizer steps",
    "pretrain.batch_size": "examples a step",
    "label.kind": "the teacher answers; right answers are kept and scored",
    "label.teacher": "an earlier model stage, owner/name, or a folder",
    "label.api": "the answers come from there",
    "label.samples": "prompts taken: the first so many",
    "label.samples_per_prompt": "answers to each prompt",
    "label.keep": "of the answers to a prompt",
    "label.max_new_tokens": "longest answer, thinking included",
    "label.temperature": "of the sampling; 0 is greedy",
    "label.top_p": "of the sampling",
    "label.soft_labels": "what is kept of the teacher's probabilities",
    "label.engine": "what writes the answers",
    "soft_labels.top_k": "likeliest tokens of each position; 0: hard labels only",
    "soft_labels.temperature": "left out: that of the training",
    "api.base_url": "what stands before /chat/completions",
    "api.model": "as the API calls it",
    "api.key_env": "variable that holds your key; the key itself never stands here",
    "api.input_price": "of a million tokens of prompts: look yours up",
    "api.output_price": "of a million tokens of answers, thinking included",
    "api.max_parallel": "requests at once, 1 to 256",
    "api.requests_per_minute": "your provider's limit",
    "train.kind": "the student learns from the labels",
    "train.student": "owner/name, a folder, or an earlier model stage",
    "train.labels": "a label stage, or a folder of labels",
    "train.method": "lora: adapters; qlora: on weights in 4 bits; full: every weight",
    "train.lora": "the adapters",
    "train.loss": "alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE",
    "train.epochs": "times through the labels; or give steps",
    "train.steps": "optimizer steps; or give epochs",
    "train.batch_size": "samples a step",
    "train.micro_batch": "samples a forward pass; left out: what fits",
    "train.max_seq_len": "longest row, tokens; left out: the longest there is",
    "train.weight_decay": "of AdamW",
    "train.precision": "left out: bf16 where the device has it",
    "train.early_stop_patience": "evaluations after the best one; left out: none is held",
    "lora.r": "rank: more learns more and takes more memory",
    "lora.alpha": "scale; 2 r is usual",
    "lora.dropout": "of the adapters' input",
    "lora.targets": "matrices that get one: q, k, v, o, gate, up, down _proj",
    "loss.alpha": "share of the soft labels, 0 to 1; 0 is hard labels only",
    "loss.temperature": "softens both sides; 2 to 4 is usual",
    "evaluate.kind": "accuracy, speed and memory on held-out prompts",
    "evaluate.student": "a train stage",
    "evaluate.teacher": "beside it: a model or label stage; left out: no teacher row",
    "evaluate.max_new_tokens": "longest answer",
    "evaluate.batch_size": "prompts at once; left out: what fits",
    "evaluate.limit": "at most so many prompts",
    "evaluate.seeds": "answers to each prompt: 1 is greedy, more are sampled",
    "export.kind": "the student as files to take home",
    "export.student": "a train stage",
    "export.formats": "hf: safetensors, tokenizer, model card; gguf: for llama.cpp and Ollama",
    "rehearse.kind": "counted steps and no model",
    "rehearse.steps": "so many",
    "rehearse.seconds_per_step": "what each takes",
    "rehearse.checkpoint_every_steps": "saved so often",
    "model.hidden_size": "width",
    "model.intermediate_size": "width of the MLP",
    "model.num_hidden_layers": "layers",
    "model.num_attention_heads": "heads",
    "model.num_key_value_heads": "heads of keys and values",
}

SAID = ("kind", "formats", "method")  # whose words stand in their meaning, or would lead nowhere

# Keys worth knowing that a recipe may leave out: written as comments, ready to be taken in.
OFFERED: Mapping[str, Mapping[str, Any]] = {
    "recipe": {
        "bucket": "s3://my-bucket/kd",
        "deadline": "12h",
        "gpus": ["RTX3090", "A10G", "A100"],
        "spot": True,
        "on_shortfall": "fewer_samples",
        "allow_account_key": True,
    },
    "label": {"keep": "shortest", "engine": "vllm"},
    "train": {"max_seq_len": 4096, "early_stop_patience": 3},
    "evaluate": {"limit": 200, "seeds": 4},
}


def written(raw: Mapping[str, Any], file: str, about: Sequence[str], *, offer: bool = True) -> str:
    """The recipe as text: a command that runs, what it is about, then every key with its meaning."""
    head = [f"kdcloud plan {shlex.quote(file)}", "", *about, ""]
    head.append(
        "Written by `kdcloud init`. What is left out, the planner chooses and shows; all keys: kdcloud recipe-schema"
    )
    comment = [line for text in head for line in (textwrap.wrap(text, WIDTH - 2) or [""])]
    lines = [f"# {line}".rstrip() for line in comment]
    return "\n".join([*lines, "", *_part("recipe", raw, "", offer)]) + "\n"


def _part(part: str, raw: Mapping[str, Any], indent: str, offer: bool) -> Iterator[str]:
    """Lines of one part in its own order; what it leaves out and may want stands there as a comment."""
    fields = PARTS[part].model_fields
    offered = {key: value for key, value in OFFERED.get(part, {}).items() if offer and _helps(part, key, raw)}
    first = ["name", "kind", "infra", "gpus", "spot"] if part in KINDS else []
    own = [*first, *PARTS[part].__annotations__, *fields]  # what all stages share, a model lists before its own
    for key in dict.fromkeys(key for key in own if key in raw or key in offered):
        if key in raw:
            yield from _key(part, key, raw[key], indent, offer)
        else:
            yield _line(f"{indent}# {key}: {_scalar(offered[key])}", meaning(part, key, offered[key]))


def _helps(part: str, key: str, raw: Mapping[str, Any]) -> bool:
    """Whether an offer says something here: on one's own machine nothing is chosen or rented."""
    return part != "recipe" or raw.get("infra") != "local" or key in ("bucket", "deadline")


def _key(part: str, key: str, value: Any, indent: str, offer: bool) -> Iterator[str]:
    said = meaning(part, key, value)
    if isinstance(value, Mapping):
        yield _line(f"{indent}{key}:", said)
        yield from _part(NESTED.get(key, key), value, f"{indent}  ", offer)
    elif key == "stages":
        yield _line(f"{indent}{key}:", said)
        for number, stage in enumerate(value):
            said = meaning(str(stage["kind"]), "name", stage["name"]) if number == 0 else ""
            yield from ("", _line(f"{indent}  - name: {_scalar(stage['name'])}", said))
            rest = {key: item for key, item in stage.items() if key != "name"}
            yield from _part(str(stage["kind"]), rest, f"{indent}    ", offer)
    else:
        yield _line(f"{indent}{key}: {_scalar(value)}", said)


def _line(text: str, said: str) -> str:
    if not said:
        return text
    if len(text) < COLUMN:
        return f"{text:<{COLUMN}}  # {said}"
    indent = text[: len(text) - len(text.lstrip())]
    return f"{indent}# {said}\n{text}"


def meaning(part: str, key: str, value: Any) -> str:
    """What a key means, and the other words that it takes."""
    field = PARTS[part].model_fields[key]
    said = WORDS.get(f"{part}.{key}") or WORDS.get(key) or field.description or ""
    values = value if isinstance(value, list | tuple) else [value]
    others = [] if key in SAID else [word for word in _choices(field.annotation) if word not in values]
    word = "also" if isinstance(value, list | tuple) else "or"
    return f"{said}; {word} {', '.join(map(str, others))}" if others else said


def _choices(annotation: Any) -> Sequence[Any]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for one in get_args(annotation) if (found := _choices(one))), ())


def _scalar(value: Any) -> str:
    """A value on one line, quoted where YAML wants it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
