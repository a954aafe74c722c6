"""Is a stage started as often as SkyPilot says there are GPUs, and do its processes find each other?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from tasks.bucket import open_bucket
from tasks.contract import RehearseSettings, Task, TaskError, Watch
from tasks.peers import FIRST_PORT, PORTS, stage_argv

OWN = ["-m", "tasks.stage", "--task", "t.json"]


def said(nodes: int, gpus: int, rank: int = 0, addresses: str = "10.0.0.1\n10.0.0.2") -> dict[str, str]:
    return {
        "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus), "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": addresses, "SKYPILOT_TASK_ID": "sky-2026-01-01_c_1",
    }  # fmt: skip


@pytest.mark.parametrize("env", [{}, said(1, 0), said(1, 1), {"SKYPILOT_NUM_NODES": ""}])
def test_one_gpu_or_none_is_one_process_without_torchrun(env):
    assert stage_argv(OWN, env) == [sys.executable, *OWN]


def test_several_gpus_of_one_node_are_a_process_each():
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    assert stage_argv(OWN, said(1, 4)) == [*torchrun, "--nproc-per-node=4", "--standalone", *OWN]


def test_all_nodes_meet_at_the_first_address_and_at_the_same_port():
    head, other = (stage_argv(OWN, said(2, 8, rank)) for rank in (0, 1))
    assert [word for word in head if "rank" not in word] == [word for word in other if "rank" not in word]
    assert {"--nnodes=2", "--nproc-per-node=8", "--node-rank=1", "--master-addr=10.0.0.1"} <= set(other)
    (port,) = (int(word.partition("=")[2]) for word in head if word.startswith("--master-port"))
    assert FIRST_PORT <= port < FIRST_PORT + PORTS
    assert stage_argv(OWN, said(2, 0))[3] == "--nproc-per-node=1"  # nodes without a GPU


@pytest.mark.parametrize(
    "env", [said(2, 1, addresses="10.0.0.1"), said(2, 1, rank=2), {"SKYPILOT_NUM_NODES": "two"}, said(2, 1, rank=-1)]
)
def test_what_cannot_be_true_starts_nothing(env):
    with pytest.raises(TaskError):
        stage_argv(OWN, env)


@pytest.mark.slow
def test_two_processes_do_one_stage_under_the_supervisor_and_one_of_them_writes(tmp_path: Path):
    bucket = open_bucket(f"file:{tmp_path / 'bucket' / 'run1'}")
    settings = RehearseSettings(steps=12, seconds_per_step=0.02, checkpoint_every_steps=5, payload_bytes=100)
    watch = Watch(idle_s=120, stall_floor_s=120, tick_s=0.1, flush_s=10)
    task = Task("run1", "try", "rehearse", attempt=1, fence=1, bucket=bucket.url, settings=settings, watch=watch)
    bucket.put("try/task.json", task.to_json().encode())
    done = subprocess.run(
        [sys.executable, "-m", "tasks.supervisor", "--bucket", bucket.url, "--stage", "try", "--attempt", "1",
         "--remaining-s", "300", "--work", str(tmp_path / "work")],
        env={**os.environ, **said(1, 2), "PYTHONPATH": str(Path(tasks.__file__).parents[1])}, cwd=tmp_path,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(bucket.get("try/result.json")[0])
    assert result["processes"] == 2 and result["steps"] == 12
    rows = bucket.get("try/metrics.jsonl")[0].decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 13))
