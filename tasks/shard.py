"""How do several processes hold one model? Each a part of every weight (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks import models


def shard(
    model: nn.Module, work: Callable[..., Any], *, name: str = "loss_of", mesh: DeviceMesh | None = None
) -> None:  # fmt: skip
    """Leaves each process its part of the weights, in place and on its GPU; `model.loss_of(...)` (or as it is named) is
    then `work(model, ...)`.

    Layers are gathered one at a time. What lies outside of them (embedding, last norm, head) is one group, gathered
    for the whole of `work`, which takes the head's weight itself.
    """
    for layer in models.causal(model).base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    setattr(model, name, MethodType(work, model))
    register_fsdp_forward_method(model, name)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(value: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part. Every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The part of `value` that this process holds of `like`; every process has the whole `value`."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
