"""What the machine's GPUs are asked, through a driver library that the test plays."""

from __future__ import annotations

import ctypes
import threading

import pytest

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
