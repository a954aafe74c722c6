"""How do several processes do one stage? Started by torchrun from what SkyPilot says of nodes and GPUs; rank 0 leads.

A kind that cannot be shared out runs in rank 0 alone: `tasks.<kind>.follow` says what the other ranks do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from zlib import crc32

from tasks.contract import TaskError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

LAUNCHED_ENV = "TORCHELASTIC_RUN_ID"  # torchrun sets it in what it starts
FIRST_PORT, PORTS = 20_000, 10_000


def stage_argv(own: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """Command for Python's arguments `own`: one process, or torchrun with a process for each GPU of each node.

    Reads SKYPILOT_NUM_NODES, _NUM_GPUS_PER_NODE, _NODE_RANK, _NODE_IPS (one a line, the head first) and _TASK_ID.
    Raises TaskError when they contradict each other.
    """
    nodes, gpus = _number(env, "SKYPILOT_NUM_NODES", 1), _number(env, "SKYPILOT_NUM_GPUS_PER_NODE", 1)
    if nodes <= 1 and gpus <= 1:
        return [sys.executable, *own]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={max(1, gpus)}"]
    if nodes <= 1:
        return [*torchrun, "--standalone", *own]
    addresses, rank = env.get("SKYPILOT_NODE_IPS", "").split(), _number(env, "SKYPILOT_NODE_RANK", -1)
    if len(addresses) != nodes or not 0 <= rank < nodes:
        raise TaskError(
            f"SkyPilot says {nodes} nodes, rank {rank} and the addresses {addresses}",
            hint="resume the run: it is given another machine",
        )
    port = FIRST_PORT + crc32(env.get("SKYPILOT_TASK_ID", "").encode()) % PORTS  # the same on every node
    where = [f"--master-addr={addresses[0]}", f"--master-port={port}"]
    return [*torchrun, f"--nnodes={nodes}", f"--node-rank={rank}", *where, *own]


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise TaskError(f"{name} is {text!r}, not a number", hint="report this, with log.txt") from None


def rank_of(env: Mapping[str, str]) -> int:
    return int(env.get("RANK", "0"))


def size_of(env: Mapping[str, str]) -> int:
    """How many processes do this stage together."""
    return int(env.get("WORLD_SIZE", "1"))


def take_gpu(env: Mapping[str, str]) -> None:
    """Of several processes on a machine each works on a GPU of its own."""
    import torch

    if size_of(env) > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(env["LOCAL_RANK"]))


class Peers:
    """The other processes of this stage; made by each of them, and by none that is alone."""

    def __init__(self) -> None:
        import torch

        self._torch, self._device = torch, "cpu"
        if torch.cuda.is_available():
            self._device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self._device)
        hook = sys.excepthook
        torch.distributed.init_process_group("gloo" if self._device == "cpu" else "nccl")
        sys.excepthook = hook  # torch's holds back the traceback until ours returns, which ends the process instead

        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def first_says(self, value: float) -> float:
        """The first process's value, in every one of them."""
        said = self._torch.tensor([value], dtype=self._torch.float64, device=self._device)
        self._torch.distributed.broadcast(said, 0)
        return float(said.item())

    def most(self, value: int) -> int:
        said = self._torch.tensor([value], device=self._device)
        self._torch.distributed.all_reduce(said, op=self._torch.distributed.ReduceOp.MAX)
        return int(said.item())

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Puts the sum over all processes into each tensor; of one dtype, and on this process's device."""
        flat = self._torch.cat([tensor.flatten() for tensor in tensors])
        self._torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def text_of_first(self, text: str) -> str:
        raw = text.encode() if self.rank == 0 else b""
        size = self.most(len(raw))
        held = self._torch.tensor(list(raw.ljust(size)), dtype=self._torch.uint8, device=self._device)
        self._torch.distributed.broadcast(held, 0)
        return bytes(held.cpu().tolist()).decode()

    def tensors_of_first(self, tensors: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each of the first process's tensors, one after the other."""
        mine = tensors or {}
        kinds = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in mine.items()]
        for name, dtype, shape in json.loads(self.text_of_first(json.dumps(kinds))):
            value = self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self._device)
            if self.rank == 0:
                value.copy_(mine[name])
            self._torch.distributed.broadcast(value, 0)
            yield name, value

    def all_go_on(self, mine: bool) -> bool:
        """Whether every process said so. Waits for all of them."""
        said = self._torch.tensor([int(mine)], device=self._device)
        self._torch.distributed.all_reduce(said)
        return int(said.item()) == self._torch.distributed.get_world_size()

    def mesh(self) -> DeviceMesh:
        """All of them in a row, as shards of a model lie. Every process has to ask."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self._device.partition(":")[0], (self.size,))

    def leave(self) -> None:
        self._torch.distributed.destroy_process_group()
