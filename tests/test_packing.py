"""Are samples laid end to end in one row to the model what each would be alone?"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import context
from test_train import HOW, TINY, TRAIN, tiny, uneven

from tasks import models, train
from tasks.contract import Architecture, LoraSettings
from tasks.models import Runs, hidden_states, use_packing
from tasks.train import Arm, Examples, accumulate, fit, micro_batches

TWO_LAYERS = replace(TINY, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def model(arch: Architecture = TWO_LAYERS) -> Any:
    return models.from_architecture(arch, models.tiny_tokenizer(), seed=1).train()


def gradients(net: Any, *batches: train.Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the batches together."""
    net.zero_grad()
    total = 0.0
    for batch in batches:
        loss = train.loss_of(net, batch, HOW, 36).total
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_a_packed_row_gives_loss_and_gradients_of_each_sample_alone() -> None:
    examples, net = uneven(), model()
    assert use_packing(net)
    packed = examples.batch(torch.tensor([4, 0, 7, 1, 1, 3]), soft=True, packed=True)
    assert packed.ids.shape == (1, 11 + 3 + 17 + 5 + 5 + 9) and packed.runs[3] == (2, 5)
    alone = [examples.batch(torch.tensor([i]), soft=True) for i in (4, 0, 7, 1, 1, 3)]
    loss, grads = gradients(net, packed)
    wanted, wanted_grads = gradients(net, *alone)
    assert loss == pytest.approx(wanted, abs=1e-5)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_no_sample_sees_the_one_before_it() -> None:
    net = model()
    assert use_packing(net)
    runs: Runs = ((2, 3), (1, 1))
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13]])
    changed = ids.clone()
    changed[0, :3] = torch.tensor([70, 80, 90])
    a, b = hidden_states(net, ids, runs=runs), hidden_states(net, changed, runs=runs)
    assert torch.equal(a[0, 3:], b[0, 3:]) and not torch.equal(a[0, :3], b[0, :3])


def test_a_model_that_was_not_told_to_pack_refuses_rows_of_several_samples() -> None:
    with pytest.raises(ValueError, match="see each other"):
        hidden_states(model(), torch.tensor([[1, 2, 3, 4]]), runs=((2, 2),))


def test_a_model_that_packs_refuses_a_mask_which_it_would_not_look_at() -> None:
    net = model()
    use_packing(net)
    with pytest.raises(ValueError, match="no mask"):
        hidden_states(net, torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))


def test_attention_that_does_not_look_at_the_whole_past_is_not_packed() -> None:
    net = model()
    net.config.sliding_window = 2
    assert not use_packing(net)
    (batch,) = micro_batches(net, uneven(), torch.arange(8), HOW)
    assert batch.ids.shape == (8, 17) and batch.runs == ()


def test_a_model_that_ignores_where_samples_begin_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.packed_attention
    monkeypatch.setattr(models, "packed_attention", lambda *args, packing=None, **rest: real(*args, **rest))
    net = model()
    assert not use_packing(net) and not models.packs(net)


def test_kernels_that_round_apart_are_no_reason_to_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 28 layers in bf16 the largest difference is some percent of the largest value (one H200)."""
    real = models.packed_attention

    def rounding(*args: Any, packing: Any = None, **rest: Any) -> Any:
        found, weights = real(*args, packing=packing, **rest)
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        return found + 0.02 * found.std() * noise * (packing is not None), weights

    monkeypatch.setattr(models, "packed_attention", rounding)
    net = model()
    assert use_packing(net)


def test_rows_hold_as_many_tokens_as_the_micro_batch_at_its_longest() -> None:
    examples, net = uneven(), model()
    use_packing(net)
    sizes = [b.ids.shape[1] for b in micro_batches(net, examples, torch.arange(8), replace(HOW, micro_batch=2))]
    assert sizes == [3 + 5 + 7 + 9, 11 + 13, 15 + 17]  # at most 2 * 17
    sizes = [b.ids.shape[1] for b in micro_batches(net, examples, torch.arange(8), replace(HOW, max_seq_len=20))]
    assert sizes == [80]
    roomy = replace(HOW, micro_batch=1, max_seq_len=4096)  # half as many must mean less memory where samples are short
    assert len(list(micro_batches(net, examples, torch.arange(8), roomy))) > 4


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("lora", [False, True])
def test_packed_steps_are_those_of_padded_ones(micro: int, lora: bool) -> None:
    examples, padded = uneven(), model().double()
    if lora:
        padded = models.with_lora(padded, LoraSettings(dropout=0.0), special_ids=[], seed=0).double()
    packed = copy.deepcopy(padded)
    assert use_packing(packed) and not models.packs(padded)
    for net, how in ((padded, HOW), (packed, replace(HOW, micro_batch=micro))):
        accumulate(net, examples, torch.arange(8), how)
    for a, b in zip(padded.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_training_packs_and_leaves_no_trace_of_it_in_what_it_saves(tmp_path: Any) -> None:
    net, seen = tiny(), []
    real = Examples.batch

    def spying(self: Examples, *args: Any, **kwargs: Any) -> Any:
        seen.append(real(self, *args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examples, "batch", spying)
        fit(context(tmp_path, "t", "train", TRAIN), net, uneven(), replace(HOW, steps=1), Arm("soft-0", 0, 1), None)
    assert [batch.runs for batch in seen] == [tuple((1, 3 + 2 * i) for i in range(8))]
    models.save(tmp_path / "model", net, models.tiny_tokenizer())
    assert models.PACKED_ATTENTION not in (tmp_path / "model" / "config.json").read_text()


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_layers_with_their_mlp_in_parts_give_the_same_gradients(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LoraSettings(dropout=0.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
    plain: Any = models.with_lora(model().double(), settings, special_ids=[], seed=0).double()
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
    saving = copy.deepcopy(plain)
    models.checkpoint_layers(saving, frozen=True)
    seen: list[int] = []
    for net in (plain, saving):
        net.base_model.model.model.layers[0].mlp.act_fn.register_forward_hook(
            lambda module, args, out: seen.append(args[0].shape[-2])
        )
    if compiled:
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend="eager", **how))
        models.compile_layers(saving)
        models.causal(saving).enable_input_require_grads()
    for net in (plain, saving):
        accumulate(net, uneven(), torch.arange(8), HOW)
    if not compiled:
        assert seen == [17, *[8 * 17 // 4] * 8]  # the second time for the backward pass
    trained = [(a, b) for a, b in zip(plain.parameters(), saving.parameters(), strict=True) if a.requires_grad]
    assert len(trained) == 2 * 2 * 4
    for a, b in trained:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_compiled_layers_compute_the_same_and_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    ids = torch.arange(1, 13).reshape(2, 6)
    plain = hidden_states(net, ids)
    assert not models.is_compiled(net)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, backend="eager", **how))
    models.compile_layers(net)
    assert models.is_compiled(net)
    torch.testing.assert_close(hidden_states(net, ids), plain)
    fit(context(tmp_path, "t", "train", TRAIN), net, uneven(), replace(HOW, steps=1), Arm("soft-0", 0, 1), None)
    assert not models.packs(net)


def test_batches_cut_ahead_are_those_of_their_step_and_of_the_micro_batch_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, examples = model(), uneven()
    ahead = train.Ahead(net, examples, train.Order(len(examples), 4, seed=1))
    order = train.Order(len(examples), 4, seed=1)
    cut: list[int] = []
    real = train.micro_batches
    monkeypatch.setattr(train, "micro_batches", lambda *args: cut.append(args[3].micro_batch) or real(*args))
    ahead._pool = ThreadPoolExecutor(1)  # as on CUDA
    monkeypatch.setattr(train.Batch, "pinned", lambda self: self)
    how = replace(HOW, steps=3, micro_batch=2)
    for step, now in enumerate((how, how, replace(how, micro_batch=1))):
        picked, batches = ahead.at(step, now)
        assert torch.equal(picked, order.at(step))
        wanted = list(real(net, examples, picked, now))
        assert len(batches) == len(wanted) == 4 // now.micro_batch
        for got, want in zip(batches, wanted, strict=True):
            assert torch.equal(got.ids, want.ids) and torch.equal(got.labels, want.labels)
    ahead._pool.shutdown()
    assert sorted(cut) == [1, 2, 2, 2]  # the third was cut for two at a time, and again
