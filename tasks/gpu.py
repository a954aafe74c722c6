"""How busy are the NVIDIA GPUs of this machine, and how full? Asked of the driver's own library (NVML).

By ctypes: the library comes with every driver, while its Python binding would be one more package on each machine.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

GIB = 2**30
EVERY_S = 2.0
LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Utilization(ctypes.Structure):  # nvmlUtilization_t, per cent of the driver's last sample period
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


@dataclass(frozen=True)
class Gpu:
    use: float | None  # 0 to 1: share of the last moment in which a kernel ran; None where the driver does not say
    used_gib: float  # by everybody who uses it
    total_gib: float


class Gpus:
    """Open it once; `read` then takes some milliseconds. Nothing where there is no NVIDIA driver."""

    def __init__(self, library: Callable[[], ctypes.CDLL] = lambda: ctypes.CDLL(LIBRARY)) -> None:
        self._handles: list[ctypes.c_void_p] = []
        try:
            self._nvml = library()
            if self._nvml.nvmlInit_v2() == 0:
                self._handles = self._visible()
        except (OSError, AttributeError):  # no driver, or one that is too old
            self._handles = []

    def _visible(self) -> list[ctypes.c_void_p]:
        """Those that CUDA_VISIBLE_DEVICES leaves, by number or UUID; all without it."""
        count = ctypes.c_uint()
        if self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = [str(i) for i in range(count.value)] if named is None else named.split(",")
        found = []
        for word in (word.strip() for word in words):
            handle = ctypes.c_void_p()
            if word.isdecimal():
                status = self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(word)), ctypes.byref(handle))
            else:
                status = self._nvml.nvmlDeviceGetHandleByUUID(word.encode(), ctypes.byref(handle))
            if status == 0:
                found.append(handle)
        return found

    def read(self) -> list[Gpu]:
        found = []
        for handle in self._handles:
            memory, use = _Memory(), _Utilization()
            if self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
                continue
            told = self._nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(use)) == 0
            found.append(Gpu(use.gpu / 100 if told else None, memory.used / GIB, memory.total / GIB))
        return found


class Watcher(threading.Thread):
    """Reads them now and then; `numbers` is what it last saw. A thread: a driver that hangs must hold up nobody."""

    def __init__(self, gpus: Callable[[], Gpus] = Gpus, every_s: float = EVERY_S) -> None:
        super().__init__(name="gpus", daemon=True)
        self._open, self._every_s = gpus, every_s
        self.numbers: dict[str, float] = {}

    def run(self) -> None:
        gpus = self._open()
        while seen := gpus.read():
            self.numbers = numbers_of(seen)
            time.sleep(self._every_s)
        self.numbers = {}  # a GPU that no longer answers is not at work


def numbers_of(gpus: list[Gpu]) -> dict[str, float]:
    """As progress tells them: mean use, and memory of the fullest GPU; nothing without one."""
    if not gpus:
        return {}
    fullest = max(gpus, key=lambda gpu: gpu.used_gib)
    uses = [gpu.use for gpu in gpus if gpu.use is not None]
    told = {"gpu_used_gib": round(fullest.used_gib, 3), "gpu_total_gib": round(fullest.total_gib, 3)}
    return {**told, **({"gpu_use": round(sum(uses) / len(uses), 3)} if uses else {})}
