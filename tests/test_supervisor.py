"""Does a stage end when it must, with its work saved and nothing left alive? Real processes, small times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import tasks
from tasks import supervisor
from tasks.bucket import Bucket, fetch_folder, open_bucket, read_commit, sha256_of
from tasks.contract import Ended, Exit, Limit, Progress, RehearseSettings, Task, Watch
from tasks.rehearse import payload

ROOT = Path(tasks.__file__).resolve().parents[1]
WATCH = Watch(idle_s=20, stall_floor_s=10, tick_s=0.05, flush_s=1.2)
STALLING = replace(WATCH, stall_floor_s=0.6)
STAGE = "rehearse"

# A stage's process with the real context and `body` as its working code.
CHILD = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from tasks import stage
from tasks.contract import TaskError
def run(ctx, settings):
{body}
    return {{}}
sys.excepthook = stage.end_with_traceback
work = Path({work!r})
stage.end_process(stage.run_stage(work / "task.json", work, run))
"""

# The supervisor of that process.
PARENT = """
import sys, time
from pathlib import Path
from tasks import supervisor
{before}
sys.excepthook = supervisor.end_with_traceback
url, stage, attempt, remaining_s, work, code = sys.argv[1:]
argv = [sys.executable, "-c", code]
supervisor.end_process(supervisor.supervise(url, stage, int(attempt), float(remaining_s), Path(work), child_argv=argv))
"""

ENDLESS = "ctx.progress('train', 1, 10)\nwhile True: time.sleep(0.02); ctx.progress('train', time.monotonic())"
HUNG = "ctx.progress('train', 1, 10)\nwhile True: time.sleep(1)"
# Idle like TensorBoard: one child in a session of its own, one in ours, and one whose parent has gone already.
SPAWN = """
kids = [subprocess.Popen(["sleep", "600"], start_new_session=True), subprocess.Popen(["sleep", "600"])]
code = "import subprocess as s; print(s.Popen(['sleep', '600'], start_new_session=True, stdout=s.DEVNULL).pid)"
orphan = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip()
(ctx.work / "kids").write_text(" ".join([*(str(kid.pid) for kid in kids), orphan]))
"""

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # real processes, ended to the tenth of a second


class Bench:
    """A bucket folder, a work folder and the supervisors started over them."""

    def __init__(self, root: Path) -> None:
        self.bucket: Bucket = open_bucket(f"file:{root / 'bucket' / 'run1'}")
        self.work = root / "work"
        self.started: list[subprocess.Popen[str]] = []

    def task(
        self, *, attempt: int = 1, watch: Watch = WATCH, steps: int = 10, step_s: float = 0.05, every: int = 3,
        stage: str = STAGE,
    ) -> Task:
        task = Task(
            run="run1", stage=stage, kind="rehearse", attempt=attempt, fence=attempt, bucket=self.bucket.url,
            watch=watch, settings=RehearseSettings(steps, step_s, every, 1000),
        )
        self.bucket.put(f"{stage}/task.json", task.to_json().encode())
        return task

    def start(
        self, body: str | None = None, *, attempt: int = 1, remaining_s: float = 60.0, before: str = "",
        code: Path = ROOT, then: str = "",
    ) -> subprocess.Popen[str]:
        """The supervisor; the stage is `body`, or the rehearsal through the real command line."""
        if body is None:
            args = [
                "-m", "tasks.supervisor", "--bucket", self.bucket.url, "--stage", STAGE, "--attempt", str(attempt),
                "--remaining-s", str(remaining_s), "--work", str(self.work), "--then", then,
            ]
        else:
            child = CHILD.format(body=textwrap.indent(body, "    "), work=str(self.work))
            parent = PARENT.format(before=before)
            args = ["-c", parent, self.bucket.url, STAGE, str(attempt), str(remaining_s), str(self.work), child]
        process = subprocess.Popen(
            [sys.executable, *args], env={**os.environ, "PYTHONPATH": str(code)}, text=True,
            cwd=self.work.parent,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, body: str | None = None, **kwargs: object) -> tuple[int, str]:
        process = self.start(body, **kwargs)  # type: ignore[arg-type]
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def ended(self, stage: str = STAGE) -> Ended:
        return Ended.from_json(self.bucket.get(f"{stage}/ended.json")[0].decode())

    def progress(self) -> Progress:
        return Progress.from_json((self.work / "progress.json").read_text())

    def mark(self) -> str:
        return str(json.loads((self.work / "supervisor.json").read_text())["mark"])

    def alive(self) -> list[int]:
        """Process ids of everything that carries the stage's mark."""
        return [p.pid for p in supervisor._marked(self.mark()) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for process in bench.started:
        process.kill()
        process.communicate()
    if (bench.work / "supervisor.json").exists():
        supervisor.end_marked(bench.mark())


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_the_log_says_which_packages_the_machine_got_and_why_not_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = {"environment": "train", "torch": "cu126", "seconds": 61.5, "why": "vLLM needs a newer driver"}
    monkeypatch.setenv("KDCLOUD_SETUP", json.dumps(setup))
    bench.task(steps=1)
    rc, output = bench.run()
    assert rc == 0, output
    log = bench.bucket.get(f"{STAGE}/log.txt")[0].decode()
    assert "environment: train, ready in 62 s; vLLM needs a newer driver" in log
    assert json.loads(bench.bucket.get(f"{STAGE}/result.json")[0])["setup"] == setup


def test_a_rehearsal_runs_to_its_end_and_everything_is_in_the_bucket(bench: Bench, tmp_path: Path) -> None:
    bench.task()
    rc, output = bench.run()
    assert (rc, bench.ended().reason, bench.ended().rc) == (0, "done", 0), output
    assert bench.ended().peak_gib is not None and bench.ended().last_checkpoint == "step-9"
    commit = read_commit(bench.bucket, STAGE)
    assert commit is not None and sorted(commit.files) == ["payload.bin", "result.json"]
    result = json.loads((fetch_folder(bench.bucket, STAGE, tmp_path / "got") / "result.json").read_text())
    assert (tmp_path / "got" / "payload.bin").read_bytes() == payload(result["digest"], 1000)
    progress = Progress.from_json(bench.bucket.get(f"{STAGE}/progress.json")[0].decode())
    assert (progress.phase, progress.done, progress.total) == ("rehearse", 10, 10)
    assert progress.numbers["rss_gib"] > 0 and progress.numbers["cpu_cores"] >= 0
    steps = [json.loads(row)["step"] for row in bench.bucket.get(f"{STAGE}/metrics.jsonl")[0].splitlines()]
    assert steps == list(range(1, 11))
    assert any("tfevents" in stat.key for stat in bench.bucket.list(f"{STAGE}/events/"))

    ended = bench.ended()
    os.remove(bench.work / "task.json")  # a second start must not even prepare
    assert bench.run()[0] == 0
    assert bench.ended() == ended and not (bench.work / "task.json").exists()


def put_limit(bench: Bench, total: float, *, attempt: int = 1, fence: int = 1) -> None:
    bench.bucket.put(f"{STAGE}/limit.json", Limit(total, attempt, fence).to_json().encode())


def test_a_stage_ends_early_and_says_so_when_its_client_sets_a_limit(bench: Bench) -> None:
    task = bench.task(steps=400, step_s=0.05)
    bench.bucket.put(f"{STAGE}/task.json", replace(task, gate=True).to_json().encode())
    process = bench.start()
    until(lambda: progress_of(bench).done >= 2)
    put_limit(bench, 60)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, bench.ended().reason) == (0, "done"), output
    result = json.loads(bench.bucket.get(f"{STAGE}/result.json")[0])
    assert result["limited"] == {"planned": 400, "done": 60} and result["steps"] == 60
    assert (progress_of(bench).total, progress_of(bench).attempt) == (60, 1)


def test_a_limit_for_another_attempt_or_by_a_client_that_lost_the_run_is_none(bench: Bench) -> None:
    task = bench.task(attempt=2, steps=40, step_s=0.05)
    bench.bucket.put(f"{STAGE}/task.json", replace(task, gate=True).to_json().encode())
    put_limit(bench, 5, attempt=1, fence=2)
    process = bench.start(attempt=2)
    until(lambda: progress_of(bench).done >= 25)  # 1.25 s: it was looked for in between
    put_limit(bench, 30, attempt=2, fence=1)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert json.loads(bench.bucket.get(f"{STAGE}/result.json")[0])["steps"] == 40


def progress_of(bench: Bench) -> Progress:
    found = bench.bucket.head(f"{STAGE}/progress.json")
    return Progress() if found is None else Progress.from_json(bench.bucket.get(f"{STAGE}/progress.json")[0].decode())


def test_a_stage_runs_from_a_wheel_that_is_only_on_the_path(bench: Bench, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "kdcloud.whl", "w") as wheel:
        for path in Path(tasks.__file__).parent.glob("*.py"):
            wheel.write(path, f"tasks/{path.name}")
    task = bench.task(steps=2, step_s=0.0)
    for sha256, expected in [("0" * 64, Exit.BAD_INPUT), (sha256_of(tmp_path / "kdcloud.whl"), Exit.DONE)]:
        bench.bucket.put(f"{STAGE}/task.json", replace(task, code_sha256=sha256).to_json().encode())
        rc, output = bench.run(code=tmp_path / "kdcloud.whl")
        assert (rc, bench.ended().rc) == (expected, expected), output


def test_a_hung_loop_is_ended_although_a_heartbeat_thread_lives(bench: Bench) -> None:
    beat = """
def beat():
    while True:
        time.sleep(0.05); print("alive", flush=True)
        ctx.progress("train", 1, 10, loss=time.time())
threading.Thread(target=beat, daemon=True).start()
"""
    bench.task(watch=STALLING)
    rc, output = bench.run(beat + HUNG)
    assert (rc, bench.ended().reason) == (Exit.STALLED, "stalled"), output
    assert "in train, at 1 of 10 steps" in bench.ended().message
    assert b"alive" in bench.bucket.get(f"{STAGE}/log.txt")[0] and "alive" in output


def test_a_busy_loop_without_progress_is_ended(bench: Bench) -> None:
    bench.task(watch=STALLING)
    rc, output = bench.run("ctx.progress('train', 1, 10)\nwhile True: pass")
    assert (rc, bench.ended().reason) == (Exit.STALLED, "stalled"), output
    assert bench.alive() == []


@pytest.mark.parametrize(("declared", "rc"), [(True, Exit.DONE), (False, Exit.STALLED)])
def test_a_long_upload_that_moves_bytes_is_work_only_if_declared(bench: Bench, declared: bool, rc: int) -> None:
    body = f"""
ctx.progress("upload", 0, declared={declared})
end = time.monotonic() + 2.0
with open(ctx.work / "sent", "wb") as file:
    while time.monotonic() < end and not ctx.stopping:
        file.write(bytes(100_000)); file.flush(); time.sleep(0.05)
"""
    bench.task(watch=replace(WATCH, stall_floor_s=0.8))
    assert bench.run(body + "if ctx.stopping: raise stage.Stopped")[0] == rc


def test_idle_children_are_no_work_and_are_gone_with_the_stage(bench: Bench) -> None:
    bench.task(watch=STALLING)
    rc, output = bench.run(SPAWN + HUNG)
    kids = [int(pid) for pid in (bench.work / "kids").read_text().split()]
    assert rc == Exit.STALLED and len(kids) == 3, output
    assert not any(is_alive(kid) for kid in kids)


def test_children_left_open_by_a_stage_that_is_done_are_gone(bench: Bench) -> None:
    bench.task()
    rc, output = bench.run(SPAWN)
    kids = [int(pid) for pid in (bench.work / "kids").read_text().split()]
    assert rc == Exit.DONE and len(kids) == 3, output
    assert not any(is_alive(kid) for kid in kids)


def test_the_deadline_saves_a_checkpoint_in_time_and_the_next_attempt_goes_on_from_it(bench: Bench) -> None:
    bench.task(steps=40, every=1000)
    began = time.monotonic()
    rc, output = bench.run(remaining_s=3.0)
    assert time.monotonic() - began < 3.0 + 0.5  # 0.5 s: the interpreter's own start
    assert (rc, bench.ended().reason) == (Exit.DEADLINE, "deadline"), output
    step = int(str(bench.ended().last_checkpoint).removeprefix("step-"))
    assert "stopped as asked" in output and "Traceback" not in output
    assert 0 < step < 40 and read_commit(bench.bucket, f"{STAGE}/checkpoints/step-{step}") is not None

    bench.task(steps=40, every=1000, attempt=2)
    bench.work = bench.work.with_name("another machine")
    rc, output = bench.run(attempt=2)
    assert rc == 0 and f"resumed at step {step}" in output
    steps = [json.loads(row)["step"] for row in bench.bucket.get(f"{STAGE}/metrics.jsonl")[0].splitlines()]
    assert steps == list(range(1, 41))  # none twice, none left out
    log = bench.bucket.get(f"{STAGE}/log.txt")[0].decode()
    assert "attempt 1 of" in log and "attempt 2 of" in log


def test_a_stage_that_will_not_stop_is_gone_before_the_deadline(bench: Bench) -> None:
    bench.task()
    began = time.monotonic()
    moving = "with ctx._moving('upload') as moved:\n    while True: time.sleep(0.02); moved(1)"
    rc, output = bench.run("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + moving, remaining_s=2.5)
    assert (rc, bench.ended().reason) == (Exit.DEADLINE, "deadline"), output
    assert time.monotonic() - began < 2.5 + 0.3
    assert bench.alive() == []


def test_the_deadline_holds_while_the_store_hangs(bench: Bench) -> None:
    hang = """
from tasks.bucket_file import FileBucket
put = FileBucket.put
def hanging(self, key, *args, **kwargs):
    if Path(work, "progress.json").exists(): time.sleep(600)
    return put(self, key, *args, **kwargs)
work = sys.argv[5]
FileBucket.put = hanging
"""
    bench.task()
    began = time.monotonic()
    rc, output = bench.run(ENDLESS, remaining_s=2.2, before=hang)
    assert rc == Exit.DEADLINE and "did not answer in time" in output
    assert time.monotonic() - began < 2.2 + 0.5


def test_a_loop_that_never_asks_whether_to_stop_is_stopped_by_its_progress(bench: Bench) -> None:
    bench.task()
    bench.bucket.put(f"{STAGE}/ended.json", b"of an earlier attempt")
    process = bench.start(ENDLESS)
    until(lambda: (bench.work / "progress.json").exists())
    assert bench.bucket.head(f"{STAGE}/ended.json") is None
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, bench.ended().reason) == (Exit.TERMINATED, "terminated")
    assert "stopped as asked" in output


@pytest.mark.parametrize("guarded", [True, False])
def test_no_child_outlives_a_supervisor_that_is_killed(bench: Bench, guarded: bool) -> None:
    bench.task()
    own_way_out = "" if guarded else "stage.die_with_parent()\n"
    process = bench.start(own_way_out + (SPAWN if guarded else "") + ENDLESS)
    until(lambda: (bench.work / "progress.json").exists())
    assert len(bench.alive()) == (4 if guarded else 1)
    if not guarded:  # the guard was killed too
        for child in psutil.Process(process.pid).children():
            if child.pid not in bench.alive():
                child.kill()
    process.kill()
    until(lambda: not bench.alive(), limit_s=5)


def test_a_supervisor_ends_what_a_killed_one_left_behind(bench: Bench) -> None:
    bench.task()
    first = bench.start(ENDLESS)
    until(lambda: (bench.work / "progress.json").exists())
    left = bench.alive()
    for child in psutil.Process(first.pid).children():
        if child.pid not in left:
            child.kill()  # the guard
    first.kill()
    assert bench.alive() == left != []
    bench.task(attempt=2)
    assert bench.run("pass", attempt=2)[0] == 0
    assert not any(is_alive(pid) for pid in left)


def test_a_stage_ends_when_its_clients_lease_stands_still(bench: Bench) -> None:
    bench.bucket.put("lease.json", b"1")
    bench.task(watch=replace(WATCH, client_lease_s=4.0))
    process = bench.start(ENDLESS)
    for beat in range(25):  # renewed for longer than the lease
        time.sleep(0.2)
        bench.bucket.put("lease.json", str(beat).encode())
    assert process.poll() is None
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, bench.ended().reason) == (Exit.CLIENT_GONE, "client_gone"), output


def test_a_machine_that_was_rebooted_ends_at_once_and_stays_ended(bench: Bench) -> None:
    bench.task(watch=replace(WATCH, flush_s=15))
    bench.work.mkdir()
    state = {"boot_id": "another", "attempt": 1, "at_s": 1.0, "remaining_s": 3600.0, "mark": "none"}
    (bench.work / "supervisor.json").write_text(json.dumps(state))
    for _ in range(2):
        assert bench.run()[0] == Exit.REBOOTED
        assert bench.ended().reason == "rebooted"
    assert not (bench.work / "progress.json").exists()  # the stage was never started
    bench.task(attempt=2, watch=replace(WATCH, flush_s=15))
    code, output = bench.run(attempt=2)
    assert code == 0, output  # paid for anew


def test_a_restart_on_the_same_machine_gains_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(supervisor, "boottime_s", lambda: clock[0])
    state, before, _ = supervisor._State.take(tmp_path, 1, 50.0)
    assert (before, supervisor.left_s(state)) == (None, 50.0)
    clock[0] = 130.0
    again, before, rebooted = supervisor._State.take(tmp_path, 1, 50.0)
    assert (supervisor.left_s(again), before, rebooted) == (20.0, state, False)
    assert again.mark != state.mark
    assert supervisor.left_s(supervisor._State.take(tmp_path, 1, 5.0)[0]) == 5.0  # a deadline may come nearer
    assert supervisor.left_s(supervisor._State.take(tmp_path, 2, 50.0)[0]) == 50.0  # a new attempt was paid for anew


def test_a_newer_attempt_stops_the_stage_and_every_write_of_it(bench: Bench) -> None:
    bench.task(steps=10_000, every=10_000)
    process = bench.start()
    until(lambda: (bench.work / "progress.json").exists() and bench.progress().done > 2)
    bench.task(attempt=2)
    before = {stat.key: stat.etag for stat in bench.bucket.list()}
    output, _ = process.communicate(timeout=10)
    assert process.returncode == Exit.FENCED, output
    after = {stat.key: stat.etag for stat in bench.bucket.list()}
    assert {key for key in after if after[key] != before.get(key)} <= {f"{STAGE}/progress.json"}  # was on its way
    assert bench.alive() == []


def test_an_attempt_that_was_replaced_before_it_started_writes_nothing(bench: Bench) -> None:
    bench.task(attempt=2)
    assert bench.run(attempt=1)[0] == Exit.FENCED
    assert [stat.key for stat in bench.bucket.list()] == [f"{STAGE}/task.json"]


def test_a_new_attempt_waits_for_the_one_it_replaces_to_leave(bench: Bench) -> None:
    bench.task(steps=10_000, every=10_000)
    first = bench.start()
    until(lambda: (bench.work / "progress.json").exists())
    bench.task(attempt=2, steps=3)
    assert bench.run(attempt=2)[0] == 0
    assert first.wait(timeout=1) == Exit.FENCED


def test_a_second_supervisor_of_the_same_stage_leaves_the_first_one_alone(bench: Bench) -> None:
    bench.task()
    first = bench.start(ENDLESS)
    until(lambda: (bench.work / "progress.json").exists())
    alive = bench.alive()
    rc, output = bench.run(ENDLESS, remaining_s=0.5)
    assert rc == Exit.BAD_INPUT and "another supervisor" in output
    assert first.poll() is None and bench.alive() == alive != []
    assert bench.bucket.head(f"{STAGE}/ended.json") is None  # it has not ended


def test_a_checkpoint_whose_upload_broke_with_the_stage_is_committed_by_the_supervisor(bench: Bench) -> None:
    body = """
def broken(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
ctx.checkpoint(1, lambda folder: (folder / "state").write_text("1"))
stage.commit_checkpoint = broken
ctx.checkpoint(2, lambda folder: (folder / "state").write_text("2"))
"""
    bench.task()
    assert bench.run(body)[0] in (Exit.BAD_INPUT, Exit.TERMINATED)  # by whether the kernel counts its kills
    assert "killed" in bench.ended().message and bench.ended().hint
    assert bench.ended().last_checkpoint == "step-2"
    assert bench.bucket.get(f"{STAGE}/checkpoints/step-2/state")[0] == b"2"


@pytest.mark.parametrize(("slow_call", "seconds"), [("put_file", 60.0), ("put", 0.25), ("list", 0.9)])
def test_the_last_upload_is_bounded_with_a_slow_store_and_the_end_is_told_all_the_same(
    bench: Bench, slow_call: str, seconds: float
) -> None:
    slow = f"""
from tasks.bucket_file import FileBucket
def slowed(call):
    def slower(*args, **kwargs):
        if Path(sys.argv[5], "dead").exists(): time.sleep({seconds})
        return call(*args, **kwargs)
    return slower
FileBucket.{slow_call} = slowed(FileBucket.{slow_call})
"""
    body = """
def save(folder):
    (folder / "weights").write_bytes(b"w" * 1000)
    (ctx.work / "dead").write_text("from here on the store is slow")
ctx.progress("train", 1, 10)
stage.commit_checkpoint = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
ctx.checkpoint(7, save)
"""
    bench.task()
    process = bench.start(body, before=slow)
    until((bench.work / "dead").exists)
    began = time.monotonic()
    output, _ = process.communicate(timeout=30)
    took_s = time.monotonic() - began
    assert process.returncode in (Exit.BAD_INPUT, Exit.TERMINATED), output  # by whether the kernel counts its kills
    assert took_s < WATCH.flush_s + 0.5  # 0.5 s: ending the processes
    assert "killed" in bench.ended().message and bench.ended().last_checkpoint in (None, "step-7")
    assert slow_call == "put" or bench.ended().last_checkpoint is None
    assert (bench.work / "checkpoints" / "step-7" / "weights").exists()  # for the next attempt on this machine


@pytest.mark.parametrize(
    ("body", "rc", "message", "hint"),
    [
        ("raise TaskError('no such model', hint='check its name')", Exit.BAD_INPUT, "no such model", "check its name"),
        ("raise ValueError('3 is not 4')", Exit.BUG, "ValueError: 3 is not 4", "log.txt"),
        ("raise OSError(28, 'No space left')", Exit.BAD_INPUT, "is full", "free some space"),
        ("raise MemoryError", Exit.BAD_INPUT, "ran out of memory", "smaller batch"),
        ("os.abort()", Exit.BUG, "signal 6", "log.txt"),
        ("os._exit(0)", Exit.BUG, "without a committed result", "log.txt"),
    ],
)
def test_a_stage_that_fails_says_why_and_what_to_do(bench: Bench, body: str, rc: int, message: str, hint: str) -> None:
    bench.task()
    got, output = bench.run(body)
    ended = bench.ended()
    assert (got, ended.rc) == (rc, rc), output
    assert message in ended.message and hint in ended.hint
    assert ("Traceback" in bench.bucket.get(f"{STAGE}/log.txt")[0].decode()) == (message.startswith("ValueError"))


def test_a_bucket_that_cannot_be_used_is_a_sentence(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("a file")
    rc, output = bench.run()
    assert rc == Exit.BAD_INPUT and "Traceback" not in output and "error: " in output


def test_a_task_of_another_version_is_refused_and_the_client_is_told(bench: Bench) -> None:
    task = bench.task()
    bench.bucket.put(f"{STAGE}/task.json", task.to_json().replace('"schema": 1', '"schema": 99').encode())
    rc, output = bench.run()
    assert rc == Exit.BAD_INPUT and bench.ended().rc == rc, output
    assert "schema 99" in bench.ended().message and "version" in bench.ended().hint


# -- several stages on one machine


def test_it_goes_on_with_the_next_stage_without_a_client_each_with_a_folder_and_an_attempt_of_its_own(
    bench: Bench,
) -> None:
    bench.task()
    bench.task(stage="second", attempt=3)
    bench.task(stage="third", attempt=1)
    rc, output = bench.run(then="second:3:5,third:1:5")
    assert rc == Exit.DONE, output
    ended = {stage: bench.ended(stage) for stage in (STAGE, "second", "third")}
    assert [(one.reason, one.attempt) for one in ended.values()] == [("done", 1), ("done", 3), ("done", 1)]
    for stage in ended:
        assert read_commit(bench.bucket, stage) is not None
        assert f"of stage {stage}" in bench.bucket.get(f"{stage}/log.txt")[0].decode()
    assert sum(one.seconds for one in ended.values()) < 30
    assert (bench.work.with_name("third") / "supervisor.json").exists()


def test_a_stage_that_is_not_done_ends_what_was_to_come_after_it(bench: Bench) -> None:
    bench.task()
    bench.task(stage="second", attempt=2)  # a newer attempt has it
    bench.task(stage="third")
    rc, output = bench.run(then="second:1:5,third:1:5")
    assert rc == Exit.FENCED, output
    assert bench.ended().reason == "done"
    assert bench.bucket.head("second/ended.json") is None and bench.bucket.head("third/ended.json") is None


def test_a_stage_may_not_use_the_time_of_those_after_it(bench: Bench) -> None:
    bench.task(steps=10_000)
    bench.task(stage="second")
    began = time.monotonic()
    rc, _ = bench.run(remaining_s=105.0, then="second:1:100")
    assert rc == Exit.DEADLINE and time.monotonic() - began < 20
    assert bench.ended().last_checkpoint is not None
    assert bench.bucket.head("second/ended.json") is None


def test_time_is_counted_over_all_stages_of_a_machine(bench: Bench) -> None:
    bench.task(steps=20)
    bench.task(stage="second", steps=10_000)
    began = time.monotonic()
    rc, _ = bench.run(remaining_s=20.0, then="second:1:5")
    assert rc == Exit.DEADLINE and bench.ended().reason == "done" and bench.ended("second").reason == "deadline"
    assert time.monotonic() - began < 20.0


def test_a_machine_that_is_told_to_end_goes_on_with_nothing(bench: Bench) -> None:
    bench.task(steps=10_000)
    bench.task(stage="second")
    process = bench.start(then="second:1:5")
    until(lambda: (bench.work / "progress.json").exists() and bench.progress().done > 3)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == Exit.TERMINATED
    assert bench.bucket.head("second/ended.json") is None
