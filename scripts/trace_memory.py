"""What does a training step of transformers' own code allocate and reserve? Live storages of tensors that hold no data.

    python scripts/trace_memory.py [--method lora] [--batch 8] [--length 1024] [--checkpointing] [--layers 28]

Qwen2.5-1.5B's shape, bf16; LoRA r=8 on q/k/v under autocast. Every tensor that an operation makes is added up until
its storage dies, and goes through PyTorch's caching allocator, simulated: sizes rounded to 512 bytes, blocks up to 1
MiB from segments of 2, below 10 MiB from segments of 20, larger ones from segments of their own; best fit, split,
joined with free neighbours in the segment. It runs on a CPU, whose attention copies keys to the number of heads and
makes a mask, and counts no work space of kernels. The shares in orchestrator/memory_training.py: cached_bytes come
from such runs.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB, GIB = 1 << 20, 1 << 30


@dataclass(eq=False)
class Block:
    """A part of a segment, with its neighbours there."""

    key: int
    size: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = False


@dataclass
class Allocator:
    """The caching allocator of PyTorch, as far as sizes go."""

    reserved: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)
    unused: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    keys: Any = field(default_factory=itertools.count)

    def take(self, size: int) -> int:
        """A block of at least `size` bytes: its key."""
        small = size <= MIB
        held = self.unused[small]
        place = bisect.bisect_left(held, (size, -1))
        if place < len(held):
            block = self.blocks[held.pop(place)[1]]
        else:
            segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.reserved += segment
            block = self._made(segment, small)
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            other = self._made(rest, small)
            other.before, other.after, other.free = block, block.after, True
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, size
            bisect.insort(held, (rest, other.key))
        block.free = False
        return block.key

    def give(self, key: int) -> None:
        """A block back, joined with its free neighbours."""
        block = self.blocks[key]
        held = self.unused[block.small]
        if block.after is not None and block.after.free:
            self._join(block, block.after, held)
        if block.before is not None and block.before.free:
            block, lost = block.before, block
            held.remove((block.size, block.key))
            self._join(block, lost, held)
        block.free = True
        bisect.insort(held, (block.size, block.key))

    def _join(self, block: Block, lost: Block, held: list[tuple[int, int]]) -> None:
        if lost.free:
            held.remove((lost.size, lost.key))
        block.size, block.after = block.size + lost.size, lost.after
        if lost.after is not None:
            lost.after.before = block
        del self.blocks[lost.key]

    def _made(self, size: int, small: bool) -> Block:
        block = Block(next(self.keys), size, small)
        self.blocks[block.key] = block
        return block


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages of what operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.allocator = Allocator()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size, self.allocator.take(size))

    def _drop(self, key: int, size: int, block: int) -> None:
        self._seen.discard(key)
        self.now -= size
        self.allocator.give(block)


def step(*, full: bool, batch: int, length: int, checkpointing: bool, layers: int) -> tuple[float, float]:
    """GiB allocated at the peak of the second step, and reserved."""
    with FakeTensorMode(), Live() as live:
        model = _model(layers, full, checkpointing)
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
        for _ in range(2):
            live.peak = 0
            for p in trained:
                p.grad = None
            ids = torch.zeros(batch, length, dtype=torch.long)
            with nullcontext() if full else torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        del moments
        return live.peak / GIB, live.allocator.reserved / GIB


def _model(layers: int, full: bool, checkpointing: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2", vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    inner = model
    if not full:
        from peft import LoraConfig, get_peft_model

        plain = torch.nn.Module._apply
        torch.nn.Module._apply = _convert  # type: ignore[method-assign]
        try:
            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]))
        finally:
            torch.nn.Module._apply = plain  # type: ignore[method-assign]
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
    return model


def _convert(self: Any, fn: Any, recurse: bool = True) -> Any:
    """Module.to by new parameters: tensors without data cannot be exchanged in place."""
    for child in self.children():
        _convert(child, fn)
    for name, old in self._parameters.items():
        if old is not None:
            with torch.no_grad():
                made = fn(old)
            if made is not old:
                self._parameters[name] = torch.nn.Parameter(made, requires_grad=old.requires_grad)
    return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["full", "lora"], default="lora")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    allocated, reserved = step(
        full=given.method == "full", batch=given.batch, length=given.length, checkpointing=given.checkpointing,
        layers=given.layers,
    )  # fmt: skip
    print(f"allocated {allocated:.2f} GiB, reserved {reserved:.2f} GiB")


if __name__ == "__main__":
    main()
