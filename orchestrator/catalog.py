"""What is known of models? Shapes, exact counts of parameters, any model by its config.json. Cards: gpus.py."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.gpus import GPUS, Figure, Gpu

__all__ = ["GPUS", "LICENCES", "MODELS", "Experts", "Figure", "Gpu", "Latent", "ModelShape", "UnknownModel", "shape_of"]


@dataclass(frozen=True)
class Experts:
    """The MLP of a mixture of experts: `routed` of width `width`, `active` of them a token, a shared one beside them.

    The first `dense_layers` layers have a plain MLP. `router_bias`: a value an expert that steers the routing.
    """

    routed: int
    active: int
    width: int
    shared_width: int = 0
    dense_layers: int = 0
    router_bias: bool = False
    shared_gate: bool = False


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek V2 and V3): keys and values are projected up from one compressed vector."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class ModelShape:
    """What memory and speed depend on. `fixed_params`, `fixed_active_params`: counts that stand in for the sums below.

    `gated`: the MLP has three matrices, not two. `layer_extra`, `model_extra`: parameters a layer, and of the whole
    model, beside matrices, qkv biases and the two plain norms (other biases, further norms, learned positions).
    """

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
    architecture: str = "llama"
    gated: bool = True
    experts: Experts | None = None
    latent: Latent | None = None
    layer_extra: int = 0
    model_extra: int = 0

    @cached_property
    def params(self) -> int:
        """Parameters, exactly: embedding, layers, norms, and the head where it is not tied."""
        if self.fixed_params is not None:
            return self.fixed_params
        head = 0 if self.tied else self.vocab * self.hidden
        return self.vocab * self.hidden + self._all_layers(every_expert=True) + self.hidden + head + self.model_extra

    @cached_property
    def active_params(self) -> int:
        """Parameters of the matrix products a token goes through, the head once, the embedding look-up not."""
        if self.fixed_active_params is not None:
            return self.fixed_active_params
        return self._all_layers(every_expert=False) + self.vocab * self.hidden

    def kv_bytes(self, bytes_per_value: int) -> int:
        """Key and value cache of one token, bytes."""
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        if self.latent is not None:
            return self.layers * (self.latent.kv_rank + self.latent.rope_dim) * bytes_per_value
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    def lora_params(self, r: int, targets: tuple[str, ...]) -> int:
        """Parameters of LoRA adapters on `targets`: r * (in + out) for each matrix. Unknown names count nothing."""
        sides = self._matrices
        layers = self.layers * r * sum(sum(sides[target]) for target in targets if target in sides)
        return layers + (r * (self.hidden + self.vocab) if "lm_head" in targets else 0)

    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of the matrices of a plain layer, by the names that LoRA targets use."""
        return self._matrices

    @cached_property
    def _matrices(self) -> dict[str, tuple[int, int]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        if not self.gated:
            del found["gate_proj"]
        return found

    def _all_layers(self, *, every_expert: bool) -> int:
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        plain = self.layers if self.experts is None else self.experts.dense_layers
        mlps = plain * (3 if self.gated else 2) * self.hidden * self.intermediate
        mlps += (self.layers - plain) * self._expert_params(every_expert)
        return self.layers * (self._attention_params() + norms + self.layer_extra) + mlps

    def _attention_params(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        latent = self.latent
        if latent is None:
            bias = q + 2 * kv if self.qkv_bias else 0
            return self.hidden * q + 2 * self.hidden * kv + q * self.hidden + bias
        wide = self.heads * (latent.nope_dim + latent.rope_dim)
        query = self.hidden * wide
        if latent.q_rank is not None:
            query = self.hidden * latent.q_rank + latent.q_rank + latent.q_rank * wide
        down = self.hidden * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
        up = latent.kv_rank * self.heads * (latent.nope_dim + latent.v_dim)
        return query + down + up + self.heads * latent.v_dim * self.hidden

    def _expert_params(self, every_expert: bool) -> int:
        """Of one layer's experts, all of them or those a token goes through, with the router."""
        experts = self.experts
        if experts is None:
            return 0
        widths = (experts.routed if every_expert else experts.active) * experts.width + experts.shared_width
        router = self.hidden * experts.routed + (experts.routed if experts.router_bias else 0)
        gate = self.hidden if experts.shared_gate else 0
        return (3 if self.gated else 2) * self.hidden * widths + router + gate


def _family(
    names: str | tuple[str, ...],
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    tied: bool = False,
    head_dim: int | None = None,
    architecture: str = "llama",
    qkv_bias: bool = False,
    qk_norm: bool = False,
    experts: Experts | None = None,
    latent: Latent | None = None,
) -> list[ModelShape]:
    """Models of one shape, each under its own name."""
    every = (names,) if isinstance(names, str) else names
    shape = ModelShape(
        every[0],
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim or hidden // heads,
        vocab,
        tied,
        qkv_bias,
        qk_norm,
        architecture=architecture,
        experts=experts,
        latent=latent,
    )
    return [replace(shape, name=name, source=f"config.json of {name}") for name in every]


def _qwen2(names: tuple[str, ...], *sizes: int, tied: bool = False) -> list[ModelShape]:
    hidden, intermediate, layers, heads, kv_heads, vocab = sizes
    return _family(
        names, hidden, intermediate, layers, heads, kv_heads, vocab, tied=tied, architecture="qwen2", qkv_bias=True
    )


def _qwen3(names: tuple[str, ...], *sizes: int, tied: bool = False, experts: Experts | None = None) -> list[ModelShape]:
    hidden, intermediate, layers, heads, kv_heads = sizes
    return _family(
        names,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        151936,
        tied=tied,
        head_dim=128,
        architecture="qwen3" if experts is None else "qwen3_moe",
        qk_norm=True,
        experts=experts,
    )


def _and(name: str, *endings: str) -> tuple[str, ...]:
    return (name, *(name + ending for ending in endings))


_R1 = "deepseek-ai/DeepSeek-R1-Distill-"
_DEEPSEEK_V3 = ("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-R1-0528", "deepseek-ai/DeepSeek-V3")
_ALL: list[ModelShape] = [
    *_qwen2(_and("Qwen/Qwen2-0.5B", "-Instruct"), 896, 4864, 24, 14, 2, 151936, tied=True),
    *_qwen2(_and("Qwen/Qwen2-1.5B", "-Instruct"), 1536, 8960, 28, 12, 2, 151936, tied=True),
    *_qwen2(_and("Qwen/Qwen2-7B", "-Instruct"), 3584, 18944, 28, 28, 4, 152064),
    *_qwen2(_and("Qwen/Qwen2-72B", "-Instruct"), 8192, 29568, 80, 64, 8, 152064),
    *_qwen2(_and("Qwen/Qwen2.5-0.5B", "-Instruct"), 896, 4864, 24, 14, 2, 151936, tied=True),
    *_qwen2(
        (
            *_and("Qwen/Qwen2.5-1.5B", "-Instruct"),
            *_and("Qwen/Qwen2.5-Math-1.5B", "-Instruct"),
            *_and("Qwen/Qwen2.5-Coder-1.5B", "-Instruct"),
        ),
        *(1536, 8960, 28, 12, 2, 151936),
        tied=True,
    ),
    *_qwen2(_and("Qwen/Qwen2.5-3B", "-Instruct"), 2048, 11008, 36, 16, 2, 151936, tied=True),
    *_qwen2(
        (
            *_and("Qwen/Qwen2.5-7B", "-Instruct"),
            *_and("Qwen/Qwen2.5-Math-7B", "-Instruct"),
            *_and("Qwen/Qwen2.5-Coder-7B", "-Instruct"),
            _R1 + "Qwen-7B",
        ),
        *(3584, 18944, 28, 28, 4, 152064),
    ),
    *_qwen2((*_and("Qwen/Qwen2.5-14B", "-Instruct"), _R1 + "Qwen-14B"), 5120, 13824, 48, 40, 8, 152064),
    *_qwen2(
        (*_and("Qwen/Qwen2.5-32B", "-Instruct"), "Qwen/QwQ-32B", _R1 + "Qwen-32B"), 5120, 27648, 64, 40, 8, 152064
    ),
    *_qwen2(_and("Qwen/Qwen2.5-72B", "-Instruct"), 8192, 29568, 80, 64, 8, 152064),
    *_qwen2((_R1 + "Qwen-1.5B",), 1536, 8960, 28, 12, 2, 151936),
    *_qwen3(_and("Qwen/Qwen3-0.6B", "-Base"), 1024, 3072, 28, 16, 8, tied=True),
    *_qwen3(_and("Qwen/Qwen3-1.7B", "-Base"), 2048, 6144, 28, 16, 8, tied=True),
    *_qwen3(_and("Qwen/Qwen3-4B", "-Base"), 2560, 9728, 36, 32, 8, tied=True),
    *_qwen3(_and("Qwen/Qwen3-8B", "-Base"), 4096, 12288, 36, 32, 8),
    *_qwen3(_and("Qwen/Qwen3-14B", "-Base"), 5120, 17408, 40, 40, 8),
    *_qwen3(("Qwen/Qwen3-32B",), 5120, 25600, 64, 64, 8),
    *_qwen3(_and("Qwen/Qwen3-30B-A3B", "-Base"), 2048, 6144, 48, 32, 4, experts=Experts(128, 8, 768)),
    *_qwen3(("Qwen/Qwen3-235B-A22B",), 4096, 12288, 94, 64, 4, experts=Experts(128, 8, 1536)),
    *_family(_R1 + "Llama-8B", 4096, 14336, 32, 32, 8, 128256),
    *_family(_R1 + "Llama-70B", 8192, 28672, 80, 64, 8, 128256),
    *_family(
        _DEEPSEEK_V3,
        *(7168, 18432, 61, 128, 128, 129280),
        head_dim=128,
        architecture="deepseek_v3",
        experts=Experts(256, 8, 2048, shared_width=2048, dense_layers=3, router_bias=True),
        latent=Latent(1536, 512, 128, 64, 128),
    ),
    *_family(("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"), 4096, 11008, 32, 32, 32, 32000),
    *_family(("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"), 5120, 13824, 40, 40, 40, 32000),
    *_family(("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"), 8192, 28672, 80, 64, 8, 32000),
    *_family(
        (*_and("meta-llama/Meta-Llama-3-8B", "-Instruct"), *_and("meta-llama/Llama-3.1-8B", "-Instruct")),
        *(4096, 14336, 32, 32, 8, 128256),
    ),
    *_family(
        (
            *_and("meta-llama/Meta-Llama-3-70B", "-Instruct"),
            *_and("meta-llama/Llama-3.1-70B", "-Instruct"),
            "meta-llama/Llama-3.3-70B-Instruct",
        ),
        *(8192, 28672, 80, 64, 8, 128256),
    ),
    *_family(_and("meta-llama/Llama-3.1-405B", "-Instruct"), 16384, 53248, 126, 128, 8, 128256),
    *_family(_and("meta-llama/Llama-3.2-1B", "-Instruct"), 2048, 8192, 16, 32, 8, 128256, tied=True),
    *_family(_and("meta-llama/Llama-3.2-3B", "-Instruct"), 3072, 8192, 28, 24, 8, 128256, tied=True),
    *_family(
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
        *(2048, 5632, 22, 32, 4, 32000),
    ),
    *_family(
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.2"),
        *(4096, 14336, 32, 32, 8, 32000),
        architecture="mistral",
    ),
    *_family(
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        *(4096, 14336, 32, 32, 8, 32768),
        architecture="mistral",
    ),
    *_family(
        ("mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Nemo-Instruct-2407"),
        *(5120, 14336, 40, 32, 8, 131072),
        head_dim=128,
        architecture="mistral",
    ),
    *_family(
        ("mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Small-24B-Instruct-2501"),
        *(5120, 32768, 40, 32, 8, 131072),
        head_dim=128,
        architecture="mistral",
    ),
    *_family(
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        *(4096, 14336, 32, 32, 8, 32000),
        architecture="mixtral",
        experts=Experts(8, 2, 14336),
    ),
    *_family("microsoft/phi-4", 5120, 17920, 40, 40, 10, 100352, architecture="phi3"),
    *_family("microsoft/Phi-3-mini-4k-instruct", 3072, 8192, 32, 32, 32, 32064, architecture="phi3"),
]
MODELS: dict[str, ModelShape] = {shape.name: shape for shape in _ALL}


def _licences() -> dict[str, str]:
    """Licence of a model by its name, as the front matter of its card on the hub has it; unknown ones are left out."""
    begins = {
        "Qwen/Qwen2": "apache-2.0",
        "Qwen/QwQ-32B": "apache-2.0",
        "deepseek-ai/DeepSeek-R1": "mit",
        "meta-llama/Llama-2-": "llama2",
        "meta-llama/Meta-Llama-3-": "llama3",
        "meta-llama/Llama-3.1-": "llama3.1",
        "meta-llama/Llama-3.2-": "llama3.2",
        "meta-llama/Llama-3.3-": "llama3.3",
        "Qwen/Qwen3-": "apache-2.0",
        "TinyLlama/": "apache-2.0",
        "mistralai/": "apache-2.0",
        "microsoft/": "mit",
        # Smaller or larger siblings with terms of their own.
        "Qwen/Qwen2-72B": "tongyi-qianwen",
        "Qwen/Qwen2.5-3B": "qwen-research",
        "Qwen/Qwen2.5-72B": "qwen",
        # Their cards say mit, and that the Llama that they come from keeps its own licence.
        _R1 + "Llama-8B": "mit, on top of llama3.1",
        _R1 + "Llama-70B": "mit, on top of llama3.3",
    }
    found = {name: max((one for one in begins if name.startswith(one)), key=len, default="") for name in MODELS}
    return {name: begins[begin] for name, begin in found.items() if begin}


LICENCES = _licences()


class UnknownModel(UsageError):
    """A model whose shape is not known."""


def shape_of(model: str) -> ModelShape:
    """Shape of a built-in model by name, of a folder with a config.json, or of one in the hub's cache.

    Raises UnknownModel, which names the file that is missing. Nothing is fetched.
    """
    known = {name.lower(): name for name in MODELS}
    if model.lower() in known:
        return MODELS[known[model.lower()]]
    config = Path(model).expanduser() / "config.json"
    if config.is_file():
        return shape_from_config(model, _read(config))
    if model.startswith((".", "/", "~")):
        raise UnknownModel(
            f"there is no model in {model}", hint="name the folder that holds config.json and the weights"
        )
    cached = cached_config(model)
    if cached is not None:
        return shape_from_config(model, _read(cached))
    short = {name.rpartition("/")[2].lower(): name for name in MODELS}
    close = [known[name] for name in difflib.get_close_matches(model.lower(), known, n=2, cutoff=0.6)]
    close = close or [
        short[n] for n in difflib.get_close_matches(model.rpartition("/")[2].lower(), short, n=2, cutoff=0.6)
    ]
    nearest = f"did you mean {' or '.join(close)}? " if close else ""
    raise UnknownModel(
        f"the shape of model {model!r} is not known",
        hint=f"{nearest}for any other model fetch its config.json into the hub's cache "
        f"(`hf download {model} config.json`), or name a folder that holds it",
    )


def cached_config(model: str, env: Mapping[str, str] | None = None) -> Path | None:
    """config.json of `model` in the Hugging Face cache of this machine, of its main revision or else the newest."""
    values = os.environ if env is None else env
    home = Path(values.get("HF_HOME") or Path(values.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser()
    hub = Path(values.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = hub / f"models--{model.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        revision = ""
    named = folder / "snapshots" / revision / "config.json"
    if revision and named.is_file():
        return named
    others = sorted(folder.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    return others[-1] if others else None


# --- config.json

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "deepseek_v2")
_UNGATED = ("phi", "gpt_neox")
KNOWN_TYPES = (*_LLAMA_LIKE, *_EXPERTS, *_UNGATED)
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")
_MORE_NORMS = {"gemma2": 2, "gemma3_text": 2}  # of the hidden size, a layer, beyond two


def shape_from_config(name: str, config: Mapping[str, object]) -> ModelShape:
    """Shape from the contents of a transformers config.json. Raises UnknownModel."""
    read = _Config(name, config)
    kind = read.kind()
    hidden, layers, heads = (
        read.number("hidden_size"),
        read.number("num_hidden_layers"),
        read.number("num_attention_heads"),
    )
    kv_heads = read.number("num_key_value_heads", heads)
    head_dim = read.number("head_dim", hidden // heads)
    intermediate = read.number("intermediate_size", 4 * hidden)
    gated = kind not in _UNGATED
    norms = _MORE_NORMS.get(kind, 0) * hidden
    biases, final = 0, 0
    if kind in _UNGATED:  # layer norms with a bias, every matrix with a bias; phi has one norm a layer
        biases = heads * head_dim + 2 * kv_heads * head_dim + hidden + intermediate + hidden
        norms = 0 if kind == "phi" else 2 * hidden
        final = hidden + (read.number("vocab_size") if kind == "phi" else 0)
    elif read.flag("attention_bias") and kind in ("llama", "mistral", "qwen3"):
        biases = heads * head_dim + 2 * kv_heads * head_dim + hidden
    if read.flag("mlp_bias"):
        biases += 2 * intermediate + hidden
    return ModelShape(
        name,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        read.number("vocab_size"),
        tied=read.flag("tie_word_embeddings", kind in _TIED_BY_DEFAULT),
        qkv_bias=kind in ("qwen2", "qwen2_moe"),
        qk_norm=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        source=f"{name}/config.json",
        architecture=kind,
        gated=gated,
        experts=_experts(kind, read),
        latent=_latent(kind, read),
        layer_extra=biases + norms,
        model_extra=final,
    )


def _experts(kind: str, read: _Config) -> Experts | None:
    match kind:
        case "mixtral":
            return Experts(
                read.number("num_local_experts"), read.number("num_experts_per_tok"), read.number("intermediate_size")
            )
        case "qwen2_moe" | "qwen3_moe":
            shared = read.number("shared_expert_intermediate_size", 0) if kind == "qwen2_moe" else 0
            return Experts(
                read.number("num_experts"),
                read.number("num_experts_per_tok"),
                read.number("moe_intermediate_size"),
                shared_width=shared,
                shared_gate=shared > 0,
            )
        case "deepseek_v2" | "deepseek_v3":
            width = read.number("moe_intermediate_size")
            return Experts(
                read.number("n_routed_experts"),
                read.number("num_experts_per_tok"),
                width,
                shared_width=width * read.number("n_shared_experts", 0),
                dense_layers=read.number("first_k_dense_replace", 0),
                router_bias=kind == "deepseek_v3",
            )
    return None


def _latent(kind: str, read: _Config) -> Latent | None:
    if kind not in ("deepseek_v2", "deepseek_v3"):
        return None
    return Latent(
        read.number("q_lora_rank", 0) or None,
        read.number("kv_lora_rank"),
        read.number("qk_nope_head_dim"),
        read.number("qk_rope_head_dim"),
        read.number("v_head_dim"),
    )


class _Config:
    """Reads values out of a config.json; what cannot be used raises UnknownModel."""

    def __init__(self, name: str, values: Mapping[str, object]) -> None:
        inner = values.get("text_config")
        self._name = name
        self._values: Mapping[str, object] = inner if isinstance(inner, dict) and "hidden_size" in inner else values

    def kind(self) -> str:
        kind = self._values.get("model_type")
        if not isinstance(kind, str) or kind not in KNOWN_TYPES:
            raise UnknownModel(
                f"{self._name}: models of type {kind!r} are not known", hint=f"known are {', '.join(KNOWN_TYPES)}"
            )
        return kind

    def number(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < (1 if default != 0 else 0):
            raise UnknownModel(
                f"{self._name}: config.json has no usable {key}", hint="fetch config.json of the model again"
            )
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        return default if value is None else bool(value)


def _read(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownModel(f"cannot read {path}: {error}", hint="fetch config.json of the model again") from error
    if not isinstance(value, dict):
        raise UnknownModel(f"{path} does not hold a JSON object", hint="fetch config.json of the model again")
    return value
