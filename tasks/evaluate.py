"""How good, how fast and how large are teacher and students on problems that none of them has seen?

Right is what `verify` says of the part behind `</think>`. pass@1 is the share of right answers, over all problems and
seeds; its interval treats problems as the independent unit (intervals.pass_interval). The divergence is that of the
student from the teacher on the teacher's own answers, token by token, over the whole vocabulary, in nats.

vLLM writes the answers where it is (several times faster); it holds a copy of the weights of its own, so each model is
served first and loaded after that, for its latency, its memory and its divergence.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks import models, verify
from tasks.contract import EvaluateSettings, ModelSource, TaskError, Writing, build
from tasks.crew import Crew
from tasks.generate import (
    Completion,
    Generator,
    Moved,
    TransformersGenerator,
    VllmGenerator,
    free_memory,
    rows_that_fit,
    wants_vllm,
)
from tasks.intervals import pass_interval
from tasks.label import SCORE_TOKENS, batches
from tasks.labels import TOKENIZER_FOLDER
from tasks.peers import take_gpu
from tasks.stage import Context, Stopped
from tasks.train import STUDENTS_FILE

ROLES = ("teacher", "student_before", "student_hard", "student", "student_hard_2x")
_ROLE_OF_KIND = {"soft": "student", "hard": "student_hard", "hard_2x": "student_hard_2x"}
LATENCY_PROMPTS = 5
SERVED_TOKENS = 64  # new ones of the few answers that show what memory a model takes, where vLLM wrote the others
SAMPLES_SHOWN = 12
KL_TOKENS = 16384  # of the teacher's answers: the divergence is taken over so many
KL_ELEMENTS = 1 << 25  # logits of one model held at once


@dataclass(frozen=True)
class Measured:
    """One model on the held-out prompts."""

    right: list[list[bool]]  # by seed, then by problem
    texts: list[str]  # of the first seed
    tokens_per_s: float  # new tokens a second and GPU, batched, of the engine that wrote
    first_token_s: float  # median over a few prompts, batch 1, by transformers
    peak_gib: float  # by transformers: vLLM takes whatever there is
    engine: str = "transformers"  # what wrote the answers
    kl_to_teacher: float | None = None  # nats a token
    lm_eval: dict[str, dict[str, float]] | None = None  # number by metric, by task
    cut_share: float | None = None  # of its answers, all seeds
    loop_share: float | None = None

    @property
    def accuracies(self) -> list[float]:
        """By seed."""
        return [sum(right) / len(right) for right in self.right]

    @property
    def shares(self) -> list[float]:
        """By problem: right answers over the seeds."""
        return [sum(problem) / len(self.right) for problem in zip(*self.right, strict=True)]


def run(ctx: Context, settings: EvaluateSettings) -> dict[str, Any]:
    """Quality by role; a role nobody trained is null. Answers are judged like the labels."""
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("prepare", declared=True)
    rows = ctx.data(settings.held_out)[: settings.limit]
    if not rows:
        raise TaskError("there are no held-out prompts", hint="set data.held_out in the recipe")
    if settings.verify not in ("exact", "math"):
        raise TaskError(f"verify: {settings.verify} cannot tell right answers", hint="use exact or math to evaluate")
    if settings.lm_eval:
        _harness()
    engine = "vllm" if wants_vllm(settings.engine, models.pick_device()) else "transformers"
    candidates, crew = _candidates(ctx, settings), Crew.of(ctx)
    try:
        return _judge_all(ctx, settings, rows, candidates, engine, crew)
    except Stopped:
        crew.stop()
        raise


def follow(ctx: Context, settings: EvaluateSettings) -> None:
    """What the other processes of a machine do: they write their part of every model's answers, on a GPU each."""
    models.quiet()
    models.set_threads(settings.threads)
    crew = Crew.of(ctx)
    if crew.size == 1:
        print("an evaluation is shared out on one machine: this process leaves")
        return
    take_gpu(os.environ)
    rows = ctx.data(settings.held_out)[: settings.limit]
    engine = "vllm" if wants_vllm(settings.engine, models.pick_device()) else "transformers"
    candidates = _candidates(ctx, settings)
    with suppress(Stopped):
        for index, (_, load, place) in enumerate(candidates):
            crew.stop_if_told()
            free_memory()
            _answers(ctx, load(), place, rows, settings, index, len(candidates), engine, crew)


def _judge_all(
    ctx: Context, settings: EvaluateSettings, rows: list[dict[str, Any]],
    candidates: list[tuple[str, Any, ModelSource | None]], engine: str, crew: Crew,
) -> dict[str, Any]:  # fmt: skip
    reference: Reference | None = None
    measured: dict[str, list[Measured]] = {role: [] for role in ROLES}
    for index, (role, load, place) in enumerate(candidates):
        if ctx.stopping:
            raise Stopped
        loaded = None  # before the next one: two of them need not fit
        free_memory()
        ctx.progress("load", declared=True)
        loaded = load()
        ctx.progress("evaluate", index, len(candidates), "models")
        found, answers = _measure(ctx, loaded, place, rows, settings, index, len(candidates), engine, crew)
        if role == "teacher":
            reference = _reference(loaded, rows, answers)
        elif reference is not None:
            found = replace(found, kl_to_teacher=_kl(loaded, reference))
        if settings.lm_eval:
            found = replace(found, lm_eval=_lm_eval(ctx, loaded, settings))
        measured[role].append(found)
    result = {
        "quality": {role: _quality(found) for role, found in measured.items()},
        "samples": _samples(rows, measured),
        "engine": "+".join(sorted({one.engine for found in measured.values() for one in found})),
    }
    note = verify.note(settings.verify)
    return result if note is None else {**result, "note": note}


def _candidates(ctx: Context, settings: EvaluateSettings) -> list[tuple[str, Any, ModelSource | None]]:
    """(role, how to load it, where its weights lie whole) of everything there is to measure."""
    dtype = models.working_dtype(models.pick_device())
    folder = ctx.input(settings.student)
    if not (folder / STUDENTS_FILE).exists():
        raise TaskError(f"{settings.student} trained no student", hint="name a train stage under student")
    students = json.loads((folder / STUDENTS_FILE).read_text())
    found: list[tuple[str, Any, ModelSource | None]] = []
    if settings.teacher is not None:
        teacher = settings.teacher
        found.append(("teacher", lambda: models.load(ctx, teacher, dtype=dtype), _whole(teacher)))
    before = students["before"]
    place = None if "folder" in before else _whole(build(ModelSource, before["source"]))
    found.append(("student_before", lambda: _before(ctx, folder, before, dtype), place))
    for arm in students["arms"]:
        role = _ROLE_OF_KIND[arm["kind"]] if len(students["arms"]) > 1 else "student"
        found.append((role, lambda path=arm["path"]: models.load_stage(folder, ctx, dtype=dtype, name=path), None))
    return found


def _whole(source: ModelSource) -> ModelSource | None:
    return source if source.stage is None else None


def _before(ctx: Context, folder: Path, before: dict[str, Any], dtype: torch.dtype) -> models.Loaded:
    if "folder" in before:
        return models.load_stage(folder, ctx, dtype=dtype, name=before["folder"])
    model = models.load(ctx, build(ModelSource, before["source"]), dtype=dtype).model
    # Asked as the trained student is asked: with the teacher's tokenizer and template.
    return models.Loaded(model, models.load_tokenizer(ModelSource(path=str(folder / TOKENIZER_FOLDER))))


def _measure(
    ctx: Context, loaded: models.Loaded, place: ModelSource | None, rows: list[dict[str, Any]],
    settings: EvaluateSettings, index: int, total: int, engine: str, crew: Crew,
) -> tuple[Measured, list[Completion]]:  # fmt: skip
    """The figures, and the answers of the first seed."""
    tokenizer = loaded.tokenizer
    by_seed, written, engine = _answers(ctx, loaded, place, rows, settings, index, total, engine, crew)
    texts = [[tokenizer.decode(each[i].ids, skip_special_tokens=True) for i in range(len(rows))] for each in by_seed]
    measured = Measured(
        right=[
            _judged(ctx, settings, rows, said, thinking=models.opens_thinking(tokenizer)) for said in texts
        ],
        texts=texts[0],
        tokens_per_s=sum(len(answer.ids) for each in by_seed for answer in each.values()) / written.seconds,
        first_token_s=_first_token_s(loaded.model, tokenizer, written.prompts[:LATENCY_PROMPTS]),
        peak_gib=models.peak_gib(models.pick_device()),
        engine=engine,
        cut_share=statistics.fmean(one.finish_reason == "length" for each in by_seed for one in each.values()),
        loop_share=statistics.fmean(one.loops for each in by_seed for one in each.values()),
    )  # fmt: skip
    return measured, [by_seed[0][i] for i in range(len(rows))]


def _answers(
    ctx: Context, loaded: models.Loaded, place: ModelSource | None, rows: list[dict[str, Any]],
    settings: EvaluateSettings, index: int, total: int, engine: str, crew: Crew,
) -> tuple[list[dict[int, Completion]], _Written, str]:  # fmt: skip
    """By seed, then by prompt, and what wrote them. Whoever does not lead hands in its own part."""
    device = models.pick_device()
    tokenizer = loaded.tokenizer
    prompts = [models.prompt_ids(tokenizer, row["input"]) for row in rows]
    written = _Written(ctx, settings, prompts, index, total, crew)
    by_seed: list[dict[int, Completion]] | None = None
    if engine == "vllm":
        ctx.progress("load", declared=True)  # the weights once more, compiling, room for the cache: minutes
        by_seed = _served(ctx, loaded, place, settings, prompts, index, written)
        free_memory()
    plain = by_seed is None
    if by_seed is not None and not crew.leads:
        return by_seed, written, engine
    model = loaded.model.to(device).eval()
    models.reset_peak(device)
    if by_seed is not None:
        few = TransformersGenerator(model, tokenizer, min(SERVED_TOKENS, settings.max_new_tokens))
        few.generate(prompts[:LATENCY_PROMPTS], seed=0)
    else:
        size = settings.batch_size
        if settings.engine == "auto" and device.type == "cuda":  # meant for an engine which packs its own batches
            free, _ = torch.cuda.mem_get_info(device)
            size = rows_that_fit(model.config, free, max(map(len, prompts)) + settings.max_new_tokens, size)
        by_seed = written.all(_plain(model, tokenizer, settings, written.moved), size)
    return by_seed, written, "transformers" if plain else "vllm"


class _Written:
    """Answers to all prompts, once a seed, with their seconds; of all processes together."""

    def __init__(
        self, ctx: Context, settings: EvaluateSettings, prompts: list[list[int]], index: int, total: int, crew: Crew
    ) -> None:
        self._ctx, self._settings, self.prompts, self._index, self._total = ctx, settings, prompts, index, total
        self._crew, self._seed, self._answers, self._size, self._mine = crew, 0, 0, 1, len(prompts)
        self._highest = float(index)
        self._counts = False  # not while one answer warms the engine up
        self.seconds = 0.0

    def moved(self, share: float, writing: Writing | None = None, /) -> None:
        """`share` of a batch is written: minutes, where answers are long."""
        if not self._counts:
            share, writing = 0.0, None
        part = self._answers + share * min(self._size, self._mine - self._answers)
        done = self._index + (self._seed + part / max(1, self._mine)) / self._settings.seeds
        numbers: dict[str, float] = {}
        if writing is not None:
            before = self._seed * self._mine + self._answers
            later = self._settings.seeds * self._mine - before - writing.answers
            numbers = replace(writing, before=before, later=later).of_all(self._crew.size).numbers()
            numbers["tokens_per_s"] = writing.tokens / max(writing.seconds, 1e-9)
        done = self._crew.done("evaluate", done) / self._crew.size
        self._highest = max(self._highest + 1e-9, done)  # how much is to come is estimated anew all the while
        done = min(self._highest, self._index + 1.0)
        self._ctx.progress("evaluate", done, self._total, "models", declared=False, **numbers)
        if self._ctx.stopping:
            raise Stopped
        self._crew.stop_if_told()

    def all(self, generator: Generator, size: int, *, own_seeds: bool = False) -> list[dict[int, Completion]]:
        """By seed, then by prompt. `size` prompts at a time, alike lengths together; each process takes whole batches.
        `own_seeds`: every prompt of a batch draws for itself, by its place, so that batches may be cut anywhere."""
        generator.generate(self.prompts[:1], seed=0)  # warm-up, not counted
        self._counts = True
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        if own_seeds:
            size = math.ceil(min(size, len(order)) / self._crew.size)
        mine = [at for n, at in enumerate(range(0, len(order), size)) if self._crew.scores(n)]
        self._size, self._mine = size, sum(len(order[at : at + size]) for at in mine)
        by_seed: list[dict[int, Completion]] = []
        for seed in range(self._settings.seeds):
            answers: dict[int, Completion] = {}
            self._seed, self._answers = seed, 0
            for at in mine:
                batch = order[at : at + size]
                started = time.monotonic()
                found = generator.generate([self.prompts[i] for i in batch], seed=seed * 1_000_003 + at)
                self.seconds += time.monotonic() - started
                answers.update(zip(batch, found, strict=True))
                self._answers = len(answers)
                self.moved(0.0)
            by_seed.append(answers)
        return self._together(by_seed)

    def _together(self, by_seed: list[dict[int, Completion]]) -> list[dict[int, Completion]]:
        """With what the others wrote; whoever does not lead hands in its own."""
        if not self._crew.leads:
            answers = [[[i, one.ids, one.finish_reason] for i, one in each.items()] for each in by_seed]
            self._crew.say(f"answers-{self._index}-{self._crew.rank}", [self.seconds, answers])
            return by_seed
        for rank in range(1, self._crew.size):
            seconds, told = self._crew.heard(f"answers-{self._index}-{rank}", lambda: self.moved(0.0))
            self.seconds += seconds
            for each, answers in zip(by_seed, told, strict=True):
                each.update({i: Completion(ids, reason) for i, ids, reason in answers})
        return by_seed


def _temperature(settings: EvaluateSettings) -> float:
    return settings.temperature if settings.seeds > 1 else 0.0


def _plain(model: Any, tokenizer: Any, settings: EvaluateSettings, moved: Moved) -> Generator:
    return TransformersGenerator(
        model, tokenizer, settings.max_new_tokens, temperature=_temperature(settings), top_p=settings.top_p, moved=moved
    )


def _served(
    ctx: Context, loaded: models.Loaded, place: ModelSource | None, settings: EvaluateSettings,
    prompts: list[list[int]], index: int, written: _Written,
) -> list[dict[int, Completion]] | None:  # fmt: skip
    """What vLLM answers, which wants the weights whole in a folder: an adapter is merged into its base for it.

    None where it cannot serve this model (its kind, or answers longer than its positions) and need not.
    """
    folder = ctx.work / f"served-{index}"
    if place is None:
        models.save(folder, loaded.model, loaded.tokenizer)
        place = ModelSource(path=str(folder))
    try:
        generator = VllmGenerator(
            place, loaded.tokenizer, settings.max_new_tokens, longest_prompt=max(map(len, prompts)),
            temperature=_temperature(settings), top_p=settings.top_p, moved=written.moved,
        )  # fmt: skip
    except TaskError as error:
        if settings.engine == "vllm":
            raise
        print(f"transformers write the answers of this model: {error}", flush=True)
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # it is loaded
    return written.all(generator, len(prompts), own_seeds=True)


def _judged(
    ctx: Context, settings: EvaluateSettings, rows: list[dict[str, Any]], texts: list[str], *, thinking: bool
) -> list[bool]:
    right = []
    for row, text in zip(rows, texts, strict=True):
        right.append(verify.check(settings.verify, text, row["answer"], thinking=thinking).ok)
        ctx.progress("verify", len(right), len(rows), "answers")
    return right


def _first_token_s(model: Any, tokenizer: Any, prompts: list[list[int]]) -> float:
    generator = TransformersGenerator(model, tokenizer, 1)
    generator.generate(prompts[:1], seed=0)
    seconds = []
    for prompt in prompts:
        started = time.monotonic()
        generator.generate([prompt], seed=0)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


# --- how far from the teacher --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the teacher thought at every token of its answers: hidden states and head stand for its distributions, so
    that it need not be in memory beside a student."""

    vocabulary: str
    real: int  # ids of the vocabulary: a head may be wider
    pairs: list[tuple[list[int], list[int]]]  # prompt, answer
    hidden: list[Tensor]  # [C, H] a pair, on the CPU
    head: Tensor  # [V, H], on the CPU


def _reference(teacher: models.Loaded, rows: list[dict[str, Any]], answers: list[Completion]) -> Reference:
    """The first KL_TOKENS tokens of the answers, in the order of the rows; at least one answer."""
    pairs: list[tuple[list[int], list[int]]] = []
    count = 0
    for row, answer in zip(rows, answers, strict=True):
        if not pairs or count + len(answer.ids) <= KL_TOKENS:
            pairs.append((models.prompt_ids(teacher.tokenizer, row["input"]), answer.ids))
            count += len(answer.ids)
    hashes, real = models.vocabulary_hashes(teacher.tokenizer), len(teacher.tokenizer)
    head = models.head_weight(teacher.model).detach().cpu()
    return Reference(hashes.ordinary, real, pairs, _hidden(teacher, pairs), head)


@torch.inference_mode()
def _hidden(loaded: models.Loaded, pairs: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    """[C, H] for each (prompt, answer), on the CPU: row j is what answer[j] is predicted from."""
    device = next(loaded.model.parameters()).device
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    found: dict[int, Tensor] = {}
    for batch in batches(lengths, SCORE_TOKENS):
        ids = torch.zeros(len(batch), max(lengths[i] for i in batch), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.tensor(pairs[i][0] + pairs[i][1])
        hidden = models.hidden_states(loaded.model, ids.to(device))
        for row, i in enumerate(batch):
            found[i] = hidden[row, len(pairs[i][0]) - 1 : lengths[i] - 1].cpu()
    return [found[i] for i in range(len(pairs))]


@torch.inference_mode()
def _kl(student: models.Loaded, reference: Reference) -> float | None:
    """Mean over tokens of KL(teacher || student), nats; None when ids mean other tokens to the student."""
    if models.vocabulary_hashes(student.tokenizer).ordinary != reference.vocabulary:
        return None
    head = models.head_weight(student.model)
    if head.shape[0] < reference.real:
        return None
    theirs = reference.head.to(head.device)
    ours, hidden = torch.cat(_hidden(student, reference.pairs)), torch.cat(reference.hidden)
    total = 0.0
    step = max(1, KL_ELEMENTS // max(head.shape[0], theirs.shape[0]))
    for at in range(0, len(hidden), step):
        p = _log_softmax(hidden[at : at + step].to(head.device), theirs, reference.real)
        q = _log_softmax(ours[at : at + step].to(head.device), head, reference.real)
        total += (p.exp() * (p - q)).sum().item()
    return max(0.0, total / len(hidden))


def _log_softmax(hidden: Tensor, head: Tensor, real: int) -> Tensor:
    return torch.log_softmax((hidden @ head.T)[:, :real].float(), 1)


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------


def _harness() -> Any:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise TaskError(
            "lm_eval names tasks of lm-evaluation-harness, which is not installed here",
            hint="pip install 'lm-eval[hf]' on this machine, or leave lm_eval out",
        ) from error
    return lm_eval.simple_evaluate, HFLM


def _lm_eval(ctx: Context, loaded: models.Loaded, settings: EvaluateSettings) -> dict[str, dict[str, float]]:
    """Numbers of each task as the harness names them, such as exact_match,strict-match. Model-written code never runs:
    the harness refuses tasks that would, unless it is told otherwise."""
    from transformers import GenerationConfig

    evaluate, wrap = _harness()
    ctx.progress("lm_eval", declared=True)
    # What was measured before left its own limit of new tokens in the model; the harness has one a task.
    ends = {"eos_token_id": loaded.tokenizer.eos_token_id, "pad_token_id": loaded.tokenizer.pad_token_id}
    loaded.model.generation_config = GenerationConfig(**ends)
    wrapped = wrap(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=settings.batch_size)
    try:
        found = evaluate(model=wrapped, tasks=list(settings.lm_eval), log_samples=False)
    except (ValueError, KeyError, OSError) as error:
        raise TaskError(
            f"lm-evaluation-harness cannot do {', '.join(settings.lm_eval)}: {error}",
            hint="`lm_eval ls tasks` lists its tasks; their data comes from the hub",
        ) from error
    return {
        task: {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
        for task, numbers in found["results"].items()
    }


# --- result --------------------------------------------------------------------------------------------------------


def _quality(found: list[Measured]) -> dict[str, Any] | None:
    if not found:
        return None
    several = len(found) > 1
    accuracies = [statistics.fmean(one.accuracies) for one in found] if several else found[0].accuracies
    shares = [statistics.fmean(problem) for problem in zip(*[one.shares for one in found], strict=True)]
    kl = [one.kl_to_teacher for one in found if one.kl_to_teacher is not None]
    return {
        "accuracy": {
            "mean": statistics.fmean(accuracies), "min": min(accuracies), "max": max(accuracies),
            "n": len(shares), "seeds": accuracies, "interval": list(pass_interval(shares)),
            "answers": len(found[0].right) * len(found),  # to each problem
        },
        "kl_to_teacher": statistics.fmean(kl) if kl else None,
        "tokens_per_s": statistics.fmean(one.tokens_per_s for one in found),
        "first_token_s": statistics.median(one.first_token_s for one in found),
        "peak_gib": max(one.peak_gib for one in found),
        "lm_eval": found[0].lm_eval,
        **_shares(found),
    }  # fmt: skip


def _shares(found: list[Measured]) -> dict[str, float | None]:
    """Of the answers: cut off at the limit, and going round in circles."""
    columns = {"cut_share": [one.cut_share for one in found], "loop_share": [one.loop_share for one in found]}
    known = {name: [share for share in column if share is not None] for name, column in columns.items()}
    return {name: statistics.fmean(column) if column else None for name, column in known.items()}


def _samples(rows: list[dict[str, Any]], measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """A dozen problems with everybody's words: half of them wrong ones of the student, as far as there are any."""
    student = measured["student"][0] if measured["student"] else None
    right = [i for i in range(len(rows)) if student is None or student.right[0][i]]
    wrong = [i for i in range(len(rows)) if student is not None and not student.right[0][i]]
    half = SAMPLES_SHOWN // 2
    picked = wrong[: max(half, SAMPLES_SHOWN - len(right))]
    picked = right[: SAMPLES_SHOWN - len(picked)] + picked
    shown = []
    for i in picked:
        said = {role: found[0].texts[i] for role, found in measured.items() if found}
        ok = {role: found[0].right[0][i] for role, found in measured.items() if found}
        shown.append({"input": rows[i]["input"], "answer": rows[i]["answer"], **said, "right": ok})
    return shown
