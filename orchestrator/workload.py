"""What does a recipe mean? Its references followed: shapes of models, lengths of text, counts of samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from orchestrator.catalog import ModelShape
from orchestrator.money import Rate, price_micros
from orchestrator.recipe import (
    ArchitecturePart,
    EvaluateStage,
    ExportStage,
    LabelStage,
    PretrainStage,
    Recipe,
    Stage,
    TrainStage,
)
from tasks.contract import ApiTeacher, Architecture, DataSource, LabelSettings, ModelSource

# --- what text is like. Assumed until a run has measured it; the first shards of a label stage tell.
BUILTIN_VOCAB = 64  # symbols of the tokenizer that comes with the generated sets, rounded up
BUILTIN_ROWS = 1000  # held-out prompts of a generated set
PROMPT_TOKENS, LONGEST_PROMPT_TOKENS = 150, 1024  # a competition problem with its template
BUILTIN_PROMPT_TOKENS, BUILTIN_ANSWER_TOKENS, BUILTIN_LIMIT = 16, 22, 48
REASONING_ANSWER_TOKENS = 3500  # R1-style chain of thought on competition problems; many pass 2,048
PLAIN_ANSWER_TOKENS = 500
CUT_SHARE_AT = {2048: 0.6, 4096: 0.3, 8192: 0.1, 16384: 0.03}  # of reasoning answers, by limit
RIGHT_SHARE = {"math": 0.8, "exact": 0.8, "text": 0.8, "none": 1.0}  # of the answers that were not cut
ROWS_UNKNOWN = 500  # held-out prompts where no file tells


def label_bytes(top_k: int, vocab: int, logprob_bits: int = 16) -> int:
    """Bytes a stored completion token takes: its id and, with soft labels, k packed ids, k values, two masses.

    284 for k = 64 and a vocabulary of 151,665, 220 in 8 bit; the shard's header and prompts come on top (1 %).
    """
    k = min(top_k, vocab)
    return 4 + 4 + 4 + k * logprob_bits // 8 + -(-k * vocab.bit_length() // 8)


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers."""

    prompt: float
    longest_prompt: int
    answer: float
    limit: int
    cut_share: float


@dataclass(frozen=True)
class Taught:
    """What a student learns from."""

    lengths: Lengths
    samples: float
    temperature: float  # T of the stored masses, besides 1
    vocab: int | None  # None: that of the teacher's shape


S = TypeVar("S", bound=Stage)
T = TypeVar("T")


def once(answer: Callable[[World, S], T]) -> Callable[[World, S], T]:
    """Worked out once for each stage of a world."""

    @functools.wraps(answer)
    def known(world: World, stage: S) -> T:
        key = (answer, id(stage))
        if key not in world.measured:
            world.measured[key] = (stage, answer(world, stage))  # the stage stays, so that its id does
        found: T = world.measured[key][1]
        return found

    return known


class World:
    """The recipe with its references followed."""

    def __init__(self, recipe: Recipe, rate: Rate) -> None:
        self.recipe = recipe
        self.rate = rate
        self._stages = {stage.name: stage for stage in recipe.stages}
        trains = [stage for stage in recipe.stages if isinstance(stage, TrainStage)]
        self._compared = trains[-1].name if trains else None
        self.measured: dict[Hashable, Any] = {}  # every offer of a card needs the same

    def label(self, name: str) -> LabelStage:
        stage = self._stages[name]
        assert isinstance(stage, LabelStage)
        return stage

    def train(self, name: str) -> TrainStage:
        stage = self._stages[name]
        assert isinstance(stage, TrainStage)
        return stage

    def compared(self, stage: TrainStage) -> bool:
        """Control arms belong to the last training: the final student."""
        return stage.name == self._compared

    def source(self, word: str, revision: str | None = None) -> ModelSource:
        """Where the model called `word` comes from: a stage (a label stage means its teacher), or a path."""
        stage = self._stages.get(word)
        if isinstance(stage, LabelStage):
            return self.source(stage.teacher, stage.revision)
        if stage is not None:
            return ModelSource(stage=word)
        path = self.recipe.folders.get(word, word)
        return ModelSource(path=path, revision=revision, trust_remote_code=self.recipe.trust_remote_code)

    @once
    def student(self, stage: TrainStage) -> ModelSource:
        if isinstance(stage.student, ArchitecturePart):
            return ModelSource(architecture=architecture(stage.student))
        return self.source(stage.student, stage.revision)

    def shape(self, word: str) -> ModelShape:
        """Shape of the model that the recipe calls `word`."""
        stage = self._stages.get(word)
        if isinstance(stage, LabelStage):
            return self.shape(stage.teacher)
        if isinstance(stage, PretrainStage):
            return made_shape(word, architecture(stage.model), BUILTIN_VOCAB)
        if isinstance(stage, TrainStage):
            return self.student_shape(stage)
        return self.recipe.models[word]

    @once
    def student_shape(self, stage: TrainStage) -> ModelShape:
        if isinstance(stage.student, ArchitecturePart):
            vocab = self.taught(stage).vocab or self.shape(self.label(stage.labels).teacher).vocab
            return made_shape(stage.name, architecture(stage.student), vocab)
        return self.shape(stage.student)

    def data(self, word: str | None) -> DataSource:
        assert word is not None
        file = self.recipe.files.get(word)
        return DataSource(word if file is None else file.path)

    @once
    def api(self, stage: LabelStage) -> ApiTeacher | None:
        """The API with the most that the stage may cost there: every answer as long as it may get, to the longest
        prompt. One that fails on its way may be billed and is asked again: it draws on the same sum."""
        part = stage.api
        if part is None:
            return None
        made = ApiTeacher(
            base_url=part.base_url,
            model=part.model,
            key_env=part.key_env,
            input_micros=price_micros(part.input_price, self.rate),
            output_micros=price_micros(part.output_price, self.rate),
            max_cost_micros=0,
            requests_per_minute=part.requests_per_minute,
            max_parallel=part.max_parallel,
            timeout_s=part.timeout,
            limit_name=part.limit_name,
        )
        file = self.recipe.files.get(stage.prompts or self.recipe.data.prompts or "")
        longest = BUILTIN_PROMPT_TOKENS if file is None else file.longest_bytes  # of bytes: no text is longer
        prompts = stage.samples if file is None else min(stage.samples, file.rows)
        most = made.most_micros(longest, self.label_lengths(stage).limit)
        return replace(made, max_cost_micros=prompts * stage.samples_per_prompt * most)

    def rows(self, word: str | None) -> int:
        """Prompts there are."""
        if word is not None and word in self.recipe.files:
            return self.recipe.files[word].rows
        return BUILTIN_ROWS if word is not None and word.startswith("builtin:") else ROWS_UNKNOWN

    def lengths(self, prompts: str | None, model: str, limit: int | None) -> Lengths:
        """Tokens of prompts from `prompts` and of the answers `model` writes to them, at most `limit`."""
        if prompts is not None and prompts.startswith("builtin:"):
            top = limit or BUILTIN_LIMIT
            return Lengths(BUILTIN_PROMPT_TOKENS, BUILTIN_PROMPT_TOKENS, min(BUILTIN_ANSWER_TOKENS, top), top, 0.0)
        top = limit or LabelSettings.max_new_tokens
        if self._reasons(model):
            return Lengths(
                PROMPT_TOKENS, LONGEST_PROMPT_TOKENS, min(REASONING_ANSWER_TOKENS, 0.8 * top), top, _cut_share(top)
            )
        return Lengths(PROMPT_TOKENS, LONGEST_PROMPT_TOKENS, min(PLAIN_ANSWER_TOKENS, 0.8 * top), top, 0.02)

    @once
    def label_lengths(self, stage: LabelStage) -> Lengths:
        model = stage.teacher if stage.api is None else stage.api.model
        return self.lengths(stage.prompts or self.recipe.data.prompts, model, stage.max_new_tokens)

    @once
    def taught(self, stage: TrainStage) -> Taught:
        """Of a label stage as it is expected to be; of a folder as it is."""
        folder = self.recipe.labels.get(stage.labels)
        if folder is None:
            label = self.label(stage.labels)
            return Taught(self.label_lengths(label), self.kept(label), self.label_temperature(label), None)
        rest = folder.longest - folder.longest_prompt  # together they are the longest row
        lengths = Lengths(folder.prompt, folder.longest_prompt, folder.answer, rest, 0.0)
        return Taught(lengths, folder.samples, folder.temperature, folder.vocabulary)

    @once
    def evaluate_lengths(self, stage: EvaluateStage) -> Lengths:
        """Answers at evaluation are as long as those the student learned from."""
        train = self.train(stage.student)
        if train.labels in self.recipe.labels:
            learnt = self.taught(train).lengths
            return replace(learnt, limit=stage.max_new_tokens or max(1, learnt.limit))
        label = self.label(train.labels)
        held_out = stage.held_out or self.recipe.data.held_out
        model = label.teacher if label.api is None else label.api.model
        return self.lengths(held_out, model, stage.max_new_tokens or self.label_lengths(label).limit)

    @once
    def kept_share(self, stage: LabelStage) -> float:
        """Share of the answers that become labels."""
        lengths = self.label_lengths(stage)
        if stage.keep == "all":
            return 1 - lengths.cut_share
        right = RIGHT_SHARE[stage.verify or self.recipe.data.verify] * (1 - lengths.cut_share)
        return (
            (1 - (1 - right) ** stage.samples_per_prompt) / stage.samples_per_prompt
            if stage.keep == "shortest"
            else right
        )

    def kept(self, stage: LabelStage) -> float:
        return stage.samples * stage.samples_per_prompt * self.kept_share(stage)

    @once
    def after(self, stage: Stage) -> tuple[str, ...]:
        """Stages whose results this one needs, by name."""
        words: list[str | None] = []
        match stage:
            case LabelStage():
                words = [stage.teacher]
            case TrainStage():
                words = [stage.labels, stage.student if isinstance(stage.student, str) else None]
            case EvaluateStage():
                words = [stage.student, self.source(stage.teacher).stage if stage.teacher else None]
            case ExportStage():
                words = [stage.student]
        return tuple(dict.fromkeys(word for word in words if word in self._stages))

    @once
    def label_temperature(self, stage: LabelStage) -> float:
        """The recipe's, else that of the first training that uses the labels. An API tells log-probabilities at 1."""
        if stage.api is not None:
            return 1.0
        if stage.soft_labels.temperature is not None:
            return stage.soft_labels.temperature
        users = (one for one in self.recipe.stages if isinstance(one, TrainStage) and one.labels == stage.name)
        return next((one.loss.temperature for one in users), 1.0)

    def _reasons(self, model: str) -> bool:
        """Whether the teacher writes long chains of thought."""
        stage = self._stages.get(model)
        if isinstance(stage, TrainStage):
            folder = self.recipe.labels.get(stage.labels)
            return self._reasons(self.label(stage.labels).teacher if folder is None else folder.teacher)
        return any(mark in model for mark in ("R1", "Qwen3", "QwQ", "reasoner"))


def architecture(part: ArchitecturePart) -> Architecture:
    return Architecture(**part.model_dump())


def made_shape(name: str, made: Architecture, vocab: int) -> ModelShape:
    return ModelShape(
        name,
        made.hidden_size,
        made.intermediate_size,
        made.num_hidden_layers,
        made.num_attention_heads,
        made.num_key_value_heads,
        made.hidden_size // made.num_attention_heads,
        vocab,
        made.tie_word_embeddings,
        qkv_bias=made.model_type == "qwen2",
        source="the recipe",
    )


def _cut_share(limit: int) -> float:
    """Share of reasoning answers longer than `limit`, between the points of CUT_SHARE_AT."""
    points = sorted(CUT_SHARE_AT.items())
    if limit <= points[0][0]:
        return min(0.95, points[0][1] + (1 - points[0][1]) * (1 - limit / points[0][0]))
    for (low, share), (high, next_share) in pairwise(points):
        if limit <= high:
            return share + (next_share - share) * (limit - low) / (high - low)
    return points[-1][1]
