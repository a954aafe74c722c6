"""A box on its machine: what lies there, what is saved and comes back, and what only its owner can read."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks import box_servers, notebook
from tasks.box import ARCHIVE, Saver, lay_out, pack, restore, unpack, unpack_code, why_ended
from tasks.box_board import words_of
from tasks.box_servers import Box, Running, Server, jupyter, jupyter_config, last_words, people_env, tensorboard
from tasks.bucket import BucketError, Manifest, commit_folder, open_bucket
from tasks.contract import (
    BEFORE_PREFIX,
    BOX,
    SETTINGS,
    TASK_FILE,
    ApiTeacher,
    BoxSettings,
    DataSource,
    LabelSettings,
    ModelSource,
    RehearseSettings,
    Task,
    TaskError,
    TrainSettings,
    Watch,
)
from tasks.stage import StageContext
from tests.test_dev import LABEL

REHEARSE = BoxSettings("rehearse", RehearseSettings(3, 0.01))
TRAIN = BoxSettings("train", TrainSettings(ModelSource(stage="big"), "label"))


def context(tmp_path: Path, settings: BoxSettings = REHEARSE, *, attempt: int = 1, machine: str = "m") -> StageContext:
    bucket = open_bucket(f"file:{tmp_path}/bucket/run1")
    task = Task("run1", "train", BOX, attempt, attempt, bucket.url, settings, Watch(idle_s=900.0))
    work = tmp_path / machine / "train"
    work.mkdir(parents=True, exist_ok=True)
    (work / TASK_FILE).write_text(task.to_json())
    return StageContext(task, work, bucket)


def commit(tmp_path: Path, prefix: str, **files: bytes) -> None:
    folder = tmp_path / "made" / prefix
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    commit_folder(open_bucket(f"file:{tmp_path}/bucket/run1"), folder, prefix, fence=0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- what lies there --------------------------------------------------------------------------------------------------


def test_inputs_code_and_a_notebook_lie_there_and_what_is_missing_is_said(tmp_path: Path) -> None:
    commit(tmp_path, "label", shard=b"labels")
    ctx = context(tmp_path, TRAIN)
    box = Box.make(ctx.work)
    missing = lay_out(ctx, TRAIN, box)
    assert len(missing) == 1 and missing[0].startswith("big is not here")
    assert (box.home / "inputs" / "label" / "shard").read_bytes() == b"labels"
    assert (box.home / "code" / "tasks" / "losses.py").is_file()
    assert json.loads((box.home / "work" / "start.ipynb").read_text())["nbformat"] == 4
    assert mode(box.root) == 0o700


def test_the_code_is_the_runs_own_out_of_its_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    with zipfile.ZipFile(tmp_path / "run.whl", "w") as code:
        code.writestr("tasks/mine.py", "x = 1")
        code.writestr("environments/train.txt", "torch")
    monkeypatch.setattr(tasks, "__spec__", SimpleNamespace(loader=SimpleNamespace(archive=str(tmp_path / "run.whl"))))
    unpack_code(tmp_path / "code")
    assert [path.name for path in (tmp_path / "code").rglob("*.*")] == ["mine.py"]


@pytest.mark.parametrize("kind", sorted(set(SETTINGS) - {BOX}))
def test_every_kind_of_stage_has_a_first_notebook_whose_cells_are_python(kind: str) -> None:
    made = notebook.notebook(BoxSettings(kind, LABEL))
    cells = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 2 and f"tasks import {kind}" in "".join(cells)
    for cell in cells:
        compile(cell, "cell", "exec")
    pytest.importorskip("nbformat").validate(made)


def test_a_label_stage_that_asks_an_api_asks_nothing_from_a_box() -> None:
    api = ApiTeacher("https://x/v1", "m", "KEY", 1, 1, 1)
    label = LabelSettings(ModelSource(path="m"), DataSource("builtin:addition/train"), "exact", 2, api=api)
    text = json.dumps(notebook.notebook(BoxSettings("label", label)))
    assert "label.run" not in text and "no key" in text


def test_the_stages_own_functions_run_in_a_notebook_and_nothing_leaves_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(tmp_path)
    box = Box.make(ctx.work)
    lay_out(ctx, REHEARSE, box)
    before = sorted(path for path in (tmp_path / "bucket").rglob("*"))
    monkeypatch.setenv(notebook.BOX_ENV, str(ctx.work))
    code = [cell["source"] for cell in notebook.notebook(REHEARSE)["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    exec("\n".join(code).replace("rehearse.run(", "result = rehearse.run("), names)
    assert names["result"]["steps"] == 3  # type: ignore[index]
    exec("\n".join(code), names)  # again, in a folder of its own
    assert sorted(path.name for path in (box.home / "scratch").iterdir())[0] == "rehearse-1"
    assert len(list((box.home / "scratch").glob("*/metrics.jsonl"))) == 2
    assert sorted(path for path in (tmp_path / "bucket").rglob("*")) == before


def test_a_notebook_says_which_input_the_box_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path, TRAIN)
    Box.make(ctx.work)
    monkeypatch.setenv(notebook.BOX_ENV, str(ctx.work))
    own, settings = notebook.stage(alpha=0.5)
    assert settings.alpha == 0.5
    with pytest.raises(TaskError, match="label is not in this box"):
        own.input("label")


# --- what is saved ----------------------------------------------------------------------------------------------------


def checkpoints(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "bucket").glob("run1/train/checkpoints/*/COMMIT"))


def test_files_are_saved_when_they_change_whatever_they_are_called_and_come_back_on_the_next_machine(
    tmp_path: Path,
) -> None:
    ctx = context(tmp_path)
    work = Box.make(ctx.work).home / "work"
    saver = Saver(ctx, work)
    assert saver.look(0.0) == "" and checkpoints(tmp_path) == []  # nothing changed
    (work / "a b").mkdir()
    (work / "a b" / "COMMIT").write_text("mine")
    (work / "run.sh").write_text("x")
    (work / "run.sh").chmod(0o700)
    (work / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(work / "pipe")
    (work / "ü \n.py").write_text("x")
    (work / ".ipynb_checkpoints").mkdir()
    (work / ".ipynb_checkpoints" / "old").write_text("x")
    saver.look(3600.0)
    assert checkpoints(tmp_path) == []  # not due yet
    saver.look(0.0)
    saver.look(0.0)
    assert checkpoints(tmp_path) == ["step-1"]
    (work / "a b" / "COMMIT").write_text("mine, longer")
    saver.look(0.0)
    assert checkpoints(tmp_path) == ["step-1", "step-2"]

    commit(tmp_path, BEFORE_PREFIX, **{ARCHIVE: b"not asked for: this box has newer files"})
    later = context(tmp_path, BoxSettings("rehearse", REHEARSE.settings, before=True), attempt=2, machine="n")
    there = Box.make(later.work).home / "work"
    restore(later, later.task.settings, there)  # type: ignore[arg-type]
    assert sorted(path.name for path in there.iterdir()) == ["a b", "run.sh", "ü \n.py"]
    assert os.access(there / "run.sh", os.X_OK) and not os.access(there / "ü \n.py", os.X_OK)
    assert (there / "a b" / "COMMIT").read_text() == "mine, longer"
    Saver(later, there).look(0.0)
    assert checkpoints(tmp_path) == ["step-1", "step-2"]


def test_a_box_begins_with_the_files_of_an_earlier_one(tmp_path: Path) -> None:
    commit(tmp_path, BEFORE_PREFIX, **{ARCHIVE: archive({"mine.txt": b"made by hand", "start.ipynb": b"changed"})})
    settings = BoxSettings("rehearse", REHEARSE.settings, before=True)
    ctx = context(tmp_path, settings)
    box = Box.make(ctx.work)
    lay_out(ctx, settings, box)
    assert (box.home / "work" / "mine.txt").read_text() == "made by hand"
    assert (box.home / "work" / "start.ipynb").read_text() == "changed"


def archive(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as out:
        for name, data in files.items():
            out.writestr(name, data)
    return memory.getvalue()


@pytest.mark.parametrize("name", ["../../../../outside", "/{tmp}/outside", "a/../../../../outside"])
def test_an_archive_in_the_bucket_writes_nothing_outside_of_the_box(tmp_path: Path, name: str) -> None:
    commit(tmp_path, BEFORE_PREFIX, **{ARCHIVE: archive({name.format(tmp=tmp_path): b"x"})})
    settings = BoxSettings("rehearse", REHEARSE.settings, before=True)
    ctx = context(tmp_path, settings)
    box = Box.make(ctx.work)
    with pytest.raises(TaskError, match="cannot be put back"):
        restore(ctx, settings, box.home / "work")
    assert not list(tmp_path.rglob("outside"))


def test_what_is_too_large_to_save_is_told_and_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.box.SAVE_LIMIT_BYTES", 1 << 30)
    ctx = context(tmp_path)
    work = Box.make(ctx.work).home / "work"
    saver = Saver(ctx, work)
    with (work / "large").open("wb") as file:
        file.truncate((1 << 30) + 1)  # takes no disk
    assert "NOT saved" in saver.look(0.0) and checkpoints(tmp_path) == [] and saver.fails
    assert saver.finish(tmp_path / ARCHIVE) == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BucketError("the bucket is away")])
def test_a_save_that_fails_is_told_tried_again_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ctx = context(tmp_path)
    work = Box.make(ctx.work).home / "work"
    saver = Saver(ctx, work)
    (work / "mine").write_text("x")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr("tasks.box.pack", fail)
        assert "could not be saved" in saver.look(0.0) and checkpoints(tmp_path) == []
        if isinstance(error, OSError):
            assert saver.finish(tmp_path / ARCHIVE) == 0
        assert saver.look(3600.0) == "" and saver.fails  # until it is tried again
    assert saver.look(0.0) == "" and checkpoints(tmp_path) == ["step-1"] and not saver.fails


def test_the_result_holds_the_files_as_they_are_at_the_end(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    work = Box.make(ctx.work).home / "work"
    saver = Saver(ctx, work)
    (work / "mine").write_text("x")
    assert saver.finish(ctx.out / ARCHIVE) > 0
    ctx.finish({"ended": "x"})
    manifest = Manifest.from_json((tmp_path / "bucket" / "run1" / "train" / "COMMIT").read_bytes())
    assert set(manifest.files) == {ARCHIVE, "result.json"}


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands and environments of servers, none of which is started."""
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(box_servers, "start", lambda argv, box, name, env: found.append((list(argv), dict(env))))
    return found


def test_token_and_secret_path_are_in_files_of_their_owner_and_in_no_argument_or_variable(
    tmp_path: Path, started: list[tuple[list[str], dict[str, str]]]
) -> None:
    box = Box.make(tmp_path)
    env = people_env(os.environ, tmp_path, box)
    doors = [jupyter(box, env).door, tensorboard(box, env).door]
    assert doors[0] is not None and doors[1] is not None
    token, place = doors[0]["path"].partition("token=")[2], doors[1]["path"].strip("/")
    assert len(token) >= 40 and len(place) >= 40
    said = json.dumps(started)
    assert len(started) == 2 and token not in said and place not in said
    config = box.jupyter["JUPYTER_CONFIG_DIR"] / "jupyter_server_config.json"
    assert token in config.read_text() and mode(config) == 0o600
    assert place in (box.root / "tensorboard.json").read_text() and mode(box.root / "tensorboard.json") == 0o600
    assert jupyter(box, env).door != doors[0]


def test_servers_listen_on_loopback_and_call_nobody() -> None:
    config = jupyter_config(Path("/x"), 40001, "t")
    assert config["ServerApp"]["ip"] == "127.0.0.1" and config["ServerApp"]["port_retries"] == 0
    assert config["ServerApp"]["allow_remote_access"] is False and config["LabApp"]["news_url"] is None
    words = words_of({"logdir": "/x", "port": 40002, "path": "/secret"})
    assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--path_prefix") + 1] == "/secret"
    assert words[words.index("--load_fast") + 1] == "false"


def test_what_people_run_has_no_key_of_the_bucket_and_does_not_think_it_is_one_of_many(tmp_path: Path) -> None:
    env = {
        "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "s", "KDCLOUD_CODE_URL": "s", "RANK": "0", "WORLD_SIZE": "4",
        "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "x", "JUPYTER_TOKEN": "s", "HF_TOKEN": "mine", "PATH": "/bin",
        "KDCLOUD_STAGE_MARK": "m", "KDCLOUD_MACHINE": "kd-a",
    }  # fmt: skip
    found = people_env(env, tmp_path, Box.make(tmp_path))
    assert {k: v for k, v in found.items() if v in ("s", "x") or k in ("RANK", "WORLD_SIZE")} == {}
    assert (found["HF_TOKEN"], found["PATH"]) == ("mine", "/bin")
    assert (found["KDCLOUD_STAGE_MARK"], found["KDCLOUD_MACHINE"]) == ("m", "kd-a")  # by these it is ended
    assert found["JUPYTER_CONFIG_DIR"].startswith(str(tmp_path))


def test_what_a_server_said_last_is_told_unless_it_may_hold_the_token(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nport is taken\n\n")
    assert last_words(log) == "port is taken"
    log.write_text("http://127.0.0.1:1/lab?token=abc")
    assert "abc" not in last_words(log)


# --- its end ----------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_kept_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, again = tmp_path / "work", tmp_path / "again"
    work.mkdir(), again.mkdir()
    (work / "good").write_text("kept")
    (work / os.fsdecode(b"bad\xff")).write_text("lost")
    pack(work, tmp_path / ARCHIVE)
    unpack(tmp_path / ARCHIVE, again)
    assert [path.name for path in again.iterdir()] == ["good"] and (again / "good").read_text() == "kept"
    assert "'bad\\udcff' is not saved" in capsys.readouterr().out


def test_more_than_is_ever_saved_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("zeros", bytes(4096))
    monkeypatch.setattr("tasks.box.SAVE_LIMIT_BYTES", 4095)
    with pytest.raises(ValueError, match="holds more than"):
        unpack(tmp_path / ARCHIVE, tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("limit", "stopping", "quiet_s", "left_s", "alive", "why"),
    [
        (None, False, 0.0, 1e4, True, ""),
        (1.0, False, 0.0, 1e4, True, "its client closed it"),
        (None, False, 0.0, 1e4, False, "JupyterLab was shut down"),
        (None, True, 0.0, 1e4, True, "it was told to end"),
        (None, True, 0.0, 1e4, False, "it was told to end"),  # as every process of the machine was
        (None, True, 0.0, 1.0, True, "its time was up"),
        (None, True, 900.0, 1e4, True, "nothing worked on it for 15 min"),
        (None, False, 1200.0, 1e4, True, "nothing worked on it for 20 min"),  # whatever was saved meanwhile
    ],
)
def test_why_a_box_ends(
    limit: float | None, stopping: bool, quiet_s: float, left_s: float, alive: bool, why: str
) -> None:
    ctx = SimpleNamespace(limit=limit, stopping=stopping, task=SimpleNamespace(watch=Watch(idle_s=900.0)))
    process = SimpleNamespace(poll=lambda: None if alive else 0)
    running = Running({"jupyter": Server("JupyterLab", process, lambda: True)})  # type: ignore[arg-type]
    assert why_ended(ctx, running, quiet_s=quiet_s, left_s=left_s) == why  # type: ignore[arg-type]


def test_a_box_on_several_gpus_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun would start as many boxes as there are GPUs."""
    from tasks import supervisor

    monkeypatch.setenv("SKYPILOT_NUM_GPUS_PER_NODE", "4")
    begun: list[list[str]] = []

    class Begun(Exception): ...

    def popen(argv: list[str], **_: object) -> None:
        begun.append(argv)
        raise Begun

    monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
    wanted = ((BOX, REHEARSE, "tasks.stage"), ("rehearse", REHEARSE.settings, "torch.distributed.run"))
    for kind, settings, word in wanted:
        task = Task("run1", "train", kind, 1, 1, f"file:{tmp_path}", settings)
        one = supervisor._Supervision.__new__(supervisor._Supervision)
        one._task, one._work = task, tmp_path
        one._state = SimpleNamespace(mark="m")  # type: ignore[assignment]
        with pytest.raises(Begun):
            one._start(None)
        assert begun[-1][:3] == [sys.executable, "-m", word]
