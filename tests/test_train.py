"""Does training do what its settings say: the same whatever the cut, the same after a stop, and fair between arms?"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ml_support import FolderContext, context, run_stage
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from tasks import models, train
from tasks.contract import (
    Architecture,
    DataSource,
    LabelSettings,
    LoraSettings,
    ModelSource,
    PretrainSettings,
    TaskError,
    TrainSettings,
)
from tasks.labels import read_labels, shard_name, write_shard
from tasks.train import Arm, Examples, Fit, Order, accumulate, fit

TINY = Architecture(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
PRETRAIN = PretrainSettings(TINY, "builtin:addition/corpus?slips=0", 200, 12, 16, 1e-2)
LABEL = LabelSettings(
    teacher=ModelSource(stage="pretrain"), prompts=DataSource("builtin:addition/train"), verify="none", samples=24,
    max_new_tokens=6, temperature=1.0, top_p=1.0, top_k=4, keep="all", max_cut_share=1.0, batch_size=24,
)  # fmt: skip
TRAIN = TrainSettings(
    student=ModelSource(architecture=TINY), labels="label", method="full", alpha=0.7, temperature=1.0, steps=6,
    batch_size=8, micro_batch=8, learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `pretrain` and `label` are done; cut answers are made to look finished."""
    root = tmp_path_factory.mktemp("run")
    run_stage(root, "pretrain", "pretrain", PRETRAIN)
    from tasks import label

    real = label._judged

    def finished(*args: Any) -> dict[str, Any]:
        return {**real(*args), "finish_reason": "stop"}

    label._judged = finished  # type: ignore[assignment]
    try:
        run_stage(root, "label", "label", LABEL)
    finally:
        label._judged = real
    return root


def uneven() -> Examples:
    """Eight samples with completions of 1 to 8 tokens and random soft labels."""
    from tasks.labels import Header, Sample

    gen = torch.Generator().manual_seed(0)
    samples = []
    for i in range(8):
        logp, ids = torch.log_softmax(torch.randn(i + 1, 262, generator=gen) * 3, 1).topk(4, 1)
        tail = torch.log1p(-logp.exp().sum(1))
        tokens = torch.randint(0, 262, (3 + 2 * i,), generator=gen)
        samples.append(Sample(f"k{i}", tokens[: 2 + i], tokens[2 + i :], ids.int(), logp, tail, tail))
    with TemporaryDirectory() as folder:  # what is mapped stays readable
        write_shard(Path(folder) / shard_name(0), Header("t", "o", "s", 4, 1.0, 262), samples)
        labels = read_labels(Path(folder))
    return Examples.of(labels, range(8))


def tiny(seed: int = 0) -> Any:
    return models.from_architecture(TINY, models.tiny_tokenizer(), seed=seed).train()


HOW = Fit(steps=6, batch_size=8, micro_batch=8, learning_rate=1e-2, alpha=0.7)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_one_batch_of_eight_equals_several_small_ones_of_uneven_lengths(micro: int) -> None:
    examples, whole = uneven(), tiny().double()
    cut = copy.deepcopy(whole)
    losses = []
    for model, how in ((whole, HOW), (cut, replace(HOW, micro_batch=micro))):
        loss, count = accumulate(model, examples, torch.arange(8), how)
        assert count == 36  # 1 + 2 + ... + 8 completion tokens
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        losses.append(loss)
    torch.testing.assert_close(losses[0].total, losses[1].total)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_only_the_completion_is_learnt_and_its_end_too() -> None:
    batch = uneven().batch(torch.tensor([2, 0]), soft=True)
    examples = uneven()
    start = examples.offsets
    wanted = [examples.ids[start[i] + 2 + i : start[i + 1]] for i in (2, 0)]
    assert batch.labels.tolist() == torch.cat(wanted).tolist()
    # Sample 2: 4 prompt tokens, 3 of completion; its labels are predicted at places 3, 4, 5 of a row of 7.
    assert batch.places.tolist() == [3, 4, 5, 7 + 1]
    assert torch.equal(batch.soft[0], examples.soft(torch.tensor([3, 4, 5, 0]))[0])


def test_what_fills_up_a_batch_changes_nothing() -> None:
    """The loss of samples together is the mean over their tokens, as if each were alone."""
    examples, model = uneven(), tiny().double().eval()
    with torch.no_grad():
        together = float(train.loss_of(model, examples.batch(torch.arange(8), soft=True), HOW, 36).total)
        alone = sum(
            float(train.loss_of(model, examples.batch(torch.tensor([i]), soft=True), HOW, 36).total) for i in range(8)
        )
    assert abs(together - alone) < 1e-9


def test_every_epoch_sees_each_sample_once_and_a_resume_needs_the_step_only() -> None:
    order = Order(10, 4, seed=3)
    seen = torch.cat([order.at(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(Order(10, 4, seed=3).at(3), order.at(3))
    assert not torch.equal(torch.cat([Order(10, 4, seed=4).at(s) for s in range(5)]), seen)
    assert len(Order(3, 8, seed=0).at(0)) == 8  # a batch may be larger than the data


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [replace(HOW, steps=100, warmup_share=0.1, learning_rate=1.0).rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[9:])) and rates[100] == pytest.approx(0.1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = [path for name in ("model.safetensors", "adapter_model.safetensors") if (path := folder / name).exists()]
    return load_file(found[0])


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped_and_resumed_ends_to_the_bit_where_an_unbroken_one_does(
    labelled: Path, method: str
) -> None:
    """Twice: at the step after a checkpoint of its own rhythm, and in the middle of two. LoRA has dropout."""
    settings = TRAIN if method == "full" else replace(TRAIN, method="lora", student=ModelSource(stage="pretrain"))
    whole = run_stage(labelled, f"whole-{method}", "train", settings)
    name = f"broken-{method}"
    assert run_stage(labelled, name, "train", replace(settings, checkpoint_every_steps=3), stop_after=4) is None
    assert sorted(p.name for p in (labelled / name / "checkpoints").iterdir())[-1] == "step-000000004"
    assert run_stage(labelled, name, "train", settings, attempt=2, stop_after=1) is None
    resumed = run_stage(labelled, name, "train", settings, attempt=3)
    assert whole is not None and resumed is not None
    assert resumed["arms"][0]["final_loss"] == whole["arms"][0]["final_loss"]
    assert resumed["tokens"] == whole["tokens"]
    assert same(labelled / name / "done" / "model", labelled / f"whole-{method}" / "done" / "model")


def test_checkpoints_hold_tensors_and_json_only(labelled: Path) -> None:
    run_stage(labelled, "files", "train", TRAIN, stop_after=2)
    (folder,) = (labelled / "files" / "checkpoints").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    assert json.loads((folder / "state.json").read_text())["step"] == 2


def test_a_checkpoint_of_another_model_is_refused(labelled: Path) -> None:
    run_stage(labelled, "other", "train", TRAIN, stop_after=2)
    wider = replace(TRAIN, student=ModelSource(architecture=replace(TINY, num_hidden_layers=2)))
    with pytest.raises(TaskError, match="another model"):
        run_stage(labelled, "other", "train", wider, attempt=2)


def test_pretraining_resumes_to_the_bit_too(tmp_path: Path) -> None:
    run_stage(tmp_path, "whole", "pretrain", PRETRAIN)
    assert run_stage(tmp_path, "broken", "pretrain", PRETRAIN, stop_after=5) is None
    run_stage(tmp_path, "broken", "pretrain", PRETRAIN, attempt=2)
    assert same(tmp_path / "whole" / "done" / "model", tmp_path / "broken" / "done" / "model")


COMPARE = replace(TRAIN, steps=2, compare_hard=True, compare_seeds=2, learning_rates=(1e-3, 1e-2), search_steps=2)


def test_arms_share_start_and_order_and_search_alike_and_the_control_gets_twice_the_steps(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, tuple[float, list[list[int]]]] = {}
    real_fit, real_at = train.fit, Order.at
    current: list[str] = []

    def spying(ctx: Any, model: Any, examples: Examples, how: Fit, arm: Arm, *rest: Any, **more: Any) -> Any:
        current[:] = [arm.name]
        started[arm.name] = (float(sum(p.detach().double().abs().sum() for p in model.parameters())), [])
        assert (how.alpha == 0.0) is ("hard" in arm.name)
        return real_fit(ctx, model, examples, how, arm, *rest, **more)

    def at(self: Order, step: int) -> torch.Tensor:
        picked = real_at(self, step)
        started[current[0]][1].append(picked.tolist())
        return picked

    monkeypatch.setattr(train, "fit", spying)
    monkeypatch.setattr(Order, "at", at)
    result = run_stage(labelled, "compare", "train", COMPARE)
    assert result is not None
    assert [(a["name"], a["steps"]) for a in result["arms"]] == [
        ("soft-0", 2), ("hard-0", 2), ("hard_2x-0", 4), ("soft-1", 2), ("hard-1", 2), ("hard_2x-1", 4),
    ]  # fmt: skip
    for seed in "01":
        assert started[f"soft-{seed}"] == started[f"hard-{seed}"]
        assert started[f"hard_2x-{seed}"][0] == started[f"hard-{seed}"][0]
        assert started[f"hard_2x-{seed}"][1][:2] == started[f"hard-{seed}"][1]
    assert started["soft-0"] != started["soft-1"]
    assert [(t["arm"], t["lr"]) for t in result["search"]] == [
        ("soft", 1e-3), ("soft", 1e-2), ("hard", 1e-3), ("hard", 1e-2),
    ]  # fmt: skip
    for arm in result["arms"]:
        kind = arm["kind"].removesuffix("_2x")
        scores = {t["lr"]: t["score"] for t in result["search"] if t["arm"] == kind}
        assert arm["learning_rate"] == min(scores, key=lambda lr: scores[lr])
    done = labelled / "compare" / "done"
    assert same(done / "model", done / "arms" / "soft-0") and not same(done / "model", done / "arms" / "hard-0")


def test_the_search_learns_from_one_part_of_the_prompts_and_chooses_by_the_other() -> None:
    examples = uneven()
    learn, choose = train._split(examples)
    assert sorted(learn.keys + choose.keys) == sorted(examples.keys) and len(choose) == 1
    i = examples.keys.index(choose.keys[0])
    a, b = examples.batch(torch.tensor([i]), soft=True), choose.batch(torch.tensor([0]), soft=True)
    assert torch.equal(a.labels, b.labels) and torch.equal(a.soft[0], b.soft[0])
    with pytest.raises(TaskError, match="too few"):
        train._split(examples.take([0]))


@pytest.mark.parametrize("stop_after", [3, 9, 13])
def test_a_stopped_comparison_repeats_no_finished_arm_and_ends_the_same(labelled: Path, stop_after: int) -> None:
    """Stopped in the search (8 steps), in the first arm and in the second one (2 steps each)."""
    if not (labelled / "compare" / "done").exists():
        run_stage(labelled, "compare", "train", COMPARE)
    name = f"cut-{stop_after}"
    assert run_stage(labelled, name, "train", COMPARE, stop_after=stop_after) is None
    ctx = context(labelled, name, "train", COMPARE, attempt=2)
    result = train.run(ctx, COMPARE)
    steps = [done for phase, done in ctx.phases if phase == "train"]
    assert steps == list(range(stop_after + 1, 25))  # 8 of search, then 2 x (2 + 2 + 4); none twice
    unbroken = json.loads((labelled / "compare" / "done" / train.STUDENTS_FILE).read_text())["arms"]
    for arm, other in zip(result["arms"], unbroken, strict=True):
        assert arm["final_loss"] == other["final_loss"] and arm["learning_rate"] == other["learning_rate"]
        assert same(ctx.out / arm["path"], labelled / "compare" / "done" / other["path"])


@pytest.mark.parametrize("stop_after", [None, 3, 15])
def test_arms_side_by_side_end_as_one_after_the_other_do_stopped_or_not(
    labelled: Path, stop_after: int | None
) -> None:
    if not (labelled / "compare" / "done").exists():
        run_stage(labelled, "compare", "train", COMPARE)
    settings, name = replace(COMPARE, arms_at_once=2, threads=1), f"beside-{stop_after}"
    if stop_after is not None:
        assert run_stage(labelled, name, "train", settings, stop_after=stop_after) is None
    result = run_stage(labelled, name, "train", settings, attempt=2)
    unbroken = json.loads((labelled / "compare" / "done" / train.STUDENTS_FILE).read_text())["arms"]
    assert result is not None
    for arm, other in zip(result["arms"], unbroken, strict=True):
        assert (arm["name"], arm["final_loss"]) == (other["name"], other["final_loss"])
        assert same(labelled / name / "done" / arm["path"], labelled / "compare" / "done" / other["path"])


def test_metrics_name_the_parts_and_arms_stay_apart(labelled: Path) -> None:
    ctx = context(labelled, "metrics", "train", COMPARE)
    train.run(ctx, COMPARE)
    names = {name for _, row in ctx.metrics for name in row}
    assert {"loss__total", "loss__kl", "loss__ce", "learning_rate", "tokens_per_s"} <= names
    assert "hard-1__loss__total" in names and "soft-0__loss__total" not in names
    for _, row in ctx.metrics:
        if "loss__kl" in row:
            assert row["loss__total"] == pytest.approx(0.7 * row["loss__kl"] + 0.3 * row["loss__ce"], rel=1e-5)


def test_metrics_tell_the_share_of_the_time_that_went_into_samples_and_checkpoints(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only batches and checkpoints move: 2 s a batch, 6 s a checkpoint, 1 s of each step is work."""
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def takes(seconds: float, real: Any) -> Any:
        def slow(*args: Any, **more: Any) -> Any:
            now[0] += seconds
            return real(*args, **more)

        return slow

    ctx = context(labelled, "waiting", "train", TRAIN)
    monkeypatch.setattr(train.Ahead, "at", takes(2.0, train.Ahead.at))
    monkeypatch.setattr(train, "accumulate", takes(1.0, train.accumulate))
    monkeypatch.setattr(ctx, "checkpoint", takes(6.0, ctx.checkpoint))
    train.run(ctx, replace(TRAIN, steps=4, checkpoint_every_steps=2))
    rows = [row for _, row in ctx.metrics]
    assert [row["waiting__data"] for row in rows] == pytest.approx([2 / 3, 4 / 6, 6 / 15, 8 / 18])
    assert [row["waiting__save"] for row in rows] == pytest.approx([0, 0, 6 / 15, 6 / 18])
    assert all(row["grad_norm"] > 0 for row in rows)


def test_checkpointing_of_activations_changes_no_result(labelled: Path) -> None:
    for name, on in (("act-off", False), ("act-on", True)):
        run_stage(labelled, name, "train", replace(TRAIN, checkpointing=on, steps=2))
    a, b = (weights(labelled / name / "done" / "model") for name in ("act-off", "act-on"))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_lora_trains_adapters_only_and_merges_to_what_was_trained(labelled: Path) -> None:
    settings = replace(TRAIN, method="lora", student=ModelSource(stage="pretrain"))
    run_stage(labelled, "lora", "train", settings)
    saved = weights(labelled / "lora" / "done" / "model")
    assert saved and all("lora_" in name for name in saved)
    ctx = context(labelled, "x", "train", settings)
    merged = models.load_stage(labelled / "lora" / "done", ctx, dtype=torch.float32).model.state_dict()
    base = weights(labelled / "pretrain" / "done" / "model")
    changed = {name.rsplit(".", 2)[1] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "k_proj", "v_proj"}


# --- special tokens that mean something else -------------------------------------------------------------------------


def other_specials() -> Any:
    """The tiny tokenizer's bytes with other added tokens at two of its ids, and no template."""
    from tokenizers import pre_tokenizers

    return Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[],
        eos_token="<|endoftext|>", pad_token="<|pad|>", unk_token="<|pad|>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|box|>"],
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_repurposed_special_tokens_are_trained_and_no_others(
    labelled: Path, tmp_path: Path, tied: bool
) -> None:
    teacher, own = models.tiny_tokenizer(), other_specials()
    arch = replace(TINY, tie_word_embeddings=tied)
    base = models.from_architecture(arch, teacher, seed=5)  # wider than its own vocabulary needs
    models.save(tmp_path / "base", base, own)
    repurposed = [
        i for i, t in models.added_vocabulary(teacher).items() if models.added_vocabulary(own).get(i) != t
    ]
    assert repurposed and len(repurposed) < len(models.added_vocabulary(teacher))
    settings = replace(TRAIN, method="lora", student=ModelSource(path=str(tmp_path / "base")), steps=3)
    name = f"special-{tied}"
    run_stage(labelled, name, "train", settings)
    ctx = context(labelled, "x", "train", settings)
    loaded = models.load_stage(labelled / name / "done", ctx, dtype=torch.float32)
    before, after = base.state_dict(), loaded.model.state_dict()
    for weight in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = (before[weight] != after[weight]).any(1).nonzero()[:, 0].tolist()
        assert rows and set(rows) <= set(repurposed)
        # The end of sequence is never read, only predicted: its row moves where the head is.
        assert (teacher.eos_token_id in rows) is (tied or weight == "lm_head.weight")
    assert models.tied(loaded.model) is tied
    assert models.vocabulary_hashes(loaded.tokenizer) == models.vocabulary_hashes(teacher)


def test_a_student_of_another_base_vocabulary_is_refused(labelled: Path, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    backwards = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True))}, merges=[],
        eos_token="<|end|>", pad_token="<|end|>", unk_token="<|end|>",
    )  # fmt: skip
    models.save(tmp_path, models.from_architecture(TINY, models.tiny_tokenizer(), seed=0), backwards)
    with pytest.raises(TaskError, match="another base vocabulary"):
        run_stage(labelled, "refused", "train", replace(TRAIN, method="lora", student=ModelSource(path=str(tmp_path))))


def test_weights_that_are_not_safetensors_are_refused(labelled: Path, tmp_path: Path) -> None:
    tokenizer = models.tiny_tokenizer()
    model = models.from_architecture(TINY, tokenizer, seed=0)
    models.save(tmp_path, model, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TaskError, match="cannot load the model") as raised:
        run_stage(labelled, "refused", "train", replace(TRAIN, student=ModelSource(path=str(tmp_path))))
    assert "safetensors" in raised.value.hint


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    model = tiny()
    models.check_plain_head(model)
    real = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = scaled
    with pytest.raises(TaskError, match="changes its logits"):
        models.check_plain_head(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "adapters"}, "method: adapters is unknown"),
        ({"optimizer": "sgd"}, "optimizer: sgd is unknown"),
        ({"method": "lora"}, "random weights"),
        ({"alpha": 2.0}, "alpha must be"),
        ({"max_seq_len": 3}, "every sample is longer than 3"),
        ({"precision": "fp8", "student": ModelSource(stage="pretrain")}, "unknown precision fp8"),
        ({"method": "lora", "student": ModelSource(stage="pretrain"), "lora": LoraSettings(targets=("nope",))}, "LoRA"),
    ],
)
def test_settings_that_cannot_work_are_refused(labelled: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        run_stage(labelled, "refused", "train", replace(TRAIN, **change))


def test_soft_training_on_hard_labels_is_refused(labelled: Path, tmp_path: Path) -> None:
    labels = read_labels(labelled / "label" / "done")
    done = tmp_path / "label" / "done"
    done.mkdir(parents=True)
    one = labels.sample(0)
    hard = replace(one, topk_ids=one.topk_ids[:, :0], topk_logprobs=one.topk_logprobs[:, :0])
    write_shard(done / shard_name(0), replace(labels.header, top_k=0), [hard])
    models.tiny_tokenizer().save_pretrained(done / "tokenizer")
    with pytest.raises(TaskError, match="hard ones only"):
        run_stage(tmp_path, "train", "train", TRAIN)
    result = run_stage(tmp_path, "train", "train", replace(TRAIN, alpha=0.0), attempt=2)
    assert result is not None and result["arms"][0]["kind"] == "hard"


def test_a_loss_that_is_not_a_number_stops_the_stage_in_words(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    ctx = FolderContext(tmp_path, context(tmp_path, "nan", "train", TRAIN).task)
    with pytest.raises(TaskError, match="the loss is nan at step 0") as raised:
        fit(ctx, model, uneven(), HOW, Arm("soft-0", 0, 6), None)
    assert "learning rate" in raised.value.hint
