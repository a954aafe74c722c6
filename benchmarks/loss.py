"""How long does the loss take, how much memory, and how exact is it? Forward and backward on one GPU, beside its peers.

    python -m benchmarks.loss [--out FOLDER]     # needs CUDA; Liger-Kernel and TRL are measured where installed

Peers compute less or need more: Liger's cross-entropy knows no soft labels, its KL and TRL's divergence want the
teacher's whole distribution (2 bytes x vocabulary a token, or its hidden states and head).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import kept, measured, versions
from tasks.losses import distillation_loss

N, H, V, K = 8192, 1536, 151_936, 64
EXACT_N = 256  # rows of the comparison with float64


def case(n: int, seed: int = 0) -> dict[str, Any]:
    """A student near its teacher, at the scale of trained models: logits of a few units, most mass on few ids."""
    gen = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n, H, device="cuda", generator=gen).bfloat16()
    head = (torch.randn(V, H, device="cuda", generator=gen) * 3 / H**0.5).bfloat16()
    parts = []
    for rows in (hidden + 0.3 * torch.randn(hidden.shape, device="cuda", generator=gen)).split(1024):
        z = rows.float() @ head.float().T
        lse = torch.logsumexp(z, 1, keepdim=True)
        top, ids = z.topk(K, 1)
        rest = z.scatter(1, ids, float("-inf"))
        at_2 = torch.logsumexp(top / 2, 1) - torch.logsumexp(z / 2, 1)
        label = torch.multinomial(torch.softmax(z, 1), 1, generator=gen)[:, 0]
        parts.append((label, ids, top - lse, torch.logsumexp(rest, 1) - lse[:, 0], at_2))
    labels, ids, logprobs, tail, at_2 = (torch.cat(column) for column in zip(*parts, strict=True))
    return {
        "hidden": hidden, "head_weight": head, "labels": labels, "topk_ids": ids.int(),
        "topk_logprobs": logprobs.half(), "log_tail_mass": tail, "log_mass_at_t": at_2,
    }  # fmt: skip


def ours(made: dict[str, Any], *, t: float, mass: bool, frozen: bool) -> Callable[[], Tensor]:
    hidden = made["hidden"].detach().requires_grad_()
    head = made["head_weight"].detach().requires_grad_(not frozen)
    rest = {name: value for name, value in made.items() if name not in ("hidden", "head_weight", "log_mass_at_t")}

    def work() -> Tensor:
        hidden.grad = head.grad = None
        loss = distillation_loss(
            hidden, head, alpha=0.7, temperature=t, token_count=len(hidden), **rest,
            log_mass_at_t=made["log_mass_at_t"] if mass else None,
        )  # fmt: skip
        loss.backward()
        return loss

    return work


def materialised(made: dict[str, Any]) -> Callable[[], Tensor]:
    """Plain torch: all logits, log-softmax in fp32, top-k + tail + cross-entropy at T = 1."""
    hidden, head = (made[name].detach().requires_grad_() for name in ("hidden", "head_weight"))
    ids, logp, tail = made["topk_ids"].long(), made["topk_logprobs"].float(), made["log_tail_mass"]

    def work() -> Tensor:
        hidden.grad = head.grad = None
        logq = torch.log_softmax((hidden @ head.T).float(), 1)
        inside = logq.gather(1, ids)
        q_out = torch.log1p(-inside.exp().sum(1).clamp(max=1 - 1e-6))
        kl = (logp.exp() * (logp - inside)).sum(1) + tail.exp() * (tail - q_out)
        ce = torch.nn.functional.nll_loss(logq, made["labels"])
        loss = 0.7 * kl.mean() + 0.3 * ce
        loss.backward()
        return loss

    return work


def exactness(t: float, mass: bool) -> dict[str, Any]:
    """Relative error of the loss and relative L2 error of each gradient against float64 on the same bf16 inputs."""
    made = case(EXACT_N, seed=1)
    made["topk_logprobs"] = made["topk_logprobs"].float()
    found: list[tuple[Tensor, ...]] = []
    for real in (torch.float64, torch.bfloat16):
        hidden, head = (made[name].to(real).detach().requires_grad_() for name in ("hidden", "head_weight"))
        loss = distillation_loss(
            hidden, head, made["labels"], made["topk_ids"], made["topk_logprobs"].to(torch.float64), alpha=0.7,
            temperature=t, token_count=EXACT_N, log_tail_mass=made["log_tail_mass"],
            log_mass_at_t=made["log_mass_at_t"] if mass else None,
        )  # fmt: skip
        loss.backward()
        assert hidden.grad is not None and head.grad is not None
        found.append((loss.detach().double(), hidden.grad.double(), head.grad.double()))
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    return dict(zip(("loss_error", "hidden_grad_error", "head_grad_error"), errors, strict=True))


def peers(made: dict[str, Any]) -> list[tuple[str, Callable[[], Any]]]:
    found: list[tuple[str, Callable[[], Any]]] = []
    hidden, head = (made[name].detach().requires_grad_() for name in ("hidden", "head_weight"))

    def clean() -> None:
        hidden.grad = head.grad = None

    try:
        from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        for dtype in (None, torch.float32):
            ce = LigerFusedLinearCrossEntropyLoss(accum_dtype=dtype)
            name = "Liger fused linear cross-entropy" + (", fp32 head gradient" if dtype else "")
            found.append((name, lambda ce=ce: (clean(), ce(head, hidden, made["labels"]).backward())))
        dense = torch.softmax(made["hidden"] @ made["head_weight"].T, 1)
        found.append((
            "Liger fused linear KL, dense target (held apart: 2.3 GiB)",
            lambda: (clean(), LigerFusedLinearKLDivFunction.apply(hidden, head, dense).backward()),
        ))  # fmt: skip
    except ImportError as error:
        print(f"Liger-Kernel is left out: {error}")
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: F401
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        teacher = made["hidden"][None]
        mask = torch.ones(1, len(teacher[0]), device="cuda")
        found.append((
            "TRL chunked divergence (forward KL, teacher's head run again)",
            lambda: (
                clean(),
                _chunked_divergence_loss(hidden[None], teacher, head, made["head_weight"], mask, 0.0)[0].backward(),
            ),
        ))  # fmt: skip
    except Exception as error:  # noqa: BLE001 - whatever keeps a peer from running is said, not hidden
        print(f"TRL is left out: {type(error).__name__}: {str(error)[:200]}")
    try:
        from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss

        ids, logp = made["topk_ids"].long()[None], torch.log_softmax(made["topk_logprobs"].float(), 1)[None]
        whole = torch.ones_like(ids)
        for compiled in (True, False):
            loss = LigerFusedLinearKLTopKLogprobLoss(0.3, 0.7, beta=0.0, compiled=compiled)
            name = "axolotl top-k + cross-entropy in chunks, no tail" + ("" if compiled else ", not compiled")
            found.append((
                name,
                lambda loss=loss: (
                    clean(), loss(head, hidden[None], ids, logp, whole, made["labels"][None]).backward()
                ),
            ))  # fmt: skip
    except Exception as error:  # noqa: BLE001
        print(f"axolotl is left out: {type(error).__name__}: {str(error)[:200]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    made = case(N)
    works: list[tuple[str, Callable[[], Any]]] = [
        ("kdcloud T=1", ours(made, t=1.0, mass=False, frozen=False)),
        ("kdcloud T=1, head frozen", ours(made, t=1.0, mass=False, frozen=True)),
        ("kdcloud T=2 exact", ours(made, t=2.0, mass=True, frozen=False)),
        ("kdcloud T=2 exact, head frozen", ours(made, t=2.0, mass=True, frozen=True)),
        ("kdcloud T=2 by the chain rule", ours(made, t=2.0, mass=False, frozen=False)),
        ("materialised torch T=1", materialised(made)),
        *peers(made),
    ]
    rows: list[dict[str, Any]] = []
    for name, work in works:
        try:
            ms, gib = measured(work)
            rows.append({"loss": name, "ms": round(ms, 2), "gib": round(gib, 2)})
        except Exception as error:  # noqa: BLE001
            rows.append({"loss": name, "failed": f"{type(error).__name__}: {str(error)[:160]}"})
        torch.cuda.empty_cache()
    cases = {"T=1": (1.0, False), "T=2 exact": (2.0, True), "T=2 by the chain rule": (2.0, False)}
    exact = {name: exactness(*which) for name, which in cases.items()}
    for name, errors in exact.items():
        print(name, {key: f"{value:.2e}" for key, value in errors.items()})
    kept(
        "loss", rows, out, shape={"N": N, "H": H, "V": V, "k": K, "dtype": "bf16"}, exactness=exact,
        versions=versions("triton", "liger-kernel", "trl", "axolotl"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
