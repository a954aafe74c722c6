"""Do the fused kernels give what plain torch gives? On CUDA, or anywhere in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/test_kernels.py     # needs `pip install triton`; no GPU
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton, and TRITON_INTERPRET=1 without a GPU")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from tasks import kernels, losses  # noqa: E402
from tests.test_losses import teacher_labels  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
N, V, K = 7, 300, 8
MODES = [(1.0, False), (2.0, True), (2.0, False)]  # temperature, mass at T known


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, the last one not full."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    monkeypatch.setattr(kernels, "WARPS", 4)


def rows(t: float, mass: bool, *, seed: int = 0) -> tuple[Tensor, Tensor, losses.Targets]:
    """Logits, labels (one left out, one among the ids, one outside of them) and targets (one row with three ids, one
    with none)."""
    gen = torch.Generator().manual_seed(seed)
    teacher = torch.randn(N, V, generator=gen) * 2
    made = teacher_labels(teacher, K, t)
    z = teacher + torch.randn(N, V, generator=gen)
    labels = torch.randint(0, V, (N,), generator=gen)
    labels[1] = -100
    labels[2] = made["topk_ids"][2, 3]
    labels[3] = next(i for i in range(V) if i not in made["topk_ids"][3].tolist())
    made["topk_ids"][4, 3:] = -1
    made["topk_logprobs"][4, 3:] = float("-inf")
    made["topk_ids"][5] = -1
    made["topk_logprobs"][5] = float("-inf")
    made["log_tail_mass"][4] = torch.log1p(-made["topk_logprobs"][4, :3].exp().sum())
    made["log_tail_mass"][5] = 0.0
    targets = losses._targets(
        made["topk_ids"], made["topk_logprobs"], made["log_tail_mass"], made["log_mass_at_t"] if mass else None, t,
        torch.float32,
    )  # fmt: skip
    return z, labels, targets


def fused(z: Tensor, labels: Tensor, targets: losses.Targets, dtype: torch.dtype, **how: Any) -> tuple[Tensor, ...]:
    buffer = kernels.Buffer.of(N, V, torch.device(DEVICE))
    logits, out = buffer.of_rows(N, V), buffer.gradients(N, V, dtype)
    logits.copy_(z)
    moved = [tensor.to(DEVICE) for tensor in targets[1:]]
    scale = torch.ones((), device=DEVICE)
    kl, ce = kernels.loss_rows(logits, out, labels.to(DEVICE), *moved, scale, mode=targets.mode, **how)
    return kl.cpu(), ce.cpu(), out.float().cpu()


@pytest.mark.parametrize(("t", "mass"), MODES)
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0])
def test_values_and_gradients_are_those_of_plain_torch(t: float, mass: bool, alpha: float) -> None:
    z, labels, targets = rows(t, mass)
    kl, ce, grad = fused(z, labels, targets, torch.float32, alpha=alpha, t=t, want_grad=True)
    counted = labels >= 0
    expected_kl, expected_ce, expected = losses._rows(z, labels, targets, alpha, t, True)
    assert expected is not None
    if alpha > 0.0:
        torch.testing.assert_close(kl.sum(), expected_kl, rtol=1e-4, atol=1e-5)
    if alpha < 1.0:
        torch.testing.assert_close(ce[counted].sum(), expected_ce, rtol=1e-5, atol=1e-5)
    assert kl[1] == ce[1] == 0.0 and not grad[1].any()
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("t", "mass"), MODES)
def test_gradients_in_half_precision_are_written_over_the_logits_they_came_from(t: float, mass: bool) -> None:
    z, labels, targets = rows(t, mass, seed=1)
    _, _, grad = fused(z, labels, targets, torch.bfloat16, alpha=0.7, t=t, want_grad=True)
    expected = losses._rows(z, labels, targets, 0.7, t, True)[2]
    assert expected is not None
    torch.testing.assert_close(grad, expected.bfloat16().float(), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_top_and_what_is_beside_it_are_those_of_the_sorted_row(t: float) -> None:
    z = torch.randn(N, V, generator=torch.Generator().manual_seed(2)) * 3
    real = V - 5
    z[0, real:] = 20.0  # beyond the vocabulary: tail, never among the k
    ids, logp, tail, mass = (x.cpu() for x in kernels.top_stats(z.clone().to(DEVICE), K, t, real))
    full = torch.log_softmax(z.double(), 1)
    top, there = full[:, :real].topk(K, 1)
    assert torch.equal(ids.long(), there)
    torch.testing.assert_close(logp.double(), top, rtol=1e-5, atol=1e-5)
    rest = torch.logsumexp(full.scatter(1, there, float("-inf")), 1)
    torch.testing.assert_close(tail.double(), rest, rtol=1e-5, atol=1e-5)
    at_t = torch.logsumexp(torch.log_softmax(z.double() / t, 1).gather(1, there), 1)
    torch.testing.assert_close(mass.double(), at_t, rtol=1e-5, atol=1e-5)
