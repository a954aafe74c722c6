"""Will the money last, at the speed that a stage shows on its real machine? Pure: progress in, a verdict out.

The plan was made before anything ran. The first steps on the rented machine say how long the stage really takes; where
that does not fit what is left, it is better to know now than at the cap.

An engine that writes many answers side by side is judged in the middle of them: by its steps, by tokens written against
tokens expected, and with the long steps in which its last answers end alone (Pace).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.contract import EvaluateSettings, LabelSettings, Progress, RehearseSettings, Settings, TrainSettings, Writing

if TYPE_CHECKING:
    from orchestrator.plan import StagePlan

LEAST_SHARE = 0.25  # of samples or steps, as planned: fewer is another experiment
SLACK = 0.9  # the first steps of a machine are its slowest: only what falls short at a tenth more speed falls short
CAREFUL = 0.95  # of the time that is left, what a smaller stage is made to fit
JUST_BEGUN = 0.03  # of a unit: nearer to its beginning `done` is right; within, answers do not come evenly


@dataclass(frozen=True)
class Gate:
    """From when on a kind of stage can be judged: in which phase, and after so many units of its progress."""

    phase: str
    units: float


GATES = {
    "rehearse": Gate("rehearse", 20),
    "train": Gate("train", 20),  # optimizer steps
    "pretrain": Gate("train", 20),  # it trains as well
    "label": Gate("generate", 1),  # shards, where one has just ended; within one see _labelling
    "evaluate": Gate("evaluate", 0.0),  # models; see _evaluating
}
SCORED = 0.25  # of a shard: from then on the second pass of a label stage is judged by its own speed
LEAST_BATCHES = 4  # one after the other: within a batch answers seem slower than they are
LEAST_STEPS = 256  # of an engine: the first ones read the prompts, and word of an answer comes every 32 tokens
STEP_SHARE = 0.4  # of an engine's step is the same for few answers as for many, where a plan does not say it: assumed
LAST_ANSWER = 0.58  # of n exponential lengths the longest is ln n and so much, in mean lengths (Euler's constant)
LAST_ANSWERS = 6.0  # mean lengths at most, as the plan has it


@dataclass(frozen=True)
class Planned:
    """What the plan knows of a stage, and its progress does not."""

    answer_tokens: float | None = None  # of an answer, on average
    longest: float = math.inf  # tokens of one
    step_share: float = STEP_SHARE  # of an engine's step that is the same for one answer as for all in flight
    scoring: float = 0.0  # seconds of the second pass for a second of the first
    shard_answers: float = 1.0
    models: tuple[float, ...] = ()  # of an evaluation, in their order: work of each, as shares of all
    load_s: float = 0.0  # until the next one of them answers
    batch_share: float = 1.0  # a batch, as a share of a shard or of one model's answers


@dataclass(frozen=True)
class Ok:
    left_s: float  # until this stage is done
    whole: bool = True  # or until the model at hand is, where the plan does not say how the others compare


@dataclass(frozen=True)
class Shortfall:
    left_s: float
    allowed_s: float  # what may be used of it
    total: float  # in units of its progress: what the stage would have to end at
    size: float  # of the stage before it was told to do less
    whole: bool = True

    @property
    def share(self) -> float:
        """Of the whole stage."""
        return self.total / self.size


def planned_of(stage: StagePlan, *, plain_batches: bool) -> Planned:
    """`plain_batches`: batches one after the other, as transformers write them."""
    settings, uses = stage.settings, stage.uses
    if isinstance(settings, LabelSettings):
        share = min(0.99, uses.get("scoring_share", 0.0))
        return Planned(
            answer_tokens=uses.get("expected_answer_tokens"),
            longest=settings.max_new_tokens,
            step_share=uses.get("step_share", STEP_SHARE),
            scoring=share / (1.0 - share),
            shard_answers=settings.shard_size * settings.samples_per_prompt,
            batch_share=settings.batch_size / (settings.shard_size * settings.samples_per_prompt)
            if plain_batches
            else math.inf,
        )
    if not isinstance(settings, EvaluateSettings):
        return Planned()
    models, around = round(uses.get("models", 0)), stage.parts.get("around")
    batch = settings.batch_size / (uses["prompts"] * settings.seeds) if uses.get("prompts") and plain_batches else 1.0
    return Planned(
        answer_tokens=uses.get("expected_answer_tokens"),
        longest=settings.max_new_tokens,
        step_share=uses.get("step_share", STEP_SHARE),
        models=_shares(models, uses.get("teacher_share"), teacher=settings.teacher is not None),
        load_s=around.seconds.expected / models if around is not None and models else 0.0,
        batch_share=min(1.0, batch if plain_batches else 1.0 / settings.seeds),
    )


def _shares(models: int, teacher_share: float | None, *, teacher: bool) -> tuple[float, ...]:
    """The teacher comes first; students are of one size."""
    if models < 1 or (teacher and teacher_share is None):
        return ()
    first = (teacher_share or 0.0,) if teacher else ()
    students = models - len(first)
    return (*first, *((1.0 - sum(first)) / students for _ in range(students)))


def forecast(
    kind: str, progress: Progress, *, allowed_s: float, planned: Planned | None = None, size: float | None = None
) -> Ok | Shortfall | None:
    """Whether the rest of the stage fits into `allowed_s`; None while too little was seen, or it is in another phase.

    `size`: of the whole stage before it was told to do less, in the units of its progress.
    """
    gate, planned = GATES.get(kind), planned or Planned()
    if gate is None or not progress.total or progress.phase_s <= 0:
        return None
    told, size = size, size or progress.total
    if kind == "label" and progress.phase == "score":
        return _verdict(progress, SCORED, allowed_s, size)
    if progress.phase != gate.phase:
        return None
    if kind == "evaluate":
        return _evaluating(progress, allowed_s, planned)
    if kind != "label":
        return _verdict(progress, gate.units - 1.0, allowed_s, size)
    seen = progress.done - progress.phase_from
    between = seen >= gate.units and progress.done % 1.0 <= JUST_BEGUN
    if not between and Writing.of(progress) is not None:
        return _labelling(progress, allowed_s, planned, told)
    if not between and seen < LEAST_BATCHES * planned.batch_share:
        return None
    unit_s, part = progress.phase_s / seen, 1.0 if between else planned.shard_answers
    ahead = progress.total - progress.done + planned.scoring * progress.total
    return _judged(
        ahead * unit_s,
        allowed_s,
        lambda spare_s: math.floor((progress.done + spare_s / unit_s) / (1.0 + planned.scoring) * part) / part,
        size,
    )


def _verdict(progress: Progress, needed: float, allowed_s: float, size: float) -> Ok | Shortfall | None:
    """Units that take as long as each other."""
    assert progress.total is not None
    seen = progress.done - progress.phase_from
    if seen < needed or seen <= 0:
        return None
    unit_s = progress.phase_s / seen
    left_s = max(0.0, progress.total - progress.done) * unit_s
    return _judged(left_s, allowed_s, lambda spare_s: math.floor(progress.done + spare_s / unit_s), size)


def _judged(
    left_s: float, allowed_s: float, fitting: Callable[[float], float], size: float, *, whole: bool = True
) -> Ok | Shortfall:
    """`fitting`: at what the stage would have to end to take no more than so many seconds."""
    left_s, allowed = max(0.0, left_s), max(0.0, allowed_s)
    if left_s * SLACK <= allowed_s:
        return Ok(left_s, whole)
    fits = float(fitting(allowed * CAREFUL))
    return Shortfall(left_s, allowed, fits, size, whole)


# --- answers in the middle


@dataclass(frozen=True)
class Pace:
    """An engine's time: so much a step, and so much a token; how long answers are; and how many it writes at once."""

    step_s: float
    token_s: float
    mean: float  # tokens of an answer
    longest: float
    flight: float

    @staticmethod
    def of(writing: Writing, planned: Planned) -> Pace | None:
        """None while too little was seen."""
        if writing.steps < LEAST_STEPS or writing.tokens <= 0 or writing.flight <= 0 or writing.seconds <= 0:
            return None
        rest = max(0.0, planned.longest - writing.longest)
        expected = planned.answer_tokens if planned.answer_tokens is not None else writing.length
        # Of those that go on nobody has seen the end: as long again as the plan has an answer.
        mean = writing.length + writing.going_on * min(expected, rest)
        fixed = planned.step_share
        at_once = fixed * writing.steps + (1.0 - fixed) * writing.tokens / writing.flight
        full_s = writing.seconds / at_once  # a step with all in flight
        token_s = (1.0 - fixed) * full_s / writing.flight
        return Pace(fixed * full_s, token_s, max(1.0, mean), planned.longest, writing.flight)

    def steps(self, answers: float) -> float:
        """Of answers that are asked at once: while places are taken again, and until the last one has ended."""
        if answers <= 0:
            return 0.0
        flight = max(1.0, min(self.flight, answers))
        last = self.mean * min(math.log(flight) + LAST_ANSWER, LAST_ANSWERS) if flight > 1 else self.mean
        return max(0.0, answers / flight - 1.0) * self.mean + min(max(last, self.mean), self.longest)

    def seconds(self, steps: float, tokens: float) -> float:
        return max(0.0, steps) * self.step_s + max(0.0, tokens) * self.token_s


def _left_s(pace: Pace, writing: Writing, answers: float) -> float:
    """Until there are so many answers in all."""
    here = max(writing.ended, min(writing.answers, answers - writing.before))
    begun = min(writing.answers, writing.ended + writing.flight)
    tokens = writing.tokens * min(1.0, here / begun)  # of those that stay
    seconds = pace.seconds(pace.steps(here) - writing.steps, here * pace.mean - tokens)
    return seconds + _fresh_s(pace, writing, answers - writing.before - writing.answers)


def _fresh_s(pace: Pace, writing: Writing, answers: float) -> float:
    """Of answers that have not begun, in units of the size of the one at hand."""
    if answers <= 0:
        return 0.0
    unit = max(1.0, min(writing.answers, answers))
    return pace.seconds(answers / unit * pace.steps(unit), answers * pace.mean)


def _labelling(progress: Progress, allowed_s: float, planned: Planned, size: float | None) -> Ok | Shortfall | None:
    """Within a shard. Whatever is written is scored afterwards."""
    writing = Writing.of(progress)
    pace = None if writing is None else Pace.of(writing, planned)
    if writing is None or pace is None:
        return None
    whole = writing.before + writing.answers + writing.later

    def until(answers: float) -> float:
        return _left_s(pace, writing, answers) + planned.scoring * _fresh_s(pace, writing, answers)

    def fitting(spare_s: float) -> float:
        least, most = writing.before + writing.ended, whole
        while most - least >= 1.0:
            middle = (least + most) / 2
            least, most = (middle, most) if until(middle) <= spare_s else (least, middle)
        return math.floor(least) / planned.shard_answers

    return _judged(until(whole), allowed_s, fitting, size or whole / planned.shard_answers)


def _evaluating(progress: Progress, allowed_s: float, planned: Planned) -> Ok | Shortfall | None:
    """The model at hand by its own speed, those after it by what the plan says of them beside it."""
    assert progress.total is not None
    index, writing = math.floor(progress.done), Writing.of(progress)
    pace = None if writing is None else Pace.of(writing, planned)
    if writing is not None and pace is not None:
        if writing.ended >= writing.answers and writing.later <= 0:
            return None  # that was the model before
        left_s = _left_s(pace, writing, writing.before + writing.answers + writing.later)
        model_s = _fresh_s(pace, writing, writing.before + writing.answers + writing.later)
    else:
        index, seen = math.floor(progress.phase_from), progress.done - progress.phase_from
        if seen < LEAST_BATCHES * planned.batch_share or progress.done >= index + 1.0 or seen <= 0:
            return None  # models differ: only the first one's speed is known
        model_s = progress.phase_s / seen
        left_s = (index + 1.0 - progress.done) * model_s
    known = len(planned.models) == round(progress.total) and planned.models[index] > 0
    if known:
        later = planned.models[index + 1 :]
        left_s += sum(later) / planned.models[index] * model_s + len(later) * planned.load_s
    return _judged(left_s, allowed_s, lambda spare_s: 0.0, progress.total, whole=known or index + 1 == progress.total)


# --- what may be done about it


def shrinks(settings: Settings, on_shortfall: str) -> bool:
    """Whether the stage can be told to do less, in the way that the recipe allows.

    A comparison stays fair or is not made: its arms and its search have lengths that belong together.
    """
    if isinstance(settings, LabelSettings):
        return on_shortfall == "fewer_samples"
    if isinstance(settings, TrainSettings):
        return on_shortfall != "stop" and not settings.compare_hard and len(settings.learning_rates) < 2
    return isinstance(settings, RehearseSettings) and on_shortfall != "stop"


def part_of(settings: Settings, total: float, of: float, unit: str) -> str:
    """`154 of 256 answers`: what of a stage is done, where it is not whole units."""
    if isinstance(settings, LabelSettings) and (total % 1.0 or of % 1.0):
        each = settings.shard_size * settings.samples_per_prompt
        whole = min(of * each, settings.samples * settings.samples_per_prompt)
        return f"{total * each:,.0f} of {whole:,.0f} answers"
    return f"{total:,.0f} of {of:,.0f} {unit}"
