"""Does the student of one stage teach the next one? Teacher, middle and small, each stage by its own `run`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import context, run_stage
from test_train import LABEL, PRETRAIN, TINY, TRAIN

from tasks import label, models
from tasks.contract import Architecture, ModelSource
from tasks.labels import read_labels

TEACHER = Architecture(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
MIDDLE = replace(TEACHER, hidden_size=24, intermediate_size=48)
SMALL = replace(TINY, hidden_size=16)


@pytest.mark.slow
def test_three_models_in_a_row_each_learn_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = label._judged
    monkeypatch.setattr(label, "_judged", lambda *args: {**real(*args), "finish_reason": "stop"})  # answers are cut

    def stage(name: str, kind: str, settings: Any) -> dict[str, Any]:
        result = run_stage(tmp_path, name, kind, settings)
        assert result is not None
        return result

    stage("pretrain", "pretrain", replace(PRETRAIN, model=TEACHER))
    learn = replace(TRAIN, steps=30, batch_size=16, micro_batch=16, temperature=1.0, alpha=1.0)
    sizes = [sum(p.numel() for p in student(tmp_path, "pretrain").parameters())]
    for n, (teacher, arch) in enumerate([("pretrain", MIDDLE), ("train-0", SMALL)]):
        stage(f"label-{n}", "label", replace(LABEL, teacher=ModelSource(stage=teacher)))
        stage(f"train-{n}", "train", replace(learn, labels=f"label-{n}", student=ModelSource(architecture=arch)))
        labels = read_labels(tmp_path / f"label-{n}" / "done")
        assert len(labels) == LABEL.samples
        before, after = student(tmp_path, f"train-{n}", models_folder="before"), student(tmp_path, f"train-{n}")
        assert divergence(student(tmp_path, teacher), labels) < 1e-3  # they are this teacher's, and no other's
        assert 1e-3 < divergence(after, labels) < 0.7 * divergence(before, labels)
        sizes.append(sum(p.numel() for p in after.parameters()))
    assert sizes == sorted(sizes, reverse=True)
    ends = [models.load_stage(tmp_path / name / "done", context(tmp_path, "x", "train", TRAIN), dtype=torch.float32)
            for name in ("pretrain", "train-1")]  # fmt: skip
    assert models.vocabulary_hashes(ends[0].tokenizer) == models.vocabulary_hashes(ends[1].tokenizer)


def student(root: Path, stage: str, models_folder: str = models.MODEL_FOLDER) -> Any:
    ctx = context(root, "x", "train", TRAIN)
    return models.load_stage(root / stage / "done", ctx, dtype=torch.float32, name=models_folder).model.eval()


@torch.no_grad()
def divergence(model: Any, labels: Any) -> float:
    """Mean distance of the model's log-probabilities from the labels' at their ids, over all tokens of completions."""
    gaps = []
    for i in range(len(labels)):
        sample = labels.sample(i)
        ids = torch.cat([sample.prompt_ids, sample.completion_ids]).long()[None]
        logp = torch.log_softmax(model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].float(), 1)
        gaps.append((logp.gather(1, sample.topk_ids.long()) - sample.topk_logprobs).abs().mean())
    return float(torch.stack(gaps).mean())
