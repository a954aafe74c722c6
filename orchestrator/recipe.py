"""What does the user want? A recipe file becomes one frozen, typed value, or a list of all that is wrong with it."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
)

from orchestrator.catalog import GPUS, ModelShape, UnknownModel, shape_of
from orchestrator.errors import UsageError
from orchestrator.money import Amount, parse_amount, parse_budget, parse_duration
from orchestrator.shipped import builtin_recipes
from tasks.contract import GGUF_FAMILIES

if TYPE_CHECKING:
    from orchestrator.label_folder import LabelFolder
else:
    LabelFolder = Any  # read_label_folder makes them; few recipes name one, and its module loads much

Loc = tuple[str | int, ...]
MOST_GPUS = 16  # of one machine
MODEL_STAGES = ("pretrain", "train")  # kinds whose result is a model


def _price(value: object) -> Amount:
    amount = parse_amount(value)
    if not amount.hourly:
        raise ValueError(f"{value!r} is not a price an hour; write it like 0.10 USD/h")
    if amount.value < 0:
        raise ValueError(f"must not be below 0, not {amount}")
    return amount


def _amount(value: object) -> Amount:
    amount = parse_amount(value)
    if amount.hourly or amount.value < 0:
        raise ValueError(f"{value!r} is not the price of a million tokens; write it like 0.55 USD")
    return amount


def _key_env(value: object) -> str:
    """A recipe of somebody else must not send any secret it likes to a server it names."""
    name = str(value)
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*_API_KEY", name) or name.startswith(_CLOUDS):
        raise ValueError(f"{name!r} is not the variable of a model API's key; name one like OPENAI_API_KEY")
    return name


def _base_url(value: object) -> str:
    parts = urlsplit(str(value))
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.hostname or parts.username or not (parts.scheme == "https" or (parts.scheme == "http" and here)):
        raise ValueError(f"{value!r} is not an address of an API; write it like https://api.example.com/v1")
    return str(value)


def _duration(value: object) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError(f"must be longer than 0, not {value!r}")
    return seconds


def _many(value: object) -> object:
    return [value] if isinstance(value, str) else value


_CLOUDS = ("AWS", "RUNPOD", "LAMBDA", "VAST", "NEBIUS", "OCI", "GCP", "AZURE", "HF_", "KDCLOUD", "SKYPILOT")
_INFRA = re.compile(r"[a-z0-9][a-z0-9._-]*(/[A-Za-z0-9._-]+)*")


def _infra(value: object) -> str:
    if not isinstance(value, str) or not _INFRA.fullmatch(value):
        raise ValueError(f"{value!r} is not an infra; write it like local, aws or slurm/lab")
    return value


def _gpu(value: object) -> str:
    names = {name.upper(): name for name in GPUS}
    text, colon, count = str(value).upper().replace(" ", "").removeprefix("NVIDIA").removeprefix("-").partition(":")
    if colon and not (count.isascii() and count.isdecimal() and 1 <= int(count) <= MOST_GPUS):
        raise ValueError(f"{value!r} has no number of GPUs from 1 to {MOST_GPUS} after the colon; write it like A100:8")
    if text not in names:
        close = difflib.get_close_matches(text, names, n=1)
        nearest = f"; did you mean {names[close[0]]}?" if close else f"; known are {', '.join(GPUS)}"
        raise ValueError(f"unknown GPU {value!r}{nearest}")
    return names[text] + (f":{int(count)}" if colon else "")


def gpu_counts(gpus: Iterable[str]) -> dict[str, frozenset[int]]:
    """How many GPUs a machine may have by card, as `gpus:` says it; an empty set stands for any number."""
    found: dict[str, frozenset[int]] = {}
    free = {one for one in gpus if ":" not in one}
    for one in gpus:
        name, _, count = one.partition(":")
        found[name] = frozenset() if name in free else found.get(name, frozenset()) | {int(count)}
    return found


def _as_text(example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": [example]})


Budget = Annotated[Amount, BeforeValidator(parse_budget), _as_text("50 CNY")]
Price = Annotated[Amount, BeforeValidator(_price), _as_text("0.10 USD/h")]
TokenPrice = Annotated[Amount, BeforeValidator(_amount), _as_text("0.55 USD")]
KeyEnv = Annotated[str, BeforeValidator(_key_env), _as_text("OPENAI_API_KEY")]
BaseUrl = Annotated[str, BeforeValidator(_base_url), _as_text("https://api.example.com/v1")]
Duration = Annotated[float, BeforeValidator(_duration), _as_text("8h")]
Infra = Annotated[
    tuple[Annotated[str, BeforeValidator(_infra), _as_text("aws")], ...],
    BeforeValidator(_many),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Gpus = Annotated[
    tuple[Annotated[str, BeforeValidator(_gpu)], ...],
    BeforeValidator(_many),
    Field(min_length=1),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"anyOf": [{"enum": list(GPUS)}, {"pattern": f"^({'|'.join(GPUS)}):[1-9][0-9]?$"}]},
            "minItems": 1,
        }
    ),
]
Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1)]
Verify = Literal["math", "exact", "text", "none"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)  # built once, with the whole recipe


class ArchitecturePart(_Part):
    """A small decoder made from scratch, with random weights."""

    model_type: Literal["qwen2"] = Field("qwen2", description="family of its layers")
    hidden_size: Count = Field(96, description="width of the residual stream")
    intermediate_size: Count = Field(256, description="width inside the MLP")
    num_hidden_layers: Count = Field(2, description="layers")
    num_attention_heads: Count = Field(4, description="heads of attention; they divide hidden_size")
    num_key_value_heads: Count = Field(2, description="heads of keys and values; they divide the heads")
    tie_word_embeddings: Flag = Field(True, description="one table for reading and writing tokens")


class LocalPart(_Part):
    """This machine, for `infra: local`."""

    price: Price = Field(description="what an hour of this machine costs; 0 USD/h is allowed")
    gflops: Positive | None = Field(None, description="measured speed of this machine, 1e9 operations a second")


class DataPart(_Part):
    """Where prompts come from and how an answer is checked."""

    prompts: Name | None = Field(None, description='a jsonl file of {"input", "answer"}, or builtin:NAME')
    held_out: Name | None = Field(None, description="prompts for the evaluation, never trained on")
    verify: Verify = Field("none", description="how an answer is compared with the right one")


class ComparePart(_Part):
    """Control rows of the evaluation, priced like everything else."""

    hard_labels: Flag = Field(False, description="also train on hard labels: same data, steps, seeds and batch order")
    seeds: Count = Field(1, description="each arm is trained so many times; mean and span are shown")
    learning_rates: tuple[Positive, ...] = Field((), description="the same small search for each arm")
    search_steps: Count | None = Field(None, description="steps of each try; default: a quarter of the training")
    at_once: Count = Field(1, description="arms trained side by side; for students made from scratch")


class SoftLabelsPart(_Part):
    """What is kept of the teacher's distribution."""

    top_k: Whole = Field(64, description="ids kept a token; 0 keeps hard labels only")
    temperature: Positive | None = Field(None, description="default: the temperature of the training that uses them")
    logprob_bits: Literal[16, 8] = Field(16, description="8: 220 bytes a token of 64 ids instead of 284, off by 0.04")


class ApiPart(_Part):
    """A teacher behind an OpenAI-compatible API, with what a million tokens cost there."""

    base_url: BaseUrl = Field(description="what stands before /chat/completions")
    model: Name = Field(description="as the API calls it")
    key_env: KeyEnv | None = Field(None, description="environment variable that holds the key; default: no key")
    input_price: TokenPrice = Field(description="of 1e6 tokens of prompts")
    output_price: TokenPrice = Field(description="of 1e6 tokens of answers, thinking included")
    requests_per_minute: Positive | None = Field(None, description="your provider's limit; default: none")
    max_parallel: Annotated[int, Field(strict=True, ge=1, le=256)] = Field(8, description="requests in flight at once")
    timeout: Duration = Field(600.0, description="for one answer")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what this API calls the limit of an answer"
    )


class LoraPart(_Part):
    """Low-rank adapters on frozen weights."""

    r: Count = Field(8, description="rank: more learns more and takes more memory")
    alpha: Count = Field(16, description="scale: what an adapter adds is multiplied by alpha / r")
    dropout: Share = Field(0.05, description="share of an adapter's input that is dropped while training")
    targets: tuple[Name, ...] = Field(
        ("q_proj", "k_proj", "v_proj"),
        min_length=1,
        description="matrices that get an adapter; also o_proj, gate_proj, up_proj, down_proj",
    )


class LossPart(_Part):
    """alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE."""

    alpha: Share = Field(0.7, description="share of the soft labels in the loss; 0 is hard labels only")
    temperature: Positive = Field(2.0, description="softens teacher and student alike; 2 to 4 is usual")


class _Stage(_Part):
    name: Annotated[str, Field(max_length=12, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")] = Field(
        description="a-z, 0-9 and -, at most 12 characters: it becomes part of machine names"
    )
    infra: Infra | None = Field(None, description="where this stage may run; default: the recipe's")
    gpus: Gpus | None = Field(None, description="which GPUs this stage may use; default: the recipe's")
    spot: Flag | None = Field(None, description="take spot machines; default: the recipe's")


class _Working(_Stage):
    threads: Count | None = Field(None, description="CPU threads; default: all")


class PretrainStage(_Working):
    """Next-token training of a small model made from scratch, on a generated corpus."""

    kind: Literal["pretrain"]
    model: ArchitecturePart = Field(description="its shape")
    corpus: Name = Field(description="builtin:NAME")
    examples: Count = Field(description="texts of the corpus that are made")
    steps: Count = Field(description="optimizer steps")
    batch_size: Count = Field(description="examples an optimizer step")
    learning_rate: Positive = Field(description="AdamW's, at its peak after the warm-up")
    seed: Whole = Field(0, description="of first weights and order")
    checkpoint_every: Duration | None = Field(None, description="default: 5min on a GPU, 20s without")


class LabelStage(_Working):
    """The teacher answers the prompts; right answers are kept and scored with soft labels."""

    kind: Literal["label"]
    teacher: Name = Field(description="an earlier pretrain or train stage, a model as owner/name, or a folder")
    api: ApiPart | None = Field(
        None, description="answers come from there; `teacher` is then the model whose tokenizer the labels are for"
    )
    revision: Name | None = Field(None, description="commit of a hub model")
    prompts: Name | None = Field(None, description="default: data.prompts")
    verify: Verify | None = Field(None, description="default: data.verify")
    samples: Count = Field(description="prompts taken")
    samples_per_prompt: Count = Field(1, description="answers to each prompt")
    keep: Literal["correct", "shortest", "all"] = Field(
        "correct",
        description="which answers become labels: right ones, the shortest right one of a prompt, or all that ended",
    )
    max_new_tokens: Count | None = Field(
        None, description="longest answer in tokens, thinking included; default: 8192, of built-in prompts 48"
    )
    temperature: NotNegative = Field(0.6, description="of the sampling, not of the labels; 0 is greedy")
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(
        0.95, description="sampling takes the likeliest tokens that together have this share"
    )
    soft_labels: SoftLabelsPart = Field(SoftLabelsPart(), description="what is kept of the teacher's probabilities")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="what writes the answers; auto: vLLM on a GPU that it runs on, else transformers"
    )
    batch_size: Count | None = Field(None, description="prompts at once; default: what fits")
    shard_size: Count | None = Field(None, description="prompts a file of labels, and between commits; default: 256")
    max_cut_share: Share = Field(
        0.3, description="the stage ends when more answers than this are cut off at their limit"
    )
    seed: Whole = Field(0, description="of the sampling")


class TrainStage(_Working):
    """The student learns from the labels."""

    kind: Literal["train"]
    student: Annotated[
        Annotated[str, Tag("id"), Field(min_length=1)] | Annotated[ArchitecturePart, Tag("architecture")],
        Discriminator(lambda value: "id" if isinstance(value, str) else "architecture"),
    ] = Field(description="a model as owner/name, a folder, an earlier pretrain or train stage, or an architecture")
    revision: Name | None = Field(None, description="commit of a hub model")
    labels: Name = Field(description="an earlier label stage, or a folder of labels (`kdcloud labels import`)")
    method: Literal["lora", "qlora", "full"] = Field("lora", description="qlora: LoRA on weights held in 4 bits")
    lora: LoraPart = Field(LoraPart(), description="the adapters, for method lora and qlora")
    loss: LossPart = Field(LossPart(), description="alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE")
    steps: Count | None = Field(None, description="optimizer steps; or give epochs")
    epochs: Positive | None = Field(None, description="times through the labels; default 1")
    batch_size: Count = Field(8, description="samples an optimizer step")
    micro_batch: Count | None = Field(None, description="samples a forward pass; default: what fits")
    max_seq_len: Count | None = Field(None, description="default: the longest prompt and answer")
    learning_rate: Positive = Field(2e-4, description="AdamW's, at its peak after the warm-up; 2e-5 is usual for full")
    warmup_share: Share = Field(0.05, description="share of the steps in which the rate rises from 0")
    weight_decay: NotNegative = Field(0.0, description="AdamW's")
    max_grad_norm: Positive = Field(1.0, description="longer gradients are cut to this length")
    precision: Literal["bf16", "fp32"] | None = Field(None, description="default: bf16 where the device has it")
    checkpointing: Flag | None = Field(None, description="gradient checkpointing; default: where it is needed")
    checkpoint_every: Duration | None = Field(None, description="default: 5min on a GPU, 20s without")
    checkpoint_every_steps: Count | None = Field(
        None, description="saved after so many steps, too; default: by time alone"
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: a quarter of its memory")
    compile: Flag | None = Field(
        None, description="torch.compile of the layers on CUDA; default: where training takes long enough to gain by it"
    )
    early_stop_patience: Count | None = Field(
        None, description="hold out a tenth of the prompts; end so many evaluations after their best loss, and keep it"
    )
    eval_every_steps: Count | None = Field(None, description="with early_stop_patience; default: steps / 20")
    seed: Whole = Field(0, description="of adapters, dropout and the order of samples")


class EvaluateStage(_Working):
    """Answers to held-out prompts: accuracy, speed, latency and memory of teacher and student."""

    kind: Literal["evaluate"]
    student: Name = Field(description="an earlier train stage")
    teacher: Name | None = Field(None, description="a model stage, a label stage (its teacher), owner/name or a folder")
    held_out: Name | None = Field(None, description="default: data.held_out")
    verify: Verify | None = Field(None, description="default: data.verify")
    max_new_tokens: Count | None = Field(
        None, description="longest answer in tokens; default: as long as those that the student learned from"
    )
    batch_size: Count | None = Field(None, description="prompts at once; default: what fits")
    limit: Count | None = Field(None, description="at most so many prompts")
    seeds: Count = Field(1, description="answers to each prompt: 1 is greedy, more are sampled")
    temperature: Positive = Field(0.6, description="of sampled answers")
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(0.95, description="of sampled answers")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="what writes the answers; auto: vLLM on a GPU that it runs on, else transformers"
    )
    lm_eval: tuple[Name, ...] = Field((), description="tasks of lm-evaluation-harness, where that is installed")


class ExportStage(_Working):
    """The student as files to take home."""

    kind: Literal["export"]
    student: Name = Field(description="an earlier train stage")
    formats: tuple[Literal["hf", "gguf"], ...] = Field(
        ("hf",), min_length=1, description="hf: a Hugging Face folder; gguf: files for llama.cpp and Ollama"
    )


class RehearseStage(_Stage):
    """Counted steps with checkpoints and no model: tries machine, bucket, cap and teardown for little money."""

    kind: Literal["rehearse"]
    steps: Count = Field(description="counted, without a model")
    seconds_per_step: Positive = Field(description="seconds that each takes")
    checkpoint_every_steps: Count = Field(10, description="steps between two checkpoints")
    payload_bytes: Whole = Field(65536, description="bytes of a checkpoint")


Stage = PretrainStage | LabelStage | TrainStage | EvaluateStage | ExportStage | RehearseStage
KINDS: dict[str, type[_Stage]] = {
    "pretrain": PretrainStage,
    "label": LabelStage,
    "train": TrainStage,
    "evaluate": EvaluateStage,
    "export": ExportStage,
    "rehearse": RehearseStage,
}


class RecipeSpec(_Part):
    """A kdcloud recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)] = Field(
        description="what the run is called; it begins the run's id"
    )
    budget: Budget = Field(description="what the run may cost in all, like 50 CNY; --budget overrides it")
    deadline: Duration | None = Field(None, description="how long the run may take, like 8h")
    idle: Duration = Field(3600.0, description="without progress for so long, a machine is ended")
    bucket: str | None = Field(None, description="s3://bucket/prefix or file:folder; default: under KDCLOUD_HOME")
    infra: Infra | None = Field(None, description="where it may run: local, or clouds; default: every one known")
    gpus: Gpus | None = Field(None, description="which GPUs it may use; default: all known")
    spot: Flag = Field(False, description="take spot machines")
    local: LocalPart | None = Field(None, description="this computer, for stages on infra: local")
    on_shortfall: Literal["stop", "fewer_samples", "fewer_epochs"] = Field(
        "stop", description="what a stage does when its first steps show that money or time will not last"
    )
    allow_account_key: Flag = Field(False, description="let an account-wide key onto a rented machine")
    trust_remote_code: Flag = Field(False, description="run code that comes with a model")
    data: DataPart = Field(DataPart(), description="prompts and how answers are checked; paths start at the recipe")
    compare: ComparePart = Field(ComparePart(), description="control rows, trained beside the student and priced")
    stages: tuple[Annotated[Stage, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="done one after the other, in this order"
    )


@dataclass(frozen=True)
class DataFile:
    """A prompt file of the user's: uploaded to `<run>/<key>` before the first stage."""

    path: str
    key: str
    sha256: str
    rows: int
    longest_bytes: int  # of a line


class Recipe(RecipeSpec):
    """The recipe, with what had to be read beside it."""

    path: str
    text: str
    bucket_url: str | None  # the bucket with its folder made absolute
    files: Mapping[str, DataFile]  # by the text that stands in the recipe
    models: Mapping[str, ModelShape]  # by the text that stands in the recipe
    folders: Mapping[str, str]  # model folders made absolute, by the text that stands in the recipe
    labels: Mapping[str, LabelFolder]  # by the text that stands in the recipe


def load_recipe(path_or_name: str) -> Recipe:
    """The recipe in a file, or a built-in one by name. Raises UsageError with everything that is wrong, one a line."""
    path = _find(path_or_name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file", hint="a recipe is YAML in UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="name a recipe file") from error
    return parse_recipe(text, path)


def on_infra(recipe: Recipe, text: str) -> Recipe:
    """The same recipe with every stage on the infra named in `text` (several with commas). Raises UsageError."""
    try:
        infra = tuple(_infra(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--infra: {error}", hint="write it like --infra local or --infra slurm/lab") from error
    stages = tuple(stage.model_copy(update={"infra": None}) for stage in recipe.stages)
    return recipe.model_copy(update={"infra": infra, "stages": stages})


def parse_recipe(text: str, path: Path) -> Recipe:
    """The recipe in `text`; relative paths in it start at the folder of `path`. Raises UsageError."""
    node, raw = _read_yaml(text, path)
    problems = _Problems(path, node)
    for loc, message in _duplicate_keys(node):
        problems.add(loc, message)
    spec = None
    try:
        spec = RecipeSpec.model_validate(raw)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] != "too_short" or not item["input"]:  # a list of wrong entries is not short as well
                problems.add(*_say(item))
    beside = _Beside(path.absolute().parent)
    for loc, message in _reference_problems(raw, beside):
        problems.add(loc, message)
    if problems.found or spec is None:
        raise problems.error()
    return Recipe.model_construct(
        **{key: getattr(spec, key) for key in RecipeSpec.model_fields},
        path=str(path),
        text=text,
        bucket_url=beside.bucket,
        files=beside.files,
        models=beside.models,
        folders=beside.folders,
        labels=beside.labels,
    )


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema = RecipeSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kdcloud recipe", **schema}


# --- finding and reading the file


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = builtin_recipes()
    if path_or_name in known:
        return known[path_or_name]
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a recipe", hint="name the recipe file in it")
    beside = [str(file) for file in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path_or_name, [*beside, *known], n=1, cutoff=0.5)
    close = close or difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close and path.stem != "recipe" else "`kdcloud init` writes one; "
    raise UsageError(f"there is no recipe {path_or_name}", hint=f"{hint}built in are: {', '.join(known)}")


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it: ten times as fast


class _Loader(_Base):  # type: ignore[misc]
    """YAML with the traps of version 1.1 taken out: 3e-3 is a number; 1:30 and 2026-01-01 are text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _read_yaml(text: str, path: Path) -> tuple[yaml.MappingNode, dict[str, Any]]:
    try:
        node = _Loader(text).get_single_node()
        if node is None:
            raise UsageError(
                f"{path} is empty", hint="start from a built-in recipe, for example recipes/quickstart.yaml"
            )
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(
                f"{path}:1: a recipe holds keys and values, such as `name: my-run`",
                hint="start from a built-in recipe, for example recipes/quickstart.yaml",
            )
        _refuse_loops(node, ())
        raw = _construct(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(
            f"{path}{where}: not YAML: {error.problem or error.context}",
            hint="mend the line; often a missing space after `:` or an unclosed bracket or quote",
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {error}", hint="a recipe is YAML in UTF-8") from error
    except RecursionError as error:
        raise UsageError(f"{path}: is nested too deeply", hint="a recipe needs four levels") from error
    return node, raw


def _construct(text: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except ValueError as error:  # such as !!int of a word
        raise yaml.YAMLError(str(error)) from error


def _refuse_loops(node: yaml.Node, above: tuple[int, ...]) -> None:
    if id(node) in above:
        raise yaml.composer.ComposerError(None, None, "an alias contains itself", node.start_mark)
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for one in child if isinstance(child, tuple) else (child,):
                _refuse_loops(one, (*above, id(node)))


def _duplicate_keys(node: yaml.Node, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first and key.value != "<<":
                yield (*loc, key.value), f"stands here twice, first in line {first[key.value]}"
            first[key.value] = line
            yield from _duplicate_keys(value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicate_keys(item, (*loc, index))


# --- saying what is wrong


class _Problems:
    """What is wrong, with the line it stands in."""

    def __init__(self, path: Path, node: yaml.Node) -> None:
        self._path, self._node = path, node
        self.found: dict[tuple[int, str], str] = {}

    def add(self, loc: Loc, message: str) -> None:
        line, key = _line_of(self._node, loc)
        self.found.setdefault((line, key), f"{self._path}:{line}: {key + ': ' if key else ''}{message}")

    def error(self) -> UsageError:
        lines = [text for _, text in sorted(self.found.items(), key=lambda item: item[0])]
        many = f"{len(lines)} things to mend" if len(lines) > 1 else "mend that line"
        return UsageError("\n".join(lines), hint=f"{many}; `kdcloud recipe-schema` lists every key")


def _line_of(node: yaml.Node, loc: Loc) -> tuple[int, str]:
    """Line of the deepest part of `loc` that is in the file, and `loc` as people write it; union tags are skipped."""
    line, words = node.start_mark.line + 1, ""
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, yaml.MappingNode):
            found = [
                (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode) and key.value == part
            ]
            if found:
                key, node = found[-1]
                line, words = key.start_mark.line + 1, f"{words}.{part}" if words else str(part)
            elif last:
                words = f"{words}.{part}" if words else str(part)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line, words = node.start_mark.line + 1, f"{words}[{part}]"
    return line, words


_PARTS: dict[str, type[BaseModel]] = {
    **KINDS,
    "architecture": ArchitecturePart,
    "model": ArchitecturePart,
    "local": LocalPart,
    "data": DataPart,
    "compare": ComparePart,
    "soft_labels": SoftLabelsPart,
    "api": ApiPart,
    "lora": LoraPart,
    "loss": LossPart,
}


def _say(item: Any) -> tuple[Loc, str]:
    """Place and sentence for one of pydantic's errors."""
    loc: Loc = item["loc"]
    kind, context = item["type"], item.get("ctx", {})
    match kind:
        case "extra_forbidden":
            parent = next((str(part) for part in reversed(loc[:-1]) if part in _PARTS), "")
            return loc, f"unknown key{_nearest(str(loc[-1]), _PARTS.get(parent, RecipeSpec).model_fields)}"
        case "missing":
            parent = next((str(part) for part in reversed(loc[:-1]) if part in _PARTS), "")
            what = _PARTS.get(parent, RecipeSpec).model_fields[str(loc[-1])].description
            return loc, f"is missing{': ' + what if what else ''}"
        case "union_tag_not_found":
            return (*loc, "kind"), f"is missing: one of {', '.join(KINDS)}"
        case "union_tag_invalid":
            return (*loc, "kind"), f"unknown kind of stage {context['tag']!r}{_nearest(context['tag'], KINDS)}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            return loc, f"{item['input']!r} is not known here{_nearest(str(item['input']), allowed)}"
        case "value_error":
            return loc, str(context["error"])
        case "string_pattern_mismatch" if loc[-1] == "name":
            return loc, f"{item['input']!r} may hold a-z, 0-9 and - only" if len(loc) > 1 else (
                f"{item['input']!r} may hold letters, digits, dot, dash and underscore only"
            )
        case "string_too_long":
            return loc, f"{item['input']!r} is longer than {context['max_length']} characters"
        case "model_type" | "model_attributes_type" | "dict_type":
            return loc, "must hold keys and values"
        case "tuple_type" | "too_short" if kind == "tuple_type" or "min_length" in context:
            return loc, "must be a list with at least one entry"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
            (bound,) = [f"{words[key]} {value:g}" for key, value in context.items() if key in words]
            return loc, f"must be {bound}, not {item['input']!r}"
        case "int_type" | "int_from_float":
            return loc, f"{item['input']!r} is not a whole number"
        case "float_type":
            return loc, f"{item['input']!r} is not a number"
        case "bool_type":
            return loc, f"{item['input']!r} is neither true nor false"
        case "string_type":
            return loc, f"{item['input']!r} is not text; put it in quotes"
    said = item["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return loc, f"{said}, not {item['input']!r}" if said.startswith("should be") else said


def _nearest(word: str, known: Any) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(names)}"


# --- what refers to something else: stages, models, files


class _Beside:
    """What stands beside the recipe: files, model shapes; relative paths start at its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, DataFile] = {}
        self.models: dict[str, ModelShape] = {}
        self.folders: dict[str, str] = {}
        self.labels: dict[str, LabelFolder] = {}
        self.bucket: str | None = None

    def data(self, text: str) -> str | None:
        """What is wrong with a prompt source; None when it is good."""
        if text.startswith("builtin:") or text in self.files:
            return None
        path = self.folder / Path(text).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            return f"cannot read {path}: {error.strerror}; name a jsonl file, relative to the recipe, or builtin:NAME"
        rows = [len(line) for line in content.splitlines() if line.strip()]
        if not rows:
            return f"{path} is empty"
        digest = hashlib.sha256(content).hexdigest()
        self.files[text] = DataFile(str(path), f"data/{digest[:12]}.jsonl", digest, len(rows), max(rows))
        return None

    def model(self, text: str) -> str | None:
        """What is wrong with a model's name; None when its shape is known."""
        if text in self.models:
            return None
        folder = self.folder / Path(text).expanduser()
        try:
            if text.startswith((".", "/", "~")) or (folder / "config.json").is_file():
                self.models[text] = shape_of(str(folder))
                self.folders[text] = str(folder)
            else:
                self.models[text] = shape_of(text)
        except UnknownModel as error:
            return f"{error.message}; {error.hint}"
        return None

    def label_folder(self, text: str) -> str | None:
        """What is wrong with a folder of labels; None when it is good."""
        from orchestrator.label_folder import read_label_folder

        if text in self.labels:
            return None
        try:
            self.labels[text] = read_label_folder(self.folder / Path(text).expanduser())
        except UsageError as error:
            return f"{error.message}; {error.hint}"
        return None

    def may_be_labels(self, text: str) -> bool:
        """Whether the text is a folder rather than a stage's name."""
        return "/" in text or text.startswith((".", "~")) or any((self.folder / text).glob("labels-*.safetensors"))

    def may_be_model(self, text: str) -> bool:
        """Whether the text is a model's name rather than a stage's."""
        return "/" in text or text.startswith((".", "~")) or (self.folder / text / "config.json").is_file()

    def place(self, text: str) -> str | None:
        """What is wrong with a bucket; None when it is a url kdcloud can use."""
        scheme, _, rest = text.partition(":")
        if scheme == "file" and rest.strip("/"):
            self.bucket = f"file:{(self.folder / Path(rest.removeprefix('//')).expanduser()).absolute()}"
        elif scheme == "s3" and re.fullmatch(r"//[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", rest):
            self.bucket = text.rstrip("/")
        else:
            return f"{text!r} is not a bucket; write s3://bucket/prefix or file:folder"
        return None


_Named = dict[str, tuple[int, dict[str, Any]]]  # stages as they stand in the file, with their place, by name


def _reference_problems(raw: Any, beside: _Beside) -> Iterator[tuple[Loc, str]]:
    """What refers to nothing, on the raw data, so that it shows together with errors of form."""
    if not isinstance(raw, dict):
        return
    if isinstance(raw.get("bucket"), str):
        yield from _problem(("bucket",), beside.place(raw["bucket"]))
    data = raw["data"] if isinstance(raw.get("data"), dict) else {}
    for key in ("prompts", "held_out"):
        if isinstance(data.get(key), str):
            yield from _problem(("data", key), beside.data(data[key]))
    listed = raw.get("stages")
    stages = [
        (index, stage)
        for index, stage in enumerate(listed if isinstance(listed, list) else [])
        if isinstance(stage, dict)
    ]
    names: _Named = {}
    for index, stage in stages:
        name = stage.get("name")
        if isinstance(name, str):
            if name in names:
                yield ("stages", index, "name"), f"{name!r} is also the name of stages[{names[name][0]}]"
            else:
                names[name] = (index, stage)
    for index, stage in stages:
        for key, message in _stage_problems(index, stage, names, data, beside):
            yield ("stages", index, key), message


def _stage_problems(
    index: int, stage: dict[str, Any], names: _Named, data: dict[str, Any], beside: _Beside
) -> Iterator[tuple[str, str]]:
    kind = stage.get("kind")

    def refer(key: str, kinds: tuple[str, ...], *, model: bool) -> Iterator[tuple[str, str]]:
        word = stage.get(key)
        if isinstance(word, str) and word:
            for problem in _refer(word, index, kinds, names, beside if model else None):
                yield key, problem

    def source(key: str) -> Iterator[tuple[str, str]]:
        if isinstance(stage.get(key), str):
            for _, problem in _problem((), beside.data(stage[key])):
                yield key, problem
        elif key not in data:
            yield key, f"is missing: give data.{key} or {key} in this stage"

    match kind:
        case "label":
            yield from refer("teacher", MODEL_STAGES, model=True)
            yield from source("prompts")
            if stage.get("samples_per_prompt", 1) != 1 and stage.get("temperature") == 0:
                yield "temperature", "0 gives the same answer every time: several samples a prompt need more"
        case "train":
            yield from refer("student", MODEL_STAGES, model=True)
            if _from_folder(stage, names, beside):
                yield from (("labels", problem) for _, problem in _problem((), beside.label_folder(stage["labels"])))
            else:
                yield from refer("labels", ("label",), model=False)
            if _hard_only(stage, names, beside):
                yield (
                    "loss",
                    "alpha above 0 learns from soft labels, and those labels are hard (top_k: 0): set alpha: 0",
                )
            if stage.get("method", "lora") == "lora" and isinstance(stage.get("student"), dict):
                yield (
                    "method",
                    "LoRA on random weights learns nothing: write method: full for a student made from scratch",
                )
            if stage.get("steps") is not None and stage.get("epochs") is not None:
                yield "epochs", "steps and epochs exclude each other: remove one"
            micro, batch = stage.get("micro_batch"), stage.get("batch_size", 8)
            if type(micro) is int and type(batch) is int and micro > 0 and batch % micro:
                yield "micro_batch", f"must divide batch_size {batch}, and {micro} does not"
        case "evaluate":
            yield from refer("student", ("train",), model=False)
            yield from refer("teacher", (*MODEL_STAGES, "label"), model=True)
            yield from source("held_out")
            _, named = names.get(str(stage.get("teacher")), (0, {}))
            if named.get("kind") == "label" and named.get("api") is not None:
                yield "teacher", "a teacher behind an API cannot be evaluated: leave it out"
            if stage.get("verify", data.get("verify", "none")) in ("text", "none"):
                yield "verify", "an evaluation needs right answers: give data.verify or verify here, math or exact"
        case "export":
            yield from refer("student", ("train",), model=False)
            family, formats = _family(stage.get("student"), names, beside), stage.get("formats")
            if isinstance(formats, list) and "gguf" in formats and family not in (None, *GGUF_FAMILIES):
                yield "formats", (
                    f"gguf is written for {', '.join(GGUF_FAMILIES)}, and this student is a {family}: write [hf]; "
                    "llama.cpp's convert_hf_to_gguf.py may know it"
                )


def _family(word: Any, names: _Named, beside: _Beside) -> str | None:
    """The architecture of a model or of what a stage trains; None where that is not known."""
    if isinstance(word, dict):
        return str(word.get("model_type", ArchitecturePart().model_type))
    if not isinstance(word, str):
        return None
    if word not in names:
        return beside.models[word].architecture if word in beside.models else None
    at, stage = names[word]
    earlier = {name: pair for name, pair in names.items() if pair[0] < at}  # a circle is told elsewhere
    return _family(stage.get("model" if stage.get("kind") == "pretrain" else "student"), earlier, beside)


def _from_folder(stage: dict[str, Any], names: _Named, beside: _Beside) -> bool:
    """Whether a train stage names a folder of labels."""
    word = stage.get("labels")
    return isinstance(word, str) and word not in names and beside.may_be_labels(word)


def _hard_only(stage: dict[str, Any], names: _Named, beside: _Beside) -> bool:
    """Whether a train stage wants soft labels where there are none."""
    _, label = names.get(str(stage.get("labels")), (0, {}))
    soft, loss = label.get("soft_labels"), stage.get("loss")
    alpha = loss.get("alpha", LossPart().alpha) if isinstance(loss, dict) else LossPart().alpha
    folder = beside.labels.get(str(stage.get("labels")))
    if folder is not None:
        return folder.top_k == 0 and alpha != 0
    return isinstance(soft, dict) and soft.get("top_k") == 0 and alpha != 0


def _refer(word: str, index: int, kinds: tuple[str, ...], names: _Named, beside: _Beside | None) -> Iterator[str]:
    fitting = [name for name, (at, stage) in names.items() if at < index and stage.get("kind") in kinds]
    if word in fitting:
        return
    if word in names:
        at, found = names[word]
        kind = found.get("kind")
        if at == index:
            yield f"a stage cannot use its own result ({word!r})"
        elif kind not in kinds:
            needed = f"needed is one of kind {' or '.join(kinds)}"
            yield f"stage {word!r} is of kind {kind}; {needed}{_stages_nearest(word, fitting)}"
        else:
            yield f"stage {word!r} comes later; move it before this one"
    elif beside is not None and (not fitting or beside.may_be_model(word)):
        yield from (problem for _, problem in _problem((), beside.model(word)))
    else:
        yield f"there is no stage {word!r} before this one{_stages_nearest(word, fitting)}"


def _stages_nearest(word: str, fitting: list[str]) -> str:
    if not fitting:
        return ""
    close = difflib.get_close_matches(word, fitting, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; earlier stages it could be: {', '.join(fitting)}"


def _problem(loc: Loc, message: str | None) -> Iterator[tuple[Loc, str]]:
    if message is not None:
        yield loc, message
