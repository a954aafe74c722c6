"""Is an engine's work seen while it writes, without what ends early standing for all, and can it be told to do less?"""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vllm_stand_in
from hypothesis import given
from hypothesis import strategies as st
from ml_support import FolderContext, context
from test_labels import LABEL, pretrained  # noqa: F401 (a fixture)

from tasks import evaluate, generate, label, models
from tasks.contract import DataSource, EvaluateSettings, ModelSource, Progress, Writing
from tasks.crew import Crew
from tasks.generate import Completion, VllmGenerator, lengths_so_far
from tasks.stage import Stopped

TOKENIZER = models.tiny_tokenizer()
END = TOKENIZER.eos_token_id
LONGEST = 2000


def written(length: int) -> list[int]:
    """The ids of an answer of so many tokens that ends by itself."""
    return [5] * (length - 1) + [END]


def engine(monkeypatch: pytest.MonkeyPatch, lengths: dict[int, int], **more: Any) -> VllmGenerator:
    """Answers of the length that belongs to the first id of a prompt."""
    vllm_stand_in.install(monkeypatch, lambda served: lambda ids, params: written(lengths[ids[0]]), **more)
    return VllmGenerator(ModelSource(path="/there"), TOKENIZER, LONGEST, longest_prompt=17)


def test_vllm_moves_with_every_step_and_is_not_asked_for_more_room_than_the_answers_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {1: [5], 2: [5, 5, END], 3: [5, 5]}
    asked: list[Any] = []

    def answering(served: vllm_stand_in.LLM) -> vllm_stand_in.Answer:
        return lambda ids, params: asked.append(params) or answers[len(ids)]  # type: ignore[func-returns-value]

    made = vllm_stand_in.install(monkeypatch, answering).made
    moved: list[float] = []
    generator = VllmGenerator(
        ModelSource(path="/there"), TOKENIZER, 3, longest_prompt=17, moved=lambda share, writing: moved.append(share)
    )
    assert made[0].room == 17 + 3
    for _ in range(2):
        assert generator.generate([[1], [1, 2], [1, 2, 3]], seed=3) == [
            Completion([5], "length"), Completion([5, 5, END], "stop"), Completion([5, 5], "length"),
        ]  # fmt: skip
    assert len(moved) == made[0].llm_engine.steps == 6
    # Log-probabilities of an engine carry the sampling temperature, or cost three quarters of its speed.
    assert [one.seed for one in asked] == [3, 4, 5] * 2
    assert not any("logprobs" in name for one in asked for name in vars(one))


def test_an_engine_tells_of_answers_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at once of six, of 10, 500 and four times 1000 tokens, looked at after every step."""
    lengths = {1: 10, 2: 500, 3: 1000, 4: 1000, 5: 1000, 6: 1000}
    monkeypatch.setattr(generate, "TELL_S", 0.0)
    generator, told = engine(monkeypatch, lengths, at_once=4), list[tuple[float, Writing]]()
    generator._moved = lambda share, writing=None, /: told.append((share, writing))  # type: ignore[arg-type]
    generator.generate([[i] for i in range(1, 7)], seed=0)
    shares = [share for share, _ in told]
    assert 0 < shares[0] < 0.01 and shares[-1] == 1.0
    _, middle = told[400]
    assert (middle.answers, middle.ended, middle.flight, middle.steps) == (6, 1, 4, 401)
    assert 4 * 401 - 4 * generate.STREAM_TOKENS <= middle.tokens <= 4 * 401
    assert middle.going_on == pytest.approx(4 / 5) and middle.longest <= 401
    last = told[-1][1]
    assert (last.ended, last.going_on, last.tokens) == (6, 0.0, 4510) and last.length == pytest.approx(4510 / 6)


@pytest.mark.parametrize(
    ("ended", "going", "wanted"),
    [
        ([], [], (0.0, 1.0, 0)),
        ([], [7, 7], (7.0, 1.0, 7)),
        ([2, 4], [], (3.0, 0.0, 4)),
        ([2], [4], (3.0, 0.5, 4)),  # all live to 2, half of them on to 4
        ([2, 6], [4, 0], (2 + 2 * 2 / 3 + 2 * 2 / 3, 0.0, 6)),  # who was only seen to 4 counts until then
    ],
)
def test_lengths_so_far(ended: list[int], going: list[int], wanted: tuple[float, float, int]) -> None:
    assert lengths_so_far(ended, going) == pytest.approx(wanted)


@given(st.integers(0, 2**31), st.sampled_from([600.0, 1500.0]))
def test_answers_that_end_first_do_not_pass_for_all(seed: int, mean: float) -> None:
    """Of 64 answers at once out of 2,000; what has ended by then is far shorter than what is written."""
    rng = random.Random(seed)
    lengths = [1 + int(rng.lognormvariate(0.0, 0.8) * mean) for _ in range(2000)]
    places, ended, going = [0.0] * 64, list[int](), list[int]()
    for length in lengths:
        at = min(range(64), key=lambda i: places[i])
        began, places[at] = places[at], places[at] + length
        if began < 2 * mean:
            (ended if places[at] <= 2 * mean else going).append(int(min(length, 2 * mean - began)))
    found, share, longest = lengths_so_far(ended, going)
    whole = statistics.fmean(min(length, longest) for length in lengths)
    assert found == pytest.approx(whole, rel=0.35)
    assert statistics.fmean(ended) < found and 0.0 <= share < 0.5


# --- doing less


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (5, [0, 1, 2, 3, 4]),  # 5 has not begun
        (2, [0, 3]),  # 3 has ended: it is not taken back; of those in the middle the last ones go
        (0, [3]),
        (9, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_is_not_wanted_any_more_is_dropped_from_the_end_and_what_has_ended_stays(
    most: int, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count(1)
    now = [0]
    generator = engine(
        monkeypatch, {1: 300, 2: 300, 3: 300, 4: 20, 5: 300, 6: 300}, at_once=4,
        stepping=lambda: now.__setitem__(0, next(steps)),
    )  # fmt: skip
    found = dict(generator.stream([[i] for i in range(1, 7)], seed=0, most=lambda: most if now[0] > 50 else None))
    assert sorted(found) == kept and found[3] == Completion(written(20), "stop")
    assert len(vllm_stand_in.LLM.made[0].llm_engine.aborted) == 6 - len(kept)
    assert dict(generator.stream([[4]], seed=0)).keys() == {0}  # the engine is there for what comes next


class Telling(FolderContext):
    """Keeps what progress says, and is told a limit after so many steps of the engine."""

    def progress(self, phase: str, done: float = 0, total: float | None = None, *args: Any, **more: Any) -> None:
        super().progress(phase, done, total, *args, **more)
        more.pop("declared", None)
        self.said.append(Progress(phase, 0, done, total, numbers=more))


def served(
    root: Path, name: str, settings: Any, monkeypatch: pytest.MonkeyPatch, *, limit: tuple[int, float] | None = None,
    stop_at: int | None = None, attempt: int = 1, at_once: int = 4,
) -> tuple[Telling, list[vllm_stand_in.LLM]]:  # fmt: skip
    """A label stage's context whose engine answers with 20 to 59 tokens, and that is told a limit in the middle."""
    ctx = context(root, name, "label", settings, attempt=attempt)
    ctx.__class__ = Telling
    ctx.said = []  # type: ignore[attr-defined]
    steps = itertools.count(1)

    def stepping() -> None:
        step = next(steps)
        if limit is not None and step == limit[0]:
            ctx.limit = limit[1]
        if step == stop_at:
            ctx._left = 0

    def answering(llm: vllm_stand_in.LLM) -> vllm_stand_in.Answer:
        return lambda ids, params: written(20 + sum(ids) % 40)

    made = vllm_stand_in.install(monkeypatch, answering, stepping=stepping, at_once=at_once).made
    monkeypatch.setattr(generate, "find_spec", lambda name: name)
    monkeypatch.setattr(generate, "TELL_S", 0.0)
    return ctx, made  # type: ignore[return-value]


ONE_SHARD = replace(LABEL, engine="vllm", batch_size=256, shard_size=256, max_new_tokens=64)  # 20 prompts


def test_a_single_shard_is_seen_while_it_is_written(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    ctx, made = served(pretrained, "seen", ONE_SHARD, monkeypatch)
    label.run(ctx, ONE_SHARD)
    told = [one for one in ctx.said if one.phase == "generate"]
    assert [a.done < b.done for a, b in itertools.pairwise(told)].count(False) <= 1  # the last word: it is at its end
    assert told[0].done < 0.1 and told[-1].done == told[-1].total == 1.0
    assert len(told) > made[0].llm_engine.steps > 100
    halfway = next(one for one in told if one.done > 0.5)
    writing = Writing.of(halfway)
    assert writing is not None and (writing.answers, writing.before, writing.later) == (20, 0, 0)
    assert writing.tokens > 300 and halfway.numbers["tokens_per_s"] > 0


def test_a_shard_that_is_told_to_end_early_keeps_what_is_done_and_what_was_begun_first(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """Four at once of 20: nine are wanted, which is told when some have ended. Prompts differ in length."""
    real = models.prompt_ids
    monkeypatch.setattr(models, "prompt_ids", lambda tok, text: [5] * (sum(map(ord, text)) % 7) + real(tok, text))
    ctx, made = served(pretrained, "early", ONE_SHARD, monkeypatch, limit=(70, 9.5 / 256))
    result = label.run(ctx, ONE_SHARD)
    rows = label._rows(ctx.out / "generated-00000.jsonl")
    assert len(rows) == result["generated"] == 9 and result["limited"] == {"planned": 20, "done": 9}
    chosen = label._choose(ctx.data(ONE_SHARD.prompts), ONE_SHARD)
    assert {row["key"] for row in rows} == {row["key"] for row in chosen[:9]}  # whatever the lengths of their answers
    assert len(made[0].llm_engine.aborted) == 11
    last = [one for one in ctx.said if one.phase == "generate"][-1]
    assert last.done == last.total == 9.5 / 256
    again, made = served(pretrained, "early", ONE_SHARD, monkeypatch, attempt=2)
    assert label.run(again, ONE_SHARD)["generated"] == 9 and not made  # nobody tells this one


def test_a_limit_in_a_later_shard_leaves_those_before_it_whole(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811,E501
    settings = replace(ONE_SHARD, shard_size=8, batch_size=8, samples_per_prompt=2)
    ctx, _ = served(pretrained, "later", settings, monkeypatch, limit=(20, 1.25))
    result = label.run(ctx, settings)
    assert result["generated"] == 16 + 4 and result["limited"] == {"planned": 20, "done": 10}
    first = Writing.of(next(one for one in ctx.said if one.numbers))
    assert first is not None and (first.answers, first.before, first.later) == (8, 0, 8 + 24)


def test_a_stop_in_the_middle_of_a_batch_keeps_what_has_ended(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811,E501
    ctx, _ = served(pretrained, "stopped", ONE_SHARD, monkeypatch, stop_at=150)
    with pytest.raises(Stopped):
        label.run(ctx, ONE_SHARD)
    (had,) = ctx.checkpoints
    assert 4 <= had < 20
    again, _ = served(pretrained, "stopped", ONE_SHARD, monkeypatch, attempt=2)
    assert label.run(again, ONE_SHARD)["generated"] == 20
    first = Writing.of(next(one for one in again.said if one.numbers))
    assert first is not None and (first.answers, first.before) == (20 - had, had)


def test_transformers_are_told_between_batches(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    settings = replace(LABEL, shard_size=256, batch_size=4)
    ctx = context(pretrained, "plain-early", "label", settings)
    asked: list[int] = []

    def answer(self: Any, prompts: list[list[int]], *, seed: int) -> list[Completion]:
        asked.append(len(prompts))
        ctx.limit = 10 / 256
        return [Completion([9, END], "stop")] * len(prompts)

    monkeypatch.setattr(generate.TransformersGenerator, "generate", answer)
    assert label.run(ctx, settings)["generated"] == 10 and asked == [4, 4, 2]


def test_a_limit_told_while_labels_are_scored_ends_it_there(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    class Late(FolderContext):
        def progress(self, phase: str, done: float = 0, *args: Any, **more: Any) -> None:
            super().progress(phase, done, *args, **more)
            if phase == "score" and self.limit is None:
                self.limit = 2.0

    ctx = context(pretrained, "score-less", "label", LABEL)  # 20 prompts in shards of 8
    ctx.__class__ = Late
    result = label.run(ctx, LABEL)
    assert result["limited"] == {"planned": 20, "done": 16} and result["generated"] == 16


def test_an_evaluation_by_an_engine_is_seen_within_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of the second of three models; the one answer that warms the engine up says nothing."""
    monkeypatch.setattr(generate, "TELL_S", 0.0)
    settings = EvaluateSettings("train", None, DataSource("p"), "math", seeds=2)
    ctx = context(tmp_path, "evaluate", "evaluate", settings)
    ctx.__class__ = Telling
    ctx.said = []  # type: ignore[attr-defined]
    prompts = [[i] for i in range(1, 7)]
    written = evaluate._Written(ctx, settings, prompts, 1, 3, Crew(tmp_path))
    generator = engine(monkeypatch, dict.fromkeys(range(1, 7), 400), at_once=3)
    generator._moved = written.moved
    assert [len(seed) for seed in written.all(generator, len(prompts))] == [6, 6]
    told = [(one, Writing.of(one)) for one in ctx.said]  # type: ignore[attr-defined]
    assert all(1.0 <= a.done <= b.done <= 2.0 for (a, _), (b, _) in itertools.pairwise(told))
    first = next(writing for _, writing in told if writing is not None)
    assert (first.answers, first.before, first.later, first.steps) == (6, 0, 6, 1)
    half = next(writing for one, writing in told if one.done > 1.7)
    assert half is not None and (half.before, half.later) == (6, 0)
    assert sum(writing is None for _, writing in told) >= 400
