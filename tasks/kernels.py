"""What does one pass over logits give, fused for CUDA? Triton kernels; tasks.losses and tasks.label know the sums.

A row of logits belongs to one program, which reads it once for its log-sum-exp and once for its gradient. The gradient
is written over the logits it came from, in the dtype of the hidden states, so that nothing of their size is added.
Triton comes with the CUDA builds of torch; this module is imported on CUDA only.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, untyped-decorator, unused-ignore"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits a step of the loop
SUB = 4  # neighbours that share one running maximum
WARPS = 16
GROUP = 32  # logits of which only the maximum is looked at first, by top_stats


@dataclass(frozen=True)
class Buffer:
    """Logits of up to `rows` rows, fp32, and the same memory as gradients."""

    logits: Tensor  # [rows, width] fp32; width >= V, a multiple of 8

    @staticmethod
    def of(rows: int, vocabulary: int, device: torch.device) -> Buffer:
        return Buffer(torch.empty(rows, -(-vocabulary // 8) * 8, dtype=torch.float32, device=device))

    def of_rows(self, n: int, vocabulary: int) -> Tensor:
        return self.logits[:n, :vocabulary]

    def gradients(self, n: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
        return self.logits.view(dtype)[:n, :vocabulary]


def loss_rows(
    z: Tensor, out: Tensor, labels: Tensor, ids: Tensor, logp: Tensor, log_out: Tensor, log_mass: Tensor,
    scale: Tensor, *, alpha: float, t: float, mode: int, want_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """KL (times T^2) and CE of each row [n], fp32; with `want_grad` the gradient for z is left in `out`.

    z [n, V] fp32 is destroyed. out [n, V]: the same memory (Buffer.gradients). labels [n]; ids [n, k] int64, -1 where
    empty; logp [n, k] (-inf where empty), log_out [n], log_mass [n]: see tasks.losses.Targets. scale: one number, by
    which the gradient is multiplied.
    """
    n, v = z.shape
    k = ids.shape[1]
    kl, ce = torch.empty(n, device=z.device), torch.empty(n, device=z.device)
    _loss_row[(n,)](
        z, out, z.stride(0), out.stride(0), labels, ids, logp, ids.stride(0), k, log_out, log_mass, kl, ce, scale, v,
        alpha, t, MODE=mode, HAS_KL=alpha > 0.0 and k > 0, HAS_CE=alpha < 1.0, WANT_GRAD=want_grad,
        K=max(16, triton.next_power_of_2(max(k, 1))), SUB=SUB, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return kl, ce


@triton.jit
def _with_top(z, top, SUB: tl.constexpr, BLOCK: tl.constexpr):
    """z as [BLOCK // SUB, SUB] and the largest so far of each row of it: the sums are rescaled once for SUB logits."""
    z = tl.reshape(z, [BLOCK // SUB, SUB])
    return z, tl.maximum(top, tl.max(z, 1))


@triton.jit
def _loss_row(
    Z, OUT, z_stride, out_stride, LABELS, IDS, LOGP, ids_stride, k, LOG_OUT, LOG_MASS, KL, CE, SCALE, V, alpha, t,
    MODE: tl.constexpr, HAS_KL: tl.constexpr, HAS_CE: tl.constexpr, WANT_GRAD: tl.constexpr, K: tl.constexpr,
    SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # MODE: 0 at T = 1, 1 exact at T, 2 chain rule; see tasks.losses.Targets.
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_stride
    OUT += row * out_stride
    column = tl.arange(0, BLOCK)
    label = tl.load(LABELS + row)
    if label < 0:  # left out of both terms
        tl.store(KL + row, 0.0)
        tl.store(CE + row, 0.0)
        if WANT_GRAD:
            for at in range(0, V, BLOCK):
                here = at + column
                tl.store(OUT + here, tl.zeros([BLOCK], OUT.dtype.element_ty), mask=here < V)
        return

    z_label = tl.load(Z + label)
    NEG = float("-inf")
    place = tl.arange(0, K)
    if HAS_KL:
        there = place < k
        ids = tl.load(IDS + row * ids_stride + place, mask=there, other=-1)
        logp = tl.load(LOGP + row * ids_stride + place, mask=there, other=NEG)
        valid = (ids >= 0) & (logp > NEG)
        z_in = tl.load(Z + ids, mask=valid, other=NEG)
        tl.debug_barrier()
        tl.store(Z + ids, tl.full([K], NEG, tl.float32), mask=valid)  # what is left is the tail
        tl.debug_barrier()

    # Pass one: log-sum-exp of the tail, at 1 and (exact at T) at T.
    top = tl.full([BLOCK // SUB], -1e30, tl.float32)
    total = tl.zeros([BLOCK // SUB], tl.float32)
    total_t = tl.zeros([BLOCK // SUB], tl.float32)
    for at in range(0, V, BLOCK):
        here = at + column
        z = tl.load(Z + here, mask=here < V, other=NEG)
        z, new = _with_top(z, top, SUB, BLOCK)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        if MODE == 1:
            total_t = total_t * tl.exp((top - new) / t) + tl.sum(tl.exp((z - new[:, None]) / t), 1)
        top = new
    most = tl.max(top, 0)
    tail_sum = tl.sum(total * tl.exp(top - most), 0)
    lse_tail = tl.where(tail_sum > 0.0, most + tl.log(tail_sum), NEG)
    lse = lse_tail
    lse_t = lse_tail
    kl = 0.0
    slope = 0.0
    factor = 1.0
    if HAS_KL:
        some = tl.max(valid.to(tl.int32), 0) > 0
        most_in = tl.where(some, tl.max(z_in, 0), 0.0)
        in_sum = tl.sum(tl.exp(z_in - most_in), 0)
        lse_in = tl.where(some, most_in + tl.log(in_sum), NEG)
        highest = tl.maximum(lse_in, lse_tail)
        lse = highest + tl.log(tl.exp(lse_in - highest) + tl.exp(lse_tail - highest))
        # The quantities of the KL: at T for the exact one, at 1 for the others.
        u_in, u_lse, u_tail, u_lse_in = z_in, lse, lse_tail, lse_in
        if MODE == 1:
            tail_t = tl.sum(total_t * tl.exp((top - most) / t), 0)
            u_tail = tl.where(tail_t > 0.0, most / t + tl.log(tail_t), NEG)
            u_in = z_in / t
            u_lse_in = tl.where(some, most_in / t + tl.log(tl.sum(tl.exp((z_in - most_in) / t), 0)), NEG)
            highest_t = tl.maximum(u_lse_in, u_tail)
            u_lse = highest_t + tl.log(tl.exp(u_lse_in - highest_t) + tl.exp(u_tail - highest_t))
            lse_t = u_lse
            factor = t
        q_in = tl.where(valid, tl.exp(u_in - u_lse), 0.0)
        log_out = tl.load(LOG_OUT + row)
        out = tl.exp(log_out)
        log_q_out = tl.maximum(u_tail - u_lse, -87.0)
        out = tl.where((out > 0.0) & (tl.sum(valid.to(tl.int32), 0) < V), out, 0.0)
        if MODE == 2:
            log_mass = tl.load(LOG_MASS + row)
            mass = tl.exp(log_mass)
            shape = tl.where(valid, tl.exp(logp), 0.0)  # logp: within the ids, at T
            z_t = z_in / t
            norm = tl.where(some, most_in / t + tl.log(tl.sum(tl.exp((z_in - most_in) / t), 0)), 0.0)
            student = tl.where(valid, z_t - norm, 0.0)
            kl = mass * t * t * tl.sum(tl.where(valid, shape * (logp - student), 0.0), 0)
            kl += tl.where(mass > 0.0, mass * (log_mass - (u_lse_in - u_lse)), 0.0)
            within = tl.where(valid, tl.exp(z_in - tl.where(some, lse_in, 0.0)), 0.0)
            p = mass * within - mass * t * (tl.where(valid, tl.exp(student), 0.0) - shape)
        else:
            p = tl.where(valid, tl.exp(logp), 0.0)
            mass = tl.sum(p, 0)
            kl = tl.sum(tl.where(valid, p * (logp - (u_in - u_lse)), 0.0), 0)
        kl += tl.where(out > 0.0, out * (log_out - log_q_out), 0.0)
        whole = mass + out
        slope = whole - out / tl.exp(log_q_out)
        if MODE == 1:
            kl *= t * t
    tl.store(KL + row, kl)
    tl.store(CE + row, lse - z_label if HAS_CE else 0.0)
    if not WANT_GRAD:
        return

    # Pass two: the gradient of the tail, written over the logits. Nobody may write before all have read.
    scale = tl.load(SCALE)
    by_q = 0.0
    by_q_t = 0.0
    if HAS_CE:
        by_q = scale * (1.0 - alpha)
    if HAS_KL:
        if MODE == 1:
            by_q_t = scale * alpha * factor * slope
        else:
            by_q += scale * alpha * slope
    for at in range(0, V, BLOCK):
        here = at + column
        z = tl.load(Z + here, mask=here < V, other=NEG)
        g = by_q * tl.exp(z - lse)
        if MODE == 1:
            g += by_q_t * tl.exp(z / t - lse_t)
        tl.debug_barrier()
        tl.store(OUT + here, g.to(OUT.dtype.element_ty), mask=here < V)
    tl.debug_barrier()
    in_ids = label < 0
    if HAS_KL:
        g_in = scale * alpha * factor * (whole * q_in - p)
        if HAS_CE:
            is_label = (ids == label) & valid
            in_ids = tl.sum(is_label.to(tl.int32), 0) > 0
            g_in += scale * (1.0 - alpha) * (tl.exp(z_in - lse) - is_label.to(tl.float32))
        tl.store(OUT + ids, g_in.to(OUT.dtype.element_ty), mask=valid)
    if HAS_CE:
        g_label = by_q * tl.exp(z_label - lse) - scale * (1.0 - alpha)
        if MODE == 1:
            g_label += by_q_t * tl.exp(z_label / t - lse_t)
        if in_ids == 0:
            tl.store(OUT + label, g_label.to(OUT.dtype.element_ty))


def top_stats(z: Tensor, k: int, t: float, real: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-k ids [n, k] and log-probabilities [n, k], log tail mass [n] at T = 1, log mass of the ids at T [n].

    z [n, V] fp32 is destroyed. Only ids below `real` are among the k. The k largest lie in the k groups with the
    largest maxima, so that the sort sees a thirtieth of the row.
    """
    n, v = z.shape
    groups = -(-real // GROUP)
    maxima = torch.empty(n, -(-v // GROUP), device=z.device)
    lse_t = torch.empty(n, device=z.device)
    _group_maxima[(n,)](
        z, z.stride(0), maxima, maxima.stride(0), lse_t, v, real, t, AT_T=t != 1.0, GROUP=GROUP,
        SUB=SUB, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    few = min(k, groups)
    best = maxima[:, :groups].topk(few, dim=1, sorted=False).indices
    columns = (best[:, :, None] * GROUP + torch.arange(GROUP, device=z.device)).view(n, -1)
    candidates = z.gather(1, columns.clamp(max=v - 1)).masked_fill_(columns >= real, float("-inf"))
    top, at = candidates.topk(k, dim=1)
    ids = columns.gather(1, at)
    tail = torch.empty(n, device=z.device)
    _tail[(n,)](z, z.stride(0), ids, k, tail, v, K=triton.next_power_of_2(k), SUB=SUB, BLOCK=BLOCK, num_warps=WARPS)
    inside = torch.logsumexp(top, 1)
    lse = torch.logaddexp(inside, tail)
    mass = inside - lse if t == 1.0 else torch.logsumexp(top / t, 1) - lse_t
    return ids.int(), top - lse[:, None], tail - lse, mass


@triton.jit
def _group_maxima(
    Z, z_stride, MAXIMA, maxima_stride, LSE_T, V, real, t, AT_T: tl.constexpr, GROUP: tl.constexpr,
    SUB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_stride
    MAXIMA += row * maxima_stride
    column = tl.arange(0, BLOCK)
    group = tl.arange(0, BLOCK // GROUP)
    top = tl.full([BLOCK // SUB], -1e30, tl.float32)
    total = tl.zeros([BLOCK // SUB], tl.float32)
    for at in range(0, V, BLOCK):
        here = at + column
        z = tl.load(Z + here, mask=here < V, other=float("-inf"))
        if AT_T:
            several, new = _with_top(z, top, SUB, BLOCK)
            total = total * tl.exp((top - new) / t) + tl.sum(tl.exp((several - new[:, None]) / t), 1)
            top = new
        known = tl.where(here < real, z, float("-inf"))
        most = tl.max(tl.reshape(known, [BLOCK // GROUP, GROUP]), 1)
        first = at // GROUP + group
        tl.store(MAXIMA + first, most, mask=first * GROUP < V)
    if AT_T:
        most_all = tl.max(top, 0)
        tl.store(LSE_T + row, most_all / t + tl.log(tl.sum(total * tl.exp((top - most_all) / t), 0)))


@triton.jit
def _tail(Z, z_stride, IDS, k, TAIL, V, K: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp of everything but the ids."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_stride
    place = tl.arange(0, K)
    ids = tl.load(IDS + row * k + place, mask=place < k, other=0)
    tl.store(Z + ids, tl.full([K], float("-inf"), tl.float32), mask=place < k)
    tl.debug_barrier()
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK // SUB], -1e30, tl.float32)
    total = tl.zeros([BLOCK // SUB], tl.float32)
    for at in range(0, V, BLOCK):
        here = at + column
        z, new = _with_top(tl.load(Z + here, mask=here < V, other=float("-inf")), top, SUB, BLOCK)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new[:, None]), 1)
        top = new
    most = tl.max(top, 0)
    rest = tl.sum(total * tl.exp(top - most), 0)
    tl.store(TAIL + row, tl.where(rest > 0.0, most + tl.log(rest), float("-inf")))
