"""Does training with a 4-bit base or 8-bit moments do what it says, and say so where it cannot?"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import context, run_stage
from safetensors.torch import load_file
from test_train import TRAIN, labelled, same, weights  # noqa: F401 (a fixture)

from orchestrator.catalog import MODELS
from orchestrator.handover import packages
from orchestrator.memory import GIB, training_memory
from tasks import models
from tasks.contract import Architecture, ModelSource, TaskError, TrainSettings, install_hint

needs_it = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
WIDE = Architecture(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("change", [{"method": "qlora"}, {"optimizer": "adamw_8bit"}])
def test_without_bitsandbytes_the_stage_ends_in_words(
    labelled: Path,  # noqa: F811
    change: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (name, value), *_ = change.items()
    with pytest.raises(TaskError, match=f"{name}: {value} needs bitsandbytes") as raised:
        run_stage(labelled, "refused", "train", replace(TRAIN, student=ModelSource(stage="pretrain"), **change))
    assert install_hint("quantized") in raised.value.hint


def test_a_rented_machine_gets_bitsandbytes_for_such_a_stage_only() -> None:
    assert "bitsandbytes" not in packages("train", s3=False)
    assert packages("train", s3=False, quantized=True)["bitsandbytes"].startswith("bitsandbytes==")


def test_a_plan_counts_the_bytes_of_weights_and_moments_as_they_are_held() -> None:
    shape = next(shape for shape in MODELS.values() if shape.tied)
    how: dict[str, Any] = {"micro_batch": 1, "seq_len": 512, "half": True, "checkpointing": True, "gpu": True}
    lora = training_memory(shape, trainable=1000, full=False, **how).parts_gib
    qlora = training_memory(shape, trainable=1000, full=False, four_bit=True, **how).parts_gib
    layers = shape.params - shape.vocab * shape.hidden
    saved = layers * (2 - 0.516) / GIB  # bf16, against 4 bits and their scales
    assert lora["weights"] - qlora["weights"] == pytest.approx(saved, rel=1e-3)
    full = training_memory(shape, trainable=shape.params, full=True, **how).parts_gib
    eight = training_memory(shape, trainable=shape.params, full=True, eight_bit=True, **how).parts_gib
    assert full["optimizer"] / eight["optimizer"] == pytest.approx(4.0, rel=0.02)


def stopped_and_resumed(root: Path, name: str, settings: TrainSettings) -> Path:
    """Checks that both ways end alike; returns the folder of the checkpoint between."""
    whole = run_stage(root, f"{name}-whole", "train", settings)
    assert run_stage(root, f"{name}-cut", "train", settings, stop_after=3) is None
    (checkpoint,) = (root / f"{name}-cut" / "checkpoints").iterdir()
    resumed = run_stage(root, f"{name}-cut", "train", settings, attempt=2)
    assert whole is not None and resumed is not None
    assert whole["arms"][0]["final_loss"] == resumed["arms"][0]["final_loss"]
    assert same(root / f"{name}-whole" / "done" / "model", root / f"{name}-cut" / "done" / "model")
    return checkpoint


@needs_it
def test_eight_bit_moments_survive_a_stop_to_the_bit_without_pickle(labelled: Path) -> None:  # noqa: F811
    settings = replace(TRAIN, student=ModelSource(architecture=WIDE), optimizer="adamw_8bit")
    checkpoint = stopped_and_resumed(labelled, "eight", settings)
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in moments.items() if name.endswith("state1")} == {
        torch.uint8, torch.float32,  # matrices; norms and biases, which are small
    }  # fmt: skip


@needs_it
def test_qlora_trains_adapters_on_a_four_bit_base_and_resumes_to_the_bit(
    labelled: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    tokenizer = models.tiny_tokenizer()
    models.save(tmp_path, models.from_architecture(WIDE, tokenizer, seed=0), tokenizer)
    settings = replace(TRAIN, method="qlora", student=ModelSource(path=str(tmp_path)))
    stopped_and_resumed(labelled, "qlora", settings)
    run_stage(labelled, "whole-base", "train", replace(settings, method="lora"))
    assert not same(labelled / "qlora-whole" / "done" / "model", labelled / "whole-base" / "done" / "model")
    done = labelled / "qlora-whole" / "done" / "model"
    assert all("lora_" in name for name in weights(done))
    assert json.loads((done / models.STUDENT_FILE).read_text())["base"]["path"] == str(tmp_path)
    ctx = context(labelled, "x", "train", settings)
    base = models.load(ctx, settings.student, dtype=torch.float32, four_bit=True).model
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    with pytest.raises(TaskError, match="left an adapter"):
        models.load(ctx, ModelSource(stage="qlora-whole"), dtype=torch.float32, four_bit=True)
