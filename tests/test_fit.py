"""Does a training run end where it should when memory runs out on the way, and when more steps do not help?"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import context, run_stage
from test_train import HOW, PRETRAIN, TRAIN, labelled, same, tiny, uneven  # noqa: F401 (a fixture)

from tasks import models, train
from tasks.contract import LoraSettings, TaskError
from tasks.stage import Stopped
from tasks.train import Arm, Batch, Fit, Fitted, fit, resume_point

FOUR = replace(HOW, micro_batch=4)


def student() -> Any:
    """Draws random numbers: a repeated step has to draw the same ones."""
    return models.with_lora(tiny(), LoraSettings(dropout=0.5), special_ids=[], seed=0)


def run_fit(root: Path, how: Fit, net: Any, **rest: Any) -> Fitted:
    return fit(context(root, "t", "train", TRAIN), net, uneven(), how, Arm("soft-0", 0, how.steps), None, **rest)


def out_of_memory(monkeypatch: pytest.MonkeyPatch, at: list[int]) -> list[int]:
    """Forward passes of these numbers run out of memory; the list returned has the tokens of each row."""
    real, rows = train.loss_of, []

    def failing(net: Any, batch: Batch, *rest: Any) -> Any:
        rows.append(batch.ids.shape[1])
        if len(rows) in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(net, batch, *rest)

    monkeypatch.setattr(train, "loss_of", failing)
    return rows


def trained(net: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def test_a_step_that_runs_out_of_memory_is_done_again_with_half_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = student()
    small, large = copy.deepcopy(start), copy.deepcopy(start)
    wanted = run_fit(tmp_path, replace(FOUR, micro_batch=2), small)
    rows = out_of_memory(monkeypatch, at=[2])  # after the first row's backward pass
    ctx = context(tmp_path, "t", "train", TRAIN, attempt=2)
    got = fit(ctx, large, uneven(), FOUR, Arm("soft-0", 0, 6), None)
    assert rows == [63, 17] + 6 * [24, 24, 32]  # of 80 tokens, at most 4 * 17 and then 2 * 17 at once
    assert (got.micro_batch, got.final_loss, got.tokens) == (2, wanted.final_loss, wanted.tokens)
    for a, b in zip(trained(small).values(), trained(large).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert [row["micro_batch"] for _, row in ctx.metrics if "micro_batch" in row] == [2]
    assert "done again with micro_batch 2 (CUDA out of memory" in capsys.readouterr().out


def test_a_single_sample_that_does_not_fit_ends_the_stage_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory(monkeypatch, at=list(range(1, 99)))
    with pytest.raises(TaskError, match="a single sample does not fit: CUDA out of memory") as raised:
        run_fit(tmp_path, FOUR, student())
    assert "checkpointing" in raised.value.hint


def test_a_resumed_run_keeps_the_micro_batch_that_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = out_of_memory(monkeypatch, at=[1])
    arm, net = Arm("soft-0", 0, 6), student()
    with pytest.raises(Stopped):
        fit(context(tmp_path, "t", "train", TRAIN, stop_after=2), net, uneven(), FOUR, arm, None)
    before = len(rows)
    again = context(tmp_path, "t", "train", TRAIN, attempt=2)
    done = fit(again, student(), uneven(), FOUR, arm, resume_point(again))
    assert done.micro_batch == 2 and rows[before:] == 4 * [24, 24, 32]


def test_training_ends_when_held_out_samples_say_so_and_keeps_the_weights_they_liked_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    losses = iter([3.0, 2.0, 2.5, 2.0])

    def scripted(net: Any, *_: Any) -> float:
        net.eval()
        seen.append(trained(net))
        return next(losses)

    monkeypatch.setattr(train, "validation_loss", scripted)
    net = student()
    how = replace(HOW, steps=30, early_stop_patience=2, eval_every_steps=3)
    done = run_fit(tmp_path, how, net, held_out=uneven())
    assert (done.steps_done, done.best_step, done.best_loss) == (12, 6, 2.0)
    best = trained(net)
    assert all(torch.equal(best[name], seen[1][name]) for name in best)
    assert not all(torch.equal(best[name], seen[3][name]) for name in best)


def test_looking_at_held_out_samples_changes_nothing(tmp_path: Path) -> None:
    plain, looked = student(), student()
    a = run_fit(tmp_path, HOW, plain)
    b = run_fit(tmp_path, replace(HOW, early_stop_patience=99, eval_every_steps=1), looked, held_out=uneven())
    assert b.best_step == 6 and a.final_loss == b.final_loss
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), looked.parameters(), strict=True))


STOPPING = replace(TRAIN, steps=12, learning_rate=0.3, early_stop_patience=3, eval_every_steps=1)


def test_an_early_stop_is_the_same_after_a_resume(labelled: Path) -> None:  # noqa: F811
    """The rate is far too high, so that a best one lies before the stop, and the stop before the end."""
    whole = run_stage(labelled, "early", "train", STOPPING)
    assert whole is not None
    (arm,) = whole["arms"]
    assert 2 < arm["steps_done"] < 12 and arm["steps_done"] == arm["best_step"] + 3
    assert whole["samples"] == 22  # of 24, a tenth held out
    stop = arm["best_step"] + 1
    assert run_stage(labelled, "early-cut", "train", STOPPING, stop_after=stop) is None
    (folder,) = (labelled / "early-cut" / "checkpoints").iterdir()
    assert json.loads((folder / "state.json").read_text())["best"]["since"] == 1
    (labelled / "early-cut" / "work" / "best-soft-0.safetensors").unlink()  # another machine
    resumed = run_stage(labelled, "early-cut", "train", STOPPING, attempt=2)
    assert resumed is not None
    (other,) = resumed["arms"]
    assert {**arm, "tokens_per_s": 0} == {**other, "tokens_per_s": 0}
    assert same(labelled / "early" / "done" / "model", labelled / "early-cut" / "done" / "model")
