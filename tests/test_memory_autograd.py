"""What autograd really keeps of a transformers layer is what the memory model counts."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.catalog import MODELS, ModelShape
from orchestrator.memory_training import TRANSFORMERS, Training, layer_bytes, training_step

ROOT = Path(__file__).parent.parent
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HIDDEN, INNER, HEADS, KV, VOCAB, BATCH, LENGTH = 64, 176, 4, 2, 128, 2, 96
TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")


def saved_bytes(layers: int, kind: str, *, lora: bool, weights: Any, autocast: bool, attention: str) -> int:
    """Bytes of all tensors that the layers' forward pass saves, each storage once, parameters left out."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HIDDEN // HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=weights, attn_implementation=attention)
    if lora:
        peft = pytest.importorskip("peft")
        how = peft.LoraConfig(r=4, target_modules=list(TARGETS), lora_dropout=0.0, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, how).get_base_model()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    products = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), products:
        model.train().base_model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("kind", "lora", "weights", "autocast", "attention"),
    [
        ("llama", False, "bf16", False, "sdpa"),
        ("llama", False, "fp32", True, "sdpa"),
        ("llama", True, "bf16", False, "sdpa"),
        ("qwen2", True, "bf16", True, "sdpa"),
        ("qwen3", False, "bf16", False, "sdpa"),
        ("llama", False, "bf16", False, "eager"),
    ],
)
def test_a_layer_keeps_what_is_counted(kind: str, lora: bool, weights: str, autocast: bool, attention: str) -> None:
    """Of one layer more; what is left out of the count is a few bytes a token (1 / rms, rounding)."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[weights]
    two, three = (
        saved_bytes(layers, kind, lora=lora, weights=dtype, autocast=autocast, attention=attention) for layers in (2, 3)
    )
    shape = ModelShape(
        "tiny", HIDDEN, INNER, 3, HEADS, KV, HIDDEN // HEADS, VOCAB, True, qk_norm=kind == "qwen3", architecture=kind
    )
    job = Training(
        shape, BATCH, LENGTH, method="lora" if lora else "full", rank=4 if lora else 0, targets=TARGETS if lora else (),
        weights=weights, autocast=autocast, attention=attention, habits=TRANSFORMERS,
    )  # fmt: skip
    layer = sum(layer_bytes(job).values()) * job.tokens
    if weights == "fp32":  # the copies of its weights in bf16 that autocast's products keep
        q, kv = HIDDEN, HIDDEN // HEADS * KV
        layer += 2 * (2 * HIDDEN * q + 2 * HIDDEN * kv + 3 * HIDDEN * INNER)
    assert three - two == pytest.approx(layer, rel=0.03)


@pytest.mark.parametrize(("full", "checkpointing"), [(False, True), (True, False)])
def test_a_step_takes_what_a_trace_of_transformers_own_code_comes_to(full: bool, checkpointing: bool) -> None:
    """Allocated, and reserved by a simulated allocator, on tensors without data; a CPU repeats keys for attention."""
    spec = importlib.util.spec_from_file_location("trace_memory", ROOT / "scripts" / "trace_memory.py")
    assert spec is not None and spec.loader is not None
    trace = importlib.util.module_from_spec(spec)
    sys.modules["trace_memory"] = trace
    spec.loader.exec_module(trace)
    allocated, reserved = trace.step(full=full, batch=2, length=1024, checkpointing=checkpointing, layers=4)
    shape = replace(MODELS["Qwen/Qwen2.5-1.5B"], layers=4)
    job = Training(
        shape, 2, 1024, method="full" if full else "lora", rank=0 if full else 8,
        targets=() if full else ("q_proj", "k_proj", "v_proj"), autocast=not full, checkpointing=checkpointing,
        habits=replace(TRANSFORMERS, repeats_keys=True),
    )  # fmt: skip
    step = training_step(job)
    assert step.allocated_gib == pytest.approx(allocated, rel=0.02)
    assert step.allocated_gib + step.cached_gib == pytest.approx(reserved, rel=0.06)
