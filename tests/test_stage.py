"""Does the context keep what a stage gives it: progress, checkpoints, results, through stops, kills and corruption?"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tasks
from tasks import stage as stage_module
from tasks.bucket import Bucket, BucketError, open_bucket, read_commit, sha256_of
from tasks.contract import DataSource, Exit, Progress, RehearseSettings, Task, TaskError
from tasks.stage import (
    Fenced,
    StageContext,
    Stopped,
    committed_checkpoints,
    explain,
    grow_segments,
    local_checkpoints,
    run_stage,
)

ROOT = Path(tasks.__file__).resolve().parents[1]


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return open_bucket(f"file:{tmp_path / 'bucket'}")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds; the context reads them instead of the machine's."""
    now = [100.0]
    monkeypatch.setattr(stage_module.time, "monotonic", lambda: now[0])
    return now


def task_of(bucket: Bucket, attempt: int = 1) -> Task:
    settings = RehearseSettings(steps=3, seconds_per_step=0.0)
    task = Task("run1", "train", "rehearse", attempt=attempt, fence=attempt, bucket=bucket.url, settings=settings)
    bucket.put("train/task.json", task.to_json().encode())
    return task


def context(bucket: Bucket, work: Path, attempt: int = 1) -> StageContext:
    return StageContext(task_of(bucket, attempt), work, bucket)


def written(ctx: StageContext) -> Progress:
    return Progress.from_json((ctx.work / "progress.json").read_text())


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "state").write_text(text)
        (folder / "sub" / "more").write_text(text * 2)

    return write


def test_the_counter_moves_with_phase_and_done_alone(bucket: Bucket, tmp_path: Path, clock: list[float]) -> None:
    ctx = context(bucket, tmp_path / "w")
    counts = []
    for phase, done, loss in [("a", 0, 1.0), ("a", 0, 2.0), ("a", 1, 2.0), ("b", 1, 2.0), ("b", 1, 3.0)]:
        clock[0] += 1
        ctx.progress(phase, done, loss=loss)
        counts.append(written(ctx).count)
    assert counts == [1, 1, 2, 3, 3]
    assert written(ctx).numbers == {"loss": 3.0}


def test_progress_is_written_at_most_every_fifth_of_a_second_but_never_misses_a_phase_or_the_end(
    bucket: Bucket, tmp_path: Path, clock: list[float]
) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.progress("a", 1, 5)
    seen = []
    for done in (2, 3, 4):
        clock[0] += 0.15
        ctx.progress("a", done, 5)
        seen.append(written(ctx).done)
    assert seen == [1, 3, 3]  # 0.15 s, 0.30 s, 0.15 s after the last one written
    ctx.progress("a", 5, 5)
    assert written(ctx).done == 5
    ctx.progress("b", 0)
    assert written(ctx).phase == "b"


def test_the_step_is_the_median_time_between_two_movements_of_a_phase(
    bucket: Bucket, tmp_path: Path, clock: list[float]
) -> None:
    ctx = context(bucket, tmp_path / "w")
    for done, gap_s in enumerate([50.0, 2.0, 2.0, 9.0]):
        clock[0] += gap_s
        ctx.progress("a", done)
    assert written(ctx).step_s == 2.0  # of 2, 2, 9: the first 50 s were another phase
    clock[0] += 1
    ctx.progress("b", 0)
    assert written(ctx).step_s is None


def test_time_at_work_is_told_apart_from_declared_phases(bucket: Bucket, tmp_path: Path, clock: list[float]) -> None:
    ctx = context(bucket, tmp_path / "w")
    for gap_s, phase, done, declared in [
        (30.0, "prepare", 0, True), (20.0, "train", 1, False), (5.0, "train", 2, False), (4.0, "upload", 7, True),
        (9.0, "train", 2, False), (6.0, "train", 3, False), (1.0, "train", 3, False),
    ]:  # fmt: skip
        clock[0] += gap_s
        ctx.progress(phase, done, declared=declared)
    now = written(ctx)
    # in train: 5 s, 4 s until the upload began, 6 s; the last second moved nothing, and 9 s were the upload's
    assert (now.phase_from, now.phase_s, now.work_s) == (1, 15.0, 15.0)
    assert now.phases_s == {"prepare": 20.0, "upload": 9.0}


def test_a_number_that_is_none_does_not_reach_progress(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.progress("a", 1, loss=float("nan"), speed=3.0)
    assert written(ctx).numbers == {"speed": 3.0}


def test_an_upload_is_a_declared_phase_that_ends_with_the_upload(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.progress("train", 3, 10, loss=1.0)
    during: list[Progress] = []
    commit = stage_module.commit_checkpoint

    def watched(*args: Any, **kwargs: Any) -> None:
        during.append(written(ctx))
        commit(*args, **kwargs)

    monkeypatch.setattr(stage_module, "commit_checkpoint", watched)
    ctx.checkpoint(3, writer("x"))
    assert (during[0].phase, during[0].declared, during[0].unit) == ("checkpoint", True, "bytes")
    after = written(ctx)
    assert (after.phase, after.done, after.total, after.declared) == ("train", 3, 10, False)
    assert after.count > during[0].count > 1  # the upload itself was movement
    assert after.moved_bytes["checkpoint"] > 0 and set(after.phases_s) == {"checkpoint"}


def test_a_loop_that_never_asks_is_stopped_in_the_third_call(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.progress("a", 1)
    ctx.ask_to_stop()
    ctx.progress("a", 2)
    ctx.progress("a", 3)
    with pytest.raises(Stopped):
        ctx.progress("a", 4)


def test_a_loop_that_asks_is_left_to_save_its_work(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.progress("a", 1)
    assert not ctx.stopping
    ctx.ask_to_stop()
    for done in range(2, 10):
        ctx.progress("a", done)
    assert ctx.stopping
    ctx.progress("b", 1)  # a phase in which nobody asks is stopped as well
    ctx.progress("b", 2)
    with pytest.raises(Stopped):
        ctx.progress("b", 3)


def test_the_newest_two_checkpoints_are_kept_here_and_there(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    bucket.put("train/checkpoints/step-1/state", b"a part of an upload that broke")
    (ctx.work / "checkpoints" / "step-1.tmp").mkdir(parents=True)
    for step in (2, 4, 10):
        ctx.checkpoint(step, writer(str(step)))
    assert committed_checkpoints(bucket, "train") == local_checkpoints(ctx.work) == [4, 10]
    assert {stat.key.split("/")[2] for stat in bucket.list("train/checkpoints/")} == {"step-4", "step-10"}
    assert sorted(p.name for p in (ctx.work / "checkpoints").iterdir()) == ["step-10", "step-4"]


def test_a_checkpoint_is_found_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    assert context(bucket, tmp_path / "one").latest_checkpoint() is None
    context(bucket, tmp_path / "one").checkpoint(7, writer("seven"))
    found = context(bucket, tmp_path / "two", attempt=2).latest_checkpoint()
    assert found is not None
    step, folder = found
    assert (step, (folder / "state").read_text(), (folder / "sub" / "more").read_text()) == (7, "seven", "sevenseven")


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], same_machine: bool
) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.checkpoint(1, writer("one"))
    ctx.checkpoint(2, writer("two"))
    bucket.put("train/checkpoints/step-2/state", b"2wo")
    if same_machine:
        (ctx.work / "checkpoints" / "step-2" / "state").write_text("3wo")
    else:
        shutil.rmtree(ctx.work)
    again = context(bucket, ctx.work, attempt=2)
    found = again.latest_checkpoint()
    assert found is not None and found[0] == 1 and (found[1] / "state").read_text() == "one"
    assert "step-2 is corrupt, taking the one before" in capsys.readouterr().out
    again.checkpoint(2, writer("two again"))
    assert bucket.get("train/checkpoints/step-2/state")[0] == b"two again"
    found = context(bucket, tmp_path / "third", attempt=3).latest_checkpoint()
    assert found is not None and (found[1] / "state").read_text() == "two again"


def test_a_complete_local_checkpoint_that_is_newer_wins_and_half_a_one_never_does(
    bucket: Bucket, tmp_path: Path
) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.checkpoint(1, writer("one"))
    for name in ("step-2", "step-3.tmp"):
        (ctx.work / "checkpoints" / name).mkdir()
        writer(name)(ctx.work / "checkpoints" / name)
    found = context(bucket, ctx.work, attempt=2).latest_checkpoint()
    assert found == (2, ctx.work / "checkpoints" / "step-2")


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks import stage
from tasks.bucket_file import FileBucket
def run(ctx, settings):
    write = lambda folder: [(folder / f"part-{n}").write_text(str(n)) for n in range(4)]
    ctx.checkpoint(5, write)
    put_file = FileBucket.put_file
    def dying(self, path, key, moved=None):
        if key == "part-2": os.kill(os.getpid(), signal.SIGKILL)
        return put_file(self, path, key, moved)
    FileBucket.put_file = dying
    ctx.checkpoint(9, write)
stage.run_stage(Path(sys.argv[1]), Path(sys.argv[2]), run)
"""


def test_after_a_kill_in_the_middle_of_a_checkpoints_upload_the_last_committed_one_is_used(
    bucket: Bucket, tmp_path: Path
) -> None:
    path = tmp_path / "task.json"
    path.write_text(task_of(bucket).to_json())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(tmp_path / "w")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -signal.SIGKILL
    assert bucket.head("train/checkpoints/step-9/part-1") is not None  # it was in the middle
    ctx = context(bucket, tmp_path / "another machine", attempt=2)
    found = ctx.latest_checkpoint()
    assert found is not None and found[0] == 5 and len(list(found[1].iterdir())) == 4
    ctx.checkpoint(7, writer("seven"))
    assert bucket.head("train/checkpoints/step-9/part-1") is None


def test_the_same_step_is_uploaded_once(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.checkpoint(1, writer("one"))
    ctx.checkpoint(1, lambda folder: pytest.fail("written twice"))


@pytest.mark.parametrize("name", ["labels", "labels/part.jsonl"])
def test_what_is_kept_comes_back_on_another_machine(bucket: Bucket, tmp_path: Path, name: str) -> None:
    one, two = context(bucket, tmp_path / "one"), context(bucket, tmp_path / "two")
    (one.out / "labels").mkdir()
    (one.out / "labels" / "part.jsonl").write_text("rows")
    assert not two.kept(name)
    one.keep(name)
    assert two.kept(name) and (two.out / "labels" / "part.jsonl").read_text() == "rows"
    assert not two.kept("other")


def test_kept_bytes_that_are_corrupt_are_made_again(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = context(bucket, tmp_path / "one"), context(bucket, tmp_path / "two")
    (one.out / "labels").mkdir()
    (one.out / "labels" / "rows").write_text("rows")
    one.keep("labels")
    bucket.put("train/labels/rows", b"r0ws")
    assert not two.kept("labels") and not (two.out / "labels").exists()
    assert "made again" in capsys.readouterr().out


def test_the_result_is_committed_with_what_is_in_out_and_nothing_else(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    ctx.metric(1, loss__total=2.0)
    ctx.checkpoint(1, writer("one"))
    (ctx.out / "model").mkdir()
    (ctx.out / "model" / "weights").write_text("w")
    ctx.keep("model")
    ctx.finish({"loss": float("nan"), "rows": (1, 2.5, float("inf"))})
    commit = read_commit(bucket, "train")
    assert commit is not None and sorted(commit.files) == ["model/weights", "result.json"]
    assert json.loads(bucket.get("train/result.json")[0]) == {"loss": None, "rows": [1, 2.5, None]}


def test_the_result_says_how_long_the_machine_took_to_get_its_packages(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = {"environment": "train", "torch": "cu126", "seconds": 61.5, "why": "the driver is old"}
    monkeypatch.setenv("KDCLOUD_SETUP", json.dumps(setup))
    context(bucket, tmp_path / "w").finish({"ok": True})
    assert json.loads(bucket.get("train/result.json")[0]) == {"ok": True, "setup": setup}


def test_an_input_is_fetched_whole_or_refused(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    (ctx.out / "weights").write_text("w")
    ctx.finish({"ok": True})
    after = StageContext(Task(**{**ctx.task.__dict__, "stage": "evaluate"}), tmp_path / "other" / "w2", bucket)
    folder = after.input("train")
    assert (folder / "weights").read_text() == "w" and json.loads((folder / "result.json").read_text()) == {"ok": True}
    with pytest.raises(TaskError, match="label has no committed result"):
        after.input("label")
    bucket.put("train/weights", b"v")
    shutil.rmtree(folder)
    with pytest.raises(TaskError, match="corrupt"):
        after.input("train")


def test_prompts_come_from_the_bucket_and_must_be_the_ones_the_run_began_with(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"input": "1+1", "answer": "2"}\n')
    bucket.put_file(rows, "data/prompts.jsonl")
    found = ctx.data(DataSource("data/prompts.jsonl", sha256_of(rows)))
    assert [(row["input"], row["answer"]) for row in found] == [("1+1", "2")]
    with pytest.raises(TaskError, match="not the file this run was started with"):
        ctx.data(DataSource("data/prompts.jsonl", "0" * 64))
    with pytest.raises(TaskError, match="not in the bucket"):
        ctx.data(DataSource("data/other.jsonl"))


def test_metrics_are_rows_and_tensorboard_scalars(bucket: Bucket, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ctx = context(bucket, tmp_path / "w")
    for step in (1, 2):
        ctx.metric(step, loss__total=step * 2.0, loss__kl=float("nan"))
    ctx.close()
    rows = [json.loads(row) for row in (ctx.work / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": s, "loss/total": s * 2.0, "loss/kl": None} for s in (1, 2)]
    events = EventAccumulator(str(ctx.work / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 2.0), (2, 4.0)]


def test_a_row_that_a_kill_left_half_written_is_cut_off(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w")
    (ctx.work / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    ctx.metric(2, loss=1.0)
    ctx.close()
    assert [json.loads(row)["step"] for row in (ctx.work / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_without_tensorboard_the_log_says_so_once_and_rows_go_on(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    ctx = context(bucket, tmp_path / "w")
    for step in (1, 2):
        ctx.metric(step, loss=1.0)
    ctx.close()
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1
    assert len((ctx.work / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_replaced_attempt_commits_nothing(bucket: Bucket, tmp_path: Path) -> None:
    ctx = context(bucket, tmp_path / "w", attempt=1)
    task_of(bucket, attempt=2)
    for write in (lambda: ctx.checkpoint(1, writer("x")), lambda: ctx.finish({}), lambda: ctx.keep("result.json")):
        with pytest.raises(Fenced):
            write()
    assert not any(stat.key.endswith("COMMIT") for stat in bucket.list())


class OutOfMemoryError(RuntimeError):
    """Called as in torch."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TaskError("no such model", hint="look"), "no such model"),
        (BucketError("the store does not answer", hint="look"), "the store does not answer"),
        (OSError(errno.ENOSPC, "No space left on device", "/scratch/x"), "/scratch/x is full"),
        (OSError(errno.EDQUOT, "Quota"), "is full"),
        (MemoryError(), "ran out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "Tried to allocate 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "ran out of memory"),
    ],
)
def test_what_a_person_can_mend_is_one_sentence_and_a_hint(error: Exception, words: str, tmp_path: Path) -> None:
    known = explain(error, tmp_path)
    assert known is not None and words in known.message and "\n" not in known.message and known.hint


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes differ"), OSError(errno.EIO, "I/O error")])
def test_a_bug_is_not_explained_away(error: Exception, tmp_path: Path) -> None:
    assert explain(error, tmp_path) is None


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, Exit.DONE),
        (Stopped(), Exit.TERMINATED),
        (Fenced("newer"), Exit.FENCED),
        (TaskError("bad", hint="mend"), Exit.BAD_INPUT),
    ],
)
def test_the_stages_process_ends_with_the_contracts_status(
    bucket: Bucket, tmp_path: Path, raised: Exception | None, code: Exit
) -> None:
    def run(ctx: object, settings: object) -> dict[str, int]:
        if raised is not None:
            raise raised
        return {"ok": 1}

    path = tmp_path / "task.json"
    path.write_text(task_of(bucket).to_json())
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_stage(path, tmp_path / "w", run) is code
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = tmp_path / "w" / "failed.json"
    assert failed.exists() is (code is Exit.BAD_INPUT)
    assert (read_commit(bucket, "train") is not None) is (code is Exit.DONE)


def test_a_bug_in_a_stage_is_raised_with_its_traceback(bucket: Bucket, tmp_path: Path) -> None:
    def run(ctx: object, settings: object) -> dict[str, int]:
        raise ValueError("3 is not 4")

    path = tmp_path / "task.json"
    path.write_text(task_of(bucket).to_json())
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="3 is not 4"):
            run_stage(path, tmp_path / "w", run)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_cuda_memory_grows_in_segments_unless_somebody_said_otherwise() -> None:
    env: dict[str, str] = {}
    grow_segments(env)
    assert env == dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    told = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    grow_segments(told)
    assert told == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
