"""Will the money last, at the speed that a stage shows on its real machine? Pure: progress in, a verdict out.

The plan was made before anything ran. The first steps on the rented machine say how long the stage really takes; where
that does not fit what is left, it is better to know now than at the cap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tasks.contract import LabelSettings, Progress, RehearseSettings, Settings, TrainSettings

LEAST_SHARE = 0.25  # of samples or steps: fewer is another experiment
SLACK = 0.9  # the first steps of a machine are its slowest: only what falls short at a tenth more speed falls short
CAREFUL = 0.95  # of the time that is left, what a smaller stage is made to fit
JUST_BEGUN = 0.03  # of a unit: nearer to its beginning `done` is right; within, answers do not come evenly


@dataclass(frozen=True)
class Gate:
    """From when on a kind of stage can be judged: in which phase, and after so many units of its progress."""

    phase: str
    units: float
    whole: bool = False  # only where a unit has just ended


GATES = {
    "rehearse": Gate("rehearse", 20),
    "train": Gate("train", 20),  # optimizer steps
    "pretrain": Gate("train", 20),  # it trains as well
    "label": Gate("generate", 1, whole=True),  # shards
    "evaluate": Gate("evaluate", 0.0),  # models; see _batches
}
LEAST_BATCHES = 4  # of an evaluation: within a batch answers seem slower than they are


@dataclass(frozen=True)
class Ok:
    left_s: float  # until this stage is done


@dataclass(frozen=True)
class Shortfall:
    left_s: float
    allowed_s: float  # what may be used of it
    total: float  # in units of its progress: what the stage would have to end at
    share: float  # of the whole stage


def forecast(kind: str, progress: Progress, *, allowed_s: float, batch_share: float = 1.0) -> Ok | Shortfall | None:
    """Whether the rest of the stage fits into `allowed_s`; None while too little was seen, or it is in another phase.

    `batch_share`: a batch, as a share of one model's answers, of an evaluation.
    """
    gate = GATES.get(kind)
    if gate is None or progress.phase != gate.phase or not progress.total or progress.phase_s <= 0:
        return None
    seen = progress.done - progress.phase_from
    needed = LEAST_BATCHES * batch_share if kind == "evaluate" else gate.units - (0.0 if gate.whole else 1.0)
    end = progress.total
    if kind == "evaluate":  # models differ: only the one at hand is known
        end = math.floor(progress.phase_from) + 1.0
        if progress.done >= end:
            return None
    if seen < needed or (gate.whole and progress.done % 1.0 > JUST_BEGUN):
        return None
    unit_s = progress.phase_s / seen
    left_s = max(0.0, end - progress.done) * unit_s
    if left_s * SLACK <= allowed_s:
        return Ok(left_s)
    fits = math.floor(progress.done + max(0.0, allowed_s) * CAREFUL / unit_s)
    return Shortfall(left_s, max(0.0, allowed_s), float(fits), fits / progress.total)


def shrinks(settings: Settings, on_shortfall: str) -> bool:
    """Whether the stage can be told to do less, in the way that the recipe allows.

    A comparison stays fair or is not made: its arms and its search have lengths that belong together.
    """
    if isinstance(settings, LabelSettings):
        return on_shortfall == "fewer_samples"
    if isinstance(settings, TrainSettings):
        return on_shortfall != "stop" and not settings.compare_hard and len(settings.learning_rates) < 2
    return isinstance(settings, RehearseSettings) and on_shortfall != "stop"
