"""What the machine's GPUs are asked, through a driver library that the test plays."""

from __future__ import annotations

import ctypes
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tasks import supervisor
from tasks.contract import PROGRESS_FILE, Progress
from tasks.gpu import Gpu, Gpus, Watcher, numbers_of


class Driver:
    """NVML with so many GPUs: each at 10 % more than the one before, and fuller."""

    def __init__(self, count: int, *, status: int = 0, rates: int = 0) -> None:
        self.count, self.status, self.rates = count, status, rates

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = self.count
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> int:
        handle._obj.value = index.value + 1
        return 0 if index.value < self.count else 2

    def nvmlDeviceGetHandleByUUID(self, uuid, handle) -> int:
        handle._obj.value = 1
        return 0 if uuid == b"GPU-1" else 2

    def nvmlDeviceGetMemoryInfo(self, handle, memory) -> int:
        memory._obj.total, memory._obj.used = 80 << 30, handle.value << 30
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, use) -> int:
        use._obj.gpu = 10 * handle.value
        return self.rates


@pytest.fixture(autouse=True)
def all_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_every_gpu_tells_its_use_and_memory():
    assert Gpus(lambda: Driver(2)).read() == [Gpu(0.1, 1.0, 80.0), Gpu(0.2, 2.0, 80.0)]


@pytest.mark.parametrize(("named", "used"), [("1", [2.0]), ("GPU-1", [1.0]), ("", []), ("7", []), ("1,0", [2.0, 1.0])])
def test_gpus_that_the_stage_may_not_use_are_not_counted(monkeypatch, named, used):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [gpu.used_gib for gpu in Gpus(lambda: Driver(2)).read()] == used


def test_without_a_driver_or_with_one_that_refuses_there_are_none():
    def missing() -> ctypes.CDLL:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert Gpus(missing).read() == []
    assert Gpus(lambda: Driver(2, status=9)).read() == []
    assert Gpus(lambda: object()).read() == []


def test_a_card_that_does_not_tell_its_use_tells_its_memory():
    (gpu,) = Gpus(lambda: Driver(1, rates=3)).read()
    assert gpu == Gpu(None, 1.0, 80.0)
    assert numbers_of([gpu]) == {"gpu_used_gib": 1.0, "gpu_total_gib": 80.0}


def test_progress_has_the_mean_use_and_the_fullest_card():
    found = numbers_of([Gpu(0.5, 10.0, 80.0), Gpu(1.0, 60.0, 80.0)])
    assert found == {"gpu_use": 0.75, "gpu_used_gib": 60.0, "gpu_total_gib": 80.0}
    assert numbers_of([]) == {}


def test_a_driver_that_hangs_holds_up_nobody():
    asked, free = threading.Event(), threading.Event()

    class Hanging:
        def read(self) -> list[Gpu]:
            asked.set()
            free.wait(10)
            return []

    watcher = Watcher(Hanging)
    watcher.start()
    assert asked.wait(10) and watcher.numbers == {} and watcher.daemon
    free.set()
    watcher.join(10)
    assert not watcher.is_alive()  # no GPU: nothing to look at


def test_a_gpu_that_no_longer_answers_is_not_at_work():
    answers = iter([[Gpu(0.98, 10.0, 80.0)], []])
    watcher = Watcher(lambda: SimpleNamespace(read=lambda: next(answers)), every_s=0.0)
    watcher.run()
    assert watcher.numbers == {} and next(answers, "read to the end") == "read to the end"


# --- what the supervisor makes of it


class Process:
    """As psutil tells of one: so many seconds of processor time."""

    def __init__(self, pid: int, cpu_s: float) -> None:
        self.pid, self.cpu_s = pid, cpu_s

    def oneshot(self):
        return nullcontext()

    def create_time(self) -> float:
        return 1.0

    def cpu_times(self) -> SimpleNamespace:
        return SimpleNamespace(user=self.cpu_s, system=0.0)

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(rss=1 << 30)


def test_busy_cores_are_those_of_the_last_seconds_and_count_processes_that_have_left(monkeypatch):
    now, processes = [100.0], [Process(1, 0.0), Process(2, 0.0)]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervisor, "descendants", lambda guard: processes)
    meter = supervisor._Meter()
    meter.read(None)
    now[0], processes[0].cpu_s, processes[1].cpu_s = 104.0, 4.0, 2.0
    meter.read(None)
    assert meter.cores == 1.5  # 6 s of processor time in 4 s
    now[0] = 105.0
    meter.read(None)
    assert meter.cores == 1.5  # too short a while to say anything new
    now[0] = 108.0
    processes.pop()
    meter.read(None)
    assert meter.cores == 0.0


def test_progress_in_the_bucket_tells_memory_cores_and_gpus_beside_the_stages_own_numbers(tmp_path):
    (tmp_path / PROGRESS_FILE).write_text(Progress("train", 1, done=1, total=2, numbers={"loss": 0.5}).to_json())
    seeing = supervisor._Supervision.__new__(supervisor._Supervision)
    seeing._work, seeing._task = tmp_path, SimpleNamespace(attempt=3)
    seeing._meter = SimpleNamespace(peak_gib=1.25, cores=1.9)
    seeing._gpus = SimpleNamespace(numbers={"gpu_use": 0.9, "gpu_used_gib": 60.0, "gpu_total_gib": 80.0})
    seeing._courier = SimpleNamespace(progress=None)
    seeing._see_progress()
    sent = seeing._courier.progress
    assert sent.attempt == 3 and sent.numbers == {
        "loss": 0.5, "rss_gib": 1.25, "cpu_cores": 1.9, "gpu_use": 0.9, "gpu_used_gib": 60.0, "gpu_total_gib": 80.0,
    }  # fmt: skip
