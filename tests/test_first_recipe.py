"""`kdcloud init`: what it writes plans, explains itself, and replaces nothing that somebody else wrote."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import first_recipe, price_cache, sky_ask
from orchestrator.cli import kdcloud
from orchestrator.config import Home
from orchestrator.errors import BudgetExceeded, UsageError
from orchestrator.first_recipe import Answers, Draft, Question, composed, from_template, interview, templates
from orchestrator.init_cli import found_infras, next_steps, write
from orchestrator.recipe import RecipeSpec, parse_recipe
from orchestrator.recipe_words import OFFERED, PARTS, WIDTH, WORDS, written
from orchestrator.shipped import builtin_recipes
from orchestrator.sky_ask import SkyAnswer
from orchestrator.testing import START, fake_offer
from tasks.contract import TaskError
from tasks.data import read_rows
from tests.plans import make_plan

ROOT = Path(__file__).parents[1]
LLAMA = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a home folder of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def call(*words: str) -> None:
    kdcloud.main(list(words), standalone_mode=False)


def spec(text: str) -> RecipeSpec:
    return RecipeSpec.model_validate(yaml.safe_load(text))


def rows(path: Path, *made: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def sums(path: Path, count: int) -> Path:
    return rows(path, *({"question": f"What is {n} and {n}?", "answer": 2 * n} for n in range(count)))


# -- templates


def test_there_are_templates_for_the_ways_to_distil_and_each_says_what_it_is() -> None:
    known = templates()
    assert {"quickstart", "r1-qwen-1.5b", "api-teacher", "lora-24gb", "staged", "rehearsal"} <= set(known)
    for words in known.values():
        assert words.endswith(".") and len(words) > 40


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_what_a_template_writes_plans_under_its_cap_by_the_command_in_its_first_line(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"my {name}.yaml"
    call("init", file, "--template", name)
    assert re.search(r"^plan fits: .* on .* expected", capsys.readouterr().err, re.M)
    command = Path(file).read_text().splitlines()[0].removeprefix("# ")
    words = shlex.split(command)
    assert words == ["kdcloud", "plan", file]
    call(*words[1:], "--json")
    assert json.loads(capsys.readouterr().out)["fits"] is True


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_template_is_written_with_the_same_meaning_and_every_key_explained(name: str) -> None:
    draft = from_template(name)
    text = written(draft.raw, "recipe.yaml", draft.about)
    assert spec(text) == spec(builtin_recipes()[name].read_text())
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    keys = [(n, line) for n, line in enumerate(lines) if re.match(r"\s*(- |# )?[a-z_]+:( |$)", line)]
    assert len(keys) >= 8
    unexplained = [
        line
        for n, line in keys
        if not re.search(r"\s# \w", line.lstrip().removeprefix("# "))
        and not re.match(r"\s*# (?![a-z_]+: )", lines[n - 1])
    ]
    assert unexplained == [line for _, line in keys if line.startswith("  - name")][1:]  # said once is enough


def test_what_is_offered_as_a_comment_may_be_taken_in() -> None:
    draft = from_template("r1-qwen-1.5b")
    text = written(draft.raw, "recipe.yaml", draft.about)
    taken, count = re.subn(r"^( *)# ([a-z_]+: .*  # )", r"\1\2", text, flags=re.M)
    missing = sum(key not in draft.raw for key in OFFERED["recipe"])
    assert count == missing + len(OFFERED["label"]) + len(OFFERED["train"]) + len(OFFERED["evaluate"]) >= 8
    assert spec(taken).spot is True and spec(text).spot is False


def test_on_a_machine_of_ones_own_nothing_about_renting_is_offered() -> None:
    draft = from_template("quickstart")
    text = written(draft.raw, "recipe.yaml", draft.about)
    assert "# bucket:" in text and "spot" not in text and "allow_account_key" not in text


def test_every_meaning_is_of_a_key_that_exists() -> None:
    every = {key for part in PARTS.values() for key in part.model_fields}
    for word in WORDS:
        part, _, key = word.rpartition(".")
        assert key in (PARTS[part].model_fields if part else every), word
    assert len(WORDS) > 60


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        call("init", "--template", "quikstart")
    assert "did you mean quickstart?" in caught.value.hint


def test_the_list_of_templates_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    call("init", "--template", "list")
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == list(builtin_recipes()) and not err


def test_a_template_takes_no_answers() -> None:
    with pytest.raises(UsageError, match="written as it is"):
        call("init", "--template", "quickstart", "--budget", "3CNY")


# -- questions


def answering(**given: str) -> tuple[list[Question], Callable[[Question, Callable[[str], Any]], Any]]:
    """What was asked, and an asker that takes the default unless told otherwise."""
    asked: list[Question] = []

    def ask(question: Question, check: Callable[[str], Any]) -> Any:
        asked.append(question)
        return check(given.get(question.option, question.default))

    return asked, ask


@pytest.mark.parametrize(
    ("teacher", "count"),
    [(first_recipe.TEACHER, 5), ("api", 5), (LLAMA, 5), ("tiny", 3)],  # a tiny one has its student and problems
)
def test_at_most_five_questions_and_their_defaults_make_a_recipe_that_plans(teacher: str, count: int) -> None:
    asked, ask = answering(teacher=teacher)
    draft = composed(interview(ask, (), ("runpod", "aws", "lambda", "vast")))
    assert len(asked) == count
    write(draft, Path("recipe.yaml"), may_replace=lambda file: False)
    call("plan", "recipe.yaml", "--json")


def test_what_is_enabled_is_what_is_proposed() -> None:
    asked, ask = answering()
    assert interview(ask, ("slurm/lab", "aws"), ("runpod", "slurm", "aws")).infra == ("slurm/lab", "aws")
    assert "doctor" not in asked[3].note
    asked, ask = answering(infra="runpod , AWS")
    assert interview(ask, (), ("runpod", "aws")).infra == ("runpod", "aws")
    assert "None is enabled from here yet" in asked[3].note


def test_what_can_be_had_is_known_from_prices_on_file_else_from_slurms_clusters_else_from_skypilot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "kd")
    monkeypatch.setattr(sky_ask, "sky_version", lambda: None)
    assert found_infras(home) == ()
    (tmp_path / "user" / ".slurm").mkdir(parents=True)
    (tmp_path / "user" / ".slurm" / "config").write_text("Host lab\n  HostName lab.lan\nHost *\n")
    assert found_infras(home) == ("slurm/lab",)
    monkeypatch.setattr(sky_ask, "sky_version", lambda: "0.14.1")
    monkeypatch.setattr(sky_ask, "enabled", lambda home, limit_s: SkyAnswer(("slurm", "aws")))
    assert found_infras(home) == ("slurm/lab", "aws")
    monkeypatch.setattr(sky_ask, "enabled", lambda home, limit_s: SkyAnswer(None, "does not run"))
    assert found_infras(home) == ("slurm/lab",)
    price_cache.save(home.offers_cache, {"runpod": [fake_offer(infra="runpod")], "slurm/lab": []}, START)
    assert found_infras(home) == ("runpod", "slurm")


@pytest.mark.parametrize(
    ("option", "answer", "says"),
    [
        ("teacher", "Qwen/Qwen9-1B", "not known"),
        ("student", "meta-llama/Llama-3.2-1B", "another tokenizer"),
        ("prompts", "nowhere.jsonl", "cannot read"),
        ("infra", "runpood", "no infra"),
        ("infra", "aws; touch x", "no infra"),
        ("infra", " , ", "at least one"),
        ("budget", "50", "names no currency"),
        ("budget", "-1 CNY", "above 0"),
        ("budget", "1 CNY/h", "price an hour"),
    ],
)
def test_a_wrong_answer_is_said_with_what_would_be_right(option: str, answer: str, says: str) -> None:
    _, ask = answering(**{option: answer})
    with pytest.raises(UsageError, match=says) as caught:
        composed(interview(ask, (), ("runpod", "aws", "lambda", "vast")))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", first_recipe.STUDENT),
        ("qwen/qwen3-8b", first_recipe.STUDENT),
        (LLAMA, "meta-llama/Llama-3.2-1B"),  # nearest to 1.5B of those with its tokenizer
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen2-0.5B"),  # the usual one would be larger than its teacher
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),  # none is smaller
    ],
)
def test_the_proposed_student_has_the_teachers_tokenizer_and_is_smaller(teacher: str, student: str) -> None:
    assert first_recipe.student_for(teacher) == student
    first_recipe.check_pair(teacher, student)


def test_a_model_in_a_folder_is_named_by_its_whole_path(beside: Path) -> None:
    shape = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    (beside / "own model").mkdir()
    (beside / "own model" / "config.json").write_text(json.dumps(shape))
    raw = composed(Answers(student="own model")).raw
    assert raw["stages"][1]["student"] == str(beside / "own model") and raw["name"] == "own-model"


def test_this_machine_among_the_infras_has_a_price_and_no_list_of_cards() -> None:
    raw = composed(Answers(infra=("aws", "local"))).raw
    assert raw["infra"] == ["aws", "local"] and raw["local"] and "gpus" not in raw


# -- prompts of one's own


@pytest.mark.parametrize(
    "text",
    [
        '{"input": "a", "answer": "1"}\n',
        '{"prompt": "a"}\n\n{"question": "b", "target": 2}\r\n',
        '{"input": "a", "key": "x"}\n{"input": "a", "key": "y"}',
        '{"input": "a\u2028b", "answer": 1.5}\n',
        "",
        "\n \n",
        "not json\n",
        "[1]\n",
        '{"output": "a"}\n',
        '{"input": " "}\n',
        '{"input": 3}\n',
        '{"input": "a", "answer": ["1"]}\n',
        '{"input": "a", "key": 7}\n',
        '{"input": "a"}\n{"input": "a"}\n',
    ],
)
def test_a_file_of_prompts_is_taken_just_where_the_stages_take_it(text: str, beside: Path) -> None:
    path = beside / "prompts.jsonl"
    path.write_bytes(text.encode())
    try:
        wanted = read_rows(path)
    except TaskError:
        with pytest.raises(UsageError) as caught:
            first_recipe.read_prompts(path)
        assert caught.value.hint and str(path) in caught.value.message
        return
    found = first_recipe.read_prompts(path)
    assert len(found.lines) == len(wanted)
    assert [wanted[n]["answer"] is not None for n in range(len(wanted))] == [
        n in found.answered for n in range(len(wanted))
    ]


@pytest.mark.parametrize("count", [20, 21, 199, 12_000])
def test_own_prompts_are_parted_and_none_is_both_learned_and_evaluated(count: int, beside: Path) -> None:
    both = first_recipe.parted(first_recipe.read_prompts(sums(beside / "mine.jsonl", count)))
    assert both is not None
    learned, held = (set(part.splitlines()) for part in both)
    assert learned.isdisjoint(held)
    assert learned | held == set((beside / "mine.jsonl").read_text().splitlines())
    assert 2 <= len(held) <= 500


def test_own_prompts_are_counted_and_stand_beside_the_recipe(beside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums(beside / "mine.jsonl", 250)
    call("init", "--yes", "--prompts", "mine.jsonl", "sub/first.yaml")
    assert "mine.jsonl: 250 prompts, all with a right answer" in capsys.readouterr().err
    recipe = parse_recipe(Path("sub/first.yaml").read_text(), Path("sub/first.yaml"))
    assert {Path(file.path).name: file.rows for file in recipe.files.values()} == {
        "mine-train.jsonl": 225,
        "mine-held-out.jsonl": 25,
    }
    assert recipe.data.verify == "math"
    label = recipe.stages[0]
    assert label.kind == "label" and label.samples == 225


def test_answers_in_words_are_compared_as_they_are(beside: Path) -> None:
    path = rows(beside / "mine.jsonl", *({"input": f"{n}?", "answer": "yes"} for n in range(40)))
    assert composed(Answers(prompts=first_recipe.read_prompts(path))).raw["data"]["verify"] == "exact"


def test_prompts_without_answers_are_labelled_unchecked_and_not_evaluated(beside: Path) -> None:
    path = rows(beside / "mine.jsonl", *({"prompt": f"Tell {n}"} for n in range(30)))
    draft = composed(Answers(prompts=first_recipe.read_prompts(path)))
    assert draft.raw["data"] == {"prompts": str(path), "verify": "none"} and not draft.files
    assert [stage["kind"] for stage in draft.raw["stages"]] == ["label", "train", "export"]
    parse_recipe(written(draft.raw, "r.yaml", draft.about), beside / "r.yaml")


# -- writing


def test_what_is_there_is_replaced_only_when_told(beside: Path) -> None:
    (beside / "recipe.yaml").write_text("mine\n")
    with pytest.raises(UsageError, match="there already"):
        call("init", "--yes")
    assert (beside / "recipe.yaml").read_text() == "mine\n"
    assert not (beside / "data").exists()
    call("init", "--yes", "--force")
    assert (beside / "recipe.yaml").read_text().startswith("# kdcloud plan")


def test_data_that_is_there_is_replaced_only_when_told(beside: Path) -> None:
    call("init", "--yes")
    call("init", "--yes")  # the same again: nothing to replace
    (beside / "data" / "algebra.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match=r"algebra\.jsonl is there already"):
        call("init", "--yes", "other.yaml")
    assert not (beside / "other.yaml").exists()


def test_a_recipe_that_cannot_be_leaves_nothing_behind(beside: Path) -> None:
    draft = from_template("r1-qwen-1.5b")
    with pytest.raises(UsageError):
        write(Draft({**draft.raw, "budget": "soon"}, (), draft.files), beside / "r.yaml", may_replace=lambda f: True)
    assert [path for path in beside.rglob("*") if path.is_file()] == []


def test_a_recipe_that_does_not_fit_is_written_and_said(beside: Path) -> None:
    with pytest.raises(BudgetExceeded):
        call("init", "--yes", "--budget", "1CNY")
    assert (beside / "recipe.yaml").exists()


def test_a_file_name_cannot_leave_its_comment() -> None:
    raw = from_template("quickstart").raw
    text = written(raw, "a\nbudget: 1000000 USD\n.yaml", ("b\nname: c",))
    assert yaml.safe_load(text) == raw


def test_without_a_terminal_it_says_what_to_add(beside: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "init"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=beside, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 2 and "--yes" in done.stderr and not (beside / "recipe.yaml").exists()


def test_on_a_terminal_a_wrong_answer_is_asked_again_and_enter_takes_the_default(beside: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "init"],
        cwd=beside, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"Qwen/Qwen9\n" + b"\n" * 4 + b"40 CNY\n")
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other side closed it
            break
    os.close(ours)
    assert process.wait() == 0, said.decode()
    text = said.decode()
    assert text.count("Who writes the answers?") == 2 and text.count("Who learns?") == 1
    assert spec((beside / "recipe.yaml").read_text()).budget.value == 40


@pytest.mark.parametrize(
    ("infra", "bucket", "asked"), [("vast", "file:/b", 2), ("vast", "s3://b/kd", 1), ("slurm/lab", "s3://b/kd", 0)]
)
def test_what_must_be_set_by_hand_is_said_with_the_file(infra: str, bucket: str, asked: int) -> None:
    """On most clouds a machine ends itself only with a right over the account."""
    made = make_plan({"train": 60.0}, offers=(fake_offer(infra=infra),), bucket=bucket)
    *by_hand, doctor, run = next_steps(made, Path("my recipe.yaml")).splitlines()
    assert len(by_hand) == asked and all("in my recipe.yaml" in line for line in by_hand)
    assert ("allow_account_key" in "".join(by_hand)) == (infra == "vast")
    assert "doctor --recipe 'my recipe.yaml'" in doctor and run.strip() == "kdcloud run 'my recipe.yaml'"
