"""What is wrong with a run, and which lines of the recipe mend it? Pure: what was seen goes in, findings come out.

Each threshold stands here by name; docs/doctor-run.md gives their reasons.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Any

from tasks.contract import EvaluateSettings, LabelSettings, PretrainSettings, Settings, TrainSettings

LEAST_ANSWERS = 16  # fewer say nothing about shares
LOOPS_MANY, LOOPS_SOME = 0.3, 0.1  # share of answers
CUT_MANY, CUT_SOME = 0.3, 0.1
KEPT_FEW, KEPT_HALF = 0.2, 0.5  # share of answers that were kept
T_LOW, T_HIGH = 2.0, 4.0  # the usual range
T_ODD, T_FAR = (1.0, 8.0), (0.5, 10.0)
ALPHA_LOW, ALPHA_HIGH, ALPHA_LOST = 0.3, 0.95, 0.1
LEAST_POINTS = 20  # of a curve
EDGE = 0.1  # the first and the last tenth of a curve are compared
WARM_UP = 0.05  # of the steps: the rate is still rising
FLAT, SLOW = 0.01, 0.05  # share of the loss by which it fell
ROSE, CAME_UP = 1.1, 1.15  # times the loss at the beginning; times the lowest that was before
MEDIAN_JUMP = 0.954  # of standard deviations: median |a - b| of two draws from one normal distribution
SWINGS = 0.35  # from one point to the next, as a share of the loss
WAITS = 0.3  # share of the training in which no step was made
SAVES = 0.05  # share that saving may take
STARTS_S, WORKS = 900.0, 0.5  # a machine older than that has worked for less than this share of its time
WORSE = 0.02  # of accuracy, where the intervals overlap
GAP, CLOSED = 0.1, 0.1  # of accuracy between teacher and student before; share of it that training closed
RATE_FAR = 30.0  # times the usual rate, or one that many of it

OUT_OF_MEMORY = re.compile(r"out of memory|want of memory|allocate memory|does not fit:|cache blocks", re.I)
NOT_FINITE = re.compile(r"the loss is (nan|-?inf) at step (\d+)")
DIVERGED, NEVER_LEARNED = "the loss is not a number any more", "the loss does not fall"

# What others train with: LoRA papers and PEFT's examples, full fine-tuning of models of a few 1e9, models from nothing.
USUAL_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5, "scratch": 3e-3}


class Severity(StrEnum):
    FAULT = "fault"  # the result is of no use, or there is none
    WARNING = "warning"  # it costs quality or money
    NOTE = "note"  # unusual, and may be meant


# Causes before what follows from them: of findings as severe as each other the first is to be mended first.
ORDER = (
    "out_of_memory", "answers_repeat", "answers_cut", "labels_dropped", "temperature", "alpha", "loss_swings",
    "loss_flat", "learning_rate", "waiting_data", "waiting_save", "waiting_start", "student_worse", "student_far",
    "student_repeats", "student_cut", "memory_tight", "stage_failed",
)  # fmt: skip
TITLES = {
    "out_of_memory": "out of memory",
    "answers_repeat": "the teacher's answers repeat themselves",
    "answers_cut": "the teacher's answers are cut off",
    "labels_dropped": "most of the teacher's answers were dropped",
    "temperature": "temperature outside 2 to 4",
    "alpha": "alpha outside the usual range",
    "loss_swings": "the loss swings or rises",
    "loss_flat": "the loss is flat",
    "learning_rate": "learning rate far from the usual",
    "waiting_data": "training waits for its data",
    "waiting_save": "training waits for its checkpoints",
    "waiting_start": "the machine hardly worked",
    "student_worse": "the student is worse than before",
    "student_far": "the student hardly learned",
    "student_repeats": "the student's answers repeat themselves",
    "student_cut": "the student's answers are cut off",
    "memory_tight": "memory was short",
    "stage_failed": "a stage failed",
}


@dataclass(frozen=True)
class Change:
    """One line of the recipe: `key` below a stage, or below the recipe itself where that is None."""

    stage: str | None
    key: str  # loss.temperature
    value: Any


@dataclass(frozen=True)
class Finding:
    id: str
    severity: Severity
    stage: str
    what: str
    evidence: Mapping[str, float | int | str | None]
    change: tuple[Change, ...] = ()
    advice: str = ""  # what no line of a recipe does


@dataclass(frozen=True)
class Curve:
    """A model's training as its metrics tell it."""

    name: str
    losses: tuple[float, ...]  # in the order of steps, warm-up included
    last_step: int
    waiting_data: float | None = None  # share of the time until the last row
    waiting_save: float | None = None
    micro_batch: int | None = None  # the smallest to which memory has forced it


@dataclass(frozen=True)
class Answers:
    """Counts of a teacher's answers, from a stage's result, or from what it had written."""

    count: int
    kept: int
    dropped: Mapping[str, int]  # by reason
    loops: int | None  # None: not counted


@dataclass(frozen=True)
class StageSeen:
    name: str
    kind: str
    settings: Settings
    done: bool
    attempts: int = 0
    result: Mapping[str, Any] = field(default_factory=dict)
    ended: Mapping[str, Any] = field(default_factory=dict)  # last words of its newest machine
    curves: tuple[Curve, ...] = ()
    answers: Answers | None = None
    local: bool = True


@dataclass(frozen=True)
class Seen:
    """What was read of a run. `stages` in the order of the plan."""

    state: str
    message: str
    hint: str
    failed: str | None  # the stage at which it ended
    stages: tuple[StageSeen, ...]

    def stage(self, name: str | None) -> StageSeen | None:
        return next((one for one in self.stages if one.name == name), None)


def findings(seen: Seen) -> list[Finding]:
    """Everything that is wrong, the worst and most causal first. Of one kind and stage the worst alone: seeds agree."""
    found = [one for stage in seen.stages for rule in RULES for one in rule(seen, stage)]
    faults = {one.stage for one in found if one.severity is Severity.FAULT}
    found += [one for one in _failed(seen) if one.stage not in faults]
    ordered = sorted(found, key=lambda one: (list(Severity).index(one.severity), ORDER.index(one.id)))
    first: dict[tuple[str, str], Finding] = {}
    for one in ordered:
        first.setdefault((one.id, one.stage), one)
    return list(first.values())


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(seen: Seen, stage: StageSeen) -> Iterator[Finding]:
    said = str(stage.ended.get("message", ""))
    if not stage.done and OUT_OF_MEMORY.search(said):
        evidence = {"peak_gib": stage.ended.get("peak_gib"), **_sizes(stage.settings)}
        advice = "or a machine with more memory: `gpus:` in the recipe, `kdcloud plan` says what is needed"
        yield Finding("out_of_memory", Severity.FAULT, stage.name, said, evidence, _smaller(stage), advice)
    least = min((curve.micro_batch for curve in stage.curves if curve.micro_batch is not None), default=None)
    if least is not None:
        what = f"a step did not fit and was done again with micro_batch {least}"
        evidence = {"micro_batch": least, **_sizes(stage.settings)}
        yield Finding(
            "memory_tight", Severity.NOTE, stage.name, what, evidence, (Change(stage.name, "micro_batch", least),)
        )


def _sizes(settings: Settings) -> dict[str, int]:
    names = ("batch_size", "micro_batch", "max_seq_len", "max_new_tokens")
    return {name: getattr(settings, name) for name in names if hasattr(settings, name)}


def _smaller(stage: StageSeen) -> tuple[Change, ...]:
    """A quarter of what is held at once: accumulation makes up for it. What cannot be cut is recomputed, or adapted."""
    settings = stage.settings
    if isinstance(settings, TrainSettings):
        changes = []
        if settings.micro_batch > 1:
            changes.append(Change(stage.name, "micro_batch", max(1, settings.micro_batch // 4)))
        if not settings.checkpointing:
            changes.append(Change(stage.name, "checkpointing", True))
        if settings.micro_batch == 1 and settings.method == "full" and settings.student.architecture is None:
            changes.append(Change(stage.name, "method", "lora"))
        elif settings.micro_batch == 1:
            changes.append(Change(stage.name, "max_seq_len", max(1, settings.max_seq_len // 2)))
        return tuple(changes)
    if isinstance(settings, (PretrainSettings, LabelSettings, EvaluateSettings)) and settings.batch_size > 1:
        return (Change(stage.name, "batch_size", max(1, settings.batch_size // 4)),)
    return ()


# --- the teacher's answers -------------------------------------------------------------------------------------------


def _answers(seen: Seen, stage: StageSeen) -> Iterator[Finding]:
    settings, answers = stage.settings, stage.answers
    if not isinstance(settings, LabelSettings) or answers is None or answers.count < LEAST_ANSWERS:
        return
    cut = answers.dropped.get("cut", 0)
    loops = answers.loops or 0
    told = {"answers": answers.count, "cut_off": cut, "repeating": answers.loops, "kept": answers.kept}
    share = loops / answers.count
    if share > LOOPS_SOME:
        severity = Severity.FAULT if share > LOOPS_MANY else Severity.WARNING
        what = f"{share:.0%} of {answers.count} answers end in the same words over and over"
        yield Finding("answers_repeat", severity, stage.name, what, told, _livelier(seen, stage, settings))
    if loops < cut / 2 and cut / answers.count > CUT_SOME:
        severity = Severity.FAULT if cut / answers.count > CUT_MANY else Severity.WARNING
        what = f"{cut / answers.count:.0%} of {answers.count} answers were cut off at {settings.max_new_tokens} tokens"
        longer = settings.max_new_tokens * (4 if cut > answers.count / 2 else 2)
        told = {**told, "max_new_tokens": settings.max_new_tokens}
        change = (Change(stage.name, "max_new_tokens", longer),)
        yield Finding("answers_cut", severity, stage.name, what, told, change, "or take easier prompts")
    yield from _dropped(seen, stage, settings, answers, told)


def _dropped(
    seen: Seen, stage: StageSeen, settings: LabelSettings, answers: Answers, told: Mapping[str, Any]
) -> Iterator[Finding]:
    """Of answers that came to an end: what was cut off is another finding; `keep: shortest` drops right ones."""
    finished = answers.count - answers.dropped.get("cut", 0)
    good = answers.kept + answers.dropped.get("longer", 0)
    if finished < LEAST_ANSWERS or good / finished >= KEPT_HALF:
        return
    reasons = {why: n for why, n in answers.dropped.items() if why not in ("cut", "longer")}
    most = sorted(reasons.items(), key=lambda item: -item[1])
    words = ", ".join(f"{n} {why}" for why, n in most)
    what = f"of {finished} finished answers {good} were good enough to keep ({words})"
    severity = Severity.FAULT if good / finished < KEPT_FEW else Severity.WARNING
    teacher = seen.stage(settings.teacher.stage)
    changes = []
    if teacher is not None:
        changes += _longer(teacher)
    if settings.temperature > 0.6:
        changes.append(Change(stage.name, "temperature", 0.6))
    if reasons and most[0][0] == "no_answer" and settings.verify == "exact":
        changes.append(Change(stage.name, "verify", "math"))
    if teacher is None and settings.samples_per_prompt == 1 and settings.temperature > 0:
        changes += [Change(stage.name, "samples_per_prompt", 4), Change(stage.name, "keep", "shortest")]
    advice = "a better teacher helps most; `kdcloud labels show` shows what was dropped"
    yield Finding(
        "labels_dropped", severity, stage.name, what, {**told, **{f"dropped_{k}": n for k, n in most}}, tuple(changes),
        advice,
    )  # fmt: skip


def _longer(stage: StageSeen) -> list[Change]:
    """More training of a stage that is a teacher."""
    settings = stage.settings
    if isinstance(settings, (PretrainSettings, TrainSettings)) and settings.steps is not None:
        return [Change(stage.name, "steps", settings.steps * 4)]
    if isinstance(settings, TrainSettings) and settings.epochs is not None:
        return [Change(stage.name, "epochs", settings.epochs * 2)]
    return []


def _livelier(seen: Seen, stage: StageSeen, settings: LabelSettings) -> tuple[Change, ...]:
    changes = []
    if settings.temperature < 0.6:
        changes.append(Change(stage.name, "temperature", 0.6))
    if settings.top_p > 0.95:
        changes.append(Change(stage.name, "top_p", 0.95))
    teacher = seen.stage(settings.teacher.stage)
    if teacher is not None:
        changes += _longer(teacher)
    if settings.verify == "none":
        changes.append(Change(stage.name, "verify", "text"))
    return tuple(changes)


# --- the loss --------------------------------------------------------------------------------------------------------


def _weights(seen: Seen, stage: StageSeen) -> Iterator[Finding]:
    """Temperature and alpha."""
    settings = stage.settings
    if not isinstance(settings, TrainSettings):
        return
    labels = seen.stage(settings.labels)
    soft = labels is None or not isinstance(labels.settings, LabelSettings) or labels.settings.top_k > 0
    t, alpha = settings.temperature, settings.alpha
    evidence = {"temperature": t, "alpha": alpha}
    # a student from nothing may be meant to learn the teacher's distribution as it is, which is what T = 1 asks for
    low = T_LOW if settings.student.architecture is None else T_ODD[0]
    if alpha > 0 and not low <= t <= T_HIGH:
        severity = _outside(t, T_FAR, Severity.FAULT) or _outside(t, T_ODD, Severity.WARNING) or Severity.NOTE
        what = f"at T = {t:g} {_at_temperature(t)}"
        yield Finding("temperature", severity, stage.name, what, evidence, (Change(stage.name, "loss.temperature", 2),))
    if soft and not ALPHA_LOW <= alpha <= ALPHA_HIGH:
        severity = Severity.WARNING if alpha < ALPHA_LOST else Severity.NOTE
        what = (
            f"at alpha = {alpha:g} the soft labels, which were paid for, hardly count"
            if alpha < ALPHA_LOW
            else f"at alpha = {alpha:g} hardly anything holds the student to the answer itself"
        )
        yield Finding("alpha", severity, stage.name, what, evidence, (Change(stage.name, "loss.alpha", 0.7),))


def _at_temperature(t: float) -> str:
    if t < T_ODD[0]:
        return "the soft labels are close to one-hot: they say little more than the answer"
    if t < T_LOW:
        return "the teacher's second choices count as they are; 2 to 4 makes more of them"
    return "the soft labels are " + ("flatter than usual" if t <= T_ODD[1] else "so flat that they say little")


def _outside(value: float, limits: tuple[float, float], severity: Severity) -> Severity | None:
    return None if limits[0] <= value <= limits[1] else severity


def _losses(seen: Seen, stage: StageSeen) -> Iterator[Finding]:
    settings = stage.settings
    if not isinstance(settings, (TrainSettings, PretrainSettings)):
        return
    lower = _calmer(stage, settings)
    broke = NOT_FINITE.search(str(stage.ended.get("message", ""))) if not stage.done else None
    rate = settings.learning_rate
    if broke is not None:
        what = f"{DIVERGED} at step {broke[2]}"
        evidence: dict[str, Any] = {"learning_rate": rate, "step": int(broke[2])}
        yield Finding("loss_swings", Severity.FAULT, stage.name, what, evidence, lower)
        return
    for curve in stage.curves:
        shape = shape_of(curve.losses)
        if shape is None:
            continue
        evidence = {
            "loss_begin": round(shape.begin, 4), "loss_end": round(shape.end, 4), "loss_low": round(shape.low, 4),
            "loss_peak": round(shape.peak, 4), "swing": round(shape.swing, 3), "learning_rate": rate,
            "steps": curve.last_step + 1,
        }  # fmt: skip
        verdict = _verdict(shape)
        if verdict is not None:
            severity, what = verdict
            yield Finding("loss_swings", severity, stage.name, what, evidence, lower)
        elif shape.fell < FLAT or (shape.fell < SLOW and shape.begin - shape.end < 2 * shape.error):
            what = f"{NEVER_LEARNED}: {shape.begin:.3g} at the beginning, {shape.end:.3g} at the end"
            yield Finding("loss_flat", Severity.FAULT, stage.name, what, evidence, _bolder(stage, settings), _DOUBT)
        elif shape.fell < SLOW:
            what = f"the loss fell by {shape.fell:.1%} only, from {shape.begin:.3g} to {shape.end:.3g}"
            yield Finding("loss_flat", Severity.WARNING, stage.name, what, evidence, _bolder(stage, settings), _DOUBT)
        elif not 1 / RATE_FAR <= rate / _usual(settings) <= RATE_FAR:
            what = f"others train such a model with {_usual(settings):g}, not with {rate:g}"
            change = (Change(stage.name, "learning_rate", _usual(settings)),)
            yield Finding("learning_rate", Severity.WARNING, stage.name, what, evidence, change)


_DOUBT = "where the rate is right already, look at what the teacher said: `kdcloud labels show`"


@dataclass(frozen=True)
class Shape:
    """What a curve does. All but `swing` and `error` are means over a tenth of it."""

    begin: float
    end: float
    low: float  # from where it rose most,
    peak: float  # and to where
    swing: float  # median change from a point to the next in the later half, as a share of its mean
    error: float  # standard error of begin - end

    @property
    def fell(self) -> float:
        """Share of the loss at the beginning."""
        return (self.begin - self.end) / self.begin if self.begin > 0 else 0.0


def shape_of(losses: Sequence[float]) -> Shape | None:
    """None for a curve of few points."""
    values = losses[math.ceil(WARM_UP * len(losses)) :]
    if len(values) < LEAST_POINTS:
        return None
    n = max(3, round(EDGE * len(values)))
    means = [fmean(values[at : at + n]) for at in range(len(values) - n + 1)]
    lows = list(accumulate(means, min))
    low, peak = max(zip(lows, means, strict=True), key=lambda pair: pair[1] / pair[0] if pair[0] > 0 else 0.0)
    late = values[len(values) // 2 :]
    jumps = [abs(b - a) for a, b in pairwise(late)]
    noise = median(jumps) / MEDIAN_JUMP  # of a point; the trend hardly moves it
    error = noise * math.sqrt(2 / n)
    return Shape(means[0], means[-1], low, peak, median(jumps) / fmean(late) if fmean(late) > 0 else 0.0, error)


def _verdict(shape: Shape) -> tuple[Severity, str] | None:
    if shape.end > ROSE * shape.begin:
        return Severity.FAULT, f"the loss rose from {shape.begin:.3g} to {shape.end:.3g}"
    if shape.peak > CAME_UP * shape.low:
        return Severity.WARNING, f"the loss was down at {shape.low:.3g} and came up again to {shape.peak:.3g}"
    if shape.swing > SWINGS:
        return Severity.WARNING, f"the loss jumps by {shape.swing:.0%} from one point to the next, to the end"
    return None


def _usual(settings: TrainSettings | PretrainSettings) -> float:
    if isinstance(settings, PretrainSettings) or settings.student.architecture is not None:
        return USUAL_RATE["scratch"]
    return USUAL_RATE[settings.method]


def _calmer(stage: StageSeen, settings: TrainSettings | PretrainSettings) -> tuple[Change, ...]:
    rate, usual = settings.learning_rate, _usual(settings)
    changes = [Change(stage.name, "learning_rate", usual if rate > 3 * usual else _round(rate / 3))]
    if isinstance(settings, TrainSettings) and not 0 < settings.max_grad_norm <= 1:
        changes.append(Change(stage.name, "max_grad_norm", 1.0))
    return tuple(changes)


def _bolder(stage: StageSeen, settings: TrainSettings | PretrainSettings) -> tuple[Change, ...]:
    """A usual rate where it is far below; twice as long where it is not."""
    if settings.learning_rate < _usual(settings) / 3:
        return (Change(stage.name, "learning_rate", _usual(settings)),)
    changes = [Change(stage.name, "learning_rate", _round(settings.learning_rate * 3))]
    return (*changes, *_longer(stage)[:1])


def _round(value: float) -> float:
    return float(f"{value:.2g}")


# --- waiting ---------------------------------------------------------------------------------------------------------


def _waiting(seen: Seen, stage: StageSeen) -> Iterator[Finding]:
    settings = stage.settings
    for curve in stage.curves:
        data, save = curve.waiting_data or 0.0, curve.waiting_save or 0.0
        evidence = {"waiting_data": round(data, 3), "waiting_save": round(save, 3)}
        if data > WAITS:
            what = f"{data:.0%} of the training went by until the next samples were there"
            labels = seen.stage(settings.labels) if isinstance(settings, TrainSettings) else None
            change: tuple[Change, ...] = ()
            if labels is not None and isinstance(labels.settings, LabelSettings) and labels.settings.top_k > 8:
                change = (Change(labels.name, "soft_labels.top_k", max(8, labels.settings.top_k // 4)),)
            advice = "labels lie on the machine's own disk: take one with a faster disk and more processor cores"
            yield Finding("waiting_data", Severity.WARNING, stage.name, what, evidence, change, advice)
        if save > WAITS:
            what = f"{save:.0%} of the training went by while checkpoints were saved and sent"
            yield Finding("waiting_save", Severity.WARNING, stage.name, what, evidence, _rarer(stage, save))
    seconds, work_s = stage.ended.get("seconds"), stage.ended.get("work_s")
    if not stage.local and seconds and work_s is not None and seconds > STARTS_S and work_s < WORKS * seconds:
        what = f"of {seconds / 60:.0f} min of the machine {work_s / 60:.0f} went into the stage's own work"
        evidence = {"seconds": seconds, "work_s": work_s}
        advice = "the rest was packages, models and results on their way: more samples a run, or a bucket in its region"
        yield Finding("waiting_start", Severity.WARNING, stage.name, what, evidence, (), advice)


def _rarer(stage: StageSeen, share: float) -> tuple[Change, ...]:
    """So rarely that saving takes a twentieth: with `share` of the time for it, steps take the rest."""
    times = math.ceil(share / (1 - min(share, 0.99)) / (SAVES / (1 - SAVES)))
    every = getattr(stage.settings, "checkpoint_every_steps", None)
    if every is not None:
        return (Change(stage.name, "checkpoint_every_steps", every * times),)
    seconds = getattr(stage.settings, "checkpoint_every_s", 300.0) * times
    return (Change(stage.name, "checkpoint_every", f"{seconds / 60:.0f}min" if seconds >= 60 else f"{seconds:.0f}s"),)


# --- the student -----------------------------------------------------------------------------------------------------


def _student(seen: Seen, stage: StageSeen) -> Iterator[Finding]:
    settings = stage.settings
    quality = stage.result.get("quality") or {}
    after, before = quality.get("student"), quality.get("student_before")
    if not isinstance(settings, EvaluateSettings) or not after:
        return
    if before:
        yield from _worse(seen, stage, settings, after["accuracy"], before["accuracy"])
    if before and quality.get("teacher"):
        means = [role["accuracy"]["mean"] for role in (before, after, quality["teacher"])]
        yield from _far(seen, stage, settings, *means)
    loops, cut = after.get("loop_share") or 0.0, after.get("cut_share") or 0.0
    evidence = {"cut_share": round(cut, 3), "loop_share": round(loops, 3), "accuracy": after["accuracy"]["mean"]}
    if loops > LOOPS_SOME:
        severity = Severity.WARNING if loops > LOOPS_MANY else Severity.NOTE
        what = f"{loops:.0%} of its answers end in the same words over and over"
        train = seen.stage(settings.student)
        change = tuple(_longer(train)) if train is not None else ()
        yield Finding("student_repeats", severity, stage.name, what, evidence, change, "and more varied prompts")
    if loops < cut / 2 and cut > CUT_SOME:
        severity = Severity.WARNING if cut > CUT_MANY else Severity.NOTE
        what = f"{cut:.0%} of its answers were cut off at {settings.max_new_tokens} tokens"
        change = (Change(stage.name, "max_new_tokens", settings.max_new_tokens * 2),)
        yield Finding("student_cut", severity, stage.name, what, evidence, change)


def _worse(
    seen: Seen, stage: StageSeen, settings: EvaluateSettings, after: Mapping[str, Any], before: Mapping[str, Any]
) -> Iterator[Finding]:
    lost = before["mean"] - after["mean"]
    apart = bool(after.get("interval") and before.get("interval")) and after["interval"][1] < before["interval"][0]
    if not apart and lost <= WORSE:
        return
    what = f"it solves {after['mean']:.1%} of {after['n']} problems, and solved {before['mean']:.1%} before training"
    evidence = {"accuracy": after["mean"], "accuracy_before": before["mean"], "problems": after["n"]}
    severity = Severity.FAULT if apart else Severity.WARNING
    yield Finding("student_worse", severity, stage.name, what, evidence, tuple(_gentler(seen, settings)), _GENTLER)


def _far(
    seen: Seen, stage: StageSeen, settings: EvaluateSettings, before: float, after: float, teacher: float
) -> Iterator[Finding]:
    """Between where it was and its teacher."""
    if teacher - before < GAP or not 0 <= after - before < CLOSED * (teacher - before):
        return
    what = f"it solves {after:.1%}, before training it solved {before:.1%}, and its teacher solves {teacher:.1%}"
    evidence = {"accuracy": after, "accuracy_before": before, "accuracy_teacher": teacher}
    train = seen.stage(settings.student)
    change = tuple(_longer(train)) if train is not None else ()
    yield Finding(
        "student_far",
        Severity.WARNING,
        stage.name,
        what,
        evidence,
        change,
        "or more samples; a student much smaller than its teacher may need one in between",
    )


_GENTLER = "it learned something else than the task: look at what it was given with `kdcloud labels show`"


def _gentler(seen: Seen, settings: EvaluateSettings) -> Iterator[Change]:
    train = seen.stage(settings.student)
    if train is None or not isinstance(train.settings, TrainSettings):
        return
    labels = seen.stage(train.settings.labels)
    if labels is not None and isinstance(labels.settings, LabelSettings):
        if labels.settings.verify == "none":
            yield Change(labels.name, "verify", settings.verify)
        elif labels.settings.keep == "all":
            yield Change(labels.name, "keep", "correct")
    yield Change(train.name, "learning_rate", _round(train.settings.learning_rate / 3))
    if train.settings.method == "full" and train.settings.student.path is not None:
        yield Change(train.name, "method", "lora")


# --- whatever else ---------------------------------------------------------------------------------------------------


def _failed(seen: Seen) -> list[Finding]:
    """A run that ended before its time: what it said itself."""
    if seen.state in ("done", "running", "stopped", "interrupted"):
        return []
    stage = seen.stage(seen.failed)
    ended = stage.ended if stage is not None else {}
    evidence = {"state": seen.state, "reason": ended.get("reason"), "attempts": stage.attempts if stage else None}
    return [Finding("stage_failed", Severity.FAULT, seen.failed or "-", seen.message, evidence, (), seen.hint)]


RULES = (_memory, _answers, _weights, _losses, _waiting, _student)
