"""What is known of GPUs and models? Every number with its source, as data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import UsageError


@dataclass(frozen=True)
class Figure:
    """A number and where it was read."""

    value: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """One card: memory that PyTorch can use of it, speed of dense matrix products, memory bandwidth in 1e9 bytes/s.

    `half_tflops`: in bf16, or fp16 where there is no bf16, with fp32 accumulation, as the vendor states it.
    """

    name: str
    vram_gib: Figure
    half_tflops: Figure
    bandwidth_gb_s: Figure
    bf16: bool = True


_OOM = "total capacity as PyTorch's out-of-memory messages give it for this card"
_GA102 = "NVIDIA GA102 architecture white paper"
_ADA = "NVIDIA Ada architecture white paper"


def _gpu(
    name: str,
    vram_gib: float,
    half_tflops: float,
    bandwidth_gb_s: float,
    sheet: str,
    *,
    vram: str = _OOM,
    bf16: bool = True,
) -> Gpu:
    return Gpu(name, Figure(vram_gib, vram), Figure(half_tflops, sheet), Figure(bandwidth_gb_s, sheet), bf16)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 14.6, 65, 320, "NVIDIA T4 data sheet (fp16)", bf16=False),
        _gpu("V100", 15.7, 125, 900, "NVIDIA V100 SXM2 16 GB data sheet (fp16)", bf16=False),
        _gpu("L4", 22.0, 121, 300, "NVIDIA L4 data sheet (half of the figure with sparsity)"),
        _gpu("A10", 22.0, 125, 600, "NVIDIA A10 data sheet"),
        _gpu("A10G", 22.0, 70, 600, "NVIDIA A10G data sheet (70 dense against 125 for the A10)"),
        _gpu("RTX3090", 23.6, 71, 936, _GA102),
        _gpu("RTX4090", 23.6, 165, 1008, _ADA),
        _gpu("A6000", 47.4, 155, 768, "NVIDIA RTX A6000 data sheet (half of the figure with sparsity)"),
        _gpu("L40S", 44.4, 362, 864, "NVIDIA L40S data sheet (half of the figure with sparsity)"),
        _gpu("A100", 39.4, 312, 1555, "NVIDIA A100 40 GB data sheet"),
        _gpu("A100-80GB", 79.1, 312, 1935, "NVIDIA A100 80 GB PCIe data sheet (SXM: 2039 GB/s)"),
        _gpu("H100", 79.1, 756, 2000, "NVIDIA H100 PCIe data sheet, the slower of the two forms (SXM: 989 and 3350)"),
        _gpu("H200", 139.7, 989, 4800, "NVIDIA H200 data sheet (half of the figure with sparsity)"),
    )
}


@dataclass(frozen=True)
class ModelShape:
    """What memory and speed depend on. `fixed_params` and `active_params` where the layers are not plain dense ones."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    source: str = ""
    fixed_params: int | None = None
    fixed_active_params: int | None = None
    kv_bytes_per_token: int | None = None  # of the whole model, where the cache is compressed
    architecture: str = "llama"  # model_type of transformers' config.json, as far as it decides what is kept in memory
    gated: bool = True  # the MLP has gate, up and down; False: up and down

    @property
    def params(self) -> int:
        """Parameters, exactly: embedding, layers, norms, and the head where it is not tied."""
        if self.fixed_params is not None:
            return self.fixed_params
        head = 0 if self.tied else self.vocab * self.hidden
        return self.vocab * self.hidden + self.layers * self._layer_params() + self.hidden + head

    @property
    def active_params(self) -> int:
        """Parameters of the matrix products a token goes through, the head once, the embedding look-up not."""
        if self.fixed_active_params is not None:
            return self.fixed_active_params
        return self.layers * self._layer_params() + self.vocab * self.hidden

    def kv_bytes(self, bytes_per_value: int) -> int:
        """Key and value cache of one token, bytes."""
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    def lora_params(self, r: int, targets: tuple[str, ...]) -> int:
        """Parameters of LoRA adapters on `targets`: r * (in + out) for each matrix. Unknown names count nothing."""
        head = r * (self.hidden + self.vocab) if "lm_head" in targets else 0
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = {
            "q_proj": self.hidden + q,
            "k_proj": self.hidden + kv,
            "v_proj": self.hidden + kv,
            "o_proj": q + self.hidden,
            "gate_proj": self.hidden + self.intermediate if self.gated else 0,
            "up_proj": self.hidden + self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        return self.layers * r * sum(sides.get(target, 0) for target in targets) + head

    def _layer_params(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * q + 2 * self.hidden * kv + q * self.hidden
        bias = q + 2 * kv if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + bias + (3 if self.gated else 2) * self.hidden * self.intermediate + norms


def _qwen2(
    name: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> ModelShape:
    return ModelShape(
        name,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        hidden // heads,
        vocab,
        tied,
        qkv_bias=True,
        source=f"config.json of {name}",
    )


def _qwen3(name: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool) -> ModelShape:
    return ModelShape(
        name,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        128,
        151936,
        tied,
        qk_norm=True,
        source=f"config.json of {name}",
    )


def _llama(
    name: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> ModelShape:
    return ModelShape(
        name,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        hidden // heads,
        vocab,
        tied,
        source=f"config.json of {name}",
    )


def _with_variants(shape: ModelShape, *names: str) -> list[ModelShape]:
    return [shape, *(replace(shape, name=name, source=f"config.json of {name}") for name in names)]


_QWEN25 = [
    _qwen2("Qwen/Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, True),
    _qwen2("Qwen/Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151936, True),
    _qwen2("Qwen/Qwen2.5-3B", 2048, 11008, 36, 16, 2, 151936, True),
    _qwen2("Qwen/Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064, False),
    _qwen2("Qwen/Qwen2.5-14B", 5120, 13824, 48, 40, 8, 152064, False),
    _qwen2("Qwen/Qwen2.5-32B", 5120, 27648, 64, 40, 8, 152064, False),
    _qwen2("Qwen/Qwen2.5-72B", 8192, 29568, 80, 64, 8, 152064, False),
]
_LLAMA3 = [
    _llama("meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, True),
    _llama("meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, True),
    _llama("meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256),
    _llama("meta-llama/Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256),
]
_ALL: list[ModelShape] = [
    *(variant for shape in _QWEN25 for variant in _with_variants(shape, f"{shape.name}-Instruct")),
    *_with_variants(
        _qwen2("Qwen/Qwen2.5-Math-1.5B", 1536, 8960, 28, 12, 2, 151936, True),
        "Qwen/Qwen2.5-Math-1.5B-Instruct",
        "Qwen/Qwen2.5-Coder-1.5B",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
    *_with_variants(
        _qwen2("Qwen/Qwen2.5-Math-7B", 3584, 18944, 28, 28, 4, 152064, False),
        "Qwen/Qwen2.5-Math-7B-Instruct",
    ),
    _qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1536, 8960, 28, 12, 2, 151936, False),
    _qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 3584, 18944, 28, 28, 4, 152064, False),
    _qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 5120, 13824, 48, 40, 8, 152064, False),
    _qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", 5120, 27648, 64, 40, 8, 152064, False),
    _llama("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 4096, 14336, 32, 32, 8, 128256),
    _llama("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", 8192, 28672, 80, 64, 8, 128256),
    # Mixture of experts with compressed attention: 61 layers, cache of 512 + 64 values a token and layer in bf16.
    ModelShape(
        "deepseek-ai/DeepSeek-R1",
        7168,
        18432,
        61,
        128,
        128,
        128,
        129280,
        False,
        source="model card: 671B, 37B active",
        fixed_params=671_000_000_000,
        fixed_active_params=37_000_000_000,
        kv_bytes_per_token=61 * (512 + 64) * 2,
    ),
    *(
        variant
        for shape in (
            _qwen3("Qwen/Qwen3-0.6B", 1024, 3072, 28, 16, 8, True),
            _qwen3("Qwen/Qwen3-1.7B", 2048, 6144, 28, 16, 8, True),
            _qwen3("Qwen/Qwen3-4B", 2560, 9728, 36, 32, 8, True),
            _qwen3("Qwen/Qwen3-8B", 4096, 12288, 36, 32, 8, False),
            _qwen3("Qwen/Qwen3-14B", 5120, 17408, 40, 40, 8, False),
        )
        for variant in _with_variants(shape, f"{shape.name}-Base")
    ),
    _qwen3("Qwen/Qwen3-32B", 5120, 25600, 64, 64, 8, False),
    *(variant for shape in _LLAMA3 for variant in _with_variants(shape, f"{shape.name}-Instruct")),
    *_with_variants(_LLAMA3[3], "meta-llama/Llama-3.3-70B-Instruct"),
    *_with_variants(
        _llama("mistralai/Mistral-7B-v0.1", 4096, 14336, 32, 32, 8, 32000), "mistralai/Mistral-7B-Instruct-v0.1"
    ),
    *_with_variants(
        _llama("mistralai/Mistral-7B-v0.3", 4096, 14336, 32, 32, 8, 32768), "mistralai/Mistral-7B-Instruct-v0.3"
    ),
]
MODELS: dict[str, ModelShape] = {shape.name: shape for shape in _ALL}


class UnknownModel(UsageError):
    """A model whose shape is not known."""


def shape_of(model: str) -> ModelShape:
    """Shape of a built-in model by name, or of a folder with a config.json. Raises UnknownModel."""
    known = {name.lower(): name for name in MODELS}
    if model.lower() in known:
        return MODELS[known[model.lower()]]
    config = Path(model) / "config.json"
    if config.is_file():
        return shape_from_config(model, _read(config))
    if model.startswith((".", "/", "~")):
        raise UnknownModel(
            f"there is no model in {model}", hint="name the folder that holds config.json and the weights"
        )
    short = {name.rpartition("/")[2].lower(): name for name in MODELS}
    close = [known[name] for name in difflib.get_close_matches(model.lower(), known, n=2, cutoff=0.6)]
    close = close or [
        short[n] for n in difflib.get_close_matches(model.rpartition("/")[2].lower(), short, n=2, cutoff=0.6)
    ]
    nearest = f"did you mean {' or '.join(close)}? " if close else ""
    raise UnknownModel(
        f"the shape of model {model!r} is not known",
        hint=f"{nearest}for any other model name a folder with its config.json",
    )


def shape_from_config(name: str, config: Mapping[str, object]) -> ModelShape:
    """Shape from the contents of a transformers config.json (llama, mistral, qwen2, qwen3). Raises UnknownModel."""
    kind = config.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UnknownModel(
            f"{name}: models of type {kind!r} are not known", hint="known are llama, mistral, qwen2 and qwen3"
        )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise UnknownModel(f"{name}: config.json has no usable {key}", hint="fetch config.json of the model again")
        return value

    heads = number("num_attention_heads")
    return ModelShape(
        name,
        number("hidden_size"),
        number("intermediate_size"),
        number("num_hidden_layers"),
        heads,
        number("num_key_value_heads", heads),
        number("head_dim", number("hidden_size") // heads),
        number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        source=f"{name}/config.json",
    )


def _read(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownModel(f"cannot read {path}: {error}", hint="fetch config.json of the model again") from error
    if not isinstance(value, dict):
        raise UnknownModel(f"{path} does not hold a JSON object", hint="fetch config.json of the model again")
    return value
