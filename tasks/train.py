"""How does a student learn from labels? One training loop, resumable to the bit, and the arms compared by it."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks import models
from tasks.contract import DataSource, ModelSource, TaskError, TrainSettings
from tasks.labels import TOKENIZER_FOLDER, Labels, read_labels
from tasks.losses import Loss, distillation_loss_parts
from tasks.stage import Context, Stopped

STUDENTS_FILE = "students.json"  # what evaluate and export read
BEFORE_FOLDER = "before"
SEARCH_FILE = "search.json"
VALIDATION_SHARE = 0.1  # of the labelled prompts; they pick the learning rate and are trained on afterwards
FINAL_STEPS = 20  # final_loss is the mean over the last steps, since single batches differ
METRIC_ROWS = 200  # of an arm
# torch has one generator for all threads: whoever seeds it and draws initial weights must not be interrupted.
_GENERATOR = threading.Lock()


def run(ctx: Context, settings: TrainSettings) -> dict[str, Any]:
    """The student under `model/`; with compare, every arm under `arms/NAME` and the first distilled one as `model/`.

    All arms of a seed share initial weights, data and batch order. Each of the two kinds of labels gets the same
    search over `learning_rates`: short runs without a tenth of the labelled prompts, which then choose by the arm's
    own loss. Held-out problems choose nothing.
    """
    _check(settings)
    models.quiet()
    models.set_threads(settings.threads)
    ctx.progress("prepare", declared=True)
    folder = ctx.input(settings.labels)
    labels = read_labels(folder)
    student = _Student(ctx, settings, folder, labels)
    examples, too_long = _examples(labels, settings)
    _check_labels(labels, settings, examples)
    student.save_before()

    steps = settings.steps or max(1, math.ceil((settings.epochs or 1.0) * len(examples) / settings.batch_size))
    kinds = ["soft", "hard"] if settings.compare_hard else ["soft" if settings.alpha > 0.0 else "hard"]
    point = resume_point(ctx)
    work = _Work(ctx, settings, student, examples, steps, kinds, point)
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
        "tokens": sum(arm["tokens"] for arm in arms),
        "tokens_per_s": sum(speeds) / len(speeds),
        "student_before": before,
    }


def _check(settings: TrainSettings) -> None:
    if settings.method not in ("lora", "full"):
        raise TaskError(f"method: {settings.method} is unknown", hint="use lora or full")
    if settings.optimizer != "adamw":
        raise TaskError(f"optimizer: {settings.optimizer} is unknown", hint="use adamw")
    if settings.method == "lora" and settings.student.architecture is not None:
        raise TaskError("LoRA on random weights learns nothing", hint="use method: full for a student from scratch")
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
    """Right-padded sequences and, for each place that predicts a token of a completion, its labels."""

    ids: Tensor  # [B, L]
    places: Tensor  # [N] into B * L
    labels: Tensor  # [N]
    soft: tuple[Tensor, ...]  # topk_ids [N, k], topk_logprobs [N, k], log_tail_mass [N], log_mass_at_t [N]; or ()


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

    def batch(self, picked: Tensor, *, soft: bool) -> Batch:
        """The samples `picked` [B]."""
        start, length = self.offsets[picked], self.lengths[picked]
        column = torch.arange(int(length.max()))
        at = start[:, None] + column  # [B, L]
        there = column < length[:, None]
        ids = torch.where(there, self.ids[at.clamp(max=len(self.ids) - 1)], 0)
        first = self.prompts[picked][:, None] - 1  # the prompt's last token predicts the completion's first
        predicts = (column >= first) & (column < length[:, None] - 1)
        labels = self.ids[at[predicts] + 1]
        found: tuple[Tensor, ...] = ()
        if soft and self.soft:
            row = (self.rows[picked][:, None] + column - first)[predicts]
            found = self.soft(row)
        return Batch(ids, predicts.flatten().nonzero()[:, 0], labels, found)


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
    temperature: float = 1.0
    use_mass_at_t: bool = False  # the labels' log_mass_at_t belongs to this temperature
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.98  # second moments that follow within 50 steps: short runs, and little difference in long ones
    max_grad_norm: float = 1.0
    precision: str = "auto"
    checkpoint_every_s: float = 300.0
    checkpoint_every_steps: int | None = None
    seed: int = 0

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


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint of an arm in the middle, and what the stage had found out by then."""

    arm: str
    step: int
    recent: list[float]
    tokens: int
    notes: dict[str, float]
    folder: Path


def resume_point(ctx: Context) -> ResumePoint | None:
    """The newest committed checkpoint of this stage."""
    latest = ctx.latest_checkpoint()
    if latest is None:
        return None
    state = json.loads((latest[1] / "state.json").read_text())
    return ResumePoint(**state, folder=latest[1])


def fit(
    ctx: Context, model: nn.Module, examples: Examples, how: Fit, arm: Arm, point: ResumePoint | None,
    notes: dict[str, float] | None = None,
) -> Fitted:  # fmt: skip
    """Trains `model` in place, from `point` when that belongs to this arm. Raises Stopped after a last checkpoint."""
    device = next(model.parameters()).device
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=how.learning_rate, betas=(0.9, how.beta2), weight_decay=how.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip
    order = Order(len(examples), how.batch_size, how.seed)
    start, tokens, recent = 0, 0, []
    with _GENERATOR:
        torch.manual_seed(how.seed)
        if point is not None and point.arm == arm.name:
            start, tokens, recent = point.step, point.tokens, list(point.recent)
            _restore(point.folder, weights, optimizer, device)

    def save(step: int) -> None:
        state = {"arm": arm.name, "step": step, "recent": recent, "tokens": tokens, "notes": notes or {}}
        ctx.checkpoint(arm.first + step, lambda folder: _write(folder, weights, optimizer, device, state))

    model.train()
    began, before, saved_at = time.monotonic(), tokens, time.monotonic()
    every = max(1, how.steps // METRIC_ROWS)
    for step in range(start, how.steps):
        if ctx.stopping:
            save(step)
            raise Stopped
        rate = how.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, count = accumulate(model, examples, order.at(step), how)
        if how.max_grad_norm > 0.0:
            nn.utils.clip_grad_norm_(weights.values(), how.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        total = float(loss.total)
        if not math.isfinite(total):
            raise TaskError(f"{arm.name}: the loss is {total} at step {step}", hint="lower the learning rate")
        tokens += count
        recent = [*recent[1 - FINAL_STEPS :], total]
        speed = (tokens - before) / (time.monotonic() - began)
        if step % every == 0 or step == how.steps - 1:
            _metric(ctx, arm, step, loss, rate, speed)
        ctx.progress("train", arm.first + step + 1, arm.total, "steps", loss=total, tokens_per_s=speed)
        due = how.checkpoint_every_steps and (step + 1) % how.checkpoint_every_steps == 0
        if step + 1 < how.steps and (due or time.monotonic() - saved_at >= how.checkpoint_every_s):
            save(step + 1)
            saved_at = time.monotonic()
    model.eval()
    return Fitted(sum(recent) / max(1, len(recent)), tokens, (tokens - before) / (time.monotonic() - began))


def accumulate(model: nn.Module, examples: Examples, picked: Tensor, how: Fit) -> tuple[Loss, int]:
    """Gradients of one optimizer step over the samples `picked`, its loss, and its supervised tokens.

    Every micro-batch is divided by the tokens of the whole step, so the cut into micro-batches changes nothing.
    """
    lengths = examples.lengths[picked]
    count = int((lengths - examples.prompts[picked]).sum())
    if len(picked) > how.micro_batch:
        picked = picked[lengths.argsort(stable=True)]  # alike lengths together: little padding
    sums = [torch.zeros(())] * 3
    for part in picked.split(how.micro_batch):
        loss = loss_of(model, examples.batch(part, soft=how.alpha > 0.0), how, count)
        loss.total.backward()
        sums = [a + b.detach().cpu() for a, b in zip(sums, loss, strict=True)]
    return Loss(*sums), count


def loss_of(model: nn.Module, batch: Batch, how: Fit, token_count: int) -> Loss:
    """The loss of a batch as the model stands, divided by `token_count`."""
    device = next(model.parameters()).device
    dtype = models.working_dtype(device, how.precision)
    low = dtype != torch.float32
    with torch.autocast(device.type, dtype=dtype) if low else nullcontext():
        hidden = models.hidden_states(model, batch.ids.to(device))
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


def _metric(ctx: Context, arm: Arm, step: int, loss: Loss, rate: float, speed: float) -> None:
    values = {
        "loss__total": float(loss.total), "loss__kl": float(loss.kl), "loss__ce": float(loss.ce),
        "learning_rate": rate, "tokens_per_s": speed,
    }  # fmt: skip
    ctx.metric(step, **{arm.prefix + name: value for name, value in values.items()})


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _write(
    folder: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device,
    state: dict[str, Any],
) -> None:  # fmt: skip
    """What a resumed run needs to go on to the bit: trained weights, moments, RNG, step. No pickle."""
    save_file({name: p.detach().contiguous() for name, p in weights.items()}, folder / "weights.safetensors")
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value.contiguous() for i, part in moments.items() for name, value in part.items()}
    tensors["rng"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


def _restore(
    folder: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    saved = load_file(folder / "weights.safetensors")
    if set(saved) != set(weights):
        raise TaskError("the checkpoint belongs to another model", hint="start a new run")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(saved[name])
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    if device.type == "cuda" and "rng_cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("rng_cuda"), device)
    tensors.pop("rng_cuda", None)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, part = name.partition(".")
        moments.setdefault(int(index), {})[part] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


# --- the student -----------------------------------------------------------------------------------------------------


class _Student:
    """Makes the student as it is before training, again and again, and saves it after."""

    def __init__(self, ctx: Context, settings: TrainSettings, folder: Path, labels: Labels) -> None:
        self._ctx, self._settings = ctx, settings
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
            loaded = models.load(
                self._ctx, settings.student, dtype=dtype if settings.method == "lora" else torch.float32
            )
            rows = loaded.model.get_output_embeddings().weight.shape[0]
            special = models.check_compatible(
                self.tokenizer, loaded.tokenizer, teacher_hash=self._teacher_hash, head_rows=rows
            )
            model = loaded.model
            for config in (loaded.model.config, loaded.model.generation_config):
                config.eos_token_id = self.tokenizer.eos_token_id
                config.pad_token_id = self.tokenizer.pad_token_id
            if settings.method == "lora":
                model = models.with_lora(loaded.model, settings.lora, special_ids=special, seed=seed)
        model.to(self._device)
        if self._special_ids is None:
            models.check_plain_head(model)
            self._special_ids = []
        if settings.checkpointing:
            inner = models.causal(model)
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if settings.method == "lora":
                inner.enable_input_require_grads()
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        base = self._settings.student if self._settings.method == "lora" else None
        models.save(folder, model, self.tokenizer, base=base)

    def save_before(self) -> None:
        """A student from scratch is stored as it begins; any other one can be had again from where it came."""
        if self._settings.student.architecture is not None:
            models.save(self._ctx.out / BEFORE_FOLDER, self.make(self._settings.seed), self.tokenizer)

    def before(self) -> dict[str, Any]:
        if self._settings.student.architecture is not None:
            return {"folder": BEFORE_FOLDER}
        self.tokenizer.save_pretrained(self._ctx.out / TOKENIZER_FOLDER)
        return {"source": asdict(self._settings.student)}


# --- search and arms -------------------------------------------------------------------------------------------------


class _Work:
    """All runs of the stage in their fixed order, so that the count of steps before each is known."""

    def __init__(
        self, ctx: Context, settings: TrainSettings, student: _Student, examples: Examples, steps: int,
        kinds: list[str], point: ResumePoint | None,
    ) -> None:  # fmt: skip
        self._ctx, self._settings, self._student = ctx, settings, student
        self._examples, self._kinds, self._point = examples, kinds, point
        searched = len(settings.learning_rates) > 1
        search_steps = (settings.search_steps or max(1, steps // 4)) if searched else 0
        trials = [(kind, lr) for kind in kinds for lr in settings.learning_rates] if searched else []
        self._search = [(kind, lr, search_steps, search_steps * n) for n, (kind, lr) in enumerate(trials)]
        self._arms: list[tuple[str, int, int, int]] = []  # kind, seed, steps, steps of the stage before it
        self._total = search_steps * len(trials)
        for seed in range(max(1, settings.compare_seeds) if settings.compare_hard else 1):
            for kind in [*kinds, "hard_2x"] if settings.compare_hard else kinds:
                length = steps * (2 if kind == "hard_2x" else 1)
                self._arms.append((kind, seed, length, self._total))
                self._total += length
        self._shared = _Shared(ctx, self._total)

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
                fit(self._shared.of(first), model, learn, how, self._arm(name, first), self._point, scores)
                scores[name] = validation_loss(model, choose, how)
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
            done = fit(ctx, model, self._examples, how, self._arm(name, first), self._point)
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
        if at_once < 2 or self._settings.student.architecture is None:
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

    def _arm(self, name: str, first: int) -> Arm:
        plain = name in ("soft-0", "hard-0" if self._kinds == ["hard"] else "")
        return Arm(name, first, self._total, "" if plain else f"{name}__")

    def _fit(self, kind: str, seed: int, steps: int, lr: float) -> Fit:
        s = self._settings
        return Fit(
            steps=steps, batch_size=s.batch_size, micro_batch=s.micro_batch, learning_rate=lr,
            alpha=s.alpha if kind == "soft" else 0.0, temperature=s.temperature,
            use_mass_at_t=s.temperature == self._student.label_temperature, warmup_share=s.warmup_share,
            weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, precision=s.precision,
            checkpoint_every_s=s.checkpoint_every_s, checkpoint_every_steps=s.checkpoint_every_steps, seed=seed,
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
        self._shared.progress(self._first, phase, done, unit, numbers)

    @property
    def stopping(self) -> bool:
        return self._shared.ctx.stopping

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

    def data(self, source: DataSource) -> list[dict[str, Any]]:
        return self._shared.ctx.data(source)


def _split(examples: Examples) -> tuple[Examples, Examples]:
    """Samples to learn from and samples that choose the learning rate; all samples of a prompt on one side.

    By key: keys are hashes, so the first ones in their order are a random choice, and the same one for every arm.
    """
    keys = sorted(set(examples.keys))
    if len(keys) < 2:
        raise TaskError("one labelled prompt is too few to search a learning rate", hint="give one learning_rate")
    chosen = set(keys[: max(1, round(VALIDATION_SHARE * len(keys)))])
    sides = [[i for i, key in enumerate(examples.keys) if (key in chosen) is side] for side in (False, True)]
    return examples.take(sides[0]), examples.take(sides[1])


@torch.no_grad()
def validation_loss(model: nn.Module, examples: Examples, how: Fit) -> float:
    """The run's own loss a token on samples it did not learn from."""
    model.eval()
    order = examples.lengths.argsort(stable=True)
    return sum(
        float(loss_of(model, examples.batch(part, soft=how.alpha > 0.0), how, examples.tokens).total)
        for part in order.split(max(how.micro_batch, 1))
    )
