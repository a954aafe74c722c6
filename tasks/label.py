"""What does the teacher say to the prompts, which answers are right, and with which probabilities? Two passes.

First it generates, and answers are verified; then only what is kept is scored by a teacher-forced pass: the exact
top-k log-probabilities, the mass outside of them, and the mass at the label temperature. Both passes work in shards
that are kept as they finish. Token ids are never made from text again.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks import api_teacher, losses, models, verify
from tasks.contract import API_SPENT_FILE, ApiTeacher, LabelSettings, ModelSource, TaskError, Writing
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
from tasks.stage import Context, Stopped

CUT_CHECK_MIN = 32  # answers before the share of cut ones is judged
SCORE_TOKENS = 16384  # tokens of a scoring batch
COMPILE_TOKENS = 5_000_000  # to score: compiled layers are a quarter faster and take 8 s to compile (H200, 1.5B)
SCORE_ELEMENTS = 1 << 25  # logits held at once on a CPU; on CUDA as many as the loss holds
SAMPLES_SHOWN = 8
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
    teacher = _Teacher(ctx, settings, device)
    api = None if settings.api is None else ApiGenerator(ctx, settings, settings.api, teacher.tokenizer)
    teacher.longest_prompt = max(len(models.prompt_ids(teacher.tokenizer, row["input"])) for row in rows)
    shards = [rows[at : at + settings.shard_size] for at in range(0, len(rows), settings.shard_size)]

    generated: list[list[dict[str, Any]]] = []
    newest = ctx.latest_checkpoint()
    started, new_tokens = time.monotonic(), 0
    for index in range(len(shards)):
        if index >= _end(ctx, len(shards)):
            break
        found, fresh = _generated(
            ctx, settings, api or teacher, teacher, index, shards, generated, newest[1] if newest else None
        )
        new_tokens += fresh
        generated.append(found)
        _pause_when_cut(settings, generated)
        if fresh:  # what was kept before says nothing of this machine's speed
            end = _end(ctx, len(shards))
            ctx.progress("generate", min(index + 1, end), end, "shards")
    generation_s = time.monotonic() - started
    teacher.end_generation()

    header = teacher.header() if settings.api is None else teacher.api_header(generated)
    teacher.tokenizer.save_pretrained(ctx.out / TOKENIZER_FOLDER)
    waiting = [row for i, found in enumerate(generated) if not ctx.kept(shard_name(i)) for row in found if row["kept"]]
    scored = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in waiting)
    if settings.api is None and settings.top_k and scored >= COMPILE_TOKENS:
        teacher.compile()
    for index, found in enumerate(list(generated)):
        total = math.ceil(_end(ctx, len(generated)))
        if index >= total:
            del generated[index:]
            break
        _stop_if_asked(ctx)
        if not ctx.kept(shard_name(index)):
            kept = [row for row in found if row["kept"]]
            samples = list(_score(ctx, teacher, kept, settings, header, index, total))
            write_shard(ctx.out / shard_name(index), header, samples)
            ctx.keep(shard_name(index))
        ctx.progress("score", index + 1, total, "shards")
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


def _end(ctx: Context, shards: int) -> float:
    """Shards to make, the last one perhaps in part."""
    limit = ctx.limit
    return float(shards) if limit is None else min(float(shards), limit if limit > 0 else 1.0)


def _wanted(ctx: Context, settings: LabelSettings, shards: int, index: int) -> int | None:
    """Answers that are to be there of a shard: at least one; None = all."""
    end = _end(ctx, shards)
    if end >= min(shards, index + 1):
        return None
    return max(1, int((end - index) * settings.shard_size * settings.samples_per_prompt + ROUNDING))


# --- pass one: generate and verify -----------------------------------------------------------------------------------


def _generated(
    ctx: Context, settings: LabelSettings, answerer: Answerer, teacher: _Teacher, index: int,
    shards: list[list[dict[str, Any]]], before: list[list[dict[str, Any]]], checkpoint: Path | None,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """The judged answers of one shard, and how many tokens of them were made just now.

    A shard that is whole, or as much of it as a limit allows, is kept; of one that is not, every batch is in a
    checkpoint as soon as it is there, and the newest `checkpoint` of an earlier attempt tells where to go on.
    """
    shard = shards[index]
    name = f"generated-{index:05d}.jsonl"
    if ctx.kept(name):
        return _rows(ctx.out / name), 0
    _stop_if_asked(ctx)
    prompts = [models.prompt_ids(teacher.tokenizer, row["input"]) for row in shard]
    order = list(range(len(shard)))
    if not teacher.packs:  # alike lengths together: little padding
        order.sort(key=lambda i: len(prompts[i]))
    asked = [(i, copy) for i in order for copy in range(settings.samples_per_prompt)]
    found = _rows(checkpoint / name) if checkpoint is not None and (checkpoint / name).exists() else []
    had, saved, fresh = sum(map(len, before)), len(found), 0
    there = {(row["key"], row["copy"]) for row in found}
    open_ = [(i, copy) for i, copy in asked if (shard[i]["key"], copy) not in there]

    def save() -> None:
        if saved < len(found):
            ctx.checkpoint(had + len(found), lambda folder: _write_rows(folder / name, found))

    highest, numbers = float(index), dict[str, float]()

    def moved(share: float, writing: Writing | None = None, /) -> None:
        nonlocal highest, numbers
        part = len(found) + share * min(settings.batch_size, len(asked) - len(found))
        if writing is not None:
            there_before = writing.before + len(asked) - len(open_)
            part = there_before + share * writing.answers
            later = sum(map(len, shards[index + 1 :])) * settings.samples_per_prompt
            telling = replace(writing, before=had + there_before, later=writing.later + later)
            numbers = {**telling.numbers(), "tokens_per_s": writing.tokens / max(writing.seconds, 1e-9)}
        # Checking answers is work as well, although the tokens are there: it moves by a little.
        end = _end(ctx, len(shards))
        highest = max(highest + 1e-9, min(index + part / len(asked), end))
        ctx.progress("generate", highest, end, "shards", declared=False, **numbers)
        _stop_if_asked(ctx)

    def most() -> int | None:
        wanted = _wanted(ctx, settings, len(shards), index)
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

    def __init__(self, ctx: Context, settings: LabelSettings, device: torch.device) -> None:
        self._ctx = ctx
        self._settings = settings
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
            self._loaded = models.load(
                self._ctx, self._settings.teacher, dtype=models.working_dtype(self.device)
            )
            self._loaded.model.to(self.device).eval()
            models.check_plain_head(self._loaded.model)
        return self._loaded.model

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
                    moved=lambda share, writing=None, /: self.moved(share, writing),
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


def _score(
    ctx: Context, teacher: _Teacher, rows: list[dict[str, Any]], settings: LabelSettings, header: Header, index: int,
    total: int,
) -> Iterator[Sample]:  # fmt: skip
    """Soft labels of the kept completions, in the order of `rows`."""
    k = header.top_k
    if settings.api is not None:
        yield from (_told(row, k) for row in rows)
        return
    scored: dict[int, Sample] = {}
    if k == 0:
        empty = torch.zeros(0)
        for row in rows:
            c = len(row["completion_ids"])
            yield _sample(row, torch.zeros(c, 0), torch.zeros(c, 0), empty.new_zeros(c), empty.new_zeros(c))
        return
    lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows]
    for batch in batches(lengths, SCORE_TOKENS):
        pairs = [(rows[i]["prompt_ids"], rows[i]["completion_ids"]) for i in batch]
        for i, parts in zip(batch, score(teacher.model, pairs, k, settings.label_temperature,
                                         real_vocabulary=len(teacher.tokenizer)), strict=True):  # fmt: skip
            scored[i] = _sample(rows[i], *parts)
        done = sum(lengths[i] for i in scored) / sum(lengths)  # by tokens: short ones come first
        ctx.progress("score", index + done, total, "shards")
        _stop_if_asked(ctx)
    for i in range(len(rows)):
        yield scored[i]


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
