"""What does a person who watches a run see? Values for `drawing`, from plan, ledger and progress. Pure."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from orchestrator import outlook, spend
from orchestrator.ledger import MachineRow, Run
from orchestrator.money import Rate
from orchestrator.plan import Micros, Plan, Range, StagePlan
from orchestrator.provision import Offer
from orchestrator.runner import Snapshot, offer_from_dict
from orchestrator.shares import visits
from orchestrator.states import State
from tasks.contract import Progress

DONE, RUNNING, WAITING, STOPPED = "done", "running", "waiting", "stopped"
_TIMES = ((1, "s"), (60, "min"), (3600, "h"))
_STATES = {
    State.INTENT: "ordering a machine",
    State.CREATING: "waiting for the machine",
    State.LIVE: "starting",
    State.DRAINING: "ending the machine",
    State.TEARDOWN_PENDING: "ending the machine",
}


@dataclass(frozen=True)
class StageLine:
    """One stage, as a row."""

    name: str
    state: str  # done | running | waiting | stopped
    offer: Offer
    attempts: int
    took_s: float | None  # of its machines, together
    left: Range | None  # seconds; None = not known, or nothing
    spent_micros: int
    planned: Micros


@dataclass(frozen=True)
class Curve:
    """Losses of one model, in the order of their steps."""

    name: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Work:
    """What the running stage does right now."""

    doing: str
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    speed: str = ""
    load: str = ""
    curve: Curve = field(default_factory=Curve)


@dataclass(frozen=True)
class Scene:
    run: str
    state: str  # running, stopping, or what it ended as
    took_s: float
    left: Range | None
    stages: tuple[StageLine, ...]
    work: Work | None
    spent_micros: int
    forecast: Micros
    cap_micros: int
    rate: Rate
    currency: str
    warning: str = ""
    note: str = ""  # what Ctrl-C does


def scene_of(
    snapshot: Snapshot, plan: Plan, *, now: datetime, curve: Curve, state: str = "running", note: str = "",
    warning: str = "", since_s: float = 0.0, told: Told | None = None,
) -> Scene:  # fmt: skip
    """`since_s`: seconds since the snapshot was taken; ages go on, what was seen stays.

    `told`: what the stage last said of its work, where it is at something else just now (see `told_by`).
    """
    run, open_rows = snapshot.run, [row for row in snapshot.run.machines if row.state is not State.GONE]
    lefts = {stage.name: _left(stage, snapshot, since_s, told) for stage in plan.stages}
    machines = [_machine_micros(row, snapshot, since_s, lefts) for row in open_rows if row.state is not State.INTENT]
    covered = {name for row in open_rows if row.state is not State.INTENT for name in row.stages} | set(run.done)
    waiting = [stage for stage in plan.stages if stage.name not in covered]
    forecast = outlook.total_micros(
        plan, spent=run.spent_micros, open_machines=machines, waiting=waiting, apis=run.apis
    )
    return Scene(
        run=run.id,
        state=state,
        took_s=max(0.0, (now - run.created_at).total_seconds()),
        left=outlook.together(lefts[stage.name] for stage in plan.stages if stage.name not in run.done)
        if state == RUNNING
        else None,
        stages=tuple(_line(stage, snapshot, now, lefts[stage.name], since_s) for stage in plan.stages),
        work=None if state not in ("running", "stopping") else _work(snapshot, plan, curve),
        spent_micros=_spending(snapshot, since_s),
        forecast=forecast,
        cap_micros=run.cap_micros,
        rate=plan.rate,
        currency=plan.currency,
        warning=warning or _unconfirmed(snapshot, plan, since_s),
        note=note,
    )


def _spending(snapshot: Snapshot, since_s: float) -> int:
    """The snapshot's figure, with what its machine cost since."""
    row = snapshot.machine
    if row is None or row.state is State.INTENT:
        return snapshot.spending_micros
    offer = _offer(row)
    before = min(row.reserved_micros, spend.cost_micros(offer, snapshot.machine_age_s))
    after = min(row.reserved_micros, spend.cost_micros(offer, snapshot.machine_age_s + since_s))
    return snapshot.spending_micros + after - before


def _unconfirmed(snapshot: Snapshot, plan: Plan, since_s: float) -> str:
    """A machine that is older than its reservation pays for."""
    from orchestrator.money import shown

    row = snapshot.machine
    if row is None or row.state is State.INTENT:
        return ""
    age = snapshot.machine_age_s + since_s
    worst = spend.worst_case_micros(_offer(row), reserved=row.reserved_micros, age_s=age)
    if worst <= row.reserved_micros:
        return ""
    return f"{row.name} is not confirmed gone: in the worst case {shown(worst, plan.rate, plan.currency)}"


def _offer(row: MachineRow) -> Offer:
    return offer_from_dict(row.facts.get("landed") or row.order["offer"])


def _machine_micros(row: MachineRow, snapshot: Snapshot, since_s: float, lefts: Mapping[str, Range | None]) -> Micros:
    mine = snapshot.machine is not None and row.name == snapshot.machine.name
    if mine and snapshot.stage is not None:
        age = snapshot.machine_age_s + since_s
        still = row.stages[row.stages.index(snapshot.stage) :] if snapshot.stage in row.stages else (snapshot.stage,)
        left = outlook.together(lefts.get(name) for name in still)
        return outlook.machine_micros(_offer(row), age_s=age, left=left, reserved=row.reserved_micros)
    return Micros(0, row.reserved_micros, row.reserved_micros)


def _left(stage: StagePlan, snapshot: Snapshot, since_s: float, told: Told | None) -> Range | None:
    if stage.name in snapshot.run.done:
        return None
    if stage.name != snapshot.stage or snapshot.machine is None:
        return stage.hours.times(3600)
    index = int(snapshot.machine.order.get("offer_index", 0))
    hours = stage.candidate_hours[index] if index < len(stage.candidate_hours) else stage.hours
    now = told_by(snapshot, stage) or (told if told is not None and told.machine == snapshot.machine.name else None)
    age_s, began_s = snapshot.machine_age_s + since_s, _began_s(snapshot.machine, stage.name)
    if now is None or now.stage != stage.name:
        return outlook.left_s(stage, hours, age_s - began_s, None)
    found = outlook.left_s(stage, hours, now.age_s - began_s, now.progress)
    if found is None:
        return None
    passed = age_s - now.age_s
    if passed > found.high > 0:
        return None  # nothing was heard of it since it should have been done
    return Range(*(max(0.0, value - passed) for value in (found.low, found.expected, found.high)))


def _began_s(row: MachineRow, stage: str) -> float:
    """The machine's age when its time for this stage began."""
    return next((visit.from_s for visit in visits(row) if visit.stage == stage), 0.0)


@dataclass(frozen=True)
class Told:
    """How far a stage was with its work, and how old its machine was then."""

    machine: str
    stage: str
    progress: Progress
    age_s: float


def told_by(snapshot: Snapshot, stage: StagePlan) -> Told | None:
    """None while it is at something else: loading, checking, a checkpoint."""
    progress, row = _of_now(snapshot), snapshot.machine
    if progress is None or row is None or outlook.work_share(stage, progress) is None:
        return None
    return Told(row.name, stage.name, progress, snapshot.machine_age_s)


def _of_now(snapshot: Snapshot) -> Progress | None:
    """The progress, if it is of the attempt that is running."""
    progress, row = snapshot.progress, snapshot.machine
    if progress is None or row is None:
        return None
    return progress if row.serves != snapshot.stage or progress.attempt == row.attempt else None


def _line(stage: StagePlan, snapshot: Snapshot, now: datetime, left: Range | None, since_s: float) -> StageLine:
    run = snapshot.run
    rows = [row for row in run.machines if row.stage == stage.name or stage.name in {v.stage for v in visits(row)}]
    sent = [row for row in rows if "sent_at" in row.facts]
    if stage.name in run.done:
        state = DONE
    elif stage.name == snapshot.stage and snapshot.machine is not None:
        state = RUNNING
    else:
        state = STOPPED if sent else WAITING
    current = snapshot.machine if state == RUNNING else None
    parts = [_part(row, stage.name, snapshot, since_s, now) for row in sent]
    took = [seconds for seconds, _ in parts]
    if not sent and state == DONE:
        took = _span_s(run, stage.name)
    spent = sum(micros for _, micros in parts) + run.apis.get(stage.name, spend.ApiLine()).settled_micros
    return StageLine(
        name=stage.name,
        state=state,
        offer=_offer((current or sent[-1]) if current or sent else rows[-1]) if rows else stage.offer,
        attempts=len(sent),
        took_s=sum(took) if took else None,
        left=left,
        spent_micros=spent,
        planned=stage.cost_micros,
    )


def _part(row: MachineRow, stage: str, snapshot: Snapshot, since_s: float, now: datetime) -> tuple[float, int]:
    """(seconds, micros) of a machine for a stage: its share of what was settled, or of what it took until now."""
    found = visits(row)
    at = next((n for n, visit in enumerate(found) if visit.stage == stage), len(found) - 1)
    visit = found[at]
    if visit.seconds is not None and visit.micros is not None:
        return visit.seconds, visit.micros
    if row.state is State.GONE:
        return _lived_s(row, now), row.settled_micros
    current = snapshot.machine is not None and row.name == snapshot.machine.name
    age_s = snapshot.machine_age_s + since_s if current else _lived_s(row, now)
    until_s = found[at + 1].from_s if at + 1 < len(found) else age_s
    offer, most = _offer(row), row.reserved_micros
    paid, before = (min(most, spend.cost_micros(offer, s)) if s > 0 else 0 for s in (until_s, visit.from_s))
    return max(0.0, until_s - visit.from_s), paid - before


def _lived_s(row: MachineRow, now: datetime) -> float:
    """Seconds of a machine: until it was seen gone, or until now."""
    if "billed_s" in row.facts:
        return float(row.facts["billed_s"])
    end = row.facts.get("gone_at")
    until = datetime.fromisoformat(end) if end else now
    return max(0.0, (until - datetime.fromisoformat(row.facts["sent_at"])).total_seconds())


def _span_s(run: Run, stage: str) -> list[float]:
    """Of a stage that was done on another one's machine: from its first entry to its result."""
    at = [entry.at for entry in run.entries if entry.stage == stage]
    return [(at[-1] - at[0]).total_seconds()] if len(at) > 1 else []


def _work(snapshot: Snapshot, plan: Plan, curve: Curve) -> Work | None:
    stage = next((one for one in plan.stages if one.name == snapshot.stage), None)
    if stage is None:
        return None
    row, progress = snapshot.machine, _of_now(snapshot)
    if row is None:
        return Work("choosing a machine")
    if row.state is not State.LIVE or progress is None:
        return Work(_STATES[row.state])
    return Work(
        doing=phase_of(progress),
        done=progress.done,
        total=progress.total,
        unit=clean(progress.unit),
        speed=speed_of(stage, progress),
        load=load_of(progress.numbers),
        curve=curve if stage.kind in ("train", "pretrain") else Curve(),
    )


def phase_of(progress: Progress) -> str:
    return "starting" if progress.phase == "start" else clean(progress.phase)


def speed_of(stage: StagePlan, progress: Progress) -> str:
    """`26,714 tokens/s`; of a stage that tells none answers, or units of its progress, a second, minute or hour."""
    told = progress.numbers.get("tokens_per_s")
    if told is not None:
        return f"{told:,.0f} tokens/s"
    seen = progress.done - progress.phase_from
    if seen <= 0 or progress.phase_s <= 0 or progress.phase != outlook.WORK_PHASES.get(stage.kind):
        return ""
    answers = _answers_a_unit(stage, progress)
    rate, what = seen * (answers or 1.0) / progress.phase_s, "answers" if answers else clean(progress.unit)
    seconds, name = next((one for one in _TIMES if rate * one[0] >= 0.95), _TIMES[-1])
    return f"{rate * seconds:,.{0 if rate * seconds >= 9.95 else 1}f} {what}/{name}"


def _answers_a_unit(stage: StagePlan, progress: Progress) -> float | None:
    """Answers in a shard of labels, or for a model that is evaluated."""
    if stage.kind == "label" and progress.total and stage.uses.get("answers"):
        return stage.uses["answers"] / progress.total
    if stage.kind == "evaluate" and stage.uses.get("prompts"):
        return stage.uses["prompts"] * int(getattr(stage.settings, "seeds", 1))
    return None


def load_of(numbers: Mapping[str, float]) -> str:
    """`GPU 97 %, 61.2 of 79.6 GiB`, or on a machine without one `1.9 cores, 0.40 GiB`."""
    parts = []
    if "gpu_use" in numbers:
        parts.append(f"GPU {100 * numbers['gpu_use']:.0f} %")
    if "gpu_used_gib" in numbers:
        whole = f" of {numbers['gpu_total_gib']:.0f}" if "gpu_total_gib" in numbers else ""
        parts.append(f"{'' if parts else 'GPU '}{numbers['gpu_used_gib']:.1f}{whole} GiB")
    if parts:
        return ", ".join(parts)
    if "cpu_cores" in numbers:
        parts.append(f"{numbers['cpu_cores']:.1f} cores")
    if "rss_gib" in numbers:
        parts.append(f"{numbers['rss_gib']:.2f} GiB")
    return ", ".join(parts)


# --- losses ----------------------------------------------------------------------------------------------------------


def curve_of(text: str) -> Curve:
    """The losses in a metrics.jsonl: of the model that is trained now. Of several at once it is the one begun first.

    Steps that were repeated after a resume count as they were last.
    """
    losses: dict[str, dict[int, float]] = {}
    lately: deque[str] = deque(maxlen=8)
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        for key, value in row.items():
            if key.endswith("loss/total") and isinstance(value, (int, float)) and math.isfinite(value):
                losses.setdefault(key, {})[row["step"]] = float(value)
                lately.append(key)
    if not lately:
        return Curve()
    key = next(name for name in losses if name in lately)
    values = tuple(losses[key][step] for step in sorted(losses[key]))
    return Curve(clean(key.removesuffix("loss/total").rstrip("/")), values)


SPARKS = "▁▂▃▄▅▆▇█"
LOG_FROM = 20.0  # losses that fall by more than this factor are drawn by their logarithm


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """The values as a row of blocks, at most `width`, between their own minimum and maximum."""
    if not values or width < 1:
        return ""
    size = max(1.0, len(values) / width)
    count = min(width, len(values))
    bins = [values[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))] for i in range(count)]
    means = [sum(one) / len(one) for one in bins]
    if min(means) > 0 and max(means) > LOG_FROM * min(means):
        means = [math.log(value) for value in means]
    low, high = min(means), max(means)
    if high <= low:
        return SPARKS[0] * len(means)
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in means)


# --- text that others wrote ------------------------------------------------------------------------------------------

_SEQUENCES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC: titles, links, the clipboard
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"  # DCS, SOS, PM, APC
    r"|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]"  # CSI and the short ones
)


def clean(text: str) -> str:
    """One line that cannot steer a terminal: no sequences, no control or direction characters, tabs as spaces."""
    plain = _SEQUENCES.sub("", text).expandtabs(4)
    return "".join(char for char in plain if char.isprintable())
