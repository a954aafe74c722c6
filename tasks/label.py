"""What does the teacher say to the prompts, which answers are right, and with which probabilities? Two passes.

First it generates, and answers are verified; then only what is kept is scored by a teacher-forced pass: the exact
top-k log-probabilities, the mass outside of them, and the mass at the label temperature. Both passes work in shards
that are kept as they finish. Token ids are never made from text again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks import api_teacher, losses, models, verify
from tasks.contract import API_SPENT_FILE, ApiTeacher, LabelSettings, ModelSource, TaskError, Writing
from tasks.crew import PARTIAL, POLL_S, Crew
from tasks.generate import (
    Completion,
    Generator,
    Most,
    Moved,
    TransformersGenerator,
    VllmGenerator,
    free_memory,
    rows_that_fit,
    still,
    wants_vllm,
)
from tasks.intervals import wilson
from tasks.labels import TOKENIZER_FOLDER, Header, Sample, read_labels, shard_name, write_shard
from tasks.peers import Peers, take_gpu
from tasks.shard import is_sharded, shard
from tasks.stage import Context, Stopped

CUT_CHECK_MIN = 32  # answers before the share of cut ones is judged
SCORE_TOKENS = 16384  # tokens of a scoring batch
COMPILE_TOKENS = 5_000_000  # to score: compiled layers are a quarter faster and take 8 s to compile (H200, 1.5B)
SCORE_ELEMENTS = 1 << 25  # logits held at once on a CPU; on CUDA as many as the loss holds
SAMPLES_SHOWN = 8
LIMIT = "limit"  # what the first process says of ctx.limit to the others
LEAVE_S = 15.0  # in which the others save what they have
ROUNDING = 1e-6  # of a limit, in answers
LEAST_TAIL = 1e-7  # an API's log-probabilities are rounded: what is left of 1 is no smaller than that


@dataclass(frozen=True)
class Question:
    text: str
    ids: list[int]  # the generation prompt


class Answerer(Protocol):
    """Something that answers questions: (place in `questions`, completion), in the order they come.

    `moved` is called all the while: answers take minutes, and what does not move counts as stalled. `most` says how
    many are still wanted: an API, whose answers take no machine's time, need not ask.
    """

    def answers(
        self, questions: Sequence[Question], *, seed: int, moved: Moved, most: Most
    ) -> Iterator[tuple[int, Completion]]: ...


def run(ctx: Context, settings: LabelSettings) -> dict[str, Any]:
    """Labels of the kept answers as `labels-NNNNN.safetensors`, readable text as `generated-NNNNN.jsonl`."""
    _check(settings)
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("prepare", declared=True)
    rows = _choose(ctx.data(settings.prompts), settings)
    device = models.pick_device()
    crew = _crew(ctx, settings, device)
    teacher = _Teacher(ctx, settings, device, crew)
    api = None if settings.api is None else ApiGenerator(ctx, settings, settings.api, teacher.tokenizer)
    teacher.longest_prompt = max(len(models.prompt_ids(teacher.tokenizer, row["input"])) for row in rows)
    shards = [rows[at : at + settings.shard_size] for at in range(0, len(rows), settings.shard_size)]

    point = _where_to_go_on(ctx, crew)
    started = time.monotonic()
    generated, new_tokens = _all_generated(ctx, settings, api or teacher, teacher, shards, point, crew)
    generation_s = time.monotonic() - started
    teacher.end_generation()

    header = teacher.header() if settings.api is None else teacher.api_header(generated)
    teacher.tokenizer.save_pretrained(ctx.out / TOKENIZER_FOLDER)
    _all_scored(ctx, settings, teacher, generated, header, crew)
    speed = new_tokens / max(generation_s, 1e-9) if new_tokens else None
    prompts = sum(len({row["key"] for row in found}) for found in generated)
    result = _result(ctx, settings, generated, prompts, speed)
    if prompts < len(rows):
        result["limited"] = {"planned": len(rows), "done": prompts}
    result["engine"] = "api" if api is not None else "vllm" if wants_vllm(settings.engine, device) else "transformers"
    if api is not None:
        result["api"] = _bill(generated, api)
        if settings.top_k and not result["api"]["soft"]:
            result["note"] = (
                "the API told no log-probabilities, or of tokens that are not this tokenizer's: the labels are hard"
            )
    return result


def follow(ctx: Context, settings: LabelSettings) -> None:
    """What the other processes of a machine do: their part of the shards, which the first one takes from them."""
    if settings.api is not None:
        return
    models.quiet()
    models.set_threads(settings.threads)
    rows, device = _choose(ctx.data(settings.prompts), settings), models.pick_device()
    crew = _crew(ctx, settings, device)
    if crew.size == 1:
        print("labelling is shared out on one machine: this process leaves")
        return
    teacher = _Teacher(ctx, settings, device, crew)
    teacher.longest_prompt = max(len(models.prompt_ids(teacher.tokenizer, row["input"])) for row in rows)
    shards = [rows[at : at + settings.shard_size] for at in range(0, len(rows), settings.shard_size)]
    try:
        _all_generated(ctx, settings, teacher, teacher, shards, _where_to_go_on(ctx, crew), crew)
        teacher.end_generation()
        _all_scored(ctx, settings, teacher, [], teacher.header(), crew)
    except Stopped:
        crew.say(f"left-{crew.rank}", True)


def _crew(ctx: Context, settings: LabelSettings, device: torch.device) -> Crew:
    """Who works on this. Raises TaskError where the machine is another than the settings were made for."""
    if settings.api is not None:
        return Crew(ctx.work)
    crew = Crew.of(ctx, settings.tensor_parallel)
    if crew.size % crew.cards:
        raise TaskError(
            f"the teacher is held by {crew.cards} GPUs together, and here are {crew.size}",
            hint="resume the run: it is given another machine",
        )
    if crew.cards > 1 and not wants_vllm(settings.engine, device):
        print(f"vLLM is not here: transformers write, with the whole teacher on each of the {crew.size} GPUs")
        return Crew.of(ctx)
    return crew


def _check(settings: LabelSettings) -> None:
    if settings.keep not in ("correct", "shortest", "all"):
        raise TaskError(f"keep: {settings.keep} is unknown", hint="use correct, shortest or all")
    if settings.verify not in verify.KINDS:
        raise TaskError(f"verify: {settings.verify} is unknown", hint=f"use one of {', '.join(verify.KINDS)}")
    if settings.engine not in ("auto", "vllm", "transformers"):
        raise TaskError(f"engine: {settings.engine} is unknown", hint="use auto, vllm or transformers")
    if settings.logprob_bits not in (8, 16):
        raise TaskError(f"logprob_bits: {settings.logprob_bits} cannot be stored", hint="use 16 or 8")
    if settings.samples_per_prompt > 1 and settings.temperature == 0.0:
        raise TaskError(
            f"{settings.samples_per_prompt} samples a prompt at temperature 0 are one answer paid several times",
            hint="set a temperature above 0, or samples_per_prompt: 1",
        )
    if settings.teacher.architecture is not None:
        raise TaskError("a teacher made from scratch knows nothing", hint="pretrain it in a stage and name the stage")


def _choose(rows: list[dict[str, Any]], settings: LabelSettings) -> list[dict[str, Any]]:
    """`samples` of the rows (all, when there are fewer), the same ones for the same seed."""
    if settings.verify in ("math", "exact") and settings.keep != "all":
        without = next((row for row in rows if row.get("answer") is None), None)
        if without is not None:
            raise TaskError(
                f"a prompt has no answer to check against: {without['input'][:60]!r}",
                hint="add answers to the prompts, or use verify: text or none",
            )
    chosen = sorted(rows, key=lambda row: row["key"])
    random.Random(f"label-{settings.seed}").shuffle(chosen)
    return chosen[: settings.samples]


def _end(ctx: Context, shards: int, crew: Crew) -> float:
    """Shards to make, the last one perhaps in part."""
    limit = ctx.limit
    if not crew.leads:
        told = crew.there(LIMIT)
        limit = None if told is None else float(json.loads(told.read_text()))
    elif limit is not None:
        crew.say_anew(LIMIT, limit)
    return float(shards) if limit is None else min(float(shards), limit if limit > 0 else 1.0)


def _wanted(ctx: Context, settings: LabelSettings, shards: int, index: int, crew: Crew) -> int | None:
    """Answers that are to be there of a shard: at least one; None = all."""
    end = _end(ctx, shards, crew)
    if end >= min(shards, index + 1):
        return None
    return max(1, int((end - index) * settings.shard_size * settings.samples_per_prompt + ROUNDING))


@dataclass(frozen=True)
class _Point:
    """Where an earlier attempt left off: answers of unfinished shards in a folder."""

    step: int = 0
    folder: Path | None = None

    def rows(self, name: str) -> list[dict[str, Any]]:
        return _rows(self.folder / name) if self.folder is not None and (self.folder / name).exists() else []


def _where_to_go_on(ctx: Context, crew: Crew) -> _Point:
    """As the first process finds it."""
    if not crew.leads:
        step, folder = crew.heard("start", lambda: None)
        return _Point(step, None if folder is None else Path(folder))
    newest = ctx.latest_checkpoint()
    point = _Point() if newest is None else _Point(*newest)
    if crew.size > 1:
        crew.say("start", [point.step, None if point.folder is None else str(point.folder)])
    return point


# --- pass one: generate and verify -----------------------------------------------------------------------------------


def _all_generated(
    ctx: Context, settings: LabelSettings, answerer: Answerer, teacher: _Teacher, shards: list[list[dict[str, Any]]],
    point: _Point, crew: Crew,
) -> tuple[list[list[dict[str, Any]]], int]:  # fmt: skip
    """Judged answers by shard, and how many tokens of them were made just now. Whoever does not lead: its own.

    A shard is written by one process, whose batches and seeds are those of any other: the answers are the same.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    new_tokens = 0
    try:
        for index in range(len(shards)):
            if index >= _end(ctx, len(shards), crew):
                break
            if not crew.writes(index):
                continue
            before = list(found.values())
            found[index], fresh = _generated(
                ctx, settings, answerer, teacher, index, shards, before, point, crew
            )
            new_tokens += fresh
            if crew.size > 1:
                name = text_name(index)
                crew.say(f"fresh-{index}", fresh)
                crew.hand_in(name, lambda path, name=name: shutil.copyfile(ctx.out / name, path))  # type: ignore[misc]
            _pause_when_cut(settings, list(found.values()))
            if fresh:  # what was kept before says nothing of this machine's speed
                end = _end(ctx, len(shards), crew)
                ctx.progress("generate", min(crew.done("generate", len(found)), end), end, "shards")
        if crew.leads and crew.size > 1:
            teacher.end_generation()
            new_tokens += _gather(ctx, shards, found, crew)
    except (Stopped, TaskError):
        if crew.leads and crew.size > 1:
            _leave_together(ctx, crew, point)
        raise
    there = itertools.takewhile(found.__contains__, range(len(shards)))  # after a limit some may lie beyond a gap
    return [found[index] for index in there], new_tokens


def text_name(index: int) -> str:
    return f"generated-{index:05d}.jsonl"


def _gather(
    ctx: Context, shards: list[list[dict[str, Any]]], found: dict[int, list[dict[str, Any]]], crew: Crew
) -> int:  # fmt: skip
    """Puts the shards of the others into `found` as they are handed in; how many tokens of them are new."""
    new_tokens, own = 0, len(found)
    while missing := [n for n in range(math.ceil(_end(ctx, len(shards), crew))) if n not in found]:
        for index in missing:
            path = crew.there(text_name(index))
            if path is None:
                continue
            fresh = int(crew.heard(f"fresh-{index}", lambda: None))
            shutil.copyfile(path, ctx.out / path.name)
            if fresh:
                ctx.keep(path.name)
            found[index], new_tokens = _rows(path), new_tokens + fresh
        end = _end(ctx, len(shards), crew)
        ctx.progress("generate", min(end, crew.done("generate", own)), end, "shards")
        _stop_if_asked(ctx)
        time.sleep(POLL_S)
    return new_tokens


def _leave_together(ctx: Context, crew: Crew, point: _Point) -> None:
    """Ends the others and saves what they have, too."""
    crew.stop()
    until = time.monotonic() + LEAVE_S
    while time.monotonic() < until and not crew.left():
        time.sleep(POLL_S)
    for path in sorted(crew.folder.glob(text_name(0).replace("00000", "*"))):
        if not (ctx.out / path.name).exists():
            shutil.copyfile(path, ctx.out / path.name)
            ctx.keep(path.name)
    _checkpoint(ctx, crew, point)


def _checkpoint(ctx: Context, crew: Crew, point: _Point) -> None:
    """Of every shard that some process has begun: what there is of it, at least as much as an earlier attempt left."""
    whole = {path.name for path in crew.folder.glob("generated-*")}
    begun = {path.name.removeprefix(PARTIAL): path for path in crew.folder.glob(f"{PARTIAL}*")}
    older = {path.name: path for path in point.folder.glob("generated-*")} if point.folder is not None else {}
    open_ = {name: path for name, path in {**older, **begun}.items() if name not in whole}
    rows = sum(len(_rows(crew.folder / name)) for name in whole) + sum(len(_rows(path)) for path in begun.values())
    if open_:

        def write(folder: Path) -> None:
            for name, path in open_.items():
                shutil.copyfile(path, folder / name)

        ctx.checkpoint(point.step + rows, write)


def _generated(
    ctx: Context, settings: LabelSettings, answerer: Answerer, teacher: _Teacher, index: int,
    shards: list[list[dict[str, Any]]], before: list[list[dict[str, Any]]], point: _Point, crew: Crew,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """The judged answers of one shard, and how many tokens of them were made just now.

    A shard that is whole, or as much of it as a limit allows, is kept; of one that is not, every batch is in a
    checkpoint as soon as it is there, and the newest one of an earlier attempt tells where to go on.
    """
    shard = shards[index]
    name = text_name(index)
    if ctx.kept(name):
        return _rows(ctx.out / name), 0
    _stop_if_asked(ctx)
    prompts = [models.prompt_ids(teacher.tokenizer, row["input"]) for row in shard]
    order = list(range(len(shard)))
    if not teacher.packs:  # alike lengths together: little padding
        order.sort(key=lambda i: len(prompts[i]))
    asked = [(i, copy) for i in order for copy in range(settings.samples_per_prompt)]
    found = point.rows(name)
    had, saved, fresh = sum(map(len, before)), len(found), 0
    there = {(row["key"], row["copy"]) for row in found}
    open_ = [(i, copy) for i, copy in asked if (shard[i]["key"], copy) not in there]

    def save() -> None:
        if saved >= len(found):
            return
        if crew.size == 1:
            ctx.checkpoint(had + len(found), lambda folder: _write_rows(folder / name, found))
            return
        crew.hand_in(PARTIAL + name, lambda path: _write_rows(path, found))
        if crew.leads:
            _checkpoint(ctx, crew, point)

    done = len(before)
    highest, numbers = float(done), dict[str, float]()

    def moved(share: float, writing: Writing | None = None, /) -> None:
        nonlocal highest, numbers
        part = len(found) + share * min(settings.batch_size, len(asked) - len(found))
        if writing is not None:
            there_before = writing.before + len(asked) - len(open_)
            part = there_before + share * writing.answers
            after = (part for n, part in enumerate(shards) if n > index and crew.writes(n))
            later = sum(map(len, after)) * settings.samples_per_prompt
            telling = replace(writing, before=had + there_before, later=writing.later + later).of_all(crew.engines)
            numbers = {**telling.numbers(), "tokens_per_s": writing.tokens / max(writing.seconds, 1e-9)}
        # Checking answers is work as well, although the tokens are there: it moves by a little.
        end = _end(ctx, len(shards), crew)
        highest = max(highest + 1e-9, min(done + part / len(asked), end))
        ctx.progress("generate", crew.done("generate", highest), end, "shards", declared=False, **numbers)
        _stop_if_asked(ctx)
        crew.stop_if_told()

    def most() -> int | None:
        wanted = _wanted(ctx, settings, len(shards), index, crew)
        return None if wanted is None else max(0, wanted - (len(asked) - len(open_)))

    seed = settings.seed * 1_000_003 + index * 10_007 + len(found)
    questions = [Question(shard[i]["input"], prompts[i]) for i, _ in open_]
    try:
        for place, completion in answerer.answers(questions, seed=seed, moved=moved, most=most):
            i, copy = open_[place]
            found.append(_judged(settings, teacher, shard[i], copy, prompts[i], completion))
            fresh += len(completion.ids)
            moved(0.0)
            if settings.batch_size <= len(found) - saved and len(found) < len(asked):
                save()
                saved = len(found)
                _pause_when_surely_cut(settings, [*before, found])
    except (Stopped, TaskError):  # what came before it was paid for
        save()
        raise
    found = _keep(settings.keep, sorted(found, key=lambda row: (row["key"], row["copy"])))
    _write_rows(ctx.out / name, found)
    ctx.keep(name)
    return found, fresh


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as lines:  # answers may hold what splitlines() takes for a line end
        return [json.loads(line) for line in lines]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _judged(
    settings: LabelSettings, teacher: _Teacher, row: dict[str, Any], copy: int, prompt: list[int], done: Completion
) -> dict[str, Any]:
    text = teacher.tokenizer.decode(done.ids, skip_special_tokens=True)
    if done.finish_reason == "length":
        verdict = verify.Verdict(False, "cut")
    elif done.finish_reason != "stop":
        verdict = verify.Verdict(False, done.finish_reason)
    else:
        verdict = verify.check(settings.verify, text, row.get("answer"), thinking=teacher.opens_thinking)
    judged = {
        "key": row["key"], "copy": copy, "input": row["input"], "answer": row.get("answer"), "text": text,
        "finish_reason": done.finish_reason, "ok": verdict.ok, "reason": verdict.reason,
        "loops": done.loops,
        "prompt_ids": prompt, "completion_ids": done.ids,
    }  # fmt: skip
    return judged if done.top is None else {**judged, "top": done.top}


def _keep(rule: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `kept` set. Unfinished answers are never kept; `shortest` keeps one right answer a prompt."""
    shortest: dict[str, int] = {}
    for at, row in enumerate(rows):
        best = shortest.get(row["key"])
        if row["ok"] and (best is None or len(row["completion_ids"]) < len(rows[best]["completion_ids"])):
            shortest[row["key"]] = at
    for at, row in enumerate(rows):
        if rule == "all":
            row["kept"] = row["finish_reason"] == "stop"
        elif rule == "shortest":
            row["kept"] = row["ok"] and shortest[row["key"]] == at
            if row["ok"] and not row["kept"]:
                row["reason"] = "longer"
        else:
            row["kept"] = row["ok"]
    return rows


def _cut_share(generated: list[list[dict[str, Any]]]) -> tuple[float, int]:
    rows = [row for shard in generated for row in shard]
    return sum(row["finish_reason"] == "length" for row in rows) / max(1, len(rows)), len(rows)


def _pause_when_cut(settings: LabelSettings, generated: list[list[dict[str, Any]]]) -> None:
    """After a shard: by the share itself."""
    share, count = _cut_share(generated)
    if count >= CUT_CHECK_MIN and share > settings.max_cut_share:
        raise _too_many_cut(settings, share, count)


def _pause_when_surely_cut(settings: LabelSettings, generated: list[list[dict[str, Any]]]) -> None:
    """Within a shard: only once chance is no excuse, that is with the low end of the share's 95 % interval."""
    share, count = _cut_share(generated)
    if count >= CUT_CHECK_MIN and wilson(share, count)[0] > settings.max_cut_share:
        raise _too_many_cut(settings, share, count)


def _too_many_cut(settings: LabelSettings, share: float, count: int) -> TaskError:
    return TaskError(
        f"{share:.0%} of {count} answers were cut off at {settings.max_new_tokens} tokens: "
        "they cost money and cannot be kept",
        hint="raise max_new_tokens, or take easier prompts, and start a new run",
    )


class _Teacher:
    """The teacher, loaded when first needed: a stage whose shards are all kept loads nothing but a tokenizer."""

    def __init__(self, ctx: Context, settings: LabelSettings, device: torch.device, crew: Crew) -> None:
        self._ctx = ctx
        self._settings = settings
        self._crew = crew
        self.device = device
        self._loaded: models.Loaded | None = None
        self._generator: Generator | None = None
        self._rows: int | None = None
        self.moved: Moved = still
        self.longest_prompt = 0
        self.place = self._place(settings.teacher)
        self.tokenizer = models.load_tokenizer(self.place)
        self.opens_thinking = models.opens_thinking(self.tokenizer)

    def _place(self, source: ModelSource) -> ModelSource:
        if source.stage is None:
            return source
        return ModelSource(path=str(self._ctx.input(source.stage) / models.MODEL_FOLDER))

    @property
    def model(self) -> torch.nn.Module:
        if self._loaded is None:
            self._ctx.progress("load", declared=True)
            if self._crew.cards > 1:
                self._loaded = self._in_turns()
                return self._loaded.model
            take_gpu(os.environ)
            self._loaded = self._load()
            self._loaded.model.to(self.device)
            models.check_plain_head(self._loaded.model)
        return self._loaded.model

    def _load(self) -> models.Loaded:
        loaded = models.load(self._ctx, self._settings.teacher, dtype=models.working_dtype(self.device))
        loaded.model.eval()
        return loaded

    def _in_turns(self) -> models.Loaded:
        """Loaded by one process after the other: the host's memory need hold the whole only once."""
        peers = Peers()
        mesh = peers.mesh()
        for turn in range(peers.size):
            if turn == peers.rank:
                loaded = self._load()
                models.check_plain_head(loaded.model)
                shard(loaded.model, score, name="score", mesh=mesh)
            peers.most(0)
        return loaded

    def compile(self) -> None:
        if self.device.type == "cuda" and losses.has_triton():
            models.compile_layers(self.model)

    def generator(self) -> Generator:
        if self._generator is None:
            if wants_vllm(self._settings.engine, self.device):
                if self._settings.teacher.stage is None:
                    models.fetch(self._ctx, self.place)
                self._ctx.progress("load", declared=True)  # weights, compiling, room for the cache: minutes
                self._generator = VllmGenerator(
                    self.place, self.tokenizer, self._settings.max_new_tokens, longest_prompt=self.longest_prompt,
                    temperature=self._settings.temperature, top_p=self._settings.top_p, seed=self._settings.seed,
                    moved=lambda share, writing=None, /: self.moved(share, writing), cards=self._crew.cards,
                )  # fmt: skip
            else:
                self._generator = TransformersGenerator(
                    models.causal(self.model), self.tokenizer, self._settings.max_new_tokens,
                    temperature=self._settings.temperature, top_p=self._settings.top_p,
                    moved=lambda share, writing=None, /: self.moved(share, writing),
                )  # fmt: skip
        return self._generator

    @property
    def packs(self) -> bool:
        """Whether what writes the answers does not care for their order."""
        return self._settings.api is None and wants_vllm(self._settings.engine, self.device)

    def answers(
        self, questions: Sequence[Question], *, seed: int, moved: Moved, most: Most
    ) -> Iterator[tuple[int, Completion]]:
        """In batches, each with a seed of its own that follows from its place."""
        size, at = self._batch_size(), 0
        while at < len(questions):
            wanted = most()
            batch = questions[at : min(at + size, len(questions) if wanted is None else wanted)]
            if not batch:
                return
            self.moved = partial(_of_all, moved, at, len(questions) - at - len(batch))
            generator, prompts = self.generator(), [one.ids for one in batch]
            if isinstance(generator, VllmGenerator):
                left = partial(_left, most, at)
                yield from ((at + i, done) for i, done in generator.stream(prompts, seed=seed + at, most=left))
            else:
                yield from enumerate(generator.generate(prompts, seed=seed + at), at)
            at += len(batch)

    def _batch_size(self) -> int:
        """The settings' own, but for a machine on which transformers take vLLM's place: that size was meant for an
        engine which packs its own batches."""
        settings = self._settings
        if settings.engine != "auto" or self.device.type != "cuda" or wants_vllm(settings.engine, self.device):
            return settings.batch_size
        if self._rows is None:  # once: what torch holds for a batch that is over does not count as free
            config, (free, _) = models.causal(self.model).config, torch.cuda.mem_get_info(self.device)
            length = self.longest_prompt + settings.max_new_tokens
            self._rows = rows_that_fit(config, free, length, settings.batch_size)
        return self._rows

    def end_generation(self) -> None:
        """Frees an engine that holds its own copy of the weights."""
        self._generator = None
        free_memory()

    def header(self) -> Header:
        source = self._settings.teacher
        hashes = models.vocabulary_hashes(self.tokenizer)
        name = source.path or f"stage:{source.stage}"
        return Header(
            teacher=f"{name}@{source.revision}" if source.revision else name, ordinary_sha256=hashes.ordinary,
            special_sha256=hashes.special, top_k=min(self._settings.top_k, len(self.tokenizer)),
            temperature=self._settings.label_temperature, vocabulary=len(self.tokenizer),
            logprob_bits=self._settings.logprob_bits,
        )  # fmt: skip

    def api_header(self, generated: list[list[dict[str, Any]]]) -> Header:
        """Of what an API answered: its log-probabilities are at T = 1, and as many as it told. Where soft labels were
        wanted and it told none there is place for one, so that training for soft labels goes on without."""
        assert self._settings.api is not None
        told = max((len(row) for shard in generated for one in shard for row in one.get("top") or ()), default=0)
        top_k = max(told, min(1, self._settings.top_k))
        return replace(self.header(), teacher=f"api:{self._settings.api.model}", top_k=top_k, temperature=1.0)


def _of_all(moved: Moved, before: int, later: int, share: float, writing: Writing | None = None, /) -> None:
    """What a batch tells, with the answers of a shard before and after it."""
    moved(share, None if writing is None else replace(writing, before=before, later=later))


def _left(most: Most, before: int) -> int | None:
    """Of all that is wanted, what a batch may still give."""
    wanted = most()
    return None if wanted is None else max(0, wanted - before)


class ApiGenerator:
    """A teacher behind an API: text becomes ids of the tokenizer named beside it, once.

    Soft labels only where every token of an answer, and every candidate, has the bytes of just one id of it.
    """

    def __init__(self, ctx: Context, settings: LabelSettings, api: ApiTeacher, tokenizer: Any) -> None:
        self._ctx, self._tokenizer = ctx, tokenizer
        self._thinks = models.opens_thinking(tokenizer)
        self._ids = models.byte_vocabulary(tokenizer) if settings.top_k else {}
        before = api_teacher.Spent()
        if ctx.kept(API_SPENT_FILE):
            before = api_teacher.Spent(**json.loads((ctx.out / API_SPENT_FILE).read_text()))
        step = settings.batch_size * api.cost_micros(0, settings.max_new_tokens)
        self.purse = api_teacher.Purse(api.max_cost_micros, before, self._save, step_micros=step)
        self._client = api_teacher.Client(
            api, self.purse, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
            top_p=settings.top_p, top=settings.top_k,
        )  # fmt: skip

    def _save(self, spent: api_teacher.Spent) -> None:
        (self._ctx.out / API_SPENT_FILE).write_text(json.dumps(asdict(spent)))
        self._ctx.keep(API_SPENT_FILE)

    def answers(
        self, questions: Sequence[Question], *, seed: int, moved: Moved, most: Most
    ) -> Iterator[tuple[int, Completion]]:
        """No seed is sent: few APIs know one."""
        began = time.monotonic()

        def stopping() -> bool:
            waited = time.monotonic() - began
            # Every attempt has a limit of its own, so waiting is no stall; a stop is answered below.
            with suppress(Stopped):
                moved(waited / (waited + 60.0))
            return self._ctx.stopping

        try:
            for place, answer in self._client.answers([one.text for one in questions], stopping):
                yield place, self._completion(answer)
                began = time.monotonic()
        finally:
            self.purse.close()

    def _completion(self, answer: api_teacher.Answer) -> Completion:
        before = self._thinking(answer)
        ids = self._encode(before)
        top: list[list[tuple[int, float]]] = [[] for _ in ids]
        said = self._spelled(answer.tokens)
        if said is None:
            ids, top = self._encode(before + answer.content), []
        else:
            ids += [i for i, _ in said]
            top += [candidates for _, candidates in said]
        if answer.finish_reason == "stop" and (not ids or ids[-1] != self._tokenizer.eos_token_id):
            ids.append(self._tokenizer.eos_token_id)
            top += [[]] if top else []
        return Completion(ids, answer.finish_reason, top)

    def _thinking(self, answer: api_teacher.Answer) -> str:
        """What stands before the content so that the whole reads as this tokenizer's template has it."""
        if answer.reasoning is not None:
            return ("" if self._thinks else "<think>\n") + f"{answer.reasoning}\n</think>\n\n"
        return "\n</think>\n\n" if self._thinks and "</think>" not in answer.content else ""

    def _encode(self, text: str) -> list[int]:
        """Special tokens that the text spells out stay text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _spelled(
        self, tokens: tuple[api_teacher.Token, ...] | None
    ) -> list[tuple[int, list[tuple[int, float]]]] | None:
        """(id, candidates) of every token; None unless all of them map one to one."""
        if tokens is None or not self._ids:
            return None
        rows = []
        for token in tokens:
            candidates = [(self._ids.get(text), value) for text, value in token.top]
            own = self._ids.get(token.text)
            known = [(i, value) for i, value in candidates if i is not None]
            if own is None or len({i for i, _ in known}) < len(candidates):
                return None
            rows.append((own, known))
        return rows


# --- pass two: score -------------------------------------------------------------------------------------------------


def _all_scored(
    ctx: Context, settings: LabelSettings, teacher: _Teacher, generated: list[list[dict[str, Any]]], header: Header,
    crew: Crew,
) -> None:  # fmt: skip
    """Labels of every shard, each by one process; where a GPU holds a part of the teacher only, by all together.

    Shards beyond a limit are taken out of `generated`.
    """
    waiting: list[int] = []
    compiles = False
    if crew.leads:
        waiting = [index for index in range(len(generated)) if not ctx.kept(shard_name(index))]
        kept = [row for index in waiting for row in generated[index] if row["kept"]]
        scored = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in kept)
        compiles = settings.api is None and bool(settings.top_k) and scored >= COMPILE_TOKENS and crew.cards == 1
        if crew.size > 1:
            crew.say("generated", [str(ctx.out), len(generated), waiting, compiles])
    else:
        out, count, waiting, compiles = crew.heard("generated", lambda: None)
        generated = [_rows(Path(out) / text_name(index)) for index in range(count)]
    if compiles:
        teacher.compile()
    crew.new_phase()
    before, mine = len(generated) - len(waiting), 0
    try:
        for index in waiting:
            total = math.ceil(_end(ctx, len(generated), crew))
            if index >= total:
                break
            if crew.cards == 1 and not crew.scores(index):
                continue
            _stop_if_asked(ctx)
            crew.stop_if_told()
            kept = [row for row in generated[index] if row["kept"]]
            samples = list(_score(ctx, teacher, kept, settings, header, (before, mine), crew, index, total))
            mine += 1
            if crew.leads:
                write_shard(ctx.out / shard_name(index), header, samples)
                ctx.keep(shard_name(index))
                ctx.progress("score", min(total, before + crew.done("score", mine)), total, "shards")
            elif crew.cards == 1:
                crew.hand_in(
                    shard_name(index), lambda path, samples=samples: write_shard(path, header, samples)  # type: ignore[misc]
                )  # fmt: skip
        if crew.leads and crew.cards == 1 and crew.size > 1:
            others = [index for index in waiting if not crew.scores(index)]
            _gather_labels(ctx, others, before, mine, len(generated), crew)
        if crew.leads:
            del generated[math.ceil(_end(ctx, len(generated), crew)) :]
            ctx.progress("score", len(generated), len(generated), "shards")
    except Stopped:
        if crew.leads:
            crew.stop()
        raise


def _gather_labels(ctx: Context, missing: list[int], before: int, mine: int, count: int, crew: Crew) -> None:
    """Keeps the labels of the others as they are handed in."""
    total = math.ceil(_end(ctx, count, crew))
    while missing := [index for index in missing if index < total]:
        for index in list(missing):
            path = crew.there(shard_name(index))
            if path is not None:
                shutil.copyfile(path, ctx.out / path.name)
                ctx.keep(path.name)
                missing.remove(index)
        total = math.ceil(_end(ctx, count, crew))
        ctx.progress("score", min(total, before + crew.done("score", mine)), total, "shards")
        _stop_if_asked(ctx)
        time.sleep(POLL_S)


def _score(
    ctx: Context, teacher: _Teacher, rows: list[dict[str, Any]], settings: LabelSettings, header: Header,
    sofar: tuple[int, int], crew: Crew, index: int, total: int,
) -> Iterator[Sample]:  # fmt: skip
    """Soft labels of the kept completions, in the order of `rows`."""
    k = header.top_k
    if settings.api is not None:
        yield from (_told(row, k) for row in rows)
        return
    if k == 0:
        empty = torch.zeros(0)
        for row in rows:
            c = len(row["completion_ids"])
            yield _sample(row, torch.zeros(c, 0), torch.zeros(c, 0), empty.new_zeros(c), empty.new_zeros(c))
        return
    lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows]
    cut = list(batches(lengths, SCORE_TOKENS))
    scored: dict[int, tuple[Tensor, ...]] = {}
    # With a part of the teacher on each GPU all make as many passes: whoever has no batch left repeats one.
    for n in range(0, len(cut), crew.size if crew.cards > 1 else 1):
        at = n + crew.rank if crew.cards > 1 else n
        batch = cut[min(at, len(cut) - 1)]
        pairs = [(rows[i]["prompt_ids"], rows[i]["completion_ids"]) for i in batch]
        parts = scored_by(teacher.model, pairs, k, settings.label_temperature, real_vocabulary=len(teacher.tokenizer))
        if at < len(cut):
            scored.update(zip(batch, parts, strict=True))
        part = sum(lengths[i] for i in scored) / sum(lengths)  # by tokens: short ones come first
        shown = sofar[0] + crew.done("score", sofar[1] + part)
        ctx.progress("score", min(total, shown), total, "shards")
        if crew.cards == 1:  # together nobody leaves in the middle of a shard: the others would wait for its next layer
            _stop_if_asked(ctx)
            crew.stop_if_told()
    if crew.cards > 1:
        scored = _exchanged(crew, index, scored)
    for i in range(len(rows)):
        if i in scored:
            yield _sample(rows[i], *scored[i])


def _exchanged(crew: Crew, index: int, scored: dict[int, tuple[Tensor, ...]]) -> dict[int, tuple[Tensor, ...]]:
    """What all have scored of a shard, for the first process."""
    if not crew.leads:
        named = {f"{i}.{n}": part.contiguous() for i, parts in scored.items() for n, part in enumerate(parts)}
        crew.hand_in(f"scored-{index}-{crew.rank}", lambda path: save_file(named, path))
        return {}
    whole = dict(scored)
    for rank in range(1, crew.size):
        while (path := crew.there(f"scored-{index}-{rank}")) is None:
            time.sleep(POLL_S)
        found = load_file(path)
        for i in {int(name.partition(".")[0]) for name in found}:
            whole[i] = tuple(found[f"{i}.{n}"] for n in range(4))
        path.unlink()
    return whole


def _told(row: dict[str, Any], k: int) -> Sample:
    """Soft labels as an API gave them. A place without any says nothing: no ids, and all mass in the tail."""
    c = len(row["completion_ids"])
    ids, logprobs = torch.full((c, k), -1, dtype=torch.int32), torch.full((c, k), float("-inf"), dtype=torch.float64)
    for at, candidates in enumerate(row.get("top") or ()):
        for place, (i, value) in enumerate(candidates):
            ids[at, place], logprobs[at, place] = i, value
    mass = logprobs.exp().sum(1) if k else torch.zeros(c, dtype=torch.float64)
    tail = torch.where(mass > 0, (1.0 - mass).clamp(min=LEAST_TAIL), 1.0).log()
    return _sample(row, ids, logprobs.float(), tail.float(), mass.clamp(max=1.0).log().float())


def _sample(row: dict[str, Any], ids: Tensor, logprobs: Tensor, tail: Tensor, mass: Tensor) -> Sample:
    return Sample(
        row["key"], torch.tensor(row["prompt_ids"]), torch.tensor(row["completion_ids"]), ids, logprobs, tail, mass
    )


def batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of alike lengths, each with at most `most_tokens` padded tokens (or one sample)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[i] * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def scored_by(model: torch.nn.Module, *args: Any, **how: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`score` of a model that is whole here, or of which each process holds a part."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = (
        model.score(*args, **how) if is_sharded(model) else score(model, *args, **how)  # type: ignore[operator]
    )
    return found


@torch.inference_mode()
def score(
    model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]], k: int, temperature: float, *,
    real_vocabulary: int,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """For each (prompt, completion): top-k ids [C, k], log-probabilities [C, k] and log tail mass [C] at T = 1, log
    mass of the k ids at `temperature` [C], all on the CPU.

    Row j is the distribution of completion[j] given all before it, so it comes from the place before it. Ids beyond the
    real vocabulary (a wider head) are never among the k; their mass counts as tail.
    """
    device = next(model.parameters()).device
    lengths = [len(p) + len(c) for p, c in pairs]
    ids = torch.zeros(len(pairs), max(lengths), dtype=torch.long)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        ids[row, : lengths[row]] = torch.tensor(prompt + completion)
        wanted[row, len(prompt) - 1 : lengths[row] - 1] = True
    hidden = models.hidden_states(model, ids.to(device))[wanted.to(device)]  # rows of prompts need no head product
    head = models.head_weight(model)
    parts = []
    step = max(1, (losses.FUSED_ELEMENTS if hidden.is_cuda else SCORE_ELEMENTS) // head.shape[0])
    for at in range(0, len(hidden), step):
        parts.append(_top(hidden[at : at + step], head, k, temperature, real_vocabulary))
    joined = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    cuts = [len(c) for _, c in pairs]
    return list(zip(*[column.split(cuts) for column in joined], strict=True))


def _top(hidden: Tensor, head: Tensor, k: int, t: float, real: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if losses.fuses(hidden):
        from tasks import kernels

        z = torch.mm(hidden, head.to(hidden.dtype).T, out_dtype=torch.float32)
        return kernels.top_stats(z, k, t, real)
    z = (hidden @ head.T).float()
    lse = torch.logsumexp(z, 1, keepdim=True)
    top, ids = z[:, :real].topk(k, dim=1)
    rest = z.scatter(1, ids, float("-inf"))
    tail = torch.logsumexp(rest, 1) - lse[:, 0]  # from the rest itself: 1 - sum would be all rounding
    mass = torch.logsumexp(top / t, 1) - torch.logsumexp(z / t, 1)
    return ids.int(), top - lse, tail, mass


# --- result ----------------------------------------------------------------------------------------------------------


def _result(
    ctx: Context, settings: LabelSettings, generated: list[list[dict[str, Any]]], prompts: int, speed: float | None
) -> dict[str, Any]:
    rows = [row for shard in generated for row in shard]
    kept = [row for row in rows if row["kept"]]
    if not kept:
        raise TaskError(
            f"none of {len(rows)} answers was kept ({_dropped_words(rows)})",
            hint="look at generated-*.jsonl in the bucket; a better teacher or keep: all may help",
        )
    labels = read_labels(ctx.out)
    tails = labels.log_tail_masses() if labels.header.top_k else torch.zeros(0)
    tails = tails[tails < 0.0]  # the whole mass is outside where an API told nothing
    inside = (1.0 - tails.exp()).mean().item() if len(tails) else None
    rounding = labels.rounding
    dropped = [row for row in rows if not row["kept"]]
    result = {
        "prompts": prompts,
        "generated": len(rows),
        "kept": len(kept),
        "thoughts": sum("</think>" in row["text"] for row in kept),
        "dropped": dict(Counter(row["reason"] for row in dropped)),
        "tokens": sum(len(row["completion_ids"]) for row in kept),
        "generated_tokens": sum(len(row["completion_ids"]) for row in rows),
        "tokens_per_s": speed,  # generation; None when every shard came from an earlier attempt
        "cut_share": _cut_share(generated)[0],
        "loop_share": sum(row.get("loops", False) for row in rows) / max(1, len(rows)),
        "mass_inside_mean": inside,  # teacher's mass on the stored ids
        "logprob_error": None if rounding is None else {"mean": rounding.mean, "worst": rounding.worst},
        "samples": [
            {name: row[name] for name in ("key", "input", "answer", "text", "kept", "reason")}
            for row in kept[: SAMPLES_SHOWN - 2] + dropped[:2]
        ],
    }
    note = verify.note(settings.verify)
    return result if note is None else {**result, "note": note}


def _bill(generated: list[list[dict[str, Any]]], api: ApiGenerator) -> dict[str, Any]:
    """What the API has cost, by its own counts; and how many of the kept answers have soft labels."""
    kept = [row for shard in generated for row in shard if row["kept"]]
    spent = api.purse.spent
    return {
        "calls": spent.calls, "input_tokens": spent.input_tokens, "output_tokens": spent.output_tokens,
        "cost_micros": spent.micros, "limit_micros": api.purse.limit_micros,
        "soft": sum(bool(row.get("top")) for row in kept),
    }  # fmt: skip


def _dropped_words(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row["reason"] for row in rows).most_common())


def _stop_if_asked(ctx: Context) -> None:
    if ctx.stopping:
        raise Stopped
