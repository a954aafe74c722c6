"""Which settings fit a machine, and what does a stage need with them? Choices left open are made here, and measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator import duration, memory, setup_time, teachers
from orchestrator.catalog import Gpu, ModelShape
from orchestrator.memory import Memory
from orchestrator.plan import Range
from orchestrator.provision import Offer
from orchestrator.recipe import (
    EvaluateStage,
    ExportStage,
    LabelStage,
    PretrainStage,
    RehearseStage,
    Stage,
    TrainStage,
)
from orchestrator.workload import (
    BUILTIN_ANSWER_TOKENS,
    BUILTIN_PROMPT_TOKENS,
    BUILTIN_VOCAB,
    Lengths,
    World,
    architecture,
    label_bytes,
    made_shape,
    once,
)
from tasks.contract import (
    ApiTeacher,
    EvaluateSettings,
    ExportSettings,
    LabelSettings,
    LoraSettings,
    ModelSource,
    PretrainSettings,
    RehearseSettings,
    Settings,
    TrainSettings,
)

API_TOP_K = 20  # most candidates a token that such APIs tell
API_VOCABULARY = 200_000  # ids of a label, as large as they get: the tokenizer is looked at by the stage only
API_TOKENS_S = Range(20.0, 50.0, 150.0)  # of one answer; assumed: what public APIs of large models are seen to do
COMPILE_S = Range(50.0, 65.0, 120.0)  # once: 50 to 80 with an H200 (benchmarks/README.md); slower hosts assumed
COMPILE_FROM_S = 300.0  # trainings that take less are not compiled: what it saves there is less than it may cost
ARMS = 3  # of a comparison: soft labels, hard labels, hard labels with twice the steps
KL_TOKENS = 20_000  # of prompts and answers at most (tasks/evaluate.py: KL_TOKENS)
ENGINE_LEAST = 2  # longest answers that an engine must have room for at once: it takes what more there is
ARMS_STEPS = 4  # their optimizer steps together, in those of one
NOTHING = Range(0.0, 0.0, 0.0)
GGUF_BYTES = 2.0 + 34 / 32  # a parameter, of f16 and q8_0 together: 32 bytes and a 16-bit scale hold 32 values
GGUF_PARAMS_S = 20e6  # turned into both of them in a second of one core (measured: 233 M parameters of bf16 in 10.5 s)


@dataclass(frozen=True)
class Measured:
    """What a stage with given settings needs on a given machine, its start not included."""

    memory: Memory
    work_s: Range
    uses_of: Callable[[], Mapping[str, float]]  # what the estimate rests on; few are asked for it
    around_s: Range  # process start, weights onto the card, an engine's start
    download_s: Range = NOTHING  # weights from the hub
    bucket_s: Range = NOTHING  # inputs from the bucket, results to it
    environment: str | None = None  # see setup_time.environment_of

    @cached_property
    def uses(self) -> Mapping[str, float]:
        return self.uses_of()

    @cached_property
    def own_hours(self) -> Range:
        """All of these together, as the models have them."""
        return self.own_hours_with(1.0)

    def own_hours_with(self, missing: float) -> Range:
        """The same where only this share of the weights must be fetched."""
        around, download, bucket, work = self.around_s, self.download_s, self.bucket_s, self.work_s
        return Range(
            (around.low + download.low * missing + bucket.low + work.low) * (1 / 3600),
            (around.expected + download.expected * missing + bucket.expected + work.expected) * (1 / 3600),
            (around.high + download.high * missing + bucket.high + work.high) * (1 / 3600),
        )


@dataclass(frozen=True)
class Machine:
    """An offer with the speed of its card."""

    offer: Offer
    speed: duration.Speed
    gpu: Gpu | None

    @cached_property
    def gpus(self) -> int:
        """Processes of a stage that can be shared out: one a GPU; without any there is one as well."""
        return max(1, self.offer.gpus)


def _once(answer: Callable[[Stage, World], float]) -> Callable[[Stage, World], float]:
    """Worked out once for each stage of a world."""
    known = once(lambda world, stage: answer(stage, world))
    return functools.wraps(answer)(lambda stage, world: known(world, stage))


# --- settings: the recipe's, with what it leaves open


def choices(stage: Stage, world: World, machine: Machine) -> Iterator[Settings]:
    """Settings to try on a machine: each must be measured, since which is the fastest depends on its card."""
    key = ("choices", id(stage), _card(machine, stage))
    if key not in world.measured:
        alike = ("choices", id(stage), _chosen_by(stage, world, machine))
        if alike not in world.measured:
            found = tuple(world.measured.setdefault(("same", one), one) for one in _choices(stage, world, machine))
            world.measured[alike] = (stage, found)  # the stage stays, so that its id does
        world.measured[key] = world.measured[alike]
    yield from world.measured[key][1]


def _chosen_by(stage: Stage, world: World, machine: Machine) -> tuple[Any, ...]:
    """What of a machine the choices depend on: those of cards that have it in common are one and the same."""
    gpus = machine.gpus if uses_all_gpus(stage) else 1
    engine = _engine(getattr(stage, "engine", ""), machine)
    if isinstance(stage, TrainStage):
        half = _half(machine)
        alike = ("first", id(stage), machine.speed.gpu, gpus, half)
        if alike not in world.measured:
            world.measured[alike] = (stage, _first_training(stage, world, machine))
        return machine.speed.gpu, gpus, half, _may_compile(stage, world.measured[alike][1], world, machine)
    return machine.speed.gpu, gpus, engine


def _card(machine: Machine, stage: Stage) -> tuple[str | None, int, bool]:
    """All that choices and needs depend on."""
    gpus = machine.gpus if uses_all_gpus(stage) else 1
    return (machine.gpu.name if machine.gpu else machine.offer.gpu, gpus, machine.offer.infra == "local")


def uses_all_gpus(stage: Stage) -> bool:
    """Whether the stage is shared out over the GPUs of its machine."""
    return isinstance(stage, (TrainStage, EvaluateStage)) or (isinstance(stage, LabelStage) and stage.api is None)


def _choices(stage: Stage, world: World, machine: Machine) -> Iterator[Settings]:
    match stage:
        case PretrainStage():
            yield PretrainSettings(
                model=architecture(stage.model),
                corpus=stage.corpus,
                examples=stage.examples,
                steps=stage.steps,
                batch_size=stage.batch_size,
                learning_rate=stage.learning_rate,
                seed=stage.seed,
                threads=stage.threads,
                checkpoint_every_s=stage.checkpoint_every or _checkpoint_s(machine),
            )
        case LabelStage() if stage.api is not None:
            yield _label_settings(stage, world, stage.batch_size or 4 * stage.api.max_parallel)
        case LabelStage():
            paged = _engine(stage.engine, machine)  # it packs its own batches
            free = [LabelSettings.shard_size] if paged else _batches(world.shape(stage.teacher))
            for batch_size in [stage.batch_size] if stage.batch_size else free:
                for cards in _together(world.shape(stage.teacher), machine) if paged else [1]:
                    yield replace(_label_settings(stage, world, batch_size), tensor_parallel=cards)
        case TrainStage():
            yield from _train_choices(stage, world, machine)
        case EvaluateStage():
            paged = _engine(stage.engine, machine)
            free = [EvaluateSettings.batch_size] if paged else _batches(world.shape(stage.teacher or stage.student))
            for batch_size in [stage.batch_size] if stage.batch_size else free:
                yield _evaluate_settings(stage, world, batch_size)
        case ExportStage():
            yield ExportSettings(student=stage.student, formats=stage.formats, threads=stage.threads)
        case RehearseStage():
            yield RehearseSettings(
                steps=stage.steps,
                seconds_per_step=stage.seconds_per_step,
                checkpoint_every_steps=stage.checkpoint_every_steps,
                payload_bytes=stage.payload_bytes,
            )


def _together(shape: ModelShape, machine: Machine) -> list[int]:
    """How many of the machine's GPUs may hold one model together in vLLM: each has as many heads, and heads of keys are
    cut evenly or repeated evenly (vllm/config/model.py: verify_with_parallel_config)."""
    return [
        cards
        for cards in (1, 2, 4, 8)
        if machine.gpus % cards == 0
        and shape.heads % cards == 0
        and (shape.latent is not None or max(cards, shape.kv_heads) % min(cards, shape.kv_heads) == 0)
    ]


def _batches(shape: ModelShape) -> list[int]:
    """Sizes to try, largest first."""
    return [256] if shape.params < 10_000_000 else [64, 32, 16, 8, 4, 2, 1]


def _checkpoint_s(machine: Machine) -> float:
    return 300.0 if machine.speed.gpu else 20.0


def _label_settings(stage: LabelStage, world: World, batch_size: int) -> LabelSettings:
    lengths = world.label_lengths(stage)
    return LabelSettings(
        teacher=world.source(stage.teacher, stage.revision),
        prompts=world.data(stage.prompts or world.recipe.data.prompts),
        verify=stage.verify or world.recipe.data.verify,
        samples=stage.samples,
        samples_per_prompt=stage.samples_per_prompt,
        keep=stage.keep,
        max_new_tokens=lengths.limit,
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=_top_k(stage),
        label_temperature=world.label_temperature(stage),
        logprob_bits=stage.soft_labels.logprob_bits,
        engine=stage.engine,
        batch_size=batch_size,
        shard_size=stage.shard_size or LabelSettings.shard_size,
        max_cut_share=stage.max_cut_share,
        seed=stage.seed,
        threads=stage.threads,
        api=world.api(stage),
    )


def _top_k(stage: LabelStage) -> int:
    return stage.soft_labels.top_k if stage.api is None else min(stage.soft_labels.top_k, API_TOP_K)


def _half(machine: Machine) -> bool:
    return machine.speed.gpu and (machine.gpu is None or machine.gpu.bf16)


def _first_training(stage: TrainStage, world: World, machine: Machine) -> TrainSettings:
    """The first to try; the others differ in micro_batch, checkpointing and compile."""
    lengths, folder = world.taught(stage).lengths, world.recipe.labels.get(stage.labels)
    half, compare, compared = _half(machine), world.recipe.compare, world.compared(stage)
    return TrainSettings(
        student=world.student(stage),
        labels=stage.labels if folder is None else str(Path(folder.path).absolute()),
        method=stage.method,
        lora=LoraSettings(stage.lora.r, stage.lora.alpha, stage.lora.dropout, stage.lora.targets),
        alpha=stage.loss.alpha,
        temperature=stage.loss.temperature,
        steps=stage.steps,
        epochs=None if stage.steps is not None else stage.epochs or 1.0,
        batch_size=stage.batch_size,
        micro_batch=_micro_batches(stage, machine)[0],
        max_seq_len=stage.max_seq_len or lengths.longest_prompt + lengths.limit,
        learning_rate=stage.learning_rate,
        warmup_share=stage.warmup_share,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        precision=stage.precision or ("bf16" if half else "fp32"),
        checkpointing=bool(stage.checkpointing),
        checkpoint_every_s=stage.checkpoint_every or _checkpoint_s(machine),
        checkpoint_every_steps=stage.checkpoint_every_steps,
        optimizer=stage.optimizer,
        compile=bool(stage.compile),
        early_stop_patience=stage.early_stop_patience,
        eval_every_steps=stage.eval_every_steps,
        seed=stage.seed,
        compare_hard=compared and compare.hard_labels,
        compare_seeds=compare.seeds if compared else 1,
        arms_at_once=compare.at_once if compared else 1,
        learning_rates=compare.learning_rates if compared else (),
        search_steps=compare.search_steps if compared else None,
        threads=stage.threads,
    )


def _train_choices(stage: TrainStage, world: World, machine: Machine) -> Iterator[TrainSettings]:
    first = _first_training(stage, world, machine)
    for compiled in (False, True) if _may_compile(stage, first, world, machine) else (first.compile,):
        for checkpointing in (False, True) if stage.checkpointing is None else (stage.checkpointing,):
            for micro in _micro_batches(stage, machine):
                yield replace(first, checkpointing=checkpointing, micro_batch=micro, compile=compiled)


def _micro_batches(stage: TrainStage, machine: Machine) -> list[int]:
    """Sizes to try, largest first: of a step's rows those on one GPU in as many parts as are even."""
    if stage.micro_batch is not None:
        return [stage.micro_batch]
    return _divisors(math.ceil(stage.batch_size / machine.gpus))


def _may_compile(stage: TrainStage, settings: TrainSettings, world: World, machine: Machine) -> bool:
    """Whether it is for the planner to say, and long enough on a card that it was measured on the like of (bf16)."""
    if stage.compile is not None or machine.gpu is None or not machine.gpu.bf16:
        return False
    if machine.gpus > 1 and settings.method == "full":  # compiled layers in shards were never measured
        return False
    return _training_s(stage, settings, world, machine).expected > COMPILE_FROM_S


def _divisors(number: int) -> list[int]:
    """Divisors, largest first."""
    return [candidate for candidate in range(number, 0, -1) if number % candidate == 0]


def _evaluate_settings(stage: EvaluateStage, world: World, batch_size: int) -> EvaluateSettings:
    return EvaluateSettings(
        student=stage.student,
        teacher=world.source(stage.teacher) if stage.teacher else None,
        held_out=world.data(stage.held_out or world.recipe.data.held_out),
        verify=stage.verify or world.recipe.data.verify,
        max_new_tokens=world.evaluate_lengths(stage).limit,
        batch_size=batch_size,
        limit=stage.limit,
        threads=stage.threads,
        seeds=stage.seeds,
        temperature=stage.temperature,
        top_p=stage.top_p,
        lm_eval=stage.lm_eval,
        engine=stage.engine,
    )


_OPEN = {
    "label": {"max_new_tokens": "max_new_tokens", "batch_size": "batch_size", "shard_size": "shard_size"},
    "train": {
        "micro_batch": "micro_batch",
        "max_seq_len": "max_seq_len",
        "precision": "precision",
        "checkpointing": "checkpointing",
        "compile": "compile",
        "checkpoint_every": "checkpoint_every_s",
    },
    "pretrain": {"checkpoint_every": "checkpoint_every_s"},
    "evaluate": {"max_new_tokens": "max_new_tokens", "batch_size": "batch_size"},
}


def left_open(stage: Stage) -> tuple[str, ...]:
    """Settings that the recipe left to the planner."""
    chosen = [setting for key, setting in _OPEN.get(stage.kind, {}).items() if getattr(stage, key) is None]
    if isinstance(stage, LabelStage) and stage.soft_labels.top_k and stage.soft_labels.temperature is None:
        chosen.append("label_temperature")
    return tuple(chosen)


# --- measuring settings on a machine


def measure(stage: Stage, settings: Settings, world: World, machine: Machine) -> Measured:
    """What `stage` needs with `settings`, which are its own kind's."""
    key = ("needs", id(stage), id(settings), _card(machine, stage))
    if key not in world.measured:
        measured = _with_traffic(_measure(stage, settings, world, machine), stage, settings, world, machine)
        world.measured[key] = ((stage, settings), measured)  # they stay, so that their ids do
    found: Measured = world.measured[key][1]
    return found


def needed_memory(stage: Stage, settings: Settings, world: World, machine: Machine) -> Memory:
    """What of `measure` says whether the machine holds them, without how long they take."""
    match stage, settings:
        case LabelStage(), LabelSettings() if settings.api is None:
            return _label_memory(stage, settings, world, machine)
        case TrainStage(), TrainSettings():
            return _training_memory(stage, settings, world, gpu=machine.speed.gpu, gpus=machine.gpus)
        case EvaluateStage(), EvaluateSettings():
            return _evaluate_memory(stage, settings, world, machine)
    return measure(stage, settings, world, machine).memory


def _with_traffic(found: Measured, stage: Stage, settings: Settings, world: World, machine: Machine) -> Measured:
    """What depends on networks apart from what depends on the machine."""
    download_s = duration.fetch_s(machine.speed, _downloads_gb(stage, world))
    bucket_gb = fetched_gb(stage, world)
    if not isinstance(stage, ExportStage):  # sending its files is its work
        bucket_gb += left_gb(stage, world)
    return Measured(
        found.memory,
        found.work_s,
        lambda: {**found.uses, "bucket_gb": bucket_gb},
        found.around_s - download_s,
        download_s,
        duration.bucket_s(machine.speed, bucket_gb),
        setup_time.environment_of(stage.kind, settings, machine.gpu),
    )


@_once
def _downloads_gb(stage: Stage, world: World) -> float:
    """Weights from the hub, as they are in the stage's own estimate."""
    match stage:
        case LabelStage() if stage.api is None:
            return _download_gb(world.source(stage.teacher, stage.revision), world.shape(stage.teacher))
        case TrainStage():
            return _download_gb(world.student(stage), world.student_shape(stage))
        case ExportStage():
            return _downloads_gb(world.train(stage.student), world)
        case EvaluateStage():
            teacher = _download_gb(world.source(stage.teacher), world.shape(stage.teacher)) if stage.teacher else 0.0
            return teacher + _downloads_gb(world.train(stage.student), world)
    return 0.0


def _measure(stage: Stage, settings: Settings, world: World, machine: Machine) -> Measured:
    match stage, settings:
        case PretrainStage(), PretrainSettings():
            return _measure_pretrain(settings, machine)
        case LabelStage(), LabelSettings():
            return _measure_label(stage, settings, world, machine)
        case TrainStage(), TrainSettings():
            return _measure_train(stage, settings, world, machine)
        case EvaluateStage(), EvaluateSettings():
            return _measure_evaluate(stage, settings, world, machine)
        case ExportStage(), ExportSettings():
            return _measure_export(settings, world, machine)
        case RehearseStage(), RehearseSettings():
            return _measure_rehearse(settings, machine)
    raise TypeError(f"stage {stage.name} has settings of another kind: {type(settings).__name__}")


def _measure_pretrain(settings: PretrainSettings, machine: Machine) -> Measured:
    shape = made_shape("pretrain", settings.model, BUILTIN_VOCAB)
    length = BUILTIN_PROMPT_TOKENS + BUILTIN_ANSWER_TOKENS
    need = memory.training_memory(
        shape,
        trainable=shape.params,
        full=True,
        micro_batch=settings.batch_size,
        seq_len=length,
        half=False,
        checkpointing=False,
        gpu=machine.speed.gpu,
    )
    work = duration.training_s(
        machine.speed,
        shape,
        steps=settings.steps,
        batch_size=settings.batch_size,
        micro_batch=settings.batch_size,
        mean_len=length,
        full=True,
        checkpointing=False,
        half=False,
    )
    around = duration.stage_s(machine.speed, downloads_gb=0.0)
    return Measured(need, work, lambda: {"params": shape.params, "row_tokens": length}, around)


def _measure_label(stage: LabelStage, settings: LabelSettings, world: World, machine: Machine) -> Measured:
    if settings.api is not None:
        return _measure_api(stage, settings, settings.api, world)
    shape, lengths, speed = world.shape(stage.teacher), world.label_lengths(stage), machine.speed
    engine = _engine(settings.engine, machine)
    answers, kept = stage.samples * stage.samples_per_prompt, world.kept(stage)
    cards = settings.tensor_parallel
    small = _small_weights(settings, shape, machine)
    share = _longest_share(stage, settings, machine.gpus // cards)
    writing = duration.generation_s(
        speed,
        shape,
        sequences=answers * share,
        prompt_len=lengths.prompt,
        answer_len=lengths.answer,
        longest=lengths.limit,
        batch_size=settings.batch_size,
        engine=engine,
        gpus=cards,
        weight_bytes=teachers.FP8_BYTES if small else 2.0,
    )
    scored = kept * (lengths.prompt + lengths.answer) if settings.top_k else 0.0
    if cards == 1:
        scored *= _longest_share(stage, settings, machine.gpus)
    scoring = duration.scoring_s(
        speed, shape, tokens=scored, mean_len=lengths.prompt + lengths.answer, sharded=machine.gpus if cards > 1 else 1
    )
    return Measured(
        _label_memory(stage, settings, world, machine),
        writing + scoring,
        lambda: {
            "params": shape.params,
            "answers": answers,
            "expected_answer_tokens": lengths.answer,
            "cut_share": lengths.cut_share,
            "kept_share": world.kept_share(stage),
            "kept_samples": kept,
            "label_gib": label_gib(stage, world),
            "scoring_share": scoring.expected / max((writing + scoring).expected, 1e-9),
            **_step_share(
                shape, lengths, speed, min(settings.batch_size, answers), engine=engine, gpus=cards,
                weight_bytes=teachers.FP8_BYTES if small else 2.0,
            ),
        },
        duration.stage_s(
            speed, downloads_gb=_download_gb(settings.teacher, shape) * (0.5 if small else 1.0), engine=engine
        ),
    )


def _small_weights(settings: LabelSettings, shape: ModelShape, machine: Machine) -> bool:
    """Whether the engine has the teacher in 8 bits."""
    return machine.gpu is not None and teachers.in_8_bits(shape, machine.gpu) and _engine(settings.engine, machine)


def _label_memory(stage: LabelStage, settings: LabelSettings, world: World, machine: Machine) -> Memory:
    """The same on every card that holds the teacher in the same way."""
    shape, engine, gpu = world.shape(stage.teacher), _engine(settings.engine, machine), machine.speed.gpu
    cards, small = settings.tensor_parallel, _small_weights(settings, shape, machine)
    key = ("memory", id(stage), id(settings), gpu, engine, small, machine.gpus if cards > 1 else 1)
    if key in world.measured:
        known: Memory = world.measured[key][1]
        return known
    lengths, answers = world.label_lengths(stage), stage.samples * stage.samples_per_prompt
    need = memory.generation_memory(
        shape,
        sequences=min(settings.batch_size, answers, ENGINE_LEAST) if engine else min(settings.batch_size, answers),
        seq_len=lengths.longest_prompt + lengths.limit,
        half=gpu,
        gpu=gpu,
        prompt_len=lengths.longest_prompt,
        engine=engine,
        gpus=cards,
        weights="fp8" if small else None,
    )
    if settings.top_k and (cards > 1 or small):  # scored by transformers, in 16 bits
        need = memory.largest([need, memory.scoring_memory(shape, gpus=machine.gpus if cards > 1 else 1)])
    world.measured[key] = ((stage, settings), need)
    return need


def _longest_share(stage: LabelStage, settings: LabelSettings, parts: int) -> float:
    """The share of the prompts that falls to the engine which has most: whole shards (tasks/label.py)."""
    shards = math.ceil(stage.samples / settings.shard_size)
    return min(1.0, math.ceil(shards / parts) * settings.shard_size / stage.samples)


def label_gib(stage: LabelStage, world: World) -> float:
    """What the labels of the stage take in the bucket."""
    vocab = world.shape(stage.teacher).vocab if stage.api is None else API_VOCABULARY
    each = label_bytes(_top_k(stage), vocab, stage.soft_labels.logprob_bits)
    return world.kept(stage) * world.label_lengths(stage).answer * each / 2**30


@_once
def left_gb(stage: Stage, world: World) -> float:
    """GB (1e9) that the stage leaves in the bucket. Weights of a full training and adapters are fp32; an exported
    student that was trained by adapters is bf16 (tasks/export.py)."""
    match stage:
        case LabelStage():
            return label_gib(stage, world) * 2**30 / 1e9
        case PretrainStage():
            return world.shape(stage.name).params * 4 / 1e9
        case TrainStage():
            shape = world.student_shape(stage)
            full = stage.method == "full"
            return (shape.params if full else shape.lora_params(stage.lora.r, stage.lora.targets)) * 4 / 1e9
        case ExportStage():
            train = world.train(stage.student)
            sizes = {"hf": 4.0 if train.method == "full" else 2.0, "gguf": GGUF_BYTES}
            return world.student_shape(train).params / 1e9 * sum(sizes[one] for one in stage.formats)
    return 0.0


@_once
def fetched_gb(stage: Stage, world: World) -> float:
    """GB (1e9) that a machine of the stage reads from the bucket: what stages before it left, labels of a folder."""
    before = [one for one in world.recipe.stages if one.name in world.after(stage)]
    folder = world.recipe.labels.get(stage.labels) if isinstance(stage, TrainStage) else None
    return sum(left_gb(one, world) for one in before) + (folder.size / 1e9 if folder is not None else 0.0)


def _engine(wanted: str, machine: Machine) -> bool:
    """Whether vLLM writes the answers: on a rented machine wherever its card allows, it is installed there."""
    there = machine.speed.gpu and (machine.offer.infra == "local" or setup_time.runs_vllm(machine.gpu))
    return there and wanted != "transformers"


def _measure_api(stage: LabelStage, settings: LabelSettings, api: ApiTeacher, world: World) -> Measured:
    """Needs a tokenizer and the network, whatever the machine has."""
    lengths, kept = world.label_lengths(stage), world.kept(stage)
    answers = stage.samples * stage.samples_per_prompt
    least = answers * 60.0 / api.requests_per_minute if api.requests_per_minute else 0.0
    tokens = answers * lengths.answer / api.max_parallel
    rates = (API_TOKENS_S.high, API_TOKENS_S.expected, API_TOKENS_S.low)
    waiting = Range(*(max(least, tokens / rate) for rate in rates))
    return Measured(
        memory.process_memory(),
        waiting,
        lambda: {
            "answers": answers,
            "expected_answer_tokens": lengths.answer,
            "cut_share": lengths.cut_share,
            "kept_share": world.kept_share(stage),
            "kept_samples": kept,
            "api_expected_micros": answers * api.cost_micros(round(lengths.prompt), round(lengths.answer)),
            "label_gib": label_gib(stage, world),
        },
        duration.stage_s(duration.cpu_speed(None), downloads_gb=0.0),
    )


def _measure_train(stage: TrainStage, settings: TrainSettings, world: World, machine: Machine) -> Measured:
    taught = world.taught(stage)
    shape, lengths, speed = world.student_shape(stage), taught.lengths, machine.speed
    full = settings.method == "full"
    trainable = shape.params if full else shape.lora_params(settings.lora.r, settings.lora.targets)
    steps = _steps(stage, settings, world)
    around = duration.stage_s(speed, downloads_gb=_download_gb(world.student(stage), shape))
    if settings.compile and speed.gpu:
        around += COMPILE_S
    return Measured(
        _training_memory(stage, settings, world, gpu=speed.gpu, gpus=machine.gpus),
        _training_s(stage, settings, world, machine),
        lambda: {
            "params": shape.params,
            "trainable": trainable,
            "steps": steps,
            "steps_in_all": _steps_in_all(settings, steps),
            "row_tokens": min(lengths.prompt + lengths.answer, settings.max_seq_len),
            "row_share": _row_share(stage, settings, world, machine),
            "samples": taught.samples,
            "accumulation": _accumulation(settings, machine.gpus),
        },
        around,
    )


def _accumulation(settings: TrainSettings, gpus: int) -> int:
    """Micro-batches of a step on the GPU that has most."""
    return math.ceil(math.ceil(settings.batch_size / gpus) / settings.micro_batch)


def _training_memory(stage: TrainStage, settings: TrainSettings, world: World, *, gpu: bool, gpus: int) -> Memory:
    """The same on every card."""
    key = ("memory", id(stage), id(settings), gpu, gpus)
    if key in world.measured:
        known: Memory = world.measured[key][1]
        return known
    shape, full = world.student_shape(stage), settings.method == "full"
    trainable = shape.params if full else shape.lora_params(settings.lora.r, settings.lora.targets)
    need = memory.training_memory(
        shape,
        trainable=trainable,
        full=full,
        micro_batch=min(settings.micro_batch, math.ceil(settings.batch_size / gpus)),
        seq_len=settings.max_seq_len,
        half=settings.precision == "bf16",
        checkpointing=settings.checkpointing,
        gpu=gpu,
        four_bit=settings.method == "qlora",
        eight_bit=settings.optimizer == "adamw_8bit",
        compiled=settings.compile and gpu,
        accumulation=_accumulation(settings, gpus),
        gpus=gpus,
        lora=None if full else (settings.lora.r, settings.lora.targets),
    )
    world.measured[key] = ((stage, settings), need)
    return need


def _steps(stage: TrainStage, settings: TrainSettings, world: World) -> int:
    """Optimizer steps of one training."""
    kept = world.taught(stage).samples
    return settings.steps or max(1, math.ceil(kept * (settings.epochs or 1.0) / settings.batch_size))


def _row_share(stage: TrainStage, settings: TrainSettings, world: World, machine: Machine) -> float:
    """How much of the steps' time goes with the length of rows, 0 to 1: the rest is the same for any."""
    whole = _training_s(stage, settings, world, machine).expected
    return min(1.0, max(0.0, 2 * (1 - _training_s(stage, settings, world, machine, rows=0.5).expected / whole)))


def _training_s(
    stage: TrainStage, settings: TrainSettings, world: World, machine: Machine, *, rows: float = 1.0
) -> Range:
    """Seconds of all steps; `rows`: their length, as a share of what is expected."""
    lengths, speed = world.taught(stage).lengths, machine.speed
    work = duration.training_s(
        speed,
        world.student_shape(stage),
        steps=_steps_in_all(settings, _steps(stage, settings, world)),
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        mean_len=rows * min(lengths.prompt + lengths.answer, settings.max_seq_len),
        full=settings.method == "full",
        checkpointing=settings.checkpointing,
        lora_r=settings.lora.r,
        lora_targets=settings.lora.targets,
        half=settings.precision == "bf16",
        four_bit=settings.method == "qlora",
        eight_bit=settings.optimizer == "adamw_8bit",
        compiled=settings.compile,
        gpus=machine.gpus,
    )
    if not speed.gpu:
        return work.times(duration.side_by_side(min(settings.arms_at_once, _runs(settings))))
    return work


def _runs(settings: TrainSettings) -> int:
    """Training runs of the stage, the search left out."""
    return settings.compare_seeds * ARMS if settings.compare_hard else 1


def _steps_in_all(settings: TrainSettings, steps: int) -> float:
    """Optimizer steps of all seeds and control arms, and of the search for a learning rate in each arm."""
    arms = ARMS_STEPS if settings.compare_hard else 1
    search = settings.search_steps or max(1, steps // 4)
    searches = len(settings.learning_rates) if len(settings.learning_rates) > 1 else 0
    return settings.compare_seeds * arms * steps + (2 if settings.compare_hard else 1) * searches * search


def _measure_evaluate(stage: EvaluateStage, settings: EvaluateSettings, world: World, machine: Machine) -> Measured:
    train, speed = world.train(stage.student), machine.speed
    lengths = world.evaluate_lengths(stage)
    rows = _problems(stage, world)
    compare = world.recipe.compare
    students = 1 + (compare.seeds * (ARMS if compare.hard_labels else 1) if world.compared(train) else 1)
    shapes = [(world.student_shape(train), students), *([(world.shape(stage.teacher), 1)] if stage.teacher else [])]
    engine = _engine(settings.engine, machine)
    share = _written_share(rows, rows if engine else settings.batch_size, machine.gpus, cut=engine)
    seconds = teacher_s = NOTHING
    around = duration.stage_s(
        speed,
        downloads_gb=sum(
            _download_gb(source, shape)
            for source, (shape, _) in zip(
                [world.student(train), *([world.source(stage.teacher)] if stage.teacher else [])], shapes, strict=True
            )
        ),
    )
    for shape, times in shapes:
        around += duration.ENGINE_START_S.times(times if engine else 0)
        own = duration.generation_s(
            speed,
            shape,
            sequences=share,
            prompt_len=lengths.prompt,
            answer_len=lengths.answer,
            longest=lengths.limit,
            batch_size=share if engine else settings.batch_size,
            engine=engine,
        ).times(times * settings.seeds)
        if stage.teacher:  # how far from the teacher: each model reads the teacher's answers once
            tokens = min(rows * (lengths.prompt + lengths.answer), KL_TOKENS)
            mean_len = lengths.prompt + lengths.answer
            own += duration.scoring_s(speed, shape, tokens=tokens, mean_len=mean_len).times(times)
        seconds += own
        teacher_s = own  # it is the last
    return Measured(
        _evaluate_memory(stage, settings, world, machine),
        seconds,
        lambda: {
            **_step_share(shapes[0][0], lengths, speed, rows, engine=engine),
            "prompts": rows,
            "models": students + len(shapes) - 1,
            "expected_answer_tokens": lengths.answer,
            "params": max(shape.params for shape, _ in shapes),
            **({"teacher_share": teacher_s.expected / max(seconds.expected, 1e-9)} if stage.teacher else {}),
        },
        around,
    )


def _problems(stage: EvaluateStage, world: World) -> int:
    rows = world.rows(stage.held_out or world.recipe.data.held_out)
    return min(rows, stage.limit or rows)


def _evaluate_memory(stage: EvaluateStage, settings: EvaluateSettings, world: World, machine: Machine) -> Memory:
    """The same on every card, with an engine and without."""
    engine, gpu = _engine(settings.engine, machine), machine.speed.gpu
    key = ("memory", id(stage), id(settings), gpu, engine)
    if key in world.measured:
        known: Memory = world.measured[key][1]
        return known
    lengths, rows = world.evaluate_lengths(stage), _problems(stage, world)
    student = world.student_shape(world.train(stage.student))
    need = memory.largest(
        [
            memory.generation_memory(
                shape,
                sequences=min(settings.batch_size, rows, ENGINE_LEAST) if engine else min(settings.batch_size, rows),
                seq_len=lengths.longest_prompt + lengths.limit,
                half=gpu,
                gpu=gpu,
                prompt_len=lengths.longest_prompt,
                engine=engine,
            )
            for shape in (student, *([world.shape(stage.teacher)] if stage.teacher else []))
        ]
    )
    world.measured[key] = ((stage, settings), need)
    return need


def _written_share(rows: int, batch: int, gpus: int, *, cut: bool) -> int:
    """Problems that fall to the GPU which has most (tasks/evaluate.py): whole batches, unless they may be cut."""
    size = math.ceil(rows / gpus) if cut else batch
    return min(rows, math.ceil(math.ceil(rows / size) / gpus) * size)


def _step_share(
    shape: ModelShape, lengths: Lengths, speed: duration.Speed, batch: float, *, engine: bool, gpus: int = 1,
    weight_bytes: float = 2.0,
) -> dict[str, float]:  # fmt: skip
    """How much of an engine's step is the same for few answers as for many: what the gate judges by."""
    if not engine:
        return {}
    share = duration.step_share(
        speed, shape, batch_size=batch, prompt_len=lengths.prompt, answer_len=lengths.answer, longest=lengths.limit,
        gpus=gpus, weight_bytes=weight_bytes,
    )  # fmt: skip
    return {"step_share": share}


def _measure_export(settings: ExportSettings, world: World, machine: Machine) -> Measured:
    stage = world.train(settings.student)
    shape = world.student_shape(stage)
    need = memory.loading_memory(shape, half=machine.speed.gpu, gpu=machine.speed.gpu)
    writing = 0.0
    if "hf" in settings.formats:
        writing += shape.params * 2 / 1e9 * 10  # 100 MB/s to disk and bucket
    if "gguf" in settings.formats:
        writing += shape.params * GGUF_BYTES / 1e9 * 10 + shape.params / GGUF_PARAMS_S
    around = duration.stage_s(machine.speed, downloads_gb=_download_gb(world.student(stage), shape))
    return Measured(need, Range(writing / 3, writing, writing * 3), lambda: {"params": shape.params}, around)


def _measure_rehearse(settings: RehearseSettings, machine: Machine) -> Measured:
    own = settings.steps * settings.seconds_per_step
    around = duration.stage_s(machine.speed, downloads_gb=0.0, bare=True)
    return Measured(memory.bare_memory(), Range(own, own * 1.02, own * 1.2), lambda: {"steps": settings.steps}, around)


def models_gb(stage: Stage, settings: Settings, world: World) -> dict[str, float]:
    """GB (1e9) of each model that a machine with a GPU fetches for the stage, as `measure` counts them. The machine
    keeps them, by name (tasks/hub.py)."""
    sources: list[tuple[ModelSource, ModelShape]] = []
    match stage, settings:
        case LabelStage(), LabelSettings() if settings.api is None:
            sources = [(settings.teacher, world.shape(stage.teacher))]
        case TrainStage(), _:
            sources = [(world.student(stage), world.student_shape(stage))]
        case EvaluateStage() | ExportStage(), _:
            train = world.train(stage.student)
            sources = [(world.student(train), world.student_shape(train))]
            if isinstance(stage, EvaluateStage) and stage.teacher:
                sources.append((world.source(stage.teacher), world.shape(stage.teacher)))
    return {f"{one.path} {one.revision}": _download_gb(one, shape) for one, shape in sources if one.path is not None}


def _download_gb(source: ModelSource, shape: ModelShape) -> float:
    """Weights to fetch, GB: two bytes a parameter, of a model that is no stage's and not made from scratch."""
    return shape.params * 2 / 1e9 if source.path is not None else 0.0
