"""How long until a rented machine has the packages of a stage? From the bytes of its locked environment. Pure.

Measured 2026-11-25 on 2 cores of a cloud machine with a local disk, uv 0.13.9, CPython 3.11, the locks of that day and
an empty cache: train 26.8 s (2.93 GB received, 5.17 GB in 24,594 files unpacked), label 43.3 and 48.5 s (4.37 GB,
9.47 GB in 70,925 files), both cores busy throughout; from a full cache 1 to 3 s. uv unpacks while it fetches, so the
slower of the two sets the pace.
"""

from __future__ import annotations

import re
from functools import cache

from orchestrator.catalog import Gpu
from orchestrator.locks import environments, requirements
from orchestrator.plan import Range
from tasks.contract import Settings

# PyPI to a rented machine. Assumed, but for the fast end: 4.37 GB came in 43 s above, from a cache of PyPI near by.
FETCH_GB_S = Range(0.02, 0.06, 0.1)
# Fetched gigabytes that are unpacked in a second: 0.09 to 0.11 above. Network disks are slower: AWS's gp3 writes 0.125
# GB/s unless more is paid for, which is 0.057 fetched GB/s at 2.2 bytes written for each one fetched.
UNPACK_GB_S = Range(0.05, 0.09, 0.11)
PYTHON_S = Range(1.0, 8.0, 40.0)  # uv and a Python of its own (30 MB), where the machine lacks them: assumed
CHECK_S = Range(2.0, 6.0, 20.0)  # imports torch and computes on the GPU; torch alone took 2.1 to 4.6 s above
FEW_PACKAGES_S = Range(2.0, 5.0, 20.0)  # psutil and boto3 by version
VLLM_CARD_MISSING = frozenset({"V100", "V100-32GB"})  # 7.0; vLLM 0.24 starts at 7.5 (tasks/bootstrap.py: VLLM_CARD)


def setup_s(environment: str | None, *, first: bool = True, others: bool = False) -> Range:
    """Seconds until the locked environment of that name is ready; None: a few packages. `first`: on this machine;
    `others`: which has made other environments, so that uv and a Python are there. They share little else: torch and
    CUDA's libraries are of other versions."""
    if environment is None:
        return FEW_PACKAGES_S if first else Range(0.1, 0.5, 2.0)
    if not first:  # found ready, by its name
        return Range(0.1, 1.0, 5.0)
    fetched = fetched_bytes(environment) / 1e9
    pace = [min(fetch, unpack) for fetch, unpack in zip(_values(FETCH_GB_S), _values(UNPACK_GB_S), strict=True)]
    made = Range(fetched / pace[2], fetched / pace[1], fetched / pace[0]) + CHECK_S
    return made if others else made + PYTHON_S


def environment_of(kind: str, settings: Settings, gpu: Gpu | None) -> str | None:
    """The locked environment that a stage will most likely get; the driver shows only on the machine."""
    names = environments(kind, settings)
    fitting = [name for name in names if name != "label" or runs_vllm(gpu)]
    return next(iter(fitting or names), None)


def runs_vllm(gpu: Gpu | None) -> bool:
    """Whether the card is one that vLLM's wheel has code for. Its driver must be new enough as well."""
    return gpu is not None and gpu.name not in VLLM_CARD_MISSING


@cache
def fetched_bytes(environment: str) -> int:
    """As the lock's header counts them."""
    head = requirements(environment).read_text()[:1000]
    found = re.search(r"(\d+) bytes to fetch", head)
    if found is None:
        raise ValueError(f"{environment}.txt does not say how many bytes it takes: write it anew with `make lock`")
    return int(found[1])


def _values(one: Range) -> tuple[float, float, float]:
    return one.low, one.expected, one.high
