"""Publishing on the hub: what exactly goes where is said first, private unless asked otherwise, no token is shown."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator import hub_push
from orchestrator.cli import kdcloud
from orchestrator.config import Home
from orchestrator.errors import UsageError
from orchestrator.hub_push import Item, Push, Target, check, licence_of, lines_of, path_in_repo
from orchestrator.ledger import Ledger
from orchestrator.session import opened_ledger
from tasks.bucket import commit_folder, open_bucket
from tasks.contract import ExportSettings, ModelSource, TrainSettings
from tests.hub_stand_in import TOKEN, Hub, Repo, hub_on_loopback
from tests.recorded_runs import recorded, stages

ROOT = Path(__file__).parents[1]
RUN, REPO = "r-abc123", "ada/student"
CARD = "---\nlicense: apache-2.0\n---\n# Student\n"
PLAN = stages(train=TrainSettings(ModelSource(path="some/base"), "label"), export=ExportSettings("train"))


@pytest.mark.parametrize(
    ("rel", "path"),
    [
        ("hf/model.safetensors", "model.safetensors"),
        ("hf/deep/file", "deep/file"),
        ("gguf/student-q8_0.gguf", "gguf/student-q8_0.gguf"),
        ("Modelfile", "Modelfile"),
        ("result.json", None),
        ("hfx/model.safetensors", None),
    ],
)
def test_only_what_others_can_load_goes_there(rel: str, path: str | None):
    assert path_in_repo(rel) == path


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD, "apache-2.0"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "other qwen"),
        ("---\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ('---\nlicense: "a\\x1b[2Jb"\n---\n', "a?[2Jb"),
        ("---\ntags: [x]\n---\n", None),
        ("license: mit\n", None),
        ("---\nlicense: [\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_card_states(card: str, licence: str | None):
    assert licence_of(card) == licence


@pytest.mark.parametrize(("stage", "exported"), [(None, True), ("train", False)])
def test_an_export_goes_up_though_a_later_stage_trained_on_unless_a_stage_is_named(
    nothing_of_the_user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str | None, exported: bool
):
    asked: list[bool] = []

    def find(*_: object, **how: bool) -> None:
        asked.append(how["exported"])
        raise UsageError("enough")

    home = Home(nothing_of_the_user)
    recorded(home, RUN, f"file:{tmp_path}/bucket/{RUN}", PLAN)
    monkeypatch.setattr(hub_push, "find", find)
    with opened_ledger(home, say=print) as ledger, pytest.raises(UsageError, match="enough"):
        hub_push._exported(ledger.run(RUN), home, stage)
    assert asked == [exported]


def test_an_upload_never_changes_who_may_see_it():
    there = Target(REPO, "https://hub", "ada", private=True)
    check(there, public=False)
    check(replace(there, private=None), public=True)
    with pytest.raises(UsageError, match="for everybody to see"):
        check(replace(there, private=False), public=False)
    with pytest.raises(UsageError, match="is there already, and private"):
        check(there, public=True)


def test_the_question_names_everything():
    target = Target(REPO, "https://hub", "ada", private=True, files=frozenset({"README.md"}))
    items = (Item("README.md", Path("x"), 900), Item("model.safetensors", Path("y"), 2_500_000))
    lines = lines_of(Push(RUN, target, items, False, None))
    assert lines == [
        "run          r-abc123",
        "repository   ada/student at https://hub, there already; as ada",
        "visibility   private: only you and your organisation",
        "licence      the model card states none: add `license:` to its head if others may use it",
        "  README.md            900 B  replaces the one there",
        "  model.safetensors   2.5 MB",
        "2 files, 2.5 MB",
    ]
    steering = lines_of(Push(RUN, target, (Item("a\x1b[2J.json", Path("z"), 9),), False, None))
    assert "\x1b" not in "".join(steering)
    public = lines_of(Push(RUN, replace(target, private=None), items, True, "mit"))
    assert public[1:4] == [
        "repository   ada/student at https://hub, new; as ada",
        "visibility   public: everybody can see and download it",
        "licence      mit",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "student", "--yes"], "is no name on the hub"),
        (["--push-to-hub", "../student", "--yes"], "is no name on the hub"),
        (["--push-to-hub", REPO], "no terminal to ask on"),
        (["--public"], "--public says how"),
        (["--push-to-hub", REPO, "--prune"], "--prune goes with neither"),
        (["--push-to-hub", REPO, "--fetch", "x"], "are two things"),
        (["--push-to-hub", REPO, "--yes", "--stage", "train"], "no export of it"),
        (["--push-to-hub", REPO, "--yes"], "there is no token for the hub"),
    ],
)
def test_what_cannot_be_meant_is_said_before_the_hub_is_asked(
    nothing_of_the_user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    exported(Home(nothing_of_the_user), tmp_path)
    done = CliRunner().invoke(kdcloud, ["artifacts", "last", *words])
    assert isinstance(done.exception, UsageError) and message in done.exception.message


def exported(home: Home, tmp_path: Path) -> None:
    """A finished run of which training and export are in a bucket."""
    url = f"file:{tmp_path}/bucket/{RUN}"
    recorded(home, RUN, url, PLAN)
    bucket = open_bucket(url)
    for stage, files in {
        "train": {"model/w": "w"},
        "export": {"hf/README.md": CARD, "hf/model.safetensors": "weights", "x.gguf": "few bits", "result.json": "{}"},
    }.items():
        for rel, text in files.items():
            path = tmp_path / stage / rel
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        commit_folder(bucket, tmp_path / stage, stage, fence=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "uploads"), [("n\n", 0), ("\n", 0), ("y\n", 1)])
def test_only_a_clear_yes_uploads(
    nothing_of_the_user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, uploads: int
):
    exported(Home(nothing_of_the_user), tmp_path)
    done: list[Push] = []
    monkeypatch.setattr(hub_push, "_api", lambda: None)
    monkeypatch.setattr(hub_push, "look", lambda api, repo: Target(repo, "https://hub", "ada"))
    monkeypatch.setattr(hub_push, "upload", lambda api, push: done.append(push) or "https://hub/it")
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    with closing(Ledger(Home(nothing_of_the_user).ledger)) as ledger:
        run = ledger.run(RUN)
    hub_push.push_command(run, Home(nothing_of_the_user), REPO, None, False, False, False)
    assert len(done) == uploads
    assert [push.public for push in done] == [False] * uploads


# -- real requests to a stand-in on loopback ---------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_on_loopback() as hub:
        yield hub


def push(hub: Hub, home: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HOME": str(home / "hf"), "KDCLOUD_HOME": str(home), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "orchestrator.cli", "artifacts", "last", "--push-to-hub", REPO, *words]
    done = subprocess.run(
        argv, env={**os.environ, **own}, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert token not in done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_student_arrives_as_it_was_committed(hub: Hub, nothing_of_the_user: Path, tmp_path: Path):
    exported(Home(nothing_of_the_user), tmp_path)
    done = push(hub, nothing_of_the_user, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.repos == {
        REPO: Repo(True, {"README.md": CARD.encode(), "model.safetensors": b"weights", "x.gguf": b"few bits"})
    }
    document = json.loads(done.stdout)
    assert (document["repo"], document["private"], document["licence"]) == (REPO, True, "apache-2.0")
    assert document["url"] == f"{hub.url}/{REPO}"
    assert [file["path"] for file in document["files"]] == ["README.md", "model.safetensors", "x.gguf"]
    assert "repository   ada/student" in done.stderr and "model.safetensors" in done.stderr
    assert TOKEN.encode() not in Home(nothing_of_the_user).ledger.read_bytes()
    again = push(hub, nothing_of_the_user, "--yes")
    assert again.returncode == 0 and "replaces the one there" in again.stderr


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_and_nothing_is_uploaded(hub: Hub, nothing_of_the_user: Path, tmp_path: Path):
    exported(Home(nothing_of_the_user), tmp_path)
    for what, token, words in (
        ({}, "hf_wrong", "the hub does not know this token"),
        ({"POST /api/repos/create": 403}, TOKEN, f"this token may not write {REPO}"),
        ({"POST /api/repos/create": 409}, TOKEN, f"{REPO} is taken already"),
    ):
        hub.refuses = dict(what)
        done = push(hub, nothing_of_the_user, "--yes", token=token)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert hub.repos == {} and hub.large == {}
    hub.refuses, hub.opens_everything = {}, True
    done = push(hub, nothing_of_the_user, "--yes")
    assert done.returncode == 2 and f"the hub made {REPO} public, which was not asked for" in done.stderr
    assert hub.repos == {REPO: Repo(False)} and hub.large == {}
    hub.url = "http://127.0.0.1:9"
    done = push(hub, nothing_of_the_user, "--yes")
    assert done.returncode == 2 and "cannot reach the hub at http://127.0.0.1:9" in done.stderr
