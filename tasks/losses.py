"""How far is the student from the teacher's labels? alpha * T^2 * KL + (1 - alpha) * CE from sparse top-k labels.

The teacher is known on k ids a token and by the mass outside of them, so the KL is taken over k + 1 buckets: the ids,
and everything else. It is zero exactly when the student agrees on all of them, and never above the full KL.
Value and gradient are computed together in one pass over chunks of rows; logits of all rows are never held.
"""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in fp32
FUSED_ELEMENTS = 1 << 28  # the same on CUDA, 1 GiB: the head's gradient is read and written once a chunk
FROZEN_ELEMENTS = 7 << 24  # and with a frozen head, 448 MiB: with checkpointing this is a training step's peak
FUSED_ROWS = 128  # a chunk is a multiple of so many rows, as matrix products like it
AT_1, EXACT_AT_T, CHAIN = 0, 1, 2


class Loss(NamedTuple):
    """All three divided by the token count; total = alpha * kl + (1 - alpha) * ce, kl with its T^2. Only total has a
    gradient; a part whose weight is 0 is not computed and reads 0."""

    total: Tensor
    kl: Tensor
    ce: Tensor


def distillation_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    alpha: float,
    temperature: float,
    token_count: float | Tensor,
    log_tail_mass: Tensor | None = None,
    log_mass_at_t: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar; see `distillation_loss_parts` for its parts and for what the arguments mean."""
    return distillation_loss_parts(
        hidden, head_weight, labels, topk_ids, topk_logprobs, alpha=alpha, temperature=temperature,
        token_count=token_count, log_tail_mass=log_tail_mass, log_mass_at_t=log_mass_at_t,
    ).total  # fmt: skip


def distillation_loss_parts(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    alpha: float,
    temperature: float,
    token_count: float | Tensor,
    log_tail_mass: Tensor | None = None,
    log_mass_at_t: Tensor | None = None,
) -> Loss:
    """Total, KL (times T^2) and CE, summed over tokens and divided by `token_count`.

    hidden [N, H]; head_weight [V, H]; labels [N]: what hidden[i] predicts, -100 = left out of both terms.
    topk_ids [N, k], topk_logprobs [N, k]: the teacher at T = 1; a row may hold fewer than k (id -1, -inf).
    log_tail_mass [N]: log of the teacher's mass outside the ids at T = 1; without it, one minus the sum, clamped.
    log_mass_at_t [N]: log of the teacher's mass of the ids at T. With it the KL at T is exact over k + 1 buckets;
    without it (T != 1) the mass at T is unknown and the chain rule is used: the shape within the ids at T, and the
    mass of the ids at T = 1.
    token_count: supervised tokens of the whole optimizer step, not of this call.
    Gradients reach hidden and, unless it is frozen, head_weight.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
    if temperature <= 0.0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if not torch.is_grad_enabled():  # autograd's function would go by requires_grad alone
        hidden, head_weight = hidden.detach(), head_weight.detach()
    total, kl, ce = _Fused.apply(
        hidden, head_weight, labels, topk_ids, topk_logprobs, log_tail_mass, log_mass_at_t,
        float(alpha), float(temperature), token_count,
    )  # fmt: skip
    return Loss(total, kl, ce)


class Targets(NamedTuple):
    """The teacher as the sums need it, [N, k] and [N], in fp32 or fp64.

    AT_1: logp are its log-probabilities at T = 1. EXACT_AT_T: at T. CHAIN: at T within the ids, which hold `log_mass`
    of it at T = 1. Everywhere -inf where a row holds no id. log_out: log of its mass outside the ids.
    """

    mode: int
    ids: Tensor
    logp: Tensor
    log_out: Tensor
    log_mass: Tensor

    def rows(self, part: slice) -> Targets:
        return Targets(self.mode, *(tensor[part] for tensor in self[1:]))


def _targets(ids: Tensor, logprobs: Tensor, tail: Tensor | None, mass_t: Tensor | None, t: float, real: Any) -> Targets:
    valid = (ids >= 0) & (logprobs > float("-inf"))
    ids = torch.where(valid, ids, -1).long()
    logp = torch.where(valid, logprobs.to(real), float("-inf"))
    log_mass = torch.logsumexp(logp, 1) if ids.shape[1] else logp.new_full((len(ids),), float("-inf"))
    # Without a stored tail: one minus the sum, -inf where the ids hold everything.
    log_out = torch.log1p(-log_mass.exp().clamp(max=1.0)) if tail is None else tail.to(real)
    if t == 1.0:
        return Targets(AT_1, ids, logp, log_out, log_mass)
    inside = torch.where(valid, _log_softmax(logp / t, valid), float("-inf"))
    if mass_t is None:
        return Targets(CHAIN, ids, inside, log_out, log_mass)
    log_mass = mass_t.to(real).clamp(max=0.0)
    return Targets(EXACT_AT_T, ids, inside + log_mass[:, None], torch.log(-torch.expm1(log_mass)), log_mass)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, head, labels, ids, logprobs, tail, mass_t, alpha, t, count):  # type: ignore[no-untyped-def]
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        want_hidden, want_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wanted = want_hidden or want_head
        fused = fuses(hidden)
        n, v = len(hidden), len(head)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = _grad_head(head, n, real, fused) if want_head else None
        sums = torch.zeros(2, dtype=real, device=hidden.device)
        one = torch.ones((), dtype=real, device=hidden.device)  # filled there: sending would wait for it
        scale = one / count
        elements = CHUNK_ELEMENTS if not fused else FUSED_ELEMENTS if want_head else FROZEN_ELEMENTS
        rows = _rows_at_once(n, elements // v, fused)
        with torch.autocast(hidden.device.type, enabled=False):
            targets = None if fused else _targets(ids, logprobs, tail, mass_t, t, real)
            low_head = head.to(hidden.dtype)
            buffer = grad = None
            if fused and n:
                from tasks import kernels

                buffer = kernels.Buffer.of(min(rows, n), v, hidden.device)
            for at in range(0, n, rows):
                part = slice(at, at + rows)
                h = hidden[part]
                if buffer is not None:
                    z = torch.mm(h, low_head.T, out_dtype=real, out=buffer.of_rows(len(h), v))
                    targets = targets or _targets(ids, logprobs, tail, mass_t, t, real)  # while the GPU multiplies
                    grad = buffer.gradients(len(h), v, h.dtype)
                    found = kernels.loss_rows(
                        z, grad, labels[part], *targets.rows(part)[1:], scale, alpha=alpha, t=t, mode=targets.mode,
                        want_grad=wanted,
                    )  # fmt: skip
                    sums += torch.stack(found).sum(1)
                else:
                    assert targets is not None
                    kl, ce, full = _rows(_product(h, head, real), labels[part], targets.rows(part), alpha, t, wanted)
                    sums += torch.stack((kl, ce))
                    grad = full if full is None else full.mul_(scale).to(h.dtype)
                if grad is not None and grad_hidden is not None:
                    torch.mm(grad, low_head, out=grad_hidden[part])
                if grad is not None and grad_head is not None:
                    _add_product(grad_head, grad, h, first=at == 0)
            del buffer, grad  # before the head's gradient is cast: their memory serves for that
        sums *= scale
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        total = alpha * sums[0] + (1.0 - alpha) * sums[1]
        kl, ce = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total, _kl, _ce):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = grad_head * grad_total.to(grad_head.dtype)
        return (grad_hidden, grad_head, *[None] * 8)


def fuses(hidden: Tensor) -> bool:
    """Whether tasks.kernels serves these hidden states."""
    return hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16) and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton is here, and the C compiler and the headers of Python without which it compiles nothing."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return find_spec("triton") is not None and any(map(shutil.which, compilers)) and headers.exists()


def _rows_at_once(n: int, most: int, fused: bool) -> int:
    """Rows of a chunk, at most `most`; chunks of about equal size on CUDA."""
    if not fused:
        return max(1, most)
    most = max(FUSED_ROWS, most // FUSED_ROWS * FUSED_ROWS)
    return math.ceil(math.ceil(n / math.ceil(max(1, n) / most)) / FUSED_ROWS) * FUSED_ROWS or FUSED_ROWS


def _grad_head(head: Tensor, n: int, real: torch.dtype, fused: bool) -> Tensor:
    """Where the head's gradient is added up; the first fused product fills it."""
    made = torch.empty_like if fused and n else torch.zeros_like
    return made(head, dtype=real)


def _add_product(total: Tensor, grad: Tensor, h: Tensor, *, first: bool) -> None:
    """total += grad.T @ h, accumulated in the dtype of `total`."""
    if not fuses(h):
        total += _product(grad.T, h.T, total.dtype)
    elif first:
        torch.mm(grad.T, h, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, grad.T, h, out_dtype=total.dtype, out=total)


def _product(a: Tensor, b: Tensor, real: torch.dtype) -> Tensor:
    """a @ b.T accumulated and returned in `real`, whatever the dtype of the factors."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.to(a.dtype).T, out_dtype=real)
    return a.to(real) @ b.to(real).T


def _rows(
    z: Tensor, labels: Tensor, targets: Targets, alpha: float, t: float, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over these rows of T^2 * KL and of CE, and the gradient of the weighted sum for the logits z [n, V]."""
    counted = labels != IGNORED
    lse = torch.logsumexp(z, dim=1, keepdim=True)
    q = torch.exp(z - lse) if want_grad or alpha > 0.0 else z.new_zeros(0)  # validation of hard labels needs none
    kl = ce = z.new_zeros(())
    grad: Tensor | None = None
    if alpha > 0.0:
        kl_rows, grad = _kl(z, lse, q, targets, t, want_grad)
        kl = torch.where(counted, kl_rows, 0.0).sum()
    if alpha < 1.0:
        target = labels.clamp(min=0)[:, None]
        ce = torch.where(counted, (lse - z.gather(1, target))[:, 0], 0.0).sum()
        if want_grad:
            both = q * (1.0 - alpha) if grad is None else grad.mul_(alpha).add_(q, alpha=1.0 - alpha)
            grad = both.scatter_add_(1, target, z.new_full((len(z), 1), alpha - 1.0))
    return kl, ce, None if grad is None else grad.masked_fill_(~counted[:, None], 0.0)


def _kl(
    z: Tensor, lse: Tensor, q: Tensor, targets: Targets, t: float, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """T^2 * KL of each row [n] and its gradient for z [n, V]."""
    mode, ids, logp, log_out, log_mass = targets
    log_out, log_mass = log_out[:, None], log_mass[:, None]
    real = z.dtype
    valid = ids >= 0
    # An empty place repeats the row's first id, so that writing there changes nothing; a row without any writes to
    # id 0 what already stands there.
    at = torch.where(valid, ids, ids[:, :1]).clamp(min=0)
    full = valid.any(1, keepdim=True)
    p = logp.exp()
    mass = p.sum(1, keepdim=True)
    value, factor = (t * t, t) if mode == EXACT_AT_T else (1.0, 1.0)  # d(z / T) / dz = 1 / T
    if mode == EXACT_AT_T:
        z, lse = z / t, torch.logsumexp(z / t, dim=1, keepdim=True)
        q = torch.exp(z - lse)
    z_in = z.gather(1, at)
    if mode == CHAIN:  # the shape within the ids at T (times T^2), the mass of the ids at T = 1
        log_student = _log_softmax(z_in / t, valid)
        shape = torch.where(valid, p * (logp - log_student), 0.0).sum(1, keepdim=True)
        log_q_mass = torch.logsumexp(torch.where(valid, z_in, float("-inf")), 1, keepdim=True) - lse
        mass = log_mass.exp()
        kl = mass * t * t * shape + torch.where(mass > 0.0, mass * (log_mass - log_q_mass), 0.0)
        inside_student = torch.where(valid, _log_softmax(z_in, valid).exp(), 0.0)
        pull = torch.where(valid, log_student.exp(), 0.0) - p
        p = mass * inside_student - mass * t * pull  # what the gradient subtracts on the ids
    else:
        kl = torch.where(valid, p * (logp - (z_in - lse)), 0.0).sum(1, keepdim=True)

    out = log_out.exp()
    q_in = q.gather(1, at)
    q_tail = q.scatter(1, at, torch.where(full, 0.0, q_in))
    q_out = q_tail.sum(1, keepdim=True).clamp(min=torch.finfo(real).tiny)
    has_tail = (out > 0.0) & (valid.sum(1, keepdim=True) < z.shape[1])
    kl = kl + torch.where(has_tail, out * (log_out - q_out.log()), 0.0)
    if not want_grad:
        return value * kl[:, 0], None
    out = torch.where(has_tail, out, 0.0)
    whole = mass + out  # 1 up to rounding
    slope = whole - out / q_out
    on_ids = torch.where(valid, whole * q_in - p, slope * q_in)
    on_ids = torch.where(valid, on_ids, on_ids[:, :1])
    grad = q_tail.mul_(slope).scatter_(1, at, on_ids)
    return value * kl[:, 0], grad if factor == 1.0 else grad.mul_(factor)


def _log_softmax(x: Tensor, valid: Tensor) -> Tensor:
    """log softmax over the valid places [n, k]; finite (and meaningless) elsewhere, also in rows with none."""
    kept = torch.where(valid, x, float("-inf"))
    norm = torch.logsumexp(kept, 1, keepdim=True)
    return torch.where(valid, x - torch.where(norm > float("-inf"), norm, 0.0), 0.0)
