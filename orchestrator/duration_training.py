"""How long is one optimizer step? Seconds by kernel class, from the model's shape and the way it is trained. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.catalog import ModelShape
from orchestrator.duration_kernels import (
    all_reduce_s,
    attention_s,
    bytes_s,
    memory_s,
    product_s,
    products_s,
)
from orchestrator.gpus import Gpu

BACKWARD_BYTES = 2.0  # element-wise work backward, in forward work: each kernel reads two tensors and writes one
ATTENTION_BACKWARD = 2.5  # fused attention: five products for the two of forward
# Forward, bytes a value. RMSNorm as transformers writes it (to fp32, square, mean, scale, back, weight): 7 passes in
# fp32, 4 in the compute type. Rotation: q cos + rotate_half(q) sin: 10 passes. Fused: read once, written once.
NORM_PASSES, NORM_FP32_BYTES, FUSED_PASSES = 4, 28, 2
ROTARY_PASSES = 10
GATE_PASSES, FUSED_GATE_PASSES = 5, 3  # silu, then the product; one kernel
ACTIVATION_PASSES = 2
RESIDUAL_PASSES = 3
ATTENTION_COPIES = 4  # into and out of the kernel, and the heads put side by side again
# Adapters (peft), bytes a value of the matrix's input and of its output beside their products. Half precision: dropout
# and its mask 5, where there is one (half of the recipes); scaled 4, added 6; backward the gradient of the input is a
# sum 6, dropout again, scaled 4. fp32, as peft keeps them: input cast 6, dropout in fp32; scaled 8, added 10, cast 6.
ADAPTER_FORWARD, ADAPTER_BACKWARD = (2.5, 10.0), (8.5, 4.0)
ADAPTER_FORWARD_FP32, ADAPTER_BACKWARD_FP32 = (10.5, 24.0), (16.5, 14.0)
# Kernels that are no products, forward, a layer: norms 14, rotations 10, attention 4, MLP 2, residuals 2, reshapes; as
# fused or compiled. An adapter: dropout, scale, sum, casts. Backward twice as many.
KERNELS, KERNELS_FUSED, KERNELS_ADAPTER = 42, 12, 5
# Loss, bytes a logit, both ways: upcast to fp32, log-softmax, gradient, back to half; in chunks without the shifted
# copy; compiled; the project's own row kernels (5 + 7.5 GB for 1.24e9 logits, benchmarks/README.md).
LOSS_BYTES = {"materialised": 40.0, "chunked": 30.0, "compiled": 16.0, "own": 10.0}
# AdamW, values read and written a parameter: 7 when fused; torch's default takes 8 kernels (decay 2, lerp 3, mul 2,
# addcmul 3, sqrt 2, div 2, add 2, addcdiv 4: torch/optim/adamw.py). Not known: mostly the default.
ADAM_PASSES = {"fused": 7.0, "foreach": 20.0, "unknown": 16.0}
CLIP_PASSES = 3.0  # gradient norm, then scaling
# 4-bit weights, a parameter and use, in bytes moved at full bandwidth. nf4: 0.5 read and 2 written by a kernel at about
# half the bandwidth (bitsandbytes pull request 1747 doubled it on A100). int4 of auto-gptq while training: unpacked by
# chains of torch operations on int32, int8 and half tensors.
UNPACK_BYTES = {"nf4": 5.0, "int4": 18.0}
# Host seconds a layer: some 40 kernels forward from Python (transformers' forward alone took 0.83 ms a layer and token
# on an A100 host of 2024: qwen.readthedocs.io v2.0, 49.94 tokens/s with 24 layers), 60 backward from C++, and adapters.
# Compiled layers check their guards at each call. The hosts of rented H200s were SLOW_HOST times slower at all of it:
# there 28 layers took 146 to 173 ms a step with three adapters and 194 to 218 with seven, 515 with those and MLPs
# computed again in parts, 207 compiled and recomputed (benchmarks/cases/own.jsonl, benchmarks/results/training.json).
HOST_FORWARD_S, HOST_BACKWARD_S = 0.95e-3, 0.9e-3
HOST_COMPILED_FORWARD_S, HOST_COMPILED_BACKWARD_S = 1.4e-3, 0.3e-3
HOST_ADAPTER_FORWARD_S, HOST_ADAPTER_BACKWARD_S = 0.12e-3, 0.06e-3
# An MLP in one more part of its rows, forward, without and for each adapter; backward half of it. A 4-bit weight
# unpacked (two kernels behind a function of Python's). AdamW in 8 bits, a tensor: one kernel after the other.
HOST_PART_S, HOST_PART_ADAPTER_S = 0.08e-3, 0.1e-3
HOST_UNPACK_S = 0.075e-3
HOST_8BIT_S = 0.04e-3
SLOW_HOST = 2.4
MLP = ("gate_proj", "up_proj", "down_proj")
ONE_QKV = ("qwen", "phi3", "mpt", "gpt_neox", "falcon", "bloom", "gpt2")  # q, k and v are one matrix
HOST_ZERO3_S = 2.5e-3  # DeepSpeed's hooks around each module, a layer and pass
# FSDP gathers and shares out each layer in each pass: on two H200 65 ms a step of 28 layers more than with 0.5 ms, and
# 100 more with checkpointing (benchmarks/results/several_gpus.json).
HOST_FSDP_S = 1.0e-3
# Share of the traffic that does not hide behind computing: with NVLink it does, but for the first and the last layer;
# through host memory the copies stand in the way of each other.
EXPOSED_NVLINK, EXPOSED_PCIE, EXPOSED_ZERO3 = 0.5, 0.7, 0.5  # ZeRO-3 fetches module by module
NVLINK_GB_S = 100.0  # links from here on are NVLink
# Beyond a host: eight adapters of 200 Gbit/s carry one copy of the weights into it (a DGX A100's), 0.85 of it arrives;
# hosts without NVLink have one of 100 Gbit/s.
NODE_GPUS, NODE_NVLINK_GB_S, NODE_GB_S = 8, 170.0, 10.0


@dataclass(frozen=True)
class Training:
    """One way to train `shape` on cards of one kind; `micro_batch` rows of `length` tokens on each rank.

    `tensor`: ranks that share each layer; `sharded`: fsdp or zero3 (weights gathered layer by layer), else None; `gpus`
    / `tensor` ranks take rows of their own. `weight_bytes`: of a stored weight; `four_bit`: nf4 or int4, of the layers.
    `state_bytes`: of one value of the optimizer's state. `trainable`: parameters that learn.
    """

    shape: ModelShape
    micro_batch: int
    length: float
    accumulation: int = 1
    full: bool = True
    lora_r: int = 0
    lora_targets: tuple[str, ...] = ()
    half: bool = True
    weight_bytes: int = 2
    four_bit: str | None = None
    fp32_adapters: bool | None = None  # None: not known
    optimizer: str = "unknown"
    state_bytes: float = 2.0
    checkpointing: bool = False
    eager_attention: bool = False
    fused: bool = False
    compiled: bool = False
    loss: str = "materialised"
    mlp_parts: int = 1  # the rows of a layer's MLP go through in so many
    gpus: int = 1
    tensor: int = 1
    sharded: str | None = None
    moved_bytes: float = 2.0  # of a weight that sharded ranks gather, and of a gradient that they sum
    overlaps: bool = True  # whether ranks with whole models sum gradients while others are still computed
    host: float = 1.0  # times slower than a usual host

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.gpus // self.tensor)

    @property
    def tokens(self) -> float:
        """Of one optimizer step, over all cards."""
        return self.micro_batch * self.length * self.accumulation * self.ranks

    @property
    def trainable(self) -> int:
        return self.shape.params if self.full else self.shape.lora_params(self.lora_r, self.lora_targets)


def step_s(card: Gpu, work: Training, micro: Mapping[str, float] | None = None) -> float:
    """Seconds of one optimizer step."""
    return sum(step_parts(card, work, micro).values())


def step_parts(card: Gpu, work: Training, micro: Mapping[str, float] | None = None) -> dict[str, float]:
    """Seconds of one optimizer step by what they go to; `host`: what the kernels' start takes beyond their work.
    `micro`: micro_parts, where they are known."""
    micro = micro_parts(card, work) if micro is None else micro
    device = sum(micro.values())
    traffic = _traffic_s(card, work, device)
    host = max(0.0, _host_s(work) - device - traffic)
    parts = {name: seconds * work.accumulation for name, seconds in micro.items()}
    parts["traffic"] = traffic * work.accumulation + _reduction_s(card, work, device)
    parts["host"] = host * work.accumulation
    parts["optimizer"] = optimizer_s(card, work)
    return parts


def forward_parts(card: Gpu, work: Training, *, head_rows: float) -> dict[str, float]:
    """Seconds of one forward pass of a micro-batch without gradients, `head_rows` of its tokens through the head."""
    shape, tokens = work.shape, work.micro_batch * work.length
    width = shape.heads * shape.head_dim / work.tensor
    return {
        "products": shape.layers * _layer_products_s(card, work, tokens),
        "attention": shape.layers
        * attention_s(
            card,
            tokens,
            work.length,
            width,
            eager=work.eager_attention,
            half=work.half,
            heads=shape.heads // work.tensor or 1,
        ),
        "memory": memory_s(
            card,
            tokens * shape.layers * layer_bytes(work),
            _row_bytes(work),
            kernels=shape.layers * (KERNELS_FUSED if work.fused or work.compiled else KERNELS),
        ),
        "head": product_s(card, head_rows, shape.hidden, shape.vocab / work.tensor, half=work.half),
    }


def one_micro_batch(work: Training) -> Training:
    """The same for all work whose micro-batches take as long on the device."""
    return replace(work, accumulation=1, host=1.0, gpus=work.gpus if work.sharded or work.tensor > 1 else 1)


def micro_parts(card: Gpu, work: Training) -> Mapping[str, float]:
    """Seconds of a micro-batch on the device, forward and backward."""
    shape, tokens = work.shape, work.micro_batch * work.length
    forward = forward_parts(card, work, head_rows=tokens)
    again = 1.0 if work.checkpointing else 0.0
    backward = 2.0 if work.full else 1.0
    parts = {
        "products": forward["products"] * (1 + again + backward),
        "attention": forward["attention"] * (1 + again + ATTENTION_BACKWARD),
        "memory": forward["memory"] * (1 + again + BACKWARD_BYTES),
        "head": forward["head"] * (1 + (2 if work.full or "lm_head" in work.lora_targets else 1)),
        "loss": memory_s(card, tokens * shape.vocab / work.tensor * LOSS_BYTES[work.loss]),
    }
    if not work.full:
        moved = adapter_bytes(work, again)
        kernels = (3 + again) * shape.layers * _adapters(work) * (1 if work.compiled else KERNELS_ADAPTER)
        products = _adapter_products_s(card, work, tokens) * (3 + again)
        parts["adapters"] = memory_s(card, tokens * moved, _row_bytes(work), kernels=kernels) + products
    if work.four_bit is not None:
        unpacked = shape.layers * sum(a * b for a, b in shape.matrices().values())
        unpacked += (work.mlp_parts - 1) * shape.layers * sum(_mlp_weights(work))
        parts["unpacking"] = unpacked * UNPACK_BYTES[work.four_bit] / bytes_s(card) * (2 + again)
    elif work.half and work.weight_bytes == 4:  # mixed precision: cast for use, gradients cast back
        shard = work.ranks if work.sharded else 1
        parts["casts"] = memory_s(card, 6.0 * shape.params / shard * (2 if work.full else 1))
    return parts


def _mlp_weights(work: Training) -> list[int]:
    """Values of each weight of a layer's MLP."""
    return [a * b for name, (a, b) in work.shape.matrices().items() if name in MLP]


def _row_bytes(work: Training) -> float:
    """Bytes of one tensor of the hidden size."""
    return work.micro_batch * work.length * work.shape.hidden * (2.0 if work.half else 4.0)


def _layer_products_s(card: Gpu, work: Training, tokens: float) -> float:
    shape = work.shape
    if shape.experts is not None or shape.latent is not None:  # as if all its products were one
        per_layer = (shape.active_params - shape.vocab * shape.hidden) / shape.layers
        return product_s(card, tokens, shape.hidden, per_layer / shape.hidden / work.tensor, half=work.half)
    return products_s(
        card, tokens, [(a, max(1, b // work.tensor)) for a, b in shape.matrices().values()], half=work.half
    )


def layer_bytes(work: Training) -> float:
    """Bytes that element-wise kernels of one layer move for one token, forward."""
    shape, size, fused = work.shape, 2 if work.half else 4, work.fused or work.compiled
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer_norm = shape.architecture in ("mpt", "phi", "gpt_neox", "falcon", "gpt2", "opt", "bloom")
    norm = FUSED_PASSES * size if fused or layer_norm else NORM_PASSES * size + NORM_FP32_BYTES
    rotary = 0 if shape.architecture in ("mpt", "gpt2", "opt", "bloom") else FUSED_PASSES if fused else ROTARY_PASSES
    if shape.gated:
        mlp = (FUSED_GATE_PASSES if fused else GATE_PASSES) * size * _mlp_width(shape)
    else:
        mlp = ACTIVATION_PASSES * size * _mlp_width(shape)
    residual = (2 if fused else RESIDUAL_PASSES) * size
    shared = (ATTENTION_COPIES * (q + kv) + rotary * (q + kv)) * size + mlp
    if shape.qk_norm:
        shared += norm * (q + kv)
    return 2 * shape.hidden * (norm + residual) + shared / work.tensor


def _mlp_width(shape: ModelShape) -> int:
    """Values of the MLP's middle that a token fills."""
    experts = shape.experts
    return shape.intermediate if experts is None else experts.active * experts.width + experts.shared_width


def adapter_bytes(work: Training, again: float = 0.0) -> float:
    """Bytes that the adapters' element-wise kernels move for one token both ways, `again` forward passes more."""
    sides = [work.shape.matrices()[target] for target in work.lora_targets if target in work.shape.matrices()]
    ins, outs = (work.shape.layers * sum(side[i] for side in sides) for i in (0, 1))
    if "lm_head" in work.lora_targets:
        ins, outs = ins + work.shape.hidden, outs + work.shape.vocab

    def moved(forward: tuple[float, float], backward: tuple[float, float]) -> float:
        return (1 + again) * (ins * forward[0] + outs * forward[1]) + ins * backward[0] + outs * backward[1]

    half = moved(ADAPTER_FORWARD, ADAPTER_BACKWARD)
    full = moved(ADAPTER_FORWARD_FP32, ADAPTER_BACKWARD_FP32)
    share = 0.5 if work.compiled else 1.0  # scale, sum and dropout in one kernel
    each = {True: full, False: half, None: (full + half) / 2}[work.fp32_adapters]
    return share * each / work.tensor


def _adapters(work: Training) -> int:
    """Adapters of a layer: one for q, k and v where they are one matrix."""
    together = {"q_proj", "k_proj", "v_proj"} & set(work.lora_targets)
    return len(work.lora_targets) - (max(0, len(together) - 1) if work.shape.architecture in ONE_QKV else 0)


def _adapter_products_s(card: Gpu, work: Training, tokens: float) -> float:
    sides = [work.shape.matrices()[target] for target in work.lora_targets if target in work.shape.matrices()]
    pairs = [pair for a, b in sides for pair in ((a, work.lora_r), (work.lora_r, b))]
    return work.shape.layers * products_s(card, tokens, pairs, half=work.half) / work.tensor


def optimizer_s(card: Gpu, work: Training) -> float:
    """Seconds of clipping and AdamW, on this rank's share."""
    mine = work.trainable / work.tensor / (work.ranks if work.sharded else 1)
    weight = 4 if not work.full else work.weight_bytes
    passes = ADAM_PASSES[work.optimizer if work.optimizer in ADAM_PASSES else "unknown"]
    adam = passes / 7 * (3 * weight + 4 * work.state_bytes)  # p twice, g, both moments twice
    host = 0.0
    if work.optimizer == "8bit":
        adam = 3 * weight + 4 * 1.0
        tensors = 2 * _adapters(work) if not work.full else len(work.shape.matrices()) + 2
        host = work.host * tensors * work.shape.layers * HOST_8BIT_S
    elif work.optimizer == "sgd":
        adam = 3.0 * weight
    return max(host, mine * (adam + CLIP_PASSES * weight) / bytes_s(card))


# --- the host, and the other cards


def _host_s(work: Training) -> float:
    """Seconds in which the host starts the kernels of a micro-batch."""
    again = 1.0 if work.checkpointing else 0.0
    if work.compiled:
        layer = HOST_COMPILED_FORWARD_S * (1 + again) + HOST_COMPILED_BACKWARD_S
    else:
        adapters = _adapters(work)
        layer = (HOST_FORWARD_S + adapters * HOST_ADAPTER_FORWARD_S) * (1 + again)
        layer += HOST_BACKWARD_S + adapters * HOST_ADAPTER_BACKWARD_S
        part = HOST_PART_S + sum(name in MLP for name in work.lora_targets) * HOST_PART_ADAPTER_S
        layer += (work.mlp_parts - 1) * part * (1.5 + again)
    if work.four_bit is not None:
        uses = len(work.shape.matrices()) + (work.mlp_parts - 1) * len(_mlp_weights(work))
        layer += uses * HOST_UNPACK_S * (2 + again)
    if work.sharded == "zero3":
        layer += HOST_ZERO3_S * (2 + again)
    elif work.sharded:
        layer += HOST_FSDP_S * (2 + again)
    return work.host * work.shape.layers * layer


def _link(card: Gpu, work: Training) -> float:
    within = card.link_gb_s.value
    if work.gpus <= NODE_GPUS:
        return within
    return min(within, NODE_NVLINK_GB_S if within >= NVLINK_GB_S else NODE_GB_S)


def _exposed(card: Gpu, work: Training, traffic: float, device: float) -> float:
    """Seconds of traffic that computing of `device` seconds does not hide."""
    share = EXPOSED_NVLINK if card.link_gb_s.value >= NVLINK_GB_S else EXPOSED_PCIE
    if work.sharded == "zero3":
        share = max(share, EXPOSED_ZERO3)
    return max(share * traffic, traffic - device)


def _traffic_s(card: Gpu, work: Training, device: float) -> float:
    """Seconds of a micro-batch's traffic that computing does not hide."""
    shape, seconds = work.shape, 0.0
    if work.tensor > 1:  # two sums a layer and pass, each waited for
        size = work.micro_batch * work.length * shape.hidden * 2
        passes = 2 + (1 if work.checkpointing else 0)
        seconds += 2 * shape.layers * passes * all_reduce_s(card, size, work.tensor)
    if work.sharded and work.ranks > 1:
        gathered = all_reduce_s(card, _stored_bytes(work) / work.tensor, work.ranks, _link(card, work)) / 2 * 2
        scattered = 0.0
        if work.full:
            size = work.moved_bytes * work.trainable / work.tensor
            scattered = all_reduce_s(card, size, work.ranks, _link(card, work)) / 2
        seconds += _exposed(card, work, gathered + scattered, device)
    return seconds


def _reduction_s(card: Gpu, work: Training, device: float) -> float:
    """Seconds of the gradients' sum over ranks that hold whole models, beyond the last backward pass."""
    if work.sharded or work.ranks == 1:
        return 0.0
    size = float(work.trainable * (2 if work.full and work.weight_bytes == 2 else 4)) / work.tensor
    seconds = all_reduce_s(card, size, work.ranks, _link(card, work))
    return _exposed(card, work, seconds, device / 2) if work.overlaps else seconds


def _stored_bytes(work: Training) -> float:
    """Bytes of the weights as they travel."""
    shape = work.shape
    if work.four_bit is None:
        return work.moved_bytes * shape.params
    layers = shape.layers * sum(a * b for a, b in shape.matrices().values())
    return 0.53 * layers + 2.0 * (shape.params - layers)
