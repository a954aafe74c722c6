"""Do two processes train the student that one does? Real ones, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ml_support import run_stage
from safetensors.torch import load_file
from test_train import LABEL, PRETRAIN, TINY, TRAIN

import tasks
from tasks import label
from tasks.bucket import Bucket, commit_folder, delete_prefix, open_bucket
from tasks.contract import Exit, LoraSettings, ModelSource, Task, TrainSettings
from tasks.stage import committed_checkpoints

pytestmark = pytest.mark.slow
UNTIED = replace(TINY, num_hidden_layers=2, tie_word_embeddings=False)
# Of 7 samples one process has 4 and the other 3, and each is a row of its own.
FULL = replace(TRAIN, student=ModelSource(architecture=UNTIED), max_seq_len=24, batch_size=7, micro_batch=1, steps=5)
TIED = replace(FULL, student=ModelSource(architecture=TINY))
LORA = replace(TRAIN, method="lora", student=ModelSource(stage="pretrain"), lora=LoraSettings(dropout=0.0), steps=5)
EARLY = replace(FULL, learning_rate=0.1, steps=9, early_stop_patience=2, eval_every_steps=1)
LOSSES = ("loss/total", "loss/kl", "loss/ce")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished stages `pretrain` and `label`."""
    root = tmp_path_factory.mktemp("inputs")
    real = label._judged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "_judged", lambda *args: {**real(*args), "finish_reason": "stop"})
        run_stage(root, "pretrain", "pretrain", PRETRAIN)
        run_stage(root, "label", "label", LABEL)
    return root


def bucket_of(inputs: Path, tmp_path: Path) -> Bucket:
    bucket = open_bucket(f"file:{tmp_path / 'bucket'}")
    for stage in ("pretrain", "label"):
        commit_folder(bucket, inputs / stage / "done", stage, fence=1)
    return bucket


PLANTED = """
import os, sys
import torch
from tasks import train
from tasks.stage import main
real, calls = train.distillation_loss_parts, []
def failing(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == RANK and len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\\nmore")
    return real(*args, **kwargs)
train.distillation_loss_parts = failing
main(sys.argv[1:])
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_shards_ends_the_stage_with_what_to_set(
    inputs: Path, tmp_path: Path, rank: int
) -> None:
    """In the middle of a step, in one of two processes only: the other one waits, and is ended."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.replace("== RANK", f"== '{rank}'"))
    settings = replace(FULL, batch_size=8, micro_batch=4)
    done = started(2, bucket_of(inputs, tmp_path), "full", settings, tmp_path / "work", script=[str(script)])
    assert done.returncode != Exit.DONE
    told = json.loads((tmp_path / "work" / "failed.json").read_text())
    assert told["message"].startswith("one of the GPUs ran out of memory with micro_batch 4")
    assert "Tried to allocate 2.00 GiB" in told["message"] and "more" not in told["message"]
    assert told["hint"] == "start again with micro_batch: 2, or checkpointing: true"


def train_with(processes: int, bucket: Bucket, stage: str, settings: TrainSettings, work: Path) -> Path:
    """The folder of the stage's result."""
    done = started(processes, bucket, stage, settings, work)
    assert done.returncode == Exit.DONE, done.stdout + done.stderr
    return work / "out"


def started(
    processes: int, bucket: Bucket, stage: str, settings: TrainSettings, work: Path,
    script: Sequence[str] = ("-m", "tasks.stage"),
) -> subprocess.CompletedProcess[str]:
    task = Task("run", stage, "train", attempt=1, fence=1, bucket=bucket.url, settings=settings, gate=True)
    work.mkdir(parents=True)
    (work / "task.json").write_text(task.to_json())
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    return subprocess.run(
        [sys.executable, *torchrun, *script, "--task", str(work / "task.json"), "--work", str(work)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(work), "PYTHONPATH": str(Path(tasks.__file__).parents[1]),
             "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def losses(work: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in LOSSES) for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = (out / "model").glob("*model.safetensors")
    return load_file(path)


def close(one: Path, two: Path, learning_rate: float) -> None:
    """AdamW steps are as long as the learning rate, however small the gradient: so rounding is, too. How much differs
    with the order in which a CPU's kernels add (0.0018 of the rate was seen); shares that are not added differ by all
    of it."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=5e-3 * learning_rate)


@pytest.mark.parametrize("settings", [EARLY, TIED, LORA], ids=["full", "full-tied", "lora"])
def test_two_processes_end_where_one_does(inputs: Path, tmp_path: Path, settings: TrainSettings) -> None:
    bucket = bucket_of(inputs, tmp_path)
    one = train_with(1, bucket, "one", settings, tmp_path / "one")
    two = train_with(2, bucket, "two", settings, tmp_path / "two")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    close(one, two, settings.learning_rate)
    result: dict[str, Any] = json.loads((two / "result.json").read_text())
    (arm,) = result["arms"]
    assert settings is not EARLY or arm["best_step"] == arm["steps_done"] - 2 < 7
    assert result["processes"] == 2 and result["tokens"] == json.loads((one / "result.json").read_text())["tokens"]
    written = [path for path in (tmp_path / "two" / "rank-1" / "work").rglob("*") if path.is_file()]
    assert {path.suffix for path in written}.isdisjoint({".safetensors", ".jsonl"})  # the first one writes those


@pytest.mark.parametrize("then", [1, 2])
def test_what_two_processes_saved_another_number_goes_on_with(inputs: Path, tmp_path: Path, then: int) -> None:
    bucket = bucket_of(inputs, tmp_path)
    settings = replace(FULL, checkpoint_every_steps=3, early_stop_patience=9, eval_every_steps=2)
    whole = train_with(2, bucket, "train", settings, tmp_path / "whole")
    assert committed_checkpoints(bucket, "train") == [3]
    assert len(losses(tmp_path / "whole")) == 5
    delete_prefix(bucket, "train/model")  # as if it had been stopped after that checkpoint
    rest = train_with(then, bucket, "train", settings, tmp_path / "rest")
    assert len(losses(tmp_path / "rest")) == 2
    close(whole, rest, settings.learning_rate)


def test_what_ends_a_process_is_seen(inputs: Path, tmp_path: Path) -> None:
    bucket = bucket_of(inputs, tmp_path)
    refused = started(2, bucket, "few", replace(FULL, batch_size=1), tmp_path / "few")
    assert refused.returncode != Exit.DONE and "batch_size 1 leaves some of 2 GPUs without a sample" in refused.stdout
    assert "batch_size 1" in json.loads((tmp_path / "few" / "failed.json").read_text())["message"]
    broken: Any = "a tenth"
    bug = started(2, bucket, "bug", replace(FULL, learning_rate=broken), tmp_path / "bug")
    assert bug.returncode != Exit.DONE and "TypeError" in bug.stderr and "in _optimizer" in bug.stderr
