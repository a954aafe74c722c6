"""How does a student learn from labels? One training loop, resumable to the bit, and the arms compared by it."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks import losses, models
from tasks.contract import DataSource, ModelSource, Task, TaskError, TrainSettings
from tasks.labels import TOKENIZER_FOLDER, Labels, read_labels
from tasks.losses import Loss, distillation_loss_parts
from tasks.peers import Peers, size_of
from tasks.shard import is_sharded, part_of, shard, whole
from tasks.stage import Context, Stopped

STUDENTS_FILE = "students.json"  # what evaluate and export read
BEFORE_FOLDER = "before"
SEARCH_FILE = "search.json"
BEST_FILE = "best.safetensors"  # in a checkpoint, where held-out samples choose
# Of the labelled prompts. They pick the learning rate and are trained on afterwards; those of an early stop never are.
VALIDATION_SHARE = 0.1
FINAL_STEPS = 20  # final_loss is the mean over the last steps, since single batches differ
METRIC_ROWS = 200  # of an arm
# torch has one generator for all threads: whoever seeds it and draws initial weights must not be interrupted.
_GENERATOR = threading.RLock()


def run(ctx: Context, settings: TrainSettings) -> dict[str, Any]:
    """The student under `model/`; with compare, every arm under `arms/NAME` and the first distilled one as `model/`.

    All arms of a seed share initial weights, data and batch order. Each of the two kinds of labels gets the same
    search over `learning_rates`: short runs without a tenth of the labelled prompts, which then choose by the arm's
    own loss. Held-out problems choose nothing.
    """
    _check(settings)
    peers = Peers() if size_of(os.environ) > 1 else None
    try:
        return _run(ctx, settings, peers)
    finally:
        if peers is not None:
            peers.leave()


def follow(ctx: Context, settings: TrainSettings) -> None:
    """What the other processes do: the same, and what the first one says goes."""
    with suppress(Stopped):
        run(ctx, settings)


def _run(ctx: Context, settings: TrainSettings, peers: Peers | None) -> dict[str, Any]:
    if peers is not None and settings.batch_size < peers.size:
        text = f"batch_size {settings.batch_size} leaves some of {peers.size} GPUs without a sample"
        raise TaskError(text, hint="raise batch_size, or take fewer GPUs")
    if peers is not None and settings.method == "full" and settings.optimizer == "adamw_8bit":
        raise TaskError("adamw_8bit does not work on shards of a model", hint="use adamw, lora, or one GPU")
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("prepare", declared=True)
    folder = ctx.input(settings.labels)
    labels = read_labels(folder)
    student = _Student(ctx, settings, folder, labels, peers)
    examples, too_long = _examples(labels, settings)
    _check_labels(labels, settings, examples)
    held_out = None
    if settings.early_stop_patience is not None:
        examples, held_out = _split(examples)
    student.save_before()

    steps = settings.steps or max(1, math.ceil((settings.epochs or 1.0) * len(examples) / settings.batch_size))
    kinds = ["soft", "hard"] if settings.compare_hard else ["soft" if settings.alpha > 0.0 else "hard"]
    point = resume_point(ctx, peers)
    work = _Work(ctx, settings, student, examples, held_out, steps, kinds, point, peers)
    rates, search = work.search()
    arms = work.arms(rates)
    if settings.compare_hard:
        shutil.copytree(ctx.out / arms[0]["path"], ctx.out / models.MODEL_FOLDER, dirs_exist_ok=True)
    before = student.before()
    (ctx.out / STUDENTS_FILE).write_text(json.dumps({"before": before, "arms": arms}, indent=1))
    speeds = [arm.pop("tokens_per_s") for arm in arms]
    return {
        "arms": arms,
        "search": search,
        "samples": len(examples),
        "too_long": too_long,
        "supervised_tokens": examples.tokens,
        "row_tokens": float(examples.lengths.double().mean()),
        "steps_done": work.search_steps + sum(arm["steps_done"] for arm in arms),
        "tokens": sum(arm["tokens"] for arm in arms),
        "tokens_per_s": sum(speeds) / len(speeds),
        "micro_batch": min(arm["micro_batch"] for arm in arms),
        "student_before": before,
        **({"processes": peers.size} if peers else {}),
        **({"limited": {"planned": arms[0]["steps"], "done": arms[0]["limit"]}} if arms[0].get("limit") else {}),
    }


def _check(settings: TrainSettings) -> None:
    if settings.method not in ("lora", "qlora", "full"):
        raise TaskError(f"method: {settings.method} is unknown", hint="use lora, qlora or full")
    if settings.optimizer not in ("adamw", "adamw_8bit"):
        raise TaskError(f"optimizer: {settings.optimizer} is unknown", hint="use adamw or adamw_8bit")
    if settings.method == "qlora":
        models.bits_and_bytes("method: qlora")
    if settings.optimizer == "adamw_8bit":
        models.bits_and_bytes("optimizer: adamw_8bit")
    if settings.method != "full" and settings.student.architecture is not None:
        raise TaskError("LoRA on random weights learns nothing", hint="use method: full for a student from scratch")
    if (settings.early_stop_patience or 1) < 1 or (settings.eval_every_steps or 1) < 1:
        raise TaskError("early_stop_patience and eval_every_steps must be 1 or more", hint="leave them out")
    if not 0.0 <= settings.alpha <= 1.0 or settings.temperature <= 0.0:
        raise TaskError("alpha must be between 0 and 1 and temperature above 0", hint="alpha: 0.7, temperature: 2")


def _check_labels(labels: Labels, settings: TrainSettings, examples: Examples) -> None:
    if settings.alpha > 0.0 and labels.header.top_k == 0:
        raise TaskError("these labels are hard ones only", hint="set loss.alpha to 0, or label with soft_labels")
    if len(examples) == 0:
        raise TaskError(f"every sample is longer than {settings.max_seq_len} tokens", hint="raise max_seq_len")


# --- what is trained on ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, or ones end to end, and labels for each place that predicts a token of a completion."""

    ids: Tensor  # [B, L]; end to end [1, T]
    places: Tensor  # [N] into B * L
    labels: Tensor  # [N]
    soft: tuple[Tensor, ...]  # topk_ids [N, k], topk_logprobs [N, k], log_tail_mass [N], log_mass_at_t [N]; or ()
    runs: models.Runs = ()  # of sequences end to end

    def to(self, device: torch.device) -> Batch:
        """The same there. From pinned memory a copy is only asked for: what follows waits for it on the GPU."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        soft = tuple(map(change, self.soft))
        return Batch(change(self.ids), change(self.places), change(self.labels), soft, self.runs)


@dataclass(frozen=True)
class Examples:
    """Samples end to end: tokens offsets[i]:offsets[i + 1], of which the first prompts[i] are the prompt."""

    keys: list[str]
    ids: Tensor  # all tokens, prompt then completion
    offsets: Tensor  # [n + 1]
    prompts: Tensor  # [n] prompt lengths
    rows: Tensor  # [n] first row of the sample in the soft labels
    soft: Callable[[Tensor], tuple[Tensor, ...]] | None = None  # Labels.soft_rows

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    @property
    def tokens(self) -> int:
        """Supervised tokens."""
        return int((self.lengths - self.prompts).sum())

    @staticmethod
    def hard(pairs: Sequence[tuple[list[int], list[int]]]) -> Examples:
        """Examples of (prompt ids, completion ids), without soft labels."""
        lengths = torch.tensor([0, *(len(p) + len(c) for p, c in pairs)])
        return Examples(
            keys=[str(i) for i in range(len(pairs))],
            ids=torch.tensor([token for p, c in pairs for token in (*p, *c)]),
            offsets=lengths.cumsum(0),
            prompts=torch.tensor([len(p) for p, _ in pairs]),
            rows=torch.zeros(len(pairs), dtype=torch.long),
        )

    @staticmethod
    def of(labels: Labels, picked: Sequence[int]) -> Examples:
        """The picked samples; soft labels stay where they are and are found by row."""
        pairs = [labels.tokens(i) for i in picked]
        parts = [part for pair in pairs for part in pair]
        lengths = torch.tensor([0, *(len(prompt) + len(completion) for prompt, completion in pairs)])
        return Examples(
            keys=[labels.keys[i] for i in picked],
            ids=torch.cat(parts).long() if parts else torch.zeros(0, dtype=torch.long),
            offsets=lengths.cumsum(0),
            prompts=torch.tensor([len(prompt) for prompt, _ in pairs]),
            rows=labels.completion_offsets[torch.tensor(picked, dtype=torch.long)],
            soft=labels.soft_rows,
        )

    def take(self, picked: Sequence[int]) -> Examples:
        """These samples only."""
        at = torch.tensor(picked, dtype=torch.long)
        spans = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in picked]
        return replace(
            self, keys=[self.keys[i] for i in picked], ids=torch.cat(spans), prompts=self.prompts[at],
            offsets=torch.tensor([0, *map(len, spans)]).cumsum(0), rows=self.rows[at],
        )  # fmt: skip

    def batch(self, picked: Tensor, *, soft: bool, packed: bool = False) -> Batch:
        """The samples `picked` [B], one a row or, packed, end to end in one row."""
        length = self.lengths[picked]
        sample, column = torch.arange(len(picked))[:, None], torch.arange(int(length.max()))[None]  # to [B, L]
        runs: models.Runs = ()
        if packed:
            sample = torch.repeat_interleave(length)[None]  # [1, T]
            column = torch.arange(sample.shape[1]) - (length.cumsum(0) - length)[sample]
            each, counts = length.unique_consecutive(return_counts=True)
            runs = tuple(zip(counts.tolist(), each.tolist(), strict=True))
        at = self.offsets[picked][sample] + column
        there = column < length[sample]
        ids = torch.where(there, self.ids[at.clamp(max=len(self.ids) - 1)], 0)
        first = self.prompts[picked][sample] - 1  # the prompt's last token predicts the completion's first
        predicts = (column >= first) & (column < length[sample] - 1)
        labels = self.ids[at[predicts] + 1]
        found: tuple[Tensor, ...] = ()
        if soft and self.soft is not None:
            found = self.soft((self.rows[picked][sample] + column - first)[predicts])
        return Batch(ids, predicts.flatten().nonzero()[:, 0], labels, found, runs)


def _examples(labels: Labels, settings: TrainSettings) -> tuple[Examples, int]:
    """Samples that fit `max_seq_len`, and how many do not."""
    lengths = labels.prompt_offsets.diff() + labels.completion_offsets.diff()
    fits = (lengths <= settings.max_seq_len).nonzero()[:, 0].tolist()
    return Examples.of(labels, fits), len(labels) - len(fits)


class Order:
    """Which samples make up step n: endless epochs, each shuffled by (seed, epoch). Nothing to save but the step."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self._n, self._batch_size, self._seed = n, batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(self._n, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + epoch))

    def at(self, step: int) -> Tensor:
        start = step * self._batch_size
        picked: list[Tensor] = []
        while start < (step + 1) * self._batch_size:
            epoch, offset = divmod(start, self._n)
            part = self._epoch(epoch)[offset : offset + (step + 1) * self._batch_size - start]
            picked.append(part)
            start += len(part)
        return torch.cat(picked)


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One training run."""

    steps: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    alpha: float
    max_seq_len: int | None = None  # a packed row holds micro_batch times as many tokens; None = the longest sample
    temperature: float = 1.0
    use_mass_at_t: bool = False  # the labels' log_mass_at_t belongs to this temperature
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.98  # second moments that follow within 50 steps: short runs, and little difference in long ones
    max_grad_norm: float = 1.0
    precision: str = "auto"
    optimizer: str = "adamw"
    checkpoint_every_s: float = 300.0
    checkpoint_every_steps: int | None = None
    early_stop_patience: int | None = None  # evaluations without a new best one
    eval_every_steps: int | None = None  # None = a twentieth of the steps
    seed: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether the held-out samples are looked at after this many steps."""
        every = self.eval_every_steps or max(1, self.steps // 20)
        return step % every == 0 or step == self.steps

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to a tenth."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        along = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * along))


@dataclass(frozen=True)
class Arm:
    """Where a run stands within its stage."""

    name: str
    first: int  # steps of the stage before it
    total: int  # steps of the whole stage
    prefix: str = ""  # of its metrics


@dataclass(frozen=True)
class Fitted:
    final_loss: float
    tokens: int
    tokens_per_s: float
    micro_batch: int  # at the end: memory may have asked for a smaller one than the settings do
    steps_done: int
    best_step: int | None = None  # whose weights these are, where held-out samples chose
    best_loss: float | None = None  # of held-out samples, a token
    limit: int | None = None  # steps, where the run was told to end earlier than planned


@dataclass(frozen=True)
class Best:
    """The lowest loss of held-out samples, after how many steps, and how many evaluations ago."""

    loss: float = math.inf
    step: int = 0
    since: int = 0


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint of an arm in the middle, and what the stage had found out by then."""

    arm: str
    step: int
    recent: list[float]
    tokens: int
    notes: dict[str, float]
    folder: Path
    micro_batch: int
    best: Best | None
    limit: int | None = None


def resume_point(ctx: Context, peers: Peers | None = None) -> ResumePoint | None:
    """The newest committed checkpoint of this stage, as the first process finds it."""
    latest = ctx.latest_checkpoint()
    text = "" if latest is None else (latest[1] / "state.json").read_text()
    if peers is not None:
        text = peers.text_of_first(text)
    if not text:
        return None
    state = json.loads(text)
    best = state.pop("best")
    folder = latest[1] if latest is not None else Path()
    return ResumePoint(**state, folder=folder, best=None if best is None else Best(**best))


def fit(
    ctx: Context, model: nn.Module, examples: Examples, how: Fit, arm: Arm, point: ResumePoint | None,
    notes: dict[str, float] | None = None, held_out: Examples | None = None, peers: Peers | None = None,
    prove: bool = False,
) -> Fitted:  # fmt: skip
    """Trains `model` in place, from `point` when that belongs to this arm. Raises Stopped after a last checkpoint.

    With `peers`, each of them calls this, and takes its share of the samples of each step.
    With `prove`, the dearest step is tried first, and changes nothing but the micro-batch if it must.
    With `held_out`, training ends early_stop_patience evaluations after their best loss, and its weights are taken.
    """
    device = next(model.parameters()).device
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(weights, how, device)
    order = Order(len(examples), how.batch_size, how.seed)
    start, tokens, recent, limit = 0, 0, [], None
    planned, limited = how.steps, ctx.task.gate and arm.first == 0 and arm.total == how.steps  # and no other arm
    best, best_file = Best(), ctx.work / f"best-{arm.name}.safetensors"
    with _GENERATOR:
        torch.manual_seed(how.seed)
        if point is not None and point.arm == arm.name:
            start, tokens, recent, best = point.step, point.tokens, list(point.recent), point.best or best
            how, limit = replace(how, micro_batch=point.micro_batch), point.limit
            _restore(point.folder, weights, optimizer, device, peers)
            if point.best is not None and _leads(peers):
                shutil.copyfile(point.folder / BEST_FILE, best_file)

    def save(step: int) -> None:
        state = {
            "arm": arm.name, "step": step, "recent": recent, "tokens": tokens, "notes": notes or {},
            "micro_batch": how.micro_batch, "best": asdict(best) if best.step else None, "limit": limit,
        }  # fmt: skip

        saved = _saved(weights, optimizer, device, peers)  # all processes take part in it

        def write(folder: Path) -> None:
            _write(folder, *saved, state)
            if best.step:
                shutil.copyfile(best_file, folder / BEST_FILE)

        ctx.checkpoint(arm.first + step, write)

    if not is_sharded(model) and not models.is_compiled(model):  # whoever compiles it decides before
        models.use_packing(model)
    model.train()
    if prove:
        how = prove_memory(model, examples, how, weights, optimizer, peers)
    began, before, saved_at = time.monotonic(), tokens, time.monotonic()
    every = max(1, how.steps // METRIC_ROWS)
    ahead = Ahead(model, examples, order, peers)
    done, data_s, save_s = start, 0.0, 0.0  # the seconds in which no step was made
    while True:
        if limited:
            limit = _limit(ctx, planned, done, limit, peers)
            how = replace(how, steps=limit or planned)
        if done >= how.steps or (how.early_stop_patience and best.since >= how.early_stop_patience):
            break
        step = done
        if _agree(peers, ctx.stopping):
            save(step)
            raise Stopped
        if peers is not None:  # resumed with as many processes, each draws as before
            torch.manual_seed((how.seed * 1_000_003 + step) * peers.size + peers.rank)
        rate = how.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        cut, asked_at = how.micro_batch, time.monotonic()
        picked, batches = ahead.at(step, how)
        data_s += time.monotonic() - asked_at
        loss, count, how = accumulate_within_memory(model, examples, picked, how, peers, batches)
        norm = nn.utils.clip_grad_norm_(weights.values(), how.max_grad_norm) if how.max_grad_norm > 0.0 else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

        total = float(loss.total)
        if not math.isfinite(total):
            raise TaskError(f"{arm.name}: the loss is {total} at step {step}", hint="lower the learning rate")
        tokens += count
        recent = [*recent[1 - FINAL_STEPS :], total]
        speed = (tokens - before) / (time.monotonic() - began)
        more: dict[str, float] = {"micro_batch": how.micro_batch} if how.micro_batch < cut else {}
        if held_out is not None and how.evaluates(done):
            found = validation_loss(model, held_out, how)
            more["loss__held_out"] = found = found if peers is None else peers.first_says(found)
            model.train()
            best = replace(best, since=best.since + 1)
            if found < best.loss:
                best = Best(found, done)
                values = _values(weights, peers)
                if _leads(peers):
                    save_file(values, best_file)
        if step % every == 0 or done == how.steps or more:
            passed_s = time.monotonic() - began
            waited = {"waiting__data": data_s / passed_s, "waiting__save": save_s / passed_s}
            gradient = {} if norm is None else {"grad_norm": float(whole(norm))}
            _metric(ctx, arm, step, loss, rate, speed, {**more, **waited, **gradient})
        numbers = {"loss": total, "tokens_per_s": speed, **more}
        ctx.progress("train", arm.first + done, limit or arm.total, "steps", declared=False, **numbers)
        due = bool(how.checkpoint_every_steps) and done % (how.checkpoint_every_steps or 1) == 0
        if done < how.steps and (due or _agree(peers, time.monotonic() - saved_at >= how.checkpoint_every_s)):
            save_from = time.monotonic()
            save(done)
            saved_at = time.monotonic()
            save_s += saved_at - save_from
    if best.step:
        _take(weights, load_file(best_file) if _leads(peers) else {}, peers)
    model.eval()
    best_step, best_loss = (best.step, best.loss) if best.step else (None, None)
    return Fitted(
        sum(recent) / max(1, len(recent)), tokens, (tokens - before) / (time.monotonic() - began), how.micro_batch,
        done, best_step, best_loss, limit,
    )  # fmt: skip


def _limit(ctx: Context, planned: int, done: int, before: int | None, peers: Peers | None) -> int | None:
    """Steps at which the run ends because the client said so, and learns by: a run that has them already ends now."""
    told = ctx.limit or 0.0
    told = told if peers is None else peers.first_says(told)
    least = min(before or planned, max(done, 1, int(told))) if told else before
    return None if least == planned else least


def prove_memory(
    model: nn.Module, examples: Examples, how: Fit, weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer, peers: Peers | None = None,
) -> Fit:  # fmt: skip
    """`how` as it fits into memory, found out before money is spent: one step on the longest batch, without an update.

    A step of several micro-batches is at its dearest in the second one, which has the gradients of the first beside
    it: so the longest batch is taken twice. Weights and random numbers stay as they were. What the optimizer will
    hold is held meanwhile.
    """
    device = next(model.parameters()).device
    with _GENERATOR:
        drawn = _generators(device)
        held = [] if optimizer.state else _as_large_as_moments(weights, how, device)
        tried = 0
        while tried != how.micro_batch:
            tried, picked = how.micro_batch, fullest(model, examples, how, peers)
            batches = list(micro_batches(model, examples, _share(picked, peers), how))
            if how.micro_batch * (1 if peers is None else peers.size) < how.batch_size:
                batches += batches
            _, _, how = accumulate_within_memory(model, examples, picked, how, peers, batches)
            model.zero_grad(set_to_none=True)
            if peers is not None:  # each halves for itself, and all must ask each other as often
                break
        del held
        _set_generators(drawn, device)
    return how


def fullest(model: nn.Module, examples: Examples, how: Fit, peers: Peers | None = None) -> Tensor:
    """Samples of the micro-batch that takes most memory, once for each process."""
    order = examples.lengths.argsort(descending=True, stable=True)
    picked = order[: how.micro_batch]
    if models.packs(model):  # whatever still fits into the row
        longest = int(examples.lengths.max())
        room, chosen = how.micro_batch * min(how.max_seq_len or longest, longest), []
        for place, length in zip(order.tolist(), examples.lengths[order].tolist(), strict=True):
            if length <= room:
                room -= length
                chosen.append(place)
        picked = torch.tensor(chosen)
    return picked.repeat_interleave(1 if peers is None else peers.size)


def _as_large_as_moments(weights: Mapping[str, nn.Parameter], how: Fit, device: torch.device) -> list[Tensor]:
    """Two numbers a trained weight; in 8 bit, of one byte."""
    if device.type != "cuda":
        return []
    dtype = torch.uint8 if how.optimizer == "adamw_8bit" else None  # None: the weight's own
    return [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in weights.values() for _ in range(2)]


class Ahead:
    """The samples of each step and their batches, on CUDA cut while the GPU is at the step before."""

    def __init__(self, model: nn.Module, examples: Examples, order: Order, peers: Peers | None = None) -> None:
        self._model, self._examples, self._order, self._peers = model, examples, order, peers
        self._pool = ThreadPoolExecutor(1) if next(model.parameters()).is_cuda else None
        self._next: tuple[int, int, Future[tuple[Tensor, list[Batch]]]] | None = None

    def at(self, step: int, how: Fit) -> tuple[Tensor, list[Batch]]:
        """The samples of all processes, and the batches of this one."""
        if self._pool is None:
            return self._cut(step, how)
        made, self._next = self._next, None
        known = made is not None and made[:2] == (step, how.micro_batch)
        found = made[2].result() if made is not None and known else self._cut(step, how)
        if step + 1 < how.steps:
            self._next = step + 1, how.micro_batch, self._pool.submit(self._cut, step + 1, how)
        return found

    def _cut(self, step: int, how: Fit) -> tuple[Tensor, list[Batch]]:
        picked = self._order.at(step)
        batches = list(micro_batches(self._model, self._examples, _share(picked, self._peers), how))
        return picked, batches if self._pool is None else [batch.pinned() for batch in batches]


def _share(picked: Tensor, peers: Peers | None) -> Tensor:
    """The samples of a step that this process takes."""
    return picked if peers is None else picked[peers.rank :: peers.size]


def _optimizer(weights: dict[str, nn.Parameter], how: Fit, device: torch.device) -> torch.optim.Optimizer:
    betas = (0.9, how.beta2)
    if how.optimizer == "adamw_8bit":
        eight_bit: torch.optim.Optimizer = models.bits_and_bytes("optimizer: adamw_8bit").optim.AdamW8bit(
            weights.values(), lr=how.learning_rate, betas=betas, weight_decay=how.weight_decay
        )
        return eight_bit
    return torch.optim.AdamW(
        weights.values(), lr=how.learning_rate, betas=betas, weight_decay=how.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip


def _leads(peers: Peers | None) -> bool:
    return peers is None or peers.rank == 0


def _agree(peers: Peers | None, value: bool) -> bool:
    """What the first process says."""
    return value if peers is None else bool(peers.first_says(value))


def accumulate_within_memory(
    model: nn.Module, examples: Examples, picked: Tensor, how: Fit, peers: Peers | None = None,
    batches: Sequence[Batch] | None = None,
) -> tuple[Loss, int, Fit]:  # fmt: skip
    """`accumulate`, and with what micro-batch it went: halved, from the start of the step, where memory ran out.

    Raises TaskError where not even a micro-batch of 1 fits, and for a model in shards, which cannot repeat a step.
    """
    device = next(model.parameters()).device
    drawn = _generators(device)
    while True:
        try:
            loss, count = accumulate(model, examples, picked, how, peers, batches)
            break
        except torch.OutOfMemoryError as error:
            if is_sharded(model):
                raise _unrepeatable(error, how) from error
            said = str(error).split("\n")[0]
        # Only out here is nothing left that holds the step's activations: the error's traceback did.
        model.zero_grad(set_to_none=True)
        if how.micro_batch == 1:
            raise TaskError(
                f"a single sample does not fit: {said}",
                hint="set checkpointing: true, a smaller max_seq_len, method: lora or qlora, or take a larger GPU",
            )
        how, batches = replace(how, micro_batch=how.micro_batch // 2), None
        print(f"out of memory: the step is done again with micro_batch {how.micro_batch} ({said})")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with _GENERATOR:
            _set_generators(drawn, device)
    if peers is not None:
        loss = _summed(model, loss, peers)
    return loss, count, how


def _unrepeatable(error: torch.OutOfMemoryError, how: Fit) -> TaskError:
    """What to set by hand where memory ran out in shards: each layer gathers its weights from all processes in turn,
    so the others stand in the middle of the step and wait for this one's next layer."""
    fitting = [n for n in range(1, how.micro_batch // 2 + 1) if how.batch_size % n == 0]
    hint = f"start again with micro_batch: {fitting[-1]}, or checkpointing: true" if fitting else (
        "start again with checkpointing: true, a smaller max_seq_len, method: lora, or more GPUs"
    )  # fmt: skip
    return TaskError(
        f"one of the GPUs ran out of memory with micro_batch {how.micro_batch}, and a step of a model in shards "
        f"cannot be repeated with less ({str(error).splitlines()[0]})",
        hint=hint,
    )


def _summed(model: nn.Module, loss: Loss, peers: Peers) -> Loss:
    """The loss over all processes, and its gradients, which a sharded model has summed already."""
    if not is_sharded(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        peers.add([p.grad for p in trained if p.grad is not None])
    parts = torch.stack(loss).to(next(model.parameters()).device)
    peers.add([parts])
    return Loss(*parts.cpu())


def accumulate(
    model: nn.Module, examples: Examples, picked: Tensor, how: Fit, peers: Peers | None = None,
    batches: Sequence[Batch] | None = None,
) -> tuple[Loss, int]:  # fmt: skip
    """Gradients of one optimizer step over the samples `picked`, its loss, and its supervised tokens.

    Every micro-batch is divided by the tokens of the whole step, so the cut into micro-batches changes nothing. With
    `peers`, loss and gradients are of this process's share, unless the model is sharded: then gradients are of all.
    `batches`: the share, cut before. On a GPU nothing is waited for before the last gradient is asked for.
    """
    count = int((examples.lengths[picked] - examples.prompts[picked]).sum())
    if batches is None:
        batches = list(micro_batches(model, examples, _share(picked, peers), how))
    if peers is not None and is_sharded(model):
        return _accumulate_together(model, batches, how, count, peers), count
    device = next(model.parameters()).device
    sums = torch.zeros(3, device=device)
    for batch in batches:
        loss = loss_of(model, batch.to(device), how, count)
        loss.total.backward()
        sums += torch.stack([part.detach().to(sums.dtype) for part in loss])
    return Loss(*sums.cpu()), count


def _accumulate_together(model: nn.Module, batches: Sequence[Batch], how: Fit, count: int, peers: Peers) -> Loss:
    """Every process makes as many passes: whoever has fewer micro-batches repeats its last one, counting nothing."""
    sums = [torch.zeros(())] * 3
    for n in range(peers.most(len(batches))):
        mine = n < len(batches)
        loss = _loss(model, batches[min(n, len(batches) - 1)], how, count)
        (loss.total * (peers.size if mine else 0)).backward()  # FSDP takes the mean over processes
        sums = [a + b.detach().cpu() * mine for a, b in zip(sums, loss, strict=True)]
    return Loss(*sums)


def _loss(model: nn.Module, batch: Batch, how: Fit, count: int) -> Loss:
    if not is_sharded(model):
        return loss_of(model, batch, how, count)
    found: Loss = model.loss_of(batch, how, count)  # type: ignore[operator]
    return found


def micro_batches(model: nn.Module, examples: Examples, picked: Tensor, how: Fit) -> Iterator[Batch]:
    """The samples `picked`, cut into what `model` takes at once.

    A model that packs takes rows of up to micro_batch * max_seq_len tokens, however many samples that are: the memory
    that so many samples of the greatest length would need. Any other takes micro_batch padded ones.
    """
    soft = how.alpha > 0.0
    lengths = examples.lengths[picked]
    order = lengths.argsort(stable=True)  # alike lengths together: little padding, few runs
    picked, lengths = picked[order], lengths[order]
    if not models.packs(model):
        for part in picked.split(how.micro_batch):
            yield examples.batch(part, soft=soft)
        return
    longest = int(examples.lengths.max())
    room = how.micro_batch * min(how.max_seq_len or longest, longest)
    first, filled = 0, 0
    for n, length in enumerate(lengths.tolist()):
        if n > first and filled + length > room:
            yield examples.batch(picked[first:n], soft=soft, packed=True)
            first, filled = n, 0
        filled += length
    yield examples.batch(picked[first:], soft=soft, packed=True)


def loss_of(model: nn.Module, batch: Batch, how: Fit, token_count: int) -> Loss:
    """The loss of a batch as the model stands, divided by `token_count`."""
    device = next(model.parameters()).device
    dtype = models.working_dtype(device, how.precision)
    low = dtype != torch.float32
    with torch.autocast(device.type, dtype=dtype) if low else nullcontext():
        hidden = models.hidden_states(model, batch.ids.to(device), runs=batch.runs)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.places.to(device)]
    labels = batch.labels.to(device)
    if batch.soft:
        ids, logprobs, tail, mass = (tensor.to(device) for tensor in batch.soft)
    else:
        ids, logprobs, tail, mass = labels.new_zeros(len(labels), 0), hidden.new_zeros(len(labels), 0), None, None
    return distillation_loss_parts(
        hidden.to(dtype) if low else hidden, models.head_weight(model), labels, ids, logprobs, alpha=how.alpha,
        temperature=how.temperature, token_count=token_count, log_tail_mass=tail,
        log_mass_at_t=mass if how.use_mass_at_t else None,
    )  # fmt: skip


def _metric(
    ctx: Context, arm: Arm, step: int, loss: Loss, rate: float, speed: float, more: dict[str, float]
) -> None:
    values = {
        "loss__total": float(loss.total), "loss__kl": float(loss.kl), "loss__ce": float(loss.ce),
        "learning_rate": rate, "tokens_per_s": speed, **more,
    }  # fmt: skip
    ctx.metric(step, **{arm.prefix + name: value for name, value in values.items()})


# --- checkpoints -----------------------------------------------------------------------------------------------------


Saved = tuple[dict[str, Tensor], dict[str, Tensor]]


def _saved(
    weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device, peers: Peers | None
) -> Saved:
    """What a resumed run needs to go on to the bit: trained weights; moments and random generators."""
    tensors = {f"{i}.{name}": value for i, part in _moments(optimizer).items() for name, value in part.items()}
    return _values(weights, peers), {**_values(tensors, peers), **_generators(device)}


def _write(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
    """A checkpoint, without pickle."""
    save_file(weights, folder / "weights.safetensors")
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def _restore(
    folder: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device,
    peers: Peers | None,
) -> None:  # fmt: skip
    saved = load_file(folder / "weights.safetensors") if _leads(peers) else {}
    if _leads(peers) and set(saved) != set(weights):
        raise TaskError("the checkpoint belongs to another model", hint="start a new run")
    _take(weights, saved, peers)
    tensors = load_file(folder / "optimizer.safetensors") if _leads(peers) else {}
    drawn = {name: tensors.pop(name) for name in ("rng", "rng_cuda") if name in tensors}
    if peers is None:
        _set_generators(drawn, device)
    moments: dict[int, dict[str, Any]] = {}
    params = list(weights.values())
    for name, tensor in tensors.items() if peers is None else peers.tensors_of_first(tensors):
        index, _, part = name.partition(".")
        counted = tensor.ndim == 0 and not tensor.is_floating_point()  # bitsandbytes counts its steps in an int
        of_values = tensor.shape == params[int(index)].shape
        value = part_of(tensor, params[int(index)]) if of_values else tensor
        moments.setdefault(int(index), {})[part] = tensor.item() if counted else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _moments(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the optimizer remembers of each parameter, in the order it was given them."""
    found: dict[int, dict[str, Tensor]] = {}
    for index, part in optimizer.state_dict()["state"].items():
        flat: dict[str, Any] = {}
        for name, value in part.items():  # bitsandbytes wraps what is quantized once more
            flat.update(value if isinstance(value, dict) else {name: value})
        found[index] = {name: torch.as_tensor(value).contiguous() for name, value in flat.items()}
        for name in ("qmap1", "qmap2"):  # one table serves all parameters: safetensors stores nothing twice
            if name in found[index]:
                found[index][name] = found[index][name].clone()
    return found


def _values(tensors: Mapping[str, Tensor], peers: Peers | None = None) -> dict[str, Tensor]:
    """Whole tensors. With `peers` every process has to ask, and the first one gets them, in the machine's memory."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if peers is None:
            found[name] = value.contiguous()
        elif peers.rank == 0:
            found[name] = value.cpu().contiguous()
    return found


@torch.no_grad()
def _take(weights: dict[str, nn.Parameter], values: dict[str, Tensor], peers: Peers | None) -> None:
    """Puts the first process's `values` into the weights."""
    for name, value in values.items() if peers is None else peers.tensors_of_first(values):
        weights[name].copy_(part_of(value, weights[name]))


def _generators(device: torch.device) -> dict[str, Tensor]:
    """What the next random numbers follow from."""
    states = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng"])
    if device.type == "cuda" and "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"], device)


# --- the student -----------------------------------------------------------------------------------------------------


class _Student:
    """Makes the student as it is before training, again and again, and saves it after."""

    def __init__(
        self, ctx: Context, settings: TrainSettings, folder: Path, labels: Labels, peers: Peers | None
    ) -> None:
        self._ctx, self._settings, self._peers = ctx, settings, peers
        self.tokenizer = models.load_tokenizer(ModelSource(path=str(folder / TOKENIZER_FOLDER)))
        self._teacher_hash = labels.header.ordinary_sha256
        self.label_temperature = labels.header.temperature
        self._device = models.pick_device()
        self._special_ids: list[int] | None = None

    def make(self, seed: int) -> nn.Module:
        settings = self._settings
        if settings.student.architecture is not None:
            model: nn.Module = models.from_architecture(settings.student.architecture, self.tokenizer, seed=seed)
        else:
            dtype = models.working_dtype(self._device, settings.precision)
            # Full training keeps fp32 weights (bf16 ones swallow small updates) and computes under autocast.
            adapters = settings.method != "full"
            loaded = models.load(
                self._ctx, settings.student, dtype=dtype if adapters else torch.float32,
                four_bit=settings.method == "qlora",
            )  # fmt: skip
            rows = loaded.model.get_output_embeddings().weight.shape[0]
            special = models.check_compatible(
                self.tokenizer, loaded.tokenizer, teacher_hash=self._teacher_hash, head_rows=rows
            )
            model = loaded.model
            if adapters:
                model = models.with_lora(loaded.model, settings.lora, special_ids=special, seed=seed)
        if settings.method != "qlora":  # bitsandbytes put it there
            model.to(self._device)
        if self._special_ids is None:
            models.check_plain_head(model)
            self._special_ids = []
        if settings.checkpointing:
            models.checkpoint_layers(model, frozen=settings.method != "full")
        sharded = self._peers is not None and settings.method == "full"
        compiled = settings.compile and self._device.type == "cuda" and losses.has_triton()
        if sharded or (compiled and models.has_varlen(next(model.parameters()))):
            models.use_packing(model)  # without that kernel every mix of lengths would be compiled anew
        if compiled:
            models.compile_layers(model)
        if settings.method != "full" and (compiled or settings.checkpointing):
            models.causal(model).enable_input_require_grads()  # or the first layer would be compiled for itself
        if sharded:
            shard(model, loss_of)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        base = self._settings.student if self._settings.method != "full" else None
        values = None
        if is_sharded(model):
            held = model.state_dict(keep_vars=True)
            once = {id(tensor): name for name, tensor in reversed(held.items())}  # a tied head is its embedding
            values = _values({name: held[name] for name in once.values()}, self._peers)
        if _leads(self._peers):
            models.save(folder, model, self.tokenizer, base=base, values=values)
        else:
            folder.mkdir(parents=True)

    def save_before(self) -> None:
        """A student from scratch is stored as it begins; any other one can be had again from where it came."""
        if self._settings.student.architecture is not None:
            self.save(self.make(self._settings.seed), self._ctx.out / BEFORE_FOLDER)

    def before(self) -> dict[str, Any]:
        if self._settings.student.architecture is not None:
            return {"folder": BEFORE_FOLDER}
        self.tokenizer.save_pretrained(self._ctx.out / TOKENIZER_FOLDER)
        return {"source": asdict(self._settings.student)}


# --- search and arms -------------------------------------------------------------------------------------------------


class _Work:
    """All runs of the stage in their fixed order, so that the count of steps before each is known."""

    def __init__(
        self, ctx: Context, settings: TrainSettings, student: _Student, examples: Examples, held_out: Examples | None,
        steps: int, kinds: list[str], point: ResumePoint | None, peers: Peers | None,
    ) -> None:  # fmt: skip
        self._ctx, self._settings, self._student, self._peers = ctx, settings, student, peers
        self._examples, self._held_out, self._kinds, self._point = examples, held_out, kinds, point
        searched = len(settings.learning_rates) > 1
        search_steps = (settings.search_steps or max(1, steps // 4)) if searched else 0
        trials = [(kind, lr) for kind in kinds for lr in settings.learning_rates] if searched else []
        self._search = [(kind, lr, search_steps, search_steps * n) for n, (kind, lr) in enumerate(trials)]
        self._arms: list[tuple[str, int, int, int]] = []  # kind, seed, steps, steps of the stage before it
        self._total = self.search_steps = search_steps * len(trials)
        for seed in range(max(1, settings.compare_seeds) if settings.compare_hard else 1):
            for kind in [*kinds, "hard_2x"] if settings.compare_hard else kinds:
                length = steps * (2 if kind == "hard_2x" else 1)
                self._arms.append((kind, seed, length, self._total))
                self._total += length
        self._shared = _Shared(ctx, self._total)
        self._unproved = ctx.task.gate

    def search(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The learning rate of each kind of labels, and every trial's score (lower is better)."""
        rates = self._settings.learning_rates
        if len(rates) < 2:
            only = rates[0] if rates else self._settings.learning_rate
            return dict.fromkeys(("soft", "hard", "hard_2x"), only), []
        trials = self._trials()
        best = {
            kind: min((t for t in trials if t["arm"] == kind), key=lambda t: t["score"])["lr"] for kind in self._kinds
        }
        return {**best, "hard_2x": best.get("hard", 0.0)}, trials

    def _trials(self) -> list[dict[str, Any]]:
        if self._ctx.kept(SEARCH_FILE):
            for _, _, steps, first in self._search:
                self._shared.skip(first, steps)
            trials: list[dict[str, Any]] = json.loads((self._ctx.out / SEARCH_FILE).read_text())
            return trials
        learn, choose = _split(self._examples)
        scores: dict[str, float] = dict(self._point.notes) if self._point else {}

        def one(kind: str, lr: float, steps: int, first: int) -> dict[str, Any]:
            name = f"search-{kind}-{lr:g}"
            if name in scores:
                self._shared.skip(first, steps)
            else:
                how = self._fit(kind, self._settings.seed, steps, lr)
                model = self._make(self._settings.seed)
                fit(
                    self._shared.of(first), model, learn, how, self._arm(name, first), self._point, scores, None,
                    self._peers, prove=self._prove(),
                )  # fmt: skip
                score = validation_loss(model, choose, how)
                scores[name] = score if self._peers is None else self._peers.first_says(score)
            return {"arm": kind, "lr": lr, "score": scores[name]}

        trials = self._all(one, self._search)
        (self._ctx.out / SEARCH_FILE).write_text(json.dumps(trials))
        self._ctx.keep(SEARCH_FILE)
        return trials

    def arms(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """One row an arm, soft before hard before twice the steps, seed by seed."""
        return self._all(lambda kind, *rest: self._one(rates[kind], kind, *rest), self._arms)

    def _one(self, lr: float, kind: str, seed: int, steps: int, first: int) -> dict[str, Any]:
        name = f"{kind}-{seed}"
        path = f"arms/{name}" if self._settings.compare_hard else models.MODEL_FOLDER
        folder, ctx = self._ctx.out / path, self._shared.of(first)
        if not ctx.kept(path):
            shutil.rmtree(folder, ignore_errors=True)
            model = self._make(self._settings.seed + seed)
            how = self._fit(kind, self._settings.seed + seed, steps, lr)
            done = fit(
                ctx, model, self._examples, how, self._arm(name, first), self._point, None, self._held_out, self._peers,
                prove=self._prove(),
            )  # fmt: skip
            self._student.save(model, folder)
            row = {
                "name": name, "kind": kind, "seed": seed, "learning_rate": lr, "steps": steps, "path": path,
                **asdict(done),
            }  # fmt: skip
            (folder / "arm.json").write_text(json.dumps(row))
            ctx.keep(path)
        self._shared.skip(first, steps)
        found: dict[str, Any] = json.loads((folder / "arm.json").read_text())
        return found

    def _all(self, one: Callable[..., dict[str, Any]], planned: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
        """`one` of everything planned, in order; several at a time where nothing they share can differ by it.

        torch lets go of Python's lock inside its operations, so threads use the cores that one small model cannot.
        Each arm alone decides its result: its weights and batch order follow from its seed, and it draws no dropout.
        """
        at_once = self._settings.arms_at_once
        if at_once < 2 or self._settings.student.architecture is None or self._peers is not None:
            return [one(*args) for args in planned]

        def work(*args: Any) -> dict[str, Any]:
            models.set_threads(self._settings.threads)  # torch keeps the number for each thread
            return one(*args)

        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(work, *args) for args in planned]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _make(self, seed: int) -> nn.Module:
        with _GENERATOR:
            return self._student.make(seed)

    def _prove(self) -> bool:
        """Whether memory is to be proved: on a rented machine, once, before the first step of all."""
        with self._shared.lock:
            first, self._unproved = self._unproved, False
        if first:
            self._ctx.progress("prove", declared=True)
        return first

    def _arm(self, name: str, first: int) -> Arm:
        plain = name in ("soft-0", "hard-0" if self._kinds == ["hard"] else "")
        return Arm(name, first, self._total, "" if plain else f"{name}__")

    def _fit(self, kind: str, seed: int, steps: int, lr: float) -> Fit:
        s = self._settings
        return Fit(
            steps=steps, batch_size=s.batch_size, micro_batch=s.micro_batch, learning_rate=lr,
            alpha=s.alpha if kind == "soft" else 0.0, max_seq_len=s.max_seq_len, temperature=s.temperature,
            use_mass_at_t=s.temperature == self._student.label_temperature, warmup_share=s.warmup_share,
            weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, precision=s.precision, optimizer=s.optimizer,
            checkpoint_every_s=s.checkpoint_every_s, checkpoint_every_steps=s.checkpoint_every_steps,
            early_stop_patience=s.early_stop_patience, eval_every_steps=s.eval_every_steps, seed=seed,
        )  # fmt: skip


class _Shared:
    """The stage's context for arms that may train side by side: one call at a time, their progress added up."""

    def __init__(self, ctx: Context, total: int) -> None:
        self.ctx, self.total, self.lock = ctx, total, threading.RLock()
        self._done: dict[int, float] = {}  # steps done, by the count of steps before the arm

    def of(self, first: int) -> Context:
        return _ArmContext(self, first)

    def skip(self, first: int, steps: int) -> None:
        """The arm is complete."""
        self._done[first] = steps

    def progress(self, first: int, phase: str, done: float, unit: str, numbers: dict[str, float]) -> None:
        with self.lock:
            self._done[first] = done - first
            self.ctx.progress(phase, sum(self._done.values()), self.total, unit, declared=False, **numbers)


class _ArmContext:
    """One arm's view of the context."""

    def __init__(self, shared: _Shared, first: int) -> None:
        self._shared, self._first = shared, first
        self.task, self.work, self.out = shared.ctx.task, shared.ctx.work, shared.ctx.out

    def progress(
        self, phase: str, done: float = 0, total: float | None = None, unit: str = "steps", *,
        declared: bool = False, **numbers: float,
    ) -> None:  # fmt: skip
        self._shared.total = min(self._shared.total, int(total or self._shared.total))
        self._shared.progress(self._first, phase, done, unit, numbers)

    @property
    def stopping(self) -> bool:
        return self._shared.ctx.stopping

    @property
    def limit(self) -> float | None:
        return self._shared.ctx.limit

    def metric(self, step: int, **values: float) -> None:
        with self._shared.lock:
            self._shared.ctx.metric(step, **values)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        with self._shared.lock:
            self._shared.ctx.checkpoint(step, write)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        return self._shared.ctx.latest_checkpoint()

    def keep(self, name: str) -> None:
        with self._shared.lock:
            self._shared.ctx.keep(name)

    def kept(self, name: str) -> bool:
        with self._shared.lock:
            return self._shared.ctx.kept(name)

    def input(self, stage: str) -> Path:
        return self._shared.ctx.input(stage)

    def told(self, stage: str) -> tuple[Task, dict[str, Any]] | None:
        return self._shared.ctx.told(stage)

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        return self._shared.ctx.data(source)


def _split(examples: Examples) -> tuple[Examples, Examples]:
    """Samples to learn from and samples that choose (learning rate, end); all samples of a prompt on one side.

    By key: keys are hashes, so the first ones in their order are a random choice, and the same one for every arm.
    """
    keys = sorted(set(examples.keys))
    if len(keys) < 2:
        raise TaskError(
            "one labelled prompt is too few to hold some out", hint="give one learning_rate and no early_stop_patience"
        )
    chosen = set(keys[: max(1, round(VALIDATION_SHARE * len(keys)))])
    sides = [[i for i, key in enumerate(examples.keys) if (key in chosen) is side] for side in (False, True)]
    return examples.take(sides[0]), examples.take(sides[1])


@torch.no_grad()
def validation_loss(model: nn.Module, examples: Examples, how: Fit) -> float:
    """The run's own loss a token on samples it did not learn from."""
    model.eval()
    everything = torch.arange(len(examples))
    return sum(
        float(_loss(model, batch, how, examples.tokens).total)
        for batch in micro_batches(model, examples, everything, how)
    )
