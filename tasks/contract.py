"""What client and machine say to each other: task.json in, progress and result.json out. Standard library only.

Every value is frozen. `from_json` refuses unknown keys and unknown schema numbers, so that a client and a machine of
different versions never guess what the other meant.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = 1

# File names inside <bucket>/<run>/<stage>/ (a directory counts only once its COMMIT is there).
TASK_FILE = "task.json"
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
ENDED_FILE = "ended.json"
LIMIT_FILE = "limit.json"
COMMIT_FILE = "COMMIT"
API_SPENT_FILE = "api-spent.json"  # what an API may have cost the stage: written down before it is used
VLLM_SHARE = 0.9  # of a card, for vLLM: the plan counts with it, so the engine is told (its own default has changed)
STAGE_PREFIX = "stage:"
LABELS_PREFIX = "data/labels-"  # and the sha256 of a folder of labels that came with the recipe
GGUF_FAMILIES = ("qwen2", "qwen3", "llama")  # model types that an export writes as GGUF files
BEFORE_PREFIX = "data/before"  # what was made by hand in an earlier box
PROMPT_OVERHEAD_TOKENS = 256  # an API's chat template, and what a provider puts before a prompt unasked


class Exit(IntEnum):
    """Exit status of the supervisor: why a stage's process ended."""

    DONE = 0
    BUG = 1
    BAD_INPUT = 2
    DEADLINE = 10
    STALLED = 11
    CLIENT_GONE = 12
    TERMINATED = 13
    FENCED = 14
    REBOOTED = 15


class TaskError(Exception):
    """Something the user can mend: one sentence of what happened, one of what to do. Not a bug."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Architecture:
    """A small decoder made from scratch instead of downloaded (a transformers config, random weights)."""

    model_type: str = "qwen2"
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: exactly one of `path` (hub id or folder), `stage` (an earlier stage of this run) or
    `architecture` (made from scratch, with the tokenizer of the teacher)."""

    path: str | None = None
    stage: str | None = None
    architecture: Architecture | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSource:
    """Rows of prompts: a jsonl file in the bucket (`{"input": ..., "answer": ...}`, key relative to the run) or a
    generated set (`builtin:NAME`)."""

    source: str
    sha256: str | None = None


@dataclass(frozen=True)
class PretrainSettings:
    """Next-token training of a model made from scratch on a generated corpus."""

    model: Architecture
    corpus: str
    examples: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    checkpoint_every_s: float = 60.0
    threads: int | None = None


@dataclass(frozen=True)
class ApiTeacher:
    """A teacher behind an OpenAI-compatible API, and the most that it may cost.

    The key itself is in the environment variable `key_env`, and nowhere else.
    """

    base_url: str  # up to what stands before /chat/completions
    model: str
    key_env: str | None  # None = the server asks for none
    input_micros: int  # micro-USD for 1e6 tokens of prompts
    output_micros: int  # micro-USD for 1e6 tokens of answers
    max_cost_micros: int  # no request is sent that could pass it, whatever attempt of the stage sends it
    requests_per_minute: float | None = None
    max_parallel: int = 8
    timeout_s: float = 600.0  # for the whole of one answer
    attempts: int = 6  # at one answer
    limit_name: str = "max_tokens"  # how the API calls the limit of new tokens; or max_completion_tokens

    def cost_micros(self, input_tokens: int, output_tokens: int) -> int:
        """Of one answer, integer micro-USD, rounded up."""
        return -(-(input_tokens * self.input_micros + output_tokens * self.output_micros) // 1_000_000)

    def most_micros(self, prompt_bytes: int, new_tokens: int) -> int:
        """No answer to a prompt of so many bytes in UTF-8 costs more: no tokenizer makes more tokens than bytes."""
        return self.cost_micros(prompt_bytes + PROMPT_OVERHEAD_TOKENS, new_tokens)


@dataclass(frozen=True)
class LabelSettings:
    """Generate with the teacher, verify, keep, score what was kept with top-k soft labels.

    With `api`, that teacher answers, and `teacher` names the tokenizer whose ids the labels hold.
    """

    teacher: ModelSource
    prompts: DataSource
    verify: str  # math | exact | text | none
    samples: int  # prompts taken
    samples_per_prompt: int = 1
    keep: str = "correct"  # correct | shortest | all
    max_new_tokens: int = 8192
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 64  # ids kept a token; 0 = hard labels only
    label_temperature: float = 1.0  # T at which log mass of the k ids is stored, besides T = 1
    logprob_bits: int = 16  # of a stored log-probability; or 8
    engine: str = "auto"  # auto | vllm | transformers
    batch_size: int = 64
    shard_size: int = 256
    max_cut_share: float = 0.3
    seed: int = 0
    threads: int | None = None
    api: ApiTeacher | None = None
    tensor_parallel: int = 1  # GPUs that hold one teacher together; as many engines as that leaves write side by side


@dataclass(frozen=True)
class LoraSettings:
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class TrainSettings:
    """Distil labels into a student; with `compare_hard`, train the hard-label arms on the same data beside it."""

    student: ModelSource
    labels: str  # name of the label stage, or LABELS_PREFIX and a hash
    method: str = "lora"  # lora | qlora | full
    lora: LoraSettings = field(default_factory=LoraSettings)
    alpha: float = 0.7
    temperature: float = 2.0
    steps: int | None = None  # optimizer steps; else epochs
    epochs: float | None = 1.0
    batch_size: int = 8  # samples an optimizer step
    micro_batch: int = 8  # samples a forward pass; accumulation = batch_size / micro_batch
    max_seq_len: int = 8192
    learning_rate: float = 2e-4
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "auto"  # auto | bf16 | fp32
    checkpointing: bool = False
    checkpoint_every_s: float = 300.0
    checkpoint_every_steps: int | None = None
    optimizer: str = "adamw"  # adamw | adamw_8bit
    compile: bool = False  # decoder layers, on CUDA
    early_stop_patience: int | None = None  # evaluations without a new best one; None = no samples are held out
    eval_every_steps: int | None = None  # None = a twentieth of the steps
    seed: int = 0
    compare_hard: bool = False
    compare_seeds: int = 1
    arms_at_once: int = 1  # small students from scratch: so many arms train side by side, in threads
    learning_rates: tuple[float, ...] = ()  # the same small search for each arm; empty = learning_rate as given
    search_steps: int | None = None  # steps of a search run; None = steps / 4
    threads: int | None = None


@dataclass(frozen=True)
class EvaluateSettings:
    """Answers to the held-out prompts by teacher, student before and after: accuracy, speed, latency, memory."""

    student: str  # name of the train stage
    teacher: ModelSource | None
    held_out: DataSource
    verify: str
    max_new_tokens: int = 8192
    batch_size: int = 64
    limit: int | None = None
    threads: int | None = None
    seeds: int = 1  # answers to a problem; 1 = greedy, more are sampled
    temperature: float = 0.6  # of sampled answers
    top_p: float = 0.95
    lm_eval: tuple[str, ...] = ()  # tasks of lm-evaluation-harness, where it is installed
    engine: str = "auto"  # auto | vllm | transformers


@dataclass(frozen=True)
class Origin:
    """What only the client knows of a run, for the student's model card."""

    version: str  # of kdcloud
    recipe: str  # its name
    recipe_sha256: str  # of its text
    evaluation: str | None = None  # an evaluate stage of the same student, before the export
    licences: dict[str, str] = field(default_factory=dict, hash=False)  # of models, by name, as the catalogue has them


@dataclass(frozen=True)
class ExportSettings:
    """The student as files to take home."""

    student: str
    formats: tuple[str, ...] = ("hf",)  # hf, gguf
    threads: int | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class RehearseSettings:
    """Counted steps with checkpoints and no model: tries machine, bucket, cap and teardown for little money."""

    steps: int
    seconds_per_step: float
    checkpoint_every_steps: int = 10
    payload_bytes: int = 65536


StageSettings = (
    PretrainSettings | LabelSettings | TrainSettings | EvaluateSettings | ExportSettings | RehearseSettings
)
BOX = "box"
BOX_READY = "open"  # phase of a box's progress once its servers answer
BOX_FOLDER = "box"  # below the stage's work on the machine, for its owner only
CONNECT_FILE = "connect.json"  # in it: ports and token. Read over SSH, never uploaded


@dataclass(frozen=True)
class BoxSettings:
    """A machine to work on by hand in a stage's place: its environment and inputs, JupyterLab and TensorBoard."""

    kind: str  # of the stage
    settings: StageSettings  # of the stage
    before: bool = False  # files of an earlier box lie at BEFORE_PREFIX
    chat: ModelSource | None = None  # Open WebUI before a server of this model
    save_every_s: float = 60.0  # what was made by hand goes to the bucket, if it changed


Settings = StageSettings | BoxSettings
SETTINGS: dict[str, type[Any]] = {
    "pretrain": PretrainSettings,
    "label": LabelSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "rehearse": RehearseSettings,
    BOX: BoxSettings,
}


def inputs_of(settings: Settings) -> tuple[str, ...]:
    """Stages, or folders of labels, whose committed results a stage reads."""
    match settings:
        case TrainSettings():
            found = [settings.labels, settings.student.stage]
        case LabelSettings():
            found = [settings.teacher.stage]
        case EvaluateSettings():
            found = [settings.student, settings.teacher.stage if settings.teacher else None]
        case ExportSettings():
            found = [settings.student]
        case BoxSettings():
            found = [*inputs_of(settings.settings), settings.chat.stage if settings.chat else None]
        case _:
            found = []
    return tuple(dict.fromkeys(name for name in found if name is not None))


@dataclass(frozen=True)
class Watch:
    """What the supervisor enforces, in seconds. `remaining_s` is sent with the job instead, since it shrinks."""

    idle_s: float = 3600.0  # no progress for this long ends the stage, whatever it is doing
    stall_floor_s: float = 300.0  # never call a stall earlier than this
    tick_s: float = 1.0
    flush_s: float = 60.0  # the last upload may take this long
    client_lease_s: float | None = None  # the client's lease has not moved for so long: end; None = outlive it


@dataclass(frozen=True)
class Task:
    """task.json: data only, never commands."""

    run: str
    stage: str
    kind: str
    attempt: int
    fence: int  # fencing number of the client's lease; a higher one in the bucket stops every write
    bucket: str  # url of the run's own prefix, <bucket>/<run-id>
    settings: Settings
    watch: Watch = field(default_factory=Watch)
    gate: bool = False  # memory is proved before the first step, and the client may set a Limit
    code_sha256: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Task:
        """Raises TaskError for another schema, an unknown kind or an unknown key."""
        raw = json.loads(text)
        if raw.get("schema") != SCHEMA:
            raise TaskError(
                f"task.json has schema {raw.get('schema')}, this kdcloud reads {SCHEMA}",
                hint="resume the run with the kdcloud version that started it",
            )
        kind = raw.get("kind")
        if kind not in SETTINGS:
            raise TaskError(f"task.json asks for an unknown kind of stage: {kind!r}")
        raw["settings"] = build(SETTINGS[kind], raw["settings"])
        raw["watch"] = build(Watch, raw["watch"])
        return build(Task, raw)


@dataclass(frozen=True)
class Link:
    """A stage that goes on on the machine of the one before it: `stage:attempt:seconds` in the supervisor's orders."""

    stage: str
    attempt: int
    kept_s: float  # of the machine's time, what stages before it must leave to it

    def __str__(self) -> str:
        return f"{self.stage}:{self.attempt}:{self.kept_s:.3f}"

    @staticmethod
    def parse(text: str) -> Link:
        """Raises ValueError."""
        stage, attempt, kept_s = text.split(":")
        return Link(stage, int(attempt), float(kept_s))


def links_of(text: str) -> tuple[Link, ...]:
    """What `--then` says, in turn. Raises ValueError."""
    return tuple(Link.parse(part) for part in text.split(",") if part)


def kept_s(links: Sequence[Link]) -> float:
    """Seconds that a stage must leave to those after it on its machine."""
    return sum(link.kept_s for link in links)


@dataclass(frozen=True)
class Progress:
    """progress.json: written by the working loop itself. `count` must move while work is done."""

    phase: str = "start"
    count: int = 0  # monotone over the whole stage; steps, samples, bytes: whatever moves
    done: float = 0.0  # of `total`, for the bar
    total: float | None = None
    unit: str = "steps"
    declared: bool = False  # a phase (download, tokenise, upload) in which CPU, disk or network count as work
    step_s: float | None = None  # median seconds of a step lately
    phase_from: float = 0.0  # `done` when this phase was first reported in this attempt
    phase_s: float = 0.0  # seconds in it since then, until `done` last moved
    work_s: float = 0.0  # seconds of this attempt in phases that are not declared
    phases_s: dict[str, float] = field(default_factory=dict)  # seconds of this attempt in declared phases, by name
    moved_bytes: dict[str, float] = field(default_factory=dict)  # in those that count bytes: upload, download
    attempt: int = 0  # set by the supervisor
    numbers: dict[str, float] = field(default_factory=dict)  # loss, tokens_per_s ...

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Progress:
        return build(Progress, json.loads(text))


@dataclass(frozen=True)
class Writing:
    """Answers that an engine is writing side by side, as far as they are: numbers of a Progress, all of one unit of it
    (a shard, or a seed of one model).

    Short answers end first, so those that ended are no sample of all: `length` and `going_on` are the product-limit
    estimate, in which an answer in the middle counts for as long as it was seen (Kaplan and Meier 1958).
    """

    answers: float  # of the unit, that this attempt is to write
    before: float  # answers of the stage or model that are there from before the unit, or earlier attempts
    later: float  # answers of later units
    ended: float
    flight: float  # most at once so far
    tokens: float
    steps: float  # of the engine
    seconds: float
    length: float  # tokens of an answer, on average, up to `longest`
    going_on: float  # share of answers that are longer than `longest`
    longest: float  # tokens

    def of_all(self, engines: int) -> Writing:
        """Of so many engines side by side, each as far as this one."""
        counts = ("answers", "before", "later", "ended", "flight", "tokens")
        return replace(self, **{name: engines * getattr(self, name) for name in counts})

    def numbers(self) -> dict[str, float]:
        return {f"writing_{name}": float(value) for name, value in asdict(self).items()}

    @staticmethod
    def of(progress: Progress) -> Writing | None:
        """None where nothing of the kind was told."""
        told = {f.name: progress.numbers.get(f"writing_{f.name}") for f in fields(Writing)}
        known = {name: value for name, value in told.items() if value is not None}
        return Writing(**known) if len(known) == len(told) else None


@dataclass(frozen=True)
class Limit:
    """limit.json: the client tells one attempt of a stage to end early, at `total` of its progress."""

    total: float
    attempt: int
    fence: int  # of the client's lease

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Limit:
        return build(Limit, json.loads(text))


@dataclass(frozen=True)
class Ended:
    """ended.json: why the supervisor ended the stage, and what was saved."""

    reason: str  # done | bug | bad_input | deadline | stalled | client_gone | terminated | fenced | rebooted
    rc: int
    message: str = ""
    hint: str = ""
    seconds: float = 0.0  # from the supervisor's start
    peak_gib: float | None = None  # largest resident memory of the process tree, or of the GPU
    last_checkpoint: str | None = None
    attempt: int = 0
    work_s: float | None = None  # of `seconds`, at the stage's own work: not starting, fetching or sending
    phases_s: dict[str, float] = field(default_factory=dict)  # of the rest, by phase
    moved_bytes: dict[str, float] = field(default_factory=dict)  # in those that count bytes
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Ended:
        return build(Ended, json.loads(text))


T = TypeVar("T")

_NESTED: dict[tuple[str, str], type[Any]] = {
    ("PretrainSettings", "model"): Architecture,
    ("ModelSource", "architecture"): Architecture,
    ("LabelSettings", "teacher"): ModelSource,
    ("LabelSettings", "prompts"): DataSource,
    ("LabelSettings", "api"): ApiTeacher,
    ("TrainSettings", "student"): ModelSource,
    ("TrainSettings", "lora"): LoraSettings,
    ("EvaluateSettings", "teacher"): ModelSource,
    ("EvaluateSettings", "held_out"): DataSource,
    ("ExportSettings", "origin"): Origin,
    ("BoxSettings", "chat"): ModelSource,
}


def build(cls: type[T], raw: Any) -> T:
    """The dataclass from plain JSON data, nested ones too; lists become tuples. Raises TaskError on unknown keys."""
    if is_dataclass(raw) and isinstance(raw, cls):
        return raw
    if not isinstance(raw, dict):
        raise TaskError(f"{cls.__name__} must be an object, not {type(raw).__name__}")
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(raw) - known)
    if unknown:
        raise TaskError(
            f"{cls.__name__} has unknown keys: {', '.join(unknown)}",
            hint="client and machine run different versions of kdcloud",
        )
    values: dict[str, Any] = {}
    for key, value in raw.items():
        nested = SETTINGS.get(raw.get("kind", "")) if (cls, key) == (BoxSettings, "settings") else None
        nested = nested or _NESTED.get((cls.__name__, key))
        if nested is not None and value is not None:
            value = build(nested, value)
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    return cls(**values)


# --- what to type where a package is missing


@dataclass(frozen=True)
class Installation:
    """How the kdcloud that runs came here."""

    python: str = sys.executable
    has_pip: bool = True
    pipx: str | None = None  # pipx's name for the environment
    clone: str | None = None  # folder of an editable installation
    requires: tuple[str, ...] | None = None  # as in its metadata; None: none are here, as on a rented machine


def install_hint(extra: str, *more: str, how: Installation | None = None) -> str:
    """The command that adds an extra of kdcloud, and further packages, to the environment that runs it.

    It names the packages of the extra instead of kdcloud: an index may not know it, or know another one by that name.
    """
    how = how or installation()
    if how.requires is None and extra:
        return f"install what kdcloud's extra [{extra}] names into the environment of {how.python}"
    packages = _merged([*_of_extra(how.requires or (), extra), *more])
    if how.pipx:  # --force: else it leaves a package of another version, or with fewer extras, as it is
        inject = ["pipx", "inject", "--force"]
        sky = [name for name in packages if name.startswith("skypilot")]  # whose command is next
        rest = [name for name in packages if name not in sky]
        each = [[*inject, "--include-apps", how.pipx, *sky]] * bool(sky) + [[*inject, how.pipx, *rest]] * bool(rest)
        return " && ".join(map(shlex.join, each))
    pip = [how.python, "-m", "pip", "install"] if how.has_pip else ["uv", "pip", "install", "--python", how.python]
    if how.clone and extra:
        return shlex.join([*pip, "-e", f"{how.clone}[{extra}]", *more])
    return shlex.join([*pip, *packages])


def _merged(packages: Sequence[str]) -> list[str]:
    """Two extras of one package in the same versions as one requirement."""
    found: dict[tuple[str, str], list[str]] = {}
    for package in packages:
        name, extras, versions = re.fullmatch(r"([^\[=<>~! ]+)(?:\[([^]]*)\])?(.*)", package).groups()  # type: ignore[union-attr]
        found.setdefault((name, versions), []).extend((extras or "").split(",") if extras else [])
    return [
        f"{name}[{','.join(dict.fromkeys(extras))}]{versions}" if extras else f"{name}{versions}"
        for (name, versions), extras in found.items()
    ]


def _of_extra(requires: Sequence[str], extra: str) -> list[str]:
    """Requirements that stand in the metadata under `extra == "NAME"`, without that marker."""
    parts = (line.partition(";") for line in requires)
    return [
        name.strip() for name, _, marker in parts if re.search(rf"""\bextra == ["']{re.escape(extra)}["']""", marker)
    ]


def installation() -> Installation:
    """Read from this environment: pipx leaves a file at its top, pip and uv one that says where kdcloud came from."""
    from importlib.metadata import PackageNotFoundError, distribution
    from importlib.util import find_spec
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    prefix, has_pip = Path(sys.prefix), find_spec("pip") is not None
    pipx = prefix.name if (prefix / "pipx_metadata.json").is_file() else None
    try:
        found = distribution("kdcloud")
        origin = json.loads(found.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return Installation(has_pip=has_pip, pipx=pipx)
    editable = origin.get("dir_info", {}).get("editable", False)
    clone = url2pathname(urlsplit(origin["url"]).path) if editable else None
    return Installation(sys.executable, has_pip, pipx, clone, tuple(found.requires or ()))
