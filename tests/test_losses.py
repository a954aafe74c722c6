"""Is the loss what it says it is? Against a plain float64 reference, at equality, and against the full KL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks import losses
from tasks.losses import distillation_loss, distillation_loss_parts

N, H, V = 6, 10, 80


def teacher_labels(logits: Tensor, k: int, t: float) -> dict[str, Tensor]:
    """What a label store would hold of these teacher logits, exactly."""
    logp = torch.log_softmax(logits, 1)
    top, ids = logp.topk(k, 1)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    return {
        "topk_ids": ids,
        "topk_logprobs": top,
        "log_tail_mass": torch.logsumexp(logp.masked_fill(inside, -math.inf), 1),
        "log_mass_at_t": torch.logsumexp(torch.log_softmax(logits / t, 1).gather(1, ids), 1),
    }


def reference(
    hidden: Tensor, head: Tensor, labels: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, *, alpha: float,
    temperature: float, token_count: float, log_tail_mass: Tensor | None = None, log_mass_at_t: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The contract written row by row; gradients come from autograd."""
    total = hidden.new_zeros(())
    t = temperature
    for i, z in enumerate(hidden @ head.T):
        if labels[i] == -100:
            continue
        there = topk_ids[i] >= 0
        ids, logp = topk_ids[i][there], topk_logprobs[i][there]
        outside = torch.ones(len(z), dtype=torch.bool)
        outside[ids] = False
        m = logp.exp().sum()
        tail = (1 - m) if log_tail_mass is None else log_tail_mass[i].exp()

        def buckets(p: Tensor, rest: Tensor, logq: Tensor, ids: Tensor = ids, outside: Tensor = outside) -> Tensor:
            kl = (p * (p.log() - logq[ids])).sum()
            if outside.any() and rest > 0:
                kl = kl + rest * (rest.log() - torch.logsumexp(logq[outside], 0))
            return kl

        logq = torch.log_softmax(z, 0)
        if t == 1:
            kl = buckets(logp.exp(), tail, logq)
        elif log_mass_at_t is not None:
            mass = log_mass_at_t[i].exp()
            kl = t * t * buckets(torch.softmax(logp / t, 0) * mass, 1 - mass, torch.log_softmax(z / t, 0))
        else:
            a, b = torch.log_softmax(logp / t, 0), torch.log_softmax(z[ids] / t, 0)
            kl = m * t * t * (a.exp() * (a - b)).sum() + m * (m.log() - torch.logsumexp(logq[ids], 0))
            if outside.any() and tail > 0:
                kl = kl + tail * (tail.log() - torch.logsumexp(logq[outside], 0))
        total = total + alpha * kl - (1 - alpha) * logq[labels[i]]
    return total / token_count


def case(seed: int = 0, *, k: int = 8, t: float = 1.0, n: int = N, v: int = V) -> dict[str, Any]:
    """Random student and teacher, one row left out, one row with fewer than k labels."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=gen, dtype=torch.float64, requires_grad=True)
    head = torch.randn(v, H, generator=gen, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, v, (n,), generator=gen)
    labels[1] = -100
    made = teacher_labels(torch.randn(n, v, generator=gen, dtype=torch.float64) * 2, k, t)
    return {"hidden": hidden, "head_weight": head, "labels": labels, **made}


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


FORMS = [
    pytest.param(1.0, (), id="T=1"),
    pytest.param(1.0, ("log_tail_mass", "log_mass_at_t"), id="T=1-without-tail"),
    pytest.param(3.0, (), id="T=3-with-mass-at-T"),
    pytest.param(3.0, ("log_mass_at_t",), id="T=3-chain-rule"),
    pytest.param(3.0, ("log_mass_at_t", "log_tail_mass"), id="T=3-chain-rule-without-tail"),
]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("t", "absent"), FORMS)
def test_value_and_gradients_are_those_of_the_reference(t: float, absent: tuple[str, ...], alpha: float) -> None:
    given = case(t=t)
    given["topk_ids"][2, 5:] = -1
    given["topk_logprobs"][2, 5:] = -math.inf
    if not absent:  # what belongs to the five ids that are left
        keep = given["topk_ids"][2, :5]
        logits = given["topk_logprobs"][2, :5].detach()
        given["log_tail_mass"][2] = torch.log1p(-logits.exp().sum())
        given["log_mass_at_t"][2] = math.log(0.4)
        assert len(keep) == 5
    elif "log_tail_mass" not in absent:
        given["log_tail_mass"][2] = torch.log1p(-given["topk_logprobs"][2, :5].exp().sum())
    given = without(given, *absent)
    how = {"alpha": alpha, "temperature": t, "token_count": 5}
    ours, plain = distillation_loss(**given, **how), reference_of(given, how)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    wrt = (given["hidden"], given["head_weight"])
    for a, b in zip(torch.autograd.grad(ours * 3, wrt), torch.autograd.grad(plain * 3, wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def reference_of(given: dict[str, Any], how: dict[str, Any]) -> Tensor:
    rest = without(given, "hidden", "head_weight")
    return reference(given["hidden"], given["head_weight"], **rest, **how)


@pytest.mark.parametrize(("t", "absent"), FORMS)
def test_gradients_agree_with_finite_differences(t: float, absent: tuple[str, ...]) -> None:
    given = without(case(k=3, n=3, v=9, t=t), *absent)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        rest = without(given, "hidden", "head_weight")
        return distillation_loss(hidden, head, **rest, alpha=0.6, temperature=t, token_count=2)

    assert torch.autograd.gradcheck(loss, (given["hidden"], given["head_weight"]))


@pytest.mark.parametrize("mass_known", [True, False])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(t: float, k: int, mass_known: bool) -> None:
    given = case(k=k, t=t)
    logits = (given["hidden"] @ given["head_weight"].T).detach()
    given.update(teacher_labels(logits, k, t))
    if not mass_known:
        given = without(given, "log_mass_at_t")
    loss = distillation_loss(**given, alpha=1.0, temperature=t, token_count=1)
    assert abs(loss.item()) < 1e-6
    for grad in torch.autograd.grad(loss, (given["hidden"], given["head_weight"])):
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_labels_shifted_by_one_token_are_noticed(t: float) -> None:
    given = case(t=t)
    logits = (given["hidden"] @ given["head_weight"].T).detach()
    given.update(teacher_labels(logits.roll(1, 0), 8, t))
    loss = distillation_loss(**given, alpha=1.0, temperature=t, token_count=1)
    assert loss.item() > 1.0
    assert torch.autograd.grad(loss, given["hidden"])[0].abs().sum() > 1.0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 79), t=st.sampled_from([1.0, 2.0, 5.0]))
def test_the_buckets_never_exceed_the_full_divergence(seed: int, k: int, t: float) -> None:
    gen = torch.Generator().manual_seed(seed)
    z, teacher = torch.randn(2, 4, V, generator=gen, dtype=torch.float64) * 3
    full = t * t * torch.nn.functional.kl_div(
        torch.log_softmax(z / t, 1), torch.log_softmax(teacher / t, 1), log_target=True, reduction="sum"
    )  # fmt: skip
    # The head is the identity, so that hidden is the logits.
    ours = distillation_loss(
        z, torch.eye(V, dtype=torch.float64), torch.zeros(4, dtype=torch.long), **teacher_labels(teacher, k, t),
        alpha=1.0, temperature=t, token_count=1,
    ).item()  # fmt: skip
    assert -1e-9 <= ours <= full.item() + 1e-9


def test_with_every_id_stored_the_buckets_are_the_full_divergence() -> None:
    given = case(k=V)
    given["log_tail_mass"] = torch.full((N,), -math.inf, dtype=torch.float64)
    z = given["hidden"] @ given["head_weight"].T
    keep = given["labels"] != -100
    logp = torch.zeros(N, V, dtype=torch.float64).scatter(1, given["topk_ids"], given["topk_logprobs"])
    full = torch.nn.functional.kl_div(torch.log_softmax(z, 1)[keep], logp[keep], log_target=True, reduction="sum")
    ours = distillation_loss(**given, alpha=1.0, temperature=1.0, token_count=1)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(*(torch.autograd.grad(x, given["hidden"], retain_graph=True)[0] for x in (ours, full)))


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("absent", [(), ("log_mass_at_t",), ("log_mass_at_t", "log_tail_mass")])
def test_rows_with_few_or_no_labels_and_certain_teachers_stay_finite(t: float, absent: tuple[str, ...]) -> None:
    given = case(t=t)
    ids, logprobs = given["topk_ids"], given["topk_logprobs"]
    ids[0], logprobs[0] = -1, -math.inf  # nothing stored
    given["log_tail_mass"][0], given["log_mass_at_t"][0] = 0.0, -math.inf
    ids[2, 1:], logprobs[2, 1:], logprobs[2, 0] = -1, -math.inf, 0.0  # all on one id
    given["log_tail_mass"][2], given["log_mass_at_t"][2] = -math.inf, 0.0
    ids[3, 2:], logprobs[3, 2:] = 0, -math.inf  # id 0 with no probability, as some engines pad
    logprobs[4] += 0.01  # rounded up: sums above 1
    loss = distillation_loss(**without(given, *absent), alpha=0.7, temperature=t, token_count=5)
    assert loss.isfinite()
    for grad in torch.autograd.grad(loss, (given["hidden"], given["head_weight"])):
        assert grad.isfinite().all()


def test_a_row_without_labels_adds_no_divergence() -> None:
    given = case()
    given["topk_ids"][:], given["topk_logprobs"][:] = -1, -math.inf
    given = without(given, "log_tail_mass", "log_mass_at_t")
    loss = distillation_loss(**given, alpha=1.0, temperature=1.0, token_count=5)
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, given["hidden"])[0].abs().max() < 1e-12


def test_left_out_rows_change_nothing_whatever_stands_in_them() -> None:
    given = case()
    how = {"alpha": 0.7, "temperature": 1.0, "token_count": 5}
    one = distillation_loss(**given, **how)
    given["topk_logprobs"][1] = math.nan
    two = distillation_loss(**given, **how)
    assert one.item() == two.item()
    assert torch.autograd.grad(two, given["hidden"])[0][1].abs().max() == 0


def test_cutting_into_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    how = {"alpha": 0.7, "temperature": 1.0, "token_count": 5}
    whole = distillation_loss(**given, **how)
    grads = torch.autograd.grad(whole, (given["hidden"], given["head_weight"]))
    seen: list[int] = []
    rows = losses._rows
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2 * V)
    monkeypatch.setattr(losses, "_rows", lambda z, *rest: (seen.append(len(z)), rows(z, *rest))[1])
    cut = distillation_loss(**given, **how)
    assert seen == [2, 2, 2]
    torch.testing.assert_close(cut, whole)
    for a, b in zip(torch.autograd.grad(cut, (given["hidden"], given["head_weight"])), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_head_gets_no_gradient_and_changes_none_of_the_hidden_one() -> None:
    given = case()
    how = {"alpha": 0.7, "temperature": 1.0, "token_count": 5}
    trained = torch.autograd.grad(distillation_loss(**given, **how), given["hidden"])[0]
    given["head_weight"] = given["head_weight"].detach()
    loss = distillation_loss(**given, **how)
    loss.backward()
    torch.testing.assert_close(given["hidden"].grad, trained)


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    monkeypatch.setattr(losses, "_add_product", None)  # of the head
    with torch.no_grad():
        assert distillation_loss(**given, alpha=0.7, temperature=1.0, token_count=5) > 0.0


def test_parts_add_up_to_the_total() -> None:
    total, kl, ce = distillation_loss_parts(**case(t=2.0), alpha=0.7, temperature=2.0, token_count=5)
    torch.testing.assert_close(total.detach(), 0.7 * kl + 0.3 * ce)
    assert kl > 0 and ce > 0 and not kl.requires_grad and not ce.requires_grad


@pytest.mark.parametrize("alpha", [0.7, 1.0])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_half_precision_inputs_stay_close_to_the_reference_on_the_same_numbers(t: float, k: int, alpha: float) -> None:
    given = case(n=64, k=k, t=t)
    with torch.no_grad():
        low = {**given, "hidden": given["hidden"].bfloat16(), "head_weight": given["head_weight"].bfloat16()}
        z = low["hidden"].double() @ low["head_weight"].double().T
        near = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    given.update(teacher_labels(near, k, t))  # late in training: what is left is as small as rounding of logits
    low = {**given, **{name: low[name] for name in ("hidden", "head_weight")}}
    low["hidden"].requires_grad_()
    low["head_weight"].requires_grad_()
    exact = {**given, "hidden": low["hidden"].detach().double(), "head_weight": low["head_weight"].detach().double()}
    exact["hidden"].requires_grad_()
    exact["head_weight"].requires_grad_()
    how = {"alpha": alpha, "temperature": t, "token_count": 63}
    ours, plain = distillation_loss(**low, **how), reference_of(exact, how)
    assert abs(ours.item() / plain.item() - 1) < 1e-3
    ours.backward()
    plain.backward()
    for name in ("hidden", "head_weight"):
        a, b = low[name].grad.double(), exact[name].grad
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize(("alpha", "t"), [(1.5, 1.0), (-0.1, 1.0), (0.5, 0.0)])
def test_impossible_weights_are_refused(alpha: float, t: float) -> None:
    with pytest.raises(ValueError, match=r"alpha|temperature"):
        distillation_loss(**case(), alpha=alpha, temperature=t, token_count=1)
