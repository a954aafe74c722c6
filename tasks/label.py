"""What does the teacher say to the prompts, which answers are right, and with which probabilities? Two passes.

First it generates, and answers are verified; then only what is kept is scored by a teacher-forced pass: the exact
top-k log-probabilities, the mass outside of them, and the mass at the label temperature. Both passes work in shards
that are kept as they finish. Token ids are never made from text again.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks import hub, models, verify
from tasks.contract import LabelSettings, ModelSource, TaskError
from tasks.labels import TOKENIZER_FOLDER, Header, Sample, read_labels, shard_name, write_shard
from tasks.stage import Context, Stopped

CUT_CHECK_MIN = 32  # answers before the share of cut ones is judged
SCORE_TOKENS = 16384  # tokens of a scoring batch
SCORE_ELEMENTS = 1 << 25  # logits held at once
SAMPLES_SHOWN = 8


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # end of sequence included
    finish_reason: str  # stop | length


class Generator(Protocol):
    """Something that continues prompts. Deterministic for equal prompts and seed where the engine can."""

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]: ...


def run(ctx: Context, settings: LabelSettings) -> dict[str, Any]:
    """Labels of the kept answers as `labels-NNNNN.safetensors`, readable text as `generated-NNNNN.jsonl`."""
    _check(settings)
    models.quiet()
    models.set_threads(settings.threads)
    rows = _choose(ctx.data(settings.prompts), settings)
    device = models.pick_device()
    teacher = _Teacher(ctx, settings, device)
    shards = [rows[at : at + settings.shard_size] for at in range(0, len(rows), settings.shard_size)]

    generated: list[list[dict[str, Any]]] = []
    started, new_tokens = time.monotonic(), 0
    for index, shard in enumerate(shards):
        found, fresh = _generated(ctx, settings, teacher, index, shard)
        new_tokens += sum(len(row["completion_ids"]) for row in found) if fresh else 0
        generated.append(found)
        _pause_when_cut(settings, generated)
        ctx.progress("generate", index + 1, len(shards), "shards")
    generation_s = time.monotonic() - started
    teacher.end_generation()

    header = teacher.header()
    teacher.tokenizer.save_pretrained(ctx.out / TOKENIZER_FOLDER)
    for index, found in enumerate(generated):
        _stop_if_asked(ctx)
        if not ctx.kept(shard_name(index)):
            kept = [row for row in found if row["kept"]]
            write_shard(ctx.out / shard_name(index), header, list(_score(teacher, kept, settings)))
            ctx.keep(shard_name(index))
        ctx.progress("score", index + 1, len(generated), "shards")
    return _result(ctx, settings, generated, len(rows), new_tokens / max(generation_s, 1e-9) if new_tokens else None)


def _check(settings: LabelSettings) -> None:
    if settings.keep not in ("correct", "shortest", "all"):
        raise TaskError(f"keep: {settings.keep} is unknown", hint="use correct, shortest or all")
    if settings.verify not in verify.KINDS:
        raise TaskError(f"verify: {settings.verify} is unknown", hint=f"use one of {', '.join(verify.KINDS)}")
    if settings.engine not in ("auto", "vllm", "transformers"):
        raise TaskError(f"engine: {settings.engine} is unknown", hint="use auto, vllm or transformers")
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


# --- pass one: generate and verify -----------------------------------------------------------------------------------


def _generated(
    ctx: Context, settings: LabelSettings, teacher: _Teacher, index: int, shard: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], bool]:
    """The judged answers of one shard, and whether they were made just now."""
    name = f"generated-{index:05d}.jsonl"
    if ctx.kept(name):
        return [json.loads(line) for line in (ctx.out / name).read_text().splitlines()], False
    _stop_if_asked(ctx)
    prompts = [models.prompt_ids(teacher.tokenizer, row["input"]) for row in shard]
    n = settings.samples_per_prompt
    order = sorted(range(len(shard)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    found: list[dict[str, Any]] = []
    for at in range(0, len(order) * n, settings.batch_size):
        batch = [(i, c) for i in order for c in range(n)][at : at + settings.batch_size]
        seed = settings.seed * 1_000_003 + index * 10_007 + at
        completions = teacher.generator().generate([prompts[i] for i, _ in batch], seed=seed)
        for (i, copy), completion in zip(batch, completions, strict=True):
            found.append(_judged(settings, teacher, shard[i], copy, prompts[i], completion))
        ctx.progress("generate", index + min(1.0, (at + len(batch)) / (len(order) * n)), None, "shards")
        _stop_if_asked(ctx)
    found = _keep(settings.keep, sorted(found, key=lambda row: (row["key"], row["copy"])))
    (ctx.out / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    ctx.keep(name)
    return found, True


def _judged(
    settings: LabelSettings, teacher: _Teacher, row: dict[str, Any], copy: int, prompt: list[int], done: Completion
) -> dict[str, Any]:
    text = teacher.tokenizer.decode(done.ids, skip_special_tokens=True)
    if done.finish_reason == "length":
        verdict = verify.Verdict(False, "cut")
    else:
        verdict = verify.check(settings.verify, text, row.get("answer"), thinking=teacher.opens_thinking)
    return {
        "key": row["key"], "copy": copy, "input": row["input"], "answer": row.get("answer"), "text": text,
        "finish_reason": done.finish_reason, "ok": verdict.ok, "reason": verdict.reason,
        "prompt_ids": prompt, "completion_ids": done.ids,
    }  # fmt: skip


def _keep(rule: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `kept` set. Cut answers are never kept; `shortest` keeps one right answer a prompt."""
    shortest: dict[str, int] = {}
    for at, row in enumerate(rows):
        best = shortest.get(row["key"])
        if row["ok"] and (best is None or len(row["completion_ids"]) < len(rows[best]["completion_ids"])):
            shortest[row["key"]] = at
    for at, row in enumerate(rows):
        if rule == "all":
            row["kept"] = row["finish_reason"] != "length"
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
    share, count = _cut_share(generated)
    if count >= CUT_CHECK_MIN and share > settings.max_cut_share:
        raise TaskError(
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
            self._loaded = models.load(
                self._ctx, self._settings.teacher, dtype=models.working_dtype(self.device)
            )
            self._loaded.model.to(self.device).eval()
            models.check_plain_head(self._loaded.model)
        return self._loaded.model

    def generator(self) -> Generator:
        if self._generator is None:
            if _wants_vllm(self._settings, self.device):
                self._generator = VllmGenerator(self.place, self.tokenizer, self._settings)
            else:
                self._generator = TransformersGenerator(
                    models.causal(self.model), self.tokenizer, self._settings.max_new_tokens,
                    temperature=self._settings.temperature, top_p=self._settings.top_p,
                )  # fmt: skip
        return self._generator

    def end_generation(self) -> None:
        """Frees an engine that holds its own copy of the weights."""
        self._generator = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def header(self) -> Header:
        source = self._settings.teacher
        hashes = models.vocabulary_hashes(self.tokenizer)
        return Header(
            teacher=source.path or f"stage:{source.stage}", ordinary_sha256=hashes.ordinary,
            special_sha256=hashes.special, top_k=min(self._settings.top_k, len(self.tokenizer)),
            temperature=self._settings.label_temperature, vocabulary=len(self.tokenizer),
        )  # fmt: skip


def _wants_vllm(settings: LabelSettings, device: torch.device) -> bool:
    from importlib.util import find_spec

    installed = find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise TaskError("engine: vllm, but vLLM is not installed here", hint="install vllm, or use engine: auto")
    return settings.engine == "vllm" or (settings.engine == "auto" and installed and device.type == "cuda")


class TransformersGenerator:
    """Batched generation with a key-value cache, prompts padded on the left. Greedy at temperature 0."""

    def __init__(
        self, model: Any, tokenizer: Any, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        self._model = model
        self._pad = tokenizer.pad_token_id
        self._ends = {tokenizer.eos_token_id}
        from transformers import GenerationConfig

        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        # Made from nothing: the sampling settings in a model's own generation_config would join in silently.
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=sorted(self._ends), pad_token_id=self._pad, use_cache=True,
            **(sampling if temperature > 0.0 else {"do_sample": False}),
        )  # fmt: skip
        model.generation_config = self._config

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(p)) + p for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = self._model.generate(input_ids=ids, attention_mask=mask, generation_config=self._config)
        return [self._until_end(row) for row in out[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> Completion:
        for at, token in enumerate(ids):
            if token in self._ends:
                return Completion(ids[: at + 1], "stop")
        return Completion(ids, "length")


class VllmGenerator:
    """vLLM, without log-probabilities: those come from our own pass and would slow generation to a quarter."""

    def __init__(self, place: ModelSource, tokenizer: Any, settings: LabelSettings) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self._settings = settings
        self._params = SamplingParams
        self._eos = tokenizer.eos_token_id
        self._llm = LLM(
            model=hub.local_path(place), revision=place.revision, trust_remote_code=place.trust_remote_code,
            load_format="safetensors", seed=settings.seed,
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        params = [
            self._params(
                temperature=self._settings.temperature, top_p=self._settings.top_p,
                max_tokens=self._settings.max_new_tokens, seed=seed + i, detokenize=False,
            )
            for i in range(len(prompts))
        ]
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        done = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            stopped = output.outputs[0].finish_reason == "stop"
            if stopped and (not ids or ids[-1] != self._eos):
                ids.append(self._eos)  # some versions leave the end of sequence out
            done.append(Completion(ids, "stop" if stopped else "length"))
        return done


# --- pass two: score -------------------------------------------------------------------------------------------------


def _score(teacher: _Teacher, rows: list[dict[str, Any]], settings: LabelSettings) -> Iterator[Sample]:
    """Soft labels of the kept completions, in the order of `rows`."""
    k = min(settings.top_k, len(teacher.tokenizer))
    scored: dict[int, Sample] = {}
    if k == 0:
        empty = torch.zeros(0)
        for row in rows:
            c = len(row["completion_ids"])
            yield _sample(row, torch.zeros(c, 0), torch.zeros(c, 0), empty.new_zeros(c), empty.new_zeros(c))
        return
    for batch in _batches([len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows], SCORE_TOKENS):
        pairs = [(rows[i]["prompt_ids"], rows[i]["completion_ids"]) for i in batch]
        for i, parts in zip(batch, score(teacher.model, pairs, k, settings.label_temperature,
                                         real_vocabulary=len(teacher.tokenizer)), strict=True):  # fmt: skip
            scored[i] = _sample(rows[i], *parts)
    for i in range(len(rows)):
        yield scored[i]


def _sample(row: dict[str, Any], ids: Tensor, logprobs: Tensor, tail: Tensor, mass: Tensor) -> Sample:
    return Sample(
        row["key"], torch.tensor(row["prompt_ids"]), torch.tensor(row["completion_ids"]), ids, logprobs, tail, mass
    )


def _batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
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
    step = max(1, SCORE_ELEMENTS // head.shape[0])
    for at in range(0, len(hidden), step):
        parts.append([x.cpu() for x in _top(hidden[at : at + step], head, k, temperature, real_vocabulary)])
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    cuts = [len(c) for _, c in pairs]
    return list(zip(*[column.split(cuts) for column in joined], strict=True))


def _top(hidden: Tensor, head: Tensor, k: int, t: float, real: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    inside = (1.0 - labels.log_tail_masses().exp()).mean().item() if labels.header.top_k else None
    dropped = [row for row in rows if not row["kept"]]
    result = {
        "prompts": prompts,
        "generated": len(rows),
        "kept": len(kept),
        "dropped": dict(Counter(row["reason"] for row in dropped)),
        "tokens": sum(len(row["completion_ids"]) for row in kept),
        "tokens_per_s": speed,  # generation; None when every shard came from an earlier attempt
        "cut_share": _cut_share(generated)[0],
        "mass_inside_mean": inside,  # teacher's mass on the stored ids
        "samples": [
            {name: row[name] for name in ("key", "input", "answer", "text", "kept", "reason")}
            for row in kept[: SAMPLES_SHOWN - 2] + dropped[:2]
        ],
    }
    note = verify.note(settings.verify)
    return result if note is None else {**result, "note": note}


def _dropped_words(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row["reason"] for row in rows).most_common())


def _stop_if_asked(ctx: Context) -> None:
    if ctx.stopping:
        raise Stopped
