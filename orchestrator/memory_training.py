"""How much GPU memory does a training step take? The bytes of every part at each moment that may be the peak. Pure.

Counted as autograd keeps them: for each operation of a decoder layer, what its backward formula needs (derivatives.yaml
of PyTorch), with each framework's own copies on top (`Habits`). Checked by running the frameworks' own code on tensors
without storage and adding up what is alive (docs/estimates.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.catalog import ModelShape

GIB = 2**30

# bitsandbytes: 4 bits a value and one scale for 64 of them, in fp32, or in 8 bits with a second scale (fp32) for 256.
# Source: bitsandbytes.functional.quantize_4bit (blocksize 64, compress_statistics).
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# GPTQ with groups of 128: 4 bits, and a scale (fp16) and a 4 bit zero a group; AWQ likewise.
INT4_BYTES = 0.5 + (2 + 0.5) / 128
# bitsandbytes.optim.AdamW8bit: 8 bits, and one fp32 scale for 256 values, a moment.
EIGHT_BIT_BYTES = 1 + 4 / 256
ZERO3_PARAMETERS = 1e9  # stage3_max_live_parameters and sub_group_size of DeepSpeed's configuration
WEIGHT_BYTES = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1 + (2 + 1) / 128, "fp8": 1.0, "nf4": NF4_BYTES, "fp4": NF4_BYTES,
    "int4": INT4_BYTES, "awq": INT4_BYTES, "gptq": INT4_BYTES,
}  # fmt: skip
FOUR_BIT = ("nf4", "int4", "fp4", "awq", "gptq")
ATTENTION_TARGETS, MLP_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Logits:
    """Bytes a logit that are alive at the loss' forward pass, at its backward pass, and after it, while the layers'
    backward passes run; and of one chunk while its loss is computed: of `rows` tokens (`each`: of every sequence), or
    of one of so many `chunks`, or, with neither, of as many tokens as make it as large as the hidden states."""

    forward: float
    backward: float
    after: float = 0.0
    chunk_bytes: float = 0.0
    rows: int = 0
    each: bool = False
    chunks: int = 0


# PyTorch's cross_entropy on fp32 logits: log_softmax keeps its result (4), nll_loss' backward makes one (4) and
# log_softmax' backward another (4).
HF_LOGITS = Logits(forward=10, backward=12)  # transformers from 4.45: bf16 (2), .float() (4), log_softmax (4)
HF_HELD_LOGITS = Logits(forward=12, backward=16, after=4)  # before, and in a loop that holds `output`: fp32 ones stay
LITGPT_LOGITS = Logits(forward=8, backward=8, after=4, chunk_bytes=8, rows=128, each=True)  # lora.py: a list in fp32
LITGPT_WHOLE_LOGITS = Logits(forward=12, backward=16, after=4)  # full.py: [:-1] of a batch is copied, then split
TORCHTUNE_LOGITS = Logits(forward=8, backward=12)  # output(h).float(), deleted before backward
TORCHTUNE_CHUNKED = Logits(forward=2, backward=2, chunk_bytes=4, chunks=8)  # bf16 list; a compiled chunk: its gradient
# Liger-Kernel's fused_linear_cross_entropy: V / H chunks, of a power of two of rows; gradients where logits were. Its
# gradient of the hidden states is made in the forward pass.
FUSED_LOGITS = Logits(forward=0, backward=0, chunk_bytes=2)


@dataclass(frozen=True)
class Habits:
    """What a framework holds beside what the mathematics needs.

    `norm`: "float" (RMSNorm written out: an fp32 copy of its input is kept), "fused" (the input only).
    `adapter_bytes`: of LoRA's weights; None: as the frozen weights. `cast_inputs`: an adapter in fp32 keeps its own
    copy of its input. `dropout`: LoRA drops its input out and keeps the result and a mask of one byte a value.
    `repeats_keys`: keys and values are copied to the number of query heads before attention.
    `fused_qkv`: one product, whose result stays whole because the values are a view of it.
    `pads_updates`: LoRA's update is copied into a wider tensor, and its source kept (index_copy).
    `keeps_4bit_inputs`: a 4 bit product keeps its input (bitsandbytes up to 0.43: ctx.tensors = (A, B)), not as a
    saved tensor, which the backward pass would free, but as long as its graph lives.
    `foreach`: AdamW's foreach form makes a copy of the second moments in a step; the fused form does not.
    `cached_share`: of `cached_bytes` that stays reserved. With segments that grow (PyTorch's expandable_segments) what
    was freed lies beside what is free, and mostly serves again.
    """

    name: str = "transformers"
    norm: str = "float"
    logits: Logits = HF_LOGITS
    chunked_logits: Logits = FUSED_LOGITS
    adapter_bytes: int | None = 4
    cast_inputs: bool = True
    dropout: bool = False
    repeats_keys: bool = False
    fused_qkv: bool = False
    pads_updates: bool = False
    keeps_4bit_inputs: bool = False
    four_bit_head: bool = False
    unpacks_by_fp16: bool = False  # 4 bit weights come back in fp16 and are cast: two copies (lightning's quantize)
    holds_graph: bool = False  # the last loss lives until the next one is made, with all that custom functions hold
    double_quantised: bool = True
    foreach: bool = False
    state_bytes: float | None = None  # of one moment of AdamW; None: as the trained weights
    fixed_loss_bytes: float = 0.0  # of the loss, whatever the batch
    loads_whole: bool = False  # every GPU loads the whole model and shards it then
    cached_share: float = 1.0
    shards_as_stored: bool = False  # FSDP without a mixed-precision policy: weights and gradients travel in fp32


@dataclass(frozen=True)
class Training:
    """What decides the memory of one GPU's training step. Bytes are of one value; `seq_len` where memory peaks."""

    shape: ModelShape
    batch: int
    seq_len: int
    method: str = "full"  # full, lora, qlora
    rank: int = 0
    targets: tuple[str, ...] = ()
    weights: str = "bf16"  # as stored: fp32, bf16, fp16, nf4, int4
    compute_bytes: int = 2
    autocast: bool = False
    optimizer: str = "adamw"  # adamw, adamw8bit, paged_adamw, sgd
    state_bytes: float | None = None  # of one moment
    master_bytes: float = 0.0  # a further copy of what is trained (DeepSpeed's fp32 master weights)
    accumulation: int = 1
    checkpointing: bool = False
    attention: str = "sdpa"  # sdpa, flash, eager
    chunked_loss: bool = False
    compiled: bool = False
    gpus: int = 1
    parallel: str = "none"  # none, ddp, fsdp, zero1, zero2, zero3
    tensor_parallel: int = 1
    repeated: bool = True  # the micro-batch before was as long
    mlp_parts: int = 1  # a layer's rows go through its MLP in so many parts
    habits: Habits = field(default_factory=Habits)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def four_bit(self) -> bool:
        return self.weights in FOUR_BIT

    @property
    def shards(self) -> int:
        """GPUs that share the weights between them."""
        return self.gpus // self.tensor_parallel if self.parallel in ("fsdp", "zero3") else 1

    @property
    def gradient_shards(self) -> int:
        """GPUs that share the gradients."""
        return self.gpus // self.tensor_parallel if self.parallel in ("fsdp", "zero3", "zero2") else 1

    @property
    def state_shards(self) -> int:
        """GPUs that share the optimizer's states."""
        return self.gpus // self.tensor_parallel if self.parallel in ("fsdp", "zero3", "zero2", "zero1") else 1

    @property
    def adapters(self) -> int:
        return self.shape.lora_params(self.rank, self.targets) // self.tensor_parallel

    @property
    def trainable(self) -> int:
        return self.shape.params // self.tensor_parallel if self.full else self.adapters


@dataclass(frozen=True)
class Step:
    """The allocated memory of a training step, GiB: each part at each moment; the peak is the largest moment's sum."""

    moments: Mapping[str, Mapping[str, float]]
    cached_gib: float  # freed before the peak in sizes that the peak's tensors do not fit: reserved, not allocated
    static_gib: float
    loaded_gib: float = 0.0  # reserved while the model was loaded, before it was sharded

    @property
    def peak(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        return self.moments[self.peak]

    @property
    def allocated_gib(self) -> float:
        return sum(self.parts.values())


def training_step(job: Training) -> Step:
    """What one GPU holds at the moments that compete: at the loss, when the layers' backward passes begin, when the
    first layer's ends them, when the embedding gets its gradient, and in the optimizer's step."""
    static, tokens, layers = static_bytes(job), job.tokens, job.shape.layers
    layer = tokens * sum(layer_bytes(job).values())
    kept = layers * tokens * stream_bytes(job) * job.shape.hidden if job.checkpointing else layers * layer
    grads, work = gradient_bytes(job), backward_bytes(job)
    before = grads if job.accumulation > 1 else 0.0  # of the micro-batches before
    root = root_gradient_bytes(job)
    head_grad = before + max(root, head_gradient_bytes(job)) if root else before or head_gradient_bytes(job)
    at_loss, after = logit_bytes(job)

    moments = {
        "loss": {
            **static, "gradients": head_grad if job.chunked_loss and not job.habits.fixed_loss_bytes else before,
            "activations": kept,
            "head": tokens * head_bytes(job) + dequantised_head_bytes(job), "weight copies": weight_copies_bytes(job),
            "logits": at_loss,
        },
        "backward": {
            **static, "gradients": head_grad, "activations": kept, "layer again": layer if job.checkpointing else 0.0,
            "weight copies": weight_copies_bytes(job), "logits": after, "work": work,
        },
        "first layer": {
            **static, "gradients": grads + root, "activations": kept / layers,
            "layer again": layer if job.checkpointing else 0.0, "logits": after, "work": work,
        },
        "embedding": {
            **static, "gradients": grads + 2 * root, "embedding gradient": embedding_gradient_bytes(job),
            "logits": after, "work": tokens * stream_bytes(job) * job.shape.hidden,
        },
        "step": {**static, "gradients": grads, "optimizer work": optimizer_work_bytes(job)},
    }  # fmt: skip
    if root:  # whole on each GPU, before it is shared out
        moments["loading"] = {"weights": sum(_stored(job))}
    held = held_bytes(job)
    if held:  # the graph before is there until the new one's loss replaces it, and its logits until the new ones do
        rows = job.tokens * job.shape.vocab / job.tensor_parallel
        old, new = job.habits.chunked_logits.after * rows, job.compute_bytes * rows
        moments["next forward"] = {
            **static, "gradients": before, "activations": kept, "inputs of the step before": held,
            "head": tokens * head_bytes(job), "logits": old + new + max(4.0 * rows, dequantised_head_bytes(job)),
        }  # fmt: skip
    scaled = {name: {part: size / GIB for part, size in parts.items() if size} for name, parts in moments.items()}
    return Step(scaled, cached_bytes(job, layer) / GIB, sum(static.values()) / GIB, loaded_bytes(job) / GIB)


def cached_bytes(job: Training, layer: float) -> float:
    """What PyTorch's allocator keeps at the peak since it was freed in sizes that the peak's tensors do not fit, bytes.

    One layer's widest forward moment, the logits before they are cast, about half of a layer that is computed again,
    and a third of the gradients where they are freed between steps. The shares are what a simulation of the allocator
    (best fit, blocks split but never joined across segments) gave on the traces of docs/estimates.md.
    """
    logits = 0.0 if job.chunked_loss else 2.0 * job.tokens * job.shape.vocab / job.tensor_parallel
    again = 0.45 * layer if job.checkpointing else 0.0
    grads = 0.3 * gradient_bytes(job) if job.full and job.accumulation == 1 else 0.0
    return job.habits.cached_share * (forward_bytes(job) + logits + again + grads)


def logit_bytes(job: Training) -> tuple[float, float]:
    """Bytes of logits at the loss, and while the layers' backward passes run."""
    logits = job.habits.chunked_logits if job.chunked_loss else job.habits.logits
    width = job.shape.vocab / job.tensor_parallel
    rows = logits.rows * (job.batch if logits.each else 1)
    if not rows:
        rows = math.ceil(job.tokens / (logits.chunks or math.ceil(job.shape.vocab / job.shape.hidden)))
        rows = rows if logits.chunks else 1 << (rows - 1).bit_length()
    chunk = logits.chunk_bytes * width * min(job.tokens, rows)
    held = max(logits.forward, logits.backward) * job.tokens * width
    return held + chunk + job.habits.fixed_loss_bytes, logits.after * job.tokens * width


# --- what is there all the time


def static_bytes(job: Training) -> dict[str, float]:
    """Weights, adapters and optimizer of one GPU, bytes; sharded where they are."""
    shape, shards = job.shape, job.shards
    frozen, scales, whole = _stored(job)
    parts = {"weights": (frozen + whole) / shards + scales}
    if shards > 1:
        layer_share = (frozen / shape.layers) * 2  # this layer and the next one, gathered ahead
        halved = job.full and job.weights == "fp32" and not job.habits.shards_as_stored
        gathered = 2.0 / WEIGHT_BYTES[job.weights] if halved else 1.0
        parts["gathered"] = (whole + layer_share) * gathered
        if job.parallel == "zero3":
            parts["gathered"] = max(parts["gathered"], 2.0 * min(shape.params, ZERO3_PARAMETERS))
    own = job.adapters * adapter_bytes(job)
    if own and not job.full:
        parts["adapters"] = own / shards
    parts["optimizer"] = optimizer_bytes(job) / job.state_shards
    if job.parallel == "ddp":
        parts["buckets"] = gradient_bytes(job)  # DistributedDataParallel: gradients are copied into its buckets
    return parts


def loaded_bytes(job: Training) -> float:
    """Weights and adapters whole, and the largest unit once more while its parameters are laid end to end.

    PyTorch's allocator keeps that when the shards are all that is left.
    """
    if not job.habits.loads_whole or job.shards == 1:
        return 0.0
    frozen, scales, whole = _stored(job)
    return frozen + scales + 2 * whole + job.adapters * adapter_bytes(job)


def unpacked_bytes(job: Training) -> float:
    """GPTQ's layers unpack a weight with ordinary operations, and autograd keeps it for the product's backward pass: of
    one layer where layers are computed again, else of all."""
    if job.weights not in ("int4", "gptq", "awq"):
        return 0.0
    layers = _stored(job)[0] / 0.5
    return layers * job.compute_bytes / (job.shape.layers if job.checkpointing else 1)


def _stored(job: Training) -> tuple[float, float, float]:
    """Bytes of the layers' weights, of scales that no sharding splits, and of embedding and head."""
    shape, tp = job.shape, job.tensor_parallel
    embedding = shape.vocab * shape.hidden
    head = 0 if shape.tied else embedding
    layers = (shape.params - embedding - head) / tp
    if not job.four_bit:
        size = WEIGHT_BYTES[job.weights]
        return layers * size, 0.0, (embedding + head) * size / tp
    bits = INT4_BYTES if job.weights != "nf4" else NF4_DOUBLE_BYTES if job.habits.double_quantised else NF4_BYTES
    if job.habits.four_bit_head:
        layers, head = layers + head, 0
    other = 4 if job.compute_bytes == 4 else 2
    return layers * 0.5, layers * (bits - 0.5), (embedding + head) * other / tp


def adapter_bytes(job: Training) -> float:
    """Bytes of one value of LoRA's weights."""
    if job.habits.adapter_bytes is not None:
        return job.habits.adapter_bytes
    return 4.0 if job.weights == "fp32" else 2.0


def trained_bytes(job: Training) -> float:
    """Bytes of one trained value, and of its gradient."""
    return WEIGHT_BYTES[job.weights] if job.full else adapter_bytes(job)


def gradient_bytes(job: Training) -> float:
    """Gradients of one GPU when all are there: one for each trained value, in its own dtype."""
    return job.trainable * trained_bytes(job) / job.gradient_shards


def optimizer_bytes(job: Training) -> float:
    """Moments and master weights of everything trained, bytes, before any sharding.

    Source: torch.optim.Adam makes exp_avg and exp_avg_sq like the parameter. Paged ones are in unified memory, which
    PyTorch's allocator does not count.
    """
    size = job.state_bytes or job.habits.state_bytes or trained_bytes(job)
    moments = {"sgd": 0, "sgd_momentum": 1, "lion": 1, "adafactor": 0}.get(job.optimizer, 2)
    if job.optimizer.startswith("paged"):
        moments = 0
    elif "8bit" in job.optimizer:
        size = EIGHT_BIT_BYTES
    return job.trainable * (moments * size + job.master_bytes)


def optimizer_work_bytes(job: Training) -> float:
    """What a step makes beside: the square root of the second moments of all parameters (foreach); gradients of one
    sub-group in fp32 (DeepSpeed's ZeRO-3: sub_group_size); else nothing."""
    own = job.trainable / job.state_shards
    if job.parallel == "zero3" and job.master_bytes:
        return 4.0 * min(own, ZERO3_PARAMETERS)
    if not job.habits.foreach or not job.optimizer.startswith("adam"):
        return 0.0
    return own * (job.state_bytes or trained_bytes(job))


def weight_copies_bytes(job: Training) -> float:
    """Under autocast, weights in fp32 are cast for each product, and the copy is kept for its backward pass."""
    if not job.autocast or job.weights != "fp32" or job.compute_bytes == 4:
        return unpacked_bytes(job)
    embedding = job.shape.vocab * job.shape.hidden
    layers = job.shape.params - embedding * (1 if job.shape.tied else 2)
    head = 0 if job.chunked_loss else embedding
    return 2.0 * ((layers / job.shape.layers if job.checkpointing else layers) + head) / job.tensor_parallel


# --- what the layers keep for their backward passes


def stream_bytes(job: Training) -> float:
    """Bytes of a value of the residual stream: autocast leaves it in the dtype of the embedding."""
    return 4.0 if job.weights == "fp32" else float(job.compute_bytes)


def layer_bytes(job: Training) -> dict[str, float]:
    """What one layer keeps for its backward pass, bytes a token."""
    return {"norms": _norms(job), "attention": _attention(job), "mlp": _mlp(job)}


def _norms(job: Training) -> float:
    """Two norms a layer. LayerNorm and fused RMSNorm keep their input; RMSNorm written out keeps an fp32 copy of it
    and, where its own weight is trained, the normed values."""
    shape, size, stream = job.shape, job.compute_bytes, stream_bytes(job)
    count = 1 if shape.architecture in SHARED_NORM else 2
    if shape.architecture in LAYER_NORM or job.habits.norm == "fused" or job.compiled:
        parallel = shape.architecture in PARALLEL  # both norms read the same input
        return stream * shape.hidden * (1 if parallel else count)
    normed = (4 if stream == 4 else size) if job.full else 0
    qk = (4 + normed) * (shape.heads + shape.kv_heads) * shape.head_dim if shape.qk_norm else 0.0
    return count * (4 + normed) * shape.hidden + qk / job.tensor_parallel


def _attention(job: Training) -> float:
    """Inputs of trained products; q, k, v and the result of attention, and its log-sum-exp (fp32) a head; all scores in
    fp32 and again in the compute type where attention is eager."""
    shape, size, habits, tp = job.shape, job.compute_bytes, job.habits, job.tensor_parallel
    q, kv = shape.heads * shape.head_dim / tp, shape.kv_heads * shape.head_dim / tp
    wide = q if habits.repeats_keys or job.attention == "eager" else kv
    keys = size * wide
    values = size * ((q + 2 * kv) if habits.fused_qkv and wide == kv else wide)
    held = size * q + keys + values + size * q + 4 * shape.heads / tp
    if job.attention == "eager":
        held += shape.heads / tp * job.seq_len * (4 + size)
    inputs = _inputs(job, ATTENTION_TARGETS[:3], shape.hidden) + _inputs(job, ("o_proj",), q, there=True)
    return held + inputs + _pad(job)


def _mlp(job: Training) -> float:
    """gate, up and the activated gate for their product (compiled or fused: the last is made again); without a gate the
    activation's input. The input of the last product where that is trained."""
    shape, size = job.shape, job.compute_bytes
    inner = shape.intermediate / job.tensor_parallel
    fused = job.compiled or job.habits.norm == "fused"
    if shape.gated:
        held = (2 if fused else 3) * size * inner
    else:
        written = shape.architecture in WRITTEN_GELU and not fused and job.habits.name != "litgpt"
        held = (5 if written else 1) * size * inner
    first = MLP_TARGETS[:2] if shape.gated else MLP_TARGETS[1:2]
    return held + _inputs(job, first, shape.hidden) + _inputs(job, ("down_proj",), inner)


def _inputs(job: Training, names: tuple[str, ...], width: float, *, there: bool = False) -> float:
    """Bytes a token of inputs of `width` values that the products `names` keep; `there`: something else has it already.

    A trained weight keeps its input: once for all products that share it, unless each casts its own from fp32.
    """
    habits, size = job.habits, job.compute_bytes
    shared = 0.0 if there else size * width
    if job.full:
        casts = len(names) if job.autocast and job.weights == "fp32" and not there else 1
        return shared * casts
    plain = shared if habits.keeps_4bit_inputs and job.four_bit else 0.0
    adapted = [name for name in names if name in job.targets]
    if not adapted:
        return plain
    modules = 1 if habits.fused_qkv and names == ATTENTION_TARGETS[:3] else len(adapted)
    low = job.rank * size * len(adapted)
    if habits.dropout:
        kept = size if job.autocast or adapter_bytes(job) == 2 else 4
        return plain + modules * (kept + 1) * width + low
    casts = habits.cast_inputs and not (job.four_bit and job.autocast)  # peft/tuners/lora/bnb.py leaves it to autocast
    if adapter_bytes(job) == 4 and size == 2 and casts and not job.compiled:
        return plain + modules * (2 if job.autocast else 4) * width + low
    return max(plain, shared) + low


def _pad(job: Training) -> float:
    """litgpt's LoRA of some of q, k and v copies its update into zeros of the full width and keeps the update."""
    names = [name for name in ATTENTION_TARGETS[:3] if name in job.targets]
    if not job.habits.pads_updates or job.full or len(names) in (0, 3):
        return 0.0
    q, kv = job.shape.heads * job.shape.head_dim, job.shape.kv_heads * job.shape.head_dim
    return job.compute_bytes * float(sum(q if name == "q_proj" else kv for name in names))


# --- what comes and goes


def head_bytes(job: Training) -> float:
    """The last norm's copies, and its result, which the head reads; bytes a token."""
    stream = stream_bytes(job)
    copy = 4 if job.habits.norm == "float" else stream
    head_trained = job.full or "lm_head" in job.targets
    dropped = (job.compute_bytes + 1) if "lm_head" in job.targets and job.habits.dropout else 0
    kept_input = job.compute_bytes if job.habits.keeps_4bit_inputs and job.four_bit and job.habits.four_bit_head else 0
    return job.shape.hidden * (copy + (job.compute_bytes if job.full else 0) + job.compute_bytes * head_trained * 1.0
                               + dropped + kept_input + job.compute_bytes)  # fmt: skip


def head_gradient_bytes(job: Training) -> float:
    """The head's gradient, the first that backward makes; this package's loss makes it itself (fixed_loss_bytes)."""
    if not job.full:
        return 0.0
    made = job.shape.vocab * job.shape.hidden * trained_bytes(job) / job.tensor_parallel
    copies = 2 if job.chunked_loss and not job.habits.fixed_loss_bytes else 1
    return made * copies / (1 if job.habits.shards_as_stored else job.shards)


def embedding_gradient_bytes(job: Training) -> float:
    """A tied embedding's gradient comes twice: from the head and, at the end, as a dense one from the look-up.

    Source: embedding's backward is dense unless `sparse`, and is added to the gradient that is there.
    """
    if not job.full or not job.shape.tied:
        return 0.0
    return job.shape.vocab * job.shape.hidden * trained_bytes(job) / job.tensor_parallel


def root_gradient_bytes(job: Training) -> float:
    """Gradients of embedding and head where those are one group of shards: whole until the last one is there, then
    laid end to end for their sum."""
    if not (job.full and job.shards > 1 and job.habits.shards_as_stored):
        return 0.0
    return _stored(job)[2] / WEIGHT_BYTES[job.weights] * trained_bytes(job)


def dequantised_head_bytes(job: Training) -> float:
    """A head in 4 bits is unpacked for its product, forward and backward."""
    if not (job.four_bit and job.habits.four_bit_head):
        return 0.0
    copies = 2 if job.habits.unpacks_by_fp16 and job.compute_bytes == 2 else 1
    return job.shape.vocab * job.shape.hidden * float(job.compute_bytes) * copies


def held_bytes(job: Training) -> float:
    """Inputs of 4 bit products of the micro-batch before: of q, k and v, of o, of the MLP's first products (the same as
    of q, k and v in a block with one norm) and of its last."""
    if not (job.four_bit and job.habits.keeps_4bit_inputs and job.habits.holds_graph and job.repeated):
        return 0.0
    shape = job.shape
    norms = 1 if shape.architecture in SHARED_NORM else 2
    width = norms * shape.hidden + (shape.heads * shape.head_dim + shape.intermediate) / job.tensor_parallel
    layers = 1 if job.checkpointing else shape.layers
    return float(job.tokens * layers * job.compute_bytes * width)


def backward_bytes(job: Training) -> float:
    """Gradients in flight in one layer's MLP: of the product and its two factors, of one part of the rows at a time,
    and of the stream; a dequantised weight where weights are 4 bit; a layer's gradients where they are shared."""
    shape, size = job.shape, job.compute_bytes
    inner = shape.intermediate / job.tensor_parallel
    wide = (3 if shape.gated else 2) * inner * size / job.mlp_parts
    flight = job.tokens * (wide + 2 * shape.hidden * stream_bytes(job))
    if job.full and job.shards > 1:  # a layer's gradients before they are summed up and shared
        flight += _stored(job)[0] / WEIGHT_BYTES[job.weights] / shape.layers * _shared_bytes(job)
    return flight + (inner * shape.hidden * size if job.four_bit else 0.0)


def _shared_bytes(job: Training) -> float:
    """Bytes of a layer's gradient until it is shared out; as stored: in the compute type and in fp32, laid end to end
    for the sum, and the layer before still on its way (torch/distributed/fsdp/_fully_shard: foreach_reduce)."""
    if not job.habits.shards_as_stored:
        return float(job.compute_bytes)
    return 2 * WEIGHT_BYTES[job.weights] + job.compute_bytes + WEIGHT_BYTES[job.weights]


def forward_bytes(job: Training) -> float:
    """Widest moment of one layer's forward pass beside what is kept: its MLP."""
    shape, size = job.shape, job.compute_bytes
    inner = shape.intermediate / job.tensor_parallel
    wide = (3 if shape.gated else 2) * inner * size / job.mlp_parts + 3 * shape.hidden * stream_bytes(job)
    if not job.full:
        adapted = [name for name in MLP_TARGETS if name in job.targets]
        wide += 2 * inner * size * bool(adapted)
    if not job.checkpointing:
        wide /= 2
    return job.tokens * wide + (inner * shape.hidden * size if job.four_bit else 0.0)


LAYER_NORM = ("phi", "gpt_neox", "falcon", "mpt", "gpt2", "gptj", "opt", "bloom", "gpt_bigcode", "starcoder2")
PARALLEL = ("phi", "gpt_neox", "falcon", "gptj")
SHARED_NORM = ("phi", "falcon", "gptj")
WRITTEN_GELU = ("phi", "gpt2", "gptj", "bloom")  # tanh form in Python: five results are kept

TRANSFORMERS = Habits()
LITGPT = Habits(
    "litgpt", logits=LITGPT_WHOLE_LOGITS, chunked_logits=LITGPT_LOGITS, adapter_bytes=None, cast_inputs=False,
    dropout=True, repeats_keys=True, fused_qkv=True, pads_updates=True, keeps_4bit_inputs=True, four_bit_head=True,
    double_quantised=False, foreach=True, unpacks_by_fp16=True, holds_graph=True,
)  # fmt: skip
TORCHTUNE = Habits(
    "torchtune", logits=TORCHTUNE_LOGITS, chunked_logits=TORCHTUNE_CHUNKED, adapter_bytes=None, cast_inputs=False,
    repeats_keys=True, four_bit_head=False,
)  # fmt: skip
FSDP_QLORA = Habits(
    "fsdp_qlora", logits=HF_HELD_LOGITS, adapter_bytes=None, cast_inputs=False, dropout=True, repeats_keys=True,
    keeps_4bit_inputs=True, double_quantised=False, foreach=True, loads_whole=True,
)  # fmt: skip
# Of seven steps on an H200 with segments that grow, 0.04 to 2.1 GiB were reserved beyond the peak, 0.1 to 0.5 of what
# fixed segments would hold; one of uneven rows 1.0 GiB, and 22.4 with fixed ones (benchmarks/cases/own.jsonl).
OURS = replace(TRANSFORMERS, name="kdcloud", cached_share=0.4)
