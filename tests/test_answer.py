"""The process that holds models: it loads only what fits, and says what an evaluation would have got."""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.answering import Answer, Asking, whole_student
from orchestrator.config import Home
from orchestrator.errors import StageFailed, UsageError
from orchestrator.student import Found, Model, Role
from tasks import answer, models
from tasks.answer import Words, at_hand, cached_values, fitting_dtype, need_bytes, weights_in
from tasks.bucket import commit_folder, open_bucket
from tasks.contract import Architecture, LoraSettings, ModelSource, TaskError, TrainSettings
from tasks.generate import TransformersGenerator
from tests.recorded_runs import recorded, stages

GIB = 2**30
FP32, BF16 = torch.float32, torch.bfloat16
WORK = answer.WORK_BYTES


@pytest.mark.parametrize(
    ("free", "dtype"),
    [
        (need_bytes(10**9, 10**6, FP32), FP32),
        (need_bytes(10**9, 10**6, FP32) - 1, BF16),
        (need_bytes(10**9, 10**6, BF16), BF16),
        (need_bytes(10**9, 10**6, BF16) - 1, None),
    ],
)
def test_a_model_is_loaded_in_what_fits_or_not_at_all(free: int, dtype: torch.dtype | None):
    assert fitting_dtype(10**9, 10**6, FP32, free) == dtype


def test_the_need_counts_weights_and_cache():
    assert need_bytes(1000, 0, FP32) == 4400 + WORK  # 1,000 x 4 B x 1.1
    assert need_bytes(0, 1000, BF16) == 2000 + WORK
    grouped = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 3}
    assert cached_values(grouped, 10) == 2 * 3 * 2 * 8 * 10  # keys and values, layers, heads, width, tokens
    assert cached_values({"text_config": {**grouped, "head_dim": 16, "num_key_value_heads": None}}, 1) == 2 * 3 * 8 * 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: a student, what it began as, and an adapter on a base outside of the run."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = models.tiny_tokenizer()
    for stage, part, seed in (("train", "model", 1), ("train", "before", 2), ("base", "model", 3)):
        model = models.from_architecture(Architecture(hidden_size=32, intermediate_size=32), tokenizer, seed=seed)
        models.save(root / stage / part, model, tokenizer)
    base = ModelSource(path=str(root / "base" / "model"))
    adapted = models.with_lora(models._pretrained(base, FP32), LoraSettings(), special_ids=[], seed=0)
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would change nothing
            torch.nn.init.normal_(weights)
    models.save(root / "lora" / "model", adapted, tokenizer, base=base)
    models.save(root / "merged" / "model", adapted.merge_and_unload(), tokenizer)  # type: ignore[operator]
    return root


def test_parameters_are_counted_from_the_heads_of_files(root: Path):
    loaded = models._pretrained(ModelSource(path=str(root / "train/model")), FP32)
    assert weights_in(root / "train/model") == sum(p.numel() for p in loaded.parameters()) > 0


def test_a_model_of_the_hub_is_at_hand_only_where_it_was_fetched(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert at_hand(ModelSource(path=str(root / "train/model"))) == str(root / "train/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert at_hand(ModelSource(path="some/model")) is None
    commit = tmp_path / "models--some--model" / "snapshots" / ("1" * 40)
    commit.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("1" * 40)
    (commit / "config.json").write_text("{}")
    assert at_hand(ModelSource(path="some/model")) is None  # its configuration alone
    (commit / "model.safetensors").write_bytes(b"")
    assert at_hand(ModelSource(path="some/model")) == str(commit)


def test_the_memory_of_an_adapter_is_that_of_its_base(root: Path):
    asked = answer.Asked("student", "x", "lora", adapter=True)
    assert answer._weights(asked, None, root) == root / "base/model"


def test_a_machine_cannot_name_code_that_runs_here(root: Path):
    description = root / "lora" / "model" / models.STUDENT_FILE
    said = json.loads(description.read_text())
    description.write_text(json.dumps({"base": {**said["base"], "trust_remote_code": True}}))
    try:
        with pytest.raises(TaskError, match="own code would run on this machine"):
            answer._weights(answer.Asked("student", "x", "lora", adapter=True), None, root)
    finally:
        description.write_text(json.dumps(said))


def test_words_come_whole_and_join_to_the_text():
    tokenizer = models.tiny_tokenizer()
    text = "12+30 é 蒸馏\n<think>\nΩ</think> ok"
    said: list[str] = []
    words = Words(tokenizer, said.append)
    for token in tokenizer.encode(text):
        words.put([token])
    assert "".join(said) == text and "蒸" in said and "\n" in said and "\ufffd" not in "".join(said)


def test_what_the_command_line_sends_is_what_the_process_reads():
    model = Model(Role.TEACHER, "some/model", source=ModelSource(path="some/model", revision="abc"), tokenizer="train")
    raw = {"root": "/run", "models": [model.to_dict()], "max_new_tokens": 5, "temperature": 0.5}
    setup = answer.Setup.from_dict(json.loads(json.dumps(raw)))
    assert asdict(setup.models[0]) == asdict(model) and setup.root == Path("/run")
    assert set(answer.FIRST) == {str(role) for role in Role} and str(Role.STUDENT) == answer.STUDENT


class Told(list[dict[str, Any]]):
    def __call__(self, message: dict[str, Any]) -> None:
        self.append(message)


def setup_of(root: Path, *asked: answer.Asked, tokens: int = 12) -> answer.Setup:
    return answer.Setup(root, asked, tokens, 0.0)


STUDENT = answer.Asked("student", "s", "train")
BEFORE = answer.Asked("before", "b", "train", "before")


def test_where_not_all_fit_the_student_comes_first(root: Path, monkeypatch: pytest.MonkeyPatch):
    free = iter([GIB, 1000])
    monkeypatch.setattr(answer, "free_bytes", lambda device: next(free))
    told = Told()
    (ready,) = answer._all(setup_of(root, BEFORE, STUDENT), torch.device("cpu"), told)
    assert ready.asked is STUDENT
    assert [(m["type"], m["role"]) for m in told] == [
        ("loading", "student"), ("ready", "student"), ("loading", "before"), ("absent", "before"),
    ]  # fmt: skip
    assert told[-1]["why"] == "it needs 0.3 GiB, and 0.0 GiB are free on this machine"
    monkeypatch.setattr(answer, "free_bytes", lambda device: 1000)
    with pytest.raises(answer.TaskError, match="the student cannot answer here: it needs") as raised:
        list(answer._all(setup_of(root, STUDENT), torch.device("cpu"), Told()))
    assert "GGUF" in raised.value.hint


def test_a_greedy_answer_is_the_one_of_an_evaluation_and_comes_word_by_word(root: Path):
    told = Told()
    ready = answer._load(STUDENT, setup_of(root, STUDENT), torch.device("cpu"))
    assert isinstance(ready, answer._Ready) and ready.opens_thinking
    answer.Answers(ready, setup_of(root, STUDENT), told, threading.Event()).to("12+30", 0)
    loaded = models.load_stage(root / "train", SimpleNamespace(), dtype=FP32)  # type: ignore[arg-type]
    prompts = [models.prompt_ids(loaded.tokenizer, text) for text in ("12+30", "a longer one beside it")]
    beside = TransformersGenerator(loaded.model, loaded.tokenizer, 12).generate(prompts, seed=0)[0]
    said = told[-1]
    assert said["text"] == loaded.tokenizer.decode(beside.ids, skip_special_tokens=True) and said["tokens"] == 12
    assert (said["finish"], said["type"], said["role"]) == ("length", "answer", "student")
    assert "".join(m["text"] for m in told[:-1]) == said["text"].rstrip("\ufffd") and len(told) > 3
    assert 0 < said["first_token_s"] <= said["seconds"]


def test_what_is_not_wanted_any_more_ends_with_what_is_there(root: Path):
    told, unwanted = Told(), threading.Event()
    ready = answer._load(STUDENT, setup_of(root, STUDENT), torch.device("cpu"))
    assert isinstance(ready, answer._Ready)
    unwanted.set()
    answer.Answers(ready, setup_of(root, STUDENT, tokens=3000), told, unwanted).to("12+30", 0)
    assert (told[-1]["finish"], told[-1]["tokens"]) == ("stopped", 1)


def test_a_question_longer_than_the_model_reads_is_not_cut_in_secret(root: Path):
    told = Told()
    ready = answer._load(STUDENT, setup_of(root, STUDENT), torch.device("cpu"))
    assert isinstance(ready, answer._Ready)
    answer.Answers(ready, setup_of(root, STUDENT), told, threading.Event()).to("1" * 5000, 0)
    assert [(m["type"], m["finish"], m["tokens"]) for m in told] == [("answer", "too_long", 0)]


# -- the process itself ------------------------------------------------------------------------------------------------


def found(*asked: Model) -> Found:
    return Found("r-abc123", asked, {}, {}, {})


def asking(root: Path, *asked: Model, tokens: int = 12, temperature: float = 0.0) -> Asking:
    return Asking(found(*asked), root, max_new_tokens=tokens, temperature=temperature)


def said(models_: Asking, question: str, seed: int = 0) -> dict[Role, Answer]:
    return {one.role: one for one in models_.ask(question, seed=seed)}


TRAINED = Model(Role.STUDENT, "stage train", "train")
BEGAN = Model(Role.BEFORE, "as training began", "train", "before")


@pytest.mark.slow
def test_the_process_loads_answers_and_stops(root: Path):
    with asking(root, TRAINED, BEGAN, tokens=40, temperature=1.0) as both:
        assert [role for role, what in both.load() if what] == [Role.STUDENT, Role.BEFORE]
        first = said(both, "12+30")
        assert list(first) == [Role.BEFORE, Role.STUDENT]
        assert first[Role.STUDENT].text != first[Role.BEFORE].text and first[Role.STUDENT].opens_thinking
        again, other = said(both, "12+30"), said(both, "12+30", seed=1)
        assert again[Role.STUDENT].text == first[Role.STUDENT].text != other[Role.STUDENT].text
    assert both._child.returncode == 0
    with asking(root, TRAINED, tokens=3000) as one:
        list(one.load())
        answers = one.ask("12+30", seed=0)
        next(answers)
        one.stop()
        last = list(answers)[-1]
        assert last.finish == "stopped" and last.tokens is not None and last.tokens < 3000
        following = one.ask("1+1", seed=0)  # it goes on with the next question
        assert next(following).text
        one.stop()
        assert list(following)[-1].finish == "stopped"
        one._child.send_signal(signal.SIGKILL)
        with pytest.raises(StageFailed, match="was killed by signal 9") as raised:
            said(one, "2+2")
        assert "memory may have run out" in raised.value.hint


@pytest.mark.slow
def test_an_adapter_answers_and_is_served_as_merged_into_its_base(root: Path, tmp_path: Path):
    home, url = Home(tmp_path / "home"), f"file:{tmp_path}/bucket/r-abc123"
    commit_folder(open_bucket(url), root / "lora", "lora", fence=1)
    run = recorded(home, "r-abc123", url, stages(lora=TrainSettings(ModelSource(path="some/base"), "label")))
    whole = whole_student(run, home)
    assert whole.parent == tmp_path / "home/models/r-abc123" and [*whole.parent.iterdir()] == [whole]
    merged, ours = (models._pretrained(ModelSource(path=str(at)), FP32) for at in (root / "merged/model", whole))
    for name, weights in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weights)
    with asking(root, replace(TRAINED, stage="lora"), tokens=30) as one:
        list(one.load())
        text = said(one, "12+30")[Role.STUDENT].text
    tokenizer = models.tiny_tokenizer()
    prompt = models.prompt_ids(tokenizer, "12+30")
    (written,) = TransformersGenerator(merged, tokenizer, 30).generate([prompt], seed=0)
    assert text == tokenizer.decode(written.ids, skip_special_tokens=True)


@pytest.mark.slow
def test_a_teacher_that_is_not_here_is_left_out_and_alone_is_an_error(root: Path, tmp_path: Path):
    away = Model(Role.TEACHER, "some/teacher", source=ModelSource(path="some/teacher-of-nobody"))
    with asking(root, TRAINED, away) as both:
        what = dict(both.load())
        assert what[Role.TEACHER].startswith("is not asked: it is not on this machine")
        assert list(said(both, "1")) == [Role.STUDENT]
    with asking(root, away) as one, pytest.raises(UsageError, match="the teacher cannot answer here"):
        list(one.load())
