"""How far is the student from the teacher's labels? alpha * T^2 * KL + (1 - alpha) * CE from sparse top-k labels.

The teacher is known on k ids a token and by the mass outside of them, so the KL is taken over k + 1 buckets: the ids,
and everything else. It is zero exactly when the student agrees on all of them, and never above the full KL.
Value and gradient are computed together in one pass over chunks of rows; logits of all rows are never held.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in fp32


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
    total, kl, ce = _Fused.apply(
        hidden, head_weight, labels, topk_ids, topk_logprobs, log_tail_mass, log_mass_at_t,
        float(alpha), float(temperature), token_count,
    )  # fmt: skip
    return Loss(total, kl, ce)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, head, labels, ids, logprobs, tail, mass_t, alpha, t, count):  # type: ignore[no-untyped-def]
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        want_hidden, want_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros_like(head, dtype=real) if want_head else None
        sums = torch.zeros(2, dtype=real, device=hidden.device)
        scale = 1.0 / count
        rows = max(1, CHUNK_ELEMENTS // head.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for at in range(0, hidden.shape[0], rows):
                part = slice(at, at + rows)
                h = hidden[part]
                kl, ce, grad = _rows(
                    _product(h, head, real), labels[part], ids[part], logprobs[part],
                    None if tail is None else tail[part], None if mass_t is None else mass_t[part],
                    alpha, t, want_hidden or want_head,
                )  # fmt: skip
                sums[0] += kl
                sums[1] += ce
                if grad is not None:
                    grad *= scale
                    low = grad.to(h.dtype)
                    if grad_hidden is not None:
                        grad_hidden[part] = low @ head.to(h.dtype)
                    if grad_head is not None:
                        grad_head += _product(low.T, h.T, real)
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


def _product(a: Tensor, b: Tensor, real: torch.dtype) -> Tensor:
    """a @ b.T accumulated and returned in `real`, whatever the dtype of the factors."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.to(a.dtype).T, out_dtype=real)
    return a.to(real) @ b.to(real).T


def _rows(
    z: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor | None, mass_t: Tensor | None,
    alpha: float, t: float, want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Sums over these rows of T^2 * KL and of CE, and the gradient of the weighted sum for the logits z [n, V]."""
    counted = labels != IGNORED
    lse = torch.logsumexp(z, dim=1, keepdim=True)
    q = torch.exp(z - lse) if want_grad or alpha > 0.0 else z.new_zeros(0)  # validation of hard labels needs none
    kl = ce = z.new_zeros(())
    grad: Tensor | None = None
    if alpha > 0.0:
        kl_rows, grad = _kl(z, lse, q, ids, logprobs, tail, mass_t, t, want_grad)
        kl = torch.where(counted, kl_rows, 0.0).sum()
    if alpha < 1.0:
        target = labels.clamp(min=0)[:, None]
        ce = torch.where(counted, (lse - z.gather(1, target))[:, 0], 0.0).sum()
        if want_grad:
            both = q * (1.0 - alpha) if grad is None else grad.mul_(alpha).add_(q, alpha=1.0 - alpha)
            grad = both.scatter_add_(1, target, z.new_full((len(z), 1), alpha - 1.0))
    return kl, ce, None if grad is None else grad.masked_fill_(~counted[:, None], 0.0)


def _kl(
    z: Tensor, lse: Tensor, q: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor | None, mass_t: Tensor | None,
    t: float, want_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """T^2 * KL of each row [n] and its gradient for z [n, V]."""
    real = z.dtype
    valid = (ids >= 0) & (logprobs > float("-inf"))
    # An empty place repeats the row's first id, so that writing there changes nothing; a row without any writes to
    # id 0 what already stands there.
    at = torch.where(valid, ids, ids[:, :1]).clamp(min=0).long()
    full = valid.any(1, keepdim=True)
    logp = torch.where(valid, logprobs.to(real), 0.0)  # the zeros are never used: every sum below is masked
    mass = torch.where(valid, logp.exp(), 0.0).sum(1, keepdim=True)
    # Without a stored tail: one minus the sum, -inf where the ids hold everything.
    log_out = torch.log1p(-mass.clamp(max=1.0)) if tail is None else tail.to(real)[:, None]
    if t != 1.0 and mass_t is not None:
        # Exact at T: p_T on the ids = softmax(log p / T) * exp(log mass at T), the rest in the tail.
        inside = _log_softmax(logp / t, valid)
        log_mass = mass_t.to(real)[:, None].clamp(max=0.0)
        logp = inside + log_mass
        p = torch.where(valid, logp.exp(), 0.0)
        log_out = torch.log(-torch.expm1(log_mass))
        z, lse = z / t, torch.logsumexp(z / t, dim=1, keepdim=True)
        q = torch.exp(z - lse)
        value, factor = t * t, t  # d(z / T) / dz = 1 / T
        log_ratio = logp - (z.gather(1, at) - lse)
        kl = torch.where(valid, p * log_ratio, 0.0).sum(1, keepdim=True)
        mass = p.sum(1, keepdim=True)
    elif t != 1.0:
        # Chain rule: the shape within the ids at T (times T^2), the mass of the ids at T = 1.
        value, factor = 1.0, 1.0
        log_student = _log_softmax(z.gather(1, at) / t, valid)
        log_teacher = _log_softmax(logp / t, valid)
        shape_teacher = torch.where(valid, log_teacher.exp(), 0.0)
        shape = torch.where(valid, shape_teacher * (log_teacher - log_student), 0.0).sum(1, keepdim=True)
        log_q_mass = torch.logsumexp(torch.where(valid, z.gather(1, at), float("-inf")), 1, keepdim=True) - lse
        kl = mass * t * t * shape + torch.where(mass > 0.0, mass * (mass.log() - log_q_mass), 0.0)
        inside_student = torch.where(valid, _log_softmax(z.gather(1, at), valid).exp(), 0.0)
        pull = torch.where(valid, log_student.exp(), 0.0) - shape_teacher
        p = mass * inside_student - mass * t * pull  # what the gradient subtracts on the ids
    else:
        value, factor = 1.0, 1.0
        p = torch.where(valid, logp.exp(), 0.0)
        kl = torch.where(valid, p * (logp - (z.gather(1, at) - lse)), 0.0).sum(1, keepdim=True)

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
