"""Does the supervisor go on looking at the bucket when this machine's disk is full?"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tasks import supervisor
from tasks.bucket import open_bucket
from tasks.contract import LIMIT_FILE, TASK_FILE, Limit, RehearseSettings, Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    url = f"file:{tmp_path}/bucket/run1"
    return Task("run1", "rehearse", "rehearse", 1, 1, url, RehearseSettings(10, 1.0), gate=True)


def full_disk(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_said_once_and_ends_no_looking(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, work = open_bucket(task.bucket), tmp_path / "work"
    work.mkdir()
    courier = supervisor._Courier(bucket, task, work)
    bucket.put(f"rehearse/{LIMIT_FILE}", Limit(4.0, 1, 1).to_json().encode())
    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "write_text", full_disk)
        for _ in range(3):
            courier._try(courier._look_for_limit)
    assert capsys.readouterr().out.count("this machine's disk: [Errno 28]") == 1 and not list(work.iterdir())
    courier._try(courier._look_for_limit)  # there is room again
    assert Limit.from_json((work / LIMIT_FILE).read_text()).total == 4.0


def test_its_thread_lives_on_and_sees_a_newer_attempt(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_bucket(task.bucket)
    bucket.put(f"rehearse/{LIMIT_FILE}", Limit(4.0, 1, 1).to_json().encode())
    tried: list[Any] = []

    def full(path: Path, text: str) -> None:
        tried.append(path)
        if len(tried) == 1:  # only now: what is seen of it was looked for after the disk was full
            bucket.put(f"rehearse/{TASK_FILE}", Task(**{**vars(task), "attempt": 2}).to_json().encode())
        full_disk(path, text)

    monkeypatch.setattr(supervisor, "write_text", full)
    courier = supervisor._Courier(bucket, task, tmp_path)
    courier._jobs = [(0.0, job) for _, job in courier._jobs]
    courier.start()
    try:
        for _ in range(100):
            if courier.newest_attempt == 2:
                break
            courier._ended.wait(0.05)
        assert tried and courier.newest_attempt == 2 and courier.is_alive()
    finally:
        courier.stop()
