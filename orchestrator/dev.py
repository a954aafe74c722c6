"""A box to work on, in the place of a stage: planned and paid for like a run of that one stage, and ended like it.

Nothing here moves money or machines: a box is a run whose stage is of kind `box`, so ledger, cap, deadline, lease,
teardown and reaper act as they do for any other. What is added: inputs of an earlier run are laid into this one, its
servers are reached over SSH, and Ctrl-C closes it so that it can save.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import spend
from orchestrator.doors import Doorman, Target
from orchestrator.errors import BudgetExceeded, UsageError
from orchestrator.ledger import Run
from orchestrator.live import PlainView
from orchestrator.money import both, human_seconds, shown
from orchestrator.plan import Micros, Plan, Range, StagePlan, digest_of
from orchestrator.provision import Offer, Reachable
from orchestrator.runner import Outcome, Snapshot, offer_from_dict, place
from orchestrator.session import Session, plan_of
from orchestrator.states import State
from tasks.bucket import Bucket, BucketError, Manifest, open_bucket, read_commit
from tasks.contract import (
    BEFORE_PREFIX,
    BOX,
    BOX_READY,
    COMMIT_FILE,
    LABELS_PREFIX,
    LIMIT_FILE,
    BoxSettings,
    Exit,
    Limit,
    ModelSource,
    Progress,
    StageSettings,
    install_hint,
)

DEADLINE_S = 3600.0
IDLE_S = 900.0
LEAST_S = 300.0  # of life: less is not worth its machine
ARCHIVE = "work.zip"  # tasks/box.py
CLOSING_S = 45.0  # beside the last upload: until the box has heard that it is closed
WARN_S = (600.0, 120.0)  # before the end
UNSAVED, IDLE = -2.0, -1.0  # warnings of no time
GONE_QUIET = (Exit.STALLED, Exit.TERMINATED, Exit.DEADLINE)  # of a box that could not even save: no other is rented


# --- the plan: pure ---------------------------------------------------------------------------------------------------


def chosen_stage(plan: Plan, name: str | None) -> StagePlan:
    """The stage named, else the first that trains, else the first. Raises UsageError."""
    if name is None:
        return next((stage for stage in plan.stages if stage.kind == "train"), plan.stages[0])
    found = next((stage for stage in plan.stages if stage.name == name), None)
    if found is None:
        raise UsageError(f"the recipe has no stage {name}", hint=f"it has {', '.join(s.name for s in plan.stages)}")
    return found


def box_name(recipe: str) -> str:
    return f"dev-{recipe}"[:60]


def box_plan(
    plan: Plan, stage: StagePlan, settings: BoxSettings, *, cap_micros: int | None, deadline_s: float, idle_s: float
) -> Plan:
    """The plan of a box on the stage's machines: open for as long as deadline and cap allow.

    Without a cap of its own it may cost what that takes, at most the recipe's budget. Raises BudgetExceeded.
    """
    offer = stage.offer
    work_s = deadline_s - offer.latencies.total_s
    cap = (
        cap_micros if cap_micros is not None else min(plan.cap_micros, needed_micros(offer, work_s) or plan.cap_micros)
    )
    work_s = min(work_s, spend.order_lifetime_s(offer, cap))
    if work_s < LEAST_S:
        longer = "--deadline" if deadline_s - offer.latencies.total_s < LEAST_S else "--budget"
        raise BudgetExceeded(
            f"a box on {place(offer)} would be open for {human_seconds(max(0.0, work_s))}: "
            f"of its time {human_seconds(offer.latencies.total_s)} are kept for ending it",
            hint=f"allow more with {longer}",
        )
    hours = Range(0.0, work_s / 3600, work_s / 3600)
    whole = min(spend.cost_micros(offer, work_s), cap - stage.reserve_micros) if offer.price_micros_per_hour else 0
    box = replace(
        stage, kind=BOX, settings=settings, after=(), hours=hours, candidate_hours=(hours,) * len(stage.candidates),
        cost_micros=Micros(0, whole, whole), notes=(), uses={}, chosen=(), candidate_parts=(), joins=False,
        startup_hours=Range(0.0, 0.0, 0.0), rejected=(),
    )  # fmt: skip
    digest = digest_of({"box": plan.digest}, (box,), cap, deadline_s, plan.rate)
    return replace(
        plan, name=box_name(plan.name), digest=digest, stages=(box,), overhead=(), cap_micros=cap,
        deadline_s=deadline_s, idle_s=idle_s, notes=(), infra=tuple({one.infra: None for one in stage.candidates}),
    )  # fmt: skip


def needed_micros(offer: Offer, work_s: float) -> int:
    return spend.reserve_micros(offer, max(0.0, work_s)) if offer.price_micros_per_hour else 0


def words_of(plan: Plan, inputs: Sequence[str]) -> list[str]:
    """What is about to be rented, for the question before it."""
    (stage,) = plan.stages
    settings, offer = _settings(stage), stage.offer
    price = offer.price_micros_per_hour or 0
    most = both(stage.cost_micros.high, plan.rate, plan.currency)
    costs = f"{shown(price, plan.rate, plan.currency)} an hour, {most} at most"
    lines = [
        f"a box in the place of stage {stage.name} ({settings.kind}) on {place(offer)}",
        f"  open for {human_seconds(stage.hours.high * 3600)} at most; {costs if price else 'it costs nothing'}; "
        f"cap {both(plan.cap_micros, plan.rate, plan.currency)}",
        f"  ends when nothing computes on it for {human_seconds(plan.idle_s)}: an open notebook is no work",
    ]
    return [*lines, *(f"  {text}" for text in inputs)]


def _settings(stage: StagePlan) -> BoxSettings:
    assert isinstance(stage.settings, BoxSettings)
    return stage.settings


# --- inputs: what earlier runs left -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A committed folder of another run that is laid into this one."""

    bucket: str  # of that run
    prefix: str
    to: str
    of: str  # run
    only: tuple[str, ...] = ()  # files; all where there are none


@dataclass(frozen=True)
class Inputs:
    pieces: tuple[Piece, ...]
    missing: tuple[str, ...]

    def words(self) -> list[str]:
        got = [f"{piece.to if piece.to != BEFORE_PREFIX else 'your files'} of run {piece.of}" for piece in self.pieces]
        lines = [f"brings {', '.join(got)}"] if got else []
        return [*lines, *(f"begins without {name}: no run of this recipe has it" for name in self.missing)]


def find_inputs(runs: Iterable[Run], recipe: str, stage: str, needed: Sequence[str], given: Run | None) -> Inputs:
    """Results that the stage reads, from the newest run of the recipe that has all of them (or the run given), and
    what was made by hand in the newest box of the same stage. `runs`: newest first."""
    known = list(runs)
    names = [name for name in needed if not name.startswith(LABELS_PREFIX) and not Path(name).is_absolute()]
    fitting = [given] if given is not None else [run for run in known if run.name == recipe]
    source = next((run for run in fitting if set(names) <= set(run.done)), None)
    if source is None and given is not None:
        raise UsageError(
            f"run {given.id} has no {', '.join(name for name in names if name not in given.done)}",
            hint=f"go on with it first: kdcloud run --resume {given.id}",
        )
    pieces = [Piece(source.bucket, name, name, source.id) for name in names] if source is not None else []
    pieces += _before(run for run in known if run.name == box_name(recipe) and _is_box_of(run, stage))
    return Inputs(tuple(pieces), () if source is not None else tuple(names))


def still_open(runs: Iterable[Run], recipe: str, stage: str) -> list[str]:
    """Boxes of the same stage whose machines may still be there."""
    return [run.id for run in runs if run.name == box_name(recipe) and run.live and _is_box_of(run, stage)]


def _is_box_of(run: Run, stage: str) -> bool:
    return any(one["name"] == stage and one["kind"] == BOX for one in run.data.get("plan", {}).get("stages", ()))


def _before(boxes: Iterator[Run]) -> Iterator[Piece]:
    """Of the newest box that left files: its result, else its newest checkpoint."""
    for run in boxes:
        (stage,) = (one["name"] for one in run.data["plan"]["stages"])
        prefix = stage if _saved_all(run, stage) else _checkpoint_of(run)
        if prefix is not None:
            yield Piece(run.bucket, prefix, BEFORE_PREFIX, run.id, (ARCHIVE,))
            return


def _saved_all(run: Run, stage: str) -> bool:
    """Whether it ended with its files: where they were too large for that, its newest checkpoint is all there is."""
    return bool(run.done.get(stage, {}).get("result", {}).get("saved_bytes"))


def _checkpoint_of(run: Run) -> str | None:
    return next((str(row.facts["checkpoint"]) for row in reversed(run.machines) if row.facts.get("checkpoint")), None)


def with_before(settings: BoxSettings, inputs: Inputs) -> BoxSettings:
    return replace(settings, before=any(piece.to == BEFORE_PREFIX for piece in inputs.pieces))


def lay_in(pieces: Sequence[Piece], session: Session, say: Callable[[str], None]) -> None:
    """Copies them into the run: its machine has keys for nothing else. Raises BucketError."""
    own = open_bucket(session.bucket.url)
    for piece in pieces:
        say(f"bringing {piece.prefix} of run {piece.of}")
        with tempfile.TemporaryDirectory(prefix="kdcloud-") as folder:
            _copy(piece, own, Path(folder), session.lease.renew_if_due)


def _copy(piece: Piece, own: Bucket, folder: Path, beat: Callable[[], None]) -> None:
    source = open_bucket(piece.bucket)
    manifest = read_commit(source, piece.prefix)
    if manifest is None:
        raise BucketError(f"{piece.prefix} of run {piece.of} is not in its bucket any more", hint="run that stage anew")
    files = {name: entry for name, entry in manifest.files.items() if not piece.only or name in piece.only}
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source.get_file(f"{piece.prefix}/{name}", path, lambda _: beat())
        own.put_file(path, f"{piece.to}/{name}", lambda _: beat())
        path.unlink()
        beat()
    own.put(f"{piece.to}/{COMMIT_FILE}", Manifest(fence=0, files=files).to_json().encode())


def box_settings(stage: StagePlan, given: Run | None, *, chat: bool) -> BoxSettings:
    """Of a box in the stage's place. Raises UsageError."""
    assert not isinstance(stage.settings, BoxSettings), "no recipe has one"
    return BoxSettings(stage.kind, stage.settings, chat=chat_source(stage.settings, given) if chat else None)


def chat_source(settings: StageSettings, given: Run | None) -> ModelSource:
    """What Open WebUI talks to: the student of the run given, else the model that the stage begins with."""
    if given is not None:
        kinds = {stage.name: stage.kind for stage in plan_of(given).stages}
        done = [name for kind in ("export", "train") for name in reversed(list(given.done)) if kinds.get(name) == kind]
        if not done:
            raise UsageError(f"run {given.id} has no student yet", hint=f"kdcloud run --resume {given.id}")
        return ModelSource(stage=done[0])
    model: object = getattr(settings, "teacher", None) or getattr(settings, "student", None)
    if isinstance(model, str):
        return ModelSource(stage=model)
    if not isinstance(model, ModelSource) or model.architecture is not None:
        raise UsageError("this stage begins with no model to talk to", hint="name a finished run: --chat --run RUN")
    return model


# --- the session ------------------------------------------------------------------------------------------------------


class Desk:
    """One box, from its machine to its end: tells addresses, warns, and closes it when asked."""

    def __init__(
        self, session: Session, say: Callable[[str, str | None, str], None], tell: Callable[[str], None]
    ) -> None:
        self._session, self._say, self._tell = session, say, tell
        (self._stage,) = session.plan.stages
        self._doors: Doorman | None = None
        if isinstance(session.provider, Reachable):
            self._doors = Doorman(session.provider, self._told, lambda text: say("warn", self._stage.name, text))
        # Machines of earlier sessions: how those ended does not end this one.
        self._before = {row.name for row in session.ledger.run(session.run_id).machines if row.state is State.GONE}
        self._asked = 0
        self._asked_at: float | None = None
        self._closing = self._over = False
        self._last: Snapshot | None = None  # of a machine that can be told to close
        self._warned: set[float] = set()
        self._doing = self._opened = ""

    def go(self) -> Outcome:
        if self._doors is None:
            raise UsageError("this provider does not say how its machines are reached", hint="use infra: local")
        self._doors.start()
        try:
            return self._session.go(say=self._say, stop=self.stops, on_turn=self.look)
        finally:
            self._doors.close()

    def close(self) -> None:
        """Ctrl-C: the box saves and ends; a second one does not wait for that."""
        self._asked += 1
        self._asked_at = self._asked_at or time.monotonic()
        what = "ending the machine now"
        if self._asked == 1:
            saves = "closing the box: it saves your files, then its machine ends"
            what = saves if self._last is not None else "ending the machine: the box was not open yet"
        self._say("stop", self._stage.name, what)

    def stops(self) -> bool:
        """Whether the runner is to end the machine: not while the box is closing by itself."""
        if self._over or self._asked > 1:
            return True
        if self._asked_at is None:
            return False
        if not self._closing and self._last is not None:  # asked between two looks: told before anything is ended
            self._closing = self._ask_to_close(self._last)
        limit_s = CLOSING_S + self._stage.offer.latencies.flush_s
        return not self._closing or time.monotonic() - self._asked_at > limit_s

    def look(self, snapshot: Snapshot) -> None:
        target = target_of(snapshot)
        assert self._doors is not None
        self._doors.look(target)
        self._over = self._over or any(
            row.job_rc in GONE_QUIET
            for row in snapshot.run.machines
            if row.state is State.GONE and row.name not in self._before
        )
        self._last = snapshot if target is not None else None
        if target is not None and snapshot.progress is not None:
            self._follow(target, snapshot.progress.phase)
            self._warn(snapshot.progress.numbers)

    def _follow(self, target: Target, phase: str) -> None:
        """What a machine does until the box is open, which may take minutes."""
        if target.is_open:
            self._opened = target.machine
        elif phase not in (self._doing, Progress().phase) and self._opened != target.machine:
            self._say("progress", self._stage.name, f"{phase} ...")
        self._doing = phase

    def _ask_to_close(self, snapshot: Snapshot) -> bool:
        """Word to a rented box; one on this machine hears the signal that ends it."""
        row = snapshot.machine
        if row is None or offer_from_dict(row.order["offer"]).infra == "local":
            return False
        limit = Limit(1.0, row.attempt, self._session.lease.fence)
        with suppress(BucketError):
            self._session.bucket.put(f"{row.serves}/{LIMIT_FILE}", limit.to_json().encode())
            return True
        return False

    def _warn(self, numbers: Mapping[str, float]) -> None:
        for text in warnings(numbers, self._session.plan.idle_s, self._warned):
            self._say("warn", self._stage.name, text)

    def _told(self, lines: list[str]) -> None:
        for line in lines:
            self._tell(line)
        self._say("up", self._stage.name, "the box is open; Ctrl-C saves your files and ends its machine")


def target_of(snapshot: Snapshot) -> Target | None:
    """The machine, once its supervisor tells of it; open once its servers answer."""
    row, progress = snapshot.machine, snapshot.progress
    if row is None or row.state is not State.LIVE or progress is None:
        return None
    if progress.attempt != row.attempt or "job" not in row.facts:
        return None
    return Target(row.name, str(row.facts["job"]), row.serves, is_open=progress.phase == BOX_READY)


def warnings(numbers: Mapping[str, float], idle_s: float, told: set[float]) -> list[str]:
    """What is due of the end that comes near, each once; an idle box that works again may be told anew."""
    left_s, quiet_s, found = numbers.get("left_s"), numbers.get("quiet_s", 0.0), []
    due = [limit for limit in WARN_S if left_s is not None and left_s <= limit]
    if left_s is not None and due and min(due) not in told:
        told.update(due)
        found.append(f"its machine ends in {human_seconds(left_s)}; files below work/ are saved")
    if not numbers.get("unsaved"):
        told.discard(UNSAVED)
    elif UNSAVED not in told:
        told.add(UNSAVED)
        found.append("the files below work/ are NOT saved just now: NOTICE.txt beside it says why")
    before_s = min(300.0, idle_s / 2)
    if quiet_s < idle_s - before_s:
        told.discard(IDLE)
    elif IDLE not in told:
        told.add(IDLE)
        found.append(f"nothing has computed on it for {human_seconds(quiet_s)}: it ends in {human_seconds(before_s)}")
    return found


class DeskView(PlainView):
    """What happens, a line each; no picture is drawn, so that addresses can be copied."""

    def update(self, snapshot: Snapshot) -> None:
        pass


def last_words(run: Run, plan: Plan) -> list[str]:
    """How it ended, what it cost, and where the files are."""
    (stage,) = plan.stages
    result: Mapping[str, Any] = run.done.get(stage.name, {}).get("result", {})
    ended, whole, checkpoint = result.get("ended"), _saved_all(run, stage.name), _checkpoint_of(run)
    spent, cap = shown(run.spent_micros, plan.rate, plan.currency), both(run.cap_micros, plan.rate, plan.currency)
    last = "the box ended before it could save everything" if checkpoint else "the box was not open"
    lines = [f"the box was closed: {ended}" if ended else last]
    lines.append(f"spent {spent} of {cap}")
    if ended and not whole:
        lines.append("the files below work/ were too many for its end, or its disk was full: they are NOT saved")
    if whole or checkpoint:
        where = f"{run.bucket}/{stage.name}/{ARCHIVE if whole else 'checkpoints'}"
        what = "your files" if whole or not ended else "your files as they were earlier"
        lines.append(f"{what}: {where}; the next box of this stage begins with them")
    return lines


def check_resumable(run: Run, plan: Plan) -> None:
    """Raises UsageError."""
    if len(plan.stages) != 1 or plan.stages[0].kind != BOX:
        raise UsageError(f"{run.id} is no box", hint=f"go on with it by `kdcloud run --resume {run.id}`")
    if plan.stages[0].name in run.done and not run.live:
        raise UsageError(f"the box {run.id} was closed", hint="open a new one: it begins with the files of that one")
    if not run.machines:  # perhaps ended before its inputs were there
        raise UsageError(f"the box {run.id} had no machine yet: there is nothing to go on with", hint="open a new one")


def check_here(plan: Plan) -> None:
    """Raises UsageError where this machine lacks what the box needs of it: ssh, or JupyterLab where it is the box."""
    import importlib.util
    import shutil

    infras = {offer.infra for offer in plan.stages[0].candidates}
    if "local" not in infras and shutil.which("ssh") is None:
        raise UsageError(
            "a rented box is reached by ssh, and there is none here", hint="Debian: apt install openssh-client"
        )
    if "local" not in infras:
        return
    lacking = [name for name in ("jupyterlab", "tensorboard") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsageError(
            f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed here",
            hint=f"{install_hint('box')}, or name rented machines with --infra",
        )
