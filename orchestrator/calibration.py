"""How far off were the estimates of earlier runs, and what follows for the next plan? Pure: values in, ranges out.

Parts of a stage are kept apart, since a slow download says nothing about a card: `create` (until the machine takes its
job), `setup` (its packages), `download` (weights from the hub), `bucket` (inputs and results, by the byte), `around`
(process start, weights onto the card, an engine's start) and `work`, checkpoints included. What lm_eval takes is no
part: nothing is planned for it, and a plan without it is not to wait for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.plan import Part, Range, StagePlan
from orchestrator.provision import Offer
from orchestrator.setup_time import VLLM_CARD_MISSING
from tasks.contract import Exit, Settings, TrainSettings

Ratios = Mapping[str, tuple[float, ...]]  # actual / estimated of earlier runs, newest first, by Part.key

TOOK = "took"  # entry of a run's ledger: {"parts": [Took.to_dict(), ...]}
TOLD = 500  # such entries that a plan looks at
LAST = 10  # runs that count: cards, drivers and this program change
ALIKE = 1.05  # the same work on two machines of a kind differs by so much either way, at least: assumed
BUCKET_PHASES = ("upload", "download")  # of a stage's progress
SHORTEST_S = 1.0  # of an estimate or a time: a ratio of less than that says nothing


@dataclass(frozen=True)
class Took:
    """One part of a finished stage: what was estimated, before any calibration, and what it took."""

    key: str
    estimated_s: float
    actual_s: float

    @property
    def ratio(self) -> float:
        return self.actual_s / self.estimated_s

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- what a plan makes of it


def calibrated(part: Part) -> Range:
    """Seconds of the part as earlier runs suggest: their median, and a range that narrows with their number.

    The model's own range, taken as factors around its expected value, shrinks by the square root of one more than the
    number of runs; it stays as wide as what was seen. Without earlier runs it is the model's.
    """
    seconds, ratios = part.seconds, part.ratios
    if not ratios or seconds.expected <= 0:
        return seconds
    middle = statistics.median(ratios)
    below = _narrowed(seconds.expected / max(seconds.low, 1e-9), len(ratios))
    above = _narrowed(seconds.high / seconds.expected, len(ratios))
    return Range(min(middle / below, *ratios), middle, max(middle * above, *ratios)).times(seconds.expected)


def _narrowed(width: float, runs: int) -> float:
    """One side of a range, as a factor of 1 or more, after so many runs."""
    return max(float(width ** (1 / math.sqrt(1 + runs))), min(ALIKE, width))


def with_ratios(key: str, seconds: Range, ratios: Ratios) -> Part:
    return Part(key, seconds, ratios.get(key, ()))


def work_key(kind: str, settings: Settings, params: float | None, offer: Offer) -> str:
    """Kind of work, how it is done, size of the model (to the nearest power of two) and card."""
    words = [kind]
    if isinstance(settings, TrainSettings):
        words += [settings.method, *(["compiled"] if settings.compile else [])]
    if kind in ("label", "evaluate"):
        words.append(engine_of(settings, offer))
    if params:
        words.append(f"{2.0 ** round(math.log2(params)) / 1e9:.2g}B")
    return " ".join([*words, "on", card_of(offer)])


def card_of(offer: Offer) -> str:
    """Without a GPU the machine's own name: processors differ more than cards of one name do."""
    return f"{offer.gpus} x {offer.gpu}" if offer.gpus > 1 else offer.gpu or f"CPU {offer.instance}"


def engine_of(settings: Settings, offer: Offer) -> str:
    """api | vllm | transformers: what answers are planned to be written with."""
    if getattr(settings, "api", None) is not None:
        return "api"
    wanted = str(getattr(settings, "engine", "auto"))
    if wanted != "auto":
        return wanted
    return "vllm" if offer.gpu is not None and offer.gpu not in VLLM_CARD_MISSING else "transformers"


# --- what a finished stage says


def took_of(
    stage: StagePlan, machines: Iterable[Mapping[str, Any]], result: Mapping[str, Any], *, smoke: bool = False
) -> list[Took]:
    """What the stage took, part by part; nothing where it was not done in one piece.

    `machines`: order and facts of each machine that the ledger knows of the stage. A stage that went over several
    machines, or whose work is not what was estimated, says nothing of its speed. `smoke`: a few steps say nothing
    of many, but the parts before them count.
    """
    worked = [facts for facts in machines if "job_age_s" in facts]
    if len(worked) != 1 or not stage.candidate_parts:
        return []
    facts = worked[0]
    parts = stage.candidate_parts[facts["offer_index"]]
    ended = facts.get("ended") or {}
    if ended.get("rc") != Exit.DONE:
        return []
    seconds = {"create": facts["job_age_s"], "setup": (result.get("setup") or {}).get("seconds")}
    if ended.get("work_s"):
        phases = ended.get("phases_s") or {}
        apart = {"lm_eval": ("lm_eval",), "work": ("checkpoint",), "download": ("fetch",), "bucket": BUCKET_PHASES}
        spent = {
            name: sum(phases.get(phase, 0.0) for phase in names)
            for name, names in apart.items()
            if name in parts or name == "lm_eval"
        }
        seconds["around"] = ended["seconds"] - ended["work_s"] - sum(spent.values())
        share = 0.0 if smoke else share_done(stage, facts["offer"], result)
        seconds["work"] = (ended["work_s"] + spent["work"]) / share if share else None
        seconds["download"] = spent.get("download")
        seconds["bucket"] = _as_planned_s(stage, spent.get("bucket", 0.0), ended.get("moved_bytes") or {})
    if card_of(facts["offer"]) != card_of(stage.candidates[facts["offer_index"]]):
        return []  # something else landed
    found = (Took(part.key, part.seconds.expected, seconds.get(name) or 0.0) for name, part in parts.items())
    return [one for one in found if min(one.estimated_s, one.actual_s) >= SHORTEST_S]


def _as_planned_s(stage: StagePlan, seconds: float, moved_bytes: Mapping[str, float]) -> float:
    """What the bytes that were planned would have taken at the speed of those that were moved."""
    moved = sum(moved_bytes.get(phase, 0.0) for phase in BUCKET_PHASES)
    return seconds * stage.uses.get("bucket_gb", 0.0) * 1e9 / moved if moved else 0.0


def share_done(stage: StagePlan, offer: Offer, result: Mapping[str, Any]) -> float:
    """The work that was done, as a share of what was estimated; 0 where it was work of another kind.

    More tokens than expected are not a slow card: steps and lengths are counted where the result tells them.
    """
    settings, uses = stage.settings, stage.uses
    if isinstance(settings, TrainSettings):
        if result.get("micro_batch", settings.micro_batch) != settings.micro_batch:
            return 0.0  # memory ran out on the way, and steps were repeated
        steps, row = result.get("steps_done"), result.get("row_tokens")
        if not steps or not row or not uses.get("steps_in_all") or not uses.get("row_tokens"):
            return 0.0
        shorter = 1 - row / uses["row_tokens"]  # a step of rows of half the length may take as long
        return float(steps / uses["steps_in_all"] * (1 - uses.get("row_share", 1.0) * shorter))
    if stage.kind in ("label", "evaluate") and result.get("engine") != engine_of(settings, offer):
        return 0.0
    if stage.kind == "label":
        tokens = result.get("generated_tokens")
        expected = uses.get("answers", 0.0) * uses.get("expected_answer_tokens", 0.0)
        return float(tokens / expected) if tokens and expected else 0.0
    return 1.0 if "limited" not in result else 0.0


def ratios_of(told: Iterable[Mapping[str, Any]], *, last: int = LAST) -> dict[str, tuple[float, ...]]:
    """The last ratios by key, newest first, from the data of TOOK entries, newest first."""
    found: dict[str, list[float]] = {}
    for one in (part for entry in told for part in entry["parts"]):
        took = Took(str(one["key"]), float(one["estimated_s"]), float(one["actual_s"]))
        ratios = found.setdefault(took.key, [])
        if len(ratios) < last and took.estimated_s > 0 and math.isfinite(took.ratio):
            ratios.append(took.ratio)
    return {key: tuple(ratios) for key, ratios in found.items()}


def said(parts: Mapping[str, Part]) -> str:
    """`work measured on 3 earlier runs: 1.4 times the estimate`; empty without earlier runs of the work."""
    work = parts.get("work")
    if work is None or not work.ratios:
        return ""
    count, factor = len(work.ratios), statistics.median(work.ratios)
    runs = f"{count} earlier run{'' if count == 1 else 's'}"
    times = f"{factor:.2g}" if factor < 99.5 else f"{factor:.0f}"  # not 1.1e+02
    return f"work measured on {runs}: {times} times the estimate"


def to_json(parts: Mapping[str, Part]) -> dict[str, Any] | None:
    """What `plan --json` says of a stage; None without earlier runs of any part."""
    measured = {name: part for name, part in parts.items() if part.ratios}
    if not measured:
        return None
    return {
        "runs": len(parts["work"].ratios) if "work" in parts else 0,
        "parts": {
            name: {
                "key": part.key,
                "runs": len(part.ratios),
                "factor": statistics.median(part.ratios),
                "estimated_s": asdict(part.seconds),
                "seconds": asdict(calibrated(part)),
            }
            for name, part in measured.items()
        },
    }


def sum_of(parts: Mapping[str, Part], names: Sequence[str]) -> Range:
    """Seconds of these parts together, calibrated."""
    low = expected = high = 0.0
    for name in names:
        if name in parts:
            one = calibrated(parts[name])
            low, expected, high = low + one.low, expected + one.expected, high + one.high
    return Range(low, expected, high)
