"""TensorBoard over a run's events: they come as they grow, only this machine is served, and it ends with Ctrl-C."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator import tensorboard
from orchestrator.errors import UsageError
from orchestrator.tensorboard import HOST, Copy, append, check_installed, free_port, serve, server_argv
from tasks.bucket import Bucket, BucketError, open_bucket
from tasks.contract import install_hint


@pytest.fixture
def bucket(tmp_path) -> Bucket:
    return open_bucket(f"file:{tmp_path / 'bucket'}")


def test_a_copy_grows_with_the_events_and_asks_only_for_what_has_changed(bucket, tmp_path):
    copy, file = Copy(bucket, ["pretrain", "train"], tmp_path / "own"), tmp_path / "own/train/events.out.1"
    assert copy.look() == 0
    bucket.put("train/events/events.out.1", b"one")
    assert copy.look() == 1 and file.read_bytes() == b"one"
    held = file.open("rb")  # as TensorBoard holds it
    assert held.read() == b"one"
    bucket.put("train/events/events.out.1", b"one two")
    assert copy.look() == 1 and held.read() == b" two"
    assert copy.look() == 0
    held.close()


def test_only_events_of_known_stages_are_brought(bucket, tmp_path):
    for key in ("train/events/a", "train/model/b", "other/events/c", "train/events-old/d"):
        bucket.put(key, b"x")
    Copy(bucket, ["train"], tmp_path / "own").look()
    assert [
        path.relative_to(tmp_path / "own").as_posix() for path in (tmp_path / "own").rglob("*") if path.is_file()
    ] == ["train/a"]


def test_what_is_shorter_for_a_moment_takes_nothing_away_and_what_differs_begins_anew(tmp_path):
    file = tmp_path / "f"
    append(file, b"abc")
    append(file, b"ab")
    assert file.read_bytes() == b"abc"
    append(file, b"xyz!")
    assert file.read_bytes() == b"xyz!"


def test_a_port_is_the_one_that_was_asked_for_or_a_free_one():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=str(port)) as error:
            free_port(port)
        assert "--port" in error.value.hint
        assert free_port(None) != port
    assert free_port(port) == port


def test_it_listens_on_this_machine_only():
    argv = server_argv(Path("/x"), 7007)
    assert argv[argv.index("--host") + 1] == "127.0.0.1" and "--bind_all" not in argv


def test_without_tensorboard_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as error:
        check_installed()
    assert error.value.hint == install_hint("", "tensorboard")


LISTENS = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"


def listening(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-c", LISTENS, str(port)]


def served(bucket: Bucket, folder: Path, ended, **more):
    said: list[str] = []
    tensorboard.LOOK_S, before = 0.05, tensorboard.LOOK_S
    try:
        status = serve(bucket, ["train"], folder, port=None, say=said.append, ended=ended, **more)
    except BaseException as error:  # noqa: BLE001 - Ctrl-C, as the test plays it
        return said, error
    finally:
        tensorboard.LOOK_S = before
    return said, status


def test_it_says_where_it_is_and_when_the_run_has_ended_and_leaves_nothing_behind(bucket, tmp_path, monkeypatch):
    processes: list[subprocess.Popen[bytes]] = []
    popen, naps, looks, over = subprocess.Popen, iter(range(100)), iter(range(100)), []

    def started(*words, **more) -> subprocess.Popen[bytes]:
        processes.append(popen(*words, **more))
        return processes[-1]

    def ended() -> bool:
        if next(looks) >= 2:
            over.append(True)
        return bool(over)

    def nap(seconds: float) -> None:
        time.sleep(seconds)
        if over and next(naps) > 2:  # a while after the run has ended
            raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard.subprocess, "Popen", started)
    monkeypatch.setattr(tensorboard, "time", SimpleNamespace(sleep=nap, monotonic=time.monotonic))
    said, result = served(bucket, tmp_path / "own", ended, argv=listening)
    assert isinstance(result, KeyboardInterrupt)
    assert said[0].startswith("there are no events yet")
    assert "http://127.0.0.1:" in said[1] and any("the run has ended" in line for line in said)
    assert processes[0].poll() is not None and not (tmp_path / "own").exists()


def test_a_server_that_does_not_start_is_told_with_its_last_word(bucket, tmp_path):
    argv = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    _, error = served(bucket, tmp_path / "own", lambda: False, argv=lambda folder, port: argv)
    assert isinstance(error, UsageError) and "no such thing" in error.message and str(tmp_path) in error.hint


def test_a_bucket_that_does_not_answer_is_told_once_and_asked_again(bucket, tmp_path, monkeypatch):
    calls = iter(range(1000))

    def look(self) -> int:
        if 0 < next(calls) < 5:
            raise BucketError("the store is away")
        return 1

    monkeypatch.setattr(Copy, "look", look)

    def ended() -> bool:
        if next(calls) > 12:
            raise KeyboardInterrupt
        return False

    said, _ = served(bucket, tmp_path / "own", ended, argv=listening)
    assert sum("the store is away" in line for line in said) == 1


@pytest.mark.slow
def test_the_real_tensorboard_shows_curves_that_grow_in_the_bucket(bucket, tmp_path):
    from tasks.stage import _Events

    work = tmp_path / "work"
    events = _Events.open(work)
    assert events is not None

    def write(steps: range) -> None:
        for step in steps:
            events.add(step, {"loss/total": 1.0 / (1 + step)})
        events._writer.flush()
        (file,) = work.iterdir()
        bucket.put(f"train/events/{file.name}", file.read_bytes())

    def points(port: int) -> int:
        link = http.client.HTTPConnection(HOST, port, timeout=10)
        query = urllib.parse.urlencode({"run": "train", "tag": "loss/total"})
        link.request("GET", f"/data/plugin/scalars/scalars?{query}")
        answer = link.getresponse()
        return len(json.loads(answer.read())) if answer.status == 200 else 0

    write(range(5))
    port, seen, until = free_port(None), [], time.monotonic() + 120

    def ended() -> bool:
        seen.append(points(port))
        if seen[-1] == 5:
            write(range(5, 12))
        if seen[-1] == 12 or time.monotonic() > until:
            raise KeyboardInterrupt
        return False

    tensorboard.LOOK_S, before = 1.0, tensorboard.LOOK_S
    try:
        with pytest.raises(KeyboardInterrupt):
            serve(bucket, ["train"], tmp_path / "own", port=port, say=lambda text: None, ended=ended)
    finally:
        tensorboard.LOOK_S = before
    assert 5 in seen and seen[-1] == 12
