"""Do labels survive storing, are they those of the right token, and is a label stage resumed shard by shard?"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_support import context, run_stage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from orchestrator.workload import label_bytes
from tasks import label, models, train
from tasks.contract import (
    Architecture,
    DataSource,
    ExportSettings,
    LabelSettings,
    ModelSource,
    PretrainSettings,
    TaskError,
    TrainSettings,
)
from tasks.crew import Crew
from tasks.generate import Completion, TransformersGenerator, rows_that_fit
from tasks.label import score
from tasks.labels import Header, Sample, pack_bits, read_labels, shard_name, unpack_bits, write_shard
from tasks.losses import distillation_loss
from tasks.stage import Stopped

TINY = Architecture(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
HEADER = Header(teacher="t", ordinary_sha256="o", special_sha256="s", top_k=3, temperature=2.0, vocabulary=50)
LABEL = LabelSettings(
    teacher=ModelSource(stage="pretrain"), prompts=DataSource("builtin:addition/train"), verify="exact", samples=20,
    max_new_tokens=6, temperature=1.0, top_p=1.0, top_k=4, label_temperature=2.0, batch_size=8, shard_size=8,
    keep="all", max_cut_share=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stage `pretrain` is done: a teacher that has seen a few steps."""
    root = tmp_path_factory.mktemp("run")
    settings = PretrainSettings(TINY, "builtin:addition/corpus?slips=0", 200, 30, 16, 1e-2)
    assert run_stage(root, "pretrain", "pretrain", settings) is not None
    return root


def sample(key: str, prompt: int, completion: int, k: int = 3) -> Sample:
    gen = torch.Generator().manual_seed(prompt * 100 + completion)
    logp = torch.log_softmax(torch.randn(completion, 50, generator=gen) * 3, 1)
    top, ids = logp.topk(k, 1)
    tail = torch.log1p(-top.exp().sum(1))
    return Sample(key, torch.arange(prompt), torch.arange(completion) + 7, ids.int(), top, tail, tail / 2)


def test_what_was_stored_is_read_back_by_key_however_it_was_cut(tmp_path: Path) -> None:
    samples = [sample("c", 2, 5), sample("a", 4, 1), sample("b", 3, 2)]
    for name, cuts in (("one", [samples]), ("three", [[s] for s in reversed(samples)]), ("gap", [samples, []])):
        (tmp_path / name).mkdir()
        for i, part in enumerate(cuts):
            write_shard(tmp_path / name / shard_name(i), HEADER, part)
        labels = read_labels(tmp_path / name)
        assert labels.header == HEADER and labels.keys == ["a", "b", "c"]
        for i, expected in enumerate(sorted(samples, key=lambda s: s.key)):
            got = labels.sample(i)
            assert got.prompt_ids.tolist() == expected.prompt_ids.tolist()
            assert got.completion_ids.tolist() == expected.completion_ids.tolist()
            assert got.topk_ids.tolist() == expected.topk_ids.tolist()
            torch.testing.assert_close(got.topk_logprobs.float(), expected.topk_logprobs, rtol=1e-3, atol=1e-6)
            assert torch.equal(got.log_tail_mass, expected.log_tail_mass)  # fp32, to the bit
            assert torch.equal(got.log_mass_at_t, expected.log_mass_at_t)


def test_missing_labels_stay_missing_and_tiny_ones_stay_finite(tmp_path: Path) -> None:
    one = sample("a", 1, 2)
    one.topk_ids[0, 2], one.topk_logprobs[0, 2] = -1, -math.inf
    one.topk_logprobs[1, 2] = -1e6
    write_shard(tmp_path / shard_name(0), HEADER, [one])
    got = read_labels(tmp_path).sample(0)
    assert got.topk_ids[0, 2] == -1 and got.topk_logprobs[0, 2] == -math.inf
    assert got.topk_logprobs[1, 2].isfinite()


def test_labels_that_cannot_be_used_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="holds no labels"):
        read_labels(tmp_path)
    write_shard(tmp_path / shard_name(0), HEADER, [])
    with pytest.raises(TaskError, match="no sample was kept"):
        read_labels(tmp_path)
    write_shard(tmp_path / shard_name(0), replace(HEADER, schema=99), [sample("a", 1, 1)])
    with pytest.raises(TaskError, match="label schema 99"):
        read_labels(tmp_path)
    write_shard(tmp_path / shard_name(0), HEADER, [sample("a", 1, 1)])
    write_shard(tmp_path / shard_name(1), replace(HEADER, teacher="other"), [sample("b", 1, 1)])
    with pytest.raises(TaskError, match="different settings"):
        read_labels(tmp_path)
    (tmp_path / shard_name(1)).write_bytes(b"garbage" * 9)
    with pytest.raises(TaskError, match="damaged"):
        read_labels(tmp_path)


@given(st.integers(0, 5), st.integers(0, 70), st.integers(1, 25), st.integers(0, 2**31))
def test_packed_integers_come_back_and_take_their_bits(rows: int, k: int, bits: int, seed: int) -> None:
    values = torch.randint(0, 1 << bits, (rows, k), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(values, bits)
    assert packed.shape == (rows, math.ceil(k * bits / 8)) and torch.equal(unpack_bits(packed, k, bits), values.int())
    for row, number in zip(values.tolist(), packed.tolist(), strict=True):  # the definition, one value at a time
        whole = int.from_bytes(bytes(number), "little")
        assert row == [whole >> j * bits & (1 << bits) - 1 for j in range(k)]


def wide(rows: int, k: int, vocabulary: int, key: str = "a", seed: int = 0) -> Sample:
    """Rows peaked as a reasoning model's: most of the mass on one id, the others far below."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, min(vocabulary, 4 * k), generator=gen).topk(k).indices * (vocabulary // (4 * k) or 1)
    logits = torch.randn(rows, k + 1, generator=gen) * 4
    logits[:, 0] += 8 * torch.rand(rows, generator=gen)
    logp = torch.log_softmax(logits, 1)
    tokens = torch.randint(0, vocabulary, (rows,), generator=gen)
    mass = torch.logsumexp(logp[:, :k] / 2, 1) - torch.logsumexp(logp / 2, 1)
    return Sample(key, torch.arange(9), tokens, ids.int(), logp[:, :k], logp[:, k], mass)


@pytest.mark.parametrize(
    ("vocabulary", "bits"),
    [(1, 1), (2**17 - 1, 17), (2**17, 18), (151_665, 18), (2**18 - 1, 18), (2**18, 19)],
)
def test_every_id_of_the_vocabulary_and_the_empty_place_fit_into_its_bits(
    tmp_path: Path, vocabulary: int, bits: int
) -> None:
    header = replace(HEADER, vocabulary=vocabulary, top_k=3)
    assert header.id_bits == bits
    one = sample("a", 1, 2)
    one.topk_ids[:] = torch.tensor([[vocabulary - 1, 0, -1], [-1, -1, -1]])
    one.topk_logprobs[one.topk_ids < 0] = -math.inf
    write_shard(tmp_path / shard_name(0), header, [one])
    got = read_labels(tmp_path).sample(0)
    assert torch.equal(got.topk_ids, one.topk_ids)
    assert torch.equal(got.topk_logprobs == -math.inf, one.topk_ids < 0)
    one.topk_ids[0, 0] = vocabulary
    with pytest.raises(ValueError, match="outside the vocabulary"):
        write_shard(tmp_path / shard_name(0), header, [one])


def test_a_completion_token_takes_284_bytes_at_k_64_as_the_plan_says_and_288_with_everything(tmp_path: Path) -> None:
    header = replace(HEADER, vocabulary=151_665, top_k=64)
    path = tmp_path / shard_name(0)
    samples = [wide(500, 64, 151_665, f"{i:064x}", i) for i in range(32)]
    write_shard(path, header, samples)
    assert label_bytes(64, 151_665) == 284 < path.stat().st_size / (32 * 500) <= 288
    tensors = load_file(path)
    rows = [t for t in tensors.values() if len(t) == 32 * 500]
    assert len(rows) == 5 and sum(t[0].nbytes for t in rows) == 284
    assert label_bytes(64, 151_665, 8) == 220
    for top_k, vocabulary in ((0, 50), (3, 50), (5, 2**17), (64, 50)):
        k = min(top_k, vocabulary)
        one = wide(7, k, vocabulary) if k not in (0, 50) else sample("a", 1, 7, k)
        for bits in (16, 8):
            write_shard(path, replace(HEADER, vocabulary=vocabulary, top_k=k, logprob_bits=bits), [one])
            named = load_file(path).items()
            stored = sum(t.nbytes for name, t in named if "prompt" not in name and "offsets" not in name)
            assert stored == 7 * label_bytes(top_k, vocabulary, bits)


@pytest.mark.parametrize(
    ("bits", "worst", "mean", "of_loss"), [(16, 0.008, 0.002, 1e-5), (8, 0.13, 0.04, 1e-3)]
)
def test_rounding_of_log_probabilities_stays_within_what_is_promised(
    tmp_path: Path, bits: int, worst: float, mean: float, of_loss: float
) -> None:
    header = replace(HEADER, vocabulary=2_000, top_k=64, logprob_bits=bits)
    exact = wide(2_000, 64, 2_000)
    write_shard(tmp_path / shard_name(0), header, [exact])
    labels = read_labels(tmp_path)
    got = labels.sample(0)
    error = (got.topk_logprobs - exact.topk_logprobs).abs()
    assert labels.rounding is not None and labels.rounding.values == error.numel()
    assert math.isclose(labels.rounding.mean, error.mean().item(), rel_tol=1e-4)
    assert math.isclose(labels.rounding.worst, error.max().item(), rel_tol=1e-6)
    size = exact.topk_logprobs.abs()
    bound = size * 2**-11 + 1e-7 if bits == 16 else (40 * size).sqrt() / 255 + 2e-4
    assert bool((error <= bound).all())
    assert error.max() < worst and error.mean() < mean
    gen = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(2_000, 8, generator=gen), torch.randn(2_000, 8, generator=gen)
    for t in (1.0, 2.0):
        values = [
            distillation_loss(
                hidden, head, s.completion_ids, s.topk_ids, s.topk_logprobs, alpha=1.0, temperature=t,
                token_count=2_000, log_tail_mass=s.log_tail_mass, log_mass_at_t=s.log_mass_at_t,
            ).item()
            for s in (exact, got)
        ]  # fmt: skip
        print(bits, error.max().item(), error.mean().item(), t, values[1] / values[0] - 1)
        assert math.isclose(*values, rel_tol=of_loss)


def test_rows_are_found_wherever_the_shards_were_cut(tmp_path: Path) -> None:
    samples = [sample(f"{i * 7 % 10}", 2, i % 4) for i in range(10)]  # some have no row at all
    rows = torch.randint(0, sum(len(s.completion_ids) for s in samples), (50,))
    found = []
    for cut in (1, 3, 10):
        folder = tmp_path / str(cut)
        folder.mkdir()
        for i in range(0, 10, cut):
            write_shard(folder / shard_name(i), HEADER, samples[i : i + cut])
        labels = read_labels(folder)
        found.append(labels.soft_rows(rows))
        assert torch.equal(labels.log_tail_masses(), torch.cat([labels.sample(i).log_tail_mass for i in range(10)]))
    expected = torch.cat([s.topk_ids for s in sorted(samples, key=lambda s: s.key)])
    for ids, logprobs, tail, mass in found:
        assert torch.equal(ids, expected[rows]) and ids.dtype == torch.int32
        assert logprobs.dtype == tail.dtype == mass.dtype == torch.float32
        assert torch.equal(logprobs, found[0][1]) and torch.equal(tail, found[0][2]) and torch.equal(mass, found[0][3])
    assert labels.soft_rows(rows[:0])[0].shape == (0, 3)
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError):
            labels.soft_rows(torch.tensor([outside]))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_shard_is_the_same_to_the_byte_however_many_samples_are_packed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    samples = [sample(f"{i}", 2, i * 3 % 7) for i in range(10)]
    made = []
    for rows in (1, 6, 2048):
        monkeypatch.setattr("tasks.labels.PACKED_ROWS", rows)
        write_shard(tmp_path / shard_name(0), replace(HEADER, logprob_bits=bits), samples)
        made.append((tmp_path / shard_name(0)).read_bytes())
    assert made[0] == made[1] == made[2]
    assert torch.equal(read_labels(tmp_path).sample(9).topk_ids, samples[9].topk_ids)


def test_opening_labels_does_not_read_the_soft_ones(tmp_path: Path) -> None:
    """Two shards of 64 MB: in a fresh process, opening them and reading a few rows takes a small part of that."""
    header = replace(HEADER, vocabulary=151_665, top_k=64)
    big = wide(1_000, 64, 151_665)
    big = Sample("a", big.prompt_ids, *(t.repeat(230, *[1] * (t.dim() - 1)) for t in astuple(big)[2:]))
    for i in range(2):
        write_shard(tmp_path / shard_name(i), header, [replace(big, key=str(i))])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 128e6
    code = """
import sys, pathlib, psutil, torch
from tasks.labels import read_labels
memory = lambda: psutil.Process().memory_info().rss
read_labels(pathlib.Path(sys.argv[1])).soft_rows(torch.arange(9))  # what the first use loads
before = memory()
labels = read_labels(pathlib.Path(sys.argv[1]))
labels.soft_rows(torch.arange(1000))
print(memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32e6


def test_shards_whose_tensors_do_not_fit_together_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    write_shard(path, HEADER, [sample("a", 1, 4)])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for name in ("topk_ids", "topk_logprobs", "log_tail_mass", "log_mass_at_t", "completion_offsets"):
        tensors = load_file(path)
        save_file({**tensors, name: tensors[name][:-1].clone()}, tmp_path / shard_name(1), metadata=metadata)
        with pytest.raises(TaskError, match="do not fit together"):
            read_labels(tmp_path)


def tiny_model(seed: int = 0) -> tuple[Any, Any]:
    tokenizer = models.tiny_tokenizer()
    return models.from_architecture(TINY, tokenizer, seed=seed).eval(), tokenizer


def test_each_row_is_the_distribution_of_its_own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against logits of one unpadded sequence at a time, with uneven lengths, chunks of few rows and T = 2."""
    model, tokenizer = tiny_model()
    monkeypatch.setattr(label, "SCORE_ELEMENTS", 3 * len(tokenizer))
    pairs = [([5, 6, 7], [8, 9]), ([1], [2, 3, 4, 5, 6]), ([9, 8], [7])]
    for (prompt, completion), (ids, logp, tail, mass) in zip(
        pairs, score(model, pairs, 4, 2.0, real_vocabulary=len(tokenizer)), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0]
        for j in range(len(completion)):
            exact = torch.log_softmax(logits[len(prompt) + j - 1], 0)
            top = exact.topk(4)
            assert ids[j].tolist() == top.indices.tolist()
            torch.testing.assert_close(logp[j], top.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tail[j].exp(), 1 - top.values.exp().sum(), rtol=1e-4, atol=1e-5)
            at_t = torch.softmax(logits[len(prompt) + j - 1] / 2, 0)[top.indices].sum().log()
            torch.testing.assert_close(mass[j], at_t, rtol=1e-4, atol=1e-5)


def test_the_tail_is_exact_where_one_minus_the_sum_is_all_rounding() -> None:
    hidden, head = torch.tensor([[30.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    _, _, tail, _ = label._top(hidden, head, 1, 1.0, 3)
    assert math.isclose(tail.item(), math.log(2) - 30, rel_tol=1e-5)


def test_rows_of_a_wider_head_are_never_labels_but_count_as_tail() -> None:
    hidden, head = torch.eye(1), torch.tensor([[1.0], [2.0], [9.0]])  # the third id is no token
    ids, logp, tail, _ = label._top(hidden, head, 2, 1.0, 2)
    assert ids.tolist() == [[1, 0]]
    assert math.isclose(logp.exp().sum().item() + tail.exp().item(), 1.0, rel_tol=1e-6) and tail > -0.01


def test_the_teacher_itself_as_student_has_no_loss_on_its_own_stored_labels(pretrained: Path) -> None:
    """Through generation, scoring, storing and reading; shifted by one it does. However the answers were sampled."""
    run_stage(pretrained, "cold", "label", replace(LABEL, temperature=0.5, top_p=0.8))
    labels = read_labels(pretrained / "cold" / "done")
    assert labels.header.top_k == 4 and labels.header.temperature == 2.0
    teacher = models.load_stage(pretrained / "pretrain" / "done", context(pretrained, "x", "label", LABEL),
                                dtype=torch.float32).model.eval()  # fmt: skip
    for shift, small in ((0, True), (1, False)):
        total, count = 0.0, 0
        for i in range(len(labels)):
            s = labels.sample(i)
            ids = torch.cat([s.prompt_ids, s.completion_ids]).long()[None]
            first = len(s.prompt_ids) - 1
            with torch.no_grad():
                hidden = models.hidden_states(teacher, ids)[0, first : first + len(s.completion_ids)]
                total += distillation_loss(
                    hidden.roll(shift, 0), models.head_weight(teacher), s.completion_ids.long(), s.topk_ids,
                    s.topk_logprobs.float(), alpha=1.0, temperature=2.0, token_count=1,
                    log_tail_mass=s.log_tail_mass, log_mass_at_t=s.log_mass_at_t,
                ).item()  # fmt: skip
            count += len(s.completion_ids)
        assert (total / count < 1e-4) is small


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
def test_training_finds_nothing_to_learn_for_the_teacher_itself(pretrained: Path, t: float, packed: bool) -> None:
    """From the stored labels through training's own batches, shuffled, of uneven lengths; one place off it would."""
    run_stage(pretrained, f"own-{t:g}", "label", replace(LABEL, label_temperature=t))
    labels = read_labels(pretrained / f"own-{t:g}" / "done")
    examples = train.Examples.of(labels, range(len(labels)))
    ctx = context(pretrained, "x", "label", LABEL)
    teacher = models.load_stage(pretrained / "pretrain" / "done", ctx, dtype=torch.float32).model
    if packed:
        assert models.use_packing(teacher)
    how = train.Fit(
        steps=1, batch_size=8, micro_batch=8, learning_rate=1.0, alpha=1.0, temperature=t, use_mass_at_t=True,
        precision="fp32",
    )  # fmt: skip
    picked = torch.tensor([4, 0, 3, 3, 1])
    batch = examples.batch(picked, soft=True, packed=packed)
    count = len(batch.labels)
    loss = train.loss_of(teacher, batch, how, count).total
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in teacher.parameters() if p.grad is not None)
    assert abs(loss.item()) < 1e-4 and largest < 1e-3
    assert batch.soft is not None
    shifted = replace(batch, soft=tuple(part.roll(1, 0) for part in batch.soft))
    assert train.loss_of(teacher, shifted, how, count).total > 0.01


def test_the_header_names_the_teacher_with_its_revision(pretrained: Path) -> None:
    folder = str(pretrained / "pretrain" / "done" / models.MODEL_FOLDER)
    for source, name in (
        (ModelSource(stage="pretrain"), "stage:pretrain"),
        (ModelSource(path=folder), folder),
        (ModelSource(path=folder, revision="abc123"), f"{folder}@abc123"),
    ):
        settings = replace(LABEL, teacher=source)
        ctx = context(pretrained, "x", "label", settings)
        made = label._Teacher(ctx, settings, torch.device("cpu"), Crew(pretrained))
        assert made.header().teacher == name


def test_the_thinking_is_opened_in_the_prompt_and_stays_in_the_labels(pretrained: Path) -> None:
    run_stage(pretrained, "label", "label", LABEL)
    labels = read_labels(pretrained / "label" / "done")
    tokenizer = models.load_tokenizer(ModelSource(path=str(pretrained / "label" / "done" / "tokenizer")))
    for i in range(len(labels)):
        text = tokenizer.decode(labels.sample(i).prompt_ids, skip_special_tokens=False)
        assert text.startswith("<|user|>") and text.endswith("<|assistant|><think>\n")
    assert labels.header.ordinary_sha256 == models.vocabulary_hashes(tokenizer).ordinary


class Scripted:
    """A generator that answers as it is told, by call."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self._tokenizer, self._texts, self.calls = tokenizer, texts, 0

    def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        done = []
        for prompt in prompts:
            a, b = self._tokenizer.decode(prompt).split("<|user|>")[1].split("<|assistant|>")[0].split("+")
            text = self._texts[self.calls % len(self._texts)].replace("SUM", str(int(a) + int(b)))
            self.calls += 1
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            cut = text.endswith("...")
            done.append(Completion(ids if cut else [*ids, self._tokenizer.eos_token_id], "length" if cut else "stop"))
        return done


def test_ids_stay_as_the_teacher_wrote_them_where_its_text_would_be_cut_otherwise(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models.tiny_tokenizer()
    halves = [models.byte_vocabulary(tokenizer)[bytes([one])] for one in (0xC3, 0xFF, 0xA9)]  # no text has these
    written = [*halves, tokenizer.eos_token_id]
    assert tokenizer.encode(tokenizer.decode(written)) != written

    class Odd:
        def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
            return [Completion(list(written), "stop")] * len(prompts)

    monkeypatch.setattr(label._Teacher, "generator", lambda self: Odd())
    run_stage(pretrained, "odd", "label", replace(LABEL, verify="none"))
    labels = read_labels(pretrained / "odd" / "done")
    assert len(labels) == 20
    assert all(labels.tokens(i)[1].tolist() == written for i in range(20))


def test_training_reads_prompt_and_answer_as_they_were_written_with_the_thinking_and_the_end(
    pretrained: Path, scripted: Any
) -> None:
    scripted("w1\n</think>SUM")
    run_stage(pretrained, "thought", "label", LABEL)
    labels = read_labels(pretrained / "thought" / "done")
    tokenizer = models.tiny_tokenizer()
    examples = train.Examples.of(labels, range(len(labels)))
    for i in range(len(labels)):
        prompt, completion = labels.tokens(i)
        row = examples.ids[examples.offsets[i] : examples.offsets[i + 1]]
        assert row.tolist() == [*prompt.tolist(), *completion.tolist()]
        assert "<|assistant|><think>\nw1\n</think>" in tokenizer.decode(row, skip_special_tokens=False)
        learnt = examples.batch(torch.tensor([i]), soft=True).labels
        assert learnt.tolist() == completion.tolist() and learnt[-1] == tokenizer.eos_token_id


def test_a_generated_answer_holds_its_end_of_sequence_and_nothing_behind_it() -> None:
    model, tokenizer = tiny_model()
    made = TransformersGenerator(model, tokenizer, 4)
    end = tokenizer.eos_token_id
    assert made._until_end([5, end, 6, end]) == Completion([5, end], "stop")
    assert made._until_end([5, 6]) == Completion([5, 6], "length")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_head_wider_than_the_vocabulary_stays_as_wide_through_training_and_export(
    pretrained: Path, tmp_path: Path, method: str
) -> None:
    """As Qwen2.5's is: rows without a token are neither cut off nor added, or GGUF files would not load."""
    run_stage(pretrained, "label", "label", LABEL)
    tokenizer = models.tiny_tokenizer()
    wide_one = models.from_architecture(TINY, tokenizer, seed=1)
    rows = len(tokenizer) + 10
    wide_one.resize_token_embeddings(rows)
    models.save(tmp_path, wide_one, tokenizer)
    settings = TrainSettings(
        student=ModelSource(path=str(tmp_path)), labels="label", method=method, steps=2, micro_batch=8,
        learning_rate=1e-2, temperature=2.0,
    )  # fmt: skip
    run_stage(pretrained, f"wide-{method}", "train", settings)
    run_stage(pretrained, f"out-{method}", "export", ExportSettings(f"wide-{method}"))
    folder = pretrained / f"out-{method}" / "done" / "hf"
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.config.vocab_size == rows == len(made.get_input_embeddings().weight) == len(models.head_weight(made))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*texts: str) -> Scripted:
        made = Scripted(models.tiny_tokenizer(), *texts)
        monkeypatch.setattr(label._Teacher, "generator", lambda self: made)
        return made

    return use


def test_answers_that_go_round_in_circles_are_marked_and_counted(pretrained: Path, scripted: Any) -> None:
    scripted("w\n</think>SUM", "w" * 30 + "\n</think>SUM", "w" * 90, "SUM" + "ab" * 20)
    result = run_stage(pretrained, "circles", "label", replace(LABEL, keep="all", samples=20))
    assert result is not None and result["loop_share"] == 0.5
    rows = [json.loads(line) for p in sorted((pretrained / "circles" / "done").glob("generated-*"))
            for line in p.read_text().splitlines()]  # fmt: skip
    assert {row["text"][-4:] for row in rows if row["loops"]} == {"wwww", "abab"}


def test_wrong_and_cut_answers_are_dropped_and_counted_by_reason(pretrained: Path, scripted: Any) -> None:
    scripted("w\n</think>SUM", "w\n</think>0", "SUM", "w...")
    result = run_stage(pretrained, "judged", "label", replace(LABEL, keep="correct", samples=20))
    assert result is not None
    assert (result["prompts"], result["generated"], result["kept"], result["thoughts"]) == (20, 20, 5, 5)
    assert result["dropped"] == {"wrong": 5, "no_answer": 5, "cut": 5}
    assert result["cut_share"] == 0.25
    assert all(s["reason"] == "ok" and "</think>" in s["text"] for s in result["samples"][:5])
    kept = read_labels(pretrained / "judged" / "done")
    eos = models.tiny_tokenizer().eos_token_id
    assert all(kept.sample(i).completion_ids[-1] == eos for i in range(len(kept)))
    assert result["tokens"] == len(kept.completion_ids)
    rows = [json.loads(line) for p in sorted((pretrained / "judged" / "done").glob("generated-*"))
            for line in p.read_text().splitlines()]  # fmt: skip
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_shortest_keeps_one_right_answer_a_prompt(pretrained: Path, scripted: Any) -> None:
    scripted("long long\n</think>SUM", "s\n</think>SUM", "\n</think>0")
    settings = replace(LABEL, keep="shortest", samples=4, samples_per_prompt=3, batch_size=3)
    result = run_stage(pretrained, "shortest", "label", settings)
    assert result is not None and result["kept"] == 4 and result["dropped"] == {"longer": 4, "wrong": 4}
    labels = read_labels(pretrained / "shortest" / "done")
    assert {len(labels.sample(i).completion_ids) for i in range(4)} <= {6, 7}  # "s", newline, mark, 2-3 digits, end


def test_labelling_pauses_when_too_many_answers_are_cut(pretrained: Path, scripted: Any) -> None:
    made = scripted("w...", "w\n</think>SUM")
    with pytest.raises(TaskError, match="50% of 32 answers were cut off at 6 tokens") as raised:
        run_stage(pretrained, "cut", "label", replace(LABEL, samples=400, max_cut_share=0.3))
    assert "max_new_tokens" in raised.value.hint
    assert made.calls == 32  # and not 400


def test_nothing_kept_is_said_with_the_reasons(pretrained: Path, scripted: Any) -> None:
    scripted("w\n</think>0")
    with pytest.raises(TaskError, match=r"none of 20 answers was kept \(20 wrong\)"):
        run_stage(pretrained, "none", "label", replace(LABEL, keep="correct"))


def test_a_resumed_stage_repeats_no_kept_shard_and_ends_the_same(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stage(pretrained, "whole", "label", LABEL)
    generated: list[int] = []
    real = TransformersGenerator.generate

    def counting(self: Any, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        generated.append(len(prompts))
        if sum(generated) == 16:
            raise KeyboardInterrupt
        return real(self, prompts, seed=seed)

    monkeypatch.setattr(TransformersGenerator, "generate", counting)
    with pytest.raises(KeyboardInterrupt):
        run_stage(pretrained, "broken", "label", LABEL)
    result = run_stage(pretrained, "broken", "label", LABEL, attempt=2)
    assert generated == [8, 8, 8, 4]  # the second batch was repeated, the first was not
    assert whole is not None and result is not None
    for name in ("prompts", "generated", "kept", "dropped", "tokens", "mass_inside_mean", "samples"):
        assert result[name] == whole[name]
    one, two = (read_labels(pretrained / stage / "done") for stage in ("whole", "broken"))
    assert one.keys == two.keys and torch.equal(one.completion_ids, two.completion_ids)
    rows = torch.arange(len(one.completion_ids))
    for a, b in zip(one.soft_rows(rows), two.soft_rows(rows), strict=True):
        assert torch.equal(a, b)


def test_a_killed_stage_loses_one_batch_at_most_and_ends_the_same(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the fifth of six batches, which is the second of the second shard."""
    whole_settings = replace(LABEL, samples=24, batch_size=4)
    whole = run_stage(pretrained, "batches", "label", whole_settings)
    calls: list[int] = []
    real = TransformersGenerator.generate

    def counting(self: Any, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, prompts, seed=seed)

    monkeypatch.setattr(TransformersGenerator, "generate", counting)
    with pytest.raises(KeyboardInterrupt):
        run_stage(pretrained, "batches-broken", "label", whole_settings)
    result = run_stage(pretrained, "batches-broken", "label", whole_settings, attempt=2)
    assert len(calls) == 6 + 1 and calls[3] == calls[4]  # the batch that was cut short, and no other, was asked twice
    assert whole is not None and result is not None
    one, two = (read_labels(pretrained / stage / "done") for stage in ("batches", "batches-broken"))
    assert one.keys == two.keys and torch.equal(one.completion_ids, two.completion_ids)


def test_every_token_of_a_batch_counts_as_progress_and_a_stop_is_answered_at_the_next(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of long answers takes longer than what counts as a stall, and than what is left after a stop."""
    ctx = context(pretrained, "tokens", "label", LABEL)
    label.run(ctx, replace(LABEL, samples=8))
    places = [done for phase, done in ctx.phases if phase == "generate"]
    assert len(set(places)) >= LABEL.max_new_tokens and all(b >= a - 1e-6 for a, b in pairwise(places))

    stopped = context(pretrained, "stopped", "label", LABEL)
    looks = iter([False] * 20)  # the first batch looks six times for its tokens, and a few times more
    monkeypatch.setattr(type(stopped), "stopping", property(lambda self: next(looks, True)))
    asked: list[int] = []
    real = TransformersGenerator.generate

    def counting(self: Any, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        asked.append(seed)
        done = real(self, prompts, seed=seed)
        asked.append(-1)
        return done

    monkeypatch.setattr(TransformersGenerator, "generate", counting)
    with pytest.raises(Stopped):
        label.run(stopped, replace(LABEL, samples=32, shard_size=32))
    assert asked[-1] != -1  # in the middle of a batch
    assert stopped.checkpoints[-1] == 8 * asked.count(-1)  # whose answers are all kept

    late = context(pretrained, "late", "label", LABEL)
    checked = property(lambda self: sum(done > 1 for phase, done in self.phases if phase == "generate") >= 8)
    monkeypatch.setattr(type(stopped), "stopping", checked)
    with pytest.raises(Stopped):  # after the last answer of the only batch was checked
        label.run(late, replace(LABEL, samples=8))
    assert late.checkpoints == [8]
    asked.clear()
    monkeypatch.setattr(type(stopped), "stopping", False)
    result = run_stage(pretrained, "late", "label", replace(LABEL, samples=8), attempt=2)
    assert result is not None and result["generated"] == 8 and asked == []


def test_loading_is_a_phase_in_which_the_network_counts_and_every_scored_batch_moves(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def progress(self: Any, phase: str, *args: Any, declared: bool = False, **more: Any) -> None:
        told.append(phase if declared else f"{phase} {args[0]:.2f}")

    ctx = context(pretrained, "loading", "label", LABEL)
    monkeypatch.setattr(type(ctx), "progress", progress)
    monkeypatch.setattr(label, "SCORE_TOKENS", 20)
    done = Completion([9], "stop")
    monkeypatch.setattr(TransformersGenerator, "generate", lambda self, prompts, *, seed: [done] * len(prompts))
    label.run(ctx, replace(LABEL, samples=8))
    assert told[:2] == ["prepare", "load"] and told.count("load") == 1
    assert len({one for one in told if one.startswith("score 0.")}) >= 2


@pytest.mark.parametrize(
    ("free_gib", "rows"),
    [
        (60.0, 73),  # 2 x 2 bytes x 28 layers x 4 heads x 128 x 9,216 tokens = 0.492 GiB a row; 0.6 x 60 = 36 GiB
        (1.0, 1),  # one row is tried whatever there is
        (1e6, 256),
    ],
)
def test_where_transformers_take_vllms_place_a_batch_has_room_for_its_cache(free_gib: float, rows: int) -> None:
    qwen_7b = SimpleNamespace(num_hidden_layers=28, num_key_value_heads=4, num_attention_heads=28, hidden_size=3584)
    assert rows_that_fit(qwen_7b, int(free_gib * 2**30), 9216, 256) == rows


def test_the_result_says_what_wrote_the_answers(pretrained: Path) -> None:
    result = run_stage(pretrained, "engine", "label", LABEL)
    assert result is not None and result["engine"] == "transformers"


def test_a_shard_with_many_cut_answers_pauses_before_it_is_whole_once_chance_is_no_excuse(
    pretrained: Path, scripted: Any
) -> None:
    made = scripted("w...", "w\n</think>SUM")
    long = replace(LABEL, samples=400, shard_size=400, batch_size=8, max_cut_share=0.3)
    with pytest.raises(TaskError, match="50% of 32 answers were cut off"):
        run_stage(pretrained, "cut-early", "label", long)
    assert made.calls == 32
    made = scripted("w...", "w\n</think>SUM", "w\n</think>SUM")  # a third: over the limit, but 32 do not prove it
    with pytest.raises(TaskError, match="34% of 400 answers were cut off"):
        run_stage(pretrained, "cut-late", "label", long)


def test_answers_with_line_separators_inside_survive_a_resume(pretrained: Path, scripted: Any) -> None:
    scripted("one\u2028two\x85three\r\n</think>SUM")
    done = [run_stage(pretrained, "lines", "label", LABEL, attempt=attempt) for attempt in (1, 2)]
    assert done[0] is not None and done[1] is not None and done[0]["samples"] == done[1]["samples"]


def test_unfinished_answers_of_any_kind_are_never_labels(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Filtered:
        def generate(self, prompts: list[list[int]], *, seed: int) -> list[Completion]:
            return [Completion([5, 6], ("stop", "content_filter")[i % 2]) for i in range(len(prompts))]

    monkeypatch.setattr(label._Teacher, "generator", lambda self: Filtered())
    result = run_stage(pretrained, "filtered", "label", LABEL)
    assert result is not None and (result["kept"], result["dropped"]) == (10, {"content_filter": 10})


def test_labels_in_8_bit_are_half_as_wide_and_say_how_far_off_they_are(pretrained: Path) -> None:
    made = {}
    for bits in (16, 8):
        result = run_stage(pretrained, f"bits-{bits}", "label", replace(LABEL, logprob_bits=bits))
        labels = read_labels(pretrained / f"bits-{bits}" / "done")
        assert result is not None and labels.header.logprob_bits == bits
        made[bits] = (labels, result["logprob_error"])
    (exact, fine), (coarse, rough) = made[16], made[8]
    assert torch.equal(exact.completion_ids, coarse.completion_ids)
    rows = torch.arange(len(exact.completion_ids))
    gap = (exact.soft_rows(rows)[1] - coarse.soft_rows(rows)[1]).abs()
    assert 0 < fine["mean"] < fine["worst"] < 0.01 < rough["worst"] < 0.2  # the bound at -10 is 0.08
    assert math.isclose(gap.max().item(), rough["worst"], abs_tol=2 * fine["worst"])


def test_places_without_a_label_count_as_no_rounding_and_old_shards_tell_none(tmp_path: Path) -> None:
    one = sample("a", 1, 2)
    one.topk_ids[0], one.topk_logprobs[0] = -1, -math.inf
    write_shard(tmp_path / shard_name(0), replace(HEADER, logprob_bits=8), [one])
    found = read_labels(tmp_path).rounding
    assert found is not None and found.values == 3 and 0 < found.mean <= found.worst < 0.2
    with safe_open(tmp_path / shard_name(0), framework="pt") as file:
        told = json.loads(file.metadata()["kdcloud"])
    del told["rounding"]
    tensors = load_file(tmp_path / shard_name(0))
    save_file(tensors, tmp_path / shard_name(0), metadata={"kdcloud": json.dumps(told)})
    assert read_labels(tmp_path).rounding is None


def test_hard_labels_only_store_no_soft_ones(pretrained: Path) -> None:
    result = run_stage(pretrained, "hard", "label", replace(LABEL, top_k=0))
    assert result is not None and result["mass_inside_mean"] is None
    assert read_labels(pretrained / "hard" / "done").sample(0).topk_ids.shape[1] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"keep": "best"}, "keep: best is unknown"),
        ({"verify": "maths"}, "verify: maths is unknown"),
        ({"engine": "tgi"}, "engine: tgi is unknown"),
        ({"logprob_bits": 4}, "logprob_bits: 4 cannot be stored"),
        ({"engine": "vllm"}, "vLLM is not installed"),
        ({"samples_per_prompt": 2, "temperature": 0.0}, "one answer paid several times"),
        ({"teacher": ModelSource(architecture=TINY)}, "knows nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(pretrained: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        run_stage(pretrained, "refused", "label", replace(LABEL, **change))


def test_prompts_without_answers_cannot_be_checked_exactly(pretrained: Path) -> None:
    (pretrained / "open.jsonl").write_text('{"input": "why?"}\n')
    with pytest.raises(TaskError, match="no answer to check against: 'why"):
        run_stage(pretrained, "open", "label", replace(LABEL, prompts=DataSource("open.jsonl"), keep="correct"))


# --- tokenizers ------------------------------------------------------------------------------------------------------

BASE = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}


def tokenizer_with(specials: list[str], base: dict[str, int] = BASE, merges: list[Any] | None = None) -> Any:
    """A byte-level tokenizer over `base`, with added tokens behind it, the first of which ends a sequence."""
    merges = [("a", "b"), ("ab", "c")] if merges is None else merges
    return Qwen2Tokenizer(
        vocab=base, merges=merges, eos_token=specials[0], pad_token=specials[0], unk_token=specials[0],
        extra_special_tokens=specials[1:],
    )  # fmt: skip


def compatible(teacher: Any, student: Any, head_rows: int = 64) -> list[int]:
    hashes = models.vocabulary_hashes(teacher)
    return models.check_compatible(teacher, student, teacher_hash=hashes.ordinary, head_rows=head_rows)


def test_the_same_base_with_other_special_tokens_is_accepted_and_their_ids_are_named() -> None:
    teacher = tokenizer_with(["<end>", "<user>", "<think>"])
    student = tokenizer_with(["<|endoftext|>", "<user>", "<|box|>"])
    assert compatible(teacher, student) == [5, 7]  # 6 means the same to both
    one, two = models.vocabulary_hashes(teacher), models.vocabulary_hashes(student)
    assert one.ordinary == two.ordinary and one.special != two.special


def test_an_equal_tokenizer_needs_no_trained_rows() -> None:
    assert compatible(tokenizer_with(["<e>"]), tokenizer_with(["<e>"])) == []


def test_special_tokens_the_student_has_no_name_for_need_trained_rows_but_no_wider_head() -> None:
    teacher, student = tokenizer_with(["<e>", "<think>"]), tokenizer_with(["<e>"])
    assert compatible(teacher, student, head_rows=7) == [6]
    with pytest.raises(TaskError, match="head has 6 rows, the teacher's vocabulary needs 7"):
        compatible(teacher, student, head_rows=6)


@pytest.mark.parametrize(
    "base", [{**BASE, "abc": 2, "c": 4}, {**BASE, "x": 5}], ids=["two ids swapped", "one token more"]
)
def test_another_base_vocabulary_is_refused(base: dict[str, int]) -> None:
    with pytest.raises(TaskError, match="another base vocabulary") as raised:
        compatible(tokenizer_with(["<e>"]), tokenizer_with(["<e>"], base))
    assert "teacher's family" in raised.value.hint


def test_the_same_vocabulary_cut_by_other_merges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_PROBES", ("abcab",))
    with pytest.raises(TaskError, match="cut text differently"):
        compatible(tokenizer_with(["<e>"]), tokenizer_with(["<e>"], merges=[("a", "b")]))


def test_labels_of_another_tokenizer_than_the_one_beside_them_are_refused() -> None:
    with pytest.raises(TaskError, match="do not belong"):
        models.check_compatible(tokenizer_with(["<e>"]), tokenizer_with(["<e>"]), teacher_hash="0", head_rows=9)


def test_the_tiny_tokenizer_spells_any_text_and_loads_as_what_it_was_saved(tmp_path: Path) -> None:
    tokenizer = models.tiny_tokenizer()
    models.save(tmp_path, models.from_architecture(TINY, tokenizer, seed=0), tokenizer)
    again = models.load_tokenizer(ModelSource(path=str(tmp_path)))
    assert models.vocabulary_hashes(again) == models.vocabulary_hashes(tokenizer)
    for text in ("12+34", "é 蒸馏\n\n\t  x", "a</think>b"):
        ids = again.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert again.decode(ids) == text
    assert models.prompt_ids(again, "12+34") == models.prompt_ids(tokenizer, "12+34")
    assert models.opens_thinking(again) and again.padding_side == "left"
    past = again.apply_chat_template(
        [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "w</think>2"}], tokenize=False
    )
    assert past == "<|user|>1+1<|assistant|>2<|end|>"
