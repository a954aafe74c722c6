"""How much GPU memory does writing text take? Weights, key-value cache, work space, and an engine's share. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.catalog import ModelShape
from orchestrator.memory_training import FOUR_BIT, GIB, WEIGHT_BYTES, Step
from tasks import contract

# vLLM takes this share of the card for itself, whatever the model needs: weights, the work space that its profile run
# measured, and blocks of cache in all that is left (EngineArgs.gpu_memory_utilization).
VLLM_SHARE = contract.VLLM_SHARE
VLLM_BATCHED_TOKENS = 8192  # of its profile run, a prefill (max_num_batched_tokens, which is 16,384 on an H100)
VLLM_SEQUENCES = 256  # max_num_seqs: the profile run samples for so many
SCORE_TOKENS = 16384  # tasks.label: SCORE_TOKENS, a batch
SCORE_LOGITS, SCORE_LOGIT_BYTES = 1 << 28, 8.0  # held at once, in fp32 (tasks.losses: FUSED_ELEMENTS), and their copy
VLLM_GRAPHS_GIB = 0.6  # CUDA graphs of its batch sizes, beside the share: assumed


# Bytes a logit of transformers' sampling: in fp32, scaled, sorted with places (4 + 8) and the sort's own work space as
# large, softmax, sum, masks, softmax. Measured on an H200: 67 and 76 (benchmarks/cases/own.jsonl).
SAMPLED_LOGIT_BYTES = 72.0


@dataclass(frozen=True)
class Generation:
    """What decides the memory of one GPU that generates. Lengths in tokens; bytes are of one value."""

    shape: ModelShape
    sequences: int  # in flight
    prompt_len: float
    answer_len: float
    weights: str = "bf16"
    cache_bytes: int = 2
    soft_labels: bool = False
    tensor_parallel: int = 1
    prefill_tokens: int | None = None  # read at once; None: all prompts


def cache_shares(shape: ModelShape, tensor_parallel: int) -> int:
    """GPUs over which an answer's cache is spread: a head of keys and values is never cut, and what heads share (latent
    attention) lies on each (vllm/model_executor/layers/attention: num_kv_heads = max(1, total // tp))."""
    return 1 if shape.latent is not None else min(tensor_parallel, shape.kv_heads)


def weight_bytes(shape: ModelShape, weights: str) -> float:
    """Weights as stored, bytes; of a quantised model embedding and head stay in 2 bytes a value."""
    size = WEIGHT_BYTES[weights]
    if size >= 2:
        return shape.params * size
    whole = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return (shape.params - whole) * size + whole * 2.0


def transformers_generation(job: Generation) -> Step:
    """transformers' generate: at the end of the prompt's pass, and at the last token.

    The prompt's pass holds, beside the cache, the embedded prompt, a layer's input, the stream after attention and the
    normed stream, and the gate, its activation and up for their product; 4-bit weights are unpacked one at a time. A
    token appends to the cache by copying a layer's (DynamicCache: torch.cat).
    """
    shape, size = job.shape, 2.0
    weights = weight_bytes(shape, job.weights) / job.tensor_parallel
    one = shape.kv_bytes(job.cache_bytes) / job.tensor_parallel
    prompt = job.sequences * job.prompt_len
    total = job.sequences * (job.prompt_len + job.answer_len)
    unpacked = shape.intermediate * shape.hidden * size if job.weights in FOUR_BIT else 0.0
    read = prompt if job.prefill_tokens is None else min(prompt, job.prefill_tokens)
    logits = job.sequences * shape.vocab * SAMPLED_LOGIT_BYTES
    moments = {
        "prompt": {
            "weights": weights, "cache": prompt * one, "work": read * layer_work_bytes(shape) + unpacked,
            "logits": job.sequences * shape.vocab * (size + 4.0),
        },
        "last token": {
            "weights": weights, "cache": total * one, "work": total * one / shape.layers + unpacked, "logits": logits,
        },
    }  # fmt: skip
    scaled = {name: {part: size / GIB for part, size in parts.items() if size} for name, parts in moments.items()}
    cached = 0.25 * read * layer_work_bytes(shape) + total * one / shape.layers
    return Step(scaled, cached / GIB, weights / GIB)


def layer_work_bytes(shape: ModelShape, size: float = 2.0) -> float:
    """Widest moment of a layer without gradients, bytes a token: its MLP."""
    inner = (3 if shape.gated else 2) * shape.intermediate
    attention = 2 * shape.heads * shape.head_dim + 3 * shape.heads * shape.head_dim
    return size * (4 * shape.hidden + max(inner, attention))


def sharded_scoring(shape: ModelShape, gpus: int) -> Step:
    """tasks/label.py's pass over finished answers with a part of every weight on each GPU (bf16): embedding and head
    gathered for the whole of a batch, this layer and the next one; hidden states of the batch and of its answers."""
    whole = shape.vocab * shape.hidden * (1 if shape.tied else 2) * 2.0
    layers = shape.params * 2.0 - whole
    parts = {
        "weights": shape.params * 2.0 / gpus,
        "gathered": whole + 2 * layers / shape.layers,
        "work": SCORE_TOKENS * (layer_work_bytes(shape) + 4.0 * shape.hidden),
        "logits": SCORE_LOGITS * SCORE_LOGIT_BYTES,
    }
    scaled = {name: size / GIB for name, size in parts.items()}
    return Step({"scoring": scaled}, 0.25 * scaled["work"], scaled["weights"] + scaled["gathered"])


def vllm_need(job: Generation) -> Step:
    """What must lie in vLLM's share of the card, beside the context, for that many sequences in flight: weights, their
    cache, and what its profile run takes.

    That is a prefill of `prefill_tokens`, and sampling for 256 sequences: logits in fp32 and a sorted copy of them;
    log-probabilities add a log-softmax.
    """
    shape = job.shape
    weights = weight_bytes(shape, job.weights) / job.tensor_parallel
    read = job.prefill_tokens or VLLM_BATCHED_TOKENS
    tokens = job.sequences * (job.prompt_len + job.answer_len)
    parts = {
        "weights": weights,
        "cache": tokens * shape.kv_bytes(job.cache_bytes) / cache_shares(shape, job.tensor_parallel),
        "work": read * layer_work_bytes(shape) / job.tensor_parallel,
        "logits": VLLM_SEQUENCES * shape.vocab * 4.0 * (3 if job.soft_labels else 2),
    }
    scaled = {name: size / GIB for name, size in parts.items() if size}
    return Step({"serving": scaled}, 0.0, (weights + parts["cache"]) / GIB)
