"""How good, how fast and how large are teacher and students on problems that none of them has seen?"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tasks import models, verify
from tasks.contract import EvaluateSettings, ModelSource, TaskError, build
from tasks.label import Completion, TransformersGenerator
from tasks.labels import TOKENIZER_FOLDER
from tasks.stage import Context, Stopped
from tasks.train import STUDENTS_FILE

ROLES = ("teacher", "student_before", "student_hard", "student", "student_hard_2x")
_ROLE_OF_KIND = {"soft": "student", "hard": "student_hard", "hard_2x": "student_hard_2x"}
LATENCY_PROMPTS = 5
SAMPLES_SHOWN = 12


@dataclass(frozen=True)
class Measured:
    """One model on the held-out prompts."""

    right: list[bool]
    texts: list[str]
    tokens_per_s: float  # new tokens a second, batched
    first_token_s: float  # median over a few prompts, batch 1
    peak_gib: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def run(ctx: Context, settings: EvaluateSettings) -> dict[str, Any]:
    """Quality by role; a role nobody trained is null. Answers are greedy and judged like the labels."""
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("prepare", declared=True)
    rows = ctx.data(settings.held_out)[: settings.limit]
    if not rows:
        raise TaskError("there are no held-out prompts", hint="set data.held_out in the recipe")
    if settings.verify not in ("exact", "math"):
        raise TaskError(f"verify: {settings.verify} cannot tell right answers", hint="use exact or math to evaluate")
    candidates = _candidates(ctx, settings)
    measured: dict[str, list[Measured]] = {role: [] for role in ROLES}
    for index, (role, load) in enumerate(candidates):
        if ctx.stopping:
            raise Stopped
        ctx.progress("evaluate", index, len(candidates), "models")
        measured[role].append(_measure(ctx, load(), rows, settings, index, len(candidates)))
    result = {
        "quality": {role: _quality(found) for role, found in measured.items()},
        "samples": _samples(rows, measured),
    }
    note = verify.note(settings.verify)
    return result if note is None else {**result, "note": note}


def _candidates(ctx: Context, settings: EvaluateSettings) -> list[tuple[str, Any]]:
    """(role, how to load it) of everything there is to measure; one model is in memory at a time."""
    dtype = models.working_dtype(models.pick_device())
    folder = ctx.input(settings.student)
    if not (folder / STUDENTS_FILE).exists():
        raise TaskError(f"{settings.student} trained no student", hint="name a train stage under student")
    students = json.loads((folder / STUDENTS_FILE).read_text())
    found: list[tuple[str, Any]] = []
    if settings.teacher is not None:
        teacher = settings.teacher
        found.append(("teacher", lambda: models.load(ctx, teacher, dtype=dtype)))
    found.append(("student_before", lambda: _before(ctx, folder, students["before"], dtype)))
    for arm in students["arms"]:
        role = _ROLE_OF_KIND[arm["kind"]] if len(students["arms"]) > 1 else "student"
        found.append((role, lambda path=arm["path"]: models.load_stage(folder, ctx, dtype=dtype, name=path)))
    return found


def _before(ctx: Context, folder: Path, before: dict[str, Any], dtype: torch.dtype) -> models.Loaded:
    if "folder" in before:
        return models.load_stage(folder, ctx, dtype=dtype, name=before["folder"])
    model = models.load(ctx, build(ModelSource, before["source"]), dtype=dtype).model
    # Asked as the trained student is asked: with the teacher's tokenizer and template.
    return models.Loaded(model, models.load_tokenizer(ModelSource(path=str(folder / TOKENIZER_FOLDER))))


def _measure(
    ctx: Context, loaded: models.Loaded, rows: list[dict[str, Any]], settings: EvaluateSettings, index: int, total: int
) -> Measured:
    device = models.pick_device()
    model, tokenizer = loaded.model.to(device).eval(), loaded.tokenizer
    models.reset_peak(device)
    thinking = models.opens_thinking(tokenizer)
    prompts = [models.prompt_ids(tokenizer, row["input"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    generator = TransformersGenerator(model, tokenizer, settings.max_new_tokens)
    generator.generate(prompts[:1], seed=0)  # warm-up, not counted
    answers: dict[int, Completion] = {}
    seconds = 0.0
    for at in range(0, len(order), settings.batch_size):
        if ctx.stopping:
            raise Stopped
        batch = order[at : at + settings.batch_size]
        started = time.monotonic()
        found = generator.generate([prompts[i] for i in batch], seed=0)
        seconds += time.monotonic() - started
        answers.update(zip(batch, found, strict=True))
        ctx.progress("evaluate", index + len(answers) / len(rows), total, "models")
    texts = [tokenizer.decode(answers[i].ids, skip_special_tokens=True) for i in range(len(rows))]
    right = [
        verify.check(settings.verify, text, row["answer"], thinking=thinking).ok
        for row, text in zip(rows, texts, strict=True)
    ]
    return Measured(
        right=right, texts=texts,
        tokens_per_s=sum(len(a.ids) for a in answers.values()) / seconds,
        first_token_s=_first_token_s(model, tokenizer, prompts[:LATENCY_PROMPTS]),
        peak_gib=models.peak_gib(device),
    )  # fmt: skip


def _first_token_s(model: Any, tokenizer: Any, prompts: list[list[int]]) -> float:
    generator = TransformersGenerator(model, tokenizer, 1)
    generator.generate(prompts[:1], seed=0)
    seconds = []
    for prompt in prompts:
        started = time.monotonic()
        generator.generate([prompt], seed=0)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def _quality(found: list[Measured]) -> dict[str, Any] | None:
    if not found:
        return None
    accuracies = [one.accuracy for one in found]
    return {
        "accuracy": {
            "mean": statistics.fmean(accuracies), "min": min(accuracies), "max": max(accuracies),
            "n": len(found[0].right), "seeds": accuracies,
        },
        "tokens_per_s": statistics.fmean(one.tokens_per_s for one in found),
        "first_token_s": statistics.median(one.first_token_s for one in found),
        "peak_gib": max(one.peak_gib for one in found),
    }  # fmt: skip


def _samples(rows: list[dict[str, Any]], measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """A dozen problems with everybody's words: half of them wrong ones of the student, as far as there are any."""
    student = measured["student"][0] if measured["student"] else None
    right = [i for i in range(len(rows)) if student is None or student.right[i]]
    wrong = [i for i in range(len(rows)) if student is not None and not student.right[i]]
    half = SAMPLES_SHOWN // 2
    picked = wrong[: max(half, SAMPLES_SHOWN - len(right))]
    picked = right[: SAMPLES_SHOWN - len(picked)] + picked
    shown = []
    for i in picked:
        said = {role: found[0].texts[i] for role, found in measured.items() if found}
        ok = {role: found[0].right[i] for role, found in measured.items() if found}
        shown.append({"input": rows[i]["input"], "answer": rows[i]["answer"], **said, "right": ok})
    return shown
