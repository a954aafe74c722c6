"""Do people see what a teacher said, and do labels survive the way through lines of JSON?"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from orchestrator.cli import kdcloud
from orchestrator.errors import UsageError
from orchestrator.labels_cli import render_sample
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_to_dict
from orchestrator.runner import mark_to_dict
from orchestrator.testing import VirtualClock
from tasks import models
from tasks.bucket import commit_folder, open_bucket
from tasks.contract import DataSource, LabelSettings, ModelSource, TaskError
from tasks.labels import Header, Labels, Sample, read_labels, shard_name, write_shard
from tasks.labels_text import export_jsonl, import_jsonl, shown
from tests.plans import make_plan

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of a byte tokenizer: the second one's rows are short in places; ids that no encoding would give."""
    folder = tmp_path_factory.mktemp("labels")
    tokenizer = models.tiny_tokenizer()
    hashes = models.vocabulary_hashes(tokenizer)
    samples = []
    for key, text in (("a" * 64, "4"), ("b" * 64, "12\n")):
        prompt = models.prompt_ids(tokenizer, "2 + 2 = ?")
        completion = [*tokenizer.encode(text), tokenizer.eos_token_id]
        gen = torch.Generator().manual_seed(len(text))
        logp, ids = torch.log_softmax(torch.randn(len(completion), len(tokenizer), generator=gen) * 3, 1).topk(5, 1)
        tail = torch.log1p(-logp.exp().sum(1))
        mass = torch.logsumexp(logp / 2, 1) - 1.0
        samples.append(Sample(key, torch.tensor(prompt), torch.tensor(completion), ids.int(), logp, tail, mass))
    samples[1].topk_ids[0, 2:], samples[1].topk_logprobs[0, 2:] = -1, -math.inf
    samples[1].log_tail_mass[1] = -math.inf
    header = Header("some/teacher", hashes.ordinary, hashes.special, 5, 2.0, len(tokenizer))
    write_shard(folder / shard_name(0), header, samples)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def same(one: Labels, two: Labels) -> bool:
    rows = torch.arange(len(one.completion_ids))
    return (
        one.header == two.header
        and one.keys == two.keys
        and torch.equal(one.prompt_ids, two.prompt_ids)
        and torch.equal(one.completion_ids, two.completion_ids)
        and all(torch.equal(a, b) for a, b in zip(one.soft_rows(rows), two.soft_rows(rows), strict=True))
    )


def test_labels_come_back_from_json_lines_to_the_bit(folder: Path, tmp_path: Path) -> None:
    assert export_jsonl(folder, tmp_path / "one.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert lines[1]["target"].startswith("12\n") and len(lines[1]["soft_label"]) == 4
    assert len(lines[1]["soft_label"][0]) == 2 and lines[1]["log_tail_mass"][1] is None
    for line in lines:
        line["input"] = line["target"] = "other text"  # where ids are, texts are not read
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert import_jsonl(tmp_path / "one.jsonl", tmp_path / "two", str(folder / "tokenizer")) == 2
    assert same(read_labels(folder), read_labels(tmp_path / "two"))
    with pytest.raises(TaskError, match="holds labels already"):
        import_jsonl(tmp_path / "one.jsonl", tmp_path / "two", str(folder / "tokenizer"))


def imported(tmp_path: Path, folder: Path, *lines: dict[str, object]) -> Labels:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_jsonl(file, tmp_path / "out", str(folder / "tokenizer"))
    return read_labels(tmp_path / "out")


def test_labels_of_others_need_only_text_and_probabilities(folder: Path, tmp_path: Path) -> None:
    soft = [{"4": 0.75, "5": 0.125}, {"<|im_end|>": 1.0}]
    tokenizer = models.tiny_tokenizer()
    soft[1] = {tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id): 1.0}
    sample = imported(tmp_path, folder, {"input": "2 + 2 = ?", "target": "4", "soft_label": soft}).sample(0)
    four, five = tokenizer.encode("45")
    assert sample.prompt_ids.tolist() == models.prompt_ids(tokenizer, "2 + 2 = ?")
    assert sample.completion_ids.tolist() == [four, tokenizer.eos_token_id]
    assert sample.topk_ids.tolist() == [[four, five], [tokenizer.eos_token_id, -1]]
    torch.testing.assert_close(sample.topk_logprobs[0].exp(), torch.tensor([0.75, 0.125]), rtol=1e-3, atol=0)
    torch.testing.assert_close(sample.log_tail_mass.exp(), torch.tensor([0.125, 0.0]))
    torch.testing.assert_close(sample.log_mass_at_t.exp(), torch.tensor([0.875, 1.0]))


def test_hard_labels_of_others_end_with_the_end_of_sequence(folder: Path, tmp_path: Path) -> None:
    labels = imported(tmp_path, folder, {"input": "2 + 2 = ?", "target": "4"})
    assert labels.header.top_k == 0 and len(labels.sample(0).completion_ids) == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"input": "1"}, "no input and target"),
        ({"input": "1", "target": "4", "soft_label": [{"4": 0.5}] * 3}, "target has 1 tokens, soft_label 3"),
        ({"input": "1", "target": "4", "soft_label": [{"forty": 0.5}]}, '"forty" is not one token'),
        ({"input": "1", "target": "4", "target_ids": [9], "soft_label": [{"999": 0.5}]}, "outside the vocabulary"),
        ({"input": "1", "target": "4", "target_ids": [-9], "soft_label": [{"9": 0.5}]}, "outside the vocabulary"),
        ({"input": "1", "target": "4", "tokenizer": "another"}, "another tokenizer"),
        ({"input": "1", "target": "4", "soft_label": [{"4": 0.5}], "temperature": 2.0}, "log_mass_at_t is missing"),
        ({"input": "1", "target": "4", "soft_label": [{"4": 0.5}], "log_tail_mass": []}, "0 values for 1 tokens"),
    ],
)
def test_lines_that_cannot_be_labels_are_refused_in_words(folder: Path, tmp_path: Path, line: dict, says: str) -> None:
    with pytest.raises(TaskError, match=re.escape(says)):
        imported(tmp_path, folder, line)


GOOD = '"input": "1", "target": "4", "target_ids": [9]'
ODD = [
    ("", "holds no samples"),
    ("\n  \n", "holds no samples"),
    ("{" + GOOD, "it is not JSON"),
    ("input,target", "it is not JSON"),
    ("[" * 100_000, "it is not JSON"),
    ('["1", "4"]', "no input and target"),
    (b"\xff\xfe{", "not UTF-8"),
    (f'{{{GOOD}, "soft_label": [{{"9": NaN}}]}}', "NaN is no number"),
    (f'{{{GOOD}, "soft_label": [{{"9": -Infinity}}]}}', "-Infinity is no number"),
    (f'{{{GOOD}, "soft_label": [{{"9": 1e999}}]}}', "too large a number"),
    (f'{{{GOOD}, "soft_label": [{{"9": {"9" * 400}}}]}}', "too large a number"),
    (f'{{{GOOD}, "soft_label": [{{"9": {"9" * 5000}}}]}}', "it is not JSON"),
    (f'{{{GOOD}, "soft_label": [{{"9": "0.5"}}]}}', 'soft_label[0] of "9" is "0.5", not a number'),
    (f'{{{GOOD}, "soft_label": [{{"9": true}}]}}', "is true, not a number"),
    (f'{{{GOOD}, "soft_label": [{{"9": 0.5, "9": 0.25}}]}}', '"9" stands twice'),
    (f'{{{GOOD}, "soft_label": [{{"9": 0.5, "09": 0.25}}]}}', "soft_label[0] names the token"),
    (f'{{{GOOD}, "soft_label": [{{"9": -0.5, "8": 0.25}}]}}', "soft_label[0] holds 0.25, and soft_label[0] -0.5"),
    (f'{{{GOOD}, "soft_label": [{{"9": 1.5}}]}}', "no probability is above 1"),
    (f'{{{GOOD}, "soft_label": [{{"9": 0.7, "8": 0.7}}]}}', "sum up to 1.4"),
    (f'{{{GOOD}, "soft_label": [{{"9": -0.1, "8": -0.1}}]}}', "sum up to 1.81"),
    (f'{{{GOOD}, "soft_label": [{{"-9": 0.5}}]}}', "holds -9, which is outside the vocabulary"),
    (f'{{{GOOD}, "soft_label": [{{"{"9" * 40}": 0.5}}]}}', "is not one token"),
    (f'{{{GOOD}, "soft_label": [{{"\\ud800": 0.5}}]}}', "is not one token"),
    (f'{{{GOOD}, "soft_label": {{"9": 0.5}}}}', "not a list"),
    (f'{{{GOOD}, "soft_label": [0.5]}}', "soft_label[0] is 0.5"),
    (f'{{{GOOD}, "soft_label": [{{"9": 0.5}}, {{"9": 0.5}}]}}', "target has 1 tokens, soft_label 2"),
    (f'{{{GOOD}, "soft_label": [{{"9": 0.5}}], "log_tail_mass": [0.5]}}', "log_tail_mass[0] is 0.5"),
    (f'{{{GOOD}, "soft_label": [{{"9": 0.5}}], "log_mass_at_t": "x"}}', "not a list"),
    ('{"input": "1", "target": 4}', "target is 4, not text"),
    ('{"input": ["1"], "target": "4"}', "not text"),
    ('{"input": "\\ud800", "target": "4"}', "half a character"),
    ('{"input": "1", "target": "4", "target_ids": ["9"]}', 'target_ids[0] is "9", not a token id'),
    ('{"input": "1", "target": "4", "target_ids": [9.0]}', "target_ids[0] is 9.0, not a token id"),
    ('{"input": "1", "target": "4", "target_ids": 9}', "target_ids is 9, not a list"),
    ('{"input": "1", "target": "4", "input_ids": []}', "input_ids is [], not a list"),
    ('{"input": "1", "target": "4", "input_ids": [-1]}', "input_ids holds -1, which is outside the vocabulary"),
    (f'{{"input": "1", "target": "4", "target_ids": [{"9" * 30}]}}', "outside the vocabulary"),
    (f'{{{GOOD}, "temperature": 0}}', "temperature is 0"),
    (f'{{{GOOD}, "temperature": "2"}}', 'temperature is "2", not a number'),
    (f'{{{GOOD}, "key": 7}}', "key is 7, not text"),
    (f'{{{GOOD}, "teacher": []}}', "teacher is [], not text"),
]


@pytest.mark.parametrize(("text", "says"), ODD, ids=[says for _, says in ODD])
def test_whatever_stands_in_a_file_there_is_one_error_with_its_line_and_a_cure(
    folder: Path, tmp_path: Path, text: str | bytes, says: str
) -> None:
    """Behind a good line, so that the line is counted and what was written before is taken back."""
    good = b'{"input": "2", "target": "5", "target_ids": [9]}\n\n'
    if b"soft_label" in (text if isinstance(text, bytes) else text.encode()):
        good = good.replace(b"}", b', "soft_label": [{"9": 0.5}]}')
    if says == "holds no samples":
        good = b""
    file = tmp_path / "odd.jsonl"
    file.write_bytes(good + (text if isinstance(text, bytes) else text.encode()))
    with pytest.raises(TaskError) as raised:
        import_jsonl(file, tmp_path / "out", str(folder / "tokenizer"))
    message = raised.value.message
    assert says in message and str(file) in message and len(message) < 300 and raised.value.hint
    assert says == "holds no samples" or message.startswith(f"line 3 of {file}: ")
    assert not list((tmp_path / "out").glob("labels-*"))


def test_a_line_that_never_ends_is_not_read_into_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.labels_import.LONGEST_LINE", 1 << 20)
    file = tmp_path / "huge.jsonl"
    file.write_bytes(b"[" + b" " * (3 << 20))
    with pytest.raises(TaskError, match=r"line 1 of .* is longer than 1 MiB") as raised:
        import_jsonl(file, tmp_path / "out", str(folder / "tokenizer"))
    assert "JSON array" in raised.value.hint


def test_the_command_says_what_is_wrong_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"input": "1", "target": "4", "soft_label": [{"4": "high"}]}\n')
    words = ["labels", "import", "odd.jsonl", "out", "--tokenizer", str(folder / "tokenizer")]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        'error: line 1 of odd.jsonl: soft_label[0] of "4" is "high", not a number\n  -> write it without quotes\n'
    )


def test_log_probabilities_that_rounding_lifted_above_zero_stay_what_they_are(folder: Path, tmp_path: Path) -> None:
    soft = [{"9": 1e-7, "8": -20.0}]
    sample = imported(tmp_path, folder, {"input": "1", "target": "4", "target_ids": [9], "soft_label": soft}).sample(0)
    assert sample.topk_ids.tolist() == [[9, 8]] and abs(sample.topk_logprobs[0, 1] + 20) < 0.02


def test_half_an_import_is_taken_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.labels_import.SHARD_SAMPLES", 1)
    good = {"input": "1", "target": "4"}
    assert len(imported(tmp_path, folder, good, good)) == 2
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(TaskError, match=r"line 2 .*outside the vocabulary"):
        imported(tmp_path, folder, good, {**good, "target_ids": [9999]})
    assert not list((tmp_path / "out").iterdir())


def test_lines_of_different_kinds_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    hard = {"input": "1", "target": "4"}
    for other in ({**hard, "soft_label": [{"4": 0.5}]}, {**hard, "teacher": "another"}):
        with pytest.raises(TaskError, match=r"line 2 of .* differs from line 1 in (teacher|whether)"):
            imported(tmp_path, folder, hard, other)


def test_a_sample_is_readable_in_80_columns_and_without_colours(folder: Path) -> None:
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as captured:
        for sample in shown(folder, first=1, limit=5):
            assert abs(sum(one["probability"] for one in sample["tokens"][2]["top"]) - 1.0) < 1.0
            render_sample(sample, console)
    text = captured.get()
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    assert "sample 1" in text and "sample 0" not in text
    assert re.search(r"^2 +\S+ \d+\.\d%", text, re.M)  # token, alternative, probability
    assert "\\n" in text  # a token that is a line end
    with pytest.raises(TaskError, match="no sample 2"):
        list(shown(folder, first=2, limit=1))


def test_control_characters_of_a_model_do_not_reach_the_terminal(folder: Path) -> None:
    (sample,) = shown(folder, first=0, limit=1)
    sample["completion"] = sample["tokens"][0]["text"] = "\x1b[2Jgone"
    console = Console(width=80)
    with console.capture() as captured:
        render_sample(sample, console)
    assert "\x1b[2J" not in captured.get() and "[2Jgone" in captured.get()


def call(*words: str) -> str:
    done = CliRunner().invoke(kdcloud, ["labels", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_commands_show_export_and_import(folder: Path, tmp_path: Path) -> None:
    document = json.loads(call("show", str(folder), "--limit", "9", "--json"))
    assert [sample["sample"] for sample in document["samples"]] == [0, 1]
    top = document["samples"][1]["tokens"][0]["top"]
    assert len(top) == 2 and 0 < top[1]["probability"] <= top[0]["probability"] < 1
    assert document["top_k"] == 5 and document["logprob_bits"] == 16
    assert 0 < document["logprob_error"]["mean"] < document["logprob_error"]["worst"] < 0.01
    shown_text = call("show", str(folder))
    assert "teacher's likeliest" in shown_text
    line = shown_text.splitlines()[0]
    assert re.fullmatch(r"5 ids a token; log-probabilities of 16 bit, off by 0\.\d+, 0\.\d+ at worst", line)
    file, out = tmp_path / "x.jsonl", tmp_path / "out"
    call("export", str(folder), str(file))
    call("import", str(file), str(out), "--tokenizer", str(folder / "tokenizer"))
    assert same(read_labels(folder), read_labels(out))


@pytest.mark.parametrize("remote", [False, True])
def test_the_labels_of_a_run_are_shown_from_its_bucket(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setenv("KDCLOUD_HOME", str(tmp_path / "home"))
    bucket = open_bucket(f"file:{tmp_path}/bucket/test-abc123")
    url = bucket.url
    if remote:
        url = "s3://some/test-abc123"
        monkeypatch.setattr("tasks.bucket.open_bucket", lambda url: bucket)
    plan = make_plan({"label": 60.0, "train": 60.0}, bucket=url)
    data = DataSource("builtin:addition/train")
    settings = LabelSettings(ModelSource(path="some/teacher"), data, verify="exact", samples=1)
    stages = (replace(plan.stages[0], kind="label", settings=settings), plan.stages[1])
    mark = VirtualClock().mark()
    (tmp_path / "home").mkdir()
    Ledger(tmp_path / "home" / "ledger.sqlite").create_run(
        "test-abc123", name="t", bucket=url, cap_micros=100, deadline_s=None, mark=mark_to_dict(mark), at=mark.wall,
        data={"schema": 1, "owner": "owner1", "plan": plan_to_dict(replace(plan, stages=stages))},
    )  # fmt: skip
    with pytest.raises(UsageError, match="label of test-abc123 is not done"):
        call("show", "last")
    commit_folder(bucket, folder, "label", fence=1)
    document = json.loads(call("show", "abc123", "--limit", "2", "--json"))
    assert [sample["key"][0] for sample in document["samples"]] == ["a", "b"]
    file = tmp_path / "run.jsonl"
    call("export", "last", str(file))
    call("import", str(file), str(tmp_path / "again"), "--tokenizer", str(folder / "tokenizer"))
    assert same(read_labels(folder), read_labels(tmp_path / "again"))
    for words in (("show", "abc123"), ("export", "abc123", str(file))):
        with pytest.raises(UsageError, match="none of that name"):
            call(*words, "--stage", "train")
    with pytest.raises(UsageError, match="no folder"):
        call("export", "./nosuch", str(file))
