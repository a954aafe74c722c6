"""What should a stranger know of the student? Its model card: quality, data, training, licences, how to run it.

Everything that comes from recipes, models or their cards is text of others: escaped, on one line, of bounded length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tasks.contract import (
    EvaluateSettings,
    ExportSettings,
    LabelSettings,
    ModelSource,
    TaskError,
    TrainSettings,
)
from tasks.stage import Context

UNKNOWN = "unknown"
ROLES = {
    "student": "this student",
    "student_before": "the student before",
    "student_hard": "the same on hard labels only",
    "student_hard_2x": "the same on hard labels, twice the steps",
    "teacher": "the teacher",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Licences that the hub knows by these names (hub-docs, "Licenses"); every other is `other` there, with its own name.
_HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "gemma",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
}  # fmt: skip
_LONGEST = 200  # characters of somebody else's text
_MARKS = re.compile(r"([\\`*_{}\[\]<>#!|~&$@]|:(?=//))")  # no address becomes a link of itself
S = TypeVar("S")


@dataclass(frozen=True)
class Licence:
    name: str  # as the hub names it; UNKNOWN
    source: str  # where that stands, or where to look


@dataclass(frozen=True)
class Use:
    """The folder that a card lies in, and what else there is."""

    folder: str  # hf or gguf
    made: tuple[str, ...]
    files: Mapping[str, int]  # GGUF files by name, bytes
    notes: tuple[str, ...] = ()  # in words


@dataclass(frozen=True)
class Story:
    """What the earlier stages were asked and what came out; None for what is not known here."""

    train: TrainSettings | None
    trained: Mapping[str, Any]
    label: LabelSettings | None
    labelled: Mapping[str, Any]
    evaluate: EvaluateSettings | None
    evaluated: Mapping[str, Any]
    base: str | None  # the student's model before: its name on the hub, or a folder's
    teacher: str | None
    base_licence: Licence | None
    teacher_licence: Licence | None


def story(ctx: Context, settings: ExportSettings) -> Story:
    """Read from the bucket: orders and results of the stages before, no files of theirs."""
    train, trained = _told(ctx, settings.student, TrainSettings)
    label, labelled = _told(ctx, train.labels if train else None, LabelSettings)
    evaluation = settings.origin.evaluation if settings.origin else None
    evaluate, evaluated = _told(ctx, evaluation, EvaluateSettings)
    known = settings.origin.licences if settings.origin else {}
    base = origin(ctx, train.student) if train else None
    teacher = origin(ctx, label.teacher) if label and label.api is None else None
    return Story(
        train, trained, label, labelled, evaluate, evaluated, _name(base), _name(teacher) if label else None,
        _licence(base, known), _licence(teacher, known),
    )  # fmt: skip


def card(
    ctx: Context, settings: ExportSettings, told: Story, *, arm: Mapping[str, Any], parameters: int, use: Use
) -> str:
    """README.md. `arm`: how the exported student was trained."""
    parts = [
        _front(told),
        f"# {text(ctx.task.run)}: {text(told.base) if told.base else 'a small model'}, distilled",
        _summary(told, parameters),
        "## Quality\n\n" + "\n".join(_quality(told)),
        "## Data\n\n" + "\n".join(_data(told)),
        "## Training\n\n" + _table(("", ""), _training(told, arm)),
        "## Licences\n\n" + "\n".join(_licences(told)),
        "## How to run it\n\n" + "\n".join(_use(use)),
        "## Where it comes from\n\n" + "\n".join(_origin(ctx, settings)),
    ]
    return "\n\n".join(parts) + "\n"


def text(value: object) -> str:
    """Somebody else's text as plain words in Markdown, on one line."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 1] + "…"
    return _MARKS.sub(r"\\\1", line)


# --- what came before ------------------------------------------------------------------------------------------------


def _told(ctx: Context, stage: str | None, kind: type[S]) -> tuple[S | None, Mapping[str, Any]]:
    found = ctx.told(stage) if stage is not None else None
    if found is None or not isinstance(found[0].settings, kind):
        return None, {}
    return found[0].settings, found[1]


def origin(ctx: Context, source: ModelSource) -> ModelSource:
    """The model that it began with, before the stages of this run."""
    for _ in range(20):  # each stage refers to an earlier one
        if source.stage is None:
            return source
        train, _ = _told(ctx, source.stage, TrainSettings)
        if train is None:
            return ModelSource()
        source = train.student
    return source


def _name(source: ModelSource | None) -> str | None:
    if source is None or source.path is None:
        return None
    return Path(source.path).name if Path(source.path).is_absolute() else source.path


def _licence(source: ModelSource | None, known: Mapping[str, str]) -> Licence | None:
    """Of a model with a name; from the files beside it, else the catalogue."""
    if source is None or source.path is None:
        return None
    if Path(source.path).is_dir():
        return _stated(Path(source.path)) or Licence(UNKNOWN, "ask who gave you that folder")
    if source.path in known:
        return Licence(known[source.path], f"kdcloud's catalogue, from the model's card on the hub ({source.path})")
    return Licence(UNKNOWN, f"look at its card: huggingface.co/{source.path}")


def _stated(folder: Path) -> Licence | None:
    """What a model's own folder says."""
    try:
        parts = (folder / "README.md").read_text(errors="replace").split("---", 2)
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, yaml.YAMLError):
        front = None
    if isinstance(front, dict):
        named = front.get("license_name") if front.get("license") == "other" else front.get("license")
        if isinstance(named, str) and named.strip():
            return Licence(named.strip(), "the README.md in its folder")
    if (folder / "LICENSE").is_file():
        return Licence("see its LICENSE", "the LICENSE in its folder")
    return None


# --- the card's parts ------------------------------------------------------------------------------------------------


def _front(told: Story) -> str:
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    licence = UNKNOWN if told.base_licence is None else told.base_licence.name
    if licence in _HUB_LICENCES:
        front["license"] = licence
    elif licence != UNKNOWN:
        front |= {"license": "other", "license_name": _slug(licence)}
    if told.base is not None and _HUB_NAME.fullmatch(told.base):
        front["base_model"] = told.base
    front["tags"] = ["knowledge-distillation", "kdcloud"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _slug(name: str) -> str:
    """As the hub wants the name of a licence that it does not know."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:_LONGEST] or UNKNOWN


def _summary(told: Story, parameters: int) -> str:
    teacher = text(told.teacher) if told.teacher else "a teacher"
    if told.label is not None and told.label.api is not None:
        teacher = f"{text(told.label.api.model)} (behind an API)"
    soft = told.label is None or told.label.top_k > 0
    lessons = "its probabilities of each token" if soft and (told.train is None or told.train.alpha) else "its answers"
    return f"{parameters:,} parameters. It learned from answers that {teacher} wrote, and from {lessons}."


def _quality(told: Story) -> Iterator[str]:
    quality, asked = told.evaluated.get("quality"), told.evaluate
    if not isinstance(quality, dict) or asked is None:
        yield "It was not evaluated before it was exported."
        return
    rows = []
    for role, what in ROLES.items():
        found = quality.get(role)
        if found:
            accuracy, kl = found["accuracy"], found.get("kl_to_teacher")
            low, high = accuracy["interval"]
            apart = "" if kl is None else f"{kl:.3f}"
            rows.append((what, f"{accuracy['mean']:.1%}", f"{low:.1%} to {high:.1%}", apart))
    yield _table(("", "right answers", "95 % interval", "nats a token from the teacher"), rows)
    count = next((found["accuracy"]["n"] for found in quality.values() if found), 0)
    how = "greedy" if asked.seeds == 1 else f"{asked.seeds} answers each, at temperature {asked.temperature:g}"
    yield (
        f"\n{count:,} held-out problems ({text(_file(asked.held_out.source))}), {how}, at most "
        f"{asked.max_new_tokens:,} new tokens, judged by `verify: {asked.verify}`. Several students of one kind are "
        "averaged; this one is the first."
    )


def _data(told: Story) -> Iterator[str]:
    label, found = told.label, told.labelled
    if label is None:
        labels = told.train.labels if told.train else UNKNOWN
        yield f"Labels that were made before this run ({text(labels)})."
        return
    dropped = ", ".join(f"{count:,} {text(why)}" for why, count in (found.get("dropped") or {}).items())
    yield f"- Prompts: {text(_file(label.prompts.source))}, {_count(found.get('prompts'))} of them"
    yield (
        f"- Answers: {_count(found.get('generated'))} sampled at temperature {label.temperature:g}, top-p "
        f"{label.top_p:g}, at most {label.max_new_tokens:,} tokens; {_count(found.get('kept'))} kept "
        f"(`keep: {label.keep}`, judged by `verify: {label.verify}`)" + (f"; dropped: {dropped}" if dropped else "")
    )
    mass = found.get("mass_inside_mean")
    inside = "" if mass is None else f", which hold {mass:.2%} of the teacher's probability on the mean"
    soft = f"the {label.top_k} likeliest tokens at each place{inside}" if label.top_k else "none: answers only"
    yield f"- Soft labels: {soft}"
    yield f"- Tokens learned from: {_count(found.get('tokens'))}"


def _training(told: Story, arm: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    train = told.train
    if train is not None:
        soft = arm["kind"] == "soft"
        alpha = train.alpha if soft else 0.0
        if train.method != "full":
            lora = train.lora
            yield (
                "method",
                f"{train.method}, r {lora.r}, alpha {lora.alpha}, on {text(', '.join(lora.targets))}; merged",
            )
        else:
            yield "method", "all weights"
        yield "loss", f"{alpha:g} · T² KL(teacher, student) + {1 - alpha:g} · cross-entropy, T = {train.temperature:g}"
        yield "batch", f"{train.batch_size} samples of at most {train.max_seq_len:,} tokens"
        yield "optimizer", f"{train.optimizer}, weight decay {train.weight_decay:g}, warm-up {train.warmup_share:.0%}"
    yield "labels", "soft and hard" if arm["kind"] == "soft" else "hard"
    yield "learning rate", f"{arm['learning_rate']:g}"
    yield "optimizer steps", f"{arm['steps']:,}"
    yield "supervised tokens seen", f"{arm['tokens']:,}"
    yield "final training loss", f"{arm['final_loss']:.4f}"
    yield "seed", str(arm.get("seed", 0))


def _licences(told: Story) -> Iterator[str]:
    if told.base is None:
        yield "- Student: made from scratch, so its licence is its maker's to choose"
    else:
        yield f"- Student, from {text(told.base)}: {_licence_words(told.base_licence)}"
    if told.label is not None and told.label.api is not None:
        yield f"- Teacher, {text(told.label.api.model)}: the terms of the API that it answered through"
    elif told.teacher is not None:
        yield f"- Teacher, {text(told.teacher)}: {_licence_words(told.teacher_licence)}"
    elif told.label is not None:
        yield "- Teacher: made from scratch in the same run"
    else:
        yield f"- Teacher: {UNKNOWN}; look at the run that made the labels"
    yield (
        "\nThe student's weights stay under the licence of the model that they began with. Whether a teacher's answers "
        "may train other models, and under which name, is for the teacher's licence to say: read both before you "
        "pass this on."
    )


def _licence_words(licence: Licence | None) -> str:
    return UNKNOWN if licence is None else f"{text(licence.name)} ({text(licence.source)})"


def _use(use: Use) -> Iterator[str]:
    """Commands for the folder that the card lies in: it may have been copied somewhere without the other one."""
    sizes = ", ".join(f"`{name}` ({size / 1e6:,.1f} MB)" for name, size in use.files.items())
    if use.folder == "hf":
        yield (
            "In this folder (or with its name on the hub instead of the dot):\n\n"
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
            'asked = [{"role": "user", "content": "What is 12+34?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    asked, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
            "answer = model.generate(**inputs, max_new_tokens=512)\n"
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]))\n```'
        )
        if use.files:
            yield f"\nFor llama.cpp and Ollama, in `gguf/` beside this folder (on the hub, in it): {sizes}. There:"
    else:
        yield f"In this folder, with llama.cpp, LM Studio and Ollama: {sizes}.\n"
    if use.files:
        yield "\n```sh" if use.folder == "hf" else "```sh"
        yield "ollama create student -f Modelfile && ollama run student"
        yield f"llama-cli -m {list(use.files)[-1]} --jinja\n```"
    if use.folder == "gguf" and "hf" in use.made:
        yield "\nFor transformers and vLLM: `hf/` beside this folder."
    yield from (f"\nNote: {text(note)}." for note in use.notes)


def _origin(ctx: Context, settings: ExportSettings) -> Iterator[str]:
    origin = settings.origin
    yield f"- Run: {text(ctx.task.run)}, stage {text(settings.student)}"
    if origin is not None:
        yield f"- Recipe: {text(origin.recipe)}, sha256 of its text `{_hex(origin.recipe_sha256)}`"
        yield f"- Made with kdcloud {text(origin.version)}"


def _hex(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{0,64}", digest):
        raise TaskError("the recipe's hash is none", hint="start the run from an unchanged kdcloud")
    return digest


def _file(source: str) -> str:
    """A file of prompts by its own name: its key in the bucket begins with a hash."""
    return re.sub(r"^data/[0-9a-f]{12}-", "", source)


def _count(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
