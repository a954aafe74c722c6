"""Which models of a run are its student, the student before training, and its teacher? Where do they lie?

`find` decides from the plan and from what is committed; `fetch` brings what is needed to this machine, each file
checked against its SHA-256. `student_folder` does both for whoever wants to serve or publish the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.config import Home
from orchestrator.errors import UsageError
from orchestrator.ledger import Run
from orchestrator.plan import StagePlan
from orchestrator.session import plan_of, state_of
from tasks.bucket import Bucket, Corrupt, FileEntry, Manifest, fetch_folder, open_bucket, read_commit, sha256_of
from tasks.contract import EvaluateSettings, ExportSettings, LabelSettings, ModelSource, TrainSettings

# Folders of a stage, as tasks/export.py, train.py, models.py and labels.py name them.
EXPORTED = "hf"
TRAINED = "model"
BEFORE = "before"
TOKENIZER = "tokenizer"
ADAPTER_FILE = "student.json"
CACHE = "models"  # below KDCLOUD_HOME


class Role(StrEnum):
    STUDENT = "student"
    BEFORE = "before"  # the student as it was when training began
    TEACHER = "teacher"


@dataclass(frozen=True)
class Model:
    """One model of a run: `part` of the folder of a `stage`, or else a `source` outside of the run.

    `adapter`: that folder holds an adapter, to be merged into its base. `tokenizer`: the stage whose `tokenizer/` is
    used instead of the model's own.
    """

    role: Role
    name: str  # for people
    stage: str | None = None
    part: str = TRAINED
    source: ModelSource | None = None
    adapter: bool = False
    tokenizer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As tasks/answer.py reads it."""
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """The models of a run that there are, in the order of Role; `missing` says why one is not among them.

    `parts`: folders of stages that have to be here for them.
    """

    run: str
    models: tuple[Model, ...]
    missing: Mapping[Role, str]
    parts: Mapping[str, frozenset[str]]
    manifests: Mapping[str, Manifest] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(entry.size for stage in self.parts for entry in self.files(stage).values())

    def files(self, stage: str) -> dict[str, FileEntry]:
        """What is needed of a stage, by name below it."""
        parts = self.parts[stage]
        return {rel: entry for rel, entry in self.manifests[stage].files.items() if rel.partition("/")[0] in parts}


@dataclass(frozen=True)
class Student:
    """The student as a folder on this machine: safetensors, tokenizer, chat template."""

    folder: Path
    stage: str
    adapter: bool  # no whole model: its base is named in `student.json`

    def card(self) -> str:
        """The model card, "" where the stage wrote none."""
        path = self.folder / "README.md"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def student_folder(
    run: Run, home: Home, *, stage: str | None = None, moved: Callable[[int], None] = lambda size: None
) -> Student:
    """The run's student on this machine, fetched where its bucket is elsewhere: what export made of it, else what
    training left. `moved` hears the bytes. Raises UsageError, BucketError."""
    bucket = open_bucket(run.bucket)
    found = find(run, bucket, stage=stage, roles=(Role.STUDENT,))
    root = fetch(found, bucket, home, moved=moved)
    (student,) = found.models
    assert student.stage is not None
    return Student(root / student.stage / student.part, student.stage, student.adapter)


def find(
    run: Run, bucket: Bucket, *, stage: str | None = None, roles: Sequence[Role] = tuple(Role), exported: bool = False
) -> Found:
    """The models of a run in these roles. Raises UsageError while there is no student.

    `stage`: the export or train stage whose student is meant; by default the last one that is done. `exported`: an
    export's, where there is one.
    """
    stages = plan_of(run).stages
    manifests: dict[str, Manifest] = {}
    for one in stages:
        manifest = read_commit(bucket, one.name)
        if manifest is not None:
            manifests[one.name] = manifest
    return choose(
        run.id, stages, manifests, state=state_of(run), done=set(run.done), stage=stage, roles=roles, exported=exported
    )


def choose(
    run: str, stages: Sequence[StagePlan], manifests: Mapping[str, Manifest], *, state: str = "done",
    done: set[str] | frozenset[str] = frozenset(), stage: str | None = None, roles: Sequence[Role] = tuple(Role),
    exported: bool = False,
) -> Found:  # fmt: skip
    """What `find` finds, from the plan and what is committed; pure. `done`: stages that the ledger calls done."""
    house = _House(run, {one.name: one for one in stages}, manifests)
    taker = _pick(house, state, done, stage, exported=exported)
    train = _trained_by(house, taker)
    found: list[Model] = []
    missing: dict[Role, str] = {}
    for role in (role for role in Role if role in roles):
        made = _student(house, taker, train) if role is Role.STUDENT else _OTHERS[role](house, train)
        if isinstance(made, Model):
            found.append(made)
        else:
            missing[role] = made
    parts: dict[str, set[str]] = {}
    for model in found:
        _need(house, model, parts)
    return Found(run, tuple(found), missing, {name: frozenset(names) for name, names in parts.items()}, manifests)


def fetch(found: Found, bucket: Bucket, home: Home, *, moved: Callable[[int], None] = lambda size: None) -> Path:
    """The folder in which every stage of `found` lies as `<stage>/<part>/...`, each file checked.

    A bucket that is a folder of this machine is used as it is; another one's files come into `KDCLOUD_HOME/models/RUN`,
    and are not fetched twice. Raises BucketError.
    """
    return bring({stage: found.files(stage) for stage in found.parts}, found.run, bucket, home, moved=moved)


def bring(
    files: Mapping[str, Mapping[str, FileEntry]], run: str, bucket: Bucket, home: Home, *,
    moved: Callable[[int], None] = lambda size: None,
) -> Path:  # fmt: skip
    """As `fetch`, for any committed files of stages."""
    if bucket.url.startswith("file:"):
        root = Path(bucket.url.removeprefix("file:"))
        for stage, wanted in files.items():
            _check(root / stage, wanted, moved)
        return root
    home.make()
    root = home.root / CACHE / run
    for stage, wanted in files.items():
        fetch_folder(bucket, stage, root / stage, moved=moved, only=wanted.__contains__)
    return root


def _check(folder: Path, files: Mapping[str, FileEntry], moved: Callable[[int], None]) -> None:
    for rel, entry in files.items():
        path = folder / rel
        if not path.is_file() or path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            raise Corrupt(f"{path} is not what was committed", hint="somebody changed or removed it: train again")
        moved(entry.size)


# -- choosing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _House:
    run: str
    plan: Mapping[str, StagePlan]
    manifests: Mapping[str, Manifest]

    def has(self, stage: str, part: str) -> bool:
        """Whether a committed stage has such a folder."""
        manifest = self.manifests.get(stage)
        return manifest is not None and any(rel.startswith(f"{part}/") for rel in manifest.files)

    def gives_student(self, stage: StagePlan) -> bool:
        return self.has(stage.name, EXPORTED if stage.kind == "export" else TRAINED)


def _pick(
    house: _House, state: str, done: set[str] | frozenset[str], stage: str | None, *, exported: bool = False
) -> StagePlan:
    """The stage whose student is taken. Raises UsageError."""
    makers = [one for one in house.plan.values() if one.kind in ("export", "train")]
    if not makers:
        raise UsageError(f"run {house.run} trains no student", hint="name another run: `kdcloud status` lists them")
    if stage is not None:
        chosen = [one for one in makers if one.name == stage]
        if not chosen:
            names = ", ".join(one.name for one in makers)
            raise UsageError(f"run {house.run} has no student of a stage {stage!r}", hint=f"there is one of: {names}")
        makers = chosen
    exports = [one for one in makers if one.kind == "export"] if exported else []
    for one in [*reversed(exports), *reversed(makers)]:
        if house.gives_student(one):
            return one
    first = makers[0]
    if first.name in done:
        raise UsageError(
            f"stage {first.name} of {house.run} is done, but its model is not in the bucket any more",
            hint="it was pruned or removed: run the recipe again",
        )
    go_on = f"kdcloud run --resume {house.run}"
    hint = f"`kdcloud attach {house.run}` watches it" if state == "running" else f"go on with `{go_on}`"
    raise UsageError(f"run {house.run} has no student yet: stage {first.name} is not done ({state})", hint=hint)


def _trained_by(house: _House, taker: StagePlan) -> StagePlan:
    """The train stage behind a student."""
    return house.plan[taker.settings.student] if isinstance(taker.settings, ExportSettings) else taker


def _student(house: _House, taker: StagePlan, train: StagePlan) -> Model:
    if taker.kind == "export":
        return Model(Role.STUDENT, f"stage {taker.name}", taker.name, EXPORTED)
    return replace(_of_stage(house, train.name), role=Role.STUDENT)


def _before(house: _House, train: StagePlan) -> Model | str:
    settings = train.settings
    assert isinstance(settings, TrainSettings)
    if settings.student.architecture is not None:
        if house.has(train.name, BEFORE):
            return Model(Role.BEFORE, "as training began", train.name, BEFORE)
        return f"stage {train.name} left nothing of its start"
    tokenizer = train.name if house.has(train.name, TOKENIZER) else None
    if settings.student.stage is not None:
        if not house.has(settings.student.stage, TRAINED):
            return f"stage {settings.student.stage} left no model"
        return replace(_of_stage(house, settings.student.stage), role=Role.BEFORE, tokenizer=tokenizer)
    return _outside(Role.BEFORE, settings.student, tokenizer)


def _teacher(house: _House, train: StagePlan) -> Model | str:
    assert isinstance(train.settings, TrainSettings)
    label = house.plan.get(train.settings.labels)
    source: ModelSource | None = None
    if label is not None and isinstance(label.settings, LabelSettings):
        if label.settings.api is not None:
            return f"{label.settings.api.model} answered by its API, and costs money"
        source = label.settings.teacher
    else:  # labels that came with the recipe: an evaluation may name who made them
        named = (one.settings.teacher for one in house.plan.values() if isinstance(one.settings, EvaluateSettings))
        source = next((teacher for teacher in named if teacher is not None), None)
    if source is None:
        return "the labels came with the recipe"
    if source.stage is None:
        return _outside(Role.TEACHER, source, None)
    if not house.has(source.stage, TRAINED):
        return f"stage {source.stage} left no model"
    return replace(_of_stage(house, source.stage), role=Role.TEACHER)


_OTHERS = {Role.BEFORE: _before, Role.TEACHER: _teacher}


def _of_stage(house: _House, stage: str) -> Model:
    adapter = f"{TRAINED}/{ADAPTER_FILE}" in house.manifests[stage].files
    return Model(Role.STUDENT, f"stage {stage}", stage, TRAINED, adapter=adapter)


def _outside(role: Role, source: ModelSource, tokenizer: str | None) -> Model:
    return Model(role, str(source.path), source=source, tokenizer=tokenizer)


def _need(house: _House, model: Model, parts: dict[str, set[str]]) -> None:
    """Adds what has to be here for a model: its own folder, its tokenizer, and for an adapter the stage of its base."""
    if model.tokenizer is not None:
        parts.setdefault(model.tokenizer, set()).add(TOKENIZER)
    if model.stage is None:
        return
    parts.setdefault(model.stage, set()).add(model.part)
    settings = house.plan[model.stage].settings
    base = settings.student.stage if model.adapter and isinstance(settings, TrainSettings) else None
    if base is not None:
        _need(house, _of_stage(house, base), parts)
