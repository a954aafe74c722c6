"""Is memory proved before the first step without a trace, and does a stage that is told to do less end properly?"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import FolderContext, context, run_stage
from test_fit import FOUR, out_of_memory, student, trained
from test_labels import LABEL, pretrained  # noqa: F401 (a fixture)
from test_train import HOW, PRETRAIN, TRAIN, labelled, same, tiny, uneven  # noqa: F401 (fixtures)

from tasks import label, train
from tasks.labels import read_labels
from tasks.stage import Stopped
from tasks.train import Arm, Fit, Fitted, fit, fullest, resume_point

ARM = Arm("soft-0", 0, 6)


def rented(root: Path, **kwargs: Any) -> FolderContext:
    ctx = context(root, "t", "train", TRAIN, **kwargs)
    ctx.task = replace(ctx.task, gate=True)
    return ctx


def test_a_run_that_proved_its_memory_ends_to_the_bit_like_one_that_did_not(tmp_path: Path) -> None:
    plain = student()  # draws random numbers for its dropout
    proved = copy.deepcopy(plain)
    a = fit(rented(tmp_path / "a"), plain, uneven(), FOUR, ARM, None)
    b = fit(rented(tmp_path / "b"), proved, uneven(), FOUR, ARM, None, prove=True)
    assert (a.final_loss, a.tokens, a.micro_batch) == (b.final_loss, b.tokens, b.micro_batch)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), proved.parameters(), strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_the_step_that_proves_it_is_the_dearest_of_all(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of 3, 5 ... 17 tokens. Padded, the four longest; end to end, what fills a row of 4 * 17 = 68 best."""
    with monkeypatch.context() as patch:
        patch.setattr(train.models, "packs", lambda model: packed)
        picked = fullest(tiny(), uneven(), replace(HOW, micro_batch=4))
    tokens = sorted(uneven().lengths[picked].tolist())
    assert tokens == ([3, 9, 11, 13, 15, 17] if packed else [11, 13, 15, 17])
    rows = out_of_memory(monkeypatch, at=[])
    fit(rented(tmp_path), tiny(), uneven(), FOUR, ARM, None, prove=True)
    assert rows[0] == max(rows) == 68


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("micro", "wanted"), [(8, [False]), (4, [False, True])])
def test_where_gradients_are_added_up_memory_is_proved_with_those_of_an_earlier_micro_batch(
    micro: int, wanted: list[bool], packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step in one micro-batch has none when its activations are there; no step has those of a second."""
    monkeypatch.setattr(train.models, "packs", lambda model: packed)
    real, seen = train.loss_of, []

    def looking(net: Any, batch: train.Batch, *rest: Any) -> Any:
        seen.append((batch.ids.numel(), all(p.grad is not None for p in net.parameters() if p.requires_grad)))
        return real(net, batch, *rest)

    monkeypatch.setattr(train, "loss_of", looking)
    how = replace(HOW, micro_batch=micro)
    net = tiny()
    before = {name: p.clone() for name, p in net.named_parameters()}
    optimizer = train._optimizer(dict(net.named_parameters()), how, torch.device("cpu"))
    drawn = torch.get_rng_state()
    assert train.prove_memory(net, uneven(), how, dict(net.named_parameters()), optimizer) == how
    assert [held for _, held in seen] == wanted and len({tokens for tokens, _ in seen}) == 1
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in net.named_parameters())
    assert not optimizer.state and torch.equal(torch.get_rng_state(), drawn)


def test_memory_that_runs_out_while_it_is_proved_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = student()
    small, large = copy.deepcopy(start), copy.deepcopy(start)
    wanted = fit(rented(tmp_path / "a"), small, uneven(), replace(FOUR, micro_batch=2), ARM, None)
    rows = out_of_memory(monkeypatch, at=[2])  # with the gradients of the first
    got = fit(rented(tmp_path / "b"), large, uneven(), FOUR, ARM, None, prove=True)
    assert (got.micro_batch, got.final_loss) == (2, wanted.final_loss)
    proved = rows[: -6 * 3]
    assert proved[:2] == [68, 68] and proved[-2:] == [32, 32]  # did not fit; what fits best into 2 * 17 was proved
    assert rows[len(proved) :] == 6 * [24, 24, 32]  # then six steps as usual
    for a, b in zip(trained(small).values(), trained(large).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("gate", "wanted"), [(True, [True]), (False, [False])])
def test_memory_is_proved_once_and_on_rented_machines_only(
    gate: bool, wanted: list[bool], labelled: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    asked: list[bool] = []
    real = train.fit

    def spying(*args: Any, prove: bool, **more: Any) -> Fitted:
        asked.append(prove)
        return real(*args, prove=prove, **more)

    monkeypatch.setattr(train, "fit", spying)
    settings = replace(TRAIN, steps=2, learning_rates=(1e-2, 2e-2), search_steps=1)
    ctx = context(labelled, f"prove-{gate}", "train", settings)
    ctx.task = replace(ctx.task, gate=gate)
    train.run(ctx, settings)
    assert asked == [*wanted, False, False]
    assert (("prove", 0) in ctx.phases) is gate


# --- doing less


class Limiting(FolderContext):
    """The client's word comes after two steps."""

    def progress(self, phase: str, done: float = 0, total: float | None = None, *args: Any, **more: Any) -> None:
        super().progress(phase, done, total, *args, **more)
        self.seen = (done, total)
        if phase == "train" and done == 2 and self.limit is None:
            self.limit = 4.0


def limiting(root: Path, **kwargs: Any) -> Limiting:
    ctx = rented(root, **kwargs)
    ctx.__class__ = Limiting
    return ctx  # type: ignore[return-value]


def test_a_limit_ends_training_early_with_the_learning_rate_brought_down(tmp_path: Path) -> None:
    ctx = limiting(tmp_path)
    done = fit(ctx, tiny(), uneven(), replace(HOW, steps=40), Arm("soft-0", 0, 40), None)
    assert (done.steps_done, done.limit, ctx.seen) == (4, 4, (4, 4))
    rates = [row["learning_rate"] for _, row in ctx.metrics]
    assert rates[2:] == [Fit(**{**HOW.__dict__, "steps": 4}).rate(step) for step in (2, 3)]
    assert rates[3] < 0.4 * HOW.learning_rate < rates[1]


def test_a_limit_below_what_was_done_ends_now_and_one_above_the_plan_is_none(tmp_path: Path) -> None:
    ctx = limiting(tmp_path)
    ctx.limit = 99.0
    assert fit(ctx, tiny(), uneven(), HOW, ARM, None).limit is None
    late = limiting(tmp_path / "b")
    late.limit = 0.5
    assert fit(late, tiny(), uneven(), HOW, ARM, None).steps_done == 1


def test_a_limited_run_that_is_broken_off_goes_on_as_a_limited_one(tmp_path: Path) -> None:
    whole, broken = tiny(), tiny()
    how, arm = replace(HOW, steps=40), Arm("soft-0", 0, 40)
    fit(limiting(tmp_path / "a"), whole, uneven(), how, arm, None)
    with pytest.raises(Stopped):
        fit(limiting(tmp_path / "b", stop_after=3), broken, uneven(), how, arm, None)
    again = rented(tmp_path / "b", attempt=2)  # nobody tells this one
    done = fit(again, tiny(1), uneven(), how, arm, resume_point(again))
    assert (done.steps_done, done.limit) == (4, 4)
    other = tiny(2)
    fit(rented(tmp_path / "b", attempt=3), other, uneven(), how, arm, resume_point(again))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), other.parameters(), strict=True))


def test_a_stage_of_several_arms_takes_no_limit(labelled: Path) -> None:  # noqa: F811
    settings = replace(TRAIN, steps=3, compare_hard=True)
    ctx = context(labelled, "arms", "train", settings)
    ctx.task, ctx.limit = replace(ctx.task, gate=True), 1.0
    assert [arm["steps_done"] for arm in train.run(ctx, settings)["arms"]] == [3, 3, 6]


def test_a_limited_training_says_so_in_its_result(labelled: Path) -> None:  # noqa: F811
    ctx = context(labelled, "less", "train", TRAIN)
    ctx.task, ctx.limit = replace(ctx.task, gate=True), 3.0
    result = train.run(ctx, TRAIN)
    assert result["limited"] == {"planned": 6, "done": 3} and result["steps_done"] == 3
    assert json.loads((ctx.out / "model" / "arm.json").read_text())["limit"] == 3
    assert "limited" not in (run_stage(labelled, "all", "train", TRAIN) or {"limited": 1})


def test_a_limited_labelling_keeps_whole_shards_and_says_so(pretrained: Path) -> None:  # noqa: F811
    ctx = context(pretrained, "fewer", "label", LABEL)  # 20 prompts in shards of 8
    ctx.limit = 2.0
    result = label.run(ctx, LABEL)
    assert result["limited"] == {"planned": 20, "done": 16}
    assert (result["prompts"], result["generated"]) == (16, 16)
    assert len(read_labels(ctx.out)) == result["kept"]
    none = context(pretrained, "one", "label", LABEL)
    none.limit = 0.0
    assert label.run(none, LABEL)["prompts"] == 8  # one shard is the least
